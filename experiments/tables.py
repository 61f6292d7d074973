"""From measured rows to tables, and to verdicts on the claims of claims.csv.

A row is {"table", "name", "seed", "figures": {figure: value}}, in a file of its own.
"""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable

import numpy as np
from scipy import stats

from runs.cache import digest, write_atomically
from runs.run import find_device, hardware

ROOT = Path(__file__).parent.parent
LEVEL = 0.05            # share of chance findings among the differences that are shown


def kept_row(folder: Path, row: dict, measure: Callable[[], dict], *depends) -> dict:
    """The row with what `measure()` tells of it, kept in a file of the folder; measured anew where
    what it depends on, or the code of the method, its training or the judge is another."""
    code = [ROOT / "flashaudio.py", ROOT / "train.py", *sorted(ROOT.glob("evaluation/*.*"))]
    file = folder / f"{digest(row, *depends, *code)}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**row, **measure()}, indent=1).encode())
    return json.loads(file.read_text())


def write_rows(file: Path, rows: list[dict], flags: Any) -> None:
    """What is published: tables and claims follow from it."""
    held = {"rows": rows, "flags": asdict(flags), "hardware": hardware(find_device(flags.device))}
    write_atomically(file, json.dumps(held, indent=1).encode())


def by_figure(rows: list[dict]) -> dict:
    """{(table, name, figure): {seed: value}}, in the order of the rows."""
    found: dict = {}
    for row in rows:
        for figure, value in row["figures"].items():
            found.setdefault((row["table"], row["name"], figure), {})[row["seed"]] = value
    return found


def cell(seeds: dict | None) -> str:
    """Mean ± standard error of {seed: value}."""
    values = list((seeds or {}).values())
    if len(set(values)) < 2:
        return f"{values[0]:.3g}" if values else "-"
    return f"{np.mean(values):.3g} ± {stats.sem(values):.2g}"


def table_of(rows: list[dict], table: str) -> list[list[str]]:
    """A line for each row and a column for each figure, or the other way where that is longer."""
    found = by_figure(rows)
    names = dict.fromkeys(row["name"] for row in rows if row["table"] == table)
    figures = dict.fromkeys(figure for of, _, figure in found if of == table)
    lines = [[table, *figures]]
    for name in names:
        lines.append([name, *(cell(found.get((table, name, figure))) for figure in figures)])
    return [list(line) for line in zip(*lines)] if len(figures) > len(names) else lines


def judge_claims(rows: list[dict]) -> list[dict]:
    """The claims that three or more seeds can tell of: the mean difference, one less the other of
    each seed, half of its 95% interval (Student's t), and a verdict.

    A difference is shown where its p-value survives the correction of Benjamini and Hochberg (1995)
    for all claims of the page. It agrees with the paper where it has the sign of its figures.
    """
    found, judged = by_figure(rows), []
    text = Path(__file__).with_name("claims.csv").read_text(encoding="utf-8")
    for claim in csv.DictReader(text.splitlines()):
        for figure in claim["figure"].split("; "):
            of_other = claim["figure of the other"] or figure
            one = found.get((claim["table"], claim["one"], figure), {})
            other = found.get((claim["table"], claim["other"], of_other), {})
            seeds = sorted(one.keys() & other.keys())
            if len(seeds) < 3:
                continue
            pairs = np.array([(one[seed], other[seed]) for seed in seeds])
            gap, error = np.mean(pairs @ (1, -1)), stats.sem(pairs @ (1, -1))
            student = stats.t(len(seeds) - 1)
            judged.append({"claim": claim["claim"], "figure": figure, "of the other": of_other,
                           "ours": pairs.mean(0), "difference": gap, "student": student,
                           "interval": student.isf(0.025) * error,
                           "p": 2 * student.sf(abs(gap) / (error or np.inf)),
                           "paper": claim["paper"] if figure.startswith("fd") else ""})  # FAD
    if judged:
        shown = stats.false_discovery_control([claim["p"] for claim in judged]) <= LEVEL
        level = min(LEVEL, LEVEL * (shown.sum() + 1) / len(judged))     # that of one more
        for claim, seen in zip(judged, shown):
            student = claim["student"]
            least = claim["interval"] * student.isf(level / 2) / student.isf(0.025)
            claim["verdict"] = verdict_of(claim["difference"], seen, least, claim["paper"])
    return judged


def verdict_of(gap: float, shown: bool, least: float, paper: str) -> str:
    """least: the smallest difference that would have been shown; paper: its two figures, or ""."""
    if not shown:
        return f"not shown (could have seen d ≥ {least:.2g})"
    if not paper:
        return "lower" if gap < 0 else "higher"
    theirs = [float(figure) for figure in paper.split(",")]
    return "as in the paper" if (gap < 0) == (theirs[0] < theirs[1]) else "the opposite"


def claims_of(rows: list[dict]) -> list[list[str]]:
    """The claims that the rows tell of as lines of a table."""
    lines = [["claim", "figure", "one", "other", "difference", "in the paper", "verdict"]]
    for claim in judge_claims(rows):
        figures = dict.fromkeys((claim["figure"], claim["of the other"]))
        one, other = claim["ours"]
        lines.append([claim["claim"], "; ".join(figures), f"{one:.3g}", f"{other:.3g}",
                      f"{claim['difference']:.3g} ± {claim['interval']:.2g}",
                      claim["paper"] or "-", claim["verdict"]])
    return lines
