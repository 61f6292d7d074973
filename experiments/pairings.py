"""What is not the paper's: a pairing, one over several steps and captions, a sampler.

    train.train_rf1(run, model, squared_pairing, partial(fa.logit_normal, mean=-0.5))
    train.Couplings(run, model, "rf2", sampler=cfg_zero_sample)
    train_rf1_over(run, model, 256, weight=3.0)
"""

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from typing import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import flashaudio as fa
import train
from flashaudio import FlashAudio, Velocity
from runs.run import Run


def squared_pairing(z0: Tensor, z1: Tensor) -> Tensor:
    """immiscible_pairing with the least sum of squared distances: optimal transport of the batch.

    z0, z1 (B, ...) -> the noise in the order of the data.
    """
    cost = -(z1.flatten(1) @ z0.flatten(1).T)       # |z1|² and |z0|² are the same in any order
    _, column = linear_sum_assignment(cost.cpu().numpy())
    return z0[column]


def caption_pairing(z0: Tensor, z1: Tensor, c: Tensor,
                    pairing: Callable[..., Tensor] = fa.immiscible_pairing) -> Tensor:
    """A pairing in which noise has a caption, too, that of the clip it was drawn for; c (B, D).

    The distance of latents and captions together keeps p(z0 | c) nearer to N(0, I), which sampling
    draws, the larger c is (C²OT, Cheng and Schwing 2025, adds the two instead).
    """
    with_captions = pairing(torch.cat([z0.flatten(1), c], 1), torch.cat([z1.flatten(1), c], 1))
    return with_captions[:, :z0[0].numel()].view_as(z0)


def train_rf1_over(run: Run, model: FlashAudio, over: int,
                   pairing: Callable[..., Tensor] = fa.immiscible_pairing,
                   weight: float = 0.0) -> FlashAudio:
    """train.train_rf1, its noise paired over the `over` clips of several steps at once.

    They are drawn together and handed out step by step; `over` is a multiple of the batch size.
    weight: of the captions in the distance, by the mean of their contexts.
    """
    size = run.flags.batch_size
    wide = replace(run, flags=replace(run.flags, batch_size=over))
    density, loss = fa.logit_normal, fa.rectified_flow_loss
    if wide.done("rf1", model, pairing, density, loss, partial(caption_pairing, c=weight)):
        return run.load("rf1")
    clips = train.Latents(run, model)
    encoder = deepcopy(model.text).cpu()            # as it is now: the model's is trained on

    @lru_cache(1)
    @torch.no_grad()
    def drawn(group: int) -> list[Tensor]:
        z0, z1, t, text = train.get_batch(wide, "rf1", clips, density, fa.no_pairing, group)
        context = text if text.is_floating_point() else encoder(text)           # (over, N, D)
        c = weight * context.float().mean(1)
        return [caption_pairing(z0, z1, c, pairing), z1, t, text]

    def draw(step: int) -> list[Tensor]:
        group, place = divmod(step * size, over)
        return [x[place:place + size] for x in drawn(group)]

    flags = run.flags
    return train.fit(run, "rf1", model, clips.parts, draw, loss, flags.rf1_steps, flags.rf1_lr)


@torch.no_grad()
def cfg_zero_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor, steps: int,
                    guidance: float = 1.0, *_, return_trajectory: bool = False) -> Tensor:
    """Guided Euler in which v(z, t, ∅) is first scaled to fit v(z, t, c) best, sample by sample.

    The scale is <v_c, v_∅> / |v_∅|² (CFG-Zero*, Fan et al. 2025). Called as `make_couplings` is; the
    settings of the anchor are unused.
    """
    def velocity(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, c]))
        v_null, v_cond = both.flatten(1).chunk(2)
        scale = (v_cond * v_null).sum(1) / v_null.pow(2).sum(1).clamp(min=1e-12)        # (B,)
        return fa.cfg(scale[:, None] * v_null, v_cond, guidance).view_as(z)

    return fa.euler_sample(velocity, z0, context, steps=steps, return_trajectory=return_trajectory)
