"""Fused attention for Hopper GPUs (Mosaic GPU). UNVERIFIED: run under JAX's GPU interpreter only, never on a GPU.

Only by name. One warpgroup takes 64 queries (or, for dk and dv, 64 keys) of one head and walks along the other side. Tiles come
by TMA into shared memory, products are wgmma of 16-bit tiles summed in float32, the weights go through shared memory as the
next product's left side. No copy overlaps with a product yet: correctness first, then a machine to time it on.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from truepose_jax.kernels.attention.key_params import (
    FLOOR,
    ROWS,
    TINY,
    compute_capability,
    logits,
    pad_keys,
    plain_rows,
    refused_arrays,
    slopes,
)

BLOCK = 64
"""Queries and keys of a tile, the rows of one wgmma."""
WIDTH_UNIT = 64
"""Heads are padded to this many columns: 128 bytes, one swizzle."""
MOST_HEAD_DIM = 192
"""Four tiles of 64 x 192 and one of 64 x 64 take 104 of the 227 KiB that a block may use on Hopper."""
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))

HOPPER = "9.0"
"""The one compute capability with wgmma: Blackwell (10.x, 12.x) has none."""
KEYS = 1
"""Axis of a tile of logits; in the kernel of dk and dv, where tiles are transposed, it is that of the queries."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one call, padded to whole tiles."""

    b: int
    n: int
    m: int
    g: int
    d: int
    dtype: jnp.dtype
    interpret: bool


def refuses(q: Array, k: Array, v: Array, *, has_rows: bool, platform: str) -> str | None:
    """What of a call the kernels cannot take; None where they can take all."""
    del has_rows
    if platform not in ("gpu", "cpu"):
        return f"a program for {platform}"
    if platform == "gpu" and (found := compute_capability()) not in (None, HOPPER):
        return f"GPUs of compute capability {found}; it takes {HOPPER} only"
    if reason := refused_arrays(q, k, v, DTYPES):
        return reason
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"heads of width {q.shape[-1]}; it takes at most {MOST_HEAD_DIM}"
    return None


def attend(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    rows: Float[Array, "b 3 m"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "b n g d"]:
    """softmax(logits) v with the logits of key_params.py (rows None: q k^T / sqrt d). No gradient reaches rows."""
    b, n, g, d = q.shape
    m = k.shape[1]
    s = Sizes(b, _up(n, BLOCK), _up(m, BLOCK), g, _up(d, WIDTH_UNIT), jnp.dtype(q.dtype), interpret)
    rows = plain_rows(jnp.ones((b, m), bool), d) if rows is None else lax.stop_gradient(rows)
    rows = pad_keys(rows, b, m, s.m, d)
    out = _attend(s, *(_pad(x, length, s.d) for x, length in ((q, s.n), (k, s.m), (v, s.m))), rows)
    return out[:, :n, :, :d]


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _pad(x: Float[Array, "b n g d"], length: int, width: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))


# --- pieces of kernels -----------------------------------------------------------------------------------------------


def _tile(width: int, dtype):
    return plgpu.SMEM((BLOCK, width), dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _line():
    return plgpu.SMEM((BLOCK,), jnp.float32)


def _fetch(pairs, barriers) -> None:
    """Copies every (source, destination) and waits for all."""
    plgpu.commit_smem()  # a barrier: every warp's products are done with what the copies overwrite
    for i, (source, to) in enumerate(pairs):
        plgpu.copy_gmem_to_smem(source, to, barriers.at[i])
    for i in range(len(pairs)):
        plgpu.barrier_wait(barriers.at[i])


def _product(left, right, width: int) -> Array:
    """left [64 x] right [x width] of shared memory -> float32 [64 width]."""

    def compute(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((BLOCK, width), jnp.float32))


def _product_turned(s: Sizes, left, right) -> Array:
    """left [64 d] right [64 d]^T -> float32 [64 64]."""
    if not s.interpret:
        return _product(left, right.transpose((1, 0)), BLOCK)

    def compute(copy):  # the interpreter's wgmma takes no transposed reference
        copy[...] = right[...].T
        return _product(left, copy, BLOCK)

    return pl.run_scoped(compute, plgpu.SMEM((s.d, BLOCK), s.dtype))


def _along(s: Sizes, ref, axis: int) -> Array:
    """A line of 64 numbers, spread over a tile so that it varies along `axis`."""
    # JAX 0.10 wants the index that 0.11 warns of.
    line = ref[...] if s.interpret else plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))
    return lax.broadcast_in_dim(line, (BLOCK, BLOCK), [axis])


def _full(s: Sizes, shape: tuple[int, ...], value: float) -> Array:
    filled = jnp.full(shape, value, jnp.float32)
    if s.interpret:
        return filled
    return plgpu.layout_cast(filled, plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1))


def _spread(column: Array, width: int) -> Array:
    return lax.broadcast_in_dim(column, (BLOCK, width), [0])


def _store(ref, x: Array) -> None:
    ref[...] = x
    plgpu.commit_smem()


def _out(pairs) -> None:
    for source, to in pairs:
        plgpu.copy_smem_to_gmem(source, to)
    plgpu.wait_smem_to_gmem(0)


def _at(block) -> tuple:
    """Where this program's head lies in [b length g d], for one block of the length."""
    return lax.axis_index("image"), pl.ds(block * BLOCK, BLOCK), lax.axis_index("head")


def _statistics_at(block) -> tuple:
    return lax.axis_index("image"), lax.axis_index("head"), pl.ds(block * BLOCK, BLOCK)


def _rows_at(rows_ref, block) -> list:
    return [rows_ref.at[lax.axis_index("image"), i, pl.ds(block * BLOCK, BLOCK)] for i in range(ROWS)]


# --- the kernels -----------------------------------------------------------------------------------------------------


def _forward_kernel(q_ref, k_ref, v_ref, rows_ref, out_ref, lse_ref, tiles, lines, barriers, *, s: Sizes):
    q_tile, k_tile, v_tile, weights_tile = tiles
    block = lax.axis_index("block")
    _fetch([(q_ref.at[_at(block)], q_tile)], barriers)

    def step(j, carry):
        top, total, acc = carry
        pairs = [(k_ref.at[_at(j)], k_tile), (v_ref.at[_at(j)], v_tile)]
        _fetch([*pairs, *zip(_rows_at(rows_ref, j), lines[:ROWS], strict=True)], barriers)
        rows = tuple(_along(s, line, KEYS) for line in lines[:ROWS])
        x = logits(_product_turned(s, q_tile, k_tile), rows, 1.0)
        new_top = jnp.maximum(top, jnp.max(x, axis=1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(x - _spread(new_top, BLOCK))
        _store(weights_tile, weights.astype(s.dtype))
        acc = acc * _spread(shrink, s.d) + _product(weights_tile, v_tile, s.d)
        return new_top, total * shrink + jnp.sum(weights, axis=1), acc

    start = (_full(s, (BLOCK,), FLOOR), _full(s, (BLOCK,), 0.0), _full(s, (BLOCK, s.d), 0.0))
    top, total, acc = lax.fori_loop(0, s.m // BLOCK, step, start)
    total = jnp.maximum(total, TINY)
    lines[0][...] = top + jnp.log(total)
    _store(q_tile, (acc / _spread(total, s.d)).astype(s.dtype))
    _out([(q_tile, out_ref.at[_at(block)]), (lines[0], lse_ref.at[_statistics_at(block)])])


def _weights_and_gradient(s: Sizes, a: Array, d_weights: Array, lines, *, query_axis: int) -> tuple[Array, Array]:
    """The softmax's weights and the gradient by the unscaled products; lines: up, down, bias, logsumexp, mean."""
    rows = tuple(_along(s, line, 1 - query_axis) for line in lines[:ROWS])
    lse, mean = (_along(s, line, query_axis) for line in lines[ROWS:])
    weights = jnp.exp(logits(a, rows, 1.0) - lse)
    return weights, weights * (d_weights - mean) * slopes(a, rows, 1.0)


def _dq_kernel(
    q_ref, k_ref, v_ref, rows_ref, d_out_ref, lse_ref, mean_ref, dq_ref, tiles, lines, barriers, *, s: Sizes
):
    q_tile, k_tile, v_tile, d_out_tile, square = tiles
    block = lax.axis_index("block")
    own = [(q_ref.at[_at(block)], q_tile), (d_out_ref.at[_at(block)], d_out_tile)]
    statistics = [
        (lse_ref.at[_statistics_at(block)], lines[ROWS]),
        (mean_ref.at[_statistics_at(block)], lines[ROWS + 1]),
    ]
    _fetch([*own, *statistics], barriers)

    def step(j, d_q):
        pairs = [(k_ref.at[_at(j)], k_tile), (v_ref.at[_at(j)], v_tile)]
        _fetch([*pairs, *zip(_rows_at(rows_ref, j), lines[:ROWS], strict=True)], barriers)
        a = _product_turned(s, q_tile, k_tile)
        d_weights = _product_turned(s, d_out_tile, v_tile)
        _, d_a = _weights_and_gradient(s, a, d_weights, lines, query_axis=0)
        _store(square, d_a.astype(s.dtype))
        return d_q + _product(square, k_tile, s.d)

    d_q = lax.fori_loop(0, s.m // BLOCK, step, _full(s, (BLOCK, s.d), 0.0))
    _store(q_tile, d_q.astype(s.dtype))
    _out([(q_tile, dq_ref.at[_at(block)])])


def _dkv_kernel(
    q_ref, k_ref, v_ref, rows_ref, d_out_ref, lse_ref, mean_ref, dk_ref, dv_ref, tiles, lines, barriers, *, s: Sizes
):
    """Tiles of logits are transposed here, [keys queries], so that the products need no transposed left side."""
    q_tile, k_tile, v_tile, d_out_tile, square = tiles
    block = lax.axis_index("block")
    own = [(k_ref.at[_at(block)], k_tile), (v_ref.at[_at(block)], v_tile)]
    _fetch([*own, *zip(_rows_at(rows_ref, block), lines[:ROWS], strict=True)], barriers)

    def step(i, carry):
        d_k, d_v = carry
        pairs = [(q_ref.at[_at(i)], q_tile), (d_out_ref.at[_at(i)], d_out_tile)]
        statistics = [(lse_ref.at[_statistics_at(i)], lines[ROWS]), (mean_ref.at[_statistics_at(i)], lines[ROWS + 1])]
        _fetch([*pairs, *statistics], barriers)
        a = _product_turned(s, k_tile, q_tile)
        d_weights = _product_turned(s, v_tile, d_out_tile)
        weights, d_a = _weights_and_gradient(s, a, d_weights, lines, query_axis=1)
        _store(square, weights.astype(s.dtype))
        d_v = d_v + _product(square, d_out_tile, s.d)
        _store(square, d_a.astype(s.dtype))
        return d_k + _product(square, q_tile, s.d), d_v

    zeros = _full(s, (BLOCK, s.d), 0.0)
    d_k, d_v = lax.fori_loop(0, s.n // BLOCK, step, (zeros, zeros))
    _store(k_tile, d_k.astype(s.dtype))
    _store(v_tile, d_v.astype(s.dtype))
    _out([(k_tile, dk_ref.at[_at(block)]), (v_tile, dv_ref.at[_at(block)])])


# --- launches and gradients ------------------------------------------------------------------------------------------


def _run(s: Sizes, kernel, blocks: int, outputs: list, arrays: list[Array], wide_tiles: int) -> list[Array]:
    """kernel over (image, head, block) with that many tiles [64 d], one [64 64], and five lines of shared memory."""
    interpret = None
    if s.interpret:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not public in JAX 0.10

        interpret = InterpretGPUParams()
    return plgpu.kernel(
        functools.partial(kernel, s=s),
        out_type=outputs,
        grid=(s.b, s.g, blocks),
        grid_names=("image", "head", "block"),
        scratch_types=[
            [_tile(s.d, s.dtype) for _ in range(wide_tiles)] + [_tile(BLOCK, s.dtype)],
            [_line() for _ in range(ROWS + 2)],
            plgpu.Barrier(num_barriers=ROWS + 2),
        ],
        interpret=interpret,
    )(*arrays)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(s: Sizes, q, k, v, rows):
    return _forward(s, q, k, v, rows)[0]


def _forward(s: Sizes, q, k, v, rows) -> list[Array]:
    statistics = jax.ShapeDtypeStruct((s.b, s.g, s.n), jnp.float32)
    return _run(s, _forward_kernel, s.n // BLOCK, [_like(q), statistics], [q, k, v, rows], 3)


def _forward_saving(s: Sizes, q, k, v, rows):
    out, lse = _forward(s, q, k, v, rows)
    return out, (q, k, v, rows, out, lse)


def _backward(s: Sizes, saved, d_out):
    q, k, v, rows, out, lse = saved
    # sum_j weight_j * d weight_j of every query
    mean = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1).swapaxes(1, 2)
    arrays = [q, k, v, rows, d_out, lse, mean]
    (d_q,) = _run(s, _dq_kernel, s.n // BLOCK, [_like(q)], arrays, 4)
    d_k, d_v = _run(s, _dkv_kernel, s.m // BLOCK, [_like(k), _like(v)], arrays, 4)
    return d_q, d_k, d_v, jnp.zeros_like(rows)


_attend.defvjp(_forward_saving, _backward)
