"""The toy set: captioned sounds made from formulas, with what sounds in each as its *scene*.

    "bell"               one sound alone; it fills the clip
    "bell>rain"          two in sequence, one in each half of the clip
    "siren+rain"         two together, an event over a texture
    "knocks:3>chirp:up"  after the colon, a detail that the caption names
"""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
from scipy.io import wavfile

from flashaudio import SAMPLE_RATE, InputError

SAMPLES = 32768     # in a clip: 2.048 s or 128 mel frames, enough for two sounds and for a laptop
FADE = 640          # samples (40 ms) at both ends of a sound, also where two meet: no clicks
LOUDNESS = 0.13     # RMS of a sound's loudest 64 ms; peaks of noise, four times that, fit in
CAPTION_BYTES = 60  # the text encoder cuts at 64 tokens of one byte each
VERSION = 4         # increase it when sounds change: then set and judge are made again

PHRASES = {  # every kind of sound, and what captions call it
    "tone": ("a {} tone", "a {} note"),
    "chirp": ("a {} chirp", "a {} whistle"),
    "siren": ("a siren", "a wailing siren"),
    "buzz": ("a buzz", "loud buzzing"),
    "bell": ("a bell", "a ringing bell"),
    "knocks": ("{} knocks", "{} knocks on a door"),
    "hiss": ("a hiss", "hissing steam"),
    "rain": ("rain", "falling rain"),
    "wind": ("wind", "howling wind"),
    "engine": ("an engine", "a running engine")}
DETAILS = {"tone": ("low", "high"), "chirp": ("up", "down"), "knocks": ("2", "3", "4")}
WORDS = {"up": "rising", "down": "falling", "2": "two", "3": "three", "4": "four"}
WORDINGS = {
    "": ("{0}", "the sound of {0}"),
    ">": ("{0} followed by {1}", "{0}, then {1}", "first {0}, next {1}"),
    "+": ("{0} over {1}", "{0} with {1} in the background", "{1} behind {0}")}
UNSEEN_WORDINGS = {  # in the test split only
    "": ("you can hear {0}", "somewhere, {0}", "it is {0}"),
    ">": ("{0} and afterwards {1}", "you can hear {0}, later {1}", "{0} before {1}",
          "it starts with {0}, next comes {1}"),
    "+": ("{0} somewhere above {1}", "you can hear {0} amid {1}", "{0} on top of {1}",
          "both {0} and {1} at once")}
BELL = (  # inharmonic partials: ratio to the strike note, level, decay in seconds
    (1, 1, 0.9), (2, 0.7, 0.7), (2.4, 0.6, 0.6), (3, 0.4, 0.45), (4.5, 0.4, 0.3), (5.4, 0.3, 0.2))
KINDS = tuple(PHRASES)
TEXTURES = ("hiss", "rain", "wind", "engine")  # together means over one of these; two would blur
SEQUENCES = tuple(f"{a}>{b}" for a, b in product(KINDS, KINDS) if a != b)
TOGETHER = tuple(f"{a}+{b}" for a, b in product(KINDS, TEXTURES) if a not in TEXTURES)
SCENES = KINDS + SEQUENCES + TOGETHER  # what the judge chooses between
HELD_OUT = set(SEQUENCES[3::7])  # for the test split only: one sequence in seven


def harmonics(frequency: np.ndarray, weights: list[float]) -> np.ndarray:
    """Weighted sum of the multiples 1, 2, 3, ... of a frequency (samples,) in Hz that may move."""
    turns = np.cumsum(frequency / SAMPLE_RATE, dtype=np.float64) % 1
    phase = 2 * np.pi * turns.astype(np.float32)
    return sum(weight * np.sin((i + 1) * phase) for i, weight in enumerate(weights))


def band_noise(rng: np.random.Generator, samples: int, low: float, high: float) -> np.ndarray:
    """Noise (samples,) between two frequencies in Hz, with soft edges, at unit RMS."""
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE) + 1
    gain = 1 / (1 + np.square(np.square(low / frequency)) + np.square(np.square(frequency / high)))
    noise = np.fft.irfft(gain * np.fft.rfft(rng.standard_normal(samples)), samples)
    return noise / noise.std()


def sound(kind: str, detail: str, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One kind of sound at the times t (samples,) in seconds, at any level.

    To add a kind: a case here, a line in PHRASES. Steady sounds have a few pitches each: a small
    VAE needs far longer to place thin lines just anywhere.
    """
    n = len(t)
    seconds = n / SAMPLE_RATE
    steady = np.ones(n)
    draw = rng.uniform
    match kind:
        case "tone":
            pitches = (1200, 1400, 1600) if detail == "high" else (280, 330, 390)
            return harmonics(steady * rng.choice(pitches), [1, 0.5, 0.25, 0.12])
        case "chirp":
            way = t / seconds if detail == "up" else 1 - t / seconds
            return harmonics(draw(300, 450) * draw(6, 8) ** way, [1, 0.3])
        case "siren":  # about two swings a second over 1.2 octaves
            pitch = draw(750, 900) * 1.5 ** np.sin(2 * np.pi * (draw(1.8, 2.6) * t + draw()))
            return harmonics(pitch, [1, 0.5, 0.3])
        case "buzz":  # brightest at 1 kHz
            pitch = rng.choice((100, 115, 130, 145))
            return harmonics(steady * pitch, [k * np.exp(-k / 8) for k in range(1, 30)])
        case "bell":
            strike = 2 * np.pi * rng.choice((500, 580, 670, 780))
            return sum(level * np.exp(-t / decay) * np.sin(ratio * strike * t)
                       for ratio, level, decay in BELL)
        case "knocks":  # low and woody, spread over the time there is
            gap = draw(0.85, 1) * (seconds - 0.25) / int(detail)
            s = (t - 0.15) % gap  # seconds since the last one
            ring = np.sin(2 * np.pi * draw(280, 420) * s)
            wood = ring + 0.4 * np.exp(-s / 0.01) * band_noise(rng, n, 300, 1500)
            knocking = (t > 0.15) * (t < 0.15 + int(detail) * gap)
            return knocking * np.minimum(1, s / 0.003) * np.exp(-s / 0.03) * wood
        case "hiss":
            return band_noise(rng, n, draw(4500, 5500), 8000)
        case "rain":  # a bed of noise and forty droplets a second
            wav = band_noise(rng, n, 600, draw(3000, 4500))
            s = t[:320]
            for start in rng.integers(0, n - len(s), round(40 * seconds)):
                drop = draw(2, 6) * np.exp(-s / 0.003) * np.sin(2 * np.pi * draw(1500, 5000) * s)
                wav[start:start + len(s)] += drop
            return wav
        case "wind":  # gusts that get brighter as they swell
            gust = 1 + np.sin(2 * np.pi * (draw(0.6, 1) * t + draw()))
            wav = (0.2 + gust) * band_noise(rng, n, 120, 450)
            return wav + 0.5 * gust ** 2 * band_noise(rng, n, 450, 900)
        case "engine":  # one explosion after another
            fire = np.exp(2 * np.cos(2 * np.pi * draw(9, 13) * t) - 2)
            hum = harmonics(steady * draw(55, 85), [1, 1, 0.7, 0.5])
            return fire * hum + 0.1 * band_noise(rng, n, 50, 300)
    raise ValueError(f"unknown sound {kind!r}; known are {', '.join(KINDS)}")


def parse_scene(scene: str) -> tuple[str, list[str], list[str]]:
    """Relation ("", ">" or "+"), kinds, and details ("" where none) of a scene."""
    relation = next((sign for sign in ">+" if sign in scene), "")
    parts = scene.split(relation) if relation else [scene]
    kinds = [part.partition(":")[0] for part in parts]
    return relation, kinds, [part.partition(":")[2] for part in parts]


def scene_index(scene: str) -> int:
    """Place of a scene, its details ignored, in SCENES. Raises ValueError if it is not there."""
    relation, kinds, _ = parse_scene(scene)
    return SCENES.index(relation.join(kinds))


def with_details(scene: str, rng: np.random.Generator) -> str:
    """The scene with details drawn for the kinds that have one."""
    relation, kinds, _ = parse_scene(scene)
    most = 2 if relation == ">" else 3  # half a clip holds two or three knocks, not four
    choices = [DETAILS.get(kind, ("",))[:most] for kind in kinds]
    parts = [f"{kind}:{rng.choice(choice)}" for kind, choice in zip(kinds, choices)]
    return relation.join(part.rstrip(":") for part in parts)


def synthesise(scene: str, rng: np.random.Generator) -> np.ndarray:
    """Waveform (SAMPLES,) float32, peak below 0.9. Raises ValueError for an unknown kind."""
    relation, kinds, details = parse_scene(scene)
    change = SAMPLES // 2 + 64 * int(rng.integers(-12, 13))  # within 50 ms of the middle
    spans = [(0, SAMPLES), (0, SAMPLES)]
    if relation == ">":
        spans = [(0, change + FADE // 2), (change - FADE // 2, SAMPLES)]
    wav = np.zeros(SAMPLES)
    for kind, detail, (start, end) in zip(kinds, details, spans):
        t = np.arange(end - start, dtype=np.float32) / SAMPLE_RATE
        one = sound(kind, detail, t, rng)
        power = np.convolve(one[::8] ** 2, np.full(128, 1 / 128), "same")  # over 64 ms
        ramp = np.minimum(1, np.arange(len(one)) / FADE)
        background = relation == "+" and kind in TEXTURES
        level = rng.uniform(0.2, 0.35) if background else 1
        wav[start:end] += level * LOUDNESS / np.sqrt(power.max()) * ramp * ramp[::-1] * one
    level = rng.uniform(0.7, 1)  # varies by 3 dB
    return (wav * min(level, 0.89 / np.abs(wav).max())).astype(np.float32)


def caption(scene: str, rng: np.random.Generator, unseen: bool = False) -> str:
    """One of the captions of a scene with details; unseen: worded as none in training is."""
    relation, kinds, details = parse_scene(scene)
    phrases = []
    for kind, detail in zip(kinds, details):
        word = WORDS.get(detail, detail)
        phrases.append([phrase.format(word) for phrase in PHRASES[kind]])
    wordings = (UNSEEN_WORDINGS if unseen else WORDINGS)[relation]
    options = [text.format(*chosen) for text, chosen in product(wordings, product(*phrases))]
    return str(rng.choice([text for text in options if len(text.encode()) <= CAPTION_BYTES]))


def write_toy_set(folder: Path | str, train_clips: int = 2400, test_clips: int = 256,
                  validation_clips: int = 128, seed: int = 0) -> Path:
    """Writes folder/wav/*.wav (16 bit) and folder/manifest.csv, unless there; returns the latter.

    2400 training clips are about ten of each pair; 256 test clips give an accuracy to within about
    3 points. The second half of the test split holds sequences absent from training, and a third of
    its captions are worded in ways unseen there. Validation clips are like those of training, with
    no caption of the test split. Raises InputError for a manifest that is not a toy set.
    """
    folder = Path(folder)
    manifest = folder / "manifest.csv"
    settings_file = folder / "toy.json"
    settings = json.dumps([VERSION, train_clips, test_clips, validation_clips, seed])
    if manifest.exists() and not settings_file.exists():
        raise InputError(f"{manifest} is not a toy set and stays as it is: choose another folder")
    if manifest.exists() and settings_file.read_text() == settings:
        return manifest
    manifest.unlink(missing_ok=True)  # from here until the last line the set is incomplete
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    settings_file.write_text(settings)
    taken = set()

    def write_clip(stream: int, split: str, i: int) -> tuple[str, str, str, str]:
        rng = np.random.default_rng((seed, stream, i))  # the judge is trained on stream 2
        held_out = split == "test" and i >= test_clips // 2
        shares = (0, 1, 0) if held_out else (0.25, 0.45, 0.3)  # alone, in sequence, together
        text = ""
        while not text or text in taken:
            scenes = (KINDS, SEQUENCES, TOGETHER)[rng.choice(3, p=shares)]
            pool = [scene for scene in scenes if (scene in HELD_OUT) == held_out]
            scene = with_details(str(rng.choice(pool)), rng)
            text = caption(scene, rng, unseen=split == "test" and rng.random() < 1 / 3)
        path = f"wav/{split}-{i:05d}.wav"
        wav = np.round(synthesise(scene, rng) * 32767).astype(np.int16)
        wavfile.write(folder / path, SAMPLE_RATE, wav)
        return path, text, split, scene

    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # numpy leaves room for other threads
        for stream, split, n in ((0, "train", train_clips), (1, "test", test_clips),
                                 (3, "validation", validation_clips)):
            rows += workers.map(write_clip, [stream] * n, [split] * n, range(n))
            taken = {text for _, text, of, _ in rows if of == "test"}
    with open(f"{manifest}.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("audio_path", "caption", "split", "scene"), *rows])
    os.replace(f"{manifest}.tmp", manifest)
    return manifest
