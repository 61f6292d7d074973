"""What a recipe takes, from its sizes alone: operations, memory, hours and disk.

    python train.py --preset small --plan 60            at 60 TFLOP/s

An estimate: shapes without numbers pass through the loss of each stage; nothing is read, trained or
written. Evaluation, mels, latents and a frozen text encoder come on top, minutes each.
"""

import math
from dataclasses import dataclass, replace
from typing import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flashaudio as fa

STATE = 20      # bytes for a trained parameter: weight, gradient, average, two moments
SAVED = 0.5     # of what autograd keeps in float32: most of it is bfloat16 on a GPU


@dataclass
class Row:
    """A stage, or the couplings made before one."""
    stage: str
    trained: int                                  # parameters
    flop: float                                   # operations in a step; for couplings, in a batch
    steps: int
    memory: float                                 # bytes


def cost(loss: Callable[..., Tensor], *batch) -> tuple[int, int, int]:
    """Operations of a forward pass, of its backward pass, and bytes kept between the two."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            value = loss(*batch)
        forward = counter.get_total_flops()
        value.backward()
    return forward, counter.get_total_flops() - forward, sum(kept.values())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def untrained(flags) -> tuple[fa.FlashAudio, int]:
    """The model on `meta`, and N of its contexts. A frozen text encoder stays on the hub: its
    contexts are taken to be as wide as the preset says."""
    config = fa.PRESETS[flags.preset]
    tokens = config.text.max_length // 4
    if flags.init or flags.text != "bytes":
        tokens = 154 if flags.init else 77
        config = replace(config, text=fa.TextConfig("none"))
    with torch.device("meta"):
        return fa.FlashAudio(config), tokens


def plan(flags) -> list[Row]:
    """The stages of train.Flags in their order, each with the couplings before it."""
    model, tokens = untrained(flags)
    part = math.ceil(flags.batch_size / flags.grad_accum)
    frames = max(1, min(flags.vae_frames, model.config.frames) // model.stride) * model.stride
    with torch.device("meta"):
        z, t = torch.empty(part, *model.latent_shape()), torch.empty(part)
        mel, noise = torch.empty(part, 80, frames), z[:, :, :frames // model.stride]
        context = torch.empty(part, tokens, model.config.dit.context_dim)
    flow = with_text = cost(fa.rectified_flow_loss, model, z, z, t, context)
    if model.text is not None:
        text = torch.zeros(part, model.config.text.max_length, dtype=torch.long, device="meta")
        with_text = cost(fa.rectified_flow_loss, model, z, z, t, text)
    whole, vae, dit = count(model), count(model.vae), count(model.dit)
    stages = {"vae": (vae, cost(fa.vae_loss, model.vae, mel, noise, 1.0)),
              "cfm": (whole - vae, with_text), "rf1": (whole - vae, with_text),
              "rf2": (dit, flow), "distill": (dit, flow)}
    if flags.init:
        del stages["vae"], stages["cfm"]
    rows = []
    for stage, (trained, (forward, backward, kept)) in stages.items():
        if stage in ("rf2", "distill"):
            batches = math.ceil(getattr(flags, f"{stage}_couplings") / part)
            memory = 4 * whole + SAVED * kept
            flop = forward * evaluations(flags, stage) * getattr(flags, f"{stage}_coupling_steps")
            rows.append(Row(f"{stage} pairs", 0, flop, batches, memory))
        flop = (forward + backward) * flags.batch_size / part
        memory = STATE * trained + SAVED * kept
        rows.append(Row(stage, trained, flop, getattr(flags, f"{stage}_steps"), memory))
    return rows


def evaluations(flags, stage: str) -> int:
    """Forwards that a step of the stage's couplings takes; with anchored optimisation, at most."""
    if getattr(flags, f"{stage}_guidance") == 1.0:
        return 1
    if flags.rf2_anchor_steps == 0:
        return 2
    # The unguided path, v(z, t, c), v(z, t, ∅); each iteration v(z, t, ∅) again, and its gradient,
    # which is to ∅ alone and takes as much as a forward
    return 3 + 2 * flags.rf2_anchor_steps


def print_plan(flags) -> None:
    """The plan at flags.plan TFLOP/s, and the disk that it takes."""
    model, tokens = untrained(flags)
    rows = plan(flags)
    print(f"preset {flags.preset} at {flags.plan:g} TFLOP/s: an estimate, nothing was run\n\n"
          "stage          trained  TFLOP/step   steps   GiB   hours")
    total = 0.0
    for row in rows:
        hours = row.flop * row.steps / (flags.plan * 1e12) / 3600
        total += hours
        print(f"{row.stage:13} {row.trained / 1e6:7.1f}M {row.flop / 1e12:11.4g} {row.steps:7} "
              f"{row.memory / 2 ** 30:5.1f} {hours:7.2f}")
    channels, length = model.latent_shape()
    latent = 8 * channels * length                  # mean and std, or noise and sample
    width = 2 if model.text is None else 4          # bytes
    clip = 320 * model.config.frames + latent + width * tokens * model.config.dit.context_dim
    models = 4 * count(model) * (4 if flags.init else 5)
    couplings = (flags.rf2_couplings + flags.distill_couplings) * latent
    checkpoint = 16 * max(row.trained for row in rows)
    print(f"\nin all {total:.2f} h; GB on disk: models {models / 1e9:.1f}, couplings "
          f"{couplings / 1e9:.1f}, checkpoint {checkpoint / 1e9:.1f}, 1000 clips {clip / 1e6:.2f}")
