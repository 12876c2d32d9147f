"""What the numbers of a batch study say: steps to a loss, the hyperbola through them, noise scales with their spread."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.stats

from truepose_jax.training import noise_scale

DRAWS = 1000
"""Bootstrap resamples."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval; NaN where the data do not bound it."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Hyperbola:
    """steps = least (1 + critical / batch); McCandlish et al. 2018, Eq. 2.11. points: how many were fitted."""

    least: Estimate
    critical: Estimate
    points: int

    def steps(self, batch: np.ndarray) -> np.ndarray:
        return self.least.value * (1 + self.critical.value / batch)


def steps_to(target: float, steps: Sequence[int], losses: Sequence[float]) -> float | None:
    """Where the loss first falls to the target, between evaluations by a straight line in (log step, loss).

    None: it never does. steps ascend from 1 on.
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0 or losses[i - 1] <= target:
                return float(steps[i])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return float(math.exp(math.log(steps[i - 1]) + share * math.log(steps[i] / steps[i - 1])))
    return None


def hyperbola(batches: Sequence[float], steps: Sequence[float]) -> Hyperbola | None:
    """Least squares in log steps, over log least and log critical. None: under three batch sizes, or no fit.

    The intervals are Student's, from the fit's covariance and its residuals: they say how well the curve holds the
    points, not how much another seed would move them. Three points leave one degree of freedom and bound next to nothing.
    """
    b, s = np.asarray(batches, float), np.asarray(steps, float)
    if len(np.unique(b)) < 3:
        return None

    def log_steps(batch, log_least, log_critical):
        return log_least + np.log1p(np.exp(log_critical) / batch)

    start = (math.log(s.min()), math.log(float(np.exp(np.mean(np.log(b))))))
    try:
        found, covariance = scipy.optimize.curve_fit(log_steps, b, np.log(s), p0=start, maxfev=10_000)
    except RuntimeError:
        return None
    spread = np.sqrt(np.diag(covariance)) * scipy.stats.t.ppf(0.975, len(b) - 2)

    def interval(i: int) -> Estimate:
        low, high = (math.exp(min(found[i] + sign * spread[i], 700.0)) for sign in (-1, 1))
        bounded = math.isfinite(spread[i]) and high < 1e4 * math.exp(found[i])
        return Estimate(math.exp(found[i]), low if bounded else math.nan, high if bounded else math.nan)

    return Hyperbola(interval(0), interval(1), len(b))


def noise_estimate(signal: np.ndarray, noise: np.ndarray, *, seed: int = 0) -> Estimate:
    """B_simple of moments over steps, with a bootstrap over blocks of neighbouring steps (they share parameters)."""
    value = noise_scale.quotient(signal, noise)
    kept = np.isfinite(signal) & np.isfinite(noise)
    pairs = np.stack([np.asarray(signal)[kept], np.asarray(noise)[kept]], axis=1)
    n = len(pairs)
    if n < 4:
        return Estimate(value, math.nan, math.nan)
    length = math.ceil(math.sqrt(n))
    starts = np.random.default_rng(seed).integers(0, n - length + 1, (DRAWS, math.ceil(n / length)))
    rows = (starts[:, :, None] + np.arange(length)).reshape(DRAWS, -1)[:, :n]
    means = pairs[rows].mean(axis=1)
    # A draw without signal has no upper bound: its quotient counts as infinite.
    draws = np.where(means[:, 0] > 0, means[:, 1] / np.maximum(means[:, 0], 1e-300), math.inf)
    low, high = np.quantile(draws, [0.025, 0.975], method="nearest")
    return Estimate(value, float(low), float(high) if math.isfinite(high) else math.nan)
