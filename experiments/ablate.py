"""The claims of the paper one by one, over several seeds:  python -m experiments.ablate

Each row of `plan` is train.py's recipe with a flag, or a function that a stage is given, changed.
A stage is trained once for all rows that agree in what it depends on; <out>/seed<n> may be a run of
train.py, and a row that is a file in <out>/rows was measured: the same command goes on.
"""

import json
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import stdev
from typing import Callable

import torch

import flashaudio as fa
import train
from data import toy
from data.clips import Clips
from evaluation.evaluate import Table, markdown
from evaluation.judges import is_toy
from experiments.tables import claims_of, kept_row, table_of, write_rows
from runs.cache import bar, digest
from runs.run import WHERE, Parser, Run, name_of, one_line_errors

FIGURES = ("fd", "kl", "accuracy", "measured")
DRAWS = 5               # of noise, for its own effect
CLIPS = 1024            # that every row is judged on, of the toy set
NOTE = """mean ± standard error over seeds. A difference is one less the other, ± half of its 95%
interval, seeds paired. Shown: at a false discovery rate of 5% over the table of claims."""


@dataclass
class Row:
    """A row of a table: what it changes in the full recipe."""
    table: str
    name: str
    stage: str                                          # the one that is measured
    flags: dict = field(default_factory=dict)
    rf1: dict = field(default_factory=dict)             # arguments of train_rf1
    rf2: dict = field(default_factory=dict)             # of train_rf2


def plan() -> list[Row]:
    """The rows; those with the same couplings in a row, as only the last are kept on disk."""
    unpaired, uniform = {"pairing": fa.no_pairing}, {"density": fa.uniform}
    rows = [Row("Stages", stage, stage) for stage in ("cfm", "rf1", "rf2", "distill")]
    rows += [Row("Stages, noise", "distill", "distill"),
             Row("1-RF", "full", "rf1"),
             Row("1-RF", "uniform t", "rf1", rf1=uniform),
             Row("1-RF", "no pairing", "rf1", rf1=unpaired),
             Row("2-RF", "full", "rf2"),
             Row("2-RF", "uniform t", "rf2", rf2=uniform),
             Row("2-RF", "anchored", "rf2", {"anchor_steps": 1})]
    for n in (0, 1, 3, 10):
        rows.append(Row("Couplings", f"{n} iterations", "rf1", {"anchor_steps": n}))
    return rows


@dataclass
class SharedRun(Run):
    """A run whose stages lie in folders named by what they depend on, with their logs, or where
    train.py has trained the same."""
    names: dict[str, str] = field(default_factory=dict)     # of the folders

    def done(self, stage: str, start=None, *functions: Callable) -> bool:
        settings = self.settings(stage, start, functions)
        self.names[stage] = stage
        if self.notes(stage).get("settings") != settings:
            self.names[stage] = f"{stage}-{digest(settings)}"
        return super().done(stage, start, *functions)

    def folder(self, stage: str) -> Path:
        return Path(self.flags.out) / self.names[stage]

    @property
    def out(self) -> Path:
        return self.folder(list(self.names)[-1])


def train_row(run: Run, row: Row) -> None:
    """Algorithm 1 with the row's changes, up to the stage that it measures."""
    model = train.train_vae(run)
    if row.stage == "vae":
        return
    model = train.train_cfm(run, model)
    if row.stage == "cfm":
        return
    pairing = train.PAIRINGS[run.flags.rf1_pairing]
    model = train.train_rf1(run, model, **{"pairing": pairing, **row.rf1})
    if row.stage == "rf1":
        return
    model = train.train_rf2(run, model, train.Couplings(run, model, "rf2"), **row.rf2)
    if row.stage == "distill":
        train.distill(run, model, train.Couplings(run, model, "distill"))


@torch.no_grad()
def measure(run: Run, table: Table, row: Row) -> dict:
    """The figures of a row; of the 1-RF in as many steps as pairs are made in."""
    model = run.load(row.stage).requires_grad_(False)
    if row.table == "Couplings":
        return measure_couplings(run, table, model)
    if row.table == "Stages, noise":
        return {f"sd of fd 1 step over {DRAWS} draws": noise_of_sampling(table, model)}
    pairs = run.flags.rf2_coupling_steps
    ways = {"cfm": {"1 step": (1, 1.0), "24 steps": (24, 1.0), "24 steps, ω = 3": (24, 3.0)},
            "rf1": {"ω = 1": (pairs, 1.0), "ω = 3": (pairs, 3.0)},
            "rf2": {"1 step": (1, 1.0), "4 steps": (4, 1.0)},
            "distill": {"1 step": (1, 1.0)}}[row.stage]
    if (row.table, row.stage) == ("Stages", "rf2"):
        ways["24 steps"] = (24, 1.0)
    found = {}
    for name, (steps, guidance) in ways.items():
        wav, bend, _ = table.sample(model, steps, guidance)
        judged = table.judge(wav)
        found |= {f"{figure} {name}": judged[figure] for figure in FIGURES if figure in judged}
        if name == "24 steps":
            found["straightness"] = bend
    return found


def noise_of_sampling(table: Table, model: fa.FlashAudio) -> float:
    """Standard deviation of the fd of one step, each time from other noise."""
    found, other = [], copy(table)
    for draw in range(DRAWS):
        seed = table.run.flags.seed + 10_000 * (1 + draw)
        other.run = replace(table.run, flags=replace(table.run.flags, seed=seed))
        found.append(table.judge(other.sample(model, 1, 1.0)[0])["fd"])
    return stdev(found)


def measure_couplings(run: Run, table: Table, model: fa.FlashAudio) -> dict:
    """What is left of guidance where the 1-RF makes couplings of held-out captions: v - v_c in
    units of v_c - v_∅, along it."""
    how = train.Couplings(run, model, "rf2").how
    n = run.flags.rf2_coupling_steps
    context = model.contexts(table.captions[:128])
    null = model.contexts([""]).expand_as(context)
    shape = (len(context), *model.latent_shape())
    z0 = torch.randn(shape, generator=run.generator("judged")).to(run.device)
    path = fa.make_couplings(model, z0, context, null, *how, return_trajectory=True)
    left = 0.0
    for t, z, v in zip(fa.time_grid(n).to(run.device), path, path.diff(dim=0) * n):
        v_cond = model(z, t.expand(len(z)), context)
        way = v_cond - model(z, t.expand(len(z)), null)
        left += (((v - v_cond) * way).sum() / way.pow(2).sum()).item() / n
    return {"guidance left": left}


def measured_row(run: Run, table: Table, row: Row, folder: Path) -> dict:
    """The row with its figures, trained and measured unless it is in the folder."""
    flags = replace(run.flags, **row.flags)
    held = json.loads(json.dumps(asdict(row), default=name_of)) | {"seed": flags.seed}
    depends = {name: value for name, value in asdict(flags).items() if name not in WHERE}

    def measured() -> dict:
        kind = SharedRun if row.flags or row.rf1 or row.rf2 else Run    # else it is train.py's own
        own = kind(flags, run.data, run.device, run.vocoder)
        train_row(own, row)
        return {"figures": measure(own, table, row)}

    return kept_row(folder, held, measured, depends, CLIPS, table.run.data.key)


def new_table(run: Run, validation: bool = False) -> Table:
    """A table to judge by, with noise that no other seed has. For the toy set on clips of its own,
    as many as a difference of .3 in fd takes, with captions like those of the test split."""
    data = run.data
    if is_toy(data):
        folder = run.out.parent / ("validation" if validation else "test")
        manifest = toy.write_toy_set(folder, 1, CLIPS, 0, seed=2 if validation else 1)
        data = Clips(manifest, folder / "cache", data.frames)
    elif validation:
        data = copy(data)
        data.test = data.validation
    own = replace(run.flags, seed=1_000_000 * (1 + run.flags.seed), eval_clips=CLIPS,
                  out=str(run.out / "judged"))
    return Table(replace(run, data=data, flags=own))


def ruler_rows(run: Run, table: Table, folder: Path, name: str) -> list[dict]:
    """The first rows of a table: what real clips score, and what the VAE leaves of them."""
    train_row(run, Row("", "", "vae"))
    model = run.load("vae")

    def measured(judged: dict) -> dict:
        return {"figures": {figure: judged[figure] for figure in FIGURES if figure in judged}}

    @torch.no_grad()
    def through_vae() -> dict:
        table.add_vae(model)
        return measured(table.rows[-1])

    real = {"table": name, "name": "real clips", "seed": run.flags.seed}
    vae = {**real, "name": "the VAE alone"}
    return [{**real, **measured(table.judge.floor)},
            kept_row(folder, vae, through_vae, table.run.data.key, model)]


def ablate(flags: train.Flags, seeds: int, text: str = "") -> list[dict]:
    """Train and measure every row with `text` in its name for every seed -> the rows, also in
    <out>/ablation.json, or ablation-<text>.json."""
    out, rows = Path(flags.out), []
    chosen = [row for row in plan() if text in f"{row.table} {row.name}"]
    if not chosen:
        raise fa.InputError(f"--rows '{text}': no row has that in its name; '2-RF full' is one")
    for seed in range(seeds):
        with train.open_run(replace(flags, seed=seed, out=str(out / f"seed{seed}"))) as run:
            table = new_table(run)
            rows += ruler_rows(run, table, out / "rows", "Ruler")
            for row in bar(chosen, f"seed {seed}"):
                rows.append(measured_row(run, table, row, out / "rows"))
    write_rows(out / f"ablation{text and '-'}{text}.json", rows, flags)
    return rows


def new_parser(name: str, text: str) -> Parser:
    """With what every experiment over seeds is asked."""
    parser = Parser(name, text)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on [5]")
    parser.add_argument("--out", default="out/seeds", help="folder of the runs [out/seeds]")
    parser.add_argument("--data", default="toy", help="folder or CSV of sounds [the toy set]")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = new_parser("experiments.ablate", __doc__)
    parser.add_argument("--rows", default="", help="only rows with this in table and name")
    given = parser.parse_args(argv)
    flags = train.parse_flags(["--data", given.data, "--out", given.out])
    rows = ablate(flags, given.seeds, given.rows)
    for name in dict.fromkeys(row["table"] for row in rows):
        print(markdown(table_of(rows, name)), end="\n\n")
    print(markdown(claims_of(rows)), NOTE, sep="\n\n")


if __name__ == "__main__":
    with one_line_errors("experiments.ablate"):
        main()
