"""Programs that tests start: their environment, what they say, and how they end."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
LONGEST = 600
"""Seconds after which nothing more is hoped for: for a loaded machine, no measure of anything."""
OF_A_JOB = ("SLURM", "JAX_COORDINATOR", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JOB_COMPLETION")


def environment(*, devices: int = 1, cached: bool = False, **more: str) -> dict[str, str]:
    """This process's, for a CPU that pretends to be `devices`. cached: XLA's programs are shared within this run of the tests."""
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}" * (devices > 1)
    cache = {"JAX_ENABLE_COMPILATION_CACHE": str(cached).lower(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_JOB)}
    return inherited | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | cache | more


class Program(subprocess.Popen):
    """Python with these words, in the root. It writes into files: pipes fill, and what one reader has buffered is lost to the
    next."""

    def __init__(self, *words, env: dict[str, str] | None = None):
        self.files = [tempfile.TemporaryFile() for _ in "oe"]  # noqa: SIM115
        command, (out, errors) = [sys.executable, *map(str, words)], self.files
        super().__init__(command, cwd=ROOT, env=env or environment(), stdout=out, stderr=errors)

    def said(self) -> list[str]:
        """[stdout, stderr] until now."""
        return [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self.files]

    def wait_for(self, found: str | Callable[[], bool]) -> None:
        """Until found() is true or it has said `found`; an error where it ends before."""
        end = time.monotonic() + LONGEST
        while not (found() if callable(found) else found in self.said()[0]):
            assert self.poll() is None and time.monotonic() < end, f"never came to {found}: {self.said()}"
            time.sleep(0.01)

    def finish(self) -> tuple[int, str, str]:
        """(code, stdout, stderr) at its end."""
        try:
            return self.wait(LONGEST), *self.said()
        finally:
            self.kill()
            for file in self.files:
                file.close()


def of_code(code: str, *words, env: dict[str, str] | None = None) -> Program:
    return Program("-u", "-c", textwrap.dedent(code), *words, env=env)


def run(*words, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """(code, stdout, stderr) of Python with these words."""
    return Program(*words, env=env).finish()


STARTS = """
    import importlib, json, os, runpy, sys, tempfile

    module, calls, ends = sys.argv[1], json.loads(sys.argv[2]), []
    importlib.import_module(module)  # what it needs is there then, once for all; JAX is not yet started
    del sys.modules[module]
    for words in calls:
        files = [tempfile.TemporaryFile() for _ in "oe"]
        child = os.fork()
        if not child:
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            sys.argv[1:] = words
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends.append([code, *(os.pread(file.fileno(), 1 << 20, 0).decode() for file in files)])
    print(json.dumps(ends))
"""


def starts(module: str, *calls: list) -> list[list]:
    """[code, stdout, stderr] of `python -m module` with each of these lists of words, whose imports are paid once."""
    code, out, errors = of_code(STARTS, module, json.dumps([list(map(str, words)) for words in calls])).finish()
    assert code == 0, errors
    return json.loads(out)


def code_of(main: Callable, *words) -> int:
    """The exit code of a program in this process, that of argparse's own exit included."""
    try:
        return main(list(map(str, words)))
    except SystemExit as stopped:
        return stopped.code


def free_port(candidates: Iterable[int] = (0,)) -> int:
    """The first of these that nobody has; 0: any."""
    for port in candidates:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("localhost", port))
            return s.getsockname()[1]
    raise AssertionError("no free port")
