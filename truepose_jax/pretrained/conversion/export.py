"""A trained model as a folder that diffusers opens: weights by diffusers' names, configs, schedule and a model card.

    source_net/, target_net/   config.json and safetensors of a UNet2DConditionModel each (attn2 of TargetNet is CAA)
    truepose.safetensors       what diffusers has no class for: HPFA, the pose and parsing encoders, the half-cell head
    truepose.json              how these are wired
    scheduler/                 scheduler_config.json of a DDIMScheduler
    training_config.json       the whole configuration
    image_encoder/             CLIP's vision tower, where it was asked for
    patch_codec.safetensors    the patch codec, where it is not the one that comes along
    README.md                  the model card

exported.py opens the folder as a run of ours, and truepose_jax/interop/torch_truepose.py as a PyTorch TruePose (without a head,
and no ablation). B1 has no SourceNet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from truepose_jax.config import Config, to_dict
from truepose_jax.pretrained.conversion import key_maps, to_torch, weights_folder
from truepose_jax.pretrained.conversion.export_configs import scheduler_config, settings, unet_config
from truepose_jax.pretrained.conversion.model_card import model_card
from truepose_jax.pretrained.conversion.safetensors_io import (
    STEMS,
    ConversionError,
    TensorInfo,
    weight_files,
    write_safetensors,
)
from truepose_jax.pretrained.conversion.truepose_names import (
    EXTRAS,
    HEAD,
    SETTINGS_FILE,
    SOURCE_NET,
    TARGET_NET,
    block_of_site,
    place_of,
)
from truepose_jax.runtime.markdown import narrow

FILES = {
    SOURCE_NET: f"{SOURCE_NET}/{STEMS[0]}.safetensors",
    TARGET_NET: f"{TARGET_NET}/{STEMS[0]}.safetensors",
    EXTRAS: f"{EXTRAS}.safetensors",
}
"""{stem of truepose_names: file in the folder}."""

CONFIG_FILE = "training_config.json"
WEIGHTS = ("ema", "raw")

_HPFA = (
    *(f"{name}.weight" for name in ("source_to_q", "source_to_k", "source_to_v", "to_q", "to_k", "to_v")),
    *(f"{name}.{part}" for name in ("norm", "to_out.0") for part in ("weight", "bias")),
)
_HPFA_OF_HEAD = ("limbs.weight", "limb_scale")
_POSE_ENCODER = tuple(
    f"pose_encoder.{name}.{part}" for name in ("conv_0", "conv_1", "conv_2", "conv_out") for part in ("weight", "bias")
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written: tensors and parameters per file (by its path in the folder), and the bytes of all tensors."""

    folder: Path
    tensors: Mapping[str, int]
    parameters: Mapping[str, int]
    bytes: int

    def __str__(self) -> str:
        files = "\n".join(
            f"  {file}: {self.tensors[file]} tensors, {self.parameters[file]:,} parameters" for file in self.tensors
        )
        return f"{self.folder}: {weights_folder.gib(self.bytes)} of weights\n{files}"


def write_export(
    dst: Path,
    params: Mapping[str, Any],
    *,
    config: Config,
    dtype: str | None = None,
    origin: Mapping[str, Any] | None = None,
    run: Mapping[str, Any],
    clip: Path | None = None,
    codec: Path | None = None,
) -> Report:
    """Writes the folder `dst`, which must not exist or be empty; it appears when it is whole.

    params: our parameter tree; leaves may be NumPy or jax arrays and are brought to the host one by one. dtype: of all
    tensors, "float32", "float16" or "bfloat16"; None keeps each parameter's own. origin: what training started from, as
    WeightsFolder.origin has it: {"name", "licence", "files": {file: sha256}, "clip": {"name", "licence"}}, all but the
    name optional; None: from nothing. run: {"step", "weights": "ema" or "raw", "frozen": {"autoencoder": fingerprint,
    "clip": fingerprint}, "records": {"name", "labels"}}; the last where they are at hand. clip: transformers folder of CLIP's
    vision tower, to be copied in. codec: file of the patch codec, to be copied in; None: the run's is the one that comes
    along, or none. Raises ConversionError before the first byte.
    """
    dst = Path(dst)
    if dtype is not None and dtype not in to_torch.DTYPES:
        raise ConversionError(f"export dtype is {dtype!r}; choose one of {tuple(to_torch.DTYPES)} or none")
    if run["weights"] not in WEIGHTS:
        raise ConversionError(f"export weights are {run['weights']!r}; choose one of {WEIGHTS}")
    trees = _by_file(params)
    infos = {file: to_torch.infos(tree, dtype, _tensor_name) for file, tree in trees.items()}
    if config.model.fusion.is_whole:
        _check_whole(infos, config)
    size = sum(info.dtype.itemsize * math.prod(info.shape) for found in infos.values() for info in found.values())
    inside = [] if clip is None else [clip / "config.json", *weight_files(clip)]
    copied = {f"{weights_folder.CLIP_FOLDER}/{file.name}": file for file in inside} | (
        {weights_folder.CODEC_FILE: codec} if codec else {}
    )
    needed = size + sum(file.stat().st_size for file in copied.values())
    weights_folder.check_destination(dst, needed)
    if dtype == "float16":  # the one that ends before float32 does
        for tree in trees.values():
            for _ in to_torch.stream(tree, dtype, _tensor_name):
                pass

    texts = _texts(_at_home(config, copied), origin, run, infos, copied)
    with weights_folder.new_folder(dst, needed) as partial:
        weights_folder.write_texts(partial, texts)
        for file, tree in trees.items():
            write_safetensors(partial / file, infos[file], to_torch.stream(tree, dtype, _tensor_name))
        for name, file in copied.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)
    return Report(
        folder=dst,
        tensors={file: len(found) for file, found in infos.items()},
        parameters={file: sum(math.prod(info.shape) for info in found.values()) for file, found in infos.items()},
        bytes=size,
    )


def write_files(
    dst: Path,
    params: Mapping[str, Any],
    place_of: Callable[[str], tuple[str, str]],
    files: Mapping[str, str],
    texts: Mapping[str, str],
    dtype: str | None,
) -> str:
    """Writes a run's parameters as these files, where place_of names a tensor, and says so. Raises ConversionError before the
    first byte."""
    flat: dict[str, dict[str, Any]] = {stem: {} for stem in files}
    for path, leaf in key_maps.leaves(params):
        stem, tensor = place_of(path)
        if tensor:
            flat[stem][path] = leaf
    trees = {files[stem]: key_maps.nest(found) for stem, found in flat.items() if found}

    def name_of(path: str) -> str:
        return place_of(path)[1]

    infos = {file: to_torch.infos(tree, dtype, name_of) for file, tree in trees.items()}
    size = sum(info.dtype.itemsize * math.prod(info.shape) for found in infos.values() for info in found.values())
    with weights_folder.new_folder(dst, size) as partial:
        weights_folder.write_texts(partial, texts)
        for file, tree in trees.items():
            (partial / file).parent.mkdir(exist_ok=True)
            write_safetensors(partial / file, infos[file], to_torch.stream(tree, dtype, name_of))
    return f"{dst}: " + ", ".join(f"{file} {len(found)} tensors" for file, found in infos.items())


def _at_home(config: Config, copied: Container[str]) -> Config:
    """The configuration with what was copied in called by its place there: where it lay before is nobody's business."""
    model = config.model
    if f"{weights_folder.CLIP_FOLDER}/config.json" in copied:
        model = dataclasses.replace(model, clip=dataclasses.replace(model.clip, path=weights_folder.CLIP_FOLDER))
    if weights_folder.CODEC_FILE in copied:
        model = dataclasses.replace(model, vae=weights_folder.CODEC_FILE)
    return dataclasses.replace(config, model=model)


def _tensor_name(path: str) -> str:
    return place_of(path).tensor


def _by_file(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{file: the part of the tree that it holds}."""
    flat: dict[str, dict[str, Any]] = {file: {} for file in FILES.values()}
    for path, leaf in key_maps.leaves(params):
        try:
            flat[FILES[place_of(path).stem]][path] = leaf
        except ValueError as error:
            raise ConversionError(str(error)) from error
    return {file: key_maps.nest(found) for file, found in flat.items() if found}


def _check_whole(infos: Mapping[str, Mapping[str, TensorInfo]], config: Config) -> None:
    """That no part of the network is missing: the twins have the same tensors, the rest is known by name, of the half-cell head
    its networks'."""
    model = config.model
    source, target, extras = (infos[FILES[stem]] for stem in (SOURCE_NET, TARGET_NET, EXTRAS))
    blocks = [block_of_site(site.name) for site in model.unet.sites]
    head = HEAD if model.carry.head else ()
    hpfa = (*_HPFA, *(("cosine_scale",) if model.fusion.cosine else ()), *(_HPFA_OF_HEAD if head else ()))
    wanted = {key_maps.torch_name(f"hpfa/{block}/_")[:-1] + name for block in blocks for name in hpfa}
    wanted |= {*_POSE_ENCODER, *head}
    if model.source_parsing == "coverage":
        wanted.add("parsing_encoder.class_bias.weight")
    in_unet = {key_maps.torch_name(f"{block}/attn2/to_k/kernel") for block in blocks} | {"conv_in.weight"}
    found = {network if (network := name.split(".")[0]) in HEAD else name for name in extras}
    wrong = {
        FILES[EXTRAS]: wanted ^ found,
        "source_net and target_net": source.keys() ^ target.keys(),
        FILES[SOURCE_NET]: in_unet - source.keys(),
    }
    for where, names in wrong.items():
        if names:
            raise ConversionError(
                f"these parameters are not the whole of this configuration's TruePose: {where} differ by "
                f"{len(names)} tensors, such as {min(names)}"
            )
    width, channels = model.unet.block_out_channels[0], model.unet.in_channels
    for name, info in (("source_net", source), ("target_net", target)):
        if info["conv_in.weight"].shape[:2] != (width, channels):
            raise ConversionError(
                f"{name}'s conv_in has the shape {info['conv_in.weight'].shape}; the configuration says "
                f"{channels} channels to {width}"
            )


def _texts(
    config: Config,
    origin: Mapping[str, Any] | None,
    run: Mapping[str, Any],
    infos: Mapping[str, Mapping[str, TensorInfo]],
    copied: Container[str],
) -> dict[str, str]:
    """{file: its text}, for all that is no tensor. copied: files of frozen networks in the folder."""
    unet = unet_config(config.model)
    nets = [net for net in (SOURCE_NET, TARGET_NET) if FILES[net] in infos]
    classes = infos[FILES[EXTRAS]].get("parsing_encoder.class_bias.weight")
    found = {
        **{f"{net}/config.json": unet for net in nets},
        "scheduler/scheduler_config.json": scheduler_config(config.diffusion),
        SETTINGS_FILE: settings(config, classes=classes.shape[1] if classes else 0, run=run),
        CONFIG_FILE: to_dict(config),
    }
    texts = {file: json.dumps(values, indent=2, allow_nan=False) + "\n" for file, values in found.items()}
    return texts | {"README.md": narrow(model_card(config, origin, run, copied=copied))}
