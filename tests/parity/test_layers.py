"""Each layer kind of the UNet against its torch class."""

import jax
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
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


def test_timestep_embedding():
    check(TimestepEmbedding(32, 128), lambda m, x: m(x), layers.TimestepEmbedding(128), [normal(1, 3, 32)])


@pytest.mark.parametrize("c_in,c_out,hw", [(32, 32, (5, 7)), (32, 64, (6, 4))])
def test_resnet_with_time(c_in, c_out, hw):
    reference = ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=48, groups=8, eps=1e-5)
    ours = layers.ResnetBlock2D(c_out, groups=8)
    check(reference, lambda m, x, e: m(x, e), ours, [normal(1, 2, *hw, c_in), normal(2, 2, 48)])


def test_resnet_without_time():
    reference = ResnetBlock2D(in_channels=64, out_channels=32, temb_channels=None, groups=8, eps=1e-6)
    check(
        reference,
        lambda m, x: m(x, None),
        layers.ResnetBlock2D(32, groups=8, eps=1e-6),
        [normal(1, 1, 5, 3, 64)],
    )


@pytest.mark.parametrize("hw", [(8, 6), (11, 7)])
def test_downsample(hw):
    reference = Downsample2D(16, use_conv=True, out_channels=24, padding=1, name="op")
    check(reference, lambda m, x: m(x), layers.Downsample2D(24), [normal(1, 2, *hw, 16)])


def test_downsample_of_the_autoencoder():
    reference = Downsample2D(16, use_conv=True, out_channels=16, padding=0, name="op")
    check(reference, lambda m, x: m(x), layers.Downsample2D(16, asymmetric=True), [normal(1, 2, 8, 6, 16)])


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


@pytest.mark.parametrize("batch,context", [(1, None), (2, 5)])
def test_attention(batch, context):
    reference = Attention(48, cross_attention_dim=context and 40, heads=3, dim_head=16)
    inputs = [normal(1, batch, 35, 48)] + ([normal(2, batch, context, 40)] if context else [])
    check(reference, lambda m, *x: m(*x), attention.Attention(3), inputs)


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


def test_feed_forward_is_geglu_with_exact_gelu():
    check(
        FeedForward(32, activation_fn="geglu"),
        lambda m, x: m(x),
        attention.FeedForward(),
        [normal(1, 2, 9, 32)],
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
