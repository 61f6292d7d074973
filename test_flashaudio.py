"""The method's specification, by value, in the order of flashaudio.py: closed forms, brute force,
parity with public fixtures. Algebra is compared in float64, everything else within a bound whose
reason stands beside it: no value depends on the processor."""

import ast
import itertools
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from graphlib import TopologicalSorter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from scipy.linalg import sqrtm
from scipy.special import logit
from scipy.stats import kstest, norm
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import flashaudio as fa
from flashaudio import FlashAudio, InputError, TextConfig
from tests.helpers import ROOT, TINY, assert_parity, fixture, public_fixtures, rng, tiny_model


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def points() -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 3), randn(2, 1, 3, seed=1), randn(2, 1, 3, seed=2)  # z0, context, ∅


class Field:
    """A velocity that remembers its calls; by default one of z (B, D) and context (B, 1, D)."""

    def __init__(self, velocity=lambda z, t, c: (1 + t[:, None]) * c[:, 0] + 0.5 * z):
        self.velocity, self.calls = velocity, []

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls.append((z, t, context.detach().clone()))
        return self.velocity(z, t, context)


# ---- 1. The flow: timesteps, pairing, losses -----------------------------------------------------

@pytest.mark.parametrize("draw, cdf", [
    (fa.uniform, lambda t: t),
    (fa.logit_normal, lambda t: norm.cdf(logit(t))),
    (partial(fa.logit_normal, mean=-0.5, std=0.7), lambda t: norm.cdf((logit(t) + 0.5) / 0.7)),
    (fa.mix_exp, lambda t: 0.5 + (np.exp(4 * t) - np.exp(4 - 4 * t)) / (2 * np.expm1(4))),
    (partial(fa.mix_exp, a=1), lambda t: 0.5 + (np.exp(t) - np.exp(1 - t)) / (2 * np.expm1(1)))])
def test_timesteps_follow_their_densities(draw, cdf):
    t = draw(20_000, generator=rng()).double().numpy()
    assert kstest(t, cdf).pvalue > 0.01 and t.min() >= 0 and t.max() <= 1      # of this one seed


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_pairing_equals_brute_force(size):
    stretch = torch.arange(1, size + 1)[:, None, None]  # so that squared distances pair otherwise
    z0, z1 = stretch * randn(size, 3, 4, seed=size), stretch * randn(size, 3, 4, seed=10 + size)

    def total(noise: Tensor) -> float:
        return (z1 - noise).flatten(1).norm(dim=1).sum().item()

    paired = fa.immiscible_pairing(z0, z1)
    best = min(total(z0[list(order)]) for order in itertools.permutations(range(size)))
    assert total(paired) == pytest.approx(best, abs=1e-3)       # distances are made in float32
    assert torch.equal(paired.flatten(1).sort(0).values, z0.flatten(1).sort(0).values)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_losses_by_value(sigma_min):
    z0, z1, context = randn(5, 2, 3), randn(5, 2, 3, seed=1), randn(5, 1, 4, seed=2)
    t = torch.linspace(0, 1, 5).double()
    s = t[:, None, None]
    noise = (1 - sigma_min) * z0
    flow = Field(lambda z, t, c: z1 - noise + 0.5)      # half beside the true velocity
    loss = fa.rectified_flow_loss(flow, z0, z1, t, context, sigma_min)
    assert loss.item() == pytest.approx(0.25)
    assert_close(flow.calls, [(s * z1 + z0 - s * noise, t, context)])
    one_step = Field(lambda z, t, c: z1 - z0 + 0.5)
    assert fa.distill_loss(one_step, z0, z1, context).item() == pytest.approx(0.25)
    assert_close(one_step.calls, [(z0, 0 * t, context)])


def test_a_gaussian_goes_the_whole_way_in_closed_form():
    """Data N(2, 1/4): flow, couplings, reflow and one step, where all of them are known."""
    mean, std = 2.0, 0.5
    z0, z1 = randn(100_000, 1), mean + std * randn(100_000, 1, seed=1)

    def flow(z: Tensor, t: Tensor, context: Tensor) -> Tensor:          # E[z1 - z0 | z_t = z]
        slope = (t * std ** 2 + t - 1) / ((1 - t) ** 2 + (t * std) ** 2)
        return mean + slope[:, None] * (z - t[:, None] * mean) + off

    def straight(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return mean + (std - 1) * (z - t[:, None] * mean) / (1 - t + t * std)[:, None]

    for t, off in itertools.product((0.0, 0.3, 0.8), (-0.5, 0.5, 0.0)):     # the last is exact
        times = z0.new_full((len(z0),), t)
        loss = fa.rectified_flow_loss(flow, z0, z1, times, None).item()
        least = std ** 2 / ((1 - t) ** 2 + (t * std) ** 2)              # Var(z1 - z0 | z_t)
        assert loss == pytest.approx(least + off ** 2, abs=0.03)        # 5 sigma
        assert fa.rectified_flow_loss(straight, z0, mean + std * z0, times, None) < 1e-12
    z0 = z0[:999]
    ends = fa.make_couplings(flow, z0, None, None, 500)
    assert_close(ends, mean + std * z0, atol=0.03, rtol=0)              # an error of 1 / steps
    assert_close(fa.euler_sample(straight, z0, None), mean + std * z0)


def test_guidance_extrapolates_from_the_null_context():
    z, context, null = points()
    t = torch.tensor([0.25, 0.75])
    field = Field()
    v_cond, v_null = Field()(z, t, context), Field()(z, t, null)
    assert torch.equal(fa.guided_velocity(field, z, t, context, None, 1.0), v_cond)
    for guidance in (0.0, 3.0):
        v = fa.guided_velocity(field, z, t, context, null, guidance)
        assert_close(v, (1 - guidance) * v_null + guidance * v_cond)
    assert [len(z) for z, _, _ in field.calls] == [2, 4, 4]             # ω = 1 costs half


@pytest.mark.parametrize("steps", [1, 3, 24])
def test_euler_by_value(steps):
    z0, context, null = points()
    v, w = context[:, 0], null[:, 0]
    sample = partial(fa.euler_sample, z0=z0, context=context, null=null, steps=steps)
    almost = partial(assert_close, atol=1e-5, rtol=0)   # t is float32
    almost(sample(lambda z, t, c: c[:, 0]), z0 + v)
    almost(sample(lambda z, t, c: c[:, 0], guidance=3.0), z0 + 3 * v - 2 * w)
    almost(sample(lambda z, t, c: z), z0 * (1 + 1 / steps) ** steps)
    path = sample(lambda z, t, c: t[:, None] * v, return_trajectory=True)
    almost(path[-1], z0 + v * (steps - 1) / (2 * steps))                # the sum of i / steps²
    assert path.shape == (steps + 1, 2, 3) and torch.equal(path[0], z0)


def test_the_network_is_told_the_time_in_full_or_as_the_public_sampler_tells_it():
    z0, context, _ = points()
    for integer_time, expected in ((False, 5 / 25), (True, 0.199)):     # 25 float32 steps: 0.19999
        field = Field()
        fa.euler_sample(field, z0.bfloat16(), context.bfloat16(), steps=25,
                        integer_time=integer_time)
        told = torch.stack([t[0] for _, t, _ in field.calls])
        assert told[5].item() == pytest.approx(expected, abs=1e-7)      # bf16 is off by 1e-3
        assert not integer_time or torch.equal(told, (1000 * told).round() / 1000)


# ---- Anchored optimisation -----------------------------------------------------------------------

def test_anchored_loss_by_value():
    anchor, z, v_cond, v_null = (randn(3, 2, 4, seed=seed) for seed in range(4))
    loss = fa.anchored_cfg_loss(anchor, z, v_cond, v_null, 5.0, 0.1)
    assert_close(loss, (anchor - z - 0.1 * (5 * v_cond - 4 * v_null)).pow(2).mean((1, 2)))
    assert fa.anchored_cfg_loss(z + 0.1 * v_cond, z, v_cond, v_cond, 5.0, 0.1).max() < 1e-25


def test_each_null_context_moves_by_itself_until_it_is_near_enough():
    z, t, context = randn(4, 3), torch.full((4,), 0.5), randn(4, 1, 3, seed=1)
    start = context + torch.tensor([0, 0.02, 0.05, 1])[:, None, None]
    v_cond = Field()(z, t, context)
    anchor = z + 0.25 * v_cond
    enough = (0.25 * 2 * 1.5 * 0.015) ** 2              # ∅ within 0.015 of c
    field = Field()
    with torch.no_grad():
        moved, v_null = fa.optimise_null(field, start, anchor, z, t, v_cond, 3.0, 0.25, 8, 0.01,
                                         enough)
    assert_close(v_null, Field()(z, t, moved))
    assert [len(z) for z, _, _ in field.calls] == [4, 3, 2, 2, 2, 1, 1, 1, 1]   # the far ones alone
    for i in range(4):                                  # the same by the book, one by one
        null = start[i:i + 1].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([null], lr=0.01)
        for _ in range(8):
            v_cfg = 3 * v_cond[i] - 2 * Field()(z[i:i + 1], t[i:i + 1], null)
            loss = (anchor[i] - z[i] - 0.25 * v_cfg).pow(2).mean()
            if loss < enough:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_close(moved[i:i + 1], null.detach())


@pytest.mark.parametrize("steps, step", [(4, 0), (4, 3), (50, 10)])
def test_the_threshold_grows_with_t_and_with_the_step(steps, step):
    """Near enough: a loss below tolerance (1 + 100 t) (50 dt)². Only one step has a velocity."""
    z0, context, _ = points()
    t = step / steps
    loss = (2 * 0.1 / steps) ** 2                       # ω = 3, and ∅ is 0.1 away from c
    tolerance = loss / ((1 + 100 * t) * (50 / steps) ** 2)
    for share, moves in ((1.001, 0), (0.999, 1)):
        field = Field(lambda z, when, c: c[:, 0] * ((when - t).abs() < 1e-6)[:, None])
        fa.anchored_sample(field, z0, context, context + 0.1, steps, 3.0, 1, 0.1, share * tolerance)
        calls = 3 * steps - 1                           # the anchor, v_c and v_∅; v_c(z0) is both
        assert len(field.calls) == calls + moves        # v_∅ again


def test_every_step_has_its_rate_and_a_fresh_adam():
    """The first step of an Adam is as long as its rate, in each element: lr (1 - t/2)."""
    z, context, null = points()
    field = Field()
    path = fa.anchored_sample(field, z, context, null, 4, 3.0, 1, 0.02, 0.0, True)
    assert all(torch.equal(c, context) for _, _, c in field.calls[:4])  # the anchor
    for i in range(4):
        t = torch.full((2,), i / 4)
        conditional, before, after = field.calls[3 + 3 * i:6 + 3 * i]
        if i > 0:                                       # v_c(z0) is the anchor's
            assert torch.equal(conditional[2], context) and torch.equal(conditional[1], t)
        assert torch.equal(before[1], t) and torch.equal(before[2], null)
        null = after[2]                                 # carried to the next step
        rate = torch.full_like(null, 0.02 * (1 - i / 8))
        assert_close((null - before[2]).abs(), rate, atol=1e-6, rtol=0)         # Adam's eps
        assert_close(path[i], z)
        z = z + (3 * Field()(z, t, context) - 2 * Field()(z, t, null)) / 4
    assert_close(path[4], z)


def test_anchoring_nears_the_unguided_path_and_moves_the_null_context_alone():
    model = tiny_model().double()
    given = (randn(2, 20, 16), model.contexts(["rain", "a bell"]), model.contexts(["", ""]))
    before = [x.clone() for x in given]
    gaps = []
    for iterations in (0, 3, 30):
        z1 = fa.anchored_sample(model.dit, *given, 4, 5.0, iterations, 0.05, 0.0)
        gaps.append((z1 - fa.euler_sample(model.dit, *given, 4)).norm().item())
    assert gaps[0] > 1.5 * gaps[1] > 2 * gaps[2] and not z1.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(given, before))
    assert all(p.grad is None for p in model.parameters())


def test_couplings_are_guided_and_anchored_as_asked():
    field = Field()
    make = partial(fa.make_couplings, field, *points(), 4)
    anchored = fa.anchored_sample(Field(), *points(), 4, 3.0, 2, 0.3, 1e-3, True)
    guided = fa.euler_sample(Field(), *points(), 4, 3.0, True)
    plain = fa.euler_sample(Field(), *points(), 4)
    assert torch.equal(make(), plain) and torch.equal(make(1.0, 10), plain)
    assert len(field.calls) == 2 * 4                    # at ω = 1 there is nothing to anchor
    assert torch.equal(make(3.0, 0, 0.3, 1e-3, True), guided)
    assert torch.equal(make(3.0, 2, 0.3, 1e-3, True), anchored)
    assert (anchored[-1] - guided[-1]).abs().max() > 0.01


def test_straightness_by_value():
    a, b = randn(4, 3), randn(4, 3, seed=1)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None, None]
    assert fa.straightness(b + t * a) == pytest.approx(0, abs=1e-12)
    curved = t * a + t * (1 - t) * b                    # dZ/dt - (Z1 - Z0) = (1 - 2t) b
    bend = b.pow(2).sum(1).mean().item() / 3 * (1 - 1 / 8 ** 2)         # of 8 secants
    assert fa.straightness(curved) == pytest.approx(bend)


# ---- 2. Networks ---------------------------------------------------------------------------------

@public_fixtures
@torch.no_grad()
def test_parity_vae():
    io, vae = fixture("vae_io"), fa.MelVAE(fa.VAEConfig(channels=32, channel_mult=(1, 2, 2)))
    vae.load_state_dict(fixture("vae_weights"))
    mean, logvar = vae.encode(io["mel"])
    assert_parity(mean, io["mean"])
    assert_parity(logvar, io["logvar"])
    assert_parity(vae.decode(io["z"]), io["decoded"])


def test_vae_loss_by_value():
    mel, noise, mean, spread = (randn(2, 80, 8, seed=seed) for seed in range(4))
    posterior = Normal(mean, (0.5 + spread / 2).exp())
    vae = SimpleNamespace(encode=lambda mel: (mean, 1 + spread), decode=lambda z: 2 * z)
    error = (2 * (mean + posterior.stddev * noise) - mel).pow(2).mean()
    kl = kl_divergence(posterior, Normal(0, 1)).mean()  # in this direction
    for weight in (0.0, 0.03):
        assert_close(fa.vae_loss(vae, mel, noise, weight), error + weight * kl)


@torch.no_grad()
@pytest.mark.parametrize("caption", ["", "a dogs", "étés a b c d"])
def test_a_word_is_the_sum_of_its_bytes_and_pieces(caption):
    """Without layers, a context is the norm of each word's sum, turned by the word's place."""
    text = fa.TextEncoder(TextConfig(max_length=16, layers=0, heads=1), 8).double()
    ids = [byte + 1 for byte in caption.encode()]
    assert text.tokenize([caption + 16 * "é", caption])[1].tolist() == (ids + 16 * [0])[:16]
    words = torch.zeros(4, 8, dtype=torch.float64)      # 16 / 4; the last holds all that follow
    word = start = 0
    for i, byte in enumerate(ids):
        if byte == 1 + ord(" "):                        # begins the next word
            word, start = word + 1, i
        total = text.bytes.weight[byte].clone()
        for k, n in enumerate((3, 4, 5)):
            piece = ([0] * n + ids[start:i + 1])[-n:]
            bucket = sum(held * 389 ** place for place, held in enumerate(piece)) % 2048
            total += text.pieces.weight[2048 * k + bucket]
        words[min(word, 3)] += total
    angle = torch.arange(4)[:, None] * math.pi / 4 * 2.0 ** -torch.arange(4)
    turned = torch.view_as_complex(words.unflatten(1, (4, 2))) * torch.exp(1j * angle)
    expected = nn.functional.layer_norm(torch.view_as_real(turned).flatten(1), (8,))
    assert_close(text([caption])[0], expected, atol=1e-5, rtol=0)       # the turns are float32


@public_fixtures
@torch.no_grad()
def test_parity_dit_sampler_and_objective():
    io, flow = fixture("dit_io"), fixture("cfm_io")
    dit = fa.DiT(fa.DiTConfig(context_dim=48, hidden_size=64, num_heads=4, depth=2))
    dit.load_state_dict(fixture("dit_weights"))
    assert_parity(dit(io["x"], io["t"] / 1000, io["context"]), io["v"])
    assert_parity(dit(io["x"], io["t_frac"] / 1000, io["context"]), io["v_frac"])
    sample = partial(fa.euler_sample, dit, flow["x0"], flow["cond"], flow["uncond"], guidance=3.0,
                     integer_time=True)
    assert_parity(sample(steps=4, return_trajectory=True), flow["trajectory"])
    assert_close(sample(steps=25), flow["final_26_points"], atol=3e-5, rtol=0)  # 50 evaluations
    loss = fa.rectified_flow_loss(dit, flow["train_noise"], flow["train_x1"],
                                  flow["train_t"] / 1000, flow["cond"], sigma_min=1e-4)
    assert_parity(loss, flow["train_loss"])


@torch.no_grad()
def test_the_backbone_starts_at_zero_and_runs_at_every_precision():
    z, t, context = randn(2, 20, 16).float(), torch.tensor([0.3, 0.9]), randn(2, 8, 32).float()
    assert not fa.DiT(TINY.dit)(z, t, context).any()
    dit = tiny_model().dit
    v = dit(z, t, context)
    for dtype, bound in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):         # of the largest
        other = dit.to(dtype)(z.to(dtype), t, context.to(dtype))
        assert other.dtype == dtype and (other - v).abs().max() < bound * v.abs().max()
    with pytest.raises(InputError, match="65 latent frames, but the position table ends at 64"):
        dit(torch.zeros(1, 20, 65), t[:1], context[:1])


@torch.no_grad()
def test_absolute_positions_tell_equal_frames_apart():
    """Frames of one value and a context of one token: attention finds the same at every place."""
    z, t, context = randn(1, 20, 1).expand(-1, -1, 16), torch.zeros(1), randn(1, 1, 32)
    for told in (False, True):
        dit = tiny_model(config=replace(TINY, dit=replace(TINY.dit, absolute_positions=told))).dit
        v = dit.double()(z, t, context)
        assert ((v - v[..., :1]).abs().max() > 0.1) == told


@pytest.mark.parametrize("preset, count, vae_count", [
    ("small", 73_880_788, 53_469_764), ("base", 197_940_244, 212_958_212),
    ("large", 429_363_860, 212_958_212)])
def test_parameter_counts(preset, count, vae_count):
    with torch.device("meta"):
        dit, vae = fa.DiT(fa.PRESETS[preset].dit), fa.MelVAE(fa.PRESETS[preset].vae)
    assert sum(p.numel() for p in dit.parameters()) == count
    assert sum(p.numel() for p in vae.parameters()) == vae_count


# ---- 3. Sound ------------------------------------------------------------------------------------

@public_fixtures
def test_parity_mel():
    io = fixture("mel_io")
    assert_parity(fa.mel_basis(), io["mel_basis"])
    ours, theirs = 10 ** fa.mel_spectrogram(io["wav"]), 10 ** io["logmel"]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.max()            # a float32 FFT: 2e-6


def test_mel_by_value():
    """A click at sample 256 i + 128 is in the middle of frame i; silence is -5."""
    wav = torch.zeros(1, 16 * fa.HOP)
    assert (fa.mel_spectrogram(wav) == -5).all()
    wav[0, 8 * fa.HOP + 128] = 2.0                      # is clamped to 1
    mel = fa.mel_spectrogram(wav)
    assert mel.shape == (1, 80, 16) and (mel.argmax(2) == 8).all()
    assert_close(mel[0, :, 8], fa.mel_basis().sum(1).log10(), atol=1e-4, rtol=0)    # a flat 1
    assert (fa.mel_basis() @ fa.mel_to_magnitude(mel) - 10 ** mel).abs().max() < 1e-3
    with pytest.raises(InputError, match="384 samples is too short"):
        fa.mel_spectrogram(torch.zeros(1, 384))


def test_griffin_lim_keeps_the_mel_the_length_and_the_timing():
    t = torch.arange(32 * 256) / fa.SAMPLE_RATE
    wav = (0.3 * torch.sin(2 * math.pi * 700 * t) * (t > 0.25) * (t < 0.4))[None]
    mel = fa.mel_spectrogram(wav)
    magnitude = fa.mel_to_magnitude(mel)
    fit = (fa.mel_basis() @ magnitude).clamp(min=1e-5).log10() - mel
    assert magnitude.min() >= 0 and fit.abs().mean() < 0.005    # least squares, cut at 0: 0.014
    back = fa.griffin_lim(mel)
    assert back.shape == wav.shape
    assert (fa.mel_spectrogram(back) - mel)[mel > -2].abs().mean() < 0.15       # log10 units: 3 dB
    ours, theirs = ((x[0] ** 2 * t).sum() / (x ** 2).sum() for x in (back, wav))
    assert abs(ours - theirs) < 0.002                   # seconds; a frame is 0.016


# ---- 4. FlashAudio -------------------------------------------------------------------------------

def test_sampling_is_reproducible_and_depends_on_no_company():
    model = tiny_model(config=replace(TINY, integer_time=True)).double()
    state = torch.get_rng_state()
    prompts = ["rain", "a bell", "rain"]
    sample = partial(model.sample_latents, steps=3, guidance=3.0)
    z1 = sample(prompts, seed=3)
    assert torch.equal(z1, sample(prompts, seed=3))
    assert_close(sample("a bell", seed=3), z1[1:2])     # a string is one prompt
    assert_close(sample(("rain", "rain"), seed=3), z1[::2])             # two takes of one prompt
    z0 = torch.stack([torch.randn(20, 16, generator=rng(seed)) for seed in (3, 3, 4)]).double()
    context, null = model.contexts(prompts), model.contexts(["", "", ""])
    by_hand = fa.euler_sample(model.dit, z0, context, null, 3, 3.0, integer_time=True)
    assert_close((z1, sample(context, z0=z0)), (by_hand.detach(), z1))
    for other in (sample("rain", seed=4), sample("rain"), z1[2:]):
        assert (other - z1[0]).abs().max() > 0.1
    assert torch.equal(torch.get_rng_state(), state)    # the global generator is left alone


def test_a_context_depends_on_its_caption_and_the_present_weights_alone():
    model = tiny_model()
    rain, other = model.contexts(["a bell, then rain", "rain a bell, then"])
    assert rain.shape == (8, 32) and (rain - other).abs().max() > 0.1   # the order of its words
    with torch.autocast("cpu", torch.bfloat16):         # at the precision of the weights
        assert_close(model.contexts(["a bell, then rain"])[0], rain, atol=1e-5, rtol=0)
    model.text(["rain"]).square().sum().backward()
    torch.optim.AdamW(model.text.parameters(), lr=0.1, fused=True).step()
    assert (model.contexts(["a bell, then rain"])[0] - rain).abs().max() > 0.1


def test_generate_decodes_what_is_sampled_and_gives_it_to_the_vocoder():
    model = tiny_model()
    z1 = model.sample_latents("rain", seed=0)
    mel = torch.ones(1, 80, 32)
    assert_close(model.encode(mel), 0.7 * model.vae.encode(mel)[0])
    assert_close(model.decode(z1), model.vae.decode(z1 / 0.7))
    t = torch.tensor([0.5])
    ids = model.text.tokenize(["rain"])
    for text in (ids, model.text(ids)):                 # captions as ids, or their contexts
        assert_close(model(z1, t, text), model.dit(z1, t, model.text(["rain"])))
    wav = model.generate("rain", seed=0)
    assert wav.shape == (1, 32 * 256) and wav.dtype == torch.float32 and wav.abs().max() <= 1
    assert torch.equal(wav, fa.griffin_lim(model.decode(z1)))
    model.vocoder = lambda mel: mel[:, 1]
    assert torch.equal(model.generate("rain", seed=0), model.decode(z1)[:, 1])
    own = partial(model.generate, "rain", seed=0, vocoder=lambda mel: mel[:, 2])
    assert torch.equal(own(), model.decode(z1)[:, 2])
    assert own(seconds=0.25).shape == (1, 16)           # 15.6 frames, 2 at a time
    with pytest.warns(UserWarning, match="1 s is longer than the 0.512 s of training"):
        assert model.latent_shape(1) == (20, 31)


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"steps": 1.5}, {"guidance": math.nan}, {"guidance": math.inf}, {"seconds": 0},
    {"seconds": math.nan}, {"seconds": 60}, {"prompts": []}, {"prompts": ["rain", 3]},
    {"prompts": 3}, {"prompts": None}, {"prompts": "a\0b"}, {"prompts": "a\nb"},
    {"prompts": ["\ud800"]}, {"z0": torch.zeros(2, 20, 16)}, {"z0": torch.zeros(1, 19, 16)},
    {"z0": torch.zeros(20, 16)}, {"z0": torch.zeros(1, 20, 0)}, {"guidance": "3"},
    {"z0": torch.full((1, 20, 16), math.nan)}, {"prompts": torch.zeros(4, 8, 31)},
    {"prompts": torch.zeros(8, 32)}, {"prompts": torch.zeros(1, 0, 32)}])
def test_what_cannot_be_meant_is_refused_in_one_line(wrong):
    with pytest.raises(InputError) as e:
        tiny_model().generate(**{"prompts": "rain", **wrong})
    assert "\n" not in str(e.value)


def test_any_text_is_accepted_and_what_is_not_read_is_said(recwarn):
    model = tiny_model()
    prompts = ["rain\u00a0on tin", "👨\u200d👩\u200d👧 sing", "باران می\u200cبارد", "雨\u3000の音"]
    assert model.sample_latents(prompts).shape == (4, 20, 16) and not recwarn
    with pytest.warns(UserWarning, match="only.* 32 bytes are read of: rain, rain"):
        model.generate("rain, " * 10)


def test_a_model_is_saved_loaded_and_uploaded(tmp_path, monkeypatch):
    def upload(self, repo_id: str, folder_path: str, **_) -> None:
        shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **named: SimpleNamespace(**named))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(fa, "snapshot_download", lambda source, **_: tmp_path / source)
    model = tiny_model(config=replace(TINY, stage="rf2"))
    model.save_pretrained(tmp_path / "folder")
    model.push_to_hub("me/flash")
    z1 = model.sample_latents("rain", 2, 3.0, seed=0)
    for source in (tmp_path / "folder", "me/flash"):
        with torch.inference_mode():
            again = FlashAudio.from_pretrained(source)
        assert again.config == model.config and not again.training and again.scale_factor == 0.7
        assert torch.equal(again.sample_latents("rain", 2, 3.0, seed=0), z1)
    text = TextConfig("make-an-audio", bert={"a": 1}, tokenizers=("x", "y"))
    for config in (*fa.PRESETS.values(), fa.FlashAudioConfig(text=text, integer_time=True)):
        assert fa.FlashAudioConfig(**json.loads(json.dumps(asdict(config)))) == config


def refusal(source) -> str:
    """What from_pretrained says, in one line and soon, without the memory that a size promises."""
    start = time.perf_counter()
    with pytest.raises(InputError) as e:
        FlashAudio.from_pretrained(source)
    assert "\n" not in str(e.value) and time.perf_counter() - start < 5         # 0.05 s, usually
    return str(e.value)


@pytest.mark.parametrize("part, lie, said", [
    ("dit", {"hidden_size": 10 ** 6}, "bytes, model.safetensors holds"),
    ("dit", {"max_len": 3_000_000}, "bytes, model.safetensors holds"),  # a failure is survived, too
    ("text", {"max_length": 10 ** 7}, "bytes, model.safetensors holds"),
    ("dit", {"depth": 10_000}, "more than 1000 layers"),
    ("vae", {"res_blocks": 10_000}, "more than 1000 layers"),
    ("dit", {"depth": 2}, '"dit.blocks.1.attention.gate"'),
    ("dit", {"hidden_size": 64}, "dit.t_embedder.mlp.0.weight"),
    ("dit", {"depht": 1}, "'depht'"), ("", {"frames": -5}, "clips of -5 frames"),
    ("", {"frames": "x"}, "not a readable model")])
def test_a_config_that_lies_is_refused(tmp_path, part, lie, said):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    lying = config[part] if part else config
    lying |= lie
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert said in refusal(tmp_path)


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for mistyped in (tmp_path / "gone", "toy/distil", "out/toy/distil"):
        assert f"{mistyped}: no such folder, nor on the hub" in refusal(mistyped)
    tiny_model().save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2])
        assert "not a readable model" in refusal(tmp_path)
        (tmp_path / name).unlink()
        assert f"no model here ({name} is missing)" in refusal(tmp_path)
        (tmp_path / name).write_bytes(content)


# ---- 5. Measures ---------------------------------------------------------------------------------

def test_measures_by_value():
    x = randn(400, 3) - randn(400, 3).mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T        # mean 0 and covariance 1
    a, b, shift = randn(3, 3, seed=1), randn(3, 3, seed=2), randn(3, seed=3)
    cov_x, cov_y = (a @ a.T).numpy(), (b @ b.T).numpy()
    expected = shift.pow(2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    distance = fa.frechet_distance(x @ a.T, x @ b.T + shift)
    assert distance == pytest.approx(expected.item(), rel=1e-6)
    assert 0 <= fa.frechet_distance(x, x) < 1e-9        # not below zero, by rounding
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    nats = 0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert fa.kl_divergence(p.log(), q.log()) == pytest.approx(nats, rel=1e-5)
    audio, text = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])
    assert fa.clap_score(audio, text) == pytest.approx((1 + 0.5 ** 0.5) / 2)


# ---- The house -----------------------------------------------------------------------------------

FLOORS = {"flashaudio": 0, "pretrained": 1, "runs": 1, "data": 1, "evaluation": 1,
          "train": 2, "sample": 2, "experiments": 3, "tests": 4, "test_flashaudio": 4}


def test_arrows_point_to_flashaudio_and_there_is_no_circle():
    graph, floor = {}, {}
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        folder = module.split(".")[0]
        if folder not in FLOORS:
            continue
        source = path.read_text(encoding="utf-8")
        found = set()
        for node in ast.walk(ast.parse(source)):        # in functions, too
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):        # from data import toy: data and data.toy
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[module] = found
        floor[module] = FLOORS[folder]
        for trick in ("sys.path", "sys.modules", "import_module", "__import__"):
            assert trick not in source or folder in ("tests", "test_flashaudio"), path
    graph = {module: found & set(graph) for module, found in graph.items()}
    assert not graph["flashaudio"] and "train" in graph and "data.clips" in graph
    TopologicalSorter(graph).prepare()                  # raises CycleError, which names the circle
    for module, found in graph.items():
        assert all(floor[other] <= floor[module] for other in found), (module, found)
