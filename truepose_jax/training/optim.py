"""AdamW and LAMB with warm-up, decay and clipping, as one optax chain; EMA as a pure function."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from truepose_jax.config import ConfigError, OptimConfig
from truepose_jax.runtime.sharding import path_of


def learning_rate(config: OptimConfig, total_steps: int | jax.Array) -> optax.Schedule:
    """Linear warm-up, then constant; "cosine": constant for `flat` of the run, then a half cosine to `final` x rate; "step": then
    `final` x rate at once.
    total_steps: an array where one program is to serve any number."""
    peak = config.learning_rate
    parts = [optax.constant_schedule(peak)]
    boundaries: list[int] = []
    if config.warmup_steps:
        # From 1/(n+1), so that the first step already moves.
        start = peak / (config.warmup_steps + 1)
        parts.insert(0, optax.linear_schedule(start, peak, config.warmup_steps))
        boundaries.append(config.warmup_steps)
    if config.schedule != "constant":
        if isinstance(total_steps, int):
            flat_until = max(int(config.flat * total_steps), config.warmup_steps)
            decay_steps = float(max(total_steps - flat_until, 1))
        else:
            flat_until = jnp.maximum(jnp.floor(config.flat * total_steps), config.warmup_steps)
            decay_steps = jnp.maximum(total_steps - flat_until, 1.0)

        def decay(count):  # optax's own wants to know the number of steps while it is traced
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, decay_steps) / decay_steps))
            return peak * ((1 - config.final) * cosine + config.final)

        parts.append(decay if config.schedule == "cosine" else optax.constant_schedule(peak * config.final))
        boundaries.append(flat_until)
    return optax.join_schedules(parts, boundaries)


@dataclasses.dataclass(frozen=True)
class ParamLayout:
    """The form in which the optimizer sees the parameters, and back. decayed: 1 where weight decay applies, in that
    form. first_bad(gradients): index (in jax.tree.leaves order) of the first parameter whose gradient is not finite,
    or -1."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]
    decayed: Any
    first_bad: Callable[[Any], jax.Array]


def trained_part(params: Any, trainable: str) -> Any:
    """The tree of the parameters whose path the regex `trainable` finds, without the others (nested dicts).

    Gradients, moments and decay exist for these alone; the rest of the network stays as it is. Raises ConfigError where
    it finds none.
    """
    pattern = re.compile(trainable)

    def cut(tree: Any, prefix: str) -> Any:
        kept = {}
        for name, value in tree.items():
            path = f"{prefix}{name}"
            value = cut(value, f"{path}/") if isinstance(value, Mapping) else value if pattern.search(path) else {}
            if not (isinstance(value, Mapping) and not value):
                kept[name] = value
        return kept

    found = cut(params, "")
    if not found:
        raise ConfigError(f"config.optim.trainable {trainable!r} finds none of the parameters")
    return found


def put_trained(params: Any, trained: Any) -> Any:
    """`params` with the leaves that `trained` has: the inverse of trained_part."""
    return {
        name: (put_trained(value, trained[name]) if isinstance(value, Mapping) else trained[name])
        if name in trained
        else value
        for name, value in params.items()
    }


def is_decayed(params: Any, no_decay: str) -> list[bool]:
    """Per leaf: matrices and convolutions decay, except those that `no_decay` matches."""
    pattern = re.compile(no_decay)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf.ndim > 1 and not pattern.search(path_of(path)) for path, leaf in leaves]


def make_param_layout(layout: str, params: Any, no_decay: str) -> ParamLayout:
    """layout "tree": as they are. "flat": one vector, decayed leaves first. params: arrays or shapes.

    The vector is for small networks on CPU, where an update of hundreds of small leaves is hundreds of kernels to
    compile and to start; it cannot be sharded like the parameters.
    """
    leaves, structure = jax.tree.flatten(params)
    decayed = is_decayed(params, no_decay)
    if layout == "tree":
        return ParamLayout(
            pack=lambda tree: tree,
            unpack=lambda tree: tree,
            decayed=jax.tree.unflatten(structure, [float(d) for d in decayed]),
            first_bad=lambda grads: _first(jnp.stack([~jnp.isfinite(jnp.sum(g * g)) for g in jax.tree.leaves(grads)])),
        )
    order = np.argsort([not d for d in decayed], kind="stable")
    sizes = np.array([leaves[i].size for i in order])
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def pack(tree):
        found = jax.tree.leaves(tree)
        return jnp.concatenate([found[i].reshape(-1) for i in order])

    def unpack(vector):
        found: list[Any] = [None] * len(leaves)
        for place, i in enumerate(order):
            found[i] = vector[starts[place] : starts[place + 1]].reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, found)

    def first_bad(vector):
        place = jnp.searchsorted(jnp.asarray(starts), jnp.argmax(~jnp.isfinite(vector)), side="right") - 1
        return jnp.where(jnp.all(jnp.isfinite(vector)), -1, jnp.asarray(order)[place])

    decayed_size = int(sum(leaves[i].size for i in order if decayed[i]))
    return ParamLayout(pack, unpack, (jnp.arange(starts[-1]) < decayed_size).astype(jnp.float32), first_bad)


def _first(bad: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


LAMB_EPSILON = 1e-6
"""Beside the root of Adam's second moment (AdamW: 1e-8), as the LAMB paper's code and optax.lamb have it."""


def make_optimizer(config: OptimConfig, total_steps: int | jax.Array, decayed: Any) -> optax.GradientTransformation:
    """clip by global norm -> AdamW, or LAMB: You et al. 2020, algorithm 2, with the ratio 1 where either norm is 0.
    decayed: 1 or 0 per parameter, see ParamLayout."""
    lamb = config.name == "lamb"

    def decay(updates, params):
        return jax.tree.map(lambda u, p, d: u + config.weight_decay * d * p, updates, params, decayed)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=LAMB_EPSILON if lamb else 1e-8),
        optax.stateless(decay) if config.weight_decay else optax.identity(),
        *([optax.scale_by_trust_ratio()] if lamb else []),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
    )


def ema_update(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """ema + (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)): young averages follow quickly."""
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
