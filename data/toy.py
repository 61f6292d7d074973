"""The toy set: captioned sounds made from formulas, and a judge that hears which of them a clip holds.

`python data/toy.py --out data/toy` writes data/toy/wav/*.wav and data/toy/manifest.csv; with --judge it also tries the judge.
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
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from scipy.io import wavfile
from scipy.signal import find_peaks, stft
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that flashaudio.py is found from a script in data/
from flashaudio import InputError, griffin_lim, mel_spectrogram

SAMPLE_RATE = 16000   # Hz, the mel front end's
CLIP_SECONDS = 2.048  # long enough for two sounds, short enough for a laptop; 128 mel frames
SAMPLES = 32768       # in a clip
FADE = 640            # samples (40 ms) at both ends of a sound and where one gives way to the next: no clicks
LOUDNESS = 0.13       # RMS of a sound's loudest 64 ms: noise, with peaks at four times that, stays below full scale
CAPTION_BYTES = 60    # the text encoder cuts at 64 tokens of one byte each
JUDGE_BAR = 0.95      # accuracy on real clips below which the judge refuses to judge
VERSION = 4           # increase it when sounds or judge change: what was written before is then made again

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
WORDS = {"up": "rising", "down": "falling", "2": "two", "3": "three", "4": "four"}  # other details are words already
WORDINGS = {
    "": ("{0}", "the sound of {0}"),
    ">": ("{0} followed by {1}", "{0}, then {1}", "first {0}, next {1}"),
    "+": ("{0} over {1}", "{0} with {1} in the background", "{1} behind {0}")}
UNSEEN_WORDINGS = {  # in the test split only
    "": ("you can hear {0}", "somewhere, {0}", "it is {0}"),
    ">": ("{0} and afterwards {1}", "you can hear {0}, later {1}", "{0} before {1}", "it starts with {0}, next comes {1}"),
    "+": ("{0} somewhere above {1}", "you can hear {0} amid {1}", "{0} on top of {1}", "both {0} and {1} at once")}
KINDS = tuple(PHRASES)
TEXTURES = ("hiss", "rain", "wind", "engine")  # "together" is an event over one of these: two textures would blur into one
SEQUENCES = tuple(f"{a}>{b}" for a, b in product(KINDS, KINDS) if a != b)
TOGETHER = tuple(f"{a}+{b}" for a, b in product(KINDS, TEXTURES) if a not in TEXTURES)
SCENES = KINDS + SEQUENCES + TOGETHER  # what the judge chooses between
HELD_OUT = set(SEQUENCES[3::7])  # for the test split only: one sequence in seven, spread over the kinds


# ---- Sounds -----------------------------------------------------------------------------------------------------------------
def harmonics(frequency: np.ndarray, weights: list[float]) -> np.ndarray:
    """Weighted sum of the multiples 1, 2, 3, ... of a frequency (samples,) in Hz that may move."""
    phase = 2 * np.pi * (np.cumsum(frequency / SAMPLE_RATE, dtype=np.float64) % 1).astype(np.float32)
    return sum(weight * np.sin((i + 1) * phase) for i, weight in enumerate(weights))


def band_noise(rng: np.random.Generator, samples: int, low: float, high: float) -> np.ndarray:
    """Noise (samples,) between two frequencies in Hz, with soft edges, at unit RMS."""
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE) + 1
    gain = 1 / (1 + np.square(np.square(low / frequency)) + np.square(np.square(frequency / high)))
    noise = np.fft.irfft(gain * np.fft.rfft(rng.standard_normal(samples)), samples)
    return noise / noise.std()


def sound(kind: str, detail: str, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One kind of sound at the times t (samples,) in seconds, at any level. To add a kind: a case here, a line in PHRASES.

    Steady sounds have a few pitches each: a small VAE needs far longer to place thin lines just anywhere.
    """
    n, seconds, steady, draw, pick = len(t), len(t) / SAMPLE_RATE, np.ones(len(t)), rng.uniform, rng.choice
    match kind:
        case "tone":
            return harmonics(steady * pick((1200, 1400, 1600) if detail == "high" else (280, 330, 390)), [1, 0.5, 0.25, 0.12])
        case "chirp":
            return harmonics(draw(300, 450) * draw(6, 8) ** (t / seconds if detail == "up" else 1 - t / seconds), [1, 0.3])
        case "siren":  # about two swings a second over 1.2 octaves
            return harmonics(draw(750, 900) * 1.5 ** np.sin(2 * np.pi * (draw(1.8, 2.6) * t + draw())), [1, 0.5, 0.3])
        case "buzz":
            return harmonics(steady * pick((100, 115, 130, 145)), [k * np.exp(-k / 8) for k in range(1, 30)])  # brightest at 1 kHz
        case "bell":  # inharmonic partials: ratio to the strike note, level, decay in seconds
            partials = ((1, 1, 0.9), (2, 0.7, 0.7), (2.4, 0.6, 0.6), (3, 0.4, 0.45), (4.5, 0.4, 0.3), (5.4, 0.3, 0.2))
            strike = 2 * np.pi * pick((500, 580, 670, 780))
            return sum(level * np.exp(-t / decay) * np.sin(ratio * strike * t) for ratio, level, decay in partials)
        case "knocks":  # low and woody, spread over the time there is
            gap = draw(0.85, 1) * (seconds - 0.25) / int(detail)
            s = (t - 0.15) % gap  # seconds since the last one
            wood = np.sin(2 * np.pi * draw(280, 420) * s) + 0.4 * np.exp(-s / 0.01) * band_noise(rng, n, 300, 1500)
            return (t > 0.15) * (t < 0.15 + int(detail) * gap) * np.minimum(1, s / 0.003) * np.exp(-s / 0.03) * wood
        case "hiss":
            return band_noise(rng, n, draw(4500, 5500), 8000)
        case "rain":  # a bed of noise and forty droplets a second
            wav, s = band_noise(rng, n, 600, draw(3000, 4500)), t[:320]
            for start in rng.integers(0, n - len(s), round(40 * seconds)):
                wav[start:start + len(s)] += draw(2, 6) * np.exp(-s / 0.003) * np.sin(2 * np.pi * draw(1500, 5000) * s)
            return wav
        case "wind":  # gusts that get brighter as they swell
            gust = 1 + np.sin(2 * np.pi * (draw(0.6, 1) * t + draw()))
            return (0.2 + gust) * band_noise(rng, n, 120, 450) + 0.5 * gust ** 2 * band_noise(rng, n, 450, 900)
        case "engine":  # one explosion after another
            fire = np.exp(2 * np.cos(2 * np.pi * draw(9, 13) * t) - 2)
            return fire * harmonics(steady * draw(55, 85), [1, 1, 0.7, 0.5]) + 0.1 * band_noise(rng, n, 50, 300)
    raise ValueError(f"unknown sound {kind!r}; known are {', '.join(KINDS)}")


# ---- Scenes, captions, the set ----------------------------------------------------------------------------------------------
def parse_scene(scene: str) -> tuple[str, list[str], list[str]]:
    """Relation ("", ">" or "+"), kinds, and details ("" where none) of a scene."""
    relation = ">" if ">" in scene else "+" if "+" in scene else ""
    parts = [part.partition(":") for part in (scene.split(relation) if relation else [scene])]
    return relation, [part[0] for part in parts], [part[2] for part in parts]


def scene_index(scene: str) -> int:
    """Place of a scene, its details ignored, in SCENES. Raises ValueError if it is not there."""
    relation, kinds, _ = parse_scene(scene)
    return SCENES.index(relation.join(kinds))


def with_details(scene: str, rng: np.random.Generator) -> str:
    """The scene with details drawn for the kinds that have one. Half a clip holds two or three knocks, not four."""
    relation, kinds, _ = parse_scene(scene)
    choices = [DETAILS.get(kind, ("",))[:2 if relation == ">" else 3] for kind in kinds]
    return relation.join(f"{kind}:{rng.choice(choice)}".rstrip(":") for kind, choice in zip(kinds, choices))


def synthesise(scene: str, rng: np.random.Generator) -> np.ndarray:
    """Waveform (SAMPLES,) float32, peak below 0.9, of a scene with its details. Raises ValueError for an unknown kind."""
    relation, kinds, details = parse_scene(scene)
    change = SAMPLES // 2 + 64 * int(rng.integers(-12, 13))  # within 50 ms of the middle
    spans = [(0, change + FADE // 2), (change - FADE // 2, SAMPLES)] if relation == ">" else [(0, SAMPLES)] * 2
    wav = np.zeros(SAMPLES)
    for kind, detail, (start, end) in zip(kinds, details, spans):
        one = sound(kind, detail, np.arange(end - start, dtype=np.float32) / SAMPLE_RATE, rng)
        power = np.convolve(one[::8] ** 2, np.full(128, 1 / 128), "same")  # over 64 ms
        ramp = np.minimum(1, np.arange(len(one)) / FADE)
        level = rng.uniform(0.2, 0.35) if relation == "+" and kind in TEXTURES else 1  # a texture stays in the background
        wav[start:end] += level * LOUDNESS / np.sqrt(power.max()) * ramp * ramp[::-1] * one
    return (wav * min(rng.uniform(0.7, 1), 0.89 / np.abs(wav).max())).astype(np.float32)  # the level varies by 3 dB


def caption(scene: str, rng: np.random.Generator, unseen: bool = False) -> str:
    """One of the captions of a scene with details, at most CAPTION_BYTES long; unseen takes wordings kept from training."""
    relation, kinds, details = parse_scene(scene)
    phrases = [[p.format(WORDS.get(detail, detail)) for p in PHRASES[kind]] for kind, detail in zip(kinds, details)]
    wordings = (UNSEEN_WORDINGS if unseen else WORDINGS)[relation]
    options = [wording.format(*chosen) for wording in wordings for chosen in product(*phrases)]
    return str(rng.choice([text for text in options if len(text.encode()) <= CAPTION_BYTES]))


def write_toy_set(folder: Path | str, train_clips: int = 2400, test_clips: int = 256, seed: int = 0) -> Path:
    """Writes folder/wav/*.wav (16 bit) and folder/manifest.csv and returns the latter; if it is there already, does nothing.

    2400 training clips are about ten of each pair; 256 test clips give an accuracy to within about 3 points. The second half
    of the test split holds sequences absent from training, and a third of the test captions are worded in ways unseen in training.
    Raises InputError for negative numbers or a manifest that is not a toy set, OSError where it cannot write.
    """
    folder = Path(folder)
    manifest, settings_file = folder / "manifest.csv", folder / "toy.json"
    settings = json.dumps({"version": VERSION, "train_clips": train_clips, "test_clips": test_clips, "seed": seed})
    if min(train_clips, test_clips, seed) < 0:
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
        pool = [s for s in (KINDS, SEQUENCES, TOGETHER)[rng.choice(3, p=shares)] if (s in HELD_OUT) == held_out]
        scene = with_details(str(rng.choice(pool)), rng)
        text = caption(scene, rng, unseen=split == "test" and rng.random() < 1 / 3)
        path = f"wav/{split}-{i:05d}.wav"
        wavfile.write(folder / path, SAMPLE_RATE, np.round(synthesise(scene, rng) * 32767).astype(np.int16))
        return path, text, split, scene

    clips = [(0, "train", i) for i in range(train_clips)] + [(1, "test", i) for i in range(test_clips)]
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # numpy leaves other threads room while it computes
        rows = list(workers.map(write_clip, *zip(*clips)))
    with open(folder / "manifest.csv.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("audio_path", "caption", "split", "scene"), *rows])
    os.replace(folder / "manifest.csv.tmp", manifest)
    return manifest


# ---- The judge --------------------------------------------------------------------------------------------------------------
class Judge(nn.Module):
    """Hears each kind in each half of a clip; a scene scores the sum of what it holds, so pairs are known by their parts."""
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
        hidden = self.layers(mel.clamp(min=-3) + 1)  # below -3, 70 dB under the loudest, nothing is heard
        halves = nn.functional.adaptive_max_pool1d(hidden, 2).transpose(1, 2)  # (B, 2, 32); the maximum hears one knock
        return halves.flatten(1), (self.head(halves).flatten(1) @ self.patterns).log_softmax(1)

    @torch.no_grad()
    def judge(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (N, samples) → embedding (N, 64) for the Fréchet distance, log-probabilities (N, scenes)."""
        embedding, log_posterior = zip(*[self(mel_spectrogram(part)) for part in wav.to(self.patterns.device).split(256)])
        return torch.cat(embedding), torch.cat(log_posterior)


def spoiled(mel: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mels (B, 80, frames) at another level, noisier and less sharp, as a model and a vocoder would leave them."""
    noise, floor = torch.rand(2, generator=generator).tolist()
    bands, frames = [(1, 1), (1, 5), (3, 1), (3, 5)][torch.randint(4, (), generator=generator)]  # blurred over so many
    level = torch.rand(len(mel), 1, 1, generator=generator) - 0.5
    mel = mel + 0.4 * level + 0.2 * noise * torch.randn(mel.shape, generator=generator)  # level within ±4 dB
    mel = nn.functional.avg_pool2d(mel, (bands, frames), stride=1, padding=(bands // 2, frames // 2), count_include_pad=False)
    return mel.clamp(min=-3 + 1.5 * floor)


@torch.enable_grad()
def train_judge(path: Path | str | None = None, seed: int = 0, steps: int = 500, progress: bool = True) -> Judge:
    """A judge trained on 12 fresh clips of each scene (by 500 steps it has converged), or read from `path` if trained alike."""
    settings = {"version": str(VERSION), "seed": str(seed), "steps": str(steps)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    if path is not None and Path(path).exists():
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata() == settings:
                judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
                return judge
    rngs = [np.random.default_rng((seed, 2, i)) for i in range(12 * len(SCENES))]  # the splits are streams 0 and 1
    target = torch.arange(len(rngs)) % len(SCENES)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        wavs = list(workers.map(lambda i, rng: synthesise(with_details(SCENES[i], rng), rng), target.tolist(), rngs))
    mels = torch.cat([mel_spectrogram(part) for part in torch.from_numpy(np.stack(wavs)).split(256)])
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(seed)
    torch.set_num_threads(1)  # so small a network gains nothing from two, and crawls when another program holds one of them
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in trange(steps, desc="judge", disable=not progress):
        batch = torch.randint(len(mels), (64,), generator=generator)
        loss = nn.functional.nll_loss(judge(spoiled(mels[batch], generator))[1], target[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
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
        raise InputError(f"the judge hears only {accuracy:.1%} of real clips right, below {bar:.0%}: train it longer")
    return accuracy


def measure(wav: np.ndarray, scene: str) -> dict[str, bool]:
    """Whether what the caption of a scene names is there in a waveform (SAMPLES,), by signal processing, without the judge.

    "pitch": a tone is low or high. "direction": a chirp rises or falls. "count": so many knocks (not over a texture).
    "order": in a sequence of a tonal and a noisy sound, the tonal half is the right one. Absent where it does not apply.
    """
    relation, kinds, details = parse_scene(scene)
    parts = [wav[:14900], wav[17600:]] if relation == ">" else [wav, wav]  # 0 to 0.93 s, 1.10 to 2.05 s: clear of the change
    found, tonality = {}, []
    for kind, detail, part in zip(kinds, details, parts):
        frequency, _, spectrum = stft(part, SAMPLE_RATE, nperseg=1024)
        power = np.abs(spectrum) ** 2  # (bins, frames)
        peak = frequency[16:][power[16:].argmax(0)]  # Hz, in each frame; from 250 Hz, above an engine
        tonality.append(np.median(power.max(0) / (power.mean(0) + 1e-12)))  # high for a few lines, low for noise
        if kind == "tone":
            found["pitch"] = detail == ("high" if np.median(peak) > 700 else "low")
        if kind == "chirp":
            found["direction"] = detail == ("up" if np.polyfit(np.arange(len(peak)), peak, 1)[0] > 0 else "down")
        if kind == "knocks" and relation != "+":
            envelope = np.sqrt(np.convolve(part ** 2, np.hanning(800), "same"))  # over 50 ms
            found["count"] = detail == str(len(find_peaks(envelope, prominence=0.3 * envelope.max())[0]))
    noisy = [kind in ("hiss", "rain") for kind in kinds]
    if relation == ">" and any(noisy) and {"tone", "chirp", "siren", "bell"} & set(kinds):
        found["order"] = bool((tonality[0] < tonality[1]) == noisy[0])
    return {name: right and bool(np.abs(wav).max() > 0.01) for name, right in found.items()}  # silence is never right


def report(judge: Judge, manifest: Path) -> None:
    """Prints how well the judge and the measurements do on the test split, as it is and after mel → Griffin-Lim."""
    with open(manifest, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    scenes = [row["scene"] for row in rows]
    real = torch.from_numpy(np.stack([wavfile.read(manifest.parent / row["audio_path"])[1] for row in rows]) / 32768).float()
    vocoded = torch.cat([griffin_lim(mel_spectrogram(part)) for part in real.split(64)])
    for name, wav, bar in (("real", real, JUDGE_BAR), ("after mel and Griffin-Lim", vocoded, 0)):
        print(f"{name}: the judge hears {check_judge(judge, wav, scenes, bar):.1%} of {len(wav)} test clips right")
        found = [measure(clip, scene) for clip, scene in zip(wav.numpy(), scenes)]
        for key in ("pitch", "direction", "count", "order"):
            right = [one[key] for one in found if key in one]
            print(f"    {key} measured right in {sum(right)} of the {len(right)} clips whose caption names it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the toy set, and with --judge train its judge and try it.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train_clips", type=int, default=2400, help="about ten of each pair")
    parser.add_argument("--test_clips", type=int, default=256, help="gives an accuracy to within about 3 points")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--judge", action="store_true", help="also train the judge (under a minute) and test it")
    args = parser.parse_args()
    try:
        toy_manifest = write_toy_set(args.out, args.train_clips, args.test_clips, args.seed)
        print(f"{toy_manifest}: {args.train_clips} training and {args.test_clips} test clips of {CLIP_SECONDS} s")
        if args.judge:
            report(train_judge(args.out / "judge.safetensors"), toy_manifest)
    except (InputError, OSError) as error:
        parser.exit(2, f"toy.py: {error}\n")
