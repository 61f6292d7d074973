"""Judges: how good waveforms are, next to the real clips of the same captions.

A judge is made with the rows that are judged and their real clips (N, samples), and called with
other waveforms for these rows. It returns {"fd", "kl", "accuracy", "measured", "clap"}; what it
cannot tell is None. `real` (N, E) is its embedding of the real clips, from which fd is measured.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

import flashaudio as fa
from data import toy
from data.clips import Clips
from flashaudio import InputError
from pretrained.text import hub_model
from runs.run import Run


class ToyJudge:
    """For the toy set, with the classifier of data/toy.py. kl: its posterior on the real clip
    against that on the generated one. accuracy: the scene of the caption is the likeliest.
    measured: share of the details named in captions that signal processing finds."""
    name = "toy judge"

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor):
        self.scenes = [data.rows[i]["scene"] for i in rows]
        self.classes = torch.tensor([toy.scene_index(scene) for scene in self.scenes])
        self.judge = toy.train_judge(toy.JUDGE, progress=sys.stderr.isatty())
        toy.check_judge(self.judge, wav, self.scenes)       # refuses to judge below its bar
        self.real, self.real_posterior = self.judge.judge(wav)

    def __call__(self, wav: Tensor) -> dict:
        embedding, posterior = self.judge.judge(wav)
        details = []
        for clip, scene in zip(wav.numpy(), self.scenes):
            details += toy.measure(clip, scene).values()
        return {"fd": fa.frechet_distance(embedding, self.real),
                "kl": fa.kl_divergence(self.real_posterior, posterior),
                "accuracy": (posterior.argmax(1) == self.classes).float().mean().item(),
                "measured": float(np.mean(details)) if details else None, "clap": None}


class NearestClip:
    """For any other data. accuracy: the real clip nearest in log-mel (L2), or a copy of it, has the
    caption. fd: of the mean and std over time of each mel band."""
    name = "nearest log-mel"

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor):
        self.captions = [data.captions[i] for i in rows]
        self.mels = fa.mel_spectrogram(wav)                                     # (N, 80, T)
        self.real = self.embed(self.mels)
        # One recording may stand in several rows, with a caption in each
        self.recordings = torch.unique(wav, dim=0, return_inverse=True)[1].tolist()
        self.described = set(zip(self.recordings, self.captions))

    @staticmethod
    def embed(mels: Tensor) -> Tensor:
        return torch.cat([mels.mean(2), mels.std(2)], 1)                        # (N, 160)

    def accuracy(self, mels: Tensor) -> float:
        nearest = torch.cdist(mels.flatten(1), self.mels.flatten(1)).argmin(1)
        heard = [self.recordings[i] for i in nearest]
        return float(np.mean([pair in self.described for pair in zip(heard, self.captions)]))

    def __call__(self, wav: Tensor) -> dict:
        mels = fa.mel_spectrogram(wav)
        return {"fd": fa.frechet_distance(self.embed(mels), self.real), "kl": None,
                "accuracy": self.accuracy(mels), "measured": None, "clap": None}


class PublicJudge(NearestClip):
    """With public models, as papers do: "CLAP" or "CLAP,AST", by folder or hub id. fd: of CLAP's
    audio embedding. clap: its cosine with the caption. kl: of an AudioSet classifier (AST)."""

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor, models: str,
                 device: torch.device):
        import transformers as hf
        super().__init__(data, rows, wav)
        self.name = ",".join(Path(m).name if Path(m).exists() else m for m in models.split(","))
        self.device = device
        clap, _, ast = models.partition(",")
        self.clap = hub_model(hf.ClapModel, clap).to(device).eval()
        self.clap_input = hub_model(hf.AutoFeatureExtractor, clap)
        self.ast = None
        if ast:
            self.ast = hub_model(hf.ASTForAudioClassification, ast).to(device).eval()
            self.ast_input = hub_model(hf.AutoFeatureExtractor, ast)
        tokenizer = hub_model(hf.AutoTokenizer, clap)
        tokens = tokenizer(self.captions, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            self.text = pooled(self.clap.get_text_features(**tokens.to(device))).cpu()
        self.real, self.real_posterior = self.hear(wav)

    def prepare(self, extractor, wav: Tensor) -> dict:
        rate = extractor.sampling_rate
        wav = torchaudio.functional.resample(wav, fa.SAMPLE_RATE, rate)
        return extractor(list(wav.numpy()), sampling_rate=rate, return_tensors="pt").to(self.device)

    @torch.no_grad()
    def hear(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        """Waveforms (N, samples) -> CLAP embeddings (N, E), log-posteriors of AST (N, classes)."""
        embeddings, posteriors = [], []
        for part in wav.split(16):
            output = self.clap.get_audio_features(**self.prepare(self.clap_input, part))
            embeddings.append(pooled(output).cpu())
            if self.ast:
                logits = self.ast(**self.prepare(self.ast_input, part)).logits
                posteriors.append(logits.log_softmax(1).cpu())
        return torch.cat(embeddings), torch.cat(posteriors) if self.ast else None

    def __call__(self, wav: Tensor) -> dict:
        embedding, posterior = self.hear(wav)
        return {"fd": fa.frechet_distance(embedding, self.real),
                "kl": fa.kl_divergence(self.real_posterior, posterior) if self.ast else None,
                "accuracy": self.accuracy(fa.mel_spectrogram(wav)), "measured": None,
                "clap": fa.clap_score(embedding, self.text)}


def pooled(output) -> Tensor:
    """CLAP's projected embedding, which newer versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


def is_toy(data: Clips) -> bool:
    """Whether these are clips of the toy set, at its length: what its judge can judge."""
    try:
        scenes = [toy.scene_index(row["scene"]) for row in data.rows]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return len(scenes) > 0 and data.mels.shape[2] * fa.HOP == toy.SAMPLES


def check_judge(models: str, data: Clips) -> None:
    """Ask for what the evaluation will need, before the work and not after it. InputError."""
    if len(data.held_out(2)) < 2:
        raise InputError("stage eval compares at least 2 clips, and there are fewer to judge by")
    if models and not is_toy(data):
        from transformers import AutoConfig
        for model in models.split(","):
            hub_model(AutoConfig, model)


def make_judge(run: Run, rows: np.ndarray, wav: Tensor) -> ToyJudge | NearestClip:
    """The toy set's own; for other data the models that flag `judge` names, or the nearest clip."""
    if is_toy(run.data):
        return ToyJudge(run.data, rows, wav)
    if run.flags.judge:
        return PublicJudge(run.data, rows, wav, run.flags.judge, run.device)
    return NearestClip(run.data, rows, wav)
