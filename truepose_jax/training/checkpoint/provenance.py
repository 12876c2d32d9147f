"""What a run reads and never saves: frozen networks, data, the weights it began with. Going on, it must find the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from truepose_jax.training.checkpoint.errors import CheckpointError
from truepose_jax.training.checkpoint.workdir import has_steps, read_metadata

NAMES = {
    "autoencoder": ("the autoencoder", "config.model.vae"),
    "clip": ("the CLIP of the region tokens", "config.model.clip.path"),
    "dino": ("the DINOv2", "config.model.dino.path"),
    "ipf": ("the first stage", "config.model.ipf.path"),
    "data": ("the data set", "config.data.root"),
    "origin": ("what the run began with", "config.init_from"),
}
"""What is compared -> what people call it, and the setting that says where it lies."""
LONGEST = 64
"""Characters of a fingerprint in a message: a sha256 fits, an origin with its files does not."""


def as_metadata(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of metadata.json for contents, {key of NAMES: fingerprint}."""
    frozen = {name: value for name, value in contents.items() if name not in ("data", "origin")}
    return {"frozen": frozen, "data": contents["data"], "origin": contents["origin"]}


def check_same_contents(workdir: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Refuses to go on with other contents than the run has trained with; what it did not record is taken on trust. A
    workdir without a saved step is fine. Raises CheckpointError."""
    if not has_steps(workdir):
        return
    record = read_metadata(workdir)
    was = {**record.get("frozen", {}), **{name: record[name] for name in ("data", "origin") if name in record}}
    for name, (what, setting) in NAMES.items():
        # An origin of nothing is an origin; a CLIP whose fingerprint is not known is "".
        known = name in was and name in contents and (name == "origin" or (was[name] and contents[name]))
        if known and was[name] != json.loads(json.dumps(contents[name])):
            raise CheckpointError(
                f"{workdir}: {what} is not the one that this run has trained with ({_short(was[name])}, now "
                f"{_short(contents[name])}); give {setting} the same again, or take another --workdir"
            )


def data_digest(images: Any, root: str, folders: Iterable[str]) -> str:
    """sha256 of what is trained on, cheaply: the pairs of an image set, and the digest of its records where it has one, else
    names and sizes of the files in these folders of `root` ("": of none)."""
    digest = hashlib.sha256(np.ascontiguousarray(images.pairs, np.int64).tobytes())
    if hasattr(images, "digest"):
        digest.update(images.digest.encode())
    elif root:
        digest.update(_names_and_sizes(root, folders).encode())
    return digest.hexdigest()


def _names_and_sizes(root: str, folders: Iterable[str]) -> str:
    lines = []
    for name in folders:
        for place, _, files in os.walk(Path(root) / name):
            paths = [Path(place) / file for file in files if not file.startswith(".")]
            lines += [f"{path.relative_to(root).as_posix()}|{path.stat().st_size}" for path in paths]
    return "\n".join(sorted(lines))


def _short(value: Any) -> str:
    value = value.get("name", value) if isinstance(value, Mapping) else value
    text = "nothing" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
