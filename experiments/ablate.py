"""The claims of the paper one by one, over several seeds:  python -m experiments.ablate

    --short          two seeds of a quarter of the training, to see that it works
    --rows 2-RF      only rows with this in their name

Each row of `plan` is train.py's recipe with a flag, or a function that a stage is given, changed.
A stage is trained once for all rows that agree in what it depends on. A row that has been measured
is a file in <out>/rows, so the same command continues what was interrupted. Samples are judged by
their mels, before the vocoder. The tables are printed and written to <out>/ablation.json.
"""

import argparse
import inspect
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import flashaudio as fa
import train
from data import toy
from data.clips import Clips, load_audio
from evaluation.judges import ToyJudge, is_toy
from experiments import figures
from experiments.pairings import cfg_zero_sample, knn_pairing
from flashaudio import FlashAudio, InputError
from runs.cache import bar, digest, write_atomically
from runs.run import WHERE, Run, one_line_errors

SHORT = dict(vae_steps=800, cfm_steps=600, rf1_steps=100, rf2_steps=150, distill_steps=150,
             rf2_couplings=128, distill_couplings=128, eval_clips=96)


# ---- What is trained -----------------------------------------------------------------------------

@dataclass
class Row:
    """A row of a table: what it changes in the full recipe."""
    table: str
    name: str
    stage: str                                          # the one that is measured
    flags: dict = field(default_factory=dict)
    rf1: dict = field(default_factory=dict)             # arguments of train.train_rf1
    couplings: dict = field(default_factory=dict)       # of train.couplings, for rf2
    rf2: dict = field(default_factory=dict)             # of train.train_rf2
    from_cfm: bool = True                               # or the 1-RF starts anew

    def changes(self) -> dict:
        """All that it changes, functions by their names."""
        held = {"flags": self.flags, "from_cfm": self.from_cfm}
        for part in ("rf1", "couplings", "rf2"):
            given = getattr(self, part)
            held[part] = {k: f.__qualname__ if f else None for k, f in given.items()}
        return held


def variant(density: Callable, **changes: float) -> Callable:
    """A density of t with other parameters, under a name that tells them."""
    defaults = inspect.signature(density).parameters
    if all(defaults[name].default == value for name, value in changes.items()):
        return density                                  # one name for one thing

    def changed(n: int, generator: torch.Generator | None = None) -> Tensor:
        return density(n, generator=generator, **changes)

    changed.__qualname__ = f"{density.__qualname__}({changes})"
    return changed


def plan() -> list[Row]:
    paired = {"pair": fa.immiscible_pairing}
    unpaired = {"pair": None}
    uniform = {"density": fa.uniform}
    rows = [Row("Table 2", "1-RF full", "rf1"),
            Row("Table 2", "1-RF uniform t", "rf1", rf1=uniform),
            Row("Table 2", "1-RF not from CFM", "rf1", from_cfm=False),
            Row("Table 2", "1-RF no pairing", "rf1", rf1=unpaired)]
    for mean in (-0.5, 0.0, 0.5):
        density = variant(fa.logit_normal, mean=mean)
        rows.append(Row("Table 6", f"1-RF μ = {mean}", "rf1", rf1={"density": density}))
    for name, pair in (("none", None), ("immiscible", fa.immiscible_pairing), ("knn", knn_pairing)):
        rows.append(Row("Pairing", f"1-RF {name}", "rf1", rf1={"pair": pair}))
    rows += [Row("Table 2", "2-RF full", "rf2"),
             Row("Table 2", "2-RF uniform t", "rf2", rf2=uniform),
             Row("Table 2", "2-RF literal re-pairing", "rf2", rf2=paired),
             Row("Table 2", "2-RF paired before the ODE", "rf2", couplings=paired),
             Row("Table 2", "2-RF from 1-RF without pairing", "rf2", rf1=unpaired)]
    for a in (1.0, 2.0, 3.0, 4.0):
        density = variant(fa.mix_exp, a=a)
        rows.append(Row("Table 6", f"2-RF a = {a:g}", "rf2", rf2={"density": density}))
    for guidance in (1.0, 2.0, 3.0, 5.0):
        iterations = {"plain": 0}
        if guidance > 1:
            iterations["anchored, 1"] = 1
        if guidance == 3:
            iterations |= {"anchored, 3": 3, "anchored, 10": 10}
        for way, n in iterations.items():
            flags = {"rf2_guidance": guidance, "rf2_anchor_steps": n}
            rows.append(Row("Fig. 4", f"ω = {guidance:g}, {way}", "rf2", flags))
        if guidance > 1:
            rows.append(Row("Fig. 4", f"ω = {guidance:g}, CFG-Zero*", "rf2",
                            {"rf2_guidance": guidance}, couplings={"sampler": cfg_zero_sample}))
    for guidance in (3.0, 1.0):
        rows.append(Row("Eq. 13", f"couplings at ω = {guidance:g}", "distill",
                        {"distill_guidance": guidance}))
    return rows + [Row("Fig. 2, 3", stage, stage) for stage in ("cfm", "rf1", "rf2", "distill")]


@dataclass
class SharedRun(Run):
    """A run whose stages lie in folders named by what they depend on, logs and loss beside them."""
    names: dict[str, str] = field(default_factory=dict)     # of the folders

    def done(self, stage: str, start=None, *functions: Callable | None) -> bool:
        self.names[stage] = f"{stage}-{digest(self.settings(stage, start, functions))}"
        return super().done(stage, start, *functions)

    def folder(self, stage: str) -> Path:
        return Path(self.flags.out) / self.names[stage]

    @property
    def out(self) -> Path:
        return self.folder(list(self.names)[-1])


def train_row(run: SharedRun, row: Row) -> None:
    """Algorithm 1 with the row's changes, up to the stage that it measures."""
    model = train.train_vae(run)
    if row.from_cfm:
        model = train.train_cfm(run, model)
    if row.stage == "cfm":
        return
    model = train.train_rf1(run, model, **row.rf1)
    if row.stage == "rf1":
        return
    pairs = train.couplings(run, model, "rf2", **row.couplings)
    model = train.train_rf2(run, model, pairs, **row.rf2)
    if row.stage == "distill":
        pairs = train.couplings(run, model, "distill")
        train.distill(run, model, pairs)


# ---- What is measured ----------------------------------------------------------------------------

class Judge:
    """Quality of latents (N, C, L) made for the held-out captions."""

    def __init__(self, data: Clips, clips: int):
        if not is_toy(data):
            raise InputError("the ablations need the toy set, whose judge tells their rows apart")
        rows = data.held_out(clips)
        wavs = [load_audio(data.rows[i]["audio_path"], toy.SAMPLES) for i in rows]
        self.rows, self.captions = rows, [data.captions[i] for i in rows]
        self.toy = ToyJudge(data, rows, torch.stack(wavs))

    @torch.no_grad()
    def __call__(self, model: FlashAudio, z: Tensor, name: str) -> dict:
        mels = torch.cat([model.decode(part).cpu() for part in z.split(64)])
        embedding, posterior = self.toy.judge(mels)
        right = posterior.argmax(1) == self.toy.classes
        return {f"fd {name}": fa.frechet_distance(embedding, self.toy.real),
                f"accuracy {name}": right.float().mean().item()}

    def noise(self, model: FlashAudio) -> Tensor:
        """z0 (N, C, L): the same for every row."""
        shape = model.latent_shape()
        return torch.cat([model.noise([""], i, shape) for i in range(len(self.captions))])

    def paths(self, model: FlashAudio, steps: int) -> Tensor:
        """Euler's from that noise, (steps + 1, N, C, L)."""
        z0, parts = self.noise(model), []
        for i in range(0, len(z0), 64):
            captions = self.captions[i:i + 64]
            parts.append(model.sample_latents(captions, steps, z0=z0[i:i + 64],
                                              return_trajectory=True))
        return torch.cat(parts, 1)


@torch.no_grad()
def measure(run: SharedRun, judge: Judge, row: Row) -> dict:
    """The figures of a row."""
    model = run.load(row.stage)
    steps = (24,)
    if row.stage == "distill":
        steps = (1,)
    elif row.table == "Fig. 2, 3":
        steps = (1, 2, 4, 8, 16, 24)
    elif row.stage == "rf2":
        steps = (1, 4, 24)
    found = {}
    for n in steps:
        found |= judge(model, judge.paths(model, n)[-1], f"{n} steps")
    if row.table == "Fig. 2, 3":
        paths = judge.paths(model, 24)
        found["straightness"] = fa.straightness(paths)
        found["relative straightness"] = fa.straightness(paths, relative=True)
    if row.table == "Fig. 4":
        found |= measure_couplings(run, judge, row)
    if row.table == "Pairing":
        found |= measure_pairing(run, model, row.rf1["pair"])
        found["prediction gap"] = prediction_gap(model, judge)
    return found


def measure_couplings(run: SharedRun, judge: Judge, row: Row) -> dict:
    """What the 1-RF makes of the held-out captions under guidance: its quality, its distance to the
    unguided path, and the guidance that is left, |v - v_c| / |v_c - v_∅|."""
    flags, model = run.flags, run.load("rf1").requires_grad_(False)
    sampler = row.couplings.get("sampler", fa.make_couplings)
    anchoring = (flags.rf2_anchor_steps, flags.rf2_anchor_lr, flags.rf2_anchor_tol)
    began, ends, residual, effective = time.time(), [], [], []
    for i, z0 in enumerate(judge.noise(model).split(64)):
        context = model.contexts(judge.captions[64 * i:64 * i + 64])
        null = model.contexts([""]).expand(len(z0), -1, -1)
        n = flags.rf2_coupling_steps
        with run.autocast():
            path = sampler(model, z0, context, null, n, flags.rf2_guidance, *anchoring,
                           return_trajectory=True)
        unguided = fa.euler_sample(model, z0, context, steps=n)
        ends.append(path[-1])
        residual.append((path[-1] - unguided).pow(2).mean().item())
        for k, v in enumerate(path.diff(dim=0) * n):
            t = torch.full((len(z0),), k / n, device=z0.device)
            v_cond, v_null = model(path[k], t, context), model(path[k], t, null)
            effective.append(((v - v_cond).norm() / (v_cond - v_null).norm()).item())
    return {**judge(model, torch.cat(ends), "couplings"), "residual": float(np.mean(residual)),
            "effective guidance": float(np.mean(effective)), "seconds": time.time() - began}


def measure_pairing(run: SharedRun, model: FlashAudio, pair: train.Pairing | None) -> dict:
    """What a pairing does to 2000 batches: distance saved (%), share of noises that stay with their
    clip, and skew of p(z0 | c): 1 where noise tells nothing of the caption."""
    data, generator = run.data, torch.Generator().manual_seed(0)
    latents, scale = data.latents(model), model.scale_factor.cpu()
    before, after, fixed, noises = [], [], [], {}
    for _ in range(2000):
        order = torch.randperm(len(data.train), generator=generator)
        rows = data.train[order[:run.flags.batch_size].numpy()]
        z1 = scale * torch.from_numpy(latents[data.file[rows], 0])
        z0 = torch.randn(z1.shape, generator=generator)
        paired = pair(z0, z1) if pair else z0
        before.append((z1 - z0).flatten(1).norm(dim=1).mean().item())
        after.append((z1 - paired).flatten(1).norm(dim=1).mean().item())
        fixed.append((paired == z0).flatten(1).all(1).float().mean().item())
        for i, noise in zip(rows, paired):
            noises.setdefault(toy.scene_index(data.rows[i]["scene"]), []).append(noise)
    groups = [torch.stack(group) for group in noises.values() if len(group) > 1]
    skew = [len(group) * group.mean(0).pow(2).mean().item() for group in groups]
    return {"distance saved": 100 * (1 - np.mean(after) / np.mean(before)),
            "fixed": float(np.mean(fixed)), "skew": float(np.mean(skew))}


def prediction_gap(model: FlashAudio, judge: Judge) -> float:
    """|v_c - v_∅|² on unguided paths: how much the caption changes what is predicted."""
    context = model.contexts(judge.captions)
    null = model.contexts([""]).expand_as(context)
    gaps = []
    for k, z in enumerate(judge.paths(model, 10)):
        if k % 2:
            t = torch.full((len(z),), k / 10, device=z.device)
            gaps.append((model(z, t, context) - model(z, t, null)).pow(2).mean().item())
    return float(np.mean(gaps))
