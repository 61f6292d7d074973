"""CUDA without a GPU, by fake tensors: they have shapes, types and a device, and hold no numbers.

A tensor that is made on the CPU among others on the GPU raises here as it would there. What looks
at values (Hungarian pairing, the anchor's early stop, Griffin-Lim) and gradients can't be faked.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flashaudio as fa

GPU = torch.device("cuda")


@torch.no_grad()
def test_the_method_stays_on_the_gpu():
    with FakeTensorMode():
        with GPU:
            model = fa.FlashAudio(fa.SIZES["toy"])
        z0, z1 = torch.randn(2, 4, *model.latent_shape(), device=GPU)
        t = torch.rand(4, device=GPU)
        context = model.text(["a bell", "rain", "wind", "a siren"])
        null = model.contexts([""]).expand_as(context)
        path = fa.make_couplings(model, z0, context, null, 3, 3.0, return_trajectory=True)
        mel = model.decode(z0)
        found = [path, fa.rectified_flow_loss(model, z0, z1, t, context), model.encode(mel), mel,
                 fa.distill_loss(model, z0, z1, context), fa.vae_loss(model.vae, mel, z1, 1e-2),
                 fa.anchored_cfg_loss(z1, z0, z1, z0, 3.0, 0.1)]
        assert {x.device.type for x in found} == {"cuda"} and path.shape == (4, *z0.shape)
        with pytest.raises(Exception, match="(?i)device"):      # a wrong device shows
            model.dit(z0.cpu(), t, context)
