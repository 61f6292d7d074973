"""FlashAudio in one file: text to audio in one step with rectified flows (Liu et al., ACL 2025, arXiv 2410.12266).

A caption becomes a context, Gaussian noise becomes the latent of a mel spectrogram by following a velocity field, the latent
becomes a mel, the mel becomes a waveform. A flow trained in the usual way bends, so it takes many small steps to follow. This
file trains the same network three times more, until one step is enough:

    CFM       flow matching: noise and data paired at random                     many steps (24)
    1-RF      rectified flow: t drawn where it is hard, noise paired to near data many steps, better
    2-RF      reflow: trained on the (noise, sample) pairs of the 1-RF itself     few steps; its paths are almost straight
    distilled trained at t = 0 on the pairs of the 2-RF                           one step

Notation, the same everywhere:
    z0 noise ~ N(0, I) at t = 0      z1 audio latent at t = 1      z_t = (1 - t) z0 + t z1      v velocity = dz_t / dt
    c context (B, N, D)              ∅ null context, that of ""    ω guidance scale             NFE evaluations of the network
    B batch   C latent channels   L latent frames   T mel frames   N text tokens   D context width   H heads
Time runs from noise (0) to data (1). SD3, MeanFlow and TangoFlux run it the other way.

From the paper to the code:
    Eq. 4, 5, 12  rectified flow and reflow loss    rectified_flow_loss
    Eq. 6-7       logit-normal timesteps (1-RF)     logit_normal
    Eq. 8         Mix-Exp timesteps (2-RF)          mix_exp
    Eq. 9         immiscible pairing                immiscible_pairing
    Eq. 10-11     anchored optimisation             anchored_cfg_loss, anchored_sample, make_couplings
    Eq. 13        one-step distillation             distill_loss
    Eq. 14        Euler sampling                    euler_sample
    Algorithm 1   the order of the stages           train.py
MelVAE and DiT have the architecture and the key names of Make-An-Audio 3, the backbone that the paper starts from.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InputError(ValueError):
    """Wrong input from a person. The message is one line: what is wrong with which file or value, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------------
# 1. Configuration
# ---------------------------------------------------------------------------------------------------------------------------

SAMPLE_RATE = 16_000  # Hz, Table 3
HOP = 256             # samples between mel frames: 62.5 frames per second
N_FFT = 1024          # samples in a window (64 ms)


@dataclass
class VAEConfig:
    """Mel VAE; the defaults are the public 213M-parameter VAE."""
    mel_bins: int = 80                             # mel bands in and out
    channels: int = 384                            # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4)      # width of each level, in units of `channels`
    res_blocks: int = 2                            # residual blocks per level (the decoder has one more)
    kernel_size: int = 5                           # frames; the decoder's residual blocks keep 3, as in the public code
    z_channels: int = 20                           # channels before quant_conv
    embed_dim: int = 20                            # latent channels C
    down_levels: tuple[int, ...] = (0,)            # levels after which time is halved: (0,) makes T = 2 L
    norm_groups: int = 32                          # groups of every GroupNorm; two channels a group would erase a steady tone


@dataclass
class DiTConfig:
    """Backbone; the defaults are DiT-M of Make-An-Audio 3, the paper's Base (197.9M parameters)."""
    in_channels: int = 20                          # latent channels C
    context_dim: int = 1024                        # context width D
    hidden_size: int = 768
    num_heads: int = 32
    depth: int = 16                                # blocks
    max_len: int = 1000                            # longest latent (frames) that the position table reaches
    absolute_positions: bool = False               # tell each frame its place too, not only its distance to others; see DiT


@dataclass
class TextConfig:
    """Captions to contexts: "bytes" is trained here and needs no download, "make-an-audio" is the text stage of the public
    checkpoints, and any other name is a transformers text model, frozen: a folder or a hub id, CLAP, T5, BERT and the like."""
    encoder: str = "bytes"
    max_length: int = 128                          # bytes or tokens; longer captions are cut, shorter ones padded
    layers: int = 4                                # of the byte encoder; its width is DiTConfig.context_dim
    heads: int = 8
    bert: dict = field(default_factory=dict)       # of make-an-audio: sizes, by the names of transformers; empty: it has none
    t5: dict = field(default_factory=dict)
    tokenizers: tuple[str, ...] = ()               # of make-an-audio: hub ids or folders, read when a caption comes


@dataclass
class FlashAudioConfig:
    vae: VAEConfig = field(default_factory=VAEConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    frames: int = 624                              # mel frames T the model is trained on; 624 = 9.984 s (§4.1)
    integer_time: bool = False                     # sample at whole thousandths of t, as the public sampler does

    @classmethod
    def from_dict(cls, d: dict) -> "FlashAudioConfig":
        """Read a config.json; keys that are not ours are left alone."""
        if max(d["dit"]["depth"], d["text"]["layers"], d["vae"]["res_blocks"], len(d["vae"]["channel_mult"])) > 1000:
            raise ValueError("config.json describes more than 1000 layers")
        vae, dit, text = ({k: tuple(v) if isinstance(v, list) else v for k, v in d[part].items()} for part in ("vae", "dit", "text"))
        return cls(VAEConfig(**vae), DiTConfig(**dit), TextConfig(**text), d["frames"], d["integer_time"])


PRESETS: dict[str, FlashAudioConfig] = {
    # ours: 2.048 s, 4M parameters, trained on a laptop CPU in minutes
    "toy": FlashAudioConfig(
        VAEConfig(channels=64, channel_mult=(1, 1, 1), res_blocks=1, down_levels=(0, 1), norm_groups=4),
        DiTConfig(context_dim=128, hidden_size=192, num_heads=6, depth=3, max_len=256, absolute_positions=True),
        TextConfig(max_length=64, layers=2, heads=4), frames=128),
    # Table 5 gives parameter counts alone; hidden size and depth of small and large are chosen to meet them
    "small": FlashAudioConfig(dit=DiTConfig(hidden_size=512, num_heads=16, depth=12)),   # 74M
    "base": FlashAudioConfig(),                                                          # 197M, the paper's model
    "large": FlashAudioConfig(dit=DiTConfig(hidden_size=1024, num_heads=32, depth=20)),  # 429M
}

# ---------------------------------------------------------------------------------------------------------------------------
# 2. Audio front end and vocoders
# ---------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def mel_basis(device: str = "cpu") -> Tensor:
    """Slaney mel filters, 0 to 8000 Hz -> (80, 513); computed in float64, as librosa does."""
    from transformers.audio_utils import mel_filter_bank
    basis = mel_filter_bank(N_FFT // 2 + 1, 80, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(basis.T).float().to(device)                         # (80, 513)


def mel_spectrogram(wav: Tensor) -> Tensor:
    """Waveform (B, samples) in [-1, 1] at 16 kHz -> log10 mel magnitude (B, 80, samples // 256); silence is -5.

    The front end of Make-An-Audio and of BigVGAN: frame i is centred on sample 256 i + 128. Raises InputError below 385
    samples, the shortest clip that can be padded by reflection.
    """
    pad = (N_FFT - HOP) // 2
    if wav.shape[-1] <= pad:
        raise InputError(f"a clip of {wav.shape[-1]} samples is too short for a mel spectrogram (at least {pad + 1})")
    wav = F.pad(wav.clamp(-1, 1)[:, None], (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(N_FFT, device=wav.device)
    spectrum = torch.stft(wav, N_FFT, HOP, window=window, center=False, return_complex=True)  # (B, 513, T)
    magnitude = (spectrum.real ** 2 + spectrum.imag ** 2 + 1e-9).sqrt()
    return (mel_basis(str(wav.device)) @ magnitude).clamp(min=1e-5).log10()


@lru_cache(maxsize=4)
def mel_inverse(device: str = "cpu") -> Tensor:
    """Pseudo-inverse of the mel filters -> (513, 80)."""
    return torch.linalg.pinv(mel_basis()).to(device)


def mel_to_magnitude(mel: Tensor) -> Tensor:
    """log10 mel (B, 80, T) -> magnitude spectrogram (B, 513, T), by least squares."""
    return (mel_inverse(str(mel.device)) @ 10 ** mel.float()).clamp(min=0)


def griffin_lim(mel: Tensor, iterations: int = 16) -> Tensor:
    """log10 mel (B, 80, T) -> waveform (B, 256 T) in [-1, 1], without a trained vocoder (Griffin & Lim 1984, fast version).

    The magnitudes are the least-squares inverse of the mel filters. The phase starts from zero, so that a clip depends on its
    mel alone; random phases sound no better. `iterations`: the mel error is 0.158 (log10) after 16, 0.148 after 32, 0.144 after 64.
    """
    import torchaudio
    magnitude = F.pad(mel_to_magnitude(mel), (0, 1), mode="replicate")          # T + 1 centred frames span 256 T samples
    wav = torchaudio.functional.griffinlim(magnitude, torch.hann_window(N_FFT, device=mel.device), N_FFT, HOP, N_FFT, power=1.0,
                                           n_iter=iterations, momentum=0.99, length=None, rand_init=False)
    return F.pad(wav, (HOP // 2, -HOP // 2)).clamp(-1, 1)                       # from frames at 256 i to frames at 256 i + 128


def load_vocoder(name: str = "griffin-lim", device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """The vocoder called `name`: a function from log10 mel (B, 80, T) to waveform (B, 256 T) in [-1, 1].

    griffin-lim; hifigan:<hub id or folder>; bigvgan:<checkpoint or its folder>. Raises InputError for another name, or
    where there is no such model.
    """
    kind, _, source = name.partition(":")
    if name == "griffin-lim":
        return griffin_lim
    if not source or kind not in ("hifigan", "bigvgan"):
        raise InputError(f"unknown vocoder '{name}': use griffin-lim, hifigan:<hub id or folder> or bigvgan:<folder>")
    from data import public
    return public.load_hifigan(source, device) if kind == "hifigan" else public.load_bigvgan(source, device)


def load_audio(path: str | Path, samples: int | None = None) -> Tensor:
    """An audio file -> mono float32 waveform (samples,) in [-1, 1] at 16 kHz; cut, or repeated, to `samples` if given.

    WAV of any width is read with scipy, everything else through torchaudio and TorchCodec. Raises InputError, in one line,
    for what cannot be read or holds no sound.
    """
    import torchaudio
    from scipy.io import wavfile
    from scipy.signal import resample_poly
    try:
        if str(path).lower().endswith((".wav", ".wave")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of tags that scipy does not know
                rate, data = wavfile.read(path)
            if data.dtype == np.uint8:              # 8-bit WAV is unsigned
                data = (data.astype(np.float32) - 128) / 128
            elif data.dtype.kind == "i":
                data = data / np.float32(-float(np.iinfo(data.dtype).min))
            wav = torch.from_numpy(np.ascontiguousarray(data.T, dtype=np.float32))
        else:
            wav, rate = torchaudio.load(path)
    except ImportError as e:
        raise InputError(f"{path}: only WAV can be read here; `pip install torchcodec` and FFmpeg add the rest") from e
    except Exception as e:                          # decoders raise all kinds of errors; a person needs one line
        raise InputError(f"{path}: cannot be read as audio ({' '.join(str(e).split()) or type(e).__name__})") from e
    wav = wav.mean(0) if wav.dim() == 2 else wav
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path}: says that it has {rate} samples a second")
    if samples:
        wav = wav[:math.ceil((samples / SAMPLE_RATE + 0.1) * rate)]
    if not wav.numel() or not wav.isfinite().all():
        raise InputError(f"{path}: holds no samples" if not wav.numel() else f"{path}: holds NaN or infinite samples")
    if rate != SAMPLE_RATE:
        wav = torch.from_numpy(resample_poly(wav.numpy(), SAMPLE_RATE // (g := math.gcd(rate, SAMPLE_RATE)), rate // g))
    return wav.repeat(math.ceil(samples / len(wav)))[:samples] if samples else wav


# ---------------------------------------------------------------------------------------------------------------------------
# 3. MelVAE: mel (B, 80, T) <-> latent (B, C, L)
# ---------------------------------------------------------------------------------------------------------------------------


def group_norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, kernel: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width_in, groups), nn.Conv1d(width_in, width, kernel, padding=kernel // 2)
        self.norm2, self.conv2 = group_norm(width, groups), nn.Conv1d(width, width, kernel, padding=kernel // 2)
        if width_in != width:
            self.nin_shortcut = nn.Conv1d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class FrameAttention(nn.Module):
    """One head over all frames, in the middle of the encoder and of the decoder."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = group_norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).transpose(1, 2)                                        # (B, T, width)
        q, k, v = (F.linear(h, f.weight.squeeze(2), f.bias) for f in (self.q, self.k, self.v))  # kernels of 1 are products
        h = F.linear(F.scaled_dot_product_attention(q, k, v), self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + h.transpose(1, 2)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1)))          # (B, width, T) -> (B, width, T // 2)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules in a row, under the names that the public checkpoints give them."""
    return nn.Sequential(OrderedDict(modules))


def level(width_in: int, width: int, blocks: int, kernel: int, groups: int, **resample: nn.Module) -> nn.Sequential:
    block = nn.Sequential(*(ResidualBlock(width_in if i == 0 else width, width, kernel, groups) for i in range(blocks)))
    return named(block=block, **resample)


def middle(width: int, kernel: int, groups: int) -> nn.Sequential:
    return named(block_1=ResidualBlock(width, width, kernel, groups), attn_1=FrameAttention(width, groups),
                 block_2=ResidualBlock(width, width, kernel, groups))


class MelVAE(nn.Module):
    """1-D convolutional VAE over time (Make-An-Audio 3): the 80 mel bands are its input channels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c, k, groups = config, config.kernel_size, config.norm_groups
        widths = [c.channels * m for m in c.channel_mult]
        levels = range(len(widths))
        down = [level(widths[max(i - 1, 0)], widths[i], c.res_blocks, k, groups,
                      **({"downsample": Downsample(widths[i])} if i in c.down_levels else {})) for i in levels]
        up = OrderedDict((str(i), level(widths[min(i + 1, len(widths) - 1)], widths[i], c.res_blocks + 1, 3, groups,
                                        **({"upsample": Upsample(widths[i])} if i - 1 in c.down_levels else {})))
                         for i in reversed(levels))  # runs from the last level to the first, named by level
        same = {"kernel_size": k, "padding": k // 2}
        self.encoder = named(conv_in=nn.Conv1d(c.mel_bins, widths[0], **same), down=nn.Sequential(*down),
                             mid=middle(widths[-1], k, groups), norm_out=group_norm(widths[-1], groups), swish=nn.SiLU(),
                             conv_out=nn.Conv1d(widths[-1], 2 * c.z_channels, **same))
        self.decoder = named(conv_in=nn.Conv1d(c.z_channels, widths[-1], **same), mid=middle(widths[-1], 3, groups),
                             up=nn.Sequential(up), norm_out=group_norm(widths[0], groups), swish=nn.SiLU(),
                             conv_out=nn.Conv1d(widths[0], c.mel_bins, **same))
        self.quant_conv = nn.Conv1d(2 * c.z_channels, 2 * c.embed_dim, 1)
        self.post_quant_conv = nn.Conv1d(c.embed_dim, c.z_channels, 1)

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """log10 mel (B, 80, T) -> mean and log-variance of the posterior, each (B, C, L)."""
        mean, logvar = self.quant_conv(self.encoder(mel)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, C, L) -> log10 mel (B, 80, T)."""
        return self.decoder(self.post_quant_conv(z))


def vae_loss(vae: MelVAE, mel: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Squared error of the mel plus kl_weight x KL(posterior || N(0, I)) per latent element; noise (B, C, L) ~ N(0, I).

    Ours: the public VAE is trained with an absolute error and a discriminator. Squared, a missed loud line on a quiet ground
    weighs more: in one comparison at toy size, 60 s each, the judge knew 75% of the clips afterwards instead of 50%.
    """
    mean, logvar = vae.encode(mel)
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
    return F.mse_loss(vae.decode(mean + (logvar / 2).exp() * noise), mel) + kl_weight * kl


# ---------------------------------------------------------------------------------------------------------------------------
# 4. TextEncoder: captions -> context (B, N, D)
# ---------------------------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Bytes in, transformer layers over words, one context token per word. Trained with the flow up to the 1-RF.

    A word is the sum of the embeddings of its bytes and of its 3, 4 and 5 byte pieces, looked up by hash (fastText, Bojanowski
    et al. 2017), so that spelling need not be learnt by attention first. What comes first in the caption is told by turning each
    word by its place, as RoPE turns queries.
    Every caption takes N / 4 tokens and padding is attended to like any other token, here and in the backbone: that is how the
    public systems work, and what makes a context independent of the batch it was made in.
    """
    PIECES, BUCKETS, SPACE = (3, 4, 5), 2048, 1 + ord(" ")
    trained = True

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        self.max_length, self.words = config.max_length, config.max_length // 4
        self.bytes, self.pieces = nn.Embedding(257, width), nn.Embedding(len(self.PIECES) * self.BUCKETS, width)
        nn.init.normal_(self.pieces.weight, std=0.3)
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(width, config.heads, 2 * width, dropout=0.0, activation="gelu",
                                                                 batch_first=True, norm_first=True) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width)
        half_turn = torch.arange(self.words)[:, None] * math.pi / self.words    # the fastest goes round by π over a caption
        self.register_buffer("turn", turns(half_turn * 2.0 ** (-torch.arange(width // 2) / (width / 8))), persistent=False)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> byte ids (B, max_length); padding is 0, byte b is b + 1."""
        ids = ([b + 1 for b in caption.encode()[:self.max_length]] for caption in captions)
        return torch.tensor([row + [0] * (self.max_length - len(row)) for row in ids])

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or their byte ids (B, max_length) -> context (B, N = max_length / 4, D)."""
        ids = (captions if isinstance(captions, Tensor) else self.tokenize(captions)).to(self.turn.device)
        word = (ids == self.SPACE).cumsum(1)                                    # the word that each byte belongs to
        pieces = []
        for i, n in enumerate(self.PIECES):
            last, same = (F.pad(u, (n - 1, 0), value=-1).unfold(1, n, 1) for u in (ids, word))      # (B, bytes, n)
            power = 389 ** torch.arange(n, device=ids.device)                   # 389: a prime > 257 ids
            pieces.append((last * (same == word[..., None]) * power).sum(-1) % self.BUCKETS + i * self.BUCKETS)
        x = self.bytes(ids) + self.pieces(torch.stack(pieces, -1)).sum(-2)                          # (B, bytes, D)
        member = F.one_hot(word.clamp(max=self.words - 1), self.words) * (ids > 0)[..., None]       # (B, bytes, N)
        x = rotate(member.transpose(1, 2).to(x) @ x, self.turn)                 # (B, N, D)
        return self.norm(self.layers(x))


class PretrainedText(nn.Module):
    """A frozen text model of transformers (the text tower of CLAP, T5, BERT ...), by folder or hub id -> its token states.

    Padding is masked inside the model, as in its own training, and its states are set to zero. The model is no submodule: its
    weights are not ours to save again with every stage.
    """
    trained = False

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, ClapTextModel
        kind = hub_model(AutoConfig, config.encoder)
        model = hub_model(ClapTextModel if kind.model_type.startswith("clap") else AutoModelForTextEncoding, config.encoder)
        self.held = [model.eval().requires_grad_(False)]
        self.tokenizer, self.max_length = hub_model(AutoTokenizer, config.encoder), config.max_length
        if model.config.hidden_size != width:
            raise InputError(f"{config.encoder} has width {model.config.hidden_size}, the backbone's context_dim is {width}")

    def _apply(self, fn, recurse: bool = True):         # .to(device) reaches the model all the same
        self.held[0]._apply(fn)
        return super()._apply(fn, recurse)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> ids and mask, (B, 2, N)."""
        held = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt")
        return torch.stack([held.input_ids, held.attention_mask], 1)

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or what `tokenize` returns -> context (B, N, D)."""
        model = self.held[0]
        ids, mask = (captions if isinstance(captions, Tensor) else self.tokenize(captions)).to(model.device).unbind(1)
        return model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


def hub_model(auto: type, source: str):
    """auto.from_pretrained(source), with an error of one line."""
    try:
        return auto.from_pretrained(source)
    except Exception as e:                          # transformers and the hub have many
        raise InputError(f"{source}: not loaded by {auto.__name__} ({(str(e) or type(e).__name__).splitlines()[0]})") from e


def pretrained_width(source: str) -> int:
    """Width D of the token states of a transformers text model."""
    from transformers import AutoConfig
    config = hub_model(AutoConfig, source)
    return getattr(config, "text_config", config).hidden_size


def text_encoder(config: TextConfig, width: int) -> nn.Module | None:
    """The text encoder that `config.encoder` names, with contexts of `width`."""
    if config.encoder == "none":                    # a model that is given contexts
        return None
    if config.encoder == "make-an-audio":
        from data.public import MakeAnAudioText
        return MakeAnAudioText(config, width)
    return (TextEncoder if config.encoder == "bytes" else PretrainedText)(config, width)


# ---------------------------------------------------------------------------------------------------------------------------
# 5. DiT: the velocity v(z_t, t, c)
# ---------------------------------------------------------------------------------------------------------------------------


def turns(angle: Tensor) -> Tensor:
    """Angles (L, width / 2) -> what `rotate` multiplies elements and their neighbours by, (2, L, width)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).flatten(2)


def rope_table(length: int, width: int) -> Tensor:
    """Rotary positions (RoPE): angles of position x 10000^(-2i / width) -> (2, length, width)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return turns(torch.arange(length)[:, None] * frequency)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring elements (2i, 2i + 1) of x (..., L, width) as complex numbers."""
    cos, sin = table.to(x.dtype)
    return torch.addcmul(x * cos, x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), sin)


class Attention(nn.Module):
    """Attention over the latent frames plus gated attention to the text, which shares its queries and its output."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.wk_y, self.wv_y = (nn.Linear(context_dim, width, bias=False) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, y: Tensor, rope: Tensor) -> Tensor:
        def heads(u: Tensor) -> Tensor:
            return u.unflatten(-1, (len(self.gate), -1)).transpose(1, 2)        # (B, L, width) -> (B, H, L, width / H)

        q, k, v = rotate(heads(self.wq(x)), rope), rotate(heads(self.wk(x)), rope), heads(self.wv(x))
        audio = F.scaled_dot_product_attention(q, k, v)
        text = F.scaled_dot_product_attention(q, heads(self.wk_y(y)), heads(self.wv_y(y)))
        out = torch.addcmul(audio, self.gate.tanh()[:, None, None].to(text.dtype), text)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = 256 * math.ceil(int(8 * width / 3) / 256)
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(width, context_dim, heads), FeedForward(width)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention_y_norm = nn.RMSNorm(context_dim, eps=1e-5)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, y: Tensor, rope: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(c).chunk(6, dim=-1)
        h = modulate(self.attention_norm(x), shift_a, scale_a)
        x = torch.addcmul(x, gate_a[:, None], self.attention(h, self.attention_y_norm(y), rope))
        h = modulate(self.ffn_norm(x), shift_f, scale_f)
        return torch.addcmul(x, gate_f[:, None], self.feed_forward(h))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) in 0..1000 -> (B, width)."""
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=-1)))


class DiT(nn.Module):
    """Diffusion transformer of Make-An-Audio 3 ("Flag-DiT"): adaLN from time and pooled text, gated text attention.

    RoPE tells frames how far apart they are, not where they are. At t = 0, where every frame is noise, nothing else tells the
    first half of "a bell followed by rain" from the second, and that is all the distilled model sees. `absolute_positions` adds
    the sinusoids of Vaswani et al. (2017) to the input; it has no parameters.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        c, width = config, config.hidden_size
        self.t_embedder = TimeEmbedder(width)
        self.cap_embedder = nn.Sequential(nn.LayerNorm(c.context_dim), nn.Linear(c.context_dim, width))
        self.proj_in = nn.Linear(c.in_channels, width)
        self.blocks = nn.ModuleList(Block(width, c.context_dim, c.num_heads) for _ in range(c.depth))
        self.final_layer = FinalLayer(width, c.in_channels)
        self.register_buffer("rope", rope_table(c.max_len, width // c.num_heads), persistent=False)
        places = rotate(torch.ones(width), rope_table(c.max_len, width)) * c.absolute_positions
        self.register_buffer("places", places, persistent=False)                # (max_len, width)
        self.apply(self._init)
        for layer in [self.final_layer.linear, *(m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer))]:
            nn.init.zeros_(layer.weight)            # an untrained network returns 0
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """z (B, C, L), t (B,) in [0, 1], context (B, N, D) -> velocity (B, C, L)."""
        if z.shape[-1] > self.rope.shape[1]:
            raise InputError(f"{z.shape[-1]} latent frames, but the position table ends at {self.rope.shape[1]}")
        rope = self.rope[:, :z.shape[-1]]
        c = self.t_embedder(1000 * t) + self.cap_embedder(context.mean(1))      # (B, width)
        x = self.proj_in(z.transpose(1, 2)) + self.places[:z.shape[-1]]         # (B, L, width)
        for block in self.blocks:
            x = block(x, c, context, rope)
        return self.final_layer(x, c).transpose(1, 2).float()


# ---------------------------------------------------------------------------------------------------------------------------
# 6. Training a flow
#    `model` is any velocity field: a function of z (B, ...), t (B,) and context. Random numbers come from `generator` (CPU).
# ---------------------------------------------------------------------------------------------------------------------------

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def expand(t: Tensor, z: Tensor) -> Tensor:
    """t (B,) -> (B, 1, ...), to multiply z (B, ...)."""
    return t.view(-1, *[1] * (z.dim() - 1))


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """t ~ U[0, 1) -> (n,): flow matching."""
    return torch.rand(n, generator=generator)


def logit_normal(n: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Eq. 6-7: logit(t) ~ N(mean, std²) -> (n,). Bifocal, first half: 1-RF looks at the middle, where paths cross."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def mix_exp(n: int, a: float = 4.0, generator: torch.Generator | None = None) -> Tensor:
    """Eq. 8: p(t) ∝ e^{at} + e^{a(1-t)} -> (n,). Bifocal, second half: 2-RF looks at the two ends."""
    u = torch.rand(n, generator=generator)
    t = torch.log1p(u * math.expm1(a)) / a          # inverse of the CDF of a e^{at} / (e^a - 1)
    return torch.where(torch.rand(n, generator=generator) < 0.5, t, 1 - t)


def immiscible_pairing(z1: Tensor, z0: Tensor, context: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """Eq. 9: hand out the noises z0 (B, ...) so that their total distance to the latents z1 (B, ...) is least.

    Only the noise changes places, so captions stay with their latents and the batch of noise stays exactly Gaussian.
    Distance: unsquared L2 over the flattened latents, as in Immiscible Diffusion (Li et al. 2024). With weight > 0, a noise
    costs weight x the distance between the pooled contexts (B, N, D) of the clip it had and the clip it gets, so that noise
    tells little about the caption (C²OT, Cheng & Schwing 2025).
    """
    from scipy.optimize import linear_sum_assignment
    cost = torch.cdist(z1.flatten(1).float(), z0.flatten(1).float(), 2.0, "use_mm_for_euclid_dist")  # (B, B), a Gram product
    if weight:
        pooled = context.mean(1).float()
        cost = cost + weight * torch.cdist(pooled, pooled)
    _, column = linear_sum_assignment(cost.cpu().numpy())
    return z0[torch.from_numpy(column).to(z0.device)]


def knn_pairing(z1: Tensor, draws: Tensor) -> Tensor:
    """For each latent z1 (B, ...), the nearest of its own k noises draws (k, B, ...) -> (B, ...).

    Needs no assignment, but the noise is no longer exactly Gaussian (the KNN variant of Immiscible Diffusion, Li et al. 2025).
    """
    nearest = (draws - z1).flatten(2).norm(dim=2).argmin(0)                     # (B,)
    return draws[nearest, torch.arange(len(z1))]


def rectified_flow_loss(model: Velocity, z1: Tensor, z0: Tensor, t: Tensor, context: Tensor, sigma_min: float = 0.0) -> Tensor:
    """Eq. 4, and on couplings Eq. 5 and 12: E || (z1 - z0) - v(z_t, t, c) ||², averaged over elements -> scalar.

    z1, z0 (B, ...), t (B,). sigma_min > 0 leaves that much noise in the data end: 1e-4 is the public CFM objective.
    """
    s = expand(t, z1)
    z_t = (1 - (1 - sigma_min) * s) * z0 + s * z1
    return F.mse_loss(model(z_t, t, context), z1 - (1 - sigma_min) * z0)


def distill_loss(model: Velocity, z1: Tensor, z0: Tensor, context: Tensor) -> Tensor:
    """Eq. 13: E || (z1'' - z0'') - v(z0'', 0, c) ||²: the velocity at t = 0 becomes the whole way -> scalar."""
    return F.mse_loss(model(z0, z0.new_zeros(len(z0)), context), z1 - z0)


# ---------------------------------------------------------------------------------------------------------------------------
# 7. Sampling
# ---------------------------------------------------------------------------------------------------------------------------


def guided_velocity(model: Velocity, z: Tensor, t: Tensor, context: Tensor, null: Tensor | None, guidance: float,
                    cfg_zero: bool = False) -> Tensor:
    """v_cfg = v(z, t, ∅) + ω (v(z, t, c) - v(z, t, ∅)); ω = 1 is v(z, t, c) and costs one evaluation, not two.

    z (B, ...), t (B,), context and null (B, N, D). cfg_zero: v(z, t, ∅) is first scaled to fit v(z, t, c) best, sample by
    sample, by s = <v_c, v_∅> / |v_∅|² (CFG-Zero*, Fan et al. 2025).
    """
    if guidance == 1.0:
        return model(z, t, context)
    v_null, v_cond = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, context])).chunk(2)
    if cfg_zero:
        scale = (v_cond * v_null).flatten(1).sum(1) / v_null.flatten(1).pow(2).sum(1).clamp(min=1e-12)
        v_null = expand(scale, z) * v_null
    return v_null + guidance * (v_cond - v_null)


def euler_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor | None = None, steps: int = 1,
                 guidance: float = 1.0, return_trajectory: bool = False, integer_time: bool = False,
                 cfg_zero: bool = False) -> Tensor:
    """Eq. 14: z_{t + 1/T} = z_t + v(z_t, t, c) / T from noise z0 (B, ...) to data (B, ...).

    return_trajectory: all of z_0 .. z_1 instead, (steps + 1, B, ...). integer_time: hand the network t rounded down to
    thousandths, as the public sampler does.
    """
    times = torch.linspace(0, 1, steps + 1)
    z, trajectory = z0, [z0]
    for i in range(steps):
        t = (times[i] * 1000).floor() / 1000 if integer_time else times[i]
        v = guided_velocity(model, z, z.new_full((len(z),), t.item()), context, null, guidance, cfg_zero)
        z = z + (times[i + 1] - times[i]).item() * v
        trajectory.append(z)
    return torch.stack(trajectory) if return_trajectory else z


def anchored_cfg_loss(anchor: Tensor, z: Tensor, v_cond: Tensor, v_null: Tensor, guidance: float, dt: float) -> Tensor:
    """Eq. 10: || z*_{t + dt} - (z_t + v_cfg dt) ||² per sample, averaged over elements -> (B,).

    anchor is z*_{t + dt} of the unguided path; all tensors (B, ...). Zero where v_null = v_cond and z is on that path.
    """
    v_cfg = v_null + guidance * (v_cond - v_null)
    return (anchor - (z + dt * v_cfg)).pow(2).flatten(1).mean(1)


@torch.no_grad()
def anchored_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor, steps: int, guidance: float,
                    anchor_steps: int = 10, lr: float = 1e-2, tolerance: float = 1e-5, return_trajectory: bool = False) -> Tensor:
    """Eq. 10-11: guided Euler that optimises the null context ∅_t at every step to stay near the unguided path.

    z0 (B, ...), context and null (B, N, D) -> z1 (B, ...). After null-text inversion (Mokady et al. 2023), which the paper
    follows without giving numbers: ∅ is carried from step to step, each step has a fresh Adam of rate lr (1 - t/2), at most
    `anchor_steps` iterations, and leaves a sample alone once its loss is below tolerance (1 + 100 t); the tolerance is meant
    for steps of 1/50 and grows with their square. Run to convergence the loss is zero at ω = 1, so all that anchoring does
    lies in the early stop.
    """
    anchors = euler_sample(model, z0, context, steps=steps, return_trajectory=True)
    z, null, dt, trajectory = z0, null.clone(), 1 / steps, [z0]
    for i in range(steps):
        t = torch.full((len(z),), i * dt, device=z.device)
        v_cond, v_null = model(z, t, context).clone(), torch.empty_like(z)
        optimizer = torch.optim.Adam([null.requires_grad_(True)], lr=lr * (1 - i * dt / 2))
        busy = torch.arange(len(z), device=z.device)    # samples whose ∅ is still being optimised: the others leave the batch
        for iteration in range(anchor_steps + 1):
            with torch.set_grad_enabled(iteration < anchor_steps):
                v = model(z[busy], t[busy], null[busy])
                loss = anchored_cfg_loss(anchors[i + 1][busy], z[busy], v_cond[busy], v, guidance, dt)
            v_null[busy] = v.detach()
            far = loss.detach() >= tolerance * (1 + 100 * i * dt) * (50 * dt) ** 2
            if iteration == anchor_steps or not far.any():
                break
            null.grad, = torch.autograd.grad(loss, null, far.float())   # each sample has its own ∅: gradients do not mix
            busy, before = busy[far], null.detach().clone()
            optimizer.step()
            before[busy] = null[busy]
            null.copy_(before)
        null = null.detach()
        z = z + dt * (v_null + guidance * (v_cond - v_null)).detach()
        trajectory.append(z)
    return torch.stack(trajectory) if return_trajectory else z


def make_couplings(model: Velocity, z0: Tensor, context: Tensor, null: Tensor, steps: int, guidance: float = 1.0,
                   anchor_steps: int = 0, rectify: str = "anchored", lr: float = 1e-2, tolerance: float = 1e-5,
                   return_trajectory: bool = False) -> Tensor:
    """Eq. 11: the sample z1' = ODE[v_cfg](z0 | c) that a flow reaches from each noise -> (B, ...). (z0, z1') is a coupling.

    rectify: how guidance is kept in bounds: "anchored" (Eq. 10, the paper's, with anchor_steps > 0; the others as in
    anchored_sample), "cfg_zero", or "plain", not at all.
    """
    if rectify == "anchored" and guidance != 1.0 and anchor_steps:
        return anchored_sample(model, z0, context, null, steps, guidance, anchor_steps, lr, tolerance, return_trajectory)
    return euler_sample(model, z0, context, null, steps, guidance, return_trajectory, cfg_zero=rectify == "cfg_zero")


# ---------------------------------------------------------------------------------------------------------------------------
# 8. Measuring
# ---------------------------------------------------------------------------------------------------------------------------


def straightness(trajectory: Tensor, relative: bool = False) -> float:
    """S(Z) = ∫ E || (Z_1 - Z_0) - dZ_t/dt ||² dt of simulated paths (steps + 1, B, ...); 0 is straight (Fig. 2).

    relative: divided by E || Z_1 - Z_0 ||², which makes latents of different size comparable.
    """
    way = trajectory[-1] - trajectory[0]
    bend = (way - trajectory.diff(dim=0) * (len(trajectory) - 1)).flatten(2).pow(2).sum(2).mean()
    return (bend / way.flatten(1).pow(2).sum(1).mean() if relative else bend).item()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to embeddings x (N, E) and y (M, E) (Heusel et al. 2017; FAD, fd)."""
    def root(cov: Tensor) -> Tensor:                # cov^(1/2)
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    x, y = x.cpu().double(), y.cpu().double()       # MPS has no float64
    cov_x, cov_y = x.T.cov(), y.T.cov()
    cross = torch.linalg.svdvals(root(cov_x) @ root(cov_y)).sum()               # tr (cov_x cov_y)^(1/2)
    return ((x.mean(0) - y.mean(0)).pow(2).sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL(p || q) in nats of paired log-posteriors (N, classes): p of the real clips, q of the generated ones."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def clap_score(audio: Tensor, text: Tensor) -> float:
    """Mean cosine of paired CLAP embeddings of audio and caption, each (N, E)."""
    return F.cosine_similarity(audio, text).mean().item()


# ---------------------------------------------------------------------------------------------------------------------------
# 9. FlashAudio: the whole model
# ---------------------------------------------------------------------------------------------------------------------------


class FlashAudio(nn.Module):
    """VAE + text encoder + DiT + latent scale. Latents z are the VAE's times `scale_factor`, so that their std is 1."""

    def __init__(self, config: FlashAudioConfig):
        super().__init__()
        self.config = config
        self.vae = MelVAE(config.vae)
        self.text = text_encoder(config.text, config.dit.context_dim)
        self.dit = DiT(config.dit)
        self.register_buffer("scale_factor", torch.ones(()))
        self.stride = 2 ** len(config.vae.down_levels)      # mel frames per latent frame
        self.vocoder: Callable[[Tensor], Tensor] = griffin_lim
        self.notes: dict = {}                               # further keys of config.json: stage, settings ...
        self.card = ""                                      # its model card, README.md
        self.remembered: dict = {}                          # contexts of prompts

    @property
    def device(self) -> torch.device:
        return self.scale_factor.device

    def latent_shape(self, seconds: float | None = None) -> tuple[int, int]:
        """(C, L) of a clip of `seconds`, by default the length that the model was trained on."""
        seconds = self.config.frames * HOP / SAMPLE_RATE if seconds is None else seconds
        length = max(1, round(seconds * SAMPLE_RATE / HOP / self.stride))
        if length > self.config.dit.max_len:
            longest = self.config.dit.max_len * self.stride * HOP / SAMPLE_RATE
            raise InputError(f"{seconds:g} s is too long: this model reaches {longest:g} s")
        if length > self.config.frames // self.stride:      # Python shows a warning once
            warnings.warn(f"{seconds:g} s is longer than the {self.config.frames * HOP / SAMPLE_RATE:g} s this model was trained on")
        return self.config.vae.embed_dim, length

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, L) -> log10 mel (B, 80, T)."""
        return self.vae.decode(z / self.scale_factor)

    def noise(self, prompts: list[str], seed: int, shape: tuple[int, int]) -> Tensor:
        """z0 (B, C, L): the k-th copy of a prompt gets the noise of seed + k, whatever else is in the batch."""
        seen, draws = {}, []
        for prompt in prompts:
            copy = seen[prompt] = seen.get(prompt, -1) + 1
            draws.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed + copy)))
        return torch.stack(draws).to(self.device)

    @torch.no_grad()
    def contexts(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (B, N, D). A prompt is encoded once and remembered, until the text encoder changes."""
        version = (str(self.device), self.scale_factor.dtype, sum(p._version for p in self.text.parameters()))
        if version != self.remembered.get(0) or len(self.remembered) > 1000:
            self.remembered = {0: version}
        new = [p for p in dict.fromkeys(prompts) if p not in self.remembered]
        with torch.autocast(self.device.type, enabled=False):                   # at the precision that training had them
            self.remembered.update(zip(new, self.text(new)) if new else ())
        return torch.stack([self.remembered[p] for p in prompts])

    def compile(self) -> "FlashAudio":
        """For sampling alone: compile backbone and VAE decoder; on CUDA with CUDA graphs, and bf16 weights in the backbone, which
        autocast would make of them at every step. The first batch of each size then takes a minute."""
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        torch._dynamo.config.recompile_limit = 64           # batch sizes; torch stops at 8
        if self.device.type == "cuda":
            nn.ModuleList(layer for layer in self.dit.modules() if isinstance(layer, nn.Linear)).bfloat16()
        self.dit.compile(mode=mode, dynamic=False)
        decode = torch.compile(self.vae.decode, mode=mode, dynamic=False)
        self.vae.decode = lambda z: decode(z).clone()       # a CUDA graph writes over what it returned before
        return self

    @torch.no_grad()
    def sample_latents(self, prompts: list[str] | Tensor, steps: int = 1, guidance: float = 1.0,
                       seconds: float | None = None, seed: int | None = None, z0: Tensor | None = None,
                       return_trajectory: bool = False) -> Tensor:
        """Prompts, or a context (B, N, D) -> z1 (B, C, L); arguments as in `generate`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if self.text is None and (guidance != 1.0 or not isinstance(prompts, Tensor)):
                raise InputError("this model has no text stage: pass contexts (B, N, D) as prompts, and no guidance")
            context = prompts.to(self.device) if isinstance(prompts, Tensor) else self.contexts(prompts)
            null = self.contexts([""]).expand(len(context), -1, -1) if guidance != 1.0 else None
            if z0 is None:
                names = [""] * len(context) if isinstance(prompts, Tensor) else prompts
                z0 = self.noise(names, int.from_bytes(os.urandom(4)) >> 1 if seed is None else seed, self.latent_shape(seconds))
            return euler_sample(self.dit, z0.to(self.device), context, null, steps, guidance, return_trajectory,
                                self.config.integer_time)

    @torch.no_grad()
    def generate(self, prompts: list[str] | Tensor, steps: int = 1, guidance: float = 1.0, seconds: float | None = None,
                 seed: int | None = None, z0: Tensor | None = None,
                 vocoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Text to audio -> waveform (B, samples) float32 in [-1, 1] at 16 kHz.

        prompts: captions, or a context (B, N, D). steps: Euler steps; one for a distilled model. guidance: ω, 1 is none.
        seconds: length, rounded to latent frames. seed: the same seed gives the same clips; copies of one prompt in a batch
        differ. z0 (B, C, L): the noise itself, in place of a seed. Raises InputError for a length beyond the position table.
        The rest of the batch changes a latent by rounding alone, which Griffin-Lim can turn into other phases.
        """
        z = self.sample_latents(prompts, steps, guidance, seconds, seed, z0)
        return (vocoder or self.vocoder)(self.decode(z)).float()

    def save_pretrained(self, folder: str | Path, **notes) -> None:
        """Write config.json, with `notes` in it, model.safetensors and any model card as README.md, each whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_model
        folder, temporary = Path(folder), Path(folder) / "model.safetensors.tmp"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_model(self, str(temporary))
        except SafetensorError as e:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{folder / 'model.safetensors'}: not written ({e})") from e
        os.chmod(temporary, folder.stat().st_mode & 0o666)                      # safetensors would keep it private
        os.replace(temporary, folder / "model.safetensors")
        self.notes.update(notes)
        write_atomically(folder / "config.json", json.dumps({**asdict(self.config), **self.notes}, indent=2).encode())
        if self.card:
            write_atomically(folder / "README.md", self.card.encode())

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Upload to the hub what save_pretrained writes -> the address. from_pretrained(repo_id) loads it again."""
        from huggingface_hub import HfApi
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="flashaudio model"))

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> "FlashAudio":
        """Load what save_pretrained wrote, from a folder or from a hub id such as "name/model". Evaluation mode.

        Raises InputError, in one line, when there is no model or its files do not fit each other.
        """
        from safetensors.torch import load_model
        folder = Path(source)
        try:
            if not folder.exists() and str(source).count("/") == 1:
                from huggingface_hub import snapshot_download
                folder = Path(snapshot_download(str(source), allow_patterns=["config.json", "model.safetensors", "README.md"]))
            held = json.loads((folder / "config.json").read_text())
            config = FlashAudioConfig.from_dict(held)
            with torch.device("meta"):                  # sizes without memory: a config.json may say anything
                size = 4 * sum(p.numel() for p in cls(replace(config, text=TextConfig("none"))).parameters())
            if size > 2 * (folder / "model.safetensors").stat().st_size + 2 ** 20:
                raise ValueError(f"config.json describes {size} bytes of weights, model.safetensors holds fewer")
            load_model(model := cls(config), folder / "model.safetensors")
        except FileNotFoundError as e:
            raise InputError(f"{source}: no model here ({Path(e.filename or 'model.safetensors').name} is missing)") from e
        except Exception as e:                          # safetensors, JSON, torch and the hub each have errors of their own
            raise InputError(f"{source}: not a readable model ({(str(e) or type(e).__name__).splitlines()[0]})") from e
        model.notes = {k: v for k, v in held.items() if k not in asdict(model.config)}
        model.card = card.read_text(encoding="utf-8") if (card := folder / "README.md").exists() else ""
        return model.to(device).eval()

    @classmethod
    def from_make_an_audio(cls, checkpoint: str | Path, text: tuple[str, ...] | None = None, vocoder: str = "griffin-lim",
                           device: str = "cpu") -> "FlashAudio":
        """Load a public checkpoint of Make-An-Audio 3, of any size: VAE, DiT, text stage and latent scale. Evaluation mode.

        checkpoint: a file or "repo_id:path/in/repo". text: where its tokenizers are, hub ids or folders, BERT's and T5's; by
        default the ones it was trained with, fetched when the first caption comes. vocoder: as in load_vocoder. Raises
        InputError, in one line, for a file that is no such checkpoint, with the keys that are missing or left over.
        """
        from data import public
        state = public.rename(public.read_checkpoint(checkpoint))
        try:
            model = cls(public.make_an_audio_config(state, text))
            ours = model.state_dict().keys()
            missing, surplus = (sorted(map(public.their_name, keys)) for keys in (ours - state.keys(), state.keys() - ours))
            if missing or surplus:
                raise InputError(f"{checkpoint}: keys missing: {missing}, keys left over: {surplus}")
            model.load_state_dict(state)
        except (KeyError, IndexError, AttributeError, RuntimeError) as e:
            raise InputError(f"{checkpoint}: no Make-An-Audio 3 checkpoint (missing or misshapen: {' '.join(str(e).split())})") from e
        model.vocoder = load_vocoder(vocoder, device)
        return model.to(device).eval()


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto is cuda where there is one, else cpu. Raises InputError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device '{name}' is not available here: use cpu, cuda, cuda:0, mps or auto") from e


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, then rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
