"""Attention block by block in plain JAX: any backend, any size, memory O(n * block), exact gradients by recomputation.

The online softmax of flash attention as two nested scans, over blocks of queries and of keys. Of the forward pass only q, k,
v, the output and one logsumexp per query are kept. What the keys' masks and slopes are is told by key_params.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from truepose_jax.kernels.attention.key_params import FLOOR, TINY, logits, pad_keys, refused_arrays, slopes

BLOCK_QUERIES = 128
BLOCK_KEYS = 2048
"""Measured on a CPU core at 2816 tokens and 8 heads of 40: keys in blocks of 1408 or whole take half the forward time of 512 or
128; 32 to 256 queries make no difference."""


DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def refuses(q: Array, k: Array, v: Array, *, has_rows: bool, platform: str) -> str | None:
    """What of a call it cannot take; None where it can take all."""
    del has_rows, platform
    return refused_arrays(q, k, v, DTYPES)


def attend(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    rows: Float[Array, "b 3 m"] | None,
) -> Float[Array, "b n g d"]:
    """softmax(logits) v with the logits of key_params.py (rows None: q k^T / sqrt d). No gradient reaches rows."""
    b, n, _, d = q.shape
    m = k.shape[1]
    n_blocks, block_n = _blocks(n, BLOCK_QUERIES)
    m_blocks, block_m = _blocks(m, BLOCK_KEYS)
    rows = pad_keys(rows, b, m, m_blocks * block_m, d)
    cut = [
        _cut(_pad(x, blocks * block), blocks)
        for x, blocks, block in ((q, n_blocks, block_n), (k, m_blocks, block_m), (v, m_blocks, block_m))
    ]
    if rows is not None:
        rows = lax.stop_gradient(rows).reshape(b, 3, m_blocks, block_m).transpose(2, 1, 0, 3)
    out = _attend(d**-0.5, *cut, rows)
    return _join(out)[:, :n].astype(q.dtype)


def _blocks(length: int, block: int) -> tuple[int, int]:
    """(count, size) of the blocks; nearly equal ones, so that little is padded."""
    count = -(-length // block)
    return count, -(-length // count)


def _pad(x: Float[Array, "b n g d"], length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _cut(x: Float[Array, "b n g d"], blocks: int) -> Float[Array, "blocks b g size d"]:
    b, _, g, d = x.shape
    return x.reshape(b, blocks, -1, g, d).transpose(1, 0, 3, 2, 4)


def _join(x: Float[Array, "blocks b g size d"]) -> Float[Array, "b n g d"]:
    blocks, b, g, size, d = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, blocks * size, g, d)


def _dot(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _each(rows: Float[Array, "3 b size"] | None) -> tuple[Array, Array, Array] | None:
    """up, down, bias of a block, to be broadcast over heads and queries."""
    return None if rows is None else tuple(row[:, None, None, :] for row in rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, rows):
    return _forward(scale, q, k, v, rows)[0]


def _forward(scale, q, k, v, rows):
    """Blocks of the output and the logsumexp of every query [blocks b g size 1]."""

    def one_query_block(_, q_i):
        def add_key_block(carry, block):
            top, total, acc = carry
            k_j, v_j, rows_j = block
            s = logits(_dot(q_i, _t(k_j)), _each(rows_j), scale)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
            weights = jnp.exp(s - new_top)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            return (new_top, total, acc * shrink + _dot(weights.astype(v_j.dtype), v_j)), None

        column = (*q_i.shape[:-1], 1)
        start = (jnp.full(column, FLOOR), jnp.zeros(column), jnp.zeros(q_i.shape))
        start = tuple(x.astype(jnp.float32) for x in start)
        (top, total, acc), _ = lax.scan(add_key_block, start, (k, v, rows))
        total = jnp.maximum(total, TINY)
        return None, ((acc / total).astype(v.dtype), top + jnp.log(total))

    return lax.scan(one_query_block, None, q)[1]


def _forward_saving(scale, q, k, v, rows):
    out, lse = _forward(scale, q, k, v, rows)
    return out, (q, k, v, rows, out, lse)


def _backward(scale, saved, d_out):
    q, k, v, rows, out, lse = saved
    f32 = jnp.float32
    # sum_j weight_j * d weight_j of every query, which is also this
    mean = jnp.sum(d_out.astype(f32) * out.astype(f32), axis=-1, keepdims=True)

    def one_query_block(carry, block):
        q_i, d_out_i, lse_i, mean_i = block

        def against_key_block(d_q, block):
            k_j, v_j, rows_j = block
            each = _each(rows_j)
            a = _dot(q_i, _t(k_j))
            weights = jnp.exp(logits(a, each, scale) - lse_i)
            d_v = _dot(_t(weights.astype(d_out_i.dtype)), d_out_i)
            d_a = weights * (_dot(d_out_i, _t(v_j)) - mean_i) * slopes(a, each, scale)
            d_a = d_a.astype(k_j.dtype)
            return d_q + _dot(d_a, k_j), (_dot(_t(d_a), q_i), d_v)

        d_q, of_keys = lax.scan(against_key_block, jnp.zeros(q_i.shape, f32), (k, v, rows))
        return jax.tree.map(jnp.add, carry, of_keys), d_q

    start = (jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32))
    (d_k, d_v), d_q = lax.scan(one_query_block, start, (q, d_out, lse, mean))
    d_rows = None if rows is None else jnp.zeros_like(rows)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_rows


_attend.defvjp(_forward_saving, _backward)
