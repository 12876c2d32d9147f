"""Convolutional parts of the SD1.5 UNet and autoencoder: time embedding, resnet, down- and upsampling. NHWC.

Parameter names are diffusers'. Norm statistics are float32 whatever the compute dtype.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from truepose_jax.kernels.attention.api import platform

FEW_CELLS = 128
"""Cells of a whole batch up to which a convolution on a CPU is one matrix product. XLA there turns the weights round for the
gradient by the input, which for few cells is most of the work. Processor time of product / convolution, forward with gradients
and forward alone (one core, 3x3, 24 cells of 512 -> 256 channels, 96 of 256, 352 of 128, 1408 of 64): 0.40 and 0.60, 0.72 and
1.04, 0.96 and 1.15, 1.07 and 1.31."""


def group_norm(groups: int, eps: float, dtype, name: str) -> nn.GroupNorm:
    # Two-pass variance: the one-pass form loses digits where a group's mean is large against its spread.
    return nn.GroupNorm(num_groups=groups, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def conv3x3(features: int, dtype, name: str, *, stride: int = 1, padding=1, zero_init: bool = False) -> nn.Conv:
    init = {"kernel_init": nn.initializers.zeros} if zero_init else {}
    return nn.Conv(
        features, (3, 3), strides=stride, padding=padding, dtype=dtype, name=name, conv_general_dilated=convolve, **init
    )


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "i j c features"],
    strides: tuple[int, int],
    padding: list[tuple[int, int]],
    *,
    lhs_dilation: tuple[int, int],
    rhs_dilation: tuple[int, int],
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    feature_group_count: int,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "b h2 w2 features"]:
    """jax.lax.conv_general_dilated as nn.Conv calls it (NHWC, HWIO, nothing dilated); on CPU one product for FEW_CELLS."""
    (top, bottom), (left, right) = padding
    (down, across), (i, j, c, features) = strides, kernel.shape
    h = (x.shape[1] + top + bottom - i) // down + 1
    w = (x.shape[2] + left + right - j) // across + 1
    if platform() != "cpu" or x.shape[0] * h * w > FEW_CELLS:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    seen = [x[:, a : a + down * h : down, b : b + across * w : across] for a in range(i) for b in range(j)]
    cells = jnp.concatenate([each[:, :h, :w] for each in seen], axis=-1).reshape(-1, i * j * c)
    return jnp.matmul(cells, kernel.reshape(i * j * c, features), precision=precision).reshape(-1, h, w, features)


def timestep_sinusoids(t: Int[Array, " b"], width: int) -> Float[Array, "b width"]:
    """[cos, sin] of t at width/2 frequencies 1 .. 1/10000 (diffusers: flip_sin_to_cos, freq_shift 0)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_sinusoids(h: int, w: int, features: int) -> Float[Array, "h w features"]:
    """Fixed 2-D positions in [-1, 1]: cos and sin of y and of x at features/4 octaves each, from half a period over
    the picture on; channels that four do not divide stay 0."""
    octaves = jnp.pi / 2 * 2.0 ** jnp.linspace(0.0, 3.0, features // 4)
    y, x = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n * 2.0 - 1.0 for n in (h, w))
    waves = [f(a[:, None] * octaves) for a in (y, x) for f in (jnp.cos, jnp.sin)]
    rows = jnp.broadcast_to(jnp.concatenate(waves[:2], -1)[:, None], (h, w, 2 * len(octaves)))
    columns = jnp.broadcast_to(jnp.concatenate(waves[2:], -1)[None], (h, w, 2 * len(octaves)))
    found = jnp.concatenate([rows, columns], axis=-1)
    return jnp.pad(found, ((0, 0), (0, 0), (0, features - found.shape[-1])))


class TimestepEmbedding(nn.Module):
    """Two dense layers on the sinusoids: [b width] -> [b features]."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, sinusoids: Float[Array, "b width"]) -> Float[Array, "b features"]:
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(sinusoids)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))


class ResnetBlock2D(nn.Module):
    """norm, silu, conv, (+ time), norm, silu, conv, + shortcut. `temb` None: no time (the autoencoder)."""

    features: int
    groups: int = 32
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w features"]:
        h = nn.silu(group_norm(self.groups, self.eps, self.dtype, "norm1")(x))
        h = conv3x3(self.features, self.dtype, "conv1")(h)
        if temb is not None:
            h += nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))[:, None, None, :]
        h = nn.silu(group_norm(self.groups, self.eps, self.dtype, "norm2")(h))
        # Zero at birth, as in the ADM and LDM code: a new block starts as the identity.
        h = conv3x3(self.features, self.dtype, "conv2", zero_init=True)(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2; h and w halve, rounding up. `asymmetric` pads right and bottom only (the VAE;
    there h and w must be even)."""

    features: int
    asymmetric: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        padding = ((0, 1), (0, 1)) if self.asymmetric else 1
        return conv3x3(self.features, self.dtype, "conv", stride=2, padding=padding)(x)


class Upsample2D(nn.Module):
    """Repeats each cell 2 x 2, crops to `size` (h, w) where given, then a 3x3 convolution.

    The crop is what torch's nearest interpolation to an explicit size gives for 6 -> 11; it lets odd latents through.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 features"]:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        if size is not None:
            if not all(full - 1 <= want <= full for full, want in zip(x.shape[1:3], size, strict=True)):
                raise ValueError(f"cannot upsample {h}x{w} to {size[0]}x{size[1]}: not a halving that rounds up")
            x = x[:, : size[0], : size[1]]
        return conv3x3(self.features, self.dtype, "conv")(x)
