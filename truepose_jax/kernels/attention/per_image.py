"""Attention one image and head after the other in plain JAX, for CPUs: one image's logits stay in the cache, where those of a
whole batch do not. Gradients recompute them, so that memory never holds more than one image's.

The backward pass holds keys by queries, not queries by keys: of its five products then one, and not two, has its first factor
transposed, which on CPU costs a pass or a slower kernel. With the logsumexp kept it needs no maxima and sums either. Gradients
of 12 images of 768 tokens (width 92, values 48) on one core: 107 ms where the derivative of the forward pass took 164.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from truepose_jax.kernels.attention.key_params import FLOOR, TINY, logits, slopes
from truepose_jax.kernels.attention.xla import refuses

__all__ = ["attend", "refuses"]


def attend(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g e"],
    rows: Float[Array, "b 3 m"] | None,
) -> Float[Array, "b n g e"]:
    """softmax(logits) v with the logits of key_params.py (rows None: q k^T / sqrt d). No gradient reaches rows."""
    b, n, g, d = q.shape
    heads_first = [x.transpose(0, 2, 1, 3).reshape(b * g, x.shape[1], -1) for x in (q, k, v)]
    rows = None if rows is None else jnp.repeat(lax.stop_gradient(rows), g, axis=0)
    return _attend(d**-0.5, *heads_first, rows).reshape(b, g, n, -1).transpose(0, 2, 1, 3)


def _dot(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, rows):
    return _forward(scale, q, k, v, rows)[0]


def _forward(scale, q, k, v, rows):
    """The output and the logsumexp of every query."""

    def one(each):
        q, k, v, rows = each
        s = logits(_dot(q, k.T), None if rows is None else tuple(row[None] for row in rows), scale)
        top = jnp.maximum(jnp.max(s, axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(s - top)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), TINY)  # a query without keys gives 0
        return (_dot(weights.astype(v.dtype), v) / total).astype(v.dtype), (top + jnp.log(total))[:, 0]

    return lax.map(one, (q, k, v, rows))


def _forward_saving(scale, q, k, v, rows):
    out, lse = _forward(scale, q, k, v, rows)
    return out, (q, k, v, rows, out, lse)


def _backward(scale, saved, d_out):
    q, k, v, rows, out, lse = saved
    # sum_j weight_j * d weight_j of every query, which is also this
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def one(each):
        q, k, v, rows, lse, mean, d_out = each
        columns = None if rows is None else tuple(row[:, None] for row in rows)
        a = _dot(k, q.T)
        weights = jnp.exp(logits(a, columns, scale) - lse)
        d_v = _dot(weights.astype(d_out.dtype), d_out)
        d_a = (weights * (_dot(v, d_out.T) - mean) * slopes(a, columns, scale)).astype(k.dtype)
        return _dot(d_a.T, k).astype(q.dtype), _dot(d_a, q).astype(k.dtype), d_v.astype(v.dtype)

    d_q, d_k, d_v = lax.map(one, (q, k, v, rows, lse, mean, d_out))
    return d_q, d_k, d_v, None if rows is None else jnp.zeros_like(rows)


_attend.defvjp(_forward_saving, _backward)
