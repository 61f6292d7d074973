"""Moons, ablations, pictures and the bench, on stages of two steps."""

import csv
import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import stats

import flashaudio as fa
import train
from data import toy
from evaluation import judges
from evaluation.evaluate import markdown
from experiments import ablate, bench, figures, tables
from experiments.rivals import __main__ as runner
from flashaudio import InputError
from pretrained import vocoders
from tests.helpers import QUICK, ROOT, TINY, quick_vocoder


def test_moons_straighten_and_one_step_becomes_enough(tmp_path, monkeypatch, capsys):
    """S(Z) falls from stage to stage, and the distance of one step's points to the data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    with torch.random.fork_rng(devices=[]):             # the script sets the global seed
        runpy.run_module("experiments.moons", run_name="__main__")
    plt.close("all")
    lines = re.findall(r"^(\S+) +S\(Z\) (\S+)  one step is off by (\S+)$", capsys.readouterr().out,
                       re.M)
    assert [line[0] for line in lines] == ["CFM", "1-RF", "2-RF", "distilled"]
    bend, off = np.array([[float(x) for x in line[1:]] for line in lines]).T
    assert (np.diff(bend) < 0).all() and bend[2] < 0.1 * bend[0]
    assert (np.diff(off) < 0).all() and off[3] < 0.3 * off[0]
    assert (tmp_path / "docs/moons.png").stat().st_size > 10_000


def rows(name: str, *values: float, table: str = "1-RF", figure: str = "fd ω = 1") -> list:
    """A row for each seed."""
    return [{"table": table, "name": name, "seed": seed, "figures": {figure: value}}
            for seed, value in enumerate(values)]


def test_a_difference_is_shown_only_where_it_survives_the_correction():
    """p is .003, .013, .041 and 1; in this order it must be below .0125, .025, .0375 and .05."""
    found = rows("full", 1.0, 2.0, 3.0) + rows("uniform t", 2.0, 3.1, 3.9)
    found += rows("no pairing", 1.5, 2.4, 3.6)
    second = {"table": "2-RF", "figure": "fd 1 step"}
    found += rows("full", 1.0, 2.0, 3.0, 4.0, **second) + rows("uniform t", 2.0, 3.3, 3.6, **second)
    found += rows("anchored", 1.0, 2.0, 3.0, 4.0, **second)     # one seed more than the others
    one, two, three, same = tables.judge_claims(found)
    for claim, gaps in ((one, [-1, -1.1, -0.9]), (two, [-0.5, -0.4, -0.6]),
                        (three, [-1, -1.3, -0.6])):
        assert claim["difference"] == pytest.approx(np.mean(gaps))
        assert claim["interval"] == pytest.approx(stats.t(2).isf(0.025) * stats.sem(gaps))
        assert claim["p"] == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    assert one["verdict"] == "the opposite"             # the paper: 1.12 with it, 1.08 without
    assert two["verdict"] == "as in the paper"
    least = stats.sem(gaps) * stats.t(2).isf(0.0375 / 2)        # what the third has to exceed
    assert three["verdict"] == f"not shown (could have seen d ≥ {least:.2g})"
    assert same["p"] == 1 and same["verdict"] == "not shown (could have seen d ≥ 0)"


def test_claims_have_several_figures_and_two_seeds_tell_of_none():
    found = []
    for figure in ("fd", "kl", "accuracy", "measured"):
        given = {"table": "rivals", "figure": figure}
        found += rows("FlashAudio, distilled, 1, ω = 1", 1.0, 2.0, 3.0, **given)
        found += rows("consistency, 1, ω = 1", 2.0, 3.1, 3.9, **given)
    lines = tables.claims_of(found)[1:]
    assert [line[1] for line in lines] == ["fd", "accuracy", "measured", "kl"]
    assert lines[0][2:] == ["2", "3", "-1 ± 0.25", "1.49, 2.13", "as in the paper"]
    assert lines[1][2:] == ["2", "3", "-1 ± 0.25", "-", "lower"]
    assert tables.judge_claims([row for row in found if row["seed"] < 2]) == []


def test_every_claim_names_rows_that_are_in_the_plan():
    named = {(row.table, row.name) for row in ablate.plan()}
    labels = {label: sampled for label, sampled in runner.CHAIN.values()}
    labels |= {rival.label: rival.sampled for rival in runner.RIVALS.values()}
    for label, sampled in labels.items():
        named |= {("rivals", f"{label}, {steps}, ω = {omega:g}") for steps, omega in sampled}
    with open(ROOT / "experiments/claims.csv", encoding="utf-8") as f:
        for claim in csv.DictReader(f):
            assert {(claim["table"], claim["one"]), (claim["table"], claim["other"])} <= named


def test_a_table_lies_down_where_it_is_wider_than_long():
    upright = rows("a", 0.5, 1.5) + rows("b", 2.0) + rows("c", 3.0, 3.0)
    assert markdown(tables.table_of(upright, "1-RF")).splitlines() == [
        "| 1-RF | fd ω = 1 |", "| ---- | -------- |",
        "| a    | 1 ± 0.5  |", "| b    | 2        |", "| c    | 3        |"]
    wide = rows("a", 1.0) + rows("a", 2.0, figure="kl")
    assert tables.table_of(wide, "1-RF") == [["1-RF", "a"], ["fd ω = 1", "1"], ["kl", "2"]]


def test_a_row_is_measured_anew_where_its_code_or_what_it_depends_on_changes(tmp_path, monkeypatch):
    """The code is a copy, which is edited."""
    shutil.copytree(ROOT / "evaluation", tmp_path / "evaluation")
    for name in ("flashaudio.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    count = iter(range(100))

    def kept(depends: str) -> int:
        return tables.kept_row(tmp_path / "rows", {"seed": 0}, lambda: {"count": next(count)},
                               depends)["count"]

    assert [kept("a"), kept("a"), kept("b"), kept("a")] == [0, 0, 1, 0]
    for n, name in enumerate(("flashaudio.py", "train.py", "evaluation/judges.py")):
        with open(tmp_path / name, "a") as f:
            f.write("# edited\n")
        assert kept("a") == kept("a") == n + 2


PUBLISHED = {}                                          # rows, by page
for page, file in (("ablations", "ablation"), ("rivals", "rivals")):
    PUBLISHED[page] = json.loads((ROOT / f"docs/{file}.json").read_text())["rows"]
SHOWN = (("CFM", 1, 1, "cfm", "1 step"), ("CFM", 24, 1, "cfm", "24 steps"),
         ("CFM", 24, 3, "cfm", "24 steps, ω = 3"), ("2-RF", 4, 1, "rf2", "4 steps"),
         ("2-RF", 1, 1, "rf2", "1 step"), ("FlashAudio", 1, 1, "distill", "1 step"))


@pytest.mark.parametrize("page, held", PUBLISHED.items())
def test_the_published_tables_are_those_of_their_rows(page, held):
    text = (ROOT / f"docs/{page}.md").read_text()
    assert markdown(tables.claims_of(held)) in text
    for table in dict.fromkeys(row["table"] for row in held):
        assert markdown(tables.table_of(held, table)) in text


def test_the_readme_shows_what_was_measured():
    """Its table, and every difference that it tells."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = tables.by_figure(PUBLISHED["ablations"])

    def cells(table: str, name: str, way: str) -> str:
        figures = [f"{figure} {way}".strip() for figure in ("fd", "accuracy", "measured")]
        return " | ".join(tables.cell(found[table, name, figure]) for figure in figures)

    for model, steps, omega, name, way in SHOWN:
        assert f"| {model} | {steps} | {omega} | {cells('Stages', name, way)} |" in text
    assert f"| real clips | - | - | {cells('Ruler', 'real clips', '')} |" in text
    assert f"| VAE alone | - | - | {cells('Ruler', 'the VAE alone', '')} |" in text
    told = re.findall(r"(-?[\d.]+ ± [\d.]+)(?= in)", text)
    shown = set()
    for held in PUBLISHED.values():
        shown |= {line[4] for line in tables.claims_of(held)}
    assert len(told) >= 4 and set(told) <= shown


@pytest.fixture
def quick(tmp_path, monkeypatch) -> train.Flags:
    """A recipe of seconds: the network is tiny, the vocoder is none."""
    text = replace(TINY.text, max_length=64)            # long enough for all captions
    monkeypatch.setitem(fa.SIZES, "toy", replace(TINY, frames=128, text=text))
    monkeypatch.setattr(judges, "REFERENCE", 12)
    monkeypatch.setattr(ablate, "CLIPS", 6)
    monkeypatch.setattr(vocoders, "load", lambda *given: quick_vocoder)
    data = toy.write_toy_set(tmp_path / "toy", 12, 8, 6)
    return train.Flags(data=str(data), out=str(tmp_path / "out"), **QUICK)


def test_ablations_share_stages_go_on_and_say_what_is_left_of_guidance(quick, monkeypatch):
    names = ("cfm", "full", "uniform t", "anchored", "0 iterations", "3 iterations")
    plan = [row for row in ablate.plan() if row.name in names or "noise" in row.table]
    monkeypatch.setattr(ablate, "plan", lambda: plan)
    out = Path(quick.out)
    with train.open_run(replace(quick, out=str(out / "seed0"))) as run:
        train.train_rf1(run, train.train_cfm(run, train.train_vae(run)))    # is taken from there
    found = ablate.ablate(quick, 2)
    for folder in (out / "seed0", out / "seed1"):
        models = [path.parent.name.split("-")[0] for path in folder.glob("*/model.safetensors")]
        assert [models.count(stage) for stage in ("vae", "cfm", "rf1", "rf2")] == [1, 1, 2, 3]
    assert json.loads((out / "ablation.json").read_text())["rows"] == found and len(found) == 22
    held = {(row["table"], row["name"]): row["figures"] for row in found if row["seed"] == 1}
    plain, anchored = (held["Couplings", f"{n} iterations"] for n in (0, 3))
    assert plain["guidance left"] == pytest.approx(2, abs=1e-3)     # ω = 3, less one
    assert anchored["guidance left"] != plain["guidance left"]

    path = next(p for p in (out / "rows").iterdir() if '"1-RF"' in p.read_text())
    changed = {**json.loads(path.read_text()), "figures": {"fd ω = 1": 3.0}}
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(train, "fit", None)             # nothing is left to train
    assert changed in ablate.ablate(replace(quick, save_every=1.0), 2, "1-RF")
    with pytest.raises(InputError, match="no row"):
        ablate.ablate(quick, 1, "3-RF")
    assert json.loads((out / "ablation.json").read_text())["rows"] == found     # it stays whole


def test_pictures_and_a_page_of_a_run_that_was_moved(quick, tmp_path):
    with train.open_run(quick) as run:
        train.main(run)
    shutil.move(quick.out, tmp_path / "moved")
    listen = tmp_path / "docs/listen"
    figures.main([str(tmp_path / "moved"), "--out", str(tmp_path / "docs")])
    plt.close("all")
    assert all((tmp_path / f"docs/{name}.png").exists() for name in ("loss_by_time", "one_step"))
    named = set(re.findall(r'src="([^"]+)"', (listen / "index.html").read_text()))
    assert len(named) == 2 * 3 * 5 and named < {path.name for path in listen.iterdir()}
    assert sum(path.stat().st_size for path in listen.iterdir()) < 1.5e6
    with pytest.raises(InputError, match="no finished run"):
        figures.main([str(tmp_path / "nowhere")])


def test_a_plan_counts_the_products_of_the_backbone(monkeypatch):
    """2 for each weight and input of a linear layer, 4 L² d and 4 L N d for attention."""
    monkeypatch.setitem(fa.SIZES, "toy", TINY)
    model = fa.FlashAudio(TINY)
    found = []

    for layer in model.dit.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, given, made: found.append(
                2 * given[0].numel() * layer.out_features))
    z = torch.randn(5, *model.latent_shape())
    model.dit(z, torch.rand(5), torch.randn(5, 8, 32))
    forward = sum(found) + 5 * 4 * 32 * (16 * 16 + 16 * 8)
    flags = train.Flags(batch_size=10, grad_accum=2, rf2_couplings=12, rf2_coupling_steps=4,
                        anchor_steps=2, distill_steps=7)
    rows = {row["stage"]: (row["flop"], row["steps"]) for row in bench.plan(flags)}
    assert list(rows) == ["vae", "cfm", "rf1", "rf2 pairs", "rf2", "distill pairs", "distill"]
    assert rows["rf2 pairs"] == (forward * (4 * (1 + 1 + 1 + 2 * 2) - 1), 3)
    assert rows["distill"] == (pytest.approx(2 * 3 * forward, rel=0.05), 7)     # z has no gradient


def test_the_bench_plans_at_the_speed_of_a_step(monkeypatch, capsys):
    monkeypatch.setitem(fa.SIZES, "toy", TINY)
    calls = []
    monkeypatch.setattr(bench, "milliseconds", lambda f: calls.append(f()) or 1e5)
    bench.main([])
    plan = {row["stage"]: row for row in bench.plan(train.Flags())}
    speed = plan["cfm"]["flop"] / 100                   # in 100 seconds
    hours = sum(row["flop"] * row["steps"] for row in plan.values()) / speed / 3600
    assert f"at {speed / 1e12:.3g} TFLOP/s: {hours:.2f} hours" in capsys.readouterr().out
    assert len(calls) == 3 * 5 + 1 and calls[4].shape == (1, TINY.frames * fa.HOP)
