"""SSIM and PSNR against scikit-image, by every protocol's settings."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from truepose_jax.evaluate.report import garment_of
from truepose_jax.metrics.garments import GALLERY, colour_histogram, retrieval_rate
from truepose_jax.metrics.psnr import LEAST_PIXELS, psnr, psnr_inside
from truepose_jax.metrics.ssim import gaussian_window, ssim_51, ssim_256, ssim_map, uniform_window


def pair(seed=0, hw=(72, 61)):
    """A smooth picture and a noisy, darker copy of it: float, 0 to 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    truth = 127 + 90 * np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1)
    noisy = 0.8 * truth + rng.normal(0, 12, truth.shape)
    return np.round(np.clip(noisy, 0, 255)), np.round(truth)


def reference(a, b, **settings):
    return structural_similarity(b, a, channel_axis=2, full=True, **settings)


def test_uniform_window_of_51():
    a, b = pair()
    expected, whole = reference(a / 255, b / 255, win_size=51, data_range=1)
    found = ssim_51(a, b)
    assert abs(found.mean() - expected) < 1e-12
    np.testing.assert_allclose(found, whole[25:-25, 25:-25], atol=1e-11)
    assert 0.1 < expected < 0.98


@pytest.mark.parametrize(("sigma", "taps"), [(1.5, 11), (1.2, 9)])
def test_gaussian_window(sigma, taps):
    a, b = pair()
    settings = {"gaussian_weights": True, "sigma": sigma, "use_sample_covariance": False}
    expected, whole = reference(a, b, data_range=a.max() - a.min(), **settings)
    found = ssim_256(a, b, sigma=sigma)
    assert len(gaussian_window(sigma).weights) == taps
    assert abs(found.mean() - expected) < 1e-12
    margin = taps // 2
    np.testing.assert_allclose(found, whole[margin:-margin, margin:-margin], atol=1e-11)
    # Which image the range comes from matters, and so do the covariances: a slip in either would show.
    assert abs(found.mean() - reference(a, b, data_range=255, **settings)[0]) > 1e-3
    unbiased = settings | {"use_sample_covariance": True}
    assert abs(found.mean() - reference(a, b, data_range=a.max() - a.min(), **unbiased)[0]) > 1e-6


def test_float32_images_as_the_field_computes_them():
    a, b = (x.astype(np.float32) for x in pair(1))
    expected, _ = reference(a / 255, b / 255, win_size=51, data_range=1)
    assert abs(ssim_51(a, b).mean() - expected) < 1e-5


def test_an_image_is_itself():
    a, _ = pair()
    assert ssim_51(a, a).mean() == pytest.approx(1, abs=1e-12)
    assert ssim_256(a, a, sigma=1.5).mean() == pytest.approx(1, abs=1e-12)
    assert psnr(a, a, data_range=255) == math.inf


def test_small_and_unequal_images_are_refused():
    a, b = pair()
    with pytest.raises(ValueError, match="does not fit"):
        ssim_map(a[:20], b[:20], window=uniform_window(51), data_range=1)
    with pytest.raises(ValueError, match="one size"):
        ssim_51(a, b[1:])
    with pytest.raises(ValueError, match="one size"):
        psnr(a, b[1:], data_range=255)


def test_psnr():
    a, b = pair()
    expected = peak_signal_noise_ratio(b / 255, a / 255, data_range=1)
    assert psnr(a / 255, b / 255, data_range=1) == pytest.approx(expected, abs=1e-10)
    assert psnr(a, b, data_range=255) == pytest.approx(expected, abs=1e-10)


def test_psnr_inside_a_region():
    a, b = pair()
    mask = np.zeros(a.shape[:2], bool)
    mask[10:20, 5:20] = True
    expected = peak_signal_noise_ratio(b[10:20, 5:20], a[10:20, 5:20], data_range=255)
    assert psnr_inside(a, b, mask, data_range=255) == pytest.approx(expected, abs=1e-10)
    whole = np.ones_like(mask)
    assert psnr_inside(a, b, whole, data_range=255) == pytest.approx(psnr(a, b, data_range=255), abs=1e-10)
    few = np.zeros_like(mask)
    few.reshape(-1)[: LEAST_PIXELS - 1] = True
    assert math.isnan(psnr_inside(a, b, few, data_range=255))
    few.reshape(-1)[:LEAST_PIXELS] = True
    assert not math.isnan(psnr_inside(a, b, few, data_range=255))


def test_garments_by_names():
    """Other poses of one person show the same clothes: they must never count as somebody else's."""
    alike = [
        ("WOMEN/Dresses/id_00005537/05_1_front.jpg", "fashionWOMENDressesid0000553705_2side.png"),
        ("train/0002_c1s1_000451_03.jpg", "0002_c3s2_000351_01.jpg"),
        ("test-1-000007-0.png", "sub/test-1-000007-3.png"),
        ("anna/one.png", "anna/two.png"),
    ]
    found = [{garment_of(name) for name in names} for names in alike]
    assert all(len(names) == 1 for names in found) and len(set.union(*found)) == 4
    assert garment_of("one.png") != garment_of("two.png")
    assert garment_of("test-1-000007-0.png") != garment_of("test-1-000008-0.png")


def test_garment_retrieval():
    rng = np.random.default_rng(0)
    mask = np.ones((12, 12), bool)
    colours = rng.uniform(20, 235, (24, 1, 1, 3))
    worn = [np.clip(c + rng.normal(0, 6, (12, 12, 3)), 0, 255) for c in colours]
    truth = np.stack([colour_histogram(image, mask) for image in worn])
    names = [str(i) for i in range(len(worn))]
    assert truth.sum(1) == pytest.approx(np.ones(24))
    assert retrieval_rate(truth, truth, names) == (1.0, 24)
    shuffled, asked = retrieval_rate(np.roll(truth, 1, 0), truth, names)
    assert shuffled < 0.1 and asked == 24
    # One garment in many photos is no rival of itself, and too few others make no gallery.
    assert math.isnan(retrieval_rate(truth, truth, ["same"] * 20 + names[:4])[0])
    assert GALLERY == 16
