"""Plain attention through cuDNN, as JAX offers it. UNVERIFIED: no GPU was at hand. Only by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_HEAD_DIM = 128


def refuses(q: Array, k: Array, v: Array, *, has_rows: bool, platform: str) -> str | None:
    """What of a call cuDNN cannot take; None where it can take all."""
    if platform != "gpu":
        return f"a program for {platform}"
    if has_rows:
        return "masks or reweighted logits"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; it takes bfloat16 or float16"
    if q.shape[-1] % 8 or q.shape[-1] > MOST_HEAD_DIM:
        return f"heads of width {q.shape[-1]}; it takes multiples of 8 up to {MOST_HEAD_DIM}"
    return None


def attend(
    q: Float[Array, "b n g d"], k: Float[Array, "b m g d"], v: Float[Array, "b m g d"], rows: None
) -> Float[Array, "b n g d"]:
    """softmax(q k^T / sqrt d) v."""
    del rows
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
