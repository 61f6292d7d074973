"""Public checkpoints of Make-An-Audio 3 -> FlashAudio: VAE, DiT, text stage and latent scale.

A model that was saved with this text stage can be loaded after this module has been imported.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashaudio import (TEXT_ENCODERS, DiTConfig, FlashAudio, FlashAudioConfig, InputError,
                        TextConfig, VAEConfig, hub_model, named)

PREFIXES = {"first_stage_model.": "vae.", "model.diffusion_model.": "dit.",
            "cond_stage_model.": "text."}
# Tensors that are there because the public code descends from a diffusion model.
UNUSED = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_")
BERT_HEAD = 64                                    # width of a head: no tensor's shape tells it


def load(checkpoint: str | Path, tokenizers: tuple[str, ...] = (),
         device: str = "cpu") -> FlashAudio:
    """A public checkpoint of any size -> the model, in evaluation mode.

    checkpoint: a file, or "repo_id:path/in/repo" on the hub. tokenizers: BERT's and T5's, hub ids
    or folders; by default the ones it was trained with, fetched when the first caption comes.
    Raises InputError, in one line, for a file that is no such checkpoint, with the keys that are
    missing or left over, and for a tokenizer that is not there.
    """
    held = read_checkpoint(checkpoint)
    try:
        state = rename(held)
        model = FlashAudio(make_an_audio_config(state, tokenizers))
        model.load_state_dict(state)
    except InputError as e:
        raise InputError(f"{checkpoint}: {e}") from e
    except Exception as e:  # a file may hold anything, and each part fails in its own way
        why = f"missing or misshapen: {' '.join(str(e).split())}"
        raise InputError(f"{checkpoint}: no Make-An-Audio 3 checkpoint ({why})") from e
    if tokenizers and model.text is not None:
        model.text.load_tokenizers()
    return model.to(device).eval()


def read_checkpoint(source: str | Path) -> dict:
    """What a file holds: a local path, or "repo_id:path/in/repo". Nothing in it is executed.

    Raises InputError for a file that is missing, is no checkpoint, or holds pickled objects
    besides tensors and plain values.
    """
    from safetensors.torch import load_file
    path = Path(source).expanduser()
    try:
        if not path.exists() and ":" in str(source):
            from huggingface_hub import hf_hub_download
            path = Path(hf_hub_download(*str(source).split(":", 1)))
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch, pickle, zip, safetensors and the hub have errors of their own
        why = (str(e) or type(e).__name__).splitlines()[0]
        if "weights_only" in str(e):
            why = "it holds pickled objects besides tensors"
        raise InputError(f"{source}: no readable checkpoint: give a file, or repo_id:path/in/repo "
                         f"({why})") from e


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


# ---- Sizes, from the shapes of renamed tensors. KeyError: one is missing -------------------------

def make_an_audio_config(state: dict[str, Tensor],
                         tokenizers: tuple[str, ...] = ()) -> FlashAudioConfig:
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
    dit = DiTConfig(
        in_channels, hidden_size=width,
        context_dim=state["dit.blocks.0.attention.wk_y.weight"].shape[1],
        num_heads=len(state["dit.blocks.0.attention.gate"]),
        depth=count(state, "dit.blocks."),
        integer_time=True)
    return FlashAudioConfig(vae, dit, text_config(state, tokenizers))


def text_config(state: dict[str, Tensor], tokenizers: tuple[str, ...]) -> TextConfig:
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
    bert = {} if music else bert_sizes(state, "text.caption_encoder.base")
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


def bert_sizes(state: dict[str, Tensor], name: str) -> dict[str, int]:
    vocab_size, width = state[f"{name}.embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocab_size, "hidden_size": width,
        "num_attention_heads": max(1, width // BERT_HEAD),
        "num_hidden_layers": count(state, f"{name}.encoder.layer."),
        "intermediate_size": len(state[f"{name}.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(state[f"{name}.embeddings.position_embeddings.weight"])}


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many layers lie below a prefix."""
    return len({n[len(prefix):].split(".")[0] for n in state if n.startswith(prefix)})


# ---- The text stage ------------------------------------------------------------------------------

class MakeAnAudioText(nn.Module):
    """BERT and a projection read the caption, T5 its structured form -> 77 + 77 tokens.

    A structured caption is "<object& start>@<object& end>" and follows the plain one: "a bell, then
    rain <bell& start>@<rain& end>". Where there is none it is "<caption& all>". The music model has
    T5 alone. No masks: padding is attended to.
    """
    trained = False

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
        self.max_length = config.max_length
        self.sources = config.tokenizers
        self.tokenizers = []                        # loaded when the first caption comes
        t5 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config.t5))
        if config.bert:
            bert = BertModel(BertConfig(**config.bert))
            projection = named(linear1=nn.Linear(bert.config.hidden_size, width, bias=False),
                               linear2=nn.Linear(width, width, bias=False),
                               layer_norm=nn.LayerNorm(width))
            self.caption_encoder = named(base=bert, projection=projection)
            self.t5_transformer = t5
        else:
            self.transformer = t5
        self.requires_grad_(False)

    def load_tokenizers(self) -> list:
        from transformers import AutoTokenizer
        for source in self.sources[len(self.tokenizers):]:
            try:
                tokenizer = hub_model(AutoTokenizer, source)
            except InputError as e:
                raise InputError(f"{e}; put this tokenizer there, or give another folder or hub id "
                                 "(of a saved model: tokenizers in its config.json)") from e
            self.tokenizers.append(tokenizer)
        return self.tokenizers

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> ids (B, 154): 77 for BERT and 77 for T5; of the music model (B, 77)."""
        plain, structured = [], []
        for caption in captions:
            before, _, after = caption.partition("<")
            if after:
                plain.append(before.strip())
                structured.append(f"<{after}")
            else:
                plain.append(before)
                structured.append(f"<{before}& all>" if before else "")
        texts = [plain, structured] if hasattr(self, "caption_encoder") else [captions]
        ids = [tokenizer(text, padding="max_length", truncation=True, max_length=self.max_length,
                         return_tensors="pt").input_ids
               for tokenizer, text in zip(self.load_tokenizers(), texts)]
        return torch.cat(ids, 1)

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or ids as from `tokenize` -> context (B, 154, D)."""
        ids = captions if isinstance(captions, Tensor) else self.tokenize(captions)
        if not hasattr(self, "caption_encoder"):
            return self.states(self.transformer, ids)
        bert_ids, t5_ids = ids.chunk(2, dim=1)
        projection = self.caption_encoder.projection
        x = projection.linear1(self.states(self.caption_encoder.base, bert_ids))    # (B, 77, D)
        x = projection.layer_norm(x + projection.linear2(F.gelu(x)))
        return torch.cat([x, self.states(self.t5_transformer, t5_ids)], 1)

    @staticmethod
    def states(model: nn.Module, ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


TEXT_ENCODERS["make-an-audio"] = MakeAnAudioText
