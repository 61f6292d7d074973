"""Text to WAV with a trained FlashAudio.

    python sample.py "a bell followed by rain"                    the newest distilled model
    python sample.py --model out/toy/rf2 --steps 4 --n 3 "rain"   another stage, three takes
    python sample.py --file prompts.txt --out samples             one prompt per line

Writes <out>/<prompt>-<take>.wav (16 bit, 16 kHz), a picture of its mel spectrogram, and a page to
listen to all of them, <out>/index.html.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from evaluation.listen import file_names, save_clip, write_page
from flashaudio import SAMPLE_RATE, TEXT_ENCODERS, FlashAudio, InputError, clean_text
from pretrained import make_an_audio, vocoders
from runs.run import Parser, find_device, one_line_errors

TEXT_ENCODERS["make-an-audio"] = make_an_audio.MakeAnAudioText      # of models made with --init


def parse_flags(argv: list[str] | tuple[str, ...] = ()) -> argparse.Namespace:
    parser = Parser("sample.py", __doc__)
    add = parser.add_argument
    add("prompts", nargs="*", help="what to hear")
    add("--file", type=Path, help="text file of prompts, one per line")
    add("--model", default="", help="folder of a stage, or a hub id [the newest out/*/distill]")
    add("--steps", type=int, default=1, help="Euler steps [1]")
    add("--guidance", type=float, default=1.0, help="guidance scale; 1 is none, others take twice "
        "the evaluations [1]")
    add("--n", type=int, default=1, help="takes of each prompt [1]")
    add("--seconds", type=float, help="length of a clip [that of the training clips]")
    add("--seed", type=int, default=0, help="take k of a prompt has the noise of seed + k [0]")
    add("--out", type=Path, default=Path("samples"), help="folder to write to [samples]")
    add("--batch_size", type=int, help="clips made at once; 1 gives the same bits in any company "
        "[1 on a CPU, else 16]")
    add("--device", default="auto", help="cpu, cuda or mps; auto is cuda where there is one [auto]")
    add("--vocoder", default="griffin-lim", help="griffin-lim, hifigan:<hub id or folder> or "
        "bigvgan:<folder> [griffin-lim]")
    return parser.parse_args(argv)


def newest_model() -> Path:
    found = sorted(Path("out").glob("*/distill/model.safetensors"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("there is no distilled model under out/ yet: run `python train.py`, or "
                         "name one with --model")
    return found[-1].parent


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """The prompts of the command line and of the file, each once."""
    prompts = list(flags.prompts)
    if flags.file:
        try:
            prompts += flags.file.expanduser().read_text(encoding="utf-8-sig").splitlines()
        except ValueError as e:
            raise InputError(f"{flags.file}: not a text file in UTF-8") from e
    prompts = list(filter(None, dict.fromkeys(map(clean_text, prompts))))
    if not prompts:
        raise InputError('there is nothing to make: give a prompt, such as "a bell, then rain"')
    return prompts


@torch.inference_mode()
def main(flags: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")          # as in training
    if flags.n < 1 or (flags.batch_size or 1) < 1:
        raise InputError("--n and --batch_size must be at least 1")
    prompts = read_prompts(flags)
    source = flags.model or newest_model()
    device = find_device(flags.device)
    vocoder = vocoders.load(flags.vocoder, str(device))
    model = FlashAudio.from_pretrained(source, str(device))
    if model.config.stage == "vae":
        raise InputError(f"{source} is a VAE without a trained flow: name a later stage")
    model.check(prompts, flags.steps, flags.guidance, flags.seconds, flags.seed + flags.n - 1)
    shape = model.latent_shape(flags.seconds)
    out = flags.out.expanduser()
    nfe = flags.steps * (1 if flags.guidance == 1 else 2)
    how = f"{source}, NFE {nfe}, ω {flags.guidance:g}, seed {flags.seed}"
    print(how)
    if (model.config.stage == "distill") != (flags.steps == 1):
        print("a distilled model is made for --steps 1, every other stage for more")
    names = file_names(prompts)
    takes = [(prompt, k) for prompt in prompts for k in range(flags.n)]
    model.generate("", seconds=0.25, seed=0, vocoder=vocoder)       # warms up: a first call is slow
    size = flags.batch_size or (1 if device.type == "cpu" else 16)
    clips = []
    for i in range(0, len(takes), size):
        batch = takes[i:i + size]
        z0 = torch.cat([model.noise([prompt], flags.seed + k, shape) for prompt, k in batch])
        began = time.perf_counter()
        wavs = model.generate([prompt for prompt, _ in batch], flags.steps, flags.guidance, z0=z0,
                              vocoder=vocoder).cpu()
        elapsed = (time.perf_counter() - began) / len(batch)
        seconds = wavs.shape[1] / SAMPLE_RATE
        for (prompt, k), wav in zip(batch, wavs):
            name = f"{names[prompt]}-{k}"
            save_clip(out / name, wav)
            clips.append((prompt, f"take {k}", name))
            print(f"{out / name}.wav  {seconds:.2f} s of audio in {1000 * elapsed:.0f} ms, "
                  f"{seconds / elapsed:.0f} x real time")
    page = write_page(out, "flashaudio", how, clips, seconds)
    print(f"{page}: all of them, to listen to in a browser")


if __name__ == "__main__":
    with one_line_errors("sample.py"):
        main(parse_flags(sys.argv[1:]))
