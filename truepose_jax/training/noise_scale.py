"""The gradient noise scale: from which batch size on a larger batch hardly gives a better gradient.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", section 2.2 and appendix A.1. With the true gradient
G and the covariance Sigma of one example's gradient, B_simple = tr(Sigma) / |G|^2. The mean gradient of b examples has
E|g_b|^2 = |G|^2 + tr(Sigma) / b, so two batch sizes in one step give both numbers without bias: the small one is a
micro-batch of the accumulation, or a device's share of the batch; the big one is the whole batch. The quotient of two
noisy numbers is biased, so each is averaged over steps first and divided then.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SMALL_SQ, BIG_SQ, SMALL_BATCH = "noise_scale_small_sq", "noise_scale_big_sq", "noise_scale_small_batch"
"""Metrics of a step: squared gradient norms (before clipping) of the parts and of the whole, examples per part."""

WINDOW = 200
"""Steps that the running estimate averages over."""

_PARTS = "noise_scale_parts"


def squared_norm(tree: Any) -> Float[Array, ""]:
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))


def partial_norms(gradient: Any, share: Float[Array, ""]) -> dict[str, jax.Array]:
    """What a part adds; share: its valid examples over those of the whole batch. Parts without any do not count.

    Weighted by the shares, parts of uneven sizes have the mean E|g|^2 = |G|^2 + tr(Sigma) parts / batch.
    """
    return {SMALL_SQ: share * squared_norm(gradient), _PARTS: (share > 0).astype(jnp.float32)}


def of_whole(gradient: Any, metrics: Mapping[str, jax.Array], valid: Float[Array, ""]) -> dict[str, jax.Array]:
    """The metrics with the sums of `of_part` finished. valid: examples in the whole batch that count."""
    found = dict(metrics)
    found[SMALL_BATCH] = valid / jnp.maximum(found.pop(_PARTS), 1.0)
    return found | {BIG_SQ: squared_norm(gradient)}


def moments(small_sq: Any, big_sq: Any, small_batch: Any, big_batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """(estimates of |G|^2, of tr(Sigma)), elementwise; single ones may be negative. Equal batch sizes: NaN."""
    small_sq, big_sq, small, big = (np.asarray(x, np.float64) for x in (small_sq, big_sq, small_batch, big_batch))
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = (big * big_sq - small * small_sq) / (big - small)
        noise = (small_sq - big_sq) / (1 / small - 1 / big)
    usable = (big > small) & (small > 0)
    return np.where(usable, signal, np.nan), np.where(usable, noise, np.nan)


def quotient(signal: Any, noise: Any) -> float:
    """B_simple of moments over steps, in examples: the means, then their quotient. NaN where |G|^2 is not above 0."""
    kept = np.isfinite(signal) & np.isfinite(noise)
    if not np.any(kept):
        return math.nan
    top, bottom = float(np.mean(np.asarray(noise)[kept])), float(np.mean(np.asarray(signal)[kept]))
    return top / bottom if bottom > 0 else math.nan


class Running:
    """B_simple over the last WINDOW steps."""

    def __init__(self):
        self._moments: collections.deque[tuple[float, float]] = collections.deque(maxlen=WINDOW)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """A step's metrics; nothing where they hold no noise scale, or the step was not finite."""
        if SMALL_SQ not in metrics or int(metrics.get("skipped_now", 0)):
            return
        found = moments(metrics[SMALL_SQ], metrics[BIG_SQ], metrics[SMALL_BATCH], metrics["valid"])
        if all(np.isfinite(x) for x in found):
            self._moments.append((float(found[0]), float(found[1])))

    def estimate(self) -> float | None:
        """In examples; None where nothing was measured, or the gradient itself is lost in its noise."""
        if not self._moments:
            return None
        found = quotient(*np.array(self._moments).T)
        return found if math.isfinite(found) else None
