"""FlashAudio beside the rivals of its abstract, over several seeds:  python -m experiments.rivals

Every seed is a run of train.py in <out>/seed<n>, whose stages are used where they are there, with a
folder more for each rival. All make the same held-out captions from the same noise, through the
vocoder, as in the table of train.py. A row that is a file in <out>/rows was measured: the same
command goes on, and a rival of another learning rate, guidance or length is trained anew.

    python -m experiments.rivals --seeds 5          the table, also in <out>/rivals.json
    python -m experiments.rivals --tune MeanFlow    its settings compared on validation clips
"""

import json
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Iterator

import torch

import flashaudio as fa
import train
from evaluation.evaluate import Table, markdown
from evaluation.judges import is_toy
from experiments.ablate import Row, flags_of, new_parser, train_row
from experiments.rivals.consistency import Consistency
from experiments.rivals.diffusion import Diffusion
from experiments.rivals.direct import Direct
from experiments.rivals.meanflow import MeanFlow
from experiments.rivals.shared import chain_cost
from experiments.tables import (
    code_of_figures, judge_claims, kept_row, plus_minus, print_claims, summary)
from flashaudio import FlashAudio, InputError
from runs.cache import digest, write_atomically
from runs.run import Run, hardware, one_line_errors

RIVALS = {rival.__name__: rival for rival in (Diffusion, Consistency, MeanFlow, Direct)}
CHAIN = {"cfm": ("CFM", ((1, 1.0), (24, 1.0), (24, 3.0))), "rf2": ("2-RF", ((1, 1.0), (4, 1.0))),
         "distill": ("FlashAudio, distilled", ((1, 1.0),))}
FIGURES = ("fd", "kl", "accuracy", "measured", "straightness", "rtf")


@dataclass
class Entry:
    """A trained model, what it took (forwards a clip), and how it is sampled: steps and ω."""
    label: str
    model: FlashAudio
    cost: int
    sampled: tuple[tuple[int, float], ...]


def entries(run: Run) -> Iterator[Entry]:
    """FlashAudio's models, then each rival's, as soon as it is trained."""
    train_row(run, Row("", "", "distill"))
    for stage, (label, sampled) in CHAIN.items():
        yield Entry(label, run.load(stage), chain_cost(run.flags, stage), sampled)
    for rival in RIVALS.values():                       # all take what FlashAudio takes
        yield Entry(rival.label, rival.trained(run), chain_cost(run.flags), rival.sampled)


def figures(table: Table, model: FlashAudio, steps: int, guidance: float) -> dict:
    """What a row shows of a model, measured as in the table of train.py."""
    made = table.sample(model, steps, guidance)
    found = {**table.judge(made[0]), "rtf": made[2] * fa.SAMPLE_RATE / made[0].numel()}
    if model.sampler is fa.euler_sample:                # of a flow, whose paths can be simulated
        longest = made if steps == 24 else table.sample(model, 24, guidance)
        found["straightness"] = longest[1]
    return {figure: found[figure] for figure in FIGURES if figure in found}


def measure(run: Run, entry: Entry, table: Table, folder: Path) -> list[dict]:
    """The rows of a model, measured unless they are in the folder."""
    found = []
    for steps, guidance in entry.sampled:
        held = {"table": "rivals", "name": row_name(entry.label, steps, guidance),
                "model": entry.label, "nfe": steps if guidance == 1 else 2 * steps,
                "omega": guidance, "compute": entry.cost / chain_cost(run.flags, "cfm"),
                "seed": run.flags.seed}
        name = digest(code_of_figures(), entry.model, held, run.flags.eval_clips,
                      run.flags.vocoder, run.data.key)

        def measured() -> dict:
            return {**held, "figures": figures(table, entry.model, steps, guidance)}

        found.append(kept_row(folder / f"{name}.json", measured))
    return found


def row_name(label: str, steps: int, guidance: float) -> str:
    return f"{label}, {steps}, ω = {guidance:g}"


@torch.no_grad()
def tune(run: Run, rival: type, share: float) -> None:
    """Print what a rival reaches on validation clips with each of its settings that are tried."""
    if not is_toy(run.data):
        raise InputError("rivals are tuned on the toy set's validation clips: leave --data out")
    data = copy(run.data)
    data.test = data.validation
    judged = replace(run, data=data, flags=replace(run.flags, out=str(run.out / "validation")))
    table = Table(judged)
    steps, omega = rival.sampled[0]
    train_row(run, Row("", "", "cfm"))
    print(f"{rival.label}: {share:g} of its training, {len(table.captions)} validation captions")
    for lr, guidance in product(*rival.tried):
        found = figures(table, rival.trained(run, lr, guidance, share), steps, omega)
        texts = [f"{figure} {value:.4g}" for figure, value in found.items()]
        print(f"lr {lr:g}, ω = {guidance:g}, {steps} step{'s' * (steps > 1)}: {', '.join(texts)}")


def compare(flags: train.Flags, seeds: int) -> list[dict]:
    """Train and measure everything for every seed, write rivals.json -> the rows."""
    out, rows = Path(flags.out), []
    for seed in range(seeds):
        with train.open_run(replace(flags, seed=seed, out=str(out / f"seed{seed}"))) as run:
            table = Table(run)
            for entry in entries(run):
                rows += measure(run, entry, table, out / "rows")
            held = {"rows": rows, "flags": asdict(flags), "hardware": hardware(run.device)}
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
    parser.add_argument("--seed", type=int, default=0, help="seed of --tune [0]")
    parser.add_argument("--share", type=float, default=0.25,
                        help="share of the training that a setting gets in --tune [0.25]")
    given = parser.parse_args(argv)
    flags = flags_of(given)
    if given.tune is None:
        return print_table(compare(flags, given.seeds))
    out = str(Path(given.out) / f"seed{given.seed}")
    with train.open_run(replace(flags, seed=given.seed, out=out)) as run:
        tune(run, RIVALS[given.tune], given.share)


if __name__ == "__main__":
    with one_line_errors("experiments.rivals"):
        main()
