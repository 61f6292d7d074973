"""What test files share: tiny models and runs, tones, public fixtures, a way to run scripts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.io import wavfile
from torch import Tensor, nn

from flashaudio import HOP, DiTConfig, FlashAudio, FlashAudioConfig, TextConfig, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests" / "parity"
TINY = FlashAudioConfig(
    VAEConfig(channels=32, channel_mult=(1, 1), res_blocks=1, norm_groups=4),
    DiTConfig(context_dim=32, hidden_size=32, num_heads=2, depth=1, max_len=64),
    TextConfig(max_length=32, layers=1, heads=2), frames=32)
# The flags of a run of seconds
QUICK = {"device": "cpu", "batch_size": 4, "vae_steps": 2, "cfm_steps": 2, "rf1_steps": 2,
         "rf2_steps": 2, "distill_steps": 2, "rf2_couplings": 8, "distill_couplings": 8,
         "rf2_coupling_steps": 2, "distill_coupling_steps": 2, "rf2_guidance": 3.0, "eval_clips": 6}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def tiny_model(seed: int = 0, config: FlashAudioConfig = TINY) -> FlashAudio:
    """A small FlashAudio whose output is not 0 and whose scale is not 1, as untrained ones' are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlashAudio(config).eval()
        for p in model.dit.parameters():
            nn.init.normal_(p, std=0.2)
        model.scale_factor.fill_(0.7)
    return model


def fixture(name: str) -> dict[str, Tensor]:
    """The tensors of a file of tests/parity: vae_io, dit_weights ..."""
    return load_file(PARITY / f"{name}.safetensors")


def assert_parity(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5, largest difference: float32 on any processor stays below 3e-6."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < 1e-5


def run(*command, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Python with these arguments, as a person would run it: run("train.py", "--out", folder)."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **env},
                          capture_output=True, text=True)


def opened(*typed):
    """`with opened("--out", folder, ...) as run:` is a run of train.py in this process."""
    import train
    return train.open_run(train.parse_flags([*map(str, typed)]))


def exit_code(script: str, *typed) -> int:
    """What train.py or sample.py answers to these arguments, in this process."""
    import sample
    import train
    from runs.run import one_line_errors
    try:
        with one_line_errors(script):
            if script == "sample.py":
                sample.main(sample.parse_flags([*map(str, typed)]))
            else:
                with opened(*typed) as run:
                    train.main(run)
    except SystemExit as e:
        return e.code
    return 0


def quick_vocoder(mel: Tensor) -> Tensor:
    """The loudness of each frame as a waveform (B, 256 T) in [-1, 1]."""
    return (mel.mean(1) / 5).tanh().repeat_interleave(HOP, 1)


def tone(samples: int = 16000, rate: int = 16000, pitch: float = 440) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(samples) / rate)


def write_clips(folder: Path, n: int = 6, samples: int = 20_000) -> Path:
    """n tones as WAV, and their manifest -> the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["audio_path,caption\n"]
    for i in range(n):
        wav = tone(samples, pitch=200 + 150 * i)
        wavfile.write(folder / f"{i}.wav", 16000, (wav * 32767).astype(np.int16))
        lines.append(f"{i}.wav,tone number {i}\n")
    (folder / "manifest.csv").write_text("".join(lines))
    return folder / "manifest.csv"


def save_tokenizer(folder: Path) -> None:
    """One token per letter: padding is 0, an unknown character 1."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz<>&@"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)


BERT = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 32}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def save_text_model(kind: str, folder: Path) -> Path:
    """A tiny bert, t5 or clap (with audio tower) of random weights, with tokenizer -> folder."""
    import transformers as hf
    torch.manual_seed(0)
    save_tokenizer(folder)
    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(**BERT))
    elif kind == "t5":
        model = hf.T5EncoderModel(hf.T5Config(**T5))
    else:
        audio = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1],
                 "num_attention_heads": [1, 1], "num_hidden_layers": 2, "projection_dim": 16}
        text = {**BERT, "projection_dim": 16}
        config = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
        model = hf.ClapModel(config)
        extractor = hf.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
        extractor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
