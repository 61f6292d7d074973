"""Stage eval: every model of a run in 1, 4 and 24 steps, judged by its waveforms.

Prints the table of the run, writes results.json, a card beside each model, and a page to listen.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import flashaudio as fa
from data.clips import load_audio
from evaluation.judges import NearestClip, ToyJudge, make_judge
from evaluation.listen import save_clip, write_page
from flashaudio import FlashAudio
from runs.cache import bar, write_atomically
from runs.run import STAGES, Run

PLAN = (("cfm", 1.0, (1, 4, 24)), ("cfm", 3.0, (24,)), ("rf1", 1.0, (1, 4, 24)),
        ("rf2", 1.0, (1, 4, 24)), ("distill", 1.0, (1,)))   # stage, guidance, steps of its rows
COLUMNS = ("model", "steps", "nfe", "guidance", "fd", "kl", "accuracy", "measured", "clap",
           "straightness", "rtf", "clips", "judge")
SHOWN = 8           # captions on the listening page
NAMES = {"cfm": "CFM", "rf1": "1-RF", "rf2": "2-RF", "distill": "distilled"}
STORY = """The real clip, then what each model makes of its caption, from the same noise. CFM needs
many steps. The 1-RF is trained on from it, the 2-RF on what the 1-RF makes, and the distilled model
on what the 2-RF makes, until one step is enough."""


CARD = """---
library_name: flashaudio
pipeline_tag: text-to-audio
tags: [rectified-flow, text-to-audio]
---

# flashaudio, stage {stage}

Text to audio at 16 kHz with rectified flows (FlashAudio, Liu et al., ACL 2025). In the folder of
the flashaudio code:

```python
import pretrained.text                              # for frozen text encoders
from flashaudio import FlashAudio
model = FlashAudio.from_pretrained("<this folder, or its hub id>")
wav = model.generate("a bell followed by rain", steps={steps}, seed=0)
```

Preset {preset}, seed {seed}. The models of its run, judged by {judge}. {remarks}

{table}
"""


@dataclass
class Table:
    """What has been measured: a row for each model and number of steps, and clips to listen to."""
    judge: ToyJudge | NearestClip
    captions: list[str]
    folder: Path        # of the clips
    rows: list[dict] = field(default_factory=list)
    clips: list[tuple[str, str, str]] = field(default_factory=list)     # as write_page takes them

    def add(self, wav: Tensor, name: str, label: str, **columns) -> None:
        """A row for waveforms (N, samples), one for each caption; columns: what else to tell."""
        judged = {**self.judge(wav), "clips": len(wav), "judge": self.judge.name}
        self.rows.append({**dict.fromkeys(COLUMNS), **judged, **columns})
        for k, clip in enumerate(wav[:SHOWN]):
            save_clip(self.folder / f"{k}-{name}", clip)
            self.clips.append((self.captions[k], label, f"{k}-{name}"))


def sample(model: FlashAudio, captions: list[str], steps: int, guidance: float,
           seed: int) -> tuple[Tensor, float, float]:
    """Latents (N, C, L), straightness of their paths, and seconds taken, text included.

    Latent i starts from the noise of seed + i, the same for every model.
    """
    model.sample_latents(captions[:1], 1, seed=0)           # warms up
    began = time.time()
    shape = model.latent_shape()
    z0 = torch.cat([model.noise([""], seed + i, shape) for i in range(len(captions))])
    latents, bend = [], 0.0
    for i in bar(range(0, len(captions), 64), "eval", unit="batch"):
        path = model.sample_latents(captions[i:i + 64], steps, guidance, z0=z0[i:i + 64],
                                    return_trajectory=True)             # (steps + 1, B, C, L)
        latents.append(path[-1])
        bend += fa.straightness(path) * path.shape[1]
    return torch.cat(latents), bend / len(captions), time.time() - began


def in_parts(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) on the CPU, computed for no more clips at once than a CPU's caches hold."""
    return torch.cat([f(part).cpu() for part in x.split(64 if x.is_cuda else 8)])


def add_row(run: Run, table: Table, model: FlashAudio, name: str, label: str, steps: int,
            guidance: float, made: tuple[Tensor, float, float], straightness: float | None) -> None:
    """A row for what `sample` made of the model."""
    latents, _, seconds = made
    began = time.time()
    mels = torch.cat([model.decode(z) for z in latents.split(64)])              # (N, 80, T)
    wav = in_parts(run.vocoder, mels)                                           # (N, samples)
    seconds += time.time() - began
    label += f", {steps} step{'s' * (steps > 1)}"
    if guidance != 1:
        label += f", ω = {guidance:g}"
    table.add(wav, f"{name}-{steps}-{guidance:g}", label, model=name, steps=steps,
              nfe=steps if guidance == 1 else 2 * steps, guidance=guidance,
              straightness=straightness, rtf=seconds * fa.SAMPLE_RATE / wav.numel())


def add_stage(run: Run, table: Table, stage: str, guidance: float, all_steps: tuple) -> None:
    """The rows of a stage's model; the straightness in each is that of its paths in 24 steps."""
    model = run.load(stage)
    longest = sample(model, table.captions, 24, guidance, run.flags.seed)
    for steps in all_steps:
        made = longest
        if steps != 24:
            made = sample(model, table.captions, steps, guidance, run.flags.seed)
        add_row(run, table, model, stage, NAMES[stage], steps, guidance, made, longest[1])


def new_table(run: Run) -> Table:
    """A table of the held-out captions, with a row of their recordings."""
    data = run.data
    rows = data.held_out(run.flags.eval_clips)
    samples = data.mels.shape[2] * fa.HOP
    real = torch.stack([load_audio(data.rows[i]["audio_path"], samples) for i in rows])
    captions = [data.captions[i] for i in rows]
    table = Table(make_judge(run, rows, real), captions, run.out / "listen")
    table.add(real, "real", "the real clip", model="real")
    return table


def measure(run: Run) -> Table:
    """The table of a run: recordings, what VAE and vocoder leave of them, then each model."""
    data = run.data
    table = new_table(run)
    model = run.load("vae")
    rows = data.held_out(run.flags.eval_clips)
    mels = torch.tensor(data.mels[data.file[rows]], device=run.device)          # (N, 80, T)
    wav = in_parts(lambda mel: run.vocoder(model.decode(model.encode(mel))), mels)
    table.add(wav, "vae", "the real clip through the VAE", model="vae")
    for stage, guidance, steps in PLAN:
        add_stage(run, table, stage, guidance, steps)
    return table


def remarks(run: Run, table: Table) -> list[str]:
    """What the reader of the figures must know."""
    found = ["The captions were held out from training."]
    if not run.data.has_test:
        found = ["The captions were trained on: the data has no test split."]
    clips, dimensions = table.judge.real.shape
    if clips < dimensions:
        found.append(f"fd means little: it compares {dimensions} dimensions by {clips} clips.")
    return found


def hardware(device: torch.device) -> str:
    chip = f"{platform.processor() or platform.machine()} {device.type}, "
    chip += f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    return f"{chip}, torch {torch.__version__}"


def cells(row: dict) -> list[str]:
    values = [row[column] for column in COLUMNS]
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    return ["-" if text == "None" else text for text in texts]


def print_table(results: dict) -> None:
    for line in [COLUMNS, *map(cells, results["rows"])]:
        print(" ".join(text.rjust(max(8, len(column))) for column, text in zip(COLUMNS, line)))
    print(f"\njudged by {results['rows'][0]['judge']}; rtf: seconds of computing per second of "
          "audio, text to waveform, batch 64", *results["remarks"], sep="\n")
    print(f"seed {results['seed']}, {results['hardware']}, {results['seconds']:.0f} s of training "
          "and evaluation")


def markdown_table(lines: list) -> str:
    """Lines of cells as a table in Markdown; the first line names the columns."""
    rule = ["-" * len(cell) for cell in lines[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def model_card(stage: str, results: dict) -> str:
    """README.md of a model: how to load it, and the table of its run. Holds no local path."""
    table = markdown_table([COLUMNS, *map(cells, results["rows"])])
    return CARD.format(stage=stage, steps=1 if stage == "distill" else 24, table=table,
                       judge=results["rows"][0]["judge"], remarks=" ".join(results["remarks"]),
                       preset=results["config"]["preset"], seed=results["seed"])


@torch.no_grad()
def evaluate(run: Run) -> None:
    """Measure the models of a run; print the table; write results.json, the cards and the page."""
    began = time.time()
    table = measure(run)
    notes = {stage: run.notes(stage) for stage in STAGES}
    seconds = sum(held["seconds"] for held in notes.values()) + time.time() - began
    config = asdict(run.flags)
    for held in notes.values():         # as the stages were trained, whatever the flags are now
        for name in config.keys() & held["settings"].keys() - {"data"}:
            config[name] = held["settings"][name]
    results = {"rows": table.rows, "config": config, "seed": run.flags.seed,
               "hardware": hardware(run.device), "seconds": round(seconds, 1),
               "remarks": remarks(run, table)}
    write_atomically(run.out / "results.json", json.dumps(results, indent=2).encode())
    for stage in notes:
        write_atomically(run.folder(stage) / "README.md", model_card(stage, results).encode())
    text = " ".join([*results["remarks"], STORY])
    length = run.data.mels.shape[2] * fa.HOP / fa.SAMPLE_RATE                   # seconds
    page = write_page(run.out / "listen", f"flashaudio: {run.out.name}", text, table.clips, length)
    print_table(results)
    print(f"{page}: {min(SHOWN, len(table.captions))} of the captions, to listen to in a browser")
