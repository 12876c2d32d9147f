"""metadata.json, the check that a workdir is of this configuration, and the lock against a second run."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

import truepose_jax
from input_pipeline import atomic, files
from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict, with_defaults
from truepose_jax.runtime import sharding
from truepose_jax.training.checkpoint.errors import CheckpointError, first_line

MAY_CHANGE = (
    "total_steps", "log_every", "tracker", "tracker_project", "eval", "checkpoint", "mesh",
    "data.threads", "data.workers", "data.max_invalid", "optim.accumulation", "optim.max_skips", "optim.noise_scale",
    "model.remat", "model.attention",
    "data.root", "model.vae", "model.clip.path", "model.dino.path", "model.ipf.path", "init_from",
)  # fmt: skip
"""Settings that a resumed run may change: how its steps are computed, watched and kept, and where its files lie, whose
contents check_same_contents compares. Everything else means another run. A noise scale measured with another accumulation
means the same: every step tells the size of its parts, and the estimate is of one start."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

METADATA: files.Form = {
    "config": dict,
    "frozen?": {str: (str, type(None))},
    "data?": (str, type(None)),
}
"""What is read again of metadata.json."""

Row = tuple[str, Sequence[int], str]
"""(path, shape, dtype) of a parameter."""


def parameter_table(params: Any) -> list[Row]:
    """One row per parameter (arrays or ShapeDtypeStructs)."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(sharding.path_of(path), tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for path, leaf in leaves]


def write_metadata(
    workdir: str | os.PathLike[str],
    *,
    config: Config,
    parameter_table: Sequence[Row],
    mesh: Any,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes workdir/metadata.json (process 0 alone); returns what it says. Raises CheckpointError where it cannot.

    mesh: a jax Mesh, or anything JSON-able. extra: more entries for the top level, JSON-able, such as
    {"frozen": {"vae": {"path": ..., "sha256": ...}}}.
    """
    networks: dict[str, int] = {}
    for path, shape, _ in parameter_table:
        network = path.split("/", 1)[0]
        networks[network] = networks.get(network, 0) + math.prod(shape)
    device = jax.devices()[0]
    record = {
        "config": to_dict(config),
        "versions": {
            "truepose_jax": truepose_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape) if isinstance(mesh, jax.sharding.Mesh) else mesh,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **(extra or {}),
        "parameters": {
            "total": sum(networks.values()),
            "networks": networks,
            "table": [[path, list(shape), str(dtype)] for path, shape, dtype in parameter_table],
        },
    }
    path = Path(workdir) / "metadata.json"
    if jax.process_index():
        return record
    text = json.dumps(record, indent=1, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({first_line(error)})") from error
    return record


def read_metadata(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """workdir/metadata.json. Raises CheckpointError."""
    path = Path(workdir) / "metadata.json"
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist: {workdir} holds no training run")
    return files.read_json(path, METADATA, what="a run's metadata", limit=files.MAX_TEXT, error=CheckpointError)


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """The resolved config of the run in `workdir`. Raises CheckpointError."""
    try:
        return from_config_dict(Config, _saved(workdir))
    except ConfigError as error:
        raise CheckpointError(f"{Path(workdir) / 'metadata.json'}: {error}") from error


def _saved(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    return with_defaults(Config, read_metadata(workdir)["config"])


def check_place(workdir: str | os.PathLike[str]) -> None:
    """Raises CheckpointError for an address: as a path it would be a new folder here, such as ./gs:/bucket/run."""
    if "://" in os.fspath(workdir):
        raise CheckpointError(
            f"--workdir={workdir} is an address, and a workdir is a folder: mount the bucket (for instance with GCS FUSE) "
            "and give the path where it is mounted"
        )


def has_steps(workdir: str | os.PathLike[str]) -> bool:
    """Has a step been saved whole?"""
    return any(path.name.isdigit() for path in Path(workdir).glob("checkpoints/*"))


def check_same_config(workdir: str | os.PathLike[str], config: Config) -> None:
    """Refuses to go on in a workdir of another configuration. One without a saved step is fine: after a first step that
    found no memory the next try has a smaller batch. Raises CheckpointError."""
    folder = Path(workdir)
    if not has_steps(folder):
        return
    if not (folder / "metadata.json").exists():
        raise CheckpointError(f"{folder} holds checkpoints but no metadata.json; take another --workdir")
    sides = {
        "was": flatten_dict(_saved(workdir), sep="."),
        "is": flatten_dict(json.loads(json.dumps(to_dict(config))), sep="."),
    }
    differing = []
    for key in dict.fromkeys((*sides["is"], *sides["was"])):
        old, new = (json.dumps(side[key]) if key in side else "absent" for side in (sides["was"], sides["is"]))
        if old != new and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            differing.append(f"config.{key} was {old} and is {new}")
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        what = "; ".join(differing[:3])
        raise CheckpointError(f"{folder} is of another configuration: {what}{more}; take another --workdir")


def check_there(workdir: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where the workdir that lock_workdir took was removed or moved away since: nothing that is still
    written could be found again."""
    path = Path(workdir).absolute() / "lock"
    held = _locks.get(path)
    if held is None or held.closed:
        return
    try:
        same = os.path.samestat(os.stat(path), os.fstat(held.fileno()))
    except FileNotFoundError:
        same = False
    except OSError:  # a disk that does not answer for a while is no reason to end
        return
    if not same:
        raise CheckpointError(f"{workdir} was removed or replaced while its run was under way; the run ends here")


_locks: dict[Path, IO[str]] = {}


def lock_workdir(workdir: str | os.PathLike[str]) -> contextlib.AbstractContextManager:
    """Takes the workdir for this process until it ends, or until the `with` over what is returned ends.

    The system lets go of it however the process ends. Process 0 locks for all. A file system without locks:
    says so and goes on. Raises CheckpointError where another process holds it.
    """
    if jax.process_index():
        return contextlib.nullcontext()
    path = Path(workdir).absolute() / "lock"
    held = _locks.get(path)
    if held is not None and not held.closed:
        return held
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"cannot write in the workdir {workdir} ({first_line(error)})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise CheckpointError(f"{workdir} is in use by another run ({owner}): wait for it to end") from error
    except OSError as error:
        print(f"warning: no lock on {path} ({first_line(error)}); start one run only", file=sys.stderr)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()
        raise CheckpointError(f"cannot write in the workdir {workdir} ({first_line(error)}); free space there") from error
    _locks[path] = file  # A file that nobody keeps would be closed, and the lock be gone, without a word.
    return file
