"""CUDA without a GPU: shapes, types and devices through fake tensors, which hold no numbers.

One that is made on the CPU among others on the GPU raises here as it would there. What looks at
values (Hungarian pairing, the anchor's early stop, Griffin-Lim) and gradients can't be faked.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flashaudio as fa
from experiments.rivals import consistency, diffusion, meanflow
from flashaudio import FlashAudio

GPU = torch.device("cuda")


@contextmanager
def fake_gpu():
    """Models that are made inside lie on a GPU that isn't there."""
    with FakeTensorMode(), torch.no_grad():
        yield


def fake_model(kind: type[FlashAudio] = FlashAudio) -> FlashAudio:
    with GPU:
        return kind(fa.PRESETS["toy"])


def test_a_wrong_device_shows():
    with fake_gpu(), pytest.raises(Exception, match="(?i)device"):
        fake_model().dit(torch.zeros(2, 20, 32, device=GPU), torch.zeros(2),
                              torch.zeros(2, 32, 128, device=GPU))


def test_the_flow_stays_on_the_gpu():
    with fake_gpu():
        model = fake_model()
        shape = (4, *model.latent_shape())
        z0, z1 = torch.randn(2, *shape, device=GPU)
        t = torch.rand(4, device=GPU)
        context = model.text(["a bell", "rain", "wind", "a siren"])
        null = model.contexts([""]).expand_as(context)
        assert fa.rectified_flow_loss(model, z0, z1, t, context).device.type == "cuda"
        assert fa.distill_loss(model, z0, z1, context).device.type == "cuda"
        path = fa.make_couplings(model, z0, context, null, 3, 3.0, return_trajectory=True)
        assert path.shape == (4, *shape) and path.device.type == "cuda"
        v = model(z0, t, context)
        loss = fa.anchored_cfg_loss(z1, z0, v, v, 3.0, 0.1)
        assert loss.shape == (4,) and loss.device.type == "cuda"


def test_the_vae_stays_on_the_gpu():
    with fake_gpu():
        model = fake_model()
        mel = torch.randn(2, 80, model.config.frames, device=GPU)
        z = model.encode(mel)
        assert z.shape == (2, *model.latent_shape())
        out = model.decode(z)
        assert out.shape == mel.shape and out.device.type == "cuda"
        assert fa.vae_loss(model.vae, mel, torch.randn_like(z), 1e-2).device.type == "cuda"


def test_rivals_stay_on_the_gpu():
    with fake_gpu():
        u = fake_model(meanflow.MeanFlow).dit
        z0, z1 = torch.randn(2, 4, 20, 32, device=GPU)
        context = torch.randn(4, 32, 128, device=GPU)
        t = torch.rand(4, device=GPU)
        jump = consistency.consistency_target(u, u, z0, t, context, context, 3.0)
        found = [jump, diffusion.diffusion_loss(u, z0, z1, t, context),
                 meanflow.meanflow_sample(u, z0, context, None, 2)]
        assert {x.device.type for x in found} == {"cuda"}
