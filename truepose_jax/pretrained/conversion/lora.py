"""Adapters as a file that diffusers and PEFT read, and such a file added to a weights folder.

    pytorch_lora_weights.safetensors
        NETWORK.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.{lora_A,lora_B}.weight    [rank in], [out rank]

NETWORK is `unet` of FPDM and IMAGPose, `source_net`, `target_net` or `truepose` of TruePose: what load_lora_adapter takes as
`prefix`. alpha stands in the file's text `lora_adapter_metadata`, by the network, as diffusers writes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from input_pipeline import files
from truepose_jax.config import LoraConfig
from truepose_jax.pretrained.conversion import paper_start, to_torch, truepose_names
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.origins import UNKNOWN_LICENCE, read_json, read_text
from truepose_jax.pretrained.conversion.plan import Item, Plan, Source
from truepose_jax.pretrained.conversion.safetensors_io import (
    ConversionError,
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    write_safetensors,
)
from truepose_jax.pretrained.conversion.weights_folder import (
    PARAMS_FILE,
    WEIGHTS_FILE,
    new_folder,
    open_weights,
)

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
PLAIN = ModelKeys(title="weights folder")

_TENSOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
_ANOTHER = ("use_dora", "use_rslora", "alpha_pattern", "lora_bias")
"""Of PEFT's settings: with any of them adapters mean something else than W + alpha / rank B A with one alpha."""


def tensor_of(method: str, path: str) -> str:
    """'target_net.mid_block. ... .to_q.weight', the name of the method's matrix at `path`; "": it has none there."""
    if method == "truepose":
        return ".".join(truepose_names.place_of(path))
    return f"unet.{paper_start.unet_tensor(path)}" if path.split("/", 1)[0] in paper_start.OF_UNET else ""


def write(dst: Path, adapters: Mapping[str, Any], *, method: str, config: LoraConfig, dtype: str | None = None) -> str:
    """Writes FILE into the folder `dst`, which must not exist or be empty, and says so. adapters: a parameter tree's "lora".
    Raises ConversionError before the first byte."""

    def name_of(path: str) -> str:
        matrix, part = path.rsplit("/lora_", 1)
        tensor = tensor_of(method, f"{matrix}/kernel")
        if not tensor:
            raise ConversionError(f"{matrix} has no name in diffusers, so its adapter has none; --merge adds it up")
        return f"{tensor.removesuffix('.weight')}.lora_{part.split('/')[0]}.weight"

    infos = to_torch.infos(adapters, dtype, name_of)
    told: dict[str, Any] = {}
    for name in infos:
        network, _, module = _TENSOR.fullmatch(name)[1].partition(".")
        told |= {f"{network}.r": config.rank, f"{network}.lora_alpha": config.alpha}
        modules = told.setdefault(f"{network}.target_modules", [])
        modules += [module] if module not in modules else []
    size = sum(info.dtype.itemsize * math.prod(info.shape) for info in infos.values())
    with new_folder(dst, size) as partial:
        tensors = to_torch.stream(adapters, dtype, name_of)
        write_safetensors(partial / FILE, infos, tensors, **{METADATA: json.dumps(told)})
    return f"{dst / FILE}: adapters of {len(infos) // 2} matrices, rank {config.rank}, alpha {config.alpha:g}"


class Adapter(NamedTuple):
    """Of one matrix. a [rank in], b [out rank]: names in the file. scale: alpha / rank."""

    a: str
    b: str
    scale: float


class Sum:
    """A TensorSource of a weights folder's parameters, adapters added to those of `pairs` ({path: Adapter}) in float32."""

    def __init__(self, base: TensorSource, adapters: TensorSource, pairs: Mapping[str, Adapter]):
        self.infos, self._base, self._adapters, self._pairs = base.infos, base, adapters, pairs

    def read(self, name: str) -> np.ndarray:
        array = self._base.read(name)
        if name not in self._pairs:
            return array
        pair = self._pairs[name]
        a, b = (self._adapters.read(x).astype(np.float32).T for x in (pair.a, pair.b))
        return (array.astype(np.float32) + np.float32(pair.scale) * (a @ b)).astype(array.dtype)


def plan_of(file: Path, base: Path, *, name: str) -> Plan:
    """The weights folder `base` with the adapters of `file` added up. Raises ConversionError."""
    file = file / FILE if file.is_dir() else file
    weights, adapters = open_weights(base), SafetensorsSource([file])
    found = _pairs(file, adapters)
    matrices = {tensor_of(weights.method, path): path for path in weights.infos if path.endswith("/kernel")}
    pairs: dict[str, Adapter] = {}
    for module, pair in found.items():
        path = matrices.get(f"{module}.weight")
        if path is None:
            raise ConversionError(f"{file}: {module} is no matrix of {base}, which holds weights of {weights.method!r}")
        shape, (a, b) = weights.infos[path].shape, (adapters.infos[x].shape for x in (pair.a, pair.b))
        if len(shape) != 2 or (a[1], b[0]) != shape:
            raise ConversionError(
                f"{file}: the adapter of {module} is of {b[0]}x{a[1]}; {base} has {list(shape)[::-1]}"
            )
        pairs[path] = pair
    params = Source(str(base), Sum(weights, adapters, pairs), PLAIN, {PARAMS_FILE: base / PARAMS_FILE, file.name: file})
    items = {PARAMS_FILE: _as_they_are(params)}
    others = sorted(x.relative_to(base).as_posix() for x in base.rglob("*") if x.is_file() and x.name != WEIGHTS_FILE)
    for other in others:
        if other.endswith(".safetensors") and other != PARAMS_FILE:
            inside = Source(str(base / other), SafetensorsSource([base / other]), PLAIN, {other: base / other})
            items[other] = _as_they_are(inside)
    told = read_json(base / WEIGHTS_FILE)
    origin = dict(weights.origin) | {"lora": name, "licence": weights.origin.get("licence", UNKNOWN_LICENCE)}
    return Plan(
        items=items,
        texts={other: read_text(base / other) for other in others if other.endswith(".json")},
        details={x: told[x] for x in told if x not in ("format", "version", "dtype")} | {"origin": origin},
        notes=(f"adapters of {name} added to {len(pairs)} matrices",),
    )


def _as_they_are(source: Source) -> list[Item]:
    infos: Mapping[str, TensorInfo] = source.tensors.infos
    return [Item(name, info.shape, source, name, info.shape, "torch") for name, info in infos.items()]


def _pairs(file: Path, adapters: SafetensorsSource) -> dict[str, Adapter]:
    """{module: its Adapter}. Raises ConversionError."""
    told = _told(file, adapters.texts)
    names: dict[str, dict[str, str]] = {}
    for name, info in adapters.infos.items():
        part = _TENSOR.fullmatch(name)
        if part is None or len(info.shape) != 2:
            raise ConversionError(
                f"{file}: {name} {list(info.shape)} is no NETWORK.MODULE.lora_A.weight or lora_B.weight of a matrix: save the "
                "adapters by diffusers' save_lora_weights or save_lora_adapter"
            )
        names.setdefault(part[1], {})[part[2]] = name
    found = {}
    for module, pair in names.items():
        if len(pair) != 2:
            raise ConversionError(f"{file}: {module} has {', '.join(pair)} alone; an adapter is lora_A and lora_B")
        rank = adapters.infos[pair["lora_A"]].shape[0]
        if adapters.infos[pair["lora_B"]].shape[1] != rank or not rank:
            raise ConversionError(f"{file}: lora_A and lora_B of {module} have ranks {rank} and others")
        network = module.split(".", 1)[0]
        found[module] = Adapter(pair["lora_A"], pair["lora_B"], told.get(f"{network}.lora_alpha", rank) / rank)
    if not found:
        raise ConversionError(f"{file} holds no adapters")
    return found


def _told(file: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of its adapters. Raises ConversionError where it is what we do not add up."""
    try:
        told = files.parse_json(texts.get(METADATA, "{}"))
        files.check_form(told, dict)
    except ValueError as error:
        raise ConversionError(f"{file}: its text {METADATA} is no JSON object ({error})") from error
    for name, value in told.items():
        setting = name.rsplit(".", 1)[-1]
        if setting in _ANOTHER and value:
            raise ConversionError(f"{file}: {name} is {value!r}; adapters of this kind are not added up here")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if setting == "lora_alpha" and not (number and math.isfinite(value)):
            raise ConversionError(f"{file}: {name} is {value!r}; expected a number")
    return told
