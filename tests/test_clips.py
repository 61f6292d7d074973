"""Clips: splits, lengths and caches. The toy set."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.io import wavfile

import flashaudio as fa
from data import clips, toy
from data.audio import load_audio
from data.clips import Clips, batch_indices
from data.rows import read_manifest
from flashaudio import InputError
from tests.helpers import tiny_model, tone, write_clips


@pytest.fixture
def heard(monkeypatch) -> list:
    """The files that are read for their mels."""
    read, real = [], clips.load_audio

    def spy(path, *how):
        read.append(Path(path).name)
        return real(path, *how)

    monkeypatch.setattr(clips, "load_audio", spy)
    return read


def write_rows(folder: Path, *rows: str) -> Path:
    text = "\n".join(["audio_path,caption,split", *rows, ""])
    (folder / "manifest.csv").write_text(text)
    return folder / "manifest.csv"


def test_odd_clips_are_used_and_bad_ones_are_counted(tmp_path, capsys):
    write_clips(tmp_path, 12)
    stereo = np.stack([tone(44100, 44100)] * 2, 1).astype(np.float32)
    wavfile.write(tmp_path / "0.wav", 44100, stereo)
    wavfile.write(tmp_path / "1.wav", 8000, (tone(8000) * 127 + 128).astype(np.uint8))
    wavfile.write(tmp_path / "2.wav", 16000, (tone(160) * 32767).astype(np.int16))  # 10 ms
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000)
    soundfile.write(tmp_path / "3.wav", noise, 16000, format="FLAC")
    raw = (tmp_path / "3.wav").read_bytes()
    (tmp_path / "3.wav").write_bytes(raw[:len(raw) // 2])           # 2 of its 4 windows are there
    with open(tmp_path / "manifest.csv", "a", encoding="utf-8") as f:
        f.write('4.wav,"ein ""Ton"" für Jürgen, leise"\n')
    data = Clips(tmp_path / "manifest.csv", tmp_path / "cache", 64, windows=4)
    assert len(data.rows) == 12 and data.captions[-1] == 'ein "Ton" für Jürgen, leise'
    assert data.file[-1] == data.file[data.captions.index("tone number 4")]
    said = capsys.readouterr().out
    assert said.count("3.wav: c") == 1 and "skipped: 1 of 13 clips" in said
    Clips(tmp_path / "manifest.csv", tmp_path / "cache", 64, windows=4)
    assert capsys.readouterr().out == said              # the cache knows it too
    expected = fa.mel_spectrogram(load_audio(tmp_path / "0.wav", 64 * 256)[None])[0]
    torch.testing.assert_close(torch.tensor(data.mels[data.file[0]]), expected)
    (tmp_path / "4.wav").unlink()
    said = "3 of 13 clips are bad, more than 10%; the first: .*3.wav: c"            # 4 twice
    with pytest.raises(InputError, match=said):
        Clips(tmp_path / "manifest.csv", tmp_path / "cache", 64, windows=4)


def test_splits_are_kept_apart_and_counted(tmp_path, capsys):
    write_clips(tmp_path, 6)
    splits = ["", "Test", "val", "train", "evaluation", "TEST"]
    rows = [f"{i}.wav,a,{split}" for i, split in enumerate(splits)]
    data = Clips(write_rows(tmp_path, *rows), tmp_path / "cache", 16)
    assert data.train.tolist() == [0, 3] and data.test.tolist() == [1, 4, 5] and data.has_test
    assert data.validation.tolist() == [2] and sorted(data.held_out(9)) == [1, 4, 5]
    shared = "Of the test split, 0 of its 3 recordings and 1 of its 1 captions were trained on."
    assert data.remarks == [shared]
    said = capsys.readouterr().out
    assert "2 to train on, 1 validation, 3 test, of 6 sounds; 1 distinct captions" in said
    assert shared in said
    data = Clips(write_rows(tmp_path, rows[0], rows[3]), tmp_path / "cache", 16)
    assert sorted(data.held_out(9)) == [0, 1] and not data.has_test
    assert data.remarks == ["The captions were trained on: the data has no test split."]
    both = [f"{i % 2}.wav,{caption},{split}" for i, (caption, split) in enumerate(
        [("a", ""), ("b", ""), ("c", "test"), ("d", "test")])]
    data = Clips(write_rows(tmp_path, *both), tmp_path / "cache", 16)
    assert "2 of its 2 recordings and 0 of its 2 captions were trained on" in data.remarks[0]
    with pytest.raises(InputError, match="nothing is left to train on"):
        Clips(write_rows(tmp_path, rows[1]), tmp_path / "cache", 16)


def test_one_file_is_heard_once_whatever_names_it(tmp_path, heard):
    write_clips(tmp_path, 2)
    shutil.copy(tmp_path / "1.wav", tmp_path / "copy.wav")
    rows = [f"{i % 2}.wav,caption {i}," for i in range(6)] + ["copy.wav,the same,"]
    data = Clips(write_rows(tmp_path, *rows), tmp_path / "cache", 16)
    assert sorted(heard) == ["0.wav", "1.wav"] and data.mels.shape == (2, 80, 16)
    assert data.file.tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert set(data.file[data.held_out(2)]) == {0, 1}       # one row of each comes first


def test_a_moved_copied_or_touched_set_keeps_its_caches(tmp_path, heard, monkeypatch):
    write_clips(tmp_path / "a", 3)
    first = Clips(tmp_path / "a/manifest.csv", tmp_path / "cache", 16)
    os.utime(tmp_path / "a/0.wav", (1, 1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for manifest in (tmp_path / "a/manifest.csv", "b/manifest.csv", "b/../a/manifest.csv"):
        assert Clips(Path(manifest), tmp_path / "cache", 16).key == first.key
    assert len(heard) == 3
    write_rows(tmp_path / "b", "0.wav,another caption,", "1.wav,tone number 1,", "2.wav,tone,")
    other = Clips(tmp_path / "b/manifest.csv", tmp_path / "cache", 16)
    assert other.key != first.key and len(heard) == 3       # what is heard is the same
    read = []                                               # anew, for its samples
    monkeypatch.setattr(clips, "samples_in", lambda path: read.append(path) or 20_000)
    assert Clips(tmp_path / "b/manifest.csv", tmp_path / "cache", 16).key == other.key and not read
    wavfile.write(tmp_path / "b/1.wav", 16000, (32767 * tone()).astype(np.int16))
    assert Clips(tmp_path / "b/manifest.csv", tmp_path / "cache", 16).key != other.key
    assert read == [str(tmp_path / "b/1.wav")]


def test_a_killed_run_goes_on_and_takes_no_cache_with_it(tmp_path, heard, monkeypatch):
    write_clips(tmp_path, 100)
    whole = Clips(tmp_path / "manifest.csv", tmp_path / "whole", 16).mels
    write_rows(tmp_path, "0.wav,a,", "1.wav,b,")
    before = Clips(tmp_path / "manifest.csv", tmp_path / "cache", 16)
    write_clips(tmp_path, 100)
    heard.clear()

    def killed(wav):
        if len(heard) > 70:
            raise KeyboardInterrupt
        return fa.mel_spectrogram(wav)

    with monkeypatch.context() as patch:
        patch.setattr(clips, "mel_spectrogram", killed)
        with pytest.raises(KeyboardInterrupt):
            Clips(tmp_path / "manifest.csv", tmp_path / "cache", 16)
    assert (tmp_path / f"cache/mels-{before.files_key}.npy").exists()
    heard.clear()
    data = Clips(tmp_path / "manifest.csv", tmp_path / "cache", 16)
    assert np.array_equal(data.mels, whole) and len(heard) <= 36
    assert len(list((tmp_path / "cache").glob("mels-*"))) == 1


@pytest.mark.parametrize("rate", [16000, 44100, 8000, 22051])
def test_a_long_recording_is_cut_into_clips_that_share_its_caption(tmp_path, capsys, heard, rate):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 13 * rate).astype(np.float32)
    wavfile.write(tmp_path / "long.wav", rate, noise)
    wavfile.write(tmp_path / "test.wav", rate, noise[7 * rate:])            # 2.9 clips
    wavfile.write(tmp_path / "short.wav", 16000, noise[:40_000])
    manifest = write_rows(tmp_path, "long.wav,a hiss,", "short.wav,short,", "long.wav,noise,",
                          "test.wav,unheard,test")
    data = Clips(manifest, tmp_path / "cache", 128, windows=4)
    said = capsys.readouterr().out
    assert "9 to train on, 0 validation, 2 test, of 3 sounds; 4 distinct captions" in said
    assert data.captions == ["a hiss"] * 4 + ["short"] + ["noise"] * 4 + ["unheard"] * 2
    assert data.file.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6]
    assert data.train.tolist() == list(range(9)) and data.held_out(9).tolist() == [9]
    whole = load_audio(tmp_path / "long.wav")
    assert len(whole) == 208_000
    for i, start in enumerate((0, 58_410, 116_821, 175_232)):       # (208000 - 32768) i / 3
        assert data.start[i] == start
        part = load_audio(tmp_path / "long.wav", 32_768, start)
        torch.testing.assert_close(part, whole[start:start + 32_768], atol=1e-6, rtol=0)
        expected = fa.mel_spectrogram(whole[None, start:start + 32_768])[0]
        torch.testing.assert_close(torch.tensor(data.mels[i]), expected, atol=1e-3, rtol=0)
    heard.clear()
    again = Clips(manifest, tmp_path / "cache", 128, windows=4)
    assert not heard and again.key == data.key
    beginning = Clips(manifest, tmp_path / "cache", 128)
    assert beginning.key != data.key and np.array_equal(beginning.mels[0], again.mels[0])


@pytest.mark.parametrize("loop", [False, True])
def test_a_short_sound_is_followed_by_silence_or_by_itself(tmp_path, loop):
    write_clips(tmp_path, 3, samples=5000)
    wavfile.write(tmp_path / "1.wav", 8000, tone(4000, 8000).astype(np.float32))
    wavfile.write(tmp_path / "2.wav", 16000, tone(20_000).astype(np.float32))
    manifest = tmp_path / "manifest.csv"
    data = Clips(manifest, tmp_path / "cache", 64, windows=4, loop=loop)
    expected = [load_audio(tmp_path / f"{i}.wav", 64 * 256, 0, loop) for i in range(3)]
    assert torch.equal(data.waveforms(np.arange(3)), torch.stack(expected))
    mels = torch.cat([fa.mel_spectrogram(wav[None]) for wav in expected])
    torch.testing.assert_close(torch.tensor(data.mels[:]), mels)
    other = Clips(manifest, tmp_path / "other", 64, windows=4, loop=not loop)
    assert other.key != data.key and other.files_key != data.files_key


def test_latents_and_contexts_follow_the_weights_they_were_made_with(tmp_path):
    write_clips(tmp_path, 3)
    data = Clips(tmp_path / "manifest.csv", tmp_path / "cache", 32)
    model = tiny_model()
    latents = data.latents(model)
    mean, logvar = model.vae.encode(torch.tensor(data.mels[:]))
    assert latents.shape == (3, 2, *model.latent_shape())
    torch.testing.assert_close(torch.tensor(latents[:, 0]), mean)
    torch.testing.assert_close(torch.tensor(latents[:, 1]), (logvar / 2).exp())
    contexts, place = data.contexts(model)
    assert place.tolist() == [1, 2, 3] and contexts.dtype == np.float32
    captions = ["", *data.captions]
    torch.testing.assert_close(torch.tensor(contexts[:]), model.text(captions))
    other = tiny_model(1)
    assert not np.array_equal(data.latents(other), latents)
    assert not np.array_equal(data.contexts(other)[0], contexts)
    frozen = tiny_model(2)
    frozen.text.trained = False
    assert data.contexts(frozen)[0].dtype == np.float16
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def test_every_clip_is_drawn_once_per_epoch():
    drawn = np.concatenate([batch_indices(10, 4, step, seed=1) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


# ---- The toy set --------------------------------------------------------------------------------

def test_toy_splits_share_nothing_and_test_holds_new_combinations(tmp_path):
    rows = read_manifest(toy.write_toy_set(tmp_path / "a", 300, 60, 40))[0]
    kinds = {"train": set(), "test": set(), "validation": set()}
    words = {"train": set(), "test": set(), "validation": set()}
    for row in rows:
        kinds[row["split"]].add(toy.SCENES[toy.scene_index(row["scene"])])
        words[row["split"]].update(row["caption"].replace(",", "").split())
    assert not (kinds["train"] | kinds["validation"]) & toy.HELD_OUT
    assert len(kinds["test"] & toy.HELD_OUT) > 5
    assert words["test"] - words["train"] and not words["validation"] - words["train"]
    tested = {row["caption"] for row in rows if row["split"] == "test"}
    assert not tested & {row["caption"] for row in rows if row["split"] == "validation"}
    assert all(len(row["caption"].encode()) <= 60 for row in rows)
    sounds = [Path(row["audio_path"]).read_bytes() for row in rows]
    assert len(set(sounds)) == len(sounds) == 400
    assert [row["split"] for row in rows] == ["train"] * 300 + ["test"] * 60 + ["validation"] * 40
    again = read_manifest(toy.write_toy_set(tmp_path / "b", 40, 60, 0))[0]
    assert [Path(row["audio_path"]).read_bytes() for row in again] == sounds[:40] + sounds[300:360]
