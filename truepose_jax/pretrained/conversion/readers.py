"""Where weights come from: an SD1.5 folder of diffusers, its original single file, an export of ours; CLIP beside them.

Each reader gives the Plan of a weights folder (weights_folder.py says what that is), made from configs and headers alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from truepose_jax.config import UNetConfig, to_dict
from truepose_jax.pretrained.conversion import key_maps, ldm, origins, paper_start, starting_point, truepose_names
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.plan import Item, Plan, Shapes, Source, Tree, copies, parameters
from truepose_jax.pretrained.conversion.safetensors_io import (
    STEMS,
    ConversionError,
    SafetensorsSource,
    TensorSource,
    weight_files,
)
from truepose_jax.pretrained.conversion.weights_folder import CLIP_FOLDER, CODEC_FILE, DINO_FOLDER, PARAMS_FILE

SD15_FOLDERS = ("unet", "vae", "scheduler")
SCHEDULER_FILE = "scheduler/scheduler_config.json"
VAE_FILE = f"vae/{STEMS[0]}.safetensors"
CLIP_FILE = f"{CLIP_FOLDER}/{STEMS[1]}.safetensors"
"""Frozen networks lie where truepose_jax/pretrained/frozen_networks.py looks for them."""

SD15_UNET = UNetConfig()
SD15_FACTOR = 8
"""Pixels per latent cell and side."""
EXTRAS = ModelKeys(title=f"{truepose_names.EXTRAS}.safetensors of a TruePose export")
CODEC = ModelKeys(title="a patch codec")

_STRANGE_CONFIGS = (
    ("addition_embed_type", "text_time", "an SDXL UNet (it has an added text-and-size embedding)"),
    ("in_channels", 9, "an inpainting UNet (9 input channels)"),
    ("in_channels", 8, "an InstructPix2Pix or image-variation UNet (8 input channels)"),
    ("in_channels", 5, "a depth-to-image UNet (5 input channels)"),
    ("cross_attention_dim", 1024, "an SD2.x UNet (context of width 1024, SD1.5 has 768)"),
)


def sd15_folder(src: Path, shapes: Shapes, *, name: str, variant: str | None = None, method: str = "truepose") -> Plan:
    """A diffusers folder with unet/, vae/ and scheduler/. method: whose starting point it becomes; SD2.x serves all but TruePose.
    name: what weights.json calls the origin. variant: "fp16" takes
    the files of that name (the autoencoder's plain ones where it has no such variant). Raises ConversionError."""
    for folder in SD15_FOLDERS:
        if not (src / folder).is_dir():
            there = sorted(p.name for p in src.iterdir())[:20]
            raise ConversionError(
                f"{src} holds no folder {folder}; expected a diffusers folder with {', '.join(SD15_FOLDERS)}, or a single "
                f"file in the original layout; it has {', '.join(there) or 'nothing'}"
            )
    config_file = src / "unet" / "config.json"
    config = origins.read_json(config_file)
    for field, value, what in _STRANGE_CONFIGS:
        if config.get(field) == value and (method == "truepose" or field != "cross_attention_dim"):
            raise ConversionError(f"{config_file}: this is {what}; TruePose starts from SD1.5's UNet")
    unet_config = origins.parsed(config_file, config, UNetConfig.from_diffusers)
    vae_config_file = src / "vae" / "config.json"
    vae_config = origins.read_json(vae_config_file)
    channels = vae_config.get("latent_channels", 4)
    if (unet_config.in_channels, unet_config.out_channels) != (channels, channels):
        raise ConversionError(
            f"{config_file}: this UNet has {unet_config.in_channels} input and {unet_config.out_channels} output "
            f"channels; the autoencoder beside it has {channels}, and TruePose needs the same for all"
        )
    factor = 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)
    if factor != SD15_FACTOR:
        raise ConversionError(f"{vae_config_file}: this autoencoder shrinks by {factor}; SD1.5's by {SD15_FACTOR}")
    vae_tree = origins.parsed(vae_config_file, vae_config, shapes.autoencoder)
    schedule = origins.schedule_of(origins.read_json(src / SCHEDULER_FILE), src / SCHEDULER_FILE)
    make = (
        (lambda unet: shapes.truepose(unet, {})) if method == "truepose" else (lambda unet: shapes.paper(method, unet))
    )
    tree = origins.parsed(config_file, unet_config, make)

    unet = _open(src / "unet", key_maps.UNET, variant)
    vae = _open(src / "vae", key_maps.VAE, variant if variant and _has_variant(src / "vae", variant) else None)
    others = sorted(p.name for p in src.iterdir() if p.is_dir() and p.name not in SD15_FOLDERS and p.name[0] != ".")
    if method == "truepose":
        items, fresh = _starting_point(tree, unet), starting_point.FRESH
    else:
        items, fresh = paper_start.of_unet(tree, unet)
    details = _details("sd15", name, origins.licence_of(src), unet_config, schedule, fresh, method)
    return Plan(
        items={PARAMS_FILE: items, VAE_FILE: copies(vae_tree, vae)},
        texts={
            "vae/config.json": origins.read_text(vae_config_file),
            SCHEDULER_FILE: origins.read_text(src / SCHEDULER_FILE),
        },
        details=details,
        notes=(f"folders not read: {', '.join(others)}",) if others else (),
    )


def sd15_file(
    file: Path,
    tensors: TensorSource,
    shapes: Shapes,
    *,
    name: str,
    not_read: Mapping[str, int],
    unet: UNetConfig = SD15_UNET,
    vae: Mapping[str, Any] = ldm.SD15_VAE,
) -> Plan:
    """The original single file, whose `tensors` are open already. unet, vae: their configs, which no such file says.
    not_read: {reason: count} of what it holds beside tensors. Raises ConversionError."""
    source = Source(str(file), tensors, ldm.KEYS, {file.name: file})
    if not any(name.startswith(ldm.UNET_PREFIX) for name in tensors.infos):
        what = ldm.KEYS.recognise({name: info.shape for name, info in tensors.infos.items()})
        raise ConversionError(
            f"{file} is {what or 'no checkpoint in the original layout'}: no tensor is named {ldm.UNET_PREFIX}..."
        )
    ldm.check_schedule(tensors, str(file))
    schedule = origins.schedule_of(ldm.SD15_SCHEDULER, "SD1.5")
    levels = len(vae["block_out_channels"])
    in_vae = copies(shapes.autoencoder(vae), source, lambda name: ldm.vae_name(name, levels))
    return Plan(
        items={
            PARAMS_FILE: _starting_point(shapes.truepose(unet, {}), source, lambda name: ldm.unet_name(name, unet)),
            VAE_FILE: [item._replace(expected=ldm.vae_shape(item.name, item.shape)) for item in in_vae],
        },
        texts={"vae/config.json": _json(vae), SCHEDULER_FILE: _json(ldm.SD15_SCHEDULER)},
        details=_details("sd15", name, origins.UNKNOWN_LICENCE, unet, schedule, starting_point.FRESH),
        notes=("the file says neither configs nor schedule; SD1.5's are taken",),
        not_read=not_read,
    )


def truepose_export(src: Path, shapes: Shapes, *, name: str) -> Plan:
    """A folder that `convert to-torch` wrote. Of autoencoders it holds at most a patch codec. Raises ConversionError."""
    settings_file = src / truepose_names.SETTINGS_FILE
    settings = origins.read_json(settings_file)
    if settings.get("method") != "truepose" or "source_parsing" not in settings:
        raise ConversionError(
            f"{settings_file}: method is {settings.get('method')!r} and source_parsing "
            f"{settings.get('source_parsing')!r}; expected an export of TruePose by `convert to-torch`"
        )
    configs = {}
    twins = (truepose_names.TARGET_NET, truepose_names.SOURCE_NET)
    for network in twins if settings.get("fusion", {}).get("features") != "clip" else twins[:1]:
        file = src / network / "config.json"
        configs[network] = origins.parsed(file, origins.read_json(file), UNetConfig.from_diffusers)
    unet = configs[truepose_names.TARGET_NET]
    if any(found != unet for found in configs.values()):
        raise ConversionError(f"{src}: the configs of source_net and target_net differ; they are twins")
    tree = origins.parsed(settings_file, unet, lambda unet: shapes.truepose(unet, settings))
    sources = {network: _open(src / network, key_maps.UNET, None) for network in configs}
    sources[truepose_names.EXTRAS] = _open(src / f"{truepose_names.EXTRAS}.safetensors", EXTRAS, None)

    def source_of(path: str) -> tuple[Source, str]:
        place = truepose_names.place_of(path)
        return sources[place.stem], place.tensor

    items = {PARAMS_FILE: parameters(tree, source_of)}
    if (src / CODEC_FILE).is_file():
        codec = _open(src / CODEC_FILE, CODEC, None)
        items[CODEC_FILE] = copies(codec.tensors.infos, codec)
    schedule = origins.schedule_of(origins.read_json(src / SCHEDULER_FILE), src / SCHEDULER_FILE)
    return Plan(
        items=items,
        texts={SCHEDULER_FILE: origins.read_text(src / SCHEDULER_FILE)},
        details=_details("truepose", name, origins.licence_of(src), unet, schedule, ()) | {"settings": settings},
    )


def with_clip(plan: Plan, src: Path, shapes: Shapes, *, name: str) -> Plan:
    """The plan with CLIP's vision tower, from a transformers folder of the tower or of a whole CLIP. Raises
    ConversionError."""
    config_file = src / "config.json"
    config = origins.read_json(config_file)
    tree = origins.parsed(config_file, config, shapes.clip)
    width, context = tree["visual_projection"]["kernel"].shape[1], plan.details["unet"]["cross_attention_dim"]
    if width != context:
        raise ConversionError(
            f"{src}: this CLIP gives tokens of {width}; the UNet reads {context} (SD1.5: openai/clip-vit-large-patch14)"
        )
    text = origins.read_text(config_file)
    if "vision_config" in config:
        # A whole CLIP's; the tower alone is what is written.
        vision = {
            "projection_dim": width,
            "architectures": [key_maps.CLIP_VISION.title],
            "model_type": "clip_vision_model",
        }
        text = _json(dict(config["vision_config"]) | vision)
    clip = _open(src, key_maps.CLIP_VISION, None, CLIP_FOLDER)
    origin = plan.details["origin"] | {"clip": {"name": name, "licence": origins.licence_of(src)}}
    return dataclasses.replace(
        plan,
        items=dict(plan.items) | {CLIP_FILE: copies(tree, clip)},
        texts=dict(plan.texts) | {f"{CLIP_FOLDER}/config.json": text},
        details=dict(plan.details) | {"origin": origin},
    )


def with_dino(plan: Plan, src: Path, tree: Tree, *, width: int) -> Plan:
    """The plan with DINOv2 from a transformers folder, whose parameters as shapes are `tree`; the network it is for reads tokens
    of `width`. Raises ConversionError."""
    found = tree["layernorm"]["scale"].shape[0]
    if found != width:
        raise ConversionError(f"{src}: this DINOv2 gives tokens of {found}; the network reads {width}")
    dino = _open(src, key_maps.DINOV2, None, DINO_FOLDER)
    return dataclasses.replace(
        plan,
        items=dict(plan.items) | {f"{DINO_FOLDER}/{STEMS[1]}.safetensors": copies(tree, dino)},
        texts=dict(plan.texts) | {f"{DINO_FOLDER}/config.json": origins.read_text(src / "config.json")},
    )


def _starting_point(tree: Mapping[str, Any], source: Source, name_of: Callable[[str], str] = str) -> list[Item]:
    """SourceNet, TargetNet and fusion out of one UNet; name_of: diffusers' tensor name -> the source's."""

    def source_of(path: str) -> tuple[Source, str]:
        tensor = starting_point.unet_tensor(path)
        return source, name_of(tensor) if tensor else tensor

    given = {network: leaves for network, leaves in tree.items() if network not in starting_point.FRESH}
    return parameters(given, source_of, lambda path: name_of(starting_point.zeros_like(path)))


def _open(src: Path, keys: ModelKeys, variant: str | None, label: str = "") -> Source:
    """label: what stands before the files' names in weights.json; the folder's own name if empty."""
    try:
        files = weight_files(src, variant)
        tensors = SafetensorsSource(files)
    except OSError as error:
        raise ConversionError(f"{error.filename or src} cannot be read ({error.strerror})") from error
    named = {file.name if src.is_file() else f"{label or src.name}/{file.name}": file for file in files}
    return Source(str(src), tensors, keys, named)


def _has_variant(folder: Path, variant: str) -> bool:
    try:
        return bool(weight_files(folder, variant))
    except ConversionError:
        return False


def _details(
    model: str,
    name: str,
    licence: str,
    unet: UNetConfig,
    schedule: Mapping[str, Any],
    fresh: Sequence[str],
    method: str = "truepose",
) -> dict[str, Any]:
    return {
        "method": method,
        "unet": to_dict(unet),
        "fresh": list(fresh),
        "schedule": dict(schedule),
        "origin": {"model": model, "name": name, "licence": licence},
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
