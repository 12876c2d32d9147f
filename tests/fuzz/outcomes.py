"""One call of a program in a forked child, and what came of it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable

ONE_LINE, ACCEPTED = "one line and 2", "accepted"
LINES, TRACEBACK, HANG, SILENT, DAMAGED, CODE = (
    "several lines", "traceback", "hang", "silent acceptance", "damaged", "another exit code",
)  # fmt: skip
GOOD = (ONE_LINE, ACCEPTED)
OUTCOMES = (*GOOD, LINES, TRACEBACK, HANG, SILENT, DAMAGED, CODE)
PATIENCE = 60
"""Seconds after which a call hangs: bad input is told of in well under one, on a machine that does nothing else."""
MEMORY = 6 << 30
"""Bytes of address space that a child may take beyond what it was born with."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A program's main with its words, over files in `folder`; it may write into folder/out alone. bad: whether it must be
    refused, or warned of at least. many: a list, each of whose rows may have a line."""

    target: str
    what: str
    main: Callable[[list[str]], int | None]
    words: list[str]
    folder: pathlib.Path
    bad: bool = False
    many: bool = False


def outcome(call: Call) -> tuple[str, str]:
    """(one of OUTCOMES, what was said)."""
    before = _contents(call.folder)
    said = call.folder.parent / "said.txt"
    code = _ends(call, said)
    text = said.read_text(errors="replace")
    errors = [line for line in text.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("WARNING")]
    if code is None:
        found = HANG
    elif "Traceback" in text or code < 0:
        found = TRACEBACK
    elif _contents(call.folder) != before or list((call.folder / "out").rglob("*.partial")):
        found = DAMAGED
    elif code == 2:
        right = all(line.startswith("error: ") for line in errors) and (len(errors) == 1 or (call.many and errors))
        found = ONE_LINE if right else LINES
    elif code == 0:
        found = SILENT if call.bad and not text.strip() else ACCEPTED
    else:
        found = CODE
    shutil.rmtree(call.folder / "out", ignore_errors=True)
    return found, f"exit {code}: {text.strip()[-2000:]}"


def _ends(call: Call, said: pathlib.Path) -> int | None:
    """Its exit code, minus the signal that ended it, or None where it had to be ended."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _in_child(call, said)
    end = time.monotonic() + PATIENCE
    pause = 0.001
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(call: Call, said: pathlib.Path) -> None:
    """Never returns: the tests' own clean-up is the parent's."""
    code = 1
    try:
        out = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, file in ((0, nothing), (1, nothing), (2, out)):
            os.dup2(file, number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        os.chdir(call.folder)
        code = call.main(call.words) or 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _contents(folder: pathlib.Path) -> dict[str, tuple[int, int, int]]:
    """What may not change: everything but folder/out."""
    found = {}
    for place, folders, files in os.walk(folder):
        if place == str(folder) and "out" in folders:
            folders.remove("out")
        for name in files:
            path = pathlib.Path(place, name)
            stat = path.lstat()
            found[str(path)] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found
