"""LPIPS 0.1 with AlexNet (Zhang et al. 2018): torchvision's AlexNet features, compared through learnt weights.

Parameters bear the published files' names (`features.0.weight`, `lin0.model.1.weight`), so that the converter's rule
loads them: features from torchvision's alexnet, linear layers from the lpips package.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet's means and deviations for images in [-1, 1], with the reference's rounding."""

EPS = 1e-10
LEAST_SIDE = 31
"""Smaller images vanish in AlexNet's pools."""

# (index in torchvision's `features`, width, kernel, stride, padding)
LAYERS = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))
POOLED_BEFORE = (3, 6)


class LPIPS(nn.Module):
    """Perceptual distance of each pair of images, >= 0; 0 for equal ones. fp32 throughout."""

    @nn.compact
    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Images in [-1, 1], at least LEAST_SIDE pixels a side."""
        count = a.shape[0]
        x = (jnp.concatenate([a, b]).astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
        distance = jnp.zeros(count)
        for number, (index, width, kernel, stride, padding) in enumerate(LAYERS):
            if index in POOLED_BEFORE:
                x = nn.max_pool(x, (3, 3), (2, 2))
            conv = nn.Conv(width, (kernel, kernel), stride, padding, precision="highest", name=f"features.{index}")
            x = nn.relu(conv(x))
            unit = x / (jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True)) + EPS)
            difference = jnp.square(unit[:count] - unit[count:])
            lin = nn.Conv(1, (1, 1), use_bias=False, precision="highest", name=f"lin{number}.model.1")
            distance += lin(difference).mean((1, 2, 3))
        return distance
