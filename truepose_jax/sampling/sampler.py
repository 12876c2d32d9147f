"""Sampling: everything that does not depend on t once, then guided DDIM, all inside one jit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.diffusion.guidance import guided_denoise
from truepose_jax.diffusion.samplers import StepCallback, ddim_sample
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.methods.base import Batch, Denoiser, Frozen, Params


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
    steps: int
    spacing: str
    guidance: float

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.sample, compiler_options=compiler_options())

    def __call__(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array) -> Float[Array, "b h w 3"]:
        return self._jitted(params, frozen, batch, keys)

    def sample(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array) -> Float[Array, "b h w 3"]:
        """The same, for use inside another jit."""
        return self.method.decode(frozen, self.latents(params, frozen, batch, self.noise(batch, keys)))

    def noise(self, batch: Batch, keys: jax.Array) -> Float[Array, "b h w c"]:
        """What sampling begins with."""
        shape = self.method.sample_spec(batch)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def latents(
        self,
        params: Params,
        frozen: Frozen,
        batch: Batch,
        noise: Float[Array, "b h w c"],
        *,
        step_callback: StepCallback | None = None,
    ) -> Float[Array, "b h w c"]:
        """step_callback: see ddim_sample."""
        conditioning = self.method.condition(params, frozen, batch)
        branches = self.method.branches(conditioning, self.guidance)
        predict = guided_denoise(functools.partial(self.method.denoise, params), branches)
        return ddim_sample(
            predict, noise, self.schedule, steps=self.steps, spacing=self.spacing, step_callback=step_callback
        )
