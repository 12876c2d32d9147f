"""Sampling: everything that does not depend on t once, then the guided sampler, all inside one jit; or, where somebody wants
to hear of the progress, in three: before, some steps, after."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.diffusion.guidance import EVERYWHERE, Denoise, guided_denoise, inside_interval
from truepose_jax.diffusion.samplers import Solver, State, StepCallback
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.methods.base import Batch, Denoiser, Frozen, Params
from truepose_jax.runtime.choices import SAMPLERS

Progress = Callable[[int, int], None]
"""(steps that are done, of how many). What it raises stops the sampling."""

SOON = 0.1
"""Seconds below which a call of Progress is not worth its time (about 2 ms)."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are sampled. sampler: one of runtime.choices.SAMPLERS. guidance_interval: (low, high) of t / T, both in;
    outside of it the source's branch runs alone."""

    steps: int
    guidance: float
    sampler: str = "ddim"
    guidance_interval: tuple[float, float] = EVERYWHERE

    def __str__(self) -> str:
        low, high = self.guidance_interval
        where = "" if (low, high) == EVERYWHERE else f" for t/T from {low:g} to {high:g}"
        return f"{self.steps} {SAMPLERS[self.sampler]} steps, guidance {self.guidance:g}{where}"


def cast_kernels(params: Params, dtype: str) -> Params:
    """Parameters as sampling holds them: matrices and kernels cast once to the compute dtype, to which every layer casts
    them at every step anyway (so no bit of a picture changes), at half the memory for bfloat16. Vectors stay: norms
    multiply by their float32 scales. The arrays given are used up."""

    def cast(x):
        return x.astype(dtype) if x.ndim > 1 else x

    if jnp.dtype(dtype) == jnp.float32:
        return params
    return jax.jit(lambda tree: jax.tree.map(cast, tree), donate_argnums=0)(params)


@functools.cache
def compiler_options() -> dict[str, Any] | None:
    """What a sampling program is compiled with beside the compiler's own choices.

    On CPUs without YNNPACK's kernels, which left more of the cores idle than XLA's older ones: 35 steps at 128x88 on two cores
    took 0.80 of the time at batch 8 and 0.97 at batch 1. (A training step took 1.09 and keeps them; BUILD_NOTES.md.)
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # a jaxlib without that option
        return None
    return options


@dataclasses.dataclass(frozen=True)
class Sampler:
    """batch and one key per target -> images [b h w 3] in [-1, 1]. The result depends on a sample's own row and key
    alone, so batching never changes a picture (beyond rounding)."""

    method: Denoiser
    schedule: Schedule
    spacing: str
    sampling: Sampling

    @functools.cached_property
    def solver(self) -> Solver:
        return Solver(self.schedule, self.sampling.sampler, self.sampling.steps, self.spacing)

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.sample, compiler_options=compiler_options())

    @functools.cached_property
    def _parts(self):
        return tuple(jax.jit(part, compiler_options=compiler_options()) for part in (self.begin, self.go, self.finish))

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        batch: Batch,
        keys: jax.Array,
        *,
        progress: Progress | None = None,
    ) -> Float[Array, "b h w 3"]:
        """progress: called after the first step and the last one, and between them about every SOON seconds."""
        if progress is None:
            return self._jitted(params, frozen, batch, keys)
        begin, go, finish = self._parts
        steps = self.sampling.steps
        fixed, state = begin(params, frozen, batch, keys)
        start, chunk = 0, 1
        while start < steps:
            began, stop = time.perf_counter(), min(start + chunk, steps)
            state = jax.block_until_ready(go(params, fixed, state, start, stop))
            progress(stop, steps)
            chunk = max(int(SOON * (stop - start) / (time.perf_counter() - began)), 1)
            start = stop
        return finish(frozen, fixed, state)

    def sample(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array) -> Float[Array, "b h w 3"]:
        """The same, for use inside another jit."""
        fixed, state = self.begin(params, frozen, batch, keys)
        return self.finish(frozen, fixed, self.go(params, fixed, state, 0, self.sampling.steps))

    def begin(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array) -> tuple[tuple[Any, Any], State]:
        """((the conditioning, what `edit` gives), the sampler before its first step)."""
        shape = self.method.sample_spec(batch)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        edit = self.edit(frozen, batch, noise)
        fixed = self.method.condition(params, frozen, batch), edit
        return fixed, self.solver.begin(noise, self.step_callback(edit), keys)

    def go(self, params: Params, fixed: tuple[Any, Any], state: State, start: int | Array, stop: int | Array) -> State:
        """Steps start to stop - 1."""
        conditioning, edit = fixed

        def guided_by(guidance: float) -> Denoise:
            branches = self.method.branches(conditioning, guidance)
            return guided_denoise(functools.partial(self.method.denoise, params), branches)

        predict, interval = guided_by(self.sampling.guidance), self.sampling.guidance_interval
        if self.sampling.guidance != 1.0 and interval != EVERYWHERE:
            predict = inside_interval(predict, guided_by(1.0), *(self.schedule.steps * share for share in interval))
        return self.solver.advance(predict, state, start, stop, self.step_callback(edit))

    def finish(self, frozen: Frozen, fixed: tuple[Any, Any], state: State) -> Float[Array, "b h w 3"]:
        return self.method.decode(frozen, state.x)

    def edit(self, frozen: Frozen, batch: Batch, noise: Float[Array, "b h w c"]) -> Any:
        """What a subclass needs in `step_callback` and `finish`, as arrays."""
        return None

    def step_callback(self, edit: Any) -> StepCallback | None:
        """See samplers.sample_latents."""
        return None
