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

from evaluation.evaluate import markdown_table
from runs.cache import write_atomically


def kept_row(file: Path, measure: Callable[[], dict]) -> dict:
    """The row in the file; where there is none, what is measured is written there first."""
    if not file.exists():
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


def judge_claims(rows: list[dict]) -> list[dict]:
    """The claims with what was found: the mean difference over seeds, one less other, its 95%
    interval (Student's t, seeds paired), and a verdict. A difference is seen where the interval
    leaves out zero; it agrees with the paper where it has the sign of the paper's figures."""
    found, judged = by_figure(rows), []
    text = Path(__file__).with_name("claims.csv").read_text(encoding="utf-8")
    for claim in csv.DictReader(text.splitlines()):
        one = found.get((claim["table"], claim["one"], claim["figure"]), {})
        other = found.get((claim["table"], claim["other"], claim["figure of the other"]), {})
        seeds = sorted(one.keys() & other.keys())
        if not seeds:
            continue
        pairs = np.array([(one[seed], other[seed]) for seed in seeds])
        gap, half, verdict = float(np.mean(pairs[:, 0] - pairs[:, 1])), None, "cannot be judged"
        if len(seeds) > 2:
            error = stats.sem(pairs[:, 0] - pairs[:, 1])
            half = float(stats.t.ppf(0.975, len(seeds) - 1) * error)
            verdict = verdict_of(gap, half, claim["paper"])
        judged.append({**claim, "ours": pairs.mean(0).tolist(), "difference": gap,
                       "interval": half, "verdict": verdict})
    return judged


def verdict_of(gap: float, half: float, paper: str) -> str:
    """paper: its two figures, "1.12, 1.19", or "" where it has none."""
    if abs(gap) <= half:
        return "not seen"
    if not paper:
        return "lower" if gap < 0 else "higher"
    theirs = [float(figure) for figure in paper.split(",")]
    return "as in the paper" if (gap < 0) == (theirs[0] < theirs[1]) else "the opposite"


def plus_minus(value: float, error: float | None) -> str:
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def print_tables(tables: dict, claims: list[dict]) -> None:
    for table, rows in tables.items():
        print(markdown(table_of(table, rows)), end="\n\n")
    print("mean ± standard error over seeds\n")
    print_claims(claims)


def print_claims(claims: list[dict]) -> None:
    print(markdown(claims_of(claims)))
    print("\none less the other, ± half of a 95% interval of the mean, seeds paired")


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
        figures = dict.fromkeys((claim["figure"], claim["figure of the other"]))
        ours = [f"{value:.3g}" for value in claim["ours"]]
        gap = plus_minus(claim["difference"], claim["interval"])
        lines.append([claim["claim"], "; ".join(figures), *ours, gap, claim["paper"] or "-",
                      claim["verdict"]])
    return lines


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown, its columns aligned; the first line names them."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = []
    for line in lines:
        aligned.append([cell.ljust(width) for cell, width in zip(line, widths)])
    return markdown_table(aligned)
