"""Autoencoders between images and latents, NHWC: SD1.5's AutoencoderKL, and the pixel codec (space to depth).

A Method talks to either through `KLAutoencoder` and `PixelAutoencoder`, which have the same surface.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.kernels.attention import api
from truepose_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D, conv3x3, group_norm

EPS = 1e-6
"""Of every norm in the autoencoder (the UNet's resnets have 1e-5)."""

LOGVAR_RANGE = (-30.0, 20.0)

# Fields of a diffusers config that would change the network, and the only value that this module has.
_FIXED_FIELDS = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of a diffusers AutoencoderKL config that shape the network; the defaults are SD1.5's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self):
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"VAE width {channels} is not divisible by {self.norm_num_groups} norm groups")

    @property
    def factor(self) -> int:
        """Pixels per latent cell and side: 8 for SD1.5."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> AutoencoderKLConfig:
        """From a config.json; fields left out have diffusers' defaults. ValueError for other autoencoders."""
        kind = config.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise ValueError(f"expected the config of an AutoencoderKL; _class_name is {kind!r}")
        for field, only in _FIXED_FIELDS.items():
            if config.get(field, only) != only:
                raise ValueError(f"VAE {field} is {config[field]!r}; only {only!r} is supported (SD1.5's)")
        widths = tuple(config.get("block_out_channels", (64,)))
        for field, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            types = tuple(config.get(field, (kind,)))
            if types != (kind,) * len(widths):
                raise ValueError(f"VAE {field} is {types}; expected {len(widths)} x {kind}")
        return cls(
            block_out_channels=widths,
            layers_per_block=config.get("layers_per_block", 1),
            latent_channels=config.get("latent_channels", 4),
            norm_num_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
        )


class AttentionBlock(nn.Module):
    """group_norm, single-head self-attention over the h*w cells with biases, + input."""

    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = group_norm(self.groups, EPS, self.dtype, "group_norm")(x).reshape(b, h * w, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(tokens)[:, :, None, :] for name in ("to_q", "to_k", "to_v"))
        out = nn.Dense(c, dtype=self.dtype, name="to_out_0")(api.attention(q, k, v)[:, :, 0, :])
        return x + out.reshape(b, h, w, c)


class _AutoencoderPart(nn.Module):
    """What the parts of encoder and decoder share: the config and resnets made from it."""

    config: AutoencoderKLConfig
    dtype: jnp.dtype = jnp.float32

    def resnet(self, features: int, index: int) -> ResnetBlock2D:
        groups = self.config.norm_num_groups
        return ResnetBlock2D(features, groups=groups, eps=EPS, dtype=self.dtype, name=f"resnets_{index}")


class MidBlock(_AutoencoderPart):
    """resnet, attention, resnet."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnet(x.shape[-1], 0)(x)
        x = AttentionBlock(self.config.norm_num_groups, dtype=self.dtype, name="attentions_0")(x)
        return self.resnet(x.shape[-1], 1)(x)


class DownEncoderBlock(_AutoencoderPart):
    """layers_per_block resnets, then a stride-2 convolution (padded right, bottom) save at the last level."""

    level: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        widths = self.config.block_out_channels
        for j in range(self.config.layers_per_block):
            x = self.resnet(widths[self.level], j)(x)
        if self.level + 1 < len(widths):
            x = Downsample2D(widths[self.level], asymmetric=True, dtype=self.dtype, name="downsamplers_0")(x)
        return x


class UpDecoderBlock(_AutoencoderPart):
    """layers_per_block + 1 resnets, then upsampling by 2 except at the last (full) level."""

    index: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        widths = self.config.block_out_channels
        width = widths[len(widths) - 1 - self.index]
        for j in range(self.config.layers_per_block + 1):
            x = self.resnet(width, j)(x)
        if self.index + 1 < len(widths):
            x = Upsample2D(width, dtype=self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(_AutoencoderPart):
    """Images [b H W 3] -> moments before quant_conv [b h w 2c], h = H / factor."""

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c2"]:
        c = self.config
        x = conv3x3(c.block_out_channels[0], self.dtype, "conv_in")(images)
        for i in range(len(c.block_out_channels)):
            x = DownEncoderBlock(c, dtype=self.dtype, level=i, name=f"down_blocks_{i}")(x)
        x = MidBlock(c, dtype=self.dtype, name="mid_block")(x)
        x = nn.silu(group_norm(c.norm_num_groups, EPS, self.dtype, "conv_norm_out")(x))
        return conv3x3(2 * c.latent_channels, self.dtype, "conv_out")(x)


class Decoder(_AutoencoderPart):
    """Latents after post_quant_conv [b h w c] -> images [b H W 3]."""

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        c = self.config
        x = conv3x3(c.block_out_channels[-1], self.dtype, "conv_in")(latents)
        x = MidBlock(c, dtype=self.dtype, name="mid_block")(x)
        for i in range(len(c.block_out_channels)):
            x = UpDecoderBlock(c, dtype=self.dtype, index=i, name=f"up_blocks_{i}")(x)
        x = nn.silu(group_norm(c.norm_num_groups, EPS, self.dtype, "conv_norm_out")(x))
        return conv3x3(3, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """SD1.5's variational autoencoder on UNSCALED latents; scaling by 0.18215 is `KLAutoencoder`'s.

    Images [-1, 1] [b H W 3], H and W divisible by config.factor; latents [b H/factor W/factor 4].
    Call its methods by `module.apply({"params": p}, x, method="encode")`; __call__ is for init.
    """

    config: AutoencoderKLConfig = AutoencoderKLConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, dtype=self.dtype)
        self.decoder = Decoder(c, dtype=self.dtype)
        self.quant_conv = nn.Conv(2 * c.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return self.decode(self.encode(images)[0])

    def encode(self, images: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """(mean, log variance) of the latents' posterior, float32; the log variance is clipped to [-30, 20].

        Raises ValueError where a side is not divisible by the factor.
        """
        check_divides(images.shape, self.config.factor)
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def sample(self, images: Float[Array, "b H W 3"], keys: jax.Array) -> Float[Array, "b h w c"]:
        """One draw of the latents' posterior; unit normal noise from `keys` [b], one key per image."""
        return posterior_sample(*self.encode(images), keys)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images, float32, about [-1, 1] and not clipped."""
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype))).astype(jnp.float32)


def posterior_sample(
    mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"], keys: jax.Array
) -> Float[Array, "b h w c"]:
    """One draw of each normal distribution; unit noise from `keys` [b], one key per image."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(0.5 * logvar) * noise


def check_divides(shape: tuple[int, ...], factor: int) -> None:
    """Raises ValueError where an image batch [b H W c] cannot be cut into cells of factor x factor pixels."""
    h, w = shape[1:3]
    if h % factor or w % factor:
        raise ValueError(f"images of {h}x{w} do not divide into cells of {factor}x{factor} pixels")


PIXEL_FACTORS = range(2, 9)


def space_to_depth(images: Float[Array, "b H W c"], factor: int) -> Float[Array, "b h w e"]:
    """Each cell of factor x factor pixels becomes a vector ordered (row, column, channel): e = factor^2 c."""
    check_divides(images.shape, factor)
    b, h, w, c = images.shape
    cells = images.reshape(b, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(latents: Float[Array, "b h w e"], factor: int) -> Float[Array, "b H W c"]:
    """The exact inverse of space_to_depth. Raises ValueError where e is no multiple of factor^2."""
    b, h, w, e = latents.shape
    if e % (factor * factor):
        raise ValueError(f"{e} channels are not cells of {factor}x{factor} pixels")
    cells = latents.reshape(b, h, w, factor, factor, -1).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(b, h * factor, w * factor, -1)


class Autoencoder(Protocol):
    """What a Method may know of an autoencoder. Latents are scaled (times `scale`), images are [-1, 1].

    factor: pixels per latent cell and side. channels: of a latent. scale: 0.18215 for the VAE, 1 for pixels.
    """

    factor: int
    channels: int
    scale: float

    def init(self, key: jax.Array) -> Mapping[str, Any]: ...

    def encode_mean(self, params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]: ...

    def encode_sample(self, params, images: Float[Array, "b H W 3"], keys: jax.Array) -> Float[Array, "b h w c"]: ...

    def decode(self, params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]: ...


@dataclasses.dataclass(frozen=True)
class KLAutoencoder:
    """`Autoencoder` on AutoencoderKL; params is that module's tree."""

    config: AutoencoderKLConfig = AutoencoderKLConfig()
    dtype: Any = jnp.float32

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @property
    def scale(self) -> float:
        return self.config.scaling_factor

    @property
    def module(self) -> AutoencoderKL:
        return AutoencoderKL(self.config, dtype=self.dtype)

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        """Random parameters; no parameter's shape depends on the image size."""
        return self.module.init(key, jnp.zeros((1, 2 * self.factor, 2 * self.factor, 3)))["params"]

    def encode_mean(self, params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        return self.module.apply({"params": params}, images, method="encode")[0] * self.scale

    def encode_sample(self, params, images: Float[Array, "b H W 3"], keys: jax.Array) -> Float[Array, "b h w c"]:
        return self.module.apply({"params": params}, images, keys, method="sample") * self.scale

    def decode(self, params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        return self.module.apply({"params": params}, latents / self.scale, method="decode")


@dataclasses.dataclass(frozen=True)
class PixelAutoencoder:
    """`Autoencoder` without parameters (pass {}): space to depth, exactly invertible. factor: 2 to 8."""

    factor: int = 8

    def __post_init__(self):
        if self.factor not in PIXEL_FACTORS:
            raise ValueError(f"pixel codec factor is {self.factor}; choose 2 to 8")

    @property
    def channels(self) -> int:
        return 3 * self.factor**2

    @property
    def scale(self) -> float:
        return 1.0

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        del key
        return {}

    def encode_mean(self, params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        del params
        return space_to_depth(images, self.factor)

    def encode_sample(self, params, images: Float[Array, "b H W 3"], keys: jax.Array) -> Float[Array, "b h w c"]:
        del keys
        return self.encode_mean(params, images)

    def decode(self, params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        del params
        return depth_to_space(latents, self.factor)


@dataclasses.dataclass(frozen=True)
class MomentsAutoencoder:
    """`Autoencoder` whose images are posteriors that were stored: [b h w 2c], mean and log variance, unscaled.

    Encodes to what `encoder` would have made of the photos, with the same noise, and decodes as it does.
    """

    encoder: KLAutoencoder

    @property
    def factor(self) -> int:
        return self.encoder.factor

    @property
    def channels(self) -> int:
        return self.encoder.channels

    @property
    def scale(self) -> float:
        return self.encoder.scale

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        return self.encoder.init(key)

    def encode_mean(self, params, images: Float[Array, "b h w c2"]) -> Float[Array, "b h w c"]:
        del params
        return images[..., : self.channels].astype(jnp.float32) * self.scale

    def encode_sample(self, params, images: Float[Array, "b h w c2"], keys: jax.Array) -> Float[Array, "b h w c"]:
        del params
        mean, logvar = jnp.split(images.astype(jnp.float32), 2, axis=-1)
        return posterior_sample(mean, logvar, keys) * self.scale

    def decode(self, params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        return self.encoder.decode(params, latents)
