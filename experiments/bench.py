"""How fast is this machine, and what would a recipe take?

    python -m experiments.bench                             measures sampling and a training step
    python -m experiments.bench --plan 60 --size small      an estimate at 60 TFLOP/s; runs nothing

Evaluation, mels, latents and a frozen text encoder come on top, minutes each.
"""

import math
from dataclasses import replace
from typing import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import flashaudio as fa
import train
from evaluation.evaluate import markdown
from runs.run import Parser, find_device, hardware, one_line_errors


def coupling_cost(flags: train.Flags, stage: str) -> int:
    """Forwards of the backbone for a pair of rf2 or distill; of an anchored one, at most. The
    gradient of Eq. 10 is to ∅ alone, and takes as much as a forward."""
    steps = getattr(flags, f"{stage}_coupling_steps")
    if getattr(flags, f"{stage}_guidance") == 1.0:
        return steps
    if flags.anchor_steps == 0:
        return 2 * steps
    # The unguided path, v(z, t, c) (at z0 the path's), v(z, t, ∅); each iteration the last again
    return (3 + 2 * flags.anchor_steps) * steps - 1


def cost(loss: Callable[..., Tensor], *batch) -> tuple[int, int]:
    """Operations of a forward pass, and of its backward pass."""
    with FlopCounterMode(display=False) as counter:
        value = loss(*batch)
        forward = counter.get_total_flops()
        value.backward()
    return forward, counter.get_total_flops() - forward


def plan(flags: train.Flags) -> list[dict]:
    """Operations in a step (of couplings: in a batch) and steps of the stages, in their order: what
    a loss computes is counted on shapes without numbers."""
    config = fa.SIZES[flags.size]
    tokens = config.text.max_length // 4
    if flags.init or flags.text != "bytes":         # stays on the hub: its contexts are enough
        tokens = 154 if flags.init else 77
        config = replace(config, text=fa.TextConfig("none"))
    part = math.ceil(flags.batch_size / flags.grad_accum)   # clips that are computed at once
    with torch.device("meta"):
        model = fa.FlashAudio(config)
        z, t = torch.empty(part, *model.latent_shape()), torch.empty(part)
        context = torch.empty(part, tokens, config.dit.context_dim)
        frames = max(1, min(flags.vae_frames, config.frames) // model.stride) * model.stride
        mel, noise = torch.empty(part, 80, frames), z[:, :, :frames // model.stride]
        text = torch.zeros(part, config.text.max_length, dtype=torch.long)
    alone = with_text = cost(fa.rectified_flow_loss, model, z, z, t, context)
    if model.text is not None:
        with_text = cost(fa.rectified_flow_loss, model, z, z, t, text)
    stages = {"vae": cost(fa.vae_loss, model.vae, mel, noise, 1.0), "cfm": with_text,
              "rf1": with_text, "rf2": alone, "distill": alone}
    rows = []
    for stage, (forward, backward) in stages.items():
        if stage in ("rf2", "distill"):
            rows.append({"stage": f"{stage} pairs", "flop": forward * coupling_cost(flags, stage),
                         "steps": -(-getattr(flags, f"{stage}_couplings") // part)})
        rows.append({"stage": stage, "flop": (forward + backward) * flags.batch_size / part,
                     "steps": getattr(flags, f"{stage}_steps")})
    return rows[2:] if flags.init else rows


def print_plan(flags: train.Flags, speed: float) -> None:
    """The plan at `speed` TFLOP/s."""
    rows = []
    for row in plan(flags):
        flop, steps = row["flop"], row["steps"]
        rows.append({"stage": row["stage"], "TFLOP/step": flop / 1e12, "steps": steps,
                     "hours": flop * steps / (speed * 1e12) / 3600})
    print_rows(rows)
    print(f"size {flags.size} at {speed:.3g} TFLOP/s: {sum(row['hours'] for row in rows):.2f} "
          "hours, an estimate")


def print_rows(rows: list[dict]) -> None:
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()])
    print(markdown(lines), end="\n\n")


def milliseconds(f: Callable[[], object]) -> float:
    """Median time of f(), warmed up and waited for."""
    timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=0.5).median


@torch.no_grad()
def sampling(model: fa.FlashAudio, size: int) -> dict:
    """Milliseconds of a batch: text, backbone, VAE, vocoder one by one, and all of `generate`."""
    prompts = [f"a bell followed by rain, {i}" for i in range(size)]
    z0, context = model.noise(prompts, 0, model.latent_shape()), model.contexts(prompts)
    mel = model.decode(z0)
    seconds = size * mel.shape[2] * fa.HOP / fa.SAMPLE_RATE                     # of audio
    row = {"batch": size, "text": milliseconds(lambda: model.contexts(prompts)),
           "backbone": milliseconds(lambda: model.sample_latents(context, z0=z0)),
           "VAE": milliseconds(lambda: model.decode(z0)),
           "vocoder": milliseconds(lambda: model.vocoder(mel)),
           "all": milliseconds(lambda: model.generate(prompts, z0=z0))}
    return {**row, "RTF": row["all"] / 1000 / seconds}


def training(flags: train.Flags, model: fa.FlashAudio) -> float:
    """The TFLOP/s that a part of a step of stage cfm reaches."""
    part, device = math.ceil(flags.batch_size / flags.grad_accum), model.device
    z = torch.randn(part, *model.latent_shape(), device=device)
    t = torch.rand(part, device=device)
    text = model.text.tokenize(["a bell followed by rain"] * part).to(device)
    if device.type == "cuda":
        model.dit.compile()                             # as in training
    optimizer = torch.optim.AdamW([*model.text.parameters(), *model.dit.parameters()], fused=True)

    def step() -> None:
        with fa.autocast(device):
            loss = fa.rectified_flow_loss(model, z, -z, t, text)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cfm = next(row for row in plan(flags) if row["stage"] == "cfm")
    return cfm["flop"] * part / flags.batch_size / (milliseconds(step) / 1000) / 1e12


def main(argv: list[str] | None = None) -> None:
    parser = Parser("experiments.bench", __doc__)
    parser.add_argument("--plan", type=float, help="TFLOP/s to estimate by; nothing is run")
    parser.add_argument("--size", default="toy", help="sizes of train.py: toy,small,base [toy]")
    given = parser.parse_args(argv)
    for size in given.size.split(","):
        flags, speed = train.parse_flags(["--size", size]), given.plan
        if speed is None:
            device = find_device()
            print(f"{hardware(device)}; milliseconds of a batch, size {size}")
            model = fa.FlashAudio(fa.SIZES[size]).to(device)
            print_rows([sampling(model, batch) for batch in (1, 16, 64)])
            speed = training(replace(flags, text="bytes"), model)
        print_plan(flags, speed)


if __name__ == "__main__":
    with one_line_errors("experiments.bench"):
        main()
