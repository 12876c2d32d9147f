"""The one door to attention. Models call these two; which implementation answers is decided here."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from truepose_jax.kernels.attention import reference

MASK_AXES = ("key", "query", "outer", "none")
READINGS = ("printed", "prose")


def attention(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    *,
    key_mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n g d"]:
    """softmax(q k^T / sqrt d) v; keys with key_mask False are left out, a row without keys gives 0."""
    return reference.attention(q, k, v, key_mask=key_mask)


def reweighted_attention(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    key_mask: Bool[Array, "b m"],
    *,
    delta: float = 0.6,
    sigma: float = 0.3,
    reading: str = "printed",
    mask_axis: str = "key",
) -> Float[Array, "b n g d"]:
    """HPFA's attention, Eq. 6 and 7 of TruePose. key_mask: True = inside M.

    mask_axis (methods.md A1): what M_ij indexes. "query" and "outer" want n == m (source self-attention).
    """
    if mask_axis not in MASK_AXES:
        raise ValueError(f"mask_axis is {mask_axis!r}; choose one of {MASK_AXES}")
    if mask_axis == "none":
        return reference.attention(q, k, v)
    inside, outside = reference.eq6_slopes(delta, sigma, reading)
    if mask_axis == "query":
        every_key = key_mask | True
        return reference.reweighted_attention(q, k, v, every_key, inside=inside, outside=outside, query_mask=key_mask)
    query_mask = key_mask if mask_axis == "outer" else None
    return reference.reweighted_attention(q, k, v, key_mask, inside=inside, outside=outside, query_mask=query_mask)
