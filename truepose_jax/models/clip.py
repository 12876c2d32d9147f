"""CLIP's vision tower with projection in Linen: transformers' CLIPVisionModelWithProjection, any config.

Parameter paths are transformers' dotted names (vision_model/encoder/layers_0/self_attn/q_proj/kernel), the
misspelt `pre_layrnorm` among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.kernels.attention import api
from truepose_jax.models.attention import merge_heads, split_heads

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's pixel statistics in [0, 1], RGB: the network sees (x - mean) / std."""


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the activation of OpenAI's weights; the exact gelu is up to 0.02 away."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}

# What transformers' CLIPVisionConfig means where a config.json leaves a field out (ViT-B/32).
_TRANSFORMERS_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The fields of a transformers CLIPVisionConfig that shape the network; the defaults are ViT-L/14's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP hidden_act is {self.hidden_act!r}; known: {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"CLIP width {self.hidden_size} is not divisible by {self.num_attention_heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(f"CLIP image_size {self.image_size} is smaller than a patch of {self.patch_size}")

    @property
    def patches(self) -> int:
        """Patches of one image; a rest of image_size that fills no patch is dropped, as in torch."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> CLIPVisionConfig:
        """From a config.json: a vision config, or a whole CLIP config whose `vision_config` is taken.

        Fields that are left out have transformers' defaults. Raises ValueError for another kind of model.
        """
        kind = config.get("model_type", "clip_vision_model")
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(f"expected the config of a CLIP vision model; model_type is {kind!r}")
        vision = dict(config.get("vision_config") or config)
        if "vision_config" in config:
            vision["projection_dim"] = config.get("projection_dim", _TRANSFORMERS_DEFAULTS["projection_dim"])
        return cls(**{name: vision.get(name, default) for name, default in _TRANSFORMERS_DEFAULTS.items()})


class CLIPVisionOutput(NamedTuple):
    """image_embeds: [b projection_dim], TruePose's token (docs/paper.md A11), not normalised, float32.
    hidden_states: the residual stream [b 1 + patches c] before the first layer and after each; class first.
    """

    image_embeds: Array
    hidden_states: tuple[Array, ...]

    @property
    def last_hidden_state(self) -> Array:
        """[b 1 + patches c] after the last layer, before post_layernorm (as transformers has it)."""
        return self.hidden_states[-1]


def _layer_norm(config: CLIPVisionConfig, dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class CLIPVisionEmbeddings(nn.Module):
    """A strided convolution to patches, class token in front, learned positions added: [b 1 + patches c]."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b n c"]:
        c = self.config
        patch = (c.patch_size, c.patch_size)
        conv = nn.Conv(
            c.hidden_size,
            patch,
            patch,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )
        patches = conv(pixels).reshape(pixels.shape[0], c.patches, c.hidden_size)
        token = self.param("class_embedding", nn.initializers.normal(c.hidden_size**-0.5), (c.hidden_size,))
        token = jnp.broadcast_to(token.astype(self.dtype), (pixels.shape[0], 1, c.hidden_size))
        positions = nn.Embed(
            c.patches + 1,
            c.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="position_embedding",
        )
        return jnp.concatenate([token, patches], axis=1) + positions(jnp.arange(c.patches + 1))


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases everywhere."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        def dense(name):
            return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)

        q, k, v = (split_heads(dense(f"{which}_proj")(x), self.heads) for which in "qkv")
        return dense("out_proj")(merge_heads(api.attention(q, k, v)))


class CLIPMLP(nn.Module):
    """Dense, activation, dense."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        h = ACTIVATIONS[self.config.hidden_act](
            nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        )
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each normed first and added."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        attention = CLIPAttention(self.config.num_attention_heads, dtype=self.dtype, name="self_attn")
        x = x + attention(_layer_norm(self.config, self.dtype, "layer_norm1")(x))
        mlp = CLIPMLP(self.config, dtype=self.dtype, name="mlp")
        return x + mlp(_layer_norm(self.config, self.dtype, "layer_norm2")(x))


class CLIPEncoder(nn.Module):
    """The layers; returns the residual stream before the first and after each."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n c"], ...]:
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(CLIPEncoderLayer(self.config, dtype=self.dtype, name=f"layers_{i}")(states[-1]))
        return tuple(states)


class CLIPVisionTransformer(nn.Module):
    """Embeddings, norm, encoder; returns the normed class token [b c] and the residual stream."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b s s 3"]) -> tuple[Float[Array, "b c"], tuple[Array, ...]]:
        x = CLIPVisionEmbeddings(self.config, dtype=self.dtype, name="embeddings")(pixels)
        x = _layer_norm(self.config, self.dtype, "pre_layrnorm")(x)
        states = CLIPEncoder(self.config, dtype=self.dtype, name="encoder")(x)
        return _layer_norm(self.config, self.dtype, "post_layernorm")(states[-1][:, 0]), states


class CLIPVisionModelWithProjection(nn.Module):
    """Pixels normalised by CLIP_MEAN and CLIP_STD [b s s 3], s = image_size -> CLIPVisionOutput.

    Under jit, hidden states that nobody reads cost nothing. Raises ValueError for another image size.
    """

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b s s 3"]) -> CLIPVisionOutput:
        c = self.config
        expected = (c.image_size, c.image_size, c.num_channels)
        if pixels.shape[1:] != expected:
            raise ValueError(f"CLIP takes images of {expected}; got {pixels.shape[1:]}")
        pooled, states = CLIPVisionTransformer(c, dtype=self.dtype, name="vision_model")(pixels.astype(self.dtype))
        projection = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")
        return CLIPVisionOutput(projection(pooled).astype(jnp.float32), states)
