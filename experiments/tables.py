"""From measured rows to tables, and from tables to verdicts on the claims of claims.csv.

A row is {"table", "name", "seed", "figures": {figure: value}}, in a file of its own.
"""

import csv
import json
from itertools import chain
from pathlib import Path
from typing import Callable

import numpy as np
from scipy import stats

from evaluation.evaluate import markdown
from runs.cache import digest, write_atomically

ROOT = Path(__file__).parent.parent
LEVEL = 0.05            # share of chance findings among the differences that are shown


def code_of_figures() -> str:
    """Digest of the code that every figure depends on: the method, its training, the judge."""
    return digest(ROOT / "flashaudio.py", ROOT / "train.py", *sorted(ROOT.glob("evaluation/*.*")))


def kept_row(file: Path, measure: Callable[[], dict]) -> dict:
    """The row in the file; where there is none, what is measured is written there first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(measure(), indent=1).encode())
    return json.loads(file.read_text())


def by_figure(rows: list[dict]) -> dict:
    """{(table, name, figure): {seed: value}}, in the order of the rows."""
    found: dict = {}
    for row in rows:
        for figure, value in row["figures"].items():
            found.setdefault((row["table"], row["name"], figure), {})[row["seed"]] = value
    return found


def summary(rows: list[dict]) -> dict:
    """{table: {name: {figure: [mean, standard error or None, seeds]}}}."""
    tables: dict = {}
    for (table, name, figure), seeds in by_figure(rows).items():
        values = list(seeds.values())
        error = float(stats.sem(values)) if len(values) > 1 else None
        figures = tables.setdefault(table, {}).setdefault(name, {})
        figures[figure] = [float(np.mean(values)), error, len(values)]
    return tables


def differences(rows: list[dict]) -> list[dict]:
    """The claims of which the rows can tell, with `gaps`: one less the other, for each seed."""
    found, told = by_figure(rows), []
    text = Path(__file__).with_name("claims.csv").read_text(encoding="utf-8")
    for claim in csv.DictReader(text.splitlines()):
        others = claim["figure of the other"] or claim["figure"]
        for figure, of_other in zip(claim["figure"].split("; "), others.split("; ")):
            one = found.get((claim["table"], claim["one"], figure), {})
            other = found.get((claim["table"], claim["other"], of_other), {})
            seeds = sorted(one.keys() & other.keys())
            if not seeds:
                continue
            pairs = np.array([(one[seed], other[seed]) for seed in seeds])
            paper = claim["paper"] if figure.startswith("fd") else ""           # has FAD alone
            told.append({"claim": claim["claim"], "figure": figure, "of the other": of_other,
                         "paper": paper, "ours": pairs.mean(0), "gaps": pairs[:, 0] - pairs[:, 1]})
    return told


def judge_claims(rows: list[dict]) -> list[dict]:
    """The claims with their mean difference, half of its 95% interval (Student's t, seeds paired),
    and a verdict.

    A difference is shown where its p-value survives the correction of Benjamini and Hochberg (1995)
    for all claims of the page. It agrees with the paper where it has the sign of its figures.
    """
    judged = differences(rows)
    tested = [claim for claim in judged if len(claim["gaps"]) > 2]
    for claim in judged:
        claim.update(difference=claim["gaps"].mean(), interval=None, verdict="cannot be judged")
    for claim in tested:
        degrees = len(claim["gaps"]) - 1
        claim["error"] = stats.sem(claim["gaps"])
        claim["interval"] = stats.t.isf(0.025, degrees) * claim["error"]
        distance = abs(claim["difference"]) / (claim["error"] or np.inf)
        claim["p"] = 2 * stats.t.sf(distance, degrees)
    if tested:
        shown = stats.false_discovery_control([claim["p"] for claim in tested]) <= LEVEL
        level = min(LEVEL, LEVEL * (shown.sum() + 1) / len(tested))     # of one more
        for claim, seen in zip(tested, shown):
            least = stats.t.isf(level / 2, len(claim["gaps"]) - 1) * claim["error"]
            claim["verdict"] = verdict_of(claim["difference"], seen, least, claim["paper"])
    return judged


def verdict_of(gap: float, shown: bool, least: float, paper: str) -> str:
    """least: the smallest difference that would have been shown. paper: its two figures, "1.12,
    1.19", or "" where it has none."""
    if not shown:
        return f"not shown (could have seen d ≥ {least:.2g})"
    if not paper:
        return "lower" if gap < 0 else "higher"
    theirs = [float(figure) for figure in paper.split(",")]
    return "as in the paper" if (gap < 0) == (theirs[0] < theirs[1]) else "the opposite"


def plus_minus(value: float, error: float | None) -> str:
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def table_of(table: str, rows: dict) -> list[list[str]]:
    """A line for each row and a column for each figure, or the other way where that is longer."""
    columns = list(dict.fromkeys(chain(*rows.values())))
    lines = [[table, *columns]]
    for name, figures in rows.items():
        cells = [plus_minus(*figures[c][:2]) if c in figures else "-" for c in columns]
        lines.append([name, *cells])
    if len(columns) > len(rows):
        lines = [list(line) for line in zip(*lines)]
    return lines


def claims_of(claims: list[dict]) -> list[list[str]]:
    lines = [["claim", "figure", "one", "other", "difference", "in the paper", "verdict"]]
    for claim in claims:
        figures = dict.fromkeys((claim["figure"], claim["of the other"]))
        ours = [f"{value:.3g}" for value in claim["ours"]]
        gap = plus_minus(claim["difference"], claim["interval"])
        lines.append([claim["claim"], "; ".join(figures), *ours, gap, claim["paper"] or "-",
                      claim["verdict"]])
    return lines


def print_claims(rows: list[dict]) -> None:
    print(markdown(claims_of(judge_claims(rows))))
    print("\none less the other, ± half of a 95% interval of the mean, seeds paired. A verdict is "
          "what\nsurvives a false discovery rate of 5% over the table; d: the least difference that "
          "would have")
