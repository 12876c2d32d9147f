"""Errors inside regions of the person: PSNR per region, and garment retrieval. NumPy; images in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

MIN_SHARE = 0.001
"""A region counts in an image from 0.1 % of the pixels on (45 pixels at 256x176)."""


def region_mse(
    images: Float[np.ndarray, "*b h w 3"], truth: Float[np.ndarray, "*b h w 3"], mask: Bool[np.ndarray, "*b h w"]
) -> Float[np.ndarray, "*b"]:
    """Mean squared error inside the mask, per image; NaN where the mask holds under MIN_SHARE of the pixels."""
    squared = np.square(images.astype(np.float64) - truth).mean(-1)
    counts = mask.sum((-2, -1))
    too_small = counts < max(1, round(MIN_SHARE * mask.shape[-2] * mask.shape[-1]))
    return np.where(too_small, np.nan, (squared * mask).sum((-2, -1)) / np.maximum(counts, 1))


def psnr(mse: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """dB of errors of images in [-1, 1] (peak-to-peak 2). An exact copy gives inf."""
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(4.0 / mse)


def mean_psnr(
    images: Float[np.ndarray, "b h w 3"], truth: Float[np.ndarray, "b h w 3"], mask: Bool[np.ndarray, "b h w"]
) -> float:
    """Mean over the images of each image's PSNR inside the mask; NaN where no image has the region."""
    values = psnr(region_mse(images, truth, mask))
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def retrieval(
    generated: Float[np.ndarray, "n h w 3"], truth: Float[np.ndarray, "n h w 3"], mask: Bool[np.ndarray, "n h w"]
) -> Bool[np.ndarray, " n"]:
    """Whether generated[i] lies nearer (MSE inside mask[i]) to truth[i] than to any other truth[j].

    All n truths show the same pose, so that only the clothes tell them apart; mask[i] is where truth[i] wears them.
    The same pixels are compared for every j. Chance: 1 / n.
    """
    errors = np.stack([region_mse(generated, np.broadcast_to(t, generated.shape), mask) for t in truth], axis=1)
    seen = ~np.isnan(errors).all(axis=1)
    return seen & (np.argmin(np.where(np.isnan(errors), np.inf, errors), axis=1) == np.arange(len(truth)))


def group_mask(parsing: np.ndarray, ids: Sequence[int]) -> Bool[np.ndarray, "*b h w"]:
    """Where the map holds one of the ids."""
    return np.isin(parsing, np.asarray(ids))
