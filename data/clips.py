"""Clips in: those of a manifest or a folder -> mels, latents, contexts.

Each is computed once, kept in the run's cache/ under the name of what it was computed from, and
read through a memory map.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from data.audio import load_audio, samples_in
from data.rows import doubts, read_folder, read_manifest
from flashaudio import HOP, FlashAudio, InputError, mel_spectrogram
from runs.cache import bar, blocks, cached, digest, one_thread, write_atomically
from runs.processes import rank_and_world


def pieces(length: int, samples: int, most: int) -> list[int]:
    """Where the pieces of a recording begin: up to `most` that don't overlap, evenly spread."""
    count = max(1, min(most, length // samples))
    return [i * (length - samples) // max(1, count - 1) for i in range(count)]


@lru_cache(maxsize=2)                       # every step of an epoch asks for it
def order(n: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, size: int, step: int, seed: int) -> np.ndarray:
    """Which of n clips are in this step: each once per epoch, in an order of epoch and seed."""
    epoch, first = divmod(step * size, n)
    epochs = range(epoch, epoch + math.ceil((first + size) / n))
    orders = [order(n, number, seed) for number in epochs]
    return np.concatenate(orders)[first:first + size]


def in_threads(work: Callable, items: list, text: str):
    """(item, work(item)) for each; so few are begun at a time that Ctrl-C is answered soon."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in bar(range(0, len(items), 64), text, unit="block"):
            block = items[start:start + 64]
            yield from zip(block, pool.map(work, block))


def look_at(path: str, noted: list) -> list:
    """Size and time of a file, the digest of what it holds, or the name of one that isn't there,
    and its samples of 16 kHz: what was noted, where size and time are still the same."""
    try:
        now = [os.path.getsize(path), os.stat(path).st_mtime_ns]
        return noted if noted[:2] == now else [*now, digest(Path(path)), samples_in(path)]
    except (OSError, ValueError):
        return [0, 0, os.path.basename(path), 0]


class Clips:
    """The clips of a manifest or a folder, without those that cannot be used.

    A recording of several times the length is cut into up to `windows` clips, all with its caption;
    silence follows a shorter one, or with `loop` the same sound again.
    rows, captions: one for each clip. train, validation, test: numbers of rows. mels (F, 80, T):
    one for each distinct clip; row i has the one at file[i], which begins at sample start[i] of its
    recording. key: what all this was read from. remarks: what a reader of figures must know.
    Raises InputError where there are none to train on, or more than a tenth cannot be used.
    """

    def __init__(self, source: Path, cache: Path, frames: int, windows: int = 1,
                 loop: bool = False):
        source = source.expanduser()
        folder = source.is_dir()
        self.cache, self.frames, self.loop = cache, frames, loop
        if folder and source.resolve() in cache.resolve().parents:
            raise InputError(f"{source}: the run's own folder lies in it, {cache.parent}: choose "
                             "another --out")
        rows, problems = read_folder(source) if folder else read_manifest(source)
        total = len(rows) + len(problems)
        if not rows:
            raise InputError(": ".join([f"{source}: holds no usable clips", *problems[:1]]))
        paths = sorted({row["audio_path"] for row in rows})
        known = self.look_at_all(paths)
        clips, files = [], {}
        for row in rows:
            *_, content, length = known[row["audio_path"]]
            for start in pieces(length, HOP * frames, windows):
                name = f"{content}-{start}" if start else content   # the beginning has no number
                files.setdefault(name, (row["audio_path"], start))
                clips.append({**row, "content": name, "start": start})
        self.files_key = digest(list(files), frames, loop)
        self.mels, unreadable = self.mels_of(files)
        bad = {clip["audio_path"]: unreadable[clip["content"]] for clip in clips
               if clip["content"] in unreadable}
        problems += [f"{row['audio_path']}: {bad[row['audio_path']]}" for row in rows
                     if row["audio_path"] in bad]
        for line in problems[:10]:
            print(f"skipped: {line}")
        if problems:
            print(f"skipped: {len(problems)} of {total} clips")
        if len(problems) > 0.1 * total:
            raise InputError(f"{source}: {len(problems)} of {total} clips are bad, more than 10%; "
                             f"the first: {problems[0]}")

        self.rows = [clip for clip in clips if clip["audio_path"] not in bad]
        self.captions = [row["caption"] for row in self.rows]
        self.start = np.array([row["start"] for row in self.rows])
        contents = [row["content"] for row in self.rows]
        places = {name: i for i, name in enumerate(files)}
        self.file = np.array([places[content] for content in contents])
        splits = np.array([row["split"] for row in self.rows])
        self.key = digest(contents, self.captions, splits.tolist(), frames, loop)
        self.train = np.flatnonzero(splits == "train")
        self.validation = np.flatnonzero(splits == "validation")
        self.test = np.flatnonzero(splits == "test")
        if not len(self.train):
            raise InputError(f"{source}: every row has another split, so nothing is left to "
                             "train on")
        self.remarks = [self.compare()]
        whole = [row["caption"] for row in self.rows if row["start"] == 0]
        print(f"clips: {len(self.train)} to train on, {len(self.validation)} validation, "
              f"{len(self.test)} test, of {len(paths) - len(bad)} sounds; "
              f"{len(set(whole))} distinct captions, such as {whole[0]!r}",
              *self.remarks, *doubts(whole), sep="\n")

    def look_at_all(self, paths: list[str]) -> dict[str, list]:
        """`look_at` of every path, noted in the cache for the next start."""
        notes = self.cache / "files.json"
        noted = json.loads(notes.read_text()) if notes.exists() else {}

        def look(path: str) -> list:
            return look_at(path, noted.get(os.path.abspath(path), []))

        known = dict(in_threads(look, paths, "files"))
        if rank_and_world()[0] == 0:
            notes.parent.mkdir(parents=True, exist_ok=True)
            found = {os.path.abspath(path): known[path] for path in known}
            write_atomically(notes, json.dumps(found).encode())
        return known

    def mels_of(self, files: dict) -> tuple[np.ndarray, dict[str, str]]:
        """Mels (F, 80, T) of {name: (path, first sample)}, and {name: why there is none}."""
        names = list(files)

        def mel(i: int) -> np.ndarray | str:
            path, start = files[names[i]]
            try:
                wav = load_audio(path, HOP * self.frames, start, self.loop)
            except InputError as e:
                return str(e).removeprefix(f"{path}: ")
            return mel_spectrogram(wav[None])[0].numpy()

        def fill(array: np.ndarray) -> None:
            if rank_and_world()[0]:
                return
            left = np.flatnonzero(array[:, -1, -1] == 0)    # others were done before a kill
            with one_thread():                  # a processor for each file, not all for one
                for i, made in in_threads(mel, left, "mels"):
                    if not isinstance(made, str):
                        array[i] = made         # no log-mel is 0 to the bit

        cache = self.cache / f"mels-{self.files_key}.npy"
        mels = cached(cache, (len(files), 80, self.frames), fill)
        return mels, {names[i]: mel(i) for i in np.flatnonzero(mels[:, -1, -1] == 0)}

    def compare(self) -> str:
        """What the test split has in common with training, in a sentence."""
        if not self.has_test:
            return "The captions were trained on: the data has no test split."
        recordings = [row["content"].partition("-")[0] for row in self.rows]
        shared = []
        for kind, values in (("recordings", recordings), ("captions", self.captions)):
            judged = {values[i] for i in self.test}
            trained_on = judged & {values[i] for i in self.train}
            shared.append(f"{len(trained_on)} of its {len(judged)} {kind}")
        return f"Of the test split, {' and '.join(shared)} were trained on."

    @property
    def has_test(self) -> bool:
        return len(self.test) > 0

    def waveforms(self, rows: np.ndarray) -> Tensor:
        """Waveforms (N, samples) of rows, at the length of the clips."""
        samples = HOP * self.frames
        return torch.stack([
            load_audio(self.rows[i]["audio_path"], samples, self.start[i], self.loop)
            for i in rows])

    def some(self, n: int, seed: int) -> np.ndarray:
        """Numbers of n rows to train on, in the seed's order; all come before one comes again."""
        return self.train[batch_indices(len(self.train), n, 0, seed)]

    def some_files(self, seed: int) -> np.ndarray:
        """Numbers of up to 1024 mels, for what is measured over the training set."""
        return self.file[self.some(min(1024, len(self.train)), seed)]

    def held_out(self, clips: int) -> np.ndarray:
        """Numbers of rows to judge by: of the test split, of training where there is none.

        Drawn in an order that is always the same; of no file a second row before all have one, and
        of a recording that is cut its beginning alone.
        """
        rows = self.test if self.has_test else self.train
        rows = np.random.default_rng(0).permutation(rows[self.start[rows] == 0])
        _, first = np.unique(self.file[rows], return_index=True)
        again = np.setdiff1d(np.arange(len(rows)), first)
        return rows[np.concatenate([np.sort(first), again])][:clips]

    @torch.no_grad()
    def latents(self, model: FlashAudio) -> np.ndarray:
        """Mean and std of the VAE's posterior for each of the mels, (F, 2, C, L)."""
        def fill(array: np.ndarray) -> None:
            for i in blocks(array, 32, "latents"):
                mel = torch.tensor(self.mels[i:i + 32], device=model.device)
                mean, logvar = model.vae.encode(mel)
                array[i:i + 32] = torch.stack([mean, (logvar / 2).exp()], 1).cpu().numpy()

        cache = self.cache / f"latents-{digest(self.files_key, model.vae)}.npy"
        return cached(cache, (len(self.mels), 2, *model.latent_shape()), fill)

    @torch.no_grad()
    def contexts(self, model: FlashAudio) -> tuple[np.ndarray, np.ndarray]:
        """The contexts (U, N, D) of the distinct captions, "" first, and each row's place there."""
        distinct = ["", *sorted(set(self.captions))]
        places = {caption: i for i, caption in enumerate(distinct)}

        def fill(array: np.ndarray) -> None:
            for i in blocks(array, 64, "contexts"):
                array[i:i + 64] = model.text(distinct[i:i + 64]).float().cpu().numpy()

        frozen = getattr(model.text, "frozen", [])      # no submodule, but its weights count
        key = digest(distinct, model.text, *frozen, asdict(model.config.text))
        shape = (len(distinct), *model.text([""]).shape[1:])
        dtype = np.float32 if model.text.trained else np.float16    # large encoders: gigabytes
        contexts = cached(self.cache / f"contexts-{key}.npy", shape, fill, dtype)
        return contexts, np.array([places[caption] for caption in self.captions])
