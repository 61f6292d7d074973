"""Data sets as they are published -> a manifest for train.py.

    python -m data.datasets esc50 ESC-50-master --out esc50.csv
    python -m data.datasets audiocaps clips --csv train.csv:train test.csv:test --out audiocaps.csv

AudioCaps and MusicCaps are published without sound: files are looked for in your folder, at any
depth, by the names that people give them: audiocap_id, youtube_id, Yyoutube_id, youtube_id_30 ...
"""

import argparse
import csv
import os
from pathlib import Path

from data.rows import AUDIO, SPLITS, find, read_table, walk
from flashaudio import InputError
from runs.run import one_line_errors

CLOTHO = tuple(f"caption_{i}" for i in range(1, 6))
WORDINGS = ("{}", "the sound of {}", "a recording of {}")       # of the name of a class
# The tables of a set, each with the file of a row's sound, columns of captions, that of the split,
# and which of its values is which split; the rest is for training
PUBLISHED = {
    "esc50": [("meta/esc50.csv", "audio/{filename}", ("category",), "fold",
               {"4": "validation", "5": "test"})],
    "urbansound8k": [("metadata/UrbanSound8K.csv", "audio/fold{fold}/{slice_file_name}",
                      ("class",), "fold", {"9": "validation", "10": "test"})],
    "fsd50k": [("FSD50K.ground_truth/dev.csv", "FSD50K.dev_audio/{fname}.wav", ("labels",), "split",
                {"val": "validation"}),
               ("FSD50K.ground_truth/eval.csv", "FSD50K.eval_audio/{fname}.wav", ("labels",), "",
                {"": "test"})],
    "clotho": [("clotho_captions_development.csv", "development/{audio_path}", CLOTHO, "", {}),
               ("clotho_captions_validation.csv", "validation/{audio_path}", CLOTHO, "",
                {"": "validation"}),
               ("clotho_captions_evaluation.csv", "evaluation/{audio_path}", CLOTHO, "",
                {"": "test"})]}
YOUTUBE = {"audiocaps": "youtube_id", "musiccaps": "ytid"}


def table(path: Path, *columns: str) -> list[dict]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows, problems = read_table(path, columns)
    for line in problems[:10]:
        print(f"skipped: {line}")
    return rows


def published(name: str, folder: Path):
    """(file, caption, split) of each caption of each clip of one of PUBLISHED."""
    for source, file, captions, column, splits in PUBLISHED[name]:
        for i, row in enumerate(table(folder / source, *captions)):
            split = splits.get(row.get(column, ""), "train")
            for caption in captions:
                text = row[caption]
                if captions != CLOTHO:              # a class; of several the first, which is exact
                    text = text.partition(",")[0].replace("_", " ").lower()
                    text = WORDINGS[i % 3].format(text)
                yield find(folder, file.format(**row)), text, split


def from_youtube(name: str, folder: Path, sources: list[str]):
    """(file, caption, split) of each row of some CSVs; file is the id where there is none."""
    if not sources:
        raise InputError(f"{name} needs --csv, its table of captions")
    files = {}
    for file in walk(folder):
        if file.suffix.lower() in AUDIO and file.exists() and file.stat().st_size > 0:
            files.update(dict.fromkeys((file.stem, file.stem[:11], file.stem[1:12]), file))
    for source in sources:
        path, _, split = source.rpartition(":")
        if split.lower() not in SPLITS:
            path, split = source, ""
        for row in table(Path(path), YOUTUBE[name], "caption"):
            names = (row.get("audiocap_id"), row[YOUTUBE[name]].strip())
            found = [files[name] for name in names if name in files]
            yield (found or [Path(names[1])])[0], row["caption"], SPLITS[split.lower()]


def write_manifest(rows, out: Path) -> tuple[int, list[str]]:
    """Write audio_path,caption,split -> number of rows, names of files that are not there."""
    found = []
    missing = {}                                    # in order, each name once
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*PUBLISHED, *YOUTUBE])
    parser.add_argument("folder", type=os.path.expanduser, help="of the data set, or of its clips")
    parser.add_argument("--csv", nargs="+", default=[], help="of captions; :train, :val, :test")
    parser.add_argument("--out", type=os.path.expanduser, required=True, help="manifest to write")
    args = parser.parse_args()
    with one_line_errors("data.datasets"):
        folder, out = Path(args.folder), Path(args.out)
        if args.name in YOUTUBE:
            listed = from_youtube(args.name, folder, args.csv)
        else:
            listed = published(args.name, folder)
        count, absent = write_manifest(listed, out)
        print(f"{out}: {count} rows; {len(absent)} clips missing: {' '.join(absent[:10])}")
