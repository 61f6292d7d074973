"""Wrong input: one line on stderr that says what is wrong, exit code 2, nothing half-written."""

import json
import resource
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from flashaudio import PRESETS, FlashAudio
from runs.cache import write_atomically
from runs.run import lock
from tests.helpers import ROOT, TINY, exit_code, run, tiny_model, write_clips

# What is typed, and what the line must say
BAD_TRAIN = {
    "--data nowhere.csv": "nowhere.csv: no such manifest", "--data taken": "no usable clips",
    "--data column.csv": "no column caption", "--data empty.csv": "no usable clips",
    "--data binary.csv": "not a CSV", "--data latin.csv": "not a CSV in UTF-8",
    "--data bad.csv": "more than 10%", "--data test.csv": "nothing is left to train on",
    "--data huge.csv": "field larger", "--data silent.csv": "holds no samples",
    "--data folder.csv": "1 of 1 clips are bad", "--data nul.csv": "no such file",
    "--data mp3.csv": "cannot be read as audio", "--data nan.csv": "NaN",
    "--data slow.csv": "samples a second", "--data split.csv": "unknown split 'tset'",
    "--learning_rate 1": "unrecognized arguments", "--stage rf3": "'rf2', 'distill', 'eval'",
    "--preset huge": "'toy', 'small', 'base', 'large'", "--lr fast": "invalid float",
    "--batch_size 1.5": "invalid int", "--lr -1": "--lr is -1.0, must be at least 0",
    "--lr nan": "at least 0", "--lr inf": "at least 0", "--batch_size 0": "at least 1",
    "--cfm_steps -5": "at least 1", "--ema 1.5": "from 0 to 1", "--caption_dropout 2": "from 0 to",
    "--seed -1": "from 0 to", "--rf2_couplings 0": "at least 1", "--warmup 0": "at least 1",
    "--distill_coupling_steps 0": "at least 1", "--rf2_anchor_steps -1": "at least 0",
    "--rf2_anchor_tol nan": "at least 0", "--rf2_guidance nan": "at least 0",
    "--lr_end -0.1": "from 0 to 1", "--eval_clips 1": "at least 2",
    "--save_every nan": "at least 0", "--grad_accum 17": "is larger",
    "--vae_frames 0": "at least 1",
    "--init public.ckpt --stage vae": "no --stage vae",
    "--init public.ckpt --preset toy": "no --preset toy",
    "--init public.ckpt --preset small": "no --preset toy or small", "--plan -1": "at least 0",
    "--init nowhere.ckpt": "no such checkpoint", "--init pickled.ckpt": "besides tensors",
    "--init good/0.wav": "not read as a checkpoint",
    "--device abacus": "cpu, cuda", "--device cuda:77": "not available",
    "--vocoder wavenet": "griffin-lim, hifigan", "--vocoder hifigan:./nowhere": "nowhere",
    "--vocoder bigvgan:./nowhere": "nowhere", "--text ./nowhere": "nowhere",
    "--judge ./nowhere": "nowhere", "--stage rf2": "vae is not trained yet",
    "--stage eval": "vae is not trained yet", "--out column.csv": "column.csv",
    "--out taken": "another run is at work", "--out torn --stage cfm": "not a readable model",
    "--out tornjson": "not readable as JSON"}
BAD_SAMPLE = {
    "": "nothing to make", "'  '": "nothing to make", "rain": "no distilled model",
    "rain --model good": "no model here", "rain --model torn/vae": "not a readable model",
    "rain --model out/distil": "no such folder", "rain --model lying": "describes",
    "rain --model deep": "1000 layers", "rain --model whole/vae": "a VAE without a trained flow",
    "--file gone.txt": "no such file", "--file good": "no such file",
    "--file binary.csv": "not a text file in UTF-8", "--file blank.txt": "nothing to make",
    "rain --n 0": "at least 1", "rain --batch_size 0": "at least 1", "rain --seed -1": "from 0 to",
    "rain --steps one": "invalid int", "rain --cfg 3": "unrecognized arguments",
    "rain --model whole --steps 0": "steps is 0", "rain --model whole --guidance nan": "guidance",
    "rain --model whole --seconds 0": "seconds is 0", "rain --model whole --seconds nan": "seconds",
    "rain --model whole --seconds 900": "too long", "ra\\x07in --model whole": "no text",
    "rain --model whole --vocoder wavenet": "griffin-lim, hifigan",
    "rain --model whole --device abacus": "cpu, cuda",
    "rain --model whole --out column.csv": "column.csv"}


@pytest.fixture(scope="module")
def corner(tmp_path_factory) -> Path:
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("corner")
    write_clips(folder / "good", 2)
    header, row = "audio_path,caption,split\n", "good/0.wav,a tone,"
    for name, text in {
            "column": "audio_path,text\ngood/0.wav,a tone\n", "empty": header,
            "bad": f"{header}{row}\ngone.wav,a tone,\ngood/1.wav,,\n",
            "test": f"{header}{row}test\n", "split": f"{header}{row}tset\n",
            "folder": f"{header}good,a tone,\n",
            "nul": f"{header}a\0b.wav,a tone,\n", "huge": f"{header}{row}{'x' * 200_000}\n",
            **{kind: f"{header}{kind}.wav,a tone,\n" for kind in ("silent", "nan", "slow", "mp3")},
            }.items():
        (folder / f"{name}.csv").write_text(text)
    (folder / "binary.csv").write_bytes(bytes(range(128, 256)))
    (folder / "latin.csv").write_bytes(f"{header}good/0.wav,Jürgen,\n".encode("latin-1"))
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "mp3.wav").write_bytes(b"ID3")
    wavfile.write(folder / "silent.wav", 16000, np.zeros(0, np.int16))
    wavfile.write(folder / "nan.wav", 16000, np.full(999, np.nan, np.float32))
    wavfile.write(folder / "slow.wav", 1, np.zeros(999, np.int16))
    torch.save({"state_dict": {"a": TINY}}, folder / "pickled.ckpt")
    for name, change in {"whole": {}, "whole/vae": {"stage": "vae"}, "torn/vae": {},
                         "lying": {"dit": {"hidden_size": 2 ** 20}},
                         "deep": {"dit": {"depth": 10 ** 9}}}.items():
        tiny_model().save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config["dit"].update(change.get("dit", {}))
        config["stage"] = change.get("stage", "")
        (folder / name / "config.json").write_text(json.dumps(config))
    weights = folder / "torn/vae/model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:99])
    (folder / "torn/vae/training.json").write_text('{"seconds": 1}')
    (folder / "tornjson/vae").mkdir(parents=True)
    (folder / "tornjson/vae/training.json").write_text('{"seco')
    (folder / "taken").mkdir()
    with lock(folder / "taken"):
        yield folder


def one_line(capsys, script: str, *typed: str) -> str:
    """What a script says when it refuses what is typed."""
    capsys.readouterr()
    code = exit_code(script, *typed)
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"{script}: "), said
    return said


@pytest.mark.parametrize("typed", BAD_TRAIN)
def test_train_refuses_wrong_input_in_one_line(corner, tmp_path, monkeypatch, capsys, typed):
    monkeypatch.chdir(corner)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = [] if "--out" in typed else ["--out", str(tmp_path)]
    if "--data" not in typed:
        more += ["--data", "good/manifest.csv"]
    if "--init" in typed:
        more += ["--judge", ""]
    assert BAD_TRAIN[typed] in one_line(capsys, "train.py", *shlex.split(typed), *more)
    made = {path.suffix for path in tmp_path.rglob("*")}
    assert not made & {".safetensors", ".pt", ".wav", ".tmp"}


@pytest.mark.parametrize("typed", BAD_SAMPLE)
def test_sample_refuses_wrong_input_in_one_line(corner, monkeypatch, capsys, typed):
    monkeypatch.chdir(corner)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = shlex.split(typed.replace("\\x07", "\x07"))
    assert BAD_SAMPLE[typed] in one_line(capsys, "sample.py", *words)
    assert not (corner / "samples").exists()


def test_no_traceback_where_a_person_sees_it(corner):
    for script, *flags in (("train.py", "--data", "column.csv"), ("sample.py", "rain", "--n", 0)):
        done = run(ROOT / script, *flags, cwd=corner)
        assert done.returncode == 2 and done.stderr.startswith(f"{script}: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_needs_no_torch_and_any_console_can_show_it(script):
    code = f"""import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit:
    assert not {{"torch", "numpy"}} & set(sys.modules)"""
    for encoding in ("utf-8", "cp1252", "latin-1", "ascii"):
        done = run("-c", code, PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and "--seed" in done.stdout, done.stderr


def test_a_first_sound_waits_for_no_compiler_and_no_plots(tmp_path):
    FlashAudio(PRESETS["toy"]).save_pretrained(tmp_path / "toy")
    code = f"""import runpy, sys
sys.argv = ["sample.py", "rain", "--model", {str(tmp_path / "toy")!r}, "--out", {str(tmp_path)!r}]
runpy.run_path("sample.py", run_name="__main__")
slow = {{"torch._dynamo", "transformers", "scipy", "pandas", "matplotlib.figure"}}
assert not slow & set(sys.modules), slow & set(sys.modules)"""
    done = run("-c", code)
    assert done.returncode == 0 and (tmp_path / "rain-0.wav").exists(), done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_any_console_can_show_a_prompt(corner, tmp_path, encoding):
    done = run("sample.py", "ω → 雨", "--model", corner / "whole", "--steps", 2, "--guidance", 2,
               "--out", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and (tmp_path / "index.html").exists(), done.stderr


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path):
    page = tmp_path / "index.html"
    write_atomically(page, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))         # bytes a file may have
    try:
        with pytest.raises(OSError, match="index.html"):
            write_atomically(page, bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert page.read_bytes() == b"old" and list(tmp_path.iterdir()) == [page]
