"""Our own folder of weights, which a training run begins with (config.init_from).

    weights.json             what this is: UNet config, noise schedule, which networks are fresh, where it came from
    params.safetensors       parameters by our paths ('source_net/conv_in/kernel'), in our layout and the source's dtype
    vae/                     autoencoder, image_encoder/ CLIP's vision tower, as diffusers and transformers write them:
    image_encoder/           truepose_jax/pretrained/frozen_networks.py reads both
    scheduler/               scheduler_config.json as found
    patch_codec.safetensors  the patch codec, where it is not the one that comes along

A folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from truepose_jax.config import ConfigError, UNetConfig, from_config_dict, to_dict
from truepose_jax.pretrained.conversion.origins import check_schedule, read_json
from truepose_jax.pretrained.conversion.plan import CheckedPlan
from truepose_jax.pretrained.conversion.safetensors_io import (
    ConversionError,
    SafetensorsSource,
    TensorInfo,
    write_safetensors,
)

WEIGHTS_FILE = "weights.json"
PARAMS_FILE = "params.safetensors"
CLIP_FOLDER = "image_encoder"
"""Where CLIP lies in a weights folder, and in an export that has it."""
DINO_FOLDER = "dino"
CODEC_FILE = "patch_codec.safetensors"
"""Where a patch codec of one's own lies in both (models/patch_codec.py)."""
FORMAT = "truepose_jax weights"
VERSION = 1

SPARE = 16 * 2**20
"""Bytes that are kept free beyond the tensors, for headers and configs."""

_CHUNK = 2**20

Progress = Callable[[int], object]
"""Told the number of bytes that were read or written since the last call."""


@dataclasses.dataclass(frozen=True)
class WeightsFolder:
    """An open folder: a TensorSource of parameters in our layout.

    infos: {path: our shape and the dtype in the file}. fresh: networks that have no weights here and begin random.
    unet: the fields of a UNetConfig. schedule: {betas, beta_start, beta_end, steps, prediction}, or None where unknown.
    origin: {"model", "name", "licence", "files": {file: sha256}}, and "clip": {"name", "licence"} where there is one.
    settings: of an export of ours its truepose.json, else {}.
    """

    path: Path
    method: str
    unet: Mapping[str, Any]
    schedule: Mapping[str, Any] | None
    fresh: tuple[str, ...]
    origin: Mapping[str, Any]
    settings: Mapping[str, Any]
    source: SafetensorsSource

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.source.infos

    def read(self, path: str) -> np.ndarray:
        """One parameter in our layout and the file's dtype. Raises ConversionError where the file was cut short."""
        try:
            return self.source.read(path)
        except (OSError, ValueError) as error:
            raise ConversionError(f"{self.path / PARAMS_FILE}: {path} cannot be read ({error})") from error


def open_weights(path: Path) -> WeightsFolder:
    """Opens and validates a folder; reads headers only. Raises ConversionError, one line."""
    path = Path(path)
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise ConversionError(
            f"{path} is no weights folder: it has no {WEIGHTS_FILE}; make one with convert from-torch"
        )
    found = read_json(file)
    if found.get("format") != FORMAT:
        raise ConversionError(f"{file}: format is {found.get('format')!r}; expected {FORMAT!r}")
    if found.get("version") != VERSION:
        raise ConversionError(f"{file}: version is {found.get('version')!r}; this program reads {VERSION}")
    for field, kind in (("method", str), ("unet", dict), ("fresh", list), ("origin", dict)):
        if not isinstance(found.get(field), kind):
            raise ConversionError(f"{file}: {field} is {found.get(field)!r}; expected {kind.__name__}")
    if not all(isinstance(name, str) for name in found["fresh"]):
        raise ConversionError(f"{file}: fresh is {found['fresh']!r}; expected names of networks")
    try:
        unet = to_dict(from_config_dict(UNetConfig, found["unet"], "unet"))
    except ConfigError as error:
        raise ConversionError(f"{file}: {error}") from error
    schedule = found.get("schedule")
    if schedule is not None:
        if not isinstance(schedule, dict):
            raise ConversionError(f"{file}: schedule is {schedule!r}; expected an object or null")
        check_schedule(schedule, file)
    if not (path / PARAMS_FILE).is_file():
        raise ConversionError(f"{path} has no {PARAMS_FILE}; convert again")
    return WeightsFolder(
        path=path,
        method=found["method"],
        unet=unet,
        schedule=schedule,
        fresh=tuple(found["fresh"]),
        origin=found["origin"],
        settings=found.get("settings") or {},
        source=SafetensorsSource([path / PARAMS_FILE]),
    )


def check_destination(dst: Path, size: int) -> None:
    """Raises ConversionError where dst is taken, or `size` bytes do not fit there."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConversionError(f"{dst} is there already and is not an empty folder; give another --dst, or remove it")
    above = next(p for p in (dst.absolute(), *dst.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(above).free
    if free < size + SPARE:
        raise ConversionError(f"{dst} needs {gib(size + SPARE)}; {above} has {gib(free)} free")


@contextlib.contextmanager
def new_folder(dst: Path, size: int) -> Iterator[Path]:
    """A folder to write `size` bytes of tensors into, which becomes dst when the block ends well.

    Raises ConversionError where dst is taken or the disk does not take it; then nothing is left behind. A kill leaves
    `.NAME.partial` beside dst, which the next conversion replaces.
    """
    check_destination(dst, size)
    partial = dst.with_name(f".{dst.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(dst)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = f"the disk is full, {gib(size)} are needed" if full else error.strerror or str(error)
        at = f" ({error.filename})" if error.filename and not full else ""
        raise ConversionError(f"{dst} cannot be written: {why}{at}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """{file, by its path in the folder: its text}."""
    for file, text in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")


def write(checked: CheckedPlan, dst: Path, *, progress: Progress = lambda count: None) -> None:
    """Writes the folder. progress: told work(checked) bytes in all. Raises ConversionError, as new_folder does."""
    plan = checked.plan
    with new_folder(dst, checked.bytes) as partial:
        write_texts(partial, plan.texts)
        for file in plan.items:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(partial / file, checked.infos(file), with_progress(checked.tensors(file), progress))
        write_texts(partial, {WEIGHTS_FILE: json.dumps(_weights_json(checked, progress), indent=2) + "\n"})


def work(checked: CheckedPlan) -> int:
    """Bytes that `write` tells its progress: those written, and those read for the hashes."""
    return checked.bytes + sum(file.stat().st_size for source in checked.plan.sources for file in source.files.values())


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def with_progress(tensors: Iterable[tuple[str, np.ndarray]], progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, with the bytes of each told to `progress` once it is taken."""
    for name, array in tensors:
        yield name, array
        progress(array.nbytes)


def _weights_json(checked: CheckedPlan, progress: Progress) -> dict[str, Any]:
    details = checked.plan.details
    files: dict[str, str] = {}
    for source in checked.plan.sources:
        for name, file in source.files.items():
            files[name] = _sha256(file, progress)
    dtypes = sorted({str(info.dtype) for info in checked.infos(PARAMS_FILE).values()})
    own = {"format": FORMAT, "version": VERSION, "dtype": ", ".join(dtypes)}
    return own | dict(details) | {"origin": details["origin"] | {"files": files}}


def _sha256(file: Path, progress: Progress) -> str:
    """The number that model hubs list."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
