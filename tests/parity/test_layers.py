"""Layers of the UNet against their torch classes: what the whole one (test_unet.py) does not ask of them."""

import jax
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

from tests.parity.compare import check, difference, normal
from truepose_jax.models import attention, layers


@pytest.mark.parametrize("width", [32, 320])
def test_timestep_sinusoids(width):
    t = np.array([0, 1, 17, 500, 999], np.int32)
    expected = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.from_numpy(t))
    assert difference(layers.timestep_sinusoids(t, width), expected.numpy()) < 1e-4


@pytest.mark.parametrize("c_in,c_out,hw", [(32, 32, (5, 7)), (32, 64, (6, 4))])
def test_resnet_with_time(c_in, c_out, hw):
    reference = ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=48, groups=8, eps=1e-5)
    ours = layers.ResnetBlock2D(c_out, groups=8)
    check(reference, lambda m, x, e: m(x, e), ours, [normal(1, 2, *hw, c_in), normal(2, 2, 48)])


@pytest.mark.parametrize("hw", [(8, 6), (11, 7)])
def test_downsample(hw):
    reference = Downsample2D(16, use_conv=True, out_channels=24, padding=1, name="op")
    check(reference, lambda m, x: m(x), layers.Downsample2D(24), [normal(1, 2, *hw, 16)])


@pytest.mark.parametrize("size", [None, (12, 8), (11, 8), (11, 7)])
def test_upsample(size):
    check(
        Upsample2D(16, use_conv=True, out_channels=16),
        lambda m, x: m(x, size),
        layers.Upsample2D(16),
        [normal(1, 2, 6, 4, 16)],
        call_ours=lambda apply, x: apply(x, size),
    )


def test_upsample_to_a_size_that_is_no_halving():
    with pytest.raises(ValueError, match="not a halving"):
        layers.Upsample2D(16).init(jax.random.key(0), normal(1, 1, 6, 4, 16), (10, 8))


def test_attention_with_a_key_mask():
    keep = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], bool)
    check(
        Attention(48, cross_attention_dim=40, heads=3, dim_head=16),
        # diffusers would add a mask of 0 / 1 to the logits: it wants -inf for what is left out.
        lambda m, x, c: m(x, c, attention_mask=torch.from_numpy(np.where(keep, 0, -np.inf).astype("f"))[:, None]),
        attention.Attention(3),
        [normal(1, 2, 35, 48), normal(2, 2, 5, 40)],
        call_ours=lambda apply, x, c: apply(x, c, keep),
    )


def test_transformer_block():
    reference = BasicTransformerBlock(48, 3, 16, cross_attention_dim=40)
    taps = []
    reference.norm1.register_forward_hook(lambda module, args, out: taps.append(out))
    check(
        reference,
        lambda m, x, c: (m(x, encoder_hidden_states=c), taps[-1]),
        attention.BasicTransformerBlock(3),
        [normal(1, 2, 35, 48), normal(2, 2, 5, 40)],
    )


def test_transformer_2d():
    """Of two blocks; those of one are in the whole UNet (test_unet.py)."""
    reference = Transformer2DModel(
        3,
        16,
        in_channels=48,
        num_layers=2,
        cross_attention_dim=40,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    sites = tuple(attention.Site(f"transformer_blocks_{i}", level=0, channels=48, heads=3) for i in range(2))
    check(
        reference,
        lambda m, x, c: m(x, c, return_dict=False)[0],
        attention.Transformer2DModel(sites, attention.plain_block, groups=8, linear_projection=True),
        [normal(1, 2, 7, 5, 48), normal(2, 2, 4, 40)],
        call_ours=lambda apply, x, c: _first(apply(x, c, None)),
    )


def _first(result):
    return result[0] if isinstance(result, tuple) else result
