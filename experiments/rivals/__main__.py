"""FlashAudio beside the rivals of its abstract, over several seeds:  python -m experiments.rivals

Every seed is a run of train.py in <out>/seed<n>, with a folder more for each rival. All make the
same held-out captions from the same noise. What is trained, or measured in <out>/rows, is not done
again.

    python -m experiments.rivals --seeds 5          the table, also in <out>/rivals.json
    python -m experiments.rivals --tune MeanFlow    its settings compared on validation clips
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch

import flashaudio as fa
import train
from evaluation.evaluate import Table, markdown
from experiments.ablate import NOTE, Row, new_parser, new_table, ruler_rows, train_row
from experiments.rivals.consistency import Consistency
from experiments.rivals.diffusion import Diffusion
from experiments.rivals.direct import Direct, Longer
from experiments.rivals.meanflow import MeanFlow
from experiments.rivals.shared import chain_cost
from experiments.tables import by_figure, claims_of, kept_row, table_of, write_rows
from runs.run import Run, one_line_errors

RIVALS = {rival.__name__: rival for rival in (Diffusion, Consistency, MeanFlow, Direct, Longer)}
CHAIN = {"cfm": ("CFM", ((24, 1.0), (24, 3.0))),
         "rf2": ("2-RF", ((1, 1.0), (4, 1.0))),
         "distill": ("FlashAudio, distilled", ((1, 1.0),))}     # label, steps and ω
FIGURES = ("fd", "kl", "accuracy", "measured", "rtf")


@torch.no_grad()
def figures(table: Table, model: fa.FlashAudio, steps: int, guidance: float) -> dict:
    """What a row shows of a model, measured as in the table of train.py."""
    wav, _, seconds = table.sample(model, steps, guidance)
    found = {**table.judge(wav), "rtf": seconds * fa.SAMPLE_RATE / wav.numel()}
    return {figure: found[figure] for figure in FIGURES if figure in found}


def measure(run: Run, table: Table, label: str, model: fa.FlashAudio, sampled: tuple,
            cost: int) -> list[dict]:
    """The rows of a model, each sampled with steps and ω; cost: of its training, in forwards."""
    found = []
    for steps, guidance in sampled:
        name = f"{label}, {steps}, ω = {guidance:g}"
        row = {"table": "rivals", "name": name, "seed": run.flags.seed}

        def measured() -> dict:
            compute = cost / chain_cost(run.flags, "cfm")
            return {"figures": {**figures(table, model, steps, guidance), "compute": compute}}

        found.append(kept_row(run.out.parent / "rows", row, measured, cost, run.flags.vocoder,
                              len(table.captions), table.run.data.key, model))
    return found


def compare(flags: train.Flags, seeds: int) -> list[dict]:
    """Train and measure everything for every seed -> the rows, best first, also in rivals.json."""
    out, rows = Path(flags.out), []
    for seed in range(seeds):
        with train.open_run(replace(flags, seed=seed, out=str(out / f"seed{seed}"))) as run:
            table = new_table(run)
            rows += ruler_rows(run, table, out / "rows", "rivals")
            train_row(run, Row("", "", "distill"))
            for stage, (label, sampled) in CHAIN.items():
                cost = chain_cost(run.flags, stage)
                rows += measure(run, table, label, run.load(stage), sampled, cost)
            for rival in RIVALS.values():               # all take what FlashAudio takes
                rows += measure(run, table, rival.label, rival.trained(run), rival.sampled, cost)
    rows = best_first(rows)
    write_rows(out / "rivals.json", rows, flags)
    return rows


def best_first(rows: list[dict]) -> list[dict]:
    fds = by_figure(rows)
    return sorted(rows, key=lambda row: mean(fds["rivals", row["name"], "fd"].values()))


def tune(run: Run, rival: type, share: float) -> None:
    """Print what a rival reaches on validation clips with each of its settings that are tried."""
    table = new_table(run, validation=True)
    train_row(run, Row("", "", "cfm"))
    steps, omega = rival.sampled[0]
    print(f"{rival.label}: {share:g} of its training, {len(table.captions)} validation captions")
    for lr, guidance in product(*rival.tried):
        found = figures(table, rival.trained(run, lr, guidance, share), steps, omega)
        texts = [f"{figure} {value:.4g}" for figure, value in found.items()]
        print(f"lr {lr:g}, ω = {guidance:g}, {steps} step{'s' * (steps > 1)}: {', '.join(texts)}")


def main(argv: list[str] | None = None) -> None:
    parser = new_parser("experiments.rivals", __doc__)
    parser.add_argument("--tune", choices=RIVALS, help="compare settings of this rival instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of --tune [0]")
    parser.add_argument("--share", type=float, default=0.25,
                        help="share of the training that a setting gets in --tune [0.25]")
    given = parser.parse_args(argv)
    flags = train.parse_flags(["--data", given.data, "--out", given.out])
    if given.tune:
        out = str(Path(given.out) / f"seed{given.seed}")
        with train.open_run(replace(flags, seed=given.seed, out=out)) as run:
            return tune(run, RIVALS[given.tune], given.share)
    rows = compare(flags, given.seeds)
    print(markdown(table_of(rows, "rivals")), markdown(claims_of(rows)), NOTE, sep="\n\n")
    print("compute: of training, in CFMs; rtf: text to waveform")


if __name__ == "__main__":
    with one_line_errors("experiments.rivals"):
        main()
