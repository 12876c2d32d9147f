"""--shard of generate, evaluate and prepare: which part of the work is this process's (input_pipeline/shards.py)."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard

STOPPED = 143
"""Exit code of a process that was asked to stop (checkpoint.STOPPED)."""


def add_shard_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("several processes").add_argument(
        "--shard",
        metavar="I/N",
        help="part I, from 0, of N of the work, or `merge` when all are done (what SLURM, Kubernetes or JAX_PROCESS_ID say)",
    )


def shard_of(text: str | None, environ: Mapping[str, str] = os.environ) -> Shard:
    """What --shard says, or else the environment. Raises InputError."""
    if text is None:
        found, how = _from_environment(environ)
        if found != WHOLE:
            print(f"{found} ({how})", flush=True)
        return found
    if text == "merge":
        return Shard(merge=True)
    if not re.fullmatch(r"\d+/\d+", text):
        raise InputError(f"--shard={text} is not I/N, as in 0/8, nor merge")
    index, _, count = text.partition("/")
    return _checked(int(index), int(count), f"--shard={text}")


def _checked(index: int, count: int, said: str) -> Shard:
    if not 0 <= index < count:
        raise InputError(f"{said}: the parts of {count} are 0 to {count - 1}")
    return Shard(index, count)


def _from_environment(environ: Mapping[str, str]) -> tuple[Shard, str]:
    """A SLURM array and a job step in it multiply; JAX's own variables; an indexed job of Kubernetes."""

    def number(name: str, default: int | None = None) -> int:
        text = environ.get(name, "" if default is None else str(default))
        if not text.isdecimal():
            raise InputError(f"{name} is {text!r}; it must be a number, or say --shard=I/N")
        return int(text)

    index, count, how = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environ:
        step = number("SLURM_ARRAY_TASK_STEP", 1) or 1
        index = (number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN", 0)) // step
        count = number("SLURM_ARRAY_TASK_COUNT")
        how.append("SLURM_ARRAY_TASK_ID")
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys():  # a batch script has the first alone, and is one process
        tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
        index, count = index * tasks + number("SLURM_PROCID"), count * tasks
        how.append("SLURM_PROCID")
    if not how:
        for name, total in (("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"), ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")):
            if name in environ:
                index, count, how = number(name), number(total), [name]
                break
    return _checked(index, count, " and ".join(how)), " and ".join(how)


@contextlib.contextmanager
def signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGINT raise SystemExit(STOPPED), so that what is done is kept."""

    def leave(number: int, frame: Any) -> None:
        del frame
        print(f"\n{signal.Signals(number).name}: stopping; what is done is kept", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)

    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
