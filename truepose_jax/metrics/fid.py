"""Frechet inception distance: what the network is fed, streaming statistics, and the distance.

| metric | network | image to network |
|---|---|---|
| fid | torchvision's Inception-v3 | [0, 1], bilinear to 299 without antialias, then the affine below: the field's habit |
| clean_fid | Inception of 2015-12-05 | Pillow's bicubic to 299 in floating point, clipped, (x - 128) / 128 |

The affine of `fid` is torchvision's `transform_input`, meant for images normalised by ImageNet's statistics; the field's
code applies it to [0, 1]. The channels land in about [-.03, .43], [-.09, .36] and [-.19, .26] (docs/paper.md 9.2). Numbers
of papers on pose transfer are `fid`; the two must not be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.linalg.lapack import dpstrf

SIDE = 299

IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)


def legacy_input(image: Float[np.ndarray, "h w 3"], side: int = SIDE) -> Float[np.ndarray, "side side 3"]:
    """Image of 0 to 255 -> what `fid` feeds to torchvision's network."""
    resized = _bilinear(_bilinear(image.astype(np.float32) / 255.0, side, 0), side, 1)
    return (resized * (IMAGENET_STD / 0.5) + (IMAGENET_MEAN - 0.5) / 0.5).astype(np.float32)


def clean_input(image: Float[np.ndarray, "h w 3"], side: int = SIDE) -> Float[np.ndarray, "side side 3"]:
    """Image of 0 to 255 -> what clean-fid feeds to the network of 2015-12-05."""
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels]
    return ((np.clip(np.stack(resized, -1), 0, 255) - 128.0) / 128.0).astype(np.float32)


def _bilinear(image: np.ndarray, side: int, axis: int) -> np.ndarray:
    """Linear interpolation at half-pixel centres, without antialias (torch's interpolate)."""
    size = image.shape[axis]
    at = np.maximum((np.arange(side, dtype=np.float32) + 0.5) * np.float32(size / side) - 0.5, 0)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(image.ndim)])
    return image.take(low, axis) * (1 - share) + image.take(high, axis) * share


@dataclasses.dataclass(frozen=True)
class FidKind:
    """variant: of `inception.Inception`. prepare: image of 0 to 255 -> the network's input."""

    variant: str
    prepare: Callable[[np.ndarray, int], np.ndarray]
    text: str


FID_KINDS = {
    "fid": FidKind("torchvision", legacy_input, "bilinear 299 without antialias, ImageNet affine on [0, 1]"),
    "clean_fid": FidKind("tensorflow", clean_input, "Pillow's float bicubic 299, clipped, (x - 128) / 128"),
}


@dataclasses.dataclass
class Statistics:
    """Mean and scatter (sum of outer products of deviations) of features, float64, in constant memory."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, width: int) -> Statistics:
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def update(self, features: Float[np.ndarray, "n d"]) -> None:
        """Takes more rows in (Chan et al.: no difference of large sums); stopped at any place, all of them or none."""
        rows = np.asarray(features, np.float64)
        if not len(rows):
            return
        mean = rows.mean(0)
        centred = rows - mean
        step = mean - self.mean
        total = self.count + len(rows)
        scatter = self.scatter + centred.T @ centred
        scatter += np.outer(step, step * (self.count * len(rows) / total))
        # One call: a signal's SystemExit comes between calls, and what is here then is saved.
        vars(self).update(count=total, mean=self.mean + step * (len(rows) / total), scatter=scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Of a sample (n - 1). Raises ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more; there are {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), >= 0 up to rounding.

    tr (A B)^(1/2) is the sum of the singular values of L_a^T L_b for A = L_a L_a^T. That needs no square root of a
    product that is nearly singular, and is exact for covariances of fewer images than features, where sqrtm is not.
    """
    step = a.mean - b.mean
    left, right = _factor(a.covariance), _factor(b.covariance)
    overlap = np.linalg.svd(left.T @ right, compute_uv=False).sum()
    return float(step @ step + np.square(left).sum() + np.square(right).sum() - 2.0 * overlap)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L with L L^T = covariance, [d rank], by Cholesky's decomposition with pivots: a small part of the time of eigenvectors."""
    factor, order, rank, _ = dpstrf(covariance, lower=1)
    return np.tril(factor)[np.argsort(order), :rank]
