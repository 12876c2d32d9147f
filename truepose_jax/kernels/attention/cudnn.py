"""Plain attention through cuDNN, as JAX offers it. UNVERIFIED: no GPU was at hand. Only by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.kernels.attention.key_params import compute_capability, refused_arrays

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
MOST_HEAD_DIM, MOST_HEAD_DIM_FROM_HOPPER = 128, 256
"""As JAX's own check has them."""


def refuses(q: Array, k: Array, v: Array, *, has_rows: bool, platform: str) -> str | None:
    """What of a call cuDNN cannot take; None where it can take all."""
    if platform != "gpu":
        return f"a program for {platform}"
    if has_rows:
        return "masks or reweighted logits"
    capability = compute_capability() or "0"
    if capability.startswith("gfx"):
        return f"GPUs of compute capability {capability}"
    if reason := refused_arrays(q, k, v, DTYPES):
        return reason
    most = MOST_HEAD_DIM_FROM_HOPPER if float(capability) >= 9.0 else MOST_HEAD_DIM
    if q.shape[-1] % 8 or q.shape[-1] > most:
        return f"heads of width {q.shape[-1]}; it takes multiples of 8 up to {most}"
    return None


def attend(
    q: Float[Array, "b n g d"], k: Float[Array, "b m g d"], v: Float[Array, "b m g d"], rows: None
) -> Float[Array, "b n g d"]:
    """softmax(q k^T / sqrt d) v."""
    del rows
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
