"""Pictures and sounds of a finished run of train.py:  python -m experiments.figures out/toy

one_step.png       one step of CFM fails, one step of the distilled model works
trajectories.png   paths straighten
loss_by_time.png   where on a path each loss is made, and where each density looks
listen/index.html  held-out captions to be heard, small enough to be published
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import flashaudio as fa
import train
from evaluation.evaluate import NAMES
from evaluation.judges import load_clips
from evaluation.listen import save_clip, write_page
from flashaudio import InputError
from runs.run import Run, one_line_errors

SEEN = (("cfm", 24), ("cfm", 1), ("rf2", 1), ("distill", 1))            # stage, steps
HEARD = (("cfm", 24), ("cfm", 1), ("distill", 1), ("rf2", 4))
STORY = """The first captions of the test split, not chosen: the recording, then what is made of its
caption from the same noise. One step of CFM is a blur, one step of the distilled model is not."""


def mels_of(run: Run, captions: list[str], ways: tuple) -> dict[str, Tensor]:
    """{title: mels (N, 80, T)} of stages in so many steps, all from one noise."""
    mels = {}
    for stage, steps in ways:
        model = run.load(stage)
        z = model.sample_latents(captions, steps, seed=0)
        mels[f"{NAMES[stage]}, {steps} step{'s' * (steps > 1)}"] = model.decode(z)
    return mels


def one_step(path: Path, run: Run, row: int) -> None:
    """The real clip of a row of the data, and what stages make of its caption."""
    caption = run.data.captions[row]
    mels = {"the real clip": torch.tensor(run.data.mels[run.data.file[[row]]]),
            **mels_of(run, [caption], SEEN)}
    figure, line = plt.subplots(1, len(mels), figsize=(10, 1.7), layout="constrained")
    figure.suptitle(f"“{caption}”")
    for axes, (title, mel) in zip(line, mels.items()):
        axes.imshow(mel[0].cpu(), origin="lower", aspect="auto", vmin=-4, vmax=1, cmap="magma")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path)


def listen(folder: Path, run: Run) -> None:
    """A page of three captions."""
    rows = run.data.held_out(3)
    captions = [run.data.captions[i] for i in rows]
    wavs = {"the real clip": load_clips(run.data, rows)}
    for title, mels in mels_of(run, captions, HEARD).items():
        wavs[title] = run.vocoder(mels).cpu()
    clips = []
    for k, caption in enumerate(captions):
        for n, title in enumerate(wavs):
            save_clip(folder / f"{k}-{n}", wavs[title][k])
            clips.append((caption, title, f"{k}-{n}"))
    seconds = run.data.mels.shape[2] * fa.HOP / fa.SAMPLE_RATE
    write_page(folder, "flashaudio, to listen to", STORY, clips, seconds)


def trajectories(path: Path, run: Run) -> None:
    """Paths in 24 steps: how far along the chord z1 - z0, how far from it. S(Z) is the table's."""
    captions = [run.data.captions[i] for i in run.data.held_out(32)]
    table = json.loads((run.out / "results.json").read_text())["rows"]
    bend = {row["model"]: row["straightness"] for row in table if row["guidance"] == 1}
    figure, row = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained", sharey=True)
    for axes, stage in zip(row, ("cfm", "rf2")):
        paths = run.load(stage).sample_latents(captions, 24, seed=0, return_trajectory=True)
        way = (paths - paths[0]).flatten(2).cpu()                               # (25, N, C L)
        chord = way[-1]
        along = (way * chord).sum(-1) / chord.pow(2).sum(-1)                    # (25, N)
        aside = (way - along[..., None] * chord).norm(dim=-1) / chord.norm(dim=-1)
        axes.plot(along, aside, lw=0.8, alpha=0.7)
        axes.set(title=f"{NAMES[stage]}: S(Z) {bend[stage]:.1f}", xlabel="along the chord",
                 ylabel="distance from it, in chords")
    figure.savefig(path)


def losses_by_time(run: Run, times: Tensor) -> dict[str, list[float]]:
    """Eq. 4 at each of the times, of CFM and 1-RF on validation clips, and of the 2-RF on what the
    1-RF makes of their captions, from noise that it has not seen."""
    flags, data = run.flags, run.data
    rows = np.concatenate([data.validation, data.held_out(128)])[:128]
    captions = [data.captions[i] for i in rows]
    models = {stage: run.load(stage) for stage in ("cfm", "rf1", "rf2")}
    ends = train.Latents(run, models["cfm"]).ends(rows, run.generator("loss by time"))
    z0, z1 = (x.to(run.device) for x in ends)
    found = {}
    for stage, model in models.items():
        context = model.contexts(captions)
        if stage == "rf2":                              # its text encoder is the 1-RF's
            null = model.contexts([""]).expand_as(context)
            z1 = fa.make_couplings(models["rf1"], z0, context, null, flags.rf2_coupling_steps,
                                   flags.rf2_guidance, flags.anchor_steps, flags.anchor_lr,
                                   flags.anchor_tol)
        found[stage] = []
        for t in times.to(run.device):
            loss = fa.rectified_flow_loss(model, z0, z1, t.expand(len(rows)), context)
            found[stage].append(loss.item())
    return found


def loss_by_time(path: Path, run: Run) -> None:
    """The argument for the densities, or against them: where on a path is the error made?"""
    times = torch.arange(0.05, 1, 0.1)
    densities = {"cfm": fa.uniform, "rf1": fa.logit_normal, "rf2": fa.mix_exp}
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 4), layout="constrained", sharex=True,
                                          height_ratios=(2, 1))
    for stage, losses in losses_by_time(run, times).items():
        density = densities[stage]
        above.plot(times, losses, "o-", label=f"{NAMES[stage]}, {density.__name__} t")
        t = density(200_000, generator=torch.Generator().manual_seed(0))
        below.hist(t.numpy(), bins=50, range=(0, 1), density=True, histtype="step")
    above.set(yscale="log", ylabel="held-out loss")
    above.legend()
    below.set(xlabel="t", ylabel="density of t")
    figure.savefig(path)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("experiments.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of train.py")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to [docs]")
    parser.add_argument("--caption", default="siren", help="what one_step.png shows [siren]")
    given = parser.parse_args(argv)
    notes, out = given.run / "distill" / "training.json", given.out
    if not notes.exists():
        raise InputError(f"{given.run}: there is no finished run of train.py here")
    flags = json.loads(notes.read_text())["flags"] | {"out": str(given.run)}
    with train.open_run(train.Flags(**flags)) as run:
        out.mkdir(parents=True, exist_ok=True)
        rows = run.data.held_out(len(run.data.rows))
        one_step(out / "one_step.png", run, next(
            (i for i in rows if given.caption in run.data.captions[i]), rows[0]))
        trajectories(out / "trajectories.png", run)
        loss_by_time(out / "loss_by_time.png", run)
        listen(out / "listen", run)


if __name__ == "__main__":
    with one_line_errors("experiments.figures"):
        main()
