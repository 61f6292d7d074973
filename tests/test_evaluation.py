"""Measures, judges, the table of a run, model cards, the page to listen to. The run is a stand-in:
models of random weights, and a vocoder that answers at once."""

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.io import wavfile

import flashaudio as fa
from data import toy
from data.clips import Clips
from evaluation import evaluate, judges, listen, toy_judge
from evaluation.measures import clap_score, frechet_distance, kl_divergence
from flashaudio import InputError
from tests.helpers import quick_vocoder, rng, save_text_model, tiny_model, write_clips
from train import Flags


def fake_run(out: Path, data, stages: tuple[str, ...] = (), judge: str = "") -> SimpleNamespace:
    models = {stage: tiny_model(i) for i, stage in enumerate(stages)}
    for stage in stages:
        (out / stage).mkdir(parents=True)
    flags = Flags(data="/home/me/sounds/birds.csv", judge=judge, eval_clips=50, seed=3)
    return SimpleNamespace(flags=flags, out=out, data=data, device=torch.device("cpu"),
                           began=time.time(), vocoder=quick_vocoder, load=models.__getitem__,
                           folder=lambda stage: out / stage, finished=models.__contains__)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> SimpleNamespace:
    """A run after its evaluation: six tones, the first under two captions, no test split."""
    folder = tmp_path_factory.mktemp("run")
    manifest = write_clips(folder / "clips")
    with open(manifest, "a", encoding="utf-8") as f:
        f.write('0.wav,"<b>""first"" & lowest</b>"\n')
    data = Clips(manifest, folder / "cache", 32)
    run = fake_run(folder / "out", data, ("vae", "cfm", "rf1", "rf2", "distill"))
    evaluate.evaluate(run)
    return run


def test_measures_by_value():
    """fd of Gaussians of diagonal covariance is Σ (difference of means)² + (that of stds)²."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * 0.75 ** 0.5    # covariance 1
    x = corners * torch.tensor([1.0, 2])
    y = corners * torch.tensor([3.0, 5]) + torch.tensor([1.0, 0])
    assert frechet_distance(x, y) == pytest.approx(1 + 2 ** 2 + 3 ** 2, rel=1e-6)
    assert frechet_distance(x[:, :1], y[:, :1]) == pytest.approx(1 + 2 ** 2, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    nats = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kl_divergence(p.log(), q.log()) == pytest.approx(nats, rel=1e-5)
    audio, text = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])
    assert clap_score(audio, text) == pytest.approx((1 + 0.5 ** 0.5) / 2)
    with pytest.raises(InputError, match="1 with 4"):
        frechet_distance(x[:1], y)
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(x, torch.where(y == y[0, 0], torch.nan, y))


# ---- The table of a run ------------------------------------------------------------------------

def test_the_table_has_its_rows(evaluated):
    results = json.loads((evaluated.out / "results.json").read_text())
    rows = results["rows"]
    assert [(r["model"], r["steps"], r["guidance"], r["nfe"]) for r in rows] == [
        ("floor", None, None, None), ("vae", None, None, None),
        ("cfm", 1, 1.0, 1), ("cfm", 24, 1.0, 24), ("cfm", 24, 3.0, 48),
        ("rf1", 24, 1.0, 24), ("rf1", 24, 3.0, 48),
        ("rf2", 1, 1.0, 1), ("rf2", 4, 1.0, 4), ("rf2", 24, 1.0, 24), ("distill", 1, 1.0, 1)]
    assert rows[0]["fd"] is None                            # no recording is left to train on
    for row in rows[1:]:
        assert row["clips"] == 7 and np.isfinite(row["fd"]) and row["judge"] == "nearest log-mel"
    assert all(row["rtf"] > 0 for row in rows[2:])
    captions = [evaluated.data.captions[i] for i in evaluated.data.held_out(50)]
    model = evaluated.load("cfm")
    z0 = torch.cat([model.noise([""], 3 + k, model.latent_shape()) for k in range(7)])
    path = model.sample_latents(captions, 24, z0=z0, return_trajectory=True)
    assert rows[3]["straightness"] == pytest.approx(fa.straightness(path), rel=1e-3)
    assert rows[2]["straightness"] is None                  # of one step there is none
    assert results["config"] == asdict(evaluated.flags) and results["seed"] == 3
    assert 0 < results["seconds"] < 3600 and "torch" in results["hardware"]
    assert_page_is_whole(evaluated.out / "listen/index.html", clips=7 * 11)


@torch.no_grad()
def test_a_row_is_made_by_its_model_steps_and_guidance(evaluated):
    data = evaluated.data
    row = data.held_out(50)[3]
    model = evaluated.load("vae")
    z = model.encode(torch.tensor(data.mels[data.file[[row]]]))         # of this row's recording
    mels = {"vae": model.decode(z)}
    for stage, steps, guidance in (("cfm", 24, 3), ("rf1", 24, 3), ("rf2", 1, 1),
                                   ("distill", 1, 1)):
        model = evaluated.load(stage)
        z0 = model.noise([""], 3 + 3, model.latent_shape())
        z = model.sample_latents(data.captions[row], steps, guidance, z0=z0)
        mels[f"{stage}-{steps}-{guidance}"] = model.decode(z)
    for name, mel in mels.items():
        _, held = wavfile.read(evaluated.out / f"listen/3-{name}.wav")
        assert np.abs(held / 32767 - quick_vocoder(mel)[0].numpy()).max() < 1e-3        # 16 bits


def test_a_fork_has_the_rows_of_its_stages_and_is_told_what_limits_them(evaluated, tmp_path,
                                                                        capsys):
    run = fake_run(tmp_path / "out", evaluated.data, ("vae", "cfm", "rf1"))
    evaluate.evaluate(run)
    rows = json.loads((run.out / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows[1:]] == ["vae", *["cfm"] * 3, *["rf1"] * 2]
    page = (run.out / "listen/index.html").read_text(encoding="utf-8")
    card = (run.out / "rf1/README.md").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, page, card):
        assert "were trained on" in text and "floor" in text    # of the data, of the judge


def test_a_card_is_that_of_its_stage_and_holds_no_path(evaluated):
    card = (evaluated.out / "distill/README.md").read_text(encoding="utf-8")
    assert "/home" not in card and str(evaluated.out) not in card
    assert "stage distill" in card and "steps=1," in card and "clap" not in card
    assert "steps=24," in (evaluated.out / "cfm/README.md").read_text(encoding="utf-8")


# ---- Judges ------------------------------------------------------------------------------------

def some_data(captions: list[str], wav: torch.Tensor, **columns: list) -> SimpleNamespace:
    """Clips that are all judged, so that none is left for a floor."""
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return SimpleNamespace(captions=captions, rows=rows, mels=fa.mel_spectrogram(wav).numpy(),
                           start=np.zeros(len(rows), int),
                           train=np.arange(0), file=np.arange(len(captions)))


def judge_of(wav: torch.Tensor, captions: list[str] | None = None) -> judges.NearestClip:
    captions = captions or [str(i) for i in range(len(wav))]
    return judges.NearestClip(some_data(captions, wav), np.arange(len(wav)), wav)


def hits(n: int, seed: int) -> torch.Tensor:
    """Decaying tones (n, 16384), each at its pitch, 60 dB down after 90 to 450 ms; then silence."""
    t = torch.arange(16384) / fa.SAMPLE_RATE
    pitch, decay = torch.rand(2, n, 1, generator=rng(seed))
    tones = torch.sin(2 * torch.pi * (300 + 2000 * pitch) * t)
    return 0.5 * tones * 10 ** (-t / (0.03 + 0.12 * decay)) * (t < 0.5)


def test_a_clip_may_have_several_captions_but_one_for_all_tells_nothing():
    """Ten captions of two recordings, and one in two files: whatever was judged, it is right."""
    wav = torch.rand(2, 8192, generator=rng()).repeat_interleave(5, 0) - 0.5
    judge = judge_of(wav)
    assert judge(wav)["accuracy"] == 1.0
    assert judge(wav.flip(0))["accuracy"] == 0.0            # each under the other's captions
    assert judge(torch.cat([wav[5:6], wav[1:]]))["accuracy"] == pytest.approx(0.9)
    judge = judge_of(wav, ["a drum"] * 10)
    assert judge(wav)["accuracy"] is None and "same caption" in " ".join(judge.remarks)


def test_the_embedding_by_value():
    """Frames of 0, -1, -4 and -5 in all bands weigh 1, 2/3, 0 and 0, as all below -3 is silence."""
    mels = torch.tensor([0.0, -1.0, -4.0, -5.0]).expand(1, 80, 4)
    embedding = judges.NearestClip.embed(mels + 0.5)[0]     # another level moves the means alone
    mean = -(2 / 3) / (5 / 3)
    variance = (mean ** 2 + 2 / 3 * (-1 - mean) ** 2) / (5 / 3)
    torch.testing.assert_close(embedding[:80], torch.full((80,), mean + 0.5))
    torch.testing.assert_close(embedding[80:160], torch.full((80,), variance ** 0.5))
    assert embedding[160].item() == pytest.approx(80 ** 0.5 * np.log10(5 / 3))


def test_silence_neither_hides_nor_makes_a_difference():
    real, made, silence = hits(40, 0), hits(40, 1), torch.zeros(40, 49152)
    right = judge_of(real)(made)["fd"]
    longer = judge_of(torch.cat([real, silence], 1))(torch.cat([made, silence], 1))["fd"]
    assert longer == pytest.approx(right, rel=0.02)         # a window at the end is mirrored
    quiet = 1e-5 * torch.randn(made.shape, generator=rng(2))
    assert judge_of(real)(made + quiet)["fd"] == pytest.approx(right, rel=0.1)
    assert judge_of(real)(real / 2 + quiet)["accuracy"] == 1.0
    repeated = torch.stack([clip[:4096].repeat(4) for clip in made])
    for wrong in (torch.zeros_like(made), quiet, repeated):
        assert judge_of(real)(wrong)["fd"] > 5 * right
    assert judge_of(real)(quiet)["accuracy"] <= 0.1         # 1 in 40 by chance


def test_fd_has_a_floor_and_a_quarter_as_many_dimensions_as_there_are_clips(tmp_path):
    data = Clips(write_clips(tmp_path / "clips", 16), tmp_path / "cache", 64)
    rows = data.held_out(8)
    judge = judges.make_judge(fake_run(tmp_path, data), rows, data.waveforms(rows))
    assert judge.real.shape == (8, 2)
    floor = judge(data.waveforms(np.setdiff1d(data.train, rows)))["fd"]
    assert judge.floor == {"fd": pytest.approx(floor, rel=1e-3), "clips": 8} and floor > 0


def test_guidance_is_that_whose_samples_are_nearest_to_clips(tmp_path, monkeypatch, capsys):
    """A flow that makes the very clips at ω = 1.5 and others the further off it is."""
    data = Clips(write_clips(tmp_path / "clips", 12), tmp_path / "cache", 64)
    run, model = fake_run(tmp_path, data), tiny_model()
    run.generator = lambda *what: rng()
    clips = torch.tensor(data.mels[data.file])

    def sampler(model, z0, context, null, steps, guidance, return_trajectory):
        return z0.new_full((len(z0), 1, 1), guidance - 1.5)

    monkeypatch.setattr(model, "sampler", sampler)
    monkeypatch.setattr(model, "decode", lambda z: clips * (1 + z.abs()))
    assert judges.best_guidance(run, model, 4) == 1.5
    said = capsys.readouterr().out
    assert "0 at ω = 1.5" in said and "made at 1.5" in said
    monkeypatch.setattr(model, "sampler", None)                 # it is looked up
    assert judges.best_guidance(run, model, 4) == 1.5


def test_a_clap_judge_scores_the_real_clips_best(tmp_path):
    clap = str(save_text_model("clap", tmp_path / "clap"))
    data = Clips(write_clips(tmp_path / "clips"), tmp_path / "cache", 128)
    wav = data.waveforms(data.train[:4])
    judge = judges.make_judge(fake_run(tmp_path, data, judge=clap), data.train[:4], wav)
    real, noise = judge(wav), judge(0.1 * torch.randn(wav.shape, generator=rng()))
    assert real["fd"] == pytest.approx(0, abs=1e-6) and noise["fd"] > 1e-3
    assert real["accuracy"] == 1 and judge.name == "clap" and judge.floor["clips"] == 2
    assert real["clap"] == pytest.approx(clap_score(judge.hear(wav), judge.text))


def test_the_toy_judge_hears_real_clips_and_can_be_trained_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "REFERENCE", 125)               # and four of each scene
    scenes = [toy.with_details(scene, np.random.default_rng(7)) for scene in toy.SCENES]
    wavs = [toy.synthesise(scene, np.random.default_rng((7, i))) for i, scene in enumerate(scenes)]
    wav = torch.from_numpy(np.stack(wavs))
    data = some_data(scenes, wav, scene=scenes)
    judge = judges.make_judge(fake_run(tmp_path, data, judge="not/asked"), range(len(wav)), wav)
    assert judge.floor["accuracy"] >= 0.95 and judge.floor["measured"] >= 0.97
    assert judge.real.shape == (4 * len(scenes), 64)
    assert judge(wav) == judge.floor and judge.floor["fd"] < judge(wav.flip(1))["fd"] / 3
    posterior = judge.judge(fa.mel_spectrogram(wav.flip(1)))[1]
    assert judge(wav.flip(1))["kl"] == kl_divergence(judge.real_posterior, posterior)
    learnt = toy_judge.train_judge(tmp_path / "judge.safetensors", steps=60)
    heard = learnt(fa.mel_spectrogram(wav))[1].argmax(1)
    assert (heard == judge.classes).float().mean() >= 0.8       # is .94; by chance .008
    again = toy_judge.train_judge(tmp_path / "judge.safetensors", steps=0)
    assert torch.equal(learnt.head.weight, again.head.weight)
    assert not judges.is_toy(some_data(scenes, wav, scene=[*scenes[1:], "moo"]))
    assert not judges.is_toy(some_data(scenes, wav[:, :8192], scene=scenes))


@pytest.mark.parametrize("scene, named, found", [
    ("chirp:up", "chirp:up", {"direction": True}), ("chirp:up", "chirp:down", {"direction": False}),
    ("knocks:3", "knocks:3", {"count": True}), ("knocks:2", "knocks:3", {"count": False}),
    ("bell>rain", "bell>rain", {"order": True}), ("rain>bell", "bell>rain", {"order": False})])
def test_what_the_caption_names_is_measured_and_can_be_wrong(scene, named, found):
    assert toy_judge.measure(toy.synthesise(scene, np.random.default_rng(0)), named) == found


# ---- Clips, pictures, the page -----------------------------------------------------------------

def assert_page_is_whole(page: Path, clips: int) -> None:
    """Each player and picture has a file to play or show, and a name for who cannot see it."""
    text = page.read_text(encoding="utf-8")
    players = re.findall(r'<audio controls .*src="(.+?)" aria-label=".+?">', text)
    pictures = re.findall(r'<img src="(.+?)" alt=".+?"', text)
    assert len(players) == len(pictures) == clips == text.count("<figure>")
    for player, picture in zip(players, pictures):
        _, wav = wavfile.read(page.parent / player)
        shape = matplotlib.image.imread(page.parent / picture).shape
        assert shape == (80, len(wav) // fa.HOP, 4)
    assert not re.search(r'(src|href)="[^"]*//', text)      # nothing from elsewhere


def test_the_page_escapes_what_it_shows_and_a_clip_keeps_its_name_and_peaks(tmp_path):
    odd = "<b>\"a\" & 'b' $title</b>"
    listen.save_clip(tmp_path / "50% #1", torch.tensor([0.5, 1.2, -1.2, 1.0] * 2048))
    page = listen.write_page(tmp_path, odd, odd, [(odd, odd, "50% #1"), (odd, "", "50% #1")], 1.0)
    text = page.read_text(encoding="utf-8")
    assert "<b>" not in text and '"a"' not in text and text.count("<section>") == 1
    assert text.count('src="50%25%20%231.wav"') == 2 and "$title" in text
    rate, held = wavfile.read(tmp_path / "50% #1.wav")
    assert rate == 16000 and held[:4].tolist() == [16384, 32767, -32768, 32767]


def test_file_names_differ_where_case_does_not_count():
    texts = ["rain 2", "rain", "rain!", "RAIN", "Straße", "STRASSE", "ΟΔΟΣ", "οδος", "…"]
    names = listen.file_names([*texts, "rain"])
    assert list(names) == texts and (names["rain 2"], names["rain"]) == ("rain-2", "rain")
    assert len({name.casefold() for name in names.values()}) == len(texts)
    assert 0 < len(listen.file_names(["ü" * 300]).popitem()[1].encode()) <= 60


def test_the_loss_picture_has_a_panel_for_each_stage_and_bears_torn_lines(tmp_path):
    lines = [json.dumps({"stage": stage, "step": 10, "loss": 0.1}) for stage in ("vae", "cfm")]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "cfm", "st']))
    listen.draw_losses(tmp_path)
    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (240, 520, 4)
