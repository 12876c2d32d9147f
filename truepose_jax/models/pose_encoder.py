"""PoseEncoder: the skeleton picture to features that are added after TargetNet's conv_in (docs/paper.md A20)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

HIDDEN = (16, 32, 96)
"""Widths of the first three convolutions: ControlNet's hint encoder at its three resolutions."""


class PoseEncoder(nn.Module):
    """Four 3x3 convolutions, silu between: three that together shrink by `stride`, then one to `features`, born zero.

    [b h w 3] in [0, 1] -> [b h/stride w/stride features]; `stride` is the autoencoder's factor: 1, 2, 4 or 8.
    """

    features: int
    stride: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, skeleton: Float[Array, "b H W 3"]) -> Float[Array, "b h w features"]:
        halvings = {1: 0, 2: 1, 4: 2, 8: 3}[self.stride]
        x = skeleton.astype(self.dtype)
        for i, width in enumerate(HIDDEN):
            stride = 2 if i < halvings else 1
            x = nn.silu(nn.Conv(width, (3, 3), strides=stride, padding=1, dtype=self.dtype, name=f"conv_{i}")(x))
        return nn.Conv(
            self.features, (3, 3), padding=1, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv_out"
        )(x)
