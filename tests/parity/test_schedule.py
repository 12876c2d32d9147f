"""Every value of the schedules and every single step of DDIM against diffusers' DDIMScheduler with SD1.5's configuration.

tests/diffusion/test_diffusion.py compares timesteps and the rest of diffusion/.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tests.diffusion.test_diffusion import SD15, SD15_SCHEDULER
from tests.parity.compare import difference, normal
from truepose_jax.config import DiffusionConfig
from truepose_jax.diffusion.samplers import sample_latents
from truepose_jax.pretrained.conversion.export_configs import scheduler_config

SHAPE = (2, 3, 4, 5)
STEP = 2e-5
"""max|difference| / max|reference| of one step from the same x_t. Measured: 4.4e-6 (x0, where eps is divided by a
rounded sqrt(1 - abar)), others 6.8e-7."""

NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
DIVISORS = (1, 2, 4, 8, 20, 25, 40, 50, 125)
"""Of 1000 (docs/paper.md 6)."""


def test_scheduler_config_is_that_of_sd15():
    """What an export of the paper's configuration says is what SD1.5's own scheduler_config.json says."""
    paper = DiffusionConfig(SD15, timestep_power=1.0, drop_rate=0.3, steps=35, spacing="leading", guidance=3.5)
    assert scheduler_config(paper).items() >= SD15_SCHEDULER.items()


@pytest.mark.parametrize(
    "betas,theirs", [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_every_value_of_the_schedule(betas, theirs):
    """abar_t of all 1000 t, with diffusers' betas multiplied in double (in float32 it is 1e-6 off, or 2e-5 where
    1 - beta is 0.001), then sqrt(abar) and sqrt(1 - abar) as add_noise uses them."""
    scheduler = DDIMScheduler(**SD15_SCHEDULER | {"beta_schedule": theirs})
    ours = dataclasses.replace(SD15, betas=betas)
    exact = torch.cumprod(1 - scheduler.betas.double(), dim=0).numpy()
    np.testing.assert_allclose(ours.alphas_cumprod[:-1], exact[:-1], rtol=1e-6)
    np.testing.assert_allclose(ours.alphas_cumprod[-1], exact[-1], rtol=1e-6 if betas != "cosine" else 2e-5)
    every = np.arange(1000)
    signal, noise = ours.signal_and_noise(every)
    ones, zeros = torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)
    np.testing.assert_allclose(signal, scheduler.add_noise(ones, zeros, torch.from_numpy(every)), atol=5e-7)
    # At small t the rounding of abar (6e-8) is divided by twice sqrt(1 - abar), 0.006 and up.
    np.testing.assert_allclose(noise, scheduler.add_noise(zeros, ones, torch.from_numpy(every)), atol=1e-5)


def steps_of_ours(schedule, steps, spacing):
    """[(x_t, t, the network's output, x of the next step)] of every step, for a fixed network that mixes channels and
    knows the time."""
    weight = normal(7, SHAPE[-1], SHAPE[-1]) / SHAPE[-1]
    seen = []

    def predict(x, t):
        output = jnp.tanh(x @ weight) + t[:, None, None, None] / 1000
        jax.debug.callback(lambda *arrays: seen.append([np.array(a) for a in arrays]), x, t[0], output, ordered=True)
        return output

    last = sample_latents(predict, normal(8, *SHAPE), schedule, steps=steps, spacing=spacing)
    jax.effects_barrier()
    following = [x for x, *_ in seen[1:]] + [np.asarray(last)]
    return [(x, int(t), output, after) for (x, t, output), after in zip(seen, following, strict=True)]


def check_steps(schedule, steps, spacing):
    scheduler = DDIMScheduler(
        **SD15_SCHEDULER
        | {
            "prediction_type": NAMES[schedule.prediction],
            "timestep_spacing": spacing,
            "clip_sample": schedule.clip_x0 > 0,
            "clip_sample_range": schedule.clip_x0 or 1.0,
        }
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    found = steps_of_ours(schedule, steps, spacing)
    assert [t for _, t, *_ in found] == scheduler.timesteps.tolist()
    worst = 0.0
    for x, t, output, after in found:
        expected = scheduler.step(
            torch.from_numpy(output).double(),
            t,
            torch.from_numpy(x).double(),
            use_clipped_model_output=schedule.clip_x0 > 0,  # eps follows x0
        )
        worst = max(worst, difference(after, expected.prev_sample.numpy()))
    print(f"\nparity DDIM {schedule.prediction} {spacing} {steps}: {worst:.1e}")
    assert worst < STEP


@pytest.mark.parametrize("clip_x0", [0.0, 1.0])
@pytest.mark.parametrize("prediction", NAMES)
def test_each_of_35_leading_steps(prediction, clip_x0):
    check_steps(dataclasses.replace(SD15, prediction=prediction, clip_x0=clip_x0), 35, "leading")


@pytest.mark.parametrize("steps", DIVISORS)
def test_trailing_where_the_step_count_divides_1000(steps):
    check_steps(dataclasses.replace(SD15, prediction="v"), steps, "trailing")
