"""The pictures of `train.py --ablate`, in <out>/figures: what the samplers draw, where the loss lies, how paths bend, what steps and
guidance do, and one caption through every stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import flashaudio as fa
from data.evaluate import NAMES


def panels(columns: int, rows: int = 1, width: float = 3.2, height: float = 2.6, **more) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def timestep_densities(path: Path) -> None:
    """Eq. 7 and 8 as curves, over histograms of what the code draws."""
    figure, ((left, right),) = panels(2)
    t, generator = np.linspace(0.002, 0.998, 400), torch.Generator().manual_seed(0)
    for mean in (0.0, -0.5, 0.5):
        logit = np.log(t / (1 - t))
        left.plot(t, np.exp(-(logit - mean) ** 2 / 2) / (np.sqrt(2 * np.pi) * t * (1 - t)), lw=2 if mean == 0 else 1, label=f"μ = {mean:g}")
    left.hist(fa.logit_normal(20_000, generator=generator).numpy(), 40, (0, 1), density=True, alpha=0.3, color="C0")
    for a in (4.0, 2.0, 1.0):
        right.plot(t, a / (2 * np.expm1(a)) * (np.exp(a * t) + np.exp(a * (1 - t))), lw=2 if a == 4 else 1, label=f"a = {a:g}")
    right.hist(fa.mix_exp(20_000, 4.0, generator).numpy(), 40, (0, 1), density=True, alpha=0.3, color="C0")
    left.set(title="1-RF: logit-normal (Eq. 7)", xlabel="t: noise 0, data 1", ylabel="density")
    right.set(title="2-RF: Mix-Exp (Eq. 8)", xlabel="t: noise 0, data 1")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path)


@torch.no_grad()
def loss_by_t(path: Path, run, captions: list[str], latents: torch.Tensor) -> None:
    """Mean squared error of the velocity in ten bins of t on held-out clips: CFM and 1-RF on the clips, 2-RF on its own couplings."""
    figure, ((axes,),) = panels(1, width=4.6)
    generator = torch.Generator().manual_seed(0)
    for stage in ("cfm", "rf1", "rf2"):
        model = run.load(stage)
        c, z0, z1 = model.text(captions), torch.randn(latents.shape, generator=generator).to(latents), latents
        if stage == "rf2":
            null = model.text([""]).expand(len(c), -1, -1)
            f = run.flags
            z1 = fa.make_couplings(run.load("rf1").dit, z0, c, null, f.coupling_steps, f.guidance, f.anchor_steps, f.rectify, f.anchor_lr, f.anchor_tol)
        bins = []
        for i in range(10):
            t = ((i + torch.rand(len(c), generator=generator)) / 10).to(c)
            bins.append(fa.rectified_flow_loss(model.dit, z1, z0, t, c).item())
        axes.plot(np.arange(10) / 10 + 0.05, bins, "o-", label=NAMES[stage])
    axes.set(title="loss by t, held-out captions", xlabel="t: noise 0, data 1", ylabel="squared error of v", yscale="log")
    axes.legend()
    figure.savefig(path)


@torch.no_grad()
def trajectories(path: Path, run, captions: list[str]) -> None:
    """Paths from the same noises, 24 steps, each against its own chord z1 - z0: how far along it, and how far from it, in chord lengths."""
    figure, (row,) = panels(2, sharex=True, sharey=True)
    for axes, stage in zip(row, ("cfm", "rf2")):
        way = run.load(stage).sample_latents(captions[:32], 24, seed=0, return_trajectory=True).flatten(2).cpu()  # (25, N, C L)
        way, chord = way - way[0], way[-1] - way[0]
        along = (way * chord).sum(-1) / chord.pow(2).sum(-1)                                            # (25, N)
        aside = (way - along[..., None] * chord).norm(dim=-1) / chord.norm(dim=-1)
        axes.plot(along.numpy(), aside.numpy(), lw=0.8, alpha=0.7)
        axes.set(title=f"{NAMES[stage]}: S(Z) {fa.straightness(way):.1f}, relative {fa.straightness(way, relative=True):.3f}",
                 xlabel="along the chord from z0 to z1")
    row[0].set_ylabel("distance from the chord")
    figure.savefig(path)


def steps_and_quality(path: Path, table: dict) -> None:
    figure, (row,) = panels(2)
    for axes, kind in zip(row, ("fd", "accuracy")):
        for stage, figures in table.items():
            found = {int(name.split()[1]): value for name, value in figures.items() if name.startswith(f"{kind} ")}
            mean, error = ([found[n][i] or 0 for n in sorted(found)] for i in (0, 1))
            axes.errorbar(sorted(found), mean, error, fmt="o-" if len(found) > 1 else "*", ms=4 if len(found) > 1 else 10, label=NAMES[stage])
        axes.set(xscale="log", xlabel="Euler steps", ylabel=kind, xticks=(1, 2, 4, 8, 16, 24), xticklabels=(1, 2, 4, 8, 16, 24))
    row[0].set_ylim(0)
    row[1].legend()
    figure.savefig(path)


def guidance_dial(path: Path, table: dict) -> None:
    """Fig. 4: ω against the quality of the couplings and of what is trained on them, for each way to keep guidance in bounds."""
    names = ("fd couplings", "fd 1 steps", "accuracy 1 steps", "effective guidance")
    figure, (row,) = panels(len(names), width=2.8)
    ways = dict.fromkeys(name.split(", ", 1)[1] for name in table if name != "ω = 1, plain")
    for way in ways:
        points = {float(name.split(",")[0][4:]): figures for name, figures in table.items() if name in ("ω = 1, plain",) or name.endswith(f", {way}")}
        for axes, name in zip(row, names):
            omega = sorted(points) if len(points) > 2 else [max(points)]
            mean, error = ([points[w][name][i] or 0 for w in omega] for i in (0, 1))
            axes.errorbar(omega, mean, error, fmt="o-" if len(omega) > 2 else "o", ms=4, label=way)
            axes.set(xlabel="ω", ylabel=name.replace("1 steps", "of the 2-RF, 1 step"))
    row[0].legend(fontsize=7)
    figure.savefig(path)


@torch.no_grad()
def mel_grid(path: Path, run, caption: str, real: torch.Tensor) -> None:
    """One caption, one noise: every stage at 1, 4 and 24 steps beside the real clip; real is its mel (80, T)."""
    figure, grid = panels(4, 4, width=2.1, height=1.25, sharex=True, sharey=True)
    shown = {"origin": "lower", "aspect": "auto", "vmin": -4, "vmax": 1, "cmap": "magma",
             "extent": (0, real.shape[1] * fa.HOP / fa.SAMPLE_RATE, 0, 80)}
    for line, stage in zip(grid, NAMES):
        model = run.load(stage)
        for axes, steps in zip(line, (1, 4, 24)):
            if stage == "distill" and steps > 1:
                axes.set_axis_off()
                continue
            axes.imshow(model.decode(model.sample_latents([caption], steps, seed=0))[0].cpu().numpy(), **shown)
            axes.set_title(f"{NAMES[stage]}, {steps} step{'s' * (steps > 1)}", fontsize=8)
        line[3].set_axis_off()
    grid[0, 3].set_axis_on()
    grid[0, 3].imshow(real.numpy(), **shown)
    grid[0, 3].set_title("the real clip", fontsize=8)
    figure.suptitle(f"“{caption}”", fontsize=9)
    figure.supxlabel("time (s)", fontsize=8)
    figure.supylabel("mel band", fontsize=8)
    figure.savefig(path)


def draw_figures(folder: Path, run, judge, tables: dict) -> None:
    """All of them, of the full recipe's models in `run` and of the tables."""
    folder.mkdir(exist_ok=True)
    rows = run.data.held_out(len(judge.captions))
    model = run.load("vae")
    with torch.no_grad():
        latents = model.scale_factor * model.vae.encode(torch.tensor(run.data.mels[rows], device=run.device))[0]
    timestep_densities(folder / "timesteps.png")
    loss_by_t(folder / "loss_by_t.png", run, judge.captions, latents)
    trajectories(folder / "trajectories.png", run, judge.captions)
    steps_and_quality(folder / "steps.png", tables["Fig. 2, 3"])
    guidance_dial(folder / "guidance.png", tables["Fig. 4"])
    k = next((i for i, caption in enumerate(judge.captions) if "followed by" in caption), 0)         # a sequence shows in time
    mel_grid(folder / "mels.png", run, judge.captions[k], torch.tensor(run.data.mels[rows[k]]))
