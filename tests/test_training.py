"""Training: what each stage hands to its loss, sampler and optimizer; runs that are interrupted,
moved and repeated; and one honest run."""

import copy
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import flashaudio as fa
import train
from data import toy
from data.clips import batch_indices
from flashaudio import FlashAudio, InputError
from runs.run import STAGES
from tests.helpers import (ROOT, TINY, exit_code, opened, rng, run, save_text_model, tiny_model,
                           write_clips)
from tests.test_pretrained import public  # noqa: F401, a fixture
from tests.test_robustness import TYPED, one_line

TOY = fa.SIZES["toy"]
# Values of their own, so that a flag taken for another is seen
FLAGS = """--device cpu --seed 3 --batch_size 8 --warmup 5 --lr 2e-3 --lr_end 0.1 --ema 0.9
    --grad_clip 0.02 --caption_dropout 0.3 --vae_steps 20 --vae_lr 3e-3 --vae_frames 16
    --vae_kl_weight 0.02 --cfm_steps 20 --rf1_pairing immiscible --rf1_steps 20 --rf1_lr 1e-3
    --rf2_couplings 6 --rf2_coupling_steps 3 --rf2_guidance 2.5 --anchor_steps 2 --anchor_lr 0.02
    --anchor_tol 1e-6 --rf2_steps 20 --distill_couplings 9 --distill_coupling_steps 2
    --distill_guidance 1.5 --distill_steps 20 --save_every 0 --windows 1""".split()
PARTS = {"vae": ("vae",), "cfm": ("text", "dit"), "rf1": ("text", "dit"), "rf2": ("dit",),
         "distill": ("dit",)}
# The flags that a stage depends on: these, and those of the stages above it
DEPENDS = {
    "vae": """size seed batch_size lr lr_end warmup grad_clip ema caption_dropout vae_steps vae_lr
        vae_frames vae_kl_weight""",
    "cfm": "cfm_steps", "rf1": "rf1_pairing rf1_lr rf1_steps",
    "rf2": """rf2_couplings rf2_coupling_steps rf2_guidance anchor_steps anchor_lr anchor_tol
        rf2_steps""",
    "distill": "distill_couplings distill_coupling_steps distill_guidance distill_steps"}


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    """In this process, size toy is a tiny model, and main() draws and evaluates nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fa.SIZES, "toy", TINY)
        patch.setattr(train, "evaluate", lambda run: None)
        patch.setattr(train, "draw_losses", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def wired(tmp_path_factory) -> SimpleNamespace:
    """A run of Algorithm 1, and what its parts were given on the way."""
    folder = tmp_path_factory.mktemp("wired")
    fits, made = {}, {}

    class AdamW(torch.optim.AdamW):
        def step(self):
            group = self.param_groups[0]
            norms = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None])
            super().step()
            weights = [p.detach().clone() for p in group["params"]]
            fits[list(fits)[-1]].steps.append((group["lr"], norms.norm().item(), weights))

    class Couplings(train.Couplings):
        def __init__(self, run, model, stage):
            super().__init__(run, model, stage)
            self.start, self.calls = copy.deepcopy(model.state_dict()), []
            made[stage] = self

    def fit(run, stage, model, parts, draw, loss, *rest, real=train.fit):
        fits[stage] = SimpleNamespace(start=copy.deepcopy(model.state_dict()), parts=parts,
                                      draw=draw, loss=loss, steps=[])
        return real(run, stage, model, parts, draw, loss, *rest)

    def anchored_sample(*given, real=fa.anchored_sample):
        z1 = real(*given)
        made[list(made)[-1]].calls.append((*given, z1))
        return z1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(train, "Couplings", Couplings)
        patch.setattr(train, "fit", fit)
        patch.setattr(fa, "anchored_sample", anchored_sample)
        data = write_clips(folder / "clips")
        with opened("--data", data, "--out", folder / "out", *FLAGS) as run:
            train.main(run)
    models = {stage: FlashAudio.from_pretrained(folder / "out" / stage) for stage in STAGES}
    return SimpleNamespace(run=run, out=folder / "out", data=data, fits=fits, made=made,
                           models=models, mels=torch.tensor(run.data.mels[run.data.file]))


def drawn(wired, stage: str) -> list[Tensor]:
    """What a stage draws in 150 steps, one batch after the other."""
    return [torch.cat(x) for x in zip(*map(wired.fits[stage].draw, range(150)))]


def same(state: dict, other: dict) -> bool:
    return all(torch.equal(state[name], value) for name, value in other.items())


def logged(out: Path, stage: str) -> dict[int, dict]:
    """The lines of a stage in the log of a run, by step."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["stage"] == stage}


def copied(wired, folder: Path, *stages: str) -> list:
    """Some stages of the run and its caches in another folder -> the flags to go on there."""
    for name in ("cache", *stages):
        shutil.copytree(wired.out / name, folder / name)
    return ["--data", wired.data, "--out", folder, *FLAGS]


# ---- The wiring ----------------------------------------------------------------------------------

def test_each_stage_starts_from_the_one_before_and_trains_its_parts_on_its_loss(wired):
    start, fits = wired.fits["vae"].start, wired.fits
    assert same(start, train.new_model(wired.run).state_dict())
    torch.testing.assert_close(start["vae.decoder.conv_out.bias"], wired.mels.mean((0, 2)))
    for stage in STAGES:
        fit, end = fits[stage], wired.models[stage].state_dict()
        assert fit.parts == PARTS[stage] and same(fit.start, start)
        for name in ("vae", "text", "dit"):
            part = {k: v for k, v in end.items() if k.startswith(f"{name}.")}
            assert same(fit.start, part) != (name in PARTS[stage]), (stage, name)
        start = end
    for stage, teacher in (("rf2", "rf1"), ("distill", "rf2")):
        assert same(wired.made[stage].start, wired.models[teacher].state_dict())
    assert fits["rf1"].loss is fits["rf2"].loss is fits["cfm"].loss.func is fa.rectified_flow_loss
    assert fits["cfm"].loss.keywords == {"sigma_min": 1e-4}
    assert fits["distill"].loss is fa.distill_loss
    model, batch = tiny_model(), (wired.mels, torch.randn(6, 20, 16, generator=rng()))
    assert fits["vae"].loss(model, *batch) == fa.vae_loss(model.vae, *batch, 0.02)


def test_the_flags_that_a_stage_depends_on(wired):
    flags = set()
    for stage, functions in zip(STAGES, (0, 3, 3, 2, 1)):
        flags |= set(DEPENDS[stage].split())
        settings = wired.run.notes(stage)["settings"]
        assert set(settings) == flags | {"network", "text", "data", "from", "functions"}
        assert len(settings["functions"]) == functions
        starts = [wired.run.settings(stage, model, ())["from"] for model in wired.models.values()]
        assert len(set(starts)) == len(STAGES)
    run, keys = wired.run, [wired.made["rf2"].key]      # of couplings
    for changed in ({"seed": 4}, {"rf2_guidance": 2.0}, {"rf2_coupling_steps": 2},
                    {"anchor_steps": 1}, {"anchor_lr": 0.1}, {"anchor_tol": 1.0}):
        other = replace(run, flags=replace(run.flags, **changed))
        keys.append(train.Couplings(other, wired.models["rf1"], "rf2").key)
    keys.append(train.Couplings(run, wired.models["cfm"], "rf2").key)
    keys.append(train.Couplings(run, wired.models["rf1"], "rf2", fa.anchored_sample).key)
    assert len(set(keys)) == 9


@pytest.mark.parametrize("stage, n, steps, guidance", [("rf2", 6, 3, 2.5), ("distill", 9, 2, 1.5)])
def test_couplings_are_made_as_the_flags_say(wired, stage, n, steps, guidance):
    pairs, data = wired.made[stage], wired.run.data
    teacher = wired.models[{"rf2": "rf1", "distill": "rf2"}[stage]]
    captions = [data.captions[i] for i in data.some(n, 3)]
    z0, context, z1 = (torch.cat([call[i] for call in pairs.calls]) for i in (1, 2, -1))
    generators = [wired.run.generator(stage, "couplings", i) for i in range(n)]
    noise = torch.stack([torch.randn(20, 16, generator=g) for g in generators])
    assert len(set(captions)) == 6 and torch.equal(z0, noise)
    torch.testing.assert_close(context, teacher.contexts(captions))
    for call in pairs.calls:
        torch.testing.assert_close(call[3], teacher.contexts([""]).expand_as(call[3]))
        assert call[4:9] == (steps, guidance, 2, 0.02, 1e-6)
    assert torch.equal(torch.stack([z0, z1], 1), torch.tensor(pairs.latents))
    assert np.array_equal(pairs.texts[pairs.place], context)


@pytest.mark.parametrize("stage, density, low, high", [
    ("cfm", fa.uniform, 0, 0.01), ("rf1", fa.logit_normal, 0.99, 1)])
def test_clips_are_drawn_in_order_with_caption_noise_and_time(wired, stage, density, low, high):
    mels, vae_noise = drawn(wired, "vae")
    z0, z1, t, text = drawn(wired, stage)
    null, order = ~text.any(1), torch.tensor(batch_indices(6, len(text), 0, 3))
    assert null.float().mean().item() == pytest.approx(0.3, abs=0.05)       # 4 standard deviations
    words = wired.models["cfm"].text.tokenize(wired.run.data.captions)
    assert torch.equal(text[~null], words[order[~null]])
    assert torch.equal(torch.cdist(mels.mean(2), wired.mels.mean(2)).argmin(1), order)
    assert len(mels.flatten(1).unique(dim=0)) > 20      # pieces from many places
    posterior = wired.run.data.latents(wired.models["vae"])[wired.run.data.file]
    mean, std = torch.tensor(posterior).unbind(1)
    scale = wired.models["vae"].scale_factor
    assert (scale ** 2 * (mean.var() + std.square().mean())).item() == pytest.approx(1, rel=2e-3)
    for x in (z0, vae_noise, (z1 / scale - mean[order]) / std[order]):
        assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
        assert len(x.flatten(1).unique(dim=0)) == len(x)
    assert stats.ks_2samp(t, density(9999, generator=rng())).pvalue > 0.01
    batches = list(zip(z0.split(8), z1.split(8)))
    near = sum(torch.equal(fa.immiscible_pairing(*batch), batch[0]) for batch in batches)
    assert low <= near / len(batches) <= high


@pytest.mark.parametrize("stage, dropout", [("rf2", 0.3), ("distill", 0.0)])
def test_couplings_are_drawn_whole_in_order_with_their_context(wired, stage, dropout):
    pairs = wired.made[stage]
    z0, z1, *t, text = drawn(wired, stage)
    noise, end = torch.tensor(pairs.latents).unbind(1)
    row = torch.tensor(batch_indices(len(noise), len(z0), 0, 3))
    assert torch.equal(z0, noise[row]) and torch.equal(z1, end[row])
    contexts = torch.tensor(pairs.texts)
    null = (text == contexts[0]).all(2).all(1)
    assert null.float().mean().item() == pytest.approx(dropout, abs=0.05)
    assert torch.equal(text[~null], contexts[pairs.place[row[~null]]])
    if stage == "rf2":
        assert stats.ks_2samp(t[0], fa.mix_exp(9999, generator=rng())).pvalue > 0.01


@pytest.mark.parametrize("stage, peak", [
    ("vae", 3e-3), ("cfm", 2e-3), ("rf1", 1e-3), ("rf2", 2e-3), ("distill", 2e-3)])
def test_rates_clipping_and_average_follow_their_formulas(wired, stage, peak):
    fit, model = wired.fits[stage], wired.models[stage]
    names = [name for name, _ in model.named_parameters() if name.startswith(PARTS[stage])]
    averages = [fit.start[name] for name in names]
    lines = logged(wired.out, stage)
    assert list(lines) == [10, 20] and len(fit.steps) == 20 and lines[10]["grad_norm"] > 0.04
    for step, (rate, norm, weights) in enumerate(fit.steps):
        cosine = (1 + math.cos(math.pi * step / 20)) / 2
        assert rate == pytest.approx(peak * min(1, (step + 1) / 5) * (0.1 + 0.9 * cosine))
        line = lines.get(step + 1, {"lr": rate, "grad_norm": norm})
        assert rate == line["lr"] and norm == pytest.approx(min(0.02, line["grad_norm"]), rel=1e-3)
        kept = min(0.9, (step + 1) / (step + 10))       # the memory is short at first
        averages = [kept * old + (1 - kept) * new for old, new in zip(averages, weights)]
    for name, average in zip(names, averages):
        torch.testing.assert_close(model.get_parameter(name).detach(), average)


def test_the_loss_of_held_out_clips_is_seen_at_each_tenth(wired, tmp_path, capsys):
    """With a rate of 0 nothing changes: ten equal values, those of the weights at the start."""
    manifest, splits = wired.data.with_name("split.csv"), ["split", *3 * ["train"], *3 * ["val"]]
    rows = zip(wired.data.read_text().splitlines(), splits)
    manifest.write_text("\n".join(map(",".join, rows)))
    flags = ["--data", manifest, "--out", tmp_path, *FLAGS, "--lr", 0, "--cfm_steps", 100]
    with opened(*flags) as run:
        model, losses = tiny_model(), []
        others = train.Latents(run, model)
        others.rows = run.data.validation
        for i in range(16):                             # 128 clips
            batch = train.get_batch(run, "cfm, held out", others, fa.uniform, fa.no_pairing, i)
            losses.append(fa.rectified_flow_loss(model, *batch, sigma_min=1e-4).item())
        train.train_cfm(run, model)
    held_out = [line["held_out"] for line in logged(tmp_path, "cfm").values()]
    assert held_out == pytest.approx(10 * [np.mean(losses)], rel=1e-5)
    assert capsys.readouterr().out.count(f"held-out loss {held_out[0]:.4f}") == 10


def test_a_fork_brings_functions_of_any_kind(wired, tmp_path, monkeypatch):
    class Beside:
        def __call__(self, z0: Tensor, z1: Tensor) -> Tensor:
            return z1 + 2

    def loss(model, z0, z1, t, context, beside):
        assert torch.allclose(z0, z1 + beside, atol=1e-5) and (t == 0.25).all()
        return fa.distill_loss(model, z0, z1, context)

    flags = copied(wired, tmp_path, "vae", "cfm")
    for _ in range(2):
        with opened(*flags) as run:
            how = {"density": lambda n, generator=None: torch.full((n,), 0.25)}
            how["loss"] = partial(loss, beside=2)
            model = train.train_rf1(run, run.load("cfm"), Beside(), **how)
            pairs = train.Couplings(run, model, "rf2", lambda model, z0, *_: z0 + 3)
            train.train_rf2(run, model, pairs, **how | {"loss": partial(loss, beside=-3)})
        monkeypatch.setattr(train, "fit", None)         # the second time, nothing is trained
    with opened(*flags) as run, pytest.raises(InputError, match="functions was.*delete"):
        train.main(run)                                 # the method's own: another 1-RF


# ---- Runs, as a person moves, repeats and kills them ---------------------------------------------

def test_the_folder_of_a_stage_is_its_state(wired, tmp_path, monkeypatch, capsys):
    """There and alike: skipped; there and different: refused; not there: trained. Also where it was
    copied and is named by another path, and a cluster has left its WORLD_SIZE."""
    def fit(run, stage, *given, real=train.fit):
        done.append(stage)
        return real(run, stage, *given)

    done, flags = [], copied(wired, tmp_path, *STAGES)
    shutil.copytree(wired.data.parent, tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "evaluate", lambda run: done.append("evaluated"))
    moved = ["--data", "clips/manifest.csv", "--out", ".", *FLAGS]
    assert exit_code("train.py", *moved) == 0 and done == ["evaluated"]
    shutil.rmtree("rf1")
    assert exit_code("train.py", *flags) == 0 and done[1:] == ["rf1", "evaluated"]
    ours = FlashAudio.from_pretrained("rf1").state_dict()
    assert same(ours, wired.models["rf1"].state_dict())
    other = [*flags, "--distill_steps", 30]
    said = one_line(capsys, "train.py", *other)
    assert f"distill_steps was 20, is 30): delete {tmp_path}/distill, or choose another" in said
    shutil.rmtree("distill")
    assert exit_code("train.py", *other) == 0 and done[3:] == ["distill", "evaluated"]
    manifest = Path("clips/manifest.csv")
    manifest.write_text(manifest.read_text().replace("number 5", "number five"))
    said = "vae was trained with other settings "
    assert f"{said}(data was" in one_line(capsys, "train.py", *moved)
    Path("edited.py").write_text(Path(fa.__file__).read_text() + "# edited\n")
    monkeypatch.setattr(fa, "__file__", "edited.py")
    assert exit_code("train.py", *other) == 0           # uses them as they are, and says so
    old = "flashaudio.py has changed since these stages were made: vae, cfm, rf1, rf2, distill\n"
    assert old in capsys.readouterr().out
    monkeypatch.setitem(fa.SIZES, "toy", replace(TINY, dit=replace(TINY.dit, depth=2)))
    assert f"{said}(network was" in one_line(capsys, "train.py", *other)


def tiny_train(flags: list, name: str = "main", call: int = 0) -> None:
    """train.py with a tiny size, in a process of its own; kill -9 in a call of the function."""
    def deadly(*given):
        calls.append(given)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    module, calls = fa if hasattr(fa, name) else train, []
    real = getattr(module, name)
    setattr(module, name, deadly)
    fa.SIZES["toy"] = TINY
    train.evaluate = lambda run: print("judged", file=sys.stderr)
    sys.exit(exit_code("train.py", *flags))


def test_two_kills_lose_nothing(wired, tmp_path):
    """One at step 15 of stage cfm, one in the second batch of couplings of stage distill."""
    flags = ["--data", str(wired.data), "--out", str(tmp_path), *FLAGS]
    for given, code in (((flags, "get_batch", 16), -9), ((flags, "anchored_sample", 3), -9),
                        ((flags,), 0)):
        done = run("-c", f"from tests.test_training import *; tiny_train(*{given})")
        assert done.returncode == code, done.stderr
        assert ("cfm: continuing at step 10" in done.stdout) == ("anchored_sample" in given)
    for stage in STAGES:
        ours = FlashAudio.from_pretrained(tmp_path / stage)
        assert same(ours.state_dict(), wired.models[stage].state_dict()), stage


def test_two_processes_in_two_parts_train_like_one_at_once(wired, tmp_path):
    """To rounding. The 1-RF pairs the noise of each process by itself, and differs from there."""
    (tmp_path / "tiny.py").write_text("from tests.test_training import *; tiny_train(sys.argv[1:])")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
               tmp_path / "tiny.py", "--data", wired.data, "--out", tmp_path, *FLAGS,
               "--grad_accum", 2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("judged") == 1             # two would write one table
    for stage in ("vae", "cfm"):
        ours, theirs = logged(tmp_path, stage)[20], logged(wired.out, stage)[20]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
    pairs = np.load(next((tmp_path / "cache").glob("couplings_distill-*.npy")))
    assert np.array_equal(pairs[:, 0], wired.made["distill"].latents[:, 0])
    assert pairs[:, 1].any((1, 2)).all()                # each was made by one of them


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(wired, tmp_path, monkeypatch, capsys):
    def get_batch(*given, real=train.get_batch):
        z0, *others = real(*given)
        return [z0 * math.nan if given[-1] == 15 else z0, *others]

    flags, state = copied(wired, tmp_path, "vae"), tmp_path / "cfm/train_state.pt"
    monkeypatch.setattr(train, "get_batch", get_batch)
    said = one_line(capsys, "train.py", *flags)
    assert "cfm: the loss is not finite at step 20; the last checkpoint is kept" in said
    assert torch.load(state, weights_only=True)["step"] == 10
    assert "cfm was trained with other" in one_line(capsys, "train.py", *flags, "--cfm_steps", 30)
    state.write_bytes(state.read_bytes()[:1000])
    assert f"{state}: cannot be read" in one_line(capsys, "train.py", *flags)


def test_training_from_a_public_checkpoint_ends_in_a_one_step_model(public, tmp_path):  # noqa: F811
    flags = ["--init", public / "public.ckpt", "--text", f"{public / 'bert'},{public / 't5'}",
             "--data", write_clips(tmp_path / "clips", 4), "--out", tmp_path / "out"]
    for _ in range(2):                                  # the second time, nothing is left to do
        assert exit_code("train.py", *flags, *TYPED, "--judge", "") == 0
    assert not (tmp_path / "out/vae").exists()
    start = FlashAudio.from_pretrained(tmp_path / "out/cfm")
    end = FlashAudio.from_pretrained(tmp_path / "out/distill")
    given = FlashAudio.from_pretrained(public / "ours").state_dict()
    assert same(start.state_dict(), given) and end.config.dit.integer_time
    changed = [name for name, value in end.state_dict().items() if not value.equal(given[name])]
    assert changed and all(name.startswith("dit.") for name in changed)


def test_training_with_a_frozen_text_model(tmp_path):
    """Whose tokenizer makes nothing of "": the null context is all padding, and stays so."""
    source = save_text_model("t5", tmp_path / "t5")
    flags = ["--data", write_clips(tmp_path / "clips", 4), "--out", tmp_path / "out", *TYPED]
    assert exit_code("train.py", *flags, "--text", source) == 0
    pairs = np.load(next((tmp_path / "out/cache").glob("couplings_rf2-*.npy")))
    assert np.isfinite(pairs).all() and pairs[:, 1].any((1, 2)).all()
    model = FlashAudio.from_pretrained(tmp_path / "out/distill")
    assert model.config.text.encoder == str(source) and model.config.dit.context_dim == 16
    with opened(*flags, "--text", os.path.relpath(source)) as run:
        clips = train.Latents(run, model)
        assert run.done("vae")                          # however the folder is spelt
    assert clips.parts == ("dit",) and clips.texts.dtype == np.float16


def test_reflow_straightens_and_distillation_takes_the_whole_way_at_once(tmp_path, monkeypatch):
    """From noise and captions held out, a 2-RF goes far straighter than the CFM. Where it comes in
    four steps, the distilled model comes in one: .20 to .28 of the 2-RF's own error (4 seeds)."""
    monkeypatch.setitem(fa.SIZES, "toy", TOY)
    data = toy.write_toy_set(tmp_path / "toy", 400, 64)
    flags = """--device cpu --batch_size 8 --warmup 20 --vae_steps 80 --cfm_steps 100 --rf1_steps 5
        --rf1_pairing immiscible --rf2_couplings 96 --rf2_coupling_steps 4 --rf2_guidance 3
        --anchor_steps 1 --rf2_steps 60 --distill_couplings 192 --distill_steps 50""".split()
    with opened("--data", data, "--out", tmp_path / "out", *flags) as run:
        train.main(run)
        captions = [run.data.captions[i] for i in run.data.test]
        models = {stage: run.load(stage) for stage in ("cfm", "rf2", "distill")}
    z0, bend, error = torch.randn(64, 20, 32, generator=rng(99)), {}, {}
    end = models["rf2"].sample_latents(captions, 4, z0=z0)
    for stage, model in models.items():
        path = model.sample_latents(captions, 24, z0=z0, return_trajectory=True)
        bend[stage] = fa.straightness(path)
        error[stage] = (model.sample_latents(captions, 1, z0=z0) - end).square().mean().item()
    assert bend["rf2"] < 0.4 * bend["cfm"], bend
    assert error["distill"] < 0.75 * error["rf2"] < 0.3 * error["cfm"], error
