"""Weights from PyTorch, and trained models to PyTorch. What it is told: truepose_jax/flags/convert.py."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import pickle
import resource
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tqdm

from configs import fpdm_deepfashion_512, imagpose_deepfashion_512
from configs.base import get_config
from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict, with_defaults
from truepose_jax.flags.convert import MODELS, make_parser
from truepose_jax.inference import hub
from truepose_jax.inference.exported import Exported
from truepose_jax.inference.pipeline import Run
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.fpdm import ImagePoseFusion
from truepose_jax.models.unet import UNetConfig
from truepose_jax.models.vae import AutoencoderKLConfig, KLAutoencoder
from truepose_jax.pretrained import vision_networks
from truepose_jax.pretrained.conversion import (
    animate_anyone,
    key_maps,
    lora,
    paper_files,
    readers,
    report,
    weights_folder,
)
from truepose_jax.pretrained.conversion.export import CONFIG_FILE
from truepose_jax.pretrained.conversion.origins import read_json
from truepose_jax.pretrained.conversion.plan import Plan, Shapes, Source, Tree
from truepose_jax.pretrained.conversion.safetensors_io import (
    STEMS,
    ArraySource,
    ConversionError,
    TensorSource,
    open_source,
)
from truepose_jax.pretrained.region_tokens import vision_shapes
from truepose_jax.runtime.cli import install, program
from truepose_jax.training.init import param_shapes

OF_HPFA = ("carry_latents", "cosine", "residual")
"""Settings of config.model.fusion with which HPFA's parameters are others than the paper's."""


@program
def main(argv: Sequence[str]) -> None:
    """Returns the exit code: 2, and what is wrong on stderr, for bad input."""
    flags = make_parser().parse_args(argv)
    {"from-torch": from_torch, "to-torch": to_torch}[flags.command](flags)


def from_torch(flags: argparse.Namespace) -> None:
    """Raises ConversionError before anything is written."""
    if flags.dst is None and not flags.dry_run:
        raise ConversionError("--dst is missing: name the folder for the weights, or --dry-run")
    if flags.dst is not None:
        weights_folder.check_destination(flags.dst, 0)
    checked = make_plan(flags).check()
    if flags.dry_run:
        print("\n".join((*report.table(checked), *report.summary(checked))))
        print(f"dry run: {weights_folder.gib(checked.bytes)} would be written")
        return
    print("\n".join(report.summary(checked)), flush=True)
    total = weights_folder.work(checked)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="convert") as bar:
        weights_folder.write(checked, flags.dst, progress=bar.update)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print("\n".join(report.closing(checked, flags.dst, peak=peak)))


def to_torch(flags: argparse.Namespace) -> None:
    """Raises CheckpointError and ConversionError before anything is written."""
    weights_folder.check_destination(flags.dst, 0)
    run = Run.open(flags.workdir, weights=flags.weights, step=flags.step)
    if isinstance(run.checkpoints, Exported):
        raise ConversionError(f"{flags.workdir} is an export already")
    adapters = bool(run.config.optim.lora.rank) and not flags.merge
    if flags.merge and not run.config.optim.lora.rank:
        raise ConversionError(f"--merge: {flags.workdir} trains no adapters")
    if adapters:
        written = hub.save_adapters(run, flags.dst, dtype=flags.dtype)
    else:
        written = hub.save(run, flags.dst, dtype=flags.dtype, with_clip=flags.with_clip)
    print(f"{flags.workdir}: step {run.step}, {run.weights} weights\n{written}")


def make_plan(flags: argparse.Namespace) -> Plan:
    shapes = Shapes(truepose_shapes, autoencoder_shapes, clip_shapes, paper_shapes)
    if flags.method != "truepose" and (flags.model != "sd15" or flags.clip):
        given = "--clip" if flags.clip else f"--model={flags.model}"
        raise ConversionError(f"--for={flags.method} starts from --model=sd15 alone; {given} is not for it")
    if (flags.model == "lora") != bool(flags.base):
        raise ConversionError("--model=lora and --base=DIR, the weights folder that its adapters are for, go together")
    if flags.model == "lora":
        if flags.clip or flags.variant:
            raise ConversionError("--clip and --variant are not for --model=lora: what --base holds comes along")
        return lora.plan_of(pathlib.Path(flags.src), flags.base, name=flags.src)
    if flags.model in paper_files.FORMS:
        return _paper(flags)
    if flags.dino:
        raise ConversionError(f"--dino is for --model=fpdm and imagpose; --model={flags.model} has no DINOv2")
    if flags.model == "animate-anyone":
        return _animate_anyone(flags, shapes)
    folders = ("unet", "vae") if flags.model == "sd15" else ("source_net", "target_net")
    src, name = _locate(flags.src, [f"{folder}/{STEMS[0]}" for folder in folders], flags.variant)
    if src.is_file():
        if flags.model != "sd15" or flags.variant:
            raise ConversionError(f"--src={src} is a file: --variant, and --model={MODELS[1]}, are for folders")
        if flags.method != "truepose":
            raise ConversionError(f"--src={src} is a file: --for={flags.method} takes a folder of diffusers")
        tensors, not_read = _open_ckpt(src) if src.suffix == ".ckpt" else (open_source(src), {})
        plan = readers.sd15_file(src, tensors, shapes, name=name, not_read=not_read)
    elif flags.model == "sd15":
        plan = readers.sd15_folder(src, shapes, name=name, variant=flags.variant, method=flags.method)
    else:
        if flags.variant:
            raise ConversionError("--variant is for --model=sd15: an export has one set of weights")
        if (src / CONFIG_FILE).is_file():
            config = _config_of(src / CONFIG_FILE, "truepose")
            if not config.model.fusion.is_whole:
                shapes = shapes._replace(truepose=lambda *_: param_shapes(config))
        plan = readers.truepose_export(src, shapes, name=name)
    if flags.clip:
        clip, name = _locate(flags.clip, [STEMS[1]], None)
        plan = readers.with_clip(plan, clip, shapes, name=name)
    return plan


def _paper(flags: argparse.Namespace) -> Plan:
    """FPDM or IMAGPose: an export of ours, or their public files."""
    src, method = pathlib.Path(flags.src), flags.model
    if flags.clip or flags.variant or not src.exists():
        why = "no such file or folder" if not src.exists() else "--clip and --variant are not for it"
        raise ConversionError(f"--model={method} --src={src}: {why}")
    rename = None
    if (src / CONFIG_FILE).is_file():
        config = _config_of(src / CONFIG_FILE, method)
        sources = paper_files.of_export(src, method, _open_any)
    elif method == "imagpose":
        sources = paper_files.of_stages(src, _open_any)
        config = published(method, "stage3")
    else:
        source = paper_files.of_checkpoint(src, _open_any(src))
        sources, rename = {"unet": source, "fpdm": source}, paper_files.released_name
        width = source.tensors.infos.get(f"sd_model.unet.{key_maps.FIRST_CONTEXT}")
        config = published(method, "sd21" if width and width.shape[1] == 1024 else "sd15")
        fused = "sd_model.unet.class_embedding.net.0.weight" in source.tensors.infos
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, fusion_embedding=fused))

    def source_of(path: str) -> tuple[Source, str]:
        stem, tensor = paper_files.FORMS[method].place_of(path)
        if "/motion_modules_" in path:
            stem = paper_files.MOTION if paper_files.MOTION in sources else stem
        if stem not in sources:
            raise ConversionError(f"{src} holds no file {stem}, where {path} should be")
        return sources[stem], rename(stem, tensor) if rename else tensor

    config, items, texts = paper_files.sized(config, source_of), {}, {}
    if rename and config.model.fusion_embedding:
        clip, shapes = _first_stage_of(source.tensors)
        items, texts = paper_files.first_stage_items(source, shapes, clip)
        ipf = dataclasses.replace(config.model.ipf, image_size=clip.image_size)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, ipf=ipf))
    plan = paper_files.plan_of(src, config, param_shapes(config), source_of, name=flags.src)
    plan = dataclasses.replace(plan, items={**plan.items, **items}, texts=texts)
    if flags.dino:
        try:
            _, shapes, _ = vision_networks.plan("dino", dataclasses.replace(config.model.dino, path=flags.dino))
        except ConfigError as error:
            raise ConversionError(f"--dino={flags.dino}: {error}") from error
        plan = readers.with_dino(plan, pathlib.Path(flags.dino), shapes, width=config.model.dino.hidden_size)
    return plan


def published(method: str, variant: str) -> Config:
    """The sizes of a public model, which its files do not tell."""
    configs = {"fpdm": fpdm_deepfashion_512, "imagpose": imagpose_deepfashion_512}
    return from_config_dict(Config, configs[method].get_config(variant))


def _config_of(file: pathlib.Path, method: str) -> Config:
    try:
        config = from_config_dict(Config, with_defaults(Config, read_json(file)))
    except ConfigError as error:
        raise ConversionError(f"{file}: {error}") from error
    if config.model.method != method:
        raise ConversionError(f"{file.parent} is of method {config.model.method!r}; --model={method} reads its own")
    return config


def _first_stage_of(tensors: TensorSource) -> tuple[CLIPVisionConfig, Tree]:
    """(CLIP's configuration, the first stage's parameters as shapes), told by the shapes in FPDM's checkpoint."""
    inside = "fusion_model.img_encoder."
    try:
        infos = {name.removeprefix(inside): x.shape for name, x in tensors.infos.items() if name.startswith(inside)}
        width, _, patch, _ = infos["vision_model.embeddings.patch_embedding.weight"]
        cells = infos["vision_model.embeddings.position_embedding.weight"][0] - 1
        layers = {name.split(".")[3] for name in infos if name.startswith("vision_model.encoder.layers.")}
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=infos["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
            projection_dim=infos["visual_projection.weight"][0],
            num_hidden_layers=len(layers),
            num_attention_heads=max(width // 64, 1),
            image_size=patch * math.isqrt(cells),
            patch_size=patch,
        )
    except (KeyError, ValueError) as error:
        raise ConversionError(f"{inside}* is no CLIP vision tower ({error})") from error
    return config, first_stage_shapes(config)


def _animate_anyone(flags: argparse.Namespace, shapes: Shapes) -> Plan:
    src = pathlib.Path(flags.src)
    if not src.is_dir() or flags.variant:
        why = "--variant is for --model=sd15" if flags.variant else "no such folder; name the one that holds the files"
        raise ConversionError(f"--src={src}: {why}")

    plan = animate_anyone.plan_of(src, _open_any, shapes, name=flags.src)
    if flags.clip:
        clip, name = _locate(flags.clip, [STEMS[1]], None)
        plan = readers.with_clip(plan, clip, shapes, name=name)
    return plan


def truepose_shapes(unet: UNetConfig, settings: Mapping[str, Any]) -> Tree:
    """The Method's parameters as shapes: the one list of what is wanted. settings: truepose.json, as far as it is there. No
    shape depends on the image size."""
    values, channels = get_config(), unet.in_channels
    model, plain = values.model, "sd15" if channels == KLAutoencoder().channels else "pixels"
    model.size = (64, 64)
    model.source_parsing = settings.get("source_parsing", "none")
    model.autoencoder = settings.get("autoencoder", {}).get("kind", plain)
    if model.autoencoder == "pixels":
        model.pixel_factor = math.isqrt(channels // 3)
    elif model.autoencoder == "patches":
        model.patch_channels = channels // 4
    model.fusion.update({name: settings.get("fusion", {}).get(name, False) for name in OF_HPFA})
    for name in ("texture", "alignment"):
        model.fusion[name] = settings.get("fusion", {}).get(name, model.fusion[name])
    model.pose_encoder = settings.get("pose_encoder", {}).get("kind", model.pose_encoder)
    model.carry.update(settings.get("carry", {}))
    if model.carry.head:
        values.diffusion.schedule.prediction = "x0"
    with model.ignore_type():
        model.unet = to_dict(unet)
    return param_shapes(from_config_dict(Config, values))


def paper_shapes(method: str, unet: UNetConfig) -> Tree:
    """Another method's parameters as shapes, with this UNet but for the channels that the method adds."""
    values = get_config(method)
    model = values.model
    if method == "imagpose":
        unet = dataclasses.replace(unet, in_channels=values.model.unet.in_channels)
        model.patch = 1
    model.size = (64, 64)
    with model.ignore_type():
        model.unet = to_dict(unet)
    return param_shapes(from_config_dict(Config, values))


def first_stage_shapes(clip: CLIPVisionConfig) -> Tree:
    """Of FPDM's first stage around this CLIP."""
    picture = jax.ShapeDtypeStruct((1, clip.image_size, clip.image_size, 3), np.float32)
    return jax.eval_shape(ImagePoseFusion(clip).init, jax.random.key(0), picture, picture)["params"]


def autoencoder_shapes(config: Mapping[str, Any]) -> Tree:
    """Of a diffusers config."""
    return jax.eval_shape(KLAutoencoder(AutoencoderKLConfig.from_diffusers(config)).init, jax.random.key(0))


def clip_shapes(config: Mapping[str, Any]) -> Tree:
    """Of a transformers config."""
    return vision_shapes(CLIPVisionConfig.from_transformers(config))


def _locate(src: str, weights: Sequence[str], variant: str | None) -> tuple[pathlib.Path, str]:
    """(path, what to call it) of a path or of a hub name, whose files are fetched: those `weights`, configs, the card."""
    path = pathlib.Path(src)
    if path.exists():
        return path, src
    if not hub.HUB_NAME.fullmatch(src):
        raise ConversionError(f"{src} does not exist, and is no name on the hub such as openai/clip-vit-large-patch14")
    mark = f".{variant}" if variant else ""
    patterns = ["*.json", "README.md", "truepose.safetensors", weights_folder.CODEC_FILE]
    for stem in weights:
        for m in {mark, mark if stem == weights[0] else ""}:  # the autoencoder may lack the variant
            patterns += [f"{stem}{m}.safetensors", f"{stem}{m}-*-of-*.safetensors"]
    try:
        from huggingface_hub import snapshot_download

        found = pathlib.Path(snapshot_download(src, allow_patterns=patterns))
    except Exception as error:  # whatever the network brings; none of it is a bug here
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConversionError(f"{src} does not exist here and cannot be fetched from the hub ({why})") from error
    if not any(found.glob(f"{weights[0]}{mark}*.safetensors")):
        raise ConversionError(f"{src} on the hub has no {weights[0]}{mark}.safetensors; try --variant=fp16")
    return found, f"{src}@{found.name}"


def _open_any(file: pathlib.Path) -> TensorSource:
    return open_source(file) if file.suffix == ".safetensors" else _open_ckpt(file)[0]


def _open_ckpt(file: pathlib.Path) -> tuple[ArraySource, dict[str, int]]:
    """(tensors, {why: how many other things}) of a PyTorch checkpoint, of which nothing but tensors is ever unpickled."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError(f"{file}: {file.suffix} needs PyTorch: {install('torch')}") from error
    try:
        # Only the newer format can be mapped instead of read into memory.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file} holds pickled Python objects, which could run any code, and is not opened; take the .safetensors file of "
            "the same model, or, where you trust who made it, save its tensors alone: "
            f"state = torch.load({file.name!r}, weights_only=False); torch.save(state['state_dict'], 'state.pth')"
        ) from error
    except Exception as error:  # its unpickler fails in any way on what is no checkpoint
        raise ConversionError(f"{file} is no PyTorch checkpoint ({' '.join(repr(error).split())[:200]})") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise ConversionError(f"{file} holds a {type(state).__name__}; expected a state_dict")
    arrays = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            if not isinstance(name, str):
                raise ConversionError(
                    f"{file}: a tensor is called {name!r}; expected a state_dict, whose names are texts"
                )
            arrays[name] = _numpy(value, f"{file}: tensor {name}")
    others = len(state) - len(arrays) + (len(loaded) - 1 if state is not loaded else 0)
    return ArraySource(arrays), {"what training kept (epochs, optimizer): no tensors": others} if others else {}


def _numpy(tensor: Any, where: str) -> np.ndarray:
    """The tensor's own bits; bfloat16 and the 8-bit floats have no form in plain NumPy. Raises ConversionError."""
    import torch

    names = {
        torch.bfloat16: ("int16", "bfloat16"),
        torch.float8_e4m3fn: ("uint8", "float8_e4m3fn"),
        torch.float8_e5m2: ("uint8", "float8_e5m2"),
    }
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "a meta tensor, without values" if tensor.is_meta else "a sparse or quantized tensor"
        raise ConversionError(f"{where} is {kind}; save the model with plain, dense tensors")
    if tensor.dtype in names:
        whole, name = names[tensor.dtype]
        return tensor.detach().contiguous().view(getattr(torch, whole)).numpy().view(getattr(ml_dtypes, name))
    try:
        return tensor.detach().numpy()
    except (RuntimeError, TypeError) as error:
        raise ConversionError(f"{where} has a dtype that is not read ({tensor.dtype})") from error


if __name__ == "__main__":
    sys.exit(main())
