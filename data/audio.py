"""Sound files in: whatever soundfile opens, known by its content, at the length that it has."""

import io
import math
import mmap
import os
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

from flashaudio import SAMPLE_RATE, InputError

# libsndfile's log of a file whose header promises more sound than there is
CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
WRITTEN_TO_A_PIPE = 0x7F000000      # bytes; so large a promise means "not known yet"
UNKNOWN = 2 ** 36                   # samples; so does this one
NO_SIZE = re.compile(rb"data(?:\0{4}|\xff{4})")     # it was to be written in the end
XING = re.compile(rb"(?:Xing|Info)\0\0\0[\3\7\13\17](.{4})(.{4})", re.DOTALL)   # frames, bytes


class Stream(soundfile.SoundFile):
    """A file that doesn't know its length, and is read from start to end."""

    def seekable(self) -> bool:
        return False

    def read_all(self) -> np.ndarray:
        parts = [self.read(2 ** 16, "float32", always_2d=True)]
        while len(parts[-1]):
            parts.append(self.read(2 ** 16, "float32", always_2d=True))
        return np.concatenate(parts)


class Endless(io.BytesIO):
    """An MP3 that seems to go on forever: libsndfile stops where it expects the end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        endless = offset == 0 and whence == os.SEEK_END
        return super().seek(2 ** 41) if endless else super().seek(offset, whence)


def open_audio(path: str | Path) -> soundfile.SoundFile:
    """The file; where its header has a wrong length, a stream, or a copy in memory put right."""
    name = os.fsencode(path) if os.name == "posix" else path
    file = soundfile.SoundFile(name)
    if file.frames > UNKNOWN:
        return Stream(name)
    if file.format != "MP3" and (file.frames or file.format not in ("WAV", "WAVEX", "RF64")):
        return file
    with open(path, "rb") as f:                     # copied page by page, where it is changed
        raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    if file.format == "MP3":
        tag = XING.search(raw)
        if tag and int.from_bytes(tag[2], "big") > 0.99 * (len(raw) - tag.start()) - 4096:
            return file
        if tag:                                     # of the first of several, put together by cat
            raw[tag.start(1):tag.end(1)] = (2 ** 30).to_bytes(4, "big")
        return Stream(Endless(raw[:]))
    gap = NO_SIZE.search(raw)
    if gap is None:
        return file
    at, width = (raw.find(b"ds64") + 16, 8) if file.format == "RF64" else (gap.end() - 4, 4)
    size = min(len(raw) - gap.end(), 256 ** width - 1)      # all that follows is sound
    raw[at:at + width] = size.to_bytes(width, "little")
    return soundfile.SoundFile(raw)


def decode(path: str | Path, start: int, seconds: float) -> tuple[np.ndarray, int, int]:
    """`seconds` of a file from second `start` on, (n, channels) float32; its rate in Hz; and how
    many samples the whole file has. Raises InputError where it cannot be read, or not whole."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with open_audio(path) as file:
            rate = file.samplerate
            first = start * rate
            wanted = math.ceil(min(seconds * rate, UNKNOWN))
            if file.seekable():
                total = file.frames
                file.seek(min(first, total))
                samples = file.read(wanted, "float32", always_2d=True)
            else:
                samples = file.read_all()
                total = len(samples)
                samples = samples[first:first + wanted]
            log = CUT_SHORT.search(file.extra_info)
    except Exception as e:                          # decoders raise all kinds; one line is enough
        reason = " ".join(str(getattr(e, "error_string", e)).split()) or type(e).__name__
        hint = "cut short, or to be converted to WAV or FLAC"
        if Path(path).read_bytes().startswith(b"version https://git-lfs"):
            hint = "a pointer of Git LFS: `git lfs pull` fetches the sounds"
        raise InputError(f"{path}: cannot be read as audio ({reason.rstrip('.')}): {hint}") from e
    promised, held = map(int, log.groups()) if log else (0, 0)
    if held < promised < WRITTEN_TO_A_PIPE:
        raise InputError(f"{path}: cut short: holds {held} of {promised} bytes of sound")
    if len(samples) < min(wanted, total - first):
        raise InputError(f"{path}: cut short: not all of its {total} samples can be read")
    return samples, rate, total


def samples_in(path: str | Path) -> int:
    """How many samples of 16 kHz a file holds; 0 where it cannot be read."""
    try:
        _, rate, total = decode(path, 0, 0)
    except InputError:                              # what is wrong is said when it is loaded
        return 0
    return total * SAMPLE_RATE // rate


def load_audio(path: str | Path, samples: int | None = None, start: int = 0,
               loop: bool = False) -> Tensor:
    """An audio file, from sample `start` on -> mono float32 waveform in [-1, 1] at 16 kHz.

    With `samples` it is cut to that length, or silence follows, or with `loop` the sound again; and
    only so much of the file is read. What exceeds full scale is scaled to it, and that is said.
    Raises InputError, in one line, for what cannot be read whole or holds no sound.
    """
    # A tenth of a second more on both sides, for the filter; a whole one is whole at any rate
    second = max(0, start - SAMPLE_RATE // 10) // SAMPLE_RATE
    start -= second * SAMPLE_RATE
    seconds = math.inf if samples is None else (start + samples) / SAMPLE_RATE + 0.1
    channels, rate, _ = decode(path, second, seconds)
    if not channels.size:
        raise InputError(f"{path}: holds no samples")
    if not np.isfinite(channels).all():
        raise InputError(f"{path}: holds NaN or infinite samples")
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path}: says that it has {rate} samples a second")
    peaks = np.abs(channels).max(0)
    mono = channels.mean(1)
    if np.abs(mono).max() < 0.01 * peaks.max():     # opposite phases that cancel each other out
        mono = channels[:, peaks.argmax()]
    mono = mono / max(1, peaks.max())
    if peaks.max() > 1.5:                           # a little more is usual after MP3 and the like
        print(f"{path}: samples up to {peaks.max():.3g}, where 1 is full scale: scaled down to 1")
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // common, rate // common)
    wav = torch.tensor(mono)[start:].clamp(-1, 1)   # the filter overshoots at full scale
    if samples is None:
        return wav
    if loop:
        wav = wav.repeat(math.ceil(samples / len(wav)))
    return torch.cat([wav, torch.zeros(samples)])[:samples]
