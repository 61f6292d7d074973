"""The judge of the toy set: a small classifier of scenes, and signal processing for details."""

from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.signal import find_peaks, stft
from torch import Tensor, nn
from tqdm import trange

from data.toy import KINDS, SCENES, VERSION, parse_scene, synthesise, with_details
from flashaudio import SAMPLE_RATE, mel_spectrogram

JUDGE = Path(__file__).with_name(f"judge-{VERSION}.safetensors")


class Judge(nn.Module):
    """Hears each kind in each half of a clip; a scene scores the sum of the kinds it holds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(                            # (B, 80, T) -> (B, 32, T / 8)
            nn.Conv1d(80, 64, 3, stride=2, padding=1), nn.GroupNorm(1, 64), nn.GELU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.GroupNorm(1, 64), nn.GELU(),
            nn.Conv1d(64, 32, 3, stride=2, padding=1), nn.GroupNorm(1, 32), nn.GELU())
        self.head = nn.Linear(32, len(KINDS))
        patterns = torch.zeros(2, len(KINDS), len(SCENES))      # 1: it has the kind in that half
        for i, (relation, kinds, _) in enumerate(map(parse_scene, SCENES)):
            for half, kind in product((0, 1), kinds):
                patterns[half, KINDS.index(kind), i] = relation != ">" or kind == kinds[half]
        self.register_buffer("patterns", patterns.flatten(0, 1), persistent=False)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel (B, 80, T) -> embedding (B, 64), log-probabilities (B, scenes)."""
        hidden = self.layers(mel.clamp(min=-3) + 1)     # not what is 70 dB below the loudest
        halves = F.adaptive_max_pool1d(hidden, 2).transpose(1, 2)   # (B, 2, 32); hears one knock
        scores = self.head(halves).flatten(1) @ self.patterns
        return halves.flatten(1), scores.log_softmax(1)


def spoiled(mel: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mels (B, 80, T) as a model and a vocoder leave them: other levels, noise, blur."""
    noise, floor = torch.rand(2, generator=generator).tolist()
    bands, frames = [(1, 1), (1, 5), (3, 1), (3, 5)][torch.randint(4, (), generator=generator)]
    level = torch.rand(len(mel), 1, 1, generator=generator) - 0.5
    mel = mel + 0.4 * level                                     # within ±4 dB
    mel = mel + 0.2 * noise * torch.randn(mel.shape, generator=generator)
    padding = (bands // 2, frames // 2)
    mel = F.avg_pool2d(mel, (bands, frames), 1, padding, count_include_pad=False)
    return mel.clamp(min=-3 + 1.5 * floor)


@torch.enable_grad()
def train_judge(path: Path = JUDGE, steps: int = 500) -> Judge:
    """The judge kept at `path`, or else one trained in half a minute on 12 clips of each scene."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge()
    if path.exists():
        safetensors.torch.load_model(judge, path)
        return judge
    mels = []
    target = torch.arange(12 * len(SCENES)) % len(SCENES)
    for i in trange(len(target), desc="judge: clips", disable=None):
        rng = np.random.default_rng((0, 2, i))                  # the splits are streams 0 and 1
        wav = synthesise(with_details(SCENES[target[i]], rng), rng)
        mels.append(mel_spectrogram(torch.from_numpy(wav)[None]))
    mels = torch.cat(mels)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in trange(steps, desc="judge: steps", disable=None):
        batch = torch.randint(len(mels), (64,), generator=generator)
        loss = F.nll_loss(judge(spoiled(mels[batch], generator))[1], target[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    safetensors.torch.save_model(judge, path)
    return judge


def measure(wav: np.ndarray, scene: str) -> dict[str, bool]:
    """Whether a waveform (SAMPLES,) holds what the scene's caption names, by signal processing.

    "pitch": a tone is low or high. "direction": a chirp rises or falls. "count": so many knocks
    (not over a texture). "order": in a sequence of a tonal and a noisy sound, the tonal half is the
    right one. Absent where it does not apply.
    """
    relation, kinds, details = parse_scene(scene)
    halves = [wav[:14900], wav[17600:]]                         # 0 to .93 s, 1.1 s to the end
    parts = halves if relation == ">" else [wav, wav]
    found = {}
    tonality = []
    for kind, detail, part in zip(kinds, details, parts):
        frequency, _, spectrum = stft(part, SAMPLE_RATE, nperseg=1024)
        power = np.abs(spectrum) ** 2                           # (bins, frames)
        peak = frequency[16:][power[16:].argmax(0)]             # Hz, from 250: above an engine
        tonality.append(np.median(power.max(0) / (power.mean(0) + 1e-12)))  # high for a few lines
        if kind == "tone":
            found["pitch"] = detail == ("high" if np.median(peak) > 700 else "low")
        if kind == "chirp":
            slope = np.polyfit(np.arange(len(peak)), peak, 1)[0]
            found["direction"] = detail == ("up" if slope > 0 else "down")
        if kind == "knocks" and relation != "+":
            envelope = np.sqrt(np.convolve(part ** 2, np.hanning(800), "same"))     # over 50 ms
            peaks, _ = find_peaks(envelope, prominence=0.3 * envelope.max())
            found["count"] = detail == str(len(peaks))
    noisy = [kind in ("hiss", "rain") for kind in kinds]
    if relation == ">" and any(noisy) and {"tone", "chirp", "siren", "bell"} & set(kinds):
        found["order"] = bool((tonality[0] < tonality[1]) == noisy[0])
    silent = np.abs(wav).max() < 0.01                           # which is never right
    return {name: right and not silent for name, right in found.items()}
