"""A run: its folder, what each stage depends on, and what keeps it whole when it is interrupted or shared by several processes."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from data.manifest import Data, digest, processes
from flashaudio import FlashAudio, InputError

STAGES = ("vae", "cfm", "rf1", "rf2", "distill", "eval")

# What a stage's weights depend on, besides the stage before it. A folder trained with other settings is never overwritten
# unless its stage is named.
COMMON = ("preset", "seed", "warmup", "lr_end", "ema", "grad_clip")
FLOW = (*COMMON, "text", "batch_size", "lr", "caption_dropout")
REFLOW = ("rectify", "anchor_steps", "anchor_lr", "anchor_tol")
DENSITY = {"logit_normal": ("logit_mean", "logit_std"), "mix_exp": ("mix_exp_a",)}     # of the timesteps that a stage draws
SETTINGS = {
    "vae": (*COMMON, "text", "vae_batch_size", "vae_frames", "vae_steps", "vae_lr", "kl_weight"),
    "cfm": (*FLOW, "cfm_steps", "cfm_timesteps", "sigma_min"),
    "rf1": (*FLOW, "init", "rf1_lr", "rf1_steps", "rf1_timesteps", "pairing", "knn_draws", "c2ot_weight"),
    "rf2": (*FLOW, *REFLOW, "couplings", "coupling_steps", "guidance", "rf2_steps", "rf2_timesteps", "pairing_reflow"),
    "distill": (*COMMON, *REFLOW, "distill_couplings", "distill_coupling_steps", "distill_guidance", "batch_size", "lr", "distill_steps")}


def own_settings(flags: "Flags", stage: str) -> dict:
    names = (*SETTINGS[stage], *DENSITY.get(getattr(flags, f"{stage}_timesteps", ""), ()))
    return {name: getattr(flags, name) for name in names}


@dataclass
class Run:
    flags: "Flags"
    data: Data
    device: torch.device

    @property
    def public(self) -> str:
        """The public checkpoint that the run starts from, or ""."""
        return "" if self.flags.init in ("cfm", "none") else self.flags.init

    def folder(self, stage: str) -> Path:
        """Of a stage's model. A public checkpoint is both the VAE and the CFM."""
        return Path(self.flags.out) / ("cfm" if self.public and stage == "vae" else stage)

    def weights(self, stage: str) -> Path:
        return self.folder(stage) / "model.safetensors"

    def text_source(self) -> Path | str:
        """What the frozen contexts depend on: the stage that trained the text encoder last, or the name of a ready-made one."""
        if self.public:
            return self.weights("cfm")
        return self.weights("rf1") if self.flags.text == "bytes" else self.flags.text

    def load(self, stage: str) -> FlashAudio:
        return FlashAudio.from_pretrained(self.folder(stage), str(self.device))

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def generator(self, *what) -> torch.Generator:
        """Random numbers that depend on the seed and on `what` they are for alone, so that a run can stop anywhere."""
        return torch.Generator().manual_seed(int(digest(self.flags.seed, *what), 16))

    def share(self, *batch) -> list:
        """The part of a step's tensors or arrays (B, ...) that this process works on."""
        rank, world = processes()
        return [x[rank::world] for x in batch]

    def settings(self, stage: str) -> dict:
        if self.public and stage == "cfm":
            return {"init": self.public, "text": self.flags.text}
        before = STAGES[STAGES.index(stage) - 1] if stage != "vae" else None
        if before and not self.weights(before).exists():
            raise InputError(f"stage {stage} starts from stage {before}, which is not trained yet in {self.flags.out}: "
                             f"leave --stage out, or give --stage {before} first")
        return {**own_settings(self.flags, stage), "data": self.data.key, **({"from": digest(self.weights(before))} if before else {})}

    def is_done(self, stage: str) -> bool:
        """Whether the stage is trained with these settings; refuses to overwrite one with others, unless it was asked for."""
        now, file = self.settings(stage), self.folder(stage) / "config.json"
        if not file.exists() or not self.weights(stage).exists():
            return False
        try:
            then = json.loads(file.read_text()).get("settings", {})
        except ValueError as e:
            raise InputError(f"{file}: not readable as JSON; delete {self.folder(stage)} to train the stage again") from e
        changed = [f"{k} was {then.get(k)}, is {v}" for k, v in now.items() if then.get(k) != v]
        if changed and self.flags.stage != stage:
            raise InputError(f"{self.folder(stage)} was trained with other settings ({'; '.join(changed)}): "
                             f"choose another --out, or train it again with --stage {stage}")
        return not changed


def versions() -> dict:
    """Of what a run was made with: this code (git), Python and the packages."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    packages = {name: version(name) for name in ("torch", "torchaudio", "transformers", "numpy", "scipy")}
    return {"flashaudio": revision or "unknown", "python": platform.python_version(), **packages}


def join_processes(device: torch.device, flags: "Flags") -> torch.device:
    """Under torchrun: meet the other processes, and take the GPU of this one -> its device. They split each batch."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device
    for name in ("batch_size", "vae_batch_size"):
        if getattr(flags, name) % world:
            raise InputError(f"--{name} {getattr(flags, name)} cannot be split over {world} processes")
    if flags.ablate or flags.bench:
        raise InputError(f"--ablate and --bench run in one process, not in {world}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"more processes than GPUs: {torch.cuda.device_count()} here")
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if processes()[0]:
        sys.stdout = open(os.devnull, "w")          # one of them talks
    return device


def mean_over_processes(x: Tensor) -> Tensor:
    world = processes()[1]
    if world > 1:
        torch.distributed.all_reduce(x)
    return x / world


class Objective(nn.Module):
    """A loss as the forward of a module: where DistributedDataParallel hooks in to average gradients."""

    def __init__(self, model: FlashAudio, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss_of(*batch)


def shared_out(objective: Objective, device: torch.device) -> nn.Module:
    """The objective, with its gradients averaged over the processes if there are several."""
    if processes()[1] == 1:
        return objective
    return nn.parallel.DistributedDataParallel(objective, [device] if device.type == "cuda" else None, broadcast_buffers=False)


def compiled(flags: "Flags", device: torch.device, f, **how):
    """f, a module or a function, through torch.compile where --compile says so."""
    if flags.compile == "off" or flags.compile == "auto" and device.type != "cuda":
        return f
    torch._dynamo.config.suppress_errors = flags.compile == "auto"              # no compiler here: run as it is
    torch._dynamo.config.recompile_limit = 64       # a graph for each stage and batch size; torch stops at 8
    return f.compile(**how) or f if isinstance(f, nn.Module) else torch.compile(f, **how)


def batches(run: Run, steps: range, draw, beside: bool | None = None):
    """(step, its batch on the device). beside, by default on CUDA: the next batch is drawn, paired and sent by a thread while this
    one is worked on. A CPU would work on both at once no faster (with pairing, at half the speed: two thread pools in each other's way)."""
    cuda = run.device.type == "cuda"
    aside = torch.cuda.Stream(run.device) if cuda else None

    def prepare(step: int) -> list[Tensor]:
        with torch.no_grad(), torch.cuda.stream(aside) if cuda else nullcontext():
            batch = [(x.pin_memory() if cuda and x.device.type == "cpu" else x).to(run.device, non_blocking=cuda) for x in draw(step)]
            if cuda:
                aside.synchronize()
        return batch

    if not (cuda if beside is None else beside):
        yield from ((step, prepare(step)) for step in steps)
        return
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device if cuda else None, initargs=(aside.device,) if cuda else ()) as pool:
        ahead = pool.submit(prepare, steps.start) if steps else None
        for step in steps:
            batch = ahead.result()
            ahead = pool.submit(prepare, step + 1) if step + 1 < steps.stop else None
            for x in batch if cuda else ():
                x.record_stream(torch.cuda.current_stream(run.device))      # made on another stream: not to be freed early
            yield step, batch


def save(path: Path, state: dict) -> None:
    """torch.save, whole or not at all. Raises OSError where there is no room."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
    except RuntimeError as e:                       # torch's word for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not written, is the disk full? What was there before is as it was") from e
    os.replace(temporary, path)


def lock(folder: Path):
    """`with lock(folder):` has the folder for itself, until the process ends if it is killed. Raises InputError if it is taken."""
    try:
        import fcntl
    except ImportError:                             # Windows
        return nullcontext()
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"{folder}: another run is at work here (process {file.read().strip() or 'unknown'}): "
                         "wait for it, stop it, or choose another --out") from None
    except OSError:                                 # a file system without locks
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


class Stop:
    """Ctrl-C and SIGTERM end a run at once, except in `with stop:`, where a first one is left to be noticed as `stop.asked`."""

    def __init__(self):
        self.asked, self.patient = 0, False

    def agreed(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step; of several processes all or none, which they ask each other every tenth."""
        if processes()[1] == 1:
            return self.asked > 0
        return step % 10 == 9 and mean_over_processes(torch.tensor(float(self.asked > 0), device=device)).item() > 0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

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
