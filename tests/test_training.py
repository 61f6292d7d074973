"""Training: what each stage hands to its loss, sampler and optimiser; runs as a person starts,
interrupts, moves and repeats them; and one honest run."""

import copy
import functools
import inspect
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.io import wavfile
from torch import Tensor

import flashaudio as fa
import train
from data import toy
from evaluation.evaluate import evaluate
from evaluation.judges import NearestClip
from flashaudio import FlashAudio, InputError
from runs.run import STAGES, WHERE, Run
from runs.start import initialize
from tests.helpers import (ROOT, TINY, exit_code, opened, rng, run, save_text_model, tiny_model,
                           write_clips)
from tests.test_evaluation import assert_page_is_whole
from tests.test_pretrained import public  # noqa: F401, a fixture

TOY = fa.PRESETS["toy"]
QUICK = """--batch_size 4 --vae_steps 4 --cfm_steps 4 --rf1_steps 3 --rf2_steps 3 --distill_steps 3
    --rf2_couplings 6 --distill_couplings 6 --rf2_coupling_steps 2 --distill_coupling_steps 2
    --eval_clips 6 --device cpu""".split()
# Every flag has a value of its own, so that one taken for another is seen.
FLAGS = """--device cpu --batch_size 4 --warmup 5 --lr 2e-3 --lr_end 0.1 --grad_clip 0.1 --ema 0.9
    --caption_dropout 0.3 --vae_steps 20 --vae_lr 3e-3 --vae_frames 16 --vae_kl_weight 0.01
    --cfm_steps 20 --rf1_steps 20 --rf1_lr 1e-3 --rf2_couplings 6 --rf2_coupling_steps 3
    --rf2_guidance 2.5 --rf2_anchor_steps 2 --rf2_anchor_lr 0.02 --rf2_anchor_tol 1e-6
    --rf2_steps 20 --distill_couplings 9 --distill_coupling_steps 2 --distill_guidance 1.5
    --distill_steps 20 --eval_clips 2 --save_every 0""".split()
PEAK = {"vae": 3e-3, "cfm": 2e-3, "rf1": 1e-3, "rf2": 2e-3, "distill": 2e-3}
PARTS = {"vae": ("vae",), "cfm": ("text", "dit"), "rf1": ("text", "dit"), "rf2": ("dit",),
         "distill": ("dit",)}


@pytest.fixture(scope="module", autouse=True)
def tiny_preset():
    """In this process, preset toy is a tiny model, and main() leaves the evaluation out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fa.PRESETS, "toy", TINY)
        patch.setattr(train, "evaluate", lambda run: None)
        yield


@pytest.fixture(scope="module")
def wired(tmp_path_factory) -> SimpleNamespace:
    """A run of Algorithm 1 on a tiny model, and what its parts were given on the way."""
    folder = tmp_path_factory.mktemp("wired")
    data = write_clips(folder / "clips")
    fits, made = {}, {}

    class AdamW(torch.optim.AdamW):
        def step(self):
            seen, group = fits[list(fits)[-1]], self.param_groups[0]
            seen.rates.append(group["lr"])
            norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
            seen.norms.append(torch.stack(norms).norm().item())
            super().step()
            seen.weights.append([p.detach().clone() for p in group["params"]])

    def fit(run, stage, model, parts, draw, loss, steps, lr, real=train.fit):
        fits[stage] = SimpleNamespace(start=copy.deepcopy(model.state_dict()), draw=draw, loss=loss,
                                      parts=parts, steps=steps, rates=[], norms=[], weights=[])
        return real(run, stage, model, parts, draw, loss, steps, lr)

    def couplings(run, model, stage, real=train.couplings):
        @functools.wraps(fa.make_couplings)
        def sampler(*given):
            calls.append((*given, fa.make_couplings(*given)))
            return calls[-1][-1]
        calls = []
        start = copy.deepcopy(model.state_dict())
        held = real(run, model, stage, sampler)
        made[stage] = SimpleNamespace(start=start, calls=calls, held=held)
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(train, "fit", fit)
        patch.setattr(train, "couplings", couplings)
        with opened("--data", data, "--out", folder / "out", *FLAGS) as run:
            train.main(run)
    models = {stage: FlashAudio.from_pretrained(folder / "out" / stage) for stage in STAGES}
    latents = torch.tensor(run.data.latents(models["vae"])[run.data.file])
    return SimpleNamespace(run=run, out=folder / "out", data=data, fits=fits, made=made,
                           models=models, mean=latents[:, 0], std=latents[:, 1],
                           scale=models["vae"].scale_factor)


def drawn(wired, stage: str, steps: int = 300) -> list[Tensor]:
    """What a stage draws in so many steps, one batch after the other."""
    return [torch.cat(x) for x in zip(*map(wired.fits[stage].draw, range(steps)))]


def clips_of(wired, z1: Tensor) -> Tensor:
    """The row that each latent is of: the nearest posterior mean."""
    return torch.cdist((z1 / wired.scale).flatten(1), wired.mean.flatten(1)).argmin(1)


def same(state: dict, other: dict) -> bool:
    return all(torch.equal(state[name], value) for name, value in other.items())


def apart(model: FlashAudio, other: FlashAudio, start: dict, part: str) -> float:
    """How far the weights of a part are from another's, in lengths of the way from the start."""
    far = way = 0.0
    for name, value in getattr(other, part).state_dict().items():
        far += (getattr(model, part).state_dict()[name] - value).square().sum().item()
        way += (value - start[f"{part}.{name}"]).square().sum().item()
    return math.sqrt(far / way)


def copied(wired, folder: Path, *stages: str) -> list:
    """Some stages of the run and its caches in another folder -> the flags to go on there."""
    for name in ("cache", *stages):
        shutil.copytree(wired.out / name, folder / name)
    return ["--data", wired.data, "--out", folder, *FLAGS]


# ---- The wiring ----------------------------------------------------------------------------------

def test_each_stage_starts_from_the_one_before_and_trains_its_parts(wired):
    before = None
    for stage in STAGES:
        fit, end = wired.fits[stage], wired.models[stage].state_dict()
        assert fit.parts == PARTS[stage] and fit.steps == len(fit.rates) == 20
        assert before is None or same(fit.start, wired.models[before].state_dict())
        for name in ("vae", "text", "dit"):
            part = {k: v for k, v in end.items() if k.startswith(f"{name}.")}
            assert same(fit.start, part) != (name in PARTS[stage]), (stage, name)
        before = stage
    for stage, teacher in (("rf2", "rf1"), ("distill", "rf2")):
        assert same(wired.made[stage].start, wired.models[teacher].state_dict())


@pytest.mark.parametrize("stage, n, steps, guidance", [("rf2", 6, 3, 2.5), ("distill", 9, 2, 1.5)])
def test_couplings_are_made_as_the_flags_say(wired, stage, n, steps, guidance):
    made, data = wired.made[stage], wired.run.data
    teacher = wired.models[{"rf2": "rf1", "distill": "rf2"}[stage]]
    captions = [data.captions[i] for i in data.some(n, 0)]
    assert len(set(captions)) == 6
    z0, context, z1 = (torch.cat([call[i] for call in made.calls]) for i in (1, 2, -1))
    torch.testing.assert_close(context, teacher.contexts(captions))
    for call in made.calls:
        torch.testing.assert_close(call[3], teacher.contexts([""]).expand_as(call[3]))
        assert call[4:-1] == (steps, guidance, 2, 0.02, 1e-6)
    assert torch.equal(made.held.ends(np.arange(n))[0], z0)
    assert torch.equal(made.held.ends(np.arange(n))[1], z1)
    assert np.array_equal(made.held.contexts[made.held.place], context)
    assert abs(z0.std() - 1) < 0.1 and len(z0.flatten(1).unique(dim=0)) == n


def test_what_a_stage_takes_where_nothing_is_given():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert default(train.couplings, "sampler") is fa.make_couplings
    for stage in (train.train_rf1, train.train_rf2):
        assert default(stage, "loss") is fa.rectified_flow_loss
    assert default(train.distill, "loss") is fa.distill_loss
    assert default(train.train_rf1, "pair") is fa.immiscible_pairing


def field(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return z * t.view(-1, 1, 1) + context.mean((1, 2))[:, None, None]


def test_each_stage_has_its_loss(wired):
    z0, z1, context = torch.randn(3, 4, 5, 6, generator=rng(), dtype=torch.float64)
    t = torch.rand(4, generator=rng(1), dtype=torch.float64)
    s = t.view(-1, 1, 1)
    for stage, sigma in (("cfm", 1e-4), ("rf1", 0.0), ("rf2", 0.0)):
        v = field((1 - (1 - sigma) * s) * z0 + s * z1, t, context)
        expected = (z1 - (1 - sigma) * z0 - v).square().mean()
        loss = wired.fits[stage].loss(field, z0, z1, t, context)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected = (z1 - z0 - field(z0, 0 * t, context)).square().mean()
    loss = wired.fits["distill"].loss(field, z0, z1, context)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@torch.no_grad()
def test_the_vae_learns_the_mel_and_kl_of_a_noisy_latent(wired):
    model, mel = tiny_model().double(), torch.randn(2, 80, 32, generator=rng()).double()
    noise = torch.randn(2, 20, 16, generator=rng(1)).double()
    mean, logvar = model.vae.encode(mel)
    posterior = torch.distributions.Normal(mean, logvar.exp().sqrt())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    heard = model.vae.decode(mean + posterior.stddev * noise)
    expected = (heard - mel).square().mean() + 0.01 * kl
    loss = wired.fits["vae"].loss(model, mel, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    _, noise = drawn(wired, "vae")
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert noise.shape == (1200, 20, 8) and len(noise.flatten(1).unique(dim=0)) == 1200


def test_the_vae_hears_pieces_of_every_place(wired):
    pieces = torch.from_numpy(wired.run.data.mels[:]).unfold(2, 16, 1)      # (F, 80, 17, 16)
    starts = set()
    for step in range(60):
        mel, _ = wired.fits["vae"].draw(step)
        match = (pieces == mel[0, None, :, None]).all(3).all(1).nonzero()   # clip, start
        starts.add(match[0, 1].item())
    assert mel.shape == (4, 80, 16) and len(starts) > 5


@pytest.mark.parametrize("stage", ["cfm", "rf1"])
def test_latents_are_of_unit_size_with_noise_of_the_posterior_and_their_caption(wired, stage):
    z0, z1, _, text = drawn(wired, stage)
    clip = clips_of(wired, z1)
    noise = (z1 / wired.scale - wired.mean[clip]) / wired.std[clip]
    assert abs(z1.std() - 1) < 0.02 and abs(wired.scale - 1) > 0.1
    for x in (z0, noise):
        assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    null = ~text.any(1)
    assert null.float().mean().item() == pytest.approx(0.3, abs=0.05)       # 4 standard deviations
    words = wired.models["cfm"].text.tokenize(wired.run.data.captions)
    assert torch.equal(text[~null], words[clip[~null]])


@pytest.mark.parametrize("stage, dropout", [("rf2", 0.3), ("distill", 0.0)])
def test_couplings_are_drawn_whole_with_their_context(wired, stage, dropout):
    held = wired.made[stage].held
    z0, z1, *_, text = drawn(wired, stage)
    noise, end = held.ends(np.arange(len(held.latents)))
    row = torch.cdist(z0.flatten(1), noise.flatten(1)).argmin(1)
    assert torch.equal(z0, noise[row]) and torch.equal(z1, end[row])
    contexts = torch.tensor(held.contexts)
    null = (text == contexts[0]).all(2).all(1)
    assert null.float().mean().item() == pytest.approx(dropout, abs=0.05)
    assert torch.equal(text[~null], contexts[held.place[row[~null]]])


CDF = {"cfm": lambda t: t, "rf1": lambda t: stats.norm.cdf(np.log(t / (1 - t))),
       "rf2": lambda t: 0.5 + (np.exp(4 * t) - np.exp(4 * (1 - t))) / (2 * np.expm1(4))}


@pytest.mark.parametrize("stage", CDF)
def test_t_is_drawn_from_the_density_of_the_stage(wired, stage):
    t = drawn(wired, stage)[2].double().numpy()
    for other, cdf in CDF.items():
        p = stats.kstest(t, cdf).pvalue
        assert p > 0.01 if other == stage else p < 1e-6, other


@pytest.mark.parametrize("stage, share", [("cfm", 1 / 24), ("rf1", 1), ("rf2", 1 / 24)])
def test_the_1rf_alone_pairs_noise_with_data(wired, stage, share):
    near = 0
    for step in range(100):
        z0, z1, *_ = wired.fits[stage].draw(step)
        near += torch.equal(fa.immiscible_pairing(z0, z1), z0)
    assert near == 100 if share == 1 else near < 60     # what the couplings keep is not random


@pytest.mark.parametrize("stage", STAGES)
def test_every_epoch_has_each_clip_once_in_an_order_of_its_own(wired, stage):
    if stage == "vae":
        mels, x = torch.from_numpy(wired.run.data.mels[:]), drawn(wired, stage, 12)[0]
        row = torch.cdist(x.mean(2), mels.mean(2)).argmin(1)                # tones: place is no matter
    elif stage in ("cfm", "rf1"):
        row = clips_of(wired, drawn(wired, stage, 12)[1])
    else:
        noise, _ = wired.made[stage].held.ends(np.arange({"rf2": 6, "distill": 9}[stage]))
        row = torch.cdist(drawn(wired, stage, 18)[0].flatten(1), noise.flatten(1)).argmin(1)
    n = row.max().item() + 1
    epochs = [tuple(epoch) for epoch in row.view(-1, n).tolist()]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(epochs)) > len(epochs) / 2


@pytest.mark.parametrize("stage", STAGES)
def test_rates_clipping_and_average_follow_their_formulas(wired, stage):
    fit, peak = wired.fits[stage], PEAK[stage]
    expected = []
    for step in range(20):
        cosine = (1 + math.cos(math.pi * step / 20)) / 2
        expected.append(peak * min(1, (step + 1) / 5) * (0.1 + 0.9 * cosine))
    assert fit.rates == pytest.approx(expected, rel=1e-6)
    lines = map(json.loads, (wired.out / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["stage"] == stage]
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert line["lr"] == pytest.approx(expected[line["step"] - 1], rel=1e-6)
        clipped = min(0.1, line["grad_norm"])
        assert fit.norms[line["step"] - 1] == pytest.approx(clipped, rel=1e-3)
    assert lines[0]["grad_norm"] > 0.1 and max(fit.norms) < 0.1001
    names = [name for name, _ in wired.models[stage].named_parameters()
             if name.startswith(PARTS[stage])]
    averages = {name: fit.start[name] for name in names}
    for step, weights in enumerate(fit.weights):
        kept = min(0.9, (step + 1) / (step + 10))       # the memory is short at first
        by_part = dict(zip(ordered(wired.models[stage], PARTS[stage]), weights))
        averages = {name: kept * averages[name] + (1 - kept) * by_part[name] for name in names}
    for name in names:
        torch.testing.assert_close(wired.models[stage].get_parameter(name).detach(), averages[name])


def ordered(model: FlashAudio, parts: tuple[str, ...]) -> list[str]:
    """Names of the parameters in the order in which the optimiser has them."""
    names = []
    for part in parts:
        names += [f"{part}.{name}" for name, _ in getattr(model, part).named_parameters()]
    return names


def test_training_starts_where_the_decoder_hears_the_latent(wired):
    clips = torch.from_numpy(wired.run.data.mels[:])
    model = FlashAudio(TINY)
    model.load_state_dict(wired.fits["vae"].start)      # initialize was called, with the mean mel
    band = clips.mean((0, 2))
    torch.testing.assert_close(model.vae.decoder.conv_out.bias.detach(), band)
    assert (model.dit.blocks[0].attention.gate == 0.5).all()
    mel = 1.7 * torch.randn(8, 80, 64, generator=rng()) - 3
    model = FlashAudio(TOY)
    initialize(model, mel.mean((0, 2)))
    vae, band = model.vae, mel.mean((0, 2))
    mean, logvar = vae.encode(mel)
    assert 0.5 < mean.std() < 2 and torch.equal(logvar, torch.full_like(logvar, -4.0))
    nothing, latent = vae.decode(torch.zeros_like(mean)), vae.decode(mean)
    torch.testing.assert_close(nothing, band[:, None].expand_as(nothing))
    assert 0.5 < (latent - nothing).std() < 3
    heard = vae.encoder.conv_in(band[None, :, None].expand(1, 80, 16))[..., 2:-2]
    assert heard.abs().max() < 1e-4                     # the mean mel is 0 to the encoder
    for layer in vae.modules():
        if isinstance(layer, (fa.ResidualBlock, fa.FrameAttention)):
            assert torch.equal(layer(mel[:, :64]), mel[:, :64])             # adds nothing yet
    for block in model.dit.blocks:
        assert (block.adaLN_modulation[1].bias.view(6, -1)[[2, 5]] == 0.5).all()


def test_a_fork_brings_its_own_functions(wired, tmp_path):
    def loss(model, z0, z1, *rest):
        seen.append((z0, z1, *rest))
        return fa.distill_loss(model, z0, z1, rest[-1])

    def density(n, generator=None):
        return torch.full((n,), 0.25)

    def nearer(z0, z1):
        return z1 + 2

    def sampler(model, z0, *_):
        return z0 + 3

    flags, seen = copied(wired, tmp_path, "vae", "cfm", "rf1"), []
    with opened(*flags, "--stage", "rf1") as run:
        train.train_rf1(run, run.load("cfm"), nearer, density, loss)
    assert all(torch.equal(z0, z1 + 2) and (t == 0.25).all() for z0, z1, t, _ in seen)
    with opened(*flags, "--stage", "rf2") as run:
        held = train.couplings(run, run.load("rf1"), "rf2", sampler, nearer)
        assert np.array_equal(held.latents[:, 1], held.latents[:, 0] + 3)
        clips = run.data.some(6, 0)
        near = wired.scale * wired.mean[clips] + 2
        torch.testing.assert_close(held.ends(np.arange(6))[0], near)
        train.train_rf2(run, run.load("rf1"), held, density, loss, nearer)
    with opened(*flags, "--stage", "distill") as run:
        train.distill(run, run.load("rf2"), held, loss)
    assert len(seen) == 60 and len(seen[-1]) == 3
    with opened(*flags) as run, pytest.raises(InputError, match="functions was"):
        train.main(run)                                 # the method's own: another 1-RF


def test_a_flag_that_a_stage_reads_is_among_its_settings(wired, tmp_path, monkeypatch):
    read = set()

    class Watched(train.Flags):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    def unwatched(method):
        def call(*given):
            before = set(read)
            result = method(*given)
            read.clear()
            read.update(before)
            return result
        return call

    for name in ("settings", "write_notes"):            # they ask for all
        monkeypatch.setattr(Run, name, unwatched(getattr(Run, name)))
    with opened("--data", wired.data, "--out", tmp_path, *FLAGS) as run:
        run.flags = Watched(**asdict(run.flags))
        model = held = None
        for stage in STAGES:
            read.clear()
            if stage in ("rf2", "distill"):
                held = train.couplings(run, model, stage)
            work = getattr(train, f"train_{stage}", train.distill)
            given = {"vae": (), "cfm": (model,), "rf1": (model,)}.get(stage, (model, held))
            model = work(run, *given)
            flags = read & {f.name for f in fields(train.Flags)}
            assert {"batch_size", "warmup", "seed", f"{stage}_steps"} <= flags
            assert flags - set(WHERE) <= set(run.notes(stage)["settings"]), stage
    assert len(fields(train.Flags)) <= 42


# ---- Runs: as a person starts them ---------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of all stages on six tones, a few steps each."""
    folder = tmp_path_factory.mktemp("run")
    done = run("train.py", "--data", write_clips(folder / "clips"), "--out", folder / "out", *QUICK)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_runs_every_stage(trained):
    rows = json.loads((trained / "out/results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["real", "vae", *4 * ["cfm"], *3 * ["rf1"],
                                              *3 * ["rf2"], "distill"]
    for stage in STAGES:
        assert FlashAudio.from_pretrained(trained / "out" / stage).config.stage == stage
        assert len(list((trained / "out" / stage).glob("tone-number-*.wav"))) == 2
        assert not (trained / "out" / stage / "train_state.pt").exists()
    assert_page_is_whole(trained / "out/listen/index.html", 6 * 13)
    assert (trained / "out/loss.png").stat().st_size > 1000


def test_a_run_that_was_moved_goes_on_and_other_settings_are_refused(trained, tmp_path):
    """Copied, touched, named by another path, from another directory, where a cluster has left
    its WORLD_SIZE."""
    for name in ("clips", "out"):
        shutil.copytree(trained / name, tmp_path / name)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    kept = [*tmp_path.glob("out/*/model.safetensors"), *tmp_path.glob("out/cache/*.npy")]
    command = [ROOT / "train.py", "--data", "clips/manifest.csv", "--out", "out", *QUICK]
    done = run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT), WORLD_SIZE="2", RANK="1")
    assert done.returncode == 0 and "steps in" not in done.stdout, done.stderr
    assert len(kept) == 10 and all(path.stat().st_mtime == 1 for path in kept), done.stdout
    manifest = tmp_path / "clips/manifest.csv"
    manifest.write_text(manifest.read_text().replace("number 5", "number five"))
    other = run(*command, cwd=tmp_path, WORLD_SIZE="")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "vae was trained with other settings (data was" in other.stderr
    assert all(path.stat().st_mtime == 1 for path in kept)


def test_the_row_of_guidance_three_is_sampled_at_three(wired, tmp_path):
    flags = copied(wired, tmp_path, *STAGES)
    with opened(*flags) as run:
        evaluate(run)
        rows = run.data.held_out(2)
    model = FlashAudio.from_pretrained(tmp_path / "cfm")
    z0 = torch.cat([model.noise([""], seed, model.latent_shape()) for seed in (0, 1)])
    captions = [run.data.captions[i] for i in rows]
    for guidance in (1, 3):
        wav = fa.griffin_lim(model.decode(model.sample_latents(captions, 24, guidance, z0=z0)))
        _, held = wavfile.read(tmp_path / f"listen/0-cfm-24-{guidance}.wav")
        theirs = fa.mel_spectrogram(torch.from_numpy(held / 32767).float()[None])
        gap = (theirs - fa.mel_spectrogram(wav)[:1]).abs().mean()
        assert gap < 0.02, guidance


@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation_gives_the_same_weights_and_couplings(wired, tmp_path, parts):
    """To rounding, which Adam makes a whole step of where a gradient is nothing else, as that of
    keys' biases in attention: a few weights among many."""
    flags = [*copied(wired, tmp_path, "vae"), "--grad_accum", parts, "--batch_size", 4]
    with opened(*flags, "--stage", "cfm") as run:
        model = train.train_cfm(run, run.load("vae"))
        assert apart(model, wired.models["cfm"], wired.fits["cfm"].start, "dit") < 0.02
    with opened(*flags, "--stage", "rf2", "--cfm_steps", 20) as run:
        held = train.couplings(run, wired.models["rf1"], "rf2")
    first = wired.made["rf2"].held
    assert held.key == first.key and np.array_equal(held.latents[:, 0], first.latents[:, 0])
    np.testing.assert_allclose(held.latents[:, 1], first.latents[:, 1], atol=1e-3)


def in_another_process(flags: list, log: Path) -> None:
    """train.py with a tiny preset, its words in `log`."""
    fa.PRESETS["toy"] = TINY
    with open(log, "w") as f:
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    sys.argv = ["train.py", *map(str, flags)]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_six_kills_lose_nothing(wired, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])          # imports torch once
    flags = ["--data", wired.data, "--out", tmp_path / "out", *FLAGS]
    draw, codes = random.Random(0), []
    for kill in range(7):
        process = context.Process(target=in_another_process, args=(flags, tmp_path / "log"))
        process.start()
        while process.exitcode is None and not (tmp_path / "out/.lock").exists():
            time.sleep(0.01)
        if kill < 6:
            process.join(draw.uniform(0, 1.5))
            by = signal.SIGKILL if kill % 2 else draw.choice((signal.SIGTERM, signal.SIGINT))
            if process.exitcode is None:
                os.kill(process.pid, by)
        process.join()
        codes.append(process.exitcode)
        said = (tmp_path / "log").read_text()
        assert process.exitcode in (0, -9, -2, -15, 130, 143) and "Traceback" not in said, said
        if process.exitcode in (130, 143):
            assert said.endswith("train.py: stopped; the same command continues from here\n")
    assert codes[-1] == 0, said
    for stage in STAGES:
        ours = FlashAudio.from_pretrained(tmp_path / "out" / stage)
        assert same(ours.state_dict(), wired.models[stage].state_dict()), (stage, codes)


def test_two_processes_train_like_one(wired, tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text("import runpy, flashaudio\nfrom tests.helpers import TINY\n"
                      "flashaudio.PRESETS['toy'] = TINY\n"
                      "runpy.run_path('train.py', run_name='__main__')\n")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script,
               "--data", wired.data, "--out", tmp_path / "out", *FLAGS, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for stage, part in (("vae", "vae"), ("cfm", "dit"), ("cfm", "text")):
        ours = FlashAudio.from_pretrained(tmp_path / "out" / stage)
        start = wired.fits[stage].start
        assert apart(ours, wired.models[stage], start, part) < 0.05, stage
    pairs = np.load(next((tmp_path / "out/cache").glob("couplings_rf2-*.npy")))
    assert np.array_equal(pairs[:, 0], wired.made["rf2"].held.latents[:, 0])
    assert pairs[:, 1].any((1, 2)).all()                # each was made by one of them
    metrics = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 10                           # one of them writes


# ---- Runs that are interrupted, in this process --------------------------------------------------

def stopped(wired, folder: Path, monkeypatch) -> list:
    """A run that was asked to stop in step 7 of its cfm -> its flags."""
    real, calls = fa.rectified_flow_loss, []

    def loss(*given):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    flags = copied(wired, folder, "vae")
    with monkeypatch.context() as patch:
        patch.setattr(fa, "rectified_flow_loss", loss)
        assert exit_code("train.py", *flags, "--stage", "cfm") == 143
    return flags


def test_a_signal_is_answered_between_two_steps(wired, tmp_path, monkeypatch, capsys):
    flags = stopped(wired, tmp_path, monkeypatch)
    said = capsys.readouterr().err
    assert said == "train.py: stopped; the same command continues from here\n"
    state = tmp_path / "cfm/train_state.pt"
    before = state.read_bytes()
    assert torch.load(state, weights_only=True)["step"] == 7
    assert exit_code("train.py", *flags, "--lr", 0.5) == 2                  # half trained is, too
    said = capsys.readouterr().err
    assert "trained with other settings" in said and said.count("\n") == 1
    assert state.read_bytes() == before
    assert exit_code("train.py", *flags, "--stage", "cfm") == 0
    assert "cfm: continuing at step 7 of 20" in capsys.readouterr().out and not state.exists()
    ours = FlashAudio.from_pretrained(tmp_path / "cfm").state_dict()
    assert same(ours, wired.models["cfm"].state_dict())


@pytest.mark.parametrize("kept", [0, 1000, 0.5])
def test_a_torn_train_state_is_ignored_with_a_line(wired, tmp_path, monkeypatch, capsys, kept):
    flags = stopped(wired, tmp_path, monkeypatch)
    state = tmp_path / "cfm/train_state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:int(kept * len(whole)) if kept < 1 else kept])
    assert exit_code("train.py", *flags, "--stage", "cfm") == 0
    assert f"{state}: cannot be read, so stage cfm begins again" in capsys.readouterr().out
    ours = FlashAudio.from_pretrained(tmp_path / "cfm").state_dict()
    assert same(ours, wired.models["cfm"].state_dict())


def test_a_full_disk_leaves_what_was_good(wired, tmp_path, capsys):
    """Simulated by the largest size that a file of the process may have."""
    import resource
    flags = [*copied(wired, tmp_path, *STAGES), "--stage", "rf2", "--rf2_couplings", 40]
    kept = {path: path.read_bytes() for path in (tmp_path / "rf2").glob("[!t]*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, file in ((50_000, "couplings_rf2"), (300_000, "train_state.pt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert exit_code("train.py", *flags) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert file in said and said.count("\n") == 1, said
        assert all(path.read_bytes() == held for path, held in kept.items())
    with opened(*flags) as run, pytest.raises(OSError, match="model.safetensors: not written"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            run.save("rf2", tiny_model())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(path.read_bytes() == held for path, held in kept.items())
    assert exit_code("train.py", *flags) == 0


def test_a_loss_that_is_not_finite_stops_the_run(wired, tmp_path, monkeypatch, capsys):
    flags = copied(wired, tmp_path, "vae", "cfm")
    before = (tmp_path / "cfm/model.safetensors").read_bytes()
    real = fa.rectified_flow_loss
    monkeypatch.setattr(fa, "rectified_flow_loss", lambda *given: real(*given) * math.nan)
    assert exit_code("train.py", *flags, "--stage", "cfm", "--lr", 1e-4) == 2
    said = capsys.readouterr().err
    assert "cfm: loss nan" in said and "at step 10" in said and said.count("\n") == 1
    assert (tmp_path / "cfm/model.safetensors").read_bytes() == before
    assert not (tmp_path / "cfm/train_state.pt").exists()


def test_an_exploding_gradient_is_named(wired, tmp_path, monkeypatch, capsys):
    norms = iter([1.0] * 19 + [500.0])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    flags = copied(wired, tmp_path)
    assert exit_code("train.py", *flags, "--stage", "vae") == 0
    said = capsys.readouterr().out
    assert "the gradient exploded at step 20: norm 500, usually 1; it is clipped" in said


# ---- Other starting points, sample.py, --help ----------------------------------------------------

def test_training_from_a_public_checkpoint_ends_in_a_one_step_model(public, tmp_path):  # noqa: F811
    flags = ["--init", public / "public.ckpt", "--text", f"{public / 'bert'},{public / 't5'}"]
    data = write_clips(tmp_path / "clips", 4)
    with opened("--data", data, "--out", tmp_path / "out", *QUICK, *flags, "--judge", "",
                "--warmup", 1, "--rf2_anchor_steps", 1, "--eval_clips", 2) as run:
        train.main(run)
        evaluate(run)
    assert not (tmp_path / "out/vae").exists()
    start, end = (FlashAudio.from_pretrained(tmp_path / "out" / name) for name in ("cfm", "distill"))
    given = FlashAudio.from_pretrained(public / "ours")
    assert same(start.state_dict(), given.state_dict()) and end.config.integer_time
    assert same(end.vae.state_dict(), given.vae.state_dict()) and end.scale_factor == 0.7
    assert same(end.text.state_dict(), given.text.state_dict())
    assert not same(end.dit.state_dict(), given.dit.state_dict())
    assert end.generate("tone number 1", seed=0).shape == (1, 159744)       # 9.984 s


def test_training_with_a_frozen_text_model(tmp_path):
    source = save_text_model("t5", tmp_path / "t5")
    flags = ["--data", write_clips(tmp_path / "clips", 4), "--out", tmp_path / "out", *QUICK]
    assert exit_code("train.py", *flags, "--text", source) == 0
    model = FlashAudio.from_pretrained(tmp_path / "out/distill")
    assert model.config.text.encoder == str(source) and model.config.dit.context_dim == 16
    contexts = np.load(next((tmp_path / "out/cache").glob("contexts-*.npy")))
    assert contexts.dtype == np.float16 and contexts.shape == (5, 77, 16)
    null = torch.from_numpy(contexts[:1]).float()
    torch.testing.assert_close(null, model.text([""]), atol=2e-3, rtol=2e-3)        # halves


def test_sample_writes_clips_and_a_page(wired, tmp_path, monkeypatch, capsys):
    shutil.copytree(wired.out, tmp_path / "out/my")
    monkeypatch.chdir(tmp_path)
    prompts = ("rain", "Rain!", "rain 2", "../a/b")
    assert exit_code("sample.py", *prompts, "--n", 2, "--out", "a", "--seed", 5) == 0
    said = capsys.readouterr().out
    assert f"out{os.sep}my{os.sep}distill, NFE 1" in said and "made for" not in said
    names = {path.stem for path in Path("a").glob("*.wav")}
    assert names == {f"{name}-{k}" for name in ("rain", "rain-2", "rain-2-2", "a-b") for k in "01"}
    assert_page_is_whole(Path("a/index.html"), 8)
    wav = wavfile.read("a/a-b-1.wav")[1]
    assert wav.dtype == np.int16 and wav.shape == (8192,)
    assert exit_code("sample.py", "../a/b", "--n", 2, "--out", "b", "--seed", 5) == 0
    assert np.array_equal(wavfile.read("b/a-b-1.wav")[1], wav)              # in any company
    for stage, steps in (("distill", 24), ("cfm", 1)):
        capsys.readouterr()
        assert exit_code("sample.py", "rain", "--model", f"out/my/{stage}", "--steps", steps) == 0
        assert "a distilled model is made for --steps 1" in capsys.readouterr().out
    assert exit_code("sample.py", "rain", "--model", "out/my/vae", "--out", "c") == 2
    assert "a VAE without a trained flow" in capsys.readouterr().err and not Path("c").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_needs_no_torch_and_answers_at_once(script):
    code = f"""import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit:
    assert not {{"torch", "numpy"}} & set(sys.modules)"""
    done = run("-c", code)
    assert done.returncode == 0 and "--seed" in done.stdout, done.stderr


# ---- The method, honestly ------------------------------------------------------------------------

@torch.no_grad()
def test_reflow_straightens_and_one_step_is_nearer(tmp_path, monkeypatch):
    """The toy preset on 400 clips for about a minute, judged by mels of captions held out."""
    monkeypatch.setitem(fa.PRESETS, "toy", TOY)
    data = toy.write_toy_set(tmp_path / "toy", 400, 64)
    steps = """--batch_size 8 --warmup 20 --vae_steps 150 --cfm_steps 300 --rf1_steps 20
        --rf2_couplings 96 --rf2_coupling_steps 4 --rf2_steps 90 --distill_couplings 256
        --distill_steps 80 --device cpu""".split()
    straightness, fd = {}, {}
    with opened("--data", data, "--out", tmp_path / "out", *steps) as run:
        train.main(run)
        rows = run.data.held_out(64)
        captions = [run.data.captions[i] for i in rows]
        real = NearestClip.embed(torch.tensor(run.data.mels[run.data.file[rows]]))
        for stage, n in (("cfm", 24), ("cfm", 1), ("rf2", 24), ("distill", 1)):
            model = run.load(stage)
            path = model.sample_latents(captions, n, seed=0, return_trajectory=True)
            straightness[stage, n] = fa.straightness(path)
            fd[stage, n] = fa.frechet_distance(NearestClip.embed(model.decode(path[-1])), real)
    assert straightness["rf2", 24] < 0.3 * straightness["cfm", 24], straightness
    assert fd["distill", 1] < fd["cfm", 1], fd
