"""Attention inside TruePose, read from the very modules while they run (flax's interceptors), nothing computed anew but
the softmax.

Source attention: A' = Q'K'^T / sqrt d of HPFA's source side (Eq. 6), softmaxed over keys, before the reweighting (A' itself)
and after it (Eq. 7). SourceNet reads the clean source at t = 0, so neither depends on the sampling step. Target attention:
Eq. 8, softmax(Q K_h'^T / sqrt d) with the queries of TargetNet's x_t: its keys are cells of the source too, and it changes from
step to step. But row j of K_h' and V_h' comes from H' at cell j, which Eq. 7 has mixed from other cells: a cell of background
can carry clothes. So the target attention is also given through Eq. 7: its mass times the source attention after Eq. 6 (both
averaged over heads, though W_V mixes them): the cells whose values V' it takes in.

All are given as mass per key cell: the mean over heads and queries, which sums to 1 over the keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from truepose_jax.config import ConfigError
from truepose_jax.diffusion.guidance import guided
from truepose_jax.diffusion.samplers import ddim_levels, ddim_step
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.kernels.attention.reference import PiecewiseLinear, eq6_slopes, mask_sides, sloped_logits
from truepose_jax.models.hpfa import HPFA, FusionConfig, HPFASource

PLAIN = PiecewiseLinear(1.0, 0.0)
"""A softmax without Eq. 6."""

Masses = dict[str, Array]
"""{site name: [b m]}, or what its name says"""


class SourceSide(NamedTuple):
    """What HPFA's source side computed at one site: Q', K' of Eq. 6, the mask M, and K_h' of Eq. 8."""

    q: Float[Array, "b n g d"]
    k: Float[Array, "b m g d"]
    mask: Bool[Array, "b m"]
    fused_k: Float[Array, "b m g d"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """before, after: {site: [photos m]}. target, through: {site: [steps photos m]}. timesteps: int [steps]. latents: what
    sampling ended in, [photos h w c]."""

    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    target: dict[str, np.ndarray]
    through: dict[str, np.ndarray]
    timesteps: np.ndarray
    latents: np.ndarray


@contextlib.contextmanager
def _watching(source: dict[str, SourceSide], queries: dict[str, Array]) -> Iterator[None]:
    """While it holds, HPFA's modules leave here what they compute. Inside a jit these are tracers, to be used in it."""

    def look(call, args, kwargs, context):
        found, module = call(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(module, HPFASource):
            keys_values, attention = found
            source[module.site.name] = SourceSide(attention.q, attention.k, args[1], keys_values.k)
        elif context.method_name == "queries" and isinstance(module, HPFA):
            # mean_attention divides by sqrt d; cosines are scaled already.
            queries[module.site.name] = found * (found.shape[-1] ** 0.5 if module.config.cosine else 1.0)
        return found

    with nn.intercept_methods(look):
        yield


def mean_attention(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    key_mask: Bool[Array, "b m"] | None = None,
    query_mask: Bool[Array, "b n"] | None = None,
    *,
    inside: PiecewiseLinear = PLAIN,
    outside: PiecewiseLinear = PLAIN,
) -> Float[Array, "b n m"]:
    """Mean over heads of the softmax over keys of the (reweighted) logits. One head of one image at a time: 32 MB at 2,816
    cells."""
    keys = jnp.ones(k.shape[:2], bool) if key_mask is None else key_mask
    queries = jnp.ones(q.shape[:2], bool) if query_mask is None else query_mask

    def of_image(part):
        q, k, keys, queries = part

        def add_head(total, head):
            q, k = (x[None, :, None] for x in head)
            logits = sloped_logits(q, k, keys[None], inside, outside, query_mask=queries[None])
            return total + jax.nn.softmax(logits, axis=-1)[0, 0], None

        none = jnp.zeros((q.shape[0], k.shape[0]), jnp.float32)
        total, _ = jax.lax.scan(add_head, none, (jnp.swapaxes(q, 0, 1), jnp.swapaxes(k, 0, 1)))
        return total / q.shape[1]

    return jax.lax.map(of_image, (q, k, keys, queries))


def reweighted_attention(side: SourceSide, config: FusionConfig) -> Float[Array, "b n m"]:
    """`mean_attention` after Eq. 6, as the model is configured to read it."""
    if config.mask_axis == "none":
        return mean_attention(side.q, side.k)
    inside, outside = eq6_slopes(config.delta, config.sigma, config.reading)
    return mean_attention(side.q, side.k, *mask_sides(config.mask_axis, side.mask), inside=inside, outside=outside)


class Watcher:
    """A pipeline whose HPFA is watched while it samples; two programs, one for the source and one for a step."""

    def __init__(self, pipeline: Pipeline, *, steps: int, guidance: float):
        # Without rematerialisation, which would run the blocks inside transformations of their own.
        self.method = dataclasses.replace(
            pipeline.method, model=dataclasses.replace(pipeline.method.model, remat=False)
        )
        self.pipeline, self.guidance = pipeline, guidance
        config = pipeline.run.config
        self.schedule = config.diffusion.schedule
        self.timesteps, self.abars = ddim_levels(self.schedule, steps=steps, spacing=config.diffusion.spacing)
        self._prepare, self._step = jax.jit(self._prepared), jax.jit(self._stepped)

    def watch(self, batch: dict[str, np.ndarray], keys: jax.Array) -> Seen:
        """One batch of rows, sampled from noise to the end."""
        with jax.set_mesh(self.pipeline.mesh):
            return self._watched(batch, keys)

    def _watched(self, batch: dict[str, np.ndarray], keys: jax.Array) -> Seen:
        params, frozen = self.pipeline.params, self.pipeline.frozen
        conditioning, fused, before, after = self._prepare(params, frozen, batch)
        shape = self.method.sample_spec(batch)
        x = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        found = []
        for t, abar_next in zip(self.timesteps, self.abars[1:], strict=True):
            x, *masses = self._step(params, x, jnp.int32(t), jnp.float32(abar_next), conditioning, fused, after)
            found.append(jax.device_get(masses))
        target, through = ({site: np.stack([m[i][site] for m in found]) for site in before} for i in range(2))
        of_source = {site: np.asarray(weights.mean(axis=1)) for site, weights in after.items()}
        return Seen(jax.device_get(before), of_source, target, through, self.timesteps, np.asarray(x))

    def _prepared(self, params, frozen, batch) -> tuple[Any, Masses, Masses, Masses]:
        """(conditioning, K_h' per site, masses before the reweighting, and after it the attention [b n m])."""
        source: dict[str, SourceSide] = {}
        with _watching(source, {}):
            conditioning = self.method.condition(params, frozen, batch)
        if not source:
            raise ConfigError("this model has no HPFA (config.model.fusion); there is no source attention to study")
        before = {site: jnp.mean(mean_attention(side.q, side.k), axis=1) for site, side in source.items()}
        after = {site: reweighted_attention(side, self.method.model.fusion) for site, side in source.items()}
        return conditioning, {site: side.fused_k for site, side in source.items()}, before, after

    def _stepped(self, params, x, t, abar_next, conditioning, fused, after) -> tuple[Array, Masses, Masses]:
        """(x of the next step, masses of Eq. 8, the same through Eq. 7)."""
        at = jnp.full((x.shape[0],), t, jnp.int32)
        queries: dict[str, Array] = {}
        with _watching({}, queries):
            output = self.method.denoise(params, x, at, conditioning)
        if self.guidance != 1.0:
            conditional, null = output, self.method.null(conditioning)
            output = guided(lambda: self.method.denoise(params, x, at, null), [(self.guidance, lambda: conditional)])
        masses = {site: jnp.mean(mean_attention(q, fused[site]), axis=1) for site, q in queries.items()}
        through = {site: jnp.einsum("bn,bnm->bm", mass, after[site]) for site, mass in masses.items()}
        return ddim_step(x, output, t, abar_next, self.schedule), masses, through


def join(parts: list[Seen], count: int) -> Seen:
    """The first `count` photos of several batches: others fill the last batch."""

    def of(name: str, axis: int) -> dict[str, np.ndarray]:
        values, kept = [getattr(part, name) for part in parts], (slice(None),) * axis + (slice(count),)
        return {site: np.concatenate([value[site] for value in values], axis=axis)[kept] for site in values[0]}

    latents = np.concatenate([part.latents for part in parts])[:count]
    return Seen(of("before", 0), of("after", 0), of("target", 1), of("through", 1), parts[0].timesteps, latents)
