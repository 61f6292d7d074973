"""What is not the paper's: a pairing, a sampler, densities, as functions handed to a stage.

    train.train_rf1(run, model, pair=knn_pairing, density=variant(fa.logit_normal, mean=-0.5))
    train.couplings(run, model, "rf2", sampler=cfg_zero_sample)

A pairing sees latents alone: those that look at captions too (C²OT, ICCV 2025) are not among them.
"""

import zlib
from typing import Callable

import torch
from torch import Tensor

import flashaudio as fa
from flashaudio import Velocity


def knn_pairing(z0: Tensor, z1: Tensor, k: int = 4) -> Tensor:
    """For each latent z1 (B, ...), the nearest of k noises of its own -> (B, ...).

    Needs no assignment, but the noise is no longer exactly Gaussian (the KNN variant of Immiscible
    Diffusion, Li et al. 2025). The first of the k is z0; the others come from a generator whose
    seed is a checksum of z0, so that a step that is done again draws the same ones.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(z0.cpu().numpy().tobytes()))
    others = torch.randn(k - 1, *z0.shape, generator=generator)
    draws = torch.cat([z0[None], others.to(z0)])                                # (k, B, ...)
    nearest = (draws - z1).flatten(2).norm(dim=2).argmin(0)                     # (B,)
    return draws[nearest, torch.arange(len(z1), device=z1.device)]


@torch.no_grad()
def cfg_zero_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor, steps: int,
                    guidance: float = 1.0, *_, return_trajectory: bool = False) -> Tensor:
    """Guided Euler in which v(z, t, ∅) is first scaled to fit v(z, t, c) best, sample by sample.

    The scale is <v_c, v_∅> / |v_∅|² (CFG-Zero*, Fan et al. 2025). z0 (B, ...), context and null
    (B, N, D) -> z1 (B, ...), or its path (steps + 1, B, ...). Takes what `make_couplings` takes,
    and leaves the settings of the anchor unused.
    """
    def velocity(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, c]))
        v_null, v_cond = both.flatten(1).chunk(2)
        scale = (v_cond * v_null).sum(1) / v_null.pow(2).sum(1).clamp(min=1e-12)        # (B,)
        v_null = scale[:, None] * v_null
        return (v_null + guidance * (v_cond - v_null)).view_as(z)

    return fa.euler_sample(velocity, z0, context, steps=steps, return_trajectory=return_trajectory)


def variant(density: Callable, **changes: float) -> Callable:
    """A density of t with other parameters, and a name of its own, by which stages know it."""
    def changed(n: int, generator: torch.Generator | None = None) -> Tensor:
        return density(n, generator=generator, **changes)

    changed.__qualname__ = f"{density.__qualname__}({changes})"
    return changed
