"""How crisp a person is: gradients inside, and the error in a band about the outline. NumPy; images in [-1, 1]."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float

from truepose_jax.metrics.psnr import LEAST_PIXELS

BAND_REACH = 3
"""Pixels on either side of the outline's own: a band of 7."""

GREY_LEVELS = 127.5
"""Grey levels (0 to 255) per unit of [-1, 1]."""


def gradient_magnitude(images: Float[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b h w"]:
    """Length of the forward differences of the channels' mean; 0 across the last row and the last column."""
    grey = images.astype(np.float64).mean(-1)
    down, right = np.zeros_like(grey), np.zeros_like(grey)
    down[..., :-1, :] = np.diff(grey, axis=-2)
    right[..., :-1] = np.diff(grey, axis=-1)
    return np.hypot(down, right)


def sharpness(
    images: Float[np.ndarray, "b h w 3"], truth: Float[np.ndarray, "b h w 3"], mask: Bool[np.ndarray, "b h w"]
) -> float:
    """Mean gradient magnitude inside the mask, generated / truth: under 1 is blurred, over 1 noisy. Mean over the images;
    those with under LEAST_PIXELS in the mask, or a flat truth there, do not count. NaN where none does."""
    ours, theirs = ((gradient_magnitude(x) * mask).sum((-2, -1)) for x in (images, truth))
    counted = (mask.sum((-2, -1)) >= LEAST_PIXELS) & (theirs > 0)
    return float(np.mean(ours[counted] / theirs[counted])) if counted.any() else float("nan")


def outline_band(person: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels at most BAND_REACH from the outline: from a pixel of the person that has a neighbour (of 4) without. Where
    the picture cuts the person off there is no outline."""
    inner = cv2.erode(person.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    outline = person & (inner == 0)
    if not outline.any():
        return np.zeros_like(outline)
    distance = cv2.distanceTransform((~outline).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= BAND_REACH + 1e-3


def outline_error(
    images: Float[np.ndarray, "b h w 3"], truth: Float[np.ndarray, "b h w 3"], person: Bool[np.ndarray, "b h w"]
) -> float:
    """Mean absolute error in grey levels, 0 to 255, inside the band about the true outline; mean over the images that have
    one, NaN where none has. person: of the truth."""
    errors = np.abs(images.astype(np.float64) - truth).mean(-1) * GREY_LEVELS
    bands = np.stack([outline_band(p) for p in person])
    counts = bands.sum((-2, -1))
    return (
        float(((errors * bands).sum((-2, -1))[counts > 0] / counts[counts > 0]).mean())
        if counts.any()
        else float("nan")
    )
