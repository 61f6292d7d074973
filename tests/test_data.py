"""What people bring: audio files, manifests, folders, published data sets."""

import csv
import math
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from data import datasets
from data.clips import Clips, load_audio
from data.rows import read_folder, read_manifest
from flashaudio import InputError
from tests.helpers import ROOT, run, tone, write_clips

CASES = ROOT.parent / "shared" / "cases"
CASE_FILES = sorted(path.name for path in CASES.glob("*.wav"))
HEADER = "audio_path,caption,split\n"


# ---- Audio files --------------------------------------------------------------------------------

KINDS = [("wav", "PCM_U8", 1e-2), ("wav", "PCM_16", 1e-4), ("wav", "PCM_24", 1e-6),
         ("wav", "PCM_32", 1e-6), ("wav", "FLOAT", 1e-6), ("wav", "DOUBLE", 1e-6),
         ("wav", "ULAW", 2e-2), ("wav", "ALAW", 2e-2), ("wav", "IMA_ADPCM", 2e-2),
         ("WAV", "PCM_16", 1e-4), ("flac", "PCM_16", 1e-4), ("aiff", "PCM_16", 1e-4),
         ("ogg", "VORBIS", 5e-2), ("mp3", "MPEG_LAYER_III", 5e-2)]


@pytest.mark.parametrize("ending, subtype, tolerance", KINDS)
def test_every_kind_of_file_is_read_by_its_content(tmp_path, ending, subtype, tolerance):
    soundfile.write(tmp_path / f"x.{ending}", tone(), 16000, subtype)
    shutil.copy(tmp_path / f"x.{ending}", tmp_path / "named.wav")
    wav = load_audio(tmp_path / "named.wav", 16000)
    assert torch.equal(wav, load_audio(tmp_path / f"x.{ending}", 16000))
    assert (wav - torch.from_numpy(tone()))[800:-800].abs().max() < tolerance


def test_sixteen_bits_are_read_to_the_bit_and_channels_are_averaged(tmp_path):
    pcm = np.random.default_rng(0).integers(-2 ** 15, 2 ** 15, (5000, 6)).astype(np.int16)
    wavfile.write(tmp_path / "one.wav", 16000, pcm[:, 0])
    assert np.array_equal(load_audio(tmp_path / "one.wav"), pcm[:, 0].astype(np.float32) / 32768)
    wavfile.write(tmp_path / "six.wav", 16000, pcm)
    assert np.abs(load_audio(tmp_path / "six.wav").numpy() - pcm.mean(1) / 32768).max() < 1e-6


def test_resampled_repeated_and_cut(tmp_path):
    wavfile.write(tmp_path / "x.wav", 44100, tone(44100, 44100).astype(np.float32))
    wav = load_audio(tmp_path / "x.wav")
    assert len(wav) == 16000 and (wav - torch.from_numpy(tone()))[200:-200].abs().max() < 2e-3
    long = load_audio(tmp_path / "x.wav", 40000)
    assert torch.equal(long, torch.cat([wav, wav, wav])[:40000])
    assert torch.equal(load_audio(tmp_path / "x.wav", 100), wav[:100])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000, 191_999])
def test_every_rate_is_resampled(tmp_path, rate):
    wavfile.write(tmp_path / "a.wav", rate, tone(rate, rate).astype(np.float32))
    wav = load_audio(tmp_path / "a.wav", 8000)
    assert (wav - torch.from_numpy(tone(8000)))[200:].abs().max() < 2e-3


def test_of_a_long_recording_only_the_part_that_is_used_is_read(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.flac", tone(48000 * 60, 48000), 48000)
    read, real = [], soundfile.SoundFile.read

    def spy(self, *args, **more):
        read.append(real(self, *args, **more))
        return read[-1]

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    assert len(load_audio(tmp_path / "long.flac", 16000)) == 16000
    assert len(read[0]) <= 1.1 * 48000 + 1
    assert len(load_audio(tmp_path / "long.flac", 16000, 50 * 16000)) == 16000
    assert len(read[1]) <= 2.2 * 48000 + 1


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3", "WAV"])
def test_a_part_of_any_kind_of_file_is_what_is_there_in_the_whole(tmp_path, ending):
    chirp = np.sin(2 * np.pi * 200 * np.arange(6 * 44100) ** 1.1 / 44100) / 2
    soundfile.write(tmp_path / f"x.{ending}", chirp, 44100)
    whole = load_audio(tmp_path / f"x.{ending}")
    for start in (0, 20_000, 50_001):
        part = load_audio(tmp_path / f"x.{ending}", 16000, start)
        assert (part - whole[start:start + 16000]).abs().max() < 1e-3


def test_a_full_scale_square_stays_within_full_scale_after_resampling(tmp_path):
    square = np.sign(np.sin(2 * np.pi * 100 * np.arange(44100) / 44100 + 0.1))
    wavfile.write(tmp_path / "x.wav", 44100, (32767 * square).astype(np.int16))
    wav = load_audio(tmp_path / "x.wav")
    assert wav.abs().max() == 1                     # the filter overshoots to 1.1


def test_channels_in_opposite_phase_are_not_silence(tmp_path):
    left = tone().astype(np.float32)
    wavfile.write(tmp_path / "x.wav", 16000, np.stack([left, -left], 1))
    assert torch.equal(load_audio(tmp_path / "x.wav"), torch.from_numpy(left))


@pytest.mark.parametrize("content, said", [
    (None, "no such file"), (b"", "cannot be read"), (b"RIFF", "cannot be read"),
    (b"not a wav at all", "Format not recognised"), ([], "no samples"),
    ([math.nan] * 100, "NaN"), ([1e4, -5e3] * 100, "samples up to 10000")])
def test_one_line_says_what_is_wrong_with_a_file(tmp_path, content, said):
    path = tmp_path / "bad.wav"
    if isinstance(content, list):
        wavfile.write(path, 16000, np.array(content, np.float32))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as e:
        load_audio(path)
    assert "bad.wav" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg", "aiff", "au"])
def test_a_file_that_is_cut_short_is_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    soundfile.write(path, tone(48000), 16000)
    assert len(load_audio(path, 48000)) == 48000
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 4])
    with pytest.raises(InputError, match="cut short"):
        load_audio(path, 48000)


@pytest.mark.parametrize("size", [0, 2 ** 31 - 1, 0x7FFFF000, 2 ** 32 - 1])
@pytest.mark.parametrize("riff", [0, 36, 2 ** 32 - 1])
def test_a_wav_that_was_written_to_a_pipe_is_read_to_its_end(tmp_path, riff, size):
    pcm = (32767 * tone(4000)).astype(np.int16)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    raw = b"RIFF" + struct.pack("<I", riff) + b"WAVE" + form + b"data" + struct.pack("<I", size)
    (tmp_path / "x.wav").write_bytes(raw + pcm.tobytes())
    assert np.array_equal(load_audio(tmp_path / "x.wav"), pcm.astype(np.float32) / 32768)
    assert (tmp_path / "x.wav").read_bytes() == raw + pcm.tobytes()


@pytest.mark.skipif(not CASE_FILES, reason="the cases are not here")
@pytest.mark.parametrize("name", CASE_FILES)
def test_cases_from_public_reports(name):
    if name == "float_int_range.wav":
        with pytest.raises(InputError, match="where 1 is full scale"):
            load_audio(CASES / name)
        return
    wav = load_audio(CASES / name, 4000)
    assert wav.isfinite().all() and 0.4 < wav.abs().max() <= 1
    if name in ("riff_size_zero.wav", "mulaw.wav"):
        assert (wav - load_audio(CASES / "tone.wav", 4000)).abs().max() < 2e-2


@settings(max_examples=80, deadline=None)
@given(channels=st.integers(0, 2 ** 16 - 1), rate=st.integers(0, 2 ** 32 - 1),
       bits=st.integers(0, 2 ** 16 - 1), kind=st.sampled_from([0, 1, 3, 7, 17, 65534]),
       align=st.integers(0, 2 ** 16 - 1), body=st.binary(max_size=256),
       claimed=st.sampled_from([0, 1, 64, 2 ** 31 - 1, 2 ** 32 - 1]))
def test_a_wav_header_may_lie(channels, rate, bits, kind, align, body, claimed):
    numbers = (16, kind, channels, rate, rate * align % 2 ** 32, align, bits)
    raw = b"RIFF" + struct.pack("<I", claimed) + b"WAVEfmt " + struct.pack("<IHHIIHH", *numbers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.wav"
        path.write_bytes(raw + b"data" + struct.pack("<I", claimed) + body)
        try:
            wav = load_audio(path, 4000)
        except InputError as e:
            assert "\n" not in str(e)
            return
    assert wav.shape == (4000,) and wav.dtype == torch.float32 and wav.isfinite().all()


# ---- Manifests and folders ----------------------------------------------------------------------

MANIFESTS = {  # all of them say the same
    "plain": 'audio_path,caption\na.wav,"a dog barks, rain falls"\n',
    "no quotes": "audio_path,caption\na.wav,a dog barks, rain falls\n",
    "last of three": "split,audio_path,caption\n,a.wav,a dog barks, rain falls\n",
    "semicolons": "audio_path;caption\na.wav;a dog barks, rain falls\n",
    "tabs": "audio_path\tcaption\na.wav\ta dog barks, rain falls\n",
    "header": " Audio_Path , CAPTION\na.wav , a dog barks, rain falls \n\n",
    "spreadsheet": "audio_path,caption,,\na.wav,a dog barks, rain falls,,\n,,,\n",
    "lines": "audio_path,caption\r\na.wav,a dog barks, rain falls\r\n",
    "controls": 'audio_path,caption\na.wav,"a dog\tbarks, rain falls\x07"\n'}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", MANIFESTS.values(), ids=list(MANIFESTS))
def test_ways_of_writing_a_manifest(tmp_path, text, encoding):
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    rows, problems = read_manifest(tmp_path / "m.csv")
    assert len(rows) == 1 and not problems
    assert rows[0]["caption"] == "a dog barks, rain falls" and rows[0]["split"] == "train"
    assert rows[0]["audio_path"] == str(tmp_path / "a.wav")


def test_paths_from_windows_are_found_and_further_columns_kept(tmp_path):
    write_clips(tmp_path / "wav", 1)
    (tmp_path / "m.csv").write_text("audio_path,caption,scene\nwav\\0.wav,a tone,tone:low\n")
    [row], _ = read_manifest(tmp_path / "m.csv")
    assert os.path.isfile(row["audio_path"]) and row["scene"] == "tone:low"


@pytest.mark.parametrize("split, known", [
    ("", "train"), (" Train", "train"), ("training", "train"), ("TEST", "test"), ("test ", "test"),
    ("Evaluation", "test"), ("eval", "test"), ("val", "validation"), ("VALID", "validation"),
    ("validation", "validation"), ("dev", "validation")])
def test_splits_are_known_in_any_case(tmp_path, split, known):
    (tmp_path / "m.csv").write_text(f"{HEADER}a.wav,a tone,{split}\n")
    assert read_manifest(tmp_path / "m.csv")[0][0]["split"] == known


def test_an_unknown_split_is_refused_with_those_that_are_known(tmp_path):
    (tmp_path / "m.csv").write_text(f"{HEADER}a.wav,a tone,\nb.wav,a tone,tests\n")
    with pytest.raises(InputError, match="line 3: unknown split 'tests'; known are train, .*val"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize("text, expected, said", [
    (f"{HEADER}a.wav,a dog, barking,test\nb.wav,rain,test\n", 1, ["line 2: 4 fields for 3"]),
    ('audio_path,caption\na.wav,"a tone\nb.wav,2\nc.wav,3\n', 0, ["line 2", "line 3", "line 4"]),
    ('audio_path,caption\na.wav,"a\nb.wav,"b"\nc.wav,c\n', 1, ["line 2", "left open in line 2"]),
    ("audio_path,caption\na.wav,\n,rain\nb.wav\n", 0, ["line 2: caption", "line 3: audio_path",
                                                       "line 4: caption is empty"])])
def test_rows_that_cannot_be_used_are_named(tmp_path, text, expected, said):
    (tmp_path / "m.csv").write_text(text)
    rows, problems = read_manifest(tmp_path / "m.csv")
    assert len(rows) == expected and len(problems) == len(said)
    assert all(part in problem for part, problem in zip(said, problems))


@pytest.mark.parametrize("text, said", [
    (b"path;text\na.wav;rain\n", "no column audio_path and caption.*names 'path, text'"),
    (b"", "no column"), ("audio_path,caption\na.wav,J\xfcrgen\n".encode("latin-1"), "not a CSV"),
    (b"audio_path,caption\na.wav," + b"x" * 200_000, "not a CSV")])
def test_what_is_no_manifest_is_refused(tmp_path, text, said):
    (tmp_path / "m.csv").write_bytes(text)
    with pytest.raises(InputError, match=said):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(InputError, match="no such manifest"):
        read_manifest(tmp_path / "nowhere.csv")


TABLES = st.text(max_size=200).map(lambda text: ("audio_path,caption\n" + text).encode(
    "utf-8", "surrogatepass"))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=300), TABLES))
def test_any_manifest_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.csv"
        path.write_bytes(content)
        try:
            rows, problems = read_manifest(path)
        except InputError as e:
            assert "\n" not in str(e)
            return
        for row in rows:                            # absolute paths, "..", NUL: a file, or none
            assert row["caption"].strip() and not os.path.isfile(row["audio_path"])


def test_a_folder_of_sounds_is_enough(tmp_path, capsys):
    write_clips(tmp_path / "set" / "wind", 1)
    sound = (tmp_path / "set/wind/0.wav").read_bytes()
    expected = {"a/Dog_bark-01.wav": "Dog bark", "a/told.WAV": "a told tale", "a/x.flac": "in json",
                "b/Glocken 3.wav": "Glocken", "Test/042.wav": "Test", "wind/0.wav": "wind"}
    for name in (*expected, ".hidden.wav"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(sound)
    (tmp_path / "set/a/told.txt").write_text(" a told\n tale\n")
    (tmp_path / "set/a/x.json").write_text('{"other": 1, "prompt": "in json"}')
    rows, problems = read_folder(tmp_path / "set")
    found = {str(Path(row["audio_path"]).relative_to(tmp_path / "set")): row for row in rows}
    assert {name: row["caption"] for name, row in found.items()} == expected and not problems
    assert list(found) == sorted(found) and [row["split"] for row in rows].count("test") == 1
    Clips(tmp_path / "set", tmp_path / "cache", 16)
    said = capsys.readouterr().out
    assert "told.WAV: a told tale" in said and said.count("set/") == 5
    assert "clips: 5 to train on, 0 validation, 1 test" in said
    (tmp_path / "set/a/x.json").write_text('{"caption": 3}')
    assert "x.json holds no text" in read_folder(tmp_path / "set")[1][0]


# ---- Published data sets ------------------------------------------------------------------------

def read_back(manifest: Path) -> list[tuple]:
    with open(manifest, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    return [(Path(manifest.parent, row["audio_path"]).name, row["caption"], row["split"])
            for row in rows]


def lay_out(folder: Path, *names: str, content: bytes = b"sound") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_audiocaps_finds_clips_under_their_usual_names_and_counts_the_missing(tmp_path):
    ids = ["aaaaaaaaaaa", "bbbbbbbbb-_", "_cccccccccc", "ddddddddddd", "eeeeeeeeeee", "f-fffffffff",
           "ggggggggggg", "hhhhhhhhhhh"]
    files = ["aaaaaaaaaaa_30.wav", "Ybbbbbbbbb-_.flac", "_cccccccccc_30_40.wav", "7004.mp3",
             "eeeeeeeeeee_30000_40000.wav", "f-fffffffff [30-40].ogg"]
    lay_out(tmp_path / "clips", "x/" + files[0], *files[1:], "hhhhhhhhhhh_50.wav")
    lay_out(tmp_path / "clips", "aaaaaaaaaaa_30.webm", "ggggggggggg_30.wav", content=b"")
    rows = [f"{7001 + i},{name},30,caption {i}, unquoted\n" for i, name in enumerate(ids)]
    table = "audiocap_id,youtube_id,start_time,caption\n" + "".join(rows)
    (tmp_path / "train.csv").write_text(table, encoding="utf-16")
    sources = [f"{tmp_path}/train.csv:Val"]
    found = datasets.from_youtube("audiocaps", tmp_path / "clips", sources)
    written = datasets.write_manifest(found, tmp_path / "out/manifest.csv")
    assert written == (6, ["ggggggggggg", "hhhhhhhhhhh"])   # an empty file, another second
    assert read_back(tmp_path / "out/manifest.csv") == [
        (name, f"caption {i}, unquoted", "validation") for i, name in enumerate(files)]
    (tmp_path / "music.csv").write_text("ytid,start_s,end_s,caption\naaaaaaaaaaa,30,40,a tune\n")
    done = run("-m", "data.datasets", "musiccaps", tmp_path / "clips", "--csv",
               tmp_path / "music.csv", "--out", tmp_path / "m.csv")
    assert done.returncode == 0 and "1 rows; 0 clips missing" in done.stdout
    assert read_back(tmp_path / "m.csv") == [(files[0], "a tune", "train")]
    for name, said in (("none.csv", "no such file"), ("train.csv", "no column ytid")):
        with pytest.raises(InputError, match=said):
            list(datasets.from_youtube("musiccaps", tmp_path / "clips", [str(tmp_path / name)]))


def test_esc50_has_captions_by_class_and_its_folds_as_split(tmp_path):
    names = [f"{fold}-{100 + i}-A-0.wav" for i, fold in enumerate((1, 2, 3, 4, 5, 5))]
    lay_out(tmp_path / "audio", *names[:5])
    lay_out(tmp_path / "audio", names[5], content=b"")
    rows = [f"{name},{name[0]},0,sea_waves,True\n" for name in names]
    lay_out(tmp_path, "meta/esc50.csv",
            content=("filename,fold,target,category,esc10\n" + "".join(rows)).encode())
    assert datasets.write_manifest(datasets.esc50(tmp_path), tmp_path / "m.csv") == (5, names[5:])
    _, captions, splits = zip(*read_back(tmp_path / "m.csv"))
    assert captions[:3] == ("sea waves", "the sound of sea waves", "a recording of sea waves")
    assert splits == ("train", "train", "train", "validation", "test")


def test_clotho_has_five_captions_a_clip(tmp_path):
    header = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n"
    for part in datasets.CLOTHO:
        lay_out(tmp_path, f"{part}/A {part}.wav")
        row = f"A {part}.wav," + ",".join(f'"{part}, {i}"' for i in range(5)) + "\n"
        lay_out(tmp_path, f"clotho_captions_{part}.csv", content=(header + row).encode())
    assert datasets.write_manifest(datasets.clotho(tmp_path), tmp_path / "m.csv") == (15, [])
    rows = read_back(tmp_path / "m.csv")
    assert rows[5] == ("A validation.wav", "validation, 0", "validation")
    assert [row[2] for row in rows] == ["train"] * 5 + ["validation"] * 5 + ["test"] * 5
