"""SourceNet: the twin UNet that reads the clean source latent at t = 0 and gives its features F' (TruePose Eq. 3)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.models.attention import plain_block
from truepose_jax.models.unet import UNet2DCondition, UNetConfig


def source_net(config: UNetConfig, *, remat: bool = False, dtype=jnp.float32) -> UNet2DCondition:
    """An unmodified SD1.5 UNet, so that SD1.5's weights are its weights."""
    return UNet2DCondition(config, functools.partial(plain_block, dtype=dtype), remat=remat, dtype=dtype)


class ParsingEncoder(nn.Module):
    """Which class covers each cell of the source, as features added after SourceNet's conv_in: a bias per class.

    Not in the paper, whose SourceNet has learned to see bodies before; for networks trained from nothing.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, coverage: Float[Array, "b h w p"]) -> Float[Array, "b h w features"]:
        return nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="class_bias")(coverage)


def source_features(
    net: nn.Module,
    params,
    latents: Float[Array, "b h w c"],
    whole_image_token: Float[Array, "b e"],
    after_conv_in: Float[Array, "*b h w d"] | None = None,
) -> dict[str, Float[Array, "b n c"]]:
    """F' of every site: norm1's output of each transformer block, at t = 0 (A6, A13).

    The cross-attention's context is one token, the CLIP embedding of the whole source image (A12).
    """
    t = jnp.zeros((latents.shape[0],), jnp.int32)
    context = whole_image_token[:, None, :]
    _, taps = net.apply({"params": params}, latents, t, context, after_conv_in=after_conv_in)
    return taps


def without_gradient(config: UNetConfig) -> str:
    """Regex of SourceNet parameters that never get a gradient: those that no tap depends on, which come after the last
    block's norm1 (A14), and those of the queries and keys that meet one context token alone, where softmax is 1 (A12).
    """
    block, inside = config.sites[-1].name.split("_attentions_")
    attention, transformer = inside.split("_transformer_blocks_")
    last = f"{block}/attentions_{attention}"
    ups = range(len(config.up_block_types))
    later = [i for i in ups if block == "mid_block" or i > int(block.removeprefix("up_blocks_"))]
    parts = [
        f"{last}/transformer_blocks_{transformer}/(attn1|norm2|attn2|norm3|ff)",
        f"{last}/proj_out",
        f"{block}/upsamplers_0",
        *(f"up_blocks_{i}" for i in later),
        *(["mid_block/resnets_1"] if block == "mid_block" else []),
        "conv_norm_out",
        "conv_out",
        r".*/transformer_blocks_\d+/(norm2|attn2/to_[qk])",
    ]
    return f"^source_net/({'|'.join(parts)})/"
