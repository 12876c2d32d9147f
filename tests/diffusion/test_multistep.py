"""DPM-Solver++ 2M and UniPC: against diffusers' schedulers, and against an ODE whose solution is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tests.diffusion.test_diffusion import SD15, SHAPE, normal
from truepose_jax.config import DiffusionConfig, EvalConfig, from_config_dict, to_dict
from truepose_jax.diffusion.guidance import inside_interval
from truepose_jax.diffusion.samplers import SAMPLERS, Solver, multistep_timesteps, sample_latents
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.pretrained.conversion.export_configs import scheduler_config
from truepose_jax.runtime import choices

PEERS = {"dpmpp_2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
WEIGHT = normal(7, SHAPE[-1], SHAPE[-1]) / SHAPE[-1]


def peer_of(sampler, schedule, steps, spacing):
    """diffusers' scheduler, from what an export of ours says of its DDIM."""
    peer = PEERS[sampler].from_config(scheduler_config(DiffusionConfig(schedule=schedule, spacing=spacing)))
    peer.set_timesteps(steps)
    return peer


def trajectory_of_diffusers(peer):
    x, weight = torch.from_numpy(normal(8, *SHAPE)).double(), torch.from_numpy(WEIGHT).double()
    for t in peer.timesteps:
        x = peer.step(torch.tanh(x @ weight) + float(t) / 1000, t, x).prev_sample
    return x.numpy()


def network(x, t):
    """Mixes channels, knows the time, and is not linear."""
    return jnp.tanh(x @ WEIGHT) + t[:, None, None, None] / 1000


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", PEERS)
def test_latents_equal_diffusers(sampler, prediction, spacing):
    """SD1.5's betas and the demo's; 1 and 2 steps too, which have no step of second order, and 17, whose last is not the first
    of fifteen."""
    for betas, counts in (("scaled_linear", (1, 2, 10)), ("cosine", (4, 17))):
        schedule = dataclasses.replace(SD15, betas=betas, prediction=prediction)
        for steps in counts:
            got = sample_latents(network, normal(8, *SHAPE), schedule, steps=steps, spacing=spacing, sampler=sampler)
            want = trajectory_of_diffusers(peer_of(sampler, schedule, steps, spacing))
            assert np.abs(got - want).max() / np.abs(want).max() < 1e-4, (betas, steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps(spacing):
    for steps in (1, 4, 7, 35, 250):
        wanted = peer_of("dpmpp_2m", SD15, steps, spacing).timesteps.tolist()
        assert multistep_timesteps(steps, spacing=spacing).tolist() == wanted
        assert peer_of("unipc", SD15, steps, spacing).timesteps.tolist() == wanted
    for steps in (499, 500, 998, 999, 1000):  # where diffusers asks for t = 1000, or for the same t again
        found = multistep_timesteps(steps, spacing=spacing)
        assert len(found) == steps and found[0] <= 999 and found[-1] >= 0 and np.all(np.diff(found) < 0)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000 steps"):
            multistep_timesteps(steps, spacing=spacing)


def test_names():
    assert set(choices.SAMPLERS) == set(SAMPLERS) == {"ddim", "ddpm", *PEERS}
    for config in (DiffusionConfig, EvalConfig):
        for name in SAMPLERS:
            assert from_config_dict(config, to_dict(config()) | {"sampler": name}).sampler == name
    with pytest.raises(ValueError, match="euler"):
        Solver(SD15, "euler", 5, "leading")


def test_nearer_the_solution_than_ddim():
    """Data N(0, 0.5^2): the best x0 prediction is linear in x_t, and a sample keeps its quantile, so the way from x_T is known.
    Compared before the last step, which is of first order in all of them."""
    schedule, spread = Schedule(prediction="x0"), 0.5

    def best(x, t):
        abar = jnp.asarray(schedule.alphas_cumprod)[t[0]]
        return jnp.sqrt(abar) * spread**2 * x / (abar * spread**2 + 1 - abar)

    def error(sampler, steps):
        solver = Solver(schedule, sampler, steps, "trailing")
        abars = solver.levels[1].astype(np.float64)
        first, last = np.sqrt(abars * spread**2 + 1 - abars)[[0, -2]]
        found = solver.advance(best, solver.begin(jnp.asarray(normal(9, *SHAPE))), 0, steps - 1)
        return np.abs(found.x - normal(9, *SHAPE) * last / first).max()

    for steps in (10, 20, 40):
        assert all(error(sampler, steps) < error("ddim", steps) / 5 for sampler in PEERS), steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_way_in_parts_is_the_same_way(sampler):
    """With traced bounds: one program for all parts."""
    solver = Solver(SD15, sampler, 7, "leading")
    part = jax.jit(lambda state, start, stop: solver.advance(network, state, start, stop))
    keys = jax.random.split(jax.random.key(1), SHAPE[0])
    state = solver.begin(jnp.asarray(normal(8, *SHAPE)), keys=keys)
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, 7)):
        state = part(state, start, stop)
    whole = jax.jit(lambda x: sample_latents(network, x, SD15, steps=7, sampler=sampler, keys=keys))
    at_once = whole(normal(8, *SHAPE))
    np.testing.assert_array_equal(state.x, at_once)
    assert part._cache_size() == 1


@pytest.mark.parametrize("sampler", PEERS)
def test_the_step_callback_has_the_last_word(sampler):
    """On every x that the network sees or that leaves, at its own noise level; UniPC's corrected one too."""
    noise, reference = normal(1, *SHAPE), normal(2, *SHAPE)
    solver = Solver(SD15, sampler, 5, "trailing")
    seen = []

    def predict(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), int(t))), x, t[0], ordered=True)
        return jnp.full_like(x, 0.25)

    def put(x, abar):
        return jnp.sqrt(abar) * reference + jnp.sqrt(1 - abar) * noise

    found = sample_latents(predict, noise, SD15, steps=5, spacing="trailing", sampler=sampler, step_callback=put)
    jax.effects_barrier()
    for (x, t), timestep in zip(seen, solver.levels[0], strict=True):
        assert t == timestep
        np.testing.assert_allclose(x, SD15.add_noise(reference, noise, np.full(SHAPE[0], t)), atol=2e-6)
    np.testing.assert_allclose(found, reference, atol=1e-6)  # abar = 1


def test_guidance_interval():
    """Ends included; of the two branches one runs."""
    ran = []

    def branch(name, value):
        def denoise(x, t):
            jax.debug.callback(lambda: ran.append(name))
            return x * value

        return denoise

    predict = jax.jit(inside_interval(branch("guided", 2.0), branch("alone", 1.0), 200, 800))
    x = normal(3, *SHAPE)
    for t, name, factor in (
        (199, "alone", 1),
        (200, "guided", 2),
        (500, "guided", 2),
        (800, "guided", 2),
        (801, "alone", 1),
    ):
        ran.clear()
        np.testing.assert_allclose(predict(x, jnp.full(SHAPE[0], t)), factor * x, rtol=1e-6)
        jax.effects_barrier()
        assert ran == [name], t
