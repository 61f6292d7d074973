"""Sounds in: the clips of a manifest or a folder -> mels, latents, contexts.

Each is computed once, kept in the run's cache/ under the name of what it was computed from, and
read through a memory map.
"""

import json
import math
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

from data.rows import read_folder, read_manifest
from flashaudio import HOP, SAMPLE_RATE, FlashAudio, InputError, mel_spectrogram
from runs.cache import bar, blocks, cached, digest, one_thread, release, write_atomically
from runs.processes import barrier, rank_and_world

# libsndfile's log of a file whose header promises more sound than there is
CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
WRITTEN_TO_A_PIPE = 0x7F000000      # bytes; so large a promise means "not known yet"


def open_audio(path: str | Path) -> soundfile.SoundFile:
    """The file, opened by its content, whatever its name says."""
    file = soundfile.SoundFile(path)
    if file.format != "WAV" or file.frames > 0:
        return file
    with open(path, "rb") as f:             # a copy in memory is repaired, page by page
        raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    start = raw.find(b"data\0\0\0\0") + 8
    if start < 8:
        return file
    size = min(len(raw) - start, 2 ** 32 - 1)       # written to a pipe: all that follows is sound
    raw[start - 4:start] = size.to_bytes(4, "little")
    return soundfile.SoundFile(raw)


def samples_in(path: str | Path) -> int:
    """How many samples of 16 kHz a file promises; 0 where it doesn't say, or cannot be read."""
    try:
        with open_audio(path) as file:
            known = file.frames < 2 ** 40               # a stream may have no end
            return file.frames * SAMPLE_RATE // file.samplerate if known else 0
    except Exception:                                   # as below; what is wrong is said there
        return 0


def read_samples(path: str | Path, start: int, seconds: float) -> tuple[np.ndarray, int]:
    """`seconds` of a file from second `start` on, (n, channels) float32, and their rate in Hz."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with open_audio(path) as file:
            first = start * file.samplerate
            frames = math.ceil(min(seconds * file.samplerate, file.frames - first))
            if first:
                file.seek(first)
            samples = file.read(frames, "float32", always_2d=True)
            promise = CUT_SHORT.search(file.extra_info)
            rate = file.samplerate
    except Exception as e:                  # decoders raise all kinds; a person needs one line
        reason = " ".join(str(getattr(e, "error_string", e)).split()) or type(e).__name__
        raise InputError(f"{path}: cannot be read as audio ({reason.rstrip('.')}): cut short, or "
                         "to be converted to WAV or FLAC") from e
    if promise and int(promise[1]) < WRITTEN_TO_A_PIPE:
        raise InputError(f"{path}: cut short: holds {promise[2]} of {promise[1]} bytes of sound")
    if len(samples) < frames:
        raise InputError(f"{path}: cut short: {len(samples)} of {frames} samples can be read")
    return samples, rate


def load_audio(path: str | Path, samples: int | None = None, start: int = 0) -> Tensor:
    """An audio file, from sample `start` on -> mono float32 waveform in [-1, 1] at 16 kHz.

    With `samples` it is cut or repeated to that length, and only so much of the file is read.
    Raises InputError, in one line, for what cannot be read whole or holds no sound.
    """
    # A tenth of a second more on both sides, for the filter; a whole one is whole at any rate
    second = max(0, start - SAMPLE_RATE // 10) // SAMPLE_RATE
    start -= second * SAMPLE_RATE
    seconds = math.inf if samples is None else (start + samples) / SAMPLE_RATE + 0.1
    channels, rate = read_samples(path, second, seconds)
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path}: says that it has {rate} samples a second")
    if not channels.size:
        raise InputError(f"{path}: holds no samples")
    if not np.isfinite(channels).all():
        raise InputError(f"{path}: holds NaN or infinite samples")
    peaks = np.abs(channels).max(0)
    if peaks.max() > 8:
        raise InputError(f"{path}: floating-point samples up to {peaks.max():.0f}, where 1 is full "
                         "scale: divide them by their full scale and save the file again")
    mono = channels.mean(1)
    if np.abs(mono).max() < 0.01 * peaks.max():     # opposite phases that cancel each other out
        mono = channels[:, peaks.argmax()]
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // common, rate // common)
    wav = torch.tensor(mono)[start:].clamp(-1, 1)   # the filter overshoots at full scale
    if samples is None:
        return wav
    return wav.repeat(math.ceil(samples / len(wav)))[:samples]


def pieces(length: int, samples: int, most: int) -> list[int]:
    """Where the pieces of a recording begin: up to `most` that don't overlap, evenly spread."""
    count = min(most, length // samples)
    return [i * (length - samples) // (count - 1) for i in range(count)] if count > 1 else [0]


@lru_cache(maxsize=2)
def order(n: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, size: int, step: int, seed: int) -> np.ndarray:
    """Which of n clips are in this step: each once per epoch, in an order of epoch and seed."""
    places = range(step * size, (step + 1) * size)
    return np.array([order(n, place // n, seed)[place % n] for place in places])


def in_threads(work: Callable, items: list, text: str):
    """(item, work(item)) for each; so few are begun at a time that Ctrl-C is answered soon."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in bar(range(0, len(items), 64), text, unit="block"):
            block = items[start:start + 64]
            yield from zip(block, pool.map(work, block))


def report(manifest: Path, problems: list[str], total: int) -> None:
    """Say what is left out. Raises InputError where that is more than a tenth of the clips."""
    for line in problems[:10]:
        print(f"skipped: {line}")
    if problems:
        print(f"skipped {len(problems)} of {total} clips")
    if len(problems) > 0.1 * total:
        raise InputError(f"{manifest}: {len(problems)} of {total} clips are bad, more than 10%; "
                         f"the first: {problems[0]}")


class Clips:
    """The clips of a manifest or a folder, without those that cannot be used.

    A recording of several times the length is cut into up to `windows` clips, all with its caption.
    rows, captions: one for each clip. train, validation, test: numbers of rows. mels (F, 80, T):
    one for each distinct clip; row i has the one at file[i]. key: what all this was read from.
    Raises InputError where there are none to train on, or more than a tenth cannot be used.
    """

    def __init__(self, manifest: Path, cache: Path, frames: int, windows: int = 1):
        self.cache = cache
        folder = manifest.is_dir()
        if folder and manifest.resolve() in cache.resolve().parents:
            raise InputError(f"{manifest}: the run's own folder lies in it, {cache.parent}: choose "
                             "another --out")
        rows, problems = read_folder(manifest) if folder else read_manifest(manifest)
        total = len(rows) + len(problems)
        known = self.contents([row["audio_path"] for row in rows])
        files = {}                              # name: path, first sample
        for row in rows:
            content, length = known[row["audio_path"]]
            row["pieces"] = {}
            if not content:
                problems.append(f"{row['audio_path']}: no such file, or not to be opened")
                continue
            for start in pieces(length, HOP * frames, windows):
                name = f"{content}-{start}" if start else content   # the beginning has no number
                row["pieces"][name] = start
                files.setdefault(name, (row["audio_path"], start))
        if len(problems) > 0.1 * total:         # before hours of work
            report(manifest, problems, total)
        if not files:
            raise InputError(f"{manifest}: holds no usable clips")
        self.files_key = digest(list(files), frames)
        self.mels, unreadable = self.mels_of(files, frames)
        self.rows = []
        for row in rows:
            held = row.pop("pieces")
            bad = [unreadable[name] for name in held if name in unreadable]
            if bad:
                problems.append(f"{row['audio_path']}: {bad[0]}")
                continue
            for name, start in held.items():
                self.rows.append({**row, "content": name, "start": start, "of": len(held)})
        report(manifest, problems, total)

        self.captions = [row["caption"] for row in self.rows]
        self.start = np.array([row["start"] for row in self.rows])
        places = {name: i for i, name in enumerate(files)}
        self.file = np.array([places[row["content"]] for row in self.rows])
        splits = [row["split"] for row in self.rows]
        self.key = digest([row["content"] for row in self.rows], self.captions, splits, frames)
        self.train = np.flatnonzero(np.array(splits) == "train")
        self.validation = np.flatnonzero(np.array(splits) == "validation")
        self.test = np.flatnonzero(np.array(splits) == "test")
        whole = [row for row in self.rows if row["start"] == 0]
        cut = [row["of"] for row in whole if row["of"] > 1]
        if folder:
            for row in whole[:5]:
                print(f"{row['audio_path']}: {row['caption']}")
        text = f", from {len(whole)} clips, of which {len(cut)} are cut into {sum(cut)} windows"
        print(f"clips: {len(self.train)} to train on, {len(self.validation)} validation, "
              f"{len(self.test)} test{text if cut else ''}")
        if not len(self.train):
            raise InputError(f"{manifest}: every row has another split, so nothing is left to "
                             "train on")

    def contents(self, paths: list[str]) -> dict[str, tuple[str, int]]:
        """{path: digest of what the file holds, "" where it cannot be opened, and samples in it}.

        A file of the same path, size and time as at the last start is not read again.
        """
        notes = self.cache / "files.json"
        first = rank_and_world()[0] == 0
        if not first:
            barrier()                           # until the first process has written its notes
        try:
            known = json.loads(notes.read_text())
        except (OSError, ValueError):
            known = {}

        def look(path: str) -> list:
            if not os.path.isfile(path):
                return [0, 0, "", 0]
            now = [os.path.getsize(path), os.stat(path).st_mtime_ns]
            noted = known.get(os.path.abspath(path), [])
            try:
                if noted[:2] == now and len(noted) == 4:
                    return noted
                return [*now, digest(Path(path)), samples_in(path)]
            except OSError:
                return [0, 0, "", 0]

        seen = dict(in_threads(look, sorted(set(paths)), "files"))
        if first:
            found = {os.path.abspath(path): note for path, note in seen.items() if note[2]}
            if found != known:
                self.cache.mkdir(parents=True, exist_ok=True)
                write_atomically(notes, json.dumps(found).encode())
            barrier()
        return {path: (note[2], note[3]) for path, note in seen.items()}

    def mels_of(self, files: dict, frames: int) -> tuple[np.ndarray, dict[str, str]]:
        """Mels (F, 80, frames) of {name: path, first sample}, and {name: why it isn't read}."""
        cache = self.cache / f"mels-{self.files_key}.npy"
        names = list(files)

        def mel(i: int) -> np.ndarray | str:
            path, start = files[names[i]]
            try:
                wav = load_audio(path, HOP * frames, start)
            except InputError as e:
                return str(e).removeprefix(f"{path}: ")
            return mel_spectrogram(wav[None])[0].numpy()

        def fill(array: np.ndarray) -> None:
            if rank_and_world()[0]:
                return
            unreadable = {}
            # the others were done by a run that was interrupted; no log-mel is 0 to the bit
            left = [i for i in range(len(files)) if array[i, -1, -1] == 0]
            with one_thread():                  # a processor for each file, not all for one
                for i, made in in_threads(mel, left, "mels"):
                    if isinstance(made, str):
                        unreadable[names[i]] = made
                    else:
                        array[i] = made
                    if i % 64 == 63:
                        release(array)
            write_atomically(cache.with_suffix(".json"), json.dumps(unreadable).encode())

        mels = cached(cache, (len(files), 80, frames), fill)
        return mels, json.loads(cache.with_suffix(".json").read_text())

    @property
    def has_test(self) -> bool:
        return len(self.test) > 0

    def some(self, n: int, seed: int) -> np.ndarray:
        """Numbers of n rows to train on, in the seed's order; all come before one comes again."""
        return self.train[batch_indices(len(self.train), n, 0, seed)]

    def some_mels(self, seed: int) -> np.ndarray:
        """Mels (up to 1024, 80, T), for what is measured over the training set."""
        return self.mels[self.file[self.some(min(1024, len(self.train)), seed)]]

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

        key = digest(distinct, model.text, asdict(model.config.text))
        shape = (len(distinct), *model.text([""]).shape[1:])
        dtype = np.float32 if model.text.trained else np.float16    # large encoders: gigabytes
        contexts = cached(self.cache / f"contexts-{key}.npy", shape, fill, dtype)
        return contexts, np.array([places[caption] for caption in self.captions])


@dataclass
class Couplings:
    """(noise, sample) pairs, made when they are first looked at, and their contexts."""
    make: Callable[[], np.ndarray]                  # -> latents
    contexts: np.ndarray                            # (U, N, D), that of "" first
    place: np.ndarray                               # (n,): where the context of each pair is
    key: str                                        # digest of what they are made from

    @cached_property
    def latents(self) -> np.ndarray:
        """(n, 2, C, L)."""
        return self.make()

    def ends(self, rows: np.ndarray, _: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.latents[rows]).unbind(1)
