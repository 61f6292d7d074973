"""MeanFlow (Geng et al. 2025; MeanAudio) from the CFM: a network of average velocities.

u(z, t, s): mean velocity of a path from z at t to s >= t, so one step is z0 + u(z0, 0, 1). The
derivative of (s - t) u gives u = v + (s - t) (v · ∂_z u + ∂_t u). The paper's time is reversed.
"""

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashaudio as fa
from experiments.rivals.shared import TRAINING, Rival
from flashaudio import FlashAudio, Velocity, column

SMOOTH = 0.03                                       # in t: see TwoTimes


class TwoTimes(fa.TimeEmbedder):
    """Embeds 1000 t (B,), or 1000 (t, s) (B, 2): the CFM's own embedding of t, and of (t, s - t).

    The ripple of the CFM's, up to cos 1000 t, hardly shows in v and makes most of ∂_t v: it is
    averaged over a Gaussian in t of std SMOOTH, which changes v by 1%."""

    def __init__(self, width: int):
        super().__init__(width)
        self.way = nn.Sequential(nn.Linear(20, width), nn.SiLU(),
                                 nn.Linear(width, width, bias=False))
        nn.init.zeros_(self.way[2].weight)

    def forward(self, times: Tensor) -> Tensor:
        t, s = times.view(len(times), -1).expand(-1, 2).unbind(1)
        rate = 10000 ** (-torch.arange(128, device=t.device) / 128)
        kept = torch.exp(-(1000 * SMOOTH * rate) ** 2 / 2)
        old = t[:, None] * rate
        octaves = 2.0 ** torch.arange(5, device=t.device) / 1000                # 1 to 16
        new = torch.stack([t, s - t], 1)[..., None].mul(octaves).flatten(1)     # (B, 10)
        new = self.way(torch.cat([new.cos(), new.sin()], 1))
        return new + self.mlp(torch.cat([kept * old.cos(), kept * old.sin()], 1))


def sorted_times(n: int, generator: torch.Generator | None = None) -> Tensor:
    """t <= s (n, 2): logit-normal(-.4, 1) in the paper's time; s = t for the first half of them."""
    times = (1 - fa.logit_normal(2 * n, -0.4, 1.0, generator)).view(n, 2).sort(1).values
    times[:n // 2, 1] = times[:n // 2, 0]
    return times


def guided(u: Velocity, z: Tensor, t: Tensor, v: Tensor, context: Tensor, null: Tensor,
           guidance: float) -> Tensor:
    """v + (1 - 1/ω) (u(z,t,t|c) - u(z,t,t|∅)) of a data velocity v: u learns v_cfg of scale ω."""
    return v + (1 - 1 / guidance) * (u(z, t, context) - u(z, t, null))


def meanflow_target(u: Velocity, z: Tensor, v: Tensor, times: Tensor, context: Tensor) -> Tensor:
    """v + (s - t) (v · ∂_z u + ∂_t u) -> (B, ...), s held fixed; times (B, 2)."""
    t, s = times.unbind(1)

    def at(z: Tensor, t: Tensor) -> Tensor:
        return u(z, torch.stack([t, s], 1), context)

    with sdpa_kernel(SDPBackend.MATH):              # the others have no forward derivative
        _, change = torch.func.jvp(at, (z, t), (v, torch.ones_like(t)))
    return v + column(s - t, z) * change


def weighted(error: Tensor) -> Tensor:
    """|| error ||² / sg(|| error ||² + 1e-3), shown as the error without weight -> scalar."""
    squares = error.pow(2).flatten(1).sum(1)                                    # (B,)
    loss = (squares / (squares.detach() + 1e-3)).mean()
    return error.detach().pow(2).mean() + loss - loss.detach()


def meanflow_sample(u: Velocity, z0: Tensor, context: Tensor, null: Tensor | None, steps: int,
                    guidance: float = 1.0, return_trajectory: bool = False) -> Tensor:
    """z + u(z, t, s) (s - t), as fa.euler_sample. Guidance is in the weights."""
    path = [z0]
    for i in range(steps):
        times = z0.new_tensor([i / steps, (i + 1) / steps]).expand(len(z0), 2)
        path.append(path[-1] + u(path[-1], times, context) / steps)
    return torch.stack(path) if return_trajectory else path[-1]


class MeanFlow(Rival):
    label = "MeanFlow"
    cost = TRAINING + 2 + 1             # with and without caption; u and its derivative for half
    lr = 1.5e-3
    guidance = 2.0                      # in the target
    tried = ((1.5e-3, 3e-3), (2.0, 3.0))
    sampled = ((1, 1.0), (4, 1.0))
    uses = (TwoTimes, guided, meanflow_target, weighted)
    density = staticmethod(sorted_times)
    sampler = staticmethod(meanflow_sample)

    def __init__(self, config: fa.FlashAudioConfig):
        super().__init__(config)
        self.dit.t_embedder = TwoTimes(config.dit.hidden_size)

    @staticmethod
    def loss(start: FlashAudio, guidance: float) -> Callable[..., Tensor]:
        null = start.contexts([""])

        def loss(model: FlashAudio, z0: Tensor, z1: Tensor, times: Tensor, c: Tensor) -> Tensor:
            t = times[:, 0]
            z = torch.lerp(z0, z1, column(t, z0))
            with torch.no_grad():
                v = guided(model.dit, z, t, z1 - z0, c, null.expand_as(c), guidance)
                far = times[:, 1] > t           # elsewhere the target is v
                v[far] = meanflow_target(model.dit, z[far], v[far], times[far], c[far])
            return weighted(model.dit(z, times, c) - v)

        return loss
