"""Hearing and seeing a run: clips, pictures of their mels, a page to play them, a loss picture."""

import html
import io
import json
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile
import torch
from torch import Tensor

from flashaudio import SAMPLE_RATE, FlashAudio, mel_spectrogram
from runs.cache import write_atomically
from runs.run import Run

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }}
ul {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr));
      gap: 1rem; padding: 0; list-style: none }}
h2 {{ margin: 2rem 0 0; font-size: 1.2rem; overflow-wrap: anywhere }}
figure {{ margin: 0 }}
figcaption {{ font-size: .9rem }}
img {{ width: 100%; height: 6rem; image-rendering: pixelated; border-radius: .25rem }}
audio {{ width: 100% }}
</style>
<main>
<h1>{title}</h1>
<p>{text} Pictures are mel spectrograms: time runs to the right ({seconds:.1f} s),
frequency upwards (0 to 8 kHz), bright is loud.</p>
{sections}
</main>
</html>
"""
SECTION = "<section>\n<h2>{caption}</h2>\n<ul>\n{cards}\n</ul>\n</section>"
CARD = """<li><figure><figcaption>{label}</figcaption>
<img src="{file}.png" alt="mel spectrogram of “{caption}”, {label}" loading="lazy">
<audio controls preload="metadata" src="{file}.wav" aria-label="“{caption}”, {label}"></audio>
</figure></li>"""


def save_clip(path: Path, wav: Tensor) -> None:
    """Waveform (samples,) in [-1, 1] -> path.wav, 16 bit, and path.png, its mel, a pixel per value.

    `path` has no ending; what looks like one is part of the name. What exceeds [-1, 1] is cut off.
    """
    from matplotlib import colormaps
    from PIL import Image                           # matplotlib's own imsave loads all of its plots
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = wav.clamp(-1, 1)
    sound = io.BytesIO()
    pcm = (wav.numpy() * 32767).round().astype(np.int16)
    soundfile.write(sound, pcm, SAMPLE_RATE, format="WAV")
    mel = mel_spectrogram(wav[None])[0].numpy()                                 # (80, T)
    bright = (mel[::-1] + 4) / 5                                                # from -4 to 1
    picture = io.BytesIO()
    Image.fromarray(colormaps["magma"](bright, bytes=True)).save(picture, "png")
    write_atomically(path.with_name(path.name + ".wav"), sound.getvalue())
    write_atomically(path.with_name(path.name + ".png"), picture.getvalue())


def write_page(folder: Path, title: str, text: str, clips: list[tuple[str, str, str]],
               seconds: float) -> Path:
    """folder/index.html: player and picture of each clip (caption, label, file without its ending).

    Clips of one caption stand together. The page needs nothing but the files beside it.
    """
    cards: dict[str, list[str]] = {}
    for caption, label, file in clips:
        card = CARD.format(label=html.escape(label), file=quote(file), caption=html.escape(caption))
        cards.setdefault(caption, []).append(card)
    sections = []
    for caption, own in cards.items():
        sections.append(SECTION.format(caption=html.escape(caption), cards="\n".join(own)))
    page = PAGE.format(title=html.escape(title), text=html.escape(text), seconds=seconds,
                       sections="\n".join(sections))
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def file_names(texts: list[str]) -> dict[str, str]:
    """A file name for each text, without ending; no two are alike where case does not count."""
    names: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        stem = re.sub(r"\W+", "-", text.casefold()).strip("-")
        stem = stem.encode()[:60].decode(errors="ignore") or "sample"
        name = stem
        number = 1
        while name in names.values():
            number += 1
            name = f"{stem}-{number}"
        names[text] = name
    return names


@torch.no_grad()
def hear(run: Run, stage: str, model: FlashAudio) -> None:
    """The same two captions after each stage, in its folder; vae plays back their recordings."""
    rows = run.data.held_out(2)
    captions = [run.data.captions[i] for i in rows]
    if stage == "vae":
        mels = torch.tensor(run.data.mels[run.data.file[rows]], device=run.device)
        wavs = run.vocoder(model.decode(model.encode(mels)))
    else:
        steps = 1 if stage == "distill" else 24
        wavs = model.generate(captions, steps, seed=0, vocoder=run.vocoder)
    names = file_names(captions)
    for caption, wav in zip(captions, wavs.cpu()):
        save_clip(run.folder(stage) / names[caption], wav)


def draw_losses(out: Path) -> None:
    """out/loss.png from out/metrics.jsonl: the loss of each stage, its running mean over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    losses: dict[str, dict[int, float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        try:
            held = json.loads(line)     # a step that was done again after a kill counts once
            losses.setdefault(held["stage"], {})[held["step"]] = held["loss"]
        except (ValueError, KeyError, TypeError):           # a line cut short by a kill
            continue
    if not losses:
        return
    figure = Figure(figsize=(2.6 * len(losses), 2.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (stage, values) in zip(every, losses.items()):
        steps, loss = np.array(sorted(values.items())).T
        window = min(20, len(loss))
        mean = np.convolve(loss, np.ones(window) / window, "valid")
        axes.plot(steps, loss, alpha=0.3)
        axes.plot(steps[window - 1:], mean, color="C0")
        axes.set(title=stage, xlabel="step", yscale="log")
    every[0].set_ylabel("loss")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(out / "loss.png", picture.getvalue())
