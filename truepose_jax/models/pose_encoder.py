"""PoseEncoder: the skeleton picture to features that are added after the UNet's conv_in (docs/paper.md A20)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

HIDDEN = (16, 32, 96)
"""Widths of the first three convolutions: ControlNet's hint encoder at its three resolutions."""

CONTROLNET = (16, 32, 96, 256)
"""Widths of ControlNet's hint encoder."""

HALVINGS = {1: 0, 2: 1, 4: 2, 8: 3}


class PoseEncoder(nn.Module):
    """Four 3x3 convolutions, silu between: three that together shrink by `stride`, then one to `features`, born zero.

    [b h w 3] in [0, 1] -> [b h/stride w/stride features]; `stride` is the autoencoder's factor: 1, 2, 4 or 8.
    """

    features: int
    stride: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, skeleton: Float[Array, "b H W 3"]) -> Float[Array, "b h w features"]:
        x = skeleton.astype(self.dtype)
        for i, width in enumerate(HIDDEN):
            stride = 2 if i < HALVINGS[self.stride] else 1
            x = nn.silu(_conv(width, self.dtype, f"conv_{i}", stride)(x))
        return _conv(self.features, self.dtype, "conv_out", zero=True)(x)


class ControlNetPoseEncoder(nn.Module):
    """ControlNet's conditioning embedding, under diffusers' names: conv_in, pairs of convolutions of which the second widens
    and halves, conv_out born zero; silu between. Shapes as PoseEncoder's; with fewer halvings the first pairs have them."""

    features: int
    stride: int = 8
    widths: tuple[int, ...] = CONTROLNET
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, skeleton: Float[Array, "b H W 3"]) -> Float[Array, "b h w features"]:
        x = nn.silu(_conv(self.widths[0], self.dtype, "conv_in")(skeleton.astype(self.dtype)))
        for i, (width, wider) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            stride = 2 if i < HALVINGS[self.stride] else 1
            x = nn.silu(_conv(width, self.dtype, f"blocks_{2 * i}")(x))
            x = nn.silu(_conv(wider, self.dtype, f"blocks_{2 * i + 1}", stride)(x))
        return _conv(self.features, self.dtype, "conv_out", zero=True)(x)


ENCODERS = {"four_conv": PoseEncoder, "controlnet": ControlNetPoseEncoder}


def pose_encoder(kind: str, features: int, *, stride: int, dtype) -> nn.Module:
    """The encoder that config.model.pose_encoder names."""
    return ENCODERS[kind](features, stride=stride, dtype=dtype)


def _conv(features: int, dtype, name: str, stride: int = 1, *, zero: bool = False) -> nn.Conv:
    init = {"kernel_init": nn.initializers.zeros} if zero else {}
    return nn.Conv(features, (3, 3), strides=stride, padding=1, dtype=dtype, name=name, **init)
