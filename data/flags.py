"""A dataclass as a command line: every field a flag, with its help, default, choices and limits."""

from __future__ import annotations

import argparse
import math
from dataclasses import field, fields

# The least and the most of each number; for the others, a whole number is at least 1 and any other at least 0
LIMITS = {"seed": (0, 2**31), "bench": (0, 10**6), "mix_exp_a": (0, 80), "anchor_steps": (0, 10_000), "eval_clips": (2, math.inf), "ema": (0, 1), "lr_end": (0, 1),
          "caption_dropout": (0, 1), "sigma_min": (0, 1), "logit_mean": (-math.inf, math.inf)}


def flag(default, text: str, **more):
    """A field of a dataclass of flags. more: choices, nargs and the like, as argparse takes them."""
    return field(default=default, metadata={"help": text, **more})


def complaint(flags) -> str:
    """What cannot be meant about these flags of train.py, in one line; "" if they are fine."""
    for f in fields(flags):
        value, whole = getattr(flags, f.name), isinstance(f.default, int)
        low, high = LIMITS.get(f.name, (1 if whole else 0, math.inf))
        if not isinstance(value, str) and not (low <= value <= high and abs(value) < math.inf):
            return f"--{f.name} is {value}, must be {f'at least {low}' if high == math.inf else f'from {low} to {high}'}"
    public = flags.init not in ("cfm", "none")
    wrong = {
        f"--grad_accum {flags.grad_accum} leaves no clip for a part of --batch_size {flags.batch_size}": flags.grad_accum > flags.batch_size,
        "--ast needs --clap": flags.ast and not flags.clap,
        "--rows goes with --ablate": flags.rows and not flags.ablate,
        f"--stage vae has nothing to train: {flags.init} brings its own": public and flags.stage == "vae",
        "--preset toy cannot start from a public checkpoint: leave --preset out": public and flags.preset == "toy",
        "--mix_exp_a is 0, must be above 0: with a = 0, Mix-Exp is uniform": flags.mix_exp_a == 0,
        "--ablate trains every stage of the toy set from nothing by the paper's recipe: leave --stage, --text, --init and --recipe out":
            flags.ablate and (flags.stage, flags.text, flags.init, flags.recipe) != ("all", "bytes", "cfm", "paper")}
    return next((text for text, holds in wrong.items() if holds), "")


def read_command_line(text: str, cls, recipes: dict, ablations: dict, argv: list[str] | None = None):
    """The flags on the command line, over those of the preset. Exits with one line, code 2, for what cannot be meant."""
    parser = argparse.ArgumentParser(prog="train.py", description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    for f in fields(cls):
        more = {k: v for k, v in f.metadata.items() if k != "help"}
        parser.add_argument(f"--{f.name}", type=type(f.default), default=None, metavar=None if more else f.name.upper(),
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **more)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    given.setdefault("preset", "toy" if given.get("init", "cfm") in ("cfm", "none") else "base")
    flags = cls(**{**recipes[given["preset"]], **recipes[given.get("recipe", "paper")], **ablations.get(given.get("ablate"), {}), **given})
    flags.out = flags.out or f"out/{'ablation' if flags.ablate else flags.preset}{'-measured' * (flags.recipe == 'measured')}"
    if complaint(flags):
        parser.error(complaint(flags))
    return flags
