"""The claims of the paper one by one, over several seeds:  python -m experiments.ablate

Each row of `plan` is train.py's recipe with a flag, or a function that a stage is given, changed.
A stage is trained once for all rows that agree in what it depends on; <out>/seed<n> may be a run of
train.py, and a row that is a file in <out>/rows was measured: the same command goes on.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import flashaudio as fa
import train
from evaluation.evaluate import Table, in_parts, markdown
from experiments.tables import claims_of, kept_row, table_of, write_rows
from runs.cache import bar, digest
from runs.run import WHERE, Parser, Run, name_of, one_line_errors

NOTE = """mean ± standard error over seeds. A difference is one less the other, ± half of its 95%
interval, seeds paired. Shown: at a false discovery rate of 5% over the table of claims."""


@dataclass
class Row:
    """A row of a table: what it changes in the full recipe."""
    table: str
    name: str
    stage: str                                          # the one that is measured
    flags: dict = field(default_factory=dict)
    rf1: dict = field(default_factory=dict)             # arguments of train_rf1, or _rf1_over
    rf2: dict = field(default_factory=dict)             # of train_rf2
    from_cfm: bool = True                               # or the 1-RF starts from an untrained flow


def plan() -> list[Row]:
    """The rows; those with the same couplings in a row, as only the last are kept on disk."""
    unpaired, uniform = {"pairing": fa.no_pairing}, {"density": fa.uniform}
    early, late = ({"density": partial(fa.logit_normal, mean=mean)} for mean in (-0.5, 0.5))
    rows = [Row("Fig. 2, 3", stage, stage) for stage in ("cfm", "rf1", "rf2", "distill")]
    rows += [Row("Table 2", "1-RF full", "rf1"),
             Row("Table 2", "1-RF uniform t", "rf1", rf1=uniform),
             Row("Table 2", "1-RF no pairing", "rf1", rf1=unpaired),
             Row("Table 2", "1-RF uniform t, no pairing", "rf1", rf1={**uniform, **unpaired}),
             Row("Table 2", "1-RF not from CFM", "rf1", from_cfm=False),
             Row("Table 6", "1-RF μ = 0", "rf1"),
             Row("Table 6", "1-RF μ = -0.5", "rf1", rf1=early),
             Row("Table 6", "1-RF μ = 0.5", "rf1", rf1=late),
             Row("Pairing", "none", "rf1", rf1=unpaired),
             Row("Pairing", "over 16", "rf1"),
             Row("Pairing", "over 64", "rf1", rf1={"over": 64}),
             Row("Pairing", "over 256", "rf1", rf1={"over": 256}),
             Row("Table 2", "2-RF full", "rf2"),
             Row("Table 2", "2-RF uniform t", "rf2", rf2=uniform),
             Row("Table 6", "2-RF a = 4", "rf2"),
             Row("Table 6", "2-RF a = 1", "rf2", rf2={"density": partial(fa.mix_exp, a=1.0)}),
             Row("Fig. 4", "2-RF anchored", "rf2"),
             Row("Fig. 4", "2-RF plain", "rf2", {"anchor_steps": 0}),
             Row("Table 2", "2-RF from 1-RF without pairing", "rf2", rf1=unpaired),
             Row("Couplings", "unguided", "rf1", {"rf2_guidance": 1.0})]
    for n in (0, 1, 3, 10):
        rows.append(Row("Couplings", f"{n} iterations", "rf1", {"anchor_steps": n}))
    for omega in (1.0, 3.0):
        name = f"couplings at ω = {omega:g}"
        rows.append(Row("Eq. 13", name, "distill", {"distill_guidance": omega}))
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


def train_rf1_over(run: Run, model: fa.FlashAudio, over: int) -> fa.FlashAudio:
    """train.train_rf1, its noise paired over `over` clips, those of several steps, drawn together
    and handed out step by step."""
    flags = run.flags
    wide = replace(run, flags=replace(flags, batch_size=over))
    pairing, density, loss = fa.immiscible_pairing, fa.logit_normal, fa.rectified_flow_loss
    if wide.done("rf1", model, pairing, density, loss):     # is known by the wide batch
        return run.load("rf1")
    clips = train.Latents(run, model)
    together = lru_cache(1)(partial(train.get_batch, wide, "rf1", clips, density, pairing))

    def draw(step: int) -> list[Tensor]:
        group, place = divmod(step * flags.batch_size, over)
        return [x[place:place + flags.batch_size] for x in together(group)]

    return train.fit(run, "rf1", model, clips.parts, draw, loss, flags.rf1_steps, flags.rf1_lr)


def train_row(run: Run, row: Row) -> None:
    """Algorithm 1 with the row's changes, up to the stage that it measures."""
    model = train.train_vae(run)
    if row.from_cfm:
        model = train.train_cfm(run, model)
    if "over" in row.rf1:
        model = train_rf1_over(run, model, **row.rf1)
    elif row.stage != "cfm":
        pairing = train.PAIRINGS[run.flags.rf1_pairing]
        model = train.train_rf1(run, model, **{"pairing": pairing, **row.rf1})
    if row.stage in ("rf2", "distill"):
        model = train.train_rf2(run, model, train.Couplings(run, model, "rf2"), **row.rf2)
    if row.stage == "distill":
        train.distill(run, model, train.Couplings(run, model, "distill"))


def figures(table: Table, wav: Tensor, name: str) -> dict:
    """Of waveforms (N, samples), one for each held-out caption."""
    judged = table.judge(wav)
    return {f"{figure} {name}": judged[figure] for figure in ("fd", "accuracy")}


@torch.no_grad()
def measure(run: SharedRun, table: Table, row: Row) -> dict:
    """The figures of a row."""
    model = run.load(row.stage).requires_grad_(False)
    if row.table == "Couplings":
        return measure_couplings(run, table, model)
    steps = {"rf2": (1, 4, 24), "distill": (1,)}.get(row.stage, (24,))
    if row.table == "Fig. 2, 3":
        steps = (1, 2, 4, 8, 16, 24)
    ways = {f"{n} steps": (n, 1.0) for n in steps}
    if row.stage == "cfm":
        ways["24 steps, ω = 3"] = (24, 3.0)
    if row.table == "Pairing":
        ways = {f"ω = {omega:g}": (24, omega) for omega in (1.0, 2.0, 3.0, 5.0)}
    found = {}
    for name, way in ways.items():
        wav, bend, _ = table.sample(model, *way)
        found |= figures(table, wav, name)
        if name == "24 steps":
            found["straightness"] = bend
    return found


def measure_couplings(run: SharedRun, table: Table, model: fa.FlashAudio) -> dict:
    """What the 1-RF makes of the held-out captions under guidance: its quality, its distance to the
    unguided path, and the guidance that is left: v - v_c in units of v_c - v_∅, along it."""
    flags, n = run.flags, run.flags.rf2_coupling_steps
    context = model.contexts(table.captions)
    null = model.contexts([""]).expand_as(context)
    shape = (len(context), *model.latent_shape())
    z0 = torch.randn(shape, generator=run.generator("judged")).to(run.device)
    path = fa.make_couplings(model, z0, context, null, n, flags.rf2_guidance, flags.anchor_steps,
                             flags.anchor_lr, flags.anchor_tol, return_trajectory=True)
    left = 0.0
    for t, z, v in zip(fa.time_grid(n).to(run.device), path, path.diff(dim=0) * n):
        v_cond = model(z, t.expand(len(z)), context)
        way = v_cond - model(z, t.expand(len(z)), null)
        left += (((v - v_cond) * way).sum() / way.pow(2).sum()).item() / n
    unguided = fa.euler_sample(model, z0, context, steps=n)
    wav = in_parts(run.vocoder, model.decode(path[-1]))
    return {**figures(table, wav, "couplings"), "guidance left": left,
            "residual": (path[-1] - unguided).pow(2).mean().item()}


def measured_row(run: Run, table: Table, row: Row, folder: Path) -> dict:
    """The row with its figures, trained and measured unless it is in the folder."""
    flags = replace(run.flags, **row.flags)
    if not row.from_cfm:                                # as long as both, at the CFM's rate
        steps = flags.cfm_steps + flags.rf1_steps
        flags = replace(flags, rf1_steps=steps, rf1_lr=flags.lr)
    held = json.loads(json.dumps(asdict(row), default=name_of)) | {"seed": flags.seed}
    depends = {name: value for name, value in asdict(flags).items() if name not in WHERE}

    def measured() -> dict:
        shared = SharedRun(flags, run.data, run.device, run.vocoder)
        train_row(shared, row)
        return {"figures": measure(shared, table, row), "folders": shared.names}

    return kept_row(folder, held, measured, depends, flags.eval_clips, run.data.key)


def new_table(run: Run) -> Table:
    """A table to judge by, with noise that no other seed has."""
    return Table(replace(run, flags=replace(run.flags, seed=1_000_000 * (1 + run.flags.seed))))


def ablate(flags: train.Flags, seeds: int, text: str = "") -> list[dict]:
    """Train and measure every row with `text` in its name for every seed -> the rows; if they are
    all there, also in <out>/ablation.json."""
    out, rows = Path(flags.out), []
    chosen = [row for row in plan() if text in f"{row.table} {row.name}"]
    if not chosen:
        raise fa.InputError(f"--rows '{text}': no row has that in its name; '2-RF full' is one")
    for seed in range(seeds):
        with train.open_run(replace(flags, seed=seed, out=str(out / f"seed{seed}"))) as run:
            table = new_table(run)
            for row in bar(chosen, f"seed {seed}"):
                rows.append(measured_row(run, table, row, out / "rows"))
    if not text:
        write_rows(out / "ablation.json", rows, flags)
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
