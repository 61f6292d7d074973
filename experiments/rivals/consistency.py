"""Consistency distillation of the guided flow, as AudioLCM and ConsistencyTTA do of a diffusion.

From anywhere on a path of the CFM the student jumps to its end: x(z, t) = z + (1 - t) v(z, t, c),
which at t = 1 is z by construction. It learns to say there what an average of itself says one step
of the teacher later (Song et al. 2023; guidance inside the step: LCM, Luo et al. 2023).
"""

import zlib
from copy import deepcopy

import torch
from torch import Tensor, nn

import flashaudio as fa
import train
from experiments.rivals.shared import (TRAINING, Rival, affordable, after_cfm, batches, column,
                                       estimate, read)
from flashaudio import Velocity
from runs.run import Run

LR = 5e-4
GUIDANCE = 3.0                      # of the teacher
TRIED = ((2e-4, 5e-4), (2.0, 3.0))                  # by --tune
SAMPLED = ((1, 1.0), (2, 1.0), (4, 1.0))            # steps, ω
COST = TRAINING + 2 + 1             # forwards a clip: student, guided teacher, average
TEACHER_STEPS = 50                  # of the path
DECAY = 0.95                        # of the average
HUBER = 1e-3                        # all three as in LCM


def grid(n: int, generator: torch.Generator | None = None) -> Tensor:
    """t at the teacher's steps, 0, 1/50 .. 49/50 -> (n,)."""
    return torch.randint(TEACHER_STEPS, (n,), generator=generator) / TEACHER_STEPS


@torch.no_grad()
def consistency_target(teacher: Velocity, average: Velocity, z: Tensor, t: Tensor, context: Tensor,
                       null: Tensor, guidance: float) -> Tensor:
    """What the average network says of the end after one teacher's step from z (B, ...)."""
    v = fa.guided_velocity(teacher, z, t, context, null, guidance)
    return estimate(average, z + v / TEACHER_STEPS, t + 1 / TEACHER_STEPS, context)


def pseudo_huber(error: Tensor) -> Tensor:
    """Squared near 0, absolute beyond -> scalar."""
    return ((error ** 2 + HUBER ** 2).sqrt() - HUBER).mean()


def consistency_sample(model: Velocity, z0: Tensor, context: Tensor, null: Tensor | None,
                       steps: int, guidance: float = 1.0) -> Tensor:
    """Jump to the end, go back to the next t with new noise, jump again -> (steps + 1, B, ...).

    Guidance is in the weights. The new noise of a clip depends on its first, not on its batch.
    """
    seeds = [zlib.crc32(noise.cpu().numpy().tobytes()) for noise in z0]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z, path = z0, [z0]
    for i in range(steps):
        t = z.new_full((len(z),), i / steps)
        if i > 0:
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z)
            z = column(1 - t, z) * noise + column(t, z) * z
        z = estimate(model, z, t, context)
        path.append(z)
    return torch.stack(path)


class Consistency(Rival):
    sampler = staticmethod(consistency_sample)


class Average:
    """A network whose weights follow another's; it begins as a copy, also when a run goes on."""
    network: nn.Module | None = None

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        if self.network is None:
            self.network = deepcopy(network).requires_grad_(False)
        weights = list(network.parameters())
        torch._foreach_lerp_(list(self.network.parameters()), weights, 1 - DECAY)


def train_rival(run: Run, lr: float = LR, guidance: float = GUIDANCE, share: float = 1.0) -> Rival:
    """Trained on `share` of the compute that FlashAudio takes from the CFM on."""
    steps = affordable(run.flags, share * after_cfm(run.flags), COST)
    stage = f"consistency-{lr:g}-{guidance:g}-{steps}"
    teacher = run.load("cfm").requires_grad_(False)
    if not run.done(stage, teacher, consistency_target, pseudo_huber):
        student, average = Consistency.begin(teacher, run.flags.seed), Average()
        null = teacher.contexts([""])
        next_batch = batches(run, stage, teacher, grid, dropout=0.0)

        def draw(step: int) -> list[Tensor]:
            average.follow(student.dit)
            return next_batch(step)

        def loss(model: Consistency, z0: Tensor, z1: Tensor, t: Tensor, text: Tensor) -> Tensor:
            context = read(teacher, text)
            z = column(1 - t, z0) * z0 + column(t, z1) * z1
            target = consistency_target(teacher.dit, average.network, z, t, context,
                                        null.expand_as(context), guidance)
            return pseudo_huber(estimate(model.dit, z, t, context) - target)

        train.fit(run, stage, student, ("dit",), draw, loss, steps, lr)
    return Consistency.from_pretrained(run.folder(stage), str(run.device))
