"""Train FlashAudio, all of Algorithm 1:  vae -> cfm -> rf1 -> rf2 -> distill, then the table.

    python train.py                                 the toy set, on sounds that it makes itself
    python train.py --data my_sounds --out out/my   a folder of sounds, or a CSV audio_path,caption

Each stage leaves a model in <out>/<stage>. A finished stage is used as it is, one that was
interrupted goes on, and a stage whose folder you delete is trained again.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import math
import os
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import flashaudio as fa
from data import toy
from data.clips import Clips, batch_indices
from evaluation.evaluate import evaluate
from evaluation.judges import best_guidance, check_judge
from evaluation.listen import draw_losses
from flashaudio import FlashAudio, InputError
from pretrained import make_an_audio, vocoders
from runs.cache import bar, blocks, cached, digest, write_atomically
from runs.processes import average_gradients, barrier, join, rank_and_world
from runs.run import Parser, Run, find_device, lock, name_of, one_line_errors

PAIRINGS = {"immiscible": fa.immiscible_pairing, "none": fa.no_pairing}


@dataclass
class Flags:
    """Defaults: the toy recipe; RECIPES has what others change. A stage depends on all flags down
    to its own last one, except those on where and how fast a run goes."""
    size: str = "toy"               # size and its recipe (toy's is shown): toy, small, base, large
    data: str = "toy"               # folder of sounds, CSV with audio_path,caption[,split], or toy
    windows: int = 4                # most clips that one recording is cut into
    loop: bool = False              # repeat a short sound to a clip's length; else silence follows
    out: str = ""                   # folder of the run; out/<size> if not given
    init: str = ""                  # Make-An-Audio 3 file, or repo_id:path, in place of vae and cfm
    text: str = "bytes"             # text encoder: bytes is trained here; else a folder or hub id
    device: str = "auto"            # cpu, cuda, cuda:1 or mps; auto takes cuda where there is one
    seed: int = 0                   # seed of weights, noise and the order of the data
    # every stage
    batch_size: int = 16            # clips per step; the paper: 4 GPUs x 16
    grad_accum: int = 1             # parts that a step is computed in: less memory, same gradient
    lr: float = 1.5e-3              # peak learning rate of cfm, rf2 and distill
    lr_end: float = 0.05            # learning rate at the end, as a share of the peak
    warmup: int = 50                # steps in which the learning rate rises to its peak
    grad_clip: float = 1.0          # largest gradient norm; Make-An-Audio 3's
    ema: float = 0.995              # decay of the average of the weights, which is what is saved
    caption_dropout: float = 0.2    # share of captions replaced by ""; Make-An-Audio 3's
    # vae
    vae_steps: int = 1800           # steps of stage vae
    vae_lr: float = 1.5e-3          # peak learning rate of stage vae
    vae_frames: int = 64            # mel frames of a clip that a step of stage vae sees
    vae_kl_weight: float = 3e-2     # weight of the KL term: more makes a smoother, blurred latent
    # cfm, rf1: flow matching, rectified flow
    cfm_steps: int = 1500           # steps of stage cfm
    rf1_pairing: str = "immiscible"  # how stage rf1 hands out noise: immiscible (Eq. 9) or none
    rf1_lr: float = 5e-4            # peak learning rate of stage rf1; a large one undoes the CFM
    rf1_steps: int = 500            # steps of stage rf1
    # rf2: reflow. Of its couplings the paper says nothing but Eq. 10-11
    rf2_couplings: int = 4000       # (noise, sample) pairs that rf2 is trained on
    rf2_coupling_steps: int = 8     # Euler steps that make a pair of rf2
    rf2_guidance: float = 3.0       # guidance scale of the pairs of rf2; 0: 1 to 3, by measurement
    anchor_steps: int = 0           # iterations of Eq. 10 at each Euler step of a pair; 0: none
    anchor_lr: float = 1e-2         # learning rate of Eq. 10 at t = 0
    anchor_tol: float = 1e-5        # loss of Eq. 10 at t = 0 below which a sample is left alone
    rf2_steps: int = 1500           # steps of stage rf2
    # distill
    distill_couplings: int = 9000   # pairs that distill is trained on; it overfits on few
    distill_coupling_steps: int = 4  # Euler steps that make a pair of distill
    distill_guidance: float = 1.0   # guidance scale of the pairs of distill; 1: the 2-RF has it
    distill_steps: int = 1200       # steps of stage distill
    # how it is judged and saved
    eval_clips: int = 160           # held-out captions in the table
    judge: str = ""                 # public CLAP model for the table; else mels are compared
    vocoder: str = "griffin-lim"    # griffin-lim, hifigan:<hub id or folder> or bigvgan:<folder>
    save_every: float = 60.0        # seconds between checkpoints

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            low = 1 if isinstance(f.default, int) else 0
            low = {"seed": 0, "loop": 0, "anchor_steps": 0, "eval_clips": 2}.get(f.name, low)
            if isinstance(value, str):
                setattr(self, f.name, os.path.expanduser(value))
            elif not low <= value < math.inf:
                raise InputError(f"--{f.name} is {value}, must be a number of at least {low}")
        if self.seed >= 2 ** 31 or self.caption_dropout > 1:
            raise InputError("--seed must be below 2^31, --caption_dropout at most 1")
        for name, known in (("size", fa.SIZES), ("rf1_pairing", PAIRINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"--{name} is {getattr(self, name)}, must be one of {list(known)}")
        self.out = self.out or f"out/{self.size}"


JUDGE = "laion/clap-htsat-unfused"
# --data at toy size: chosen on drum hits, recordings and notes, see docs/errata.md
OWN = dict(
    vae_steps=5400, vae_kl_weight=1e-2,     # recordings need a sharper latent than the toy's sounds
    rf1_pairing="none",                     # pairing pulls captions towards their common mean
    rf2_couplings=8000, rf2_guidance=0.0,   # how much guidance helps depends on the captions
    rf2_steps=1600, distill_couplings=4000, distill_steps=500)
# Ours: from scratch in an evening on a GPU of 24 GB
EVENING = dict(
    text="google/flan-t5-base", batch_size=128, lr=3e-4, warmup=1000, ema=0.999, vae_steps=30_000,
    vae_lr=3e-4, vae_frames=128, vae_kl_weight=1e-3,    # 1e-2 tolerates 4 dB of error
    cfm_steps=45_000, rf1_pairing="none", rf1_steps=10_000, rf1_lr=1e-4,        # as above
    rf2_couplings=100_000, rf2_coupling_steps=12, rf2_guidance=0.0, rf2_steps=20_000,
    distill_couplings=200_000, distill_steps=15_000,                # it overfits on few
    eval_clips=400, save_every=300.0, judge=JUDGE, vocoder="hifigan:microsoft/speecht5_hifigan")
# The paper gives batch, learning rate and steps of the 1-RF (§4.1) and has --init (§3.2); rest ours
PAPER = dict(
    batch_size=64, grad_accum=4, lr=4.8e-5, lr_end=1.0, warmup=1000, ema=0.9999,
    vae_steps=40_000, vae_lr=1e-4, vae_frames=624, vae_kl_weight=1e-6, cfm_steps=100_000,
    rf1_steps=40_000, rf1_lr=4.8e-5, rf2_couplings=50_000, rf2_coupling_steps=24, anchor_steps=1,
    rf2_steps=40_000, distill_couplings=50_000, distill_coupling_steps=24, distill_steps=40_000,
    eval_clips=1000, save_every=900.0, judge=JUDGE)
RECIPES = {"toy": {}, "own": OWN, "small": EVENING, "base": PAPER, "large": PAPER}


def parse_flags(argv: list[str] | tuple[str, ...] = ()) -> Flags:
    """The flags given, over the recipe that they mean. Raises InputError for one that is wrong."""
    parser = Parser("train.py", __doc__)
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?# (.*)$", inspect.getsource(Flags), re.M))
    for f in fields(Flags):
        how = {"action": "store_true"} if f.type == "bool" else {"type": type(f.default)}
        parser.add_argument(f"--{f.name}", help=f"{comments[f.name]} [{f.default}]",
                            default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    size = given.setdefault("size", "base" if "init" in given else "toy")
    recipe = "own" if size == "toy" and given.get("data", "toy") != "toy" else size
    return Flags(**{**RECIPES.get(recipe, {}), **given})


def main(run: Run) -> None:
    """Algorithm 1."""
    if run.flags.init:
        model = import_public(run)                          # §3.2: a flow that is trained already
    else:
        model = train_vae(run)                              # mel <-> latent
        model = train_cfm(run, model)                       # flow matching
    model = train_rf1(run, model, PAIRINGS[run.flags.rf1_pairing])      # Eq. 4, 6-7, 9
    model = train_rf2(run, model, Couplings(run, model, "rf2"))         # Eq. 5, 8, 10-12
    distill(run, model, Couplings(run, model, "distill"))               # Eq. 10-11, 13
    if rank_and_world()[0] == 0:
        evaluate(run)                                       # Eq. 14


# ---- Batches: a source has rows, their ends (noise, data), and texts[place[row]], their captions -

class Latents:
    """A source of batches: noise, and VAE latents of the clips to train on."""

    def __init__(self, run: Run, model: FlashAudio):
        data = run.data
        self.rows = data.train
        self.file = data.file
        self.posterior = data.latents(model)        # mean and std, (files, 2, C, L)
        self.scale = model.scale_factor.cpu()
        if model.text.trained:                      # learns with the flow: give it the captions
            self.parts = ("text", "dit")
            self.texts = model.text.tokenize(["", *data.captions]).numpy()
            self.place = np.arange(1, len(self.texts))
        else:                                       # frozen: its contexts are computed once
            self.parts = ("dit",)
            self.texts, self.place = data.contexts(model)

    def ends(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        eps, z0 = torch.randn(2, len(rows), *self.posterior.shape[2:], generator=generator)
        mean, std = torch.from_numpy(self.posterior[self.file[rows]]).unbind(1)
        return z0, self.scale * (mean + std * eps)


class Couplings:
    """Eq. 10-11, a source of batches: noise, and the sample that a model's ODE makes of it.

    sampler: any function that is called as `make_couplings` is.
    """

    def __init__(self, run: Run, model: FlashAudio, stage: str,
                 sampler: Callable[..., Tensor] = fa.make_couplings):
        flags, data = run.flags, run.data
        self.run, self.model, self.stage, self.sampler = run, model, stage, sampler
        clips = data.some(getattr(flags, f"{stage}_couplings"), flags.seed)
        self.rows = np.arange(len(clips))
        self.texts, place = data.contexts(model)
        self.place = place[clips]                   # whose caption each pair has
        steps = getattr(flags, f"{stage}_coupling_steps")
        guidance = getattr(flags, f"{stage}_guidance") or best_guidance(run, model, steps)
        self.how = (steps, guidance, flags.anchor_steps, flags.anchor_lr, flags.anchor_tol)
        self.key = digest(model, data.key, flags.seed, len(clips), self.how, name_of(sampler))

    def make(self) -> None:
        """latents: noise and sample of each pair, (n, 2, C, L)."""
        began = time.time()
        path = self.run.data.cache / f"couplings_{self.stage}-{self.key}.npy"
        self.latents = cached(path, (len(self.rows), 2, *self.model.latent_shape()), self.fill)
        self.seconds = time.time() - began
        print(f"{self.stage}: {len(self.latents)} couplings in {self.seconds:.0f} s")

    def fill(self, array: np.ndarray) -> None:
        run, model = self.run, self.model.to(self.run.device).requires_grad_(False)
        run.compile(model)
        null = torch.tensor(self.texts[:1]).to(run.device).float()      # may be float16
        size = math.ceil(run.flags.batch_size / run.flags.grad_accum)
        for i in blocks(array, size, "pairs"):
            if array[i:i + size, 1].any((1, 2)).all():      # done by a run that was interrupted
                continue
            rows = self.rows[i:i + size]
            generators = [run.generator(self.stage, "couplings", int(row)) for row in rows]
            z0 = torch.stack([torch.randn(array.shape[2:], generator=g) for g in generators])
            context = torch.from_numpy(self.texts[self.place[rows]]).to(run.device).float()
            with fa.autocast(run.device):
                z1 = self.sampler(model, z0.to(run.device), context, null.expand_as(context),
                                  *self.how)
            array[i:i + size] = torch.stack([z0, z1.cpu()], 1)

    def ends(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.latents[rows]).unbind(1)


def get_batch(run: Run, stage: str, source: Latents | Couplings, density: Callable[..., Tensor],
              pairing: Callable[..., Tensor], step: int) -> list[Tensor]:
    """z0, z1 (B, C, L), t (B,), texts (B, ...) of a step: a pure function of seed, stage, step."""
    flags = run.flags
    generator = run.generator(stage, step)
    rows = source.rows[batch_indices(len(source.rows), flags.batch_size, step, flags.seed)]
    z0, z1 = source.ends(rows, generator)
    t = density(len(rows), generator=generator)
    kept = torch.rand(len(rows), generator=generator) >= flags.caption_dropout
    text = torch.from_numpy(source.texts[np.where(kept, source.place[rows], 0)])
    z0, z1, t, text = share(z0, z1, t, text)
    return [pairing(z0, z1), z1, t, text]


def share(*batch: Tensor) -> list[Tensor]:
    """The part of a batch that this process works on, where there are several."""
    rank, world = rank_and_world()
    return [x[rank::world] for x in batch]


# ---- The loop ------------------------------------------------------------------------------------

def fit(run: Run, stage: str, model: FlashAudio, parts: tuple[str, ...],
        draw: Callable[[int], list[Tensor]], loss: Callable[..., Tensor], steps: int, lr: float,
        check: Callable[[int], list[Tensor]] | None = None) -> FlashAudio:
    """Train `parts` of the model on loss(model, *draw(step)); save the average of its weights.

    check: i -> a batch of validation clips, whose loss is printed ten times a stage.
    """
    flags, first = run.flags, rank_and_world()[0] == 0
    model.to(run.device).requires_grad_(False)
    weights = []
    for part in parts:
        weights += getattr(model, part).requires_grad_().parameters()
    ema = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr, fused=run.device.type in ("cpu", "cuda"))
    checkpoint = run.folder(stage) / "train_state.pt"
    step, seconds, smooth = resume(checkpoint, weights, ema, optimizer)
    run.compile(model)
    log = open(run.out / "metrics.jsonl" if first else os.devnull, "a", buffering=1)
    progress = bar(None, stage, initial=step, total=steps, unit="step")
    began = saved = time.time()
    while step < steps:
        rate = lr * learning_rate(flags, step, steps)
        optimizer.param_groups[0]["lr"] = rate
        batch = to_device(run, draw(step))
        mean = 0.0
        for part in zip(*(x.chunk(flags.grad_accum) for x in batch)):
            with fa.autocast(run.device):
                value = loss(model, *part) * (len(part[0]) / len(batch[0]))
            value.backward()
            mean += value.detach()
        average_gradients(weights)                      # over processes, where there are several
        norm = torch.nn.utils.clip_grad_norm_(weights, flags.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(flags.ema, step / (step + 9))       # short memory at first
        torch._foreach_lerp_(ema, [p.detach() for p in weights], 1 - decay)
        progress.update()
        if step % 10 and step < steps:
            continue
        line = {"stage": stage, "step": step, "loss": mean.item(), "grad_norm": norm.item(),
                "lr": rate, "seconds": round(seconds + time.time() - began, 4)}
        if not math.isfinite(line["loss"] + line["grad_norm"]):
            raise InputError(f"{stage}: the loss is not finite at step {step}; the last checkpoint "
                             f"is kept. A smaller --lr or a longer --warmup usually helps")
        smooth = line["loss"] if smooth is None else 0.9 * smooth + 0.1 * line["loss"]
        progress.set_postfix_str(f"loss {smooth:.4f}")
        if check is not None and 10 * step // steps > 10 * (step - 10) // steps:
            line["held_out"] = held_out_loss(run, model, loss, check)
            progress.write(f"{stage}: step {step}, held-out loss {line['held_out']:.4f}")
        log.write(json.dumps(line) + "\n")
        if first and step < steps and time.time() - saved > flags.save_every:
            saved, state = time.time(), io.BytesIO()
            torch.save({"step": step, "seconds": line["seconds"], "loss": smooth, "ema": ema,
                        "weights": weights, "optimizer": optimizer.state_dict()}, state)
            write_atomically(checkpoint, state.getbuffer())
    progress.close()
    torch._foreach_copy_([p.detach() for p in weights], ema)
    if "vae" in parts:                                  # scale latents to std 1, over 1024 clips
        posterior = run.data.latents(model)[run.data.some_files(flags.seed)]
        mean, std = torch.from_numpy(posterior).unbind(1)
        model.scale_factor.fill_((mean.var() + std.square().mean()).rsqrt())
    seconds += time.time() - began
    run.save(stage, model.eval(), seconds)
    print(f"{stage}: {steps} steps in {seconds:.0f} s, loss {smooth:.4f} -> {run.folder(stage)}")
    if first:
        draw_losses(run.out)
    return model


def to_device(run: Run, batch: list[Tensor]) -> list[Tensor]:
    """The batch on the run's device; to a GPU it travels while the step before is computed."""
    on_gpu = run.device.type == "cuda"
    pinned = [x.pin_memory() if on_gpu else x for x in batch]
    return [x.to(run.device, non_blocking=on_gpu) for x in pinned]


def learning_rate(flags: Flags, step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to lr_end."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / flags.warmup) * (flags.lr_end + (1 - flags.lr_end) * cosine)


def resume(checkpoint: Path, weights: list[Tensor], ema: list[Tensor],
           optimizer: torch.optim.Optimizer) -> tuple[int, float, float | None]:
    """Take up what an interrupted stage has saved -> its step, seconds and running loss."""
    barrier()
    if not checkpoint.exists():
        return 0, 0.0, None
    try:
        state = torch.load(checkpoint, map_location=weights[0].device, weights_only=True)
        for ours, saved in zip([*weights, *ema], [*state["weights"], *state["ema"]]):
            ours.detach().copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as e:                              # torch, pickle and zip have many
        raise InputError(f"{checkpoint}: cannot be read, or is of another network: delete it to "
                         "begin the stage again") from e
    print(f"{checkpoint.parent.name}: continuing at step {state['step']}")
    return state["step"], state["seconds"], state["loss"]


@torch.no_grad()
def held_out_loss(run: Run, model: FlashAudio, loss: Callable[..., Tensor],
                  check: Callable[[int], list[Tensor]]) -> float:
    """Mean loss of 128 validation clips, each time with the same noise and t."""
    losses = []
    for i in range(max(1, 128 // run.flags.batch_size)):
        with fa.autocast(run.device):
            losses.append(loss(model, *to_device(run, check(i))).item())
    return float(np.mean(losses))


# ---- The stages: pairing, density, loss and sampler are arguments, any callable ------------------

def train_vae(run: Run) -> FlashAudio:
    """The mel VAE, on pieces of clips."""
    flags, data = run.flags, run.data
    if run.done("vae"):
        return run.load("vae")
    model = new_model(run)
    frames = max(1, min(flags.vae_frames, model.config.frames) // model.stride) * model.stride

    def draw(step: int) -> list[Tensor]:
        generator = run.generator("vae", step)
        rows = data.train[batch_indices(len(data.train), flags.batch_size, step, flags.seed)]
        start = torch.randint(model.config.frames - frames + 1, (), generator=generator).item()
        shape = (len(rows), model.config.vae.embed_dim, frames // model.stride)
        noise = torch.randn(shape, generator=generator)
        return share(torch.from_numpy(data.mels[data.file[rows], :, start:start + frames]), noise)

    def loss(model: FlashAudio, mel: Tensor, noise: Tensor) -> Tensor:
        return fa.vae_loss(model.vae, mel, noise, flags.vae_kl_weight)

    return fit(run, "vae", model, ("vae",), draw, loss, flags.vae_steps, flags.vae_lr)


def new_model(run: Run) -> FlashAudio:
    """An untrained model: its first weights come from the seed, its mean mel from the clips."""
    config, text = fa.SIZES[run.flags.size], run.flags.text
    if text != "bytes":
        text = str(Path(text).resolve()) if Path(text).is_dir() else text
        dit = replace(config.dit, context_dim=fa.pretrained_width(text))
        config = replace(config, dit=dit, text=fa.TextConfig(text, max_length=77))
    with torch.random.fork_rng(devices=[]):             # the global generator stays as it was
        torch.manual_seed(run.flags.seed)
        model = FlashAudio(config)
    mels = run.data.mels[run.data.some_files(run.flags.seed)]
    model.vae.center(torch.from_numpy(mels.mean((0, 2))))
    return model


def import_public(run: Run) -> FlashAudio:
    """In place of stages vae and cfm: the public model that the paper starts from (§3.2)."""
    if not run.done("cfm"):
        text = run.flags.text
        tokenizers = None if text == "bytes" else tuple(text.split(","))
        model = make_an_audio.load(run.flags.init, tokenizers, str(run.device))
        if model.text is None:
            raise InputError(f"{run.flags.init}: has no text stage, so it can't be trained on")
        model.config.frames = run.data.mels.shape[2]        # of the clips to be trained on
        run.save("cfm", model)
    return run.load("cfm")


def train_flow(run: Run, stage: str, model: FlashAudio, pairing: Callable[..., Tensor],
               density: Callable[..., Tensor], loss: Callable[..., Tensor], steps: int,
               lr: float) -> FlashAudio:
    """What cfm and rf1 share: the flow and the text encoder are trained on clips."""
    if run.done(stage, model, pairing, density, loss):
        return run.load(stage)
    clips = Latents(run, model)
    others = copy(clips)
    others.rows = run.data.validation
    draw = partial(get_batch, run, stage, clips, density, pairing)
    check = partial(get_batch, run, f"{stage}, held out", others, density, pairing)
    return fit(run, stage, model, clips.parts, draw, loss, steps, lr,
               check if len(others.rows) else None)


def train_cfm(run: Run, model: FlashAudio, density: Callable[..., Tensor] = fa.uniform,
              loss: Callable[..., Tensor] = partial(fa.rectified_flow_loss, sigma_min=1e-4)
              ) -> FlashAudio:
    """Flow matching as in the public code: noise and data paired at random, uniform t."""
    flags = run.flags
    return train_flow(run, "cfm", model, fa.no_pairing, density, loss, flags.cfm_steps, flags.lr)


def train_rf1(run: Run, model: FlashAudio, pairing: Callable[..., Tensor] = fa.immiscible_pairing,
              density: Callable[..., Tensor] = fa.logit_normal,
              loss: Callable[..., Tensor] = fa.rectified_flow_loss) -> FlashAudio:
    """1-RF: Eq. 4 with t of Eq. 6-7 and noise that Eq. 9 has paired with the data."""
    flags = run.flags
    return train_flow(run, "rf1", model, pairing, density, loss, flags.rf1_steps, flags.rf1_lr)


def train_rf2(run: Run, model: FlashAudio, pairs: Couplings,
              density: Callable[..., Tensor] = fa.mix_exp,
              loss: Callable[..., Tensor] = fa.rectified_flow_loss) -> FlashAudio:
    """2-RF: Eq. 5 and 12 on couplings, with t of Eq. 8."""
    if run.done("rf2", pairs, density, loss):
        return run.load("rf2")
    pairs.make()
    draw = partial(get_batch, run, "rf2", pairs, density, fa.no_pairing)
    return fit(run, "rf2", model, ("dit",), draw, loss, run.flags.rf2_steps, run.flags.lr)


def distill(run: Run, model: FlashAudio, pairs: Couplings,
            loss: Callable[..., Tensor] = fa.distill_loss) -> FlashAudio:
    """Eq. 13: at t = 0. No caption is dropped."""
    flags = run.flags
    if run.done("distill", pairs, loss):
        return run.load("distill")
    pairs.make()

    def draw(step: int) -> list[Tensor]:
        rows = batch_indices(len(pairs.rows), flags.batch_size, step, flags.seed)
        z0, z1 = pairs.ends(rows, None)
        return share(z0, z1, torch.from_numpy(pairs.texts[pairs.place[rows]]))

    return fit(run, "distill", model, ("dit",), draw, loss, flags.distill_steps, flags.lr)


# ---- A run ---------------------------------------------------------------------------------------

@contextmanager
def open_run(flags: Flags):
    """`with open_run(flags) as run:` has the run's folder for itself, and its data read."""
    device = join(find_device(flags.device))
    torch.set_float32_matmul_precision("high")
    out, (rank, world) = Path(flags.out), rank_and_world()
    if flags.batch_size % world:
        raise InputError(f"--batch_size {flags.batch_size} can't be split over {world} processes")
    with lock(out) if rank == 0 else nullcontext():
        if flags.data == "toy" and rank == 0:
            toy.write_toy_set(out / "data")
        barrier()
        source = out / "data/manifest.csv" if flags.data == "toy" else Path(flags.data)
        frames = fa.SIZES[flags.size].frames
        data = Clips(source, out / "cache", frames, flags.windows, flags.loop)
        check_judge(flags.judge, data)
        run = Run(flags, data, device, vocoders.load(flags.vocoder, str(device)))
        run.say_what_changed()
        yield run


if __name__ == "__main__":
    with one_line_errors("train.py"), open_run(parse_flags(sys.argv[1:])) as opened:
        main(opened)
