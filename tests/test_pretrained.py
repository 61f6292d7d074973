"""Other people's weights: small ones built and saved here, and the public fixtures."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import flashaudio as fa
from flashaudio import DiTConfig, FlashAudio, FlashAudioConfig, InputError, TextConfig, VAEConfig
from pretrained import make_an_audio, vocoders
from pretrained.text import PretrainedText
from tests.helpers import (BERT, PARITY, T5, assert_parity, fixture, public_fixtures, rng,
                           save_text_model, save_tokenizer, tiny_model)

PUBLIC = FlashAudioConfig(
    VAEConfig(channels=32, channel_mult=(1, 2, 2), res_blocks=1, down_levels=(0, 1)),
    DiTConfig(context_dim=16, hidden_size=32, num_heads=2, depth=1),
    TextConfig("make-an-audio", max_length=77, bert={**BERT, "max_position_embeddings": 80}, t5=T5),
    integer_time=True)


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint, public.ckpt, its tokenizers and the model itself, ours/."""
    folder = tmp_path_factory.mktemp("public")
    for name in ("bert", "t5"):
        save_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps({"model_type": name, **BERT}))
    model = tiny_model(config=PUBLIC)
    model.config.text.tokenizers = (str(folder / "bert"), str(folder / "t5"))
    model.save_pretrained(folder / "ours")
    state = {make_an_audio.their_name(name): value for name, value in model.state_dict().items()}
    state["alphas_cumprod"] = torch.zeros(1000)
    state["cond_stage_model.caption_encoder.base.embeddings.position_ids"] = torch.zeros(1, 80)
    torch.save({"state_dict": state, "epoch": 1, "global_step": 2}, folder / "public.ckpt")
    return folder


def load_public(folder: Path) -> FlashAudio:
    return make_an_audio.load(folder / "public.ckpt", (str(folder / "bert"), str(folder / "t5")))


def weights(folder: Path) -> dict:
    return torch.load(folder / "public.ckpt", weights_only=True)["state_dict"]


# ---- Make-An-Audio 3 -----------------------------------------------------------------------------

def test_a_public_checkpoint_gives_the_model_it_was_made_from(public, tmp_path):
    model, ours = load_public(public), FlashAudio.from_pretrained(public / "ours")
    assert model.config == ours.config and not model.training
    model.save_pretrained(tmp_path)
    again = FlashAudio.from_pretrained(tmp_path)
    for name, value in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name
    wav = again.generate(["a bell"], 2, 3.0, seconds=0.512, seed=0)
    assert wav.shape == (1, 8192) and wav.abs().max() > 0


@public_fixtures
@torch.no_grad()
def test_parity_of_a_whole_checkpoint(tmp_path):
    """VAE, DiT and text stage in one Lightning file, as the public ones are."""
    (tmp_path / "bert").mkdir()
    heads = {"num_attention_heads": 4}                  # the one size that no tensor tells
    (tmp_path / "bert/config.json").write_text(json.dumps(heads))
    state = {"scale_factor": torch.tensor(0.7), "betas": torch.zeros(1000)}
    for prefix, part in zip(make_an_audio.PREFIXES, ("vae", "dit", "text")):
        state |= {prefix + name: value for name, value in fixture(f"{part}_weights").items()}
    torch.save({"state_dict": state}, tmp_path / "public.ckpt")
    model = make_an_audio.load(tmp_path / "public.ckpt", (str(tmp_path / "bert"), "unused"))
    vae, text, flow = fixture("vae_io"), fixture("text_io"), fixture("cfm_io")
    ids = torch.cat([text["bert_input_ids"], text["t5_input_ids"]], 1)
    assert_parity(model.text(ids), text["context"])
    assert_parity(model.sample_latents(flow["cond"], 4, z0=flow["x0"]), flow["final_no_cfg"])
    assert_parity(model.decode(0.7 * vae["z"]), vae["decoded"])
    assert model.scale_factor == 0.7 and model.config.dit == DiTConfig(20, 48, 64, 4, 2)


def published(heading: str) -> dict[str, torch.Tensor]:
    """The keys below a heading of KEYS.md. A line: norm.{0..1}.{weight,bias}  [8, 8] / [8]"""
    block = (PARITY / "KEYS.md").read_text().split(heading)[1].split("```")[1]
    state = {}
    for line in block.strip().splitlines():
        pattern, sizes = line.split("  ")
        sizes = [json.loads(size) for size in sizes.split(" / ")]
        choices = []
        for braces in re.findall(r"\{(.*?)\}", pattern):
            first, dots, last = braces.partition("..")
            choices.append(range(int(first), int(last) + 1) if dots else braces.split(","))
        for chosen in itertools.product(*choices):
            name = re.sub(r"\{.*?\}", "{}", pattern).format(*chosen)
            size = sizes[-1] if name.endswith("bias") else sizes[0]
            state[name] = torch.empty(size, device="meta")
    return state


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


@public_fixtures
@pytest.mark.parametrize("heading, dit", [
    ("\nDiT-M:", DiTConfig()),
    ("\nDiT-XL:", DiTConfig(hidden_size=1152, num_heads=16, depth=28))])
def test_the_published_keys_and_shapes_are_ours_at_full_size(heading, dit):
    held = {"scale_factor": torch.empty(())}
    for prefix, part in zip(make_an_audio.PREFIXES, ("## VAE (1-D", heading, "## Text stage")):
        held |= {prefix + name: value for name, value in published(part).items()}
    state = make_an_audio.rename(held)
    config = make_an_audio.make_an_audio_config(state)
    assert config.vae == VAEConfig() and config.dit == dit and config.integer_time
    assert config.text.bert["num_attention_heads"] == 12 and config.text.t5["d_kv"] == 64
    assert config.text.tokenizers == ("bert-base-uncased", "google/t5-v1_1-large")
    with torch.device("meta"):
        model = FlashAudio(config)
    assert shapes_of(model.state_dict()) == shapes_of(state)


def test_the_public_text_stage_reads_the_caption_twice(public):
    def padded(text: str) -> list[int]:                 # 0 is padding, 1 what is no letter
        ids = ["abcdefghijklmnopqrstuvwxyz<>&@".find(letter) + 2 for letter in text]
        return ids + [0] * (77 - len(ids))

    text = load_public(public).text
    ids = text.tokenize(["a bell", "a bell <bell& all>@<x& end>", ""]).tolist()
    assert ids[0] == padded("a bell") + padded("<a bell& all>")
    assert ids[1] == padded("a bell") + padded("<bell& all>@<x& end>")
    assert ids[2] == 154 * [0]
    context = text(["a bell", ""])
    assert context.shape == (2, 154, 16) and not context.requires_grad and not text.trained


def test_the_music_model_has_t5_alone(public, tmp_path):
    music = {name.replace("t5_transformer", "transformer"): value
             for name, value in weights(public).items() if "caption_encoder" not in name}
    torch.save({"state_dict": music}, tmp_path / "music.ckpt")
    text = make_an_audio.load(tmp_path / "music.ckpt", (str(public / "t5"),)).text
    t5 = load_public(public).text.t5_transformer
    torch.testing.assert_close(text(["bell"]), text.states(t5, text.tokenize(["bell"])))
    usual = make_an_audio.load(tmp_path / "music.ckpt").config.text.tokenizers
    assert usual == ("google/flan-t5-large",)
    with pytest.raises(InputError, match="music.ckpt.* tokenizers"):
        make_an_audio.load(tmp_path / "music.ckpt", ("bert", "t5"))


def test_a_checkpoint_without_text_stage_takes_contexts(public, tmp_path):
    bare = {k: v for k, v in weights(public).items() if not k.startswith("cond_stage_model")}
    torch.save(bare, tmp_path / "bare.ckpt")
    model = make_an_audio.load(tmp_path / "bare.ckpt")
    assert model.generate(torch.zeros(2, 5, 16), seconds=0.512, seed=0).shape == (2, 8192)
    with pytest.raises(InputError, match="no text stage"):
        model.generate(["a bell"])


PROJ = "model.diffusion_model.proj_in.weight"
MLP = "model.diffusion_model.t_embedder.mlp.0.weight"
CONV = "first_stage_model.encoder.conv_in.weight"


@pytest.mark.parametrize("changes, expected", [
    ({MLP: None}, MLP),
    ({PROJ: None}, "proj_in.weight"),                   # the size is read from it
    ({"ema.decay": torch.ones(())}, "left over: ['ema.decay']"),
    ({MLP: torch.ones(32, 9)}, "t_embedder.mlp.0"),
    ({CONV: torch.ones(0, 80, 5)}, "misshapen"),
    ({CONV: "text"}, "misshapen"),
    ({"hparams": Path("x")}, "besides tensors")])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(public, tmp_path, changes, expected):
    state = {**weights(public), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    with pytest.raises(InputError) as e:
        make_an_audio.load(tmp_path / "other.ckpt")
    assert expected in str(e.value) and "other.ckpt" in str(e.value) and "\n" not in str(e.value)


def test_what_is_no_checkpoint_is_refused_and_the_hub_is_asked(tmp_path, monkeypatch):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save([1], tmp_path / "list.ckpt")
    for name, why in (("gone", "no such"), ("text", "not read as"), ("list", "not a checkpoint")):
        with pytest.raises(InputError, match=f"{name}.ckpt: {why}"):
            make_an_audio.read_checkpoint(tmp_path / f"{name}.ckpt")
    torch.save({"a": 1}, tmp_path / "there.ckpt")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, name: tmp_path / name)
    assert make_an_audio.read_checkpoint("me/model:there.ckpt") == {"a": 1}


# ---- vocoders ------------------------------------------------------------------------------------

@public_fixtures
@torch.no_grad()
def test_parity_bigvgan():
    vocoder = vocoders.load(f"bigvgan:{PARITY / 'bigvgan_weights.safetensors'}")
    io = fixture("bigvgan_io")
    assert_parity(vocoder(io["mel"])[:, None], io["wav"])
    assert_parity(vocoder.resblocks[0].activations[0](io["act_in"]), io["act_out"])
    state = vocoders.fold_weight_norm(published("## BigVGAN generator"))
    with torch.device("meta"):
        full = vocoders.BigVGAN(80, 1536, **vocoders.DEFAULTS)
    assert shapes_of(state) == shapes_of(full.state_dict())


SIZES = {"upsample_rates": (16, 16), "upsample_kernel_sizes": (32, 32),
         "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),)}


def save_bigvgan(folder: Path, sizes: dict | list, extra: dict) -> vocoders.BigVGAN:
    """A small generator, saved as the public ones are: with weight norm, beside its sizes."""
    torch.manual_seed(0)
    model, state = vocoders.BigVGAN(80, 8, **SIZES), dict(extra)
    for name, value in model.state_dict().items():
        if name.endswith("weight"):
            state[f"{name}_g"] = value.flatten(1).norm(dim=1).view(-1, 1, 1)
            state[f"{name}_v"] = 3 * value              # its length does not matter
        else:
            state[name] = value
    torch.save({"generator": state}, folder / "g_00001000")
    (folder / "config.json").write_text(json.dumps(sizes))
    return model


@torch.no_grad()
def test_bigvgan_folds_weight_norm(tmp_path):
    model = save_bigvgan(tmp_path, SIZES, {})
    vocoder, mel = vocoders.load(f"bigvgan:{tmp_path}"), torch.randn(2, 80, 5, generator=rng())
    assert vocoder(mel).shape == (2, 5 * 256) and vocoder(mel).dtype == torch.float32
    # The weights differ by their rounding, 1e-7; the rest is done in float64.
    torch.testing.assert_close(vocoder.double()(mel), model.double()(mel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes, extra, expected", [
    (SIZES, {"extra.bias": torch.zeros(1)}, "extra.bias"),
    ({**SIZES, "upsample_rates": (16, 8)}, {}, "makes 128 samples"),
    ({**SIZES, "upsample_kernel_sizes": (32, 10 ** 13)}, {}, "ups.1.0.weight"),     # petabytes
    ([], {}, "not a BigVGAN")])
def test_a_bigvgan_that_does_not_fit_is_refused_in_one_line(tmp_path, sizes, extra, expected):
    save_bigvgan(tmp_path, sizes, extra)
    with pytest.raises(InputError, match=f"g_00001000: .*{expected}") as e:
        vocoders.load(f"bigvgan:{tmp_path}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, expected", [
    ("wavenet", "unknown vocoder"), ("bigvgan:", "unknown vocoder"), ("hifigan", "unknown vocoder"),
    ("bigvgan:gone", "0 checkpoints"), ("hifigan:/gone", "/gone: not loaded")])
def test_a_vocoder_that_is_not_there_is_named_in_one_line(name, expected):
    assert vocoders.load("griffin-lim") is fa.griffin_lim
    with pytest.raises(InputError, match=expected) as e:
        vocoders.load(name)
    assert "\n" not in str(e.value)


def test_hifigan_gets_the_mels_it_was_trained_on(tmp_path, monkeypatch):
    from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig

    def forward(self, mel):                             # keeps the mel, and counts the samples
        seen.append(mel[0].numpy())
        return torch.arange(256.0 * mel.shape[1]).expand(len(mel), -1)

    def gap(mel) -> float:                              # log10, over the bands
        return np.abs(mel.mean(0) - theirs.mean(0)).mean()

    config = SpeechT5HifiGanConfig(upsample_initial_channel=16)
    SpeechT5HifiGan(config).save_pretrained(tmp_path)
    vocoder, seen = vocoders.load(f"hifigan:{tmp_path}"), []
    t = torch.arange(16384) / 16000
    wav = 0.02 * torch.randn(16384, generator=rng())
    for frequency in (300, 440, 1250, 3000, 5200):
        wav += 0.1 * torch.sin(2 * math.pi * frequency * t)
    ours = fa.mel_spectrogram(wav[None])
    assert vocoder(ours).shape == (1, 16384)
    monkeypatch.setattr(SpeechT5HifiGan, "forward", forward)
    moved = vocoder(ours)[0]                            # by half a hop
    assert not moved[:128].any() and torch.equal(moved[128:], torch.arange(16384.0 - 128))
    theirs = SpeechT5FeatureExtractor()(audio_target=wav.numpy(), sampling_rate=16000)
    theirs = np.asarray(theirs["input_values"][0])
    assert gap(seen[0]) < 0.1 < gap(ours[0].T.numpy())


# ---- text models of transformers -----------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bert", "t5", "clap"])
def test_any_text_model_of_transformers_gives_its_token_states(tmp_path, kind):
    source = str(save_text_model(kind, tmp_path))
    text = PretrainedText(TextConfig(source, max_length=12), 16)
    context = text(["rain", "a bell"])
    assert context.shape == (2, 12, 16)
    assert not context[0, 4:].any() and context[0, :4].abs().min() > 0      # padding is 0
    assert not (text.trained or context.requires_grad or list(text.parameters()))       # frozen
    text.double()       # the same in any company, but for T5's norms in float32, 1e-7
    torch.testing.assert_close(text(["rain"]), text(["rain", "a bell"])[:1], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="context_dim is 20"):
        PretrainedText(TextConfig(source), 20)


@pytest.mark.parametrize("has_code", [False, True])
def test_a_text_model_that_is_not_there_or_brings_code_is_refused(tmp_path, monkeypatch, has_code):
    if has_code:                                        # transformers would ask, and we say yes
        config = {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match=tmp_path.name) as e:
        PretrainedText(TextConfig(str(tmp_path)), 16)
    assert "\n" not in str(e.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("lie", [{"bert": {"num_hidden_layers": 10 ** 4}},
                                 {"t5": {"num_layers": 10 ** 4}}])
def test_a_config_with_a_text_stage_of_too_many_layers_is_refused_unbuilt(lie):
    config = fa.FlashAudioConfig(text=fa.TextConfig("make-an-audio", **lie))
    with pytest.raises(fa.InputError, match="1000 layers"):
        fa.check_size(config, 10 ** 9)
