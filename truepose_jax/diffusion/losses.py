"""The training loss over latents: squared error per sample, weighted by validity; timesteps and their bins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from truepose_jax.diffusion.schedule import Schedule

NUM_BINS = 10
"""Timestep bins of the logged loss: a total loss hides that only the noisy end learns from the source."""


def timesteps(u: Float[Array, " b"], total: int, power: float = 1.0) -> Int[Array, " b"]:
    """t = floor(total * u^power), u uniform in [0, 1). power 1: uniform; below 1: more of the noisy end."""
    return jnp.minimum((total * u**power).astype(jnp.int32), total - 1)


def squared_error(prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Mean squared error per sample, float32."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)), axis=(1, 2, 3))


def min_snr_weights(schedule: Schedule, t: Int[Array, " b"], gamma: float) -> Float[Array, " b"]:
    """Hang et al. 2023: the weight of x0's error is min(SNR, gamma), in the terms of what is predicted. Of v as AnimateAnyone's
    public code has it, with SNR + 1 in SNR's place, so that the noisy end keeps weight 1."""
    snr = schedule.snr(t)
    if schedule.prediction == "x0":
        return jnp.minimum(snr, gamma)
    snr = snr + 1.0 if schedule.prediction == "v" else snr
    return jnp.minimum(snr, gamma) / snr


def weighted_mean(values: Float[Array, " b"], weights: Float[Array, " b"]) -> Float[Array, ""]:
    """sum(w v) / sum(w); 0 where no weight is left. Samples of weight 0 may hold anything, NaN included."""
    total = jnp.sum(jnp.where(weights > 0, values * weights, 0.0))
    return total / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)


def timestep_bins(values: Float[Array, " b"], weights: Float[Array, " b"], t: Int[Array, " b"], total: int):
    """(sum of w v, sum of w) per timestep bin, each [NUM_BINS]."""
    bins = jax.nn.one_hot(t * NUM_BINS // total, NUM_BINS)
    # Masked, not multiplied: a NaN must stay in its own bin.
    sums = jnp.sum(jnp.where((weights[:, None] > 0) & (bins > 0), (values * weights)[:, None], 0.0), axis=0)
    return sums, weights @ bins


def charbonnier(
    prediction: Float[Array, "b H W 3"], target: Float[Array, "b H W 3"], *, smooth: float = 0.01
) -> Float[Array, " b"]:
    """sqrt(d^2 + smooth^2) of the pixels, and of their differences along x and along y: means, added; per sample."""

    def mean(d):
        return jnp.mean(jnp.sqrt(jnp.square(d) + smooth**2), axis=(1, 2, 3))

    d = prediction - target
    return mean(d) + mean(d[:, :, 1:] - d[:, :, :-1]) + mean(d[:, 1:] - d[:, :-1])
