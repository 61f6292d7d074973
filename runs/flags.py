"""A dataclass as a command line: every field a flag, with its help, default, choices and limits."""

import argparse
import math
from dataclasses import field, fields
from typing import Callable


def flag(default, text: str, low: float | None = None, high: float = math.inf,
         choices: tuple[str, ...] | None = None):
    """A field; `low` is 1 for a whole number and 0 for any other, unless it is given."""
    if low is None:
        low = 1 if isinstance(default, int) else 0
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


def check_limits(flags) -> None:
    """Raises ValueError, in one line, for a number outside its limits; infinity and NaN are."""
    for f in fields(flags):
        value, low, high = getattr(flags, f.name), f.metadata["low"], f.metadata["high"]
        if not isinstance(value, str) and not (low <= value <= high and abs(value) < math.inf):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"--{f.name} is {value}, must be {limits}")


def read_flags(cls, text: str, defaults: Callable[[dict], dict], argv: list[str] | None = None):
    """The flags on the command line, over what they make of the defaults. Exits with one line and
    code 2."""
    prog = "train.py"
    parser = argparse.ArgumentParser(prog, description=text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{prog}: {message}; --help lists the flags\n")
    for f in fields(cls):
        choices = f.metadata["choices"]
        about = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=type(f.default), choices=choices, help=about,
                            metavar=None if choices else f.name.upper())
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    try:
        return cls(**{**defaults(given), **given})
    except ValueError as e:
        parser.error(str(e))
