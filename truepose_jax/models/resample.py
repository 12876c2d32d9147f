"""Bicubic interpolation of a table as PyTorch does it, which is not jax.image.resize (another kernel, and antialias)."""

from __future__ import annotations

import numpy as np

SHARPNESS = -0.75
"""Keys' a; jax.image.resize has -0.5."""


def bicubic_matrix(n_in: int, n_out: int, offset: float = 0.0) -> np.ndarray:
    """float32 [n_out n_in]: torch's F.interpolate along one axis, mode bicubic, align_corners false; borders repeat.

    offset: cell i reads at (i + 1/2) n_in / (n_out + offset) - 1/2, as scale_factor = (n_out + offset) / n_in gives it.
    """
    source = (np.arange(n_out) + 0.5) * n_in / (n_out + offset) - 0.5
    first = np.floor(source).astype(int)
    matrix = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        at = np.clip(first + tap, 0, n_in - 1)
        np.add.at(matrix, (np.arange(n_out), at), _keys(np.abs(source - first - tap)))
    return matrix.astype(np.float32)


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel at distances in [0, 2]."""
    a = SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)
