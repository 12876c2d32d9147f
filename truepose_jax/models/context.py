"""Cross-attention whose keys and values are made outside of the UNet: they do not depend on t, so sampling makes them once."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.kernels.attention import api
from truepose_jax.models.attention import Attention, FeedForward, Site, layer_norm, merge_heads, split_heads
from truepose_jax.models.unet import UNetConfig


class ContextKeys(NamedTuple):
    """Keys and values [b m g d] of attn2, and which keys exist ([b m], None: all)."""

    k: Array
    v: Array
    key_mask: Array | None = None


def context_projections(
    tokens: Float[Array, "b m e"], site: Site, dtype
) -> tuple[Float[Array, "b m g d"], Float[Array, "b m g d"]]:
    """(keys, values) by to_k and to_v of the module that calls this: attn2's own names."""
    k, v = (
        split_heads(nn.Dense(site.channels, use_bias=False, dtype=dtype, name=name)(tokens), site.heads)
        for name in ("to_k", "to_v")
    )
    return k, v


class ContextAttention(nn.Module):
    """The rest of attn2, under its names: queries of the normed hidden state, and the output projection.

    context None (dropped): exactly the output projection's bias; tokens that are all zero give the same.
    """

    site: Site
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, normed: Float[Array, "b n c"], context: ContextKeys | None) -> Float[Array, "b n c"]:
        width = normed.shape[-1]
        out = nn.Dense(width, dtype=self.dtype, name="to_out_0")
        if context is None:
            return out(jnp.zeros((normed.shape[0], 1, width), normed.dtype))
        q = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_q")(normed)
        q = split_heads(q, self.site.heads)
        return out(merge_heads(api.attention(q, context.k, context.v, key_mask=context.key_mask)))


class ContextSide(nn.Module):
    """Tokens [b m e] -> keys and values of every site's attn2. Parameters: <site>/attn2/{to_k,to_v}."""

    unet: UNetConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b m e"], key_mask: Bool[Array, "b m"] | None = None
    ) -> dict[str, ContextKeys]:
        return {
            site.name: _SiteContext(site, dtype=self.dtype, name=site.name)(tokens, key_mask)
            for site in self.unet.sites
        }


class _SiteContext(nn.Module):
    site: Site
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, key_mask) -> ContextKeys:
        return ContextKeys(*_SiteProjections(self.site, dtype=self.dtype, name="attn2")(tokens), key_mask)


class _SiteProjections(nn.Module):
    site: Site
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        return context_projections(tokens, self.site, self.dtype)


class ContextBlock(nn.Module):
    """SD's block with attn2 cut so: `features` are its keys and values, None where they are dropped.

    tap: root mean square of attn2's update [b], a sign of life.
    """

    site: Site
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: None, features: ContextKeys | None
    ) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
        x = x + Attention(self.site.heads, dtype=self.dtype, name="attn1")(layer_norm(self.dtype, "norm1")(x))
        attn2 = ContextAttention(self.site, dtype=self.dtype, name="attn2")
        update = attn2(layer_norm(self.dtype, "norm2")(x), features)
        x = x + update
        rms = jnp.sqrt(jnp.mean(jnp.square(update.astype(jnp.float32)), axis=(1, 2)))
        return x + FeedForward(dtype=self.dtype, name="ff")(layer_norm(self.dtype, "norm3")(x)), rms


def context_block(site: Site, *, name: str, dtype=jnp.float32) -> nn.Module:
    """The block factory of a UNet whose context is made by ContextSide."""
    return ContextBlock(site, dtype=dtype, name=name)
