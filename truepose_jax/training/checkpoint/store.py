"""Checkpoints: the state of a run saved and restored by orbax, on any mesh, with its bits checked."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from truepose_jax.runtime.sharding import path_of
from truepose_jax.training.checkpoint.errors import CheckpointError, DamagedStep, first_line

Read = TypeVar("Read")

PARTS = ("params", "ema", "rest")
UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a step's folder until it is whole."""
DAMAGED = "damaged"
"""Folder of the workdir that damaged steps are moved to."""
LEAST_SHARE = 0.8
"""Of the arrays' bytes that a save must find free: compressed, random floats take 0.92."""
COPIED_AT_ONCE = 256 << 20
"""Bytes of all devices that are there twice while restored arrays are made donatable; each such copy is one program."""


def _bit_sum(x: jax.Array) -> jax.Array:
    """Sum of an array's bits as integers modulo 2^32: exact in any order, so the same on every mesh."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)


@functools.cache
def _bit_sum_on(place: Sharding) -> Callable[[jax.Array], jax.Array]:
    everywhere = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
    return jax.jit(_bit_sum, out_shardings=everywhere)


@functools.cache
def _identity_on(place: Sharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return jax.jit(lambda arrays: arrays, out_shardings=place)


def bit_sums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """_bit_sum of every array."""
    sums: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu":
            # The same in NumPy: 0.04 s for 6,000 arrays, where compiling one jit per shape takes 2 s.
            words = np.asarray(leaf).reshape(-1).view(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
            sums[path] = words.sum(dtype=np.uint32)
        else:
            sums[path] = _bit_sum_on(leaf.sharding)(leaf)
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaves: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """dtype, shape and bit_sum of every array, for JSON (orbax's own metadata takes 1.5 ms an array to read)."""
    sums = bit_sums(leaves)
    return {
        path: {"dtype": jnp.dtype(leaf.dtype).name, "shape": list(leaf.shape), "bit_sum": sums[path]}
        for path, leaf in leaves.items()
    }


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of what the JSON of a step says about its arrays and its run."""
    text = json.dumps({name: record[name] for name in ("extra", "leaves")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a CheckpointError: what, why in one line, what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # for broken folders orbax raises ValueError, KeyError, bare Exception, ...
        raise CheckpointError(f"{what} ({first_line(error)}); {advice}") from error


def _without_pages(record: logging.LogRecord) -> bool:
    """A filter that drops the tracebacks that orbax logs, and asyncio's of the tasks and futures that it abandons (one an array
    where a disk is full): each of them comes as a CheckpointError too, in one line."""
    if not record.exc_info:
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[2])]
    return bool(files) and not any("orbax" in file for file in (record.pathname, *files))  # tensorstore's have no frame


def _collect_abandoned_reads() -> None:
    """A restore that fails abandons a coroutine per array, each of which prints a page when it is collected: now, unheard, so
    that the one line of the error can be read."""
    with _unraisable(lambda each: "orbax" in getattr(getattr(each.object, "cr_code", None), "co_filename", "")):
        gc.collect()


@contextlib.contextmanager
def without_closed_loops() -> Iterator[None]:
    """A save that fails closes orbax's event loop, and tensorstore's threads print a page for each array that then finds it
    closed. Inside they are silent: the failure comes as a CheckpointError."""
    with _unraisable(lambda unraisable: str(unraisable.exc_value) == "Event loop is closed"):
        yield


@contextlib.contextmanager
def _unraisable(drop: Callable[[Any], bool]) -> Iterator[None]:
    """Errors that nobody can catch are not printed where drop(unraisable)."""
    hear = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None if drop(unraisable) else hear(unraisable)
    try:
        yield
    finally:
        sys.unraisablehook = hear


class Checkpoints:
    """Saves and restores {"params", "ema", "rest"} and a JSON `extra` under workdir/checkpoints.

    Saves are asynchronous and atomic: a step is there whole or not at all. The bits of every array are summed
    before saving and after restoring: tensorstore notices a truncated file, but not a flipped bit in its data
    (measured).
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep: int,
        every: int,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        """keep: how many of the last steps stay. every: the interval that `due` tells. keep_every: multiples of it
        stay for good (0: none). read_only: for programs that read the workdir of a run that may still be training:
        creates and removes nothing, cannot save."""
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.every = every
        self._read_only = read_only
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} does not exist: {workdir} holds no training run")
        policies = [LatestN(n=keep)] + ([EveryNSteps(interval_steps=keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else AnyPreservationPolicy(policies),
            create=not read_only,
            # Made in the background, a folder that cannot be made is noticed after five minutes only.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_without_pages)
        with _explained(f"cannot open {self.folder}", "see its permissions"):
            if not read_only and jax.process_index() == 0:
                # orbax's cleanup_tmp_directories does it in a thread that nothing waits for.
                for unfinished in self.folder.glob(f"*{UNFINISHED}*"):
                    shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The last step (one that is still being saved too), or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that are there, in order."""
        return sorted(self._manager.all_steps())

    def look_again(self) -> None:
        """Reads the folder anew, for what another process has seen in it."""
        self._manager.reload()

    def said(self) -> str:
        """The steps that are there, in words."""
        return ", ".join(map(str, self.steps())) or "none"

    def is_committed(self, step: int) -> bool:
        """Is `step` whole on the disk? (Its folder is renamed to the step's number last of all.)"""
        return (self.folder / str(step)).is_dir()

    def due(self, step: int) -> bool:
        """Is `step` one of the interval's?"""
        return step % self.every == 0

    def save(self, step: int, state: Mapping[str, Any], *, extra: Mapping[str, Any]) -> None:
        """Starts saving `state` = {"params", "ema" (or None), "rest"} and `extra` (JSON-able) as `step`.

        Returns once the arrays are copied off: they may be donated at once. Nothing to do where `step` is
        there. Raises CheckpointError, also for an earlier save that failed since.
        """
        if self._read_only:
            raise CheckpointError(f"{self.folder} was opened for reading only")
        if step in self._manager.all_steps():
            return
        self.wait()  # the manager would do so, and a failure would seem to be this step's
        parts = {name: _by_path(state[name]) for name in PARTS if state.get(name) is not None}
        leaves = {name: _describe(part) for name, part in parts.items()}
        record = json.loads(json.dumps({"extra": dict(extra), "leaves": leaves}, allow_nan=False))
        record["digest"] = _digest(record)
        items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        args = ocp.args.Composite(**items, extra=ocp.args.JsonSave(record))
        with self._saving(f"saving step {step} to {self.folder} failed"):
            self._check_room(leaves)
            self._manager.save(step, args=args, force=True)

    def _check_room(self, leaves: Mapping[str, Mapping[str, Any]]) -> None:
        """Before orbax starts: where a disk is full it leaves half a step, and says a page for each array."""
        arrays = (leaf for part in leaves.values() for leaf in part.values())
        needed = sum(jnp.dtype(leaf["dtype"]).itemsize * math.prod(leaf["shape"]) for leaf in arrays)
        usage = shutil.disk_usage(self.folder)
        if usage.total and usage.free < LEAST_SHARE * needed:  # some mounted buckets tell 0 of all
            raise OSError(errno.ENOSPC, f"{usage.free / 1e6:.1f} of about {needed / 1e6:.1f} MB are free")

    def restore(
        self, abstract_state: Mapping[str, Any], step: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], int]:
        """(state, extra, step) of `step` (None: the latest).

        abstract_state: {"params", "ema" (or None), "rest"} of jax.ShapeDtypeStruct with shardings, on any
        mesh. Paths, shapes, dtypes and bits must be those that were saved. Raises CheckpointError.
        """
        step = self._known(step)
        record = self._record(step)
        trees = {name: abstract_state[name] for name in PARTS if abstract_state.get(name) is not None}
        wanted = {name: _by_path(tree) for name, tree in trees.items()}
        self._check_fits(step, wanted, record["leaves"])
        restored = self._read(step, wanted, record["leaves"])
        state = {
            name: jax.tree.unflatten(jax.tree.structure(tree), [restored[name][path] for path in wanted[name]])
            for name, tree in trees.items()
        }
        return {name: state.get(name) for name in PARTS}, record["extra"], step

    def restore_or_fall_back(
        self, abstract_state: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], int, list[str]]:
        """(state, extra, step, what was skipped): `restore` of the newest step that is whole.

        The damaged ones above it are moved to workdir/damaged, so that the run can save those steps again, and each
        gets a line that says why. Where none can be read nothing is moved and the newest one's DamagedStep is raised.
        """
        damage: dict[int, DamagedStep] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, extra, _ = self.restore(abstract_state, step)
            except DamagedStep as error:
                damage[step] = error
                continue
            # Only now: where memory is short or the disk is away, every step seems damaged and must stay.
            return state, extra, step, [self._move_away(bad, damage[bad]) for bad in damage]
        raise damage[max(damage)] if damage else CheckpointError(f"{self.folder} holds no checkpoint")

    def _move_away(self, step: int, error: DamagedStep) -> str:
        """Moves a damaged step out of the way; returns the line that says so."""
        place = next(p for p in self._damaged_places(step) if not p.exists())
        if jax.process_index() == 0:
            with _explained(f"cannot move the damaged step {step} to {place}", "move it by hand"):
                place.parent.mkdir(exist_ok=True)
                os.rename(self.folder / str(step), place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved damaged step {step}")
        self._manager.reload()
        return f"{error.what}: moved it to {place}"

    def _damaged_places(self, step: int) -> Iterator[Path]:
        yield self.folder.parent / DAMAGED / str(step)
        for count in itertools.count(2):
            yield self.folder.parent / DAMAGED / f"{step}_{count}"

    def restore_part(self, name: str, step: int | None = None, *, place: Sharding | None = None) -> Any:
        """One part ("params" or "ema") alone: nested dicts of arrays on `place` (None: the first local
        device). A store opened for reading asks no other process: one that has no work of its own would never answer.

        Shapes come from the checkpoint itself; neither model nor optimizer is needed. Raises CheckpointError.
        """
        step, alone = self._known(step), self._read_only
        saved = self._record(step, alone=alone)["leaves"]
        if name not in saved:
            why = "; that run kept no EMA (config.optim.ema_decay 0): use the raw weights"
            why = why if name == "ema" else ""
            raise CheckpointError(f"step {step} in {self.folder} holds no '{name}'{why}")
        place = place or SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=place)
            for path, leaf in saved[name].items()
        }
        return unflatten_dict(self._read(step, {name: wanted}, saved, alone=alone)[name], sep="/")

    def restore_like(self, name: str, abstract: Any, step: int | None = None) -> tuple[Any, int]:
        """(one part, step) in the structure and shardings of `abstract`: another run's weights. Raises CheckpointError."""
        step = self._known(step)
        saved = {name: self._record(step)["leaves"].get(name, {})}
        wanted = {name: _by_path(abstract)}
        self._check_fits(step, wanted, saved)
        restored = self._read(step, wanted, saved)[name]
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in wanted[name]]), step

    def wait(self) -> None:
        """Blocks until the last save is committed. Raises CheckpointError where it failed."""
        with self._saving(f"saving to {self.folder} failed"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        self.wait()
        self._manager.close()

    def check(self) -> None:
        """Raises CheckpointError where a save in the background has failed since."""
        if not self._manager.is_saving_in_progress():
            self.wait()  # returns at once; the manager's own check_for_errors never sees them

    def _saving(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _explained(what, "free space there, or see its permissions")

    def _sound(self, step: int, read: Callable[[], Read], *, alone: bool) -> Read:
        """What `read` returns. What goes wrong in it, on any process, is a DamagedStep on all of them; alone: here."""
        found, why = None, ""
        try:
            found = read()
        except Exception as error:  # for broken folders orbax raises ValueError, KeyError, bare Exception, ...
            why = first_line(error)
        if why:
            _collect_abandoned_reads()
        failed = [bool(why)]
        if jax.process_count() > 1 and not alone:
            failed = multihost_utils.process_allgather(np.array(bool(why))).tolist()
        if any(failed):
            why = why or f"process {failed.index(True)} cannot read its part"
            raise DamagedStep(f"cannot read step {step} in {self.folder} ({why})", self._without(step))
        return found

    def _without(self, step: int) -> str:
        older = [s for s in self._manager.all_steps() if s < step]
        if not older:
            return f"move {self.folder / str(step)} away to start from scratch"
        if self._read_only:
            return f"the step before it is {max(older)}"
        return f"to go on from step {max(older)} in its place: --config.checkpoint.allow_fallback=true"

    def _known(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}; it has {self.said()}")
        return steps[-1] if step is None else step

    def _record(self, step: int, *, alone: bool = False) -> dict[str, Any]:
        """{"extra", "leaves": {part: {path: {"dtype", "shape", "bit_sum"}}}} of `step`."""

        def read() -> dict[str, Any]:
            record = ocp.JsonCheckpointHandler().restore(self.folder / str(step) / "extra")
            if not {"extra", "leaves", "digest"} <= record.keys():
                raise ValueError("not written by truepose_jax")
            if record["digest"] != _digest(record):
                raise ValueError("its JSON is not what was saved: damaged on disk")
            return record

        return self._sound(step, read, alone=alone)

    def _check_fits(self, step: int, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """orbax casts another dtype without a word and names no path for another shape, so compare before."""
        differences = []
        for name in PARTS:
            there = {path: f"{x['dtype']}{x['shape']}" for path, x in saved.get(name, {}).items()}
            here = {path: f"{jnp.dtype(x.dtype)}{list(x.shape)}" for path, x in wanted.get(name, {}).items()}
            for path in dict.fromkeys((*there, *here)):
                old, new = there.get(path, "absent"), here.get(path, "absent")
                if old != new:
                    differences.append(f"{name}/{path} is {old} in the checkpoint and {new} in this run")
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise CheckpointError(f"step {step} in {self.folder} does not fit: {differences[0]}{more}")

    def _read(
        self, step: int, wanted: Mapping[str, dict[str, Any]], saved: Mapping[str, Any], *, alone: bool = False
    ) -> dict[str, dict[str, jax.Array]]:
        """Not by the manager, whose barriers would have the others wait for a process that found damage."""
        folder, handler = self.folder / str(step), ocp.StandardCheckpointHandler()

        def read() -> dict[str, dict[str, jax.Array]]:
            args = {name: ocp.args.StandardRestore(part) for name, part in wanted.items()}
            return {name: handler.restore(folder / name, args=args[name]) for name in wanted}

        restored = self._sound(step, read, alone=alone)

        def settle() -> dict[str, dict[str, jax.Array]]:
            return {name: _settle(name, restored.pop(name), saved[name]) for name in wanted}

        return self._sound(step, settle, alone=alone)


def _settle(part: str, leaves: dict[str, jax.Array], saved: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Checks the bits, then passes every array through an identity jit: what comes from a restore is not donatable before
    (docs/paper.md 11). Raises ValueError."""
    for path, found in bit_sums(leaves).items():
        if found != saved[path]["bit_sum"]:
            raise ValueError(f"the bits of {part}/{path} are not those that were saved: damaged on disk")
    for paths in _groups(leaves):
        arrays = _identity_on(leaves[paths[0]].sharding)([leaves[path] for path in paths])
        leaves.update(zip(paths, arrays, strict=True))
    return leaves


def _groups(leaves: Mapping[str, jax.Array]) -> list[list[str]]:
    """Paths of arrays of one sharding, at most COPIED_AT_ONCE bytes (or one array) in each."""
    groups: dict[Sharding, list[list[str]]] = {}
    room: dict[Sharding, int] = {}
    for path, leaf in leaves.items():
        room[leaf.sharding] = room.get(leaf.sharding, 0) - leaf.nbytes
        if room[leaf.sharding] < 0:
            groups.setdefault(leaf.sharding, []).append([])
            room[leaf.sharding] = COPIED_AT_ONCE - leaf.nbytes
        groups[leaf.sharding][-1].append(path)
    return [paths for found in groups.values() for paths in found]
