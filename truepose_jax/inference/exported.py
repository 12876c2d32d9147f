"""A folder that `convert to-torch` wrote, opened as if it were the run: `generate`, `study` and Pipeline.load take it for one.

So a trained model is one folder that both diffusers and this program open. Nothing can be trained on in it (config.init_from
starts a run from one, by way of `convert from-torch`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict, with_defaults
from truepose_jax.methods import needs
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import CONFIG_FILE
from truepose_jax.pretrained.conversion.origins import read_json
from truepose_jax.pretrained.conversion.plan import Shapes
from truepose_jax.pretrained.conversion.readers import truepose_export
from truepose_jax.pretrained.conversion.truepose_names import SETTINGS_FILE
from truepose_jax.pretrained.conversion.weights_folder import (
    CODEC_FILE,
    PARAMS_FILE,
    WEIGHTS_FILE,
    WeightsFolder,
    open_weights,
)
from truepose_jax.pretrained.factory import VISION
from truepose_jax.pretrained.frozen_networks import KINDS
from truepose_jax.training.checkpoint import CheckpointError
from truepose_jax.training.init import param_shapes


@dataclasses.dataclass(frozen=True)
class Exported:
    """In the place of a run's Checkpoints. step, weights: which ones were exported ("ema" or "raw"). frozen: fingerprints of
    the networks that the run was trained with. labels: label set of its parsing maps, "" where it is not known."""

    folder: pathlib.Path
    config: Config
    step: int
    weights: str
    frozen: Mapping[str, str]
    labels: str

    @classmethod
    def is_one(cls, folder: pathlib.Path) -> bool:
        return (folder / SETTINGS_FILE).is_file() and (folder / CONFIG_FILE).is_file()

    @classmethod
    def open(cls, folder: pathlib.Path) -> Exported:
        """Reads what is no tensor. Raises ConversionError and CheckpointError."""
        try:
            config = from_config_dict(Config, with_defaults(Config, read_json(folder / CONFIG_FILE)))
        except ConfigError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
        settings = read_json(folder / SETTINGS_FILE)
        run = settings.get("run")
        if not isinstance(run, dict) or run.keys() != {"step", "weights", "frozen"}:
            raise CheckpointError(
                f"{folder / SETTINGS_FILE} does not say which step and weights it holds: an older version wrote it; export "
                "the run again"
            )
        clip, codec = config.model.clip, folder / CODEC_FILE
        if (folder / KINDS["clip"].inside / "config.json").is_file():
            clip = dataclasses.replace(clip, path=str(folder))
        vae = str(codec) if codec.is_file() else config.model.vae
        model = dataclasses.replace(config.model, clip=clip, vae=vae)
        config = dataclasses.replace(config, model=model)
        return cls(folder, config, run["step"], run["weights"], run["frozen"], settings.get("labels") or "")

    def restore_part(self, name: str, step: int | None = None, *, place: Sharding | None = None) -> Any:
        """As Checkpoints.restore_part, of the one part and step that there are; every tensor is checked. Raises
        ConversionError."""
        del name, step
        made = param_shapes(self.config)
        wanted = {path: leaf.dtype for path, leaf in key_maps.leaves(made)}
        plan = truepose_export(self.folder, Shapes(lambda *_: made, _none_here, _none_here), name=str(self.folder))
        tensors = plan.check().tensors(PARAMS_FILE)
        return key_maps.nest({path: jax.device_put(jnp.asarray(x, wanted[path]), place) for path, x in tensors})


def _none_here(config: Mapping[str, Any]) -> Any:
    raise AssertionError("an export holds no other network")


def _with_what_lies_there(folder: pathlib.Path, values: Any) -> Config:
    """The configuration in a weights folder, its frozen networks found beside the weights. Raises CheckpointError."""
    try:
        config = from_config_dict(Config, with_defaults(Config, values))
    except (AttributeError, ConfigError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: {error}") from error
    inside = {kind: str(folder) for kind, of in KINDS.items() if (folder / of.inside / "config.json").is_file()}
    for role in needs(config).networks:
        if role in VISION and role not in inside:
            raise CheckpointError(
                f"{folder} holds no {role}, through which its network sees the source: convert again with --dino=DIR, or train "
                f"from it by config.init_from and config.model.{role}.path"
            )
    return dataclasses.replace(config, model=config.model.located(inside, anew=True))


def implied(found: WeightsFolder) -> dict[str, Any]:
    """The values of a config that a folder of TruePose's weights tells: the defaults, where it is silent."""
    told, values = found.settings, to_dict(Config())
    model, diffusion = values["model"], values["diffusion"]
    model["unet"] |= found.unet
    for group in ("fusion", "carry"):
        model[group] |= told.get(group, {})
    model |= {name: told[name] for name in ("positions", "source_parsing") if name in told}
    model["pose_encoder"] = told.get("pose_encoder", {}).get("kind", model["pose_encoder"])
    codec = told.get("autoencoder", {})
    model["autoencoder"] = codec.get("kind", model["autoencoder"])
    if model["autoencoder"] == "pixels":
        model["pixel_factor"] = codec["factor"]
    elif model["autoencoder"] == "patches":
        model["patch_channels"] = codec["channels"] // 4
    model["size"] = tuple(told.get("image_size", model["size"]))
    diffusion["schedule"] |= found.schedule or {}
    diffusion |= {name: told["sampling"][name] for name in ("steps", "spacing", "guidance") if "sampling" in told}
    return values


@dataclasses.dataclass(frozen=True)
class Converted:
    """A weights folder in the place of a run's Checkpoints, where `convert from-torch` made it of a whole model that was trained
    elsewhere. Its label set and the frozen networks that it was trained with are not known."""

    folder: pathlib.Path
    config: Config
    step: int = 0
    weights: str = "raw"
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: str = ""

    @classmethod
    def is_one(cls, folder: pathlib.Path) -> bool:
        return (folder / WEIGHTS_FILE).is_file()

    @classmethod
    def open(cls, folder: pathlib.Path) -> Converted:
        """Reads headers. Raises CheckpointError for a starting point, and ConversionError."""
        found = open_weights(folder)
        told = found.settings
        if "config" in told:
            return cls(folder, _with_what_lies_there(folder, told["config"]))
        if found.fresh or "sampling" not in told:
            raise CheckpointError(
                f"{folder} is a starting point, not a trained model ({', '.join(found.fresh) or 'no sampling settings'}): train "
                "from it by config.init_from"
            )
        values = implied(found)
        values["eval"]["steps"] = values["diffusion"]["steps"]
        if (folder / KINDS["clip"].inside / "config.json").is_file():
            values["model"]["clip"]["path"] = str(folder)
        try:
            return cls(folder, from_config_dict(Config, values))
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def restore_part(self, name: str, step: int | None = None, *, place: Sharding | None = None) -> Any:
        """As Checkpoints.restore_part, of the parameters that there are. Raises CheckpointError and ConversionError."""
        del name, step
        found = open_weights(self.folder)
        wanted = dict(key_maps.leaves(param_shapes(self.config)))
        if wrong := sorted(wanted.keys() ^ found.infos.keys()):
            raise CheckpointError(f"{self.folder}: {wrong[0]} is of one and not of the other: its tensors, this model")
        return key_maps.nest(
            {
                path: jax.device_put(jnp.asarray(np.asarray(found.read(path)), leaf.dtype), place)
                for path, leaf in wanted.items()
            }
        )
