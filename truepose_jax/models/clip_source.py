"""F' from CLIP in SourceNet's place: ablation B1 of TruePose (section 5.3; docs/paper.md 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.models.attention import layer_norm
from truepose_jax.models.clip import CLIP_MEAN, CLIP_STD, CLIPVisionConfig, CLIPVisionModelWithProjection
from truepose_jax.models.unet import UNetConfig


def clip_patches(config: CLIPVisionConfig, params, images: Float[Array, "b H W 3"]) -> Float[Array, "b s s e"]:
    """The patch tokens of whole images in [-1, 1], as a grid over the square that holds the image (A16: white beside
    it). The last layer's hidden states; no gradient reaches `params`."""
    b, h, w = images.shape[:3]
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    pads = ((0, 0), (top, side - h - top), (left, side - w - left), (0, 0))
    square = jnp.pad((images.astype(jnp.float32) + 1) / 2, pads, constant_values=1.0)
    size = config.image_size
    pixels = jnp.clip(jax.image.resize(square, (b, size, size, 3), "cubic"), 0.0, 1.0)
    pixels = (pixels - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
    states = CLIPVisionModelWithProjection(config).apply({"params": params}, pixels).last_hidden_state[:, 1:]
    grid = math.isqrt(config.patches)
    return jax.lax.stop_gradient(states).reshape(b, grid, grid, -1)


class ClipSource(nn.Module):
    """CLIP's patches through a stacked MLP to the shape of every site's F' [b n c].

    The grid lies over a square; each site reads it, bilinearly, where its own cells lie. beside: by level, what the MLP
    is told of each cell besides (None: nothing).
    """

    unet: UNetConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "b s s e"],
        latent_hw: tuple[int, int],
        beside: Sequence[Float[Array, "b n d"] | None],
    ) -> dict[str, Float[Array, "b n c"]]:
        patches = layer_norm(self.dtype, "norm")(patches)
        found = {}
        for site in self.unet.sites:
            cells = tuple(-(-side // 2**site.level) for side in latent_hw)
            placed = _over_image(patches, cells)
            if beside[site.level] is not None:
                placed = jnp.concatenate([placed, beside[site.level].astype(placed.dtype)], axis=-1)
            found[site.name] = _SiteMLP(site.channels, dtype=self.dtype, name=site.name)(placed)
        return found


def _over_image(patches: Float[Array, "b s s e"], cells: tuple[int, int]) -> Float[Array, "b n e"]:
    b, grid, _, e = patches.shape
    side = max(cells)
    scale = jnp.full((2,), side / grid, jnp.float32)
    shift = jnp.asarray([-(side - n) / 2 for n in cells], jnp.float32)
    placed = jax.image.scale_and_translate(
        patches.astype(jnp.float32), (b, *cells, e), (1, 2), scale, shift, "linear", antialias=False
    )
    return placed.reshape(b, cells[0] * cells[1], e).astype(patches.dtype)


class _SiteMLP(nn.Module):
    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n e"]) -> Float[Array, "b n c"]:
        h = nn.gelu(nn.Dense(self.channels, dtype=self.dtype, name="fc1")(x), approximate=False)
        h = nn.gelu(nn.Dense(self.channels, dtype=self.dtype, name="fc2")(h), approximate=False)
        h = nn.Dense(self.channels, dtype=self.dtype, name="fc3")(h)
        # Normed, as SourceNet's F' is (A6).
        return layer_norm(self.dtype, "norm_out")(h)
