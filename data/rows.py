"""What a manifest, or a folder of sounds, says: a row for each clip, a sentence for each bad one.

A manifest is a CSV (or JSON lines) with audio_path (relative to it), caption and, if you like,
split. A folder may hold tables under the names and with the columns in which data sets are
published: audiofolder of Hugging Face, AudioCaps, Clotho, ESC-50, FSD50K, UrbanSound8K.
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

AUDIO = (".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2",
         ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".voc", ".sph")   # soundfile reads these
TOLD = (".txt", ".json", ".jsonl", ".csv")          # and these may tell their captions
PATHS = ("audio_path", "file_name", "filename", "fname", "slice_file_name", "youtube_id")
CAPTIONS = ("caption", "prompt", "text", "transcription", "caption_1")
MORE_CAPTIONS = ("caption_2", "caption_3", "caption_4", "caption_5")
CLASSES = ("category", "class", "labels")
WORDINGS = ("{}", "the sound of {}", "a recording of {}")       # of the name of a class
TABLES = re.compile(r"(metadata|train|val|test|dev|eval|clotho_captions_\w+|esc50|UrbanSound8K)"
                    r"\.(csv|jsonl)")
FOLDS = {"esc50.csv": {"4": "validation", "5": "test"},         # the others are for training
         "UrbanSound8K.csv": {"9": "validation", "10": "test"}}
YOUTUBE = re.compile(r"Y?([\w-]{11})(?![A-Za-z0-9])")           # an id, at the beginning of a name
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
    """The text that JSON or a row holds: itself, the first of a list, or that under a name."""
    if isinstance(held, dict):
        held = next(filter(None, map(held.get, names)), "")
    if isinstance(held, list):
        held = held[0] if held else ""
    return held if isinstance(held, str) else ""


def read_csv(path: Path) -> list[dict]:
    """Rows of a CSV, each with its "line"; with "surplus" fields, where a caption has commas.

    Any separator will do, and upper case in the names of columns. A caption that stands last may
    have commas without quotes. Raises InputError where the file is no CSV.
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
            if end > line and "".join(lines[line - 1:end]).count('"') % 2:
                raise csv.Error(f"a quote is left open in line {line}")
            if columns[-1] in CAPTIONS:
                rest = fields[len(columns) - 1:]
                fields[len(columns) - 1:] = [separator.join(rest).rstrip(separator)]
            if any(fields):
                surplus = any(fields[len(columns):])
                rows.append({**dict(zip(columns, fields)), "line": line, "surplus": surplus})
    except csv.Error as e:
        raise InputError(f"{path}: not a CSV ({e})") from e
    return rows


def read_json_lines(path: Path) -> list[dict]:
    """Rows of a file with a JSON object in each line. Raises InputError for another."""
    lines = read_text(path).rstrip().split("\n")
    try:
        return [{**json.loads(line), "line": n} for n, line in enumerate(lines, 1)]
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: not a JSON object in each line ({e})") from e


def find(folder: Path, name: str, sounds: dict[str, Path]) -> Path:
    """The file that a table calls `name`, be it as a Mac or Windows writes it, or with spaces.

    What does not lie in `folder` is looked for in sounds, which are known by their names alone.
    """
    bare = os.path.expanduser(name.strip().replace("\\", "/"))
    for spelling in (name, unicodedata.normalize("NFC", bare), unicodedata.normalize("NFD", bare)):
        if os.path.exists(folder / spelling):
            return folder / spelling
    return sounds.get(clean_text(Path(bare).stem), folder / bare)


def captions_in(row: dict, i: int) -> list[str]:
    """All captions of row i, or one made of its class, of several the first: it is exact."""
    texts = [text_in(row)]
    texts += [text_in(row, (name,)) for name in MORE_CAPTIONS]
    label = text_in(row, CLASSES).partition(",")[0]
    if label and not any(texts):
        texts = [WORDINGS[i % 3].format(label.replace("_", " ").lower())]
    return list(filter(None, map(clean_text, texts)))


def read_manifest(path: Path, sounds: dict = {}, other: str = "") -> tuple[list[dict], list[str]]:
    """Rows with audio_path made good, caption and split: "train", "validation" or "test".

    Also a sentence for each line that cannot be used. `other` is the split where none is named.
    Raises InputError where there is no such file, it is no table, or a split has an unknown name.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such manifest or folder; --data takes a folder of sounds or "
                         "a CSV with the columns audio_path,caption")
    rows, problems = [], []
    table = read_json_lines(path) if path.suffix.lower() == ".jsonl" else read_csv(path)
    for i, row in enumerate(table):
        place = f"{path}, line {row['line']}"
        file = text_in(row, PATHS)
        captions = captions_in(row, i)
        split = text_in(row, ("split",)).strip().lower() or other
        if row.get("surplus"):
            problems.append(f"{place}: too many fields; a caption with commas needs quotes")
        elif not file.strip() or not captions:
            missing = "caption" if file.strip() else "audio_path"
            problems.append(f"{place}: no {missing}; the first line must name the columns")
        elif split not in SPLITS:
            raise InputError(f"{place}: unknown split {split[:40]!r}; known are "
                             f"{', '.join(filter(None, SPLITS))}")
        else:
            audio = find(path.parent, file, sounds)
            words = text_in(row).split(",")
            for n in range(1, len(words)):          # commas without quotes may be in the name
                longer = find(path.parent, ",".join([file, *words[:n]]), {})
                if os.path.exists(longer) and not os.path.exists(audio):
                    audio = longer
                    captions = [clean_text(",".join(words[n:]))]
            row["audio_path"] = str(audio)
            row["split"] = FOLDS.get(path.name, {}).get(text_in(row, ("fold",)), SPLITS[split])
            rows += [{**row, "caption": caption} for caption in captions]
    return rows, problems


def walk(folder: Path) -> list[Path]:
    """Every file below a folder, sorted: links are followed, hidden folders and files are not."""
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=print):
        place = os.path.realpath(root)
        new = place not in seen                     # else a link led back, or here once more
        seen.add(place)
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        files += [Path(root, name) for name in names if new and not name.startswith(".")]
    return sorted(files)


def by_name(files: list[Path]) -> dict[str, Path]:
    """Sounds by their names without ending, and by the YouTube ids that these begin with."""
    sounds = {}
    for file in files:
        if file.suffix.lower() in AUDIO and file.exists() and file.stat().st_size > 0:
            name = clean_text(file.stem)
            sounds[name] = file
            if youtube := YOUTUBE.match(name):
                sounds.setdefault(youtube[1], file)
    return sounds


def read_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for every sound below a folder, sorted, and a sentence for each without a caption.

    What lies in a first folder called test, validation ... is that split. Where there are tables,
    they say what is used, as far as it is there: AudioCaps never is whole. The rest is counted.
    """
    files = walk(folder)
    tables = [file for file in files if TABLES.fullmatch(file.name)]
    sounds = by_name(files) if tables else {}
    rows, problems = [], []
    for file in tables or files:
        split = SPLITS.get(file.relative_to(folder).parts[0].lower(), "train")
        if tables:
            split = SPLITS.get(file.stem.split("_")[-1], split)
            known = {} if file.stem == "metadata" else sounds      # that one has paths, not names
            listed, bad = read_manifest(file, known, split)
            rows += listed
            problems += bad
        elif file.suffix.lower() in AUDIO:
            try:
                caption = caption_beside(file, folder)
                rows.append({"audio_path": str(file), "caption": caption, "split": split})
            except (ValueError, OSError, RecursionError) as e:
                problems.append(f"{file}: has no caption ({e})")
    there = [row for row in rows if os.path.exists(row["audio_path"])]
    endings = Counter(file.suffix.lower() or "without ending" for file in files)
    left = [f"{n} {ending}" for ending, n in endings.most_common() if ending not in AUDIO + TOLD]
    if len(there) < len(rows):
        print(f"{folder}: {len(rows) - len(there):,} of {len(rows):,} rows have no sound")
    if left:
        print(f"{folder}: left out: {', '.join(left)} (for sounds: ffmpeg -i in.m4a out.wav)")
    return sorted(there, key=lambda row: row["audio_path"]), problems


def caption_beside(file: Path, folder: Path) -> str:
    """The caption in name.txt or name.json, else the words of the file's name or of its folders'.

    Raises ValueError where there are none.
    """
    text, notes = file.with_suffix(".txt"), file.with_suffix(".json")
    names = [folder.absolute().name, *file.relative_to(folder).with_suffix("").parts]
    told = [words_in(name) for name in names if name.lower() not in SPLITS]
    caption = next(filter(None, reversed(told)), "")
    if text.exists():
        caption = clean_text(read_text(text))
    elif notes.exists():
        caption = clean_text(text_in(json.loads(read_text(notes))))
    if not caption:
        raise ValueError("no words in the file beside it, or in its name")
    return caption


def words_in(name: str) -> str:
    """The words of a file's name, in lower case: "124101__user__BigCrash-2" -> "big crash"."""
    name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xdc00), name)
    name = re.sub(r"^\d+__.+?__", "", name)         # Freesound: number, user, title
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[\d\s_.+#()\[\]{}-]+", " ", clean_text(name)).split()).lower()


def doubts(captions: list[str]) -> list[str]:
    """Warnings for a set in which many captions are the same, or most are no words."""
    total = len(captions)
    caption, most = Counter(captions).most_common(1)[0]
    wordless = sum(not WORD.search(caption) for caption in captions)
    said = []
    if most > max(1, total / 5):
        said.append(f"warning: {most:,} of {total:,} clips are called {caption!r}")
    if wordless > total / 2:
        said.append(f"warning: {wordless:,} of {total:,} captions hold no word")
    return [f"{line}: is there a table of captions?" for line in said]
