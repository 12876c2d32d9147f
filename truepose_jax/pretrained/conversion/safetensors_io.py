"""Safetensors files read and written one tensor at a time, so that memory holds one tensor and not a model.

The safetensors package maps whole files (its pages count as memory of the process) and saves whole dicts.
The format is 8 bytes of header length, a JSON header, then the arrays.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from input_pipeline import atomic, files
from input_pipeline.schema import UserError


class ConversionError(UserError):
    """Weights that cannot be converted: the message names every tensor concerned and what was expected."""

    lines = True


DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the format
_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}


class TensorInfo(NamedTuple):
    """Shape in PyTorch's layout, and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorSource(Protocol):
    """Tensors by name: what is there without reading it, and one at a time."""

    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray: ...


class ArraySource:
    """A state dict that is already in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.infos = {name: TensorInfo(tuple(a.shape), np.dtype(a.dtype)) for name, a in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


class SafetensorsSource:
    """The tensors of one or more safetensors files, and the texts beside them. ConversionError for a damaged file or a repeated
    name."""

    def __init__(self, files: Iterable[Path]):
        self.infos: dict[str, TensorInfo] = {}
        self.texts: dict[str, str] = {}
        self._where: dict[str, tuple[Path, int]] = {}
        for file in files:
            found, texts = _read_header(file)
            self.texts |= texts
            for name, (info, offset) in found.items():
                if name in self.infos:
                    raise ConversionError(f"tensor {name} is in {self._where[name][0].name} and in {file.name}")
                self.infos[name] = info
                self._where[name] = (file, offset)

    def read(self, name: str) -> np.ndarray:
        info, (file, offset) = self.infos[name], self._where[name]
        count = int(np.prod(info.shape, dtype=np.int64))
        return np.fromfile(file, dtype=info.dtype, count=count, offset=offset).reshape(info.shape)

    def map(self, name: str) -> files.MappedArray:
        """The tensor in its file, for reading pages of it."""
        info, (file, offset) = self.infos[name], self._where[name]
        return files.MappedArray(file, info.dtype, "r", offset, info.shape)


def _read_header(file: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """({name: (info, offset of its first byte in the file)}, texts)."""
    with files.open_plain(file, "a safetensors file", error=ConversionError) as f:
        size = os.fstat(f.fileno()).st_size
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            seen = files.looks_like(start + f.read(504))
            why = f"it is {seen}" if seen else f"{size} bytes"
            raise ConversionError(f"{file} is not a safetensors file or is truncated ({why})")
        try:
            header = files.parse_json(f.read(length).decode())
            files.check_form(header, {str: dict})
            texts = header.pop("__metadata__", {})
            files.check_form(texts, {str: str})
            files.check_form(header, {str: _ENTRY})
        except ValueError as error:
            raise ConversionError(f"{file} is not a safetensors file: {error}") from error
    found, end = {}, 0
    # The official reader's rules: the tensors fill the file, one behind the other, no byte of two and none of none.
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ConversionError(f"{file}: tensor {name} has the unknown dtype {entry['dtype']}")
        info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        if len(entry["data_offsets"]) != 2 or any(side < 0 for side in info.shape):
            raise ConversionError(f"{file}: tensor {name} has the shape {info.shape} at {entry['data_offsets']}")
        start, stop = entry["data_offsets"]
        if stop - start != info.dtype.itemsize * math.prod(info.shape):
            raise ConversionError(f"{file}: tensor {name} of shape {info.shape} does not fill its bytes")
        if 8 + length + stop > size:
            raise ConversionError(f"{file} is truncated: tensor {name} ends beyond its {size} bytes")
        if start != end:
            raise ConversionError(
                f"{file}: tensor {name} begins at byte {start} of the data; the one before ends at {end}"
            )
        found[name], end = (info, 8 + length + start), stop
    if 8 + length + end != size:
        raise ConversionError(f"{file}: {size - 8 - length - end} bytes behind the last tensor belong to none")
    return {name: found[name] for name in header}, texts


STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weights."""


def weight_files(src: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of one model: `src` itself, or those of a diffusers / transformers folder.

    variant: 'fp16', 'non_ema', ...; None takes the plain files, or the fp16 ones where there are no others.
    Raises ConversionError where nothing fits, saying what is there instead.
    """
    if src.is_file():
        return _files_of_index(src) if src.suffix == ".json" else [src]
    if not src.is_dir():
        raise ConversionError(f"{src} does not exist")
    for v in (variant,) if variant else (None, "fp16"):
        for stem in STEMS:
            single = src / (f"{stem}.{v}.safetensors" if v else f"{stem}.safetensors")
            index = src / (f"{stem}.safetensors.index.{v}.json" if v else f"{stem}.safetensors.index.json")
            if single.is_file():
                return [single]
            if index.is_file():
                return _files_of_index(index)
    there = sorted(p.name for p in src.iterdir() if p.is_file())
    wanted = f"variant {variant!r}" if variant else "safetensors weights"
    hint = "; .bin files are not read, save them as safetensors" if any(n.endswith(".bin") for n in there) else ""
    raise ConversionError(f"{src} holds no {wanted} ({STEMS[0]} or {STEMS[1]}); it has {there}{hint}")


def _files_of_index(index: Path) -> list[Path]:
    form, what = {"weight_map": {str: str}}, "an index of safetensors shards"
    shard_of = files.read_json(index, form, what=what, limit=_MAX_HEADER, error=ConversionError)["weight_map"]
    outside = [name for name in shard_of.values() if Path(name).name != name]
    if outside:
        raise ConversionError(f"{index} names a shard outside its folder: {outside[0]}")
    shards = [index.parent / name for name in sorted(set(shard_of.values()))]
    missing = [f.name for f in shards if not f.is_file()]
    if missing:
        raise ConversionError(f"{index} names shards that are missing: {missing}")
    there = {name: file.name for file in shards for name in _read_header(file)[0]}
    astray = sorted(name for name, shard in shard_of.items() if there.get(name) != shard)
    if astray:
        raise ConversionError(f"{index}: tensors that are not in the shard it names: {astray}")
    return shards


def open_source(src: TensorSource | Mapping[str, np.ndarray] | str | os.PathLike, variant: str | None = None):
    """A TensorSource of a state dict, a safetensors file, a shard index, or a model's folder."""
    if isinstance(src, Mapping):
        return ArraySource(src)
    if isinstance(src, str | os.PathLike):
        return SafetensorsSource(weight_files(Path(src), variant))
    return src


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, np.ndarray]], **texts: str
) -> None:
    """Writes the tensors, which come in the order of `infos`, and texts beside them. The file appears when it is whole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **texts}}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.dtype.itemsize * int(np.prod(info.shape, dtype=np.int64))
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic.replacing(path) as partial, partial.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for (name, info), (given, array) in zip(infos.items(), tensors, strict=True):
            if given != name or TensorInfo(array.shape, array.dtype) != info:
                raise ValueError(f"expected tensor {name} {info}; got {given} {array.shape} {array.dtype}")
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
