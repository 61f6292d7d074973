"""Train FlashAudio, all of Algorithm 1:  vae -> cfm -> rf1 -> rf2 -> distill -> eval.

    python train.py                                       the toy preset on sounds it makes itself, on a CPU in minutes
    python train.py --data my/manifest.csv --out out/my   your own sounds: a CSV with the columns audio_path,caption

Each stage leaves a loadable model in <out>/<stage>. A run that was interrupted continues when its command is repeated.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from data.flags import flag, read_command_line

TIMESTEPS = ("uniform", "logit_normal", "mix_exp")


@dataclass
class Flags:
    """The command line. Defaults are the toy recipe; RECIPES holds what other presets and recipes change."""
    preset: str = flag("toy", "size of the model", choices=("toy", "small", "base", "large"))
    data: str = flag("toy", "manifest: a CSV with the columns audio_path,caption[,split]; 'toy' makes its own sounds")
    recipe: str = flag("paper", "paper: its choice wherever it makes one; measured: what the ablations found better", choices=("paper", "measured"))
    out: str = flag("", "folder of the run (default out/<preset>)")
    init: str = flag("cfm", "where rf1 starts: stage cfm; none, new weights; or a checkpoint of Make-An-Audio 3, a file or "
                            "repo_id:path/in/repo, which stands in for stages vae and cfm")
    text: str = flag("bytes", "text encoder: bytes (trained here), or a frozen CLAP, T5, BERT ... by folder or hub id; with a "
                              "public checkpoint its tokenizers, 'BERT,T5'")
    vocoder: str = flag("griffin-lim", "of stage eval: griffin-lim, hifigan:<hub id or folder>, bigvgan:<folder>")
    stage: str = flag("all", "one stage to run, trained anew if its settings have changed", choices=("all", "vae", "cfm", "rf1", "rf2", "distill", "eval"))
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto is cuda where there is one")
    seed: int = flag(0, "seed of weights, noise and order of the data")
    batch_size: int = flag(16, "clips per step")                    # the paper: 4 GPUs x 16
    grad_accum: int = flag(1, "parts that a step's clips are worked through in: less memory, the same gradient")
    vae_batch_size: int = flag(16, "clips per step of stage vae")
    vae_frames: int = flag(64, "mel frames cut from each clip in stage vae")  # a convolution needs no whole clips
    lr: float = flag(1.5e-3, "peak learning rate of the flow stages")  # a small network bears a large one
    vae_lr: float = flag(1.5e-3, "peak learning rate of the VAE")
    rf1_lr: float = flag(5e-4, "peak learning rate of stage rf1")   # it goes on from cfm: a large one would undo that first
    warmup: int = flag(50, "steps of linear warm-up")
    lr_end: float = flag(0.05, "learning rate at the end of a stage, as a share of its peak; 1 keeps it constant")
    ema: float = flag(0.995, "decay of the weight average that is saved and sampled from; 0 is off")
    grad_clip: float = flag(1.0, "largest gradient norm")           # public code
    vae_steps: int = flag(900, "steps of stage vae")
    cfm_steps: int = flag(1500, "steps of stage cfm")
    rf1_steps: int = flag(200, "steps of stage rf1")
    rf2_steps: int = flag(600, "steps of stage rf2")
    distill_steps: int = flag(480, "steps of stage distill")
    kl_weight: float = flag(3e-2, "weight of the VAE's KL term")     # ours: large enough for a smooth latent
    caption_dropout: float = flag(0.2, "share of captions replaced by '' in training")   # public code
    sigma_min: float = flag(1e-4, "noise left in the data end of stage cfm")             # public code
    cfm_timesteps: str = flag("uniform", "density of t in stage cfm", choices=TIMESTEPS)  # public code
    rf1_timesteps: str = flag("logit_normal", "density of t in stage rf1", choices=TIMESTEPS)       # Eq. 6
    rf2_timesteps: str = flag("mix_exp", "density of t in stage rf2", choices=TIMESTEPS)            # Eq. 8
    logit_mean: float = flag(0.0, "μ of logit-normal timesteps")    # Table 6: the best of -0.5, 0, 0.5
    logit_std: float = flag(1.0, "σ of logit-normal timesteps")     # Eq. 6
    mix_exp_a: float = flag(4.0, "a of Mix-Exp timesteps")          # Table 6: the best of 1, 2, 3, 4
    pairing: str = flag("immiscible", "how stage rf1 pairs noise and data", choices=("immiscible", "none", "knn", "c2ot"))
    knn_draws: int = flag(4, "noises that each clip chooses from under knn")
    c2ot_weight: float = flag(0.1, "weight of the distance of contexts under c2ot")  # at toy size a quarter of the noise stays
    pairing_reflow: str = flag("off", "Eq. 9 in stage rf2: off; the noise, before the ODE; or the finished couplings, literally",
                               choices=("off", "before", "literal"))
    couplings: int = flag(700, "(noise, sample) pairs that rf2 is trained on")
    distill_couplings: int = flag(3000, "pairs that distill is trained on")      # cheap; few, seen often, are learnt by heart
    coupling_steps: int = flag(6, "Euler steps per pair for rf2")
    distill_coupling_steps: int = flag(3, "Euler steps per pair for distill; the paths of the 2-RF are almost straight")
    guidance: float = flag(3.0, "ω of the couplings of stage rf2")  # not in the paper
    distill_guidance: float = flag(1.0, "ω of the couplings of stage distill")   # the 2-RF learnt guided samples: once is enough
    rectify: str = flag("anchored", "how guidance is kept in bounds", choices=("anchored", "cfg_zero", "plain"))
    anchor_steps: int = flag(1, "iterations of the anchored optimisation per Euler step; 0 is plain guidance")
    anchor_lr: float = flag(1e-2, "its learning rate at t = 0")     # null-text inversion, as the tolerance and the paper's 10 steps
    anchor_tol: float = flag(1e-5, "loss at t = 0 below which it leaves a sample alone, for steps of 1/50")
    eval_clips: int = flag(160, "held-out captions in stage eval")
    clap: str = flag("", "CLAP model of stage eval, folder or hub id, for fd and CLAP score; '' compares log-mels instead")
    ast: str = flag("", "AudioSet classifier (AST) of stage eval, folder or hub id, for the KL; needs --clap")
    ablate: str = flag("", "train and measure the recipe with each ingredient changed, over several seeds; full if bare",
                       choices=("full", "short"), nargs="?", const="full")
    seeds: int = flag(1, "seeds of --ablate, from --seed on [5 and 2]")
    rows: str = flag("", "of --ablate, only the rows with this in their name")
    bench: int = flag(0, "time this many steps of training on random latents instead [30 if bare]", nargs="?", const=30)
    save_every: float = flag(60.0, "seconds between checkpoints")
    compile: str = flag("auto", "torch.compile backbone and VAE loss; auto is on for cuda", choices=("auto", "on", "off"))


# The paper gives batch size, learning rate and steps of the 1-RF (§4.1) and leaves the others open.
PAPER = dict(batch_size=64, lr=4.8e-5, rf1_lr=4.8e-5, lr_end=1.0, warmup=1000, ema=0.9999, vae_frames=624, vae_lr=1e-4, kl_weight=1e-6,
             vae_steps=200_000, cfm_steps=200_000, rf1_steps=40_000, rf2_steps=40_000, distill_steps=40_000,
             couplings=50_000, distill_couplings=50_000, coupling_steps=24, distill_coupling_steps=24, anchor_steps=10, guidance=3.0, distill_guidance=3.0,
             grad_accum=4, save_every=900.0, eval_clips=1000, clap="laion/clap-htsat-unfused", ast="MIT/ast-finetuned-audioset-10-10-0.4593")
# What the ablations change, so that five seeds take hours and not days
ABLATIONS = {"full": dict(seeds=5, rf2_steps=400, distill_steps=400, couplings=600, distill_couplings=600),
             "short": dict(seeds=2, vae_steps=800, cfm_steps=600, rf1_steps=100, rf2_steps=150, distill_steps=150, couplings=128,
                           distill_couplings=128, eval_clips=96)}
RECIPES = {"toy": {}, "small": PAPER, "base": PAPER, "large": PAPER, "paper": {}, "measured": dict(pairing="none")}


def parse_flags(argv: list[str] | None = None) -> Flags:
    return read_command_line(__doc__, Flags, RECIPES, ABLATIONS, argv)


if __name__ == "__main__":
    FLAGS = parse_flags()           # before the heavy imports: --help and a mistyped flag answer at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # and so does Ctrl-C

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import flashaudio as fa
from data import toy
from data.evaluate import evaluate, is_toy, peak_memory
from data.listen import draw_losses, hear
from data.manifest import Data, bar, batch_indices, blocks, cached, digest, processes, wait_for_all
from data.run import (REFLOW, STAGES, Objective, Run, batches, compiled, join_processes, lock, mean_over_processes, save, shared_out, stop,
                      versions)
from data.public import read_checkpoint
from flashaudio import FlashAudio, InputError

# ---------------------------------------------------------------------------------------------------------------------------
# The training loop that all stages share
# ---------------------------------------------------------------------------------------------------------------------------


def fit(run: Run, stage: str, model: FlashAudio, parts: tuple[str, ...], draw, loss_of, spent: float = 0.0) -> None:
    """Train `parts` of the model on loss_of(*draw(step)) and save the result in the stage's folder.

    draw returns the tensors of this process's part of a batch. spent: seconds that the stage has taken already.
    """
    flags, folder, settings, (rank, world) = run.flags, run.folder(stage), run.settings(stage), processes()
    steps, peak = getattr(flags, f"{stage}_steps"), {"vae": flags.vae_lr, "rf1": flags.rf1_lr}.get(stage, flags.lr)
    parameters = {n: p for n, p in model.requires_grad_(False).named_parameters() if n.split(".")[0] in parts}
    for p in parameters.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=peak, fused=run.device.type in ("cpu", "cuda"))
    average = {n: p.detach().clone() for n, p in parameters.items()}
    start, state_file = 0, folder / "train_state.pt"
    if state_file.exists() and (state := read_checkpoint(state_file)).get("settings") == settings:
        start, spent = state["step"], state["seconds"]
        average = {n: x.to(run.device) for n, x in state["average"].items()}
        optimizer.load_state_dict(state["optimizer"])
        model.load_state_dict(state["weights"], strict=False)
        print(f"{stage}: continuing at step {start} of {steps}")
    objective = shared_out(Objective(model, loss_of), run.device)
    compiled(flags, run.device, model.dit, dynamic=False)

    def save_state(step: int) -> None:
        if rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save(state_file, {"step": step, "seconds": spent + time.time() - began, "settings": settings, "average": average,
                          "weights": {n: p.detach() for n, p in parameters.items()}, "optimizer": optimizer.state_dict()})
        draw_losses(Path(flags.out))

    began = saved = time.time()
    smooth = usual = None
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    with stop, open(Path(flags.out) / "metrics.jsonl" if rank == 0 else os.devnull, "a", buffering=1) as metrics:
        progress = bar(batches(run, range(start, steps), draw), stage, initial=start, total=steps, unit="step")
        for step, batch in progress:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            rate = peak * min(1.0, (step + 1) / flags.warmup) * (flags.lr_end + (1 - flags.lr_end) * cosine)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, rest = 0.0, len(batch[0])
            for part in zip(*(x.chunk(flags.grad_accum) for x in batch)):
                rest -= len(part[0])                # gradients are averaged over processes with the last part alone
                with objective.no_sync() if world > 1 and rest else nullcontext():
                    with run.autocast():
                        share = objective(*part) * (len(part[0]) / len(batch[0]))
                    share.backward()
                loss += share.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), flags.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(flags.ema, (step + 1) / (step + 10))                   # short memory at first
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
            if step % 10 == 9 or step == steps - 1:
                value, size, pace = mean_over_processes(loss).item(), norm.item(), (time.time() - began) / (step + 1 - start)
                if not math.isfinite(value + size):
                    raise InputError(f"{stage}: loss {value}, gradient norm {size} at step {step + 1}; the last good "
                                     f"checkpoint is kept in {folder}. A smaller --lr or a longer --warmup usually helps")
                if usual and size > 100 * usual:
                    progress.write(f"{stage}: the gradient exploded at step {step + 1}: norm {size:.3g}, usually {usual:.3g}; it is clipped")
                smooth, usual = (x if y is None else 0.9 * y + 0.1 * x for x, y in ((value, smooth), (size, usual)))
                progress.set_postfix_str(f"loss {smooth:.4f}, {pace:.2f} s/step")
                if step - start == 19:
                    progress.write(f"{stage}: {steps} steps, about {pace * (steps - step) / 60:.1f} min from here")
                metrics.write(json.dumps({"stage": stage, "step": step + 1, "loss": value, "grad_norm": size, "lr": rate,
                                          "seconds": round(spent + time.time() - began, 2)}) + "\n")
                if time.time() - saved > flags.save_every and step + 1 < steps:
                    save_state(step + 1)
                    saved = time.time()
            if stop.agreed(step, run.device):
                if math.isfinite(loss.item() + norm.item()):
                    save_state(step + 1)
                raise KeyboardInterrupt
    save_state(steps)
    model.load_state_dict(average, strict=False)
    if stage == "vae":
        model.scale_factor.copy_(latent_scale(run, model))
    seconds, model.card = spent + time.time() - began, ""
    if rank == 0:
        model.save_pretrained(folder, stage=stage, settings=settings, flags=asdict(flags), versions=versions(), seconds=round(seconds, 1))
        hear(run, stage, model.eval())
    wait_for_all()
    print(f"{stage}: {steps} steps in {seconds:.0f} s, loss {smooth or math.nan:.4f}, peak memory {peak_memory(run.device):.1f} GiB -> {folder}")


# ---------------------------------------------------------------------------------------------------------------------------
# The stages (Algorithm 1)
# ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_scale(run: Run, model: FlashAudio) -> Tensor:
    """1 / std of sampled latents; over up to 1024 clips, where the public code takes its first batch."""
    clips = torch.tensor(run.data.mels[run.data.train[:1024]], device=run.device)
    mean, logvar = (torch.cat(parts) for parts in zip(*(model.vae.encode(part) for part in clips.split(32))))
    return 1 / (mean.var() + logvar.exp().mean()).sqrt()


@torch.no_grad()
def initialize(model: FlashAudio, mean: Tensor) -> None:
    """Set the weights that training starts from, where the modules' own are slow at it; mean (80,): log10 mel of each band.

    With torch's own, a VAE starts with latents of std 0.2 under noise of std 1, and its decoder hardly hears them. Here each
    kernel keeps the size of what comes in, residual branches start at 0, and the posterior starts narrow.
    """
    vae, width = model.vae, model.config.vae.embed_dim
    for layer in vae.modules():
        if isinstance(layer, nn.Conv1d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    for layer in vae.modules():
        if isinstance(layer, (fa.ResidualBlock, fa.FrameAttention)):
            nn.init.zeros_((layer.conv2 if isinstance(layer, fa.ResidualBlock) else layer.proj_out).weight)
    nn.init.zeros_(vae.quant_conv.weight[width:])
    nn.init.constant_(vae.quant_conv.bias[width:], -4.0)                        # log-variance: a std of 0.14
    vae.encoder.conv_in.bias -= vae.encoder.conv_in.weight.sum(2) @ mean
    vae.decoder.conv_out.bias.copy_(mean)
    for block in model.dit.blocks:                  # half open: at toy size the gate of the text, from 0, had not opened after 1000 steps
        nn.init.constant_(block.attention.gate, 0.5)
        nn.init.constant_(block.adaLN_modulation[1].bias.view(6, -1)[2::3], 0.5)


def train_vae(run: Run) -> None:
    mels, clips, flags = run.data.mels, run.data.train, run.flags
    with torch.random.fork_rng(devices=[]):         # weights depend on the seed, the global generator stays as it was
        torch.manual_seed(flags.seed)
        config = fa.PRESETS[flags.preset]
        if flags.text != "bytes":
            dit = replace(config.dit, context_dim=fa.pretrained_width(flags.text))
            config = replace(config, dit=dit, text=fa.TextConfig(flags.text, max_length=77))    # tokens, as the public stage
        model = FlashAudio(config)
        initialize(model, torch.from_numpy(mels[clips[:1024]].mean((0, 2))))
    model.to(run.device)
    frames = max(1, min(flags.vae_frames, model.config.frames) // model.stride) * model.stride

    def draw(step: int) -> list[Tensor]:
        generator, rows = run.generator("vae", step), clips[batch_indices(len(clips), flags.vae_batch_size, step, flags.seed)]
        start = torch.randint(model.config.frames - frames + 1, (), generator=generator).item()
        noise = torch.randn(len(rows), model.config.vae.embed_dim, frames // model.stride, generator=generator)
        rows, noise = run.share(rows, noise)
        return [torch.from_numpy(mels[rows, :, start:start + frames]), noise]

    loss = compiled(flags, run.device, fa.vae_loss)
    fit(run, "vae", model, ("vae",), draw, lambda mel, noise: loss(model.vae, mel, noise, flags.kl_weight))


def timesteps(flags: Flags, stage: str, n: int, generator: torch.Generator) -> Tensor:
    """t of n clips in a flow stage -> (n,)."""
    kind = getattr(flags, f"{stage}_timesteps")
    if kind == "logit_normal":
        return fa.logit_normal(n, flags.logit_mean, flags.logit_std, generator)
    return fa.mix_exp(n, flags.mix_exp_a, generator) if kind == "mix_exp" else fa.uniform(n, generator)


def pair_noise(flags: Flags, z1: Tensor, z0: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
    """The noise that each clip gets under --pairing -> (B, C, L). context (B, N, D): of the captions, for c2ot alone."""
    if flags.pairing == "none":
        return z0
    if flags.pairing == "knn":
        return fa.knn_pairing(z1, torch.randn(flags.knn_draws, *z1.shape, generator=generator).to(z1))
    return fa.immiscible_pairing(z1, z0, context, flags.c2ot_weight if flags.pairing == "c2ot" else 0.0)


def import_checkpoint(run: Run) -> None:
    """In place of stages vae and cfm: the public model that the paper starts from (§3.2)."""
    if processes()[0]:
        return
    flags = run.flags
    model = FlashAudio.from_make_an_audio(run.public, None if flags.text == "bytes" else tuple(flags.text.split(",")))
    model.save_pretrained(run.folder("cfm"), stage="cfm", settings=run.settings("cfm"), flags=asdict(flags), versions=versions(), seconds=0.0)
    print(f"cfm: {run.public} -> {run.folder('cfm')}")


def floats(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Rows of an array on disk, which may be of half precision -> (B, ...)."""
    return torch.from_numpy(array[rows]).float()


def train_flow(run: Run, stage: str) -> None:
    """Stages cfm and rf1: on latents of real clips, with the text encoder."""
    flags, model = run.flags, run.load("vae" if stage == "cfm" or run.flags.init == "none" else "cfm")
    latents, sigma_min = run.data.latents(model, run.weights("vae")), flags.sigma_min if stage == "cfm" else 0.0
    clips, scale, c2ot = run.data.train, model.scale_factor.cpu(), stage == "rf1" and flags.pairing == "c2ot"
    if not model.text.trained or c2ot:
        contexts, place = run.data.contexts(model, run.weights("cfm") if model.text.trained else run.text_source())
    if model.text.trained:
        captions, null = model.text.tokenize(run.data.captions), model.text.tokenize([""])[0]

    def draw(step: int) -> list[Tensor]:
        generator, rows = run.generator(stage, step), clips[batch_indices(len(clips), flags.batch_size, step, flags.seed)]
        noise = torch.randn(2, len(rows), *latents.shape[2:], generator=generator)
        t, kept = timesteps(flags, stage, len(rows), generator), torch.rand(len(rows), generator=generator) >= flags.caption_dropout
        rows, t, kept, *noise = run.share(rows, t, kept, *noise)
        mean, std = torch.from_numpy(latents[rows]).unbind(1)                   # (B, C, L)
        z1, z0 = (x.to(run.device) for x in (scale * (mean + std * noise[0]), noise[1]))
        if stage == "rf1":
            own = run.generator(stage, step, "pairing", processes()[0])
            z0 = pair_noise(flags, z1, z0, floats(contexts, place[rows]).to(run.device) if c2ot else None, own)
        text = torch.where(kept[:, None], captions[rows], null) if model.text.trained else floats(contexts, place[rows] * kept.numpy())
        return [z1, z0, t, text]

    def loss_of(z1: Tensor, z0: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return fa.rectified_flow_loss(model.dit, z1, z0, t, model.text(c) if model.text.trained else c, sigma_min)

    fit(run, stage, model, ("dit", "text") if model.text.trained else ("dit",), draw, loss_of)


def train_on_couplings(run: Run, stage: str) -> None:
    """Stages rf2 and distill: on the couplings of the model before, with the text encoder frozen."""
    flags, teacher, prefix = run.flags, *(("rf1", "") if stage == "rf2" else ("rf2", "distill_"))
    model = run.load(teacher)
    count, steps, guidance = (getattr(flags, prefix + name) for name in ("couplings", "coupling_steps", "guidance"))
    contexts, place = run.data.contexts(model, run.text_source())
    clips = np.resize(run.data.train, count)        # one for each pair, in turn
    place = place[clips]
    shape = (len(clips), 2, *model.latent_shape())

    def fill(array: np.ndarray) -> None:
        compiled(flags, run.device, model.requires_grad_(False).dit)
        for i in blocks(array, 64, "pairs"):
            if array[i:i + 64][-1, 1].any():        # done by a run that was interrupted
                continue
            rows = place[i:i + 64]
            z0 = torch.randn(len(rows), *shape[2:], generator=run.generator(stage, "couplings", i))
            if reading == "before":                 # near the latents of its captions
                z0 = fa.immiscible_pairing(model.scale_factor.cpu() * torch.from_numpy(latents[clips[i:i + 64], 0]), z0)
            with run.autocast():
                z1 = fa.make_couplings(model.dit, *(x.to(run.device) for x in (z0, floats(contexts, rows), floats(contexts, 0 * rows))),
                                       steps, guidance, flags.anchor_steps, flags.rectify,
                                       lr=flags.anchor_lr, tolerance=flags.anchor_tol)
            array[i:i + 64, 0], array[i:i + 64, 1] = z0, z1.cpu()

    reading = flags.pairing_reflow if stage == "rf2" else "off"
    latents = run.data.latents(model, run.weights("vae")) if reading == "before" else None
    began, own = time.time(), [flags.seed, count, steps, guidance, reading == "before", *(getattr(flags, name) for name in REFLOW)]
    path = run.data.cache / f"couplings_{stage}-{digest(run.data.key, own, run.weights(teacher))}.npy"
    pairs = cached(path, shape, fill)
    print(f"{stage}: {len(pairs)} couplings in {time.time() - began:.0f} s")

    def draw(step: int) -> list[Tensor]:
        generator, rows = run.generator(stage, step), batch_indices(len(pairs), flags.batch_size, step, flags.seed)
        t, kept = timesteps(flags, "rf2", len(rows), generator), torch.rand(len(rows), generator=generator) >= flags.caption_dropout
        rows, t, kept = run.share(rows, t, kept)
        z0, z1 = torch.from_numpy(pairs[rows]).to(run.device).unbind(1)         # (B, C, L)
        if stage == "distill":
            return [z1, z0, floats(contexts, place[rows])]
        if reading == "literal":                    # Algorithm 1 as printed: the noise of a coupling changes hands
            z0 = fa.immiscible_pairing(z1, z0)
        return [z1, z0, t, floats(contexts, place[rows] * kept.numpy())]

    loss = fa.distill_loss if stage == "distill" else fa.rectified_flow_loss
    fit(run, stage, model, ("dit",), draw, partial(loss, model.dit), spent=time.time() - began)


RUN_STAGE = {"vae": train_vae, "cfm": partial(train_flow, stage="cfm"), "rf1": partial(train_flow, stage="rf1"),
             "rf2": partial(train_on_couplings, stage="rf2"), "distill": partial(train_on_couplings, stage="distill"), "eval": evaluate}


def main(flags: Flags) -> None:
    device = join_processes(fa.find_device(flags.device), flags)
    torch.set_float32_matmul_precision("high")
    if flags.bench:
        from data.bench import bench_training
        return print(json.dumps(bench_training(flags, device)))
    out = Path(flags.out)
    if processes()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
    with lock(out) if processes()[0] == 0 else nullcontext():
        run_stages(flags, device, out)


def run_stages(flags: Flags, device: torch.device, out: Path) -> None:
    if flags.data == "toy" and processes()[0] == 0:
        toy.write_toy_set(out / "data")
    wait_for_all()
    manifest = out / "data" / "manifest.csv" if flags.data == "toy" else Path(flags.data)
    run = Run(flags, Data(manifest, out / "cache", fa.PRESETS[flags.preset].frames), device)
    if flags.ablate:
        from data.ablate import ablate              # here, as it takes a second to import
        return ablate(sys.modules[__name__], flags, run.data, device)
    fa.load_vocoder(flags.vocoder)                  # what stage eval will need, asked for before the work and not after it
    if flags.stage in ("all", "eval") and len(run.data.held_out(2)) < 2:
        raise InputError(f"{manifest}: stage eval compares at least 2 clips, and the split 'test' has fewer")
    if flags.clap and not is_toy(run.data):
        for name in filter(None, (flags.clap, flags.ast)):
            fa.hub_model(AutoConfig, name)
    for stage in (STAGES[1:] if run.public else STAGES) if flags.stage == "all" else (flags.stage,):
        if stage != "eval" and run.is_done(stage):
            print(f"{stage}: done already")
        elif stage != "eval" or processes()[0] == 0:
            (import_checkpoint if run.public and stage == "cfm" else RUN_STAGE[stage])(run)
        wait_for_all()


def command(flags: Flags) -> int:
    """main, with an exit code: 2 and one line for what a person can put right, 130 and 143 when stopped."""
    try:
        main(flags)
        return 0
    except (InputError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("train.py: out of memory: a larger --grad_accum gives the same step in smaller parts; then a smaller --batch_size or --preset",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train.py: stopped; the same command continues from here (--out {flags.out})", file=sys.stderr)
        return 128 + stop.asked


if __name__ == "__main__":
    stop.listen()
    sys.stdout.reconfigure(line_buffering=True)     # a log file is up to date
    sys.exit(command(FLAGS))
