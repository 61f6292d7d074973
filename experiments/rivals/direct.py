"""Two controls: the CFM distilled on its own guided couplings, which is FlashAudio without 1-RF and
reflow; and the CFM trained for as long as the whole chain takes."""

from dataclasses import replace
from typing import Callable

from torch import Tensor

import flashaudio as fa
import train
from experiments.bench import coupling_cost
from experiments.rivals.shared import TRAINING, Rival, affordable, chain_cost
from runs.run import Run

COUPLINGS = 0.5             # of stage distill's number: one of these takes five times as long


class Direct(Rival):
    label = "CFM distilled, no reflow"
    lr = 1.5e-3                         # that of stage distill
    tried = ((7e-4, 1.5e-3, 3e-3), (3.0,))
    sampled = ((1, 1.0),)

    @classmethod
    def trained(cls, run: Run, lr: float | None = None, guidance: float | None = None,
                share: float = 1.0) -> fa.FlashAudio:
        """Couplings of the 1-RF's steps without anchoring; what is left of the compute goes into
        distilling them, in a folder of its own."""
        all_flags, number = run.flags, round(share * COUPLINGS * run.flags.distill_couplings)
        flags = replace(all_flags, lr=lr or cls.lr, distill_guidance=guidance or cls.guidance,
                        distill_coupling_steps=all_flags.rf2_coupling_steps, anchor_steps=0,
                        distill_couplings=max(1, number))
        compute = share * (chain_cost(all_flags) - chain_cost(all_flags, "cfm"))
        left = compute - flags.distill_couplings * coupling_cost(flags, "distill")
        steps = affordable(flags, left, TRAINING)
        out = run.out / f"direct-{flags.lr:g}-{flags.distill_guidance:g}-{steps}"
        own = replace(run, flags=replace(flags, distill_steps=steps, out=str(out)))
        cfm = run.load("cfm")
        return train.distill(own, cfm, train.Couplings(own, cfm, "distill"))


class Longer(Rival):
    label = "CFM, trained as long"
    start = "vae"
    lr = 1.5e-3                         # that of stage cfm
    tried = ((7e-4, 1.5e-3, 3e-3), (3.0,))
    sampled = ((24, 3.0), (24, 1.0))
    uses = (fa.rectified_flow_loss,)

    @staticmethod
    def loss(start: fa.FlashAudio, guidance: float) -> Callable[..., Tensor]:
        return fa.rectified_flow_loss
