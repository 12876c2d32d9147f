"""The frozen networks through which FPDM and IMAGPose see photos: DINOv2, and FPDM's first stage; or their seeded stand-ins."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from truepose_jax.config import ConfigError, DinoConfig, EncoderConfig, FirstStageConfig
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.dinov2 import Dinov2, Dinov2Config
from truepose_jax.models.fpdm import ImagePoseFusion
from truepose_jax.pretrained.conversion import from_torch, key_maps
from truepose_jax.pretrained.conversion.first_stage import COMBINER_FILE
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError
from truepose_jax.pretrained.frozen_networks import (
    files_sha256,
    load_torch_folder,
    read_torch_config,
    refusal,
)


class VisionNetwork(NamedTuple):
    """config: of the network, as its method takes it. params: arrays, or shapes where the network is only planned."""

    config: Any
    params: Any
    fingerprint: str


def load(role: str, config: EncoderConfig) -> VisionNetwork:
    """The network of a role in Frozen ("dino", "ipf"). Raises ConfigError where its folder does not serve."""
    if config.path:
        return _LOAD[role](config)
    logging.warning(
        "config.model.%s.path is empty: a seeded network in its place, UNTRAINED: fine for synthetic people and for "
        "trying things out, useless for real clothes",
        role,
    )
    network, _, make = _PLAN[role](config)
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    name = f"untrained-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return VisionNetwork(network, make(jax.random.key(config.seed)), name)


def plan(role: str, config: EncoderConfig) -> VisionNetwork:
    """The same with shapes in the place of parameters. Raises ConfigError."""
    network, shapes, _ = _PLAN[role](config)
    return VisionNetwork(network, shapes, "")


Plan = tuple[Any, Any, Callable[[jax.Array], Any]]
"""(network's config, its parameters as shapes, key -> parameters)."""


@functools.cache
def _planned(network: Any, module: type[nn.Module], pictures: int) -> Plan:
    """Kept, so that a process traces and compiles once what makes a network. pictures: that the module is called with."""

    @jax.jit
    def make(key):
        picture = jnp.zeros((1, network.image_size, network.image_size, 3))
        return module(network).init(key, *[picture] * pictures)["params"]

    return network, jax.eval_shape(make, jax.random.key(0)), make


def _plan_dino(config: DinoConfig) -> Plan:
    if config.path:
        parse = functools.partial(Dinov2Config.from_transformers, position_offset=config.position_offset)
        found = read_torch_config(config.path, parse, "dino")
        if config.image_size < found.patch_size:
            raise ConfigError(
                f"config.model.dino.image_size is {config.image_size}; a patch of {config.path} has {found.patch_size}"
            )
    else:
        found = Dinov2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    return _planned(found, Dinov2, 1)


def _load_dino(config: DinoConfig) -> VisionNetwork:
    network, shapes, _ = _plan_dino(config)
    return VisionNetwork(network, *load_torch_folder(config.path, shapes, "dino"))


def _plan_first_stage(config: FirstStageConfig) -> Plan:
    if config.path:
        found = read_torch_config(config.path, CLIPVisionConfig.from_transformers, "ipf")
        if found.image_size != config.image_size:
            raise ConfigError(
                f"config.model.ipf.image_size is {config.image_size}; the CLIP of {config.path} sees {found.image_size}"
            )
    else:
        found = CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )

    return _planned(found, ImagePoseFusion, 2)


def _load_first_stage(config: FirstStageConfig) -> VisionNetwork:
    network, shapes, _ = _plan_first_stage(config)
    clip, print_of_clip = load_torch_folder(config.path, shapes["clip"], "ipf")
    file = pathlib.Path(config.path) / COMBINER_FILE
    if not file.is_file():
        raise refusal(config.path, "ipf", f"holds no {COMBINER_FILE}: it is a plain CLIP")
    try:
        combiner = from_torch.load(file, shapes["combiner"], key_maps.COMBINER)
    except (OSError, ConversionError) as error:
        raise refusal(config.path, "ipf", str(error).splitlines()[0]) from error
    both = hashlib.sha256(f"{print_of_clip} {files_sha256(file)}".encode()).hexdigest()
    return VisionNetwork(network, {"clip": clip, "combiner": jax.tree.map(jnp.asarray, combiner)}, both)


_PLAN: Mapping[str, Callable[[Any], Plan]] = {"dino": _plan_dino, "ipf": _plan_first_stage}
_LOAD: Mapping[str, Callable[[Any], VisionNetwork]] = {"dino": _load_dino, "ipf": _load_first_stage}
