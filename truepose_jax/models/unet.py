"""UNet2DConditionModel of diffusers in Linen: SD1.5's UNet and any made of the same five block types. NHWC.

Two things differ from diffusers: the transformer block is made by a factory that is passed in, and features of another
network come in (and go out as taps) as arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from truepose_jax.models.attention import MakeBlock, Site, Transformer2DModel
from truepose_jax.models.layers import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    conv3x3,
    group_norm,
    timestep_sinusoids,
)

DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")

# What diffusers means where a config.json leaves out a field that we read.
_DIFFUSERS_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}

# Fields of a diffusers config that would change the network, and the only value that this module has. Two more exist
# that do not: sample_size (a hint) and upcast_attention (the softmax here is float32 always).
_FIXED_FIELDS = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "addition_embed_type_num_heads": 64,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": False,
    "cross_attention_norm": None,
}

_LEAST = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 0,
    "cross_attention_dim": 1,
    "transformer_layers_per_block": 1,
    "norm_num_groups": 1,
}

_ONE_FOR_ALL_LEVELS = (
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)
"""Fields that diffusers also takes as one value per level; here they must then all be the same."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of a diffusers UNet config that shape the network; the defaults are SD1.5's.

    attention_head_dim is, by a quirk of diffusers that SD1.5 rests on, the NUMBER of heads; one or one per level.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    transformer_layers_per_block: int = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self):
        for field, least in _LEAST.items():
            if getattr(self, field) < least:
                raise ValueError(f"UNet {field} is {getattr(self, field)}; it must be at least {least}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"UNet norm_eps is {self.norm_eps}; it must be in (0, 1)")
        levels = max(len(self.block_out_channels), 1)
        for field, known in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            types = getattr(self, field)
            if len(types) != levels or not set(types) <= set(known):
                raise ValueError(f"UNet {field} is {types}; expected {levels} of {known}")
        if not isinstance(self.attention_head_dim, int) and len(self.attention_head_dim) != levels:
            raise ValueError(f"UNet attention_head_dim is {self.attention_head_dim}; expected one number or {levels}")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if min(channels, heads) < 1 or channels % heads or channels % self.norm_num_groups:
                raise ValueError(
                    f"UNet width {channels} is not divisible by {heads} heads and {self.norm_num_groups} norm groups"
                )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """From a config.json; fields left out have diffusers' defaults. ValueError for what is not built here."""
        kind = config.get("_class_name", "UNet2DConditionModel")
        if kind != "UNet2DConditionModel":
            raise ValueError(f"expected the config of a UNet2DConditionModel; _class_name is {kind!r}")
        found = dict(config)
        if found.get("mid_block_only_cross_attention") is None:
            found["mid_block_only_cross_attention"] = False
        for field in _ONE_FOR_ALL_LEVELS:
            value = found.get(field)
            if isinstance(value, list | tuple):
                if not value or any(each != value[0] for each in value):
                    raise ValueError(f"UNet {field} is {value}; levels that differ in it are not supported")
                found[field] = value[0]
        for field, only in _FIXED_FIELDS.items():
            if found.get(field, only) != only:
                raise ValueError(f"UNet {field} is {found[field]!r}; only {only!r} is supported (SD1.5's)")
        fields = {name: found.get(name, default) for name, default in _DIFFUSERS_DEFAULTS.items()}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads per level."""
        if isinstance(self.attention_head_dim, int):
            return (self.attention_head_dim,) * len(self.block_out_channels)
        return self.attention_head_dim

    def attention_sites(self, where: str, level: int, index: int) -> tuple[Site, ...]:
        """The sites of the transformer `index` of block `where` at `level`."""
        return tuple(
            Site(
                name=f"{where}_attentions_{index}_transformer_blocks_{k}",
                level=level,
                channels=self.block_out_channels[level],
                heads=self.heads[level],
            )
            for k in range(self.transformer_layers_per_block)
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every transformer block in the order in which the UNet runs them: 16 for SD1.5."""
        levels = len(self.block_out_channels)
        found: list[Site] = []
        for i, kind in enumerate(self.down_block_types):
            if kind == "CrossAttnDownBlock2D":
                for j in range(self.layers_per_block):
                    found += self.attention_sites(f"down_blocks_{i}", i, j)
        found += self.attention_sites("mid_block", levels - 1, 0)
        for i, kind in enumerate(self.up_block_types):
            if kind == "CrossAttnUpBlock2D":
                for j in range(self.layers_per_block + 1):
                    found += self.attention_sites(f"up_blocks_{i}", levels - 1 - i, j)
        return tuple(found)


MakeAfter = Callable[..., nn.Module]
"""make_after(site, name=...) -> module on [b h w c] -> [b h w c]."""


class AfterSite(NamedTuple):
    """Where a module stands after a layer: 'down_blocks_0_motion_modules_1'; level: halvings of the latent."""

    name: str
    level: int
    channels: int


class _UNetPart(nn.Module):
    """What down, mid and up blocks share: the config, the factories, and resnets and transformers made from them."""

    config: UNetConfig
    make_block: MakeBlock
    make_after: MakeAfter | None = None
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    def resnet(self, features: int, index: int):
        cls = nn.remat(ResnetBlock2D) if self.remat else ResnetBlock2D
        c = self.config
        return cls(features, groups=c.norm_num_groups, eps=c.norm_eps, dtype=self.dtype, name=f"resnets_{index}")

    def transformer(self, where: str, level: int, index: int):
        return Transformer2DModel(
            sites=self.config.attention_sites(where, level, index),
            make_block=self.make_block,
            groups=self.config.norm_num_groups,
            linear_projection=self.config.use_linear_projection,
            remat=self.remat,
            dtype=self.dtype,
            name=f"attentions_{index}",
        )

    def after(self, x: Array, where: str, level: int, index: int) -> Array:
        """x through the module that stands after layer `index`, where there is one."""
        if self.make_after is None:
            return x
        name = f"motion_modules_{index}"
        site = AfterSite(f"{where}_{name}", level, self.config.block_out_channels[level])
        return self.make_after(site, name=name)(x)


class DownBlock(_UNetPart):
    """layers_per_block x (resnet, transformer), then a stride-2 convolution except at the last level."""

    level: int = 0

    @nn.compact
    def __call__(self, x, temb, context, features):
        c, i = self.config, self.level
        skips, taps = [], {}
        for j in range(c.layers_per_block):
            x = self.resnet(c.block_out_channels[i], j)(x, temb)
            if c.down_block_types[i] == "CrossAttnDownBlock2D":
                x, new = self.transformer(f"down_blocks_{i}", i, j)(x, context, features)
                taps |= new
            x = self.after(x, f"down_blocks_{i}", i, j)
            skips.append(x)
        if i + 1 < len(c.block_out_channels):
            x = Downsample2D(c.block_out_channels[i], dtype=self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips, taps


class MidBlock(_UNetPart):
    """resnet, transformer, resnet at the lowest level."""

    @nn.compact
    def __call__(self, x, temb, context, features):
        level = len(self.config.block_out_channels) - 1
        width = self.config.block_out_channels[level]
        x = self.resnet(width, 0)(x, temb)
        x, taps = self.transformer("mid_block", level, 0)(x, context, features)
        x = self.after(x, "mid_block", level, 0)
        return self.resnet(width, 1)(x, temb), taps


class UpBlock(_UNetPart):
    """(layers_per_block + 1) x (concatenate skip, resnet, transformer), then upsampling to the next skip's size."""

    index: int = 0

    @nn.compact
    def __call__(self, x, skips: list, temb, context, features):
        c, i = self.config, self.index
        level = len(c.block_out_channels) - 1 - i
        taps = {}
        for j in range(c.layers_per_block + 1):
            x = self.resnet(c.block_out_channels[level], j)(jnp.concatenate([x, skips.pop()], axis=-1), temb)
            if c.up_block_types[i] == "CrossAttnUpBlock2D":
                x, new = self.transformer(f"up_blocks_{i}", level, j)(x, context, features)
                taps |= new
            x = self.after(x, f"up_blocks_{i}", level, j)
        if level > 0:
            up = Upsample2D(c.block_out_channels[level], dtype=self.dtype, name="upsamplers_0")
            x = up(x, size=skips[-1].shape[1:3])
        return x, taps


HIDDEN = "hidden"
"""Name of the one tap that is no site's."""


class UNet2DCondition(nn.Module):
    """SD1.5's denoising UNet: (x [b h w c], t [b], context) -> (prediction [b h w out], {site name: tap}).

    context: passed as it is to every block (SD1.5: [b m 768]). features: {site name: anything} for blocks that read
    another network, or None. after_conv_in: [b h w block_out_channels[0]] or one for all rows, added to conv_in's
    output (pose features, positions).
    after_time: [b 4 block_out_channels[0]], added to the time embedding (diffusers' class embedding of type "identity").
    make_after: make_after(AfterSite, name=...) -> module on [b h w c] after every layer of every level and, in the middle,
    after the transformer: 21 for SD1.5, where AnimateDiff has its motion modules.
    remat: recompute each resnet and transformer block in the backward pass. tap_hidden: what the last convolution reads
    [b h w block_out_channels[0]] is among the taps, as HIDDEN.
    """

    config: UNetConfig
    make_block: MakeBlock
    make_after: MakeAfter | None = None
    remat: bool = False
    tap_hidden: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        context: Any,
        *,
        features: Mapping[str, Any] | None = None,
        after_conv_in: Float[Array, "*b h w e"] | None = None,
        after_time: Float[Array, "b d"] | None = None,
    ) -> tuple[Float[Array, "b h w out"], dict[str, Array]]:
        c = self.config
        if x.shape[-1] != c.in_channels:
            raise ValueError(f"the UNet takes {c.in_channels} channels; got {x.shape[-1]}")
        shared = {"config": c, "make_block": self.make_block, "make_after": self.make_after, "remat": self.remat}
        shared |= {"dtype": self.dtype}
        width = c.block_out_channels[0]
        temb = TimestepEmbedding(4 * width, dtype=self.dtype, name="time_embedding")(timestep_sinusoids(t, width))
        if after_time is not None:
            temb = temb + jnp.asarray(after_time, temb.dtype)

        x = conv3x3(width, self.dtype, "conv_in")(x)
        if after_conv_in is not None:
            x = x + jnp.asarray(after_conv_in, x.dtype)
        skips, taps = [x], {}
        for i in range(len(c.block_out_channels)):
            x, new_skips, new = DownBlock(level=i, name=f"down_blocks_{i}", **shared)(x, temb, context, features)
            skips += new_skips
            taps |= new
        x, new = MidBlock(name="mid_block", **shared)(x, temb, context, features)
        taps |= new
        for i in range(len(c.block_out_channels)):
            x, new = UpBlock(index=i, name=f"up_blocks_{i}", **shared)(x, skips, temb, context, features)
            taps |= new
        x = nn.silu(group_norm(c.norm_num_groups, c.norm_eps, self.dtype, "conv_norm_out")(x))
        if self.tap_hidden:
            taps[HIDDEN] = x
        return conv3x3(c.out_channels, self.dtype, "conv_out", zero_init=True)(x).astype(jnp.float32), taps
