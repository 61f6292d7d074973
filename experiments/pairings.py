"""Pairings that are not the paper's: squared distances, over several steps, aware of captions.

    train.train_rf1(run, model, squared_pairing)
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
from flashaudio import FlashAudio
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
    """A pairing of latents and captions c (B, D) together: noise has that of the clip it came with.

    The larger c is, the nearer p(z0 | c) stays to N(0, I), which sampling draws (C²OT, Cheng and
    Schwing 2025, adds the two distances instead).
    """
    paired = pairing(torch.cat([z0.flatten(1), c], 1), torch.cat([z1.flatten(1), c], 1))
    return paired[:, :z0[0].numel()].view_as(z0)


def train_rf1_over(run: Run, model: FlashAudio, over: int,
                   pairing: Callable[..., Tensor] = fa.immiscible_pairing,
                   weight: float = 0.0) -> FlashAudio:
    """train.train_rf1, its noise paired over the `over` clips of several steps at once.

    They are drawn together and handed out step by step; `over` is a multiple of the batch size.
    weight: of the captions in the distance, by the mean of their contexts.
    """
    flags = run.flags
    wide = replace(run, flags=replace(flags, batch_size=over))
    density, loss = fa.logit_normal, fa.rectified_flow_loss
    if wide.done("rf1", model, pairing, density, loss, partial(caption_pairing, c=weight)):
        return run.load("rf1")
    clips = train.Latents(run, model)
    encoder = deepcopy(model.text).cpu()            # as it is now: the model's is trained on

    @lru_cache(1)
    @torch.no_grad()
    def together(group: int) -> list[Tensor]:
        z0, z1, t, text = train.get_batch(wide, "rf1", clips, density, fa.no_pairing, group)
        context = text if text.is_floating_point() else encoder(text)           # (over, N, D)
        c = weight * context.float().mean(1)
        return [caption_pairing(z0, z1, c, pairing), z1, t, text]

    def draw(step: int) -> list[Tensor]:
        group, place = divmod(step * flags.batch_size, over)
        return [x[place:place + flags.batch_size] for x in together(group)]

    return train.fit(run, "rf1", model, clips.parts, draw, loss, flags.rf1_steps, flags.rf1_lr)
