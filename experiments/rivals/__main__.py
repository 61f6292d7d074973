"""FlashAudio beside the rivals of its abstract, over several seeds:  python -m experiments.rivals

Every seed is a run of train.py in <out>/seed<n>, whose stages are used where they are there, with a
folder more for each rival. All make the same held-out captions from the same noise, through the
vocoder, as in stage eval. A row that is a file in <out>/rows was measured: the same command goes
on, and a rival of another learning rate, guidance or length is trained in a new folder.

    python -m experiments.rivals --seeds 5          the table, also in <out>/rivals.json
    python -m experiments.rivals --tune meanflow    its settings compared on validation clips
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

import flashaudio as fa
import train
from data import toy
from data.clips import Clips
from evaluation import evaluate
from evaluation.judges import is_toy
from experiments.ablate import Row, flags_of, new_parser, train_row
from experiments.rivals import consistency, diffusion, direct, meanflow
from experiments.rivals.shared import after_cfm, chain_cost
from experiments.tables import (
    judge_claims, kept_row, markdown, plus_minus, print_claims, summary)
from flashaudio import FlashAudio, InputError
from runs.cache import digest, write_atomically
from runs.run import Run, one_line_errors

RIVALS = {"diffusion": diffusion, "consistency": consistency, "meanflow": meanflow,
          "direct": direct}
LABELS = {"diffusion": "diffusion, DDIM", "consistency": "consistency", "meanflow": "MeanFlow",
          "direct": "CFM distilled, no reflow", "cfm": "CFM", "rf2": "2-RF",
          "distill": "FlashAudio, distilled"}
CHAIN = {"cfm": ((1, 1.0), (24, 1.0), (24, 3.0)), "rf2": ((1, 1.0), (4, 1.0)),
         "distill": ((1, 1.0),)}
STRAIGHT = ("cfm", "rf2", "distill", "direct")          # flows: their paths can be simulated
FIGURES = ("fd", "kl", "accuracy", "measured", "straightness", "rtf")
SHARE = 0.25                                            # of the training, for each setting tried


@dataclass
class Entry:
    """A trained model, what it took (forwards a clip), and how it is sampled: steps and ω."""
    name: str
    model: FlashAudio
    cost: int
    sampled: tuple[tuple[int, float], ...]


def entries(run: Run) -> Iterator[Entry]:
    """FlashAudio's models, then each rival's, as soon as it is trained."""
    train_row(run, Row("", "", "distill"))
    for stage, sampled in CHAIN.items():
        yield Entry(stage, run.load(stage), chain_cost(run.flags, stage), sampled)
    for name, rival in RIVALS.items():                  # all take what FlashAudio takes
        yield Entry(name, rival.train_rival(run), chain_cost(run.flags), rival.SAMPLED)


@torch.no_grad()
def figures(run: Run, table: evaluate.Table, entry: Entry, steps: int, guidance: float) -> dict:
    """What a row shows of a model, measured as in stage eval."""
    seed, captions, bend = run.flags.seed, table.captions, None
    made = evaluate.sample(entry.model, captions, steps, guidance, seed)
    if entry.name in STRAIGHT:
        longest = made if steps == 24 else evaluate.sample(entry.model, captions, 24, guidance,
                                                           seed)
        bend = longest[1]
    evaluate.add_row(run, table, entry.model, entry.name, LABELS[entry.name], steps, guidance, made,
                     bend)
    row = table.rows[-1]
    return {figure: row[figure] for figure in FIGURES if row[figure] is not None}


def measure(run: Run, entry: Entry, table: evaluate.Table, folder: Path) -> list[dict]:
    """The rows of a model, measured unless they are in the folder."""
    found = []
    for steps, guidance in entry.sampled:
        held = {"table": "rivals", "name": row_name(entry.name, steps, guidance),
                "model": LABELS[entry.name], "nfe": steps if guidance == 1 else 2 * steps,
                "omega": guidance, "compute": entry.cost / chain_cost(run.flags, "cfm"),
                "seed": run.flags.seed}
        name = digest(entry.model, held, run.flags.eval_clips, run.flags.vocoder, run.data.key)

        def measured() -> dict:
            return {**held, "figures": figures(run, table, entry, steps, guidance)}

        found.append(kept_row(folder / f"{name}.json", measured))
    return found


def row_name(name: str, steps: int, guidance: float) -> str:
    return f"{LABELS[name]}, {steps}, ω = {guidance:g}"


def validation(run: Run) -> Run:
    """The run with other clips to be judged by: fresh ones, made by the toy set's synthesiser, of
    scenes that training has, without the captions of the test split."""
    if not is_toy(run.data):
        raise InputError("rivals are tuned on fresh clips of the toy set, and this is another set")
    out = run.out / "validation"
    manifest = toy.write_toy_set(out, 1, 4 * run.flags.eval_clips, seed=1)
    clips = Clips(manifest, out / "cache", fa.PRESETS[run.flags.preset].frames)
    tested = {run.data.captions[i] for i in run.data.test}
    kept = []
    for i in clips.test:
        relation, kinds, _ = toy.parse_scene(clips.rows[i]["scene"])
        if relation.join(kinds) not in toy.HELD_OUT and clips.captions[i] not in tested:
            kept.append(i)
    clips.test = np.array(kept)
    return replace(run, data=clips, flags=replace(run.flags, out=str(out)))


def tune(run: Run, name: str, share: float) -> None:
    """Print what a rival reaches on validation clips with each of its settings that are tried."""
    rival, judged = RIVALS[name], validation(run)
    steps, omega = rival.SAMPLED[0]
    train_row(run, Row("", "", "cfm"))
    table = evaluate.new_table(judged)
    print(f"{name}: {share:g} of its training, {len(table.captions)} validation captions")
    for lr, guidance in product(*rival.TRIED):
        model = rival.train_rival(run, lr, guidance, share)
        found = figures(judged, table, Entry(name, model, 0, ()), steps, omega)
        texts = [f"{figure} {value:.4g}" for figure, value in found.items()]
        print(f"lr {lr:g}, ω = {guidance:g}, {steps} step{'s' * (steps > 1)}: {', '.join(texts)}")


def compare(flags: train.Flags, seeds: int) -> list[dict]:
    """Train and measure everything for every seed, write rivals.json -> the rows."""
    out, rows = Path(flags.out), []
    (out / "rows").mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        with train.open_run(replace(flags, seed=seed, out=str(out / f"seed{seed}"))) as run:
            table = evaluate.new_table(run)
            for entry in entries(run):
                rows += measure(run, entry, table, out / "rows")
            held = {"rows": rows, "table": summary(rows), "claims": judge_claims(rows),
                    "flags": asdict(flags), "hardware": evaluate.hardware(run.device),
                    "after_cfm": after_cfm(flags)}
            write_atomically(out / "rivals.json", json.dumps(held, indent=1).encode())
    return rows


def table_of(rows: list[dict]) -> list[list[str]]:
    """Rows of one table, best fd first: mean ± standard error over seeds."""
    means = summary(rows)["rivals"]
    first = {row["name"]: row for row in reversed(rows)}
    lines = [["model", "NFE", "ω", *FIGURES, "compute"]]
    for name in sorted(means, key=lambda name: means[name]["fd"][0]):
        row, found = first[name], means[name]
        cells = [plus_minus(*found[f][:2]) if f in found else "-" for f in FIGURES]
        lines.append([row["model"], str(row["nfe"]), f"{row['omega']:g}", *cells,
                      f"{row['compute']:.2f}"])
    return lines


def print_table(rows: list[dict]) -> None:
    print(markdown(table_of(rows)))
    print(f"\n{len({row['seed'] for row in rows})} seeds, mean ± standard error. compute: of "
          "training, in CFMs. ω: when sampling; the\nfew-step models have theirs in their weights. "
          "straightness: of 24 steps. rtf: text to waveform, batch 64\n")
    print_claims(judge_claims(rows))


def main(argv: list[str] | None = None) -> None:
    parser = new_parser("experiments.rivals", __doc__)
    parser.add_argument("--tune", choices=RIVALS, help="compare settings of this rival instead")
    parser.add_argument("--seed", type=int, default=0, help="of --tune [0]")
    parser.add_argument("--share", type=float, default=SHARE,
                        help=f"of the training, in --tune [{SHARE}]")
    given = parser.parse_args(argv)
    flags = flags_of(given)
    if given.tune is None:
        return print_table(compare(flags, given.seeds))
    flags = replace(flags, seed=given.seed, out=str(Path(given.out) / f"seed{given.seed}"))
    with train.open_run(flags) as run:
        tune(run, given.tune, given.share)


if __name__ == "__main__":
    with one_line_errors("experiments.rivals"):
        main()
