"""Sound files in: whatever soundfile opens, known by its content, at the length that it has."""

import io
import math
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
XING = re.compile(rb"((?:Xing|Info)\0\0\0[\3\7\13\17]).{4}(.{4})", re.DOTALL)   # frames, bytes
ENDLESS = 2 ** 36                   # samples, or bytes of an MP3


class Stream(soundfile.SoundFile):
    """A file that is read from start to end, whatever length its header says."""

    def seekable(self) -> bool:
        return False


class EndlessMP3(io.BytesIO):
    """An MP3 that seems to have no end: libsndfile stops reading where it expects one."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = offset == 0 and whence == os.SEEK_END
        return super().seek(ENDLESS) if end else super().seek(offset, whence)


def copy_of(stream: Stream) -> soundfile.SoundFile:
    """All that a stream holds, as a file in memory that knows its length."""
    blocks = [stream.read(2 ** 16, "float32", always_2d=True)]
    while len(blocks[-1]):
        blocks.append(stream.read(2 ** 16, "float32", always_2d=True))
    copy = io.BytesIO()
    soundfile.write(copy, np.concatenate(blocks), stream.samplerate, "FLOAT", format="W64")
    copy.seek(0)
    return soundfile.SoundFile(copy)


def open_audio(path: str | Path) -> soundfile.SoundFile:
    """The file, or where its header has a wrong length, a copy in memory with the right one."""
    name = os.fsencode(path) if os.name == "posix" else path
    file = soundfile.SoundFile(name)
    if file.frames > ENDLESS:
        return copy_of(Stream(name))
    if file.format == "MP3":
        raw = Path(path).read_bytes()
        tag = XING.search(raw)
        counted = int.from_bytes(tag[2], "big") if tag else 0
        if counted + 4096 < len(raw):               # not all: several in one, or no tag at all
            return copy_of(Stream(EndlessMP3(XING.sub(rb"\1@\0\0\0\2", raw, 1))))
    return file


def decode(path: str | Path, start: int, seconds: float) -> tuple[np.ndarray, int, int]:
    """`seconds` of a file from second `start` on, (n, channels) float32; its rate in Hz; and how
    many samples the whole file has. Raises InputError where it cannot be read, or not whole."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with open_audio(path) as file:
            rate = file.samplerate
            first = min(start * rate, file.frames)
            wanted = math.ceil(min(seconds * rate, file.frames - first))
            file.seek(first)
            samples = file.read(wanted, "float32", always_2d=True)
            log = CUT_SHORT.search(file.extra_info)
    except Exception as e:                          # decoders raise all kinds; one line is enough
        reason = " ".join(str(getattr(e, "error_string", e)).split()) or type(e).__name__
        hint = "cut short, or to be converted to WAV or FLAC"
        if Path(path).read_bytes().startswith(b"version https://git-lfs"):
            hint = "a pointer of Git LFS: `git lfs pull` fetches the sounds"
        raise InputError(f"{path}: cannot be read as audio ({reason.rstrip('.')}): {hint}") from e
    promised, held = map(int, log.groups()) if log else (0, 0)
    if held < promised < WRITTEN_TO_A_PIPE or len(samples) < wanted:
        raise InputError(f"{path}: cut short: its header promises more sound than there is")
    return samples, rate, file.frames


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
        raise InputError(f"{path}: its header says that it holds no samples; if it is long, its "
                         "recorder was killed: `ffmpeg -i in.wav out.wav` makes another")
    if not np.isfinite(channels).all():
        raise InputError(f"{path}: holds NaN or infinite samples")
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path}: says that it has {rate} samples a second")
    peak = np.abs(channels).max()
    channels = channels / max(1, peak)
    mono = channels.mean(1)
    if np.abs(mono).max() < 0.01 * min(1, peak):    # opposite phases, which cancel each other out
        mono = channels[:, 0]
    if peak > 1.5:                                  # a little more is usual after MP3 and the like
        print(f"{path}: samples up to {peak:.3g}, where 1 is full scale: scaled down to 1")
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // common, rate // common)
    wav = torch.tensor(mono)[start:].clamp(-1, 1)   # the filter overshoots at full scale
    if samples is None:
        return wav
    if loop:
        wav = wav.repeat(math.ceil(samples / len(wav)))
    return torch.cat([wav, torch.zeros(samples)])[:samples]
