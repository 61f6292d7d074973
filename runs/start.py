"""Where training starts: the first weights of a model, and the scale of its latents."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import flashaudio as fa
from flashaudio import FlashAudio
from pretrained.text import pretrained_width


def new_model(preset: str, text: str, seed: int, clips: np.ndarray) -> FlashAudio:
    """An untrained model, from the seed alone; clips (N, 80, T): log10 mels to start from.

    text: "bytes", or a frozen text model by folder or hub id.
    """
    config = fa.PRESETS[preset]
    if text != "bytes":
        dit = replace(config.dit, context_dim=pretrained_width(text))
        config = replace(config, dit=dit, text=fa.TextConfig(text, max_length=77))
    with torch.random.fork_rng(devices=[]):         # the global generator stays as it was
        torch.manual_seed(seed)
        model = FlashAudio(config)
        initialize(model, torch.from_numpy(clips.mean((0, 2))))
    return model


@torch.no_grad()
def initialize(model: FlashAudio, mean: Tensor) -> None:
    """Set the weights that training starts from; mean (80,): log10 mel of each band.

    With torch's own, a VAE starts with latents of std 0.2 under noise of std 1, and its decoder
    hardly hears them. Here each kernel keeps the size of what comes in, residual branches start at
    0, the posterior starts narrow, and the gates of the backbone start half open.
    """
    vae, width = model.vae, model.config.vae.embed_dim
    for layer in vae.modules():
        if isinstance(layer, nn.Conv1d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    for layer in vae.modules():
        if isinstance(layer, fa.ResidualBlock):
            nn.init.zeros_(layer.conv2.weight)
        if isinstance(layer, fa.FrameAttention):
            nn.init.zeros_(layer.proj_out.weight)
    nn.init.zeros_(vae.quant_conv.weight[width:])
    nn.init.constant_(vae.quant_conv.bias[width:], -4.0)    # log-variance: a std of 0.14
    vae.encoder.conv_in.bias -= vae.encoder.conv_in.weight.sum(2) @ mean
    vae.decoder.conv_out.bias.copy_(mean)
    for block in model.dit.blocks:
        nn.init.constant_(block.attention.gate, 0.5)
        gates = block.adaLN_modulation[1].bias.view(6, -1)[2::3]
        nn.init.constant_(gates, 0.5)


@torch.no_grad()
def latent_scale(model: FlashAudio, clips: np.ndarray) -> Tensor:
    """1 / std of sampled latents of clips (N, 80, T); the public code takes its first batch."""
    means, variances = [], []
    for part in torch.tensor(clips).split(32):
        mean, logvar = model.vae.encode(part.to(model.device))
        means.append(mean)
        variances.append(logvar.exp())
    return 1 / (torch.cat(means).var() + torch.cat(variances).mean()).sqrt()
