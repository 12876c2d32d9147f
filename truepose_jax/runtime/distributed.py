"""Training in several processes as one JAX program: where the others are, from SLURM, a TPU pod, or flags; and what they tell one
another, through jax.experimental.multihost_utils, which every process calls equally often and in one order.

`start` joins them: call it before anything asks JAX for its devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from input_pipeline.schema import InputError, UserError

MODES = ("auto", "always", "off")
TIMEOUT = 300
"""Seconds that a process waits for the others."""
PLACE_FLAGS = ("coordinator", "process", "processes")
WAITS_AT_END = 60
"""Seconds that a process which ends waits for the others to end too; then all are ended, with 134."""
SEEN_WITHIN = 120
"""Seconds after which a file that another host has written must be seen: NFS keeps what it knows of a folder for up to 60."""
PADDED_TO = 4096
"""Bytes that what processes say is filled up to: each size is a program to compile."""
LOOK_AGAIN = 0.5
"""Seconds between two looks whether a file is there."""

_ADDRESS = re.compile(r"[^\s:]+:\d+")


def start(
    mode: str = "auto", *, coordinator: str | None = None, process: int | None = None, processes: int | None = None
) -> str:
    """Joins the processes; returns one line that says how. Raises InputError where that cannot work.

    coordinator ("host:port" of process 0), process (0, 1, ...), processes (how many): all three or none; they also come
    from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES. Without them "auto" joins where the environment
    says that there are others (SLURM's job step, a TPU pod) and else runs alone; "always" asks JAX to find them, by a
    TPU's metadata too, and fails where it finds none; "off" runs alone whatever the environment says.
    """
    import jax

    others = _others(mode, coordinator=coordinator, process=process, processes=processes)
    if isinstance(others, str):
        return others
    try:
        jax.distributed.initialize(
            **others.arguments, initialization_timeout=TIMEOUT, shutdown_timeout_seconds=WAITS_AT_END
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{others.where}: cannot join the other processes ({reason}); are all of them started, with the same address, "
            "and is its port open?"
        ) from error
    # The devices' first words to one another, here, where all have just come: Gloo, by which CPU hosts talk, waits half a minute
    # for the others to connect and then fails.
    all_gather("here")
    given = others.arguments
    index, count = given.get("process_id"), given.get("num_processes")
    if index is None:  # found by JAX
        index, count = jax.process_index(), jax.process_count()
    return f"process {index} of {count} ({others.how})"


# ------------------------------------------------------------------------------------------------- where the others are


@dataclasses.dataclass(frozen=True)
class _Others:
    """arguments: of jax.distributed.initialize. how: they were found. where: for messages."""

    arguments: Mapping[str, Any]
    how: str
    where: str


def _others(mode: str, **given: str | int | None) -> _Others | str:
    """Where the other processes are; a line that says why there are none."""
    named = {name: value for name, value in given.items() if value is not None}
    if mode not in MODES:
        raise InputError(f"--distributed is {mode!r}; choose one of {MODES}")
    if mode == "off":
        if named:
            raise InputError(f"--{next(iter(named))} makes no sense with --distributed=off")
        return "one process (--distributed=off)"
    if not named:
        named = _from_environment(os.environ)
    if named:
        return _explicit(named)
    found = _detected(os.environ)
    if mode == "auto" and not found:
        return "one process"
    where = f"--distributed={mode}: {found or 'no SLURM step, TPU pod or Kubernetes job here'}"
    return _Others({}, found or "found by JAX", where)


def _from_environment(environ: Mapping[str, str]) -> dict[str, str | int]:
    """JAX's own variables, where a coordinator is named among them."""
    if "JAX_COORDINATOR_ADDRESS" not in environ:
        return {}
    found: dict[str, str | int] = {"coordinator": environ["JAX_COORDINATOR_ADDRESS"]}
    for name, variable in (("process", "JAX_PROCESS_ID"), ("processes", "JAX_NUM_PROCESSES")):
        if variable in environ:
            if not environ[variable].isdecimal():
                raise InputError(f"{variable} is {environ[variable]!r}; it must be a number")
            found[name] = int(environ[variable])
    return found


def _explicit(named: Mapping[str, str | int]) -> _Others:
    missing = [name for name in PLACE_FLAGS if name not in named]
    if missing:
        raise InputError(
            f"--{missing[0]} is missing: --coordinator=HOST:PORT, --process=I and --processes=N go together "
            "(or JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID, JAX_NUM_PROCESSES)"
        )
    address, process, processes = named["coordinator"], named["process"], named["processes"]
    if not _ADDRESS.fullmatch(str(address)):
        raise InputError(f"--coordinator is {address!r}; it must be HOST:PORT of process 0")
    if not 0 <= process < processes:
        raise InputError(f"--process is {process} of --processes={processes}; it must be from 0 to {processes - 1}")
    arguments = {"coordinator_address": address, "process_id": process, "num_processes": processes}
    where = f"process {process} of {processes} at {address}"
    return _Others(arguments | {"cluster_detection_method": "deactivate"}, f"coordinator {address}", where)


def _detected(environ: Mapping[str, str]) -> str:
    """What in the environment says that there are other processes, in words; "" for nothing."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID", "SLURM_JOB_ID"} <= environ.keys() and tasks != "1":
        return f"SLURM job {environ['SLURM_JOB_ID']}, {tasks} tasks"
    hosts = environ.get("TPU_WORKER_HOSTNAMES", environ.get("TPU_PROCESS_ADDRESSES", ""))
    if "," in hosts:
        return f"TPU pod of {len(hosts.split(','))} workers"
    return ""


# ------------------------------------------------------------------------------------------------- what they tell one another


def all_gather(said: Any) -> list[Any]:
    """What each process says (JSON), by process."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [said]
    data = np.frombuffer(json.dumps(said).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(-(-max(sizes) // PADDED_TO) * PADDED_TO, np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_primary(work: Callable[[], Any]) -> Any:
    """What `work` returns (JSON), done by process 0 while the others wait; its UserError is an error of all."""
    import jax

    found, error = None, None
    if jax.process_index() == 0:
        try:
            found = work()
        except UserError as caught:
            error = caught
    found, why = all_gather([found, error and str(error)])[0]
    if error is not None:
        raise error
    if why:
        raise InputError(f"process 0 has failed: {why}")
    return found


def assert_same(what: str, said: Any) -> None:
    """Raises InputError, on all, where the processes do not all say the same: they were started with different settings."""
    first, *others = all_gather(said)
    for process, theirs in enumerate(others, 1):
        if theirs != first:
            differ = [name for name in first if theirs.get(name) != first[name]] if isinstance(first, dict) else []
            told = f": {differ[0]} is {theirs.get(differ[0])} there and {first[differ[0]]} here" if differ else ""
            raise InputError(
                f"{what}: those of process {process} differ from those of process 0{told}; start all of them with the same "
                "command and the same files"
            )


def same_folder(folder: pathlib.Path) -> None:
    """Raises InputError, on all, where a process does not see what process 0 writes in the folder."""
    import jax

    if jax.process_count() == 1:
        return

    def write() -> str:
        name = f".seen-{uuid.uuid4().hex}"  # a name that no earlier run has left in another folder
        (folder / name).touch()
        return name

    token = folder / on_primary(write)
    blind = [process for process, seen in enumerate(all_gather(is_seen(token))) if not seen]
    if jax.process_index() == 0:
        token.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"{folder}: process {blind[0]} does not see what process 0 writes there; choose a folder that all hosts share"
        )


def is_seen(path: pathlib.Path, within: float | None = None) -> bool:
    """Waits for a file of another process (SEEN_WITHIN seconds): a file system may show it late. False where it stays away."""
    until = time.monotonic() + (SEEN_WITHIN if within is None else within)
    while not (seen := path.exists()) and time.monotonic() < until:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # NFS looks again
        time.sleep(LOOK_AGAIN)
    return seen


def same_steps(checkpoints: Any) -> None:
    """Every process is to begin with the steps that process 0 finds: a file system may show a folder late. checkpoints: the
    workdir's, checkpoint.Checkpoints. Raises InputError, on all."""
    import jax

    if jax.process_count() == 1:
        return
    for step in on_primary(checkpoints.steps):
        is_seen(checkpoints.folder / str(step))
    checkpoints.look_again()
    assert_same("saved steps", checkpoints.steps())
