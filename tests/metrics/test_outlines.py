"""Sharpness and the error about the outline, against explicit loops, SciPy and scikit-image."""

import math

import numpy as np
import pytest
from scipy import ndimage

from truepose_jax.metrics.outlines import gradient_magnitude, outline_band, outline_error, sharpness


@pytest.fixture(scope="module")
def people():
    """(generated, truth [3 20 16 3], person [3 20 16]): blobs of people, one cut off by the picture."""
    random = np.random.default_rng(4)
    rows, columns = np.mgrid[:20, :16]
    truth = random.uniform(-1, 1, (3, 20, 16, 3)).astype(np.float32)
    centres = [(10, 8), (19, 6), (4, 15)]
    person = np.stack([np.hypot(rows - y, columns - x) < 6.3 for y, x in centres])
    return ndimage.gaussian_filter(truth, (0, 0.6, 0.6, 0)), truth, person


def test_sharpness_is_the_loops(people):
    images, truth, person = people

    def mean_gradient(image, mask):
        grey, found = image.astype(np.float64).mean(-1), []
        for y, x in np.argwhere(mask):
            down = grey[y + 1, x] - grey[y, x] if y + 1 < 20 else 0.0
            right = grey[y, x + 1] - grey[y, x] if x + 1 < 16 else 0.0
            found.append(math.sqrt(down * down + right * right))
        return np.mean(found)

    ratios = [mean_gradient(a, m) / mean_gradient(b, m) for a, b, m in zip(images, truth, person, strict=True)]
    assert sharpness(images, truth, person) == pytest.approx(np.mean(ratios), rel=1e-12)
    assert sharpness(images, truth, person) < 0.8
    assert sharpness(truth, truth, person) == pytest.approx(1)
    ramp = np.broadcast_to(np.arange(16.0)[None, None, :, None], (1, 20, 16, 3))
    assert (gradient_magnitude(ramp)[..., :-1] == 1).all() and (gradient_magnitude(ramp)[..., -1] == 0).all()


def test_the_band_is_seven_pixels_wide(people):
    for person in people[2]:
        outline = person & ~ndimage.binary_erosion(person, border_value=1)  # a cross; the picture's border cuts nothing
        distance = ndimage.distance_transform_edt(~outline)
        np.testing.assert_array_equal(outline_band(person), distance <= 3)
    half = np.zeros((20, 16), bool)
    half[:, 8:] = True
    np.testing.assert_array_equal(np.flatnonzero(outline_band(half)[10]), np.arange(5, 12))
    assert outline_band(half)[:, 5:12].all(), "where the picture cuts the person off there is no outline"
    assert not outline_band(np.ones((20, 16), bool)).any() and not outline_band(np.zeros((20, 16), bool)).any()


def test_the_outlines_error(people):
    from skimage.segmentation import find_boundaries

    images, truth, person = people
    found = []
    for image, true, mask in zip(images, truth, person, strict=True):
        near = ndimage.distance_transform_edt(~find_boundaries(mask, connectivity=1, mode="inner")) <= 3
        grey = [abs(float(a) - float(b)) * 127.5 for a, b in zip(image[near].ravel(), true[near].ravel(), strict=True)]
        found.append(np.mean(grey))
    assert outline_error(images, truth, person) == pytest.approx(np.mean(found), rel=1e-9)
    assert outline_error(truth + np.float32(2 / 255), truth, person) == pytest.approx(1, rel=1e-4)
    outside = truth + np.where(np.stack([outline_band(p) for p in person])[..., None], 0, 1)
    assert outline_error(outside, truth, person) == 0


def test_pictures_that_say_nothing_do_not_count(people):
    images, truth, person = people
    few = person.copy()
    few[1] = False
    few[1, 3, 3:9] = True
    assert sharpness(images, truth, few) == pytest.approx(sharpness(images[[0, 2]], truth[[0, 2]], few[[0, 2]]))
    flat = truth.copy()
    flat[0] = 0.5
    assert math.isfinite(sharpness(images, flat, person))
    nobody = np.zeros_like(person)
    assert math.isnan(sharpness(images, truth, nobody)) and math.isnan(outline_error(images, truth, nobody))
    nobody[2] = person[2]
    assert outline_error(images, truth, nobody) == pytest.approx(outline_error(images[2:], truth[2:], person[2:]))
