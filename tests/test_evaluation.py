"""Judges, the table of a run, model cards, and the page to listen on. The run is a stand-in: models
of random weights, and a vocoder that answers at once."""

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.io import wavfile

import flashaudio as fa
from data import toy
from data.clips import Clips, load_audio
from evaluation import evaluate, judges, listen
from tests.helpers import rng, save_text_model, tiny_model, write_clips


@dataclass
class Flags:
    data: str = "/home/me/sounds/birds.csv"
    preset: str = "toy"
    init: str = ""
    text: str = "bytes"
    judge: str = ""
    eval_clips: int = 50
    seed: int = 3
    vae_steps: int = 9
    cfm_steps: int = 9
    rf1_steps: int = 9
    rf2_steps: int = 9
    distill_steps: int = 9


def quick_vocoder(mel: torch.Tensor) -> torch.Tensor:
    """The loudness of each frame as a waveform (B, 256 T) in [-1, 1]."""
    return (mel.mean(1) / 5).tanh().repeat_interleave(fa.HOP, 1)


def fake_run(out: Path, data, flags: Flags = Flags()) -> SimpleNamespace:
    models = {stage: tiny_model(i) for i, stage in enumerate(evaluate.STAGES)}
    settings = {"data": "a digest", "from": "another", "cfm_steps": 4}
    for stage in models:
        (out / stage).mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        flags=flags, out=out, data=data, device=torch.device("cpu"), vocoder=quick_vocoder,
        folder=lambda stage: out / stage, load=models.get,
        notes=lambda stage: {"stage": stage, "flags": asdict(flags), "settings": settings,
                             "versions": {}, "seconds": 100.0})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> SimpleNamespace:
    """A run after stage eval: six tones, the first of them under two captions, no test split."""
    folder = tmp_path_factory.mktemp("run")
    manifest = write_clips(folder / "clips")
    header, *rows = manifest.read_text(encoding="utf-8").splitlines()
    rows.insert(0, '0.wav,<b>"first" & lowest</b>')
    manifest.write_text("\n".join([header, *rows]), encoding="utf-8")
    run = fake_run(folder / "out", Clips(manifest, folder / "cache", 32))
    evaluate.evaluate(run)
    return run


def test_the_table_has_its_rows(evaluated):
    results = json.loads((evaluated.out / "results.json").read_text())
    rows = results["rows"]
    assert [(r["model"], r["steps"], r["guidance"], r["nfe"]) for r in rows] == [
        ("real", None, None, None), ("vae", None, None, None),
        ("cfm", 1, 1.0, 1), ("cfm", 4, 1.0, 4), ("cfm", 24, 1.0, 24), ("cfm", 24, 3.0, 48),
        ("rf1", 1, 1.0, 1), ("rf1", 4, 1.0, 4), ("rf1", 24, 1.0, 24),
        ("rf2", 1, 1.0, 1), ("rf2", 4, 1.0, 4), ("rf2", 24, 1.0, 24), ("distill", 1, 1.0, 1)]
    assert rows[0]["accuracy"] == 1.0                       # of two captions, too
    assert rows[0]["fd"] == pytest.approx(0, abs=1e-6)
    for row in rows:
        assert row["clips"] == 7 and np.isfinite(row["fd"]) and row["judge"] == "nearest log-mel"
    for row in rows[2:]:
        assert row["rtf"] > 0
    captions = [evaluated.data.captions[i] for i in evaluated.data.held_out(50)]
    model = evaluated.load("cfm")
    z0 = torch.cat([model.noise([""], 3 + k, model.latent_shape()) for k in range(7)])
    path = model.sample_latents(captions, 24, z0=z0, return_trajectory=True)
    assert rows[2]["straightness"] == pytest.approx(fa.straightness(path), rel=1e-3)
    assert results["config"]["cfm_steps"] == 4 and results["config"]["eval_clips"] == 50
    assert results["config"]["data"] == "/home/me/sounds/birds.csv"
    assert results["seed"] == 3 and results["seconds"] >= 500 and "torch" in results["hardware"]


@pytest.mark.parametrize("k", [0, 3])
@torch.no_grad()
def test_a_row_is_made_by_its_model_steps_and_guidance(evaluated, k):
    row = evaluated.data.held_out(50)[k]
    caption = evaluated.data.captions[row]
    for stage, steps, guidance in (("cfm", 24, 3), ("rf1", 4, 1), ("rf2", 1, 1), ("distill", 1, 1)):
        model = evaluated.load(stage)
        z0 = model.noise([caption], 3 + k, model.latent_shape())
        wav = quick_vocoder(model.decode(model.sample_latents([caption], steps, guidance, z0=z0)))
        _, held = wavfile.read(evaluated.out / "listen" / f"{k}-{stage}-{steps}-{guidance}.wav")
        assert np.abs(held / 32767 - wav[0].numpy()).max() < 1e-3
    mel = fa.mel_spectrogram(load_audio(evaluated.data.rows[row]["audio_path"], 8192)[None])
    model = evaluated.load("vae")
    wav = quick_vocoder(model.decode(model.encode(mel)))    # of this row's recording
    _, held = wavfile.read(evaluated.out / "listen" / f"{k}-vae.wav")
    assert np.abs(held / 32767 - wav[0].numpy()).max() < 1e-3


def test_what_limits_the_figures_is_said(evaluated, capsys):
    results = json.loads((evaluated.out / "results.json").read_text())
    evaluate.print_table(results)
    printed = capsys.readouterr().out
    page = (evaluated.out / "listen/index.html").read_text(encoding="utf-8")
    card = (evaluated.out / "rf1/README.md").read_text(encoding="utf-8")
    for text in (printed, page, card):
        assert "were trained on" in text and "160 dimensions by 7 clips" in text
    run = SimpleNamespace(data=SimpleNamespace(has_test=True))
    table = SimpleNamespace(judge=SimpleNamespace(real=torch.zeros(64, 64)))
    assert evaluate.remarks(run, table) == ["The captions were held out from training."]


def test_a_model_card_says_how_to_load_it_and_holds_no_path(evaluated):
    results = json.loads((evaluated.out / "results.json").read_text())
    card = evaluate.model_card("distill", results)
    assert "/home" not in card and str(evaluated.out) not in card and "steps=1," in card
    assert "import pretrained.text" in card and "from_pretrained" in card
    assert "| distill | 1 | 1 | 1 |" in card
    assert "steps=24," in evaluate.model_card("cfm", results)


# ---- Judges ------------------------------------------------------------------------------------

def some_data(captions: list[str], **columns: list) -> SimpleNamespace:
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return SimpleNamespace(captions=captions, rows=rows, mels=np.zeros((1, 80, 128)), cache=Path())


def test_a_clip_may_have_several_captions():
    """Ten captions of two recordings, and one in two files: whatever was judged, it is right."""
    wav = torch.rand(2, 8192, generator=rng()).repeat_interleave(5, 0) - 0.5
    judge = judges.NearestClip(some_data([str(i) for i in range(10)]), np.arange(10), wav)
    assert judge(wav)["accuracy"] == 1.0
    assert judge(wav.flip(0))["accuracy"] == 0.0            # each under the other's captions
    wrong = torch.cat([wav[5:6], wav[1:]])
    assert judge(wrong)["accuracy"] == pytest.approx(0.9)
    assert judge(wav + 1e-4 * torch.randn(wav.shape, generator=rng()))["accuracy"] == 1.0


def test_public_judge_scores_the_real_clips_best(tmp_path):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification
    clap = str(save_text_model("clap", tmp_path / "clap"))
    ast = str(tmp_path / "ast")
    config = ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=32, max_length=256, num_labels=5)
    torch.manual_seed(0)
    ASTForAudioClassification(config).save_pretrained(ast)
    ASTFeatureExtractor(max_length=256).save_pretrained(ast)
    data = Clips(write_clips(tmp_path / "clips"), tmp_path / "cache", 128)
    wav = torch.stack([load_audio(row["audio_path"], 32768) for row in data.rows])
    run = SimpleNamespace(data=data, device=torch.device("cpu"), flags=Flags(judge=f"{clap},{ast}"))
    judge = judges.make_judge(run, data.train, wav)
    real = judge(wav)
    hiss = 0.1 * torch.randn(wav.shape, generator=rng())
    noise = judge(hiss)
    assert noise["kl"] == fa.kl_divergence(judge.real_posterior, judge.hear(hiss)[1])
    assert real["fd"] == pytest.approx(0, abs=1e-6) and real["kl"] == pytest.approx(0, abs=1e-6)
    assert real["accuracy"] == 1 and noise["fd"] > 1e-3 and noise["kl"] > 1e-6
    assert -1 <= real["clap"] <= 1 and judge.name == "clap,ast"
    run.flags = Flags(judge=clap)
    alone = judges.make_judge(run, data.train, wav)(wav)
    assert alone["kl"] is None and alone["clap"] == real["clap"]


def test_the_toy_judge_asks_its_classifier(monkeypatch):
    """kl: of the real clip's posterior (¾, ¼) from (½, ½), in that order."""
    answers = {1: [0.75, 0.25], 0: [0.5, 0.5]}              # by the sign of a clip

    def judge(wav):
        posterior = [answers[int(clip.sum() > 0)] for clip in wav]
        return wav[:, :2], torch.tensor(posterior).log()

    monkeypatch.setattr(toy, "train_judge", lambda *a, **k: SimpleNamespace(judge=judge))
    monkeypatch.setattr(toy, "check_judge", lambda *a: 1.0)
    scenes = [toy.SCENES[0], toy.SCENES[1]]
    data = some_data(["a", "b"], scene=scenes)
    assert judges.is_toy(data) and not judges.is_toy(some_data(["a"], scene=["moo"]))
    assert not judges.is_toy(some_data(["a"], split=["test"]))
    run = SimpleNamespace(data=data, flags=Flags(judge="not/asked"))
    real = torch.rand(2, toy.SAMPLES, generator=rng())
    found = judges.make_judge(run, np.arange(2), real)(-real)
    assert found["kl"] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert found["accuracy"] == 0.5                         # argmax of a tie is the first
    data.mels = np.zeros((1, 80, 624))                      # the same captions at another length
    assert not judges.is_toy(data)
    assert type(judges.make_judge(fake_run(Path(), data), [0, 1], real)) is judges.NearestClip


# ---- Clips, pictures, the page -----------------------------------------------------------------

def assert_page_is_whole(page: Path, clips: int) -> None:
    """Each player and picture has a file to play or show, and a name for who cannot see it."""
    found = {"audio": [], "img": []}
    links = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.setdefault(tag, []).append(dict(attributes))
            links.extend(value for name, value in attributes if name in ("src", "href"))

    Reader().feed(page.read_text(encoding="utf-8"))
    assert len(found["audio"]) == len(found["img"]) == clips
    for player, picture in zip(found["audio"], found["img"]):
        _, wav = wavfile.read(page.parent / player["src"])
        assert "controls" in player and player["aria-label"] and picture["alt"]
        shape = matplotlib.image.imread(page.parent / picture["src"]).shape
        assert shape == (80, len(wav) // fa.HOP, 4)
    assert not [link for link in links if "//" in link]     # nothing from elsewhere
    assert "b" not in found and "script" not in found       # what captions hold is text


def test_the_page_is_whole(evaluated):
    assert_page_is_whole(evaluated.out / "listen/index.html", clips=7 * 13)


def test_the_page_escapes_what_it_shows(tmp_path):
    odd = "<b>\"a\" & 'b'</b>"
    listen.save_clip(tmp_path / "50% #1", torch.zeros(8192))
    page = listen.write_page(tmp_path, odd, odd, [(odd, odd, "50% #1"), (odd, "", "50% #1")], 1.0)
    text = page.read_text(encoding="utf-8")
    assert "<b>" not in text and '"a"' not in text and text.count("<section>") == 1
    assert text.count('src="50%25%20%231.wav"') == 2


READ_OUT = """<script>addEventListener("load", async () => {
    const players = [...document.querySelectorAll("audio")], pictures = [...document.images]
    await Promise.all(players.map(a => a.readyState ||
                                       new Promise(done => a.onloadedmetadata = a.onerror = done)))
    await Promise.all(pictures.map(i => (i.loading = "eager", i.decode().catch(() => 0))))
    document.title = JSON.stringify([players.map(a => a.duration),
                                     pictures.map(i => i.naturalWidth)])})</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not here")
def test_a_browser_plays_the_page(evaluated, tmp_path):
    shutil.copytree(evaluated.out / "listen", tmp_path / "listen")
    page = tmp_path / "listen/index.html"
    with open(page, "a", encoding="utf-8") as f:
        f.write(READ_OUT)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
               "--virtual-time-budget=30000", "--dump-dom", page.as_uri()]
    for _ in range(3):                  # its clock may run out before the files are read
        done = subprocess.run(command, capture_output=True, text=True)
        title = done.stdout.split("<title>")[1].split("</title>")[0]
        if title.startswith("["):
            break
    assert json.loads(title) == [[0.512] * 91, [32] * 91] and "CONSOLE" not in done.stderr


def test_file_names_differ_where_case_does_not_count():
    texts = ["rain 2", "rain", "rain!", "RAIN", "Straße", "STRASSE", "ΟΔΟΣ", "οδος", "…", "a" * 90]
    names = listen.file_names([*texts, "rain"])
    assert list(names) == texts and (names["rain 2"], names["rain"]) == ("rain-2", "rain")
    assert len({name.casefold() for name in names.values()}) == len(texts)
    assert all(0 < len(name.encode()) <= 70 for name in names.values())


def test_a_clip_keeps_its_name_and_its_peaks(tmp_path):
    wav = torch.tensor([0.5, 1.2, -1.2, 1.0] * 2048)
    listen.save_clip(tmp_path / "new/seed0.1", wav)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["seed0.1.png", "seed0.1.wav"]
    rate, held = wavfile.read(tmp_path / "new/seed0.1.wav")
    assert rate == 16000 and held[:4].tolist() == [16384, 32767, -32767, 32767]


def test_hear_plays_the_same_two_captions_through_the_vocoder_of_the_run(tmp_path):
    mels = fa.mel_spectrogram(torch.rand(3, 8192, generator=rng()) - 0.5)
    data = SimpleNamespace(captions=["a", "b", "a 2", "c"], file=np.array([1, 1, 2, 0]),
                           mels=mels.numpy(), held_out=lambda n: np.array([2, 3])[:n])
    run = fake_run(tmp_path, data)
    model = tiny_model()
    expected = {"vae": model.decode(model.encode(mels[[2, 0]])),
                "cfm": model.decode(model.sample_latents(["a 2", "c"], 24, seed=0)),
                "distill": model.decode(model.sample_latents(["a 2", "c"], 1, seed=0))}
    for stage, mel in expected.items():
        listen.hear(run, stage, model)
        for name, wav in zip(("a-2", "c"), quick_vocoder(mel.detach())):
            _, held = wavfile.read(tmp_path / stage / f"{name}.wav")
            assert np.abs(held / 32767 - wav.numpy()).max() < 1e-3


def test_the_loss_picture_counts_a_step_once_and_bears_torn_lines(tmp_path):
    lines = [json.dumps({"stage": stage, "step": step, "loss": 1 / step})
             for stage in ("vae", "cfm") for step in (10, 20, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "cfm", "st', "[]"]))
    listen.draw_losses(tmp_path)
    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (240, 520, 4)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "loss.png").unlink()
    listen.draw_losses(tmp_path)
    assert not (tmp_path / "loss.png").exists()
