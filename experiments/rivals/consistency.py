"""Consistency distillation of the guided flow, as AudioLCM and ConsistencyTTA do of a diffusion.

From anywhere on a path of the CFM the student jumps to its end: x(z, t) = z + (1 - t) v(z, t, c),
which at t = 1 is z by construction. It learns to say there what an average of itself says one step
of the teacher later (Song et al. 2023; guidance inside the step: LCM, Luo et al. 2023).
"""

import zlib
from typing import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flashaudio as fa
from experiments.rivals.shared import TRAINING, Rival
from flashaudio import FlashAudio, Velocity, column

TEACHER_STEPS = 50                  # of the path
DECAY = 0.95                        # of the average
HUBER = 1e-3                        # all three as in LCM


def grid(n: int, generator: torch.Generator | None = None) -> Tensor:
    """t at the teacher's steps, 0, 1/50 .. 49/50 -> (n,)."""
    return torch.randint(TEACHER_STEPS, (n,), generator=generator) / TEACHER_STEPS


def estimate(network: Velocity, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Where the velocity at z (B, ...) and t (B,) would end: z + (1 - t) v(z, t, c)."""
    return z + column(1 - t, z) * network(z, t, context)


@torch.no_grad()
def consistency_target(teacher: Velocity, average: Velocity, z: Tensor, t: Tensor, context: Tensor,
                       null: Tensor, guidance: float) -> Tensor:
    """What the average network says of the end, after one teacher's step from z (B, ...)."""
    v = fa.guided_velocity(teacher, z, t, context, null, guidance)
    return estimate(average, z + v / TEACHER_STEPS, t + 1 / TEACHER_STEPS, context)


def consistency_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor | None,
                       steps: int, guidance: float = 1.0, return_trajectory: bool = False
                       ) -> Tensor:
    """Jump to the end, go back to the next t with new noise, jump again; as fa.euler_sample.
    Guidance is in the weights. The new noise of a clip depends on its first, not on its batch."""
    seeds = [zlib.crc32(noise.cpu().numpy().tobytes()) for noise in z0]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z, path = z0, [z0]
    for i in range(steps):
        t = z.new_full((len(z),), i / steps)
        if i > 0:
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z)
            z = torch.lerp(noise, z, i / steps)
        z = estimate(model, z, t, context)
        path.append(z)
    return torch.stack(path) if return_trajectory else z


class Consistency(Rival):
    label = "consistency"
    cost = TRAINING + 2 + 1             # student, guided teacher, average
    lr = 5e-4
    tried = ((5e-4, 1e-3), (2.0, 3.0))
    sampled = ((1, 1.0), (4, 1.0))
    uses = (consistency_target, estimate)
    density = staticmethod(grid)
    drops_captions = False
    sampler = staticmethod(consistency_sample)

    @staticmethod
    def loss(start: FlashAudio, guidance: float) -> Callable[..., Tensor]:
        null = start.contexts([""])
        average = AveragedModel(start.dit, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

        def loss(model: FlashAudio, z0: Tensor, z1: Tensor, t: Tensor, context: Tensor) -> Tensor:
            average.update_parameters(model.dit)        # the first time, it copies them
            z = torch.lerp(z0, z1, column(t, z0))
            target = consistency_target(start.dit, average, z, t, context, null.expand_as(context),
                                        guidance)
            error = estimate(model.dit, z, t, context) - target
            return ((error ** 2 + HUBER ** 2).sqrt() - HUBER).mean()    # squared near 0

        return loss
