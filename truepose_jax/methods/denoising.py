"""What all denoising methods train with: noise, timesteps and weights from one key per row, and rows that are not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from truepose_jax.config import DenoiserModel, DiffusionConfig
from truepose_jax.diffusion import losses
from truepose_jax.methods.base import Batch
from truepose_jax.models.layers import position_sinusoids
from truepose_jax.runtime import rng

TENSOR_RULES = (
    (r"/(to_[qkv]|source_to_[qkv])/kernel$", (None, "tensor")),
    (r"/to_out_0/kernel$", ("tensor", None)),
    (r"/net_0/proj/kernel$", (None, "tensor")),
    (r"/net_2/kernel$", ("tensor", None)),
)
"""Of every UNet's attention and feed-forward layers."""


class Noised(NamedTuple):
    """A training step's latents at timesteps t, what the network should say of them, and each row's weight (None: 1)."""

    x_t: Float[Array, "b h w c"]
    t: Int[Array, " b"]
    target: Float[Array, "b h w c"]
    weights: Float[Array, " b"] | None

    def errors(self, output: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        """The weighted squared error of each row."""
        found = losses.squared_error(output, self.target)
        return found if self.weights is None else found * self.weights


def per_row(keys: jax.Array, stream: str, draw: Callable[[jax.Array], Array]) -> Array:
    """draw(key) for each row, by its own key of the stream."""
    return jax.vmap(lambda key: draw(rng.key(key, stream)))(keys)


def noised(diffusion: DiffusionConfig, x0: Float[Array, "b h w c"], keys: jax.Array) -> Noised:
    """Draws noise and timesteps as the configuration says."""
    schedule = diffusion.schedule
    eps = per_row(keys, "noise", lambda key: jax.random.normal(key, x0.shape[1:], x0.dtype))
    if diffusion.noise_offset:
        shape = (1, 1, x0.shape[-1])
        eps += diffusion.noise_offset * per_row(
            keys, "noise_offset", lambda key: jax.random.normal(key, shape, x0.dtype)
        )
    u = per_row(keys, "timesteps", jax.random.uniform)
    t = losses.timesteps(u, schedule.steps, diffusion.timestep_power)
    weights = losses.min_snr_weights(schedule, t, diffusion.min_snr) if diffusion.min_snr else None
    return Noised(schedule.add_noise(x0, eps, t), t, schedule.regression_target(x0, eps, t), weights)


def loss_metrics(noisy: Noised, errors: Float[Array, " b"], valid: Float[Array, " b"], total: int) -> dict[str, Array]:
    """{"loss": the mean over valid rows, "bin_sums", "bin_counts": by timestep}."""
    sums, counts = losses.timestep_bins(errors, valid, noisy.t, total)
    return {"loss": losses.weighted_mean(errors, valid), "bin_sums": sums, "bin_counts": counts}


def without_invalid(batch: Batch) -> Batch:
    """Zeros in the rows of weight 0, and of sources whose rows all are: NaN there would reach every gradient (0 x NaN)."""
    valid = batch["valid"] > 0

    def zeroed(x: Array) -> Array:
        rows = jnp.any(valid.reshape(len(x), -1), axis=1)
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    return {name: zeroed(x) for name, x in batch.items()}


def positions(model: DenoiserModel, cells: Float[Array, "b h w c"]) -> Float[Array, ...]:
    """What a network without pretrained weights is told of place in latents or a coarser level; SD1.5's has learned it."""
    if model.positions == "none":
        return jnp.zeros(())
    return position_sinusoids(*cells.shape[1:3], model.unet.block_out_channels[0])
