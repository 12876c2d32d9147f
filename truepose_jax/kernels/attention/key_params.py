"""Eq. 6 as three numbers per key, which is all that the blockwise implementations know of masks and slopes.

With a = q k^T not yet scaled, a key's row entries are `up`, `down` and `bias`, and its logit is
    a * (up if a > 0 else down) + bias,
up = (slope + kink) / sqrt(d) and down = slope / sqrt(d) of the key's side of the mask. A key that is not there (masked
out, or padding) has bias ABSENT. Scaling after the product keeps q as it came; sqrt(d) > 0 leaves the sign alone.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.kernels.attention.reference import PiecewiseLinear

ABSENT = -1e30
FLOOR = -1e29
"""Where a running maximum starts: below every logit and far above ABSENT, so that exp(ABSENT - maximum) is 0 even in a
row that has met no key yet. Such a row sums to 0 and gives 0."""
TINY = 1e-37
"""What a sum of weights is held above, normal in float32."""
ROWS = 3


def key_params(
    key_mask: Bool[Array, "b m"],
    inside: PiecewiseLinear,
    outside: PiecewiseLinear,
    head_dim: int,
    *,
    keep: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b 3 m"]:
    """(up, down, bias) of every key; `keep` False: the key is left out."""
    up, down = (jnp.where(key_mask, i, o) for i, o in zip(_up_down(inside), _up_down(outside), strict=True))
    bias = jnp.zeros_like(up) if keep is None else jnp.where(keep, 0.0, ABSENT)
    scale = head_dim**-0.5
    return jnp.stack([up * scale, down * scale, bias], axis=1).astype(jnp.float32)


def plain_rows(keep: Bool[Array, "b m"], head_dim: int) -> Float[Array, "b 3 m"]:
    """The rows of an ordinary softmax over the keys that `keep` names."""
    return key_params(keep, PiecewiseLinear(1.0, 0.0), PiecewiseLinear(1.0, 0.0), head_dim, keep=keep)


def pad_keys(
    rows: Float[Array, "b 3 m"] | None, batch: int, keys: int, padded: int, head_dim: int
) -> Float[Array, "b 3 padded"] | None:
    """The rows for keys padded from `keys` to `padded`. None stays None (an ordinary softmax over all keys) if it can."""
    if padded == keys:
        return rows
    if rows is None:
        rows = plain_rows(jnp.ones((batch, keys), bool), head_dim)
    extra = jnp.broadcast_to(jnp.array([0.0, 0.0, ABSENT], jnp.float32)[None, :, None], (batch, ROWS, padded - keys))
    return jnp.concatenate([rows, extra], axis=2)


def logits(a: Array, rows: tuple[Array, Array, Array] | None, scale: float) -> Array:
    """What the softmax sees for products a. rows: up, down, bias, each to be broadcast along a's queries."""
    if rows is None:
        return a * scale
    up, down, bias = rows
    return a * jnp.where(a > 0, up, down) + bias


def slopes(a: Array, rows: tuple[Array, Array, Array] | None, scale: float) -> Array | float:
    """d logits / d a. At a = 0, where Eq. 6 has a kink, the mean of both sides: jnp.maximum's convention."""
    if rows is None:
        return scale
    up, down, _ = rows
    return jnp.where(a > 0, up, jnp.where(a < 0, down, 0.5 * (up + down)))


def refused_arrays(q: Array, k: Array, v: Array, dtypes: Collection[jnp.dtype]) -> str | None:
    """What an implementation of these dtypes cannot take of the arrays themselves; None where it can take them."""
    if not q.dtype == k.dtype == v.dtype or jnp.dtype(q.dtype) not in dtypes:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; it takes one of {', '.join(map(str, dtypes))}"
    if q.size == 0 or k.size == 0:
        return f"empty arrays, {q.shape} and {k.shape}"
    return None


def compute_capability() -> str | None:
    """Of this process's GPUs, as "9.0", on ROCm as "gfx942"; None where it has none."""
    device = jax.local_devices()[0]
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def _up_down(side: PiecewiseLinear) -> tuple[float, float]:
    return side.slope + side.kink, side.slope
