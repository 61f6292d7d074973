"""What is not the paper's: pairings, a sampler, densities, as functions handed to a stage.

    train.train_rf1(run, model, pair=knn_pairing, density=variant(fa.logit_normal, mean=-0.5))
    train.couplings(run, model, "rf2", sampler=cfg_zero_sample)
    train_rf1_over(run, model, 256)

A pairing sees latents alone: those that look at captions too (C²OT, ICCV 2025) are not among them.
"""

import zlib
from dataclasses import replace
from functools import lru_cache
from typing import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import flashaudio as fa
import train
from flashaudio import FlashAudio, Velocity
from runs.run import Run


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


def squared_pairing(z0: Tensor, z1: Tensor) -> Tensor:
    """immiscible_pairing with the least sum of squared distances: optimal transport of the batch.

    z0, z1 (B, ...) -> the noise in the order of the data.
    """
    cost = -(z1.flatten(1) @ z0.flatten(1).T)       # |z1|² and |z0|² are the same in any order
    _, column = linear_sum_assignment(cost.cpu().numpy())
    return z0[column]


def train_rf1_over(run: Run, model: FlashAudio, over: int,
                   pair: train.Pairing = fa.immiscible_pairing) -> FlashAudio:
    """train.train_rf1, its noise paired over the `over` clips of several steps at once.

    They are drawn together and handed out step by step; `over` is a multiple of the batch size.
    """
    flags = run.flags
    size = flags.batch_size
    loss = fa.rectified_flow_loss
    wide = replace(run, flags=replace(flags, batch_size=over))
    if wide.done("rf1", model, pair, fa.logit_normal, loss):        # is known by the wide batch
        return run.load("rf1")
    draw_together, parts = train.clip_batches(wide, "rf1", model, fa.logit_normal, pair)
    drawn = lru_cache(1)(draw_together)

    def draw(step: int) -> list[Tensor]:
        place = step * size
        return [x[place % over:place % over + size] for x in drawn(place // over)]

    return train.fit(run, "rf1", model, parts, draw, loss, flags.rf1_steps, flags.rf1_lr)


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
    changed.__wrapped__ = density                   # whose code it is known by, too
    return changed
