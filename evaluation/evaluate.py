"""The end of every run: its models in 1, 4 and 24 steps, judged by the waveforms that they make.

Prints the table, writes results.json, a card beside each model, and a page to listen to them.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Callable

import torch
from torch import Tensor

import flashaudio as fa
from evaluation.judges import make_judge
from evaluation.listen import save_clip, write_page
from flashaudio import FlashAudio
from runs.cache import bar, write_atomically
from runs.run import STAGES, Run, hardware

ROWS = (("cfm", 1.0, (1, 24)), ("cfm", 3.0, (24,)), ("rf1", 1.0, (24,)), ("rf1", 3.0, (24,)),
        ("rf2", 1.0, (1, 4, 24)), ("distill", 1.0, (1,)))       # stage, guidance, steps
COLUMNS = ("model", "steps", "nfe", "guidance", "fd", "kl", "accuracy", "measured", "clap",
           "straightness", "rtf", "clips", "judge")
NAMES = {"cfm": "CFM", "rf1": "1-RF", "rf2": "2-RF", "distill": "distilled"}
SHOWN = 8           # captions on the listening page
STORY = """The real clip, then what each model makes of its caption, from the same noise. CFM needs
many steps; each model below it learns from the one above, until one step is enough."""
CARD = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))


class Table:
    """What is measured of a run: a row for each model and number of steps, and clips to hear.

    It begins with what real clips score against other real clips.
    """

    @torch.no_grad()
    def __init__(self, run: Run):
        rows = run.data.held_out(run.flags.eval_clips)
        self.run = run
        self.captions = [run.data.captions[i] for i in rows]
        self.real = run.data.waveforms(rows)                                    # (N, samples)
        self.judge = make_judge(run, rows, self.real)
        self.rows: list[dict] = []
        self.clips: list[tuple[str, str, str]] = []             # as write_page takes them
        self.play(self.real, "real", "the real clip")
        self.add(self.judge.floor, model="floor")

    def add(self, figures: dict, **columns) -> None:
        every = {"clips": len(self.captions), "judge": self.judge.name}
        self.rows.append({**dict.fromkeys(COLUMNS), **every, **figures, **columns})

    def play(self, wav: Tensor, name: str, label: str) -> None:
        """Put the first of waveforms (N, samples), one for each caption, on the page."""
        for k, clip in enumerate(wav[:SHOWN]):
            save_clip(self.run.out / "listen" / f"{k}-{name}", clip)
            self.clips.append((self.captions[k], label, f"{k}-{name}"))

    def add_vae(self, model: FlashAudio) -> None:
        """A row for what VAE and vocoder leave of real clips."""
        def through(wav: Tensor) -> Tensor:
            mel = fa.mel_spectrogram(wav.to(self.run.device))
            return self.run.vocoder(model.decode(model.encode(mel)))

        wav = in_parts(through, self.real)
        self.play(wav, "vae", "the real clip through the VAE")
        self.add(self.judge(wav), model="vae")

    def add_model(self, stage: str, guidance: float, all_steps: tuple[int, ...]) -> None:
        """A row for each number of steps; straightness is told of paths in 24 steps."""
        model = self.run.load(stage)
        for steps in all_steps:
            wav, bend, seconds = self.sample(model, steps, guidance)
            count = "1 step" if steps == 1 else f"{steps} steps"
            label = f"{NAMES[stage]}, {count}, ω = {guidance:g}"
            self.play(wav, f"{stage}-{steps}-{guidance:g}", label)
            self.add(self.judge(wav), model=stage, steps=steps, guidance=guidance,
                     nfe=steps if guidance == 1 else 2 * steps,
                     straightness=bend if steps == 24 else None,
                     rtf=seconds * fa.SAMPLE_RATE / wav.numel())

    @torch.no_grad()
    def sample(self, model: FlashAudio, steps: int, guidance: float) -> tuple[Tensor, float, float]:
        """Waveforms (N, samples), straightness of their paths, and seconds taken, text included.

        Clip i starts from the noise of seed + i, the same for every model.
        """
        model.sample_latents(self.captions[:1], 1, seed=0)      # warms up
        began = time.time()
        wavs = []
        bend = 0.0
        for i in bar(range(0, len(self.captions), 64), "eval", unit="batch"):
            part = self.captions[i:i + 64]
            z0 = model.noise([""] * len(part), self.run.flags.seed + i, model.latent_shape())
            path = model.sample_latents(part, steps, guidance, z0=z0, return_trajectory=True)
            bend += fa.straightness(path) * len(part)           # of (steps + 1, B, C, L)
            wavs.append(in_parts(self.run.vocoder, model.decode(path[-1])))
        return torch.cat(wavs), bend / len(self.captions), time.time() - began


def in_parts(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) on the CPU, computed for no more clips at once than a CPU's caches hold."""
    return torch.cat([f(part).cpu() for part in x.split(64 if x.is_cuda else 8)])


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown, its columns aligned; the first line names them."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    aligned = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        aligned.append(f"| {' | '.join(cells)} |")
    return "\n".join(aligned)


def report(results: dict) -> str:
    """What results.json holds as a table, without empty columns, and what to know of it."""
    rows = results["rows"]
    columns = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    lines = [columns]
    for row in rows:
        values = [row[name] for name in columns]
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in values]
        lines.append(["-" if cell == "None" else cell for cell in cells])
    return "\n\n".join([
        markdown(lines), " ".join(results["remarks"]),
        "rtf: seconds of computing per second of audio, text to waveform, batch 64",
        f"seed {results['seed']}, {results['hardware']}, {results['seconds']:.0f} s"])


@torch.no_grad()
def evaluate(run: Run) -> None:
    """Measure the models of a run; print the table; write results.json, the cards and the page."""
    table = Table(run)
    if run.finished("vae"):
        table.add_vae(run.load("vae"))
    for stage, guidance, steps in ROWS:
        if run.finished(stage):
            table.add_model(stage, guidance, steps)
    remarks = [*run.data.remarks, *table.judge.remarks]
    results = {"rows": table.rows, "config": asdict(run.flags), "seed": run.flags.seed,
               "hardware": hardware(run.device), "seconds": round(time.time() - run.began, 1),
               "remarks": remarks}
    write_atomically(run.out / "results.json", json.dumps(results, indent=2).encode())
    for stage in filter(run.finished, STAGES):
        card = CARD.substitute(stage=stage, steps=1 if stage == "distill" else 24,
                               size=run.flags.size, report=report(results))
        write_atomically(run.folder(stage) / "README.md", card.encode())
    story = " ".join([*remarks, STORY])
    page = write_page(run.out / "listen", f"flashaudio: {run.out.name}", story, table.clips,
                      table.real.shape[1] / fa.SAMPLE_RATE)
    print(f"{report(results)}\n\n{page}: captions to listen to in a browser")
