"""Structural similarity as the field computes it (docs/paper.md 9.1), equal to scikit-image's. NumPy, float64.

Two numbers go by the name of SSIM in papers on pose transfer: a uniform window of 51 pixels on [0, 1] ("ssim"), and a
Gaussian one on 0 to 255 whose data range is the spread of the *prediction* ("ssim_256"; sigma 1.5 for CFLD and FPDM, 1.2
for PIDM and PCDM). The latter depends on the prediction's contrast: a published habit, not a recommendation.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.ndimage import correlate1d, uniform_filter1d

K1, K2 = 0.01, 0.03
"""Wang et al. 2004: the constants are (K * data_range)^2."""

TRUNCATE = 3.5
"""A Gaussian window ends this many sigmas from its centre: 11 taps for sigma 1.5, 9 for 1.2."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Weights of the local means, the same along both axes.

    covariance: "sample" (n / (n - 1) for n pixels in the window) or "population".
    """

    weights: tuple[float, ...]
    covariance: str

    @property
    def margin(self) -> int:
        """Pixels on each side for which the window would leave the image."""
        return len(self.weights) // 2

    def mean(self, maps: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h2 w2 c"]:
        """Local means where the whole window lies inside."""
        m = self.margin
        for axis in (0, 1):
            if len(set(self.weights)) == 1:
                maps = uniform_filter1d(maps, len(self.weights), axis=axis)
            else:
                maps = correlate1d(maps, self.weights, axis=axis)
        return maps[m:-m, m:-m]

    @property
    def correction(self) -> float:
        n = len(self.weights) ** 2
        return n / (n - 1) if self.covariance == "sample" else 1.0


def uniform_window(size: int) -> Window:
    """Equal weights, sample covariances: scikit-image's default."""
    return Window((1.0 / size,) * size, "sample")


def gaussian_window(sigma: float) -> Window:
    """Gaussian weights, population covariances: Wang et al.'s own choice."""
    radius = int(TRUNCATE * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return Window(tuple(weights / weights.sum()), "population")


UNIFORM_51 = uniform_window(51)


def ssim_map(
    generated: Float[np.ndarray, "h w 3"], truth: Float[np.ndarray, "h w 3"], *, window: Window, data_range: float
) -> Float[np.ndarray, "h2 w2 3"]:
    """SSIM of every pixel and channel whose window lies inside the image (h2 = h - 2 * window.margin).

    NaN where data_range is 0 and both windows are flat. Raises ValueError where the image is smaller than the window.
    """
    if generated.shape != truth.shape:
        raise ValueError(f"images of {generated.shape} and {truth.shape}: SSIM needs one size")
    if min(generated.shape[:2]) < len(window.weights):
        raise ValueError(f"a window of {len(window.weights)} pixels does not fit into {generated.shape[:2]}")
    x, y = generated.astype(np.float64), truth.astype(np.float64)
    means = window.mean(np.concatenate([x, y, x * x, y * y, x * y], axis=-1))
    ux, uy, uxx, uyy, uxy = np.split(means, 5, axis=-1)
    vx, vy, vxy = (window.correction * v for v in (uxx - ux * ux, uyy - uy * uy, uxy - ux * uy))
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    with np.errstate(invalid="ignore"):
        return ((2 * ux * uy + c1) * (2 * vxy + c2)) / ((ux * ux + uy * uy + c1) * (vx + vy + c2))


def ssim_51(generated: Float[np.ndarray, "h w 3"], truth: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h2 w2 3"]:
    """The map whose mean is "ssim": images 0 to 255, uniform window 51."""
    return ssim_map(generated / 255.0, truth / 255.0, window=UNIFORM_51, data_range=1.0)


def ssim_256(
    generated: Float[np.ndarray, "h w 3"], truth: Float[np.ndarray, "h w 3"], *, sigma: float
) -> Float[np.ndarray, "h2 w2 3"]:
    """The map whose mean is "ssim_256": images 0 to 255, Gaussian window, data range of the generated image."""
    spread = float(generated.max()) - float(generated.min())
    return ssim_map(generated, truth, window=gaussian_window(sigma), data_range=spread)
