"""How long a row will take: from the study's rows where there are any, else from round figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from truepose_jax.config import Config
from truepose_jax.scaling.table import Row

COMPILE = {"cpu": 60.0, "gpu": 120.0, "tpu": 120.0}
"""Seconds to compile a train step of the demo's size; SD1.5's takes several times that."""

SPEED = {"cpu": 3e10, "gpu": 1e14, "tpu": 1e14}
"""FLOP a second that a step sustains: two CPU cores (measured on the demo), and a fair share of an accelerator's peak."""

TRIED = 4
"""Batch sizes that a memory row compiles."""


def batch(run: Any, config: Config, done: Sequence[Row]) -> float:
    """To the last example, which a run with a target hardly ever sees."""
    known = [r["seconds_per_step"] / r["batch"] for r in done if r.get("seconds_per_step")]
    each = float(np.median(known)) if known else flops_per_example(config) / SPEED[_platform()]
    mine = [r["examples_to_target"] for r in done if r.get("examples_to_target") and r["batch"] == run.batch]
    return COMPILE[_platform()] + each * (float(np.median(mine)) if mine else config.total_steps * config.batch_size)


def devices(run: Any, config: Config, settings: Any, done: Sequence[Row]) -> float:
    if run.kind == "plan":
        return COMPILE["tpu"]
    known = [r["step_seconds"] / r["batch"] for r in done if r.get("step_seconds") and r["kind"] == run.kind]
    each = float(np.median(known)) if known else flops_per_example(config) / SPEED[_platform()]
    if not known and _platform() != "cpu":
        each /= run.devices
    return COMPILE[_platform()] + 2 * (settings.steps + 5) * each * run.batch


def memory(run: Any, done: Sequence[Row]) -> float:
    known = [r["compile_seconds"] for r in done if bool(r["topology"]) == bool(run.topology)]
    return float(np.median(known)) if known else TRIED * COMPILE["tpu" if run.topology else _platform()]


_known_flops: dict[Any, float] = {}


def flops_per_example(config: Config) -> float:
    """A training step's, from shapes alone: three times the multiplications of the networks' convolutions and products."""
    from truepose_jax.pretrained.factory import planned
    from truepose_jax.training.init import batch_spec

    if config.model not in _known_flops:
        # XLA counts loops once and kernels not at all
        counted = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="reference"))
        (method, frozen), spec = planned(counted), batch_spec(config)
        params = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
        count = spec["valid"].shape[0]
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        lowered = jax.jit(lambda *a: method.loss(*a)[0]).lower(params, frozen, spec, keys)
        _known_flops[config.model] = 3 * float((lowered.cost_analysis() or {}).get("flops", 0.0)) / count
    return _known_flops[config.model]


def _platform() -> str:
    return {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
