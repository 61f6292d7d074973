"""Where the time goes:  python sample.py --bench   and   python train.py --bench.  Tables, and a line of JSON at the end."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import flashaudio as fa
from data.evaluate import peak_memory
from data.manifest import batch_indices
from data.run import Objective, Run, batches, compiled
from flashaudio import FlashAudio

# Dense bf16 FLOP/s with float32 sums, from the data sheets. The first name that stands in the device's counts
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
         "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def milliseconds(f, device: torch.device, seconds: float = 2.0) -> float:
    """Median time of f(), warmed up, over at least 5 runs and as many as fit into `seconds`, 100 at most."""
    times: list[float] = []
    for _ in range(2):
        f()
    synchronise(device)
    while len(times) < 5 or (sum(times) < seconds and len(times) < 100):
        start = time.perf_counter()
        f()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def print_rows(rows: list[dict]) -> None:
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print(" ".join(f"{(f'{v:.4g}' if isinstance(v, float) else str(v)):>{max(9, len(k))}}" for k, v in row.items()))


@torch.no_grad()
def bench_sampling(model: FlashAudio, name: str, vocoder, steps: int, sizes: list[int], seconds: float | None) -> dict:
    """Text, backbone, VAE and vocoder one by one, and `generate` whole with prompts it has not met; batches of `sizes`."""
    device, rows = model.device, []
    shape = model.latent_shape(seconds)
    length = shape[1] * model.stride * fa.HOP / fa.SAMPLE_RATE
    if device.type == "cuda":
        model.compile()
        torch.cuda.reset_peak_memory_stats(device)
    for size in sizes:
        prompts = [f"a bell followed by rain, {i}" for i in range(size)]
        z0 = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        context, null = model.contexts(prompts), model.contexts([""]).expand(size, -1, -1)
        text = milliseconds(lambda: model.text(prompts), device)
        mel = model.decode(z0)
        vae, wave = (milliseconds(f, device) for f in (lambda: model.decode(z0), lambda: vocoder(mel)))
        for guidance in (1.0, 3.0):
            def backbone():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    return fa.euler_sample(model.dit, z0, context, null, steps, guidance)

            def whole():
                model.remembered.clear()
                return model.generate(prompts, steps, guidance, z0=z0, vocoder=vocoder)
            dit, everything = milliseconds(backbone, device), milliseconds(whole, device)
            rows.append({"batch": size, "ω": guidance, "NFE": steps * (1 if guidance == 1 else 2), "text ms": text, "backbone ms": dit, "VAE ms": vae,
                         "vocoder ms": wave, "whole ms": everything, "RTF": everything / 1000 / (size * length),
                         "RTF backbone+VAE": (dit + vae) / 1000 / (size * length)})
    print(f"{name}: {length:.3f} s of audio a clip; RTF: seconds of computing per second of audio")
    print_rows(rows)
    return {"model": name, "audio seconds": length, "rows": rows, "precision": "bfloat16" if device.type == "cuda" else "float32",
            "device": device_name(device), "torch": torch.__version__, "peak GiB": round(peak_memory(device), 2)}


def bench_training(flags, device: torch.device) -> dict:
    """Steps of the 1-RF on random latents and contexts: data, pairing, forward and backward, and optimiser one by one; then the
    loop as it runs, with the next batch prepared beside, with pairing and without."""
    torch.manual_seed(0)
    model = FlashAudio(fa.PRESETS[flags.preset]).to(device)
    dit, shape, size = model.dit.train(), model.latent_shape(), flags.batch_size
    run = Run(flags, None, device)
    parameters = list(dit.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type in ("cpu", "cuda"))
    average = [p.detach().clone() for p in parameters]
    context = torch.randn(size, 16 if flags.preset == "toy" else 77, model.config.dit.context_dim)
    objective = Objective(model, lambda z1, z0, t, c: fa.rectified_flow_loss(dit, z1, z0, t, c))

    def learn(batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in zip(*(x.chunk(flags.grad_accum) for x in batch)):
            with run.autocast():
                loss = objective(*part) / flags.grad_accum
            loss.backward()

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.005)

    with tempfile.TemporaryDirectory() as folder:
        held = np.lib.format.open_memmap(Path(folder) / "latents.npy", "w+", np.float32, (1024, 2, *shape))
        held[:] = np.random.default_rng(0).standard_normal(held.shape[1:], np.float32)

        def draw(step: int, paired: bool = True) -> list[torch.Tensor]:
            generator = run.generator("bench", step)
            mean, std = torch.from_numpy(held[batch_indices(len(held), size, step, 0)]).unbind(1)
            noise = torch.randn(2, *mean.shape, generator=generator)
            z1, z0 = (x.to(device) for x in (mean + std * noise[0], noise[1]))
            return [z1, fa.immiscible_pairing(z1, z0) if paired else z0, fa.logit_normal(size, generator=generator), context]

        batch = [x.to(device) for x in draw(0)]
        with FlopCounterMode(display=False) as counter:
            learn(batch)
        compiled(flags, device, dit, dynamic=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row = {"data ms": milliseconds(lambda: [x.to(device) for x in draw(1, False)], device),
               "pairing ms": milliseconds(lambda: fa.immiscible_pairing(*batch[:2]), device),
               "forward+backward ms": milliseconds(lambda: learn(batch), device), "optimiser ms": milliseconds(optimise, device)}
        for paired in (False, True):
            for step, batch in batches(run, range(flags.bench + 3), lambda step: draw(step, paired)):
                if step == 3:                       # warm; from here on nothing waits for the device
                    synchronise(device)
                    start = time.perf_counter()
                learn(batch)
                optimise()
            synchronise(device)
            row["step ms" if paired else "step unpaired ms"] = 1000 * (time.perf_counter() - start) / flags.bench
        del held, batch
    name = device_name(device)
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    row |= {"clips/s": 1000 * size / row["step ms"], "MFU": counter.get_total_flops() / (row["step ms"] / 1000) / peak if peak else "-"}
    print(f"{flags.preset}, batch {size} in {flags.grad_accum}, latents {shape}, {counter.get_total_flops() / 1e9:.1f} GFLOP a step")
    print_rows([row])
    return {"preset": flags.preset, "batch": size, "grad_accum": flags.grad_accum, **row, "GFLOP": counter.get_total_flops() / 1e9,
            "device": name, "torch": torch.__version__, "peak GiB": round(peak_memory(device), 2)}
