"""IMAGPose's own parts (Shen et al. 2024, and its public code): the canvas of four tiles, the texture tokens of FLC, and CVA,
AnimateDiff's temporal module among the tiles. Names are the code's."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.models.attention import Attention, FeedForward, layer_norm
from truepose_jax.models.layers import group_norm

HEADS = 8
"""Of CVA's attention."""


def tile(views: Float[Array, "b 4 h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Four pictures as one canvas: upper left, upper right, lower left, lower right."""
    b, _, h, w, c = views.shape
    return views.reshape(b, 2, 2, h, w, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c)


def untile(canvas: Float[Array, "b H W c"]) -> Float[Array, "b 4 H/2 W/2 c"]:
    """The inverse. Both sides must be even."""
    b, h, w, c = canvas.shape
    return canvas.reshape(b, 2, h // 2, 2, w // 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, h // 2, w // 2, c)


class TextureTokens(nn.Module):
    """A latent [b h w c] -> tokens [b (h/patch)(w/patch) e], e = features, by one strided convolution; patch divides h and w."""

    features: int
    patch: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b n e"]:
        window = (self.patch, self.patch)
        conv = nn.Conv(self.features, window, window, padding="VALID", dtype=self.dtype, name="proj")
        return conv(latents).reshape(len(latents), -1, self.features)


class CrossViewAttention(nn.Module):
    """CVA: at every cell attention among the four tiles of a canvas [b h w c], with a residual; born as nothing."""

    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, canvas: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return canvas + _TemporalTransformer(self.groups, dtype=self.dtype, name="temporal_transformer")(canvas)


class _TemporalTransformer(nn.Module):
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, canvas: Array) -> Array:
        tiles = untile(canvas)
        b, views, h, w, c = tiles.shape
        x = group_norm(self.groups, 1e-6, self.dtype, "norm")(tiles.reshape(b * views, h, w, c))
        x = nn.Dense(c, dtype=self.dtype, name="proj_in")(x).reshape(b, views, h * w, c)
        x = x.transpose(0, 2, 1, 3).reshape(b * h * w, views, c)
        x = _TemporalBlock(dtype=self.dtype, name="transformer_blocks_0")(x)
        x = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="proj_out")(x)
        return tile(x.reshape(b, h * w, views, c).transpose(0, 2, 1, 3).reshape(b, views, h, w, c))


class _TemporalBlock(nn.Module):
    """Twice self-attention over the tiles, then GEGLU; each normed first and added. Places are told after each norm."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n 4 c"]) -> Float[Array, "n 4 c"]:
        places = frame_sinusoids(x.shape[1], x.shape[2]).astype(self.dtype)
        for i in range(2):
            normed = layer_norm(self.dtype, f"norms_{i}")(x) + places
            x = x + Attention(HEADS, dtype=self.dtype, name=f"attention_blocks_{i}")(normed)
        return x + FeedForward(dtype=self.dtype, name="ff")(layer_norm(self.dtype, "ff_norm")(x))


def frame_sinusoids(count: int, width: int) -> Float[Array, "count width"]:
    """sin and cos, one beside the other, of the place at width / 2 frequencies 1 .. 1/10000 (Vaswani et al. 2017)."""
    angles = jnp.arange(count)[:, None] * jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(count, width)
