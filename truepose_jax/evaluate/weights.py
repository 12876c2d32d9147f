"""The networks under LPIPS and FID: PyTorch's published files made into safetensors, and loaded with their provenance.

A number from other weights is not LPIPS or FID. So the converted file carries the sha256 of the files it was made from
and of its own tensors; only those of the published files make a metric bear its name, else it is called
`lpips_unverified_weights` and so on. The report states file and hash either way.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from input_pipeline.annotations.photo import one_line
from input_pipeline.files import check_form, parse_json, sha256_of
from input_pipeline.schema import InputError
from truepose_jax.metrics.fid import FID_KINDS
from truepose_jax.metrics.inception import Inception
from truepose_jax.metrics.lpips import LPIPS
from truepose_jax.pretrained.conversion import from_torch
from truepose_jax.pretrained.conversion.key_maps import ModelKeys, Stranger
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError
from truepose_jax.runtime.cli import install
from truepose_jax.runtime.files import atomic_write

UNVERIFIED = "_unverified_weights"
METADATA_SOURCES, METADATA_TENSORS = "sources_sha256", "tensors_sha256"
_COMMAND = "python -m truepose_jax.evaluate weights"


@dataclasses.dataclass(frozen=True)
class Published:
    """files: {what it is: how its sha256 begins}. PyTorch's file names end in the first eight digits of theirs."""

    flag: str
    keys: ModelKeys
    files: Mapping[str, str]
    where: str


_CLASSIFIER = (r"(classifier|fc|AuxLogits)\..*", "of the classifier")
_COUNTER = (r".*\.num_batches_tracked", "a counter of training")
_NOT_INCEPTION = (Stranger("an AlexNet", "features.0.weight"), Stranger("LPIPS's linear layers", "lin0.model.1.weight"))

PUBLISHED: Mapping[str, Published] = {
    "lpips": Published(
        "--lpips-weights",
        ModelKeys(
            "AlexNet with LPIPS's linear layers",
            ignored=(_CLASSIFIER,),
            strangers=(Stranger("an Inception-v3", "Conv2d_1a_3x3.conv.weight"),),
        ),
        {
            "torchvision's alexnet-owt-7be5be79.pth": "7be5be79",
            "weights/v0.1/alex.pth of the lpips package": (
                "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
            ),
        },
        "take alexnet-owt-7be5be79.pth from download.pytorch.org/models and weights/v0.1/alex.pth from the lpips package, "
        f"then {_COMMAND} --pth=alexnet-owt-7be5be79.pth --pth=alex.pth --out=lpips.safetensors",
    ),
    "fid": Published(
        "--fid-weights",
        ModelKeys("torchvision Inception-v3", ignored=(_CLASSIFIER, _COUNTER), strangers=_NOT_INCEPTION),
        {"torchvision's inception_v3_google-0cc3c7bd.pth": "0cc3c7bd"},
        "take inception_v3_google-0cc3c7bd.pth from download.pytorch.org/models, then "
        f"{_COMMAND} --pth=inception_v3_google-0cc3c7bd.pth --out=inception.safetensors",
    ),
    "clean_fid": Published(
        "--clean-fid-weights",
        ModelKeys("Inception-v3 of 2015-12-05", ignored=(_CLASSIFIER, _COUNTER), strangers=_NOT_INCEPTION),
        {"pytorch-fid's pt_inception-2015-12-05-6726825d.pth": "6726825d"},
        "take pt_inception-2015-12-05-6726825d.pth from the releases of github.com/mseitzer/pytorch-fid, then "
        f"{_COMMAND} --pth=pt_inception-2015-12-05-6726825d.pth --out=inception_2015.safetensors",
    ),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A metric's network with its weights. name: what its numbers may be called. facts: for the report."""

    metric: str
    name: str
    sha256: str
    facts: Mapping[str, Any]
    apply: Callable[..., jax.Array]
    """Images [b h w 3], one batch or two, as the metric prepares them -> [b] or [b 2048]; compiled per shape."""


def module_of(metric: str) -> tuple[nn.Module, int]:
    """(module, how many images it takes) of "lpips", "fid" or "clean_fid"."""
    return (LPIPS(), 2) if metric == "lpips" else (Inception(FID_KINDS[metric].variant), 1)


@functools.cache
def shapes_of(metric: str) -> Mapping[str, Any]:
    module, images = module_of(metric)
    image = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
    return jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *[image] * images)


@functools.cache
def _compiled(metric: str) -> Callable[..., jax.Array]:
    module, _ = module_of(metric)
    return jax.jit(lambda params, *images: module.apply({"params": params}, *images))


def load(metric: str, path: str) -> Network:
    """Raises InputError, one line, where the file is missing (where to get it), is not this network's, or damaged."""
    published, file = PUBLISHED[metric], pathlib.Path(path)
    if file.suffix == ".pth":
        raise InputError(f"{published.flag}={path}: not read as it is; convert it by {_COMMAND} --pth={path} --out=...")
    if not file.is_file():
        raise InputError(f"{published.flag}={path}: no such file; {published.where}")
    try:
        params = from_torch.load(file, shapes_of(metric), published.keys)
        metadata = _metadata(file)
    except (OSError, ConversionError, SafetensorError) as error:
        raise InputError(f"{published.flag}={path}: {'; '.join(str(error).splitlines()[:3])}") from error
    sources, doubts = _verify(published, metadata, file)
    digest = sha256_of(file)
    facts = {"file": str(file), "sha256": digest, "made_from": sources, "verified": not doubts}
    params = jax.tree.map(jnp.asarray, params)
    call = _compiled(metric)
    return Network(
        metric,
        metric if not doubts else metric + UNVERIFIED,
        digest,
        facts | ({"why_not_verified": doubts} if doubts else {}),
        lambda *images: call(params, *images),
    )


def _verify(published: Published, metadata: Mapping[str, str], file: pathlib.Path) -> tuple[dict[str, str], str]:
    """({source file: sha256}, why the weights may not be the published ones; empty where they are)."""
    try:
        sources = parse_json(metadata.get(METADATA_SOURCES, "{}"))
        check_form(sources, {str: str})
    except ValueError:
        sources = {}
    if not sources:
        return {}, f"the file does not say what it was made from; {published.where}"
    if metadata.get(METADATA_TENSORS) != _tensors_sha256(file):
        return sources, "its tensors were changed after the conversion"
    absent = [text for text, start in published.files.items() if not any(s.startswith(start) for s in sources.values())]
    if absent or len(sources) != len(published.files):
        return sources, f"not made from {' and '.join(published.files)} (sha256 {', '.join(published.files.values())})"
    return sources, ""


def _metadata(file: pathlib.Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return opened.metadata() or {}


def _tensors_sha256(file: pathlib.Path) -> str:
    with safe_open(file, "numpy") as opened:
        return tensors_sha256({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118


def tensors_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Over names, shapes, types and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def convert(paths: Sequence[str], out: str) -> dict[str, str]:
    """One safetensors file of the tensors of PyTorch's .pth files; {file: sha256}. Needs torch.

    Read with weights_only=True: nothing in the files is run. Raises InputError.
    """
    place = pathlib.Path(out)
    if place.suffix != ".safetensors" or place.exists():
        why = "is there already; give another name" if place.exists() else "give a name that ends in .safetensors"
        raise InputError(f"--out={out}: {why}")
    try:
        import torch
    except ImportError as error:
        raise InputError("PyTorch reads .pth files and is not installed: " + install("torch")) from error
    tensors, sources = {}, {}
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = {name: tensor.detach().numpy() for name, tensor in state.items()}
            sources[pathlib.Path(path).name] = sha256_of(path)
        except FileNotFoundError as error:
            raise InputError(f"--pth={path}: no such file") from error
        except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"--pth={path}: not a state dict of PyTorch ({one_line(error)})") from error
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise InputError(f"--pth={path}: holds {twice[0]}, as another of the files does")
        tensors |= found
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {METADATA_SOURCES: json.dumps(sources), METADATA_TENSORS: tensors_sha256(tensors)}
    with atomic_write(place) as partial:
        save_file(tensors, partial, metadata={"format": "pt"} | metadata)
    return sources
