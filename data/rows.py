"""What a manifest, or a folder of sounds, says: a row for each clip, a sentence for each bad one.

A manifest is a CSV with the columns audio_path (relative to it), caption and, if you like, split.
"""

import codecs
import csv
import io
import json
import os
import re
from pathlib import Path

from flashaudio import InputError

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")  # what is looked for
CONTROL = r"[\x00-\x1f\x7f-\x9f]"          # tabs and the like: no text to a model
SPLITS = {  # what people write, in any case, and what it is here
    "": "train", "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark. Raises UnicodeError for another."""
    raw = path.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8-sig")


def read_table(path: Path, needed: tuple[str, ...]) -> tuple[list[dict], list[str]]:
    """Rows of a CSV, each with its "line", and a sentence for each line that cannot be used.

    The header says whether a comma, a semicolon or a tab separates, and names the columns in any
    case. Raises InputError where the file is no CSV or a needed column is missing.
    """
    rows, problems = [], []
    try:
        text = read_text(path)
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        columns = [name.strip().lower() for name in next(reader, [])]
        while columns and not columns[-1]:      # spreadsheets fill up with separators
            columns.pop()
        missing = [name for name in needed if name not in columns]
        if missing:
            found = ", ".join(columns)[:200] or "nothing"
            raise InputError(f"{path}: no column {' and '.join(missing)}: the first line must "
                             f"name the columns, and names {found!r}")
        last = len(columns) - 1
        end = reader.line_num
        for fields in reader:
            start = end + 1
            end = reader.line_num
            while fields and not fields[-1].strip():
                fields.pop()
            if not fields:
                continue
            if end > start:                     # every line that was swallowed is a clip less
                problems += [f"{path}, line {n}: in a field with line breaks; is a quote left "
                             f"open in line {start}?" for n in range(start, end + 1)]
            elif len(fields) > len(columns) and columns[last] != "caption":
                problems.append(f"{path}, line {start}: {len(fields)} fields for {len(columns)} "
                                "columns; a caption with commas needs quotes around it")
            else:
                fields = [*fields[:last], separator.join(fields[last:])]  # commas without quotes
                fields += [""] * (len(columns) - len(fields))
                row = {name: field.strip() for name, field in zip(columns, fields)}
                rows.append({**row, "line": start})
    except (UnicodeError, csv.Error) as e:
        raise InputError(f"{path}: not a CSV in UTF-8 ({e})") from e
    return rows, problems


def read_manifest(path: Path) -> tuple[list[dict], list[str]]:
    """Rows with audio_path made good, caption and split: "train", "validation" or "test".

    Also a sentence for each line that cannot be used. Raises InputError where there is no such
    file, it is no CSV, a column is missing, or a split has an unknown name.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such manifest or folder; --data takes a folder of sounds or "
                         "a CSV with the columns audio_path,caption")
    table, problems = read_table(path, ("audio_path", "caption"))
    rows = []
    for row in table:
        empty = [name for name in ("audio_path", "caption") if not row[name]]
        if empty:
            problems.append(f"{path}, line {row['line']}: {' and '.join(empty)} is empty")
            continue
        split = row.get("split", "")
        if split.lower() not in SPLITS:
            raise InputError(f"{path}, line {row['line']}: unknown split {split[:40]!r}; known are "
                             f"{', '.join(filter(None, SPLITS))}")
        file = path.parent / row["audio_path"]
        if "\\" in row["audio_path"] and not os.path.exists(file):      # written on Windows
            file = path.parent / row["audio_path"].replace("\\", "/")
        caption = re.sub(CONTROL, " ", row["caption"]).strip()
        rows.append({**row, "audio_path": str(file), "caption": caption,
                     "split": SPLITS[split.lower()]})
    return rows, problems


def read_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for every sound below a folder, sorted, and a sentence for each without a caption.

    What lies in a first folder called test, validation ... is that split, the rest is for training.
    """
    rows, problems = [], []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in AUDIO or file.name.startswith("."):
            continue
        folders = file.relative_to(folder).parts[:-1]
        split = SPLITS.get(folders[0].lower(), "train") if folders else "train"
        try:
            caption = caption_beside(file, [folder.resolve().name, *folders])
            rows.append({"audio_path": str(file), "caption": caption, "split": split})
        except (ValueError, OSError, RecursionError) as e:
            problems.append(f"{file}: has no caption ({e})")
    return rows, problems


def caption_beside(file: Path, folders: list[str]) -> str:
    """The caption in name.txt or name.json, else the words of the file's name, else a folder's.

    Raises ValueError where there are none, or one of a file that is not as it should be.
    """
    text, notes = file.with_suffix(".txt"), file.with_suffix(".json")
    if text.exists():
        caption = read_text(text)
    elif notes.exists():
        held = json.loads(read_text(notes))
        caption = next((held[key] for key in ("caption", "prompt", "text") if key in held), None)
        if not isinstance(caption, str):
            raise ValueError(f"{notes.name} holds no text under caption, prompt or text")
    else:
        names = [re.sub(r"[\d\s_.+#()\[\]{}-]+", " ", name) for name in (*folders, file.stem)]
        caption = next((name for name in reversed(names) if name.strip()), "")
    words = " ".join(re.sub(CONTROL, " ", caption).split())
    if not words:
        raise ValueError("no words in its text file or name")
    return words
