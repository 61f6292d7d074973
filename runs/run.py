"""A run: its folder, what its stages depend on, and the one line that a person is told."""

import argparse
import inspect
import json
import os
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

import flashaudio as fa
from flashaudio import FlashAudio, InputError
from runs.cache import digest, write_atomically
from runs.processes import barrier, rank_and_world

STAGES = ("vae", "cfm", "rf1", "rf2", "distill")

# Where a run lies, how fast it goes and how it is judged. A stage depends on every other flag that
# stands above its own last one: a new flag can't be forgotten. For `data`, `init` and `text` stands
# the content that they name.
WHERE = ("data", "windows", "loop", "out", "init", "text", "device", "grad_accum", "save_every",
         "vocoder", "eval_clips", "judge")


@dataclass
class Run:
    flags: Any                                    # train.Flags
    data: Any                                     # data.clips.Clips
    device: torch.device
    vocoder: Callable[[Tensor], Tensor]
    began: float = field(default_factory=time.time)

    @property
    def out(self) -> Path:
        return Path(self.flags.out)

    def folder(self, stage: str) -> Path:
        """Of a stage's model. A public checkpoint is both the VAE and the CFM."""
        return self.out / ("cfm" if self.flags.init and stage == "vae" else stage)

    def notes(self, stage: str) -> dict:
        """What training.json says of a stage: settings, flags, code, seconds; {} if none."""
        file = self.folder(stage) / "training.json"
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except ValueError as e:
            raise InputError(f"{file}: not readable; delete {file.parent}") from e

    def finished(self, stage: str) -> bool:
        trained = self.notes(stage).get("seconds") is not None
        return trained and (self.folder(stage) / "model.safetensors").exists()

    def settings(self, stage: str, start: Any, functions: tuple) -> dict:
        """All that the weights of a stage depend on; `start`: a model, or couplings with a key."""
        names = [f.name for f in fields(self.flags)]
        own = [i for i, name in enumerate(names) if name.startswith(f"{stage}_")]
        above = names[:own[-1] + 1] if own else names           # a fork's stage: all of them
        settings = {name: getattr(self.flags, name) for name in above if name not in WHERE}
        settings["network"] = digest(asdict(fa.SIZES[self.flags.size]))
        settings["text"] = content_of(self.flags.text)
        settings["data"] = self.data.key
        settings["from"] = digest(getattr(start, "key", start))
        if self.flags.init and stage == "cfm":
            settings["from"] = content_of(self.flags.init)
        settings["functions"] = [name_of(function) for function in functions]
        return settings

    def done(self, stage: str, start: Any = None, *functions: Callable) -> bool:
        """Whether the stage is finished; else its folder is there, with what it depends on.

        Raises InputError for a stage that was trained with other settings, finished or not.
        """
        folder, then = self.folder(stage), self.notes(stage).get("settings", {})
        now = self.settings(stage, start, functions)
        changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now if then.get(k) != now[k]]
        kept = any((folder / name).exists() for name in ("model.safetensors", "train_state.pt"))
        if kept and changed:
            raise InputError(f"{folder} was trained with other settings ({'; '.join(changed)}): "
                             f"delete {folder}, or choose another --out")
        if self.finished(stage):
            return True
        if rank_and_world()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.write_notes(stage, now, None)
        return False

    def write_notes(self, stage: str, settings: dict, seconds: float | None) -> None:
        notes = {"stage": stage, "settings": settings, "flags": asdict(self.flags),
                 "code": digest(Path(fa.__file__)), "hardware": hardware(self.device),
                 "seconds": seconds}
        write_atomically(self.folder(stage) / "training.json", json.dumps(notes, indent=2).encode())

    def say_what_changed(self) -> None:
        """Name the stages that another flashaudio.py has made: they are used as they are."""
        now = digest(Path(fa.__file__))
        old = [stage for stage in STAGES if self.notes(stage).get("code", now) != now]
        if old:
            print(f"flashaudio.py has changed since these stages were made: {', '.join(old)}")

    def load(self, stage: str) -> FlashAudio:
        """The model of a finished stage, to evaluate or to train on."""
        if not self.finished(stage):
            raise InputError(f"stage {stage} is not trained in {self.out}: `python train.py` does")
        return FlashAudio.from_pretrained(self.folder(stage), str(self.device))

    def save(self, stage: str, model: FlashAudio, seconds: float = 0.0) -> None:
        """Write the stage's model, each file whole or not at all; its train state goes."""
        model.config = replace(model.config, stage=stage)
        model.card = ""                             # that of the stage before
        if rank_and_world()[0] == 0:
            folder = self.folder(stage)
            unfinished = folder / ".saving"
            model.save_pretrained(unfinished, config=model.config)
            for file in unfinished.iterdir():
                os.replace(file, folder / file.name)
            unfinished.rmdir()
            self.write_notes(stage, self.notes(stage)["settings"], round(seconds, 1))
            (folder / "train_state.pt").unlink(missing_ok=True)
        barrier()

    def compile(self, model: FlashAudio) -> None:
        """On CUDA, compile what training calls; TORCH_COMPILE_DISABLE=1 leaves it out."""
        if self.device.type == "cuda":
            model.dit.compile()
            model.vae.encode = torch.compile(model.vae.encode)
            model.vae.decode = torch.compile(model.vae.decode)

    def generator(self, *what) -> torch.Generator:
        """Random numbers that depend on the seed and on `what` they are for alone."""
        return torch.Generator().manual_seed(int(digest(self.flags.seed, *what), 16))


def name_of(function: Callable) -> str:
    """What a callable is known by: its name, its code, and the values that it holds.

    Raises InputError where it has neither name nor code.
    """
    def plain(x: object) -> str:
        return name_of(x) if callable(x) else repr(x)

    if isinstance(function, partial):
        held = [function.args, function.keywords]
        return f"{name_of(function.func)} {json.dumps(held, default=plain)}"
    named = hasattr(function, "__qualname__")       # else an object that can be called
    name = function.__qualname__ if named else getattr(function, "name", "")
    held = {} if named else vars(function)
    if inspect.ismethod(function):
        held = vars(function.__self__)
    if inspect.isfunction(function):
        held = {"defaults": [function.__defaults__, function.__kwdefaults__],
                **inspect.getclosurevars(function).nonlocals}
    try:
        code = digest(inspect.getsource(function if named else type(function)))
        return f"{name} {code} {json.dumps(held, default=plain) if held else ''}".strip()
    except (OSError, TypeError) as e:               # typed into a console, or not written in Python
        if name in ("", "<lambda>"):
            raise InputError(f"{function!r} has no source code: give it a name to be known by: "
                             "function.__qualname__, or `name` of an object") from e
        return name


@lru_cache
def content_of(source: str) -> str:
    """A file or folder is known by what it holds, wherever it lies; a hub id by its own name."""
    path = Path(source or "no such folder")
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    return digest(*files) if files else source


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, and --help as it is written."""

    def __init__(self, name: str, text: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=text, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the flags")


@contextmanager
def one_line_errors(script: str):
    """Exit with 2 and one line for what a person can put right, with 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # a notebook's and a closed one haven't
            stream.reconfigure(line_buffering=True, errors="replace")
    try:
        yield
        return
    except (InputError, OSError, SafetensorError) as e:         # the last: no room for a model
        code, text = 2, e
    except torch.OutOfMemoryError:
        code, text = 2, "out of memory: a larger --grad_accum or a smaller --batch_size needs less"
    except KeyboardInterrupt:
        code, text = 130, "stopped; the same command goes on from the last checkpoint"
    print(f"{script}: {text}", file=sys.stderr)
    sys.exit(code)


def lock(folder: Path):
    """`with lock(folder):` has the folder for itself. Raises InputError where another run has."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as e:
        raise InputError(f"{folder}: another run is at work here: wait for it, stop it, or choose "
                         "another --out") from e


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto is cuda where there is one. InputError for one not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device '{name}' is not here: use cpu, cuda, cuda:0, mps or auto") from e


def hardware(device: torch.device) -> str:
    chip = f"{platform.processor() or platform.machine()} {device.type}, "
    chip += f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    return f"{chip}, torch {torch.__version__}"
