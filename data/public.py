"""What other people have trained: the text stage and the sizes of Make-An-Audio 3's checkpoints, and the vocoders HiFi-GAN and
BigVGAN. flashaudio.py comes here when a name asks for one of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashaudio import (HOP, N_FFT, SAMPLE_RATE, DiTConfig, FlashAudioConfig, InputError, TextConfig, VAEConfig, hub_model,
                        mel_to_magnitude, named)


def read_checkpoint(source: str | Path) -> dict:
    """What a checkpoint file holds: a local path, or "repo_id:path/in/repo" on the hub. Nothing in it is ever executed.

    Raises InputError for a file that is missing, is no checkpoint, or holds pickled objects besides tensors and plain values.
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
    except Exception as e:                          # torch, pickle, zip, safetensors and the hub each have errors of their own
        why = "it holds pickled objects besides tensors" if "weights_only" in str(e).lower() else str(e) or type(e).__name__
        raise InputError(f"{source}: not read as a checkpoint ({why.splitlines()[0]})") from e
    if not isinstance(held, dict):
        raise InputError(f"{source}: not a checkpoint, but a {type(held).__name__}")
    return held


# ---------------------------------------------------------------------------------------------------------------------------
# Make-An-Audio 3
# ---------------------------------------------------------------------------------------------------------------------------

PREFIXES = {"first_stage_model.": "vae.", "model.diffusion_model.": "dit.", "cond_stage_model.": "text."}
# Tensors that are there because the public code descends from a diffusion model; flow matching has no use for them.
UNUSED = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_")


def rename(checkpoint: dict) -> dict[str, Tensor]:
    """A public checkpoint -> its tensors under our names: vae., dit., text. and scale_factor."""
    state = {}
    for name, tensor in checkpoint.get("state_dict", checkpoint).items():
        if not name.startswith(UNUSED) and not name.endswith(".position_ids"):
            theirs = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
            state[PREFIXES.get(theirs, "") + name[len(theirs):]] = tensor
    return state


def their_name(ours: str) -> str:
    """dit.proj_in.bias -> model.diffusion_model.proj_in.bias"""
    part, dot, rest = ours.partition(".")
    return next((theirs + rest for theirs, prefix in PREFIXES.items() if prefix == part + dot), ours)


def make_an_audio_config(state: dict[str, Tensor], tokenizers: tuple[str, ...] | None = None) -> FlashAudioConfig:
    """The sizes of a public model, read from the shapes of its tensors (renamed). Raises KeyError for one that is not there."""
    vae, dit, text = ({name[len(part):]: tensor for name, tensor in state.items() if name.startswith(part)}
                      for part in PREFIXES.values())

    def count(state: dict, prefix: str) -> int:
        return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})

    def t5(name: str) -> dict:
        vocabulary, width = text[f"{name}.shared.weight"].shape
        layer = f"{name}.encoder.block.0.layer"
        heads = text[f"{layer}.0.SelfAttention.relative_attention_bias.weight"].shape[1]
        return dict(vocab_size=vocabulary, d_model=width, d_kv=len(text[f"{layer}.0.SelfAttention.q.weight"]) // heads,
                    d_ff=len(text[f"{layer}.1.DenseReluDense.wi_0.weight"]), num_layers=count(text, f"{name}.encoder.block."),
                    num_heads=heads)

    def bert(name: str) -> dict:
        vocabulary, width = text[f"{name}.embeddings.word_embeddings.weight"].shape
        beside = Path(tokenizers[0], "config.json")     # shapes do not tell the heads; every public BERT has one per 64
        heads = json.loads(beside.read_text())["num_attention_heads"] if beside.exists() else max(1, width // 64)
        return dict(vocab_size=vocabulary, hidden_size=width, num_attention_heads=heads,
                    num_hidden_layers=count(text, f"{name}.encoder.layer."),
                    intermediate_size=len(text[f"{name}.encoder.layer.0.intermediate.dense.weight"]),
                    max_position_embeddings=len(text[f"{name}.embeddings.position_embeddings.weight"]))

    channels, mel_bins, kernel = vae["encoder.conv_in.weight"].shape
    levels = range(count(vae, "encoder.down."))
    width, in_channels = dit["proj_in.weight"].shape
    music = "transformer.shared.weight" in text
    tokenizers = tokenizers or (("google/flan-t5-large",) if music else ("bert-base-uncased", "google/t5-v1_1-large"))
    if text and len(tokenizers) != (1 if music else 2):
        raise InputError(f"this checkpoint's text stage takes {'one tokenizer, T5' if music else 'two tokenizers, BERT,T5'}, not {','.join(tokenizers)}")
    return FlashAudioConfig(
        VAEConfig(mel_bins, channels, tuple(len(vae[f"encoder.down.{i}.block.0.conv1.weight"]) // channels for i in levels),
                  count(vae, "encoder.down.0.block."), kernel, vae["decoder.conv_in.weight"].shape[1],
                  vae["post_quant_conv.weight"].shape[1],
                  tuple(i for i in levels if f"encoder.down.{i}.downsample.conv.weight" in vae)),
        DiTConfig(in_channels, dit["blocks.0.attention.wk_y.weight"].shape[1], width, len(dit["blocks.0.attention.gate"]),
                  count(dit, "blocks.")),
        TextConfig("none") if not text else TextConfig(
            "make-an-audio", max_length=77, bert={} if music else bert("caption_encoder.base"),
            t5=t5("transformer" if music else "t5_transformer"), tokenizers=tokenizers),
        integer_time=True)


class MakeAnAudioText(nn.Module):
    """The text stage of Make-An-Audio 3: BERT and a projection read the caption, T5 its structured form -> 77 + 77 tokens.

    A structured caption is "<object& start>@<object& end>", and follows the plain one: "a bell, then rain <bell& start>@<rain&
    end>". Where there is none it is "<caption& all>". The music model has T5 alone. No masks: padding is attended to.
    """
    trained = False

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
        self.max_length, self.sources, self._tokenizers = config.max_length, config.tokenizers, []
        t5 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config.t5))
        if config.bert:
            self.t5_transformer, bert = t5, BertModel(BertConfig(**config.bert))
            projection = named(linear1=nn.Linear(bert.config.hidden_size, width, bias=False),
                               linear2=nn.Linear(width, width, bias=False), layer_norm=nn.LayerNorm(width))
            self.caption_encoder = named(base=bert, projection=projection)
        else:
            self.transformer = t5
        self.requires_grad_(False)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> ids (B, 154): 77 for BERT and 77 for T5; of the music model (B, 77)."""
        if not self._tokenizers:
            from transformers import AutoTokenizer
            self._tokenizers = [hub_model(AutoTokenizer, source) for source in self.sources]
        parts = [caption.partition("<") for caption in captions]
        plain = [before.strip() if after else before for before, _, after in parts]
        structured = [f"<{after}" if after else f"<{before}& all>" if before else "" for before, _, after in parts]
        texts = [plain, structured] if hasattr(self, "caption_encoder") else [captions]
        return torch.cat([tokenizer(text, padding="max_length", truncation=True, max_length=self.max_length,
                                    return_tensors="pt").input_ids for tokenizer, text in zip(self._tokenizers, texts)], 1)

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or ids as from `tokenize` -> context (B, 154, D)."""
        ids = captions if isinstance(captions, Tensor) else self.tokenize(captions)
        if not hasattr(self, "caption_encoder"):
            return self.states(self.transformer, ids)
        bert_ids, t5_ids = ids.chunk(2, dim=1)
        f = self.caption_encoder.projection
        x = f.linear1(self.states(self.caption_encoder.base, bert_ids))         # (B, 77, D)
        return torch.cat([f.layer_norm(x + f.linear2(F.gelu(x))), self.states(self.t5_transformer, t5_ids)], 1)

    @staticmethod
    def states(model: nn.Module, ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


# ---------------------------------------------------------------------------------------------------------------------------
# Vocoders
# ---------------------------------------------------------------------------------------------------------------------------

# The published 16 kHz, 80 band configuration; a config.json beside the checkpoint may say otherwise.
DEFAULTS = {"upsample_rates": (4, 4, 2, 2, 2, 2), "upsample_kernel_sizes": (8, 8, 4, 4, 4, 4),
            "resblock_kernel_sizes": (3, 7, 11), "resblock_dilation_sizes": ((1, 3, 5),) * 3}


def low_pass(taps: int = 12, half_width: float = 0.3) -> Tensor:
    """Kaiser-windowed sinc that keeps half of the band -> (1, 1, taps), sum 1."""
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95             # dB
    window = torch.kaiser_window(taps, periodic=False, beta=0.1102 * (attenuation - 8.7), dtype=torch.float64)
    h = window * torch.sinc((torch.arange(taps) - (taps - 1) / 2).double() / 2)
    return (h / h.sum()).float().view(1, 1, -1)


class SnakeBeta(nn.Module):
    """x + sin²(αx) / β for each channel; both parameters are stored as logarithms."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + (x * alpha).sin() ** 2 / (beta + 1e-9)


class Activation(nn.Module):
    """Twice the rate, SnakeBeta, back again: (B, width, T) -> (B, width, T)."""

    def __init__(self, width: int):
        super().__init__()
        self.act = SnakeBeta(width)
        self.register_buffer("filter", low_pass(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.filter.expand(x.shape[1], -1, -1)
        x = 2 * F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps, stride=2, groups=len(taps))[..., 15:-15]
        return F.conv1d(F.pad(self.act(x), (5, 6), mode="replicate"), taps, stride=2, groups=len(taps))


class ResidualBlock(nn.Module):
    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel // 2)) for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in dilations)
        self.activations = nn.ModuleList(Activation(width) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2)):
            x = x + second(self.activations[2 * i + 1](first(self.activations[2 * i](x))))
        return x


class BigVGAN(nn.Module):
    """Lee et al., ICLR 2023, with the key names of the public checkpoints. Every nonlinearity is a periodic function between an
    up- and a downsampling filter, so that it adds no aliases.

    log10 mel (B, bands, T) -> waveform (B, 1, T x product of the upsampling rates) in [-1, 1].
    """

    def __init__(self, bands: int = 80, width: int = 1536, *, upsample_rates: tuple[int, ...], upsample_kernel_sizes: tuple[int, ...],
                 resblock_kernel_sizes: tuple[int, ...], resblock_dilation_sizes: tuple[tuple[int, ...], ...]):
        super().__init__()
        widths = [width // 2 ** i for i in range(len(upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(bands, width, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose1d(widths[i], widths[i + 1], kernel, rate, padding=(kernel - rate) // 2)])
            for i, (rate, kernel) in enumerate(zip(upsample_rates, upsample_kernel_sizes)))
        self.parallel, self.hop = len(resblock_kernel_sizes), math.prod(upsample_rates)
        self.resblocks = nn.ModuleList(ResidualBlock(w, kernel, dilations) for w in widths[1:]
                                       for kernel, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes))
        self.activation_post = Activation(widths[-1])
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        for i, (up,) in enumerate(self.ups):
            x = up(x)
            blocks = self.resblocks[i * self.parallel:(i + 1) * self.parallel]
            x = sum(block(x) for block in blocks) / self.parallel
        return self.conv_post(self.activation_post(x)).tanh()


def fold_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """weight_g, weight_v -> weight = g v / |v|, the norm over all dimensions but the first."""
    folded = {}
    for name, value in state.items():
        if name.endswith("weight_v"):
            folded[name[:-2]] = torch._weight_norm(value, state[name[:-1] + "g"], 0)
        elif not name.endswith("weight_g"):
            folded[name] = value
    return folded


def build_bigvgan(state: dict[str, Tensor], config: dict) -> BigVGAN:
    """The generator of a state dict; widths from its tensors, the rest from `config`. The stored filters are recomputed.

    Raises RuntimeError, from torch, that lists the keys which are missing or left over.
    """
    state = fold_weight_norm({k: v for k, v in state.items() if not k.endswith(".filter")})
    width, bands, _ = state["conv_pre.weight"].shape
    model = BigVGAN(bands, width, **{name: config.get(name, default) for name, default in DEFAULTS.items()})
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load_bigvgan(source: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """A 16 kHz, 80 band BigVGAN from a checkpoint, or from the folder of one: log10 mel (B, 80, T) -> waveform (B, 256 T)."""
    found = [Path(source)] if Path(source).is_file() else [
        p for p in sorted(Path(source).glob("*")) if p.suffix in (".pt", ".pth", ".ckpt", ".safetensors") or p.name.startswith("g_")]
    if len(found) != 1:
        raise InputError(f"bigvgan: {source} holds {len(found)} checkpoints (.pt, .pth, .ckpt, .safetensors, g_*); one is needed")
    config, state = found[0].with_name("config.json"), read_checkpoint(found[0])
    try:
        model = build_bigvgan(state.get("generator", state), json.loads(config.read_text()) if config.exists() else {}).to(device)
    except (RuntimeError, LookupError, ValueError, TypeError) as e:
        raise InputError(f"{found[0]}: not a BigVGAN generator of the expected sizes ({' '.join(str(e).split())[:400]})") from e
    if model.hop != HOP:
        raise InputError(f"{found[0]}: makes {model.hop} samples per mel frame, not {HOP}")
    return lambda mel: model(mel.float())[:, 0]


def load_hifigan(source: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """SpeechT5's HiFi-GAN (16 kHz, 80 bands, hop 256), from a folder or hub id: log10 mel (B, 80, T) -> waveform (B, 256 T).

    Its mels differ from ours in two ways: the bands reach from 80 to 7600 Hz, so ours go through their least-squares inverse,
    and its frame i is centred on sample 256 i, not 256 i + 128, so the waveform is moved by half a hop.
    """
    from transformers import SpeechT5HifiGan
    from transformers.audio_utils import mel_filter_bank
    model = hub_model(SpeechT5HifiGan, source).to(device).eval().requires_grad_(False)
    if (hop := math.prod(model.config.upsample_rates)) != HOP:
        raise InputError(f"hifigan:{source}: makes {hop} samples per mel frame, not {HOP}")
    theirs = mel_filter_bank(N_FFT // 2 + 1, model.config.model_in_dim, 80.0, 7600.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    filters = torch.from_numpy(theirs.T).float().to(device)                     # (80, 513)

    def vocoder(mel: Tensor) -> Tensor:
        wav = model((filters @ mel_to_magnitude(mel)).clamp(min=1e-10).log10().transpose(1, 2))
        return F.pad(wav, (HOP // 2, -HOP // 2))

    return vocoder
