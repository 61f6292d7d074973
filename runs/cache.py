"""Arrays computed once and read through memory maps, named by what they were computed from."""

import hashlib
import json
import math
import mmap
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from runs.processes import barrier, rank_and_world


def digest(*things) -> str:
    """A short name for what something was computed from.

    A Path stands for the content of that file, a module for its weights (those of a frozen text
    model included), anything else for its JSON.
    """
    h = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            h.update(file_digest(thing))
        elif isinstance(thing, nn.Module):
            h.update(weights_digest(thing))
        else:
            h.update(json.dumps(thing, sort_keys=True).encode())
    return h.hexdigest()[:12]


def file_digest(path: Path) -> bytes:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2 ** 20):
            h.update(block)
    return h.digest()


def weights_digest(module: nn.Module) -> bytes:
    h = hashlib.sha256()
    modules = [module]
    for part in module.modules():
        modules += getattr(part, "frozen", [])      # a text model that is not saved with the rest
    for part in modules:
        for name, tensor in part.state_dict().items():
            h.update(name.encode())
            h.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.digest()


@contextmanager
def one_thread():
    """Torch on one thread, and on as many as before when it ends, however it ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def bar(iterable, text: str, **more) -> tqdm:
    """A progress bar that is silent where no one watches."""
    silent = True if rank_and_world()[0] else None
    return tqdm(iterable, f"{text:>8}", disable=silent, leave=False, dynamic_ncols=True, **more)


def blocks(array: np.ndarray, size: int, text: str):
    """Starts of the blocks of `size` rows of a memory-mapped array that this process computes."""
    rank, world = rank_and_world()
    starts = range(rank * size, len(array), world * size)
    for n, i in enumerate(bar(starts, text, unit="batch")):
        yield i
        if n % 64 == 63:
            release(array)


def release(array: np.ndarray) -> None:
    """Let go of the memory behind a mapped array; what was written to it stays."""
    if hasattr(mmap, "MADV_DONTNEED") and getattr(array, "_mmap", None) is not None:
        array._mmap.madvise(mmap.MADV_DONTNEED)


def read_array(path: Path, shape: tuple[int, ...], mode: str = "r") -> np.ndarray | None:
    """The array in a .npy file, memory-mapped; None where there is none of that shape."""
    try:
        array = np.load(path, mmap_mode=mode)       # never unpickles
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def allocate(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """An array of zeros. Takes its space now: a disk that is full later kills the process."""
    try:
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    except OSError as e:
        path.unlink(missing_ok=True)
        size = math.prod(shape) * np.dtype(dtype).itemsize / 2 ** 20
        raise OSError(e.errno, f"{e.strerror}: {size:.0f} MiB", str(path)) from e


def cached(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None],
           dtype: type = np.float32) -> np.ndarray:
    """The array at `path`, memory-mapped; where it is missing, `fill(array)` computes it first.

    `path` is <name>-<digest>.npy. Once it is there, arrays of that name with another digest were
    computed from something that has changed, and go. One that an interrupted run left half filled
    is handed to `fill` as it is. Of several processes, each fills its share.
    """
    first = rank_and_world()[0] == 0
    unfinished = path.with_suffix(".tmp")
    if first and read_array(path, shape) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if read_array(unfinished, shape) is None:
            allocate(unfinished, shape, dtype)
    barrier()
    if not path.exists():
        array = read_array(unfinished, shape, "r+")
        fill(array)
        array.flush()
        barrier()
        if first:
            os.replace(unfinished, path)
            for other in path.parent.glob(path.name.rsplit("-", 1)[0] + "-*"):
                if other.stem != path.stem:
                    other.unlink()
    barrier()
    return np.load(path, mmap_mode="r")


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half.

    Raises OSError, with the name of the file, where there is no room.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from e
