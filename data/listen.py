"""Hearing and seeing a run: WAV files, mel pictures, the loss picture, and a page to listen to them on."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor

from flashaudio import HOP, SAMPLE_RATE, mel_spectrogram, write_atomically

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }}
ul {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1rem; padding: 0; list-style: none }}
h2 {{ margin: 2rem 0 0; font-size: 1.2rem }}
figure {{ margin: 0 }}
figcaption {{ font-size: .9rem }}
img {{ width: 100%; height: 6rem; image-rendering: pixelated; border-radius: .25rem }}
audio {{ width: 100% }}
</style>
<main>
<h1>{title}</h1>
<p>{text} Pictures are mel spectrograms: time runs to the right ({seconds:.1f} s), frequency upwards (0 to 8 kHz), bright is loud.</p>
{sections}
</main>
</html>
"""
CARD = """<li><figure><figcaption>{label}</figcaption>
<img src="{name}.png" alt="mel spectrogram of “{caption}”, {label}" loading="lazy">
<audio controls preload="metadata" src="{name}.wav" aria-label="“{caption}”, {label}"></audio></figure></li>"""


def save_clip(path: Path, wav: Tensor) -> None:
    """Waveform (samples,) in [-1, 1] -> path.wav, 16 bit, and path.png, its mel alone, a pixel for each frame and band."""
    from matplotlib.image import imsave
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path.with_suffix(".wav"), SAMPLE_RATE, (wav.numpy() * 32767).round().astype(np.int16))
    imsave(path.with_suffix(".png"), mel_spectrogram(wav[None])[0].numpy(), vmin=-4, vmax=1, cmap="magma", origin="lower")


def write_page(folder: Path, title: str, text: str, clips: list[tuple[str, str, str]], seconds: float) -> Path:
    """folder/index.html, with a player and a picture for each clip (caption, label, file name without its ending).

    Clips of one caption stand together, in the order in which they come. The page needs nothing but the files beside it.
    """
    sections = []
    for caption in dict.fromkeys(c for c, _, _ in clips):
        cards = "\n".join(CARD.format(label=html.escape(label), name=html.escape(name), caption=html.escape(caption))
                          for c, label, name in clips if c == caption)
        sections.append(f"<section>\n<h2>{html.escape(caption)}</h2>\n<ul>\n{cards}\n</ul>\n</section>")
    page = PAGE.format(title=html.escape(title), text=html.escape(text), seconds=seconds, sections="\n".join(sections))
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def file_names(texts: list[str]) -> dict[str, str]:
    """A file name for each text, without ending; no two alike, also where a, A and a! are the same to a file system."""
    names: dict[str, str] = {}
    for text in texts:
        name = re.sub(r"[^\w]+", "-", text.lower()).strip("-").encode()[:60].decode(errors="ignore") or "sample"
        names[text] = name if name not in names.values() else f"{name}-{len(names)}"
    return names


def hear(run, stage: str, model) -> None:
    """The same two captions after every stage, in <out>/<stage>: stage vae gives back the recordings, the others make new ones."""
    rows = run.data.held_out(2)
    captions = [run.data.captions[i] for i in rows]
    names = file_names(captions)
    if stage == "vae":
        mels = model.vae.decode(model.vae.encode(torch.tensor(run.data.mels[rows], device=run.device))[0])
        wavs = model.vocoder(mels.detach()).cpu()
    else:
        wavs = model.generate(captions, 1 if stage == "distill" else 24, seed=0).cpu()
    for caption, wav in zip(captions, wavs):
        save_clip(run.folder(stage) / f"{names[caption]}.wav", wav)


def draw_losses(out: Path) -> None:
    """out/loss.png from out/metrics.jsonl: the loss of each stage, its running mean over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    losses: dict[str, dict[int, float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        try:
            held = json.loads(line)
            losses.setdefault(held["stage"], {})[held["step"]] = held["loss"]   # a step done again after a kill counts once
        except (ValueError, KeyError, TypeError):   # a line cut short by a kill
            continue
    if not losses:
        return
    figure = Figure(figsize=(2.6 * len(losses), 2.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, values) in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses.items()):
        steps, loss = np.array(sorted(values.items())).T
        window = min(20, len(loss))
        axes.plot(steps, loss, alpha=0.3)
        axes.plot(steps[window - 1:], np.convolve(loss, np.ones(window) / window, "valid"), color="C0")
        axes.set(title=stage, xlabel="step", ylabel="loss" if not figure.axes.index(axes) else "", yscale="log")
    figure.savefig(out / "loss.png.tmp", format="png")
    (out / "loss.png.tmp").replace(out / "loss.png")
