"""Text to WAV with a trained FlashAudio.

    python sample.py "a bell followed by rain"                    the newest distilled model under out/, one step
    python sample.py --model out/toy/rf2 --steps 4 --n 3 "rain"   another stage, four steps, three takes
    python sample.py --file prompts.txt --out samples             one prompt per line

Writes <out>/<prompt>-<take>.wav (16 bit, 16 kHz) and a picture of its mel spectrogram, prints a line for each, and writes a page to
listen to all of them, <out>/index.html.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
from pathlib import Path


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", help="what to hear")
    parser.add_argument("--file", type=Path, help="read prompts from a text file, one per line")
    parser.add_argument("--model", default="", help="folder of a stage, or a hub id [the newest out/*/distill]")
    parser.add_argument("--steps", type=int, default=1, help="Euler steps [1]")
    parser.add_argument("--guidance", type=float, default=1.0, help="ω; 1 is none, more doubles the NFE [1]")
    parser.add_argument("--n", type=int, default=1, help="takes per prompt [1]")
    parser.add_argument("--seconds", type=float, help="length in seconds [that of the training clips]")
    parser.add_argument("--seed", type=int, default=0, help="take k of a prompt has the noise of seed + k [0]")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder to write to [samples]")
    parser.add_argument("--batch_size", type=int, help="clips made at once [1 on a CPU, so that a clip is the same to the bit in any company; else 16]")
    parser.add_argument("--bench", nargs="?", const="1,16,64", help="print where the time goes for these batch sizes instead [1,16,64 if bare]")
    parser.add_argument("--preset", choices=("toy", "small", "base", "large"), help="with --bench: random weights of this size, no --model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto is cuda where there is one [auto]")
    parser.add_argument("--vocoder", default="griffin-lim", help="griffin-lim, hifigan:<hub id or folder> or bigvgan:<folder> [griffin-lim]")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    return parser.parse_args(argv)


if __name__ == "__main__":
    FLAGS = parse_flags()               # before the heavy imports: --help and a mistyped flag answer at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import time

import torch

import flashaudio as fa
from data.listen import file_names, save_clip, write_page
from flashaudio import FlashAudio, InputError


def newest_model() -> Path:
    found = sorted(Path("out").glob("*/distill/model.safetensors"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("there is no distilled model under out/ yet: run `python train.py`, or name one with --model")
    return found[-1].parent


def check(flags: argparse.Namespace) -> list[str]:
    """The prompts; raises InputError for what cannot be meant."""
    prompts = list(flags.prompts)
    if flags.file:
        if not flags.file.is_file():
            raise InputError(f"{flags.file}: no such file of prompts")
        try:
            prompts += flags.file.read_text(encoding="utf-8-sig").splitlines()
        except ValueError as e:
            raise InputError(f"{flags.file}: not a text file in UTF-8") from e
    prompts = [p.strip() for p in prompts if p.strip()]
    if flags.bench and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", flags.bench):
        raise InputError(f"--bench takes batch sizes such as 1,16,64, not '{flags.bench}'")
    if flags.preset and not flags.bench:
        raise InputError("--preset goes with --bench: an untrained model makes noise")
    if not prompts and not flags.bench:
        raise InputError('there is nothing to make: give a prompt, such as "a bell followed by rain"')
    for prompt in prompts:
        if not prompt.isprintable() or prompt.encode(errors="replace").decode() != prompt:
            raise InputError(f"a prompt holds what is no text: {prompt!r}")
    for name in ("steps", "n", "batch_size"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise InputError(f"--{name} is {getattr(flags, name)}, must be at least 1")
    if flags.seconds is not None and not 0 < flags.seconds < 3600:
        raise InputError(f"--seconds is {flags.seconds:g}, must be above 0 and below 3600")
    if not abs(flags.guidance) < 1000:
        raise InputError(f"--guidance is {flags.guidance:g}, which is no strength of guidance: 1 is none, 3 is strong")
    if not 0 <= flags.seed < 2 ** 31:
        raise InputError(f"--seed is {flags.seed}, must be from 0 to {2 ** 31 - 1}")
    return prompts


def main(flags: argparse.Namespace) -> None:
    prompts, source = check(flags), flags.preset or flags.model or newest_model()
    device = fa.find_device(flags.device)
    vocoder = fa.load_vocoder(flags.vocoder, str(device))
    model = FlashAudio(fa.PRESETS[source]).to(device).eval() if flags.preset else FlashAudio.from_pretrained(source, str(device))
    if flags.bench:
        from data.bench import bench_sampling       # here, as it takes a second to import
        sizes = [int(size) for size in flags.bench.split(",")]
        return print(json.dumps(bench_sampling(model, str(source), vocoder, flags.steps, sizes, flags.seconds)))
    flags.out.mkdir(parents=True, exist_ok=True)
    nfe = flags.steps * (1 if flags.guidance == 1 else 2)
    names = file_names(prompts := list(dict.fromkeys(prompts)))
    takes = [(prompt, k) for prompt in prompts for k in range(flags.n)]
    print(f"{source}, {flags.steps} step{'s' * (flags.steps > 1)}, ω {flags.guidance:g}, seed {flags.seed}")
    longest = model.config.text.max_length if model.config.text.encoder == "bytes" else math.inf
    for prompt in prompts:
        if len(prompt.encode()) >= longest:
            print(f"only the first {longest - 1} bytes are read of: {prompt}")
    size = flags.batch_size or (1 if model.device.type == "cpu" else 16)
    for i in range(0, len(takes), size):
        batch = takes[i:i + size]
        shape = model.latent_shape(flags.seconds)
        z0 = torch.cat([model.noise([prompt], flags.seed + k, shape) for prompt, k in batch])
        began = time.perf_counter()
        wavs = model.generate([p for p, _ in batch], flags.steps, flags.guidance, z0=z0, vocoder=vocoder).cpu()
        elapsed = (time.perf_counter() - began) / len(batch)
        for (prompt, k), wav in zip(batch, wavs):
            path = flags.out / f"{names[prompt]}-{k}.wav"
            save_clip(path, wav)
            seconds = len(wav) / fa.SAMPLE_RATE
            print(f"{path}  {seconds:.2f} s of audio in {1000 * elapsed:.0f} ms, {seconds / elapsed:.0f} x real time, NFE {nfe}")
    how = f"{source}, {flags.steps} step{'s' * (flags.steps > 1)}, ω {flags.guidance:g}, seed {flags.seed}."
    page = write_page(flags.out, "flashaudio", how, [(prompt, f"take {k}", f"{names[prompt]}-{k}") for prompt, k in takes], seconds)
    print(f"{page}: all of them, to listen to in a browser")


def command(flags: argparse.Namespace) -> int:
    """main, with an exit code: 2 and one line for what a person can put right."""
    try:
        main(flags)
        return 0
    except (InputError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("sample.py: out of memory: a smaller --batch_size needs less", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(command(FLAGS))
