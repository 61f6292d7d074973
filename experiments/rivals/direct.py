"""A control: the CFM distilled on its own guided couplings. FlashAudio without 1-RF and reflow."""

from copy import copy
from dataclasses import replace

import train
from experiments.rivals.shared import TRAINING, affordable, after_cfm, coupling_cost
from flashaudio import FlashAudio
from runs.run import Run

LR = 1.5e-3                                         # that of stage distill
GUIDANCE = 3.0                                      # of the couplings
TRIED = ((5e-4, 1.5e-3), (GUIDANCE,))               # by --tune
SAMPLED = ((1, 1.0),)                               # steps, ω
COUPLINGS = 0.5             # of stage distill's number: one of these takes five times as long


def train_rival(run: Run, lr: float = LR, guidance: float = GUIDANCE,
                share: float = 1.0) -> FlashAudio:
    """Couplings of the 1-RF's steps without anchoring; what is left of `share` of FlashAudio's
    compute from the CFM on goes into distilling. A run in a folder of its own."""
    number = max(1, round(share * COUPLINGS * run.flags.distill_couplings))
    flags = replace(run.flags, lr=lr, distill_guidance=guidance, rf2_anchor_steps=0,
                    distill_couplings=number,
                    distill_coupling_steps=run.flags.rf2_coupling_steps)
    left = share * after_cfm(run.flags) - coupling_cost(flags, "distill")
    steps = affordable(flags, left, TRAINING)
    out = run.out / f"direct-{lr:g}-{guidance:g}-{steps}"
    own = replace(run, flags=replace(flags, distill_steps=steps, out=str(out)), data=copy(run.data))
    own.data.cache = out / "cache"
    cfm = run.load("cfm")
    pairs = train.couplings(own, cfm, "distill")
    train.distill(own, cfm, pairs)
    return own.load("distill")
