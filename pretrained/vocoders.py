"""Vocoders: functions from log10 mel (B, 80, T) to waveform (B, 256 T) in [-1, 1] at 16 kHz."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashaudio import (HOP, N_FFT, SAMPLE_RATE, InputError, griffin_lim, hub_model,
                        mel_to_magnitude)
from pretrained.make_an_audio import read_checkpoint

# The published 16 kHz, 80 band BigVGAN; its width is read from the checkpoint.
RATES = (4, 4, 2, 2, 2, 2)                        # upsampling of each stage: together HOP
KERNELS = (3, 7, 11)                              # of the residual blocks that follow each stage
DILATIONS = (1, 3, 5)                             # of the convolutions in each of them


def load(name: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """The vocoder called griffin-lim, hifigan:<hub id or folder> or bigvgan:<checkpoint or folder>.

    Raises InputError, in one line, for another name, or where there is no such model.
    """
    kind, _, source = name.partition(":")
    if name == "griffin-lim":
        return griffin_lim
    if kind == "hifigan" and source:
        return load_hifigan(source, device)
    if kind == "bigvgan" and source:
        return load_bigvgan(source, device)
    raise InputError(f"unknown vocoder '{name}': use griffin-lim, hifigan:<hub id or folder> or "
                     "bigvgan:<checkpoint or folder>")


def load_hifigan(source: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """SpeechT5's HiFi-GAN (16 kHz, 80 bands, hop 256), from a folder or hub id.

    Its mels differ from ours in two ways: the bands reach from 80 to 7600 Hz, so ours go through
    their least-squares inverse, and its frame i is centred on sample 256 i, not 256 i + 128, so
    the waveform is moved by half a hop.
    """
    from transformers import SpeechT5HifiGan
    from transformers.audio_utils import mel_filter_bank
    model = hub_model(SpeechT5HifiGan, source).to(device).eval().requires_grad_(False)
    hop = math.prod(model.config.upsample_rates)
    if hop != HOP:
        raise InputError(f"hifigan:{source}: makes {hop} samples per mel frame, not {HOP}")
    filters = mel_filter_bank(N_FFT // 2 + 1, model.config.model_in_dim, 80.0, 7600.0, SAMPLE_RATE,
                              norm="slaney", mel_scale="slaney")
    filters = torch.from_numpy(filters.T).float().to(device)                # (80, 513)

    def vocoder(mel: Tensor) -> Tensor:
        theirs = (filters @ mel_to_magnitude(mel)).clamp(min=1e-10).log10()
        wav = model(theirs.transpose(1, 2))
        return F.pad(wav, (HOP // 2, -HOP // 2))

    return vocoder


def load_bigvgan(source: str, device: str = "cpu") -> BigVGAN:
    """A 16 kHz, 80 band BigVGAN of any width, from a checkpoint or from the folder of one."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        kinds = ("g_*", "*.pt", "*.pth", "*.ckpt", "*.safetensors")
        found = [file for file in folder.iterdir() if any(map(file.match, kinds))]
        if len(found) != 1:
            raise InputError(f"bigvgan: {source} holds {len(found)} checkpoints "
                             f"({', '.join(kinds)}); name one")
        source = str(found[0])
    held = read_checkpoint(source)
    try:
        state = fold_weight_norm(held.get("generator", held))
        model = BigVGAN(len(state["conv_pre.weight"]))
        model.load_state_dict(state)
    except Exception as e:  # a file may hold anything, and each part fails in its own way
        why = " ".join(str(e).split())[:400]
        raise InputError(f"{source}: not a BigVGAN of 16 kHz and 80 bands ({why})") from e
    return model.to(device).eval().requires_grad_(False)


def fold_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """weight_g, weight_v -> weight = g v / |v|, with a norm for each index of the first dimension.

    Leaves out the low-pass filters: all that are stored are the same, and are computed here.
    """
    folded = {}
    for name, value in state.items():
        if name.endswith(".weight_v"):
            direction = value / torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
            folded[name.removesuffix("_v")] = state[name.removesuffix("v") + "g"] * direction
        elif not name.endswith((".weight_g", ".filter")):
            folded[name] = value
    return folded


class BigVGAN(nn.Module):
    """Lee et al., ICLR 2023, with the key names of the public checkpoints.

    Every nonlinearity is a periodic function between an up- and a downsampling filter, so that
    it adds no aliases.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv_pre = nn.Conv1d(80, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate in RATES:
            up = nn.ConvTranspose1d(width, width // 2, 2 * rate, rate, rate // 2)
            self.ups.append(nn.ModuleList([up]))    # a list, for the key: ups.0.0.weight
            width = width // 2
            self.resblocks.extend(ResidualBlock(width, kernel) for kernel in KERNELS)
        self.activation_post = Activation(width)
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        """log10 mel (B, 80, T) -> waveform (B, 256 T)."""
        x = self.conv_pre(mel.to(self.conv_pre.bias.dtype))               # (B, width, T)
        for i, (up,) in enumerate(self.ups):
            x = up(x)                                                       # (B, width / 2, rate T)
            blocks = self.resblocks[i * len(KERNELS):(i + 1) * len(KERNELS)]
            x = sum(block(x) for block in blocks) / len(KERNELS)
        return self.conv_post(self.activation_post(x))[:, 0].tanh()


class ResidualBlock(nn.Module):
    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.convs1 = nn.ModuleList()
        self.convs2 = nn.ModuleList()
        self.activations = nn.ModuleList()
        for d in DILATIONS:
            self.convs1.append(nn.Conv1d(width, width, kernel, padding="same", dilation=d))
            self.convs2.append(nn.Conv1d(width, width, kernel, padding="same"))
            self.activations.extend([Activation(width), Activation(width)])

    def forward(self, x: Tensor) -> Tensor:
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2)):
            h = first(self.activations[2 * i](x))
            x = x + second(self.activations[2 * i + 1](h))
        return x


class Activation(nn.Module):
    """Twice the rate, SnakeBeta, back again: (B, width, T) -> (B, width, T).

    SnakeBeta is x + sin²(αx) / β for each channel, with both parameters stored as logarithms.
    """

    def __init__(self, width: int):
        super().__init__()
        self.act = nn.ParameterDict({"alpha": torch.zeros(width), "beta": torch.zeros(width)})
        self.register_buffer("filter", low_pass(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        taps = self.filter.expand(width, -1, -1)
        alpha, beta = self.act["alpha"].exp()[:, None], self.act["beta"].exp()[:, None]
        x = F.pad(x, (5, 5), mode="replicate")
        x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=width)[..., 15:-15]
        x = x + (alpha * x).sin() ** 2 / (beta + 1e-9)
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, taps, stride=2, groups=width)


def low_pass() -> Tensor:
    """Kaiser-windowed sinc of 12 taps that keeps half of the band -> (1, 1, 12), sum 1."""
    beta = 0.1102 * (2.285 * 5 * math.pi * 1.2 + 7.95 - 8.7)                # for 51 dB
    window = torch.kaiser_window(12, periodic=False, beta=beta, dtype=torch.float64)
    h = window * torch.sinc((torch.arange(12) - 5.5) / 2)
    return (h / h.sum()).float().view(1, 1, 12)
