"""Is this machine fit, and how fast is it?  python -m experiments.bench

Tables, then JSON: what the toy model computes here, against float32 on the CPU; one step of each
preset, in milliseconds; training by train.py, all stages of the first preset and of toy, the 1-RF
of the others, with the hours of the recipe. Nothing is downloaded: sounds are made, text is read as
bytes.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import flashaudio as fa
import train
from data import toy
from data.clips import Couplings
from evaluation.evaluate import hardware
from pretrained import vocoders
from runs.plan import Row, plan
from runs.run import STAGES, Run, find_device, one_line_errors, peak_memory
from runs.start import new_model

# Dense bf16 FLOP/s with float32 sums, from data sheets; the first that is in the device's name
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
         "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def milliseconds(f: Callable) -> float:
    """Median time of f(), warmed up and waited for."""
    timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=0.5).median


@torch.no_grad()
def outputs(model: fa.FlashAudio, wav: Tensor, z: Tensor, half: bool) -> dict[str, Tensor]:
    """What each part makes of the same inputs, on the model's device; half: in bf16 autocast."""
    device = model.device
    z, t = z.to(device), torch.linspace(0, 0.9, len(z), device=device)
    mel = fa.mel_spectrogram(wav.to(device))            # in float32, as in training
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        text = model.text(["a bell followed by rain"] * len(z))
        made = {"mel": mel, "encoder": model.encode(mel), "decoder": model.decode(z),
                "text": text, "velocity": model.dit(z, t, text)}
    return {name: x.float().cpu() for name, x in made.items()}


def differences(device: torch.device) -> list[dict]:
    """The largest difference of each output, in units of its largest value."""
    wav = 0.1 * torch.randn(4, 128 * fa.HOP, generator=torch.Generator().manual_seed(0))
    model = new_model("toy", "bytes", 0, fa.mel_spectrogram(wav).numpy()).eval()
    torch.nn.init.eye_(model.dit.final_layer.linear.weight)     # an untrained one returns 0
    z = model.noise(["a bell"] * len(wav), 0, model.latent_shape())
    exact = outputs(model, wav, z, False)
    found = {name: {"output": name} for name in exact}
    for kind, half in (("float32", False), ("bf16", True)):
        for name, x in outputs(model.to(device), wav, z, half).items():
            found[name][kind] = ((x - exact[name]).abs().max() / exact[name].abs().max()).item()
    return list(found.values())


@torch.no_grad()
def sampling(model: fa.FlashAudio, vocoder: Callable, size: int) -> dict:
    """Milliseconds of a batch: text, backbone, VAE, vocoder one by one, and all of `generate`."""
    prompts = [f"a bell followed by rain, {i}" for i in range(size)]
    z0, context = model.noise(prompts, 0, model.latent_shape()), model.contexts(prompts)
    mel = model.decode(z0).clone()                      # a CUDA graph writes over what it returned
    seconds = size * mel.shape[2] * fa.HOP / fa.SAMPLE_RATE                     # of audio
    row = {"batch": size, "text": milliseconds(lambda: model.contexts(prompts)),
           "backbone": milliseconds(lambda: model.sample_latents(context, z0=z0)),
           "VAE": milliseconds(lambda: model.decode(z0)),
           "vocoder": milliseconds(lambda: vocoder(mel)),
           "whole": milliseconds(lambda: model.generate(prompts, z0=z0, vocoder=vocoder))}
    to_mel = row["text"] + row["backbone"] + row["VAE"]
    return {**row, "RTF": row["whole"] / 1000 / seconds, "to mel": to_mel / 1000 / seconds}


def training(flags: train.Flags, steps: int, folder: Path, whole: bool) -> list[dict]:
    """`steps` steps of each stage of a recipe, or of the 1-RF, timed from the 10th: compiled."""
    rows, planned = [], {row.stage: row for row in plan(flags)}
    few = replace(flags, data=str(folder / "manifest.csv"), out=str(folder / flags.preset),
                  judge="", warmup=10, **{f"{stage}_steps": steps for stage in STAGES})

    def stage(name: str, function: Callable, run: Run, *given) -> fa.FlashAudio:
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        model = function(run, *given)
        lines = (run.out / "metrics.jsonl").read_text().splitlines()
        first, *_, last = (json.loads(line) for line in lines if f'"{name}"' in line)
        pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        rows.append({**measured(planned[name], pace, flags.batch_size, run.device),
                     "loss": first["loss"], "to": last["loss"]})
        return model

    def couplings(name: str, run: Run, model: fa.FlashAudio) -> Couplings:
        for n in (flags.batch_size, 2 * flags.batch_size):          # the first is compiled for
            setattr(few, f"{name}_couplings", n)
            pairs = train.couplings(run, model, name)
            made = len(pairs.latents)
        part = flags.batch_size // flags.grad_accum
        rows.append(measured(planned[f"{name} pairs"], run.spent * part / made, part, run.device))
        return pairs

    with train.open_run(few) as run:
        if whole:
            model = stage("vae", train.train_vae, run)
            model = stage("cfm", train.train_cfm, run, model)
        else:
            model = new_model(flags.preset, "bytes", 0, run.data.some_mels(0)).to(run.device)
        unpaired, _ = train.clip_batches(run, "rf1", model, fa.logit_normal)
        paired, _ = train.clip_batches(run, "rf1", model, fa.logit_normal, fa.immiscible_pairing)
        data = milliseconds(lambda: unpaired(0))
        pairing = milliseconds(lambda: paired(0)) - data
        model = stage("rf1", train.train_rf1, run, model)
        rows[-1]["data %"] = 100 * data / rows[-1]["ms"]
        rows[-1]["pairing %"] = 100 * pairing / rows[-1]["ms"]
        if whole:
            model = stage("rf2", train.train_rf2, run, model, couplings("rf2", run, model))
            stage("distill", train.distill, run, model, couplings("distill", run, model))
    return rows


def measured(row: Row, pace: float, clips: int, device: torch.device) -> dict:
    """What seconds per step mean: of couplings, per batch, with operations and hours at most."""
    peak = next((flop for part, flop in PEAKS.items() if part in hardware(device)), None)
    return {"stage": row.stage.split()[-1], "ms": 1000 * pace, "clips/s": clips / pace,
            "TFLOP/s": row.flop / pace / 1e12, "GiB": peak_memory(device),
            "MFU %": 100 * row.flop / pace / peak if peak else "-",
            "hours": pace * row.steps / 3600}


def print_rows(rows: list[dict]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    for row in ({name: name for name in names}, *rows):
        values = [row.get(name, "-") for name in names]
        print(*(f"{x:9.4g}" if isinstance(x, float) else f"{x:>9}" for x in values))
    print()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("experiments.bench", description=__doc__)
    parser.add_argument("--presets", default="small,toy,base", help="[small,toy,base]; a CPU: toy")
    parser.add_argument("--batch", default="1,16,64", help="of sampling; the first is compiled too")
    parser.add_argument("--steps", default=200, type=int, help="of each stage of training [200]")
    parser.add_argument("--vocoder", default="griffin-lim", help="as in train.py [griffin-lim]")
    given = parser.parse_args(argv)
    presets = given.presets.split(",")
    if given.steps < 12 or not set(presets) <= set(train.PRESETS):
        parser.error(f"--steps of at least 12, --presets among {', '.join(train.PRESETS)}")
    device = find_device()
    vocoder = vocoders.load(given.vocoder, str(device))
    found = {"sampling": [], "training": [], "hardware": hardware(device)}
    found["differences"] = differences(device)
    print_rows(found["differences"])
    with tempfile.TemporaryDirectory() as folder:
        toy.write_toy_set(folder, 64, 8)
        for preset in presets:
            model = fa.FlashAudio(fa.PRESETS[preset]).to(device).eval()
            sizes = [int(size) for size in given.batch.split(",")]
            rows = [{"compiled": "no", **sampling(model, vocoder, size)} for size in sizes]
            if device.type == "cuda":                   # a minute for each size
                model.dit.compile(mode="reduce-overhead", dynamic=False)
                model.vae.decode = torch.compile(model.vae.decode, mode="reduce-overhead")
                rows.append({"compiled": "yes", **sampling(model, vocoder, sizes[0])})
            found["sampling"] += [{"preset": preset, **row} for row in rows]
        print_rows(found["sampling"])
        for preset in presets:
            flags = train.Flags(preset=preset, **{**train.PRESETS[preset], "text": "bytes"})
            rows = training(flags, given.steps, Path(folder), preset in (presets[0], "toy"))
            found["training"] += [{"preset": preset, **row} for row in rows]
            if len(rows) > 1:
                hours = sum(row["hours"] for row in rows)
                print(f"{preset}: {hours:.3g} hours for the whole recipe at this pace")
        print_rows(found["training"])
    print(json.dumps(found))


if __name__ == "__main__":
    with one_line_errors("experiments.bench"):
        main()
