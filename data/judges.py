"""Judges of generated sound: called with waveforms (N, samples), one for each of the rows they were made with, they return
{"fd", "kl", "accuracy", "measured"}; what a judge cannot tell is None. train.py picks one by what the manifest holds."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from data import toy
from data.manifest import Data
from flashaudio import frechet_distance, kl_divergence, mel_spectrogram


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
                "measured": float(np.mean(details)) if details else None}


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
        return {"fd": fd, "kl": None, "accuracy": float((self.captions[nearest] == self.captions).mean()), "measured": None}
