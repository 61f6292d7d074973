"""Pictures of a run of train.py:  python -m experiments.figures out/toy --out docs

one_step.png, in which one sees one step of CFM fail and one step of the distilled model work;
mels.png, trajectories.png and timesteps.png. experiments/ablate.py draws three more.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import flashaudio as fa
import train
from evaluation.evaluate import NAMES
from flashaudio import InputError
from runs.run import Run, one_line_errors

ONE_STEP = [[("real", 0), ("cfm", 24), ("cfm", 1), ("rf2", 1), ("distill", 1)]]     # stage, steps
ALL_STEPS = [[("cfm", 1), ("cfm", 4), ("cfm", 24), ("real", 0)],
             [("rf1", 1), ("rf1", 4), ("rf1", 24)], [("rf2", 1), ("rf2", 4), ("rf2", 24)],
             [("distill", 1)]]


@torch.no_grad()
def mels(path: Path, run: Run, row: int, grid: list[list[tuple]], height: float = 1.25) -> None:
    """The real clip of a row of the data, and what stages make of its caption from one noise."""
    caption, models = run.data.captions[row], {stage: run.load(stage) for stage in NAMES}
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=(10, height * len(grid)),
                                layout="constrained", squeeze=False)
    figure.suptitle(f"“{caption}”")
    for panel in axes.flat:
        panel.set_axis_off()
    for line, cells in zip(axes, grid):
        for panel, (stage, steps) in zip(line, cells):
            mel, title = run.data.mels[run.data.file[row]], "the real clip"
            if stage != "real":
                z = models[stage].sample_latents([caption], steps, seed=0)
                mel = models[stage].decode(z)[0].cpu().numpy()
                title = f"{NAMES[stage]}, {steps} step{'s' * (steps > 1)}"
            panel.imshow(mel, origin="lower", aspect="auto", vmin=-4, vmax=1, cmap="magma")
            panel.set_title(title, fontsize=9)
    figure.savefig(path)


def timesteps(path: Path) -> None:
    """Eq. 7 and 8 as the code draws them."""
    generator = torch.Generator().manual_seed(0)
    figure, row = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    for axes, density, values, name in ((row[0], fa.logit_normal, (0, -0.5, 0.5), "1-RF, Eq. 7: μ"),
                                        (row[1], fa.mix_exp, (4, 2, 1), "2-RF, Eq. 8: a")):
        for value in values:
            t = density(200_000, value, generator=generator).numpy()
            axes.hist(t, 60, density=True, histtype="step", label=f"{value:g}")
        axes.set(xlabel="t: noise 0, data 1", ylabel="density")
        axes.legend(title=name, loc="lower center", ncols=3)
    figure.savefig(path)


def trajectories(path: Path, run: Run) -> None:
    """Paths in 24 steps from the same noises: how far along the chord z1 - z0, how far from it."""
    captions = [run.data.captions[i] for i in run.data.held_out(32)]
    figure, row = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained", sharey=True)
    for axes, stage in zip(row, ("cfm", "rf2")):
        paths = run.load(stage).sample_latents(captions, 24, seed=0, return_trajectory=True)
        way = (paths - paths[0]).flatten(2).cpu()                               # (25, N, C L)
        chord = way[-1]
        along = (way * chord).sum(-1) / chord.pow(2).sum(-1)                    # (25, N)
        aside = (way - along[..., None] * chord).norm(dim=-1) / chord.norm(dim=-1)
        axes.plot(along.numpy(), aside.numpy(), lw=0.8, alpha=0.7)
        axes.set(title=f"{NAMES[stage]}: S(Z) {fa.straightness(paths):.1f}",
                 xlabel="along the chord", ylabel="distance from it, in chords")
    figure.savefig(path)


@torch.no_grad()
def loss_by_t(path: Path, run: Run) -> None:
    """Squared error of v in ten bins of t: CFM and 1-RF on held-out clips, 2-RF on couplings."""
    flags, data, rows = run.flags, run.data, run.data.held_out(run.flags.eval_clips)
    generator, teacher = torch.Generator().manual_seed(0), run.load("rf1").requires_grad_(False)
    z1 = teacher.encode(torch.tensor(data.mels[data.file[rows]], device=run.device))
    z0 = torch.randn(z1.shape, generator=generator).to(z1)
    figure, axes = plt.subplots(figsize=(4.6, 2.6), layout="constrained")
    for stage in ("cfm", "rf1", "rf2"):
        model, losses = run.load(stage), []
        context = model.contexts([data.captions[i] for i in rows])
        if stage == "rf2":
            null = model.contexts([""]).expand_as(context)
            z1 = fa.make_couplings(teacher, z0, context, null, flags.rf2_coupling_steps,
                                   flags.rf2_guidance, flags.rf2_anchor_steps)
        for i in range(10):
            t = ((i + torch.rand(len(z1), generator=generator)) / 10).to(z1)
            losses.append(fa.rectified_flow_loss(model, z0, z1, t, context).item())
        axes.plot([i / 10 + 0.05 for i in range(10)], losses, "o-", label=NAMES[stage])
    axes.set(xlabel="t: noise 0, data 1", ylabel="squared error of v", yscale="log")
    axes.legend()
    figure.savefig(path)


def plot(axes, points: dict[float, list], label: str) -> None:
    """{x: [mean, standard error or None, seeds]}, as tables.summary has it."""
    x = sorted(points)
    error = [points[k][1] or 0 for k in x]
    axes.errorbar(x, [points[k][0] for k in x], error, fmt="o-", ms=4, label=label)


def steps_and_quality(path: Path, table: dict) -> None:
    figure, row = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    for axes, kind in zip(row, ("fd", "accuracy")):
        for stage, figures in table.items():
            own = {name: value for name, value in figures.items() if name.startswith(kind)}
            plot(axes, {int(name.split()[1]): own[name] for name in own}, NAMES[stage])
        axes.set(xscale="log", xlabel="Euler steps", ylabel=kind)
        axes.set_xticks((1, 2, 4, 8, 16, 24), (1, 2, 4, 8, 16, 24))
    row[0].set_ylim(0)
    row[1].legend()
    figure.savefig(path)


def guidance(path: Path, table: dict) -> None:
    """Fig. 4: ω against the couplings and what is trained on them, for each way to guide."""
    ways: dict = {}
    for name, figures in table.items():
        omega, way = name.removeprefix("ω = ").split(", ", 1)
        ways.setdefault(way, {1.0: table["ω = 1, plain"]})[float(omega)] = figures
    figure, row = plt.subplots(1, 4, figsize=(11.2, 2.6), layout="constrained")
    names = ("fd couplings", "fd 1 steps", "accuracy 1 steps", "effective guidance")
    for axes, name in zip(row, names):
        for way, held in ways.items():
            plot(axes, {omega: held[omega][name] for omega in held}, way)
        axes.set(xlabel="ω", ylabel=name.replace("1 steps", "of the 2-RF, 1 step"))
    row[0].legend(fontsize=7)
    figure.savefig(path)


def draw(folder: Path, run: Run, text: str = "siren", tables: dict | None = None) -> None:
    """Pictures of a run and of the tables of ablations; text: in the caption of the clip shown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = run.data.held_out(len(run.data.rows))
    row = next((i for i in rows if text in run.data.captions[i]), rows[0])
    mels(folder / "one_step.png", run, row, ONE_STEP, 1.7)
    mels(folder / "mels.png", run, row, ALL_STEPS)
    trajectories(folder / "trajectories.png", run)
    timesteps(folder / "timesteps.png")
    if tables:
        loss_by_t(folder / "loss_by_t.png", run)
        steps_and_quality(folder / "steps.png", tables["Fig. 2, 3"])
        guidance(folder / "guidance.png", tables["Fig. 4"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("experiments.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder [docs]")
    parser.add_argument("--caption", default="siren", help="what the shown one holds [siren]")
    given = parser.parse_args(argv)
    notes = given.run / "distill" / "training.json"
    if not notes.exists():
        raise InputError(f"{given.run}: there is no finished run of train.py here")
    flags = json.loads(notes.read_text())["flags"] | {"out": str(given.run), "stage": "all"}
    with train.open_run(train.Flags(**flags)) as run:
        draw(given.out, run, given.caption)


if __name__ == "__main__":
    with one_line_errors("experiments.figures"):
        main()
