"""The whole UNet against diffusers' at reduced width: odd latents, every block type, both projections."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.parity.compare import NETWORK, check, epsilons, normal, torch_epsilons
from truepose_jax.models.attention import plain_block
from truepose_jax.models.unet import UNet2DCondition, UNetConfig
from truepose_jax.pretrained.conversion import from_torch, key_maps

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def config_of(*levels, **fields) -> UNetConfig:
    """One layer per block, context of 24, groups of 8; `levels` from full size down."""
    fields = {"layers_per_block": 1, "cross_attention_dim": 24, "norm_num_groups": 8} | fields
    down, up = zip(*levels, strict=True)
    return UNetConfig(down_block_types=down, up_block_types=up[::-1], **fields)


# name: (config, latent h x w, batch). Together they have every block type and every field; two layers a block at full size
# (test_full_size.py).
CASES = {
    # As in SD1.5 the lowest level has no attention. 9x7 -> 5x4.
    "sd15": (config_of(CROSS, PLAIN, block_out_channels=(16, 32), attention_head_dim=2), (9, 7), 2),
    # As in SD2.x linear projections and heads per level. 7x4 -> 4x2.
    "linear": (
        config_of(
            PLAIN,
            CROSS,
            in_channels=12,
            out_channels=6,
            block_out_channels=(16, 32),
            attention_head_dim=(1, 4),
            use_linear_projection=True,
            norm_eps=1e-3,
        ),
        (7, 4),
        1,
    ),
}
DEEPER = dataclasses.replace(CASES["linear"][0], layers_per_block=2, transformer_layers_per_block=2)


def diffusers_unet(config: UNetConfig) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        cross_attention_dim=config.cross_attention_dim,
        transformer_layers_per_block=config.transformer_layers_per_block,
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
    )


@pytest.mark.parametrize("case", CASES)
def test_unet(case):
    config, hw, batch = CASES[case]
    x, context = normal(1, batch, *hw, config.in_channels), normal(2, batch, 3, config.cross_attention_dim)
    check(
        diffusers_unet(config),
        lambda m, x, t, c: m(x, t, c, return_dict=False)[0],
        UNet2DCondition(config, plain_block),
        [x, np.array([0, 981][:batch], np.int32), context],
        call_ours=lambda apply, *inputs: _prediction(apply(*inputs)),
        keys=key_maps.UNET,
        tolerance=NETWORK,
    )


def _prediction(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    "config,parameters",
    [(UNetConfig(), 859_520_964), (DEEPER, None)],
    ids=["sd15", "two layers a block, two blocks a transformer"],
)
def test_parameters_and_epsilons_are_those_of_diffusers(config, parameters):
    module = UNet2DCondition(config, plain_block)
    inputs = normal(0, 1, 16, 12, config.in_channels), np.zeros(1, np.int32), normal(0, 1, 7, config.cross_attention_dim)
    found, shapes = epsilons(module, *inputs)
    with torch.device("meta"):
        reference = diffusers_unet(config)
    expected = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert {need.tensor: need.shape for need in from_torch.wanted(shapes)} == expected
    assert found == torch_epsilons(reference)
    if parameters:
        assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
