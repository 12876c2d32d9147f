"""FID statistics of a folder: streamed in constant memory, kept in a file, resumed from it.

A statistics file is safetensors: mean, scatter and count in float64 / int64, and in its metadata what they are statistics
of. Only the same images, prepared in the same way for the same weights by the same program, go on with it or use it again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from input_pipeline.annotations.photo import one_line, read_photo
from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard
from truepose_jax.evaluate.pairing import Folder
from truepose_jax.evaluate.program_hash import program_hash
from truepose_jax.evaluate.protocols import Protocol, Size
from truepose_jax.evaluate.weights import Network
from truepose_jax.metrics.fid import FID_KINDS, SIDE, Statistics
from truepose_jax.metrics.inception import FEATURES
from truepose_jax.runtime.files import atomic_write, make_folder
from truepose_jax.runtime.reading import batches, read_ahead

SAVE_EVERY = 2048
"""Images between two saves: 33 MB each."""
THIS_VERSION, ANOTHER_VERSION = "made by this version", "made by another version"


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
        "program": program_hash(),
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
    share: Shard = WHOLE,
) -> tuple[Statistics, pathlib.Path]:
    """Statistics of all images of the folder, and their file, which a second call only reads.

    role: "truth" or "generated", whose way the images go. share: the part of the batches whose features this call leaves, a file
    each; the one that finishes the work takes them in, in order, so that the result is that of one process bit for bit; the
    others return with what there was. Raises InputError for images that cannot be read; what is done by
    then is kept, as after Ctrl-C.
    """
    about = describe(network, protocol, size, role) | {"files": folder.fingerprint(), "total": str(len(folder.names))}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{network.metric}-{key}.safetensors"
    found = _resume(path, about)
    kind = FID_KINDS[network.metric]
    starts = range(found.count, len(folder.names), batch_size)

    def prepare(name: str) -> np.ndarray:
        frames = protocol.frames(read_photo(folder.path(name)), role, size)
        return kind.prepare(frames.perceptual, SIDE)

    def of_batch(start: int) -> tuple[str, ...]:
        return folder.names[start : start + batch_size]

    def piece(start: int) -> pathlib.Path:
        return path.with_name(f"{path.stem}-{start}-{start + len(of_batch(start))}.piece.safetensors")

    def features(starts: Sequence[int]) -> Iterator[np.ndarray]:
        names = itertools.chain.from_iterable(map(of_batch, starts))
        for batch in batches(read_ahead(prepare, names, ahead=2 * batch_size), batch_size):
            images = np.stack([image for _, image in batch])
            padded = np.concatenate([images, np.repeat(images[-1:], batch_size - len(batch), 0)])
            yield np.asarray(network.apply(padded))[: len(batch)]

    if not starts:
        return found, path
    make_folder(cache)
    there = {start for start in starts if piece(start).exists()}
    if not share.finishes:
        todo = [start for start in share.mine(starts) if start not in there]
        for start, rows in tqdm.tqdm(zip(todo, features(todo), strict=True), title, len(todo), disable=not share.first):
            _write(piece(start), {"features": rows}, about)
        return found, path
    if share.merge:
        share.require(len(starts) - len(there), len(starts), f"batches of features ({title})")
    saved = found.count
    missing = features([start for start in starts if start not in there])
    bar = tqdm.tqdm(total=len(folder.names), initial=saved, unit="image", desc=title, smoothing=0.05)
    try:
        with bar:
            for start in starts:
                rows = _piece(piece(start), about) if start in there else next(missing)
                found.update(rows)
                bar.update(len(rows))
                if found.count - saved >= SAVE_EVERY:
                    save(path, found, about)
                    saved = found.count
    finally:
        if found.count > saved:
            save(path, found, about)
    for used in {*map(piece, starts), *path.parent.glob(f"{path.stem}-*.piece.safetensors")}:
        used.unlink(missing_ok=True)
    return found, path


def _piece(path: pathlib.Path, about: Mapping[str, str]) -> np.ndarray:
    """Features that a shard has left. Raises InputError where they are not those of these images."""
    try:
        with safe_open(path, "numpy") as opened:
            told, rows = opened.metadata() or {}, opened.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a file of features ({one_line(error)}); remove it if it is there, and run the same command again"
        ) from error
    if told != dict(about):
        raise InputError(f"{path}: is about other images than its name says; remove it")
    return rows


def _resume(path: pathlib.Path, about: Mapping[str, str]) -> Statistics:
    if not path.exists():
        return Statistics.empty(FEATURES)
    statistics, was = read(path)
    if any(was.get(name) != value for name, value in about.items()):
        raise InputError(f"{path}: is about other images than its name says; remove it")
    return statistics


def save(path: pathlib.Path, statistics: Statistics, about: Mapping[str, str]) -> None:
    """The file appears when it is whole."""
    count = np.array([statistics.count], np.int64)
    _write(path, {"count": count, "mean": statistics.mean, "scatter": statistics.scatter}, about)


def _write(path: pathlib.Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    with atomic_write(path) as partial:
        save_file(dict(tensors), partial, metadata=dict(about))


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


def reference_statistics(path: str, network: Network, protocol: Protocol, size: Size | None) -> tuple[Statistics, str]:
    """(statistics of a finished file that fits the evaluation, THIS_VERSION or ANOTHER_VERSION that made it).

    Another program's are taken: people share them, and the report tells. Raises InputError that says in what they do not
    fit.
    """
    statistics, about = read(pathlib.Path(path))
    wanted = describe(network, protocol, size, "truth")
    made_by = THIS_VERSION if about.get("program") == wanted.pop("program") else ANOTHER_VERSION
    for name, value in wanted.items():
        if about.get(name) != value:
            raise InputError(f"--fid-reference={path}: its {name} is {about.get(name)}, and here it is {value}")
    if about.get("total") != str(statistics.count):
        raise InputError(f"--fid-reference={path}: unfinished ({statistics.count} of {about.get('total')} images)")
    return statistics, made_by
