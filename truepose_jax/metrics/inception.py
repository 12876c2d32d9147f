"""Inception-v3 up to its pooled 2,048 features, with torchvision's names: the network under FID.

Two of them are in use, and their numbers differ: torchvision's own (what GFLA, PIDM, PCDM and CFLD feed), and the one of
2015-12-05 that TensorFlow's FID, pytorch-fid and clean-fid use, whose pools treat borders in another way.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

FEATURES = 2048
EPS = 1e-3
"""Of every batch norm."""

VARIANTS = ("torchvision", "tensorflow")


class BatchNorm(nn.Module):
    """With the running statistics, which are parameters here."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("running_mean", nn.initializers.zeros, shape)
        variance = self.param("running_var", nn.initializers.ones, shape)
        return (x - mean) * (scale / jnp.sqrt(variance + EPS)) + bias


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        padding = [(p, p) for p in self.padding]
        conv = nn.Conv(self.width, self.kernel, self.stride, padding, use_bias=False, precision="highest", name="conv")
        return nn.relu(BatchNorm(name="bn")(conv(x)))


ONE, WIDE, TALL = (1, 1), (1, 7), (7, 1)
SAME = {ONE: (0, 0), (3, 3): (1, 1), (5, 5): (2, 2), WIDE: (0, 3), TALL: (3, 0), (1, 3): (0, 1), (3, 1): (1, 0)}
"""Padding that keeps the size."""


class _Block(nn.Module):
    variant: str = "torchvision"

    def chain(self, x: Array, *steps: tuple[str, int, tuple[int, int]]) -> Array:
        """Convolutions (name, width, kernel) of stride 1 that keep the size, one after the other."""
        for name, width, kernel in steps:
            x = BasicConv2d(width, kernel, 1, SAME[kernel], name=name)(x)
        return x

    def pooled(self, x: Array) -> Array:
        """3x3 mean of stride 1; TensorFlow leaves the padding out of it."""
        counted = self.variant == "torchvision"
        return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=counted)


class InceptionA(_Block):
    pool_width: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        return jnp.concatenate(
            [
                self.chain(x, ("branch1x1", 64, ONE)),
                self.chain(x, ("branch5x5_1", 48, ONE), ("branch5x5_2", 64, (5, 5))),
                self.chain(
                    x, ("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))
                ),
                self.chain(self.pooled(x), ("branch_pool", self.pool_width, ONE)),
            ],
            -1,
        )


class InceptionB(_Block):
    """Halves the size."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        double = self.chain(x, ("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, (3, 3)))
        return jnp.concatenate(
            [
                BasicConv2d(384, (3, 3), 2, name="branch3x3")(x),
                BasicConv2d(96, (3, 3), 2, name="branch3x3dbl_3")(double),
                nn.max_pool(x, (3, 3), (2, 2)),
            ],
            -1,
        )


class InceptionC(_Block):
    inner: int = 128

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        c = self.inner
        double = [
            ("branch7x7dbl_1", c, ONE),
            ("branch7x7dbl_2", c, TALL),
            ("branch7x7dbl_3", c, WIDE),
            ("branch7x7dbl_4", c, TALL),
            ("branch7x7dbl_5", 192, WIDE),
        ]
        return jnp.concatenate(
            [
                self.chain(x, ("branch1x1", 192, ONE)),
                self.chain(x, ("branch7x7_1", c, ONE), ("branch7x7_2", c, WIDE), ("branch7x7_3", 192, TALL)),
                self.chain(x, *double),
                self.chain(self.pooled(x), ("branch_pool", 192, ONE)),
            ],
            -1,
        )


class InceptionD(_Block):
    """Halves the size."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        three = self.chain(x, ("branch3x3_1", 192, ONE))
        seven = self.chain(x, ("branch7x7x3_1", 192, ONE), ("branch7x7x3_2", 192, WIDE), ("branch7x7x3_3", 192, TALL))
        return jnp.concatenate(
            [
                BasicConv2d(320, (3, 3), 2, name="branch3x3_2")(three),
                BasicConv2d(192, (3, 3), 2, name="branch7x7x3_4")(seven),
                nn.max_pool(x, (3, 3), (2, 2)),
            ],
            -1,
        )


class InceptionE(_Block):
    pool: str = "mean"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        three = self.chain(x, ("branch3x3_1", 384, ONE))
        double = self.chain(x, ("branch3x3dbl_1", 448, ONE), ("branch3x3dbl_2", 384, (3, 3)))
        largest = self.pool == "largest"
        pooled = nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))) if largest else self.pooled(x)
        return jnp.concatenate(
            [
                self.chain(x, ("branch1x1", 320, ONE)),
                self.chain(three, ("branch3x3_2a", 384, (1, 3))),
                self.chain(three, ("branch3x3_2b", 384, (3, 1))),
                self.chain(double, ("branch3x3dbl_3a", 384, (1, 3))),
                self.chain(double, ("branch3x3dbl_3b", 384, (3, 1))),
                self.chain(pooled, ("branch_pool", 192, ONE)),
            ],
            -1,
        )


class Inception(nn.Module):
    """Images, normalised as the weights want them, to pooled features. fp32. At least 75 pixels a side.

    variant: "torchvision", or "tensorflow" for the network of 2015-12-05, whose mean pools leave the padding out and
    whose last block takes the largest of its neighbours (a slip of the original that all its numbers depend on).
    """

    variant: str = "torchvision"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r}; expected one of {VARIANTS}")
        v = self.variant
        x = BasicConv2d(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = BasicConv2d(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = BasicConv2d(64, (3, 3), 1, (1, 1), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = BasicConv2d(80, name="Conv2d_3b_1x1")(x)
        x = BasicConv2d(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(v, width, name=name)(x)
        x = InceptionB(v, name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = InceptionC(v, inner, name=name)(x)
        x = InceptionD(v, name="Mixed_7a")(x)
        x = InceptionE(v, name="Mixed_7b")(x)
        x = InceptionE(v, "largest" if v == "tensorflow" else "mean", name="Mixed_7c")(x)
        return x.mean((1, 2))
