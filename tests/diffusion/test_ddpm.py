"""DDPM against diffusers' DDPMScheduler (fixed_small) with the same noise, and what the noise hangs on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import DDPMScheduler  # noqa: E402
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from tests.parity.compare import difference, normal  # noqa: E402
from truepose_jax.config import ConfigError, DiffusionConfig  # noqa: E402
from truepose_jax.diffusion.samplers import sample_latents  # noqa: E402
from truepose_jax.diffusion.schedule import Schedule  # noqa: E402

SHAPE = (3, 3, 4, 5)
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
WEIGHT = normal(7, SHAPE[-1], SHAPE[-1]) / SHAPE[-1]


def network(x, t):
    return jnp.tanh(x @ WEIGHT) + t[:, None, None, None] / 1000


def keys(rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), rows)


CASES = {
    "leading": (Schedule(), "leading", 20),
    "v": (Schedule(prediction="v"), "trailing", 7),
    "clipped": (Schedule(prediction="x0", clip_x0=1.0), "leading", 10),
    "zero SNR": (Schedule(prediction="v", zero_snr=True), "trailing", 20),
}


@pytest.mark.parametrize("case", CASES)
def test_against_diffusers(case, monkeypatch):
    schedule, spacing, steps = CASES[case]
    theirs = DDPMScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule="scaled_linear", variance_type="fixed_small",
        prediction_type=NAMES[schedule.prediction], timestep_spacing=spacing, steps_offset=1,
        clip_sample=schedule.clip_x0 > 0, clip_sample_range=schedule.clip_x0 or 1.0,
    )  # fmt: skip
    # Theirs goes through betas in float32 and keeps the last abar from being 0; see tests/parity/test_recipe.py.
    theirs.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.astype(np.float64))
    theirs.set_timesteps(steps)
    if spacing == "leading":
        assert theirs.timesteps.tolist()[-2:] == [1000 // steps + 1, 1]
    x = torch.from_numpy(normal(8, *SHAPE)).double()
    for i, t in enumerate(theirs.timesteps.tolist()):
        noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:]) for key in keys(SHAPE[0])])
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, noise=noise, **__: torch.from_numpy(noise).double()
        )
        output = torch.tanh(x @ torch.from_numpy(WEIGHT).double()) + t / 1000
        x = theirs.step(output, t, x).prev_sample
    ours = jax.jit(
        lambda noise: sample_latents(
            network, noise, schedule, steps=steps, spacing=spacing, sampler="ddpm", keys=keys(SHAPE[0])
        )
    )(normal(8, *SHAPE))
    found = difference(ours, x.numpy())
    print(f"\nparity DDPM {case} {steps}: {found:.1e}")
    assert found < 1e-5


def test_a_rows_noise_is_its_own():
    """Of its key alone: the rest of the batch and its order change nothing, another key does."""
    call = jax.jit(lambda x, k: sample_latents(network, x, Schedule(), steps=4, sampler="ddpm", keys=k))
    x, own = normal(8, *SHAPE), keys(3)
    whole, order = call(x, own), np.array([2, 0, 1])
    np.testing.assert_allclose(call(x[order], own[order]), whole[order], atol=1e-5)
    other = call(x, own[order])
    assert np.all(np.abs(other - whole).max(axis=(1, 2, 3)) > 0.1)


def test_zero_snr_takes_no_sampler_of_log_snr():
    zero = Schedule(prediction="v", zero_snr=True)
    assert dataclasses.replace(DiffusionConfig(), schedule=zero, spacing="trailing", sampler="ddpm").sampler == "ddpm"
    with pytest.raises(ConfigError, match="needs 'ddim' or 'ddpm'"):
        dataclasses.replace(DiffusionConfig(), schedule=zero, spacing="trailing", sampler="unipc")
