"""Peak signal-to-noise ratio per image, whole or inside a region, equal to scikit-image's. NumPy, float64.

A mean of PSNRs, not the PSNR of a mean error: every image counts alike (docs/paper.md 9.1).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

LEAST_PIXELS = 50
"""Smaller regions say nothing: an image counts from here on."""


def psnr(generated: Float[np.ndarray, "h w 3"], truth: Float[np.ndarray, "h w 3"], *, data_range: float) -> float:
    """dB, of images whose values span data_range. An exact copy gives inf."""
    return _decibels(float(np.mean(_squared(generated, truth))), data_range)


def psnr_inside(
    generated: Float[np.ndarray, "h w 3"],
    truth: Float[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    *,
    data_range: float,
) -> float:
    """The same of the error inside the mask; NaN where it holds under LEAST_PIXELS."""
    if np.count_nonzero(mask) < LEAST_PIXELS:
        return math.nan
    return _decibels(float(np.mean(_squared(generated, truth)[mask])), data_range)


def _squared(generated: np.ndarray, truth: np.ndarray) -> np.ndarray:
    if generated.shape != truth.shape:
        raise ValueError(f"images of {generated.shape} and {truth.shape}: PSNR needs one size")
    return np.square(generated.astype(np.float64) - truth)


def _decibels(error: float, data_range: float) -> float:
    return math.inf if error == 0 else 10.0 * math.log10(data_range**2 / error)
