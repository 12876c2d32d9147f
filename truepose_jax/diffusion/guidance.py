"""Classifier-free guidance, TruePose Eq. 11."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int

Denoise = Callable[[Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, "b h w c"]]
"""(x_t, t) -> the network's output."""


def guided(
    conditional: Callable[[], Float[Array, "b h w c"]],
    unconditional: Callable[[], Float[Array, "b h w c"]],
    scale: float,
) -> Float[Array, "b h w c"]:
    """unconditional + scale * (conditional - unconditional). At scale 1 the unconditional branch is not run at all.

    Takes the branches as functions, and `scale` as a Python number, so that what is not needed is not traced.
    """
    if scale == 1.0:
        return conditional()
    null = unconditional()
    return null + scale * (conditional() - null)


def guided_denoise(conditional: Denoise, unconditional: Denoise, scale: float) -> Denoise:
    """The same as one function of (x_t, t), which samplers take."""
    return lambda x, t: guided(lambda: conditional(x, t), lambda: unconditional(x, t), scale)
