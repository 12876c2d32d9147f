"""FID statistics of a folder: streamed in constant memory, kept in a file, resumed from it.

A statistics file is safetensors: mean, scatter and count in float64 / int64, and in its metadata what they are statistics
of. Only the same images, prepared in the same way for the same weights, go on with it or use it again.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from input_pipeline.photo import one_line, read_photo
from input_pipeline.schema import InputError
from truepose_jax.evaluate.pairing import Folder
from truepose_jax.evaluate.protocols import Protocol, Size
from truepose_jax.evaluate.reading import batches, read_ahead
from truepose_jax.evaluate.weights import Network
from truepose_jax.metrics.fid import FID_KINDS, SIDE, Statistics
from truepose_jax.metrics.inception import FEATURES

SAVE_EVERY = 2048
"""Images between two saves: 33 MB each."""


def describe(network: Network, protocol: Protocol, size: Size | None, role: str) -> dict[str, str]:
    """What statistics depend on besides the images."""
    resize = protocol.truth if role == "truth" else protocol.generated
    return {
        "metric": network.metric,
        "weights": network.sha256,
        "size": "x".join(map(str, size)) if size else "own",
        "resize": f"{resize.text}; {protocol.perceptual.text}",
        "similarity_size": "x".join(map(str, protocol.similarity_size(size))) if size else "own",
        "input": FID_KINDS[network.metric].text,
    }


def folder_statistics(
    folder: Folder,
    network: Network,
    protocol: Protocol,
    size: Size | None,
    *,
    role: str,
    cache: pathlib.Path,
    batch_size: int,
    title: str,
) -> tuple[Statistics, pathlib.Path]:
    """Statistics of all images of the folder, and their file, which a second call only reads.

    role: "truth" or "generated", whose way the images go. Raises InputError for images that cannot be read; what is
    done by then is kept, as after Ctrl-C.
    """
    about = describe(network, protocol, size, role) | {"files": folder.fingerprint(), "total": str(len(folder.names))}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{network.metric}-{key}.safetensors"
    found = _resume(path, about)
    kind = FID_KINDS[network.metric]

    def prepare(name: str) -> np.ndarray:
        frames = protocol.frames(read_photo(folder.path(name)), role, size)
        return kind.prepare(frames.perceptual, SIDE)

    todo = folder.names[found.count :]
    if not todo:
        return found, path
    cache.mkdir(parents=True, exist_ok=True)
    saved = found.count
    try:
        with tqdm.tqdm(total=len(folder.names), initial=found.count, unit="image", desc=title, smoothing=0.05) as bar:
            for batch in batches(read_ahead(prepare, todo, ahead=2 * batch_size), batch_size):
                images = np.stack([image for _, image in batch])
                padded = np.concatenate([images, np.repeat(images[-1:], batch_size - len(batch), 0)])
                found.update(np.asarray(network.apply(padded))[: len(batch)])
                bar.update(len(batch))
                if found.count - saved >= SAVE_EVERY:
                    save(path, found, about)
                    saved = found.count
    finally:
        if found.count > saved:
            save(path, found, about)
    return found, path


def _resume(path: pathlib.Path, about: Mapping[str, str]) -> Statistics:
    if not path.exists():
        return Statistics.empty(FEATURES)
    statistics, was = read(path)
    if any(was.get(name) != value for name, value in about.items()):
        raise InputError(f"{path}: is about other images than its name says; remove it")
    return statistics


def save(path: pathlib.Path, statistics: Statistics, about: Mapping[str, str]) -> None:
    """The file appears when it is whole."""
    partial = path.with_name(path.name + ".partial")
    tensors = {
        "count": np.array([statistics.count], np.int64),
        "mean": statistics.mean,
        "scatter": statistics.scatter,
    }
    try:
        save_file(tensors, partial, metadata=dict(about))
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({one_line(error)}); free space there") from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: pathlib.Path) -> tuple[Statistics, dict[str, str]]:
    """(statistics, what they are about). Raises InputError for files that are none."""
    try:
        with safe_open(path, "numpy") as opened:
            about = opened.metadata() or {}
            count, mean, scatter = (opened.get_tensor(name) for name in ("count", "mean", "scatter"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a statistics file of this program ({one_line(error)})") from error
    if mean.shape != (FEATURES,) or scatter.shape != (FEATURES, FEATURES) or mean.dtype != np.float64:
        raise InputError(f"{path}: statistics of {mean.shape} features; expected {FEATURES}")
    return Statistics(int(count[0]), mean, scatter), about


def reference_statistics(path: str, network: Network, protocol: Protocol, size: Size | None) -> Statistics:
    """Of a finished file that fits the evaluation. Raises InputError that says in what it does not."""
    statistics, about = read(pathlib.Path(path))
    for name, value in describe(network, protocol, size, "truth").items():
        if about.get(name) != value:
            raise InputError(f"--fid-reference={path}: its {name} is {about.get(name)}, and here it is {value}")
    if about.get("total") != str(statistics.count):
        raise InputError(f"--fid-reference={path}: unfinished ({statistics.count} of {about.get('total')} images)")
    return statistics
