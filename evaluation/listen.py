"""Hearing and seeing a run: clips, pictures of their mels, a page to play them, a loss picture."""

import html
import json
import re
from pathlib import Path
from string import Template
from urllib.parse import quote

import soundfile
from torch import Tensor

from flashaudio import SAMPLE_RATE, mel_spectrogram

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
    soundfile.write(f"{path}.wav", wav.numpy(), SAMPLE_RATE, "PCM_16")
    mel = mel_spectrogram(wav[None])[0].numpy()                                 # (80, T)
    bright = (mel[::-1] + 4) / 5                                                # from -4 to 1
    Image.fromarray(colormaps["magma"](bright, bytes=True)).save(f"{path}.png")


def write_page(folder: Path, title: str, text: str, clips: list[tuple[str, str, str]],
               seconds: float) -> Path:
    """folder/index.html: player and picture of each clip (caption, label, file without its ending).

    Clips of one caption stand together. The page needs nothing but the files beside it.
    """
    sections: dict[str, str] = {}
    for caption, label, file in clips:
        caption = html.escape(caption)
        begun = sections.get(caption, f"<h2>{caption}</h2>\n<section>\n")
        clip = CLIP.format(label=html.escape(label), file=quote(file), caption=caption)
        sections[caption] = begun + clip
    page = PAGE.substitute(title=html.escape(title), text=html.escape(text),
                           seconds=f"{seconds:.1f}",
                           sections="\n</section>\n".join([*sections.values(), ""]))
    (folder / "index.html").write_text(page, encoding="utf-8")
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


def draw_losses(out: Path) -> None:
    """out/loss.png from out/metrics.jsonl: the loss of each stage, its running mean over it, and
    dots for the loss on clips that are held out."""
    from matplotlib.figure import Figure
    from scipy.ndimage import uniform_filter1d
    stages: dict[str, dict[int, dict]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        try:
            noted = json.loads(line)
        except ValueError:                          # cut short by a kill
            continue
        stages.setdefault(noted["stage"], {})[noted["step"]] = noted    # the last, if done again
    figure = Figure(figsize=(2.6 * len(stages), 2.4), dpi=100, layout="constrained")
    every = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (stage, noted) in zip(every, stages.items()):
        steps = sorted(noted)
        loss = [noted[step]["loss"] for step in steps]
        checked = [step for step in steps if "held_out" in noted[step]]
        axes.plot(steps, loss, alpha=0.3)
        axes.plot(steps, uniform_filter1d(loss, 20), color="C0")
        axes.plot(checked, [noted[step]["held_out"] for step in checked], "o", color="C1")
        axes.set(title=stage, xlabel="step", yscale="log")
    every[0].set_ylabel("loss (dots: held out)")
    figure.savefig(out / "loss.png")
