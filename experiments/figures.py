"""Two pictures of a run of train.py:  python -m experiments.figures out/toy --out docs

one_step.png, in which one sees one step of CFM fail and one step of the distilled model work, and
trajectories.png, in which one sees the paths straighten.
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

SHOWN = (("real", 0), ("cfm", 24), ("cfm", 1), ("rf2", 1), ("distill", 1))      # stage, steps


@torch.no_grad()
def one_step(path: Path, run: Run, row: int) -> None:
    """The real clip of a row of the data, and what stages make of its caption from one noise."""
    caption = run.data.captions[row]
    figure, line = plt.subplots(1, len(SHOWN), figsize=(10, 1.7), layout="constrained")
    figure.suptitle(f"“{caption}”")
    for axes, (stage, steps) in zip(line, SHOWN):
        if stage == "real":
            mel = run.data.mels[run.data.file[row]]
            title = "the real clip"
        else:
            model = run.load(stage)
            mel = model.decode(model.sample_latents([caption], steps, seed=0))[0].cpu().numpy()
            title = f"{NAMES[stage]}, {steps} step{'s' * (steps > 1)}"
        axes.imshow(mel, origin="lower", aspect="auto", vmin=-4, vmax=1, cmap="magma")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
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


def draw(folder: Path, run: Run, text: str) -> None:
    """Both pictures of a run; text: in the caption of the clip shown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = run.data.held_out(len(run.data.rows))
    row = next((i for i in rows if text in run.data.captions[i]), rows[0])
    one_step(folder / "one_step.png", run, row)
    trajectories(folder / "trajectories.png", run)


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
