"""Training: what each stage hands to its loss, sampler and optimiser; runs as a person starts,
interrupts, moves and repeats them; and one honest run."""

import copy
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
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.io import wavfile
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flashaudio as fa
import train
from data import datasets, toy
from data.clips import batch_indices
from evaluation.judges import NearestClip
from flashaudio import FlashAudio, InputError
from runs import plan, processes
from runs.run import STAGES, WHERE, Run, names_of
from runs.start import initialize, new_model
from tests.helpers import (ROOT, TINY, exit_code, opened, rng, run, save_text_model, tiny_model,
                           write_clips)
from tests.test_evaluation import assert_page_is_whole
from tests.test_pretrained import public  # noqa: F401, a fixture

TOY = fa.PRESETS["toy"]
QUICK = """--batch_size 4 --vae_steps 4 --cfm_steps 4 --rf1_steps 3 --rf2_steps 3 --distill_steps 3
    --rf2_couplings 6 --distill_couplings 6 --rf2_coupling_steps 2 --distill_coupling_steps 2
    --eval_clips 6 --device cpu""".split()
# Values of their own, so that a flag taken for another is seen
FLAGS = """--device cpu --seed 3 --batch_size 8 --warmup 5 --lr 2e-3 --lr_end 0.1 --ema 0.9
    --grad_clip 0.02 --caption_dropout 0.3 --vae_steps 20 --vae_lr 3e-3 --vae_frames 16
    --vae_kl_weight 0.02 --cfm_steps 20 --rf1_steps 20 --rf1_lr 1e-3 --rf2_couplings 6
    --rf2_coupling_steps 3 --rf2_guidance 2.5 --rf2_anchor_steps 2 --rf2_anchor_lr 0.02
    --rf2_anchor_tol 1e-6 --rf2_steps 20 --distill_couplings 9 --distill_coupling_steps 2
    --distill_guidance 1.5 --distill_steps 20 --eval_clips 2 --save_every 0 --windows 1""".split()
PARTS = {"vae": ("vae",), "cfm": ("text", "dit"), "rf1": ("text", "dit"), "rf2": ("dit",),
         "distill": ("dit",)}


@pytest.fixture(scope="module", autouse=True)
def tiny_preset():
    """In this process, preset toy is a tiny model, and main() draws and evaluates nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fa.PRESETS, "toy", TINY)
        patch.setattr(train, "evaluate", lambda run: None)
        patch.setattr(train, "draw_losses", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def wired(tmp_path_factory) -> SimpleNamespace:
    """A run of Algorithm 1, and what its parts read and were given on the way."""
    folder = tmp_path_factory.mktemp("wired")
    fits, made, read = {}, {}, set()

    class Watched(train.Flags):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    def unwatched(method):
        def call(*given):
            before = set(read)
            result = method(*given)
            read.intersection_update(before)
            return result
        return call

    class AdamW(torch.optim.AdamW):
        def step(self):
            group = self.param_groups[0]
            norms = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None])
            super().step()
            weights = [p.detach().clone() for p in group["params"]]
            fits[list(fits)[-1]].steps.append((group["lr"], norms.norm().item(), weights))
            fits[list(fits)[-1]].adam = (group["betas"], group["weight_decay"])

    def fit(run, stage, model, parts, *given, real=train.fit):
        fits[stage] = SimpleNamespace(start=copy.deepcopy(model.state_dict()), parts=parts,
                                      draw=given[0], loss=given[1], steps=[])
        model = real(run, stage, model, parts, *given)
        fits[stage].read = read & {f.name for f in fields(train.Flags)}
        read.clear()
        return model

    def couplings(run, model, stage, real=train.couplings):
        made[stage] = SimpleNamespace(start=copy.deepcopy(model.state_dict()), calls=[])
        made[stage].pairs = real(run, model, stage)
        return made[stage].pairs

    def anchored_sample(*given, real=fa.anchored_sample):
        z1 = real(*given)
        made[list(made)[-1]].calls.append((*given, z1))
        return z1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(train, "fit", fit)
        patch.setattr(train, "couplings", couplings)
        patch.setattr(fa, "anchored_sample", anchored_sample)
        for name in ("settings", "write_notes"):        # they ask for all flags
            patch.setattr(Run, name, unwatched(getattr(Run, name)))
        data = write_clips(folder / "clips")
        with opened("--data", data, "--out", folder / "out", *FLAGS) as run:
            run.flags = Watched(**asdict(run.flags))
            read.clear()
            train.main(run)
    models = {stage: FlashAudio.from_pretrained(folder / "out" / stage) for stage in STAGES}
    mean, std = torch.tensor(run.data.latents(models["vae"])[run.data.file]).unbind(1)
    return SimpleNamespace(run=run, out=folder / "out", data=data, fits=fits, made=made,
                           models=models, mean=mean, std=std, scale=models["vae"].scale_factor,
                           mels=torch.tensor(run.data.mels[run.data.file]))


def drawn(wired, stage: str, steps: int = 150) -> list[Tensor]:
    """What a stage draws in so many steps, one batch after the other."""
    return [torch.cat(x) for x in zip(*map(wired.fits[stage].draw, range(steps)))]


def nearest(x: Tensor, known: Tensor) -> Tensor:
    return torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)


def clips_of(wired, text: Tensor) -> Tensor:
    """The row that each caption (B, bytes) is of."""
    words = wired.models["cfm"].text.tokenize(wired.run.data.captions)
    found = (text[:, None] == words).all(2)
    assert (found.sum(1) == 1).all()
    return found.int().argmax(1)


def same(state: dict, other: dict) -> bool:
    return all(torch.equal(state[name], value) for name, value in other.items())


def losses(out: Path, stage: str) -> list[float]:
    """Those of a stage in the log of a run."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["stage"] == stage]


def apart(model: FlashAudio, wired, stage: str, part: str) -> float:
    """How far weights are from those of the run, in lengths of the way that those went."""
    far = way = 0.0
    for name, value in getattr(wired.models[stage], part).state_dict().items():
        far += (getattr(model, part).state_dict()[name] - value).square().sum().item()
        way += (wired.fits[stage].start[f"{part}.{name}"] - value).square().sum().item()
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
        assert fit.parts == PARTS[stage] and len(fit.steps) == 20
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
    captions = [data.captions[i] for i in data.some(n, 3)]
    z0, context, z1 = (torch.cat([call[i] for call in made.calls]) for i in (1, 2, -1))
    generators = [wired.run.generator(stage, "couplings", i) for i in range(n)]
    noise = torch.stack([torch.randn(20, 16, generator=g) for g in generators])
    assert len(set(captions)) == 6 and torch.equal(z0, noise)
    torch.testing.assert_close(context, teacher.contexts(captions))
    for call in made.calls:
        torch.testing.assert_close(call[3], teacher.contexts([""]).expand_as(call[3]))
        assert call[4:9] == (steps, guidance, 2, 0.02, 1e-6)
    assert torch.equal(torch.stack([z0, z1], 1), torch.tensor(made.pairs.latents))
    assert np.array_equal(made.pairs.contexts[made.pairs.place], context)


def test_couplings_are_made_anew_when_what_they_are_made_from_changes(wired, tmp_path):
    keys = {wired.made["rf2"].pairs.key}
    with opened(*copied(wired, tmp_path), "--stage", "rf2") as run:
        for model, changed in (("cfm", {}), ("rf1", {"seed": 4}), ("rf1", {"rf2_guidance": 2.0}),
                               ("rf1", {"rf2_coupling_steps": 2}), ("rf1", {"rf2_anchor_lr": 0.1})):
            run.flags = replace(run.flags, **changed)
            keys.add(train.couplings(run, wired.models[model], "rf2").key)
    assert len(keys) == 6


def test_a_finished_run_makes_no_couplings_again(wired, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "cached", None)              # what would make them
    with opened(*copied(wired, tmp_path, *STAGES)) as run:
        train.main(run)


def test_noise_depends_on_seed_stage_and_step(wired):
    other = replace(wired.run, flags=train.Flags(seed=4))
    noise = [(wired.run, "cfm", 1), (wired.run, "rf1", 1), (wired.run, "cfm", 2), (other, "cfm", 1)]
    assert len({run.generator(*what).initial_seed() for run, *what in 2 * noise}) == 4


def field(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return z * t.view(-1, 1, 1) + context.mean((1, 2))[:, None, None]


def test_each_stage_has_its_loss(wired):
    z0, z1, context = torch.randn(3, 4, 5, 6, generator=rng(), dtype=torch.float64)
    batch = z0, z1, torch.rand(4, generator=rng(1), dtype=torch.float64), context
    model, mel = tiny_model().double(), torch.randn(2, 80, 32, generator=rng()).double()
    noise = torch.randn(2, 20, 16, generator=rng(1)).double()
    for stage, ours, theirs in (
            ("vae", (model, mel, noise), fa.vae_loss(model.vae, mel, noise, 0.02)),
            ("cfm", (field, *batch), fa.rectified_flow_loss(field, *batch, 1e-4)),
            ("rf1", (field, *batch), fa.rectified_flow_loss(field, *batch)),
            ("rf2", (field, *batch), fa.rectified_flow_loss(field, *batch)),
            ("distill", (field, z0, z1, context), fa.distill_loss(field, z0, z1, context))):
        torch.testing.assert_close(wired.fits[stage].loss(*ours), theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("stage", ["cfm", "rf1"])
def test_latents_have_unit_size_posterior_noise_and_their_caption(wired, stage):
    z0, z1, _, text = drawn(wired, stage)
    null = ~text.any(1)
    assert null.float().mean().item() == pytest.approx(0.3, abs=0.05)       # 4 standard deviations
    clip = clips_of(wired, text[~null])
    noise = (z1[~null] / wired.scale - wired.mean[clip]) / wired.std[clip]
    for x in (z0, noise, drawn(wired, "vae")[1]):       # the VAE's noise, too
        assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
        assert len(x.flatten(1).unique(dim=0)) == len(x)
    size = (wired.mean.var() + wired.std.square().mean()).sqrt()
    assert wired.scale.item() == pytest.approx(1 / size.item(), rel=1e-3)
    assert z1.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("stage, dropout", [("rf2", 0.3), ("distill", 0.0)])
def test_couplings_are_drawn_whole_with_their_context(wired, stage, dropout):
    pairs = wired.made[stage].pairs
    z0, z1, *_, text = drawn(wired, stage)
    noise, end = torch.tensor(pairs.latents).unbind(1)
    row = nearest(z0, noise)
    assert torch.equal(z0, noise[row]) and torch.equal(z1, end[row])
    contexts = torch.tensor(pairs.contexts)
    null = (text == contexts[0]).all(2).all(1)
    assert null.float().mean().item() == pytest.approx(dropout, abs=0.05)
    assert torch.equal(text[~null], contexts[pairs.place[row[~null]]])


@pytest.mark.parametrize("stage, density", [
    ("cfm", fa.uniform), ("rf1", fa.logit_normal), ("rf2", fa.mix_exp)])
def test_t_is_drawn_from_the_density_of_the_stage(wired, stage, density):
    assert stats.ks_2samp(drawn(wired, stage)[2], density(9999, generator=rng())).pvalue > 0.01


@pytest.mark.parametrize("stage, low, high", [("cfm", 0, 1), ("rf1", 99, 100)])
def test_the_1rf_pairs_noise_with_data_and_the_cfm_does_not(wired, stage, low, high):
    batches = map(wired.fits[stage].draw, range(100))
    near = sum(torch.equal(fa.immiscible_pairing(z0, z1), z0) for z0, z1, *_ in batches)
    assert low <= near <= high


@pytest.mark.parametrize("stage", STAGES)
def test_clips_are_drawn_in_the_order_of_the_seed(wired, stage, monkeypatch):
    monkeypatch.setattr(wired.run.flags, "caption_dropout", 0.0)
    z0, *_, text = drawn(wired, stage, 18)              # vae: mels, noise
    n = 6
    if stage == "vae":
        row = nearest(z0.mean(2), wired.mels.mean(2))
        assert len(z0.flatten(1).unique(dim=0)) > 20    # pieces from many places
    elif stage in ("cfm", "rf1"):
        row = clips_of(wired, text)
    else:
        noise = torch.tensor(wired.made[stage].pairs.latents[:, 0])
        row, n = nearest(z0, noise), len(noise)
    assert row.tolist() == batch_indices(n, len(row), 0, 3).tolist()


@pytest.mark.parametrize("stage, peak", [
    ("vae", 3e-3), ("cfm", 2e-3), ("rf1", 1e-3), ("rf2", 2e-3), ("distill", 2e-3)])
def test_rates_clipping_and_average_follow_their_formulas(wired, stage, peak):
    fit, model, names = wired.fits[stage], wired.models[stage], []
    for part in PARTS[stage]:
        names += [f"{part}.{name}" for name, _ in getattr(model, part).named_parameters()]
    averages = [fit.start[name] for name in names]
    lines = map(json.loads, (wired.out / "metrics.jsonl").read_text().splitlines())
    lines = {line["step"]: line for line in lines if line["stage"] == stage}
    assert list(lines) == [10, 20] and lines[10]["grad_norm"] > 0.04
    assert fit.adam == ((0.9, 0.999), 0.01)             # torch's own
    for step, (rate, norm, weights) in enumerate(fit.steps):
        cosine = (1 + math.cos(math.pi * step / 20)) / 2
        assert rate == pytest.approx(peak * min(1, (step + 1) / 5) * (0.1 + 0.9 * cosine))
        line = lines.get(step + 1, {"lr": rate, "grad_norm": norm})
        assert rate == line["lr"] and norm < 0.02001
        assert norm == pytest.approx(min(0.02, line["grad_norm"]), rel=1e-3)
        kept = min(0.9, (step + 1) / (step + 10))       # the memory is short at first
        averages = [kept * old + (1 - kept) * new for old, new in zip(averages, weights)]
    for name, average in zip(names, averages):
        torch.testing.assert_close(model.get_parameter(name).detach(), average)


@pytest.mark.parametrize("stage", STAGES)
def test_a_flag_that_a_stage_reads_is_among_its_settings(wired, stage):
    read = wired.fits[stage].read
    assert {"batch_size", "warmup", "seed", f"{stage}_steps"} <= read
    elsewhere = {"out", "init", "stage", "grad_accum", "save_every"}        # not what, but where
    assert read - set(wired.run.notes(stage)["settings"]) <= elsewhere <= set(WHERE)
    starts = [wired.run.settings(stage, model, ())["from"] for model in wired.models.values()]
    assert len(set(starts)) == len(STAGES)
    assert len(fields(train.Flags)) <= 42


@torch.no_grad()
def test_training_starts_where_the_decoder_hears_the_latent(wired):
    start, model = wired.fits["vae"].start, FlashAudio(TOY)
    torch.testing.assert_close(start["vae.decoder.conv_out.bias"], wired.mels.mean((0, 2)))
    for seed in (3, 4):
        first = new_model("toy", "bytes", seed, wired.run.data.some_mels(3))
        assert same(start, first.state_dict()) == (seed == 3)
    mel = 1.7 * torch.randn(8, 80, 64, generator=rng()) - 3
    vae, band = model.vae, mel.mean((0, 2))
    initialize(model, band)
    mean, logvar = vae.encode(mel)
    nothing, latent = vae.decode(0 * mean), vae.decode(mean)
    assert 0.5 < mean.std() < 2 and (logvar == -4).all() and 0.5 < (latent - nothing).std() < 3
    torch.testing.assert_close(nothing, band[:, None].expand_as(nothing))
    heard = vae.encoder.conv_in(band[None, :, None].expand(1, 80, 16))[..., 2:-2]
    assert heard.abs().max() < 1e-4                     # the mean mel is 0 to the encoder
    for layer in vae.modules():
        if isinstance(layer, (fa.ResidualBlock, fa.FrameAttention)):
            assert torch.equal(layer(mel[:, :64]), mel[:, :64])     # adds nothing yet
    for block in model.dit.blocks:
        assert (block.adaLN_modulation[1].bias.view(6, -1)[[2, 5]] == 0.5).all()


def test_a_function_is_known_by_name_and_code(tmp_path):
    def known(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(f"def double(t):\n    {source}\n")
        return names_of(runpy.run_path(tmp_path / f"{name}.py")["double"], None)[0]

    first = known("first", "return 2 * t")
    assert first.startswith("<run_path>.double ") and first[-1] != " "
    assert known("commented", "'twice'\n    return 2*t      # the same") == first
    assert known("edited", "return 3 * t") != first
    assert names_of(len) == ["builtins.len "]           # has no file


def test_a_fork_brings_its_own_functions(wired, tmp_path):
    def loss(model, z0, z1, t, context):
        assert torch.equal(z0, z1 + 2) and (t == 0.25).all()
        return fa.distill_loss(model, z0, z1, context)

    def density(n, generator=None):
        return torch.full((n,), 0.25)

    def nearer(z0, z1):
        return z1 + 2

    def sampler(model, z0, *_):
        return z0 + 3

    flags = copied(wired, tmp_path, "vae", "cfm", "rf1")
    with opened(*flags, "--stage", "rf1") as run:
        train.train_rf1(run, run.load("cfm"), nearer, density, loss)
    with opened(*flags, "--stage", "rf2") as run:
        pairs = train.couplings(run, run.load("rf1"), "rf2", sampler, nearer)
        z0, z1 = torch.tensor(pairs.latents).unbind(1)
        torch.testing.assert_close(z0, wired.scale * wired.mean[run.data.some(6, 3)] + 2)
        assert torch.equal(z1, z0 + 3)
        run.spent = 1000.0                              # on the couplings
        train.train_rf2(run, run.load("rf1"), pairs, density, loss, nearer)
        assert run.notes("rf2")["seconds"] > 1000
    with opened(*flags) as run, pytest.raises(InputError, match="functions was"):
        train.main(run)                                 # the method's own: another 1-RF


# ---- Runs, as a person starts, moves and kills them ----------------------------------------------

def test_a_run_goes_on_wherever_it_is_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    """Copied, touched, named by another path, from another directory, where a cluster has left
    its WORLD_SIZE."""
    there, here = tmp_path / "there", tmp_path / "here"
    done = run("train.py", "--data", write_clips(there / "clips"), "--out", there / "out", *QUICK)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((there / "out/results.json").read_text())["rows"]) == 13
    assert_page_is_whole(there / "out/listen/index.html", 6 * 13)
    assert (there / "out/loss.png").exists()
    for stage in STAGES:
        assert FlashAudio.from_pretrained(there / "out" / stage).config.stage == stage
        assert len(list((there / "out" / stage).glob("tone-number-*.wav"))) == 2
    shutil.copytree(there, here)
    for path in here.rglob("*"):
        os.utime(path, (1, 1))
    kept = [*here.glob("out/*/model.safetensors"), *here.glob("out/cache/*.npy")]
    flags = ["--data", "clips/manifest.csv", "--out", "out", *QUICK, "--eval_clips", 2]
    cluster = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "1"}
    done = run(ROOT / "train.py", *flags, cwd=here, **cluster)
    assert done.returncode == 0 and "steps in" not in done.stdout, done.stderr
    manifest = here / "clips/manifest.csv"
    manifest.write_text(manifest.read_text().replace("number 5", "number five"))
    monkeypatch.chdir(here)
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setitem(fa.PRESETS, "toy", TOY)
    assert exit_code("train.py", *flags) == 2
    said = capsys.readouterr().err
    assert "vae was trained with other settings (data was" in said and said.count("\n") == 1
    assert len(kept) == 10 and all(path.stat().st_mtime == 1 for path in kept)


def in_another_process(flags: list, log: Path) -> None:
    """train.py with a tiny preset, its words in `log`."""
    fa.PRESETS["toy"] = TINY
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
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
        process.join(draw.uniform(0, 1.5) if kill < 6 else None)
        if process.exitcode is None:
            by = signal.SIGKILL if kill % 2 else draw.choice((signal.SIGTERM, signal.SIGINT))
            os.kill(process.pid, by)
        process.join()
        codes.append(process.exitcode)
        said = (tmp_path / "log").read_text()
        ours = said.partition("Exception ignored in")[0]    # Python's own, from a weak reference
        assert process.exitcode in (0, -9, -2, -15, 130, 143) and "Traceback" not in ours, said
        if process.exitcode in (130, 143):
            assert said.endswith("train.py: stopped; the same command continues from here\n")
    assert codes[-1] == 0, said
    for stage in STAGES:
        ours = FlashAudio.from_pretrained(tmp_path / "out" / stage)
        assert same(ours.state_dict(), wired.models[stage].state_dict()), (stage, codes)


def test_two_processes_train_like_one(wired, tmp_path, monkeypatch):
    """To rounding: see the next test. The 1-RF pairs each process's part of a batch by itself."""
    script = tmp_path / "tiny.py"
    judged = tmp_path / "judged"
    script.write_text("import runpy, flashaudio\nfrom tests.helpers import TINY\n"
                      "from evaluation import evaluate as module\n"
                      "def evaluate(run, real=module.evaluate):\n"
                      f"    open(r'{judged}', 'a').write('once ')\n"
                      "    real(run)\n"
                      "module.evaluate = evaluate\n"
                      "flashaudio.PRESETS['toy'] = TINY\n"
                      "runpy.run_path('train.py', run_name='__main__')\n")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script,
               "--data", wired.data, "--out", tmp_path / "out", *FLAGS, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert judged.read_text() == "once "                # by one process: two would write one table
    for stage, part in (("vae", "vae"), ("cfm", "dit"), ("cfm", "text")):
        ours = FlashAudio.from_pretrained(tmp_path / "out" / stage)
        assert apart(ours, wired, stage, part) < 0.05
        assert losses(tmp_path / "out", stage) == pytest.approx(losses(wired.out, stage), rel=0.01)
    pairs = np.load(next((tmp_path / "out/cache").glob("couplings_distill-*.npy")))
    assert np.array_equal(pairs[:, 0], wired.made["distill"].pairs.latents[:, 0])
    assert pairs[:, 1].any((1, 2)).all()                # each was made by one of them
    monkeypatch.setattr("runs.run.rank_and_world", lambda: (1, 2))
    assert wired.run.share(torch.arange(6))[0].tolist() == [1, 3, 5]


def test_what_is_not_trained_may_lie_on_another_device(tmp_path, monkeypatch):
    """As VAE and text encoder do beside a backbone on a GPU; here `meta` stands for the other."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(processes, "rank_and_world", lambda: (0, 2))
        module = torch.nn.ModuleDict({"trained": torch.nn.Linear(2, 2),
                                      "frozen": torch.nn.Linear(2, 2, device="meta")})
        module.frozen.requires_grad_(False)
        module.frozen.register_buffer("held", torch.zeros(2, device="meta"))
        module.forward = module.trained.forward
        shared = processes.distributed(module, torch.device("cpu"))
        shared(torch.ones(1, 2)).sum().backward()
        assert module.trained.weight.grad.tolist() == [[1, 1], [1, 1]]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation_gives_the_same_weights_and_couplings(wired, tmp_path, parts):
    """To rounding, which Adam makes whole steps of where a gradient is nothing else, as that of
    keys' biases in attention: a few weights among many."""
    flags = [*copied(wired, tmp_path, "vae"), "--grad_accum", parts]
    with opened(*flags, "--stage", "cfm") as run:
        assert apart(train.train_cfm(run, run.load("vae")), wired, "cfm", "dit") < 0.02
    assert losses(tmp_path, "cfm") == pytest.approx(losses(wired.out, "cfm"), rel=0.01)
    next((tmp_path / "cache").glob("couplings_rf2-*.npy")).unlink()
    with opened(*flags, "--stage", "rf2") as run:
        pairs = train.couplings(run, wired.models["rf1"], "rf2")
    first = wired.made["rf2"].pairs
    assert pairs.key == first.key and np.array_equal(pairs.latents[:, 0], first.latents[:, 0])
    np.testing.assert_allclose(pairs.latents[:, 1], first.latents[:, 1], atol=1e-3)


# ---- What interrupts a run -----------------------------------------------------------------------

@pytest.mark.parametrize("torn", [None, 0, 1000])
def test_a_signal_is_answered_between_two_steps(wired, tmp_path, monkeypatch, capsys, torn):
    """And what it saves is taken up again, or ignored where only `torn` bytes of it are left."""
    def loss(*given, real=fa.rectified_flow_loss):
        calls.append(given)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    flags, calls = copied(wired, tmp_path, "vae"), []
    state = tmp_path / "cfm/train_state.pt"
    with monkeypatch.context() as patch:
        patch.setattr(fa, "rectified_flow_loss", loss)
        assert exit_code("train.py", *flags, "--stage", "cfm") == 143
    said = capsys.readouterr().err
    assert said == "train.py: stopped; the same command continues from here\n"
    assert torch.load(state, weights_only=True)["step"] == len(calls) == 7
    before = state.read_bytes()
    assert exit_code("train.py", *flags, "--cfm_steps", 30) == 2            # half trained is, too
    said = capsys.readouterr().err
    assert "cfm was trained with other settings" in said and said.count("\n") == 1
    assert state.read_bytes() == before
    state.write_bytes(before[:torn])
    assert exit_code("train.py", *flags, "--stage", "cfm") == 0
    said = capsys.readouterr().out
    if torn is None:
        assert "cfm: continuing at step 7 of 20" in said and not state.exists()
    else:
        assert f"{state}: cannot be read, so stage cfm begins again" in said
    ours = FlashAudio.from_pretrained(tmp_path / "cfm").state_dict()
    assert same(ours, wired.models["cfm"].state_dict())


def test_a_full_disk_leaves_what_was_good(wired, tmp_path, capsys):
    """Simulated by the largest size that a file of the process may have."""
    import resource
    flags = [*copied(wired, tmp_path, *STAGES), "--stage", "rf2", "--rf2_couplings", 40]
    before = (tmp_path / "rf2/model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, steps, file in ((50_000, 20, "couplings_rf2"), (300_000, 20, "train_state.pt"),
                              (300_000, 1, "model.safetensors")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert exit_code("train.py", *flags, "--rf2_steps", steps) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert file in said and said.count("\n") == 1, said
        assert (tmp_path / "rf2/model.safetensors").read_bytes() == before
    assert exit_code("train.py", *flags) == 0


def test_a_loss_that_is_not_finite_stops_the_run(wired, tmp_path, monkeypatch, capsys):
    def loss(*given, real=fa.rectified_flow_loss):
        return math.nan * real(*given)

    flags = copied(wired, tmp_path, "vae", "cfm")
    model = tmp_path / "cfm/model.safetensors"
    before = model.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(fa, "rectified_flow_loss", loss)
        assert exit_code("train.py", *flags, "--stage", "cfm", "--lr", 1e-4) == 2
    said = capsys.readouterr().err
    assert "cfm: loss nan" in said and "at step 10" in said and said.count("\n") == 1
    assert model.read_bytes() == before
    with opened(*flags) as run, pytest.raises(InputError, match="lr was 0.0001"):
        train.train_cfm(run, run.load("vae"))
    model.unlink()
    with opened(*flags) as run:                         # there is nothing to lose
        train.train_cfm(run, run.load("vae"))
    assert model.read_bytes() == before


def test_an_exploding_gradient_is_named(wired, tmp_path, monkeypatch, capsys):
    norms = iter([1.0] * 19 + [500.0])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    assert exit_code("train.py", *copied(wired, tmp_path), "--stage", "vae") == 0
    said = capsys.readouterr().out
    assert "the gradient exploded at step 20: norm 500, usually 1; it is clipped" in said


# ---- Other starting points, and sample.py --------------------------------------------------------

def test_training_from_a_public_checkpoint_ends_in_a_one_step_model(public, tmp_path):  # noqa: F811
    flags = ["--init", public / "public.ckpt", "--text", f"{public / 'bert'},{public / 't5'}",
             "--data", write_clips(tmp_path / "clips", 4), "--out", tmp_path / "out"]
    assert exit_code("train.py", *flags, *QUICK, "--judge", "", "--rf2_anchor_steps", 1) == 0
    assert not (tmp_path / "out/vae").exists()
    start = FlashAudio.from_pretrained(tmp_path / "out/cfm")
    end = FlashAudio.from_pretrained(tmp_path / "out/distill")
    given = FlashAudio.from_pretrained(public / "ours").state_dict()
    assert same(start.state_dict(), given) and end.config.integer_time
    changed = [name for name, value in end.state_dict().items() if not value.equal(given[name])]
    assert changed and all(name.startswith("dit.") for name in changed)
    assert end.latent_shape() == (20, 156)              # 9.984 s


def test_training_with_a_frozen_text_model(tmp_path):
    source = save_text_model("t5", tmp_path / "t5")
    flags = ["--data", write_clips(tmp_path / "clips", 4), "--out", tmp_path / "out", *QUICK]
    assert exit_code("train.py", *flags, "--text", source) == 0
    model = FlashAudio.from_pretrained(tmp_path / "out/distill")
    assert model.config.text.encoder == str(source) and model.config.dit.context_dim == 16
    contexts = np.load(next((tmp_path / "out/cache").glob("contexts-*.npy")))
    with opened(*flags, "--text", source, "--caption_dropout", 0) as run:
        draw, parts = train.clip_batches(run, "cfm", model, fa.uniform)
        captions = [run.data.captions[i] for i in batch_indices(4, 4, 0, 0)]
    text = torch.cat([torch.from_numpy(contexts[:1]).float(), draw(0)[3]])
    torch.testing.assert_close(text, model.text(["", *captions]), atol=2e-3, rtol=2e-3)  # halves
    assert parts == ("dit",) and contexts.dtype == np.float16 and contexts.shape == (5, 77, 16)


def test_an_evening_from_esc50_to_one_step(tmp_path, monkeypatch):
    """The recipe of preset small, cut down to a tiny model and a few steps."""
    monkeypatch.setitem(fa.PRESETS, "small", TINY)
    write_clips(tmp_path / "esc/audio")
    (tmp_path / "esc/meta").mkdir()
    rows = [f"{i}.wav,{min(i + 1, 5)},{i},sea_waves,True\n" for i in range(6)]
    header = "filename,fold,target,category,esc10\n"
    (tmp_path / "esc/meta/esc50.csv").write_text(header + "".join(rows))
    datasets.write_manifest(datasets.esc50(tmp_path / "esc"), tmp_path / "esc50.csv")
    text = save_text_model("t5", tmp_path / "t5")
    flags = ["--preset", "small", "--data", tmp_path / "esc50.csv", "--out", tmp_path / "out"]
    assert exit_code("train.py", *flags, *QUICK, "--text", text, "--warmup", 1,
                     "--judge", "") == 0
    model = FlashAudio.from_pretrained(tmp_path / "out/distill")
    assert model.config.text.encoder == str(text) and model.config.stage == "distill"
    held = json.loads((tmp_path / "out/cfm/training.json").read_text())["settings"]
    assert (held["lr"], held["ema"]) == (3e-4, 0.999)       # the evening's, where not cut down
    prompt = ["sea waves", "--model", tmp_path / "out/distill", "--out", tmp_path / "clips"]
    assert exit_code("sample.py", *prompt) == 0
    rate, wav = wavfile.read(tmp_path / "clips/sea-waves-0.wav")
    assert rate == 16000 and len(wav) == 32 * 256 and wav.any()


def test_the_plan_counts_what_a_hand_counts():
    """A forward pass of the tiny DiT, product by product; an evening; every preset in seconds."""
    d, c, width, length, tokens = TINY.dit, 20, TINY.dit.hidden_size, 16, 8
    inner = 256                                             # 8/3 of 32, rounded up
    once = 256 * width + width * width + d.context_dim * width + 2 * width * width      # of a clip
    once += 6 * width * width                               # adaLN of the block; above, the last
    frame = 2 * c * width + 4 * width * width + 3 * width * inner + 2 * width * (length + tokens)
    token = 2 * d.context_dim * width
    dit = tiny_model().dit
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dit(torch.randn(1, c, length), torch.rand(1), torch.randn(1, tokens, d.context_dim))
    by_hand = 2 * (once + length * frame + tokens * token)
    assert counter.get_total_flops() == by_hand
    flags = train.Flags(rf2_guidance=3.0, rf2_coupling_steps=5, rf2_anchor_steps=0,
                        rf2_couplings=17)
    rows = {row.stage: row for row in plan.plan(flags)}
    assert rows["rf2 pairs"].flop == 5 * 2 * 16 * by_hand and rows["rf2 pairs"].steps == 2
    assert 2.5 < rows["rf2"].flop / (16 * by_hand) < 3      # nothing is below the first layer
    flags = replace(flags, rf2_anchor_steps=1, grad_accum=4)
    parts = {row.stage: row for row in plan.plan(flags)}
    assert parts["rf2 pairs"].flop == 5 * 5 * 4 * by_hand and parts["rf2 pairs"].steps == 5
    assert parts["rf2"].flop == rows["rf2"].flop and parts["rf2"].memory < rows["rf2"].memory


@pytest.mark.parametrize("preset", ["toy", "small", "base"])
def test_a_preset_has_a_plan(preset, monkeypatch, capsys):
    monkeypatch.setitem(fa.PRESETS, "toy", TOY)
    flags = train.parse_flags(["--preset", preset, "--plan", "60"])
    plan.print_plan(flags)
    said = capsys.readouterr().out.splitlines()
    assert "an estimate" in said[0]
    stages = [line.replace(" pairs", "-pairs").split() for line in said[3:10]]
    assert [stage[0] for stage in stages] == [
        "vae", "cfm", "rf1", "rf2-pairs", "rf2", "distill-pairs", "distill"]
    for _, _, tflop, steps, _, hours in stages:
        assert float(hours) == pytest.approx(float(tflop) * int(steps) / 60 / 3600, abs=0.006)
    total = float(said[-1].split()[2])
    assert total == pytest.approx(sum(float(stage[-1]) for stage in stages), abs=0.05)
    if preset == "small":       # three hours; judging, mels and latents are left out of the count
        assert 2.5 < total < 3.5 and 40 < float(stages[0][1].rstrip("M")) < 60
        assert max(float(stage[4]) for stage in stages) < 20            # of 24 GB


def test_own_sounds_get_a_better_vae_unless_a_flag_or_preset_says_otherwise():
    def vae(*typed: str) -> tuple[int, float]:
        flags = train.parse_flags([*typed])
        return flags.vae_steps, flags.vae_kl_weight

    assert vae() == vae("--data", "toy") == (900, 0.03)
    assert vae("--data", "my_sounds") == (5400, 0.01)
    assert vae("--data", "my_sounds", "--vae_steps", "5") == (5, 0.01)
    assert vae("--data", "my_sounds", "--preset", "small") == (30_000, 0.01)
    assert vae("--data", "my_sounds", "--init", "maa3.ckpt") == (40_000, 1e-6)


def test_a_plan_of_a_public_flow_has_no_stage_before_it(monkeypatch):
    monkeypatch.setitem(fa.PRESETS, "base", TINY)
    flags = train.parse_flags(["--init", "public.ckpt"])
    assert [row.stage for row in plan.plan(flags)] == [
        "rf1", "rf2 pairs", "rf2", "distill pairs", "distill"]


def test_a_plan_touches_nothing(tmp_path):
    nowhere = ["--data", "nowhere.csv", "--text", "nowhere", "--judge", "nowhere"]
    done = run(ROOT / "train.py", "--plan", 60, *nowhere, cwd=tmp_path)
    assert done.returncode == 0 and "toy at 60 TFLOP/s" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


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
    assert exit_code("sample.py", "../a/b", "--n", 2, "--out", "b", "--seed", 5) == 0
    assert Path("b/a-b-1.wav").read_bytes() == Path("a/a-b-1.wav").read_bytes()  # in any company
    for stage, steps in (("distill", 24), ("cfm", 1)):
        capsys.readouterr()
        assert exit_code("sample.py", "rain", "--model", f"out/my/{stage}", "--steps", steps) == 0
        assert "a distilled model is made for --steps 1" in capsys.readouterr().out
    assert exit_code("sample.py", "rain", "--model", "out/my/vae", "--out", "c") == 2
    assert "a VAE without a trained flow" in capsys.readouterr().err and not Path("c").exists()


# ---- The method, honestly ------------------------------------------------------------------------

def test_reflow_straightens_and_one_step_is_nearer(tmp_path, monkeypatch):
    """The toy preset on 400 clips for about a minute, judged by mels of captions held out."""
    monkeypatch.setitem(fa.PRESETS, "toy", TOY)
    data = toy.write_toy_set(tmp_path / "toy", 400, 64)
    steps = """--batch_size 8 --warmup 20 --vae_steps 200 --cfm_steps 300 --rf1_steps 20
        --rf2_couplings 128 --rf2_coupling_steps 4 --rf2_steps 120 --distill_couplings 256
        --distill_steps 80 --device cpu""".split()
    bend, fd = {}, {}
    with opened("--data", data, "--out", tmp_path / "out", *steps) as run:
        train.main(run)
        rows = run.data.held_out(64)
        captions = [run.data.captions[i] for i in rows]
        real = NearestClip.embed(torch.tensor(run.data.mels[run.data.file[rows]]))
        for stage, n in (("cfm", 24), ("cfm", 1), ("rf2", 24), ("distill", 1)):
            model = run.load(stage).requires_grad_(False)
            path = model.sample_latents(captions, n, seed=0, return_trajectory=True)
            bend[stage, n] = fa.straightness(path)
            fd[stage, n] = fa.frechet_distance(NearestClip.embed(model.decode(path[-1])), real)
    assert bend["rf2", 24] < 0.3 * bend["cfm", 24], bend
    assert fd["distill", 1] < fd["cfm", 1], fd
