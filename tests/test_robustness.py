"""Wrong input, odd places, full disks: one line that says what is wrong, and exit code 2."""

import io
import resource
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import flashaudio as fa
import sample
import train
from flashaudio import InputError
from runs.cache import cached, write_atomically
from runs.processes import join
from runs.run import content_of, lock, name_of, one_line_errors
from tests.helpers import QUICK, ROOT, TINY, exit_code, run, tiny_model, write_clips

TYPED = [f"--{name}={value}" for name, value in {**QUICK, "anchor_steps": 1}.items()]
BAD = {     # what is typed, and what the line must say
    "train --data nowhere.csv": "nowhere.csv: no such manifest", "train --lr fast": "invalid float",
    "train --data bad.csv": "2 of 3 clips are bad, more than 10%", "train --lr nan": "at least 0",
    "train --size huge": "'toy', 'small', 'base', 'large'", "train --seed -1": "at least 0",
    "train --batch_size 0": "--batch_size is 0, must be a number of at least 1",
    "train --rf1_pairing near": "'immiscible', 'none'", "train --device abacus": "cpu, cuda",
    "train --learning_rate 1": "unrecognized arguments", "train --init a.ckpt": "a.ckpt",
    "train --judge ./nowhere": "nowhere", "train --text /nowhere": "this folder of a model is",
    "train --out bad.csv": "bad.csv", "train --out vae": "trained with other settings",
    "train --out taken": "another run is at work", "sample '  '": "nothing to make",
    "sample a": "no distilled model", "sample a --model vae/vae": "a VAE without a trained flow",
    "sample a --model good": "no model here", "sample a --model out/distil": "no such folder",
    "sample --file gone.txt": "gone.txt", "sample --file good/0.wav": "not a text file in UTF-8",
    "sample a --n 0": "at least 1", "sample a --cfg 3": "unrecognized arguments",
    "sample a --model . --seed -1": "seed is -1", "sample a --model . --seconds 900": "too long",
    "sample a --model . --steps 0": "steps is 0", "sample a --model . --out bad.csv": "bad.csv"}


@pytest.fixture(scope="module")
def corner(tmp_path_factory) -> Path:
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("corner")
    write_clips(folder / "good")
    (folder / "bad.csv").write_text("audio_path,caption\ngood/0.wav,a tone\ngone.wav,a\n3.wav,\n")
    tiny_model().save_pretrained(folder)
    tiny_model(config=replace(TINY, stage="vae")).save_pretrained(folder / "vae/vae")
    (folder / "taken").mkdir()
    with lock(folder / "taken"):
        yield folder


def one_line(capsys, script: str, *typed) -> str:
    """What a script says when it refuses what is typed."""
    capsys.readouterr()
    code = exit_code(script, *typed)
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"{script}: "), said
    return said


@pytest.mark.parametrize("typed", BAD)
def test_wrong_input_is_refused_in_one_line(corner, tmp_path, monkeypatch, capsys, typed):
    monkeypatch.chdir(corner)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script, *words = shlex.split(typed)
    if script == "train":                               # the last of a flag counts
        words = ["--out", tmp_path, "--data", "good/manifest.csv", "--judge", "", *words]
    assert BAD[typed] in one_line(capsys, f"{script}.py", *words)
    made = {path.suffix for path in tmp_path.rglob("*")}
    assert not made & {".safetensors", ".pt", ".wav", ".tmp"} and not Path("samples").exists()


def test_a_person_sees_a_run_and_hears_it_or_reads_one_line(corner, tmp_path):
    odd = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = run(ROOT / "train.py", "--data=gone.csv", cwd=tmp_path, **odd)
    assert done.returncode == 2 and done.stderr.startswith("train.py: gone.csv: no such")
    assert "--distill_steps" in run(ROOT / "train.py", "--help", **odd).stdout
    data = corner / "good/manifest.csv"
    done = run(ROOT / "train.py", "--data", data, "--out", "out/my", *TYPED, cwd=tmp_path, **odd)
    assert done.returncode == 0, done.stderr
    for file in ("results.json", "loss.png", "listen/index.html", "distill/README.md"):
        assert (tmp_path / "out/my" / file).exists()
    done = run(ROOT / "sample.py", "ω → 雨", "Rain!", "rain", "../a/b", "--n", 2, "--out", "b",
               cwd=tmp_path, **odd)
    assert done.returncode == 0 and (tmp_path / "b/index.html").exists(), done.stderr
    names = {path.stem for path in (tmp_path / "b").glob("*.wav")}
    assert len(names) == 8 and {"rain-0", "rain-2-1", "a-b-1"} <= names


def test_a_notebook_or_no_console_is_served(tmp_path, monkeypatch):
    monkeypatch.setitem(fa.SIZES, "toy", TINY)
    monkeypatch.setattr(train, "evaluate", lambda run: None)
    data = write_clips(tmp_path / "clips")
    data.write_text(data.read_text().replace("caption", "caption,split").replace("5\n", "5,val\n"))
    for stream in (io.StringIO(), None):                # can't be reconfigured; closed
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        for error, code in ((InputError, 2), (SafetensorError, 2), (KeyboardInterrupt, 130)):
            with pytest.raises(SystemExit, match=str(code)), one_line_errors("train.py"):
                raise error("no")
        assert exit_code("train.py", "--data", data, "--out", tmp_path / "out", *TYPED) == 0


def test_a_kernels_flags_and_a_clusters_processes_are_not_ours(monkeypatch):
    def vae_steps(*typed: str) -> int:
        return train.parse_flags(typed).vae_steps

    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setenv("HOME", "/home/me")
    assert train.parse_flags() == train.Flags() and sample.parse_flags().prompts == []
    assert train.parse_flags(["--out", "~/x"]).out == "/home/me/x"
    recipes = {name: recipe.get("vae_steps") for name, recipe in train.RECIPES.items()}
    assert vae_steps("--data", "sounds") == recipes["own"] != vae_steps("--data", "toy")
    assert vae_steps("--data", "sounds", "--vae_steps", "5") == 5
    assert vae_steps("--data", "sounds", "--init", "maa3.ckpt") == recipes["base"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(InputError, match="srun .* use torchrun"):
        join(torch.device("cpu"))


def test_a_function_is_known_by_name_and_code_and_a_folder_by_what_it_holds(tmp_path, monkeypatch):
    several = [len, fa.uniform, partial(fa.mix_exp, a=1), partial(fa.mix_exp, a=2), SimpleNamespace,
               lambda t: 3 * t,
               lambda t: 4 * t]
    known = [name_of(function) for function in several]
    assert len(set(known)) == 7 and known[0] == "len" and "\n" not in "".join(known)
    with pytest.raises(InputError, match="^.*give it a name.*$"):
        name_of(eval("lambda t: t"))                    # as if it were typed into a console
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        Path(name, "deep").mkdir(parents=True)
        Path(name, "deep/model").write_text(text)
    known = [content_of(source) for source in ("a", f"{tmp_path}/a", "./b/../a", "b", "c", "me/t5")]
    assert len(set(known)) == 3 and known[0] == known[3] and known[5] == "me/t5"


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    write_atomically(page, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))         # bytes a file may have
    try:
        with pytest.raises(OSError, match="index.html"):
            write_atomically(page, bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    with pytest.raises(InputError, match="mels-1.npy: 4 MiB are needed, 3 are free"):
        cached(tmp_path / "mels-1.npy", (1 << 20,), None)
    assert page.read_bytes() == b"old" and list(tmp_path.iterdir()) == [page]
