"""Judges: how good waveforms are, next to the real clips of the same captions.

A judge is made with the rows that are judged and their real clips (N, samples), and called with
other waveforms for these rows: it returns the figures that it can tell, of fd, kl, accuracy,
measured and clap. `real` (N, E) is its embedding of the real clips, to which fd is the distance,
`fresh` real clips for the VAE, and `floor` the figures of real clips: no model should be better.
"""

from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

import flashaudio as fa
from data import toy
from data.audio import load_audio
from data.clips import Clips
from evaluation import toy_judge
from evaluation.measures import clap_score, frechet_distance, kl_divergence
from flashaudio import InputError, hub_model
from runs.run import Run

HEARD = 3.0     # decades of magnitude, 60 dB: what lies further below the loudest counts as silence


class ToyJudge:
    """For the toy set, with the classifier of toy_judge.py. kl: its posterior on the real clip
    against that on the generated one. accuracy: the scene of the caption is the likeliest.
    measured: share of the details named in captions that signal processing finds."""
    name = "toy judge"
    remarks = ["floor: real clips, made anew of the same scenes; row vae has these, too."]

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor):
        self.scenes = [data.rows[i]["scene"] for i in rows]
        self.classes = torch.tensor([toy.scene_index(scene) for scene in self.scenes])
        self.judge = toy_judge.train_judge()
        toy_judge.check_judge(self.judge, wav, self.scenes)     # refuses to judge below its bar
        self.real, self.real_posterior = self.judge.judge(wav)
        fresh = []
        for i, scene in enumerate(self.scenes):     # splits and judge are made of streams 0 to 3
            fresh.append(toy.synthesise(scene, np.random.default_rng((0, 4, i))))
        self.fresh = torch.from_numpy(np.stack(fresh))                          # (N, samples)
        self.floor = self(self.fresh)

    def __call__(self, wav: Tensor) -> dict:
        embedding, posterior = self.judge.judge(wav)
        details = []
        for clip, scene in zip(wav.numpy(), self.scenes):
            details += toy_judge.measure(clip, scene).values()
        return {"fd": frechet_distance(embedding, self.real),
                "kl": kl_divergence(self.real_posterior, posterior),
                "accuracy": (posterior.argmax(1) == self.classes).float().mean().item(),
                "measured": float(np.mean(details)) if details else None}


class NearestClip:
    """For any other data. fd: of how clips sound while they sound, and of how long that is.
    accuracy: the real clip that sounds most alike has the caption, or a copy of it has.

    Short sounds end in silence, which is most of some clips, and the same in good and in bad ones.
    So what is 60 dB below the loudest of its clip is silence, whatever its noise: it has no weight
    in fd, and two silences are alike. floor: of clips to train on.
    """
    name = "nearest log-mel"

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor):
        self.captions = [data.captions[i] for i in rows]
        mels = fa.mel_spectrogram(wav)                                          # (N, 80, T)
        self.fresh = wav
        self.heard = audible(mels)
        # One recording may stand in several rows, with a caption in each
        self.recordings = torch.unique(wav, dim=0, return_inverse=True)[1].tolist()
        self.described = set(zip(self.recordings, self.captions))
        spare = other_rows(data, rows)
        self.alone = len(spare) < 2
        self.others = rows if self.alone else spare
        others = torch.from_numpy(data.mels[data.file[self.others]])
        self.compare_with(self.embed(mels), self.embed(others))
        self.remarks = ["floor: clips to train on; there is none where all are judged."]
        if len(set(self.captions)) == 1:
            self.remarks.append("accuracy is left out: all clips have the same caption.")

    @staticmethod
    def embed(mels: Tensor) -> Tensor:
        """Log-mels (N, 80, T) -> (N, 161): mean and std of each band, and how long a clip sounds.

        A frame weighs as much as it is above silence. The length weighs as much as the level: a
        clip that is twice as long is as far off as one that is twice as loud.
        """
        heard = audible(mels)
        weight = heard.amax(1, keepdim=True) / HEARD + 1        # (N, 1, T): 1 loudest, 0 silent
        frames = weight.sum(2)                                                  # (N, 1)
        mean = (heard * weight).sum(2) / frames                                 # (N, 80)
        variance = ((heard - mean[:, :, None]).square() * weight).sum(2) / frames
        level = mels.amax((1, 2))[:, None]
        length = mels.shape[1] ** 0.5 * frames.log10()
        return torch.cat([mean + level, variance.sqrt(), length], 1)

    def compare_with(self, real: Tensor, others: Tensor) -> None:
        """Measure fd from embeddings real (N, E), along the main axes of others (M, E).

        One axis for four clips at most: of more, a covariance would be mostly chance.
        """
        count = max(1, min(len(real), len(others)) // 4)
        self.axes = torch.linalg.svd(others - others.mean(0), full_matrices=False).Vh[:count].T
        self.real = real @ self.axes
        self.floor = {"clips": len(others)}
        if not self.alone:
            self.floor["fd"] = self.distance(others)

    def distance(self, embedding: Tensor) -> float:
        return frechet_distance(embedding @ self.axes, self.real)

    def accuracy(self, mels: Tensor) -> float | None:
        if len(set(self.captions)) == 1:
            return None
        nearest = torch.cdist(audible(mels).flatten(1), self.heard.flatten(1)).argmin(1)
        pairs = zip([self.recordings[i] for i in nearest], self.captions)
        return float(np.mean([pair in self.described for pair in pairs]))

    def __call__(self, wav: Tensor) -> dict:
        mels = fa.mel_spectrogram(wav)
        return {"fd": self.distance(self.embed(mels)), "accuracy": self.accuracy(mels)}


class ClapJudge(NearestClip):
    """With a CLAP model of transformers, a folder or hub id. fd: of its embedding of the clips.
    clap: the cosine of that with its embedding of the captions."""

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor, source: str,
                 device: torch.device):
        from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel
        super().__init__(data, rows, wav)
        self.name = Path(source).name
        self.clap = hub_model(ClapModel, source).to(device).eval()
        self.extractor = hub_model(AutoFeatureExtractor, source)
        tokens = hub_model(AutoTokenizer, source)(self.captions, padding=True, truncation=True,
                                                  return_tensors="pt").to(device)
        with torch.no_grad():
            self.text = self.clap.get_text_features(**tokens).pooler_output.cpu()
        self.compare_with(self.hear(wav), self.hear(load_clips(data, self.others)))

    @torch.no_grad()
    def hear(self, wav: Tensor) -> Tensor:
        """Waveforms (N, samples) -> CLAP's embeddings (N, E)."""
        rate = self.extractor.sampling_rate
        embeddings = []
        for part in torchaudio.functional.resample(wav, fa.SAMPLE_RATE, rate).split(16):
            audio = self.extractor(list(part.numpy()), sampling_rate=rate, return_tensors="pt")
            output = self.clap.get_audio_features(**audio.to(self.clap.device))
            embeddings.append(output.pooler_output.cpu())
        return torch.cat(embeddings)

    def __call__(self, wav: Tensor) -> dict:
        embedding = self.hear(wav)
        return {"fd": self.distance(embedding), "clap": clap_score(embedding, self.text),
                "accuracy": self.accuracy(fa.mel_spectrogram(wav))}


def audible(mels: Tensor) -> Tensor:
    """Log-mels (N, 80, T) less the loudest value of each clip; what is not heard is -HEARD."""
    return (mels - mels.amax((1, 2), keepdim=True)).clamp(min=-HEARD)


def load_clips(data: Clips, rows: np.ndarray) -> Tensor:
    """Waveforms (N, samples) of rows, at the length of the clips."""
    frames = data.mels.shape[2]
    wavs = []
    for i in rows:
        loop = data.length[data.file[i]] == frames  # then a short sound was repeated
        wavs.append(load_audio(data.rows[i]["audio_path"], frames * fa.HOP, data.start[i], loop))
    return torch.stack(wavs)


def other_rows(data: Clips, rows: np.ndarray) -> np.ndarray:
    """As many rows to train on, each of another recording, none of which `rows` hold."""
    files, first = np.unique(data.file[data.train], return_index=True)
    spare = data.train[first[~np.isin(files, data.file[rows])]]
    return np.random.default_rng(0).permutation(spare)[:len(rows)]


def is_toy(data: Clips) -> bool:
    """Whether these are clips of the toy set, at its length: what its judge can judge."""
    scenes = [toy.parse_scene(row.get("scene") or "") for row in data.rows]
    known = all(relation.join(kinds) in toy.SCENES for relation, kinds, _ in scenes)
    return known and data.mels.shape[2] * fa.HOP == toy.SAMPLES


def check_judge(source: str, data: Clips) -> None:
    """Ask for what the evaluation will need, before the work and not after it. InputError."""
    if len(data.held_out(2)) < 2:
        raise InputError("at least 2 clips are needed to judge by: the data has fewer")
    if source and not is_toy(data):
        from transformers import AutoConfig
        hub_model(AutoConfig, source)


def make_judge(run: Run, rows: np.ndarray, wav: Tensor) -> ToyJudge | NearestClip:
    """The toy set's own; for other data the CLAP that flag `judge` names, or the nearest clip."""
    if is_toy(run.data):
        return ToyJudge(run.data, rows, wav)
    if run.flags.judge:
        return ClapJudge(run.data, rows, wav, run.flags.judge, run.device)
    return NearestClip(run.data, rows, wav)
