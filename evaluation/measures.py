"""Measures of generated clips against real ones, as the papers report them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashaudio import InputError


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to embeddings x (N, E), y (M, E) (Heusel et al. 2017).

    Raises InputError for fewer than two clips on a side, and for clips that hold NaN.
    """
    x, y = x.cpu().double(), y.cpu().double()       # MPS has no float64
    if min(len(x), len(y)) < 2:
        raise InputError(f"fd compares 2 clips or more with 2 or more, not {len(x)} with {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise InputError("fd of clips that hold NaN: train the model that made them again")
    cov_x, cov_y = (torch.atleast_2d(points.T.cov()) for points in (x, y))      # (E, E)
    cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).pow(2).sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return max(0.0, round(distance.item(), 9))      # rounding errors, also below zero, go


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL(p || q) in nats of paired log-posteriors (N, classes): p real clips, q generated."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def clap_score(audio: Tensor, text: Tensor) -> float:
    """Mean cosine of paired CLAP embeddings of audio and caption, each (N, E)."""
    return F.cosine_similarity(audio, text).mean().item()
