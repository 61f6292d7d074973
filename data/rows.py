"""What a manifest, or a folder of sounds, says: a row for each clip, a sentence for each bad one.

A manifest is a CSV (or JSON lines) with audio_path (relative to it), caption and, if you like,
split. Hugging Face's names are known too: file_name, and text or transcription.
"""

import codecs
import csv
import json
import os
import re
import unicodedata
from collections import Counter
from itertools import product
from pathlib import Path

from flashaudio import InputError, clean_text

AUDIO = (".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2",
         ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".voc", ".sph")   # soundfile reads these
TOLD = (".txt", ".json", ".jsonl", ".csv")          # and these may tell their captions
CAPTION = ("caption", "prompt", "text", "transcription")    # in JSON
ALIASES = {"file_name": "audio_path", "text": "caption", "transcription": "caption"}
MOST_LINES = 10                                     # in a caption; more are swallowed by a quote
WORD = re.compile(r"[^\W\d_]{3}|[^\W\d_\x00-\x7f]")     # three letters, or one that is not Latin
SPLITS = {  # what people write, in any case, and what it is here
    "": "train", "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark. Raises InputError for another."""
    raw = path.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
        if "\0" in text:                            # a letter to some versions of csv
            raise UnicodeError("it holds NUL")
    except UnicodeError as e:
        raise InputError(f"{path}: not a text in UTF-8 ({e})") from e
    return text


def read_table(path: Path, needed: tuple[str, ...]) -> tuple[list[dict], list[str]]:
    """Rows of a CSV, each with its "line", and a sentence for each line that cannot be used.

    The header says whether a comma, a semicolon or a tab separates, and names the columns in any
    case. Raises InputError where the file is no CSV or a needed column is missing.
    """
    rows, problems = [], []
    try:
        text = read_text(path)
        separator = max(",;\t", key=text.partition("\n")[0].count)
        lines = [f"{line}\n" for line in re.split("\r\n?|\n", text.rstrip())]
        reader = csv.reader(lines, delimiter=separator)
        columns = [name.strip().lower() for name in next(reader)]
        while columns and not columns[-1]:          # spreadsheets fill up with separators
            columns.pop()
        columns = [name if ALIASES.get(name, name) in columns else ALIASES[name]
                   for name in columns]
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
            taken = lines[start - 1:end]            # several, where line breaks stand in quotes
            left_open = "".join(taken).count('"') % 2 == 1
            if len(taken) > MOST_LINES or len(taken) > 1 and left_open:
                problems += [f"{path}, line {n}: in a field with line breaks; is a quote left "
                             f"open in line {start}?" for n in range(start, end + 1)]
            elif len(fields) > len(columns) and columns[last] != "caption":
                problems.append(f"{path}, line {start}: {len(fields)} fields for {len(columns)} "
                                "columns; a caption with commas needs quotes around it")
            else:
                fields = [*fields[:last], separator.join(fields[last:])]  # commas without quotes
                fields += [""] * (len(columns) - len(fields))
                rows.append({**dict(zip(columns, fields)), "line": start})
    except csv.Error as e:
        raise InputError(f"{path}: not a CSV ({e})") from e
    return rows, problems


def read_json_lines(path: Path) -> tuple[list[dict], list[str]]:
    """Rows of a file with a JSON object in each line, and a sentence for each other line."""
    rows, problems = [], []
    for n, line in enumerate(read_text(path).rstrip().split("\n"), 1):
        try:
            held = json.loads(line)
            rows.append({"audio_path": str(held.get("file_name", held.get("audio_path", ""))),
                         "caption": caption_in(held), "split": held.get("split", ""), "line": n})
        except (ValueError, AttributeError) as e:
            problems.append(f"{path}, line {n}: {e}")
    return rows, problems


def find(folder: Path, name: str) -> Path:
    """The file that a table calls `name`, be it as a Mac or Windows writes it, or with spaces."""
    bare = name.strip()
    spellings = (name, bare, bare.replace("\\", "/"), os.path.expanduser(bare))
    for spelling, form in product(spellings, ("NFC", "NFD")):
        file = folder / unicodedata.normalize(form, spelling)
        if os.path.exists(file):
            return file
    return folder / bare


def read_manifest(path: Path) -> tuple[list[dict], list[str]]:
    """Rows with audio_path made good, caption and split: "train", "validation" or "test".

    Also a sentence for each line that cannot be used. Raises InputError where there is no such
    file, it is no CSV, a column is missing, or a split has an unknown name.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such manifest or folder; --data takes a folder of sounds or "
                         "a CSV with the columns audio_path,caption")
    if path.suffix.lower() == ".jsonl":
        table, problems = read_json_lines(path)
    else:
        table, problems = read_table(path, ("audio_path", "caption"))
    rows = []
    for row in table:
        split = str(row.get("split", "")).strip()
        if split.lower() not in SPLITS:
            raise InputError(f"{path}, line {row['line']}: unknown split {split[:40]!r}; known are "
                             f"{', '.join(filter(None, SPLITS))}")
        empty = [name for name in ("audio_path", "caption") if not clean_text(row[name])]
        if empty:
            problems.append(f"{path}, line {row['line']}: {' and '.join(empty)} is empty")
            continue
        words = row["caption"].split(",")           # commas without quotes may be in the name
        files = [find(path.parent, ",".join([row["audio_path"], *words[:n]]))
                 for n in range(len(words))]
        there = [n for n, file in enumerate(files) if os.path.exists(file)] or [0]
        row["audio_path"] = str(files[there[0]])
        row["caption"] = clean_text(",".join(words[there[0]:]))
        row["split"] = SPLITS[split.lower()]
        rows.append(row)
    return rows, problems


def walk(folder: Path) -> list[Path]:
    """Every file below a folder, sorted: links are followed, hidden folders and files are not."""
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=print):
        place = os.path.realpath(root)
        if place in seen:                           # a link led back, or here a second time
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(root, name) for name in names if not name.startswith(".")]
        seen.add(place)
    return sorted(files)


def read_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for every sound below a folder, sorted, and a sentence for each without a caption.

    What lies in a first folder called test, validation ... is that split, the rest is for training.
    A metadata.csv or metadata.jsonl is a manifest of sounds below it.
    """
    files = walk(folder)
    rows, problems, told = [], [], {}
    for table in files:
        if table.name in ("metadata.csv", "metadata.jsonl"):
            listed, bad = read_manifest(table)
            told.update((row["audio_path"], row["caption"]) for row in listed)
            problems += bad
    for file in files:
        if file.suffix.lower() not in AUDIO:
            continue
        folders = file.relative_to(folder).parts[:-1]
        split = SPLITS.get(folders[0].lower(), "") if folders else ""
        names = [file.stem, *reversed(folders[1:] if split else folders), folder.absolute().name]
        try:
            caption = told.pop(str(file), "") or caption_beside(file, names)
            rows.append({"audio_path": str(file), "caption": caption, "split": split or "train"})
        except (ValueError, OSError, RecursionError) as e:
            problems.append(f"{file}: has no caption ({e})")
    problems += [f"{file}: in its metadata, and not there" for file in told]
    return rows, problems


def left_out(folder: Path) -> str:
    """What lies in a folder and is not read, counted by ending; "" where there is nothing."""
    endings = Counter(file.suffix.lower() or "without ending" for file in walk(folder))
    left = [f"{n} {ending}" for ending, n in endings.most_common() if ending not in AUDIO + TOLD]
    hint = " (if these are sounds: ffmpeg -i in.m4a out.wav)"
    return f"; left out: {', '.join(left)}{hint}" if left else ""


def caption_in(held: object) -> str:
    """The caption in what JSON holds: a text, the first of a list, or of one under a known name.

    Raises ValueError where there is none.
    """
    if isinstance(held, dict):
        held = next(filter(None, map(held.get, CAPTION)), None)
    if isinstance(held, list):
        held = held[0] if held else None
    if not isinstance(held, str):
        raise ValueError(f"holds no text under {', '.join(CAPTION)}")
    return held


def caption_beside(file: Path, names: list[str]) -> str:
    """The caption in name.txt or name.json, else the words of the first of `names` that has some.

    Raises ValueError where there are none, or one of a file that is not as it should be.
    """
    text, notes = file.with_suffix(".txt"), file.with_suffix(".json")
    if text.exists():
        caption = " ".join(read_text(text).split())
    elif notes.exists():
        caption = caption_in(json.loads(read_text(notes)))
    else:
        caption = next(filter(None, map(words_in, names)), "")
    if not clean_text(caption):
        raise ValueError("no words in its text file or name")
    return clean_text(caption)


def words_in(name: str) -> str:
    """The words of a file's name, in lower case: "124101__user__BigCrash-2" -> "big crash"."""
    name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xdc00), name)
    name = re.sub(r"^\d+__.+?__", "", name)         # Freesound: number, user, title
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[\d\s_.+#()\[\]{}-]+", " ", clean_text(name)).split()).lower()


def doubts(captions: list[str]) -> list[str]:
    """What is odd about the captions of a set, in lines."""
    caption, most = Counter(captions).most_common(1)[0]
    wordless = [caption for caption in captions if not WORD.search(caption)]
    said = []
    if most > max(1, len(captions) / 5):
        said.append(f"{most:,} of {len(captions):,} clips are called {caption!r}")
    if len(wordless) > len(captions) / 2:
        said.append(f"{len(wordless):,} of {len(captions):,} captions hold no word "
                    f"({wordless[0]!r})")
    return [f"warning: {line}: is there a table of captions?" for line in said]
