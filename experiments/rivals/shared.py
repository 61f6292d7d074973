"""What the rivals share: a model with another sampler, and what training may cost.

Costs are counted in forwards of the backbone for one clip. A training step is three a clip, as a
backward is two; an Euler step is one, a guided one two. VAE, text encoder and vocoder are the same
for all and left out.
"""

from dataclasses import replace
from typing import Any, Callable

import torch
from torch import Tensor

import flashaudio as fa
import train
from flashaudio import FlashAudio
from runs.plan import evaluations
from runs.run import Run

TRAINING = 3            # forward and backward


def coupling_cost(flags: train.Flags, stage: str) -> int:
    """Forwards that the couplings of rf2 or distill take.

    Anchored samples that are near enough to the path stop earlier: this is the most that it may be.
    """
    each = evaluations(flags, stage)
    forwards = each * getattr(flags, f"{stage}_coupling_steps")
    if each > 2:
        forwards -= 1                               # anchored: at z0 the caption's is the path's
    return forwards * getattr(flags, f"{stage}_couplings")


def chain_cost(flags: train.Flags, last: str = "distill") -> int:
    """Forwards of train.py's stages from cfm to `last`, couplings included."""
    total = 0
    for stage in ("cfm", "rf1", "rf2", "distill"):
        total += getattr(flags, f"{stage}_steps") * flags.batch_size * TRAINING
        if stage in ("rf2", "distill"):
            total += coupling_cost(flags, stage)
        if stage == last:
            break
    return total


def after_cfm(flags: train.Flags) -> int:
    """Forwards that FlashAudio takes from the CFM on: what a rival that starts there is given."""
    return chain_cost(flags) - chain_cost(flags, "cfm")


def affordable(flags: train.Flags, forwards: float, cost: float) -> int:
    """Training steps that `forwards` pay for, at so many a clip."""
    return max(1, int(forwards / (cost * flags.batch_size)))


def batches(run: Run, stage: str, model: FlashAudio, density: Callable[..., Tensor],
            dropout: float) -> train.Draw:
    """train.clip_batches with another share of captions replaced by ""."""
    flags = replace(run.flags, caption_dropout=dropout)
    return train.clip_batches(replace(run, flags=flags), stage, model, density)[0]


def read(model: FlashAudio, text: Tensor) -> Tensor:
    """The texts of a batch, contexts or not yet -> contexts (B, N, D)."""
    return text.float() if text.is_floating_point() else model.text(text)


class Rival(FlashAudio):
    """A FlashAudio with another sampler: `generate`, evaluation and files are as they were.

    sampler(network, z0, context, null, steps, guidance) -> the path (steps + 1, B, C, L).
    """
    sampler: Callable[..., Tensor]

    @classmethod
    def begin(cls, model: FlashAudio, seed: int) -> "Rival":
        """The rival with the weights of a model; what is new in its network comes from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rival = cls(model.config)
        unknown = rival.load_state_dict(model.state_dict(), strict=False).unexpected_keys
        assert not unknown, unknown
        return rival.to(model.device)

    @torch.no_grad()
    def sample_latents(self, prompts: Any, steps: int = 1, guidance: float = 1.0,
                       seconds: float | None = None, seed: int | None = None,
                       z0: Tensor | None = None, return_trajectory: bool = False) -> Tensor:
        """As FlashAudio.sample_latents, of captions."""
        prompts = self.check(prompts, steps, guidance, seconds)
        if z0 is None:
            z0 = self.noise(prompts, seed or 0, self.latent_shape(seconds))
        null = self.contexts([""]).expand(len(prompts), -1, -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            path = self.sampler(self.dit, z0.to(self.device), self.contexts(prompts), null, steps,
                                guidance)
        return path if return_trajectory else path[-1]


def estimate(network: fa.Velocity, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Where the velocity at z (B, ...) and t (B,) would end: z + (1 - t) v(z, t, c)."""
    return z + column(1 - t, z) * network(z, t, context)


def column(t: Tensor, z: Tensor) -> Tensor:
    """t (B,) as (B, 1, ...), to multiply z (B, ...) by."""
    return t.view(-1, *[1] * (z.dim() - 1))
