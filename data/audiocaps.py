"""AudioCaps or MusicCaps: an official CSV and a folder of clips -> a manifest for train.py.

    python data/audiocaps.py --csv train.csv --clips audiocaps/train --out audiocaps/train-manifest.csv
    python data/audiocaps.py --csv train.csv:train test.csv:test --clips audiocaps --out audiocaps/manifest.csv

Clips are looked for by name, at any depth and with any ending: 123 (audiocap_id), youtube_id, Yyoutube_id, and youtube_id
followed by its start (_30, _30_40, _30000, _30000_40000, -30, [30-40] ...). Those that are not there are counted and listed.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that flashaudio.py is found from a script in data/
from flashaudio import InputError

ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".webm")
COLUMNS = {"audiocap_id": ("audiocap_id",), "youtube": ("youtube_id", "ytid"), "start": ("start_time", "start_s"), "caption": ("caption",)}


def index(folder: Path) -> dict[str, Path]:
    """Every audio file below a folder, by its name without ending."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of clips")
    return {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS}


def names(row: dict[str, str]) -> list[str]:
    """File names, likeliest first, under which people keep the clip of this row."""
    youtube, start = row["youtube"], row["start"] if re.fullmatch(r"\d+(\.\d+)?", row["start"]) else ""
    seconds = [str(int(float(start))), start, str(round(1000 * float(start)))] if start else []
    starts = [f"{prefix}{youtube}{joint}{s}" for prefix in ("", "Y") for s in seconds for joint in ("_", "-")]
    return [*starts, youtube, f"Y{youtube}", row["audiocap_id"]]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows with audiocap_id, youtube, start (s) and caption, '' where a file has none. Raises InputError for another CSV."""
    if not path.is_file():
        raise InputError(f"{path}: no such CSV")
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f)
        found = {ours: next((c for c in theirs if c in (reader.fieldnames or ())), None) for ours, theirs in COLUMNS.items()}
        if not found["youtube"] or not found["caption"]:
            raise InputError(f"{path}: needs the columns youtube_id (or ytid) and caption, has {', '.join(reader.fieldnames or ['none'])}")
        return [{ours: (row[theirs] or "").strip() if theirs else "" for ours, theirs in found.items()} for row in reader]


def write_manifest(sources: list[str], clips: Path, out: Path) -> tuple[int, list[str]]:
    """Write audio_path,caption,split to `out` -> how many clips were found, and the youtube ids of those that were not."""
    files, found, missing = index(clips), [], []
    extended = {re.sub(r"[ _\-\[(]+[\d.]+[\])]?$", "", stem): path for stem, path in files.items()}    # id_30_40 -> id_30
    for source in sources:
        path, _, split = source.rpartition(":") if re.search(r":(train|test)$", source) else (source, "", "")
        for row in read_csv(Path(path)):
            options = names(row)
            file = next((held[n] for held in (files, extended) for n in options if n in held), None)
            if file and row["caption"]:
                found.append((os.path.relpath(file, out.parent), row["caption"], split))
            else:
                missing.append(row["youtube"])
    if not found:
        raise InputError(f"{clips}: holds none of the {len(missing)} clips of {', '.join(sources)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.tmp", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("audio_path", "caption", "split"), *found])
    os.replace(f"{out}.tmp", out)
    return len(found), missing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", nargs="+", required=True, help="official CSVs; with :train or :test after the name, that split")
    parser.add_argument("--clips", type=Path, required=True, help="folder of the clips, searched at any depth")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write")
    args = parser.parse_args()
    try:
        count, absent = write_manifest(args.csv, args.clips, args.out)
        print(f"{args.out}: {count} clips, {len(absent)} missing{': ' if absent else ''}{' '.join(absent[:10])}{' ...' * (len(absent) > 10)}")
    except (InputError, OSError) as error:
        parser.exit(2, f"audiocaps.py: {error}\n")
