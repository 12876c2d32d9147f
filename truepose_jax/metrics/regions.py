"""Errors inside regions of the person: PSNR per region, and garment retrieval. NumPy; images in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from truepose_jax.metrics.psnr import LEAST_PIXELS, psnr_inside


def region_mse(
    images: Float[np.ndarray, "*b h w 3"], truth: Float[np.ndarray, "*b h w 3"], mask: Bool[np.ndarray, "*b h w"]
) -> Float[np.ndarray, "*b"]:
    """Mean squared error inside the mask, per image; NaN where the mask holds under LEAST_PIXELS."""
    squared = np.square(images.astype(np.float64) - truth).mean(-1)
    counts = mask.sum((-2, -1))
    return np.where(counts < LEAST_PIXELS, np.nan, (squared * mask).sum((-2, -1)) / np.maximum(counts, 1))


def mean_psnr(
    images: Float[np.ndarray, "b h w 3"], truth: Float[np.ndarray, "b h w 3"], mask: Bool[np.ndarray, "b h w"]
) -> float:
    """Mean over the images of each image's psnr_inside; NaN where no image has the region."""
    values = np.array([psnr_inside(*each, data_range=2.0) for each in zip(images, truth, mask, strict=True)])
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
