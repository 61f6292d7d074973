"""A manifest and its clips: a CSV with the columns audio_path,caption (and optionally split: train or test) -> mels, latents,
contexts, each computed once, kept under the run's cache/ and read through a memory map."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import mmap
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

from flashaudio import HOP, FlashAudio, InputError, load_audio, mel_spectrogram, write_atomically


def digest(*things) -> str:
    """A short name for what something was computed from; a Path stands for the content of that file."""
    h = hashlib.sha256()
    for thing in things:
        h.update(file_digest(thing, os.stat(thing).st_mtime_ns) if isinstance(thing, Path) else json.dumps(thing, sort_keys=True).encode())
    return h.hexdigest()[:12]


@lru_cache(maxsize=32)
def file_digest(path: Path, _mtime: int) -> bytes:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def processes() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without torchrun."""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_available() and d.is_initialized() else (0, 1)


def wait_for_all() -> None:
    if processes()[1] > 1:
        torch.distributed.barrier()


def bar(iterable, text: str, **more) -> tqdm:
    """A progress bar that is silent where no one watches."""
    return tqdm(iterable, desc=f"{text:>8}", disable=True if processes()[0] else None, leave=False, dynamic_ncols=True, **more)


def blocks(array: np.ndarray, size: int, text: str):
    """Starts of the blocks of `size` rows of a memory-mapped array that this process computes."""
    rank, world = processes()
    for n, i in enumerate(bar(range(rank * size, len(array), world * size), text, unit="batch")):
        yield i
        if n % 64 == 63:
            to_disk(array)


def to_disk(array: np.ndarray) -> None:
    """Let go of the memory behind a mapped array; what was written to it stays."""
    if hasattr(mmap, "MADV_DONTNEED") and getattr(array, "_mmap", None) is not None:
        array._mmap.madvise(mmap.MADV_DONTNEED)


def read_array(path: Path, shape: tuple[int, ...], mode: str = "r") -> np.ndarray | None:
    """The array in a .npy file, memory-mapped; None where there is none, or not one of that shape."""
    try:
        array = np.load(path, mmap_mode=mode)       # never unpickles
        return array if array.shape == shape else None
    except (OSError, ValueError, EOFError):
        return None


def cached(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None], dtype: type = np.float32) -> np.ndarray:
    """The array at `path`, memory-mapped; where it is missing, `fill(array)` computes it first, each process its share.

    `path` is <name>-<digest>.npy. Arrays of that name with another digest were computed from something that has changed, and go.
    An array that an interrupted run left half filled is handed to `fill` as it is.
    """
    temporary, array = path.with_suffix(".tmp"), read_array(path, shape)
    wait_for_all()
    if array is not None:
        return array
    if processes()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(path.name.rsplit("-", 1)[0] + "-*"):
            if stale != temporary:
                stale.unlink()
        if read_array(temporary, shape) is None:
            try:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
                with open(temporary, "r+b") as f:   # take the space now: a disk that is full later would kill the process
                    getattr(os, "posix_fallocate", lambda *_: None)(f.fileno(), 0, os.fstat(f.fileno()).st_size)
            except OSError as e:
                temporary.unlink(missing_ok=True)
                raise OSError(e.errno, f"{e.strerror}: {math.prod(shape) * np.dtype(dtype).itemsize / 2 ** 20:.0f} MiB", str(path)) from e
    wait_for_all()
    array = read_array(temporary, shape, "r+")
    fill(array)
    array.flush()
    wait_for_all()
    if processes()[0] == 0:
        os.replace(temporary, path)
    wait_for_all()
    return np.load(path, mmap_mode="r")


def read_manifest(path: Path) -> tuple[list[dict], list[str]]:
    """The rows of the CSV, their audio_path relative to it made good, and a line for each row that cannot be used.

    Raises InputError when there is no such file, it is no CSV, or a column is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'no such manifest'}; --data takes a CSV with the columns audio_path,caption")
    good, problems = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            missing = {"audio_path", "caption"} - set(reader.fieldnames or ())
            if missing:
                raise InputError(f"{path}: no column {' and '.join(sorted(missing))} in the first line; it must name the columns")
            for row in reader:
                bad = [f"{name} is empty" for name in ("audio_path", "caption") if not (row[name] or "").strip()]
                if bad or "\0" in row["audio_path"]:
                    problems.append(f"{path}, line {reader.line_num}: {' and '.join(bad) or 'audio_path holds a NUL'}")
                else:
                    row["caption"], row["audio_path"] = row["caption"].strip(), str(path.parent / row["audio_path"].strip())
                    good.append(row)
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: not a CSV in UTF-8 ({e})") from e
    return good, problems


@lru_cache(maxsize=2)
def order(n: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, size: int, step: int, seed: int) -> np.ndarray:
    """Numbers of the clips in this step: every one of n once per epoch, in an order that the epoch and the seed decide."""
    return np.array([order(n, p // n, seed)[p % n] for p in range(step * size, (step + 1) * size)])


class Data:
    """The clips of a manifest: rows and captions, mels (N, 80, T), the numbers of the rows to train on and to test on.

    A clip that cannot be used is reported and left out. Raises InputError where more than a tenth are like that.
    """

    def __init__(self, manifest: Path, cache: Path, frames: int):
        self.cache = cache
        self.rows, problems = read_manifest(manifest)
        total = len(self.rows) + len(problems)
        if not self.rows:
            raise InputError(f"{manifest}: holds no usable clips" + "".join(f"; {line}" for line in problems[:1]))
        self.captions, paths = [r["caption"] for r in self.rows], [r["audio_path"] for r in self.rows]
        files = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) if os.path.exists(p) else p for p in paths]
        self.key = digest(files, self.captions, [r.get("split") for r in self.rows], frames)
        path = cache / f"mels-{self.key}.npy"

        def fill(array: np.ndarray) -> None:
            if processes()[0]:
                return
            unreadable = {}
            for i in bar(range(len(paths)), "mels", unit="clip"):
                if i % 1000 == 999:
                    to_disk(array)
                if array[i, -1, -1]:                # done by a run that was interrupted; no log-mel is 0 to the bit
                    continue
                try:
                    array[i] = mel_spectrogram(load_audio(paths[i], HOP * frames)[None])[0].numpy()
                except InputError as e:
                    unreadable[i] = str(e)
            write_atomically(path.with_suffix(".json"), json.dumps(unreadable).encode())

        self.mels = cached(path, (len(paths), 80, frames), fill)
        unreadable = json.loads(path.with_suffix(".json").read_text())
        problems += unreadable.values()
        for line in problems[:10]:
            print(f"skipped: {line}")
        if problems:
            print(f"skipped {len(problems)} of {total} clips")
        if len(problems) > 0.1 * total:
            raise InputError(f"{manifest}: {len(problems)} of {total} clips are bad, more than 10%; the first: {problems[0]}")
        good = [i for i in range(total - len(problems) + len(unreadable)) if str(i) not in unreadable]
        self.train = np.array([i for i in good if self.rows[i].get("split") != "test"], dtype=int)
        self.test = np.array([i for i in good if self.rows[i].get("split") == "test"], dtype=int)
        if not len(self.train):
            raise InputError(f"{manifest}: every row has the split 'test', so nothing is left to train on")

    def held_out(self, clips: int) -> np.ndarray:
        """Numbers of the first rows to judge by: of the test split, or of all where there is none."""
        return (self.test if len(self.test) else self.train)[:clips]

    @torch.no_grad()
    def latents(self, model: FlashAudio, source: Path) -> np.ndarray:
        """Mean and std of the VAE's posterior for every clip, (N, 2, C, L); source: the file that the VAE was read from."""
        def fill(array: np.ndarray) -> None:
            for i in blocks(array, 32, "latents"):
                mean, logvar = model.vae.encode(torch.tensor(self.mels[i:i + 32], device=model.device))
                array[i:i + 32] = torch.stack([mean, (logvar / 2).exp()], 1).cpu().numpy()

        shape = (len(self.mels), 2, *model.latent_shape())
        return cached(self.cache / f"latents-{digest(self.key, source)}.npy", shape, fill)

    @torch.no_grad()
    def contexts(self, model: FlashAudio, source: Path) -> tuple[np.ndarray, np.ndarray]:
        """The context of each distinct caption, (U, N, D) with that of "" first, and the place of every row's in it, (rows,)."""
        distinct = ["", *sorted(set(self.captions))]
        place = {caption: i for i, caption in enumerate(distinct)}

        def fill(array: np.ndarray) -> None:
            for i in blocks(array, 64, "contexts"):
                array[i:i + 64] = model.text(distinct[i:i + 64]).float().cpu().numpy()

        shape, path = (len(distinct), *model.text([""]).shape[1:]), self.cache / f"contexts-{digest(distinct, source, asdict(model.config.text))}.npy"
        dtype = np.float32 if model.text.trained else np.float16                # those of large encoders take gigabytes
        if not path.exists():
            print(f"contexts of {len(distinct)} captions: {math.prod(shape) * np.dtype(dtype).itemsize / 2 ** 20:.0f} MiB in {path}")
        return cached(path, shape, fill, dtype), np.array([place[caption] for caption in self.captions])
