"""Train FlashAudio, all of Algorithm 1:  vae -> cfm -> rf1 -> rf2 -> distill -> eval.

    python train.py                                       the toy preset, on sounds it makes itself
    python train.py --data my/manifest.csv --out out/my   your own sounds: audio_path,caption

Each stage leaves a loadable model in <out>/<stage>. A run that was interrupted continues when its
command is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

from runs.flags import check_limits, flag, read_flags


@dataclass
class Flags:
    """Defaults are the toy recipe; PRESETS has what the larger sizes change. A stage depends on the
    flags that begin with its name or that of an earlier stage, and on those of every stage."""
    preset: str = flag("toy", "size of the model", choices=("toy", "small", "base", "large"))
    data: str = flag("toy", "a CSV with audio_path,caption[,split], a folder of sounds, or 'toy'")
    windows: int = flag(4, "clips that a recording of several times the length becomes, at most")
    out: str = flag("", "folder of the run; out/<preset> if not given")
    init: str = flag("", "Make-An-Audio 3 in place of stages vae and cfm: a file or repo_id:path")
    text: str = flag("bytes", "bytes, trained here, or a frozen text encoder (CLAP, T5, BERT ...), "
                              "folder or hub id; with --init its tokenizers, 'BERT,T5'")
    stage: str = flag("all", "one stage to run, trained anew if its settings have changed",
                      choices=("all", "vae", "cfm", "rf1", "rf2", "distill", "eval"))
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto: cuda where there is one")
    seed: int = flag(0, "of weights, noise and the order of the data", low=0, high=2**31)
    # every stage
    batch_size: int = flag(16, "clips per step")                        # the paper: 4 GPUs x 16
    grad_accum: int = flag(1, "parts of a step: less memory, the same gradient")
    lr: float = flag(1.5e-3, "peak learning rate of cfm, rf2 and distill")
    lr_end: float = flag(0.05, "learning rate at the end, in peaks; 1 is constant", high=1)
    warmup: int = flag(50, "steps of linear warm-up")
    grad_clip: float = flag(1.0, "largest gradient norm")               # public code
    ema: float = flag(0.995, "decay of the weight average that is saved; 0 is off", high=1)
    caption_dropout: float = flag(0.2, "share of captions replaced by ''", high=1)    # public code
    # vae
    vae_steps: int = flag(900, "steps of stage vae; 5400 of your own sounds")
    vae_lr: float = flag(1.5e-3, "its peak learning rate")
    vae_frames: int = flag(64, "mel frames cut from each clip in it")   # convolutions need no more
    vae_kl_weight: float = flag(3e-2, "weight of the KL term")          # ours: a smooth latent
    # cfm, rf1: flow matching, rectified flow
    cfm_steps: int = flag(1500, "steps of stage cfm")
    rf1_steps: int = flag(500, "steps of stage rf1")
    rf1_lr: float = flag(5e-4, "its peak learning rate")                # a large one undoes the CFM
    # rf2: reflow. Of its couplings the paper says nothing but Eq. 10-11
    rf2_couplings: int = flag(2000, "(noise, sample) pairs that rf2 is trained on")
    rf2_coupling_steps: int = flag(10, "Euler steps a pair")
    rf2_guidance: float = flag(3.0, "guidance scale of the pairs")      # the public sampler's
    rf2_anchor_steps: int = flag(1, "anchored optimisation: iterations a step; 0 is off", low=0)
    rf2_anchor_lr: float = flag(1e-2, "its learning rate at t = 0")     # null-text inversion
    rf2_anchor_tol: float = flag(1e-5, "loss at t = 0 below which a sample is left alone")
    rf2_steps: int = flag(1600, "steps of stage rf2")
    # distill
    distill_couplings: int = flag(12000, "pairs that distill is trained on")  # few: learnt by heart
    distill_coupling_steps: int = flag(4, "Euler steps a pair")
    distill_guidance: float = flag(1.0, "guidance scale of the pairs")  # the 2-RF has learnt ω
    distill_steps: int = flag(1500, "steps of stage distill")
    # how it is judged and saved
    eval_clips: int = flag(160, "held-out captions in stage eval", low=2)
    judge: str = flag("", "of stage eval: CLAP[,AST], folders or hub ids; '' compares log-mels")
    vocoder: str = flag("griffin-lim", "griffin-lim, hifigan:<hub id or folder>, bigvgan:<folder>")
    save_every: float = flag(60.0, "seconds between checkpoints")
    plan: float = flag(0.0, "TFLOP/s of a GPU: print what the run would take, and stop")

    def __post_init__(self):
        check_limits(self)
        self.out = self.out or f"out/{self.preset}"
        if self.grad_accum > self.batch_size:
            raise ValueError("--grad_accum is larger than --batch_size: a part would be empty")
        if self.init and (self.stage == "vae" or self.preset in ("toy", "small")):
            raise ValueError("--init brings VAE and size: no --stage vae, no --preset toy or small")


JUDGES = "laion/clap-htsat-unfused,MIT/ast-finetuned-audioset-10-10-0.4593"
# Ours: from scratch in an evening on a GPU of 24 GB, about 3 hours by --plan 60
EVENING = dict(
    text="google/flan-t5-base", batch_size=128, lr=3e-4, warmup=1000, ema=0.999,
    vae_steps=30_000, vae_lr=3e-4, vae_frames=128, vae_kl_weight=1e-2, cfm_steps=45_000,
    rf1_steps=10_000, rf1_lr=1e-4, rf2_couplings=30_000, rf2_coupling_steps=16, rf2_steps=20_000,
    distill_couplings=40_000, distill_coupling_steps=8, distill_steps=15_000, eval_clips=400,
    save_every=300.0, judge=JUDGES)
# The paper gives batch, learning rate and steps of the 1-RF (§4.1) and has --init (§3.2); rest ours
PAPER = dict(
    batch_size=64, grad_accum=4, lr=4.8e-5, lr_end=1.0, warmup=1000, ema=0.9999,
    vae_steps=40_000, vae_lr=1e-4, vae_frames=624, vae_kl_weight=1e-6, cfm_steps=100_000,
    rf1_steps=40_000, rf1_lr=4.8e-5, rf2_couplings=50_000, rf2_coupling_steps=24,
    rf2_anchor_steps=10, rf2_steps=40_000, distill_couplings=50_000, distill_coupling_steps=24,
    distill_guidance=3.0, distill_steps=40_000, eval_clips=1000, save_every=900.0, judge=JUDGES)
PRESETS = {"toy": {}, "small": EVENING, "base": PAPER, "large": PAPER}
OWN_SOUNDS = dict(vae_steps=5400, vae_kl_weight=1e-2)       # other sounds than the toy set's


def defaults(given: dict) -> dict:
    """The preset that the flags given mean, and the defaults that it changes."""
    preset = given.get("preset", "base" if given.get("init") else "toy")
    own = preset == "toy" and given.get("data", "toy") != "toy"
    return {"preset": preset, **(OWN_SOUNDS if own else PRESETS[preset])}


def parse_flags(argv: list[str] | None = None) -> Flags:
    return read_flags(Flags, __doc__, defaults, argv)


if __name__ == "__main__":
    FLAGS = parse_flags()       # before the heavy imports: --help and a slip answer at once

import math
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import flashaudio as fa
from data import toy
from data.clips import Clips, Couplings, batch_indices
from evaluation.evaluate import evaluate
from evaluation.judges import check_judge
from evaluation.listen import draw_losses, hear
from flashaudio import FlashAudio
from pretrained import make_an_audio, vocoders
from runs.cache import blocks, cached, digest
from runs.plan import print_plan
from runs.processes import Objective, barrier, distributed, join, rank_and_world
from runs.run import Progress, Run, find_device, lock, names_of, one_line_errors, peak_memory
from runs.start import latent_scale, new_model

Pairing = Callable[[Tensor, Tensor], Tensor]        # z0, z1 -> z0 in the order of the data
Draw = Callable[[int], list[Tensor]]                # step -> a batch, this process's part, (B, ...)

# Pairing, density, loss and sampler are arguments: a fork calls a stage with a function of its own.


def main(run: Run) -> None:
    """Algorithm 1."""
    if run.flags.init:
        model = import_public(run)                          # §3.2: a flow that is trained already
    else:
        model = train_vae(run)                              # mel <-> latent
        model = train_cfm(run, model)                       # flow matching
    model = train_rf1(run, model)                           # Eq. 4, 6-7, 9
    pairs = couplings(run, model, "rf2")                    # Eq. 10-11
    model = train_rf2(run, model, pairs)                    # Eq. 5, 8, 12
    pairs = couplings(run, model, "distill")                # Eq. 10-11
    distill(run, model, pairs)                              # Eq. 13
    if run.flags.stage in ("all", "eval") and rank_and_world()[0] == 0:
        evaluate(run)                                       # Eq. 14


def fit(run: Run, stage: str, model: FlashAudio, parts: tuple[str, ...], draw: Draw,
        loss: Callable[..., Tensor], steps: int, lr: float) -> FlashAudio:
    """Train `parts` of the model on loss(model, *draw(step)), save the average of its weights."""
    flags = run.flags
    model.requires_grad_(False).cpu()                   # what is not trained needs no GPU
    weights = []
    for part in parts:
        weights += getattr(model, part).to(run.device).requires_grad_().parameters()
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr, fused=run.device.type in ("cpu", "cuda"))
    objective = distributed(Objective(model, loss), run.device)
    run.compile(model)
    progress = Progress(run, stage, steps, weights, average, optimizer)
    for step in progress:
        rate = lr * learning_rate(flags, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [x.to(run.device) for x in draw(step)]
        micro_batches = list(zip(*(x.chunk(flags.grad_accum) for x in batch)))
        mean = torch.zeros((), device=run.device)
        for micro_batch in micro_batches:
            # Under torchrun the processes average their gradients once, with the last of them
            objective.require_backward_grad_sync = micro_batch is micro_batches[-1]
            with run.autocast():
                value = objective(*micro_batch) * (len(micro_batch[0]) / len(batch[0]))
            value.backward()
            mean += value.detach()
        norm = torch.nn.utils.clip_grad_norm_(weights, flags.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(flags.ema, (step + 1) / (step + 10))                # short memory at first
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - decay)
        progress.log(mean, norm, rate)
    torch._foreach_copy_([p.detach() for p in weights], average)
    return finish(run, stage, model.eval(), progress)


def learning_rate(flags: Flags, step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to lr_end."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / flags.warmup) * (flags.lr_end + (1 - flags.lr_end) * cosine)


def finish(run: Run, stage: str, model: FlashAudio, progress: Progress) -> FlashAudio:
    """Save what a stage has trained, a VAE with the scale of its latents; let a person hear it."""
    model.to(run.device)
    if stage == "vae":
        model.scale_factor.copy_(latent_scale(model, run.data.some_mels(run.flags.seed)))
    run.save(stage, model, progress.seconds)
    print(f"{stage}: {progress.steps} steps in {progress.seconds:.0f} s, loss {progress.loss:.4f}, "
          f"peak memory {peak_memory(run.device):.1f} GiB -> {run.folder(stage)}")
    if rank_and_world()[0] == 0:
        hear(run, stage, model)
        draw_losses(run.out)
    return model


# ---- Stage vae -----------------------------------------------------------------------------------

def train_vae(run: Run) -> FlashAudio:
    """The mel VAE, on pieces of clips."""
    flags, data = run.flags, run.data
    if run.done("vae"):
        return run.load("vae")
    model = new_model(flags.preset, flags.text, flags.seed, data.some_mels(flags.seed))
    frames = max(1, min(flags.vae_frames, model.config.frames) // model.stride) * model.stride
    width = model.config.vae.embed_dim

    def draw(step: int) -> list[Tensor]:
        generator = run.generator("vae", step)
        rows = data.train[batch_indices(len(data.train), flags.batch_size, step, flags.seed)]
        start = torch.randint(model.config.frames - frames + 1, (), generator=generator).item()
        noise = torch.randn(len(rows), width, frames // model.stride, generator=generator)
        rows, noise = run.share(rows, noise)
        return [torch.from_numpy(data.mels[data.file[rows], :, start:start + frames]), noise]

    def loss(model: FlashAudio, mel: Tensor, noise: Tensor) -> Tensor:
        return fa.vae_loss(model.vae, mel, noise, flags.vae_kl_weight)

    return fit(run, "vae", model, ("vae",), draw, loss, flags.vae_steps, flags.vae_lr)


# ---- Stages cfm and rf1: on latents of real clips, with the text encoder -------------------------

def flow_batches(run: Run, stage: str, rows: np.ndarray, ends: Callable, texts: np.ndarray,
                 place: np.ndarray, density: Callable[..., Tensor],
                 pair: Pairing | None = None) -> Draw:
    """step -> z0, z1 (B, C, L), t (B,) and texts (B, ...) of a batch of `rows`.

    ends(rows, generator) -> z0, z1. Row i reads texts[place[i]], or the null text, texts[0].
    """
    flags = run.flags

    def draw(step: int) -> list[Tensor]:
        generator = run.generator(stage, step)
        batch = rows[batch_indices(len(rows), flags.batch_size, step, flags.seed)]
        z0, z1 = ends(batch, generator)
        t = density(len(batch), generator=generator)
        kept = torch.rand(len(batch), generator=generator) >= flags.caption_dropout
        text = torch.from_numpy(texts[np.where(kept, place[batch], 0)])
        z0, z1, t, text = run.share(z0, z1, t, text)
        if pair is not None:
            z0 = pair(z0, z1)
        return [z0, z1, t, text]

    return draw


def clip_batches(run: Run, stage: str, model: FlashAudio, density: Callable[..., Tensor],
                 pair: Pairing | None = None) -> tuple[Draw, tuple[str, ...]]:
    """flow_batches of noise and real clips, and the parts of the model that learn from them."""
    data = run.data
    latents = data.latents(model)                   # posterior: mean and std, (files, 2, C, L)
    scale = model.scale_factor.cpu()
    if model.text.trained:                          # learns with the flow: give it the captions
        parts = ("text", "dit")
        texts = model.text.tokenize(["", *data.captions]).numpy()
        place = np.arange(1, len(texts))
    else:                                           # frozen: its contexts are computed once
        parts = ("dit",)
        texts, place = data.contexts(model)

    def ends(rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        eps, z0 = torch.randn(2, len(rows), *latents.shape[2:], generator=generator)
        mean, std = torch.from_numpy(latents[data.file[rows]]).unbind(1)
        return z0, scale * (mean + std * eps)

    return flow_batches(run, stage, data.train, ends, texts, place, density, pair), parts


def train_cfm(run: Run, model: FlashAudio, density: Callable[..., Tensor] = fa.uniform,
              sigma_min: float = 1e-4) -> FlashAudio:
    """Flow matching as in the public code: noise and data paired at random, uniform t."""
    if run.done("cfm", model, density):
        return run.load("cfm")

    def loss(model: FlashAudio, *batch: Tensor) -> Tensor:
        return fa.rectified_flow_loss(model, *batch, sigma_min)

    draw, parts = clip_batches(run, "cfm", model, density)
    return fit(run, "cfm", model, parts, draw, loss, run.flags.cfm_steps, run.flags.lr)


def import_public(run: Run) -> FlashAudio:
    """In place of stages vae and cfm: the public model that the paper starts from (§3.2)."""
    if not run.done("cfm"):
        text = run.flags.text
        tokenizers = None if text == "bytes" else tuple(text.split(","))
        run.save("cfm", make_an_audio.load(run.flags.init, tokenizers, str(run.device)))
    return run.load("cfm")


def train_rf1(run: Run, model: FlashAudio, pair: Pairing = fa.immiscible_pairing,
              density: Callable[..., Tensor] = fa.logit_normal,
              loss: Callable[..., Tensor] = fa.rectified_flow_loss) -> FlashAudio:
    """1-RF: Eq. 4 with t of Eq. 6-7 and noise that Eq. 9 has paired with the data."""
    if run.done("rf1", model, pair, density, loss):
        return run.load("rf1")
    draw, parts = clip_batches(run, "rf1", model, density, pair)
    return fit(run, "rf1", model, parts, draw, loss, run.flags.rf1_steps, run.flags.rf1_lr)


# ---- Stages rf2 and distill: on the couplings of the model before, with frozen contexts ----------

def couplings(run: Run, model: FlashAudio, stage: str,
              sampler: Callable[..., Tensor] = fa.make_couplings,
              pair: Pairing | None = None) -> Couplings | None:
    """Eq. 10-11: what the model makes of noise for `stage` to learn from; None if not asked for.

    pair: hands out the noise before the ODE, near the latents of its captions.
    """
    flags, data = run.flags, run.data
    if flags.stage not in ("all", stage):
        return None
    contexts, place = data.contexts(model)
    clips = data.some(getattr(flags, f"{stage}_couplings"), flags.seed)     # whose caption each has
    size = max(1, flags.batch_size // flags.grad_accum)
    steps = getattr(flags, f"{stage}_coupling_steps")
    guidance = getattr(flags, f"{stage}_guidance")
    anchoring = (flags.rf2_anchor_steps, flags.rf2_anchor_lr, flags.rf2_anchor_tol)
    real = data.latents(model) if pair is not None else None

    def fill(array: np.ndarray) -> None:
        run.compile(model.requires_grad_(False), dynamic=None)      # Eq. 10 drops finished samples
        null = torch.tensor(contexts[:1]).to(run.device).float()    # frozen contexts are halves
        for i in blocks(array, size, "pairs"):
            if array[i:i + size, 1].any((1, 2)).all():      # done by a run that was interrupted
                continue
            rows = clips[i:i + size]
            generators = [run.generator(stage, "couplings", i + k) for k in range(len(rows))]
            z0 = torch.stack([torch.randn(array.shape[2:], generator=g) for g in generators])
            if pair is not None:
                means = torch.from_numpy(real[data.file[rows], 0])
                z0 = pair(z0, model.scale_factor.cpu() * means)
            context = torch.from_numpy(contexts[place[rows]]).to(run.device).float()
            with run.autocast():
                z1 = sampler(model, z0.to(run.device), context, null.expand(len(rows), -1, -1),
                             steps, guidance, *anchoring)
            array[i:i + size] = torch.stack([z0, z1.cpu()], 1)

    names = names_of(sampler, pair)
    key = digest(model, data.key, flags.seed, len(clips), steps, guidance, anchoring, names)

    def make() -> np.ndarray:
        began = time.time()
        shape = (len(clips), 2, *model.latent_shape())
        latents = cached(data.cache / f"couplings_{stage}-{key}.npy", shape, fill)
        run.spent = time.time() - began
        print(f"{stage}: {len(latents)} couplings in {run.spent:.0f} s")
        return latents

    return Couplings(make, contexts, place[clips], key)


def train_rf2(run: Run, model: FlashAudio, pairs: Couplings,
              density: Callable[..., Tensor] = fa.mix_exp,
              loss: Callable[..., Tensor] = fa.rectified_flow_loss,
              pair: Pairing | None = None) -> FlashAudio:
    """2-RF: Eq. 5 and 12 on couplings, t of Eq. 8. pair: their noise anew, as Algorithm 1 says."""
    flags = run.flags
    if run.done("rf2", pairs, density, loss, pair):
        return run.load("rf2")
    rows = np.arange(len(pairs.latents))
    draw = flow_batches(run, "rf2", rows, pairs.ends, pairs.contexts, pairs.place, density, pair)
    return fit(run, "rf2", model, ("dit",), draw, loss, flags.rf2_steps, flags.lr)


def distill(run: Run, model: FlashAudio, pairs: Couplings,
            loss: Callable[..., Tensor] = fa.distill_loss) -> FlashAudio:
    """Eq. 13: at t = 0. No caption is dropped."""
    flags = run.flags
    if run.done("distill", pairs, loss):
        return run.load("distill")
    count = len(pairs.latents)

    def draw(step: int) -> list[Tensor]:
        rows = batch_indices(count, flags.batch_size, step, flags.seed)
        z0, z1 = pairs.ends(rows)
        return run.share(z0, z1, torch.from_numpy(pairs.contexts[pairs.place[rows]]))

    return fit(run, "distill", model, ("dit",), draw, loss, flags.distill_steps, flags.lr)


# ---- A run ---------------------------------------------------------------------------------------

@contextmanager
def open_run(flags: Flags):
    """`with open_run(flags) as run:` has the run's folder for itself, and its data read."""
    device = join(find_device(flags.device), flags.batch_size)
    torch.set_float32_matmul_precision("high")
    out = Path(flags.out)
    first = rank_and_world()[0] == 0
    out.mkdir(parents=True, exist_ok=True)
    with lock(out) if first else nullcontext():
        if flags.data == "toy" and first:
            toy.write_toy_set(out / "data")
        barrier()
        source = out / "data/manifest.csv" if flags.data == "toy" else Path(flags.data)
        data = Clips(source, out / "cache", fa.PRESETS[flags.preset].frames, flags.windows)
        if flags.stage in ("all", "eval"):
            check_judge(flags.judge, data)
        yield Run(flags, data, device, vocoders.load(flags.vocoder, str(device)))


if __name__ == "__main__" and FLAGS.plan:
    print_plan(FLAGS)
elif __name__ == "__main__":
    with one_line_errors("train.py"), open_run(FLAGS) as opened:
        main(opened)
