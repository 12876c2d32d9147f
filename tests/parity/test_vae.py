"""AutoencoderKL against diffusers' at reduced width, and the pixel codec's exactness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoderKL

from tests.parity import compare
from truepose_jax.models import vae
from truepose_jax.pretrained.conversion import from_torch, key_maps

SMALL = vae.AutoencoderKLConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=8)
TWO_LEVELS = vae.AutoencoderKLConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3)
# The keys' bias adds the same number to all logits of a query.
KEY_BIAS = "to_k/bias"


def torch_vae(config: vae.AutoencoderKLConfig) -> TorchAutoencoderKL:
    levels = len(config.block_out_channels)
    return TorchAutoencoderKL(
        block_out_channels=config.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        latent_channels=config.latent_channels,
        scaling_factor=config.scaling_factor,
    )


def test_encode_and_decode():
    """One loss through both halves, so that no parameter is without a gradient."""

    def call_torch(m, images, latents):
        posterior = m.encode(images).latent_dist
        return posterior.mean, posterior.logvar, m.decode(latents, return_dict=False)[0]

    def both(module, images, latents):
        return *module.encode(images), module.decode(latents)

    compare.check(
        torch_vae(TWO_LEVELS),
        call_torch,
        vae.AutoencoderKL(TWO_LEVELS),
        [compare.normal(1, 2, 6, 10, 3), compare.normal(2, 2, 3, 5, 3)],
        call_ours=lambda apply, images, latents: apply(images, latents, method=both),
        keys=key_maps.VAE,
        zero_gradients=KEY_BIAS,
        tolerance=compare.NETWORK,
    )


def test_latents_are_scaled_and_sampled_as_in_diffusers_pipelines():
    """Scaled by 0.18215 coming out, divided by it going in; the log variance clipped where it is extreme. Three levels."""
    reference, ours = compare.randomise(torch_vae(SMALL), 3), vae.KLAutoencoder(SMALL)
    with torch.no_grad():
        reference.quant_conv.bias[-2:] = torch.tensor([-1e3, 1e3])
    params = compare.params_of(reference, jax.eval_shape(ours.init, jax.random.key(0)), key_maps.VAE)
    images, keys = compare.normal(1, 2, 12, 8, 3), jax.random.split(jax.random.key(7))
    assert (ours.factor, ours.channels, ours.scale) == (4, 4, 0.18215)

    posterior = reference.encode(compare.to_torch(images)).latent_dist
    assert posterior.logvar.min() == -30 and posterior.logvar.max() == 20
    # A sample's noise depends on its own key alone, not on its place in the batch.
    noise = np.stack([jax.random.normal(key, (3, 2, 4)) for key in keys])
    sample = compare.from_nchw((posterior.mean + posterior.std * compare.to_torch(noise)) * 0.18215)
    decoded = compare.from_nchw(reference.decode(compare.to_torch(sample) / 0.18215, return_dict=False)[0])

    @jax.jit
    def everything(params, images, keys, latents):
        mean, drawn = ours.encode_mean(params, images), ours.encode_sample(params, images, keys)
        return mean, drawn, ours.decode(params, latents)

    expected = compare.from_nchw(posterior.mean * 0.18215), sample, decoded
    for y, reference in zip(everything(params, images, keys, sample), expected, strict=True):
        assert compare.difference(y, reference) < compare.NETWORK


def test_config_from_diffusers():
    other = dataclasses.replace(TWO_LEVELS, scaling_factor=0.5)
    assert vae.AutoencoderKLConfig.from_diffusers(torch_vae(other).config) == other
    with pytest.raises(ValueError, match="use_quant_conv"):
        vae.AutoencoderKLConfig.from_diffusers(dict(torch_vae(TWO_LEVELS).config) | {"use_quant_conv": False})
    with pytest.raises(ValueError, match="VQModel"):
        vae.AutoencoderKLConfig.from_diffusers({"_class_name": "VQModel"})


def test_full_size_has_the_parameters_epsilons_and_latents_of_sd15():
    ours = vae.KLAutoencoder()
    found, shapes = compare.epsilons(ours.module, compare.normal(0, 1, 16, 16, 3))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 83_653_863
    with torch.device("meta"):
        reference = torch_vae(ours.config)
    expected = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert {need.tensor: need.shape for need in from_torch.wanted(shapes)} == expected
    assert found == compare.torch_epsilons(reference)
    latents = jax.eval_shape(ours.encode_mean, shapes, jnp.zeros((2, 512, 352, 3)))
    assert latents.shape == (2, 64, 44, 4)
    assert jax.eval_shape(ours.decode, shapes, jnp.zeros((2, 32, 22, 4))).shape == (2, 256, 176, 3)


@pytest.mark.parametrize("factor", vae.PIXEL_FACTORS)
def test_pixel_codec_is_exactly_invertible(factor):
    codec = vae.PixelAutoencoder(factor)
    images = compare.normal(1, 2, 3 * factor, 2 * factor, 3)
    latents = codec.encode_mean({}, images)
    assert latents.shape == (2, 3, 2, codec.channels)
    np.testing.assert_array_equal(codec.decode({}, latents), images)
    # The first cell's vector is its pixels in reading order.
    np.testing.assert_array_equal(latents[0, 0, 0], images[0, :factor, :factor].reshape(-1))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="10x8 do not divide"):
        vae.PixelAutoencoder(4).encode_mean({}, compare.normal(1, 1, 10, 8, 3))
    with pytest.raises(ValueError, match="10x8 do not divide"):
        jax.eval_shape(vae.KLAutoencoder(SMALL).module.init, jax.random.key(0), compare.normal(1, 1, 10, 8, 3))
    with pytest.raises(ValueError, match="factor is 9"):
        vae.PixelAutoencoder(9)
