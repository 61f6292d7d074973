"""All of Algorithm 1 on two moons, where one can watch it:  python -m experiments.moons

A "sound" is a point of the plane, its caption a number: 1 is the upper moon, -1 the lower one, 0 is
the null caption ∅. What is printed and docs/moons.png show how much the paths of each stage bend,
S(Z), and how far one step is off: its points' mean distance to paired data (fresh data: 0.07).
"""

from typing import Callable

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import flashaudio as fa


class Network(nn.Sequential):
    def forward(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:       # (B, 2), (B,), (B, 1)
        return super().forward(torch.cat([z, t[:, None], c], 1))        # v(z, t, c), (B, 2)


torch.manual_seed(0)
model = Network(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
c = torch.tensor([[1.0], [-1.0]]).repeat_interleave(2 ** 14, dim=0)     # 32,768 captions
angle = torch.pi * torch.rand(len(c), 1)
arc = torch.cat([angle.cos() - 0.5, angle.sin() - 0.25], 1)
data = 1.4 * c * arc + 0.07 * torch.randn(len(c), 2)
noise = torch.randn(len(c), 2)
figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), layout="constrained", sharex=True, sharey=True)


def stage(number: int, name: str, z0: Tensor, z1: Tensor, density: Callable, steps=24) -> None:
    """Train the model on pairs (z0, z1) with t of a density; draw what it does with `noise`."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(1500):
        i = torch.randint(len(c), (256,))
        kept = torch.rand(256, 1) > 0.2                                 # other captions become ∅
        optimizer.zero_grad()
        fa.rectified_flow_loss(model, z0[i], z1[i], density(256), kept * c[i]).backward()
        optimizer.step()
    way = fa.euler_sample(model, noise[::32], c[::32], steps=steps, return_trajectory=True).detach()
    made = fa.euler_sample(model, noise[::32], c[::32], steps=1).detach()
    off = (fa.immiscible_pairing(made, data[::32]) - data[::32]).norm(dim=1).mean()
    print(f"{name:9}  S(Z) {fa.straightness(way):.3f}  one step is off by {off:.3f}", flush=True)
    above, below = axes[:, number]
    above.set_title(f"{name}: S(Z) {fa.straightness(way):.2f}")
    below.set_title(f"one step: off by {off:.2f}")
    below.scatter(*data[::32].T, s=2, color="0.85")
    for color, path, end in zip(("C0", "C1"), way.chunk(2, 1), made.chunk(2)):
        above.plot(*path[:, ::16].unbind(2), color, lw=0.8)
        below.scatter(*end.T, s=2, color=color)


stage(0, "CFM", noise, data, fa.uniform)                # where lines cross, it learns their mean
z0 = torch.cat([fa.immiscible_pairing(*part) for part in zip(noise.split(4), data.split(4))])
stage(1, "1-RF", z0, data, fa.logit_normal)             # Eq. 6, 7, 9: four noises to four data
z1 = fa.make_couplings(model, noise, c, 0 * c, steps=24, guidance=1.0)  # Eq. 11; try guidance=2.0
stage(2, "2-RF", noise, z1, fa.mix_exp)                 # Eq. 5, 8, 12: pairs that do not cross
stage(3, "distilled", noise, fa.make_couplings(model, noise, c, 0 * c, 8), torch.zeros, steps=1)
figure.savefig("docs/moons.png")
