"""FID: both networks and both preparations against PyTorch, the statistics and the distance against NumPy and SciPy."""

import contextlib
import functools
import itertools
import sys

import jax
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from tests.metrics.torch_networks import Inception, random_state
from truepose_jax.evaluate.weights import PUBLISHED, module_of, shapes_of
from truepose_jax.metrics import fid
from truepose_jax.pretrained.conversion import from_torch

SMALL = 75
"""The least side Inception takes; 299 is in test_packages.py."""


@functools.cache
def state(metric):
    return random_state(metric, 0)


def test_published_parameter_counts():
    """What torchvision's inception_v3 has without its classifiers: 21,785,568 parameters, 34,432 running statistics."""
    sizes = {name: leaf.numel() for name, leaf in state("fid").items()}
    running = sum(size for name, size in sizes.items() if "running" in name)
    assert (len(sizes), running, sum(sizes.values()) - running) == (470, 34432, 21785568)


@pytest.mark.parametrize("metric", ["fid", "clean_fid"])
def test_network(metric):
    x = np.random.default_rng(1).uniform(-1, 1, (2, SMALL, SMALL, 3)).astype(np.float32)
    arrays = {name: tensor.numpy() for name, tensor in state(metric).items()}
    params = from_torch.load(arrays, shapes_of(metric), PUBLISHED[metric].keys)
    module, _ = module_of(metric)
    options = {"xla_backend_optimization_level": 0}
    found = jax.jit(lambda p, x: module.apply({"params": p}, x), compiler_options=options)(params, x)
    with torch.no_grad():
        tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        reference = {t: Inception(state(metric), tensorflow=t).features(tensor).numpy() for t in (False, True)}
    expected, other = reference[metric == "clean_fid"], reference[metric != "clean_fid"]
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-5 * scale
    assert np.abs(other - expected).max() > 1e-2 * scale  # the two networks differ visibly


def test_legacy_input():
    image = np.random.default_rng(2).uniform(0, 255, (64, 44, 3)).astype(np.float32)
    found = fid.legacy_input(image)
    x = F.interpolate(torch.from_numpy(image.transpose(2, 0, 1)[None] / 255), (299, 299), mode="bilinear")[0]
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    x = x * (std / 0.5)[:, None, None] + ((mean - 0.5) / 0.5)[:, None, None]
    np.testing.assert_allclose(found, x.numpy().transpose(1, 2, 0), atol=2e-6)
    large = np.random.default_rng(3).uniform(0, 255, (512, 352, 3)).astype(np.float32)
    y = F.interpolate(torch.from_numpy(large.transpose(2, 0, 1)[None] / 255), (299, 299), mode="bilinear")[0]
    y = y * (std / 0.5)[:, None, None] + ((mean - 0.5) / 0.5)[:, None, None]
    np.testing.assert_allclose(fid.legacy_input(large), y.numpy().transpose(1, 2, 0), atol=3e-5)
    black, white = (fid.legacy_input(np.full((9, 9, 3), v, np.float32)) for v in (0, 255))
    np.testing.assert_allclose(black[0, 0], [-0.030, -0.088, -0.188], atol=1e-6)
    np.testing.assert_allclose(white[0, 0], [0.428, 0.360, 0.262], atol=1e-6)


def test_clean_input():
    """Torch's antialiased bicubic is Pillow's in floating point."""
    image = np.random.default_rng(4).integers(0, 256, (400, 310, 3)).astype(np.float32)
    tensor = torch.from_numpy(image.transpose(2, 0, 1)[None])
    x = F.interpolate(tensor, (299, 299), mode="bicubic", antialias=True, align_corners=False)[0]
    expected = (x.clamp(0, 255) - 128) / 128
    np.testing.assert_allclose(fid.clean_input(image), expected.numpy().transpose(1, 2, 0), atol=6e-5)


def features(seed, count, width=24):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((width, width))
    return (rng.gamma(2.0, 1.0, (count, width)) @ mix + seed).astype(np.float32)


def statistics(rows, batch=7):
    found = fid.Statistics.empty(rows.shape[1])
    for start in range(0, len(rows), batch):
        found.update(rows[start : start + batch])
    return found


def test_streamed_statistics():
    rows = features(0, 100) + 1000.0  # far from zero: a difference of large sums would lose digits
    found = statistics(rows)
    found.update(rows[:0])
    assert found.count == 100
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9)
    with pytest.raises(ValueError, match="2 images"):
        _ = statistics(rows[:1]).covariance


def stop_at(line):
    """A trace that ends the program at that line of Statistics.update."""
    lines = itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code is fid.Statistics.update.__code__ and event == "line" and next(lines) == line:
            raise SystemExit(143)
        return trace

    return trace


def test_an_update_that_is_stopped_has_taken_all_rows_or_none():
    """A signal ends the program at any line, and what the statistics then hold is saved."""
    rows = features(3, 20)
    ends = {len(x): statistics(x, 10) for x in (rows[:10], rows)}
    counts = set()
    for line in range(1, 16):
        found, before = statistics(rows[:10], 10), sys.gettrace()
        sys.settrace(stop_at(line))
        try:
            with contextlib.suppress(SystemExit):
                found.update(rows[10:])
        finally:
            sys.settrace(before)
        counts.add(found.count)
        np.testing.assert_array_equal(found.mean, ends[found.count].mean)
        np.testing.assert_array_equal(found.scatter, ends[found.count].scatter)
    assert counts == {10, 20}


def test_distance():
    a, b = statistics(features(0, 400)), statistics(features(1, 300))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    step = a.mean - b.mean
    expected = step @ step + np.trace(a.covariance + b.covariance - 2 * root)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert expected > 1


def test_distance_of_fewer_images_than_features():
    """Rank-deficient covariances. Of one direction each the distance is known: the difference of the deviations."""
    rows = features(2, 6)
    assert abs(fid.frechet_distance(statistics(rows), statistics(rows[::-1]))) < 1e-9
    line = np.outer(np.linspace(-1, 1, 5), np.eye(24)[3])
    a, b = statistics(line), statistics(3 * line)
    variance = np.var(np.linspace(-1, 1, 5), ddof=1)
    assert fid.frechet_distance(a, b) == pytest.approx(4 * variance, rel=1e-9)
    still = statistics(np.ones((4, 24)))
    assert fid.frechet_distance(still, still) == 0
