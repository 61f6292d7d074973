"""Judges of generated sound: called with waveforms (N, samples), one for each of the rows they were made with, they return
{"fd", "kl", "accuracy", "measured", "clap"}; what a judge cannot tell is None. train.py picks one by what the manifest holds.
Also what is written about a run: its table and the card of its models."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import torchaudio
from torch import Tensor

from data import toy
from data.manifest import Data
from flashaudio import SAMPLE_RATE, clap_score, frechet_distance, hub_model, kl_divergence, mel_spectrogram


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


COLUMNS = ("model", "steps", "nfe", "guidance", "fd", "kl", "accuracy", "measured", "clap", "straightness", "rtf", "clips")


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
    steps = {s: flags[f"{s}_steps"] for s in ("vae", "cfm", "rf1", "rf2", "distill")}
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

Data: `{flags["data"]}`. Preset: {flags["preset"]}. Starting point: {flags["init"] or "none"}. Text encoder: {flags["text"]}.
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
