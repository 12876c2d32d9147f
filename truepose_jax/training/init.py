"""The state a run begins with: its own checkpoint, the weights of config.init_from, or random parameters.

config.init_from is a folder that `convert from-torch` wrote, or the workdir of another run (its EMA weights where it keeps
them). Whatever does not fit is a ConfigError before any long work; nothing is ever left random that was asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from truepose_jax.config import Config, ConfigError, FirstStageModel, ModelConfig, to_dict
from truepose_jax.data.datasets import layout_of
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.pretrained.conversion.key_maps import leaves, nest
from truepose_jax.pretrained.conversion.paper_start import fresh_of
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, TensorInfo
from truepose_jax.pretrained.conversion.weights_folder import CODEC_FILE, WEIGHTS_FILE, WeightsFolder, open_weights
from truepose_jax.pretrained.factory import planned
from truepose_jax.pretrained.frozen_networks import KINDS, folder_fingerprint, load_torch_folder, read_torch_config
from truepose_jax.runtime.sharding import like_params, param_specs
from truepose_jax.training import lora
from truepose_jax.training.checkpoint import CheckpointError, Checkpoints, read_config, read_metadata
from truepose_jax.training.optim import put_trained
from truepose_jax.training.step import Trainer, TrainState

SCRATCH = ("parsing_encoder", "clip_source")
"""Networks that no UNet has anything for, beside what a weights folder itself calls fresh."""

HPFA_OUT, COSINE_SCALE = "/hpfa/to_out_0/kernel", "/hpfa/cosine_scale"
"""Of ours, what a plain UNet's folder lacks: rows of the first that read carried latents, which are zero then, and the second."""

SETTINGS = ("autoencoder", "positions", "source_parsing", "pose_encoder")
FUSION_SETTINGS = ("reading", "mask_axis", "delta", "sigma", "regions", "carry_latents", "cosine", "residual")
CARRY_SETTINGS = ("head",)
"""Of config.model, its fusion and its carry: what no tensor's shape tells well, and trained parameters depend on."""
HARMLESS = ("fusion.regions",)
"""CAA reads any number of region tokens; only how well it does depends on the number."""


def resolve_init_from(config: Config) -> Config:
    """The config with what init_from implies: its VAE and CLIP where the config names none. Raises ConfigError."""
    if not config.init_from:
        return config
    folder = pathlib.Path(config.init_from)
    model = config.model
    if (folder / WEIGHTS_FILE).is_file():
        weights = _open(config)
        _same_method(config, weights.method)
        _no_random_base(config, weights.fresh)
        _same_network(config, weights.unet)
        _same_settings(config, weights.settings)
        if weights.schedule is not None:
            ours = {name: getattr(config.diffusion.schedule, name) for name in weights.schedule}
            if ours != dict(weights.schedule):
                logging.warning(
                    "config.init_from=%s was trained with the schedule %s; this run uses %s",
                    folder, dict(weights.schedule), ours,
                )  # fmt: skip
        inside = {kind: str(folder) for kind, of in KINDS.items() if (folder / of.inside / "config.json").is_file()}
        if getattr(model, "autoencoder", "") == "patches":
            inside["vae"] = str(folder / CODEC_FILE) if (folder / CODEC_FILE).is_file() else ""
    elif isinstance(model, FirstStageModel) and (folder / "config.json").is_file():
        _same_network(config, to_dict(read_torch_config(config.init_from, CLIPVisionConfig.from_transformers, "clip")))
        inside = {}
    elif (folder / "checkpoints").is_dir():
        try:
            other = read_config(folder)
        except CheckpointError as error:
            raise ConfigError(f"config.init_from: {error}") from error
        _same_method(config, other.model.method)
        _same_network(config, to_dict(getattr(other.model, network_of(model))))
        _warn(config, _differences(config, to_dict(other.model)))
        inside = other.model.folders
    else:
        raise ConfigError(
            f"config.init_from={folder} is neither a folder that `python -m truepose_jax.convert from-torch` wrote "
            f"(no {WEIGHTS_FILE}) nor the workdir of a run (no checkpoints/)"
        )
    if getattr(model, "autoencoder", "") == "pixels":
        inside.pop("vae", None)
    return dataclasses.replace(config, model=model.located(inside))


def origin(config: Config) -> dict[str, Any] | None:
    """What the run started from, for metadata.json and the model card: {"name", "licence", "files": {file: sha256}}; of
    another run what that one started from. None: from nothing."""
    if not config.init_from:
        return None
    if (pathlib.Path(config.init_from) / WEIGHTS_FILE).is_file():
        return dict(_open(config).origin)
    if (pathlib.Path(config.init_from) / "config.json").is_file():
        return {"name": config.init_from, "fingerprint": folder_fingerprint(config.init_from, "clip")}
    return read_metadata(config.init_from).get("origin")


def batch_spec(config: Config, *, targets: int | None = None, form: str = "float32") -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `targets`; None: of one source, which parameters are initialised with (no parameter's shape depends on
    the batch size). form: of input_pipeline/fields.py."""
    k = config.data.targets_per_source
    shapes = layout_of(config, form).shapes(batch_size=targets or k, targets_per_source=k, size=config.model.size)
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def param_shapes(config: Config) -> dict[str, Any]:
    """The parameters of the configuration's method as shapes; no weights are read."""
    method, _ = planned(config)
    return jax.eval_shape(lambda: method.init(jax.random.key(0), batch_spec(config)))


@functools.lru_cache(maxsize=1)
def _birth(trainer: Trainer) -> Callable[[jax.Array], TrainState]:
    """The random state of a key. One function for shapes and for values: JAX traces it once."""
    return lambda key: trainer.init_state(key, batch_spec(trainer.config))


def abstract_state(config: Config, trainer: Trainer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; nothing is computed."""
    # A key of no value: nothing may be computed while the mesh is of devices that are not here.
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=NamedSharding(mesh, PartitionSpec()))
    shapes = jax.eval_shape(_birth(trainer), key)
    specs = param_specs(shapes.params, mesh, trainer.method.param_rules)
    shardings = like_params(shapes, shapes.params, specs, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def first_state(config: Config, trainer: Trainer, checkpoints: Checkpoints, abstract: TrainState) -> TrainState:
    """Resume order: this workdir's checkpoint, config.init_from, random parameters. abstract: the state's shapes with
    shardings. A checkpoint that cannot be restored is an error, never a fresh start; a damaged one is skipped for the
    one before it only with config.checkpoint.allow_fallback."""
    if checkpoints.latest_step() is not None:
        rest = {name: getattr(abstract, name) for name in ("step", "opt_state", "skipped", "skips_in_a_row")}
        wanted = {"params": abstract.params, "ema": abstract.ema, "rest": rest}
        if config.checkpoint.allow_fallback:
            parts, _, step, skipped = checkpoints.restore_or_fall_back(wanted)
            for damage in skipped:
                logging.warning("%s", damage)
        else:
            parts, _, step = checkpoints.restore(wanted)
        print(f"resuming from step {step}", flush=True)
        return TrainState(params=parts["params"], ema=parts["ema"], **parts["rest"])
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    key = jax.random.key(config.seed)
    if not config.init_from:
        print("starting from random parameters: config.init_from is empty", flush=True)
        return jax.jit(_birth(trainer), out_shardings=shardings)(key)
    if (pathlib.Path(config.init_from) / WEIGHTS_FILE).is_file():
        params = _converted(config, trainer, key, abstract.params)
    elif (pathlib.Path(config.init_from) / "config.json").is_file():
        params = _of_clip(config, trainer, key, abstract.params)
    else:
        params = _of_run(config, trainer, key, abstract.params)
    # Donated: the parameters of the state are these very buffers, so that memory never holds them twice.
    return jax.jit(trainer.state_of, donate_argnums=0, out_shardings=shardings)(params)


def _converted(config: Config, trainer: Trainer, key: jax.Array, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a weights folder, each read, widened and put on its devices before the next."""
    weights = _open(config)
    wanted = dict(leaves(abstract))
    # A folder made of a plain UNet (it says so by what is fresh) has nothing for the networks that only we have.
    without = {*weights.fresh, *(SCRATCH if weights.fresh else ())}
    fresh = [name for name in abstract if name in without]
    begun = {p for p in wanted if fresh_of(without, p) or (weights.fresh and p.endswith(COSINE_SCALE))}
    allowed = re.compile(trainer.fresh)
    begun |= {p for p in wanted if p not in weights.infos and allowed.search(p)}
    # The ablations' networks are smaller than the method's own.
    fusion = getattr(config.model, "fusion", None)
    surplus = set() if fusion is None or fusion.is_whole else weights.infos.keys() - wanted.keys()
    taken = {path: info for path, info in weights.infos.items() if path not in surplus}
    if weights.fresh and fusion is not None and fusion.carry_latents:
        widened = {path for path in taken if path in wanted and path.endswith(HPFA_OUT)}
        taken |= {path: taken[path]._replace(shape=wanted[path].shape) for path in widened}
    _check_fits(config, taken, {p: leaf for p, leaf in wanted.items() if p not in begun})
    params: dict[str, jax.Array] = {}
    if begun:
        params |= _random(config, trainer, key, {path: wanted[path] for path in begun})
    for path in taken:
        params[path] = _put(weights.read(path), wanted[path])
    origin = weights.origin.get("name", config.init_from)
    left = f"; left out, this variant has no use for them: {len(surplus)} tensors" if surplus else ""
    print(f"parameters of {config.init_from} ({origin}); random: {', '.join(fresh) or 'none'}{left}", flush=True)
    return nest({path: params[path] for path in wanted})


def _of_clip(config: Config, trainer: Trainer, key: jax.Array, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Of a first stage that begins with a transformers folder of CLIP's vision tower: all else is random."""
    wanted = dict(leaves(abstract))
    clip, _ = load_torch_folder(config.init_from, abstract["clip"], "clip")
    params = {f"clip/{path}": _put(np.asarray(array), wanted[f"clip/{path}"]) for path, array in leaves(clip)}
    params |= _random(config, trainer, key, {path: leaf for path, leaf in wanted.items() if path not in params})
    print(f"parameters of {config.init_from}: clip; random: combiner", flush=True)
    return nest({path: params[path] for path in wanted})


def _random(config: Config, trainer: Trainer, key: jax.Array, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """These parameters as they are at birth; under jit nothing else is computed. wanted: by path, with shardings."""

    def make(key):
        whole = dict(leaves(trainer.init(key, batch_spec(config))))
        return {path: whole[path] for path in wanted}

    return jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in wanted.items()})(key)


def _put(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """On its devices, made float32 there slice by slice; zeros in the rows that it lacks. Copied: an array that shares NumPy's
    memory cannot be donated."""
    if array.shape != leaf.shape:
        array = np.pad(array, [(0, leaf.shape[0] - len(array))] + [(0, 0)] * (array.ndim - 1))
    placed = jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.array(array[index], dtype=leaf.dtype, order="C")
    )
    return jax.block_until_ready(jnp.copy(placed))


def _of_run(config: Config, trainer: Trainer, key: jax.Array, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The last checkpoint's EMA, or its raw weights where that run kept none, with its adapters added. What it lacks, and
    the trainer's `fresh` lets begin random, does."""
    other = read_config(config.init_from)
    checkpoints = Checkpoints(config.init_from, keep=1, every=1, read_only=True)
    wanted = dict(leaves(abstract))
    there = {path: shape for path, shape, _ in read_metadata(config.init_from)["parameters"]["table"]}
    adapters = {path: shape for path, shape in there.items() if re.search(lora.ADAPTERS, path)}
    networks, fresh = there.keys() - adapters.keys(), re.compile(trainer.fresh)
    begun = {path: leaf for path, leaf in wanted.items() if path not in networks and fresh.search(path)}
    _no_random_base(config, [path for path in begun if not re.search(lora.ADAPTERS, path)])
    kept = nest({path: leaf for path, leaf in wanted.items() if path not in begun})
    part = "ema" if other.optim.ema_decay else "params"
    params, step = _restored(checkpoints, part, kept, adapters)
    params = lora.merged(params, other.optim.lora)
    if begun:
        whole = dict(leaves(params)) | _random(config, trainer, key, begun)
        params = nest({path: whole[path] for path in wanted})
    random = f"; random: {len(begun)} parameters that it has not" if begun else ""
    weights = "EMA" if part == "ema" else "raw"
    print(f"parameters of {config.init_from}, step {step}, {weights} weights{random}", flush=True)
    return params


def _restored(
    checkpoints: Checkpoints, part: str, networks: Mapping[str, Any], adapters: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Any], int]:
    """(networks and adapters of another run, its last step). adapters: {path: shape}, of which alone such a run has an EMA."""
    if not adapters:
        return checkpoints.restore_like(part, networks)
    whole = NamedSharding(jax.tree.leaves(networks)[0].sharding.mesh, PartitionSpec())
    pairs = nest({p: jax.ShapeDtypeStruct(tuple(s), np.float32, sharding=whole) for p, s in adapters.items()})
    params, step = checkpoints.restore_like("params", {**networks, **pairs})
    return (put_trained(params, checkpoints.restore_like(part, pairs, step)[0]) if part == "ema" else params), step


def _open(config: Config) -> WeightsFolder:
    try:
        return open_weights(pathlib.Path(config.init_from))
    except (OSError, ConversionError) as error:
        raise ConfigError(f"config.init_from: {error}") from error


def network_of(model: ModelConfig) -> str:
    """The group of config.model that shapes the network that is trained."""
    return "unet" if hasattr(model, "unet") else "clip"


def _same_method(config: Config, theirs: str) -> None:
    if theirs != config.model.method:
        raise ConfigError(
            f"config.init_from={config.init_from} holds weights of {theirs!r}; config.model.method is {config.model.method!r}"
        )


def _no_random_base(config: Config, fresh: Sequence[str]) -> None:
    if config.optim.lora.rank and fresh:
        raise ConfigError(
            f"config.init_from={config.init_from} has no {', '.join(sorted(fresh)[:3])}, which would stay random: "
            "config.optim.lora trains adapters alone; train all of it first"
        )


def _same_network(config: Config, theirs: Mapping[str, Any]) -> None:
    group = network_of(config.model)
    network = getattr(config.model, group)
    ours = {name: _plain(value) for name, value in to_dict(network).items()}
    for name, value in theirs.items():
        if name == "in_channels":  # what a method reads beside the latent begins random
            ours[name] -= getattr(config.model, "extra_channels", 0) if value != ours[name] else 0
        if name == "attention_head_dim":  # one number, or one per level
            value, ours[name] = (_per_level(x, len(network.block_out_channels)) for x in (value, ours[name]))
        if _plain(value) != ours[name]:
            raise ConfigError(
                f"config.init_from={config.init_from} holds a {'UNet' if group == 'unet' else 'CLIP'} with {name} {value}; "
                f"config.model.{group}.{name} is {ours[name]}"
            )


def _same_settings(config: Config, told: Mapping[str, Any]) -> None:
    """told: truepose.json of the export that the weights came from, or {}. Raises ConfigError."""
    told = dict(told)
    for name in ("autoencoder", "pose_encoder"):
        group = told.pop(name, {})
        told |= {name: group["kind"]} if "kind" in group else {}
    found = _differences(config, told)
    wrong = {name: value for name, value in found.items() if name not in HARMLESS}
    if wrong:
        what = ", ".join(f"model.{name} {theirs}" for name, (theirs, _) in wrong.items())
        give = " ".join(f"--config.model.{name}={theirs}" for name, (theirs, _) in wrong.items())
        raise ConfigError(
            f"config.init_from={config.init_from} was trained with {what}; give {give}, or change the settings in its "
            f"{WEIGHTS_FILE} where another network is meant"
        )
    _warn(config, found)


def _differences(config: Config, told: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{setting: (theirs, ours)} of those that `told` has and this configuration has otherwise."""
    theirs = {name: told[name] for name in SETTINGS if name in told and hasattr(config.model, name)}
    ours = {name: getattr(config.model, name, None) for name in SETTINGS}
    for group, names in (("fusion", FUSION_SETTINGS), ("carry", CARRY_SETTINGS)):
        found = told.get(group, {})
        if not hasattr(config.model, group):
            continue
        theirs |= {f"{group}.{name}": found[name] for name in names if name in found}
        ours |= {f"{group}.{name}": getattr(getattr(config.model, group), name) for name in names}
    return {name: (value, ours[name]) for name, value in theirs.items() if value != ours[name]}


def _warn(config: Config, found: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (theirs, ours) in found.items():
        logging.warning(
            "config.init_from=%s was trained with model.%s %s; this run has %s", config.init_from, name, theirs, ours
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _per_level(value: Any, levels: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _check_fits(config: Config, infos: Mapping[str, TensorInfo], wanted: Mapping[str, Any]) -> None:
    """Names and shapes, and no dtype that float32 does not hold exactly."""
    problems = [f"lacks {path}" for path in wanted if path not in infos]
    for path, info in infos.items():
        if path not in wanted:
            problems.append(f"holds {path}, which this model has not")
        elif tuple(info.shape) != tuple(wanted[path].shape):
            problems.append(f"holds {path} of shape {list(info.shape)}; expected {list(wanted[path].shape)}")
        elif np.promote_types(info.dtype, wanted[path].dtype) != wanted[path].dtype:
            problems.append(f"holds {path} as {info.dtype}, which {wanted[path].dtype} does not hold exactly")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"config.init_from={config.init_from} {problems[0]}{more}")
