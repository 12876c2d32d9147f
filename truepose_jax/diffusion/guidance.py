"""Classifier-free guidance (TruePose Eq. 11), of any number of branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

Denoise = Callable[[Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, "b h w c"]]
"""(x_t, t) -> the network's output."""


class Branches(NamedTuple):
    """What guidance runs a network with: a base and others, each with the weight of its difference from the base."""

    base: Any
    others: tuple[tuple[float, Any], ...] = ()


def two_branches(conditioning: Any, null: Any, scale: float) -> Branches:
    """null + scale (conditioning - null); at scale 1 the null branch is not run at all."""
    return Branches(conditioning) if scale == 1.0 else Branches(null, ((scale, conditioning),))


def guided(
    base: Callable[[], Float[Array, "b h w c"]],
    others: Sequence[tuple[float, Callable[[], Float[Array, "b h w c"]]]],
) -> Float[Array, "b h w c"]:
    """base + the sum of weight * (other - base). Takes the branches as functions, and weights as Python numbers: one of
    weight 0 is not run."""
    start = base()
    output = start
    for weight, other in others:
        if weight != 0.0:
            output = output + weight * (other() - start)
    return output


def guided_denoise(denoise: Callable[..., Float[Array, "b h w c"]], branches: Branches) -> Denoise:
    """The same as one function of (x_t, t), which samplers take. denoise(x_t, t, conditioning)."""

    def run(x: Array, t: Array) -> Array:
        others = [(weight, lambda c=c: denoise(x, t, c)) for weight, c in branches.others]
        return guided(lambda: denoise(x, t, branches.base), others)

    return run


EVERYWHERE = (0.0, 1.0)
"""The guidance interval that is off."""


def inside_interval(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """`inside` for t from low to high, `outside` at others (Kynkaanniemi et al. 2024, who count in noise levels). Of the two only
    one runs; all of t must be one number."""
    return lambda x, t: jax.lax.cond((t[0] >= low) & (t[0] <= high), inside, outside, x, t)
