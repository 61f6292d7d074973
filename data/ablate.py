"""The claims of the paper one by one, over several seeds:  python train.py --ablate full  (or short), see `plan`.

Each row of the plan is a recipe that differs from the full one in a flag or two. Stages are trained once for every combination of
settings that they depend on, and shared by all rows that agree in them; a row that has been measured is a file in <out>/rows.
Repeating the command continues. Judged on mels, before the vocoder.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import flashaudio as fa
from data import toy
from data.evaluate import ToyJudge, is_toy
from data.figures import draw_figures
from data.manifest import bar, digest
from data.run import STAGES, Run, own_settings
from flashaudio import InputError, write_atomically


def plan() -> list[tuple[str, str, str, dict]]:
    """Table, row, the stage that is measured, and the flags that differ from the full recipe."""
    rows = [("Table 2", f"1-RF {name}", "rf1", change) for name, change in {
        "full": {}, "uniform t": dict(rf1_timesteps="uniform"), "not from CFM": dict(init="none"), "no pairing": dict(pairing="none")}.items()]
    rows += [("Table 6", f"1-RF μ = {mean}", "rf1", dict(logit_mean=mean)) for mean in (-0.5, 0.0, 0.5)]
    rows += [("Pairing", f"1-RF {name}", "rf1", dict(pairing=name)) for name in ("none", "immiscible", "knn", "c2ot")]
    rows += [("Table 2", f"2-RF {name}", "rf2", change) for name, change in {
        "full": {}, "uniform t": dict(rf2_timesteps="uniform"), "literal re-pairing": dict(pairing_reflow="literal")}.items()]
    rows += [("Table 6", f"2-RF a = {a:g}", "rf2", dict(mix_exp_a=a)) for a in (1.0, 2.0, 3.0, 4.0)]
    rows += [("Table 2", "2-RF paired before the ODE", "rf2", dict(pairing_reflow="before")),
             ("Table 2", "2-RF from 1-RF without pairing", "rf2", dict(pairing="none"))]
    for guidance in (1.0, 2.0, 3.0, 5.0):
        ways = {"plain": dict(rectify="plain")}
        if guidance > 1:
            ways |= {"anchored, 1": {}, "CFG-Zero*": dict(rectify="cfg_zero")}
        if guidance == 3:
            ways |= {f"anchored, {n}": dict(anchor_steps=n) for n in (3, 10)}
        rows += [("Fig. 4", f"ω = {guidance:g}, {name}", "rf2", dict(guidance=guidance, **change)) for name, change in ways.items()]
    rows += [("Eq. 13", f"couplings at ω = {g:g}", "distill", dict(distill_guidance=g)) for g in (1.0, 3.0)]
    return rows + [("Fig. 2, 3", stage, stage, {}) for stage in ("cfm", "rf1", "rf2", "distill")]


def shared(train, flags, data, device):
    """A run of train.py whose stages live in folders named by what they depend on."""
    class SharedRun(Run):
        def folder(self, stage: str) -> Path:
            chain = [own_settings(self.flags, s) for s in STAGES[:STAGES.index(stage) + 1]]
            return Path(self.flags.out) / f"{stage}-{digest(chain)}"
    return SharedRun(flags, data, device)


class Judge:
    """Quality of latents (N, C, L) made for the held-out captions."""

    def __init__(self, data, clips: int):
        rows = data.held_out(clips)
        if not is_toy(data):
            raise InputError("--ablate needs the toy set: its judge is what tells the rows apart")
        self.captions = [data.captions[i] for i in rows]
        self.toy = ToyJudge(data, rows, torch.stack([fa.load_audio(data.rows[i]["audio_path"], toy.SAMPLES) for i in rows]))

    @torch.no_grad()
    def __call__(self, model, z: torch.Tensor, name: str) -> dict:
        embedding, posterior = self.toy.judge(torch.cat([model.decode(part) for part in z.split(64)]).cpu())
        return {f"fd {name}": fa.frechet_distance(embedding, self.toy.real),
                f"accuracy {name}": (posterior.argmax(1) == self.toy.classes).float().mean().item()}


def contexts(model, captions: list[str], i: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        c = model.text(captions[i:i + 64])
        return c, model.text([""]).expand(len(c), -1, -1)


def measure(train, run, judge: Judge, table: str, stage: str) -> dict:
    """The figures of one row."""
    model = run.load(stage).requires_grad_(False)
    z0 = torch.cat([model.noise([""], i, model.latent_shape()) for i in range(len(judge.captions))])

    def simulate(n: int) -> torch.Tensor:
        return torch.cat([model.sample_latents(judge.captions[i:i + 64], n, z0=z0[i:i + 64], return_trajectory=True)
                          for i in range(0, len(z0), 64)], 1)                   # (n + 1, N, C, L)

    if stage == "distill":
        steps = (1,)
    else:
        steps = (1, 2, 4, 8, 16, 24) if table == "Fig. 2, 3" else (1, 4, 24) if stage == "rf2" else (24,)
    found = {}
    for n in steps:
        path = simulate(n)
        found |= judge(model, path[-1], f"{n} steps")
    if table == "Fig. 2, 3":
        path = path if n == 24 else simulate(24)
        found |= {"straightness": fa.straightness(path), "relative straightness": fa.straightness(path, relative=True)}
    if table == "Fig. 4":
        found |= measure_couplings(run, judge, z0)
    if table == "Pairing":
        found |= measure_pairing(train, run, model, judge, z0)
    return found


def measure_couplings(run, judge: Judge, z0: torch.Tensor) -> dict:
    """Couplings of the 1-RF for the held-out captions: quality, residual to the unguided path, effective guidance."""
    flags, model, ends, residual, effective, began = run.flags, run.load("rf1").requires_grad_(False), [], [], [], time.time()
    for i in range(0, len(z0), 64):
        c, null = contexts(model, judge.captions, i)
        with run.autocast():
            path = fa.make_couplings(model.dit, z0[i:i + 64], c, null, flags.coupling_steps, flags.guidance, flags.anchor_steps,
                                     flags.rectify, lr=flags.anchor_lr, tolerance=flags.anchor_tol, return_trajectory=True)
        anchor = fa.euler_sample(model.dit, z0[i:i + 64], c, steps=flags.coupling_steps)
        ends.append(path[-1])
        residual.append((path[-1] - anchor).pow(2).mean().item())
        for k, v in enumerate(path.diff(dim=0) * flags.coupling_steps):         # |v_used - v_c| / |v_c - v_∅|
            t = torch.full((len(c),), k / flags.coupling_steps, device=c.device)
            with torch.no_grad():
                cond, uncond = model.dit(path[k], t, c), model.dit(path[k], t, null)
            effective.append(((v - cond).norm() / (cond - uncond).norm()).item())
    return {**judge(model, torch.cat(ends), "couplings"), "residual": float(np.mean(residual)),
            "effective guidance": float(np.mean(effective)), "seconds": time.time() - began}


def measure_pairing(train, run, model, judge: Judge, z0: torch.Tensor) -> dict:
    """What a pairing does to 2000 batches: distance saved (%), share of noises that stay, skew of p(z0|c), |v_c - v_∅|²."""
    flags, data, generator = run.flags, run.data, torch.Generator().manual_seed(0)
    latents, scale = data.latents(model, run.weights("vae")), model.scale_factor.cpu()
    kinds = np.array([toy.scene_index(r["scene"]) for r in data.rows])
    before, after, fixed, noises = [], [], [], {}
    for _ in range(2000):
        rows = data.train[torch.randperm(len(data.train), generator=generator)[:flags.batch_size].numpy()]
        z1, plain = scale * torch.from_numpy(latents[rows, 0]), torch.randn(len(rows), *z0.shape[1:], generator=generator)
        context = model.text([data.captions[i] for i in rows]).cpu() if flags.pairing == "c2ot" else None
        paired = train.pair_noise(flags, z1, plain, context, generator)
        before.append((z1 - plain).flatten(1).norm(dim=1).mean().item())
        after.append((z1 - paired).flatten(1).norm(dim=1).mean().item())
        fixed.append((paired == plain).flatten(1).all(1).float().mean().item())
        for kind, noise in zip(kinds[rows], paired):
            noises.setdefault(int(kind), []).append(noise.flatten())
    skew = [torch.stack(group).mean(0).pow(2).mean().item() * len(group) for group in noises.values() if len(group) > 1]
    gaps = []
    for i in range(0, len(z0), 64):
        c, null = contexts(model, judge.captions, i)
        path = model.sample_latents(c, 10, z0=z0[i:i + 64], return_trajectory=True)
        for k in (1, 3, 5, 7, 9):
            t = torch.full((len(c),), k / 10, device=c.device)
            with torch.no_grad():
                gaps.append((model.dit(path[k], t, c) - model.dit(path[k], t, null)).pow(2).mean().item())
    return {"distance saved": 100 * (1 - np.mean(after) / np.mean(before)), "fixed": float(np.mean(fixed)),
            "skew": float(np.mean(skew)), "prediction gap": float(np.mean(gaps))}   # skew: 1 for noise that knows no caption


def read_figures(files: list[Path]) -> dict:
    """{(table, row, figure): {seed: value}} of the rows in these files."""
    found: dict = {}
    for file in files:
        held = json.loads(file.read_text())
        for name, value in held["figures"].items():
            found.setdefault((held["table"], held["row"], name), {})[held["seed"]] = value
    return found


def summary(found: dict) -> dict:
    """{table: {row: {figure: (mean, standard error, seeds)}}} of what read_figures found, in the order of the plan."""
    tables = {}
    for table, row, _, _ in plan():
        for v, name in ((list(seeds.values()), name) for (*place, name), seeds in found.items() if place == [table, row]):
            error = float(np.std(v, ddof=1) / len(v) ** 0.5) if len(v) > 1 else None
            tables.setdefault(table, {}).setdefault(row, {})[name] = (float(np.mean(v)), error, len(v))
    return tables


def print_tables(tables: dict) -> None:
    for table, rows in tables.items():
        names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
        print(f"\n{table}\n{'':32}" + "".join(f"{name:>24}" for name in names))
        for row, figures in rows.items():
            cells = [f"{f[0]:.3g}" + (f" ± {f[1]:.2g}" if f[1] is not None else "") if (f := figures.get(n)) else "-" for n in names]
            print(f"{row:32}" + "".join(f"{cell:>24}" for cell in cells))


# What is better, than what, and the paper's figures (FAD, Tables 1, 2, 6 and §4.2.3) where it has them; each side is table, row, figure
CLAIMS = {
    "1-RF: logit-normal t": (("Table 2", "1-RF full", "fd 24 steps"), ("Table 2", "1-RF uniform t", "fd 24 steps"), "1.12, 1.08"),
    "1-RF: from CFM": (("Table 2", "1-RF full", "fd 24 steps"), ("Table 2", "1-RF not from CFM", "fd 24 steps"), "1.12, 1.49"),
    "1-RF: immiscible pairing": (("Table 2", "1-RF full", "fd 24 steps"), ("Table 2", "1-RF no pairing", "fd 24 steps"), "1.12, 1.19"),
    "1-RF: μ = 0, not -0.5": (("Table 6", "1-RF μ = 0.0", "fd 24 steps"), ("Table 6", "1-RF μ = -0.5", "fd 24 steps"), "1.12, 1.13"),
    "1-RF: μ = 0, not 0.5": (("Table 6", "1-RF μ = 0.0", "fd 24 steps"), ("Table 6", "1-RF μ = 0.5", "fd 24 steps"), "1.12, 1.20"),
    "2-RF: Mix-Exp t": (("Table 2", "2-RF full", "fd 24 steps"), ("Table 2", "2-RF uniform t", "fd 24 steps"), "1.18, 1.23"),
    "2-RF: a = 4, not 1": (("Table 6", "2-RF a = 4", "fd 24 steps"), ("Table 6", "2-RF a = 1", "fd 24 steps"), "1.18, 1.24"),
    "2-RF: a paired 1-RF": (("Table 2", "2-RF full", "fd 24 steps"), ("Table 2", "2-RF from 1-RF without pairing", "fd 24 steps"), "1.18, 1.26"),
    "2-RF: pairing before the ODE": (("Table 2", "2-RF paired before the ODE", "fd 24 steps"), ("Table 2", "2-RF full", "fd 24 steps"), ""),
    "2-RF: literal re-pairing": (("Table 2", "2-RF literal re-pairing", "fd 24 steps"), ("Table 2", "2-RF full", "fd 24 steps"), ""),
    "2-RF in one step: Mix-Exp t": (("Table 2", "2-RF full", "fd 1 steps"), ("Table 2", "2-RF uniform t", "fd 1 steps"), ""),
    "2-RF in one step: a = 4, not 1": (("Table 6", "2-RF a = 4", "fd 1 steps"), ("Table 6", "2-RF a = 1", "fd 1 steps"), ""),
    "2-RF in one step: a paired 1-RF": (("Table 2", "2-RF full", "fd 1 steps"), ("Table 2", "2-RF from 1-RF without pairing", "fd 1 steps"), ""),
    "anchored, not plain, guidance": (("Fig. 4", "ω = 3, anchored, 1", "fd 4 steps"), ("Fig. 4", "ω = 3, plain", "fd 4 steps"), "1.26, 1.43"),
    "anchored with 10 iterations": (("Fig. 4", "ω = 3, anchored, 10", "fd 4 steps"), ("Fig. 4", "ω = 3, plain", "fd 4 steps"), "1.26, 1.43"),
    "anchored, not plain, at ω = 5": (("Fig. 4", "ω = 5, anchored, 1", "fd 4 steps"), ("Fig. 4", "ω = 5, plain", "fd 4 steps"), ""),
    "2-RF straighter than CFM": (("Fig. 2, 3", "rf2", "straightness"), ("Fig. 2, 3", "cfm", "straightness"), ""),
    "2-RF in 24 steps, CFM in 24": (("Fig. 2, 3", "rf2", "fd 24 steps"), ("Fig. 2, 3", "cfm", "fd 24 steps"), "1.18, 1.22"),
    "2-RF in 4 steps, CFM in 4": (("Fig. 2, 3", "rf2", "fd 4 steps"), ("Fig. 2, 3", "cfm", "fd 4 steps"), ""),
    "distilled on guided couplings": (("Eq. 13", "couplings at ω = 3", "fd 1 steps"), ("Eq. 13", "couplings at ω = 1", "fd 1 steps"), ""),
    "distilled, 2-RF, in one step": (("Fig. 2, 3", "distill", "fd 1 steps"), ("Fig. 2, 3", "rf2", "fd 1 steps"), "1.49, 2.24"),
    "CFM in 24 steps, distilled in 1": (("Fig. 2, 3", "cfm", "fd 24 steps"), ("Fig. 2, 3", "distill", "fd 1 steps"), "1.22, 1.49")}


def judge_claims(found: dict) -> dict:
    """For each claim the mean difference over seeds, first side less second (less is better), its 95% interval (Student's t, seeds
    paired), and what that says: reproduced only where the interval lies below zero."""
    verdicts = {}
    for claim, (better, worse, paper) in CLAIMS.items():
        if not (seeds := sorted(found.get(better, {}).keys() & found.get(worse, {}).keys())):
            continue
        gaps = np.array([found[better][seed] - found[worse][seed] for seed in seeds])
        half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 2 else math.inf
        verdict = "cannot be judged" if half == math.inf else "reproduced" if gaps.mean() < -half else "the opposite" if gaps.mean() > half else "not seen"
        verdicts[claim] = {"ours": [float(np.mean([found[side][seed] for seed in seeds])) for side in (better, worse)], "figure": better[2],
                           "difference": float(gaps.mean()), "interval": None if half == math.inf else half, "paper": paper, "verdict": verdict}
    return verdicts


def ablate(train, flags, data, device) -> None:
    """Train and measure every row of the plan for every seed; print the tables and write <out>/ablation.json."""
    out, judge = Path(flags.out), Judge(data, flags.eval_clips)
    (out / "rows").mkdir(exist_ok=True)
    own, files = {name: value for name, value in vars(flags).items() if name not in ("out", "seed", "seeds", "rows")}, []
    chosen = [row for row in plan() if flags.rows in f"{row[0]} {row[1]}"]
    if not chosen:
        raise InputError(f"--rows '{flags.rows}': no row of the ablations has that in its name, for example '2-RF full'")
    for seed, (table, row, stage, change) in bar([(s, r) for s in range(flags.seed, flags.seed + flags.seeds) for r in chosen], "ablate"):
        files.append(out / "rows" / f"{digest(table, row, seed, own, data.key)}.json")
        if files[-1].exists():
            continue
        run = shared(train, replace(flags, seed=seed, **change), data, device)
        for step in STAGES[:STAGES.index(stage) + 1]:
            if not run.is_done(step):
                train.RUN_STAGE[step](run)
        held = {"table": table, "row": row, "seed": seed, "change": change, "figures": measure(train, run, judge, table, stage)}
        write_atomically(files[-1], json.dumps(held, indent=1).encode())
    found = read_figures(files)
    tables, claims = summary(found), judge_claims(found)
    write_atomically(out / "ablation.json", json.dumps({"tables": tables, "claims": claims, "flags": vars(flags)}, indent=1).encode())
    print_tables(tables)
    for claim, c in claims.items():
        half = f" ± {c['interval']:.2g}" if c["interval"] is not None else ""
        print(f"{claim:32} {c['figure']}: {c['ours'][0]:.3g}, {c['ours'][1]:.3g}; difference {c['difference']:+.2g}{half}; paper {c['paper'] or '-'}: {c['verdict']}")
    if {"Fig. 2, 3", "Fig. 4"} <= tables.keys():
        draw_figures(out / "figures", shared(train, flags, data, device), judge, tables)
