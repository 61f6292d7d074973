"""The claims of the paper one by one, over several seeds:  python -m experiments.ablate

Each row of `plan` is train.py's recipe with a flag, or a function that a stage is given, changed.
A stage is trained once for all rows that agree in what it depends on; <out>/seed<n> may be a run of
train.py, and a row that is a file in <out>/rows was measured: the same command goes on. Judged by
mels, before the vocoder.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import flashaudio as fa
import train
from evaluation.evaluate import markdown
from evaluation.judges import ToyJudge, is_toy, load_clips
from evaluation.measures import frechet_distance
from experiments.pairings import squared_pairing, train_rf1_over
from experiments.tables import code_of_figures, kept_row, print_claims, summary, table_of
from flashaudio import FlashAudio, InputError
from runs.cache import bar, digest, write_atomically
from runs.run import WHERE, Run, hardware, name_of, one_line_errors

SHORT = dict(vae_steps=800, cfm_steps=600, rf1_steps=100, rf2_steps=150, distill_steps=150,
             rf2_couplings=128, distill_couplings=128, eval_clips=96)


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
    unpaired = {"pairing": fa.no_pairing}
    uniform = {"density": fa.uniform}
    rows = [Row("Fig. 2, 3", stage, stage) for stage in ("cfm", "rf1", "rf2", "distill")]
    rows += [Row("Table 2", "1-RF full", "rf1"),
             Row("Table 2", "1-RF uniform t", "rf1", rf1=uniform),
             Row("Table 2", "1-RF no pairing", "rf1", rf1=unpaired),
             Row("Table 2", "1-RF uniform t, no pairing", "rf1", rf1={**uniform, **unpaired}),
             Row("Table 2", "1-RF not from CFM", "rf1", from_cfm=False),
             Row("Table 6", "1-RF μ = 0", "rf1")]
    for mean in (-0.5, 0.5):
        density = partial(fa.logit_normal, mean=mean)
        rows.append(Row("Table 6", f"1-RF μ = {mean}", "rf1", rf1={"density": density}))
    squared = {"over": 256, "pairing": squared_pairing}
    rows += [Row("Pairing", "none", "rf1", rf1=unpaired),
             Row("Pairing", "over 16", "rf1"),
             Row("Pairing", "over 64", "rf1", rf1={"over": 64}),
             Row("Pairing", "over 256", "rf1", rf1={"over": 256}),
             Row("Pairing", "over 256, squared", "rf1", rf1=squared),
             Row("Pairing", "over 256, with captions", "rf1", rf1={"over": 256, "weight": 3.0}),
             Row("Table 2", "2-RF full", "rf2"),
             Row("Table 2", "2-RF uniform t", "rf2", rf2=uniform),
             Row("Table 6", "2-RF a = 4", "rf2"),
             Row("Table 6", "2-RF a = 1", "rf2", rf2={"density": partial(fa.mix_exp, a=1.0)}),
             Row("Fig. 4", "2-RF anchored", "rf2"),
             Row("Fig. 4", "2-RF plain", "rf2", {"anchor_steps": 0}),
             Row("Table 2", "2-RF from 1-RF without pairing", "rf2", rf1=unpaired)]
    for iterations in (0, 1, 3, 10):
        flags = {"anchor_steps": iterations}
        rows.append(Row("Couplings", f"{iterations} iterations", "rf1", flags))
    rows.append(Row("Couplings", "unguided", "rf1", {"rf2_guidance": 1.0}))
    return rows + [Row("Eq. 13", f"couplings at ω = {guidance:g}", "distill",
                       {"distill_guidance": guidance}) for guidance in (1.0, 3.0)]


@dataclass
class SharedRun(Run):
    """A run whose stages lie in folders named by what they depend on, with their logs.

    One that train.py has trained in the same way in <out>/<stage> is taken from there.
    """
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
    if row.from_cfm:
        model = train.train_cfm(run, model)
    if row.stage != "cfm":
        train_rf1 = train_rf1_over if "over" in row.rf1 else train.train_rf1
        model = train_rf1(run, model, **row.rf1)
    if row.stage in ("rf2", "distill"):
        model = train.train_rf2(run, model, train.Couplings(run, model, "rf2"), **row.rf2)
    if row.stage == "distill":
        train.distill(run, model, train.Couplings(run, model, "distill"))


class MelJudge:
    """Quality of latents (N, C, L) that are made for the held-out captions, before the vocoder."""

    def __init__(self, run: Run):
        if not is_toy(run.data):
            raise InputError("the ablations need the toy set, whose judge tells their rows apart")
        rows = run.data.held_out(run.flags.eval_clips)
        self.captions = [run.data.captions[i] for i in rows]
        self.toy = ToyJudge(run.data, rows, load_clips(run.data, rows))

    def __call__(self, model: FlashAudio, z: Tensor, name: str) -> dict:
        mels = torch.cat([model.decode(part).cpu() for part in z.split(64)])
        embedding, posterior = self.toy.judge(mels)
        right = posterior.argmax(1) == self.toy.classes
        return {f"fd {name}": frechet_distance(embedding, self.toy.real),
                f"accuracy {name}": right.float().mean().item()}


@torch.no_grad()
def measure(run: SharedRun, judge: MelJudge, row: Row) -> dict:
    """The figures of a row. Each seed has noise of its own, the same for all of its rows."""
    model = run.load(row.stage).requires_grad_(False)
    shape = (len(judge.captions), *model.latent_shape())
    z0 = torch.randn(shape, generator=run.generator("judged")).to(run.device)
    if row.table == "Couplings":
        return measure_couplings(run, judge, model, z0)
    found = {}
    steps = {"rf2": (1, 4, 24), "distill": (1,)}.get(row.stage, (24,))
    if row.table == "Fig. 2, 3" and row.stage != "distill":
        steps = (1, 2, 4, 8, 16, 24)
    ways = [(n, 1.0, f"{n} steps") for n in steps]
    if row.stage == "cfm":
        ways.append((24, 3.0, "24 steps, ω = 3"))
    if row.table == "Pairing":
        ways = [(24, omega, f"ω = {omega:g}") for omega in (1.0, 2.0, 3.0, 5.0)]
        found["distance saved"] = distance_saved(run, row, model)
    for n, omega, name in ways:
        found |= judge(model, model.sample_latents(judge.captions, n, omega, z0=z0), name)
    if row.table == "Fig. 2, 3":
        paths = model.sample_latents(judge.captions, 24, z0=z0, return_trajectory=True)
        found["straightness"] = fa.straightness(paths)
        way = (paths[-1] - paths[0]).flatten(1).pow(2).sum(1).mean().item()
        found["relative straightness"] = found["straightness"] / way
    return found


def measure_couplings(run: SharedRun, judge: MelJudge, model: FlashAudio, z0: Tensor) -> dict:
    """What the 1-RF makes of the held-out captions under guidance: its quality, its distance to the
    unguided path, and the guidance that is left: v - v_c in units of v_c - v_∅, along it."""
    flags = run.flags
    n = flags.rf2_coupling_steps
    context = model.contexts(judge.captions)
    null = model.contexts([""]).expand_as(context)
    path = fa.make_couplings(model, z0, context, null, n, flags.rf2_guidance, flags.anchor_steps,
                             flags.anchor_lr, flags.anchor_tol, return_trajectory=True)
    unguided = fa.euler_sample(model, z0, context, steps=n)
    left = []
    for k, v in enumerate(path.diff(dim=0) * n):
        t = torch.full((len(z0),), k / n, device=z0.device)
        v_cond, v_null = model(path[k], t, context), model(path[k], t, null)
        way = v_cond - v_null
        left.append((((v - v_cond) * way).sum() / way.pow(2).sum()).item())
    return {**judge(model, path[-1], "couplings"), "guidance left": float(np.mean(left)),
            "residual": (path[-1] - unguided).pow(2).mean().item()}


def distance_saved(run: SharedRun, row: Row, model: FlashAudio) -> float:
    """The share of the mean distance of noise and clip that a row's pairing takes away, in %."""
    clips, generator = train.Latents(run, model), torch.Generator().manual_seed(0)
    pairing = row.rf1.get("pairing", fa.immiscible_pairing)
    before, after = 0.0, 0.0
    for _ in range(40):
        rows = torch.randperm(len(clips.rows), generator=generator).numpy()
        rows = clips.rows[rows[:row.rf1.get("over", run.flags.batch_size)]]
        z0, z1 = clips.ends(rows, generator)
        before += (z1 - z0).flatten(1).norm(dim=1).mean().item()
        after += (z1 - pairing(z0, z1)).flatten(1).norm(dim=1).mean().item()
    return 100 * (1 - after / before)


def measured_row(run: Run, judge: MelJudge, row: Row, folder: Path) -> dict:
    """The row with its figures, trained and measured unless it is in the folder."""
    flags = replace(run.flags, **row.flags)
    if not row.from_cfm:                                # as long as both, at the CFM's rate
        steps = flags.cfm_steps + flags.rf1_steps
        flags = replace(flags, rf1_steps=steps, rf1_lr=flags.lr)
    held = json.loads(json.dumps(asdict(row), default=name_of))
    depends = {name: value for name, value in asdict(flags).items() if name not in WHERE}
    name = digest(code_of_figures(), held, depends, flags.eval_clips, run.data.key)

    def measured() -> dict:
        shared = SharedRun(flags, run.data, run.device, run.vocoder)
        train_row(shared, row)
        return {**held, "seed": flags.seed, "figures": measure(shared, judge, row),
                "folders": shared.names}

    return kept_row(folder / f"{name}.json", measured)


def ablate(flags: train.Flags, seeds: int, text: str = "") -> list[dict]:
    """Train and measure every row with `text` in its name for every seed -> the rows, which are
    also in <out>/ablation.json if they are all there."""
    out = Path(flags.out)
    rows = []
    chosen = [row for row in plan() if text in f"{row.table} {row.name}"]
    if not chosen:
        raise InputError(f"--rows '{text}': no row has that in its name; '2-RF full' is one")
    for seed in range(seeds):
        with train.open_run(replace(flags, seed=seed, out=str(out / f"seed{seed}"))) as run:
            judge = MelJudge(run)
            for row in bar(chosen, f"seed {seed}"):
                rows.append(measured_row(run, judge, row, out / "rows"))
            written = {"rows": rows, "flags": asdict(flags), "hardware": hardware(run.device)}
    if not text:                                        # the published file has all rows
        write_atomically(out / "ablation.json", json.dumps(written, indent=1).encode())
    return rows


def print_tables(rows: list[dict]) -> None:
    for name, table in summary(rows).items():
        print(markdown(table_of(name, table)), end="\n\n")
    print("mean ± standard error over seeds\n")
    print_claims(rows)


def new_parser(name: str, text: str) -> argparse.ArgumentParser:
    """With what every experiment over seeds is asked; `flags_of` makes flags of it."""
    parser = argparse.ArgumentParser(name, description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on [5]")
    parser.add_argument("--short", action="store_true", help="train much less, to try it out")
    parser.add_argument("--out", default="out/seeds", help="folder of the runs [out/seeds]")
    parser.add_argument("--data", default="toy", help="manifest of a toy set [its own]")
    return parser


def flags_of(given: argparse.Namespace) -> train.Flags:
    changes = SHORT if given.short else {}
    return train.Flags(out=given.out, data=given.data, **changes)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser("experiments.ablate", __doc__)
    parser.add_argument("--rows", default="", help="only rows with this in table and name")
    given = parser.parse_args(argv)
    print_tables(ablate(flags_of(given), given.seeds, given.rows))


if __name__ == "__main__":
    with one_line_errors("experiments.ablate"):
        main()
