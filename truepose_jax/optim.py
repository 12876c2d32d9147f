"""AdamW with warm-up, decay and clipping, as one optax chain; EMA as a pure function."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from truepose_jax.schema import OptimConfig
from truepose_jax.sharding import path_of


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then constant; "cosine": constant for `flat` of the run, then a half cosine to `final` x rate."""
    peak = config.learning_rate
    parts = [optax.constant_schedule(peak)]
    boundaries: list[int] = []
    if config.warmup_steps:
        # From 1/(n+1), so that the first step already moves.
        start = peak / (config.warmup_steps + 1)
        parts.insert(0, optax.linear_schedule(start, peak, config.warmup_steps))
        boundaries.append(config.warmup_steps)
    if config.schedule == "cosine":
        flat_until = max(int(config.flat * total_steps), config.warmup_steps)
        parts.append(optax.cosine_decay_schedule(peak, max(total_steps - flat_until, 1), alpha=config.final))
        boundaries.append(flat_until)
    return optax.join_schedules(parts, boundaries)


def decay_mask(params: Any, no_decay: str) -> Any:
    """True where weight decay applies: matrices and convolutions, except those that `no_decay` matches."""
    pattern = re.compile(no_decay)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and not pattern.search(path_of(path)), params
    )


def make_optimizer(config: OptimConfig, total_steps: int, no_decay: str) -> optax.GradientTransformation:
    """clip by global norm -> AdamW (decay on matrices only, never on parameters without a gradient)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: decay_mask(params, no_decay),
        ),
    )


def ema_update(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """ema + (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)): young averages follow quickly."""
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
