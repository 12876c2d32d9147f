"""The training recipe that the papers share, against diffusers' functions: zero terminal SNR, min-SNR weights, noise offset."""

import jax
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from tests import tiny
from truepose_jax.config import DiffusionConfig, OptimConfig
from truepose_jax.diffusion import losses
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.methods.denoising import noised, without_invalid
from truepose_jax.training.optim import learning_rate


def scheduler(**changes) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes)


def test_zero_terminal_snr():
    ours = Schedule(zero_snr=True, prediction="v")
    theirs = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").alphas_cumprod.numpy()
    # diffusers goes through betas in float32, and keeps the last abar from being 0.
    np.testing.assert_allclose(ours.alphas_cumprod[:-1], theirs[:-1], atol=2e-6)
    assert ours.alphas_cumprod[-1] == 0 and ours.alphas_cumprod[0] == Schedule().alphas_cumprod[0]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights(prediction):
    schedule, t = Schedule(prediction=prediction), np.arange(1000)
    snr = compute_snr(scheduler(), torch.arange(1000)).numpy().astype(np.float64)
    snr = snr + 1 if prediction == "v" else snr
    want = np.minimum(snr, 5.0) / snr
    np.testing.assert_allclose(losses.min_snr_weights(schedule, t, 5.0), want, rtol=2e-4)
    x0 = Schedule(prediction="x0")
    np.testing.assert_allclose(losses.min_snr_weights(x0, t, 5.0), np.minimum(x0.snr(t), 5.0))
    assert losses.min_snr_weights(Schedule(prediction="v", zero_snr=True), np.array([999]), 5.0) == 1.0


def test_noise_with_an_offset_is_what_the_network_is_asked_for():
    """The same noise in every pixel of a channel, in the latents and in what is predicted; from each row's own key."""
    x0, keys = np.zeros((3, 4, 4, 2), np.float32), tiny.keys(1, 3)
    plain, shifted = (noised(DiffusionConfig(noise_offset=offset), x0, keys) for offset in (0.0, 0.5))
    np.testing.assert_array_equal(plain.t, shifted.t)
    shift = np.asarray(shifted.target - plain.target)
    assert np.ptp(shift, axis=(1, 2)).max() < 1e-6 and np.ptp(shift[:, 0, 0]) > 0.1
    _, noise = Schedule().signal_and_noise(plain.t)
    np.testing.assert_allclose(shifted.x_t - plain.x_t, noise * shift, atol=1e-6)
    many = noised(DiffusionConfig(noise_offset=0.5), np.zeros((400, 1, 1, 50), np.float32), tiny.keys(2, 400))
    assert abs(np.std(many.target) - np.sqrt(1 + 0.5**2)) < 0.02
    weighed = noised(DiffusionConfig(min_snr=5.0), x0, keys)
    want = losses.squared_error(x0, weighed.target) * losses.min_snr_weights(Schedule(), weighed.t, 5.0)
    np.testing.assert_allclose(weighed.errors(x0), want)


def test_rows_that_are_not_there_become_zero():
    batch = {"valid": np.array([1, 0, 0, 0], np.float32), "source": np.full((2, 3), np.nan), "target": np.ones((4, 2))}
    found = jax.device_get(without_invalid({name: jax.numpy.asarray(x) for name, x in batch.items()}))
    assert np.isnan(found["source"][0]).all() and not found["source"][1].any()
    np.testing.assert_array_equal(found["target"].sum(1), [2, 0, 0, 0])


def test_the_rate_that_falls_at_once():
    """FPDM's: a tenth from 55 of 100 epochs on, after a warm-up."""
    config = OptimConfig(learning_rate=1e-4, warmup_steps=4, schedule="step", flat=0.55, final=0.1)
    for total in (100, np.int32(100)):
        rate = learning_rate(config, total if isinstance(total, int) else jax.numpy.asarray(total))
        np.testing.assert_allclose([rate(step) for step in (4, 54)], 1e-4, rtol=1e-6)
        np.testing.assert_allclose([rate(step) for step in (55, 99)], 1e-5, rtol=1e-6)
        assert rate(0) < 5e-5
