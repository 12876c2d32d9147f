"""SourceNet: the twin UNet that reads the clean source latent at t = 0 and gives its features F' (TruePose Eq. 3)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.models.attention import (
    Attention,
    FeedForward,
    Site,
    layer_norm,
    merge_heads,
    plain_block,
    split_heads,
)
from truepose_jax.models.hpfa import FusionConfig, SourceAttention, reweighted
from truepose_jax.models.unet import UNet2DCondition, UNetConfig


def source_net(
    config: UNetConfig, fusion: FusionConfig, *, remat: bool = False, tap_hidden: bool = False, dtype=jnp.float32
) -> UNet2DCondition:
    """An SD1.5 UNet with its own blocks, so that SD1.5's weights are its weights; taps are F'. With
    fusion.source_attention "inplace" its self-attention is Eq. 7 (the same weights): `features` are then the masks M
    [b n] by site, and taps are InplaceTap."""
    make_block = functools.partial(plain_block, dtype=dtype)
    if fusion.source_attention == "inplace":

        def make_block(site: Site, *, name: str) -> nn.Module:
            return InplaceBlock(site.heads, fusion, dtype=dtype, name=name)

    return UNet2DCondition(config, make_block, remat=remat, tap_hidden=tap_hidden, dtype=dtype)


class InplaceTap(NamedTuple):
    """H' of Eq. 7, the heads joined [b n c], and its A'."""

    fused: Array
    attention: SourceAttention


class InplaceBlock(nn.Module):
    """SD1.5's block whose self-attention is Eq. 7's (the other reading of docs/paper.md A5)."""

    heads: int
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m e"], features: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b n c"], InplaceTap]:
        attn1 = _ReweightedSelfAttention(self.heads, self.config, dtype=self.dtype, name="attn1")
        update, tap = attn1(layer_norm(self.dtype, "norm1")(x), features)
        x = x + update
        x = x + Attention(self.heads, dtype=self.dtype, name="attn2")(layer_norm(self.dtype, "norm2")(x), context)
        return x + FeedForward(dtype=self.dtype, name="ff")(layer_norm(self.dtype, "norm3")(x)), tap


class _ReweightedSelfAttention(nn.Module):
    heads: int
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], mask: Bool[Array, "b n"]):
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, width, use_bias=False, dtype=self.dtype, **self.config.square_init)
        q, k, v = (split_heads(dense(name=f"to_{which}")(x), self.heads) for which in "qkv")
        fused = merge_heads(reweighted(self.config, q, k, v, mask))
        update = nn.Dense(width, dtype=self.dtype, name="to_out_0")(fused)
        return update, InplaceTap(fused, SourceAttention(q, k))


def self_attention_of(params, features: Float[Array, "b n c"], site: Site) -> SourceAttention:
    """A' of SourceNet's own attn1 at a site, from its parameters and its F': for CAA where there is no HPFA (B4)."""
    block = params
    for part in site_path(site):
        block = block[part]
    q, k = (features @ block["attn1"][f"to_{which}"]["kernel"].astype(features.dtype) for which in "qk")
    return SourceAttention(split_heads(q, site.heads), split_heads(k, site.heads))


def site_path(site: Site) -> tuple[str, ...]:
    """Where a site's block lies in a UNet's parameters: ('mid_block', 'attentions_0', 'transformer_blocks_0')."""
    block, rest = site.name.split("_attentions_")
    attention, transformer = rest.split("_transformer_blocks_")
    return block, f"attentions_{attention}", f"transformer_blocks_{transformer}"


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
    masks: dict[str, Bool[Array, "b n"]] | None = None,
) -> dict[str, Any]:
    """F' of every site: norm1's output of each transformer block, at t = 0 (A6, A13). masks: see source_net.

    The cross-attention's context is one token, the CLIP embedding of the whole source image (A12).
    """
    t = jnp.zeros((latents.shape[0],), jnp.int32)
    context = whole_image_token[:, None, :]
    _, taps = net.apply({"params": params}, latents, t, context, features=masks, after_conv_in=after_conv_in)
    return taps


def without_gradient(config: UNetConfig, *, tap_hidden: bool = False) -> str:
    """Regex of SourceNet parameters that never get a gradient: those that no tap depends on, which come after the last
    block's norm1 (A14; with tap_hidden the last convolution alone), and those of the queries and keys that meet one context
    token alone, where softmax is 1 (A12).
    """
    one_token = r".*/transformer_blocks_\d+/(norm2|attn2/to_[qk])"
    if tap_hidden:
        return f"^source_net/(conv_out|{one_token})/"
    block, attention, transformer = site_path(config.sites[-1])
    last = f"{block}/{attention}"
    ups = range(len(config.up_block_types))
    later = [i for i in ups if block == "mid_block" or i > int(block.removeprefix("up_blocks_"))]
    parts = [
        f"{last}/{transformer}/(attn1|norm2|attn2|norm3|ff)",
        f"{last}/proj_out",
        f"{block}/upsamplers_0",
        *(f"up_blocks_{i}" for i in later),
        *(["mid_block/resnets_1"] if block == "mid_block" else []),
        "conv_norm_out",
        "conv_out",
        one_token,
    ]
    return f"^source_net/({'|'.join(parts)})/"
