"""Several processes under torchrun: each trains on its share of a batch, as if it were one."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from flashaudio import InputError


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without torchrun."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    if rank_and_world()[1] > 1:
        dist.barrier()


def join(device: torch.device) -> torch.device:
    """Under torchrun: meet the other processes and take a GPU each -> the device of this one."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "LOCAL_RANK" not in os.environ:
        raise InputError("srun started several processes that don't know each other: use torchrun")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))        # one for each
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if rank_and_world()[0] > 0:
        sys.stdout = open(os.devnull, "w")          # one of them talks
    return device


def average_gradients(weights: list[torch.Tensor]) -> None:
    """The gradients become the mean over the processes, where there are several."""
    rank, world = rank_and_world()
    for p in weights if world > 1 else ():
        dist.all_reduce(p.grad)
        p.grad /= world
