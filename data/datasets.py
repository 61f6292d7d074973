"""Data sets as they are published -> a manifest for train.py.

    python -m data.datasets esc50 ESC-50-master --out esc50.csv
    python -m data.datasets clotho clotho --out clotho.csv
    python -m data.datasets audiocaps clips --csv train.csv:train test.csv:test --out audiocaps.csv
    python -m data.datasets musiccaps clips --csv musiccaps-public.csv --out musiccaps.csv

The last two are published without sound. Files are looked for in your folder, at any depth, by the
names that people give them: audiocap_id, youtube_id, Yyoutube_id, youtube_id and its start (_30,
_30_40, _30000, -30, [30-40] ...).
"""

import argparse
import csv
import os
import re
from itertools import product
from pathlib import Path

from data.rows import AUDIO, SPLITS, read_table
from flashaudio import InputError

WORDINGS = ("{}", "the sound of {}", "a recording of {}")
CLOTHO = {"development": "train", "validation": "validation", "evaluation": "test"}
YOUTUBE = {"audiocaps": ("youtube_id", "start_time"), "musiccaps": ("ytid", "start_s")}


def table(path: Path, *columns: str) -> list[dict]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows, problems = read_table(path, columns)
    for line in problems[:10]:
        print(f"skipped: {line}")
    return rows


def esc50(folder: Path):
    """(file, caption, split) of each clip: its class in three wordings, the folds as split."""
    for i, row in enumerate(table(folder / "meta/esc50.csv", "filename", "fold", "category")):
        caption = WORDINGS[i % 3].format(row["category"].replace("_", " "))
        split = {"4": "validation", "5": "test"}.get(row["fold"], "train")
        yield folder / "audio" / row["filename"], caption, split


def clotho(folder: Path):
    """(file, caption, split) of each of the five captions of each clip."""
    captions = [f"caption_{i}" for i in range(1, 6)]
    for part, split in CLOTHO.items():
        rows = table(folder / f"clotho_captions_{part}.csv", "file_name", *captions)
        for row, caption in product(rows, captions):
            yield folder / part / row["file_name"], row[caption], split


def from_youtube(name: str, folder: Path, sources: list[str]):
    """(file, caption, split) of each row of some CSVs; file is the id where there is none."""
    if not sources:
        raise InputError(f"{name} needs --csv, its table of captions")
    youtube, start = YOUTUBE[name]
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in AUDIO and file.stat().st_size > 0:
            files[re.sub(r" ?[\[(]", "_", file.stem).rstrip("])")] = file
    without_end = {re.sub(r"[_-][\d.]+$", "", stem): file for stem, file in files.items()}
    for source in sources:
        path, _, split = source.rpartition(":")
        if split.lower() not in SPLITS:
            path, split = source, ""
        for row in table(Path(path), youtube, "caption"):
            begun = []
            if re.fullmatch(r"\d+(\.\d+)?", row.get(start, "")):
                seconds = float(row[start])
                starts = (str(int(seconds)), row[start], str(round(1000 * seconds)))
                begun = ["".join(x) for x in product(("", "Y"), [row[youtube]], "_-", starts)]
            whole = [row[youtube], f"Y{row[youtube]}", row.get("audiocap_id")]
            found = [files[stem] for stem in (*begun, *whole) if stem in files]
            found += [without_end[stem] for stem in begun if stem in without_end]
            yield (found or [Path(row[youtube])])[0], row["caption"], SPLITS[split.lower()]


def write_manifest(rows, out: Path) -> tuple[int, list[str]]:
    """Write audio_path,caption,split -> number of rows, names of files that are not there."""
    found, missing = [], {}
    for file, caption, split in rows:
        if file.is_file() and file.stat().st_size > 0:
            found.append((os.path.relpath(file, out.parent), caption, split))
        else:
            missing[file.name] = True
    if not found:
        raise InputError(f"none of the {len(missing)} clips is there as {', '.join(AUDIO)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.tmp", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("audio_path", "caption", "split"), *found])
    os.replace(f"{out}.tmp", out)
    return len(found), list(missing)


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("name", choices=["esc50", "clotho", *YOUTUBE])
    parser.add_argument("folder", type=Path, help="of the data set, or of its clips")
    parser.add_argument("--csv", nargs="+", default=[], help="of captions; :train, :val, :test")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write")
    args = parser.parse_args()
    try:
        if args.name in YOUTUBE:
            listed = from_youtube(args.name, args.folder, args.csv)
        else:
            listed = {"esc50": esc50, "clotho": clotho}[args.name](args.folder)
        count, absent = write_manifest(listed, args.out)
    except (InputError, OSError) as error:
        parser.exit(2, f"data.datasets: {error}\n")
    print(f"{args.out}: {count} rows; {len(absent)} clips missing: {' '.join(absent[:10])}")
