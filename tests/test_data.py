"""What people bring: audio files, manifests, folders, published data sets."""

import json
import math
import os
import shutil
import struct
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from data.audio import load_audio, samples_in
from data.clips import Clips
from data.rows import doubts, read_folder, read_manifest
from flashaudio import InputError
from tests.helpers import tone

HEADER = "audio_path,caption,split\n"
FORMAT = struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)        # of a WAV


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


def test_resampled_cut_followed_by_silence_or_repeated(tmp_path):
    wavfile.write(tmp_path / "x.wav", 44100, tone(44100, 44100).astype(np.float32))
    wav = load_audio(tmp_path / "x.wav")
    assert len(wav) == 16000 and (wav - torch.from_numpy(tone()))[200:-200].abs().max() < 2e-3
    padded = load_audio(tmp_path / "x.wav", 40000)
    assert torch.equal(padded, torch.cat([wav, torch.zeros(24000)]))
    looped = load_audio(tmp_path / "x.wav", 40000, loop=True)
    assert torch.equal(looped, torch.cat([wav, wav, wav])[:40000])
    assert torch.equal(load_audio(tmp_path / "x.wav", 100), wav[:100])


def test_a_full_scale_square_stays_within_full_scale_after_resampling(tmp_path):
    square = np.sign(np.sin(2 * np.pi * 100 * np.arange(44100) / 44100 + 0.1))
    wavfile.write(tmp_path / "x.wav", 44100, (32767 * square).astype(np.int16))
    wav = load_audio(tmp_path / "x.wav")
    assert wav.abs().max() == 1                     # the filter overshoots to 1.1


@pytest.mark.parametrize("peak", [1.4, 4, 10_000])
def test_floats_over_full_scale_are_scaled_to_it_and_that_is_said(tmp_path, capsys, peak):
    wavfile.write(tmp_path / "x.wav", 16000, (2 * peak * tone()).astype(np.float32))
    expected = torch.from_numpy(2 * tone())         # float32 resolves 6e-8
    assert (load_audio(tmp_path / "x.wav") - expected).abs().max() < 1e-6
    said = capsys.readouterr().out
    assert (f"x.wav: samples up to {peak:.3g}" in said) == (peak > 1.5)


@pytest.mark.parametrize("content, said", [
    (None, "no such file"), (b"", "cannot be read"), (b"RIFF", "cannot be read"),
    (b"not a wav at all", "Format not recognised"), ([], "no samples; .* recorder was killed"),
    ([math.nan] * 100, "NaN"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")])
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


@pytest.mark.parametrize("size", [2 ** 31 - 1, 0x7FFFF000, 2 ** 32 - 1])
def test_a_wav_that_was_written_to_a_pipe_is_read_to_its_end(tmp_path, size):
    pcm = (32767 * tone(4000)).astype(np.int16)
    header = b"RIFF\0\0\0\0WAVEfmt " + FORMAT + b"data" + struct.pack("<I", size)
    (tmp_path / "x.wav").write_bytes(header + pcm.tobytes())
    assert np.array_equal(load_audio(tmp_path / "x.wav"), pcm.astype(np.float32) / 32768)


def write_mp3(path: Path, sound: np.ndarray) -> bytes:
    soundfile.write(path, sound, 44100, format="MP3", bitrate_mode="VARIABLE",
                    compression_level=0.2)
    return path.read_bytes()


def without_tag(raw: bytes) -> bytes:
    """An MP3 without its first frame, which says how long it is."""
    kbit = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320][raw[2] >> 4]
    size = 144_000 * kbit // 44100 + (raw[2] >> 1 & 1)
    assert b"Xing" in raw[:size] or b"Info" in raw[:size]
    return raw[size:]


@pytest.mark.parametrize("kind", ["loud first", "quiet first", "two in one"])
def test_an_mp3_is_as_long_as_its_sound_whatever_its_header_says(tmp_path, kind):
    path = tmp_path / "x.mp3"
    loud = np.random.default_rng(0).standard_normal(3 * 44100) * 0.2
    quiet = 2 * tone(4 * 44100, 44100) * 0.05
    if kind == "two in one":
        raw = write_mp3(path, loud) + write_mp3(path, quiet)
    else:
        parts = [loud, quiet] if kind == "loud first" else [quiet, loud]
        raw = without_tag(write_mp3(path, np.concatenate(parts)))
    path.write_bytes(raw)
    whole = load_audio(path)                        # an encoder adds up to three frames of 26 ms
    assert 7 * 16000 <= len(whole) < 7.1 * 16000 and abs(samples_in(path) - len(whole)) <= 1
    part = load_audio(path, 16000, 80_000)
    assert (part - whole[80_000:96_000]).abs().max() < 1e-3


def test_a_flac_that_does_not_know_its_length_is_read_to_its_end(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 80_000)
    soundfile.write(tmp_path / "x.flac", sound, 16000)
    whole = load_audio(tmp_path / "x.flac")
    raw = bytearray((tmp_path / "x.flac").read_bytes())
    raw[21] &= 0xF0                                 # 36 bits in STREAMINFO
    raw[22:26] = bytes(4)
    (tmp_path / "x.flac").write_bytes(raw)
    assert samples_in(tmp_path / "x.flac") == 80_000
    assert torch.equal(load_audio(tmp_path / "x.flac"), whole)
    assert torch.equal(load_audio(tmp_path / "x.flac", 32_000, 48_000), whole[48_000:])


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
    "line breaks": 'audio_path,caption\na.wav,"a dog\nbarks,\r\nrain falls"\n',
    "controls": 'audio_path,caption\na.wav,"a dog\tbarks, rain falls\x07"\n'}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", MANIFESTS.values(), ids=list(MANIFESTS))
def test_ways_of_writing_a_manifest(tmp_path, text, encoding):
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    rows, problems = read_manifest(tmp_path / "m.csv")
    assert len(rows) == 1 and not problems
    assert rows[0]["caption"] == "a dog barks, rain falls" and rows[0]["split"] == "train"
    assert rows[0]["audio_path"] == str(tmp_path / "a.wav")


@pytest.mark.parametrize("text, expected, said", [
    (f"{HEADER}a.wav,a dog, barking,test\nb.wav,rain,test\n", 1, ["line 2: too many fields"]),
    ("path;words\na.wav;rain\n", 0, ["line 2: no audio_path; the first line must name"]),
    ("audio_path,caption\na.wav,\n,rain\nb.wav\n", 0, [
        "line 2: no caption", "line 3: no audio_path", "line 4: no caption"])])
def test_rows_that_cannot_be_used_are_named(tmp_path, text, expected, said):
    (tmp_path / "m.csv").write_text(text)
    rows, problems = read_manifest(tmp_path / "m.csv")
    assert len(rows) == expected and len(problems) == len(said)
    assert all(part in problem for part, problem in zip(said, problems))


@pytest.mark.parametrize("text, said", [
    ("audio_path,caption\na.wav,J\xfcrgen\n".encode("latin-1"), "not a text in UTF-8"),
    (b'audio_path,caption\na.wav,"a tone\nb.wav,2\n', "a quote is left open in line 2"),
    (b'audio_path,caption\na.wav,a\nb.wav,"b\nc.wav,"c"\nd.wav,d\n', "left open in line 3"),
    (f"{HEADER}a.wav,a,\nb.wav,b,tests\n".encode(), "line 3: unknown split 'tests'; known"),
    (b"audio_path,caption\na.wav," + b"x" * 200_000, "not a CSV")])
def test_what_is_no_manifest_is_refused(tmp_path, text, said):
    (tmp_path / "m.csv").write_bytes(text)
    with pytest.raises(InputError, match=said):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(InputError, match="no such manifest"):
        read_manifest(tmp_path / "nowhere.csv")


SOUND = b"RIFF\xec\0\0\0WAVEfmt " + FORMAT + b"data\xc8\0\0\0" + bytes(range(200))


def lay_out(folder: Path, *names: str, content: bytes = SOUND) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def captions_of(folder: Path) -> dict[str, str]:
    rows, problems = read_folder(folder)
    assert not problems
    return {str(Path(row["audio_path"]).relative_to(folder)): row["caption"] for row in rows}


def test_a_folder_of_sounds_is_enough(tmp_path):
    folder = tmp_path / "set"
    expected = {"a/Dog_bark-01.wav": "dog bark", "a/told.WAV": "A told tale", "a/x.flac": "in JSON",
                "b/Glocken 3.wav": "glocken", "Test/042.wav": "set", "wind/0.wav": "wind"}
    lay_out(folder, *expected)
    (folder / "a/told.txt").write_text(" A told\n tale\n")
    (folder / "a/x.json").write_text('{"other": 1, "prompt": "in JSON"}')
    assert captions_of(folder) == expected and list(captions_of(folder)) == sorted(expected)


@pytest.mark.parametrize("name, caption", [
    ("124101__user_name__crash", "crash"), ("29800__stomachache__3", "my kit"),
    ("ThisItemRequiresBothHands", "this item requires both hands"), ("HHOpen_02", "hh open"),
    ("16336__a__ss-ht-crunchtime", "ss ht crunchtime"), ("crash20i__ride4", "crash i ride"),
    ("sound000", "sound"), ("雨の音 3", "雨の音"), ("Ein Ton, leise", "ein ton, leise"),
    pytest.param(os.fsdecode(b"Gl\xf6ckchen"), "glöckchen", marks=pytest.mark.skipif(
        sys.platform != "linux", reason="names are any bytes on Linux alone"))])
def test_the_words_of_a_name(tmp_path, name, caption):
    lay_out(tmp_path / "MyKit", f"{name}.wav")
    assert list(captions_of(tmp_path / "MyKit").values()) == [caption]


@pytest.mark.parametrize("held, caption", [
    ({"text": ["a dog barks", "barking"], "tag": ["dog"]}, "a dog barks"),      # LAION
    ({"caption": None, "text": "a dog barks"}, "a dog barks"), (["a dog barks"], "a dog barks"),
    ("a woman reads a text", "a woman reads a text"), ({"caption": 3}, None), ({}, None),
    (None, None), (17, None), ([], None), ([[1]], None)])
def test_json_beside_a_sound(tmp_path, held, caption):
    lay_out(tmp_path, "1.wav")
    (tmp_path / "1.json").write_text(json.dumps(held))
    rows, problems = read_folder(tmp_path)
    assert [row["caption"] for row in rows] == ([caption] if caption else [])
    assert caption or "1.wav: has no caption (no words in the file beside it" in problems[0]


def test_every_sound_is_found_and_what_is_left_out_is_counted(tmp_path, capsys):
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    taken = ["a.wav", "b.oga", "c.caf", "d.aifc", "e.wave", "f.MP3", "deep/er/g.flac"]
    lay_out(folder, *taken)
    for name in taken:
        form = {".oga": "OGG", ".caf": "CAF", ".aifc": "AIFF", ".wave": "WAV"}.get(name[1:])
        soundfile.write(folder / name, tone(), 16000, format=form)
    lay_out(elsewhere, "h.wav")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "deep/back").symlink_to(folder)       # a loop
    (elsewhere / "back").symlink_to(elsewhere)
    lay_out(folder, ".git/x.wav", ".Trash-1000/y/x.wav", "deep/.ipynb_checkpoints/x.wav", "._a.wav")
    lay_out(folder, "x.m4a", "y.m4a", "z.pdf", "LICENSE", "a.txt", content=b"told")
    assert set(captions_of(folder)) == {*taken, "linked/h.wav"}
    Clips(folder, tmp_path / "cache", 16)
    assert "set: left out: 2 .m4a, 1 without ending, 1 .pdf (" in capsys.readouterr().out
    lay_out(tmp_path / "alone", "x.m4a", content=b"told")
    with pytest.raises(InputError, match="alone: holds no usable clips"):
        Clips(tmp_path / "alone", tmp_path / "cache", 16)
    assert "left out: 1 .m4a (for sounds: ffmpeg -i" in capsys.readouterr().out


@pytest.mark.parametrize("table", [
    "file_name,text\n1.wav,A dog\nsub/2.wav,A cat\n",
    "transcription,file_name\nA dog,1.wav\nA cat,sub/2.wav",
    '{"file_name": "1.wav", "text": "A dog"}\n{"file_name": "sub/2.wav", "caption": "A cat"}\n'])
def test_captions_in_the_metadata_of_an_audiofolder(tmp_path, table):
    name = "metadata.jsonl" if table.startswith("{") else "metadata.csv"
    lay_out(tmp_path, "train/1.wav", "train/sub/2.wav", "train/unnamed.wav", "test/1.wav")
    for part in ("train", "test"):
        (tmp_path / part / name).write_text(table)
    rows, problems = read_folder(tmp_path)
    assert not problems and [(row["caption"], row["split"]) for row in rows] == [
        ("A dog", "test"), ("A dog", "train"), ("A cat", "train")]
    (tmp_path / "test" / name).write_bytes(b'"\xff')
    with pytest.raises(InputError, match="metadata"):
        read_folder(tmp_path)


def test_letters_are_those_that_people_type(tmp_path):
    typed = unicodedata.normalize("NFC", "café bruyant")
    kept = unicodedata.normalize("NFD", typed)
    lay_out(tmp_path, f"{kept}.wav", " spaced .wav", "wav/1.wav", "a, b.wav")
    assert typed in captions_of(tmp_path).values()
    (tmp_path / "m.csv").write_text(f"audio_path,caption\n{typed}.wav,{kept}\n spaced .wav,x\n"
                                    " wav\\1.wav ,a tone\n~/1.wav,home\na, b.wav,c, d\n",
                                    encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "wav"))
        rows, _ = read_manifest(tmp_path / "m.csv")
    assert all(os.path.isfile(row["audio_path"]) for row in rows)
    assert [row["caption"] for row in rows] == [typed, "x", "a tone", "home", "c, d"]


@pytest.mark.parametrize("captions, said", [
    (["fold"] * 3 + [f"word {i}" for i in range(9)], "3 of 12 clips are called 'fold': is there a"),
    (["t", "fx", "x sd", "a dog"], "3 of 4 captions hold no word: is there a table"),
    (["fold"] * 2 + [f"word {i}" for i in range(8)], ""), (["雨", "a cat", "hh"], "")])
def test_doubts_about_captions(captions, said):
    lines = doubts(captions)
    assert len(lines) == bool(said) and all(said in line for line in lines)


# ---- Published data sets ------------------------------------------------------------------------

def read_set(folder: Path) -> list[tuple]:
    rows, problems = read_folder(folder)
    assert not problems
    return [(Path(row["audio_path"]).name, row["caption"], row["split"]) for row in rows]


def test_audiocaps_finds_clips_under_their_usual_names_and_counts_the_missing(tmp_path, capsys):
    ids = ["aaaaaaaaaaa", "bbbbbbbbb-_", "_cccccccccc", "f-fffffffff", "Yhhhhhhhhhh", "Ynnnnnnnnnn",
           "ggggggggggg", "iiiiiiiiiii"]
    files = ["x/aaaaaaaaaaa_30.wav", "Ybbbbbbbbb-_.flac", "_cccccccccc_30_40.wav",
             "f-fffffffff [30-40].ogg", "YYhhhhhhhhhh-30.wav", "Ynnnnnnnnnn.wav"]
    lay_out(tmp_path, *files, "unnamed.wav")
    lay_out(tmp_path, "aaaaaaaaaaa_30.webm", "ggggggggggg_30.wav", content=b"")
    rows = [f"{7001 + i},{name},30,caption {i}, unquoted\n" for i, name in enumerate(ids)]
    table = "audiocap_id,youtube_id,start_time,caption\n" + "".join(rows)
    (tmp_path / "val.csv").write_text(table, encoding="utf-16")
    assert sorted(read_set(tmp_path), key=lambda row: row[1]) == [
        (Path(name).name, f"caption {i}, unquoted", "validation") for i, name in enumerate(files)]
    assert "2 of 8 rows have no sound" in capsys.readouterr().out       # an empty file, and none


CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
PUBLISHED = [  # sounds, tables, and what they say
    (["audio/1-1-A-0.wav", "audio/4-2-A-0.wav", "audio/5-3-A-0.wav"],
     {"meta/esc50.csv": "filename,fold,target,category,esc10\n1-1-A-0.wav,1,0,sea_waves,True\n"
                        "4-2-A-0.wav,4,0,sea_waves,True\n5-3-A-0.wav,5,0,sea_waves,True\n"},
     [("1-1-A-0.wav", "sea waves", "train"),
      ("4-2-A-0.wav", "the sound of sea waves", "validation"),
      ("5-3-A-0.wav", "a recording of sea waves", "test")]),
    (["audio/fold1/7-2-0-0.wav", "audio/fold9/8-2-0-0.wav", "audio/fold10/9-2-0-0.wav"],
     {"metadata/UrbanSound8K.csv": "slice_file_name,fsID,fold,class\n7-2-0-0.wav,7,1,siren\n"
                                   "8-2-0-0.wav,8,9,siren\n9-2-0-0.wav,9,10,siren\n"},
     [("7-2-0-0.wav", "siren", "train"), ("8-2-0-0.wav", "the sound of siren", "validation"),
      ("9-2-0-0.wav", "a recording of siren", "test")]),
    (["FSD50K.dev_audio/1.wav", "FSD50K.dev_audio/2.wav", "FSD50K.eval_audio/3.wav"],
     {"FSD50K.ground_truth/dev.csv": 'fname,labels,mids,split\n1,"Acoustic_guitar,Music",/m,train\n'
                                     "2,Rain,/m/2,val\n",
      "FSD50K.ground_truth/eval.csv": 'fname,labels,mids\n3,"Dog",/m/3\n'},
     [("1.wav", "acoustic guitar", "train"), ("2.wav", "the sound of rain", "validation"),
      ("3.wav", "dog", "test")]),
    (["development/A b.wav", "evaluation/c.wav"],
     {"clotho_captions_development.csv": f'{CLOTHO}A b.wav,"a, b",c,d,e,f\n',
      "clotho_captions_evaluation.csv": f"{CLOTHO}c.wav,g,h,i,j,k\n"},
     [*(("A b.wav", caption, "train") for caption in ("a, b", "c", "d", "e", "f")),
      *(("c.wav", caption, "test") for caption in "ghijk")])]


@pytest.mark.parametrize("sounds, tables, expected", PUBLISHED)
def test_sets_are_read_as_they_are_published(tmp_path, sounds, tables, expected):
    lay_out(tmp_path, *sounds)
    for name, text in tables.items():
        lay_out(tmp_path, name, content=text.encode())
    assert sorted(read_set(tmp_path)) == expected
