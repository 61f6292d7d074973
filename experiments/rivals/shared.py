"""What the rivals share: how one is trained in a run, and what its training may cost.

Costs are forwards of the backbone for a clip: three for a training step, one for an Euler step, two
for a guided one. VAE, text encoder and vocoder are the same for all and left out.
"""

from dataclasses import replace
from functools import partial
from typing import Callable

import torch

import flashaudio as fa
import train
from experiments.bench import coupling_cost
from runs.run import STAGES, Run

TRAINING = 3            # forward and backward


def chain_cost(flags: train.Flags, last: str = "distill") -> int:
    """Forwards of train.py's stages from cfm to `last`, couplings included; none up to vae."""
    total = 0
    for stage in STAGES[1:STAGES.index(last) + 1]:
        total += getattr(flags, f"{stage}_steps") * flags.batch_size * TRAINING
        if stage in ("rf2", "distill"):
            total += getattr(flags, f"{stage}_couplings") * coupling_cost(flags, stage)
    return total


def affordable(flags: train.Flags, forwards: float, cost: float) -> int:
    """Training steps that `forwards` pay for, at so many a clip."""
    return max(1, int(forwards / (cost * flags.batch_size)))


class Rival(fa.FlashAudio):
    """A FlashAudio that is trained in another way, and sampled by another `sampler`.
    It starts from the model of a stage, and has the compute that FlashAudio takes from there on.
    loss(start, guidance), the start being frozen, makes its loss(model, z0, z1, t, context).
    """
    label: str                                      # in the table
    start = "cfm"                                   # the stage
    cost = TRAINING                                 # forwards a clip of a training step
    lr: float
    guidance = 3.0
    tried: tuple                                    # learning rates, and ω, by --tune
    sampled: tuple                                  # steps and ω of its rows; the first by --tune
    uses: tuple[Callable, ...] = ()                 # what its weights depend on, beside its class
    density = staticmethod(fa.uniform)
    drops_captions = True

    @classmethod
    def trained(cls, run: Run, lr: float | None = None, guidance: float | None = None,
                share: float = 1.0) -> fa.FlashAudio:
        """The rival of a run, trained on `share` of its compute unless it is there."""
        lr, guidance = lr or cls.lr, guidance or cls.guidance
        flags = run.flags
        compute = chain_cost(flags) - chain_cost(flags, cls.start)
        steps = affordable(flags, share * compute, cls.cost)
        stage = f"{cls.__name__.lower()}-{lr:g}-{guidance:g}-{steps}"
        start = run.load(cls.start).requires_grad_(False)
        if not run.done(stage, start, cls, *cls.uses):
            clips, model = train.Latents(run, start), cls.begin(start, flags.seed)
            parts = clips.parts
            if cls.start == "cfm":                                  # captions are learnt already
                parts = ("dit",)
                clips.texts, clips.place = run.data.contexts(start)
            dropout = flags.caption_dropout * cls.drops_captions
            own = replace(run, flags=replace(flags, caption_dropout=dropout))
            draw = partial(train.get_batch, own, stage, clips, cls.density, fa.no_pairing)
            train.fit(run, stage, model, parts, draw, cls.loss(start, guidance), steps, lr)
        return cls.from_pretrained(run.folder(stage), str(run.device))

    @classmethod
    def begin(cls, model: fa.FlashAudio, seed: int) -> "Rival":
        """The rival with the weights of a model; what is new in its network comes from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rival = cls(model.config)
        rival.load_state_dict(model.state_dict(), strict=False)
        return rival.to(model.device)
