"""HPFA, human-parsing-guided fusion attention: TruePose Eq. 6 to 8. The source side runs once per image (no t)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.kernels.attention import api
from truepose_jax.models.attention import Site, layer_norm, merge_heads, split_heads

INITS = ("random", "identity")
OUT_INITS = ("zeros", "random")
FEATURES = ("source_net", "clip")
TEXTURES = ("hpfa", "concat")
ALIGNMENTS = ("caa", "global")
SOURCE_ATTENTIONS = ("side", "inplace")
SCORES = ("logits", "reweighted", "softmax")


def identity(key, shape, dtype=jnp.float32):
    """Initialiser: the identity matrix."""
    del key
    return jnp.eye(*shape, dtype=dtype)


class KeysValues(NamedTuple):
    """Keys and values [b m g d] that TargetNet's queries meet, and which keys exist ([b m], None: all)."""

    k: Array
    v: Array
    key_mask: Array | None = None


class SourceAttention(NamedTuple):
    """Q' and K' of Eq. 6's A' [b n g d], before any dropping; CAA scores the regions with them."""

    q: Array
    k: Array


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Settings of HPFA and CAA.

    regions: K, the number of region tokens that CAA reads. delta, sigma, reading, mask_axis: Eq. 6 (docs/paper.md A1,
    A23). init "identity": HPFA's square projections start as identities (those of Eq. 7 also where it is SourceNet's own
    attention), so that a network without pretrained weights begins by attending to like features instead of averaging the
    whole image. Self-attention that reads F' too (texture "concat") starts as ever: as an identity it would see itself.
    out_init "zeros": the network starts as if HPFA were not there.

    What the paper's ablations exchange (section 5.3; docs/paper.md 5):
    features: F' is what SourceNet's blocks see, or the whole image's CLIP patches through an MLP for each site.
    texture: F' reaches TargetNet through HPFA, or "concat": as further keys and values of its self-attention.
    alignment: attn2 reads the K chosen regions (CAA), or "global": the CLIP token of the whole image.

    What we decided by reading, for the sweeps of benchmarks/ablation.py:
    source_attention (A5): Eq. 7 is a branch beside SourceNet's self-attention, or "inplace": it is that self-attention.
    score (A17): what of the source attention is averaged per region: A', A' with Eq. 6's weights, or its softmax.
    """

    regions: int = 2
    features: str = "source_net"
    texture: str = "hpfa"
    alignment: str = "caa"
    source_attention: str = "side"
    score: str = "logits"
    delta: float = 0.6
    sigma: float = 0.3
    reading: str = "printed"
    mask_axis: str = "key"
    init: str = "random"
    out_init: str = "zeros"

    def __post_init__(self):
        choices = {
            "features": FEATURES,
            "texture": TEXTURES,
            "alignment": ALIGNMENTS,
            "source_attention": SOURCE_ATTENTIONS,
            "score": SCORES,
            "init": INITS,
            "out_init": OUT_INITS,
            "mask_axis": api.MASK_AXES,
            "reading": api.READINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {allowed}")
        if self.regions < 1:
            raise ValueError(f"regions (CAA's K) is {self.regions}; it must be at least 1")
        if self.source_attention == "inplace" and (self.features, self.texture) != ("source_net", "hpfa"):
            raise ValueError("source_attention 'inplace' needs features 'source_net' and texture 'hpfa'")
        if self.features == "clip" and self.texture != "hpfa":
            raise ValueError("features 'clip' needs texture 'hpfa': no self-attention of theirs could be joined")

    @property
    def is_paper(self) -> bool:
        """Whether these are the method's own modules, which have a form in PyTorch; an ablation or reading is not."""
        mine = (self.features, self.texture, self.alignment, self.source_attention, self.score)
        return mine == ("source_net", "hpfa", "caa", "side", "logits")

    @property
    def square_init(self) -> dict:
        """Initialiser of HPFA's square projections, as keyword of nn.Dense."""
        return {"kernel_init": identity} if self.init == "identity" else {}


def reweighted(config: FusionConfig, q: Array, k: Array, v: Array, mask: Bool[Array, "b n"]) -> Float[Array, "b n g d"]:
    """H' of Eq. 7 before the heads are joined, with the settings of Eq. 6."""
    return api.reweighted_attention(
        q, k, v, mask, delta=config.delta, sigma=config.sigma, reading=config.reading, mask_axis=config.mask_axis
    )


class HPFASource(nn.Module):
    """Eq. 6, 7 and the keys and values of Eq. 8, from SourceNet's features F' [b n c] and the mask M [b n].

    keep [b]: 0 drops a sample: its F' is taken as zero, so its keys and values are exactly zero (no bias before
    Eq. 8, docs/paper.md A15). inplace (A5): H' and A' of SourceNet's own attention, in place of F' and Eq. 7 here.
    """

    site: Site
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "b n c"],
        mask: Bool[Array, "b n"],
        keep: Float[Array, " b"] | None = None,
        inplace: SourceAttention | None = None,
    ) -> tuple[KeysValues, SourceAttention]:
        c = self.config

        def dense(name):
            return nn.Dense(features.shape[-1], use_bias=False, dtype=self.dtype, name=name, **c.square_init)

        if inplace is not None:
            undropped = inplace
            fused = features if keep is None else features * keep[:, None, None].astype(features.dtype)
        else:
            q, k, v = (split_heads(dense(f"source_to_{x}")(features), self.site.heads) for x in "qkv")
            undropped = SourceAttention(q, k)
            if keep is not None:
                q, k, v = (x * keep[:, None, None, None].astype(x.dtype) for x in (q, k, v))
            fused = merge_heads(reweighted(c, q, k, v, mask))
        return KeysValues(*(split_heads(dense(name)(fused), self.site.heads) for name in ("to_k", "to_v"))), undropped


class HPFA(nn.Module):
    """Eq. 8 in TargetNet: queries from the normed hidden state, keys and values from HPFASource.

    Returns the update to add to the hidden state. `source` None (dropped): exactly the output projection's bias,
    which is also what zero keys and values give.
    """

    site: Site
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], source: KeysValues | None) -> Float[Array, "b n c"]:
        width = x.shape[-1]
        out_init = {"kernel_init": nn.initializers.zeros} if self.config.out_init == "zeros" else {}
        out = nn.Dense(width, dtype=self.dtype, name="to_out_0", **out_init)
        if source is None:
            return out(jnp.zeros((x.shape[0], 1, width), x.dtype))
        normed = layer_norm(self.dtype, "norm")(x)
        q = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_q", **self.config.square_init)(normed)
        return out(merge_heads(api.attention(split_heads(q, self.site.heads), source.k, source.v)))
