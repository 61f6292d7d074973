"""FlashAudio in one file: text to audio in one step with rectified flows.

Liu et al., ACL 2025, arXiv 2410.12266. The shapes are those of the toy model:

    "a bell, then rain" ──TextEncoder──► context c (B, 16, 128) ─────────┐
    wav (B, 32768) ──mel──► (B, 80, 128) ──MelVAE──► z1 (B, 20, 32)      │     training
                                                     │                   ▼
    noise z0 (B, 20, 32) ──────────────────► z_t = (1 - t) z0 + t z1 ──► DiT ──► v, near z1 - z0

    noise z0 ──► z + v(z, t, c) / T, T times ──► z1 ──MelVAE──► mel ──vocoder──► wav    sampling

A flow that is trained in the usual way bends, so it takes many small steps to follow. Here the same
network is trained three times more, until one step is enough:

    CFM        flow matching: noise and data paired at random                      24 steps
    1-RF       rectified flow: more t in the middle, noise matched to each clip    24 steps
    2-RF       reflow: trained on the (noise, sample) pairs that the 1-RF makes    a few steps
    distilled  trained at t = 0 on the pairs that the 2-RF makes                   one step

Notation:
    z0  noise ~ N(0, I) at t = 0        z1  audio latent at t = 1       z_t = (1 - t) z0 + t z1
    v   velocity dz_t / dt              c   context (B, N, D)           ∅   null context, that of ""
    ω   guidance scale                  NFE evaluations of the network
    B batch   C latent channels   L latent frames   N text tokens   D context width
    T mel frames; in Eq. 14 Euler steps
Time runs from noise (0) to data (1). SD3, MeanFlow and TangoFlux run it the other way.

From the paper to the code, and why:
    Eq. 4   rectified_flow_loss   Where the lines of two pairs cross, at one z_t, the network can
                                  only learn the mean of both velocities: that is why paths bend.
    Eq. 6-7 logit_normal          Lines cross in the middle, so the 1-RF draws t there more often.
    Eq. 9   immiscible_pairing    Near noise makes lines shorter, and fewer of them cross. But the
                                  noise of a caption is then no longer N(0, I), which sampling
                                  draws: where captions leave much open, that harms.
    Eq. 11  make_couplings        A flow's own pairs never cross: each noise has one sample.
    Eq. 10  anchored_cfg_loss     Guidance leads away from the flow's own paths. The anchor holds it
                                  back, and must stop early: converged, v(∅) = v(c), and the
                                  guidance is gone.
    Eq. 5, 12  rectified_flow_loss   on couplings is the reflow: nothing crosses, so it can
                                  learn straight paths.
    Eq. 8   mix_exp               A straight path is decided at its ends: at t = 0, where the
                                  network sees noise alone, and at t = 1, where the details are.
    Eq. 13  distill_loss          One step asks for v at t = 0 alone, so this trains nothing else.
    Eq. 14  euler_sample          Straight paths need one step, bent ones many.
    Fig. 2  straightness          How much velocities differ from their mean, z1 - z0.
    Algorithm 1                   The order of the stages: main() in train.py.
"""

from __future__ import annotations

import json
import math
import unicodedata
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz, Table 3
HOP = 256             # samples between mel frames: 62.5 frames per second
N_FFT = 1024          # samples in a window: 64 ms


class InputError(ValueError):
    """Wrong input from a person: one line that says what is wrong with what, and what to do."""


# ---- 1. The flow ---------------------------------------------------------------------------------
# `model` is any velocity field: a function of z (B, ...), t (B,) and a context.

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """t ~ U[0, 1) -> (n,): flow matching."""
    return torch.rand(n, generator=generator)


def logit_normal(n: int, mean: float = 0.0, std: float = 1.0,
                 generator: torch.Generator | None = None) -> Tensor:
    """Eq. 6-7: logit(t) ~ N(mean, std²) -> (n,). The 1-RF looks at the middle."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def mix_exp(n: int, a: float = 4.0, generator: torch.Generator | None = None) -> Tensor:
    """Eq. 8: p(t) ∝ e^{at} + e^{a(1-t)} -> (n,). The 2-RF looks at the two ends."""
    u = torch.rand(n, generator=generator)
    t = torch.log1p(u * math.expm1(a)) / a          # inverse of the CDF of a e^{at} / (e^a - 1)
    return torch.where(torch.rand(n, generator=generator) < 0.5, t, 1 - t)


def immiscible_pairing(z0: Tensor, z1: Tensor) -> Tensor:
    """Eq. 9: hand out the noises z0 (B, ...) so that their total distance to z1 (B, ...) is least.

    Returns the noise in the order of the data: captions stay with their latents, and the batch of
    noise stays exactly Gaussian. The distance is the unsquared L2 of flattened latents, as in
    Immiscible Diffusion (Li et al. 2024).
    """
    from scipy.optimize import linear_sum_assignment
    distance = torch.cdist(z1.flatten(1).float(), z0.flatten(1).float(),
                           compute_mode="use_mm_for_euclid_dist")                           # (B, B)
    _, nearest = linear_sum_assignment(distance.cpu().numpy())
    return z0[torch.from_numpy(nearest).to(z0.device)]


def no_pairing(z0: Tensor, z1: Tensor) -> Tensor:
    """Noise and data as they come, paired at random: flow matching."""
    return z0


def column(t: Tensor, z: Tensor) -> Tensor:
    """t (B,) as (B, 1, ...), to multiply z (B, ...) by."""
    return t.view(-1, *[1] * (z.dim() - 1))


def rectified_flow_loss(model: Velocity, z0: Tensor, z1: Tensor, t: Tensor, context: Tensor,
                        sigma_min: float = 0.0) -> Tensor:
    """Eq. 4, and on couplings Eq. 5 and 12: E || (z1 - z0) - v(z_t, t, c) ||² -> scalar.

    z0, z1 (B, ...), t (B,); averaged over elements. sigma_min > 0 leaves that much noise in the
    data end: 1e-4 is the public CFM objective.
    """
    s = column(t, z1)                               # (B, 1, ...)
    z_t = (1 - (1 - sigma_min) * s) * z0 + s * z1
    return F.mse_loss(model(z_t, t, context), z1 - (1 - sigma_min) * z0)


def distill_loss(model: Velocity, z0: Tensor, z1: Tensor, context: Tensor) -> Tensor:
    """Eq. 13: E || (z1'' - z0'') - v(z0'', 0, c) ||² -> scalar: v at 0 becomes the whole way."""
    return F.mse_loss(model(z0, z0.new_zeros(len(z0)), context), z1 - z0)


def cfg(v_null: Tensor, v_cond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: v_cfg = v(z, t, ∅) + ω (v(z, t, c) - v(z, t, ∅))."""
    return v_null + guidance * (v_cond - v_null)


def guided_velocity(model: Velocity, z: Tensor, t: Tensor, context: Tensor, null: Tensor | None,
                    guidance: float) -> Tensor:
    """v_cfg at z (B, ...), t (B,), context and null (B, N, D); ω = 1 takes half the evaluations."""
    if guidance == 1.0:
        return model(z, t, context)
    both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, context]))
    return cfg(*both.chunk(2), guidance)


def time_grid(steps: int) -> Tensor:
    """0, 1/T .. 1 -> (steps + 1,) float32, rounded as the public sampler's linspace rounds them."""
    dt = torch.tensor(1 / steps, dtype=torch.float32).double()
    i = torch.arange(steps + 1)
    return torch.where(2 * i < steps, i * dt, 1 - (steps - i) * dt).float()


def euler_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor | None = None,
                 steps: int = 1, guidance: float = 1.0, return_trajectory: bool = False) -> Tensor:
    """Eq. 14: z_{t + 1/T} = z_t + v(z_t, t, c) / T, from noise z0 (B, ...) to data (B, ...).

    return_trajectory: all of z_0 .. z_1 instead, (steps + 1, B, ...).
    """
    z, trajectory = z0, [z0]
    for t in time_grid(steps)[:-1].to(z.device):
        z = z + guided_velocity(model, z, t.expand(len(z)), context, null, guidance) / steps
        trajectory.append(z)
    return torch.stack(trajectory) if return_trajectory else z


def anchored_cfg_loss(anchor: Tensor, z: Tensor, v_cond: Tensor, v_null: Tensor,
                      guidance: float, dt: float) -> Tensor:
    """Eq. 10: || z*_{t + dt} - (z_t + v_cfg dt) ||² per sample, averaged over elements -> (B,).

    anchor is z*_{t + dt} of the unguided path; all tensors (B, ...). The loss is zero where
    v_null = v_cond and z is on that path.
    """
    v_cfg = cfg(v_null, v_cond, guidance)
    return (anchor - (z + dt * v_cfg)).pow(2).flatten(1).mean(1)


@torch.no_grad()
def optimise_null(model: Velocity, null: Tensor, anchor: Tensor, z: Tensor, t: Tensor,
                  v_cond: Tensor, guidance: float, dt: float, iterations: int, lr: float,
                  enough: float) -> tuple[Tensor, Tensor]:
    """Move ∅_t (B, ..., D) by Adam until each sample's Eq. 10 is `enough` -> ∅_t, v(z, t, ∅_t).

    The rate is in units of the root mean square of ∅_t. Padding, tokens of zeros, stays padding. A
    sample stops where a step would not lower its Eq. 10.
    """
    there = (null != 0).any(-1, keepdim=True).expand_as(null)
    size = null.flatten(1).norm(dim=1) / there.flatten(1).sum(1).clamp(min=1).sqrt()        # (B,)
    unit = there * column(size, null)
    way = torch.zeros_like(null).requires_grad_(True)
    optimizer = torch.optim.Adam([way], lr=lr)
    best, v_best = null.clone(), torch.full_like(z, math.nan)
    least = z.new_full((len(z),), math.inf)
    active = least > 0                              # a sample that has stopped does not start again
    for iteration in range(iterations + 1):         # the last one evaluates Eq. 10 alone
        with torch.set_grad_enabled(iteration < iterations):
            moved = null + unit * way
            v_null = model(z, t, moved)
            loss = anchored_cfg_loss(anchor, z, v_cond, v_null, guidance, dt)
        better = active & (loss < least)
        best[better] = moved[better]
        v_best[better] = v_null[better]
        least[better] = loss[better]
        active = better & (loss >= enough)
        if iteration == iterations or not active.any():
            break
        way.grad, = torch.autograd.grad(loss, way, active.to(loss))     # each sample has its own ∅
        optimizer.step()
    return best, v_best


@torch.no_grad()
def anchored_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor, steps: int,
                    guidance: float, anchor_steps: int = 10, lr: float = 1e-2,
                    tolerance: float = 1e-5, return_trajectory: bool = False) -> Tensor:
    """Eq. 10-11: guided Euler that moves ∅_t at every step to stay near the unguided path.

    z0 (B, ...), context and null (B, N, D) -> z1 (B, ...). After null-text inversion (Mokady et al.
    2023), the paper's source: ∅ is carried from step to step, each step has a fresh Adam of rate
    lr (1 - t/2) and at most `anchor_steps` iterations, and leaves alone a sample with a loss below
    tolerance x (1 + 100 t) x (50 / steps)². Use few: converged, it undoes the guidance.
    """
    anchor = euler_sample(model, z0, context, steps=steps, return_trajectory=True)
    dt = 1 / steps
    v_cond = (anchor[1] - z0) / dt                  # at t = 0 the anchor has evaluated it
    z, trajectory = z0, [z0]
    for i, t in enumerate(time_grid(steps)[:-1].to(z.device)):
        t = t.expand(len(z))
        if i > 0:
            v_cond = model(z, t, context)
        enough = tolerance * (1 + 100 * i * dt) * (50 * dt) ** 2
        null, v_null = optimise_null(model, null, anchor[i + 1], z, t, v_cond, guidance, dt,
                                     anchor_steps, lr * (1 - i * dt / 2), enough)
        z = z + dt * cfg(v_null, v_cond, guidance)
        trajectory.append(z)
    return torch.stack(trajectory) if return_trajectory else z


@torch.no_grad()
def make_couplings(model: Velocity, z0: Tensor, context: Tensor, null: Tensor, steps: int,
                   guidance: float = 1.0, anchor_steps: int = 0, lr: float = 1e-2,
                   tolerance: float = 1e-5, return_trajectory: bool = False) -> Tensor:
    """Eq. 11: the sample z1' = ODE[v_cfg](z0 | c) that a flow reaches from each noise -> (B, ...).

    (z0, z1') is a coupling. anchor_steps = 0 is plain guidance; see anchored_sample.
    """
    if guidance == 1.0 or anchor_steps == 0:
        return euler_sample(model, z0, context, null, steps, guidance, return_trajectory)
    return anchored_sample(model, z0, context, null, steps, guidance, anchor_steps, lr, tolerance,
                           return_trajectory)


def straightness(trajectory: Tensor) -> float:
    """S(Z) = ∫ E || (Z_1 - Z_0) - dZ_t/dt ||² dt of paths (steps + 1, B, ...); Fig. 2."""
    way = trajectory[-1] - trajectory[0]
    velocity = trajectory.diff(dim=0) * (len(trajectory) - 1)
    return (way - velocity).flatten(2).pow(2).sum(2).mean().item()


# ---- 2. Networks, with the key names of Make-An-Audio 3. First MelVAE: mel <-> latent -----------

@dataclass
class VAEConfig:
    """Mel VAE; the defaults are the public 213M-parameter VAE."""
    mel_bins: int = 80                            # mel bands in and out
    channels: int = 384                           # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4)     # width of each level, in units of `channels`
    res_blocks: int = 2                           # residual blocks per level; decoder: one more
    kernel_size: int = 5                          # frames; the decoder's residual blocks keep 3
    z_channels: int = 20                          # channels before quant_conv
    embed_dim: int = 20                           # latent channels C
    down_levels: tuple[int, ...] = (0,)           # levels after which time is halved; one: T = 2 L
    norm_groups: int = 32                         # of GroupNorm; two channels a group erase a tone


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, kernel: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, 1e-6)
        self.conv1 = nn.Conv1d(width_in, width, kernel, padding=kernel // 2)
        self.norm2 = nn.GroupNorm(groups, width, 1e-6)
        self.conv2 = nn.Conv1d(width, width, kernel, padding=kernel // 2)
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
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).transpose(1, 2) for conv in (self.q, self.k, self.v))    # (B, T, width)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj_out(h)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules in a row, under the names that the public checkpoints give them."""
    return nn.Sequential(OrderedDict(modules))


def residual_blocks(width_in: int, width: int, n: int, kernel: int, groups: int) -> nn.Sequential:
    widths = [width_in] + [width] * n
    return nn.Sequential(*(ResidualBlock(widths[i], width, kernel, groups) for i in range(n)))


def middle(width: int, kernel: int, groups: int) -> nn.Sequential:
    return named(block_1=ResidualBlock(width, width, kernel, groups),
                 attn_1=FrameAttention(width, groups),
                 block_2=ResidualBlock(width, width, kernel, groups))


def vae_encoder(c: VAEConfig) -> nn.Sequential:
    widths = [c.channels * m for m in c.channel_mult]
    kernel, groups = c.kernel_size, c.norm_groups
    conv = {"kernel_size": kernel, "padding": kernel // 2}
    down = nn.Sequential()
    for i, width in enumerate(widths):
        before = widths[max(i - 1, 0)]
        down.append(named(block=residual_blocks(before, width, c.res_blocks, kernel, groups)))
        if i in c.down_levels:
            conv_half = nn.Conv1d(width, width, 3, stride=2)        # T -> T // 2
            down[i].downsample = named(pad=nn.ConstantPad1d((0, 1), 0.0), conv=conv_half)
    return named(conv_in=nn.Conv1d(c.mel_bins, widths[0], **conv), down=down,
                 mid=middle(widths[-1], kernel, groups),
                 norm_out=nn.GroupNorm(groups, widths[-1], 1e-6), swish=nn.SiLU(),
                 conv_out=nn.Conv1d(widths[-1], 2 * c.z_channels, **conv))


def vae_decoder(c: VAEConfig) -> nn.Sequential:
    widths = [c.channels * m for m in c.channel_mult]
    top, groups = len(widths) - 1, c.norm_groups
    conv = {"kernel_size": c.kernel_size, "padding": c.kernel_size // 2}
    up = OrderedDict()                              # runs from the last level to the first
    for i in range(top, -1, -1):
        before = widths[min(i + 1, top)]
        up[str(i)] = named(block=residual_blocks(before, widths[i], c.res_blocks + 1, 3, groups))
        if i - 1 in c.down_levels:
            conv_twice = nn.Conv1d(widths[i], widths[i], 3, padding=1)      # T -> 2 T
            up[str(i)].upsample = named(twice=nn.Upsample(scale_factor=2.0), conv=conv_twice)
    return named(conv_in=nn.Conv1d(c.z_channels, widths[-1], **conv),
                 mid=middle(widths[-1], 3, groups), up=nn.Sequential(up),
                 norm_out=nn.GroupNorm(groups, widths[0], 1e-6), swish=nn.SiLU(),
                 conv_out=nn.Conv1d(widths[0], c.mel_bins, **conv))


class MelVAE(nn.Module):
    """1-D convolutional VAE over time (Make-An-Audio 3): the mel bands are its input channels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder = vae_encoder(config)
        self.decoder = vae_decoder(config)
        self.quant_conv = nn.Conv1d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv1d(config.embed_dim, config.z_channels, 1)

    @torch.no_grad()
    def start(self) -> None:
        """First weights: each kernel keeps the size of what comes in, residual branches start at 0.

        With torch's own, latents start with a std of 0.2 under noise of std 1, and the decoder
        hardly hears them. Here the posterior starts with a std of 0.14.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
                nn.init.zeros_(layer.bias)
        for layer in self.modules():
            if isinstance(layer, ResidualBlock):
                nn.init.zeros_(layer.conv2.weight)
            if isinstance(layer, FrameAttention):
                nn.init.zeros_(layer.proj_out.weight)
        width = self.post_quant_conv.in_channels
        nn.init.zeros_(self.quant_conv.weight[width:])
        nn.init.constant_(self.quant_conv.bias[width:], -4.0)       # log-variance

    @torch.no_grad()
    def center(self, mean: Tensor) -> None:
        """Let an untrained VAE begin at the mean (80,) of the log10 mels to come."""
        self.encoder.conv_in.bias -= self.encoder.conv_in.weight.sum(2) @ mean
        self.decoder.conv_out.bias.copy_(mean)

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """log10 mel (B, 80, T) -> mean and log-variance of the posterior, each (B, C, L)."""
        mean, logvar = self.quant_conv(self.encoder(mel)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, C, L) -> log10 mel (B, 80, T)."""
        return self.decoder(self.post_quant_conv(z))


def vae_loss(vae: MelVAE, mel: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Squared error of the mel + kl_weight x KL(posterior || N(0, I)) per latent element -> scalar.

    noise (B, C, L) ~ N(0, I). Ours: the public VAE has an absolute error and a discriminator.
    """
    mean, logvar = vae.encode(mel)
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
    return F.mse_loss(vae.decode(mean + (logvar / 2).exp() * noise), mel) + kl_weight * kl


# ---- Text encoders: captions -> context (B, N, D) ------------------------------------------------

@dataclass
class TextConfig:
    encoder: str = "bytes"                        # "none", key of TEXT_ENCODERS, or hub id
    max_length: int = 128                         # bytes or tokens; longer captions are cut
    layers: int = 4                               # of the byte encoder; its width is context_dim
    heads: int = 8
    bert: dict = field(default_factory=dict)      # make-an-audio: sizes in transformers' names
    t5: dict = field(default_factory=dict)
    tokenizers: tuple[str, ...] = ()              # make-an-audio: hub ids or folders


def clean_text(text: str) -> str:
    """A caption or prompt as models read it: NFC, as people type, with one space between words.

    macOS hands out names in which é is two letters.
    """
    text = unicodedata.normalize("NFC", text)
    shown = [" " if unicodedata.category(x) in ("Cc", "Cs") else x for x in text]
    return " ".join("".join(shown).split())


class TextEncoder(nn.Module):
    """Bytes in, transformer layers over words, one context token per word.

    A word is the sum of the embeddings of its bytes and of its 3, 4 and 5 byte pieces, looked up by
    hash (fastText, Bojanowski et al. 2017), and turned by its place, as RoPE turns queries. Padding
    is attended to, as in the public systems: a context does not depend on the batch it was made in.
    """
    PIECES = (3, 4, 5)
    BUCKETS = 2048
    trained = True                                # with the flow, up to the 1-RF

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        self.max_length = config.max_length
        self.words = config.max_length // 4
        self.bytes = nn.Embedding(257, width)
        self.pieces = nn.Embedding(len(self.PIECES) * self.BUCKETS, width)
        nn.init.normal_(self.pieces.weight, std=0.3)
        layers = (nn.TransformerEncoderLayer(width, config.heads, 2 * width, dropout=0.0,
                                             activation="gelu", batch_first=True, norm_first=True)
                  for _ in range(config.layers))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        half_turn = torch.arange(self.words)[:, None] * math.pi / self.words
        octaves = 2.0 ** (-torch.arange(width // 2) / (width / 8))
        self.register_buffer("turn", turns(half_turn * octaves), persistent=False)
        powers = 389 ** torch.arange(max(self.PIECES))      # a prime above 257 ids
        self.register_buffer("powers", powers, persistent=False)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> byte ids (B, max_length); padding is 0, byte b is b + 1."""
        ids = torch.zeros(len(captions), self.max_length, dtype=torch.long)
        for row, caption in zip(ids, captions):
            held = caption.encode()[:self.max_length]
            row[:len(held)] = torch.tensor(list(held)) + 1
        return ids

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or their byte ids (B, max_length) -> context (B, N = max_length / 4, D)."""
        ids = captions if isinstance(captions, Tensor) else self.tokenize(captions)
        ids = ids.to(self.turn.device)
        word = (ids == 1 + ord(" ")).cumsum(1)                      # the word of each byte
        x = self.bytes(ids) + self.pieces(self.hashes(ids, word)).sum(-2)           # (B, bytes, D)
        member = F.one_hot(word.clamp(max=self.words - 1), self.words)              # (B, bytes, N)
        member = member * (ids > 0)[..., None]                      # padding belongs to none
        x = rotate(member.transpose(1, 2).to(x) @ x, self.turn)                     # (B, N, D)
        return self.norm(self.layers(x))

    def hashes(self, ids: Tensor, word: Tensor) -> Tensor:
        """The bucket of the n bytes of a word that end at each byte -> (B, bytes, len(PIECES))."""
        buckets = []
        for i, n in enumerate(self.PIECES):
            last = F.pad(ids, (n - 1, 0), value=-1).unfold(1, n, 1)                 # (B, bytes, n)
            same = F.pad(word, (n - 1, 0), value=-1).unfold(1, n, 1) == word[..., None]
            number = (last * same * self.powers[:n]).sum(-1)
            buckets.append(number % self.BUCKETS + i * self.BUCKETS)
        return torch.stack(buckets, -1)


def hub_model(auto: type, source: str, **how):
    """auto.from_pretrained(source), a folder or hub id; runs no code that comes with it.

    Raises InputError, in one line, for what cannot be loaded.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and source.startswith((".", "~", "/")):
        raise InputError(f"{source}: this folder of a model is needed, and is not there")
    try:
        place = str(folder) if folder.is_dir() else source
        return auto.from_pretrained(place, trust_remote_code=False, **how)
    except Exception as e:                          # transformers and the hub have many
        cause = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{source}: not loaded by {auto.__name__} ({cause})") from e


def pretrained_width(source: str) -> int:
    """Width D of the token states of a transformers text model."""
    from transformers import AutoConfig
    config = hub_model(AutoConfig, source)
    return getattr(config, "text_config", config).hidden_size


class PretrainedText(nn.Module):
    """A frozen text model of transformers (CLAP's text tower, T5, BERT ...) -> its token states.

    Padding is masked inside the model, as in its own training, and its states are set to zero. The
    model is no submodule: its weights are not ours to save again with every stage.
    """
    trained = False

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, ClapTextModel
        kind = hub_model(AutoConfig, config.encoder).model_type
        loader = ClapTextModel if kind.startswith("clap") else AutoModelForTextEncoding
        model = hub_model(loader, config.encoder).eval().requires_grad_(False)
        self.frozen = [model]
        self.tokenizer = hub_model(AutoTokenizer, config.encoder)
        self.max_length = config.max_length

    def _apply(self, fn, recurse: bool = True):     # .to(device) reaches the model all the same
        self.frozen[0]._apply(fn)
        return super()._apply(fn, recurse)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> ids and mask, (B, 2, N)."""
        held = self.tokenizer(captions, padding="max_length", truncation=True,
                              max_length=self.max_length, return_tensors="pt")
        return torch.stack([held.input_ids, held.attention_mask], 1)

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or what `tokenize` returns -> context (B, N, D)."""
        model = self.frozen[0]
        ids = captions if isinstance(captions, Tensor) else self.tokenize(captions)
        ids, mask = ids.to(model.device).unbind(1)
        return model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


TEXT_ENCODERS: dict[str, type] = {"bytes": TextEncoder}     # a fork adds its own


def text_encoder(config: TextConfig, width: int) -> nn.Module | None:
    """The text encoder that `config.encoder` names, with contexts of `width`; None for "none"."""
    if config.encoder == "none":
        return None
    if config.encoder == "make-an-audio" and config.encoder not in TEXT_ENCODERS:
        raise InputError("the text stage of Make-An-Audio: `import pretrained.make_an_audio` first")
    return TEXT_ENCODERS.get(config.encoder, PretrainedText)(config, width)


# ---- DiT: the velocity v(z_t, t, c) --------------------------------------------------------------

@dataclass
class DiTConfig:
    """Backbone; the defaults are DiT-M of Make-An-Audio 3, the paper's Base (197.9M parameters)."""
    in_channels: int = 20                         # latent channels C
    context_dim: int = 1024                       # context width D
    hidden_size: int = 768
    num_heads: int = 32
    depth: int = 16                               # blocks
    max_len: int = 1000                           # longest latent, frames, of the position table
    absolute_positions: bool = False              # tell each frame its place too; see DiT
    integer_time: bool = False                    # round 1000 t down, as the public code does


def turns(angle: Tensor) -> Tensor:
    """Angles (L, width / 2) -> the cosines and signed sines that `rotate` takes, (2, L, width)."""
    cos, sin = angle.cos(), angle.sin()
    cosines = torch.stack([cos, cos], -1)
    sines = torch.stack([-sin, sin], -1)
    return torch.stack([cosines, sines]).flatten(2)


def rope_table(length: int, width: int) -> Tensor:
    """Rotary positions (RoPE): turns by position x 10000^(-2i / width) -> (2, length, width)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return turns(torch.arange(length)[:, None] * frequency)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring elements (2i, 2i + 1) of x (..., L, width) as complex numbers."""
    cos, sin = table.to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class Attention(nn.Module):
    """Attention over the latent frames, plus gated attention to the text with the same queries."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.wk_y = nn.Linear(context_dim, width, bias=False)
        self.wv_y = nn.Linear(context_dim, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(heads))

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, H, L, width / H)."""
        return x.unflatten(-1, (len(self.gate), -1)).transpose(1, 2)

    def forward(self, x: Tensor, y: Tensor, there: Tensor, rope: Tensor) -> Tensor:
        q = rotate(self.heads(self.wq(x)), rope)
        k = rotate(self.heads(self.wk(x)), rope)
        audio = F.scaled_dot_product_attention(q, k, self.heads(self.wv(x)))
        text = F.scaled_dot_product_attention(q, self.heads(self.wk_y(y)), self.heads(self.wv_y(y)),
                                              there[:, None, None])
        out = torch.addcmul(audio, self.gate.tanh()[:, None, None].to(text.dtype), text)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = 256 * math.ceil(int(8 * width / 3) / 256)       # SwiGLU, as in LLaMA
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])     # one kernel for two


class Block(nn.Module):
    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attention = Attention(width, context_dim, heads)
        self.feed_forward = FeedForward(width)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention_y_norm = nn.RMSNorm(context_dim, eps=1e-5)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, y: Tensor, there: Tensor, rope: Tensor) -> Tensor:
        """x (B, L, width), c (B, width) of time and text, y (B, N, D) -> (B, L, width)."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(c).chunk(6, -1)
        h = modulate(self.attention_norm(x), shift_a, scale_a)
        heard = self.attention(h, self.attention_y_norm(y), there, rope)
        x = torch.addcmul(x, gate_a[:, None], heard)
        h = modulate(self.ffn_norm(x), shift_f, scale_f)
        return torch.addcmul(x, gate_f[:, None], self.feed_forward(h))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """1000 t (B,) -> (B, width)."""
        place = torch.arange(128, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(10000) * place / 128)
        angle = t[:, None] * frequency              # float32 at least: bf16 has no room for 1000 t
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer of Make-An-Audio 3 ("Flag-DiT"): adaLN from time and pooled text.

    RoPE tells frames how far apart they are, not where they are. At t = 0 every frame is noise, and
    nothing else tells the first half of "a bell followed by rain" from the second. The distilled
    model sees t = 0 alone. `absolute_positions` adds sinusoids of the place (Vaswani et al. 2017).
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        c, width = config, config.hidden_size
        self.integer_time = c.integer_time
        self.t_embedder = TimeEmbedder(width)
        self.cap_embedder = nn.Sequential(nn.LayerNorm(c.context_dim),
                                          nn.Linear(c.context_dim, width))
        self.proj_in = nn.Linear(c.in_channels, width)
        self.blocks = nn.ModuleList(Block(width, c.context_dim, c.num_heads)
                                    for _ in range(c.depth))
        self.final_layer = FinalLayer(width, c.in_channels)
        self.register_buffer("rope", rope_table(c.max_len, width // c.num_heads), persistent=False)
        places = rotate(torch.ones(width), rope_table(c.max_len, width))        # (max_len, width)
        self.register_buffer("places", places * c.absolute_positions, persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        for block in self.blocks:                   # half open gates learn sooner than closed ones
            nn.init.constant_(block.attention.gate, 0.5)
            nn.init.constant_(block.adaLN_modulation[1].bias.detach().view(6, -1)[2::3], 0.5)
        nn.init.zeros_(self.final_layer.linear.weight)      # an untrained network returns 0
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """z (B, C, L), t (B,) in [0, 1], context (B, N, D) -> velocity (B, C, L)."""
        length = z.shape[-1]                        # at most max_len
        rope = self.rope[:, :length]
        time = (1000 * t).floor() if self.integer_time else 1000 * t
        there = context.any(2)                      # (B, N): tokens of zeros are masked
        there = there | ~there.any(1, keepdim=True)         # all masked: mask none
        pooled = context.sum(1) / there.sum(1, keepdim=True)
        c = self.t_embedder(time) + self.cap_embedder(pooled)       # (B, width)
        x = self.proj_in(z.transpose(1, 2)) + self.places[:length]              # (B, L, width)
        for block in self.blocks:
            x = block(x, c, context, there, rope)
        return self.final_layer(x, c).transpose(1, 2).to(z.dtype)


# ---- Sizes ---------------------------------------------------------------------------------------

@dataclass
class FlashAudioConfig:
    """What config.json holds; its parts may be the dictionaries that JSON makes of them."""
    vae: VAEConfig = field(default_factory=VAEConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    frames: int = 624                             # mel frames T in training; 624 = 9.984 s (§4.1)
    stage: str = ""                               # of training: vae, cfm, rf1, rf2, distill

    def __post_init__(self):
        for name, kind in (("vae", VAEConfig), ("dit", DiTConfig), ("text", TextConfig)):
            part = getattr(self, name)
            if isinstance(part, dict):
                plain = {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
                setattr(self, name, kind(**plain))


SIZES: dict[str, FlashAudioConfig] = {
    # ours: 2.048 s, 4M parameters, trained on a laptop CPU in minutes
    "toy": FlashAudioConfig(
        VAEConfig(channels=64, channel_mult=(1, 1, 1), res_blocks=1, down_levels=(0, 1),
                  norm_groups=4),
        DiTConfig(context_dim=128, hidden_size=192, num_heads=6, depth=3, max_len=256,
                  absolute_positions=True),
        TextConfig(max_length=64, layers=2, heads=4), frames=128),
    # 74M as in Table 5, which gives no shapes: ours, here and in large. VAE of 53M, 4.992 s: ours
    "small": FlashAudioConfig(VAEConfig(channels=192),
                              DiTConfig(hidden_size=512, num_heads=16, depth=12,
                                        absolute_positions=True), frames=312),
    "base": FlashAudioConfig(),     # 197M, the paper's model
    # 429M
    "large": FlashAudioConfig(dit=DiTConfig(hidden_size=1024, num_heads=32, depth=20)),
}


# ---- 3. Sound ------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def mel_basis(device: str = "cpu") -> Tensor:
    """Slaney mel filters, 0 to 8000 Hz -> (80, 513)."""
    from torchaudio.functional import melscale_fbanks
    filters = melscale_fbanks(N_FFT // 2 + 1, 0.0, 8000.0, 80, SAMPLE_RATE, "slaney", "slaney")
    return filters.T.contiguous().to(device)


def mel_spectrogram(wav: Tensor) -> Tensor:
    """Waveform (B, samples) in [-1, 1] at 16 kHz -> log10 mel magnitude (B, 80, samples // 256).

    As in Make-An-Audio and BigVGAN: frame i is centred on sample 256 i + 128, silence is -5.
    """
    pad = (N_FFT - HOP) // 2
    if wav.shape[-1] <= pad:
        raise InputError(f"a clip of {wav.shape[-1]} samples is too short for a mel spectrogram "
                         f"(at least {pad + 1})")
    wav = F.pad(wav.clamp(-1, 1)[:, None], (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(N_FFT, device=wav.device, dtype=torch.float32)
    spectrum = torch.stft(wav, N_FFT, HOP, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real ** 2 + spectrum.imag ** 2 + 1e-9).sqrt()         # (B, 513, T)
    return (mel_basis(str(wav.device)) @ magnitude).clamp(min=1e-5).log10()


def mel_to_magnitude(mel: Tensor) -> Tensor:
    """log10 mel (B, 80, T) -> magnitude (B, 513, T) >= 0, by updates as of Lee and Seung (2001)."""
    basis = mel_basis(str(mel.device))
    spread = (basis / basis.sum(0).clamp(min=1e-9)).T       # (513, 80)
    wanted = (10 ** mel.float()).clamp(min=1e-5)
    magnitude = torch.ones_like(spread[:, :1])              # flat, to be smooth within a band
    for _ in range(8):
        magnitude = magnitude * (spread @ (wanted / (basis @ magnitude)))
    return magnitude


def griffin_lim(mel: Tensor, iterations: int = 8) -> Tensor:
    """log10 mel (B, 80, T) -> waveform (B, 256 T) in [-1, 1], by the fast Griffin-Lim algorithm."""
    from torchaudio.functional import griffinlim            # from zero phase: the mel decides all
    magnitude = F.pad(mel_to_magnitude(mel), (0, 1), mode="replicate")  # T + 1 frames span 256 T
    window = torch.hann_window(N_FFT, device=mel.device, dtype=torch.float32)
    wav = griffinlim(magnitude, window, N_FFT, HOP, N_FFT, power=1.0, n_iter=iterations,
                     momentum=0.99, length=None, rand_init=False)
    return F.pad(wav, (HOP // 2, -HOP // 2)).clamp(-1, 1)   # frames at 256 i -> at 256 i + 128


# ---- 4. FlashAudio: the whole model --------------------------------------------------------------

def autocast(device: torch.device) -> torch.autocast:
    """`with autocast(device):` computes in bf16 on a GPU that is made for it, else in float32."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


class FlashAudio(nn.Module, PyTorchModelHubMixin, library_name="flashaudio",
                 pipeline_tag="text-to-audio", paper_url="https://arxiv.org/abs/2410.12266"):
    """VAE + text encoder + DiT; z1 = scale_factor * the VAE's latent, so that its std is 1."""

    sampler = staticmethod(euler_sample)            # a fork's model may have another
    card = ""                                       # README.md, for the hub

    def __init__(self, config: FlashAudioConfig):
        super().__init__()
        self.config = config
        self.vae = MelVAE(config.vae)
        self.text = text_encoder(config.text, config.dit.context_dim)
        self.dit = DiT(config.dit)
        self.vae.start()
        self.register_buffer("scale_factor", torch.ones(()))
        self.stride = 2 ** len(config.vae.down_levels)      # mel frames per latent frame
        self.vocoder: Callable[[Tensor], Tensor] = griffin_lim

    @property
    def device(self) -> torch.device:
        return self.scale_factor.device

    def encode(self, mel: Tensor) -> Tensor:
        """log10 mel (B, 80, T) -> z1 (B, C, L), the mean of its posterior."""
        return self.scale_factor * self.vae.encode(mel)[0]

    def decode(self, z: Tensor) -> Tensor:
        """z1 (B, C, L) -> log10 mel (B, 80, T)."""
        with autocast(self.device):
            return self.vae.decode(z / self.scale_factor).to(self.scale_factor)

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """v(z_t, t, c) -> (B, C, L); text: contexts (B, N, D), or captions as ids of `tokenize`."""
        context = text.to(z) if text.is_floating_point() else self.text(text)
        return self.dit(z, t, context)

    def latent_shape(self, seconds: float | None = None) -> tuple[int, int]:
        """(C, L) of a clip of `seconds`, by default the length that the model was trained on."""
        trained = self.config.frames * HOP / SAMPLE_RATE
        seconds = trained if seconds is None else seconds
        length = max(1, round(seconds * SAMPLE_RATE / HOP / self.stride))
        if length > self.config.dit.max_len:
            longest = self.config.dit.max_len * self.stride * HOP / SAMPLE_RATE
            raise InputError(f"{seconds:g} s is too long: this model reaches {longest:g} s")
        if length > self.config.frames // self.stride:
            warnings.warn(f"{seconds:g} s is longer than the {trained:g} s of training")
        return self.config.vae.embed_dim, length

    def noise(self, prompts: list[str], seed: int, shape: tuple[int, int]) -> Tensor:
        """z0 (B, C, L): the k-th copy of a prompt (k from 0) has the noise of seed + k."""
        draws = []
        for i, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + prompts[:i].count(prompt))
            draws.append(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))
        return torch.stack(draws).to(self.scale_factor)

    @torch.no_grad()
    def contexts(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (B, N, D), at the precision that training had them."""
        with torch.autocast(self.device.type, enabled=False):
            return self.text([clean_text(prompt) for prompt in prompts])

    def check(self, prompts: str | list[str] | Tensor, steps: int, guidance: float,
              seconds: float | None, seed: int | None) -> list[str] | Tensor:
        """The prompts as a list, or the context that they are. Raises InputError, in one line."""
        if not isinstance(steps, Integral) or steps < 1:
            raise InputError(f"steps is {steps!r}, must be a whole number of at least 1")
        if not isinstance(guidance, Real) or not math.isfinite(guidance):
            raise InputError(f"guidance is {guidance!r}: 1 is none, 3 is strong")
        if seconds is not None and not 0.03 <= seconds < 3600:
            raise InputError(f"seconds is {seconds:g}, must be at least 0.03 and below 3600")
        if seed is not None and not 0 <= seed < 2 ** 31:
            raise InputError(f"seed is {seed}, must be from 0 to {2 ** 31 - 1}")
        if self.text is None and (guidance != 1.0 or not isinstance(prompts, Tensor)):
            raise InputError("this model has no text encoder: give it contexts, and no guidance")
        if isinstance(prompts, Tensor):
            return prompts
        prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("give a prompt, or a list of prompts: each is a text")
        for prompt in prompts:
            size = len(prompt.encode(errors="replace"))
            if isinstance(self.text, TextEncoder) and size > self.text.max_length:
                warnings.warn(f"only {self.text.max_length} bytes are read of: {prompt}")
        return prompts

    @torch.no_grad()
    def sample_latents(self, prompts: str | list[str] | Tensor, steps: int = 1,
                       guidance: float = 1.0, seconds: float | None = None,
                       seed: int | None = None, z0: Tensor | None = None,
                       return_trajectory: bool = False) -> Tensor:
        """Prompts, or a context (B, N, D) -> z1 (B, C, L); arguments as in `generate`."""
        prompts = self.check(prompts, steps, guidance, seconds, seed)
        count = len(prompts)
        if z0 is None:
            names = [""] * count if isinstance(prompts, Tensor) else prompts
            seed = torch.Generator().seed() % 2 ** 31 if seed is None else seed
            z0 = self.noise(names, seed, self.latent_shape(seconds))
        context = prompts if isinstance(prompts, Tensor) else self.contexts(prompts)
        null = self.contexts([""]).expand(count, -1, -1) if guidance != 1.0 else None
        z0, context = z0.to(self.scale_factor), context.to(self.scale_factor)
        with autocast(self.device):
            return self.sampler(self.dit, z0, context, null, steps, guidance, return_trajectory)

    @torch.no_grad()
    def generate(self, prompts: str | list[str] | Tensor, steps: int = 1, guidance: float = 1.0,
                 seconds: float | None = None, seed: int | None = None, z0: Tensor | None = None,
                 vocoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Text to audio -> waveform (B, samples) float32 in [-1, 1] at 16 kHz.

        prompts: a caption, several, or a context (B, N, D). steps: Euler steps; one for a distilled
        model. guidance: ω, 1 is none. seconds: length, rounded to latent frames. seed: the same
        seed gives the same clips; copies of one prompt in a batch differ. z0 (B, C, L): the noise
        itself, in place of a seed. Raises InputError for arguments that make no sense. The rest of
        the batch changes a latent by rounding alone; Griffin-Lim may make other phases of that.
        """
        z = self.sample_latents(prompts, steps, guidance, seconds, seed, z0)
        return (vocoder or self.vocoder)(self.decode(z)).float()

    def generate_model_card(self, *given, **named) -> ModelCard:
        """README.md as save_pretrained and push_to_hub write it: the stage's own, if it has one."""
        return ModelCard(self.card) if self.card else super().generate_model_card(*given, **named)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu", *,
                        revision: str | None = None, token: str | None = None) -> FlashAudio:
        """What save_pretrained wrote, from a folder or hub id, to evaluate. Raises InputError."""
        from safetensors.torch import load_model
        folder = Path(source).expanduser()
        what = "not a readable model" if folder.is_dir() else "no such folder, nor had from the hub"
        try:
            if not folder.is_dir():
                folder = Path(snapshot_download(str(source), revision=revision, token=token))
            config = FlashAudioConfig(**json.loads((folder / "config.json").read_text()))
            model = cls(config)
            load_model(model, folder / "model.safetensors")
        except Exception as e:                      # safetensors, JSON, torch and the hub have many
            cause = " ".join(str(e).split())[:400] or type(e).__name__
            if isinstance(e, FileNotFoundError) and e.filename:
                what, cause = "no model here", f"{Path(e.filename).name} is missing"
            raise InputError(f"{source}: {what} ({cause})") from e
        card = folder / "README.md"
        model.card = card.read_text(encoding="utf-8") if card.exists() else ""
        return model.to(device).eval()
