"""Samplers as one scan: DDIM (eta 0), DDPM, DPM-Solver++ 2M and UniPC. The network is a function of (x, t); guidance happens
inside it.

DDPM (Ho et al. 2020, equations 6 and 7) draws from the posterior between two timesteps of the list, with its variance
("fixed_small"): step i with noise of (row's key, i), the last step, to abar = 1, with none.

The last two are linear in x and in the predictions of x_0 at this step and at those before, so that a step is one row of a
table made beforehand in float64. Both take lambda = log(sqrt(abar) / sqrt(1 - abar)) as time, start with a step of first order,
go on with the second, and end with one of first order at abar = 1: what diffusers' DPMSolverMultistepScheduler and
UniPCMultistepScheduler do as they stand (docs/paper.md 6).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from truepose_jax.diffusion.schedule import Schedule

SAMPLERS = {"ddim": 0, "ddpm": 0, "dpmpp_2m": 1, "unipc": 2}
"""Name -> to how many former steps it looks back."""
SPACINGS = ("leading", "trailing")

Predict = Callable[[Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, "b h w c"]]
"""(x_t, t) -> network output."""

StepCallback = Callable[[Float[Array, "b h w c"], Array], Float[Array, "b h w c"]]
"""(x, abar of its noise level) -> what sampling goes on with."""


class State(NamedTuple):
    """Of a sampler between two steps. x: at the noise level of the next. For samplers that look back: last, the x that the step
    before started from, and former, the x_0 predicted at the steps before, newest first (0 where there was none). keys [b]: of
    the noise that DDPM adds."""

    x: Float[Array, "b h w c"]
    last: tuple[Float[Array, "b h w c"], ...] = ()
    former: tuple[Float[Array, "b h w c"], ...] = ()
    keys: Array | None = None


def ddim_timesteps(steps: int, *, total: int = 1000, spacing: str = "leading") -> np.ndarray:
    """int32 [steps], descending. leading with offset 1 (SD1.5): 35 -> 953, 925 .. 29, 1. trailing: 35 -> 999 .. 28.

    Raises ValueError for a step count outside [1, total] or an unknown spacing.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling wants 1 to {total} steps; got {steps}")
    if spacing == "leading":
        # With steps == total, leading + offset would ask for t = total, which does not exist.
        found = np.arange(steps) * (total // steps) + min(1, total - 1 - (steps - 1) * (total // steps))
        return found[::-1].astype(np.int32)
    if spacing == "trailing":
        return (np.round(np.arange(total, 0, -total / steps))[:steps] - 1).astype(np.int32)
    raise ValueError(f"sampling spacing is {spacing!r}; choose one of {SPACINGS}")


def multistep_timesteps(steps: int, *, total: int = 1000, spacing: str = "leading") -> np.ndarray:
    """The same for DPM-Solver++ and UniPC, whose leading steps are those of one step more without the last: 35 -> 946 .. 28.

    Raises ValueError as ddim_timesteps.
    """
    if spacing != "leading" or not 1 <= steps <= total:
        return ddim_timesteps(steps, total=total, spacing=spacing)
    ratio = max(total // (steps + 1), 1)
    return (np.arange(steps, 0, -1) * ratio + min(1, total - 1 - steps * ratio)).astype(np.int32)


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


@dataclasses.dataclass(frozen=True)
class Solver:
    """One of SAMPLERS on a schedule, `steps` steps long. Raises ValueError for another."""

    schedule: Schedule
    sampler: str
    steps: int
    spacing: str

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; choose one of {tuple(SAMPLERS)}")

    @functools.cached_property
    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """(timesteps int32 [steps], abar float32 [steps + 1] of every x on the way)."""
        if self.sampler == "ddim":
            return ddim_levels(self.schedule, steps=self.steps, spacing=self.spacing)
        listed = ddim_timesteps if self.sampler == "ddpm" else multistep_timesteps
        timesteps = listed(self.steps, total=self.schedule.steps, spacing=self.spacing)
        return timesteps, np.append(self.schedule.alphas_cumprod[timesteps], np.float32(1.0))

    def begin(
        self, noise: Float[Array, "b h w c"], step_callback: StepCallback | None = None, keys: Array | None = None
    ) -> State:
        """Before the first step. keys [b]: one per row, which DDPM alone reads."""
        x = noise if step_callback is None else step_callback(noise, jnp.asarray(self.levels[1][0]))
        looks_back = SAMPLERS[self.sampler]
        keys = keys if self.sampler == "ddpm" else None
        return State(x, (x,) * (looks_back > 1), (jnp.zeros_like(x),) * looks_back, keys)

    def advance(
        self,
        predict: Predict,
        state: State,
        start: int | Array,
        stop: int | Array,
        step_callback: StepCallback | None = None,
    ) -> State:
        """Steps start to stop - 1 (of 0 to steps). The bounds may be traced: one program then serves every part of the way."""
        timesteps, abars = (jnp.asarray(values) for values in self.levels)
        predictor, corrector = (None if rows is None else jnp.asarray(rows) for rows in self._tables)

        def step(i, state: State) -> State:
            t, abar_next = timesteps[i], abars[i + 1]
            x, output = state.x, predict(state.x, _everywhere(timesteps[i], state.x))
            if predictor is None:
                after = State(ddim_step(x, output, t, abar_next, self.schedule))
            elif self.sampler == "ddpm":
                x0, _ = self.schedule.split(x, output, _everywhere(t, x))
                drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))
                after = state._replace(x=_combined(predictor[i], (x, x0, drawn(state.keys))))
            else:
                x0, _ = self.schedule.split(x, output, _everywhere(t, x))
                if corrector is not None:
                    x = _combined(corrector[i], (x, *state.last, x0, *state.former))
                    x = x if step_callback is None else step_callback(x, abars[i])
                former = (x0, *state.former)
                after = State(_combined(predictor[i], (x, *former[:2])), (x,) * len(state.last), former[:-1])
            return after if step_callback is None else after._replace(x=step_callback(after.x, abar_next))

        return jax.lax.fori_loop(start, stop, step, state)

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Factors, float32, of (x, x_0, the x_0 before; of DDPM the noise) for the next x [steps 3], and of (x, the last x, x_0,
        the two before) for x itself [steps 5], where a sampler has them.

        The first is DPM-Solver++'s 2M (Lu et al. 2022, algorithm 2), which UniP-2 with B2(h) equals; the second is UniC-2 with
        B2(h) (Zhao et al. 2023, equations 9 and 12), at the second step UniC-1.
        """
        if self.sampler == "ddim":
            return None, None
        abar = self.levels[1].astype(np.float64)
        if self.sampler == "ddpm":
            alpha, left = abar[:-1] / abar[1:], (1.0 - abar[1:]) / (1.0 - abar[:-1])
            rows = [np.sqrt(alpha) * left, np.sqrt(abar[1:]) * (1.0 - alpha) / (1.0 - abar[:-1])]
            return np.stack([*rows, np.sqrt(left * (1.0 - alpha))], axis=1).astype(np.float32), None
        signal, noise = np.sqrt(abar), np.sqrt(1.0 - abar)
        with np.errstate(divide="ignore"):
            time = np.log(signal) - np.log(noise)  # infinite at the end
        widths = np.diff(time)
        gains = -signal[1:] * np.expm1(-widths)
        predictor = np.stack([noise[1:] / noise[:-1], gains, 0 * gains], axis=1)
        half = np.zeros(self.steps)
        half[1:-1] = 0.5 * gains[1:-1] * widths[1:-1] / widths[:-2]
        predictor[:, 1] += half
        predictor[:, 2] -= half
        if self.sampler == "dpmpp_2m":
            return predictor.astype(np.float32), None
        corrector = np.zeros((self.steps, 5))
        corrector[0, 0] = 1.0
        for i in range(1, self.steps):
            width, gain = widths[i - 1], gains[i - 1]
            new, old = 0.5, 0.0
            if i > 1:
                ratio = -widths[i - 2] / width
                first = (np.expm1(-width) / -width - 1.0) / np.expm1(-width)
                second = 2.0 * ((np.expm1(-width) / -width - 1.0) / -width - 0.5) / np.expm1(-width)
                old, new = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [first, second])
                old /= ratio
            corrector[i, 1:] = noise[i] / noise[i - 1], gain * new, gain * (1.0 - new - old), gain * old
        return predictor.astype(np.float32), corrector.astype(np.float32)


def sample_latents(
    predict: Predict,
    noise: Float[Array, "b h w c"],
    schedule: Schedule,
    *,
    steps: int,
    spacing: str = "leading",
    sampler: str = "ddim",
    step_callback: StepCallback | None = None,
    keys: Array | None = None,
) -> Float[Array, "b h w c"]:
    """From `noise` to z_0. predict(x_t, t [b]) -> network output. keys [b]: for DDPM.

    step_callback: replaces every x_t on the way, the noise it begins with and the result included (sampling/inpainting.py).
    """
    solver = Solver(schedule, sampler, steps, spacing)
    return solver.advance(predict, solver.begin(noise, step_callback, keys), 0, steps, step_callback).x


def _combined(factors: Float[Array, " n"], arrays: tuple[Array, ...]) -> Array:
    return sum(factor * array for factor, array in zip(factors, arrays, strict=True))


def _everywhere(t: Array, x: Float[Array, "b h w c"]) -> Int[Array, " b"]:
    return jnp.full((x.shape[0],), t, jnp.int32)
