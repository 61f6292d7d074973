"""Ablations, pictures and benches, on stages of two steps and a judge that has learnt nothing."""

import csv
import json
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from scipy import stats

import flashaudio as fa
import train
from data import toy
from experiments import ablate, bench, figures, pairings, tables
from experiments.rivals import __main__ as runner
from flashaudio import InputError
from runs.plan import Row
from tests.helpers import ROOT, TINY, rng


def test_knn_takes_the_nearest_of_its_own_noises_and_the_same_ones_again():
    z0, z1 = torch.randn(2, 16, 3, 5, generator=rng())
    paired = pairings.knn_pairing(z0, z1)
    assert torch.equal(paired, pairings.knn_pairing(z0, z1))
    assert torch.equal(z0, pairings.knn_pairing(z0, z1, k=1))
    before, after = (z0 - z1).flatten(1).norm(dim=1), (paired - z1).flatten(1).norm(dim=1)
    kept = (paired == z0).flatten(1).all(1)
    assert torch.equal(kept, after == before) and (after <= before).all()
    assert 0 < kept.sum() < 16                          # about a quarter of them


def test_cfg_zero_scales_the_null_velocity_onto_the_other():
    """v_∅ = (2, 0), v_c = (1, 1): s = 1/2, so v = (1, 0) + 3 (0, 1)."""
    def velocity(z, t, c):
        null = torch.tensor([2.0, 0.0]).expand_as(z)
        return torch.where(c[:, 0] > 0, torch.ones_like(z), null.to(z))

    z0, context = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 1, 1)
    given = (velocity, z0, context, 0 * context, 4, 3.0, 1, 1e-2, 1e-5)     # by train.couplings
    z1 = pairings.cfg_zero_sample(*given)
    torch.testing.assert_close(z1, torch.tensor([1.0, 3.0]).to(z1).expand(3, 2))
    path = pairings.cfg_zero_sample(*given, return_trajectory=True)
    assert path.shape == (5, 3, 2) and torch.equal(path[-1], z1)


def test_a_variant_of_a_density_has_other_values_and_another_name():
    density = pairings.variant(fa.logit_normal, mean=-0.5)
    assert torch.equal(density(9, generator=rng()), fa.logit_normal(9, -0.5, generator=rng()))
    others = (fa.logit_normal, pairings.variant(fa.logit_normal, mean=0.5),
              pairings.variant(fa.mix_exp, a=1.0))
    assert len({f.__qualname__ for f in (density, *others)}) == 4


def rows(name: str, *values: float) -> list[dict]:
    """Rows of Table 2, with an fd for each seed."""
    return [{"table": "Table 2", "name": name, "seed": seed, "figures": {"fd 24 steps": fd}}
            for seed, fd in enumerate(values)]


def test_a_difference_is_seen_only_where_its_interval_excludes_zero(capsys):
    found = rows("1-RF full", 1.0, 2.0, 3.0) + rows("1-RF uniform t", 2.0, 3.1, 3.9)
    found += rows("1-RF not from CFM", 1.5, 1.9, 3.2) + rows("1-RF no pairing", 1.5, 2.4, 3.6)
    claims = tables.judge_claims(found)
    assert {claim["claim"]: claim["verdict"] for claim in claims} == {
        "1-RF: logit-normal t": "the opposite",         # the paper: 1.12 with it, 1.08 without
        "1-RF: from CFM": "not seen", "1-RF: immiscible pairing": "as in the paper"}
    assert claims[0]["difference"] == pytest.approx(-1.0)
    assert claims[0]["ours"] == pytest.approx([2, 3])
    assert claims[0]["interval"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / 3 ** 0.5)
    few, = tables.judge_claims(rows("1-RF full", 1.0, 2.0) + rows("1-RF uniform t", 5.0, 6.0))
    assert few["verdict"] == "cannot be judged" and few["interval"] is None
    verdicts = [tables.verdict_of(gap, 0.1, "") for gap in (-0.2, 0.05, 0.2)]
    assert verdicts == ["lower", "not seen", "higher"]  # of what the paper doesn't say
    summary = tables.summary(found)
    assert summary["Table 2"]["1-RF full"]["fd 24 steps"] == pytest.approx([2, 1 / 3 ** 0.5, 3])
    tables.print_tables(summary, claims)
    assert "2 ± 0.58" in capsys.readouterr().out


def test_every_claim_names_rows_that_are_in_the_plan():
    with open(ROOT / "experiments/claims.csv", encoding="utf-8") as f:
        claims = list(csv.DictReader(f))
    figures = {claim[column] for claim in claims for column in ("figure", "figure of the other")}
    assert figures == {"straightness", "fd couplings", "fd 1 steps", "fd 4 steps", "fd 24 steps",
                       "fd 24 steps, ω = 3", "fd ω = 1", "fd ω = 2", "fd ω = 3", "fd ω = 5",
                       "fd", "accuracy"}
    named = {(row.table, row.name) for row in ablate.plan()}
    assert len(named) == len(ablate.plan())
    sampled = runner.CHAIN | {name: rival.SAMPLED for name, rival in runner.RIVALS.items()}
    for name, ways in sampled.items():
        named |= {("rivals", runner.row_name(name, *way)) for way in ways}
    found = [{"table": table, "name": name, "seed": 0, "figures": dict.fromkeys(figures, 1.0)}
             for table, name in named]
    assert len(tables.judge_claims(found)) == len(claims)


@pytest.fixture
def quick(tmp_path, monkeypatch) -> train.Flags:
    monkeypatch.setattr(toy, "train_judge", lambda *a, **k: toy.Judge().eval())
    monkeypatch.setattr(toy, "check_judge", lambda *a: 1.0)
    for name in ("hear", "draw_losses", "evaluate"):
        monkeypatch.setattr(train, name, lambda *a: None)
    data = toy.write_toy_set(tmp_path / "toy", 12, 8)
    return train.Flags(
        data=str(data), out=str(tmp_path / "out"), device="cpu", batch_size=4, vae_steps=2,
        cfm_steps=2, rf1_steps=2, rf2_steps=2, distill_steps=2, rf2_couplings=8,
        distill_couplings=8, rf2_coupling_steps=2, eval_clips=6)


def test_ablations_share_stages_go_on_and_count_what_is_on_disk(quick, monkeypatch):
    names = ("cfm", "1-RF full", "1-RF uniform t", "1-RF not from CFM", "none", "over 16",
             "over 64", "2-RF full", "2-RF anchored", "3 iterations", "unguided")
    plan = [row for row in ablate.plan() if row.name in names]
    monkeypatch.setattr(ablate, "plan", lambda: plan)
    out = Path(quick.out)
    with train.open_run(replace(quick, out=str(out / "seed0"))) as run:
        train.main(run)                                 # of which the ablations take what they can
    ablate.ablate(quick, 2)
    for folder in (out / "seed0", out / "seed1"):
        models = [path.parent.name.split("-")[0] for path in folder.glob("*/model.safetensors")]
        assert [models.count(stage) for stage in ("vae", "cfm", "rf1", "rf2")] == [1, 1, 5, 1]
    written = json.loads((out / "ablation.json").read_text())
    found = written["tables"]
    assert len(written["rows"]) == 22 and found == tables.summary(written["rows"])
    assert {name: list(table) for name, table in found.items()} == {
        "Fig. 2, 3": ["cfm"],
        "Table 2": ["1-RF full", "1-RF uniform t", "1-RF not from CFM", "2-RF full"],
        "Pairing": ["none", "over 16", "over 64"], "Fig. 4": ["2-RF anchored"],
        "Couplings": ["3 iterations", "unguided"]}
    assert {"fd 24 steps", "fd 24 steps, ω = 3", "straightness"} < set(found["Fig. 2, 3"]["cfm"])
    anchored, unguided = found["Couplings"]["3 iterations"], found["Couplings"]["unguided"]
    assert set(anchored) == {"fd couplings", "accuracy couplings", "residual", "effective guidance"}
    assert unguided["residual"][0] == 0 < anchored["residual"][0]
    assert unguided["effective guidance"][0] == pytest.approx(0, abs=1e-3)
    two_rf, wide = found["Fig. 4"]["2-RF anchored"], found["Pairing"]["over 64"]
    assert two_rf == found["Table 2"]["2-RF full"]      # one model
    assert {"fd ω = 1", "accuracy ω = 5"} < set(wide)
    assert found["Pairing"]["none"]["distance saved"][0] == 0
    assert 0 < found["Pairing"]["over 16"]["distance saved"][0] < wide["distance saved"][0]

    path = next(p for p in (out / "rows").iterdir() if '"1-RF full"' in p.read_text())
    changed = {**json.loads(path.read_text()), "figures": {"fd 24 steps": 3.0}}
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(train, "fit", None)             # nothing is left to train
    ablate.ablate(replace(quick, save_every=1.0), 2, "1-RF full")
    with pytest.raises(InputError, match="no row"):
        ablate.ablate(quick, 1, "3-RF")
    kept = json.loads((out / "ablation.json").read_text())["rows"]
    assert kept == written["rows"]                      # a few rows are printed alone
    ablate.ablate(quick, 2)
    assert changed in json.loads((out / "ablation.json").read_text())["rows"]


def test_noise_is_paired_over_several_steps_at_once(quick, monkeypatch):
    """The steps of a group see its clips once each, with the noise of one assignment."""
    paired, batches = [], []

    def pair(z0, z1):
        paired.append((fa.immiscible_pairing(z0, z1), z1))
        return paired[-1][0]

    def fit(run, stage, model, parts, draw, *rest):
        batches.extend(draw(step) for step in (0, 1, 2))
        return model

    monkeypatch.setattr(train, "fit", fit)
    with train.open_run(quick) as run:
        model = fa.FlashAudio(fa.PRESETS["toy"])
        pairings.train_rf1_over(run, model, 8, pair)
    assert [len(z0) for z0, _ in paired] == [8, 8]      # twelve clips: two groups of two steps
    z0, z1 = (torch.cat([batch[i] for batch in batches[:2]]) for i in (0, 1))
    assert torch.equal(z0, paired[0][0]) and torch.equal(z1, paired[0][1])
    assert torch.equal(batches[2][0], paired[1][0][:4])


def test_squared_distances_are_paired_by_their_least_sum():
    z0, z1 = torch.randn(2, 5, 3, 2, generator=rng())
    cost = torch.cdist(z1.flatten(1), z0.flatten(1)) ** 2
    least = min(sum(cost[i, j].item() for i, j in enumerate(order))
                for order in permutations(range(5)))
    paired = pairings.squared_pairing(z0, z1)
    assert (paired - z1).pow(2).sum().item() == pytest.approx(least)


def test_the_published_tables_are_those_of_their_rows():
    held = json.loads((ROOT / "docs/ablation.json").read_text())
    page = (ROOT / "docs/ablations.md").read_text()
    assert tables.summary(held["rows"]) == held["tables"]
    assert tables.judge_claims(held["rows"]) == held["claims"]
    assert tables.markdown(tables.claims_of(held["claims"])) in page
    shown = [name for name in held["tables"] if f"| {name} " in page]
    assert {"Fig. 2, 3", "Pairing", "Couplings"} <= set(shown)
    for name in shown:
        assert tables.markdown(tables.table_of(name, held["tables"][name])) in page


def test_a_table_lies_down_where_it_is_wider_than_long():
    upright = {"a": {"fd": [1.0, 0.5, 2]}, "b": {"fd": [2.0, None, 1]}}
    assert tables.markdown(tables.table_of("Table 2", upright)).splitlines() == [
        "| Table 2 | fd      |", "| ------- | ------- |",
        "| a       | 1 ± 0.5 |", "| b       | 2       |"]
    lying = tables.table_of("Fig. 2", {"a": {"fd": [1.0, None, 1], "kl": [2.0, None, 1]}})
    assert lying == [["Fig. 2", "a"], ["fd", "1"], ["kl", "2"]]


def test_pictures_of_a_run_and_of_one_that_was_moved(quick, tmp_path):
    with train.open_run(quick) as run:
        train.main(run)
    shutil.move(quick.out, tmp_path / "moved")
    figures.main([str(tmp_path / "moved"), "--out", str(tmp_path / "docs")])
    names = [path.name for path in sorted((tmp_path / "docs").iterdir())]
    assert names == ["one_step.png", "trajectories.png"]
    with pytest.raises(InputError, match="no finished run"):
        figures.main([str(tmp_path / "nowhere")])


def test_the_bench_runs_a_recipe_and_says_how_long_all_of_it_takes(monkeypatch, capsys):
    monkeypatch.setitem(fa.PRESETS, "toy", TINY)
    monkeypatch.setattr(bench, "milliseconds", lambda f: [f(), 2.0][1])
    given = train.PRESETS["toy"] | {"batch_size": 4, "rf2_coupling_steps": 2, "cfm_steps": 3600}
    monkeypatch.setitem(train.PRESETS, "toy", given)
    bench.main(["--presets", "toy", "--batch", "1,2", "--steps", "30"])
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    hours = sum(row["hours"] for row in found["training"])
    assert f"toy: {hours:.3g} hours for the whole recipe" in printed
    assert [row["output"] for row in found["differences"]] == [
        "mel", "encoder", "decoder", "text", "velocity"]
    for row in found["differences"]:                    # here the device is the CPU
        assert row["float32"] == 0 and 0 <= row["bf16"] < 0.1
        assert (row["bf16"] > 1e-4) == (row["output"] != "mel")
    one, two = found["sampling"]
    assert (one["batch"], two["batch"], one["whole"]) == (1, 2, 2.0)
    assert two["RTF"] == pytest.approx(0.002 / (2 * 32 * fa.HOP / fa.SAMPLE_RATE))
    assert two["to mel"] == pytest.approx(3 * two["RTF"])
    rows = found["training"]
    assert [row["stage"] for row in rows] == [
        "vae", "cfm", "rf1", "pairs", "rf2", "pairs", "distill"]
    assert rows[1]["hours"] == pytest.approx(rows[1]["ms"] / 1000)
    assert rows[1]["clips/s"] == pytest.approx(4000 / rows[1]["ms"])
    assert rows[2]["data %"] == pytest.approx(200 / rows[2]["ms"]) and rows[2]["pairing %"] == 0
    assert rows[1]["to"] < rows[1]["loss"]              # of the CFM, between steps 10 and 30


def test_the_bench_trains_the_first_preset_and_the_1rf_of_the_others(monkeypatch, capsys):
    for preset in ("base", "small"):
        monkeypatch.setitem(fa.PRESETS, preset, TINY)
        monkeypatch.setitem(train.PRESETS, preset, {"batch_size": 4, "rf2_coupling_steps": 2})
    monkeypatch.setattr(bench, "sampling", lambda *given: {})
    monkeypatch.setattr(bench, "differences", lambda *given: [])
    monkeypatch.setattr(bench, "plan", lambda flags: [
        Row(name, 0, 1e12, 7200, 0) for name in ("vae", "cfm", "rf1", "rf2 pairs", "rf2",
                                                 "distill pairs", "distill")])
    bench.main(["--presets", "small,base", "--steps", "12"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["training"]
    assert [row["preset"] for row in rows] == ["small"] * 7 + ["base"]
    assert rows[-1]["stage"] == "rf1"
    for row in rows:
        assert row["hours"] == pytest.approx(2 * row["ms"] / 1000)
        assert row["TFLOP/s"] == pytest.approx(1000 / row["ms"])
    for wrong in (["--presets", "huge"], ["--steps", "11"]):
        with pytest.raises(SystemExit):
            bench.main(wrong)
