"""Data sets as they are published -> a manifest for train.py.

    python -m data.datasets esc50 ESC-50-master --out esc50.csv

Tables and sounds are found at any depth of the folder. AudioCaps is published without sound: put
train.csv, val.csv and test.csv beside your clips, whose names begin with youtube_id or Yyoutube_id.
"""

import argparse
import os
from pathlib import Path

from data.rows import AUDIO, read_csv, text_in, walk, write_csv
from flashaudio import InputError, clean_text
from runs.run import one_line_errors

PUBLISHED = {  # sets, their tables, and which fold or split is which; the rest is for training
    "audiocaps": {"train.csv": {}, "val.csv": {"": "validation"}, "test.csv": {"": "test"}},
    "clotho": {"clotho_captions_development.csv": {},
               "clotho_captions_validation.csv": {"": "validation"},
               "clotho_captions_evaluation.csv": {"": "test"}},
    "esc50": {"esc50.csv": {"4": "validation", "5": "test"}},
    "fsd50k": {"dev.csv": {"val": "validation"}, "eval.csv": {"": "test"}},
    "urbansound8k": {"UrbanSound8K.csv": {"9": "validation", "10": "test"}}}
SOUND = ("youtube_id", "file_name", "filename", "fname", "slice_file_name")     # their columns
CLASS = ("category", "class", "labels")
WORDINGS = ("{}", "the sound of {}", "a recording of {}")       # of the name of a class


def captions_of(row: dict, i: int) -> list[str]:
    """All captions of a row, or one made of its class, of several classes the first: it is exact"""
    label = text_in(row, CLASS).partition(",")[0].replace("_", " ").lower()
    if label:
        return [WORDINGS[i % 3].format(label)]
    return [text for name, text in row.items() if name.startswith("caption")]


def write_manifest(name: str, folder: Path, out: Path) -> tuple[int, list[str]]:
    """Write audio_path,caption,split of one of PUBLISHED -> number of rows, names of lost sounds.

    Raises InputError where all tables or all sounds are missing.
    """
    tables, sounds = [], {}
    for file in walk(folder):
        stem = clean_text(file.stem)
        if file.name in PUBLISHED[name]:
            tables.append(file)
        elif file.suffix.lower() in AUDIO and file.exists() and file.stat().st_size > 0:
            known_as = (stem[:11], stem[1:12]) if name == "audiocaps" else (stem,)
            sounds.update(dict.fromkeys(known_as, file))
    found, missing = [], []
    for table in tables:
        splits = PUBLISHED[name][table.name]
        for i, row in enumerate(read_csv(table)):
            sound = clean_text(Path(text_in(row, SOUND)).stem)
            if sound not in sounds:
                missing.append(sound)
                continue
            path = os.path.relpath(sounds[sound], out.parent)
            split = splits.get(text_in(row, ("fold", "split")), "train")
            found += [(path, caption, split) for caption in captions_of(row, i)]
    if not found:
        raise InputError(f"{folder}: holds no {' or '.join(PUBLISHED[name])} with sounds beside it "
                         f"({', '.join(AUDIO)})")
    write_csv(out, [("audio_path", "caption", "split"), *found])
    return len(found), sorted(set(missing))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PUBLISHED)
    parser.add_argument("folder", type=os.path.expanduser, help="of the data set")
    parser.add_argument("--out", type=os.path.expanduser, required=True, help="manifest to write")
    args = parser.parse_args()
    with one_line_errors("data.datasets"):
        count, lost = write_manifest(args.name, Path(args.folder), Path(args.out))
        print(f"{args.out}: {count} rows; {len(lost)} sounds missing: {' '.join(lost[:10])}")
