"""Timesteps, predictions and losses, and what DDIM does; tests/parity/test_schedule.py compares every value and step."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from truepose_jax.diffusion import losses
from truepose_jax.diffusion.guidance import Branches, guided, two_branches
from truepose_jax.diffusion.samplers import ddim_timesteps
from truepose_jax.diffusion.schedule import PREDICTIONS, Schedule

SD15 = Schedule()
SD15_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
SHAPE = (2, 3, 4, 5)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 35, 50, 250, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_equal_diffusers(steps, spacing):
    scheduler = DDIMScheduler(**SD15_SCHEDULER | {"timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(ddim_timesteps(steps, spacing=spacing), scheduler.timesteps.numpy())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_valid_for_every_count(spacing):
    for steps in range(1, 1001):
        found = ddim_timesteps(steps, spacing=spacing)
        assert len(found) == steps
        assert found[0] <= 999 and found[-1] >= 0 and np.all(np.diff(found) < 0), steps


@pytest.mark.parametrize("steps,spacing", [(0, "leading"), (1001, "leading"), (10, "linspace")])
def test_timesteps_refuse(steps, spacing):
    with pytest.raises(ValueError, match="sampling"):
        ddim_timesteps(steps, spacing=spacing)


@pytest.mark.parametrize("fields", [{"betas": "sqrt"}, {"prediction": "score"}])
def test_schedule_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Schedule(**fields)


def test_add_noise_and_v_equal_diffusers():
    x0, eps, t = normal(0, 4, 3, 2, 5), normal(1, 4, 3, 2, 5), np.array([0, 17, 500, 999])
    scheduler = DDIMScheduler(**SD15_SCHEDULER)
    a, b, index = torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(t)
    np.testing.assert_allclose(SD15.add_noise(x0, eps, t), scheduler.add_noise(a, b, index), atol=2e-5)
    v = dataclasses.replace(SD15, prediction="v").regression_target(x0, eps, t)
    np.testing.assert_allclose(v, scheduler.get_velocity(a, b, index), atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_split_undoes_add_noise(prediction):
    """A perfect network gives back x0 and eps, at both ends of the schedule."""
    schedule = dataclasses.replace(SD15, prediction=prediction)
    x0, eps, t = normal(2, 5, 3, 2, 4), normal(3, 5, 3, 2, 4), np.array([0, 1, 400, 953, 999])
    output = schedule.regression_target(x0, eps, t)
    got_x0, got_eps = schedule.split(schedule.add_noise(x0, eps, t), output, t)
    np.testing.assert_allclose(got_x0, x0, atol=2e-5)
    np.testing.assert_allclose(got_eps, eps, atol=1e-4)  # x0: at t = 0 the noise is 3 % of x_t


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipped_x0_keeps_x_t(prediction):
    """clip_x0 bounds x0, and eps follows so that both still make x_t."""
    schedule = dataclasses.replace(SD15, prediction=prediction, clip_x0=1.0)
    x_t, output, t = normal(4, 3, 2, 2, 4), normal(5, 3, 2, 2, 4), np.array([10, 500, 990])
    x0, eps = schedule.split(x_t, output, t)
    assert np.abs(x0).max() == 1.0
    np.testing.assert_allclose(schedule.add_noise(x0, eps, t), x_t, atol=1e-4)


def test_guidance():
    """Eq. 11 and FPDM's three branches; what has no weight is not run."""
    null, some, both = (normal(seed, *SHAPE) for seed in range(3))
    calls = []

    def branch(name, value):
        return lambda: calls.append(name) or value

    def run(scale, *weights):
        calls.clear()
        branches = two_branches(branch("both", both), branch("null", null), scale) if not weights else Branches(
            branch("null", null), ((weights[0], branch("some", some)), (weights[1], branch("both", both)))
        )  # fmt: skip
        return guided(*branches)

    np.testing.assert_array_equal(run(1.0), both)
    assert calls == ["both"]
    np.testing.assert_array_equal(run(3.5), null + np.float32(3.5) * (both - null))
    assert calls == ["null", "both"]
    np.testing.assert_array_equal(run(0.0), null)
    assert calls == ["null"]
    # u + w_s (p - u) + w_f (f - p): with equal scales the middle branch has weight 0.
    want = null + 3.0 * (some - null) + 2.0 * (both - some)
    np.testing.assert_allclose(run(None, 3.0 - 2.0, 2.0), want, rtol=1e-5, atol=1e-5)
    assert calls == ["null", "some", "both"]
    np.testing.assert_array_equal(run(None, 0.0, 2.0), null + np.float32(2.0) * (both - null))
    assert calls == ["null", "both"]


def test_timesteps_of_training():
    u = np.linspace(0, 1, 100_001, dtype=np.float32)[:-1]
    uniform = np.asarray(losses.timesteps(u, 1000))
    np.testing.assert_allclose(np.bincount(uniform, minlength=1000), 100, atol=2)
    assert losses.timesteps(np.float32([1.0]), 1000)[0] == 999
    assert np.mean(losses.timesteps(u, 1000, power=0.5)) == pytest.approx(1000 * 2 / 3, abs=1)


def test_weighted_mean_and_bins():
    values, weights = np.array([1.0, 4.0, np.nan, 2.0], np.float32), np.array([1, 1, 0, 1], np.float32)
    assert losses.weighted_mean(values, weights) == pytest.approx(7 / 3)
    assert losses.weighted_mean(values, 0 * weights) == 0
    grad = jax.grad(losses.weighted_mean)(values, weights)
    np.testing.assert_allclose(grad, weights / 3)
    sums, counts = losses.timestep_bins(values, weights, np.array([0, 99, 500, 999]), 1000)
    np.testing.assert_allclose(sums, [5, *[0] * 8, 2])
    np.testing.assert_allclose(counts, [2, *[0] * 8, 1])


def test_charbonnier():
    """Of pixels and of their differences along x and y, by loops; about the absolute errors, and 0.03 where there are none."""
    a, b = normal(0, 2, 5, 4, 3), normal(1, 2, 5, 4, 3)
    charbonnier = jax.jit(losses.charbonnier)
    for smooth in (0.01, 0.5):
        for i in range(2):
            d = (a[i] - b[i]).astype(np.float64)
            smoothed = lambda x, smooth=smooth: (x**2 + smooth**2) ** 0.5  # noqa: E731
            cells = [(y, x, c) for y in range(5) for x in range(4) for c in range(3)]
            pixels = [smoothed(d[y, x, c]) for y, x, c in cells]
            along_x = [smoothed(d[y, x, c] - d[y, x - 1, c]) for y, x, c in cells if x]
            along_y = [smoothed(d[y, x, c] - d[y - 1, x, c]) for y, x, c in cells if y]
            wanted = np.mean(pixels) + np.mean(along_x) + np.mean(along_y)
            assert charbonnier(a, b, smooth=smooth)[i] == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(charbonnier(a, a), 0.03, rtol=1e-6)
    np.testing.assert_allclose(charbonnier(a + 1, a), 1.02, rtol=1e-3)
    assert not np.any(jax.jit(jax.grad(lambda x: losses.charbonnier(x, a).sum()))(a)), "a finite gradient where they are equal"


def test_squared_error():
    a, b = normal(0, *SHAPE), normal(1, *SHAPE)
    np.testing.assert_allclose(losses.squared_error(a, b), ((a - b) ** 2).mean(axis=(1, 2, 3)), rtol=1e-6)
