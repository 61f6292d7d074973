"""Pictures and sounds of a finished run of train.py:  python -m experiments.figures out/toy

one_step.png       one step of CFM fails, one step of the distilled model works
listen/index.html  the same to be heard, small enough to be published
loss_by_time.png   where on a path each loss is made, and where each density looks
"""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import flashaudio as fa
import train
from evaluation.evaluate import NAMES
from evaluation.listen import save_clip, write_page
from runs.run import Parser, Run, one_line_errors

WAYS = (("cfm", 24), ("cfm", 1), ("distill", 1), ("rf2", 4))            # stage, steps
STORY = """The first captions of the test split, not chosen: the recording, then what is made of its
caption from the same noise. One step of CFM is a blur, one step of the distilled model is not."""


def one_step(out: Path, run: Run) -> None:
    """What stages make of three captions, in a picture of the first and a page of all."""
    rows = run.data.held_out(3)
    captions = [run.data.captions[i] for i in rows]
    mels = {"the real clip": torch.tensor(run.data.mels[run.data.file[rows]])}
    wavs = {"the real clip": run.data.waveforms(rows)}
    for stage, steps in WAYS:
        model = run.load(stage)
        title = f"{NAMES[stage]}, {steps} step{'s' * (steps > 1)}"
        mels[title] = model.decode(model.sample_latents(captions, steps, seed=0))
        wavs[title] = run.vocoder(mels[title]).cpu()
    clips = []
    for k, caption in enumerate(captions):
        for n, title in enumerate(wavs):
            save_clip(out / f"listen/{k}-{n}", wavs[title][k])
            clips.append((caption, title, f"{k}-{n}"))
    seconds = run.data.mels.shape[2] * fa.HOP / fa.SAMPLE_RATE
    write_page(out / "listen", "flashaudio, to listen to", STORY, clips, seconds)
    figure, line = plt.subplots(1, len(mels), figsize=(10, 1.7), layout="constrained")
    figure.suptitle(f"“{captions[0]}”")
    for axes, (title, made) in zip(line, mels.items()):
        axes.imshow(made[0].cpu().numpy(), origin="lower", aspect="auto", vmin=-4, vmax=1,
                    cmap="magma")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(out / "one_step.png")


def losses_by_time(run: Run, times: Tensor) -> dict[str, list[float]]:
    """Eq. 4 at each of the times, of CFM and 1-RF on validation clips, and of the 2-RF on what the
    1-RF makes of their captions, from noise that it has not seen."""
    data = run.data
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
            how = train.Couplings(run, models["rf1"], "rf2").how
            z1 = fa.make_couplings(models["rf1"], z0, context, null, *how)
        found[stage] = [fa.rectified_flow_loss(model, z0, z1, t.expand(len(rows)), context).item()
                        for t in times.to(run.device)]
    return found


def loss_by_time(path: Path, run: Run) -> None:
    """The argument for the densities, or against them: where on a path is the error made?"""
    times = torch.arange(0.05, 1, 0.1)
    densities = {"cfm": fa.uniform, "rf1": fa.logit_normal, "rf2": fa.mix_exp}
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 4), layout="constrained", sharex=True,
                                          height_ratios=(2, 1))
    for stage, losses in losses_by_time(run, times).items():
        density = densities[stage]
        above.plot(times.tolist(), losses, "o-", label=f"{NAMES[stage]}, {density.__name__} t")
        t = density(200_000, generator=torch.Generator().manual_seed(0))
        below.hist(t.numpy(), bins=50, range=(0, 1), density=True, histtype="step")
    above.set(yscale="log", ylabel="held-out loss")
    above.legend()
    below.set(xlabel="t", ylabel="density of t")
    figure.savefig(path)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = Parser("experiments.figures", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of train.py")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to [docs]")
    given = parser.parse_args(argv)
    notes, out = given.run / "distill" / "training.json", given.out
    if not notes.exists():
        raise fa.InputError(f"{given.run}: there is no finished run of train.py here")
    flags = json.loads(notes.read_text())["flags"] | {"out": str(given.run)}
    with train.open_run(train.Flags(**flags)) as run:
        one_step(out, run)
        loss_by_time(out / "loss_by_time.png", run)


if __name__ == "__main__":
    with one_line_errors("experiments.figures"):
        main()
