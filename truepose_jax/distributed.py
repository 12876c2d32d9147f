"""Several processes as one program: where the others are, from SLURM, Kubernetes, a TPU pod, or flags.

Import this and call `start` before anything asks JAX for its devices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import jax

from truepose_jax.schema import ConfigError

MODES = ("auto", "always", "off")
TIMEOUT = 300
"""Seconds that a process waits for the others."""

_ADDRESS = re.compile(r"[^\s:]+:\d+")


def start(
    mode: str = "auto", *, coordinator: str | None = None, process: int | None = None, processes: int | None = None
) -> str:
    """Joins the processes; returns one line that says how. Raises ConfigError where that cannot work.

    coordinator ("host:port" of process 0), process (0, 1, ...), processes (how many): all three or none; they also come
    from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES. Without them "auto" joins where the environment
    says that there are others (SLURM's job step, a TPU pod) and else runs alone; "always" asks JAX to find them, by a
    TPU's metadata too, and fails where it finds none; "off" runs alone whatever the environment says.
    """
    given = {"coordinator": coordinator, "process": process, "processes": processes}
    named = {name: value for name, value in given.items() if value is not None}
    if mode not in MODES:
        raise ConfigError(f"--distributed is {mode!r}; choose one of {MODES}")
    if mode == "off":
        if named:
            raise ConfigError(f"--{next(iter(named))} makes no sense with --distributed=off")
        return "one process (--distributed=off)"
    if not named:
        named = _from_environment(os.environ)
    if named:
        return _explicit(named)
    found = _detected(os.environ)
    if mode == "auto" and not found:
        return "one process"
    _initialize({}, f"--distributed={mode}: {found or 'no SLURM step, TPU pod or Kubernetes job here'}")
    return f"process {jax.process_index()} of {jax.process_count()} ({found or 'found by JAX'})"


def _from_environment(environ: Mapping[str, str]) -> dict[str, str | int]:
    """JAX's own variables, where a coordinator is named among them."""
    if "JAX_COORDINATOR_ADDRESS" not in environ:
        return {}
    found: dict[str, str | int] = {"coordinator": environ["JAX_COORDINATOR_ADDRESS"]}
    for name, variable in (("process", "JAX_PROCESS_ID"), ("processes", "JAX_NUM_PROCESSES")):
        if variable in environ:
            if not environ[variable].isdecimal():
                raise ConfigError(f"{variable} is {environ[variable]!r}; it must be a number")
            found[name] = int(environ[variable])
    return found


def _explicit(named: Mapping[str, str | int]) -> str:
    missing = [name for name in ("coordinator", "process", "processes") if name not in named]
    if missing:
        raise ConfigError(
            f"--{missing[0]} is missing: --coordinator=HOST:PORT, --process=I and --processes=N go together "
            "(or JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID, JAX_NUM_PROCESSES)"
        )
    address, process, processes = named["coordinator"], named["process"], named["processes"]
    if not _ADDRESS.fullmatch(str(address)):
        raise ConfigError(f"--coordinator is {address!r}; it must be HOST:PORT of process 0")
    if not 0 <= process < processes:
        raise ConfigError(f"--process is {process} of --processes={processes}; it must be from 0 to {processes - 1}")
    arguments = {"coordinator_address": address, "process_id": process, "num_processes": processes}
    _initialize(
        arguments | {"cluster_detection_method": "deactivate"}, f"process {process} of {processes} at {address}"
    )
    return f"process {process} of {processes} (coordinator {address})"


def _detected(environ: Mapping[str, str]) -> str:
    """What in the environment says that there are other processes, in words; "" for nothing."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID", "SLURM_JOB_ID"} <= environ.keys() and tasks != "1":
        return f"SLURM job {environ['SLURM_JOB_ID']}, {tasks} tasks"
    hosts = environ.get("TPU_WORKER_HOSTNAMES", environ.get("TPU_PROCESS_ADDRESSES", ""))
    if "," in hosts:
        return f"TPU pod of {len(hosts.split(','))} workers"
    return ""


def _initialize(arguments: Mapping[str, object], where: str) -> None:
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{where}: cannot join the other processes ({reason}); are all of them started, with the same address, "
            "and is its port open?"
        ) from error
