"""What a manifest, or a folder of sounds, says: a row for each clip, a sentence for each bad one.

A manifest is a CSV (or JSON lines) with audio_path (relative to it), caption and, if you like,
split. Hugging Face's names are known too: file_name, and text or transcription.
"""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from flashaudio import InputError, clean_text
from runs.cache import write_atomically

AUDIO = (".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2",
         ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".voc", ".sph")   # soundfile reads these
TOLD = (".txt", ".json", ".jsonl", ".csv")          # and these may tell their captions
PATHS = ("audio_path", "file_name")                 # names of columns
CAPTIONS = ("caption", "prompt", "text", "transcription")
MOST_BREAKS = 10                                    # in a caption; more were swallowed by a quote
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
    except UnicodeError as e:
        raise InputError(f"{path}: not a text in UTF-8 ({e})") from e
    return text.replace("\0", " ")                  # which some versions of csv refuse


def text_in(held: object, names: tuple[str, ...] = CAPTIONS) -> str:
    """The text in a row or in JSON: itself, the first of a list, or that of the first known name.

    "" where there is none.
    """
    if isinstance(held, dict):
        held = next(filter(None, map(held.get, names)), "")
    if isinstance(held, list):
        held = held[0] if held else ""
    return held if isinstance(held, str) else ""


def read_csv(path: Path) -> list[dict]:
    """Rows of a CSV, each with its "line", and with the fields that it has too many in "surplus".

    The header says whether a comma, a semicolon or a tab separates, and names the columns in any
    case. Commas without quotes are part of a caption that stands last. Raises InputError where the
    file is no CSV.
    """
    lines = list(io.StringIO(read_text(path), newline=None)) or [""]
    separator = max(",;\t", key=lines[0].count)
    lines[0] = lines[0].rstrip(f"{separator}\n ")   # spreadsheets fill up with separators
    reader = csv.reader(lines, delimiter=separator)
    rows = []
    try:
        columns = [name.strip().lower() for name in next(reader)] or [""]
        end = reader.line_num
        for fields in reader:
            line = end + 1
            end = reader.line_num
            odd = "".join(lines[line - 1:end]).count('"') % 2 == 1
            if end - line > MOST_BREAKS or end > line and odd:
                raise csv.Error(f"a quote is left open in line {line}")
            if columns[-1] in CAPTIONS:
                rest = fields[len(columns) - 1:]
                fields[len(columns) - 1:] = [separator.join(rest).rstrip(separator)]
            if any(fields):
                row = dict(zip(columns, fields))
                rows.append({**row, "line": line, "surplus": "".join(fields[len(columns):])})
    except csv.Error as e:
        raise InputError(f"{path}: not a CSV ({e})") from e
    return rows


def write_csv(path: Path, lines: list[tuple]) -> None:
    """Write a table whose first line names the columns; an interrupted one is not seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    csv.writer(table).writerows(lines)
    write_atomically(path, table.getvalue().encode())


def read_json_lines(path: Path) -> list[dict]:
    """Rows of a file with a JSON object in each line. Raises InputError for another."""
    lines = read_text(path).rstrip().split("\n")
    try:
        return [{**json.loads(line), "line": n} for n, line in enumerate(lines, 1)]
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: not a JSON object in each line ({e})") from e


def find(folder: Path, name: str) -> Path:
    """The file that a table calls `name`, be it as a Mac or Windows writes it, or with spaces."""
    bare = os.path.expanduser(name.strip().replace("\\", "/"))
    forms = [unicodedata.normalize(form, bare) for form in ("NFC", "NFD")]
    there = [spelling for spelling in (name, bare, *forms) if os.path.exists(folder / spelling)]
    return folder / (there[0] if there else bare)


def read_manifest(path: Path) -> tuple[list[dict], list[str]]:
    """Rows with audio_path made good, caption and split: "train", "validation" or "test".

    Also a sentence for each line that cannot be used. Raises InputError where there is no such
    file, it is no CSV, a column is missing, or a split has an unknown name.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such manifest or folder; --data takes a folder of sounds or "
                         "a CSV with the columns audio_path,caption")
    rows, problems = [], []
    for row in read_json_lines(path) if path.suffix.lower() == ".jsonl" else read_csv(path):
        place = f"{path}, line {row['line']}"
        file = text_in(row, PATHS)
        caption = clean_text(text_in(row))
        split = str(row.get("split", "")).strip().lower()
        if row.get("surplus"):
            problems.append(f"{place}: too many fields; a caption with commas needs quotes")
        elif not file.strip() or not caption:
            problems.append(f"{place}: no {'caption' if file.strip() else 'audio_path'} in columns "
                            f"{', '.join(row)[:200]}")
        elif split not in SPLITS:
            raise InputError(f"{place}: unknown split {split[:40]!r}; known are "
                             f"{', '.join(filter(None, SPLITS))}")
        else:
            rows.append({**row, "audio_path": str(find(path.parent, file)), "caption": caption,
                         "split": SPLITS[split]})
    return rows, problems


def walk(folder: Path) -> list[Path]:
    """Every file below a folder, sorted: links are followed, hidden folders and files are not."""
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=print):
        place = os.path.realpath(root)
        if place in seen:                           # a link led back, or here a second time
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(files)


def read_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for every sound below a folder, sorted, and a sentence for each without a caption.

    What lies in a first folder called test, validation ... is that split. A metadata.csv or
    metadata.jsonl is a manifest; other sounds have their captions beside them or in their names.
    """
    files = walk(folder)
    rows, problems = [], []
    for table in files:
        if table.name in ("metadata.csv", "metadata.jsonl"):
            listed, bad = read_manifest(table)
            rows += listed
            problems += bad
    named = {row["audio_path"] for row in rows}
    for file in files:
        if file.suffix.lower() in AUDIO and str(file) not in named:
            try:
                rows.append({"audio_path": str(file), "caption": caption_beside(file, folder)})
            except (ValueError, OSError, RecursionError) as e:
                problems.append(f"{file}: has no caption ({e})")
    for row in rows:
        first = os.path.relpath(row["audio_path"], folder).split(os.sep)[0].lower()
        row["split"] = SPLITS.get(first) or row.get("split", "train")
    return sorted(rows, key=lambda row: row["audio_path"]), problems


def left_out(folder: Path) -> str:
    """What lies in a folder and is not read, counted by ending; "" where there is nothing."""
    endings = Counter(file.suffix.lower() or "without ending" for file in walk(folder))
    left = [f"{n} {ending}" for ending, n in endings.most_common() if ending not in AUDIO + TOLD]
    hint = " (if these are sounds: ffmpeg -i in.m4a out.wav)"
    return f"; left out: {', '.join(left)}{hint}" if left else ""


def caption_beside(file: Path, folder: Path) -> str:
    """The caption in name.txt or name.json, else the words of the file's name or of its folders'.

    Raises ValueError where there are none, or one of a file that is not as it should be.
    """
    text, notes = file.with_suffix(".txt"), file.with_suffix(".json")
    if text.exists():
        caption = read_text(text)
    elif notes.exists():
        caption = text_in(json.loads(read_text(notes)))
    else:
        names = [folder.absolute().name, *file.relative_to(folder).with_suffix("").parts]
        told = [words_in(name) for name in names if name.lower() not in SPLITS]
        caption = next(filter(None, reversed(told)), "")
    if not clean_text(caption):
        raise ValueError("no words in the file beside it, or in its name")
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
        said.append(f"{len(wordless):,} captions hold no word, as {wordless[0]!r}")
    return [f"warning: {line}: is there a table of captions?" for line in said]
