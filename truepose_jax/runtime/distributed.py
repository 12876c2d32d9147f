"""Several processes as one program: where the others are, from SLURM, Kubernetes, a TPU pod, or flags.

`start` joins them for training, as one JAX program over all devices: call it before anything asks JAX for its devices.
`joined` gives each of them its share of work that needs no devices but its own (generate, evaluate, prepare).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from input_pipeline.annotations.photo import one_line
from input_pipeline.process_group import ALONE, Share
from input_pipeline.schema import InputError

MODES = ("auto", "always", "off")
TIMEOUT = 300
"""Seconds that a process waits for the others."""
PLACE_FLAGS = ("coordinator", "process", "processes")
STOPPED = 143
"""Exit code of a process that was asked to stop, or heard that another one was (checkpoint.STOPPED)."""
SEEN_WITHIN = 120
"""Seconds after which a file that another host has written must be seen: NFS keeps what it knows of a folder for up to 60."""
CHECK_EVERY = 1.0
"""Seconds between two questions whether another process has failed or was asked to stop; one takes 3 ms."""
LOOK_AGAIN = (0.01, 0.5)
"""Seconds between two looks whether the others have come: the first and the longest."""

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
    _initialize(jax.distributed.initialize, others)
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


def _initialize(join: Callable[..., object], others: _Others) -> None:
    try:
        join(**others.arguments, initialization_timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{others.where}: cannot join the other processes ({reason}); are all of them started, with the same address, "
            "and is its port open?"
        ) from error


# ------------------------------------------------------------------------------------------------- shares of work


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `joined`, which are those of training."""
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--distributed",
        choices=MODES,
        default="auto",
        help="share the work with other processes (where there are some)",
    )
    add("--coordinator", metavar="HOST:PORT", help="of process 0, with --process and --processes")
    add("--process", type=int, metavar="I", help="this process: 0, 1, ...")
    add("--processes", type=int, metavar="N", help="how many processes share the work")


def refuse_flags(flags: argparse.Namespace, why: str) -> None:
    """Raises InputError, with the reason, where a flag asks to share work that is one process's."""
    named = [name for name in PLACE_FLAGS if getattr(flags, name) is not None]
    if named or flags.distributed == "always":
        raise InputError(f"--{named[0] if named else 'distributed'} makes no sense here: {why}")


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[Share]:
    """`with joined(flags) as share:` this process's share of the work, ALONE where there are no others.

    Leaving it waits for the others, so that 0 as exit code means that all have done their share. Where one fails, or
    is told to stop (SIGTERM, Ctrl-C), the others hear of it at their next `check` and end too: with InputError, or
    with SystemExit(STOPPED). One that is killed outright is missed after some 100 seconds, and JAX then ends the others.
    """
    others = _others(flags.distributed, **{name: getattr(flags, name) for name in PLACE_FLAGS})
    if isinstance(others, str):
        with _signals_as_exits():
            yield ALONE
        return
    import jax

    # JAX's own meeting service and nothing else of jax.distributed. XLA is not joined: each process is a JAX program of its
    # own on its own devices, that compiles, reads checkpoints and ends without the others. Work that needs no sum over
    # hosts then cannot hang in one, and no process waits because another has nothing to do. SIGTERM stays ours too.
    from jax._src.distributed import State

    jax.config.update("jax_enable_preemption_service", False)
    state = State()
    _initialize(state.initialize, others)
    share = Several(state)
    print(f"process {share.index} of {share.count} ({others.how})", flush=True)
    try:
        with _signals_as_exits(), share.told():
            yield share
    finally:  # Without those handlers: a second signal ends at once. It waits until the others have heard.
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # of others that are gone without a word
            state.shutdown()


@contextlib.contextmanager
def together() -> Iterator[Share]:
    """`with together() as share:` the processes that `start` joined, for training: ALONE where this is the only one.

    Where one fails the others hear of it at the next meeting, the one that waits for all at the end among them.
    """
    import jax

    if jax.process_count() == 1:
        yield ALONE
        return
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise InputError(f"{jax.process_count()} processes have not joined one another; add --distributed=always")
    share = Several(global_state)
    with share.told():
        yield share


def same_folder(share: Share, folder: pathlib.Path) -> None:
    """Raises InputError where a process does not see what process 0 writes in the folder."""
    if share.count == 1:
        return

    def write() -> str:
        name = f".seen-{uuid.uuid4().hex}"  # a name that no earlier run has left in another folder
        (folder / name).touch()
        return name

    token = folder / share.lead("a file in the workdir", write)
    try:
        share.see(token)
        share.meet("the workdir is seen")
    finally:
        if share.leads:
            token.unlink(missing_ok=True)


def connect(share: Share) -> None:
    """The devices' first words to one another. Gloo, by which CPU hosts talk, waits half a minute for the others and then fails:
    so they come here, where all are at once, and not after compilations, which end at different times."""
    if share.count == 1:
        return
    from jax.experimental import multihost_utils

    share.meet("devices")
    multihost_utils.sync_global_devices("devices")


def same_steps(share: Share, checkpoints: Any) -> None:
    """Every process is to begin with the steps that process 0 finds: a file system may show a folder late. checkpoints: the
    workdir's, checkpoint.Checkpoints. Raises InputError."""
    if share.count == 1:
        return
    for step in share.lead("saved steps", checkpoints.steps):
        share.see(checkpoints.folder / str(step))
    checkpoints.look_again()
    share.agree("saved steps", checkpoints.steps())


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGINT raise SystemExit(STOPPED), so that what is done is kept and the others are told."""

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


class Several(Share):
    """One of several processes' share; they talk through JAX's meeting service, which lives in process 0."""

    def __init__(self, state: Any):
        """state: jax._src.distributed.State, or whatever has process_id, num_processes and a client like its."""
        self.index, self.count = state.process_id, state.num_processes
        self._client = state.client
        self._meetings = 0
        self._checked = 0.0

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Leaving it waits for the others, or tells them why this process ends before its work is done."""
        try:
            yield
            self.meet("the end", meanwhile=lambda: self.asked(False))  # one that was asked has come to its end too
        except BaseException as error:
            stopped = isinstance(error, SystemExit | KeyboardInterrupt)
            self._say("left" if stopped else "failed", f"process {self.index} has failed ({one_line(error)})")
            raise

    def check(self) -> None:
        if time.monotonic() - self._checked >= CHECK_EVERY:
            self._check()

    def _check(self) -> None:
        if self.asked(False):
            self._leave()

    def asked(self, here: bool) -> bool:
        self._checked = time.monotonic()
        if here:
            self._say("asked", "")
        words = {
            key.rpartition("/")[2]: text for key, text in self._call(self._client.key_value_dir_get, "words") or []
        }
        if "failed" in words:
            raise InputError(
                f"{words['failed']}; this process stops too, what is done is kept: run the same command again"
            )
        if "left" in words:  # and will not come to any meeting
            self._leave()
        return "asked" in words

    def _say(self, word: str, text: str) -> None:
        import jax

        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has said it before, or all are gone
            self._client.key_value_set(f"words/{word}", text)

    def _leave(self) -> NoReturn:
        print(
            "another process was asked to stop, so this one does too; run the same command again to go on",
            file=sys.stderr,
        )
        raise SystemExit(STOPPED)

    def meet(self, place: str, said: Any = None, *, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        self._meetings += 1
        meeting = f"meeting{self._meetings:06d}"
        self._call(self._client.key_value_set, f"{meeting}/{self.index}", json.dumps([place, said]))
        pause, longest = LOOK_AGAIN
        while len(there := self._call(self._client.key_value_dir_get, meeting) or []) < self.count:
            (meanwhile or self._check)()
            time.sleep(pause)
            pause = min(2 * pause, longest)
        words = {int(key.rpartition("/")[2]): json.loads(text) for key, text in there}
        for process, (where, _) in sorted(words.items()):
            if where != place:
                raise InputError(
                    f"process {process} is at '{where}' and process {self.index} at '{place}': start all of them with the "
                    "same command"
                )
        return [words[process][1] for process in range(self.count)]

    def agree(self, place: str, said: Any) -> None:
        ours = json.loads(json.dumps(said))
        for process, theirs in enumerate(self.meet(place, said)):
            if theirs != ours:
                differ = [name for name in ours if theirs.get(name) != ours[name]] if isinstance(ours, dict) else []
                told = f": {differ[0]} is {theirs.get(differ[0])} there and {ours[differ[0]]} here" if differ else ""
                raise InputError(
                    f"{place}: those of process {process} differ from those of process {self.index}{told}; start all of "
                    "them with the same command and the same files"
                )

    def see(self, path: pathlib.Path, size: int = 0) -> None:
        until = time.monotonic() + SEEN_WITHIN
        while True:
            with contextlib.suppress(OSError):
                if path.stat().st_size >= size:
                    return
            if time.monotonic() > until:
                raise InputError(
                    f"{path}: another process has written it, and process {self.index} does not see it; choose a folder "
                    "that all hosts share"
                )
            self.check()
            time.sleep(LOOK_AGAIN[1])

    def _call(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """What the meeting service answers, None where it does not know the key. Raises InputError where it is gone."""
        import jax

        try:
            return ask(*arguments)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise InputError(
                f"process {self.index} has lost the others ({one_line(error)}); start all of them again"
            ) from error
