"""Public checkpoints of Make-An-Audio 3 -> FlashAudio: VAE, DiT, text stage and latent scale."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

# Imported so that FlashAudio knows the text stage.
import pretrained.text  # noqa: F401
from flashaudio import DiTConfig, FlashAudio, FlashAudioConfig, InputError, TextConfig, VAEConfig

PREFIXES = {"first_stage_model.": "vae.", "model.diffusion_model.": "dit.",
            "cond_stage_model.": "text."}
# Tensors that are there because the public code descends from a diffusion model.
UNUSED = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_")


def load(checkpoint: str | Path, text: tuple[str, ...] | None = None,
         device: str = "cpu") -> FlashAudio:
    """A public checkpoint of any size -> the model, in evaluation mode.

    checkpoint: a file, or "repo_id:path/in/repo" on the hub. text: where its tokenizers are, hub
    ids or folders, BERT's and T5's; by default the ones it was trained with, fetched when the
    first caption comes. Raises InputError, in one line, for a file that is no such checkpoint,
    with the keys that are missing or left over.
    """
    held = read_checkpoint(checkpoint)
    try:
        state = rename(held)
        model = FlashAudio(make_an_audio_config(state, text))
        ours = model.state_dict().keys()
        missing = sorted(their_name(name) for name in ours - state.keys())
        surplus = sorted(their_name(name) for name in state.keys() - ours)
        if missing or surplus:
            raise InputError(f"keys missing: {missing}, keys left over: {surplus}")
        model.load_state_dict(state)
    except InputError as e:
        raise InputError(f"{checkpoint}: {e}") from e
    except Exception as e:  # a file may hold anything, and each part fails in its own way
        why = f"missing or misshapen: {' '.join(str(e).split())}"
        raise InputError(f"{checkpoint}: no Make-An-Audio 3 checkpoint ({why})") from e
    return model.to(device).eval()


def read_checkpoint(source: str | Path) -> dict:
    """What a file holds: a local path, or "repo_id:path/in/repo". Nothing in it is executed.

    Raises InputError for a file that is missing, is no checkpoint, or holds pickled objects
    besides tensors and plain values.
    """
    from safetensors.torch import load_file
    path = Path(source)
    try:
        if not path.exists() and ":" in str(source):
            from huggingface_hub import hf_hub_download
            path = Path(hf_hub_download(*str(source).split(":", 1)))
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise InputError(f"{source}: no such checkpoint; a file, or repo_id:path/in/repo") from e
    except Exception as e:  # torch, pickle, zip, safetensors and the hub have errors of their own
        why = (str(e) or type(e).__name__).splitlines()[0]
        if "weights_only" in str(e):
            why = "it holds pickled objects besides tensors"
        raise InputError(f"{source}: not read as a checkpoint ({why})") from e
    if not isinstance(held, dict):
        raise InputError(f"{source}: not a checkpoint, but a {type(held).__name__}")
    return held


def rename(checkpoint: dict) -> dict[str, Tensor]:
    """A public checkpoint -> its tensors under our names: vae., dit., text. and scale_factor."""
    state = {}
    for name, tensor in checkpoint.get("state_dict", checkpoint).items():
        for theirs, ours in PREFIXES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if not name.startswith(UNUSED) and not name.endswith(".position_ids"):
            state[name] = tensor
    return state


def their_name(name: str) -> str:
    """dit.proj_in.bias -> model.diffusion_model.proj_in.bias"""
    for theirs, ours in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def make_an_audio_config(state: dict[str, Tensor],
                         tokenizers: tuple[str, ...] | None = None) -> FlashAudioConfig:
    """The sizes of a model, from the shapes of its renamed tensors. KeyError: one is missing."""
    width, mel_bins, kernel = state["vae.encoder.conv_in.weight"].shape
    levels = range(count(state, "vae.encoder.down."))
    blocks = [state[f"vae.encoder.down.{i}.block.0.conv1.weight"] for i in levels]
    halving = [i for i in levels if f"vae.encoder.down.{i}.downsample.conv.weight" in state]
    vae = VAEConfig(
        mel_bins, width, kernel_size=kernel,
        channel_mult=tuple(len(block) // width for block in blocks),
        res_blocks=count(state, "vae.encoder.down.0.block."),
        z_channels=state["vae.decoder.conv_in.weight"].shape[1],
        embed_dim=state["vae.post_quant_conv.weight"].shape[1],
        down_levels=tuple(halving))
    width, in_channels = state["dit.proj_in.weight"].shape
    context_dim = state["dit.blocks.0.attention.wk_y.weight"].shape[1]
    heads = len(state["dit.blocks.0.attention.gate"])
    dit = DiTConfig(in_channels, context_dim, width, heads, depth=count(state, "dit.blocks."))
    return FlashAudioConfig(vae, dit, text_config(state, tokenizers), integer_time=True)


def text_config(state: dict[str, Tensor], tokenizers: tuple[str, ...] | None) -> TextConfig:
    """BERT and T5; in the music model T5 alone; "none" for a checkpoint without a text stage."""
    if not any(name.startswith("text.") for name in state):
        return TextConfig("none")
    music = "text.transformer.shared.weight" in state
    usual = ("google/flan-t5-large",) if music else ("bert-base-uncased", "google/t5-v1_1-large")
    tokenizers = tokenizers or usual
    if len(tokenizers) != len(usual):
        raise InputError(f"its text stage needs tokenizers such as {','.join(usual)}, "
                         f"not {','.join(tokenizers)}")
    t5 = t5_sizes(state, "text.transformer" if music else "text.t5_transformer")
    bert = {} if music else bert_sizes(state, "text.caption_encoder.base", tokenizers[0])
    return TextConfig("make-an-audio", max_length=77, bert=bert, t5=t5, tokenizers=tokenizers)


def t5_sizes(state: dict[str, Tensor], name: str) -> dict[str, int]:
    vocab_size, d_model = state[f"{name}.shared.weight"].shape
    layer = f"{name}.encoder.block.0.layer"
    heads = state[f"{layer}.0.SelfAttention.relative_attention_bias.weight"].shape[1]
    return {
        "vocab_size": vocab_size, "d_model": d_model,
        "d_kv": len(state[f"{layer}.0.SelfAttention.q.weight"]) // heads,
        "d_ff": len(state[f"{layer}.1.DenseReluDense.wi_0.weight"]),
        "num_layers": count(state, f"{name}.encoder.block."),
        "num_heads": heads}


def bert_sizes(state: dict[str, Tensor], name: str, folder: str) -> dict[str, int]:
    vocab_size, width = state[f"{name}.embeddings.word_embeddings.weight"].shape
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),  # no shape tells; public BERTs: one per 64
        "num_hidden_layers": count(state, f"{name}.encoder.layer."),
        "intermediate_size": len(state[f"{name}.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(state[f"{name}.embeddings.position_embeddings.weight"])}
    config = Path(folder, "config.json")
    if config.exists():
        sizes["num_attention_heads"] = json.loads(config.read_text())["num_attention_heads"]
    return sizes


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many layers lie below a prefix."""
    return len({n[len(prefix):].split(".")[0] for n in state if n.startswith(prefix)})
