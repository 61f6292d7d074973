"""Latent diffusion, as in AudioLDM, Tango and Make-An-Audio, which take 100 to 200 steps.

v-prediction (Salimans and Ho 2022), cosine schedule (Nichol and Dhariwal 2021), DDIM with eta = 0
(Song et al. 2021), from the CFM's first weights. The papers' time is 1 - t.
"""

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import flashaudio as fa
from experiments.rivals.shared import Rival
from flashaudio import FlashAudio, Velocity, column


def signal_and_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 - ᾱ) of the cosine schedule at t (...): 0 and 1 at t = 0, 1 and 0 at t = 1.

    Continuous in t, so the noise at t = 0 is pure: no step is clipped to β = .999.
    """
    angle = (1.008 - t) / 1.008 * math.pi / 2
    signal = (angle.cos() / math.cos(0.008 / 1.008 * math.pi / 2)).clamp(0, 1)
    return signal, (1 - signal ** 2).sqrt()


def diffusion_loss(model: Velocity, z0: Tensor, z1: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """E || (√ᾱ z0 - √(1-ᾱ) z1) - v(√ᾱ z1 + √(1-ᾱ) z0, t, c) ||², averaged over elements."""
    signal, noise = signal_and_noise(column(t, z1))
    return F.mse_loss(model(signal * z1 + noise * z0, t, context), signal * z0 - noise * z1)


def ddim_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor | None, steps: int,
                guidance: float = 1.0, return_trajectory: bool = False) -> Tensor:
    """DDIM with eta = 0 from z0 (B, ...); takes and returns what fa.euler_sample does.

    Trailing time steps: the first is at pure noise (Lin et al. 2024). Each splits z into estimates
    of data and noise, x and ε, and mixes them again as the next time has it.
    """
    times = torch.linspace(0, 1, steps + 1, device=z0.device)
    signal, noise = (x.to(z0) for x in signal_and_noise(times))
    z, path = z0, [z0]
    for i in range(steps):
        v = fa.guided_velocity(model, z, times[i].expand(len(z)), context, null, guidance)
        x = signal[i] * z - noise[i] * v
        epsilon = noise[i] * z + signal[i] * v
        z = signal[i + 1] * x + noise[i + 1] * epsilon
        path.append(z)
    return torch.stack(path) if return_trajectory else z


class Diffusion(Rival):
    label = "diffusion, DDIM"
    start = "vae"                       # its backbone and text encoder are untrained
    lr = 1.5e-3
    tried = ((3.5e-4, 7e-4, 1.5e-3, 3e-3), (3.0,))
    sampled = ((25, 3.0), (25, 2.0))
    uses = (diffusion_loss, signal_and_noise)
    sampler = staticmethod(ddim_sample)

    @staticmethod
    def loss(start: FlashAudio, guidance: float) -> Callable[..., Tensor]:
        return diffusion_loss           # guidance is for sampling: training knows none
