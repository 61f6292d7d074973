"""The rivals: their formulas by value, what they may cost, and the table of a tiny comparison."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flashaudio as fa
import train
from experiments import bench
from experiments.rivals import __main__ as runner
from experiments.rivals import consistency, diffusion, meanflow, shared
from tests import test_experiments
from tests.helpers import TINY, randn, rng, tiny_model

quick = test_experiments.quick                          # a fixture, of which both files make use


def best_v(mean: float, std: float) -> fa.Velocity:
    """E[√ᾱ ε - √(1-ᾱ) x | z] for data x ~ N(mean, std²)."""
    def v(z: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        signal, noise = (fa.column(x, z) for x in diffusion.signal_and_noise(t))
        scale = signal * noise * (1 - std ** 2) / (signal ** 2 * std ** 2 + noise ** 2)
        return scale * (z - signal * mean) - noise * mean

    return v


def test_ddim_is_exact_for_a_point_and_approaches_the_gaussian_map():
    """For N(m, σ²) the deterministic path takes z0 to m + σ z0, with an error of order 1 / T."""
    signal, _ = diffusion.signal_and_noise(torch.tensor([0.0, 0.5, 1.0]).double())
    middle = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert signal.tolist() == pytest.approx([0, middle, 1], abs=1e-12)
    z0 = randn(64, 3)
    path = diffusion.ddim_sample(best_v(2.0, 0.0), z0, None, None, 3, return_trajectory=True)
    torch.testing.assert_close(path[-1], torch.full_like(z0, 2.0), rtol=1e-6, atol=0)
    assert path.shape == (4, 64, 3) and torch.equal(path[0], z0)
    gaps = []
    for steps in (50, 100, 200):
        made = diffusion.ddim_sample(best_v(2.0, 0.5), z0, None, None, steps)
        gaps.append((made - 2 - 0.5 * z0).abs().max().item())
    assert gaps[2] < 0.03 and gaps[0] / gaps[1] > 1.8 and gaps[1] / gaps[2] > 1.8


def test_the_best_v_has_the_least_loss():
    z0, x = randn(2, 20_000, 1)
    z1, t = 2 + 0.5 * x, torch.rand(20_000, generator=rng(), dtype=torch.float64)
    losses = [diffusion.diffusion_loss(best_v(2.0, s), z0, z1, t, None) for s in (0.3, 0.5, 0.8)]
    assert losses[1] < min(losses[0], losses[2])
    point = diffusion.diffusion_loss(best_v(2.0, 0.0), z0, torch.full_like(z0, 2.0), t, None)
    assert point.item() < 1e-12                         # nothing is left to chance


def test_the_consistency_target_of_a_straight_flow_is_its_end():
    """v = a of the caption; guided, ∅ + ω (c - ∅). The average need not be right where t = 1."""
    def straight(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return c.mean(1).expand_as(z)

    z, context = randn(5, 3), 2 * torch.ones(5, 1, 1, dtype=torch.float64)
    t = torch.tensor([0, 0.1, 0.5, 0.9, 0.98], dtype=torch.float64)
    given = (z, t, context, 0.25 * context, 3.0)                        # ∅ = 0.5, so v_cfg = 5
    target = consistency.consistency_target(straight, lambda z, t, c: 5 + 0 * z, *given)
    torch.testing.assert_close(target, z + 5 * (1 - t[:, None]))
    last = consistency.consistency_target(straight, lambda z, t, c: 100 * z, *given)[-1]
    torch.testing.assert_close(last, z[-1] + 5 / 50)    # its end: nothing of the average's


def test_several_consistency_steps_go_back_to_their_time_with_new_noise():
    """A network that knows the end, 3: each jump lands there, the last from t = 1/2."""
    seen = []

    def knows(z: Tensor, t: Tensor, _: Tensor) -> Tensor:
        seen.append((z, t))
        return (3 - z) / (1 - t[:, None])

    z0 = randn(4000, 2)
    path = consistency.consistency_sample(knows, z0, None, None, 2, return_trajectory=True)
    torch.testing.assert_close(path[1:], torch.full((2, 4000, 2), 3.0, dtype=torch.float64))
    z, t = seen[1]
    assert (t == 0.5).all()
    noise = (z - 3 * 0.5) / 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.03)     # 8,000 draws: .008
    assert abs((noise * z0).mean().item()) < 0.03       # not that which came before
    consistency.consistency_sample(knows, z0[7:8], None, None, 2)
    torch.testing.assert_close(seen[3][0], z[7:8])      # the same in any company


def test_meanflow_times_are_sorted_and_equal_for_half():
    t, s = meanflow.sorted_times(20_000, rng()).unbind(1)
    assert (t[:10_000] == s[:10_000]).all() and (t < s)[10_000:].all()
    logit = torch.logit(torch.cat([t[10_000:], s[10_000:]]))
    assert logit.mean().item() == pytest.approx(0.4, abs=0.03)          # the paper's -.4, reversed


@torch.no_grad()
def test_the_meanflow_target_is_a_finite_difference_along_the_path():
    model = meanflow.MeanFlow(TINY).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in model.dit.parameters():                # all of them count
            nn.init.normal_(p, std=0.2)
    u, z, context = model.dit, randn(4, 20, 16), randn(4, 8, 32)
    v, h = 0.3 * z.flip(0), 1e-5
    times = meanflow.sorted_times(4, rng()).double() * 0.9
    times[:, 1] += 0.05
    later = u(z + h * v, times + torch.tensor([h, 0.0]), context)
    before = u(z - h * v, times - torch.tensor([h, 0.0]), context)
    way = fa.column(times[:, 1] - times[:, 0], z)
    expected = v + way * (later - before) / (2 * h)
    found = meanflow.meanflow_target(u, z, v, times, context)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - v).abs().max() > 1e-2
    middle = z + u(z, torch.tensor([0, 0.5]).to(z).expand(4, 2), context) / 2
    end = middle + u(middle, torch.tensor([0.5, 1]).to(z).expand(4, 2), context) / 2
    torch.testing.assert_close(meanflow.meanflow_sample(u, z, context, None, 2), end)


def test_guidance_inside_the_target_ends_at_the_guided_velocity():
    """Where u is v_∅ + ω (v_c - v_∅), the target on average is that again."""
    v_null, v_cond = randn(2, 4, 3)
    u_cond = fa.cfg(v_null, v_cond, 3.0)
    target = meanflow.guided(lambda z, t, c: c, v_null, None, v_cond, u_cond, v_null, 3.0)
    torch.testing.assert_close(target, u_cond)


@torch.no_grad()
def test_a_cfm_loads_into_meanflow_and_only_its_fast_times_are_smoothed():
    cfm = tiny_model()
    model = meanflow.MeanFlow.begin(cfm, seed=0)
    ours, theirs = (m.dit.blocks[0].attention.wq.weight for m in (model, cfm))
    assert torch.equal(ours, theirs)
    embedder, t = model.dit.t_embedder, 1000 * torch.rand(6, generator=rng())
    whole = torch.stack([t, torch.rand(6, generator=rng()) * 1000], 1)
    assert torch.equal(embedder(t), embedder(whole))    # the new part starts at 0
    offsets = torch.linspace(-5, 5, 401)
    features = []
    cfm.dit.t_embedder.mlp.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    for offset in offsets:                              # the CFM's features, averaged over t
        cfm.dit.t_embedder(t + 1000 * meanflow.SMOOTH * offset)
    weights = torch.exp(-0.5 * offsets ** 2)[:, None, None]
    averaged = (weights * torch.stack(features)).sum(0) / weights.sum()
    torch.testing.assert_close(embedder(t), embedder.mlp(averaged), rtol=0, atol=1e-4)


def test_compute_is_what_is_counted():
    """Of an anchored pair, the forwards and backwards that are made."""
    count = {"forwards": 0, "backwards": 0}

    def velocity(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        count["forwards"] += len(z)
        v = z + 10 * c.mean(1, keepdim=True)[..., 0]
        if v.requires_grad:
            v.register_hook(lambda _: count.update(backwards=count["backwards"] + len(z)))
        return v

    context = torch.ones(11, 1, 1)
    fa.make_couplings(velocity, torch.zeros(11, 3), context, 0.5 * context, 4, 3.0, 2)
    anchored = sum(count.values())
    assert count["backwards"] == 11 * 4 * 2
    flags = train.Flags(batch_size=10, cfm_steps=7, rf1_steps=5, rf2_steps=3, distill_steps=2,
                        rf2_couplings=11, rf2_coupling_steps=4, rf2_guidance=3.0, anchor_steps=2,
                        distill_couplings=13, distill_coupling_steps=6, distill_guidance=1.0)
    assert shared.chain_cost(flags, "vae") == 0
    assert shared.chain_cost(flags, "cfm") == 7 * 30
    assert shared.chain_cost(flags, "rf1") == 12 * 30
    assert shared.chain_cost(flags, "rf2") == 15 * 30 + anchored
    assert shared.chain_cost(flags) == 17 * 30 + anchored + 13 * 6
    assert bench.coupling_cost(replace(flags, anchor_steps=0), "rf2") == 4 * 2
    assert shared.affordable(flags, 660, 6) == 11 and shared.affordable(flags, 659, 6) == 10


def test_a_comparison_trains_within_its_budget_and_goes_on(quick, monkeypatch):
    for name, rival in runner.RIVALS.items():
        monkeypatch.setattr(rival, "sampled", rival.sampled[:2 if name == "MeanFlow" else 1])
    quick = replace(quick, distill_couplings=4)
    taken, fit = {}, train.fit

    def noted(run, stage, model, parts, draw, loss, steps, lr, *check):
        taken[stage.partition("-")[0]] = (steps, lr, parts)
        return fit(run, stage, model, parts, draw, loss, steps, lr, *check)

    monkeypatch.setattr(train, "fit", noted)
    rows = runner.compare(quick, 1)
    after = 3 * 2 * 12 + 8 * 2 * 2 + 4 * 2
    assert shared.chain_cost(quick) - 2 * 12 == after
    assert taken["diffusion"] == ((after + 24) // 12, 1.5e-3, ("text", "dit"))
    assert taken["longer"] == ((after + 24) // 12, 1.5e-3, ("text", "dit"))
    assert taken["consistency"] == (after // 24, 5e-4, ("dit",))
    assert taken["meanflow"] == (after // 24, 1.5e-3, ("dit",))
    # That of direct: half as many couplings
    assert taken["distill"] == ((after - 2 * 2 * 2) // 12, 1.5e-3, ("dit",))
    out = Path(quick.out)
    assert json.loads((out / "rivals.json").read_text())["rows"] == rows and len(rows) == 13
    fds = [row["figures"]["fd"] for row in rows]
    assert fds == sorted(fds) and len(set(fds)) > 4

    name = next((out / "rows").iterdir())
    changed = json.loads(name.read_text()) | {"figures": {"fd": -1.0}}
    name.write_text(json.dumps(changed))
    monkeypatch.setattr(train, "fit", None)             # nothing is left to train
    again = runner.compare(quick, 1)
    assert [row for row in again if row not in rows] == [changed]       # others are as they were
