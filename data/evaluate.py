"""Stage eval: every model at 1, 4 and 24 steps, judged on the waveforms; the table of a run and the cards of its models.

A judge is called with waveforms (N, samples), one for each of the rows it was made with, and returns
{"fd", "kl", "accuracy", "measured", "clap"}; what it cannot tell is None. Which one depends on what the manifest holds.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

import flashaudio as fa
from data import toy
from data.listen import save_clip, write_page
from data.manifest import Data, bar
from data.run import STAGES
from flashaudio import (SAMPLE_RATE, FlashAudio, clap_score, frechet_distance, hub_model, kl_divergence, mel_spectrogram,
                        write_atomically)


class ToyJudge:
    """The classifier of data/toy.py. fd: Fréchet distance of its embedding to that of the real clips. kl: in nats, posterior on
    the real clip against posterior on the generated one. accuracy: the scene of the caption is the likeliest. measured: share
    of the details named in captions (pitch, direction, number, order) that signal processing finds."""
    name = "toy judge"

    def __init__(self, data: Data, rows: np.ndarray, wav: Tensor):
        self.scenes = [data.rows[i]["scene"] for i in rows]
        self.judge = toy.train_judge(data.cache / "judge.safetensors", progress=sys.stderr.isatty())
        toy.check_judge(self.judge, wav, self.scenes)                           # refuses to judge below its bar
        self.real, self.real_posterior = self.judge.judge(wav)
        self.classes = torch.tensor([toy.scene_index(scene) for scene in self.scenes])

    def __call__(self, wav: Tensor) -> dict:
        embedding, posterior = self.judge.judge(wav)
        details = [ok for w, scene in zip(wav.numpy(), self.scenes) for ok in toy.measure(w, scene).values()]
        return {"fd": frechet_distance(embedding, self.real), "kl": kl_divergence(self.real_posterior, posterior),
                "accuracy": (posterior.argmax(1) == self.classes).float().mean().item(),
                "measured": float(np.mean(details)) if details else None, "clap": None}


def is_toy(data: Data) -> bool:
    """Whether these are clips of the toy set, at its length: what its judge can judge."""
    try:
        return data.mels.shape[2] * fa.HOP == toy.SAMPLES and all(toy.scene_index(row["scene"]) >= 0 for row in data.rows)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


class NearestClip:
    """For any other manifest. accuracy: the real clip that is nearest in log-mel (L2) has the caption. fd: Fréchet distance of
    the mean and std over time of each mel band."""
    name = "nearest log-mel"

    def __init__(self, data: Data, rows: np.ndarray, wav: Tensor):
        self.captions, self.real = np.array([data.captions[i] for i in rows]), mel_spectrogram(wav)

    def __call__(self, wav: Tensor) -> dict:
        mel = mel_spectrogram(wav)
        nearest = torch.cdist(mel.flatten(1), self.real.flatten(1)).argmin(1).numpy()
        fd = frechet_distance(*(torch.cat([m.mean(2), m.std(2)], 1) for m in (mel, self.real)))
        return {"fd": fd, "kl": None, "accuracy": float((self.captions[nearest] == self.captions).mean()), "measured": None, "clap": None}


class PublicJudge(NearestClip):
    """With public models, as papers do. fd: Fréchet distance of CLAP's audio embedding; clap: its cosine with the caption; kl: of
    an AudioSet classifier's softmax (AST). accuracy: as NearestClip."""

    def __init__(self, data: Data, rows: np.ndarray, wav: Tensor, clap: str, ast: str, device: torch.device):
        from transformers import ASTForAudioClassification, AutoFeatureExtractor, AutoTokenizer, ClapModel
        super().__init__(data, rows, wav)
        self.name, self.device = f"{clap}{' and ' * bool(ast)}{ast}", device
        self.clap, self.clap_features = hub_model(ClapModel, clap).to(device).eval(), hub_model(AutoFeatureExtractor, clap)
        self.ast = hub_model(ASTForAudioClassification, ast).to(device).eval() if ast else None
        self.ast_features = hub_model(AutoFeatureExtractor, ast) if ast else None
        tokens = hub_model(AutoTokenizer, clap)(self.captions.tolist(), padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            self.text = pooled(self.clap.get_text_features(**tokens)).cpu()
        self.real_embedding, self.real_posterior = self.listen(wav)

    @torch.no_grad()
    def listen(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        """Waveforms (N, samples) at 16 kHz -> CLAP embeddings (N, E) and log-posteriors (N, classes)."""
        embeddings, posteriors = [], []
        for part in wav.split(16):
            high = torchaudio.functional.resample(part, SAMPLE_RATE, self.clap_features.sampling_rate)
            held = self.clap_features(list(high.numpy()), sampling_rate=self.clap_features.sampling_rate, return_tensors="pt")
            embeddings.append(pooled(self.clap.get_audio_features(**held.to(self.device))).cpu())
            if self.ast:
                held = self.ast_features(list(part.numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt")
                posteriors.append(self.ast(**held.to(self.device)).logits.log_softmax(1).cpu())
        return torch.cat(embeddings), torch.cat(posteriors) if self.ast else None

    def __call__(self, wav: Tensor) -> dict:
        embedding, posterior = self.listen(wav)
        return {**super().__call__(wav), "fd": frechet_distance(embedding, self.real_embedding),
                "kl": kl_divergence(self.real_posterior, posterior) if self.ast else None, "clap": clap_score(embedding, self.text)}


def pooled(output) -> Tensor:
    """CLAP's projected embedding, which newer versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


SHOWN = 8   # captions on the listening page
NAMES = {"cfm": "CFM", "rf1": "1-RF", "rf2": "2-RF", "distill": "distilled"}
STORY = ("Captions that were held out: the real clip, then what each model makes of the caption, from the same noise. CFM needs many steps. "
         "The 1-RF is trained on from it, the 2-RF on what the 1-RF makes, and the distilled model on what the 2-RF makes, until one step is enough.")
COLUMNS = ("model", "steps", "nfe", "guidance", "fd", "kl", "accuracy", "measured", "clap", "straightness", "rtf", "clips", "judge")


def cells(row: dict) -> list[str]:
    return ["-" if row[c] is None else f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]


def print_table(results: dict) -> None:
    for row in [dict(zip(COLUMNS, COLUMNS)), *results["rows"]]:
        print(" ".join(f"{cell:>{max(8, len(c))}}" for c, cell in zip(COLUMNS, cells(row))))
    print(f"\njudged by {results['rows'][0]['judge']}; rtf: seconds of computing per second of audio, text to waveform, batch 64\n"
          f"seed {results['seed']}, {results['hardware']}, {results['seconds']:.0f} s of training and evaluation")


def model_card(notes: dict, results: dict) -> str:
    """README.md of a model: what it is, what it was trained on and how long, and the table of its run."""
    stage, flags = notes["stage"], notes["flags"]
    steps = {s: flags[f"{s}_steps"] for s in STAGES[:-1]}
    rows = "\n".join("| " + " | ".join(cells(row)) + " |" for row in results["rows"])
    return f"""---
library_name: flashaudio
pipeline_tag: text-to-audio
tags: [rectified-flow, text-to-audio]
---

# flashaudio, stage {stage}

Text to audio at 16 kHz with rectified flows (FlashAudio, Liu et al., ACL 2025), trained with the flashaudio code.
{"One step is enough." if stage == "distill" else "Sample it with several steps."}

```python
from flashaudio import FlashAudio
wav = FlashAudio.from_pretrained("<this model>").generate(["a bell followed by rain"], steps={1 if stage == "distill" else 24}, seed=0)
```

Data: `{flags["data"]}`. Preset: {flags["preset"]}. Starting point: {flags["init"]}. Text encoder: {flags["text"]}.
Steps of training: {", ".join(f"{s} {n}" for s, n in steps.items())}. Seed: {flags["seed"]}.

The run's models, judged by {results["rows"][0]["judge"]} ({results["hardware"]}):

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{rows}
"""


def peak_memory(device: torch.device) -> float:
    """GiB, of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if os.name == "nt":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


@torch.no_grad()
def evaluate(run: "Run") -> None:
    """Measure the stages of a run of train.py; print the table, write results.json and the model cards."""
    flags, data, began = run.flags, run.data, time.time()
    rows = data.held_out(flags.eval_clips)
    captions, model = [data.captions[i] for i in rows], run.load("vae")
    seconds = model.config.frames * fa.HOP / fa.SAMPLE_RATE
    real = torch.stack([fa.load_audio(data.rows[i]["audio_path"], model.config.frames * fa.HOP) for i in rows])
    if is_toy(data):
        judge = ToyJudge(data, rows, real)
    else:
        judge = PublicJudge(data, rows, real, flags.clap, flags.ast, run.device) if flags.clap else NearestClip(data, rows, real)
    vocoder, table, shown = fa.load_vocoder(flags.vocoder, str(run.device)), [], []
    together = 64 if run.device.type == "cuda" else 8                           # clips that a CPU's caches hold

    def add(name: str, wav: Tensor, steps: int | None = None, guidance: float | None = None, straight: float | None = None,
            elapsed: float | None = None) -> None:
        nfe = steps and steps * (1 if guidance == 1 else 2)
        rtf = elapsed and elapsed / (len(wav) * seconds)
        label = file_name = name
        if steps:
            label = f"{NAMES[name]}, {steps} step{'s' * (steps > 1)}" + f", ω = {guidance:g}" * (guidance != 1)
            file_name = f"{name}-{steps}-{guidance:g}"
        for k, clip in enumerate(wav[:SHOWN]):
            save_clip(Path(flags.out) / "listen" / f"{k}-{file_name}.wav", clip)
            shown.append((captions[k], "the real clip" if name == "real" else "the real clip through the VAE" if name == "vae" else label,
                          f"{k}-{file_name}"))
        table.append({"model": name, "steps": steps, "nfe": nfe, "guidance": guidance, **judge(wav), "straightness": straight,
                      "rtf": rtf, "clips": len(wav), "judge": judge.name})

    def simulate(model: FlashAudio, steps: int, guidance: float, listen: bool = True) -> tuple[Tensor | None, float, float]:
        """Waveforms, straightness of the paths and seconds taken; noise i has the seed i, the same for every model."""
        wav, straight = [], []
        model.sample_latents(captions[:1], 1, seed=0)               # warms up
        model.remembered.clear()                                    # text is part of the time
        start = time.time()
        z0 = torch.cat([model.noise([""], flags.seed + i, model.latent_shape()) for i in range(len(rows))])
        for i in bar(range(0, len(rows), 64), "eval", unit="batch"):
            path = model.sample_latents(captions[i:i + 64], steps, guidance, z0=z0[i:i + 64], return_trajectory=True)
            straight.append(fa.straightness(path) * path.shape[1])
            if listen:
                wav += [vocoder(mel).cpu() for mel in model.decode(path[-1]).split(together)]
        return torch.cat(wav) if listen else None, sum(straight) / len(rows), time.time() - start

    add("real", real)
    mels = torch.tensor(data.mels[rows], device=run.device)
    add("vae", torch.cat([vocoder(model.vae.decode(model.vae.encode(m)[0])).cpu() for m in mels.split(together)]))
    for stage in STAGES[1:-1]:
        model = run.load(stage)
        for guidance in (1.0, 3.0) if stage == "cfm" else (1.0,):
            wav24, straight, elapsed24 = simulate(model, 24, guidance, listen=stage != "distill")
            for steps in ((1,) if stage == "distill" else (1, 4) if guidance == 1 else ()):
                wav, _, elapsed = simulate(model, steps, guidance)
                add(stage, wav, steps, guidance, straight, elapsed)
            if stage != "distill":
                add(stage, wav24, 24, guidance, straight, elapsed24)
    notes = {s: json.loads((run.folder(s) / "config.json").read_text()) for s in STAGES[:-1]}
    chip = (torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else
            f"{platform.processor() or platform.machine()} {run.device.type}, {torch.get_num_threads()} threads")
    hardware = f"{chip}, torch {torch.__version__}"
    trained = {k: v for held in notes.values() for k, v in held["settings"].items() if k in asdict(flags) and k != "data"}
    results = {"rows": table, "config": {**asdict(flags), **trained}, "seed": flags.seed, "hardware": hardware,
               "seconds": round(sum(held["seconds"] for held in notes.values()) + time.time() - began, 1)}
    write_atomically(Path(flags.out) / "results.json", json.dumps(results, indent=2).encode())
    for stage in STAGES[1:-1] if run.public else STAGES[:-1]:
        write_atomically(run.folder(stage) / "README.md", model_card(notes[stage], results).encode())
    page = write_page(Path(flags.out) / "listen", f"flashaudio: {Path(flags.out).name}", STORY, shown, seconds)
    print_table(results)
    print(f"{page}: the first {min(SHOWN, len(rows))} captions, to listen to in a browser")
