"""Where the time goes, on a CPU or CUDA:  python -m experiments.bench --preset base --batch 1,16

Two tables, of sampling in one step and of a training step of the 1-RF on random latents, and a
line of JSON.
"""

import argparse
import json
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import flashaudio as fa
import train
from evaluation.evaluate import hardware
from flashaudio import FlashAudio
from pretrained import vocoders
from runs.processes import Objective
from runs.run import Run, find_device, one_line_errors, peak_memory

# Dense bf16 FLOP/s with float32 sums, from data sheets; the first that is in the device's name
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12}


def milliseconds(f: Callable, runs: int = 0) -> float:
    """Median time of f(), warmed up and waited for; the mean of a number of runs that do not wait
    for each other where `runs` is given."""
    timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    measured = timer.timeit(runs) if runs else timer.blocked_autorange(min_run_time=2)
    return 1000 * measured.median


def compiled(model: FlashAudio) -> FlashAudio:
    """The model with backbone and decoder as CUDA graphs, and bf16 weights in the backbone, which
    autocast would make at every step. The first batch of each size takes a minute."""
    torch._dynamo.config.recompile_limit = 64           # batch sizes; torch stops at 8
    for layer in model.dit.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.bfloat16()
    model.dit.compile(mode="reduce-overhead", dynamic=False)
    decode = torch.compile(model.vae.decode, mode="reduce-overhead", dynamic=False)

    def decode_and_copy(z: Tensor) -> Tensor:           # a graph writes over what it returned
        return decode(z).clone()

    model.vae.decode = decode_and_copy
    return model


@torch.no_grad()
def bench_sampling(model: FlashAudio, vocoder: Callable, size: int, guidance: float) -> dict:
    """One step for a batch: text, backbone, VAE and vocoder one by one, and all of `generate`."""
    prompts = [f"a bell followed by rain, {i}" for i in range(size)]
    z0 = model.noise(prompts, 0, model.latent_shape())
    context, null = model.contexts(prompts), model.contexts([""]).expand(size, -1, -1)
    mel = model.decode(z0)
    seconds = size * mel.shape[2] * fa.HOP / fa.SAMPLE_RATE                     # of audio
    cuda = model.device.type == "cuda"

    def backbone() -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            return fa.euler_sample(model.dit, z0, context, null, 1, guidance)

    row = {"batch": size, "ω": guidance, "text ms": milliseconds(lambda: model.contexts(prompts)),
           "backbone ms": milliseconds(backbone), "VAE ms": milliseconds(lambda: model.decode(z0)),
           "vocoder ms": milliseconds(lambda: vocoder(mel)),
           "whole ms": milliseconds(lambda: model.generate(prompts, 1, guidance, z0=z0,
                                                           vocoder=vocoder))}
    return {**row, "RTF": row["whole ms"] / 1000 / seconds,
            "RTF backbone+VAE": (row["backbone ms"] + row["VAE ms"]) / 1000 / seconds}


def bench_training(run: Run, model: FlashAudio) -> dict:
    """The parts of a step one by one, then 30 steps as they run, with pairing."""
    flags, shape = run.flags, model.latent_shape()
    latents = torch.randn(1024, *shape, generator=run.generator("bench"))
    contexts = model.contexts(["a bell followed by rain"]).expand(1024, -1, -1).cpu().numpy()
    rows = np.arange(1024)

    def ends(rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(len(rows), *shape, generator=generator), latents[rows]

    source = (run, "rf1", rows, ends, contexts, rows, fa.logit_normal)
    unpaired = train.flow_batches(*source)
    paired = train.flow_batches(*source, fa.immiscible_pairing)
    objective = Objective(model, fa.rectified_flow_loss)
    weights = list(model.requires_grad_(False).dit.requires_grad_().parameters())
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, fused=True)

    def learn(batch: list[Tensor]) -> None:
        optimizer.zero_grad()
        train.accumulate_gradients(run, objective, batch)

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(weights, flags.grad_clip)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - flags.ema)

    def step() -> None:
        learn(paired(0))
        optimise()

    batch = unpaired(0)
    with FlopCounterMode(display=False) as counter:
        learn(batch)
    run.compile(model)
    row = {"data ms": milliseconds(lambda: unpaired(0)),
           "pairing ms": milliseconds(lambda: fa.immiscible_pairing(*batch[:2])),
           "forward+backward ms": milliseconds(lambda: learn(batch)),
           "optimiser ms": milliseconds(optimise), "step ms": milliseconds(step, 30)}
    rate, flops = 1000 / row["step ms"], counter.get_total_flops()
    peak = next((flop for part, flop in PEAKS.items() if part in hardware(run.device)), None)
    return {**row, "clips/s": rate * flags.batch_size, "GFLOP": flops / 1e9,
            "MFU": flops * rate / peak if peak else None}


def print_rows(rows: list[dict]) -> None:
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        print(*(text.rjust(max(9, len(name))) for text, name in zip(texts, row)))


def sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("experiments.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="toy", choices=train.PRESETS, help="size [toy]")
    parser.add_argument("--model", help="folder or hub id of what samples [untrained, of the size]")
    parser.add_argument("--batch", default=[1, 16], type=sizes, help="of sampling [1,16]")
    parser.add_argument("--vocoder", default="griffin-lim", help="as in train.py [griffin-lim]")
    given = parser.parse_args(argv)
    device, config = find_device(), fa.PRESETS[given.preset]
    vocoder = vocoders.load(given.vocoder, str(device))
    model = FlashAudio(config).to(device).eval()
    if given.model:
        model = FlashAudio.from_pretrained(given.model, str(device))
    if device.type == "cuda":
        compiled(model)
    sampling = []
    for size in given.batch:
        sampling += [bench_sampling(model, vocoder, size, guidance) for guidance in (1.0, 3.0)]
    print_rows(sampling)
    flags = train.Flags(preset=given.preset, **train.PRESETS[given.preset])
    run = Run(flags, None, device, vocoder)
    training = bench_training(run, FlashAudio(config).to(device))
    print_rows([training])
    print(json.dumps({"model": given.model or given.preset, "sampling": sampling,
                      "training": training, "batch": flags.batch_size, "hardware":
                      hardware(device), "peak GiB": round(peak_memory(device), 2)}))


if __name__ == "__main__":
    with one_line_errors("experiments.bench"):
        main()
