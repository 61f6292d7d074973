"""A run: its folder, what its stages depend on, and how it survives being interrupted."""

import ast
import inspect
import json
import math
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import SafetensorError
from torch import Tensor

from flashaudio import FlashAudio, InputError
from runs.cache import bar, digest, write_atomically
from runs.processes import barrier, mean_over_processes, rank_and_world

STAGES = ("vae", "cfm", "rf1", "rf2", "distill")

# Where and how fast a run goes, and how it is judged. A stage depends on every other flag, but for
# those that bear the name of a later stage: a flag that is new can't be forgotten. For `data`,
# `windows` and `init` stands the content that they name.
WHERE = ("out", "data", "windows", "init", "stage", "device", "grad_accum", "save_every",
         "vocoder", "eval_clips", "judge", "plan")


@dataclass
class Run:
    flags: Any                                    # train.Flags
    data: Any                                     # data.clips.Clips
    device: torch.device
    vocoder: Callable[[Tensor], Tensor]
    spent: float = 0.0                            # seconds of couplings for the stage to come

    @property
    def out(self) -> Path:
        return Path(self.flags.out)

    def folder(self, stage: str) -> Path:
        """Of a stage's model. A public checkpoint is both the VAE and the CFM."""
        return self.out / ("cfm" if self.flags.init and stage == "vae" else stage)

    def notes(self, stage: str) -> dict:
        """What training.json says of a stage: settings, flags, versions, seconds; {} if none."""
        file = self.folder(stage) / "training.json"
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as e:
            raise InputError(f"{file}: not readable as JSON; delete {file.parent} to train the "
                             "stage again") from e

    def settings(self, stage: str, start: Any, functions: tuple) -> dict:
        """All that the weights of a stage depend on; `start`: a model, or couplings with a key."""
        after = STAGES.index(stage) + 1 if stage in STAGES else len(STAGES)    # a fork's: after all
        later = tuple(f"{name}_" for name in STAGES[after:])
        own = {name: value for name, value in asdict(self.flags).items()
               if name not in WHERE and not name.startswith(later)}
        own["data"] = self.data.key
        own["from"] = digest(getattr(start, "key", start))
        if self.flags.init and stage == "cfm":
            own["from"] = content_of(self.flags.init)
        own["functions"] = names_of(*functions)
        return own

    def done(self, stage: str, start: Any = None, *functions: Callable | None) -> bool:
        """Whether there is nothing to train: it was trained from the same, or --stage is another.

        Raises InputError for a stage that was trained with other settings, finished or not, unless
        it is the one that --stage names.
        """
        if self.flags.stage not in ("all", stage):
            return True
        folder, notes = self.folder(stage), self.notes(stage)
        now = self.settings(stage, start, functions)
        then = notes.get("settings", {})
        changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now if then.get(k) != now[k]]
        kept = any((folder / name).exists() for name in ("model.safetensors", "train_state.pt"))
        if kept and notes and changed and self.flags.stage != stage:
            raise InputError(f"{folder} was trained with other settings ({'; '.join(changed)}): "
                             f"choose another --out, or train it again with --stage {stage}")
        if notes and not changed and notes["seconds"] is not None:
            return (folder / "model.safetensors").exists()
        if rank_and_world()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if changed:
                (folder / "train_state.pt").unlink(missing_ok=True)
            self.write_notes(stage, now, None)
        return False

    def write_notes(self, stage: str, settings: dict, seconds: float | None) -> None:
        notes = {"stage": stage, "settings": settings, "flags": asdict(self.flags),
                 "versions": versions(), "seconds": seconds}
        write_atomically(self.folder(stage) / "training.json", json.dumps(notes, indent=2).encode())

    def load(self, stage: str) -> FlashAudio | None:
        """The stage's model, to evaluate or train on; None of a stage after the one asked for."""
        asked = self.flags.stage
        if asked in STAGES and STAGES.index(stage) > STAGES.index(asked):
            return None
        if self.notes(stage).get("seconds") is None:
            raise InputError(f"stage {stage} is not trained yet in {self.out}: leave --stage out, "
                             f"or give --stage {stage} first")
        return FlashAudio.from_pretrained(self.folder(stage), str(self.device))

    def save(self, stage: str, model: FlashAudio, seconds: float = 0.0) -> None:
        """Write the stage's model, each file whole or not at all; its train state goes."""
        model.config = replace(model.config, stage=stage)
        if rank_and_world()[0] == 0:
            folder = self.folder(stage)
            unfinished = folder / ".saving"
            try:
                model.save_pretrained(unfinished, config=model.config)
            except SafetensorError as e:
                raise OSError(f"{folder / 'model.safetensors'}: not written ({e})") from e
            for name in ("model.safetensors", "config.json", "README.md"):
                os.replace(unfinished / name, folder / name)
            unfinished.rmdir()
            settings = self.notes(stage)["settings"]
            self.write_notes(stage, settings, round(seconds + self.spent, 1))
            (folder / "train_state.pt").unlink(missing_ok=True)
        self.spent = 0.0
        barrier()

    def autocast(self):
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def compile(self, model: FlashAudio, dynamic: bool | None = False) -> None:
        """On CUDA, compile what training calls; TORCH_COMPILE_DISABLE=1 leaves it out.

        dynamic: None makes a graph for any batch size, once there is a second one.
        """
        if self.device.type == "cuda":
            torch._dynamo.config.recompile_limit = 64       # a graph for each batch size
            for part in (model.vae.encoder, model.vae.decoder, model.dit):
                part.compile(dynamic=dynamic)

    def generator(self, *what) -> torch.Generator:
        """Random numbers that depend on the seed and on `what` they are for alone."""
        return torch.Generator().manual_seed(int(digest(self.flags.seed, *what), 16))

    def share(self, *batch) -> list:
        """The part of a step's tensors or arrays (B, ...) that this process works on."""
        rank, world = rank_and_world()
        return [x[rank::world] for x in batch]


def names_of(*functions: Callable | None) -> list[str]:
    """What functions are known by in settings and keys: name and code; None is left out."""
    return [f"{f.__module__}.{f.__qualname__} {code_of(f)}" for f in functions if f is not None]


def code_of(function: Callable) -> str:
    """Digest of what a function itself does, whatever its comments; "" where no file has it."""
    try:
        definition, = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError):
        return ""
    if ast.get_docstring(definition):
        definition.body = definition.body[1:]
    return digest(ast.unparse(definition))


def content_of(source: str) -> str:
    """What a file holds, in short; a hub id is its own name."""
    return digest(Path(source)) if Path(source).is_file() else source


class Progress:
    """The steps of a stage: from where it was interrupted, with a bar, a log, and a saved state."""

    def __init__(self, run: Run, stage: str, steps: int, weights: list[Tensor],
                 average: list[Tensor], optimizer: torch.optim.Optimizer):
        self.run, self.stage, self.steps = run, stage, steps
        self.weights, self.average, self.optimizer = weights, average, optimizer
        self.file = run.folder(stage) / "train_state.pt"
        self.step = self.start = 0
        self.before = 0.0                         # seconds before the interruption
        self.smooth = None                        # running means of loss and gradient norm
        barrier()
        self.resume()
        self.began = self.saved = time.time()

    @property
    def loss(self) -> float:
        """Running mean; NaN before the first tenth step."""
        return self.smooth[0] if self.smooth else math.nan

    @property
    def seconds(self) -> float:
        return self.before + time.time() - self.began

    def resume(self) -> None:
        if not self.file.exists():
            return
        try:
            state = torch.load(self.file, map_location=self.run.device, weights_only=True)
        except Exception:                         # torch, pickle and zip have many
            print(f"{self.file}: cannot be read, so stage {self.stage} begins again")
            return
        self.step = self.start = state["step"]
        self.before = state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name in ("weights", "average"):
                for ours, saved in zip(getattr(self, name), state[name]):
                    ours.copy_(saved)
        print(f"{self.stage}: continuing at step {self.start} of {self.steps}")

    def __iter__(self):
        """Step numbers; a signal is answered between two of them. Raises KeyboardInterrupt."""
        open_log = self.run.out / "metrics.jsonl" if rank_and_world()[0] == 0 else os.devnull
        with stop, open(open_log, "a", buffering=1) as self.metrics:
            self.bar = bar(range(self.start, self.steps), self.stage, initial=self.start,
                           total=self.steps, unit="step")
            for self.step in self.bar:
                yield self.step
                if stop.agreed(self.step, self.run.device):
                    self.save()
                    raise KeyboardInterrupt

    def log(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Every tenth step: check, show and write loss and gradient norm; save where it is time.

        Raises InputError where one of them is not finite.
        """
        done = self.step + 1
        if done % 10 and done < self.steps:
            return
        loss, norm = mean_over_processes(loss).item(), norm.item()
        if not math.isfinite(loss + norm):
            raise InputError(f"{self.stage}: loss {loss}, gradient norm {norm} at step {done}; the "
                             f"last good checkpoint is kept in {self.file.parent}. A smaller --lr "
                             "or a longer --warmup usually helps")
        if self.smooth is None:
            self.smooth = [loss, norm]
        elif norm > 100 * self.smooth[1]:
            self.bar.write(f"{self.stage}: the gradient exploded at step {done}: norm {norm:.3g}, "
                           f"usually {self.smooth[1]:.3g}; it is clipped")
        self.smooth = [0.9 * old + 0.1 * new for old, new in zip(self.smooth, (loss, norm))]
        pace = (time.time() - self.began) / (done - self.start)
        self.bar.set_postfix_str(f"loss {self.smooth[0]:.4f}, {pace:.2f} s/step")
        if 20 <= done - self.start < 30:          # once: only tenth steps come here
            minutes = pace * (self.steps - done) / 60
            self.bar.write(f"{self.stage}: {self.steps} steps, about {minutes:.1f} min from here")
        line = {"stage": self.stage, "step": done, "loss": loss, "grad_norm": norm, "lr": rate,
                "seconds": round(self.seconds, 4)}
        self.metrics.write(json.dumps(line) + "\n")
        if time.time() - self.saved > self.run.flags.save_every and done < self.steps:
            self.save()

    def save(self) -> None:
        """The whole state, or none of it. Raises OSError where there is no room."""
        self.saved = time.time()
        if rank_and_world()[0] > 0:
            return
        unfinished = self.file.with_suffix(".tmp")
        state = {"step": self.step + 1, "seconds": self.seconds, "average": self.average,
                 "weights": [p.detach() for p in self.weights],
                 "optimizer": self.optimizer.state_dict()}
        try:
            with open(unfinished, "wb") as f:
                torch.save(state, f)
                os.fsync(f.fileno())
        except (RuntimeError, OSError) as e:      # the first is torch's word for a full disk
            unfinished.unlink(missing_ok=True)
            raise OSError(f"{self.file}: not written, is the disk full? What was there before is "
                          "as it was") from e
        os.replace(unfinished, self.file)


class Stop:
    """Ctrl-C and SIGTERM end a run at once, except in `with stop:`, where the first one waits."""

    def __init__(self):
        self.asked, self.patient = 0, False

    def agreed(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step; several processes ask each other at every tenth."""
        if rank_and_world()[1] == 1:
            return self.asked > 0
        if step % 10 < 9:
            return False
        asked = torch.tensor(float(self.asked > 0), device=device)
        return mean_over_processes(asked).item() > 0

    def listen(self) -> None:
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number: int, _frame) -> None:
        again, self.asked = self.asked, number
        if again or not self.patient:
            raise KeyboardInterrupt

    def __enter__(self) -> "Stop":
        self.patient = True
        return self

    def __exit__(self, *_) -> None:
        self.patient = False


stop = Stop()


@contextmanager
def one_line_errors(script: str):
    """Exit with 2 and one line for what a person can put right, 130 or 143 when stopped."""
    for stream in (sys.stdout, sys.stderr):       # up to date in a log; any console's letters
        stream.reconfigure(line_buffering=True, errors="replace")
    stop.listen()
    try:
        yield
    except (InputError, OSError) as e:
        print(f"{script}: {e}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print(f"{script}: out of memory: a larger --grad_accum (train.py) or a smaller "
              "--batch_size needs less, then a smaller --preset", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{script}: stopped; the same command continues from here", file=sys.stderr)
        sys.exit(128 + (stop.asked or signal.SIGINT))
    else:
        return
    sys.exit(2)


def lock(folder: Path):
    """`with lock(folder):` has the folder for itself, until the process ends if it is killed.

    Raises InputError where another run is at work.
    """
    try:
        import fcntl
    except ImportError:                           # Windows
        return nullcontext()
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "unknown"
        raise InputError(f"{folder}: another run is at work here (process {who}): wait for it, "
                         "stop it, or choose another --out") from None
    except OSError:                               # a file system without locks
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto is cuda where there is one. InputError for one not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device '{name}' is not available here: use cpu, cuda, cuda:0, mps or "
                         "auto") from e


def peak_memory(device: torch.device) -> float:
    """GiB, of the GPU where there is one, else of this process; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if os.name == "nt":
        return math.nan
    import resource
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def versions() -> dict:
    """Of what a run was made with: this code (git), Python and the packages."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    packages = {name: version(name) for name in ("torch", "torchaudio", "transformers", "numpy")}
    return {"flashaudio": revision or "unknown", "python": platform.python_version(), **packages}
