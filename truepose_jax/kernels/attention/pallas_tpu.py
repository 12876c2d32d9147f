"""Fused attention for TPUs (Mosaic): one forward kernel and two backward kernels (dq; dk and dv).

The logits live in VMEM only; what Eq. 6 makes of them and its slope are `logits` and `slopes` of key_params.py. Arrays keep the
layout [b n g*d] that a projection leaves them in: a block holds the lanes of several heads and the kernel takes one head after
the other, so that no transpose surrounds the kernel and a width of 40 costs 1.2x its bytes in HBM instead of 3.2x ([b g n 40] is
tiled to 128 lanes). Products take the inputs' dtype and are summed in float32.

Compiled for v5e, v5p and v6e (benchmarks/tpu_aot.py) and run in interpret mode; never yet run or timed on a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from truepose_jax.kernels.attention.key_params import FLOOR, ROWS, TINY, logits, pad_keys, refused_arrays, slopes

LANES = 128
SUBLANES = 16
"""Rows of one bfloat16 tile, and a multiple of float32's eight."""
MOST_QUERIES = 256
MOST_KEYS = 512
"""Longest blocks. 512 x 704 needs 17 of the 16 MiB that a v5e or v5p kernel may use (dk and dv, heads of 160), and 512 x 512
compiles three times as long (16 s against 4 s for heads of 80). Keys of four bytes: half of them."""
MOST_VMEM = 16 * 2**20
"""What a kernel may use of a v5e's or v5p's VMEM."""
MOST_LANES = 1024
MOST_HEAD_DIM = 256
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))

OVER_LANES = (((1,), (1,)), ((), ()))
OVER_ROWS = (((0,), (0,)), ((), ()))
INSIDE = (((1,), (0,)), ((), ()))


class Operand(NamedTuple):
    """An array that a kernel reads or writes block by block."""

    array: jax.ShapeDtypeStruct
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """Grid and blocks of one kernel. benchmarks/tpu_aot.py counts the bytes it moves from here."""

    grid: tuple[int, int, int, int]
    operands: dict[str, Operand]
    outputs: dict[str, Operand]
    scratch: list[tuple[int, int, int]]
    """Shapes of float32 arrays that stay in VMEM."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one call, lengths already padded to whole blocks. group: heads in one block."""

    b: int
    n: int
    m: int
    g: int
    d: int
    block_n: int
    block_m: int
    group: int
    dtype: jnp.dtype
    has_rows: bool
    interpret: bool

    @property
    def groups(self) -> int:
        return self.g // self.group


def refuses(q: Array, k: Array, v: Array, *, has_rows: bool, platform: str) -> str | None:
    """What of a call the kernels cannot take; None where they can take all."""
    del platform
    if reason := refused_arrays(q, k, v, DTYPES):
        return reason
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"heads of width {q.shape[-1]}; it takes at most {MOST_HEAD_DIM}"
    if (lanes := group_of(*q.shape[2:]) * q.shape[-1]) > MOST_LANES:
        return f"{q.shape[2]} heads of width {q.shape[-1]}, in blocks of {lanes} lanes; it takes at most {MOST_LANES}"
    b, n, g, d = q.shape
    if (needed := vmem_bytes(sizes(b, n, k.shape[1], g, d, q.dtype, has_rows=has_rows))) > MOST_VMEM:
        return f"{g} heads of width {d}, which need {needed / 2**20:.1f} MiB of VMEM; it takes {MOST_VMEM / 2**20:.0f}"
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
    s = sizes(b, n, m, g, d, q.dtype, has_rows=rows is not None, interpret=interpret)
    rows = pad_keys(rows, b, m, s.m, d)
    if rows is not None:
        # every block of keys a plane of its own, so that its width need not be whole tiles of lanes: 704 = 2 x 352
        rows = lax.stop_gradient(rows).reshape(b, ROWS, s.m // s.block_m, s.block_m).swapaxes(1, 2)
    flat = (_pad(x.reshape(*x.shape[:2], g * d), to) for x, to in ((q, s.n), (k, s.m), (v, s.m)))
    return _attend(s, *flat, rows)[:, :n].reshape(b, n, g, d)


def sizes(b: int, n: int, m: int, g: int, d: int, dtype, *, has_rows: bool, interpret: bool = False) -> Sizes:
    """How a call of these sizes is cut; the keys into shorter blocks where the kernels would not fit into VMEM."""
    dtype, group = jnp.dtype(dtype), group_of(g, d)
    padded_n, block_n = _blocks(n, MOST_QUERIES)
    most = MOST_KEYS * 2 // dtype.itemsize
    while True:
        padded_m, block_m = _blocks(m, most)
        rows = has_rows or padded_m != m
        s = Sizes(b, padded_n, padded_m, g, d, block_n, block_m, group, dtype, rows, interpret)
        if most <= LANES or vmem_bytes(s) <= MOST_VMEM:
            return s
        most //= 2


def group_of(g: int, d: int) -> int:
    """Fewest heads whose lanes are whole tiles; all heads where none are (a block may always span the array)."""
    return next((group for group in range(1, g) if g % group == 0 and group * d % LANES == 0), g)


def _blocks(length: int, most: int) -> tuple[int, int]:
    """(padded length, block): the whole length, or its largest divisor in whole tiles, or padding where that is small."""
    if length <= most:
        return length, length
    fits = [block for block in range(SUBLANES, most + 1, SUBLANES) if length % block == 0]
    if fits and fits[-1] >= most // 4:
        return length, fits[-1]
    return -(-length // (most // 2)) * (most // 2), most // 2


def _pad(x: Float[Array, "b n c"], length: int) -> Array:
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))


# --- what moves when -------------------------------------------------------------------------------------------------


def forward_plan(s: Sizes) -> Plan:
    """Grid (image, head group, query block, key block), keys innermost."""
    q, k, v, rows, out, lse = _operands(s, query=2, key=3)
    grid = (s.b, s.groups, s.n // s.block_n, s.m // s.block_m)
    column = (s.group, s.block_n, 1)
    scratch = [column, column, (s.group, s.block_n, s.d)]
    return Plan(grid, {"q": q, "k": k, "v": v} | rows, {"out": out, "lse": lse}, scratch)


def dq_plan(s: Sizes) -> Plan:
    q, k, v, rows, out, lse = _operands(s, query=2, key=3)
    read = {"q": q, "k": k, "v": v} | rows | {"out": out, "d_out": out, "lse": lse}
    grid = (s.b, s.groups, s.n // s.block_n, s.m // s.block_m)
    return Plan(grid, read, {"d_q": q, "mean": lse}, [(s.group, s.block_n, s.d)])


def dkv_plan(s: Sizes) -> Plan:
    """Queries innermost."""
    q, k, v, rows, out, lse = _operands(s, query=3, key=2)
    read = {"q": q, "k": k, "v": v} | rows | {"d_out": out, "lse": lse, "mean": lse}
    grid = (s.b, s.groups, s.m // s.block_m, s.n // s.block_n)
    return Plan(grid, read, {"d_k": k, "d_v": v}, [(s.group, s.block_m, s.d)] * 2)


def vmem_bytes(s: Sizes) -> int:
    """What the largest kernel takes: its blocks twice, as the next ones come meanwhile, its scratch, and what the compiler keeps
    between: no more, in what was compiled, than four tiles of logits and two rows of one head for every query and key."""
    kept = _bytes((4 * s.block_n, s.block_m), 4) + _bytes((2 * (s.block_n + s.block_m), s.d), 4)

    def of(plan: Plan) -> int:
        operands = (*plan.operands.values(), *plan.outputs.values())
        blocks = sum(_bytes(each.spec.block_shape, each.array.dtype.itemsize) for each in operands)
        return 2 * blocks + sum(_bytes(shape, 4) for shape in plan.scratch)

    return kept + max(map(of, (forward_plan(s), dq_plan(s), dkv_plan(s))))


def _bytes(shape: tuple[int | None, ...], itemsize: int) -> int:
    """In VMEM, whose last two dimensions are whole tiles."""
    *outer, rows, lanes = (side or 1 for side in shape)
    return math.prod(outer) * pl.cdiv(rows, SUBLANES) * SUBLANES * pl.cdiv(lanes, LANES) * LANES * itemsize


def _operands(s: Sizes, *, query: int, key: int) -> tuple:
    """q, k, v, {rows}, out and the per-query statistics [b groups n group]; query, key: their places in the grid."""
    lanes = s.group * s.d

    def of(length: int, block: int, place: int) -> Operand:
        array = jax.ShapeDtypeStruct((s.b, length, s.g * s.d), s.dtype)
        return Operand(array, pl.BlockSpec((None, block, lanes), lambda *at: (at[0], at[place], at[1])))

    rows = Operand(
        jax.ShapeDtypeStruct((s.b, s.m // s.block_m, ROWS, s.block_m), jnp.float32),
        pl.BlockSpec((None, None, ROWS, s.block_m), lambda *at: (at[0], at[key], 0, 0)),
    )
    statistics = Operand(
        jax.ShapeDtypeStruct((s.b, s.groups, s.n, s.group), jnp.float32),
        pl.BlockSpec((None, None, s.block_n, s.group), lambda *at: (at[0], at[1], at[query], 0)),
    )
    q, kv = of(s.n, s.block_n, query), of(s.m, s.block_m, key)
    return q, kv, kv, {"rows": rows} if s.has_rows else {}, q, statistics


def _run(s: Sizes, kernel: Callable, plan: Plan, arrays: dict[str, Array]) -> list[Array]:
    """kernel(read refs by name, written refs by name, scratch refs) over the plan's grid."""
    names = list(plan.operands)

    def body(*refs):
        at = len(names) + len(plan.outputs)
        kernel(
            dict(zip(names, refs, strict=False)), dict(zip(plan.outputs, refs[len(names) :], strict=False)), *refs[at:]
        )

    return pl.pallas_call(
        body,
        grid=plan.grid,
        in_specs=[plan.operands[name].spec for name in names],
        out_specs=[output.spec for output in plan.outputs.values()],
        out_shape=[output.array for output in plan.outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in plan.scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=s.interpret,
        name=kernel.func.__name__.strip("_"),
    )(*(arrays[name] for name in names))


# --- the kernels -----------------------------------------------------------------------------------------------------


def _dot(x: Array, y: Array, contract) -> Array:
    return lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


def _rows_of(refs) -> tuple[Array, Array, Array] | None:
    return tuple(refs["rows"][i : i + 1, :] for i in range(ROWS)) if "rows" in refs else None


def _lanes(s: Sizes, head: int) -> slice:
    return slice(head * s.d, (head + 1) * s.d)


def _forward_kernel(read, write, top_ref, total_ref, acc_ref, *, s: Sizes):
    @pl.when(pl.program_id(3) == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, FLOOR, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    rows = _rows_of(read)
    for head in range(s.group):
        own = _lanes(s, head)
        x = logits(_dot(read["q"][:, own], read["k"][:, own], OVER_LANES), rows, s.d**-0.5)
        old = top_ref[head]
        top = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        weights = jnp.exp(x - top)
        shrink = jnp.exp(old - top)
        top_ref[head] = top
        total_ref[head] = total_ref[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        acc_ref[head] = acc_ref[head] * shrink + _dot(weights.astype(s.dtype), read["v"][:, own], INSIDE)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        for head in range(s.group):
            total = jnp.maximum(total_ref[head], TINY)
            write["out"][:, _lanes(s, head)] = (acc_ref[head] / total).astype(s.dtype)
            write["lse"][:, head : head + 1] = top_ref[head] + jnp.log(total)


def _weights_and_gradient(read, mean_ref, s: Sizes, head: int, rows) -> tuple[Array, Array]:
    """The softmax's weights and the gradient by the unscaled products, [block_n block_m], of one head.

    mean: sum_j weight_j * d weight_j of every query, which is also sum(out * d_out).
    """
    own, one, scale = _lanes(s, head), slice(head, head + 1), s.d**-0.5
    a = _dot(read["q"][:, own], read["k"][:, own], OVER_LANES)
    weights = jnp.exp(logits(a, rows, scale) - read["lse"][:, one])
    d_weights = _dot(read["d_out"][:, own], read["v"][:, own], OVER_LANES)
    return weights, weights * (d_weights - mean_ref[:, one]) * slopes(a, rows, scale)


def _dq_kernel(read, write, dq_ref, *, s: Sizes):
    @pl.when(pl.program_id(3) == 0)
    def _():
        dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)
        for head in range(
            s.group
        ):  # here and not in XLA, which would lay both arrays out anew to sum over a head's lanes
            own = _lanes(s, head)
            product = read["out"][:, own].astype(jnp.float32) * read["d_out"][:, own].astype(jnp.float32)
            write["mean"][:, head : head + 1] = jnp.sum(product, axis=1, keepdims=True)

    rows = _rows_of(read)
    for head in range(s.group):
        _, d_a = _weights_and_gradient(read, write["mean"], s, head, rows)
        dq_ref[head] += _dot(d_a.astype(s.dtype), read["k"][:, _lanes(s, head)], INSIDE)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        for head in range(s.group):
            write["d_q"][:, _lanes(s, head)] = dq_ref[head].astype(s.dtype)


def _dkv_kernel(read, write, dk_ref, dv_ref, *, s: Sizes):
    @pl.when(pl.program_id(3) == 0)
    def _():
        dk_ref[...] = jnp.zeros(dk_ref.shape, jnp.float32)
        dv_ref[...] = jnp.zeros(dv_ref.shape, jnp.float32)

    rows = _rows_of(read)
    for head in range(s.group):
        own = _lanes(s, head)
        weights, d_a = _weights_and_gradient(read, read["mean"], s, head, rows)
        dv_ref[head] += _dot(weights.astype(s.dtype), read["d_out"][:, own], OVER_ROWS)
        dk_ref[head] += _dot(d_a.astype(s.dtype), read["q"][:, own], OVER_ROWS)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        for head in range(s.group):
            write["d_k"][:, _lanes(s, head)] = dk_ref[head].astype(s.dtype)
            write["d_v"][:, _lanes(s, head)] = dv_ref[head].astype(s.dtype)


# --- gradients -------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(s: Sizes, q, k, v, rows):
    return _forward(s, q, k, v, rows)[0]


def _forward(s: Sizes, q, k, v, rows) -> list[Array]:
    arrays = {"q": q, "k": k, "v": v, "rows": rows}
    return _run(s, functools.partial(_forward_kernel, s=s), forward_plan(s), arrays)


def _forward_saving(s: Sizes, q, k, v, rows):
    out, lse = _forward(s, q, k, v, rows)
    return out, (q, k, v, rows, out, lse)


def _backward(s: Sizes, saved, d_out):
    q, k, v, rows, out, lse = saved
    arrays = {"q": q, "k": k, "v": v, "rows": rows, "out": out, "d_out": d_out, "lse": lse}
    d_q, arrays["mean"] = _run(s, functools.partial(_dq_kernel, s=s), dq_plan(s), arrays)
    d_k, d_v = _run(s, functools.partial(_dkv_kernel, s=s), dkv_plan(s), arrays)
    return d_q, d_k, d_v, None if rows is None else jnp.zeros_like(rows)


_attend.defvjp(_forward_saving, _backward)
