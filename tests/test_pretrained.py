"""Other people's weights: small ones built and saved here, and the public fixtures."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flashaudio as fa
from flashaudio import DiTConfig, FlashAudio, FlashAudioConfig, InputError, TextConfig, VAEConfig
from pretrained import make_an_audio, vocoders
from tests.helpers import (BERT, PARITY, ROOT, T5, assert_parity, fixture, rng, save_text_model,
                           save_tokenizer, tiny_model)

PUBLIC = FlashAudioConfig(
    VAEConfig(channels=32, channel_mult=(1, 2, 2), res_blocks=1, down_levels=(0, 1)),
    DiTConfig(context_dim=16, hidden_size=32, num_heads=2, depth=1, integer_time=True),
    TextConfig("make-an-audio", max_length=77, t5=T5,
               bert={**BERT, "num_attention_heads": 1, "max_position_embeddings": 80}))


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint, public.ckpt, its tokenizers and the model itself, ours/."""
    folder = tmp_path_factory.mktemp("public")
    for name in ("bert", "t5"):
        save_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps({"model_type": name}))
    tokenizers = (str(folder / "bert"), str(folder / "t5"))
    model = tiny_model(config=replace(PUBLIC, text=replace(PUBLIC.text, tokenizers=tokenizers)))
    model.save_pretrained(folder / "ours")
    theirs = {ours: prefix for prefix, ours in make_an_audio.PREFIXES.items()}
    state = {"alphas_cumprod": torch.zeros(1000)}
    for name, value in model.state_dict().items():
        part, dot, rest = name.partition(".")
        state[theirs.get(part + dot, part) + rest] = value
    state["cond_stage_model.caption_encoder.base.embeddings.position_ids"] = torch.zeros(1, 80)
    torch.save({"state_dict": state, "epoch": 1, "global_step": 2}, folder / "public.ckpt")
    return folder


def load_public(folder: Path) -> FlashAudio:
    return make_an_audio.load(folder / "public.ckpt", (str(folder / "bert"), str(folder / "t5")))


def weights(folder: Path) -> dict:
    return torch.load(folder / "public.ckpt", weights_only=True)["state_dict"]


# ---- Make-An-Audio 3 -----------------------------------------------------------------------------

@torch.no_grad()
def test_parity_of_a_whole_checkpoint(tmp_path, monkeypatch):
    """VAE, DiT and text stage in one Lightning file, as the public ones are."""
    monkeypatch.setattr(make_an_audio, "BERT_HEAD", 8)  # the one size that no tensor tells
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, name: tmp_path / name)
    state = {"scale_factor": torch.tensor(0.7), "betas": torch.zeros(1000)}
    for prefix, part in zip(make_an_audio.PREFIXES, ("vae", "dit", "text")):
        state |= {prefix + name: value for name, value in fixture(f"{part}_weights").items()}
    torch.save({"state_dict": state}, tmp_path / "public.ckpt")
    model = make_an_audio.load("me/model:public.ckpt")
    vae, text, flow = fixture("vae_io"), fixture("text_io"), fixture("cfm_io")
    ids = torch.cat([text["bert_input_ids"], text["t5_input_ids"]], 1)
    assert_parity(model.text(ids), text["context"])
    assert_parity(model.sample_latents(flow["cond"], 4, z0=flow["x0"]), flow["final_no_cfg"])
    assert_parity(model.decode(0.7 * vae["z"]), vae["decoded"])
    assert model.scale_factor == 0.7
    assert model.config.dit == DiTConfig(20, 48, 64, 4, 2, integer_time=True)


def published(file: str) -> dict[str, torch.Tensor]:
    """Keys at full size; a line of the file is one for each number: block.{0..1}.bias  [8]"""
    state = {}
    for line in (PARITY / file).read_text().splitlines():
        name, size = line.split("  ")
        ends = re.findall(r"\{(\d+)\.\.(\d+)\}", name)
        for numbers in itertools.product(*(range(int(i), int(j) + 1) for i, j in ends)):
            key = re.sub(r"\{.*?\}", "{}", name).format(*numbers)
            state[key] = torch.empty(json.loads(size), device="meta")
    return state


def test_the_published_keys_and_shapes_are_ours_at_full_size():
    state = make_an_audio.rename(published("make_an_audio_keys.txt"))
    config = make_an_audio.make_an_audio_config(state)
    assert config.vae == VAEConfig() and config.dit == DiTConfig(integer_time=True)
    assert config.text.bert["num_attention_heads"] == 12 and config.text.t5["d_kv"] == 64
    assert config.text.tokenizers == ("bert-base-uncased", "google/t5-v1_1-large")
    folded = vocoders.fold_weight_norm(published("bigvgan_keys.txt"))
    with torch.device("meta"):                          # loading checks every key and shape
        FlashAudio(config).load_state_dict(state)
        vocoders.BigVGAN(1536).load_state_dict(folded)


def test_the_public_text_stage_reads_the_caption_twice(public):
    text, letters = load_public(public).text, "abcdefghijklmnopqrstuvwxyz<>&@ "     # of ids 2, 3..
    ids = text.tokenize(["a bell", "a bell <bell& all>@<x& end>", ""])
    read = ["".join(letters[i - 2] for i in row if i) for row in ids.view(6, 77).tolist()]
    assert read == ["a bell", "<a bell& all>", "a bell", "<bell& all>@<x& end>", "", ""]
    context = text(["a bell", ""])
    assert context.shape == (2, 154, 16) and not context.requires_grad and not text.trained


def test_a_text_stage_says_what_it_needs(public, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^/gone: .*tokenizer.*$"):
        make_an_audio.load(public / "public.ckpt", ("/gone", "/gone"))
    (tmp_path / "model.safetensors").write_bytes((public / "ours/model.safetensors").read_bytes())
    held = (public / "ours/config.json").read_text().replace(str(public), "/gone")
    (tmp_path / "config.json").write_text(held)
    with pytest.raises(InputError, match="^/gone/bert: .*tokenizers in its config.json.$"):
        FlashAudio.from_pretrained(tmp_path).generate("rain")
    monkeypatch.delitem(fa.TEXT_ENCODERS, "make-an-audio")
    with pytest.raises(InputError, match="^.*`import pretrained.make_an_audio` first.*$"):
        FlashAudio.from_pretrained(public / "ours")


def test_the_music_model_has_t5_alone_and_a_bare_one_takes_contexts(public, tmp_path, monkeypatch):
    music = {name.replace("t5_transformer", "transformer"): value
             for name, value in weights(public).items() if "caption_encoder" not in name}
    torch.save({"state_dict": music}, tmp_path / "music.ckpt")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = make_an_audio.load("~/music.ckpt", (str(public / "t5"),)).text
    t5 = load_public(public).text.t5_transformer
    torch.testing.assert_close(text(["bell"]), text.states(t5, text.tokenize(["bell"])))
    with pytest.raises(InputError, match="music.ckpt.* tokenizers"):
        make_an_audio.load("~/music.ckpt", ("bert", "t5"))
    bare = {name: value for name, value in music.items() if "cond_stage_model" not in name}
    torch.save(bare, tmp_path / "bare.ckpt")
    model = make_an_audio.load(tmp_path / "bare.ckpt")
    assert model.generate(torch.zeros(2, 5, 16), seconds=0.512, seed=0).shape == (2, 8192)
    with pytest.raises(InputError, match="no text encoder"):
        model.generate(["a bell"])


DIT, CONV = "model.diffusion_model.", "first_stage_model.encoder.conv_in.weight"


@pytest.mark.parametrize("changes, expected", [
    ({DIT + "t_embedder.mlp.0.weight": None}, "Missing key.*dit.t_embedder.mlp.0.weight"),
    ({DIT + "proj_in.weight": None}, "missing.*dit.proj_in.weight"),    # the size is read from it
    ({DIT + "proj_in.bias": torch.ones(9)}, "misshapen.*dit.proj_in.bias"),
    ({"ema.decay": torch.ones(())}, "Unexpected key.*ema.decay"),
    ({CONV: torch.ones(0, 80, 5)}, "misshapen"), ({CONV: "text"}, "misshapen"),
    ({"hparams": Path("x")}, "besides tensors")])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(public, tmp_path, changes, expected):
    state = {**weights(public), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=f"^.*other.ckpt: .*{expected}.*$"):
        make_an_audio.load(tmp_path / "other.ckpt")


# ---- vocoders ------------------------------------------------------------------------------------

@torch.no_grad()
def test_parity_bigvgan():
    folder = ROOT.parent / "shared" / "parity"          # a megabyte more than a clone should hold
    if not folder.is_dir():
        pytest.skip("the weights of a whole BigVGAN are not here")
    io = load_file(folder / "bigvgan_io.safetensors")
    vocoder = vocoders.load(f"bigvgan:{folder / 'bigvgan_weights.safetensors'}")
    assert_parity(vocoder(io["mel"])[:, None], io["wav"])


@torch.no_grad()
def test_parity_of_the_activation_of_bigvgan():
    io, activation = fixture("bigvgan_io"), vocoders.Activation(32)
    activation.load_state_dict({name: io[name] for name in ("act.alpha", "act.beta")})
    assert_parity(activation(io["act_in"]), io["act_out"])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_bigvgan_folds_weight_norm(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, file = vocoders.BigVGAN(64), tmp_path / "g_00001000"
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            torch.nn.utils.weight_norm(layer).weight_v.data.mul_(3)     # its length does not matter
    torch.save({"generator": model.state_dict()}, file)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    vocoder = vocoders.load(f"bigvgan:~/{tmp_path.name}")
    mel = torch.randn(2, 80, 5, generator=rng())
    assert vocoder(mel).shape == (2, 5 * 256) and vocoder(mel).dtype == torch.float32
    # The weights differ by their rounding, 1e-7; the rest is done in float64.
    torch.testing.assert_close(vocoder.double()(mel), model.double()(mel), rtol=1e-4, atol=1e-5)
    torch.save({"generator": {**model.state_dict(), "odd": mel}}, file)
    with pytest.raises(InputError, match="^.*g_00001000: .*Unexpected key.*odd.*$"):
        vocoders.load(f"bigvgan:{tmp_path}")


@pytest.mark.parametrize("name, expected", [
    ("wavenet", "unknown vocoder"), ("bigvgan:", "unknown vocoder"), ("hifigan", "unknown vocoder"),
    ("bigvgan:gone", "gone: no readable"), (f"bigvgan:{__file__}", "pretrained.py: no readable"),
    ("bigvgan:.", "0 checkpoints"), ("hifigan:/gone", "/gone: ")])
def test_a_vocoder_that_is_not_there_is_named_in_one_line(name, expected):
    assert vocoders.load("griffin-lim") is fa.griffin_lim
    with pytest.raises(InputError, match=f"^.*{expected}.*$"):
        vocoders.load(name)


def test_hifigan_gets_the_mels_it_was_trained_on(tmp_path, monkeypatch):
    from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig
    SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=16)).save_pretrained(tmp_path)
    vocoder, seen = vocoders.load(f"hifigan:{tmp_path}"), []
    tones = torch.tensor([300, 440, 1250, 3000, 5200])[:, None]
    wav = 0.1 * torch.sin(2 * math.pi * tones * torch.arange(16384) / 16000).sum(0)
    wav += 0.02 * torch.randn(16384, generator=rng())
    ours = fa.mel_spectrogram(wav[None])
    assert vocoder(ours).shape == (1, 16384)

    def forward(self, mel):                             # keeps the mel, and counts the samples
        seen.append(mel[0])
        return torch.arange(256.0 * mel.shape[1])[None]

    monkeypatch.setattr(SpeechT5HifiGan, "forward", forward)
    moved = vocoder(ours)[0]                            # by half a hop
    assert not moved[:128].any() and torch.equal(moved[128:], torch.arange(16384.0 - 128))
    theirs = SpeechT5FeatureExtractor()(audio_target=wav.numpy(), sampling_rate=16000)
    theirs = torch.tensor(theirs["input_values"][0]).mean(0)
    gap, gap_of_ours = ((mel.mean(0) - theirs).abs().mean() for mel in (seen[0], ours[0].T))
    assert gap < 0.1 < gap_of_ours                      # log10, over the bands


# ---- text models of transformers -----------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bert", "t5", "clap"])
def test_any_text_model_of_transformers_gives_its_token_states(tmp_path, kind):
    source = str(save_text_model(kind, tmp_path))
    text = fa.PretrainedText(TextConfig(source, max_length=12), 16)
    context = text(["rain", "a bell"])
    assert context.shape == (2, 12, 16)
    assert not context[0, 4:].any() and context[0, :4].abs().min() > 0      # padding is 0
    assert not (text.trained or context.requires_grad or list(text.parameters()))       # frozen
    text.double()       # the same in any company, but for T5's norms in float32, 1e-7
    torch.testing.assert_close(text(["rain"]), text(["rain", "a bell"])[:1], rtol=1e-5, atol=1e-5)


def test_a_text_model_that_brings_code_is_refused(tmp_path, monkeypatch):
    config = {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")       # transformers would ask
    with pytest.raises(InputError, match=f"^.*{tmp_path.name}: .*$"):
        fa.PretrainedText(TextConfig(str(tmp_path)), 16)
    assert not (tmp_path / "ran").exists()
