"""Tests by value: closed forms, brute force, the public fixtures, and the two scripts run as a person runs them.

    python -m pytest -q
"""

import csv
import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.io import wavfile
from torch import nn

import flashaudio as fa
from data import public
from flashaudio import DiT, DiTConfig, FlashAudio, FlashAudioConfig, InputError, MelVAE, TextConfig, VAEConfig

ROOT = Path(__file__).resolve().parent
PARITY = ROOT.parent / "shared" / "parity"
public_fixtures = pytest.mark.skipif(not PARITY.is_dir(), reason="the public fixtures are not here")
TINY = FlashAudioConfig(VAEConfig(channels=32, channel_mult=(1, 1), res_blocks=1), DiTConfig(context_dim=32, hidden_size=32,
                        num_heads=2, depth=1, max_len=64), TextConfig(max_length=32, layers=1, heads=2), frames=32)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_model(seed: int = 0) -> FlashAudio:
    """A small FlashAudio whose output is not zero, as that of an untrained one would be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlashAudio(TINY).eval()
        for p in model.dit.parameters():
            nn.init.normal_(p, std=0.2)
    return model


class MLP(nn.Module):
    """A velocity field over points (B, D) that ignores the context."""

    def __init__(self, dim: int, width: int = 64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, z, t, context):
        return self.layers(torch.cat([z, t[:, None]], 1))


def fit(model: nn.Module, loss_of, steps: int, lr: float = 1e-2) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(rng(step)).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


# ---- timesteps --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.0), (0.5, 0.7)])
def test_logit_normal_follows_its_cdf(mean, std):
    t = fa.logit_normal(20_000, mean, std, rng()).double().numpy()
    assert stats.kstest(t, lambda x: stats.norm.cdf((np.log(x / (1 - x)) - mean) / std)).pvalue > 0.01


@pytest.mark.parametrize("a", [1.0, 2.0, 4.0])
def test_mix_exp_follows_its_cdf_and_is_symmetric(a):
    t = fa.mix_exp(20_000, a, rng()).double().numpy()
    cdf = lambda x: 0.5 + (np.exp(a * x) - np.exp(a * (1 - x))) / (2 * (np.exp(a) - 1))     # integral of Eq. 8
    assert cdf(0.0) == pytest.approx(0) and cdf(1.0) == pytest.approx(1)
    assert stats.kstest(t, cdf).pvalue > 0.01
    assert stats.ks_2samp(t, 1 - fa.mix_exp(20_000, a, rng(1)).double().numpy()).pvalue > 0.01
    assert 0 <= t.min() and t.max() <= 1


def test_uniform_follows_its_cdf():
    assert stats.kstest(fa.uniform(20_000, rng()).double().numpy(), "uniform").pvalue > 0.01


# ---- immiscible pairing -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_pairing_equals_brute_force(size):
    z1, z0 = torch.randn(size, 3, 4, generator=rng(size)), torch.randn(size, 3, 4, generator=rng(size + 10))
    before = z1.clone()
    paired = fa.immiscible_pairing(z1, z0)
    total = lambda noise: (z1 - noise).flatten(1).norm(dim=1).sum().item()
    assert total(paired) == pytest.approx(min(total(z0[list(p)]) for p in itertools.permutations(range(size))), abs=1e-5)
    assert torch.equal(paired.flatten(1).sort(0).values, z0.flatten(1).sort(0).values)      # the same noises
    assert torch.equal(z1, before)                                                          # data stay with their captions


def test_c2ot_pairing_equals_brute_force_and_keeps_noise_with_its_caption():
    z1, z0, c = (torch.randn(5, 3, 4, generator=rng(i)) for i in range(3))
    pooled = c.mean(1)
    for weight in (0.0, 0.7, 1e3):
        paired = fa.immiscible_pairing(z1, z0, c, weight)
        cost = torch.cdist(z1.flatten(1), z0.flatten(1)) + weight * torch.cdist(pooled, pooled)
        best = min(itertools.permutations(range(5)), key=lambda p: cost[range(5), p].sum().item())
        assert torch.equal(paired, z0[list(best)])
    assert torch.equal(paired, z0)                                              # a large weight: nothing moves


def test_knn_pairing_takes_the_nearest_draw_of_each_clip():
    z1, draws = torch.randn(6, 3, 4, generator=rng()), torch.randn(4, 6, 3, 4, generator=rng(1))
    expected = torch.stack([min(draws[:, i], key=lambda z: (z - z1[i]).norm().item()) for i in range(6)])
    assert torch.equal(fa.knn_pairing(z1, draws), expected)


# ---- losses -----------------------------------------------------------------------------------------------------------------

def test_losses_are_zero_at_the_true_velocity_and_right_elsewhere():
    z1, z0, t = torch.randn(5, 2, 3, generator=rng()), torch.randn(5, 2, 3, generator=rng(1)), torch.rand(5, generator=rng(2))
    assert fa.rectified_flow_loss(lambda z, s, c: z1 - z0, z1, z0, t, None).item() == 0
    assert fa.distill_loss(lambda z, s, c: z1 - z0, z1, z0, None).item() == 0
    assert fa.rectified_flow_loss(lambda z, s, c: 0 * z, z1, z0, t, None).item() == pytest.approx((z1 - z0).pow(2).mean().item())
    seen = []
    fa.rectified_flow_loss(lambda z, s, c: seen.append((z, s)) or z, z1, z0, t, None, sigma_min=0.1)
    torch.testing.assert_close(seen[0][0], (1 - 0.9 * t.view(5, 1, 1)) * z0 + t.view(5, 1, 1) * z1)
    fa.distill_loss(lambda z, s, c: seen.append((z, s)) or z, z1, z0, None)
    assert torch.equal(seen[1][0], z0) and torch.equal(seen[1][1], torch.zeros(5))


def test_a_gaussian_flow_learns_the_analytic_velocity():
    mean, std = 2.0, 0.5
    model = MLP(1)

    def loss_of(g):
        z0, z1 = torch.randn(1024, 1, generator=g), mean + std * torch.randn(1024, 1, generator=g)
        return fa.rectified_flow_loss(model, z1, z0, fa.uniform(1024, g), None)

    fit(model, loss_of, 2000)
    t = torch.linspace(0.02, 0.98, 25).repeat_interleave(9)
    variance = (1 - t) ** 2 + t ** 2 * std ** 2
    z = t * mean + variance.sqrt() * torch.linspace(-1.5, 1.5, 9).repeat(25)
    exact = mean + (t * std ** 2 - (1 - t)) / variance * (z - t * mean)                     # E[z1 - z0 | z_t = z]
    assert (model(z[:, None], t, None)[:, 0] - exact).abs().mean() < 0.03
    samples = fa.euler_sample(model, torch.randn(4000, 1, generator=rng(7)), torch.empty(4000), steps=50)
    assert samples.mean().item() == pytest.approx(mean, abs=0.05) and samples.std().item() == pytest.approx(std, abs=0.05)


def test_reflow_straightens_and_makes_one_step_good():
    """Four corners in 2-D: the classic picture of rectified flow."""
    def data(n, g):
        corner = torch.randint(4, (n,), generator=g)
        centre = torch.stack([(corner % 2) * 6.0 - 3, (corner // 2) * 6.0 - 3], 1)
        return centre + 0.3 * torch.randn(n, 2, generator=g)

    def first(g):
        return fa.rectified_flow_loss(flow, data(512, g), torch.randn(512, 2, generator=g), fa.uniform(512, g), None)

    flow = MLP(2)
    fit(flow, first, 1500)
    noise = torch.randn(8192, 2, generator=rng(1))
    ends = fa.make_couplings(flow, noise, torch.empty(8192), None, steps=100)

    def second(g):
        rows = torch.randint(8192, (512,), generator=g)
        return fa.rectified_flow_loss(reflow, ends[rows], noise[rows], fa.mix_exp(512, 4.0, g), None)

    reflow = MLP(2)
    reflow.load_state_dict(flow.state_dict())
    fit(reflow.requires_grad_(True), second, 3000)
    fresh = torch.randn(2000, 2, generator=rng(2))

    def paths(model, steps):
        return fa.euler_sample(model, fresh, torch.empty(2000), steps=steps, return_trajectory=True)

    def one_step_error(model):
        return (paths(model, 1)[-1] - paths(model, 100)[-1]).pow(2).sum(1).mean().item()

    assert fa.straightness(paths(reflow, 100)) < 0.1 * fa.straightness(paths(flow, 100))
    assert one_step_error(reflow) < 0.1 * one_step_error(flow)


# ---- sampling ---------------------------------------------------------------------------------------------------------------

def test_guidance_one_is_the_conditional_velocity_and_others_extrapolate():
    model, z, t = tiny_model(), torch.randn(3, 20, 16, generator=rng()), torch.tensor([0.1, 0.5, 0.9])
    context, null = model.text(["a", "b", "c"]).detach(), model.text(["", "", ""]).detach()
    cond, uncond = model.dit(z, t, context), model.dit(z, t, null)
    assert torch.equal(fa.guided_velocity(model.dit, z, t, context, null, 1.0), cond)
    torch.testing.assert_close(fa.guided_velocity(model.dit, z, t, context, null, 3.0), uncond + 3 * (cond - uncond))
    assert (cond - uncond).abs().max() > 1e-3


def test_cfg_zero_scales_the_unconditional_velocity_to_fit():
    cond, null = torch.randn(2, 3, 4, generator=rng()), torch.randn(2, 3, 4, generator=rng(1))
    z, t, c = torch.zeros(2, 3, 4), torch.zeros(2), torch.zeros(2, 1)
    velocity = lambda null: lambda z, t, c: torch.cat([null, cond])             # guidance asks for both at once
    scale = torch.stack([(cond[i] * null[i]).sum() / (null[i] ** 2).sum() for i in range(2)]).view(2, 1, 1)
    torch.testing.assert_close(fa.guided_velocity(velocity(null), z, t, c, c, 3.0, cfg_zero=True), scale * null + 3 * (cond - scale * null))
    torch.testing.assert_close(fa.guided_velocity(velocity(-5 * cond), z, t, c, c, 3.0, cfg_zero=True), cond)   # only its length differs


def test_couplings_are_rectified_in_the_way_that_is_asked_for():
    model, z0 = tiny_model().requires_grad_(False), torch.randn(2, 20, 16, generator=rng())
    context, null = model.text(["rain", "a bell"]), model.text(["", ""])
    make = lambda guidance, **how: fa.make_couplings(model.dit, z0, context, null, 4, guidance, **how)
    plain = fa.euler_sample(model.dit, z0, context, null, 4, 5.0)
    assert torch.equal(make(5.0, rectify="plain", anchor_steps=3), plain)
    assert torch.equal(make(5.0, rectify="cfg_zero"), fa.euler_sample(model.dit, z0, context, null, 4, 5.0, cfg_zero=True))
    anchored = make(5.0, anchor_steps=3, lr=0.1, tolerance=0.0, return_trajectory=True)
    assert anchored.shape == (5, 2, 20, 16)
    assert torch.equal(anchored[-1], fa.anchored_sample(model.dit, z0, context, null, 4, 5.0, 3, 0.1, 0.0))
    assert (anchored[-1] - plain).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [1, 3, 24])
def test_euler_is_exact_for_a_constant_velocity(steps):
    z0, v = torch.randn(2, 3, 4, generator=rng()), torch.randn(2, 3, 4, generator=rng(1))
    torch.testing.assert_close(fa.euler_sample(lambda z, t, c: v, z0, torch.empty(2), steps=steps), z0 + v)


def test_euler_is_first_order():
    z0 = torch.ones(1, 1, dtype=torch.float64)
    error = [abs(fa.euler_sample(lambda z, t, c: t * z, z0, torch.empty(1), steps=n).item() - math.exp(0.5)) for n in (50, 100, 200)]
    assert error[0] / error[1] == pytest.approx(2, abs=0.1) and error[1] / error[2] == pytest.approx(2, abs=0.05)


def test_straightness_of_straight_and_curved_paths():
    a, b = torch.randn(4, 3, generator=rng()), torch.randn(4, 3, generator=rng(1))
    t = torch.linspace(0, 1, 201)[:, None, None]
    assert fa.straightness(a + t * b) == pytest.approx(0, abs=1e-4)
    curved = t * a + t * (1 - t) * b                                            # dZ/dt - (Z1 - Z0) = (1 - 2t) b
    assert fa.straightness(curved) == pytest.approx(b.pow(2).sum(1).mean().item() / 3, rel=1e-3)
    ratio = b.pow(2).sum(1).mean() / 3 / a.pow(2).sum(1).mean()
    assert fa.straightness(curved, relative=True) == pytest.approx(ratio.item(), rel=1e-3)


def test_anchored_loss_is_zero_at_the_anchor_and_moves_the_null_context_alone():
    model, z, t = tiny_model(), torch.randn(2, 20, 16, generator=rng()), torch.tensor([0.2, 0.2])
    context, null = model.text(["rain", "a bell"]).detach(), model.text(["", ""]).detach().requires_grad_(True)
    v = model.dit(z, t, context).detach()
    assert fa.anchored_cfg_loss(z + 0.1 * v, z, v, v, 5.0, 0.1).abs().max() < 1e-12
    model.requires_grad_(False)
    loss = fa.anchored_cfg_loss(z + 0.1 * v, z, v, model.dit(z, t, null), 5.0, 0.1)
    v_null = model.dit(z, t, null).detach()
    torch.testing.assert_close(loss, (0.1 * 4 * (v - v_null)).pow(2).flatten(1).mean(1))    # ((ω - 1)(v_c - v_∅) dt)²
    loss.sum().backward()
    assert null.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


def test_anchoring_approaches_the_unguided_path_and_stops_early():
    model = tiny_model().requires_grad_(False)
    z0, context, null = torch.randn(2, 20, 16, generator=rng()), model.text(["rain", "a bell"]), model.text(["", ""])
    calls = []

    def counted(z, t, c):
        calls.append(c)
        return model.dit(z, t, c)

    plain = fa.euler_sample(model.dit, z0, context, steps=4)
    guided = fa.euler_sample(model.dit, z0, context, null, 4, 5.0)
    never = fa.anchored_sample(counted, z0, context, null, 4, 5.0, anchor_steps=10, tolerance=1e9)
    assert len(calls) == 4 + 4 * 2                  # the anchor; then per step v_c and v_∅, and no iteration
    torch.testing.assert_close(never, guided)       # stopped before the first iteration: plain guidance
    distance = [(fa.anchored_sample(model.dit, z0, context, null, 4, 5.0, n, lr=0.05, tolerance=0.0) - plain).norm().item()
                for n in (3, 30)]
    assert distance[1] < distance[0] < (guided - plain).norm().item()
    alone = fa.anchored_sample(model.dit, z0[:1], context[:1], null[:1], 4, 5.0, 5, tolerance=1e-4)
    both = fa.anchored_sample(model.dit, z0, context, null, 4, 5.0, 5, tolerance=1e-4)
    torch.testing.assert_close(alone, both[:1], atol=1e-4, rtol=1e-4)           # each sample stops by itself
    torch.testing.assert_close(fa.make_couplings(model.dit, z0, context, null, 4, 5.0, 0), guided)
    torch.testing.assert_close(fa.make_couplings(model.dit, z0, context, null, 4, 1.0, 10), plain)


# ---- measuring --------------------------------------------------------------------------------------------------------------

def test_frechet_distance_of_gaussians():
    def sample(mean, root, n=400):
        x = torch.randn(n, 3, generator=rng(), dtype=torch.float64)
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T            # mean 0 and covariance 1, exactly
        return x @ root.T + mean

    m1, m2 = torch.tensor([0.0, 1, 2]).double(), torch.tensor([1.0, 1, 0]).double()
    s1, s2 = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 2, 0.5]).double()
    expected = (m1 - m2).pow(2).sum() + (s1 - s2).pow(2).sum()                  # diagonal covariances commute
    assert fa.frechet_distance(sample(m1, s1.diag()), sample(m2, s2.diag())) == pytest.approx(expected.item(), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng(1)).double())[0]     # general ones, against scipy
    from scipy.linalg import sqrtm
    a, b = turn @ s1.diag(), s2.diag()
    c1, c2 = (a @ a.T).numpy(), (b @ b.T).numpy()
    expected = (m1 - m2).pow(2).sum().item() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert fa.frechet_distance(sample(m1, a), sample(m2, b)) == pytest.approx(expected, rel=1e-8)


def test_kl_divergence_and_clap_score():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert fa.kl_divergence(p.log(), q.log()) == pytest.approx(expected, rel=1e-5)
    assert fa.clap_score(torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])) == pytest.approx((1 + 0.5 ** 0.5) / 2)


# ---- the model --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, dit", [("small", 73_880_788), ("base", 197_940_244), ("large", 429_363_860)])
def test_parameter_counts(preset, dit):
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(fa.PRESETS[preset].dit).parameters()) == dit
        assert sum(p.numel() for p in MelVAE(fa.PRESETS[preset].vae).parameters()) == 212_958_212


def test_an_untrained_backbone_returns_zero():
    assert DiT(TINY.dit)(torch.randn(2, 20, 16), torch.rand(2), torch.randn(2, 8, 32)).abs().max() == 0


def test_generate_is_reproducible_and_independent_of_the_batch(tmp_path):
    model = tiny_model()
    state = torch.get_rng_state()
    wav = model.generate(["rain", "a bell", "rain"], seed=3)
    assert torch.equal(state, torch.get_rng_state())                            # the global generator is left alone
    assert wav.shape == (3, 32 * 256) and wav.dtype == torch.float32 and wav.abs().max() <= 1
    assert torch.equal(wav, model.generate(["rain", "a bell", "rain"], seed=3))
    assert (wav - model.generate(["rain", "a bell", "rain"], seed=9)).abs().max() > 1e-3
    assert (wav[0] - wav[2]).abs().max() > 1e-3                                 # a second take of the same prompt
    latents = model.sample_latents(["rain", "a bell", "rain"], seed=3)
    torch.testing.assert_close(latents[1:2], model.sample_latents(["a bell"], seed=3), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(latents[2:], model.sample_latents(["rain", "rain"], seed=3)[1:], atol=1e-4, rtol=1e-5)
    context = model.text(["rain", "a bell"])
    z0 = torch.randn(2, 20, 16, generator=rng())
    torch.testing.assert_close(model.sample_latents(context, 4, 2.0, z0=z0), model.sample_latents(["rain", "a bell"], 4, 2.0, z0=z0))
    assert model.generate(context, z0=z0).shape == (2, 32 * 256)
    assert model.generate(["rain"], seconds=0.25).shape == (1, 16 * 256)         # 15.6 mel frames: 8 latent ones
    with pytest.warns(UserWarning, match="longer than the 0.512 s"):
        assert model.generate(["rain"], seconds=1).shape == (1, 62 * 256)
    with pytest.raises(InputError, match="too long"):
        model.generate(["rain"], seconds=60)


def test_generate_leaves_the_global_generator_alone():
    model, state = tiny_model(), torch.get_rng_state()
    clips = [model.generate(["rain"], seed=seed) for seed in (0, 0, None, None)]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(clips[0], clips[1]) and not torch.equal(clips[2], clips[3])


def test_a_prompt_is_encoded_once_until_the_encoder_changes(monkeypatch):
    model, seen, real = tiny_model(), [], fa.TextEncoder.forward
    monkeypatch.setattr(fa.TextEncoder, "forward", lambda self, captions: seen.append(captions) or real(self, captions))
    one = model.contexts(["rain", "a bell", "rain"])
    two = model.contexts(["a bell", "wind"])
    assert seen == [["rain", "a bell"], ["wind"]] and torch.equal(one[0], one[2]) and torch.equal(one[1], two[0])
    with torch.no_grad():
        model.text.pieces.weight.add_(1.0)
    assert not torch.equal(model.contexts(["rain"])[0], one[0]) and len(seen) == 3
    assert model.double().contexts(["rain"]).dtype == torch.float64                         # and follows the model


def test_a_compiled_model_gives_the_same_samples(monkeypatch):
    model = tiny_model()
    plain = model.generate(["rain"], steps=2, seed=0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))          # traced, without the minute of code generation
    torch.testing.assert_close(model.compile().generate(["rain"], steps=2, seed=0), plain, atol=1e-5, rtol=1e-5)


def test_save_and_load_give_identical_samples(tmp_path):
    model = tiny_model()
    model.scale_factor.fill_(0.7)
    model.save_pretrained(tmp_path / "m", stage="rf2")
    again = FlashAudio.from_pretrained(tmp_path / "m")
    assert again.config == model.config and json.loads((tmp_path / "m/config.json").read_text())["stage"] == "rf2"
    assert torch.equal(model.generate(["rain"], 2, 3.0, seed=0), again.generate(["rain"], 2, 3.0, seed=0))
    assert (tmp_path / "m/model.safetensors").stat().st_mode == (tmp_path / "m/config.json").stat().st_mode
    (tmp_path / "m/model.safetensors").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a readable model"):
        FlashAudio.from_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="missing"):
        FlashAudio.from_pretrained(tmp_path)


def test_griffin_lim_keeps_the_mel_the_length_and_the_timing():
    t = torch.arange(32 * 256) / fa.SAMPLE_RATE
    wav = (0.3 * torch.sin(2 * math.pi * 700 * t) * (t > 0.25) * (t < 0.4))[None]
    mel = fa.mel_spectrogram(wav)
    back = fa.griffin_lim(mel)
    assert back.shape == wav.shape
    loud = mel > -2
    assert (fa.mel_spectrogram(back) - mel)[loud].abs().mean() < 0.1            # log10 units: 2 dB
    centre = lambda x: (x ** 2 * t).sum() / (x ** 2).sum()                      # seconds
    assert abs(centre(back[0]) - centre(wav[0])) < 0.002


def test_text_is_bytes_and_the_null_context_is_that_of_the_empty_caption():
    model = tiny_model()
    ids = model.text.tokenize(["aé", "", "x" * 100])
    assert ids.shape == (3, 32) and ids[0, :4].tolist() == [97 + 1, 0xC3 + 1, 0xA9 + 1, 0] and ids[1].tolist() == [0] * 32
    assert ids[2].tolist() == [ord("x") + 1] * 32
    torch.testing.assert_close(model.text(["rain", ""])[1:], model.text([""]))


# ---- reading audio ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_load_audio_reads_every_width(tmp_path, dtype):
    x = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    data = {np.uint8: x * 128 + 128, np.int16: x * 32768, np.int32: x * 2**31}.get(dtype, x).astype(dtype)
    wavfile.write(tmp_path / "x.wav", 16000, data)
    assert (fa.load_audio(tmp_path / "x.wav") - torch.from_numpy(x)).abs().max() < (0.01 if dtype is np.uint8 else 1e-4)


def test_load_audio_mixes_resamples_repeats_and_cuts(tmp_path):
    x = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    wavfile.write(tmp_path / "x.wav", 44100, np.stack([x, 0 * x], 1).astype(np.float32))
    wav = fa.load_audio(tmp_path / "x.wav")
    assert len(wav) == 16000
    exact = 0.25 * torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)
    assert (wav - exact)[200:-200].abs().max() < 2e-3
    long = fa.load_audio(tmp_path / "x.wav", 40000)
    assert torch.equal(long[:16000], wav) and torch.equal(long[16000:32000], wav) and torch.equal(long[32000:], wav[:8000])
    assert torch.equal(fa.load_audio(tmp_path / "x.wav", 100), wav[:100])


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not a wav at all", "header only", "nan"])
def test_load_audio_says_in_one_line_what_is_wrong(tmp_path, content):
    path = tmp_path / "bad.wav"
    if content == "header only":
        wavfile.write(path, 16000, np.zeros(0, np.int16))
    elif content == "nan":
        wavfile.write(path, 16000, np.full(100, np.nan, np.float32))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as e:
        fa.load_audio(path)
    assert "bad.wav" in str(e.value) and "\n" not in str(e.value)


# ---- the public fixtures ----------------------------------------------------------------------------------------------------

def fixture(name: str) -> dict:
    from safetensors.torch import load_file
    return load_file(PARITY / f"{name}.safetensors")


def assert_parity(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max().item() < 1e-5


@public_fixtures
@torch.no_grad()
def test_parity_vae():
    io, vae = fixture("vae_io"), MelVAE(VAEConfig(channels=32, channel_mult=(1, 2, 2)))
    vae.load_state_dict(fixture("vae_weights"))
    mean, logvar = vae.encode(io["mel"])
    assert_parity(mean, io["mean"])
    assert_parity(logvar, io["logvar"])
    assert_parity(vae.decode(io["z"]), io["decoded"])
    assert_parity(vae.decode(mean), io["reconstruction_from_mean"])


def public_dit() -> DiT:
    dit = DiT(DiTConfig(context_dim=48, hidden_size=64, num_heads=4, depth=2))
    dit.load_state_dict(fixture("dit_weights"))
    return dit


@public_fixtures
@torch.no_grad()
def test_parity_dit():
    io, dit = fixture("dit_io"), public_dit()
    assert_parity(dit(io["x"], io["t"] / 1000, io["context"]), io["v"])
    assert_parity(dit(io["x"], io["t_frac"] / 1000, io["context"]), io["v_frac"])


@public_fixtures
@torch.no_grad()
def test_parity_sampler_and_training_objective():
    io, dit = fixture("cfm_io"), public_dit()
    public = {"integer_time": True}
    assert_parity(fa.euler_sample(dit, io["x0"], io["cond"], io["uncond"], 4, 3.0, True, **public), io["trajectory"])
    assert_parity(fa.euler_sample(dit, io["x0"], io["cond"], steps=4, **public), io["final_no_cfg"])
    assert_parity(fa.euler_sample(dit, io["x0"], io["cond"], io["uncond"], 25, 3.0, **public), io["final_26_points"])
    loss = fa.rectified_flow_loss(dit, io["train_x1"], io["train_noise"], io["train_t"] / 1000, io["cond"], sigma_min=1e-4)
    assert_parity(loss, io["train_loss"])


@public_fixtures
@torch.no_grad()
def test_parity_bigvgan():
    io, vocoder = fixture("bigvgan_io"), fa.load_vocoder(f"bigvgan:{PARITY / 'bigvgan_weights.safetensors'}")
    assert_parity(vocoder(io["mel"])[:, None], io["wav"])
    model = public.build_bigvgan(fixture("bigvgan_weights"), {})
    assert_parity(model.resblocks[0].activations[0](io["act_in"]), io["act_out"])


@public_fixtures
@torch.no_grad()
def test_parity_of_a_whole_public_checkpoint(tmp_path):
    """VAE, DiT and text stage in one Lightning file, as the public ones are."""
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"num_attention_heads": 4}))      # the one size no tensor tells
    parts = {"first_stage_model": "vae", "model.diffusion_model": "dit", "cond_stage_model": "text"}
    state = {f"{prefix}.{k}": v for prefix, part in parts.items() for k, v in fixture(f"{part}_weights").items()}
    torch.save({"state_dict": {**state, "scale_factor": torch.tensor(0.7), "betas": torch.zeros(1000)}}, tmp_path / "public.ckpt")
    model = FlashAudio.from_make_an_audio(tmp_path / "public.ckpt", text=(str(tmp_path / "bert"), "unused"))
    io, cfm = fixture("text_io"), fixture("cfm_io")
    assert_parity(model.text(torch.cat([io["bert_input_ids"], io["t5_input_ids"]], 1)), io["context"])
    assert (model.sample_latents(cfm["cond"], 4, z0=cfm["x0"]) - cfm["final_no_cfg"]).abs().max() < 1e-5
    assert model.scale_factor == 0.7 and model.config.dit == DiTConfig(20, 48, 64, 4, 2)


PARITY_MEL = """
import torch, flashaudio as fa
from safetensors.torch import load_file
io = load_file(r"{path}")
mel = fa.mel_spectrogram(io["wav"])
print((mel - io["logmel"]).abs().max().item(), (10 ** mel - 10 ** io["logmel"]).abs().max().item())
"""


@public_fixtures
def test_parity_mel():
    """Near the floor of -5, log10 shows the rounding of the FFT itself (4e-3 between two code paths of one library), so the
    logarithms are compared under the FFT's portable code path, and the magnitudes under whatever this machine uses."""
    script = PARITY_MEL.format(path=PARITY / "mel_io.safetensors")
    portable, native = ([float(x) for x in subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **env},
                        capture_output=True, text=True, check=True).stdout.split()] for env in ({"MKL_CBWR": "COMPATIBLE"}, {}))
    assert native[1] < 1e-5
    if torch.backends.mkl.is_available():
        assert portable[0] < 1e-5
    io = fixture("mel_io")
    assert_parity(fa.mel_basis(), io["mel_basis"])


# ---- other people's models, small ones that are built and saved here --------------------------------------------------------

def save_tokenizer(folder: Path) -> None:
    """One token per letter: padding is 0, an unknown character 1."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = {c: i for i, c in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz<>&@"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture(scope="module")
def public_checkpoint(tmp_path_factory) -> Path:
    """A folder with a tiny Make-An-Audio 3 checkpoint, public.ckpt, and its tokenizers, bert/ and t5/."""
    folder = tmp_path_factory.mktemp("public")
    for name in ("bert", "t5"):
        save_tokenizer(folder / name)
    (folder / "bert/config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 2}))
    (folder / "t5/config.json").write_text(json.dumps({"model_type": "t5"}))
    config = FlashAudioConfig(
        VAEConfig(channels=32, channel_mult=(1, 2), res_blocks=1), DiTConfig(context_dim=16, hidden_size=32, num_heads=2, depth=1),
        TextConfig("make-an-audio", max_length=77, tokenizers=(str(folder / "bert"), str(folder / "t5")), bert=dict(
            vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
            max_position_embeddings=80), t5=dict(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        integer_time=True)
    torch.manual_seed(0)
    model = FlashAudio(config).eval()
    for p in model.dit.parameters():
        nn.init.normal_(p, std=0.2)
    model.scale_factor.fill_(0.7)
    model.save_pretrained(folder / "ours")
    state = {public.their_name(k): v for k, v in model.state_dict().items()}
    state |= {"alphas_cumprod": torch.zeros(1000), "cond_stage_model.caption_encoder.base.embeddings.position_ids": torch.zeros(1, 80)}
    torch.save({"state_dict": state, "epoch": 1, "global_step": 2}, folder / "public.ckpt")
    return folder


def load_public(folder: Path) -> FlashAudio:
    return FlashAudio.from_make_an_audio(folder / "public.ckpt", text=(str(folder / "bert"), str(folder / "t5")))


def test_a_public_checkpoint_gives_the_model_it_was_made_from(public_checkpoint, tmp_path):
    model, ours = load_public(public_checkpoint), FlashAudio.from_pretrained(public_checkpoint / "ours")
    assert model.config == ours.config
    assert torch.equal(model.generate(["a bell"], 2, 3.0, seed=0), ours.generate(["a bell"], 2, 3.0, seed=0))
    model.save_pretrained(tmp_path / "again")
    again = FlashAudio.from_pretrained(tmp_path / "again")
    assert torch.equal(model.sample_latents(["a bell"], seed=0), again.sample_latents(["a bell"], seed=0))


def test_the_public_text_stage_reads_the_caption_twice(public_checkpoint):
    text = load_public(public_checkpoint).text
    letters = lambda s: [" abcdefghijklmnopqrstuvwxyz<>&@".find(c) + 1 if c != " " else 1 for c in s]
    padded = lambda s: letters(s) + [0] * (77 - len(s))
    ids = text.tokenize(["a bell", "a bell <bell& all>@<x& end>", ""])
    assert ids[0].tolist() == padded("a bell") + padded("<a bell& all>")
    assert ids[1].tolist() == padded("a bell") + padded("<bell& all>@<x& end>") and not ids[2].any()
    assert text(["a bell", ""]).shape == (2, 154, 16)


def test_the_music_model_has_t5_alone(public_checkpoint, tmp_path):
    state = torch.load(public_checkpoint / "public.ckpt", weights_only=True)["state_dict"]
    music = {k.replace("cond_stage_model.t5_transformer", "cond_stage_model.transformer"): v for k, v in state.items()
             if "caption_encoder" not in k}
    torch.save({"state_dict": music}, tmp_path / "music.ckpt")
    model = FlashAudio.from_make_an_audio(tmp_path / "music.ckpt", text=(str(public_checkpoint / "t5"),))
    both = load_public(public_checkpoint)
    torch.testing.assert_close(model.text(["a bell"]), both.text(["a bell <a bell"])[:, 77:] * 0 + both.text.states(
        both.text.t5_transformer, model.text.tokenize(["a bell"])))
    assert FlashAudio.from_make_an_audio(tmp_path / "music.ckpt").config.text.tokenizers == ("google/flan-t5-large",)


def test_a_checkpoint_without_text_stage_takes_contexts(public_checkpoint, tmp_path):
    state = torch.load(public_checkpoint / "public.ckpt", weights_only=True)["state_dict"]
    torch.save({k: v for k, v in state.items() if not k.startswith("cond_stage_model")}, tmp_path / "bare.ckpt")
    model = FlashAudio.from_make_an_audio(tmp_path / "bare.ckpt")
    assert model.generate(torch.zeros(2, 5, 16), seconds=0.512, seed=0).shape == (2, 8192)
    with pytest.raises(InputError, match="no text stage"):
        model.generate(["a bell"])


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(public_checkpoint, tmp_path):
    held = torch.load(public_checkpoint / "public.ckpt", weights_only=True)["state_dict"]
    proj, mlp = "model.diffusion_model.proj_in.weight", "model.diffusion_model.t_embedder.mlp.0.weight"
    cases = {"missing": ({k: v for k, v in held.items() if k != mlp}, mlp), "sizes": ({k: v for k, v in held.items() if k != proj}, "proj_in.weight"),
             "surplus": ({**held, "ema.decay": torch.ones(())}, "ema.decay"), "shape": ({**held, mlp: held[mlp][:, :9]}, "t_embedder.mlp.0"),
             "empty": ({}, "encoder.conv_in"), "pickle": ({**held, "hparams": Path("x")}, "besides tensors")}
    for name, (state, expected) in cases.items():
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
        with pytest.raises(InputError) as e:
            FlashAudio.from_make_an_audio(tmp_path / f"{name}.ckpt")
        assert expected in str(e.value) and f"{name}.ckpt" in str(e.value) and "\n" not in str(e.value), name
    with pytest.raises(InputError, match="no such checkpoint"):
        FlashAudio.from_make_an_audio(tmp_path / "gone.ckpt")


def test_public_sizes_have_the_public_counts():
    count = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        base = fa.PRESETS["base"]
        assert count(MelVAE(base.vae)) == 212_958_212 and count(DiT(base.dit)) == 197_940_244
        assert count(DiT(DiTConfig(hidden_size=1152, num_heads=16, depth=28))) == 740_718_804
        assert count(DiT(DiTConfig(hidden_size=1536, num_heads=32, depth=32))) == 1_469_161_492
        bigvgan = public.BigVGAN(**public.DEFAULTS)
    gains = sum(len(m.weight) for m in bigvgan.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)))     # weight_g, folded here
    assert count(bigvgan) + gains == 112_231_250


def test_bigvgan_folds_weight_norm_and_checks_its_keys(tmp_path):
    torch.manual_seed(0)
    sizes = dict(upsample_rates=(16, 16), upsample_kernel_sizes=(32, 32), resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),))
    model = public.BigVGAN(80, 8, **sizes).eval()
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("weight"):
            norm = value.flatten(1).norm(dim=1).view(-1, 1, 1)
            state |= {f"{name}_g": norm, f"{name}_v": 3 * value}                # the length of v does not matter
        else:
            state[name] = value
    torch.save({"generator": state}, tmp_path / "g_00001000")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    mel = torch.randn(2, 80, 5, generator=rng())
    torch.testing.assert_close(fa.load_vocoder(f"bigvgan:{tmp_path}")(mel), model(mel)[:, 0])
    torch.save({"generator": {**state, "extra.bias": torch.zeros(1)}}, tmp_path / "g_00001000")
    with pytest.raises(InputError, match="extra.bias"):
        fa.load_vocoder(f"bigvgan:{tmp_path}")
    with pytest.raises(InputError, match="0 checkpoints"):
        fa.load_vocoder(f"bigvgan:{tmp_path / 'gone'}")
    with pytest.raises(InputError, match="unknown vocoder"):
        fa.load_vocoder("wavenet")


def test_hifigan_gets_the_mels_it_was_trained_on(tmp_path, monkeypatch):
    from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig
    SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=16)).save_pretrained(tmp_path)
    vocoder, t = fa.load_vocoder(f"hifigan:{tmp_path}"), torch.arange(16384) / 16000
    wav = sum(0.1 * torch.sin(2 * math.pi * f * t) for f in (300, 440, 1250, 3000, 5200)) + 0.02 * torch.randn(16384, generator=rng())
    assert vocoder(fa.mel_spectrogram(wav[None])).shape == (1, 16384)
    seen = []
    monkeypatch.setattr(SpeechT5HifiGan, "forward", lambda self, mel: seen.append(mel) or torch.zeros(len(mel), 256 * mel.shape[1]))
    vocoder(fa.mel_spectrogram(wav[None]))
    theirs = SpeechT5FeatureExtractor()(audio_target=wav.numpy(), sampling_rate=16000)["input_values"][0]
    gap = lambda mel: np.abs(mel - np.asarray(theirs).mean(0)).mean()           # log10, over the bands
    assert gap(seen[0][0].mean(0).numpy()) < 0.1 < gap(fa.mel_spectrogram(wav[None])[0].mean(1).numpy())


def save_text_model(kind: str, folder: Path) -> Path:
    from transformers import BertConfig, BertModel, ClapConfig, ClapModel, T5Config, T5EncoderModel
    torch.manual_seed(0)
    save_tokenizer(folder)
    small = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    if kind == "bert":
        BertModel(BertConfig(**small)).save_pretrained(folder)
    elif kind == "t5":
        T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(folder)
    else:
        from transformers import ClapFeatureExtractor
        audio = dict(patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[1, 1], num_hidden_layers=2,
                     projection_dim=16)
        ClapModel(ClapConfig(text_config=dict(small, projection_dim=16), audio_config=audio, projection_dim=16)).save_pretrained(folder)
        ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "t5", "clap"])
def test_any_text_model_of_transformers_gives_its_token_states(tmp_path, kind):
    source = str(save_text_model(kind, tmp_path))
    text = fa.text_encoder(TextConfig(source, max_length=12), fa.pretrained_width(source))
    context = text(["rain", "a bell"])
    assert context.shape == (2, 12, 16) and not context[0, 4:].any() and context[0, :4].abs().min() > 0
    torch.testing.assert_close(text(["rain"]), context[:1])                     # in any company
    assert not list(text.parameters()) and not text.trained
    with pytest.raises(InputError, match="context_dim is 20"):
        fa.text_encoder(TextConfig(source), 20)


def test_a_text_model_that_is_not_there_is_named_in_one_line(tmp_path):
    with pytest.raises(InputError) as e:
        fa.text_encoder(TextConfig(str(tmp_path / "gone")), 16)
    assert "gone" in str(e.value) and "\n" not in str(e.value)


def test_push_to_hub_uploads_what_from_pretrained_loads(tmp_path, monkeypatch):
    from types import SimpleNamespace
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder",
                        lambda self, repo_id, folder_path, **_: shutil.copytree(folder_path, tmp_path / repo_id))
    model = tiny_model()
    model.card, model.notes = "# a card", {"stage": "distill"}
    model.push_to_hub("me/flash")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: tmp_path / repo_id)
    again = FlashAudio.from_pretrained("me/flash")
    assert again.card == "# a card" and again.notes == {"stage": "distill"}
    assert torch.equal(again.sample_latents(["rain"], seed=0), model.sample_latents(["rain"], seed=0))


def test_public_judge_scores_the_real_clips_best(tmp_path):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification
    from data.evaluate import PublicJudge
    from data.manifest import Data
    save_text_model("clap", tmp_path / "clap")
    torch.manual_seed(0)
    ASTForAudioClassification(ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                        max_length=256, num_labels=5)).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(max_length=256).save_pretrained(tmp_path / "ast")
    data = Data(write_clips(tmp_path / "clips"), tmp_path / "cache", 128)
    wav = torch.stack([fa.load_audio(r["audio_path"], 32768) for r in data.rows])
    judge = PublicJudge(data, data.train, wav, str(tmp_path / "clap"), str(tmp_path / "ast"), torch.device("cpu"))
    real, noise = judge(wav), judge(0.1 * torch.randn(wav.shape, generator=rng()))
    assert real["fd"] == pytest.approx(0, abs=1e-6) and real["kl"] == pytest.approx(0, abs=1e-6) and real["accuracy"] == 1
    assert noise["fd"] > 1e-3 and noise["kl"] > 1e-6 and -1 <= real["clap"] <= 1 and "clap" in judge.name and "ast" in judge.name


def test_audiocaps_finds_clips_under_their_usual_names_and_counts_the_missing(tmp_path):
    from data import audiocaps
    ids = ["aaaaaaaaaaa", "bbbbbbbbb-_", "_cccccccccc", "ddddddddddd", "eeeeeeeeeee", "fffffffffff"]
    files = ["x/aaaaaaaaaaa_30.wav", "Ybbbbbbbbb-_.flac", "_cccccccccc_30_40.wav", "7004.mp3", "eeeeeeeeeee_30000_40000.wav"]
    (tmp_path / "clips/x").mkdir(parents=True)
    for name in files:
        (tmp_path / "clips" / name).write_bytes(b"")
    rows = [f"{7001 + i},{y},30,caption {i}" for i, y in enumerate(ids)]
    (tmp_path / "train.csv").write_text("audiocap_id,youtube_id,start_time,caption\n" + "\n".join(rows) + "\n")
    found, missing = audiocaps.write_manifest([f"{tmp_path}/train.csv:train"], tmp_path / "clips", tmp_path / "out/manifest.csv")
    assert found == 5 and missing == ["fffffffffff"]
    held = list(csv.DictReader(open(tmp_path / "out/manifest.csv", encoding="utf-8")))
    assert [(tmp_path / "out" / r["audio_path"]).resolve().relative_to(tmp_path.resolve() / "clips").as_posix() for r in held] == files
    assert [r["caption"] for r in held] == [f"caption {i}" for i in range(5)] and {r["split"] for r in held} == {"train"}
    (tmp_path / "music.csv").write_text("ytid,start_s,end_s,caption\naaaaaaaaaaa,30,40,a tune\n")
    assert audiocaps.write_manifest([f"{tmp_path}/music.csv"], tmp_path / "clips", tmp_path / "m.csv") == (1, [])
    for bad, expected in (("clips/none.csv", "no such CSV"), ("out/manifest.csv", "needs the columns")):
        with pytest.raises(InputError, match=expected):
            audiocaps.write_manifest([str(tmp_path / bad)], tmp_path / "clips", tmp_path / "m.csv")


# ---- the scripts ------------------------------------------------------------------------------------------------------------

def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def write_clips(folder: Path, n: int = 6, samples: int = 20_000) -> Path:
    """A manifest of n tones."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("audio_path", "caption")]
    for i in range(n):
        x = 0.5 * np.sin(2 * np.pi * (200 + 150 * i) * np.arange(samples) / 16000)
        wavfile.write(folder / f"{i}.wav", 16000, (x * 32767).astype(np.int16))
        rows.append((f"{i}.wav", f"tone number {i}"))
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    return folder / "manifest.csv"


QUICK = ["--batch_size", 4, "--vae_steps", 4, "--cfm_steps", 4, "--rf1_steps", 3, "--rf2_steps", 3, "--distill_steps", 3,
         "--couplings", 6, "--distill_couplings", 6, "--coupling_steps", 2, "--distill_coupling_steps", 2, "--anchor_steps", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory) -> Path:
    """The trained judge of the toy set."""
    from data import toy
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    toy.train_judge(path, progress=False)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of all stages on six tones, a few steps each."""
    folder = tmp_path_factory.mktemp("run")
    done = run("train.py", "--data", write_clips(folder / "clips"), "--out", folder / "out", *QUICK)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_runs_every_stage(trained):
    results = json.loads((trained / "out/results.json").read_text())
    assert [(r["model"], r["steps"], r["guidance"], r["nfe"]) for r in results["rows"]] == [
        ("real", None, None, None), ("vae", None, None, None),
        ("cfm", 1, 1.0, 1), ("cfm", 4, 1.0, 4), ("cfm", 24, 1.0, 24), ("cfm", 24, 3.0, 48),
        *((m, s, 1.0, s) for m in ("rf1", "rf2") for s in (1, 4, 24)), ("distill", 1, 1.0, 1)]
    assert results["rows"][0]["accuracy"] == 1.0 and results["rows"][0]["fd"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(r["fd"]) and r["clips"] == 6 for r in results["rows"])
    assert {"rows", "config", "seed", "hardware", "seconds"} <= set(results)
    for stage in ("vae", "cfm", "rf1", "rf2", "distill"):
        FlashAudio.from_pretrained(trained / "out" / stage)


def test_results_hold_the_flags_that_the_models_were_trained_with(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    in_process("--data", trained / "clips/manifest.csv", "--out", tmp_path / "out", "--device", "cpu", "--stage", "eval", "--eval_clips", 3)
    config = json.loads((tmp_path / "out/results.json").read_text())["config"]
    assert (config["cfm_steps"], config["couplings"], config["eval_clips"], config["stage"]) == (4, 6, 3, "eval")


def test_a_recipe_is_between_the_preset_and_the_command_line():
    import train
    assert [train.parse_flags(line.split()).pairing for line in ("", "--recipe measured", "--recipe measured --pairing knn")] == ["immiscible", "none", "knn"]
    assert train.parse_flags(["--recipe", "measured"]).out == "out/toy-measured"
    assert train.parse_flags("--preset base --recipe measured".split()).couplings == 50_000


def test_timesteps_follow_the_flags():
    import train
    flags = train.Flags(rf1_timesteps="mix_exp", mix_exp_a=2.0, rf2_timesteps="uniform", cfm_timesteps="logit_normal", logit_mean=0.5)
    cdf = {"rf1": lambda x: 0.5 + (np.exp(2 * x) - np.exp(2 * (1 - x))) / (2 * (np.exp(2) - 1)), "rf2": lambda x: x,
           "cfm": lambda x: stats.norm.cdf(np.log(x / (1 - x)) - 0.5)}
    for stage in cdf:
        t = train.timesteps(flags, stage, 20_000, rng()).double().numpy()
        assert stats.kstest(t, cdf[stage]).pvalue > 0.01 and all(stats.kstest(t, cdf[s]).pvalue < 1e-6 for s in cdf if s != stage)


def in_process(*flags) -> None:
    import train
    train.main(train.parse_flags([str(f) for f in flags]))


def test_the_three_readings_of_pairing_in_reflow(trained, tmp_path, monkeypatch):
    pairs, weights = {}, {}
    for reading in ("off", "before", "literal"):
        if reading == "literal":                    # so few steps leave samples at their own noise: pair them otherwise
            monkeypatch.setattr(fa, "immiscible_pairing", lambda z1, z0: z0.flip(0))
        shutil.copytree(trained / "out", tmp_path / reading)
        in_process("--data", trained / "clips/manifest.csv", "--out", tmp_path / reading, *QUICK, "--pairing_reflow", reading, "--stage", "rf2")
        pairs[reading] = np.load(next((tmp_path / reading / "cache").glob("couplings_rf2-*.npy")))
        weights[reading] = (tmp_path / reading / "rf2/model.safetensors").read_bytes()
    assert np.array_equal(pairs["off"], pairs["literal"]) and weights["off"] != weights["literal"]
    noise = lambda reading: np.array(sorted(pairs[reading][:, 0].reshape(6, -1).tolist()))
    assert np.array_equal(noise("off"), noise("before")) and not np.array_equal(pairs["off"][:, 0], pairs["before"][:, 0])
    model = FlashAudio.from_pretrained(trained / "out/rf1")
    latents = model.scale_factor.item() * np.load(next((trained / "out/cache").glob("latents-*.npy")))[:, 0]
    far = lambda reading: np.linalg.norm((pairs[reading][:, 0] - latents).reshape(6, -1), axis=1).sum()
    assert far("before") < far("off")


def test_switches_reach_what_they_name(trained, tmp_path, monkeypatch):
    data, couplings, sigmas, loss = ("--data", trained / "clips/manifest.csv"), [], [], fa.rectified_flow_loss
    monkeypatch.setattr(fa, "make_couplings", lambda model, z0, c, null, *how, **more: couplings.append((len(z0), *how, more)) or z0)
    monkeypatch.setattr(fa, "rectified_flow_loss", lambda *inputs: sigmas.append(inputs[5] if len(inputs) > 5 else 0.0) or loss(*inputs))
    shutil.copytree(trained / "out", tmp_path / "out")
    in_process(*data, "--out", tmp_path / "out", *QUICK, "--stage", "rf2", "--couplings", 5, "--coupling_steps", 3, "--guidance", 2.5,
               "--anchor_steps", 7, "--rectify", "cfg_zero", "--anchor_lr", 0.02, "--anchor_tol", 1e-3)
    assert couplings == [(5, 3, 2.5, 7, "cfg_zero", {"lr": 0.02, "tolerance": 1e-3})]
    for stage, sigma in (("cfm", 0.25), ("rf1", 0.0)):
        sigmas.clear()
        in_process(*data, "--out", tmp_path / "out", *QUICK, "--sigma_min", 0.25, "--stage", stage)
        assert set(sigmas) == {sigma}


def test_training_starts_where_the_decoder_hears_the_latent():
    import train
    torch.manual_seed(0)
    model, mel = FlashAudio(fa.PRESETS["toy"]), 1.7 * torch.randn(8, 80, 64, generator=rng()) - 3
    band = mel.mean((0, 2))
    train.initialize(model, band)
    vae, blocks = model.vae, model.dit.blocks
    mean, logvar = vae.encode(mel)
    assert 0.5 < mean.std() < 2 and torch.equal(logvar, torch.full_like(logvar, -4.0))
    nothing, latent = vae.decode(torch.zeros_like(mean)), vae.decode(mean)
    assert torch.allclose(nothing, band[:, None].expand_as(nothing)) and 0.5 < (latent - nothing).std() < 3
    assert vae.encoder.conv_in(band[None, :, None].expand(1, 80, 16))[..., 2:-2].abs().max() < 1e-4     # the mean mel is 0 to the encoder
    for layer in vae.modules():                     # residual branches add nothing yet
        if isinstance(layer, (fa.ResidualBlock, fa.FrameAttention)):
            x = torch.randn(2, 64, 8, generator=rng())
            assert torch.equal(layer(x), x)
    z, t, c = torch.randn(2, 20, 8, generator=rng()), torch.rand(2, generator=rng()), torch.randn(2, 4, 128, generator=rng())
    assert not model.dit(z, t, c).any()             # the flow still starts from 0, with its gates half open
    assert all((b.adaLN_modulation[1].bias.view(6, -1)[[2, 5]] == 0.5).all() and (b.attention.gate == 0.5).all() for b in blocks)


@pytest.mark.parametrize("ema, kept", [(0.0, 0.0), (0.05, 0.05), (0.995, 0.1)])     # the memory is short at first: 1/10 after one step
def test_the_saved_weights_are_their_average(trained, tmp_path, ema, kept):
    from data.public import read_checkpoint
    shutil.copytree(trained / "out/vae", tmp_path / "out/vae")
    in_process("--data", trained / "clips/manifest.csv", "--out", tmp_path / "out", *QUICK, "--stage", "cfm", "--cfm_steps", 1, "--ema", ema)
    saved, before = (FlashAudio.from_pretrained(tmp_path / "out" / stage).state_dict() for stage in ("cfm", "vae"))
    after = read_checkpoint(tmp_path / "out/cfm/train_state.pt")["weights"]
    assert any(not torch.equal(before[n], after[n]) for n in after)
    for name in after:
        torch.testing.assert_close(saved[name], kept * before[name] + (1 - kept) * after[name])


def test_rf1_may_start_anew_and_pair_in_other_ways(trained, tmp_path, monkeypatch):
    weights, seen, real = {"full": (trained / "out/rf1/model.safetensors").read_bytes()}, [], fa.immiscible_pairing
    monkeypatch.setattr(fa, "immiscible_pairing", lambda z1, z0, c, weight: seen.append((c is not None, weight)) or real(z1, z0, c, weight))
    for name, flags in {"anew": ("--init", "none"), "none": ("--pairing", "none"), "knn": ("--pairing", "knn"),
                        "c2ot": ("--pairing", "c2ot", "--c2ot_weight", 0.25)}.items():
        shutil.copytree(trained / "out", tmp_path / name)
        in_process("--data", trained / "clips/manifest.csv", "--out", tmp_path / name, *QUICK, *flags, "--stage", "rf1")
        weights[name] = (tmp_path / name / "rf1/model.safetensors").read_bytes()
    assert len({weights[name] for name in ("full", "anew", "none", "knn")}) == 4
    assert seen == [(False, 0.0)] * 3 + [(True, 0.25)] * 3                      # three steps of "anew", three of "c2ot"


def test_ablations_share_stages_continue_and_count_what_is_on_disk(judge_file, tmp_path, monkeypatch):
    from data import ablate, toy
    rows = [("Table 2", "1-RF full", "rf1", {}), ("Table 2", "1-RF uniform t", "rf1", {"rf1_timesteps": "uniform"}),
            ("Fig. 4", "ω = 3, anchored, 1", "rf2", {}), ("Pairing", "1-RF knn", "rf1", {"pairing": "knn"})]
    monkeypatch.setattr(ablate, "plan", lambda: rows)
    manifest = toy.write_toy_set(tmp_path / "toy", 8, 70)
    (tmp_path / "out/cache").mkdir(parents=True)
    shutil.copy(judge_file, tmp_path / "out/cache/judge.safetensors")
    flags = ("--data", manifest, "--out", tmp_path / "out", *QUICK, "--ablate", "short", "--eval_clips", 70)
    in_process(*flags)
    made = {stage: sorted((tmp_path / "out").glob(f"{stage}-*")) for stage in ("vae", "cfm", "rf1", "rf2")}
    assert [len(made[s]) for s in made] == [2, 2, 6, 2]                         # two seeds
    tables = json.loads((tmp_path / "out/ablation.json").read_text())["tables"]
    assert {n: list(t) for n, t in tables.items()} == {"Table 2": ["1-RF full", "1-RF uniform t"], "Fig. 4": [rows[2][1]], "Pairing": [rows[3][1]]}
    assert {"fd couplings", "residual", "effective guidance", "fd 1 steps", "fd 4 steps"} <= set(tables["Fig. 4"][rows[2][1]])
    assert tables["Pairing"]["1-RF knn"]["fixed"][0] < 0.5 and tables["Pairing"]["1-RF knn"]["distance saved"][0] > 0
    files = sorted((tmp_path / "out/rows").iterdir())
    times = [p.stat().st_mtime_ns for p in (*files, *made["rf1"])]
    ours = [p for p in files if json.loads(p.read_text())["row"] == "1-RF full"]
    for value, path in zip((3.0, 5.0), ours):
        path.write_text(json.dumps({**json.loads(path.read_text()), "figures": {"fd 24 steps": value}}))
    in_process(*flags)                                                          # nothing is left to train
    assert [p.stat().st_mtime_ns for p in made["rf1"]] == times[-6:]
    assert json.loads((tmp_path / "out/ablation.json").read_text())["tables"]["Table 2"]["1-RF full"] == {"fd 24 steps": [4.0, 1.0, 2]}
    in_process(*flags, "--rows", "1-RF full")
    assert json.loads((tmp_path / "out/ablation.json").read_text())["tables"] == {"Table 2": {"1-RF full": {"fd 24 steps": [4.0, 1.0, 2]}}}
    with pytest.raises(InputError, match="no row"):
        in_process(*flags, "--rows", "3-RF")


def test_a_stage_depends_on_the_settings_it_uses():
    import train
    from data.run import own_settings
    changed = lambda stage, **flags: own_settings(train.Flags(**flags), stage) != own_settings(train.Flags(), stage)
    assert [changed(stage, mix_exp_a=1.0) for stage in ("cfm", "rf1", "rf2", "distill")] == [False, False, True, False]
    assert [changed(stage, logit_mean=0.5) for stage in ("cfm", "rf1", "rf2", "distill")] == [False, True, False, False]
    assert changed("cfm", cfm_timesteps="logit_normal") and changed("rf2", rf2_timesteps="uniform") and not changed("rf2", pairing="none")


def test_a_claim_is_reproduced_only_where_its_interval_excludes_zero(tmp_path):
    from data.ablate import judge_claims, read_figures
    rows = {("Table 2", "1-RF full"): [1.0, 2.0, 3.0], ("Table 2", "1-RF uniform t"): [2.0, 3.1, 3.9],      # -1.0, -1.1, -0.9
            ("Table 2", "1-RF not from CFM"): [1.5, 1.9, 3.2], ("Table 2", "1-RF no pairing"): [0.5, 1.4, 2.6]}
    files = []
    for (table, row), values in rows.items():
        for seed, value in enumerate(values):
            files.append(tmp_path / f"{len(files)}.json")
            files[-1].write_text(json.dumps({"table": table, "row": row, "seed": seed, "figures": {"fd 24 steps": value}}))
    claims = judge_claims(read_figures(files))
    assert {name: c["verdict"] for name, c in claims.items()} == {
        "1-RF: logit-normal t": "reproduced", "1-RF: from CFM": "not seen", "1-RF: immiscible pairing": "the opposite"}
    first = claims["1-RF: logit-normal t"]
    assert first["difference"] == pytest.approx(-1.0) and first["ours"] == pytest.approx([2.0, 3.0])
    assert first["interval"] == pytest.approx(4.302653 * 0.1 / 3 ** 0.5, rel=1e-5)            # t of 2 degrees of freedom, standard deviation 0.1
    assert judge_claims(read_figures(files[:2] + files[3:5]))["1-RF: logit-normal t"]["verdict"] == "cannot be judged"


def test_training_from_a_public_checkpoint_ends_in_a_one_step_model(public_checkpoint, tmp_path):
    manifest = write_clips(tmp_path / "clips", 4)
    done = run("train.py", "--init", public_checkpoint / "public.ckpt", "--text", f"{public_checkpoint / 'bert'},{public_checkpoint / 't5'}",
               "--data", manifest, "--out", tmp_path / "out", *QUICK, "--clap", "", "--ast", "", "--grad_accum", 2, "--warmup", 1)
    assert done.returncode == 0, done.stderr
    assert "contexts of 5 captions" in done.stdout and not (tmp_path / "out/vae").exists()
    model, start = (FlashAudio.from_pretrained(tmp_path / "out" / stage) for stage in ("distill", "cfm"))
    assert model.generate(["tone number 1"], seed=0).shape == (1, 159744)       # 9.984 s
    same = lambda part: all(torch.equal(a, b) for a, b in zip(getattr(model, part).parameters(), getattr(start, part).parameters()))
    assert same("vae") and same("text") and not same("dit") and torch.equal(model.scale_factor, start.scale_factor)
    assert [r["model"] for r in json.loads((tmp_path / "out/results.json").read_text())["rows"]].count("cfm") == 4
    assert "Starting point: " in model.card and "| distill | 1 |" in model.card and "Seed: 0" in model.card


def test_training_with_a_frozen_text_model(tmp_path):
    source = save_text_model("t5", tmp_path / "t5")
    common = ("--data", write_clips(tmp_path / "clips", 4), "--out", tmp_path / "out", *QUICK)
    done = run("train.py", "--text", source, *common)
    assert done.returncode == 0, done.stderr
    model = FlashAudio.from_pretrained(tmp_path / "out/distill")
    assert model.config.text.encoder == str(source) and model.config.dit.context_dim == 16
    contexts = np.load(next((tmp_path / "out/cache").glob("contexts-*.npy")))
    assert contexts.dtype == np.float16 and contexts.shape == (5, 77, 16)
    torch.testing.assert_close(torch.from_numpy(contexts[:1]).float(), model.text([""]), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation_gives_the_same_weights(trained, tmp_path, parts):
    flags = ("--data", trained / "clips/manifest.csv", "--stage", "vae", "--vae_steps", 3, "--vae_batch_size", 6, "--warmup", 1)
    for name, n in (("whole", 1), ("parts", parts)):
        done = run("train.py", *flags, "--grad_accum", n, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    a, b = (FlashAudio.from_pretrained(tmp_path / name / "vae").vae.state_dict() for name in ("whole", "parts"))
    close = [((a[k] - b[k]).abs() < 2e-4).float().mean() for k in a]
    assert sum(close) / len(close) > 0.98           # Adam turns rounding into whole steps where a gradient is almost zero


def test_train_skips_what_is_done_and_refuses_other_settings(trained):
    weights = trained / "out/distill/model.safetensors"
    before = weights.stat().st_mtime_ns
    common = ("train.py", "--data", trained / "clips/manifest.csv", "--out", trained / "out")
    again = run(*common, *QUICK)
    assert again.returncode == 0 and again.stdout.count("done already") == 5 and weights.stat().st_mtime_ns == before
    other = run(*common, *QUICK, "--lr", 0.5)
    assert other.returncode == 2 and "other settings" in other.stderr and "Traceback" not in other.stderr


def test_ten_kills_lose_nothing(trained, tmp_path):
    import random
    import signal
    flags = [sys.executable, "train.py", "--data", str(trained / "clips/manifest.csv"), "--out", str(tmp_path / "out"), *map(str, QUICK), "--save_every", "0"]
    draw, said = random.Random(0), []
    for kill in range(10):
        process = subprocess.Popen(flags, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started, wait = tmp_path / "out" / ".lock", time.time() + draw.uniform(0, 4)
        while process.poll() is None and time.time() < wait or not started.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL if kill % 3 else draw.choice((signal.SIGTERM, signal.SIGINT)))
        said.append((process.wait(), process.stderr.read()))
    assert all(code in (0, -9, -2, -15, 130, 143) and "Traceback" not in text for code, text in said), said
    assert all("the same command continues" in text for code, text in said if code in (130, 143))
    done = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("vae", "cfm", "rf1", "rf2", "distill"):
        a, b = ((folder / "out" / stage / "model.safetensors").read_bytes() for folder in (trained, tmp_path))
        assert a == b, stage
    rows = [[{k: v for k, v in row.items() if k != "rtf"} for row in json.loads((folder / "out/results.json").read_text())["rows"]]
            for folder in (trained, tmp_path)]
    assert rows[0] == rows[1]


def test_a_signal_is_answered_between_two_steps(trained, tmp_path):
    import signal
    flags = [sys.executable, "train.py", "--data", str(trained / "clips/manifest.csv"), "--out", str(tmp_path / "out"), "--stage", "vae",
             "--vae_steps", "100000", "--save_every", "1000"]
    process = subprocess.Popen(flags, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or not metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and said == f"train.py: stopped; the same command continues from here (--out {tmp_path / 'out'})\n"
    state = public.read_checkpoint(tmp_path / "out/vae/train_state.pt")
    assert state["step"] >= 10


def test_a_full_disk_leaves_what_was_good(trained, tmp_path, capsys):
    """Simulated by the largest size that a file of the process may have."""
    import resource
    import train
    shutil.copytree(trained / "out", tmp_path / "out")
    flags = train.parse_flags([str(f) for f in ("--data", trained / "clips/manifest.csv", "--out", tmp_path / "out", *QUICK, "--stage", "rf2", "--couplings", 9)])
    before = {p: p.read_bytes() for p in (tmp_path / "out/rf2").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = (tmp_path / "out/rf2/train_state.pt").stat().st_size
    model = (tmp_path / "out/rf2/model.safetensors").stat().st_size
    assert 20_000 < model // 2 < model < state
    for size, what in ((20_000, "couplings_rf2"), (model // 2, "train_state.pt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert train.command(flags) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert what in said and said.count("\n") == 1, said
        assert {p: p.read_bytes() for p in (tmp_path / "out/rf2").iterdir()} == before
    with pytest.raises(OSError, match="model.safetensors: not written"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            tiny_model().save_pretrained(tmp_path / "out/rf2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.read_bytes() for p in (tmp_path / "out/rf2").iterdir()} == before
    assert train.command(flags) == 0


def test_two_processes_train_like_one(trained, tmp_path):
    losses = {}
    for name, command in {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]}.items():
        shutil.copytree(trained / "out", tmp_path / name)
        (tmp_path / name / "metrics.jsonl").unlink()
        for stage, *flags in (("rf2", "--couplings", 5, "--rf2_steps", 10), ("cfm", "--cfm_steps", 20, "--grad_accum", 2)):
            done = run(*command, "train.py", "--data", trained / "clips/manifest.csv", "--out", tmp_path / name, *QUICK, *flags, "--stage", stage,
                       OMP_NUM_THREADS="1")
            assert done.returncode == 0, done.stderr
        losses[name] = {(h["stage"], h["step"]): h["loss"] for h in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())}
    assert losses["one"].keys() == losses["two"].keys() and len(losses["one"]) == 3
    assert all(losses["two"][k] == pytest.approx(v, rel=1e-4) for k, v in losses["one"].items()), losses
    pairs = [np.load(next((tmp_path / name / "cache").glob("couplings_rf2*.npy"))) for name in losses]
    assert np.array_equal(pairs[0], pairs[1])       # five pairs are one block: who makes it does not matter


def test_a_run_goes_on_with_another_number_of_processes(trained, tmp_path):
    losses = {}
    for name in ("whole", "changed"):
        shutil.copytree(trained / "out", tmp_path / name)
        metrics = tmp_path / name / "metrics.jsonl"
        metrics.unlink()
        command = ["train.py", "--data", trained / "clips/manifest.csv", "--out", tmp_path / name, *QUICK, "--cfm_steps", 120, "--stage", "cfm"]
        if name == "changed":
            two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)],
                                   cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while two.poll() is None and not (metrics.exists() and metrics.read_text()):
                time.sleep(0.01)
            two.terminate()
            two.wait()
        done = run(*command, OMP_NUM_THREADS="1")
        assert done.returncode == 0 and ("continuing at step" in done.stdout) == (name == "changed"), done.stdout + done.stderr
        losses[name] = {h["step"]: h["loss"] for h in map(json.loads, metrics.read_text().splitlines())}
    assert len(losses["whole"]) == 12 and losses["changed"] == pytest.approx(losses["whole"], rel=1e-2)


def test_batches_prepared_beside_are_the_same(trained):
    from data.run import Run, batches
    run_ = Run(None, None, torch.device("cpu"))
    seen, draw = [], lambda step: seen.append(step) or [torch.randn(3, generator=rng(step)), torch.tensor(step)]
    alone, beside = (list(batches(run_, range(2, 6), draw, beside=way)) for way in (False, True))
    assert seen == [2, 3, 4, 5] * 2 and [step for step, _ in beside] == [2, 3, 4, 5]
    assert all(torch.equal(a, b) for (_, one), (_, two) in zip(alone, beside) for a, b in zip(one, two))
    ahead = batches(run_, range(2, 6), draw, beside=True)
    next(ahead), time.sleep(0.2)
    assert seen[8:] == [2, 3]                       # one step ahead, no further
    assert list(batches(run_, range(4, 4), draw, beside=True)) == []


def test_a_half_filled_cache_is_finished_and_a_lying_one_made_again(tmp_path):
    from data.manifest import cached
    filled = []

    def fill(array):
        for i in range(len(array)):
            if not array[i].any():
                filled.append(i)
                array[i] = i + 1
                if i == 2 and len(filled) == 3:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "a-1.npy", (5, 2), fill)
    assert cached(tmp_path / "a-1.npy", (5, 2), fill)[:, 0].tolist() == [1, 2, 3, 4, 5] and filled == [0, 1, 2, 3, 4]
    raw = (tmp_path / "a-1.npy").read_bytes()
    (tmp_path / "a-1.npy").write_bytes(raw.replace(b"(5, 2)", b"(5, 9)"))       # a header that lies
    assert cached(tmp_path / "a-1.npy", (5, 2), fill).shape == (5, 2) and len(filled) == 10
    np.save(tmp_path / "a-1.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert cached(tmp_path / "a-1.npy", (5, 2), fill).shape == (5, 2) and len(filled) == 15


def test_benches_print_where_the_time_goes(trained, monkeypatch, capsys):
    import sample
    import train
    from data import bench
    monkeypatch.setattr(bench, "milliseconds", partial(bench.milliseconds, seconds=0.0))
    assert sample.command(sample.parse_flags(["--model", str(trained / "out/distill"), "--bench", "1,2", "--steps", "2", "--seconds", "0.5"])) == 0
    held = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["batch"], r["ω"], r["NFE"]) for r in held["rows"]] == [(1, 1.0, 2), (1, 3.0, 4), (2, 1.0, 2), (2, 3.0, 4)]
    assert all(r[k] > 0 for r in held["rows"] for k in ("text ms", "backbone ms", "VAE ms", "vocoder ms", "whole ms", "RTF", "RTF backbone+VAE"))
    assert train.command(train.parse_flags(["--bench", "3", "--batch_size", "4", "--device", "cpu"])) == 0
    held = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert held["MFU"] == "-" and held["clips/s"] == pytest.approx(4000 / held["step ms"])                # no peak is known for a CPU
    from torch.utils.flop_counter import FlopCounterMode
    model = FlashAudio(fa.PRESETS["toy"])
    with FlopCounterMode(display=False) as counter:
        fa.rectified_flow_loss(model.dit, *torch.zeros(2, 4, 20, 32), torch.rand(4), torch.zeros(4, 16, 128)).backward()
    assert held["GFLOP"] == counter.get_total_flops() / 1e9


def assert_page_is_whole(page: Path, clips: int) -> None:
    """Every player and picture of a listening page has a file that can be played or shown, and a name for who cannot see it."""
    from html.parser import HTMLParser

    import matplotlib.image
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Reader().feed(page.read_text(encoding="utf-8"))
    players, pictures = ([a for tag, a in found if tag == kind] for kind in ("audio", "img"))
    assert len(players) == len(pictures) == clips
    for player, picture in zip(players, pictures):
        rate, wav = wavfile.read(page.parent / player["src"])
        assert len(wav) / rate > 1 and "controls" in player and player["aria-label"] and picture["alt"]
        assert matplotlib.image.imread(page.parent / picture["src"]).shape == (80, len(wav) // 256, 4)
    assert not [a for _, a in found for k in ("src", "href") if "//" in a.get(k, "")]       # nothing from elsewhere


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not here")
def test_a_browser_plays_the_page(trained, tmp_path):
    shutil.copytree(trained / "out/listen", tmp_path / "listen")
    with open(tmp_path / "listen/index.html", "a", encoding="utf-8") as f:
        f.write("""<script>addEventListener("load", async () => {
            const players = [...document.querySelectorAll("audio")], pictures = [...document.images]
            await Promise.all(players.map(a => a.readyState || new Promise(done => a.onloadedmetadata = a.onerror = done)))
            await Promise.all(pictures.map(i => (i.loading = "eager", i.decode().catch(() => 0))))
            document.title = JSON.stringify([players.map(a => a.duration), pictures.map(i => i.naturalWidth)])})</script>""")
    for _ in range(3):                              # on a busy machine the browser's own clock may run out before the files are read
        done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
                               "--virtual-time-budget=30000", "--dump-dom", (tmp_path / "listen/index.html").as_uri()], capture_output=True, text=True)
        title = done.stdout.split("<title>")[1].split("</title>")[0]
        if title.startswith("["):
            break
    players, pictures = json.loads(title)
    assert players == [2.048] * 78 and pictures == [128] * 78 and "CONSOLE" not in done.stderr


def test_evaluation_writes_a_page_and_every_stage_a_sound(trained):
    assert_page_is_whole(trained / "out/listen/index.html", clips=6 * 13)
    for stage in ("vae", "cfm", "rf1", "rf2", "distill"):
        assert {p.name for p in (trained / "out" / stage).glob("*.wav")} == {"tone-number-0.wav", "tone-number-1.wav"}
        held = json.loads((trained / "out" / stage / "config.json").read_text())
        assert {"flashaudio", "python", "torch", "numpy"} <= set(held["versions"]) and held["flags"]["seed"] == 0
    assert (trained / "out/loss.png").stat().st_size > 1000


def test_sample_writes_wavs_and_pictures(trained, tmp_path):
    model = ("--model", trained / "out/distill")
    done = run("sample.py", *model, "tone number 1", "tone number 2", "--n", 2, "--out", tmp_path / "a", "--seed", 5)
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["index.html", *sorted(f"tone-number-{i}-{k}.{e}" for i in (1, 2) for k in (0, 1) for e in ("wav", "png"))]
    assert_page_is_whole(tmp_path / "a/index.html", clips=4)
    assert done.stdout.count("NFE 1") == 4 and "x real time" in done.stdout
    rate, wav = wavfile.read(tmp_path / "a/tone-number-2-1.wav")
    assert rate == 16000 and wav.dtype == np.int16 and wav.shape == (32768,)
    run("sample.py", *model, "tone number 2", "--n", 2, "--out", tmp_path / "b", "--seed", 5)
    assert np.array_equal(wavfile.read(tmp_path / "b/tone-number-2-1.wav")[1], wav)         # whatever else was asked for
    long = run("sample.py", *model, "tone number 2", "a" * 70, "--n", 2, "--out", tmp_path / "c", "--seed", 7)
    assert "only the first 63 bytes" in long.stdout and long.returncode == 0
    assert not np.array_equal(wavfile.read(tmp_path / "c/tone-number-2-1.wav")[1], wav)


GOOD = ["--data", "good/manifest.csv"]
BAD_TRAIN = {                                       # what is typed, and what the line must say
    "--data nowhere.csv": "no such manifest", "--data good": "a folder", "--data column.csv": "no column caption",
    "--data empty.csv": "no usable clips", "--data binary.csv": "not a CSV", "--data latin.csv": "not a CSV in UTF-8",
    "--data bad.csv": "more than 10%", "--data test.csv": "nothing is left to train on", "--data huge.csv": "not a CSV",
    "--data silent.csv": "holds no samples", "--data folder.csv": "1 of 1 clips are bad", "--data nul.csv": "NUL",
    "--data mp3.csv": "torchcodec", "--data nan.csv": "NaN", "--data slow.csv": "samples a second",
    "--learning_rate 1": "unrecognized arguments", "--stage rf3": "'vae', 'cfm', 'rf1', 'rf2', 'distill', 'eval'",
    "--preset huge": "'toy', 'small', 'base', 'large'", "--lr fast": "invalid float", "--batch_size 1.5": "invalid int",
    "--lr -1": "at least 0", "--lr nan": "at least 0", "--lr inf": "at least 0", "--batch_size 0": "at least 1",
    "--cfm_steps -5": "at least 1", "--ema 1.5": "from 0 to 1", "--caption_dropout 2": "from 0 to 1", "--seed -1": "from 0 to",
    "--couplings 0": "at least 1", "--coupling_steps 0": "at least 1", "--anchor_steps -1": "from 0 to", "--eval_clips 1": "at least 2",
    "--mix_exp_a 0": "above 0", "--mix_exp_a 100": "from 0 to 80", "--data onetest.csv": "at least 2 clips", "--sigma_min 2": "from 0 to 1", "--lr_end -0.1": "from 0 to 1", "--warmup 0": "at least 1",
    "--grad_accum 17": "leaves no clip", "--ast somewhere": "--ast needs --clap", "--init public.ckpt --stage vae": "nothing to train",
    "--init public.ckpt --preset toy": "leave --preset out", "--ablate --stage rf1": "--ablate trains every stage", "--ablate long": "'full', 'short'", "--rows 2-RF": "goes with --ablate", "--ablate --recipe measured": "leave",
    "--pairing best": "'immiscible', 'none', 'knn', 'c2ot'", "--pairing_reflow on": "'off', 'before', 'literal'",
    "--rectify cfg": "'anchored', 'cfg_zero', 'plain'", "--rf1_timesteps cosine": "'uniform', 'logit_normal', 'mix_exp'",
    "--device abacus": "cpu, cuda", "--device cuda:77": "not available", "--vocoder wavenet": "griffin-lim, hifigan",
    "--vocoder hifigan:./nowhere": "nowhere", "--vocoder bigvgan:./nowhere": "nowhere", "--text ./nowhere": "nowhere",
    '--init nowhere.ckpt --clap "" --ast ""': "no such checkpoint", '--init pickled.ckpt --clap "" --ast ""': "pickled objects", '--init good/0.wav --clap "" --ast ""': "not read as a checkpoint",
    "--stage rf2": "starts from stage rf1", "--stage eval": "vae", "--out column.csv": "column.csv", "--out taken": "another run is at work",
    "--out torn --stage cfm": "not a readable model", "--out tornjson": "not readable as JSON", "--clap ./nowhere": "nowhere"}
BAD_SAMPLE = {
    "": "nothing to make", "   ": "nothing to make", "rain": "no distilled model", "rain --model good": "no model here",
    "rain --model torn/vae": "not a readable model", "rain --model lying": "describes", "rain --model deep": "1000 layers",
    "--file gone.txt": "no such file", "--file good": "no such file", "--file binary.csv": "UTF-8", "--file blank.txt": "nothing to make",
    "rain --steps 0": "at least 1", "rain --steps one": "invalid int", "rain --n 0": "at least 1", "rain --batch_size 0": "at least 1",
    "rain --seconds 0": "above 0", "rain --seconds nan": "above 0", "rain --guidance nan": "no strength", "rain --seed -1": "from 0 to",
    "rain --model whole --seconds 900": "too long", "rain --model whole --vocoder wavenet": "griffin-lim, hifigan",
    "rain --model whole --device abacus": "cpu, cuda", "rain --model whole --out column.csv": "column.csv", "rain --cfg 3": "unrecognized arguments", "ra\x07in": "no text",
    "--bench 0": "batch sizes", "--bench many": "batch sizes", "rain --preset toy": "goes with --bench", "--bench --preset huge": "'toy', 'small'"}


@pytest.fixture(scope="module")
def corner(tmp_path_factory) -> Path:
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("corner")
    write_clips(folder / "good", 2)
    header, row = "audio_path,caption,split\n", "good/0.wav,a tone,\n"
    for name, text in {"column": "audio_path,text\ngood/0.wav,a tone\n", "empty": header, "bad": header + row + "gone.wav,a tone,\ngood/1.wav,,\n",
                       "test": header + row.replace(",\n", ",test\n"), "onetest": header + row + row.replace(",\n", ",test\n"), "silent": header + "silent.wav,nothing,\n",
                       "folder": header + "good,a tone,\n", "nul": header + "a\0b.wav,a tone,\n", "mp3": header + "a.mp3,a tone,\n",
                       "nan": header + "nan.wav,a tone,\n", "slow": header + "slow.wav,a tone,\n",
                       "huge": header + "good/0.wav," + "x" * 200_000 + ",\n"}.items():
        (folder / f"{name}.csv").write_text(text)
    (folder / "binary.csv").write_bytes(bytes(range(128, 256)))
    (folder / "latin.csv").write_bytes((header + "good/0.wav,Jürgen,\n").encode("latin-1"))
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "a.mp3").write_bytes(b"ID3")
    wavfile.write(folder / "silent.wav", 16000, np.zeros(0, np.int16))
    wavfile.write(folder / "nan.wav", 16000, np.full(999, np.nan, np.float32))
    wavfile.write(folder / "slow.wav", 1, np.zeros(999, np.int16))
    torch.save({"state_dict": {"a": TINY}}, folder / "pickled.ckpt")
    tiny_model().save_pretrained(folder / "whole")
    for name, change in {"lying": {"hidden_size": 2 ** 20}, "deep": {"depth": 10 ** 9}}.items():
        tiny_model().save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "dit": {**config["dit"], **change}}))
    for name in ("torn", "tornjson"):
        tiny_model().save_pretrained(folder / name / "vae")
        torn = folder / name / "vae" / ("model.safetensors" if name == "torn" else "config.json")
        torn.write_bytes(b"\xff" * 8 + torn.read_bytes()[8:99])
    (folder / "taken").mkdir()
    from data.run import lock
    held = lock(folder / "taken")
    yield folder
    held.close()


def one_line(script: str, typed: str, capsys) -> str:
    """What a script says to a command line that it refuses."""
    import sample
    import train
    module = {"train.py": train, "sample.py": sample}[script]
    try:
        code = module.command(module.parse_flags(shlex.split(typed) if typed.strip() else [typed] * bool(typed)))
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"{script}: "), said
    return said


@pytest.mark.parametrize("script, typed", [*(("train.py", case) for case in BAD_TRAIN), *(("sample.py", case) for case in BAD_SAMPLE)])
def test_wrong_input_is_refused_in_one_line(corner, monkeypatch, capsys, script, typed):
    monkeypatch.chdir(corner)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if script == "train.py" and "--data" not in typed:
        typed += " --data good/manifest.csv" + (" --out fresh" if "--out" not in typed else "")
    expected = BAD_TRAIN.get(typed.split(" --data good/")[0], BAD_TRAIN.get(typed)) if script == "train.py" else BAD_SAMPLE[typed]
    assert expected in one_line(script, typed, capsys)
    assert not list(corner.glob("fresh/*/model.safetensors"))


def test_the_scripts_refuse_wrong_input_without_a_traceback(corner):
    for script, *flags in (("train.py", "--data", "column.csv"), ("sample.py", "rain", "--model", "good")):
        done = run(ROOT / script, *flags, cwd=corner)
        assert done.returncode == 2 and done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1


def test_help_answers_at_once():
    for script in ("train.py", "sample.py"):
        code = f"import runpy, sys; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}', run_name='__main__')\n" \
               "except SystemExit: pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        done = run("-c", code)
        assert done.returncode == 0 and "--steps" in done.stdout or "--cfm_steps" in done.stdout, done.stderr


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda t: ("audio_path,caption\n" + t).encode("utf-8", "surrogatepass"))))
def test_any_manifest_is_read_or_refused(content):
    from data.manifest import read_manifest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.csv"
        path.write_bytes(content)
        try:
            rows, problems = read_manifest(path)
        except InputError as e:
            assert "\n" not in str(e)
            return
        assert all(row["caption"].strip() and row["audio_path"] and "\0" not in row["audio_path"] for row in rows)
        for row in rows:                            # absolute paths, "..", quotes, newlines: a file, or none
            os.path.exists(row["audio_path"])


@settings(max_examples=80, deadline=None)
@given(channels=st.integers(0, 2 ** 16 - 1), rate=st.integers(0, 2 ** 32 - 1), bits=st.integers(0, 2 ** 16 - 1), kind=st.sampled_from([0, 1, 3, 65534]),
       align=st.integers(0, 2 ** 16 - 1), claimed=st.sampled_from([0, 1, 64, 2 ** 31 - 1, 2 ** 32 - 1]), body=st.binary(max_size=256))
def test_a_wav_header_may_lie(channels, rate, bits, kind, align, claimed, body):
    import struct
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", claimed, b"WAVE", b"fmt ", 16, kind, channels, rate, rate * align % 2 ** 32, align, bits, b"data", claimed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.wav"
        path.write_bytes(header + body)
        try:
            wav = fa.load_audio(path, 4000)
        except InputError as e:
            assert "\n" not in str(e)
            return
        assert wav.shape == (4000,) and wav.dtype == torch.float32 and wav.isfinite().all()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000, 191_999])
def test_every_rate_is_resampled(tmp_path, rate):
    t = np.arange(rate) / rate
    wavfile.write(tmp_path / "a.wav", rate, (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32))
    wav = fa.load_audio(tmp_path / "a.wav", 8000)
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(8000) / 16000)
    assert (wav - expected)[200:].abs().max() < 2e-3


def test_a_silent_or_constant_clip_is_trained_on(tmp_path):
    manifest = write_clips(tmp_path / "clips", 4)
    wavfile.write(tmp_path / "clips/0.wav", 16000, np.zeros(16000, np.int16))
    wavfile.write(tmp_path / "clips/1.wav", 16000, np.full(16000, 9000, np.int16))
    done = run("train.py", "--data", manifest, "--out", tmp_path / "out", *QUICK, "--stage", "vae")
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert losses and all(math.isfinite(x) for x in losses)


def test_a_loss_that_is_not_finite_stops_the_run(trained, tmp_path, monkeypatch, capsys):
    import train
    shutil.copytree(trained / "out", tmp_path / "out")
    before = (tmp_path / "out/cfm/model.safetensors").read_bytes()
    real = fa.rectified_flow_loss
    monkeypatch.setattr(fa, "rectified_flow_loss", lambda *args: real(*args) * math.nan)
    code = train.command(train.parse_flags([str(f) for f in ("--data", trained / "clips/manifest.csv", "--out", tmp_path / "out", *QUICK, "--stage", "cfm",
                                                             "--lr", 1e-4)]))
    said = capsys.readouterr().err
    assert code == 2 and "cfm: loss nan" in said and "at step 4" in said and "last good checkpoint" in said and said.count("\n") == 1
    assert (tmp_path / "out/cfm/model.safetensors").read_bytes() == before


def test_an_exploding_gradient_is_named(trained, tmp_path, monkeypatch, capsys):
    import train
    norms = iter([1.0] * 29 + [500.0])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **more: torch.tensor(next(norms)))
    assert train.command(train.parse_flags(["--data", str(trained / "clips/manifest.csv"), "--out", str(tmp_path / "out"), "--stage", "vae",
                                            "--vae_steps", "30", "--vae_batch_size", "2"])) == 0
    assert "the gradient exploded at step 30: norm 500, usually 1; it is clipped" in capsys.readouterr().out


def test_odd_clips_are_used_and_bad_ones_are_counted(tmp_path):
    from data.manifest import Data
    write_clips(tmp_path, 12)
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    wavfile.write(tmp_path / "0.wav", 44100, np.stack([tone, tone], 1).astype(np.float32))  # stereo, 44.1 kHz, float
    wavfile.write(tmp_path / "1.wav", 8000, (tone[:8000] * 127 + 128).astype(np.uint8))     # 8 bit, 8 kHz
    wavfile.write(tmp_path / "2.wav", 16000, (tone[:160] * 32767).astype(np.int16))         # 10 ms
    (tmp_path / "3.wav").write_bytes(b"RIFF")                                               # unreadable: 1 of 13
    with open(tmp_path / "manifest.csv", "a", encoding="utf-8") as f:
        f.write('4.wav,"ein ""Ton"" für Jürgen, leise"\n')
    data = Data(tmp_path / "manifest.csv", tmp_path / "cache", 32)
    assert len(data.train) == 12 and 3 not in data.train and data.captions[-1] == 'ein "Ton" für Jürgen, leise'
    expected = fa.mel_spectrogram(fa.load_audio(tmp_path / "0.wav", 32 * 256)[None])[0]
    torch.testing.assert_close(torch.tensor(data.mels[0]), expected)
    key = data.key
    wavfile.write(tmp_path / "3.wav", 16000, np.zeros(16000, np.int16))
    again = Data(tmp_path / "manifest.csv", tmp_path / "cache", 32)                         # the cache follows the files
    assert again.key != key and len(again.train) == 13 and again.mels[3].max() == -5
    assert len(list((tmp_path / "cache").glob("mels-*.npy"))) == 1


# ---- the toy set ------------------------------------------------------------------------------------------------------------

def test_toy_splits_share_nothing_and_test_holds_new_combinations(tmp_path):
    from data import toy
    rows = list(csv.DictReader(open(toy.write_toy_set(tmp_path / "a", 300, 60), encoding="utf-8")))
    kinds = lambda split: {toy.SCENES[toy.scene_index(r["scene"])] for r in rows if r["split"] == split}
    assert not kinds("train") & toy.HELD_OUT and len(kinds("test") & toy.HELD_OUT) > 5
    clips = [(tmp_path / "a" / r["audio_path"]).read_bytes() for r in rows]
    assert len(set(clips)) == len(clips) == 360
    words = lambda split: {w for r in rows if r["split"] == split for w in r["caption"].replace(",", "").split()}
    assert words("test") - words("train") and all(len(r["caption"].encode()) <= 60 for r in rows)
    again = toy.write_toy_set(tmp_path / "b", 300, 60)
    assert again.read_bytes() == (tmp_path / "a/manifest.csv").read_bytes()
    assert all((tmp_path / "b" / r["audio_path"]).read_bytes() == clip for r, clip in zip(rows, clips))


def test_the_toy_judge_hears_real_clips_and_refuses_to_judge_below_its_bar(judge_file, tmp_path):
    from data import toy
    rows = [r for r in csv.DictReader(open(toy.write_toy_set(tmp_path, 0, 128), encoding="utf-8"))]
    wav, scenes = torch.stack([fa.load_audio(tmp_path / r["audio_path"]) for r in rows]), [r["scene"] for r in rows]
    judge = toy.train_judge(judge_file)
    assert toy.check_judge(judge, wav, scenes) >= 0.95
    embedding, posterior = judge.judge(wav)
    assert embedding.shape == (128, 64) and torch.allclose(posterior.exp().sum(1), torch.ones(128), atol=1e-4)
    vocoded = torch.cat([fa.griffin_lim(mel) for mel in fa.mel_spectrogram(wav).split(16)])
    assert toy.check_judge(judge, vocoded, scenes, bar=0) >= 0.9
    claims = [ok for w, s in zip(wav.numpy(), scenes) for ok in toy.measure(w, s).values()]
    assert len(claims) > 20 and np.mean(claims) >= 0.97
    with pytest.raises(InputError, match="below"):
        toy.check_judge(judge, torch.randn(32, toy.SAMPLES, generator=rng()), scenes[:32])


def test_what_the_caption_names_is_measured_and_can_be_wrong():
    from data import toy
    wav = lambda scene: toy.synthesise(scene, np.random.default_rng(0))
    assert toy.measure(wav("chirp:up"), "chirp:up") == {"direction": True}
    assert toy.measure(wav("chirp:up"), "chirp:down") == {"direction": False}
    assert toy.measure(wav("knocks:3"), "knocks:3") == {"count": True}
    assert toy.measure(wav("knocks:2"), "knocks:3") == {"count": False}
    assert toy.measure(wav("bell>rain"), "bell>rain") == {"order": True}
    assert toy.measure(wav("rain>bell"), "bell>rain") == {"order": False}
