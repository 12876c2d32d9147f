"""CAA, CLIP-guided attention alignment: TruePose Eq. 9, and the choice of the regions that SourceNet attends least."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from truepose_jax.kernels.attention import reference
from truepose_jax.models.attention import Site
from truepose_jax.models.context import ContextAttention, context_projections
from truepose_jax.models.hpfa import FusionConfig, KeysValues, SourceAttention


def region_scores(source: SourceAttention, coverage: Float[Array, "b n p"]) -> Float[Array, "b p"]:
    """Average attention score of each region (A17): A' = Q'K'^T / sqrt d, mean over heads, queries, and the region's
    keys weighted by coverage. The mean is linear in q and in k, so it costs O(n) and is exact. A region without any
    coverage gets 0. Regions that lie in one cell get one score to the bit, whatever their places in memory: cells are scored
    first, and to one of them nothing but zeros is added."""
    q, k = source.q.astype(jnp.float32), source.k.astype(jnp.float32)
    cells = jnp.einsum("bgd,bngd->bn", jnp.mean(q, axis=1), k)
    scores = jnp.einsum("bnp,bn->bp", _shares(coverage), cells)
    return scores / (q.shape[2] * jnp.sqrt(jnp.float32(q.shape[-1])))


def reweighted_scores(
    source: SourceAttention, coverage: Float[Array, "b n p"], mask: Bool[Array, "b n"], config: FusionConfig
) -> Float[Array, "b p"]:
    """The other readings of A17: the same mean of A' with Eq. 6's weights ("reweighted"), or of Eq. 7's softmax. They
    need the whole n x n map, so they are for sweeps at small sizes. M by its keys, whatever config.mask_axis says."""
    a = reference.sloped_logits(*source, mask, *reference.eq6_slopes(config.delta, config.sigma, config.reading))
    if config.score == "softmax":
        a = jax.nn.softmax(a, axis=-1)
    return jnp.einsum("bnp,bn->bp", _shares(coverage), jnp.mean(a, axis=(1, 2)))


def _shares(coverage: Float[Array, "b n p"]) -> Float[Array, "b n p"]:
    return coverage / jnp.maximum(jnp.sum(coverage, axis=1, keepdims=True), 1e-12)


def lowest_regions(
    scores: Float[Array, "b p"], present: Bool[Array, "b p"], count: int
) -> tuple[Int[Array, "b K"], Bool[Array, "b K"]]:
    """The `count` present regions of lowest score, the first of equals, and which of the slots hold one (A18, A19). No
    gradient."""
    ranked, index = jax.lax.top_k(jnp.where(present, -jax.lax.stop_gradient(scores), -jnp.inf), count)
    return index, jnp.isfinite(ranked)


class CAASource(nn.Module):
    """Keys and values of Eq. 9: the chosen region tokens [b K e] through TargetNet's attn2 projections.

    Tokens of dropped samples are zero, so their keys and values are exactly zero.
    """

    site: Site
    regions: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b p e"],
        present: Bool[Array, "b p"],
        scores: Float[Array, "b p"],
        keep: Float[Array, " b"] | None = None,
    ) -> KeysValues:
        index, valid = lowest_regions(scores, present, self.regions)
        chosen = jnp.take_along_axis(tokens, index[..., None], axis=1)
        if keep is not None:
            chosen = chosen * keep[:, None, None].astype(chosen.dtype)
        return KeysValues(*context_projections(chosen, self.site, self.dtype), valid)


class CAA(ContextAttention):
    """Eq. 9 in TargetNet, in the place (and under the name) of SD1.5's attn2. No region present: as dropped."""
