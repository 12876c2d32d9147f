"""Sampling: everything that does not depend on t once, then guided DDIM, all inside one jit."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jaxtyping import Array, Float

from truepose_jax.diffusion.guidance import guided
from truepose_jax.diffusion.samplers import ddim_sample
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.methods.base import Batch, Frozen, Method, Params


@dataclasses.dataclass(frozen=True)
class Sampler:
    """batch and one key per target -> images [b h w 3] in [-1, 1]. The result depends on a sample's own row and key
    alone, so batching never changes a picture (beyond rounding)."""

    method: Method
    schedule: Schedule
    steps: int
    spacing: str
    guidance: float

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.sample)

    def __call__(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array) -> Float[Array, "b h w 3"]:
        return self._jitted(params, frozen, batch, keys)

    def sample(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array) -> Float[Array, "b h w 3"]:
        """The same, for use inside another jit."""
        conditioning = self.method.condition(params, frozen, batch)
        null = self.method.null(conditioning)
        shape = self.method.latent_spec(batch["target_pose"].shape[1:3])
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

        def predict(x, t):
            return guided(
                lambda: self.method.denoise(params, x, t, conditioning),
                lambda: self.method.denoise(params, x, t, null),
                self.guidance,
            )

        latents = ddim_sample(predict, noise, self.schedule, steps=self.steps, spacing=self.spacing)
        return self.method.decode(frozen, latents)
