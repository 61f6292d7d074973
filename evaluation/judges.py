"""Judges: how good waveforms are, next to the real clips of the same captions.

A judge is made with the rows that are judged and their real clips (N, samples), and called with
other waveforms for these rows: it returns the figures that it can tell, of fd, kl, accuracy,
measured and clap. `floor`: the figures of real clips that are not those compared with.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

import flashaudio as fa
from data import toy
from data.clips import Clips
from evaluation import toy_judge
from evaluation.measures import clap_score, frechet_distance, kl_divergence
from flashaudio import InputError, hub_model
from runs.cache import bar, cached, digest
from runs.run import Run

REFERENCE = 2000    # or more clips of the toy set that generated ones are compared with; 4 a scene
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
HEARD = 3.0     # decades of magnitude, 60 dB: what lies further below the loudest counts as silence


class ToyJudge:
    """For the toy set, with the classifier of toy_judge.py. fd: of its embedding, to other clips of
    the same scenes, of which there are as many as one likes. kl: its posterior on another clip of
    the scene against that on the generated one. accuracy: the scene of the caption is the
    likeliest. measured: share of the details named in captions that signal processing finds.
    """
    name = "toy judge"
    remarks = [f"fd: to {REFERENCE} or more other real clips of the scenes that are judged. floor: "
               "the held-out clips themselves; row vae has these, too."]

    def __init__(self, data: Clips, rows: np.ndarray, wav: Tensor):
        self.scenes = [data.rows[i]["scene"] for i in rows]
        self.classes = torch.tensor([toy.scene_index(scene) for scene in self.scenes])
        self.judge = toy_judge.train_judge()
        heard = []
        for copy in range(max(4, math.ceil(REFERENCE / len(rows)))):
            clips = []
            for i, scene in enumerate(self.scenes):     # splits and judge are of streams 0 to 3
                clips.append(toy.synthesise(scene, np.random.default_rng((0, 4, copy, i))))
            heard.append(self.hear(torch.from_numpy(np.stack(clips))))
        self.real = torch.cat([embedding for embedding, _ in heard])            # (R, 64)
        self.real_posterior = heard[0][1]                                       # (N, scenes)
        self.floor = self(wav)

    def hear(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (N, samples) -> embedding (N, 64), log-probabilities (N, scenes)."""
        heard = [self.judge(fa.mel_spectrogram(part)) for part in wav.split(32)]
        embedding, posterior = zip(*heard)
        return torch.cat(embedding), torch.cat(posterior)

    def __call__(self, wav: Tensor) -> dict:
        embedding, posterior = self.hear(wav)
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
        # One recording may stand in several rows, with a caption in each
        self.recordings = torch.unique(wav, dim=0, return_inverse=True)[1].tolist()
        self.described = set(zip(self.recordings, self.captions))
        self.heard = audible(fa.mel_spectrogram(wav))
        real = self.hear(wav)
        whole = data.train[data.start[data.train] == 0]     # as rows are: no later windows
        files, first = np.unique(data.file[whole], return_index=True)
        spare = whole[first[~np.isin(files, data.file[rows])]]          # each of another recording
        spare = np.random.default_rng(0).permutation(spare)[:len(rows)]
        others = self.hear(data.waveforms(spare)) if len(spare) > 1 else real
        # fd is along the main axes of others: of more than one for four clips it is mostly chance
        count = max(1, min(len(real), len(others)) // 4)
        self.axes = torch.linalg.svd(others - others.mean(0), full_matrices=False).Vh[:count].T
        self.real = real @ self.axes
        self.floor = {"fd": self.distance(others) if len(spare) > 1 else None, "clips": len(others)}
        self.remarks = ["floor: clips to train on; there is none where all are judged."]
        if len(set(self.captions)) == 1:
            self.remarks.append("accuracy is left out: all clips have the same caption.")

    def hear(self, wav: Tensor) -> Tensor:
        """Waveforms (N, samples) -> what fd compares, (N, E)."""
        return self.embed(fa.mel_spectrogram(wav))

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

    def distance(self, embedding: Tensor) -> float:
        return frechet_distance(embedding @ self.axes, self.real)

    def accuracy(self, wav: Tensor) -> float | None:
        if len(set(self.captions)) == 1:
            return None
        heard = audible(fa.mel_spectrogram(wav))
        nearest = torch.cdist(heard.flatten(1), self.heard.flatten(1)).argmin(1)
        pairs = zip([self.recordings[i] for i in nearest], self.captions)
        return float(np.mean([pair in self.described for pair in pairs]))

    def __call__(self, wav: Tensor) -> dict:
        return {"fd": self.distance(self.hear(wav)), "accuracy": self.accuracy(wav)}


class ClapJudge(NearestClip):
    """With a CLAP model of transformers, a folder or hub id. fd: of its embedding of the clips.
    clap: the cosine of that with its embedding of the captions."""

    def __init__(self, run: Run, rows: np.ndarray, wav: Tensor):
        from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel
        source = run.flags.judge
        self.name = Path(source).name
        self.clap = hub_model(ClapModel, source).to(run.device).requires_grad_(False)
        self.extractor = hub_model(AutoFeatureExtractor, source)
        super().__init__(run.data, rows, wav)
        tokens = hub_model(AutoTokenizer, source)(self.captions, padding=True, truncation=True,
                                                  return_tensors="pt").to(run.device)
        self.text = self.clap.get_text_features(**tokens).pooler_output.cpu()

    def hear(self, wav: Tensor) -> Tensor:
        rate = self.extractor.sampling_rate
        embeddings = []
        for part in torchaudio.functional.resample(wav, fa.SAMPLE_RATE, rate).split(16):
            audio = self.extractor(list(part.numpy()), sampling_rate=rate, return_tensors="pt")
            output = self.clap.get_audio_features(**audio.to(self.clap.device))
            embeddings.append(output.pooler_output.cpu())
        return torch.cat(embeddings)

    def __call__(self, wav: Tensor) -> dict:
        embedding = self.hear(wav)
        return {"fd": self.distance(embedding), "accuracy": self.accuracy(wav),
                "clap": clap_score(embedding, self.text)}


def audible(mels: Tensor) -> Tensor:
    """Log-mels (N, 80, T) less the loudest value of each clip; what is not heard is -HEARD."""
    return (mels - mels.amax((1, 2), keepdim=True)).clamp(min=-HEARD)


def is_toy(data: Clips) -> bool:
    """Whether these are clips of the toy set, at its length: what its judge can judge."""
    scenes = [toy.parse_scene(row.get("scene") or "") for row in data.rows]
    known = all(relation.join(kinds) in toy.SCENES for relation, kinds, _ in scenes)
    return known and data.mels.shape[2] * fa.HOP == toy.SAMPLES


def check_judge(source: str, data: Clips) -> None:
    """Ask for what the evaluation will need, before the work and not after it. InputError."""
    if len(data.held_out(2)) < 2:
        raise InputError("the table compares 2 clips or more, and there is one to judge by: give "
                         "the test split another clip, or none")
    if source and not is_toy(data):
        from transformers import AutoConfig
        hub_model(AutoConfig, source)


def make_judge(run: Run, rows: np.ndarray, wav: Tensor) -> ToyJudge | NearestClip:
    """The toy set's own; for other data the CLAP that flag `judge` names, or the nearest clip."""
    if is_toy(run.data):
        return ToyJudge(run.data, rows, wav)
    if run.flags.judge:
        return ClapJudge(run, rows, wav)
    return NearestClip(run.data, rows, wav)


@torch.no_grad()
def best_guidance(run: Run, model: fa.FlashAudio, steps: int) -> float:
    """The ω of GUIDANCES at which a flow's samples are nearest to clips, by NearestClip's fd over
    captions that it was trained on: how much guidance helps depends on what captions leave open."""
    rows = np.sort(run.data.some(min(256, len(run.data.train)), run.flags.seed))
    batch = run.flags.batch_size

    def fill(array: np.ndarray) -> None:
        model.to(run.device)
        judge = NearestClip(run.data, rows, run.data.waveforms(rows))
        noise = torch.randn(len(rows), *model.latent_shape(), generator=run.generator("guidance"))
        for i, guidance in enumerate(GUIDANCES):
            mels = []
            for k in bar(range(0, len(rows), batch), f"ω = {guidance:g}", unit="batch"):
                part = slice(k, k + batch)
                z = model.sample_latents(judge.captions[part], steps, guidance, z0=noise[part])
                mels.append(model.decode(z).cpu())
            array[i] = judge.distance(judge.embed(torch.cat(mels)))

    key = digest(model, run.data.key, run.flags.seed, steps, GUIDANCES)
    found = cached(run.data.cache / f"guidance-{key}.npy", (len(GUIDANCES),), fill)
    best = GUIDANCES[found.argmin()]
    texts = [f"{fd:.3g} at ω = {guidance:g}" for guidance, fd in zip(GUIDANCES, found)]
    print(f"fd of samples in {steps} steps: {', '.join(texts)}: pairs are made at {best:g}")
    return best
