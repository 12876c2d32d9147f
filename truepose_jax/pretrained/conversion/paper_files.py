"""FPDM's second stage and IMAGPose as files under their public code's names, and such files as weights to begin with.

    FPDM        unet/ as diffusers opens it, attn2's keys and values in it (class_embed_type "identity")
                fpdm.safetensors         pose_t_proj, srcimage_proj_model and class_embedding, as the public checkpoint has them
    IMAGPose    denoising_unet, pose_guider and patch .safetensors, as its stages save them
    both        training_config.json     the whole configuration, which tells their sizes; scheduler/

FPDM's public checkpoint is one state_dict with all of this under sd_model., and its first stage under fusion_model.; IMAGPose's
files have a step in their names, and the one called motion_module is a whole UNet, of which the motion modules are read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from truepose_jax.config import Config, to_dict
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import CONFIG_FILE, write_files
from truepose_jax.pretrained.conversion.export_configs import scheduler_config, unet_config
from truepose_jax.pretrained.conversion.first_stage import COMBINER_FILE, clip_config
from truepose_jax.pretrained.conversion.first_stage import SETTINGS_FILE as FIRST_STAGE_FILE
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.origins import licence_of
from truepose_jax.pretrained.conversion.paper_start import OF_UNET, unet_tensor
from truepose_jax.pretrained.conversion.plan import Plan, Source, Tree, copies, parameters
from truepose_jax.pretrained.conversion.safetensors_io import STEMS, ConversionError, TensorSource
from truepose_jax.pretrained.conversion.weights_folder import (
    CLIP_FOLDER,
    PARAMS_FILE,
)

Open = Callable[[Path], TensorSource]

_NETS = {
    "source_projection": ("srcimage_proj_model", {"fc1": 0, "norm": 3, "fc2": 4}),
    "fusion_embedding": ("class_embedding", {"fc1": 0, "fc2": 3}),
}
"""Networks of FPDM that are lists in the public code: its name for each, and the places of the modules."""


def fpdm_place(path: str) -> tuple[str, str]:
    """(stem of the file, tensor's name in it) of FPDM's parameter at `path`."""
    network, _, inside = path.partition("/")
    if network in OF_UNET:
        return "unet", unet_tensor(path)
    if network == "pose_encoder":
        return "fpdm", key_maps.torch_name(f"pose_t_proj/{inside}")
    name, places = _NETS[network]
    module, leaf = inside.split("/")
    return "fpdm", f"{name}.net.{places[module]}.{key_maps.torch_name(leaf)}"


def imagpose_place(path: str) -> tuple[str, str]:
    """The same of IMAGPose."""
    network, _, inside = path.partition("/")
    if network in OF_UNET:
        return "denoising_unet", unet_tensor(path)
    if network == "pose_encoder":
        return "pose_guider", key_maps.torch_name(inside)
    return "patch", key_maps.torch_name(inside.removeprefix("texture/"))


class Form(NamedTuple):
    """place_of(path) -> (stem, tensor). files: {stem: its file in an export}."""

    title: str
    place_of: Callable[[str], tuple[str, str]]
    files: Mapping[str, str]


FORMS = {
    "fpdm": Form("FPDM", fpdm_place, {"unet": f"unet/{STEMS[0]}.safetensors", "fpdm": "fpdm.safetensors"}),
    "imagpose": Form(
        "IMAGPose", imagpose_place, {stem: f"{stem}.safetensors" for stem in ("denoising_unet", "pose_guider", "patch")}
    ),
}


def write(dst: Path, params: Mapping[str, Any], *, config: Config, dtype: str | None = None) -> str:
    """Writes a run of one of FORMS and says so. Raises ConversionError before the first byte."""
    form = FORMS[config.model.method]
    told = {CONFIG_FILE: to_dict(config), "scheduler/scheduler_config.json": scheduler_config(config.diffusion)}
    if "unet" in form.files:
        embedded = {"class_embed_type": "identity"} if config.model.fusion_embedding else {}
        told["unet/config.json"] = unet_config(config.model) | embedded
    texts = {file: json.dumps(values, indent=2, allow_nan=False) + "\n" for file, values in told.items()}
    return f"{form.title}'s files: {write_files(dst, params, form.place_of, form.files, texts, dtype)}"


def of_export(src: Path, method: str, open_file: Open) -> dict[str, Source]:
    """{stem: its tensors} of what `write` wrote. Raises ConversionError."""
    found = {}
    for stem, name in FORMS[method].files.items():
        if (src / name).is_file():
            found[stem] = Source(
                str(src / name), open_file(src / name), ModelKeys(FORMS[method].title), {name: src / name}
            )
    return found


# IMAGPose's own files

_CONSTANT = (r".*pos_encoder\.pe", "a constant")
_STAGE = ModelKeys("IMAGPose network", ignored=(_CONSTANT,))
_MOTION = ModelKeys(
    "IMAGPose's motion modules",
    ignored=(
        _CONSTANT,
        (r"(?!.*\.motion_modules\.).*", "motion_module is a whole UNet: its motion modules alone are read"),
    ),
)
MOTION = "motion_module"


def of_stages(src: Path, open_file: Open) -> dict[str, Source]:
    """{stem: its tensors} of a folder of the stages' files, of each the one of the last step; under MOTION its motion modules,
    where the UNet's file has none. Raises ConversionError."""
    found = {}
    for stem in (*FORMS["imagpose"].files, MOTION):
        files = [x for x in src.glob(f"{stem}*") if re.fullmatch(rf"{stem}(-\d+)?\.(pth|safetensors)", x.name)]
        if files:
            file = max(files, key=lambda x: int((re.findall(r"-(\d+)\.", x.name) or [0])[0]))
            found[stem] = Source(str(file), open_file(file), _MOTION if stem == MOTION else _STAGE, {file.name: file})
    unet = found.get("denoising_unet")
    if unet is None:
        raise ConversionError(
            f"{src} holds neither {CONFIG_FILE} nor denoising_unet-STEP.pth: no IMAGPose that to-torch or its own code wrote"
        )
    if any(".motion_modules." in name for name in unet.tensors.infos):
        found.pop(MOTION, None)
    return found


# FPDM's own checkpoint

_AGAIN = ((r"unet\.", "sd_model.unet."), (r"fusion_model\.pose_encoder\.", "fusion_model.img_encoder."))
_RELEASED = ModelKeys(
    "state_dict of FPDM",
    ignored=(
        (r"unet\..*", "the UNet again, the same bits"),
        (r"fusion_model\.pose_encoder\..*", "the first stage's CLIP again, the same bits"),
        (r"(sd_model\.)?vae\..*", "the autoencoder: model.vae names one"),
        (r"(sd_model\.)?src_image_encoder\..*", "DINOv2: model.dino.path names one"),
        (r".*position_ids", "a buffer"),
    ),
)


def of_checkpoint(file: Path, tensors: TensorSource) -> Source:
    """FPDM's public checkpoint, whose repeated tensors are compared. Raises ConversionError."""
    if "sd_model.unet.conv_in.weight" not in tensors.infos:
        raise ConversionError(
            f"{file} is no state_dict of FPDM's second stage: no tensor is named sd_model.unet.conv_in.weight"
        )
    for name in tensors.infos:
        for pattern, first in _AGAIN:
            twin = re.sub(rf"^{pattern}", first, name)
            if twin != name and twin in tensors.infos and not np.array_equal(tensors.read(twin), tensors.read(name)):
                raise ConversionError(f"{file}: {name} and {twin} should be the same tensor and are not")
    return Source(str(file), tensors, _RELEASED, {file.name: file})


def released_name(stem: str, tensor: str) -> str:
    """In the public checkpoint, of what an export has as `tensor` in `stem`."""
    return f"sd_model.{'unet.' if stem == 'unet' or tensor.startswith('class_embedding.') else ''}{tensor}"


def first_stage_items(source: Source, tree: Tree, clip: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """(items, texts) of the first stage in the public checkpoint, as config.model.ipf.path takes them."""
    items = {
        f"{CLIP_FOLDER}/{STEMS[1]}.safetensors": copies(
            tree["clip"], source, lambda n: f"fusion_model.img_encoder.{n}"
        ),
        COMBINER_FILE: copies(tree["combiner"], source, lambda n: f"fusion_model.combiner.{n}"),
    }
    texts = {f"{CLIP_FOLDER}/config.json": clip_config(clip), FIRST_STAGE_FILE: json.dumps({"method": "ipf"}) + "\n"}
    return items, texts


# Both

WIDTHS = {
    "fpdm": {"dino": "source_projection/fc1/kernel", "ipf": "fusion_embedding/fc1/kernel"},
    "imagpose": {"dino": "flc/dino_projection/kernel"},
}
"""Of a method: frozen network -> the parameter whose first side is as wide as what that says."""


def sized(config: Config, source_of: Callable[[str], tuple[Source, str]]) -> Config:
    """The configuration with stand-ins of the frozen networks as wide as the tensors read: no folder of theirs is needed."""
    model = dataclasses.replace(config.model, vae="")
    for role, path in WIDTHS[model.method].items():
        own = dataclasses.replace(getattr(model, role), path="")
        if role == "ipf" and not model.fusion_embedding:
            continue
        source, tensor = source_of(path)
        info = source.tensors.infos.get(tensor)
        # IMAGPose projects DINOv2's tokens only where they are not as wide as the context.
        width = info.shape[-1] if info else model.unet.cross_attention_dim
        changes = {"width": width} if role == "ipf" else {"hidden_size": width, "heads": 1}
        model = dataclasses.replace(model, **{role: dataclasses.replace(own, **changes)})
    return dataclasses.replace(config, model=model)


def plan_of(
    src: Path, config: Config, tree: Tree, source_of: Callable[[str], tuple[Source, str]], *, name: str
) -> Plan:
    """The weights folder of a whole network, nothing random in it. source_of(path) -> (source, tensor's name there)."""
    schedule = to_dict(config.diffusion.schedule)
    schedule.pop("clip_x0")
    model = config.model
    settings = {"autoencoder": {"kind": model.autoencoder}, "pose_encoder": {"kind": model.pose_encoder}}
    return Plan(
        items={PARAMS_FILE: parameters(tree, source_of)},
        texts={},
        details={
            "method": model.method,
            "unet": to_dict(model.unet),
            "fresh": [],
            "schedule": schedule,
            "origin": {"model": model.method, "name": name, "licence": licence_of(src)},
            "settings": settings | {"positions": model.positions, "config": to_dict(config)},
        },
    )
