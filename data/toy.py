"""The toy set: captioned sounds made from formulas, and a judge that hears what a clip holds.

`python -m data.toy --out toy_set` writes toy_set/wav/*.wav and toy_set/manifest.csv. The judge is
kept in judge.safetensors, made by `python -c "from data import toy; toy.train_judge(toy.JUDGE)"`.
A *scene* says what sounds in a clip, as a short string:

    "bell"               one sound alone; it fills the clip
    "bell>rain"          two in sequence, one in each half of the clip
    "siren+rain"         two together, an event over a texture
    "knocks:3>chirp:up"  after the colon, a detail that the caption names and `measure` can check
"""

import argparse
import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from scipy.signal import find_peaks, stft
from torch import Tensor, nn
from tqdm import trange

from flashaudio import SAMPLE_RATE, InputError, mel_spectrogram
from runs.cache import one_thread

SAMPLES = 32768     # in a clip: 2.048 s or 128 mel frames, enough for two sounds and for a laptop
FADE = 640          # samples (40 ms) at both ends of a sound, also where two meet: no clicks
LOUDNESS = 0.13     # RMS of a sound's loudest 64 ms; peaks of noise, four times that, fit in
CAPTION_BYTES = 60  # the text encoder cuts at 64 tokens of one byte each
JUDGE_BAR = 0.95    # accuracy on real clips below which the judge refuses to judge
VERSION = 4         # increase it when sounds or judge change: then both are made again
JUDGE = Path(__file__).with_name("judge.safetensors")

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


# ---- Sounds -------------------------------------------------------------------------------------

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


# ---- Scenes, captions, the set ------------------------------------------------------------------

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
                  seed: int = 0) -> Path:
    """Writes folder/wav/*.wav (16 bit) and folder/manifest.csv, unless there; returns the latter.

    2400 training clips are about ten of each pair; 256 test clips give an accuracy to within about
    3 points. The second half of the test split holds sequences absent from training, and a third of
    the test captions are worded in ways unseen in training. Raises InputError for negative numbers
    or a manifest that is not a toy set, OSError where it cannot write.
    """
    folder = Path(folder)
    manifest = folder / "manifest.csv"
    settings_file = folder / "toy.json"
    numbers = {"train_clips": train_clips, "test_clips": test_clips, "seed": seed}
    settings = json.dumps({"version": VERSION, **numbers})
    if min(numbers.values()) < 0:
        raise InputError("the toy set's train_clips, test_clips and seed must not be negative")
    if manifest.exists() and not settings_file.exists():
        raise InputError(f"{manifest} is not a toy set and stays as it is: choose another folder")
    if manifest.exists() and settings_file.read_text() == settings:
        return manifest
    manifest.unlink(missing_ok=True)  # from here until the last line the set is incomplete
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    settings_file.write_text(settings)

    def write_clip(stream: int, split: str, i: int) -> tuple[str, str, str, str]:
        rng = np.random.default_rng((seed, stream, i))
        held_out = split == "test" and i >= test_clips // 2
        shares = (0, 1, 0) if held_out else (0.25, 0.45, 0.3)  # alone, in sequence, together
        scenes = (KINDS, SEQUENCES, TOGETHER)[rng.choice(3, p=shares)]
        pool = [scene for scene in scenes if (scene in HELD_OUT) == held_out]
        scene = with_details(str(rng.choice(pool)), rng)
        text = caption(scene, rng, unseen=split == "test" and rng.random() < 1 / 3)
        path = f"wav/{split}-{i:05d}.wav"
        wav = np.round(synthesise(scene, rng) * 32767).astype(np.int16)
        wavfile.write(folder / path, SAMPLE_RATE, wav)
        return path, text, split, scene

    clips = [(0, "train", i) for i in range(train_clips)]
    clips += [(1, "test", i) for i in range(test_clips)]
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # numpy leaves room for other threads
        rows = list(workers.map(write_clip, *zip(*clips)))
    with open(f"{manifest}.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("audio_path", "caption", "split", "scene"), *rows])
    os.replace(f"{manifest}.tmp", manifest)
    return manifest


# ---- The judge ----------------------------------------------------------------------------------

class Judge(nn.Module):
    """Hears each kind in each half of a clip; a scene scores the sum of the kinds it holds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(  # (B, 80, frames) → (B, 32, frames / 8)
            nn.Conv1d(80, 64, 3, stride=2, padding=1), nn.GroupNorm(1, 64), nn.GELU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.GroupNorm(1, 64), nn.GELU(),
            nn.Conv1d(64, 32, 3, stride=2, padding=1), nn.GroupNorm(1, 32), nn.GELU())
        self.head = nn.Linear(32, len(KINDS))
        patterns = torch.zeros(2, len(KINDS), len(SCENES))  # 1 where a scene has a kind in a half
        for i, (relation, kinds, _) in enumerate(map(parse_scene, SCENES)):
            for half, kind in product((0, 1), kinds):
                patterns[half, KINDS.index(kind), i] = relation != ">" or kind == kinds[half]
        self.register_buffer("patterns", patterns.flatten(0, 1), persistent=False)  # (2K, scenes)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel (B, 80, frames) → embedding (B, 64), log-probabilities (B, scenes)."""
        hidden = self.layers(mel.clamp(min=-3) + 1)  # not what is 70 dB below the loudest
        halves = F.adaptive_max_pool1d(hidden, 2).transpose(1, 2)  # (B, 2, 32); hears one knock
        scores = self.head(halves).flatten(1) @ self.patterns
        return halves.flatten(1), scores.log_softmax(1)

    @torch.no_grad()
    def judge(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (N, samples) → embedding (N, 64), log-probabilities (N, scenes)."""
        parts = wav.to(self.patterns.device).split(256)
        embedding, log_posterior = zip(*[self(mel_spectrogram(part)) for part in parts])
        return torch.cat(embedding), torch.cat(log_posterior)


def spoiled(mel: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mels (B, 80, frames) as a model and a vocoder leave them: other levels, noise, blur."""
    noise, floor = torch.rand(2, generator=generator).tolist()
    bands, frames = [(1, 1), (1, 5), (3, 1), (3, 5)][torch.randint(4, (), generator=generator)]
    level = torch.rand(len(mel), 1, 1, generator=generator) - 0.5
    mel = mel + 0.4 * level  # within ±4 dB
    mel = mel + 0.2 * noise * torch.randn(mel.shape, generator=generator)
    padding = (bands // 2, frames // 2)
    mel = F.avg_pool2d(mel, (bands, frames), 1, padding, count_include_pad=False)
    return mel.clamp(min=-3 + 1.5 * floor)


@torch.enable_grad()
def train_judge(path: Path | str | None = None, seed: int = 0, steps: int = 500,
                progress: bool = True) -> Judge:
    """A judge trained on 12 fresh clips of each scene, or read from `path` if trained alike."""
    settings = {"version": str(VERSION), "seed": str(seed), "steps": str(steps)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    if path is not None and Path(path).exists():
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata() == settings:
                judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
                return judge
    target = torch.arange(12 * len(SCENES)) % len(SCENES)

    def clip(i: int) -> np.ndarray:
        rng = np.random.default_rng((seed, 2, i))  # the splits are streams 0 and 1
        return synthesise(with_details(SCENES[target[i]], rng), rng)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        wav = torch.from_numpy(np.stack(list(workers.map(clip, range(len(target))))))
    mels = torch.cat([mel_spectrogram(part) for part in wav.split(256)])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with one_thread():  # so small a network gains nothing from two
        for _ in trange(steps, desc="judge", disable=not progress):
            batch = torch.randint(len(mels), (64,), generator=generator)
            _, log_posterior = judge(spoiled(mels[batch], generator))
            loss = F.nll_loss(log_posterior, target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(judge.state_dict(), f"{path}.tmp", settings)
        os.replace(f"{path}.tmp", path)
    return judge


def check_judge(judge: Judge, wav: Tensor, scenes: list[str], bar: float = JUDGE_BAR) -> float:
    """Accuracy on real clips (N, samples) with known scenes. Raises InputError below the bar."""
    target = torch.tensor([scene_index(scene) for scene in scenes])
    accuracy = (judge.judge(wav)[1].argmax(1).cpu() == target).float().mean().item()
    if accuracy < bar:
        raise InputError(f"the judge hears {accuracy:.1%} of real clips right, below {bar:.0%}")
    return accuracy


def measure(wav: np.ndarray, scene: str) -> dict[str, bool]:
    """Whether a waveform (SAMPLES,) holds what the scene's caption names, by signal processing.

    "pitch": a tone is low or high. "direction": a chirp rises or falls. "count": so many knocks
    (not over a texture). "order": in a sequence of a tonal and a noisy sound, the tonal half is the
    right one. Absent where it does not apply.
    """
    relation, kinds, details = parse_scene(scene)
    parts = [wav, wav]
    if relation == ">":
        parts = [wav[:14900], wav[17600:]]  # 0 to 0.93 s, 1.10 to 2.05 s: clear of the change
    found, tonality = {}, []
    for kind, detail, part in zip(kinds, details, parts):
        frequency, _, spectrum = stft(part, SAMPLE_RATE, nperseg=1024)
        power = np.abs(spectrum) ** 2  # (bins, frames)
        peak = frequency[16:][power[16:].argmax(0)]  # Hz, in each frame, from 250: above an engine
        tonality.append(np.median(power.max(0) / (power.mean(0) + 1e-12)))  # high for a few lines
        if kind == "tone":
            found["pitch"] = detail == ("high" if np.median(peak) > 700 else "low")
        if kind == "chirp":
            slope = np.polyfit(np.arange(len(peak)), peak, 1)[0]
            found["direction"] = detail == ("up" if slope > 0 else "down")
        if kind == "knocks" and relation != "+":
            envelope = np.sqrt(np.convolve(part ** 2, np.hanning(800), "same"))  # over 50 ms
            peaks, _ = find_peaks(envelope, prominence=0.3 * envelope.max())
            found["count"] = detail == str(len(peaks))
    noisy = [kind in ("hiss", "rain") for kind in kinds]
    if relation == ">" and any(noisy) and {"tone", "chirp", "siren", "bell"} & set(kinds):
        found["order"] = bool((tonality[0] < tonality[1]) == noisy[0])
    audible = bool(np.abs(wav).max() > 0.01)  # silence is never right
    return {name: right and audible for name, right in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the toy set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train_clips", type=int, default=2400, help="about ten of each pair")
    parser.add_argument("--test_clips", type=int, default=256, help="accuracy to about 3 points")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    args = parser.parse_args()
    try:
        written = write_toy_set(args.out, args.train_clips, args.test_clips, args.seed)
    except (InputError, OSError) as error:
        parser.exit(2, f"data.toy: {error}\n")
    print(f"{written}: {args.train_clips} training and {args.test_clips} test clips")
