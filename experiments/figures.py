"""Pictures and sounds of a finished run of train.py:  python -m experiments.figures out/toy

one_step.png       one step of CFM fails, one step of the distilled model works
trajectories.png   paths straighten
loss_by_time.png   where on a path each loss is made, and where each density looks
listen/index.html  held-out captions through five rows, to be heard
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

import flashaudio as fa
import train
from evaluation.evaluate import NAMES
from evaluation.listen import file_names, save_clip, write_page
from flashaudio import InputError
from runs.run import Run, one_line_errors

SHOWN = (("cfm", 24), ("cfm", 1), ("rf2", 1), ("distill", 1))           # stage, steps
HEARD = (("cfm", 24), ("cfm", 1), ("distill", 1), ("rf2", 4))
STORY = """The first captions of the test split as they come, not chosen: the recording, then what is
made of its caption from the same noise."""


def title(stage: str, steps: int) -> str:
    return f"{NAMES[stage]}, {steps} step{'s' * (steps > 1)}"


@torch.no_grad()
def one_step(path: Path, run: Run, row: int) -> None:
    """The real clip of a row of the data, and what stages make of its caption from one noise."""
    caption = run.data.captions[row]
    mels = {"the real clip": run.data.mels[run.data.file[row]]}
    for stage, steps in SHOWN:
        model = run.load(stage)
        z = model.sample_latents([caption], steps, seed=0)
        mels[title(stage, steps)] = model.decode(z)[0].cpu().numpy()
    figure, line = plt.subplots(1, len(mels), figsize=(10, 1.7), layout="constrained")
    figure.suptitle(f"“{caption}”")
    for axes, (name, mel) in zip(line, mels.items()):
        axes.imshow(mel, origin="lower", aspect="auto", vmin=-4, vmax=1, cmap="magma")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path)


def trajectories(path: Path, run: Run) -> None:
    """Paths in 24 steps from the same noises: how far along the chord z1 - z0, how far from it.

    S(Z) is that of the run's table, of all its captions.
    """
    captions = [run.data.captions[i] for i in run.data.held_out(32)]
    held = json.loads((run.out / "results.json").read_text())["rows"]
    bend = {row["model"]: row["straightness"] for row in held if row["guidance"] == 1}
    figure, row = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained", sharey=True)
    for axes, stage in zip(row, ("cfm", "rf2")):
        model = run.load(stage)
        z0 = torch.cat([model.noise([""], i, model.latent_shape()) for i in range(32)])
        paths = model.sample_latents(captions, 24, z0=z0, return_trajectory=True)
        way = (paths - paths[0]).flatten(2).cpu()                               # (25, N, C L)
        chord = way[-1]
        along = (way * chord).sum(-1) / chord.pow(2).sum(-1)                    # (25, N)
        aside = (way - along[..., None] * chord).norm(dim=-1) / chord.norm(dim=-1)
        axes.plot(along.numpy(), aside.numpy(), lw=0.8, alpha=0.7)
        axes.set(title=f"{NAMES[stage]}: S(Z) {bend[stage]:.1f}", xlabel="along the chord",
                 ylabel="distance from it, in chords")
    figure.savefig(path)


@torch.no_grad()
def losses_by_time(run: Run, times: Tensor) -> dict[str, list[float]]:
    """Eq. 4 at each of the times, of CFM and 1-RF on validation clips, and of the 2-RF on what the
    1-RF makes of their captions from fresh noise."""
    flags, rows = run.flags, run.data.validation[:128]
    generator = run.generator("loss by time")
    found = {}
    for stage in ("cfm", "rf1", "rf2"):
        model = run.load(stage)
        z0, z1 = train.Latents(run, model).ends(rows, generator)
        context = model.contexts([run.data.captions[i] for i in rows])
        if stage == "rf2":
            null = model.contexts([""]).expand_as(context)
            z1 = fa.make_couplings(run.load("rf1"), z0.to(run.device), context, null,
                                   flags.rf2_coupling_steps, flags.rf2_guidance,
                                   flags.anchor_steps, flags.anchor_lr, flags.anchor_tol)
        ends = z0.to(run.device), z1.to(run.device)
        found[stage] = []
        for t in times:
            loss = fa.rectified_flow_loss(model, *ends, t.expand(len(rows)).to(run.device), context)
            found[stage].append(loss.item())
    return found


def loss_by_time(path: Path, run: Run) -> None:
    """The argument for the densities, or against them: where on a path is the error made?"""
    times = torch.arange(0.05, 1, 0.1)
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 4), layout="constrained", sharex=True,
                                          height_ratios=(2, 1))
    for stage, losses in losses_by_time(run, times).items():
        above.plot(times, losses, "o-", label=NAMES[stage])
    above.set(yscale="log", ylabel="held-out loss")
    for density, stage in ((fa.uniform, "cfm"), (fa.logit_normal, "rf1"), (fa.mix_exp, "rf2")):
        t = density(200_000, generator=torch.Generator().manual_seed(0))
        below.hist(t.numpy(), bins=50, range=(0, 1), density=True, histtype="step",
                   label=f"{density.__name__}, {NAMES[stage]}")
    below.set(xlabel="t", ylabel="density")
    for axes in (above, below):
        axes.legend(fontsize=8)
    figure.savefig(path)


@torch.no_grad()
def listen(folder: Path, run: Run) -> None:
    """A page as the run writes it, small enough to be published."""
    rows = run.data.held_out(3)
    captions = [run.data.captions[i] for i in rows]
    ...


def draw(folder: Path, run: Run, text: str) -> None:
    """All of a run; text: in the caption of the clip shown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = run.data.held_out(len(run.data.rows))
    row = next((i for i in rows if text in run.data.captions[i]), rows[0])
    one_step(folder / "one_step.png", run, row)
    trajectories(folder / "trajectories.png", run)
    loss_by_time(folder / "loss_by_time.png", run)
    listen(folder / "listen", run)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("experiments.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to [docs]")
    parser.add_argument("--caption", default="siren", help="what one_step.png shows [siren]")
    given = parser.parse_args(argv)
    notes = given.run / "distill" / "training.json"
    if not notes.exists():
        raise InputError(f"{given.run}: there is no finished run of train.py here")
    flags = json.loads(notes.read_text())["flags"] | {"out": str(given.run)}
    with train.open_run(train.Flags(**flags)) as run:
        draw(given.out, run, given.caption)


if __name__ == "__main__":
    with one_line_errors("experiments.figures"):
        main()
