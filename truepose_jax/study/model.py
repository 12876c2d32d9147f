"""The model of a study: a run's checkpoint, or a folder of converted weights."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.inference.exported import implied
from truepose_jax.inference.pipeline import Pipeline, Run
from truepose_jax.pretrained.conversion.key_maps import leaves, nest
from truepose_jax.pretrained.conversion.weights_folder import WeightsFolder, open_weights
from truepose_jax.pretrained.factory import assemble
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import make_mesh, replicate
from truepose_jax.training.init import batch_spec, resolve_init_from


@dataclasses.dataclass(frozen=True)
class Studied:
    """title: short, for charts. untrained: why its attention is not that of a trained model; "" where nothing says so."""

    pipeline: Pipeline
    name: str
    title: str
    untrained: str


def of_run(run: Run) -> Studied:
    """Raises CheckpointError and ConfigError."""
    pipeline = Pipeline.of_run(run)
    about = f"step {run.step}, {run.weights} weights"
    title = f"{pathlib.PurePath(run.workdir).name}, {about}"
    return Studied(pipeline, f"{run.workdir}, {about}", title, untrained(pipeline.params))


def config_of_weights(folder: str, size: tuple[int, int] | None) -> Config:
    """The config that a converted folder implies; size None: the one it was trained at, else the base config's. Raises
    ConversionError and ConfigError."""
    weights = open_weights(pathlib.Path(folder))
    values = implied(weights) | {"init_from": folder}
    values["model"] |= {"method": weights.method} | ({"size": size} if size else {})
    return resolve_init_from(from_config_dict(Config, values))


def of_weights(config: Config) -> Studied:
    """The model of `config_of_weights`. Raises ConfigError where the folder does not hold it."""
    weights = open_weights(pathlib.Path(config.init_from))
    encoder = make_encoder(config.model.clip, config.token_width)
    method, frozen, _, _ = assemble(config, encoder)
    spec = batch_spec(config, targets=config.data.targets_per_source)
    make = jax.jit(lambda key: {name: method.init(key, spec)[name] for name in weights.fresh})
    shapes = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    random = dict(leaves(make(rng.key(jax.random.key(config.seed), "study")))) if weights.fresh else {}
    params = nest({p: random[p] if p in random else _read(weights, p, leaf) for p, leaf in leaves(shapes)})
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.local_devices())
    run = Run(config.init_from, config, None, 0, "raw")
    pipeline = Pipeline(run, method, replicate(mesh, params), replicate(mesh, frozen), encoder, mesh)
    fresh = f"{', '.join(weights.fresh)} random: a starting point" if weights.fresh else ""
    name = f"{config.init_from} ({weights.origin.get('name')})"
    return Studied(pipeline, name, pathlib.PurePath(config.init_from).name, fresh or untrained(params))


def _read(weights: WeightsFolder, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    info = weights.infos.get(path)
    if info is None or tuple(info.shape) != tuple(leaf.shape):
        found = "nothing" if info is None else f"shape {list(info.shape)}"
        raise ConfigError(f"--weights={weights.path}: {path} has {found}; this model needs {list(leaf.shape)}")
    return jnp.asarray(np.asarray(weights.read(path)), leaf.dtype)


def untrained(params: Mapping[str, Any]) -> str:
    """Training leaves no network's norms all at exactly 1, and no HPFA's output projection at zero."""
    flat = dict(leaves(params))
    out = [
        value for path, value in flat.items() if path.startswith("target_net") and path.endswith("hpfa/to_out_0/kernel")
    ]
    if out and not any(bool(jnp.any(value != 0)) for value in out):
        return "HPFA's output projections are zero: TargetNet does not use it yet"
    scales = [value for path, value in flat.items() if path.startswith("target_net") and path.endswith("/scale")]
    if scales and all(bool(jnp.all(value == 1)) for value in scales):
        return "every norm still has the scale it was made with"
    return ""
