"""Hearing and seeing a run: clips, pictures of their mels, a page to play them, a loss picture."""

import html
import io
import json
import re
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
import soundfile
import torch
from torch import Tensor

from flashaudio import SAMPLE_RATE, FlashAudio, mel_spectrogram
from runs.cache import write_atomically
from runs.run import Run

PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
CLIP = """<figure><figcaption>{label}</figcaption>
<img src="{file}.png" alt="mel spectrogram of “{caption}”, {label}" loading="lazy">
<audio controls preload="metadata" src="{file}.wav" aria-label="“{caption}”, {label}"></audio>
</figure>"""


def save_clip(path: Path, wav: Tensor) -> None:
    """Waveform (samples,) in [-1, 1] -> path.wav, 16 bit, and path.png, its mel, a pixel per value.

    `path` has no ending; what looks like one is part of the name. What exceeds [-1, 1] is cut off.
    """
    from matplotlib import colormaps
    from PIL import Image                           # matplotlib's own imsave loads all of its plots
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = wav.clamp(-1, 1)
    sound = io.BytesIO()
    soundfile.write(sound, wav.numpy(), SAMPLE_RATE, "PCM_16", format="WAV")
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
    figures: dict[str, str] = {}
    for caption, label, file in clips:
        caption = html.escape(caption)
        figure = CLIP.format(label=html.escape(label), file=quote(file), caption=caption)
        figures[caption] = figures.get(caption, "") + figure
    sections = ""
    for caption, held in figures.items():
        sections += f"<h2>{caption}</h2>\n<section>\n{held}\n</section>\n"
    page = PAGE.substitute(title=html.escape(title), text=html.escape(text),
                           seconds=f"{seconds:.1f}", sections=sections)
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def file_names(texts: list[str]) -> dict[str, str]:
    """A file name for each text, without ending; no two are alike where case does not count."""
    names: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        letters = re.sub(r"\W+", "-", text.casefold()).strip("-")
        name = letters.encode()[:60].decode(errors="ignore") or "sample"
        while name in names.values():
            name += "-2"
        names[text] = name
    return names


@torch.no_grad()
def hear(run: Run, stage: str, model: FlashAudio) -> None:
    """The same two captions after each stage, in its folder; vae plays back their recordings."""
    rows = run.data.held_out(2)
    captions = [run.data.captions[i] for i in rows]
    if stage == "vae":
        mels = torch.tensor(run.data.mels[run.data.file[rows]], device=run.device)
        z = model.encode(mels)
    else:
        z = model.sample_latents(captions, 1 if stage == "distill" else 24, seed=0)
    names = file_names(captions)
    for caption, wav in zip(captions, run.vocoder(model.decode(z)).cpu()):
        save_clip(run.folder(stage) / names[caption], wav)


def draw_losses(out: Path) -> None:
    """out/loss.png from out/metrics.jsonl: the loss of each stage, its running mean over it, and
    dots for the loss on clips that are held out."""
    from matplotlib.figure import Figure
    curves: dict[str, dict[str, dict[int, float]]] = {"loss": {}, "held_out": {}}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        try:
            noted = json.loads(line)
        except ValueError:                          # cut short by a kill
            continue
        for kind in curves.keys() & noted.keys():   # a step that was done again counts once
            curves[kind].setdefault(noted["stage"], {})[noted["step"]] = noted[kind]
    stages = curves["loss"]
    if not stages:
        return
    figure = Figure(figsize=(2.6 * len(stages), 2.4), dpi=100, layout="constrained")
    every = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, stage in zip(every, stages):
        steps, loss = np.array(sorted(stages[stage].items())).T
        window = min(20, len(loss))
        mean = np.convolve(loss, np.ones(window) / window, "valid")
        axes.plot(steps, loss, alpha=0.3)
        axes.plot(steps[window - 1:], mean, color="C0")
        held_out = curves["held_out"].get(stage, {})
        axes.plot(list(held_out.keys()), list(held_out.values()), "o", color="C1")
        axes.set(title=stage, xlabel="step", yscale="log")
    every[0].set_ylabel("loss (dots: held out)")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(out / "loss.png", picture.getvalue())
