"""The pages: Python blocks run, commands and flags are known, links lead somewhere."""

import re
import runpy
import shlex
import shutil
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashaudio as fa
import sample
import train
from tests.helpers import QUICK, ROOT, TINY, opened, write_clips

README, FORKING = ROOT / "README.md", ROOT / "docs/forking.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(f"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of a tiny model, which is what size toy means meanwhile."""
    folder = tmp_path_factory.mktemp("docs")
    quick = {**QUICK, "data": str(write_clips(folder / "clips"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fa.SIZES, "toy", TINY)
        patch.setitem(train.RECIPES, "toy", quick)
        with opened("--out", folder / "out") as run:
            train.main(run)
        yield folder / "out"


@pytest.mark.parametrize("block", blocks(README, "python") + blocks(FORKING, "python"))
def test_a_python_block_runs(finished, block, tmp_path, monkeypatch):
    """As a script, where out/fork is a copy of out/toy without the stages that it makes."""
    for name, value in (("SIZES", dict(fa.SIZES)), ("DiT", fa.DiT),
                        ("TEXT_ENCODERS", dict(fa.TEXT_ENCODERS))):
        monkeypatch.setattr(fa, name, value)            # what a block changes is put back
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/toy")
    shutil.copytree(finished, "out/fork")
    for stage in ("rf1", "rf2", "distill"):
        if f'load("{stage}")' not in block:
            shutil.rmtree(f"out/fork/{stage}")
    Path("fork.py").write_text(block, encoding="utf-8")
    runpy.run_path("fork.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    known = {f.name for f in fields(train.Flags)} | set(vars(sample.parse_flags()))
    assert set(re.findall(r"`--(\w+)", text)) <= known | {"rows"}       # of experiments.ablate
    for block in blocks(page, "bash"):
        block = block.replace("\\\n", " ")              # each command in one line
        for script, words in re.findall(r"\b(train|sample)\.py\b([^&\n]*)", block):
            parse_flags = {"train": train.parse_flags, "sample": sample.parse_flags}[script]
            parse_flags(shlex.split(words, comments=True))      # exits where a flag is unknown
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert find_spec(module), module
    for file, place in re.findall(r"\]\(([^):#]*)#?([^):]*)\)", text):
        linked = page.parent / file if file else page
        assert linked.exists(), file
        assert not place or place in places(linked), place


def places(page: Path) -> list[str]:
    """What the headings of a page are called in links."""
    headings = re.findall("^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
