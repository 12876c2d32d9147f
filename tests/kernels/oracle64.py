"""The sloped softmax in NumPy float64 with gradients by hand, entry by entry as the equation reads. Nothing of it is ours."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Arrays of one call, float64. keep [b m]: keys that exist."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    keep: np.ndarray
    d_out: np.ndarray


class Answer(NamedTuple):
    out: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    d_v: np.ndarray


def answer(case: Case, inside: tuple[float, float], outside: tuple[float, float]) -> Answer:
    """Output and gradients of sum(out * d_out); inside, outside: (slope, kink). A row without keys gives 0."""
    scale = 1 / np.sqrt(case.q.shape[-1])
    a = np.einsum("bngd,bmgd->bgnm", case.q, case.k) * scale
    side = case.mask[:, None, None, :]
    slope, kink = (np.where(side, i, o) for i, o in zip(inside, outside, strict=True))
    keep = np.broadcast_to(case.keep[:, None, None, :], a.shape)
    logit = np.where(keep, slope * a + kink * np.maximum(a, 0), -np.inf)
    top = np.where(keep.any(-1, keepdims=True), logit.max(-1, keepdims=True), 0)
    e = np.exp(logit - top)
    total = e.sum(-1, keepdims=True)
    p = np.divide(e, total, out=np.zeros_like(e), where=total > 0)
    d_p = np.einsum("bngd,bmgd->bgnm", case.d_out, case.v)
    d_logit = p * (d_p - (p * d_p).sum(-1, keepdims=True))
    # at a = 0 the mean of both sides, as jnp.maximum has it
    d_a = d_logit * (slope + kink * (0.5 + 0.5 * np.sign(a))) * scale
    return Answer(
        np.einsum("bgnm,bmgd->bngd", p, case.v),
        np.einsum("bgnm,bmgd->bngd", d_a, case.k),
        np.einsum("bgnm,bngd->bmgd", d_a, case.q),
        np.einsum("bgnm,bngd->bmgd", p, case.d_out),
    )
