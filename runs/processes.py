"""Several processes under torchrun: they split each batch and share out the couplings."""

import os
import sys
from datetime import timedelta
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashaudio import FlashAudio, InputError


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    if rank_and_world()[1] > 1:
        dist.barrier()


def mean_over_processes(x: Tensor) -> Tensor:
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(x)
    return x / world


def join(device: torch.device, batch_size: int) -> torch.device:
    """Under torchrun: meet the other processes and take the GPU of this one -> its device."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return device                   # a WORLD_SIZE that a cluster left behind means nothing here
    world = int(os.environ["WORLD_SIZE"])
    if batch_size % world:
        raise InputError(f"--batch_size {batch_size} cannot be split over {world} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"more processes than GPUs: {torch.cuda.device_count()} here")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    if rank_and_world()[0] > 0:
        sys.stdout = open(os.devnull, "w")          # one of them talks
    return device


class Objective(nn.Module):
    """A loss as the forward of a module: where DistributedDataParallel averages gradients."""

    def __init__(self, model: FlashAudio, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.model, *batch)


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with its gradients averaged over the processes if there are several.

    What is not trained is the same in all of them, and may lie on another device.
    """
    if rank_and_world()[1] == 1:
        return module
    ddp = nn.parallel.DistributedDataParallel
    untrained = [name for name, p in module.named_parameters() if not p.requires_grad]
    untrained += [name for name, _ in module.named_buffers()]
    ddp._set_params_and_buffers_to_ignore_for_model(module, untrained)
    device_ids = [device] if device.type == "cuda" else None
    return ddp(module, device_ids, broadcast_buffers=False)
