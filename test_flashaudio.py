"""The method's specification, by value: closed forms, brute force, parity with public fixtures.

In the order of flashaudio.py. Algebra is compared in float64, and everything else within a bound
that has its reason beside it: no value depends on the processor.
"""

import ast
import graphlib
import itertools
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import flashaudio as fa
from flashaudio import DiT, DiTConfig, FlashAudio, FlashAudioConfig, InputError, MelVAE
from flashaudio import TextConfig, TextEncoder, VAEConfig
from tests.helpers import (PARITY, ROOT, TINY, assert_parity, fixture, public_fixtures, rng,
                           tiny_model)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


# ---- 1. The flow: timesteps ----------------------------------------------------------------------

def logit_normal_cdf(x, mean: float, std: float):
    return stats.norm.cdf((np.log(x / (1 - x)) - mean) / std)


def mix_exp_cdf(x, a: float):
    return 0.5 + (np.exp(a * x) - np.exp(a * (1 - x))) / (2 * np.expm1(a))  # the integral of Eq. 8


@pytest.mark.parametrize("draw, cdf", [
    (fa.uniform, stats.uniform.cdf),
    (fa.logit_normal, partial(logit_normal_cdf, mean=0, std=1)),
    (partial(fa.logit_normal, mean=-0.5, std=0.7), partial(logit_normal_cdf, mean=-0.5, std=0.7)),
    (fa.mix_exp, partial(mix_exp_cdf, a=4)),
    (partial(fa.mix_exp, a=1.0), partial(mix_exp_cdf, a=1))])
def test_timesteps_follow_their_densities(draw, cdf):
    t = draw(20_000, generator=rng()).double().numpy()
    assert stats.kstest(t, cdf).pvalue > 0.01           # of this one seed
    assert t.min() >= 0 and t.max() <= 1


# ---- Pairing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_pairing_equals_brute_force(size):
    z0, z1 = randn(size, 3, 4, seed=size), 2 + randn(size, 3, 4, seed=10 + size)
    before = z1.clone()

    def total(noise: Tensor) -> float:
        return (z1 - noise).flatten(1).norm(dim=1).sum().item()

    paired = fa.immiscible_pairing(z0, z1)
    best = min(total(z0[list(order)]) for order in itertools.permutations(range(size)))
    assert total(paired) == pytest.approx(best, abs=1e-3)       # distances are made in float32
    assert torch.equal(paired.flatten(1).sort(0).values, z0.flatten(1).sort(0).values)
    assert torch.equal(z1, before)                      # the data stay with their captions


def test_pairing_compares_unsquared_distances():
    far = math.pi - 4 * math.asin(0.75) / 2             # makes the triangle 2, 2, 3
    z0 = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    z1 = torch.tensor([[0.0, 0.0], [-2 * math.cos(far), 2 * math.sin(far)]])
    assert torch.equal(fa.immiscible_pairing(z0, z1), z0)       # 0 + 3 < 2 + 2, yet 9 > 4 + 4


# ---- Losses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_rectified_flow_loss_by_value(sigma_min):
    z0, z1, context = randn(5, 2, 3), randn(5, 2, 3, seed=1), randn(5, 1, 4, seed=2)
    t = torch.rand(5, generator=rng(3), dtype=torch.float64)
    noise, s = (1 - sigma_min) * z0, t[:, None, None]

    def off_by(error: float, z: Tensor, when: Tensor, c: Tensor) -> Tensor:
        assert_close(z, (1 - s) * z0 + s * (z1 + sigma_min * z0))
        assert torch.equal(when, t) and torch.equal(c, context)
        return z1 - noise + error

    for error in (0.0, 0.5):
        loss = fa.rectified_flow_loss(partial(off_by, error), z0, z1, t, context, sigma_min)
        assert loss.item() == pytest.approx(error ** 2, abs=1e-12)


def test_distill_loss_by_value():
    z0, z1, context = randn(5, 2, 3), randn(5, 2, 3, seed=1), randn(5, 1, 4, seed=2)

    def off_by(error: float, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert torch.equal(z, z0) and torch.equal(t, torch.zeros_like(z0[:, 0, 0]))
        assert torch.equal(c, context)
        return z1 - z0 + error

    for error in (0.0, 0.5):
        loss = fa.distill_loss(partial(off_by, error), z0, z1, context)
        assert loss.item() == pytest.approx(error ** 2, abs=1e-12)


def best_line(z0: Tensor, z1: Tensor, t: float) -> tuple[Tensor, float]:
    """The velocity a + b z of least loss at one t -> (a, b), loss. The loss is quadratic in them."""
    def loss(line: Tensor) -> Tensor:
        velocity = lambda z, t, c: line[0] + line[1] * z        # noqa: E731
        return fa.rectified_flow_loss(velocity, z0, z1, z0.new_full((len(z0),), t), None)

    start = torch.zeros(2, dtype=torch.float64)
    line = -torch.linalg.solve(hessian(loss, start), jacobian(loss, start))
    return line, loss(line).item()
