"""Arrays computed once and read through memory maps, named by what they were computed from."""

import hashlib
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from flashaudio import InputError
from runs.processes import barrier, rank_and_world


def digest(*things) -> str:
    """A short name for things: the content of a Path, the weights of a module, else the JSON."""
    h = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            with open(thing, "rb") as f:
                while block := f.read(2 ** 20):
                    h.update(block)
        elif isinstance(thing, nn.Module):
            for name, tensor in thing.state_dict().items():
                h.update(name.encode())
                h.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            h.update(json.dumps(thing, sort_keys=True).encode())
    return h.hexdigest()[:12]


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
    silent = rank_and_world()[0] > 0 or sys.stderr is None or None      # None: where no terminal is
    return tqdm(iterable, f"{text:>8}", disable=silent, leave=False, dynamic_ncols=True, **more)


def blocks(array: np.ndarray, size: int, text: str) -> tqdm:
    """Starts of the blocks of `size` rows of an array that this process computes."""
    rank, world = rank_and_world()
    return bar(range(rank * size, len(array), world * size), text, unit="batch")


def cached(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None],
           dtype: type = np.float32) -> np.ndarray:
    """The array at `path`, memory-mapped; where it is missing, `fill(array)` computes it first.

    `path` is <name>-<digest>.npy. Once it is there, arrays of that name with another digest were
    computed from something that has changed, and go. One that an interrupted run left half filled
    is handed to `fill` as it is. Of several processes, each fills its share.
    """
    first = rank_and_world()[0] == 0
    unfinished = path.with_suffix(".tmp")
    if first and not path.exists():
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        path.parent.mkdir(parents=True, exist_ok=True)
        if not unfinished.exists() or unfinished.stat().st_size < needed:
            free = shutil.disk_usage(path.parent).free      # a full disk kills a mapped write
            if needed > free:
                raise InputError(f"{path}: {needed >> 20} MiB are needed, {free >> 20} are free on "
                                 "this disk: make room, or choose another --out")
            np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=shape)
    barrier()
    if not path.exists():
        array = np.load(unfinished, mmap_mode="r+")
        fill(array)
        array.flush()
        del array                                   # Windows renames no file that is mapped
        barrier()
        if first:
            os.replace(unfinished, path)
            for other in path.parent.glob(path.name.rsplit("-", 1)[0] + "-*"):
                if other.stem != path.stem:
                    other.unlink()
    barrier()
    return np.load(path, mmap_mode="r")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half.

    Raises OSError, with the name of the file, where there is no room.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from e
