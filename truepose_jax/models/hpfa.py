"""HPFA, human-parsing-guided fusion attention: TruePose Eq. 6 to 8. The source side runs once per image (no t)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
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
    """Keys and values [b m g d] that TargetNet's queries meet, and which keys exist ([b m], None: all).

    Of HPFA also: latents [b m e], the source's own, which its softmax carries beside the values; limbs [b n l], what is
    joined to the queries; inside [b m], the mask M, for what is logged."""

    k: Array
    v: Array
    key_mask: Array | None = None
    latents: Array | None = None
    limbs: Array | None = None
    inside: Array | None = None


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

    What we decided by reading, for the sweeps of experiments/ablation.py:
    source_attention (A5): Eq. 7 is a branch beside SourceNet's self-attention, or "inplace": it is that self-attention.
    score (A17): what of the source attention is averaged per region: A', A' with Eq. 6's weights, or its softmax.

    What is ours and not the paper's, off there:
    carry_latents: Eq. 8's softmax also carries the source's latents, each head's joined to its features before to_out_0.
    cosine: Eq. 8's queries and keys are normalised, and their cosine is scaled by a learned number per head.
    residual: H = F' + H' makes Eq. 8's keys and values, not H' alone.
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
    carry_latents: bool = False
    cosine: bool = False
    residual: bool = False

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
        if (self.carry_latents or self.cosine or self.residual) and self.texture != "hpfa":
            raise ValueError("carry_latents, cosine and residual are settings of HPFA; texture 'concat' has none")
        if self.residual and self.source_attention == "inplace":
            raise ValueError("residual adds F' to H'; source_attention 'inplace' keeps H' alone")

    @property
    def is_paper(self) -> bool:
        """Whether these are the method's own modules and equations; an ablation or reading is not, nor what is ours."""
        return self.is_whole and not (self.carry_latents or self.cosine or self.residual)

    @property
    def is_whole(self) -> bool:
        """Whether no module is exchanged for another, as the ablations and readings do."""
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
    Eq. 8, docs/paper.md A15). inplace (A5): H' and A' of SourceNet's own attention, in place of F' and Eq. 7 here. latents
    [b n e]: the source's, to be carried. limbs: coordinates of the source's and of the target's cells (models/limbs.py).
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
        latents: Float[Array, "b n e"] | None = None,
        limbs: tuple[Float[Array, "b n l"], Float[Array, "b n l"]] | None = None,
    ) -> tuple[KeysValues, SourceAttention]:
        c = self.config

        def dense(name):
            return nn.Dense(features.shape[-1], use_bias=False, dtype=self.dtype, name=name, **c.square_init)

        def kept(x):
            return x if keep is None else x * keep.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)

        if inplace is not None:
            undropped = inplace
            fused = kept(features)
        else:
            q, k, v = (split_heads(dense(f"source_to_{x}")(features), self.site.heads) for x in "qkv")
            undropped = SourceAttention(q, k)
            fused = merge_heads(reweighted(c, *map(kept, (q, k, v)), mask))
            if c.residual:
                fused = fused + kept(features)
        k, v = (split_heads(dense(name)(fused), self.site.heads) for name in ("to_k", "to_v"))
        if c.cosine:
            k = unit(k)
        queries = None
        if limbs is not None:
            project = nn.Dense(LIMB_WIDTH, use_bias=False, dtype=self.dtype, name="limbs")
            keys, queries = (unit(project(x)) for x in limbs)
            k = jnp.concatenate([k, _every_head(keys, self.site.heads)], axis=-1)
        latents = None if latents is None else kept(latents).astype(v.dtype)
        return KeysValues(k, v, latents=latents, limbs=queries, inside=mask), undropped


class HPFA(nn.Module):
    """Eq. 8 in TargetNet: queries from the normed hidden state, keys and values from HPFASource.

    Returns the update to add to the hidden state, and what the attention did (`attention_account`; with latents "carried"
    [b n e] too, theirs by the mean of all heads). `source` None (dropped): exactly the output projection's bias, which is
    also what zero keys and values give.
    """

    site: Site
    config: FusionConfig
    latent_channels: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], source: KeysValues | None
    ) -> tuple[Float[Array, "b n c"], dict[str, Array]]:
        width, heads, c = x.shape[-1], self.site.heads, self.config
        out_init = {"kernel_init": nn.initializers.zeros} if c.out_init == "zeros" else {}
        out = nn.Dense(width, dtype=self.dtype, name="to_out_0", **out_init)
        if source is None:
            joined = width + c.carry_latents * heads * self.latent_channels
            return out(jnp.zeros((x.shape[0], 1, joined), x.dtype)), {}
        q = self.queries(x, source.limbs)
        scale = 1.0 if c.cosine else self.site.head_dim**-0.5
        account = attention_account(q * scale, source.k, source.inside)
        values = source.v
        if source.latents is not None:
            values = jnp.concatenate([values, _every_head(source.latents, heads)], axis=-1)
        found = attention_of_widths(q, source.k, values, scaled=c.cosine)
        features, carried = jnp.split(found, [source.v.shape[-1]], axis=-1)
        if source.latents is not None:
            account["carried"] = jnp.mean(carried, axis=2)
        joined = [merge_heads(features)] + ([merge_heads(carried)] if c.carry_latents else [])
        return out(jnp.concatenate(joined, axis=-1)), account

    def queries(self, x: Float[Array, "b n c"], limbs: Float[Array, "b n l"] | None) -> Float[Array, "b n g d"]:
        """Q of Eq. 8, as it meets the keys; with config.cosine scaled already."""
        c, heads = self.config, self.site.heads
        normed = layer_norm(self.dtype, "norm")(x)
        q = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="to_q", **c.square_init)(normed)
        q = split_heads(q, heads)
        if not c.cosine:
            return q
        q = unit(q) * self._scale("cosine_scale", CONTENT_LOGIT if limbs is None else CONTENT_LOGIT / 2)
        if limbs is None:
            return q
        return jnp.concatenate([q, _every_head(limbs, heads) * self._scale("limb_scale", CONTENT_LOGIT)], axis=-1)

    def _scale(self, name: str, at_birth: float) -> Array:
        made = self.param(name, lambda _: jnp.full((self.site.heads, 1), jnp.log(at_birth), jnp.float32))
        return jnp.exp(made).astype(self.dtype)


LIMB_WIDTH = 48
"""Of the projected limb coordinates that are joined to queries and keys."""

CONTENT_LOGIT = 10.0
"""Logit of cosine 1 at birth."""

SAMPLED_QUERIES = 64
"""Queries per image that the account of an attention is made of."""


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Each vector at length 1; zero stays zero."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _every_head(x: Float[Array, "b n d"], heads: int) -> Float[Array, "b n g d"]:
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], heads, x.shape[-1]))


def attention_of_widths(
    q: Float[Array, "b n g d"], k: Float[Array, "b m g d"], v: Float[Array, "b m g e"], *, scaled: bool = True
) -> Float[Array, "b n g e"]:
    """softmax(q k^T) v with values of any width; not scaled: q is still to be divided by sqrt d."""
    # api.attention divides by the square root of the width.
    return api.attention(q * q.shape[-1] ** 0.5 if scaled else q, k, v)


def attention_account(
    q: Float[Array, "b n g d"], k: Float[Array, "b m g d"], inside: Bool[Array, "b m"]
) -> dict[str, Float[Array, " b"]]:
    """What a softmax(q k^T) looks at, from SAMPLED_QUERIES queries at even distances, the mean of all heads.

    "tokens": effective number of tokens, exp of the entropy, from 1 to m. "inside": share that falls inside the mask."""
    n = q.shape[1]
    chosen = jnp.arange(min(n, SAMPLED_QUERIES)) * n // min(n, SAMPLED_QUERIES)
    q, k = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (q[:, chosen], k))
    p = jax.nn.softmax(jnp.einsum("bngd,bmgd->bgnm", q, k), axis=-1)
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)
    share = jnp.einsum("bgnm,bm->bgn", p, inside.astype(jnp.float32))
    return {"tokens": jnp.mean(jnp.exp(entropy), axis=(1, 2)), "inside": jnp.mean(share, axis=(1, 2))}
