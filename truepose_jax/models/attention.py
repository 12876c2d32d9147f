"""Transformer parts of the SD1.5 UNet: attention, GEGLU feed-forward, the plain block, the 2D wrapper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.kernels.attention import api
from truepose_jax.models.layers import group_norm


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a transformer block sits in the UNet: all that a block factory may know.

    name: 'down_blocks_0_attentions_1_transformer_blocks_0'. level: halvings of the latent (0 = full).
    channels: width of the hidden state. heads: number of heads.
    """

    name: str
    level: int
    channels: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads


MakeBlock = Callable[..., nn.Module]
"""make_block(site, name=...) -> module with (hidden [b n c], context, features) -> (hidden, tap)."""


def split_heads(x: Float[Array, "b n c"], heads: int) -> Float[Array, "b n g d"]:
    return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: Float[Array, "b n g d"]) -> Float[Array, "b n c"]:
    return x.reshape(*x.shape[:2], -1)


def layer_norm(dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head attention: q from the hidden state, k and v from the context (None: from itself)."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m e"] | None = None,
        key_mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n c"]:
        context = x if context is None else context
        width = x.shape[-1]
        q, k, v = (
            split_heads(nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(y), self.heads)
            for name, y in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        out = merge_heads(api.attention(q, k, v, key_mask=key_mask))
        return nn.Dense(width, dtype=self.dtype, name="to_out_0")(out)


class GEGLU(nn.Module):
    """x W_1 * gelu(x W_2), exact gelu (the tanh form is 1e-3 off)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n features"]:
        value, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        width = x.shape[-1]
        return nn.Dense(width, dtype=self.dtype, name="net_2")(GEGLU(4 * width, dtype=self.dtype, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """SD1.5's block: self-attention, cross-attention, feed-forward, each normed first and added.

    tap: norm1's output [b n c], the source features F' of TruePose (docs/paper.md A6).
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m e"], features: Any = None
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        if features is not None:
            raise ValueError("the plain block takes no source features; pass a block factory that does")
        tap = layer_norm(self.dtype, "norm1")(x)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn1")(tap)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn2")(layer_norm(self.dtype, "norm2")(x), context)
        return x + FeedForward(dtype=self.dtype, name="ff")(layer_norm(self.dtype, "norm3")(x)), tap


def plain_block(site: Site, *, name: str, dtype=jnp.float32) -> nn.Module:
    """The block factory of an unmodified SD1.5 UNet."""
    return BasicTransformerBlock(heads=site.heads, dtype=dtype, name=name)


class Transformer2DModel(nn.Module):
    """norm, projection in, transformer blocks over the h*w tokens, projection out, + input.

    sites: one per block. Returns the new hidden state and {site name: tap}.
    """

    sites: tuple[Site, ...]
    make_block: MakeBlock
    groups: int = 32
    linear_projection: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Any, features: dict[str, Any] | None
    ) -> tuple[Float[Array, "b h w c"], dict[str, Array]]:
        b, h, w, c = x.shape
        project = nn.Dense if self.linear_projection else _conv1x1
        tokens = group_norm(self.groups, 1e-6, self.dtype, "norm")(x)
        tokens = project(c, dtype=self.dtype, name="proj_in")(tokens).reshape(b, h * w, c)
        taps = {}
        for i, site in enumerate(self.sites):
            block = self.make_block(site, name=f"transformer_blocks_{i}")
            call = nn.remat(_call_block) if self.remat else _call_block
            site_features = None if features is None else features[site.name]
            tokens, taps[site.name] = call(block, tokens, context, site_features)
        out = project(c, dtype=self.dtype, name="proj_out")(tokens.reshape(b, h, w, c))
        return x + out, taps


def _call_block(block: nn.Module, tokens, context, features):
    return block(tokens, context, features)


def _conv1x1(features: int, *, dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (1, 1), dtype=dtype, name=name)
