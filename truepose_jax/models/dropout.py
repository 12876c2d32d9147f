"""Dropout whose masks come from one key per row, so that they do not depend on how a batch is cut."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.runtime import rng


class KeyedDropout(nn.Module):
    """Zeros a share `rate` of each row's numbers and scales the rest. keys [b]: one per row, which all dropouts of a network
    may share, for each takes the stream of its own path; None: nothing is dropped."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], keys: jax.Array | None = None) -> Float[Array, "b ..."]:
        if keys is None or self.rate == 0.0:
            return x
        stream, kept = "/".join(self.path), 1.0 - self.rate
        mask = jax.vmap(lambda key: jax.random.bernoulli(rng.key(key, stream), kept, x.shape[1:]))(keys)
        return jnp.where(mask, x / kept, 0)
