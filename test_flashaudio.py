"""The method's specification, by value, in the order of flashaudio.py: closed forms, brute force,
parity with public fixtures. Algebra is compared in float64, everything else within a bound whose
reason stands beside it: no value depends on the processor."""

import itertools
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from scipy.special import logit
from scipy.stats import kstest, norm
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import flashaudio as fa
from flashaudio import FlashAudio, InputError, TextConfig
from tests.helpers import ROOT, TINY, assert_parity, fixture, randn, rng, tiny_model


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


@pytest.mark.parametrize("steps", [1, 3, 24])
def test_euler_and_guidance_by_value(steps):
    z0, context, null = points()
    v, w = context[:, 0], null[:, 0]
    field = Field(lambda z, t, c: c[:, 0])
    sample = partial(fa.euler_sample, z0=z0, context=context, null=null, steps=steps)
    almost = partial(assert_close, atol=1e-5, rtol=0)   # t is float32
    almost(sample(field), z0 + v)
    for guidance in (0.0, 3.0):
        almost(sample(field, guidance=guidance), z0 + guidance * v + (1 - guidance) * w)
    assert [len(z) for z, _, _ in field.calls] == steps * [2] + 2 * steps * [4]     # ω = 1: half
    almost(sample(lambda z, t, c: z), z0 * (1 + 1 / steps) ** steps)
    path = sample(lambda z, t, c: t[:, None] * v, return_trajectory=True)
    almost(path[-1], z0 + v * (steps - 1) / (2 * steps))                # the sum of i / steps²
    assert path.shape == (steps + 1, 2, 3) and torch.equal(path[0], z0)


def test_the_time_grid_is_that_of_the_public_sampler():
    """1000 t, rounded down, as the public code prints it: some of its float32 are a bit too low."""
    low = {25: (5, 9, 10), 50: (5, 9, 10, 15, 18, 20, 23)}
    for steps in (1, 2, 4, 8, 10, 24, 25, 50):
        grid = fa.time_grid(steps)
        told = [1000 * i // steps - (i in low.get(steps, ())) for i in range(steps)]
        assert (1000 * grid[:-1]).floor().tolist() == told and grid[0] == 0 and grid[-1] == 1
        assert_close(grid, torch.linspace(0, 1, steps + 1), atol=6e-8, rtol=0)     # its last bit
    field = Field()
    fa.euler_sample(field, *(x.bfloat16() for x in points()), steps=25)     # t stays float32
    assert torch.equal(torch.stack([t[0] for _, t, _ in field.calls]), fa.time_grid(25)[:-1])


# ---- Anchored optimisation -----------------------------------------------------------------------

def test_anchored_loss_by_value():
    anchor, z, v_cond, v_null = (randn(3, 2, 4, seed=seed) for seed in range(4))
    loss = fa.anchored_cfg_loss(anchor, z, v_cond, v_null, 5.0, 0.1)
    assert_close(loss, (anchor - z - 0.1 * (5 * v_cond - 4 * v_null)).pow(2).mean((1, 2)))
    assert fa.anchored_cfg_loss(z + 0.1 * v_cond, z, v_cond, v_cond, 5.0, 0.1).max() < 1e-25


def test_each_null_context_moves_by_itself_until_it_is_near_enough():
    """Or until a step would not bring it nearer; its rate is in units of its size."""
    z, t, context = randn(5, 3), torch.full((5,), 0.5), randn(5, 1, 3, seed=1)
    start = context + torch.tensor([0, 0.02, 0.05, 0.2, 1])[:, None, None]
    v_cond = Field()(z, t, context)
    anchor = z + 0.25 * v_cond
    enough = (0.25 * 2 * 1.5 * 0.015) ** 2              # ∅ within 0.015 of c

    def optimise(rows: list[int], iterations: int, lr: float, field: Field = Field()):
        given = [x[rows] for x in (start, anchor, z, t, v_cond)]
        return fa.optimise_null(field, *given, 3.0, 0.25, iterations, lr, enough)

    everyone = [0, 1, 2, 3, 4]
    moved, v_null = optimise(everyone, 1, 0.01)
    step = 0.01 * start.square().mean((1, 2)).sqrt()    # an Adam's first is as long as its rate
    step[0] = 0                                         # is near enough as it is
    assert_close((moved - start).abs(), step[:, None, None].expand(5, 1, 3), rtol=1e-4, atol=0)
    assert_close(v_null, Field()(z, t, moved))
    assert torch.equal(optimise([0, 1, 2], 8, 0.1)[0], start[:3])       # would overshoot
    moved, _ = optimise(everyone, 8, 0.01)
    for i, calls in zip(everyone, (1, 3, 5, 9, 9)):     # in company as alone
        field = Field()
        assert_close(moved[[i]], optimise([i], 8, 0.01, field)[0])
        assert len(field.calls) == calls


@pytest.mark.parametrize("padding", [0, 6])
@torch.no_grad()
def test_anchoring_does_the_same_to_contexts_of_any_size(padding):
    """The network norms its contexts. Tokens of zeros, as a frozen text model pads, stay zeros."""
    dit, z, t = tiny_model().dit.double(), randn(4, 20, 16), torch.full((4,), 0.25)
    context, null = randn(4, 8, 32, seed=1), randn(4, 8, 32, seed=2)
    context[:, 8 - padding:] = null[:, 8 - padding:] = 0
    kept = []
    for size in (0.05, 1.0, 20.0):
        v_cond, v_null = dit(z, t, size * context), dit(z, t, size * null)
        anchor = z + v_cond / 4
        eq10 = partial(fa.anchored_cfg_loss, anchor, z, v_cond, guidance=3.0, dt=0.25)
        moved, v = fa.optimise_null(dit, size * null, anchor, z, t, v_cond, 3.0, 0.25, 3, 0.05, 0.0)
        assert (eq10(v) < eq10(v_null)).all() and not moved[:, 8 - padding:].any()
        gap = v_cond - v_null
        kept.append((((fa.cfg(v, v_cond, 3.0) - v_cond) * gap).sum() / gap.pow(2).sum()).item())
    assert kept == pytest.approx(3 * [kept[1]], rel=0.05) and kept[1] < 1.9     # of ω - 1 = 2


@pytest.mark.parametrize("steps", [4, 50])
def test_each_step_has_its_rate_and_its_threshold(monkeypatch, steps):
    """Rate lr (1 - t/2); near enough is tolerance (1 + 100 t) (50 dt)²; ∅ is carried on."""
    def optimise(model, *given, real=fa.optimise_null):
        calls.append((given, real(model, *given)))
        return calls[-1][1]

    monkeypatch.setattr(fa, "optimise_null", optimise)
    calls, (z0, context, null) = [], points()
    path = fa.anchored_sample(Field(), z0, context, null, steps, 3.0, 2, 0.02, 1e-3, True)
    unguided = fa.euler_sample(Field(), z0, context, steps=steps, return_trajectory=True)
    for i, (given, (moved, v_null)) in enumerate(calls):
        t = torch.full((2,), i / steps)
        v_cond = Field()(path[i], t, context)
        assert_close(given[:5], (null, unguided[i + 1], path[i], t, v_cond), atol=1e-5, rtol=0)
        numbers = 3, 1 / steps, 2, 0.02 * (1 - i / steps / 2)
        enough = 1e-3 * (1 + 100 * i / steps) * (50 / steps) ** 2
        assert given[5:] == pytest.approx((*numbers, enough))
        assert_close(path[i + 1], path[i] + (3 * v_cond - 2 * v_null) / steps, atol=1e-5, rtol=0)
        null = moved
    assert len(calls) == steps and not path.requires_grad


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


@torch.no_grad()
def test_parity_dit_sampler_and_objective():
    io, flow = fixture("dit_io"), fixture("cfm_io")
    config = fa.DiTConfig(context_dim=48, hidden_size=64, num_heads=4, depth=2)
    dit, whole = fa.DiT(config), fa.DiT(replace(config, integer_time=True))     # rounds 1000 t down
    for model in (dit, whole):
        model.load_state_dict(fixture("dit_weights"))
    assert_parity(dit(io["x"], io["t"] / 1000, io["context"]), io["v"])
    assert_parity(dit(io["x"], io["t_frac"] / 1000, io["context"]), io["v_frac"])
    rounded = dit(io["x"], io["t_frac"].floor() / 1000, io["context"])
    assert_parity(whole(io["x"], io["t_frac"] / 1000, io["context"]), rounded)
    assert (rounded - io["v_frac"]).abs().max() > 1e-4
    loss = fa.rectified_flow_loss(dit, flow["train_noise"], flow["train_x1"],
                                  flow["train_t"] / 1000, flow["cond"], sigma_min=1e-4)
    assert_parity(loss, flow["train_loss"])
    sample = partial(fa.euler_sample, whole, flow["x0"], flow["cond"], flow["uncond"], guidance=3.0)
    assert_parity(sample(steps=4, return_trajectory=True), flow["trajectory"])
    assert_close(sample(steps=25), flow["final_26_points"], atol=3e-5, rtol=0)  # 50 evaluations


@torch.no_grad()
def test_the_backbone_starts_at_zero_and_runs_at_every_precision():
    z, t, context = randn(2, 20, 16).float(), torch.tensor([0.3, 0.9]), randn(2, 8, 32).float()
    assert not fa.DiT(TINY.dit)(z, t, context).any()
    v = tiny_model().dit(z, t, context)
    for dtype, bound in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):         # of the largest
        other = tiny_model().dit.to(dtype)(z.to(dtype), t, context.to(dtype))
        assert other.dtype == dtype and (other - v).abs().max() < bound * v.abs().max()
    z, context = z[:1, :, :1].expand(-1, -1, 16), context[:1, :1]       # frames tell no place
    for told in (False, True):
        dit = tiny_model(config=replace(TINY, dit=replace(TINY.dit, absolute_positions=told))).dit
        v = dit(z, t[:1], context)
        assert ((v - v[..., :1]).abs().max() > 0.1) == told


@torch.no_grad()
def test_training_starts_where_the_decoder_hears_the_latent():
    mel = 1.7 * torch.randn(8, 80, 64, generator=rng()) - 3
    vae, band = tiny_model(config=fa.SIZES["toy"]).vae, mel.mean((0, 2))
    vae.center(band)
    mean, logvar = vae.encode(mel)
    nothing, latent = vae.decode(0 * mean), vae.decode(mean)
    assert 0.5 < mean.std() < 2 and (logvar == -4).all() and 0.5 < (latent - nothing).std() < 3
    assert_close(nothing, band[:, None].expand_as(nothing))
    heard = vae.encoder.conv_in(band[None, :, None].expand(1, 80, 16))[..., 2:-2]
    assert heard.abs().max() < 1e-4                     # the mean mel is 0 to the encoder
    for layer in vae.modules():
        if isinstance(layer, (fa.ResidualBlock, fa.FrameAttention)):
            assert torch.equal(layer(mel[:, :64]), mel[:, :64])     # adds nothing yet
    for block in fa.DiT(TINY.dit).blocks:
        assert (block.adaLN_modulation[1].bias.view(6, -1)[[2, 5]] == 0.5).all()


@pytest.mark.parametrize("size, count, vae_count", [
    ("small", 73_880_788, 53_469_764), ("base", 197_940_244, 212_958_212),
    ("large", 429_363_860, 212_958_212)])
def test_parameter_counts(size, count, vae_count):
    with torch.device("meta"):
        dit, vae = fa.DiT(fa.SIZES[size].dit), fa.MelVAE(fa.SIZES[size].vae)
    assert sum(p.numel() for p in dit.parameters()) == count
    assert sum(p.numel() for p in vae.parameters()) == vae_count


# ---- 3. Sound ------------------------------------------------------------------------------------

def test_mel_by_value_and_in_parity():
    """A click at sample 256 i + 128 is in the middle of frame i; silence is -5."""
    io = fixture("mel_io")
    assert_parity(fa.mel_basis(), io["mel_basis"])
    ours, theirs = 10 ** fa.mel_spectrogram(io["wav"]), 10 ** io["logmel"]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.max()            # a float32 FFT: 2e-6
    wav = torch.zeros(1, 16 * fa.HOP)
    assert (fa.mel_spectrogram(wav) == -5).all()
    wav[0, 8 * fa.HOP + 128] = 2.0                      # is clamped to 1
    mel = fa.mel_spectrogram(wav)
    assert mel.shape == (1, 80, 16) and (mel.argmax(2) == 8).all()
    assert_close(mel[0, :, 8], fa.mel_basis().sum(1).log10(), atol=1e-4, rtol=0)    # a flat 1
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
    model = tiny_model().double()
    state = torch.get_rng_state()
    prompts = ["rain", "a bell", "rain"]
    sample = partial(model.sample_latents, steps=3, guidance=3.0)
    z1 = sample(prompts, seed=3)
    assert torch.equal(z1, sample(prompts, seed=3))
    assert_close(sample("a bell", seed=3), z1[1:2])     # a string is one prompt
    assert_close(sample(("rain", "rain"), seed=3), z1[::2])             # two takes of one prompt
    z0 = torch.stack([torch.randn(20, 16, generator=rng(seed)) for seed in (3, 3, 4)]).double()
    context, null = model.contexts(prompts), model.contexts(["", "", ""])
    by_hand = fa.euler_sample(model.dit, z0, context, null, 3, 3.0)
    assert_close((z1, sample(context, z0=z0)), (by_hand.detach(), z1))
    for other in (sample("rain", seed=4), sample("rain"), z1[2:]):
        assert (other - z1[0]).abs().max() > 0.1
    assert torch.equal(torch.get_rng_state(), state)    # the global generator is left alone
    with torch.device("meta"):                          # as torch.set_default_device does
        assert torch.equal(model.noise(prompts, 3, (20, 16)), z0)
    model.sampler = lambda dit, z0, c, null, *rest: z0 + c.mean() - null.mean() + sum(rest)
    own = sample(prompts, z0=z0, return_trajectory=True)
    assert_close(own, z0 + context.mean() - null.mean() + 7)


def test_bf16_is_for_a_gpu_that_is_made_for_it(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: (*given, enabled))
    for emulates in (lambda including_emulation=True: including_emulation, lambda **_: True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
        half = emulates(including_emulation=False)
        assert fa.autocast(torch.device("cuda")) == ("cuda", torch.bfloat16, half)
        assert fa.autocast(torch.device("cpu")) == ("cpu", torch.bfloat16, False)


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
    {"steps": 0}, {"steps": 1.5}, {"guidance": math.nan}, {"guidance": math.inf}, {"guidance": "3"},
    {"seconds": 0}, {"seconds": math.nan}, {"seconds": 60}, {"prompts": []}, {"prompts": None},
    {"prompts": ["rain", 3]}, {"seed": -1}, {"seed": 2 ** 31}])
def test_what_cannot_be_meant_is_refused_in_one_line(wrong):
    with pytest.raises(InputError) as e:
        tiny_model().generate(**{"prompts": "rain", **wrong})
    assert "\n" not in str(e.value)


def test_any_text_is_read_as_people_type_it_and_what_is_not_read_is_said(recwarn):
    model = tiny_model()
    decomposed = "e\u0301te\u0301 a\u0300 la mer"       # as macOS hands out names
    assert torch.equal(*model.contexts([decomposed, "\u00e9t\u00e9 \u00e0 la mer"]))
    family = "👨\u200d👩\u200d👧 sing"                   # joined by letters of no width
    assert fa.clean_text(f" a\nbell\t\0{family} \n") == f"a bell {family}"
    prompts = ["rain\u00a0on tin", family, "باران می\u200cبارد", "雨\u3000の音"]
    assert model.sample_latents(prompts).shape == (4, 20, 16) and not recwarn
    with pytest.warns(UserWarning, match="only.* 32 bytes are read of: rain, rain"):
        model.generate("rain, " * 10)


def test_a_model_is_saved_loaded_and_uploaded(tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda self, **named: SimpleNamespace(**named))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, repo_id, folder_path, **_:
                        shutil.copytree(folder_path, tmp_path / repo_id))
    monkeypatch.setattr(fa, "snapshot_download", lambda source, revision, token: tmp_path / source)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model(config=replace(TINY, stage="rf2"))
    model.save_pretrained(tmp_path / "folder")
    assert "text-to-audio" in (tmp_path / "folder/README.md").read_text()       # one of the hub
    card = "---\nlibrary_name: flashaudio\n---\n\n# A 2-RF, and its table\n"
    (tmp_path / "folder/README.md").write_text(card)
    z1 = model.sample_latents("rain", 2, 3.0, seed=0)
    FlashAudio.from_pretrained(tmp_path / "folder").push_to_hub("me/flash")
    for source in (tmp_path / "folder", "~/folder", "me/flash"):
        with torch.inference_mode():
            again = FlashAudio.from_pretrained(source)
        assert again.config == model.config and not again.training and again.scale_factor == 0.7
        assert torch.equal(again.sample_latents("rain", 2, 3.0, seed=0), z1)
        assert again.card == card
    with pytest.raises(TypeError, match="torch_dtype"):
        FlashAudio.from_pretrained("~/folder", torch_dtype=torch.float16)


def test_what_is_no_model_is_refused_in_one_line(tmp_path, monkeypatch):
    def refusal(source) -> str:
        with pytest.raises(InputError, match="^.*$") as e:
            FlashAudio.from_pretrained(source)
        return str(e.value)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for mistyped in (tmp_path / "gone", "toy/distil", "out/toy/distil"):
        assert f"{mistyped}: no such folder, nor had from the hub" in refusal(mistyped)
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = file.read_text()
    for lie, said in (('"depth": 2', '"dit.blocks.1.attention.gate"'), ('"depht": 1', "'depht'"),
                      ('"depth"', "not a readable model")):
        file.write_text(content.replace('"depth": 1', lie))
        assert said in refusal(tmp_path)
    file.write_text(content)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "not a readable model" in refusal(tmp_path)
    weights.unlink()
    assert "model.safetensors" in refusal(tmp_path)


# ---- The house -----------------------------------------------------------------------------------

FLOORS = {"flashaudio": 0, "pretrained": 1, "runs": 2, "data": 3, "evaluation": 4, "train": 5,
          "sample": 5, "experiments": 6}


def test_arrows_point_to_flashaudio():
    for path in ROOT.rglob("*.py"):
        importer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if importer not in FLOORS:
            continue
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE):
            assert name == importer or FLOORS.get(name, -1) < FLOORS[importer], (path, name)
        for trick in ("sys.path", "sys.modules", "import_module", "__import__", "noqa"):
            assert trick not in source, (path, trick)
