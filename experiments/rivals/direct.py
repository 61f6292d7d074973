"""A control: the CFM distilled on its own guided couplings. FlashAudio without 1-RF and reflow."""

from copy import copy
from dataclasses import replace

import train
from experiments.bench import coupling_cost
from experiments.rivals.shared import TRAINING, Rival, affordable, chain_cost
from flashaudio import FlashAudio
from runs.run import Run

COUPLINGS = 0.5             # of stage distill's number: one of these takes five times as long


class Direct(Rival):
    label = "CFM distilled, no reflow"
    lr = 1.5e-3                         # that of stage distill
    tried = ((5e-4, 1.5e-3), (3.0,))
    sampled = ((1, 1.0),)

    @classmethod
    def trained(cls, run: Run, lr: float | None = None, guidance: float | None = None,
                share: float = 1.0) -> FlashAudio:
        """Couplings of the 1-RF's steps without anchoring; what is left of the compute goes into
        distilling them. A run in a folder of its own."""
        flags = run.flags
        number = max(1, round(share * COUPLINGS * flags.distill_couplings))
        flags = replace(flags, lr=lr or cls.lr, distill_guidance=guidance or cls.guidance,
                        distill_coupling_steps=flags.rf2_coupling_steps, anchor_steps=0,
                        distill_couplings=number)
        compute = share * (chain_cost(run.flags) - chain_cost(run.flags, "cfm"))
        steps = affordable(flags, compute - number * coupling_cost(flags, "distill"), TRAINING)
        out = run.out / f"direct-{flags.lr:g}-{flags.distill_guidance:g}-{steps}"
        own = replace(run, flags=replace(flags, distill_steps=steps, out=str(out)),
                      data=copy(run.data))
        own.data.cache = out / "cache"
        cfm = run.load("cfm")
        train.distill(own, cfm, train.Couplings(own, cfm, "distill"))
        return own.load("distill")
