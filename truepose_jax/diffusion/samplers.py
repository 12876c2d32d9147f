"""DDIM (eta 0) as one scan. The network is a function of (x, t); guidance happens inside it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from truepose_jax.diffusion.schedule import Schedule

SPACINGS = ("leading", "trailing")

StepCallback = Callable[[Float[Array, "b h w c"], Array], Float[Array, "b h w c"]]
"""(x, abar of its noise level) -> what sampling goes on with."""


def ddim_timesteps(steps: int, *, total: int = 1000, spacing: str = "leading", offset: int = 1) -> np.ndarray:
    """int32 [steps], descending. leading with offset 1 (SD1.5): 35 -> 953, 925 .. 29, 1. trailing: 35 -> 999 .. 28.

    Raises ValueError for a step count outside [1, total] or an unknown spacing.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling wants 1 to {total} steps; got {steps}")
    if spacing == "leading":
        # With steps == total, leading + offset would ask for t = total, which does not exist.
        found = np.arange(steps) * (total // steps) + min(offset, total - 1 - (steps - 1) * (total // steps))
        return found[::-1].astype(np.int32)
    if spacing == "trailing":
        return (np.round(np.arange(total, 0, -total / steps))[:steps] - 1).astype(np.int32)
    raise ValueError(f"sampling spacing is {spacing!r}; choose one of {SPACINGS}")


def ddim_sample(
    predict: Callable[[Float[Array, "b h w c"], Array], Float[Array, "b h w c"]],
    noise: Float[Array, "b h w c"],
    schedule: Schedule,
    *,
    steps: int,
    spacing: str = "leading",
    step_callback: StepCallback | None = None,
) -> Float[Array, "b h w c"]:
    """Deterministic DDIM from `noise` to z_0. predict(x_t, t [b]) -> network output.

    step_callback: replaces every x_t on the way, the noise it begins with and the result included (sampling/inpainting.py).
    """
    timesteps, abars = ddim_levels(schedule, steps=steps, spacing=spacing)

    def step(x, now):
        t, abar_next = now
        x = ddim_step(x, predict(x, _everywhere(t, x)), t, abar_next, schedule)
        return x if step_callback is None else step_callback(x, abar_next), None

    start = noise if step_callback is None else step_callback(noise, jnp.asarray(abars[0]))
    x, _ = jax.lax.scan(step, start, (jnp.asarray(timesteps), jnp.asarray(abars[1:])))
    return x


def ddim_levels(schedule: Schedule, *, steps: int, spacing: str) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps int32 [steps], abar float32 [steps + 1] of every x on the way).

    Each step goes to the next timestep of the list; the last one to abar[0], not to 1 (SD1.5's
    set_alpha_to_one = false, docs/paper.md 6).
    """
    timesteps = ddim_timesteps(steps, total=schedule.steps, spacing=spacing)
    abar = schedule.alphas_cumprod
    return timesteps, np.append(abar[timesteps], abar[0]).astype(np.float32)


def ddim_step(
    x: Float[Array, "b h w c"], output: Float[Array, "b h w c"], t: Array, abar_next: Array, schedule: Schedule
) -> Float[Array, "b h w c"]:
    """One step from x at timestep t (one number) to the noise level abar_next. output: the network's."""
    x0, eps = schedule.split(x, output, _everywhere(t, x))
    return jnp.sqrt(abar_next) * x0 + jnp.sqrt(1.0 - abar_next) * eps


def _everywhere(t: Array, x: Float[Array, "b h w c"]) -> Int[Array, " b"]:
    return jnp.full((x.shape[0],), t, jnp.int32)
