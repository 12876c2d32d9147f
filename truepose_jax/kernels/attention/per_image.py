"""Attention one image and head after the other in plain JAX, for CPUs: one image's logits stay in the cache, where those of a
whole batch do not. Gradients recompute them, so that memory never holds more than one image's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from truepose_jax.kernels.attention.key_params import FLOOR, logits, slopes
from truepose_jax.kernels.attention.xla import refuses

__all__ = ["attend", "refuses"]


def attend(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    rows: Float[Array, "b 3 m"] | None,
) -> Float[Array, "b n g d"]:
    """softmax(logits) v with the logits of key_params.py (rows None: q k^T / sqrt d). No gradient reaches rows."""
    b, n, g, d = q.shape
    heads_first = [x.transpose(0, 2, 1, 3).reshape(b * g, -1, d) for x in (q, k, v)]
    rows = None if rows is None else jnp.repeat(lax.stop_gradient(rows), g, axis=0)

    @jax.checkpoint
    def one(q, k, v, rows):
        a = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        each = None if rows is None else tuple(row[None] for row in rows)
        # The slope apart, so that its gradient at the kink is that of the other implementations.
        s = logits(a, each, d**-0.5) if each is None else a * slopes(a, each, d**-0.5) + each[2]
        weights = jnp.exp(s - jnp.maximum(jnp.max(s, axis=-1, keepdims=True), FLOOR))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)  # a query without keys gives 0, and a gradient of 0
        return (jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total).astype(v.dtype)

    _, out = lax.scan(lambda _, each: (None, one(*each)), None, (*heads_first, rows))
    return out.reshape(b, g, n, d).transpose(0, 2, 1, 3)
