"""DINOv2 in Linen: transformers' Dinov2Model, any size, without registers (Oquab et al. 2023).

Parameter paths are transformers' dotted names (encoder/layer_0/attention/attention/query/kernel).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.kernels.attention import api
from truepose_jax.models.attention import merge_heads, split_heads
from truepose_jax.models.resample import bicubic_matrix

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Pixel statistics in [0, 1], RGB: the network sees (x - mean) / std."""

# What transformers' Dinov2Config means where a config.json leaves a field out (ViT-B/14, 16-pixel patches).
_TRANSFORMERS_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 16,
    "use_swiglu_ffn": False,
    "layer_norm_eps": 1e-6,
}

# Fields of a config that would change the network, and the only value that this module has.
_FIXED_FIELDS = {"num_channels": 3, "hidden_act": "gelu", "qkv_bias": True, "num_register_tokens": 0}


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The fields of a transformers Dinov2Config that shape the network; the defaults are ViT-B/14's. image_size: that the
    table of positions was trained at; any other is shown by interpolating it (position_offset: see config.model.dino)."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    use_swiglu_ffn: bool = False
    layer_norm_eps: float = 1e-6
    position_offset: float = 0.1

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"DINOv2 width {self.hidden_size} is not divisible by {self.num_attention_heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(f"DINOv2 image_size {self.image_size} is smaller than a patch of {self.patch_size}")

    @property
    def side(self) -> int:
        """Cells of the table of positions along a side."""
        return self.image_size // self.patch_size

    @property
    def inner(self) -> int:
        """Width of the feed-forward layer: of the gated one two thirds, in eights."""
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any], *, position_offset: float = 0.1) -> Dinov2Config:
        """From a config.json. Raises ValueError for another kind of model, one with registers among them."""
        kind = config.get("model_type", "dinov2")
        if kind != "dinov2":
            raise ValueError(f"expected the config of a DINOv2 without registers; model_type is {kind!r}")
        for field, only in _FIXED_FIELDS.items():
            if config.get(field, only) != only:
                raise ValueError(f"DINOv2 {field} is {config[field]!r}; only {only!r} is supported")
        fields = {name: config.get(name, default) for name, default in _TRANSFORMERS_DEFAULTS.items()}
        return cls(**fields, position_offset=position_offset)


class Dinov2(nn.Module):
    """Normalised pixels [b H W 3] -> last_hidden_state [b 1+n c] after the final norm, the class token first."""

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b n c"]:
        x = _Embeddings(self.config, dtype=self.dtype, name="embeddings")(pixels.astype(self.dtype))
        x = _Encoder(self.config, dtype=self.dtype, name="encoder")(x)
        return _norm(self.config, self.dtype, "layernorm")(x)


def _norm(config: Dinov2Config, dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class _Embeddings(nn.Module):
    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        c, normal = self.config, nn.initializers.normal(0.02)
        patches = _Patches(c, dtype=self.dtype, name="patch_embeddings")(pixels)
        b, h, w, width = patches.shape
        token = self.param("cls_token", normal, (1, 1, width))
        table = self.param("position_embeddings", normal, (1, 1 + c.side**2, width))
        x = jnp.concatenate(
            [jnp.broadcast_to(token.astype(self.dtype), (b, 1, width)), patches.reshape(b, h * w, width)], 1
        )
        return x + _positions(table, c, (h, w)).astype(self.dtype)


class _Patches(nn.Module):
    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        patch = (self.config.patch_size,) * 2
        conv = nn.Conv(self.config.hidden_size, patch, patch, padding="VALID", dtype=self.dtype, name="projection")
        return conv(pixels)


def _positions(table: Float[Array, "1 n c"], config: Dinov2Config, cells: tuple[int, int]) -> Float[Array, "1 m c"]:
    if cells == (config.side,) * 2:
        return table
    grid = table[0, 1:].reshape(config.side, config.side, -1)
    down, across = (bicubic_matrix(config.side, n, config.position_offset) for n in cells)
    placed = jnp.einsum("hi,wj,ijc->hwc", down, across, grid, precision="highest")
    return jnp.concatenate([table[:, :1], placed.reshape(1, math.prod(cells), -1)], axis=1)


class _Encoder(nn.Module):
    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, dtype=self.dtype, name=f"layer_{i}")(x)
        return x


class _Layer(nn.Module):
    """Attention and MLP, each normed first, scaled per channel and added."""

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype = self.config, self.dtype
        attention = _Attention(c, dtype=dtype, name="attention")(_norm(c, dtype, "norm1")(x))
        x = x + _LayerScale(dtype=dtype, name="layer_scale1")(attention)
        mlp = (GatedMLP if c.use_swiglu_ffn else _MLP)(c, dtype=dtype, name="mlp")
        return x + _LayerScale(dtype=dtype, name="layer_scale2")(mlp(_norm(c, dtype, "norm2")(x)))


class _LayerScale(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.param("lambda1", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)


class _SelfAttention(nn.Module):
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        q, k, v = (
            split_heads(nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x), self.heads)
            for name in ("query", "key", "value")
        )
        return merge_heads(api.attention(q, k, v))


class _Output(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(x)


class _Attention(nn.Module):
    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        found = _SelfAttention(self.config.num_attention_heads, dtype=self.dtype, name="attention")(x)
        return _Output(dtype=self.dtype, name="output")(found)


class _MLP(nn.Module):
    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.gelu(nn.Dense(self.config.inner, dtype=self.dtype, name="fc1")(x), approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class GatedMLP(nn.Module):
    """silu of the first half times the second (giant)."""

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate, value = jnp.split(nn.Dense(2 * self.config.inner, dtype=self.dtype, name="weights_in")(x), 2, axis=-1)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="weights_out")(nn.silu(gate) * value)
