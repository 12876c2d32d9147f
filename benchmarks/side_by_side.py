"""Ours and PyTorch's side by side: the same weights, batch, precision and machine, one call of each in turn.

Every form is a process of its own (side_by_side_forms.py) and waits while another is timed. Before a peer's form is timed it
must give ours' numbers; one that does not is refused. Ours stays, the peer's forms come one at a time: a round is one call of
ours and one of the form, and a form is compared with ours of its own rounds. A form goes into the JSON when it is done, and a
second start goes on with those that have no times there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.side_by_side_case import Case
from benchmarks.side_by_side_forms import GRAPHS, OURS, PREPARE, PROGRAMS
from benchmarks.side_by_side_report import report, summary
from benchmarks.tables import RESULTS, ROOT, commit, machine, read, write
from input_pipeline.schema import InputError
from truepose_jax.kernels.attention.api import IMPLEMENTATIONS
from truepose_jax.runtime.cli import parse_size

FULL_WIDTHS, NARROW_WIDTHS = (320, 640, 1280, 1280), (64, 128, 256, 256)
WARM_UP = 1
"""Calls of each form after the check that are not counted."""
TOLERANCES = {
    ("train", "float32"): 2e-5,
    ("sample", "float32"): 2e-4,
    ("train", "bfloat16"): 2e-2,
    ("sample", "bfloat16"): math.inf,
}
"""Of |theirs - ours| / |ours|, Euclidean norms, over the losses of the first steps or the latents. Measured in float32: 5e-7
and 4e-6. Of bfloat16 nothing is measured. Its rounding can decide which regions CAA reads, a choice of whole tokens, and sampling
carries it on from step to step: latents of bfloat16 may lie far apart and both be right. So there the difference is stated in
the table and refuses nobody but what is not finite; that both are one program, float32 says (here and in tests/parity)."""
OUR_PATIENCE = 3600.0
PATIENCE = {"cpu": 200.0, "gpu": 3600.0}
"""Seconds that a peer's form may take to answer: on a CPU torch.compile makes and compiles hundreds of C++ programs."""


class FormFailed(Exception):
    """A form's process ended, or its numbers are others; the text says why."""

    def __init__(self, form: str, why: str):
        super().__init__(why)
        self.form = form


class Worker:
    """A form's process and its two pipes."""

    def __init__(self, form: str, folder: pathlib.Path, row: Row, environment: dict[str, str]):
        self.form = form
        self.log, self.patience = folder / f"{form}.log", row.patience if form not in (OURS, PREPARE) else OUR_PATIENCE
        cores = sorted(os.sched_getaffinity(0))[: row.case.threads]
        command = [sys.executable, "-m", "benchmarks.side_by_side_forms", str(folder), form]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, cores)), *command],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            raise FormFailed(
                self.form, f"no answer in {self.patience:.0f} s (--patience); building or compiling takes longer here"
            )
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            lines = [text.strip() for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise FormFailed(self.form, f"ended with code {code}: {lines[-1][:200] if lines else 'no output'}")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says why
        return self.answer()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Row:
    """A case and the peer's forms that it is timed against. apart: ours ends before the first form begins, for cases of which
    a device's memory holds one form only. patience: seconds after which a form counts as failed."""

    case: Case
    peers: Sequence[str]
    repeats: int
    patience: float
    apart: bool = False


def python_path() -> str:
    """This project before what PYTHONPATH has."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def environment_of(case: Case, xla_flags: str, programs: pathlib.Path | None = None) -> dict[str, str]:
    found = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": python_path()}
    found |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    found["TORCHINDUCTOR_COMPILE_THREADS"] = str(case.threads)
    found["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[case.device]
    found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the forms share the card
    if case.dtype == "float32":
        found["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # no TF32 on either side
    if programs is not None:
        cache = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": f"{programs.resolve() / 'cache'}"}
        found |= cache | {PROGRAMS: f"{programs.resolve()}"}
    if xla_flags:
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
    return found


def measure(
    row: Row,
    *,
    xla_flags: str = "",
    programs: pathlib.Path | None = None,
    known: Mapping[str, Any] | None = None,
    exports: pathlib.Path | None = None,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """The row's numbers. A peer that fails has {"failed": why}. Raises FormFailed where ours fails.

    known: forms that were timed before and stay. exports: where the peer's weights are kept for other rows of the same
    network. about: facts that the row and each of its forms keep. save: is given the numbers after every form.
    """
    case, stamp = row.case, {"when": time.strftime("%Y-%m-%d", time.gmtime()), **(about or {})}
    before, started = round(os.getloadavg()[0], 2), time.time()
    found = {form: numbers for form, numbers in (known or {}).items() if form not in (OURS, "about")}
    with tempfile.TemporaryDirectory(prefix="side_by_side_") as root:
        folder = pathlib.Path(root)
        (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
        environment = environment_of(case, xla_flags, programs)
        stamp["machine"] = {**stamp.get("machine", {}), **_prepare(row, folder, exports, environment)}
        with _started(OURS, row, folder, environment) as ours:
            say(f"  {OURS}: ready")
            if row.apart:
                ours.rounds(row.repeats)
                ours.finish()
                ours.worker.stop()
            for form in row.peers:
                try:
                    with _started(form, row, folder, environment) as peer:
                        say(f"  {form}: ready, difference {peer.found['difference']:.1e}")
                        found[form] = _timed(ours, peer, row) | {
                            "commit": stamp.get("commit"), "when": stamp["when"], "load": round(os.getloadavg()[0], 2)
                        }  # fmt: skip
                except FormFailed as error:
                    if error.form == OURS:
                        raise
                    found[form] = {"failed": str(error)}
                    say(f"  {form}: {error}")
                    if not ours.found["times"]:  # ours alone where no peer came to be timed
                        ours.rounds(row.repeats)
                if not row.apart:
                    ours.finish()
                row_about = {
                    "case": dataclasses.asdict(case),
                    "xla_flags": xla_flags,
                    "apart": row.apart,
                    "load_before": before,
                    "load_after": round(os.getloadavg()[0], 2),
                    "seconds": round(time.time() - started, 1),
                    **stamp,
                }
                whole = {OURS: ours.found | summary(ours.found["times"]), **found, "about": row_about}
                save(whole)
    return whole


@dataclasses.dataclass
class Running:
    """A form that is there, and what is known of it."""

    worker: Worker
    found: dict[str, Any]

    def call(self, *, counted: bool = True) -> None:
        answer = self.worker.ask("time")
        if counted:
            self.found["times"].append(answer["seconds"])
            self.found["cpu_times"].append(answer["cpu_seconds"])

    def rounds(self, repeats: int) -> None:
        for number in range(WARM_UP + repeats):
            self.call(counted=number >= WARM_UP)

    def finish(self) -> None:
        self.found |= self.worker.ask("facts")


@contextlib.contextmanager
def _started(form: str, row: Row, folder: pathlib.Path, environment: dict[str, str]) -> Iterator[Running]:
    """Built, compiled, and checked against ours. Raises FormFailed."""
    worker = Worker(form, folder, row, environment)
    try:
        device = worker.answer()["device"]
        checked = worker.ask("check")
        found = {
            "first_seconds": checked["seconds"],
            "resident_bytes": checked["resident_bytes"],
            "difference": _difference(row.case, folder, form),
            "times": [],
            "cpu_times": [],
        }
        yield Running(worker, found | ({"device": device} if form == OURS else {}))
    finally:
        worker.stop()


def _timed(ours: Running, peer: Running, row: Row) -> dict[str, Any]:
    """The peer's numbers, with ours of the same rounds; where apart, of the rounds that ours had alone."""
    begun = len(ours.found["times"])
    try:
        if row.apart:
            peer.rounds(row.repeats)
        else:
            for number in range(WARM_UP + row.repeats):
                for each in (ours, peer):
                    each.call(counted=number >= WARM_UP)
        peer.finish()
    except FormFailed:
        if not row.apart:
            for name in ("times", "cpu_times"):
                del ours.found[name][begun:]
        raise
    return peer.found | summary(peer.found["times"]) | {"ours_times": ours.found["times"][0 if row.apart else begun :]}


def _prepare(
    row: Row, folder: pathlib.Path, exports: pathlib.Path | None, environment: dict[str, str]
) -> dict[str, float]:
    """The peer's weights and inputs in `folder`; the weights are a link into `exports` where another row left them there.
    Returns what a product reaches on the cores and threads that the forms have (product_flops, on a CPU)."""
    case, kept = row.case, None
    if exports is not None:
        kept = exports / f"{'-'.join(map(str, case.widths))}_{case.layers}_{case.token_width}"
        if kept.exists():
            (folder / "export").symlink_to(kept)
    worker = Worker(PREPARE, folder, row, environment | {"JAX_PLATFORMS": "cpu"})
    try:
        answer = worker.answer()
    finally:
        worker.stop()
    if kept is not None and not kept.exists():
        (folder / "export").rename(kept)
        (folder / "export").symlink_to(kept)
    return answer


def _difference(case: Case, folder: pathlib.Path, form: str) -> float:
    """|form's - ours| / |ours|. Raises FormFailed where they are not the same program."""
    found, ours = (np.load(folder / f"{name}.npy") for name in (form, OURS))
    measured = float(np.linalg.norm(found - ours) / np.linalg.norm(ours)) if found.shape == ours.shape else np.inf
    allowed = TOLERANCES[case.task, case.dtype]
    if not measured <= allowed:
        raise FormFailed(form, f"its numbers differ from ours by {measured:.1e} (allowed: {allowed:.0e}); not timed")
    return measured


# --- results ---------------------------------------------------------------------------------------------------------


def timed_forms(row: Mapping[str, Any]) -> list[str]:
    """The peer's forms that a row has times of."""
    return [form for form, found in row.items() if form not in (OURS, "about") and found.get("times")]


def run(path: pathlib.Path, title: str, rows: Sequence[Row], flags: argparse.Namespace) -> int:
    """Measures the forms that the file lacks and writes it and its page. 1 where a peer's numbers differed.

    flags.again: rows that are measured here replace those of their names, others stay. Raises InputError.
    """
    known = dict(read(path, "about"))

    def save(case_name: str, numbers: dict[str, Any]) -> None:
        known[case_name] = numbers
        write(path, {"rows": known}, report(path.stem, title, known))

    here = machine(flags.device)
    if not flags.again:
        for row in rows:
            if row.case.name in known and (other := _first_other(row, flags.xla_flags, here, known[row.case.name])):
                raise InputError(f"{path} has {row.case.name} with {other}; name another --out or measure it --again")
    with tempfile.TemporaryDirectory(prefix="side_by_side_exports_") as exports:
        for row in rows:
            before = {} if flags.again else known.get(row.case.name, {})
            missing = [form for form in row.peers if form not in timed_forms(before)]
            if not missing:
                print(f"{row.case.name}: done before")
                continue
            print(row.case.name, flush=True)
            try:
                measure(
                    dataclasses.replace(row, peers=missing),
                    xla_flags=flags.xla_flags,
                    programs=flags.programs,
                    known=before,
                    exports=pathlib.Path(exports),
                    about={"machine": here, "commit": commit()},
                    say=functools.partial(print, flush=True),
                    save=functools.partial(save, row.case.name),
                )
            except FormFailed as error:
                print(f"error: {row.case.name}, {error.form}: {error}", file=sys.stderr)
                return 1
    print(report(path.stem, title, known))
    named = [known[row.case.name] for row in rows]
    return int(any("not timed" in found.get("failed", "") for row in named for found in row.values()))


def _first_other(row: Row, xla_flags: str, here: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The first setting that a row was measured with otherwise, in words."""
    had = dataclasses.asdict(Case.of(before["about"]["case"])) | {
        "xla_flags": before["about"].get("xla_flags", ""),
        "apart": before["about"].get("apart", False),
        **before["about"]["machine"],
    }
    wanted = dataclasses.asdict(row.case) | {"xla_flags": xla_flags, "apart": row.apart, **here}
    return next((f"{k} {had.get(k)!r} where {v!r} is asked for" for k, v in wanted.items() if had.get(k) != v), "")


# --- flags -----------------------------------------------------------------------------------------------------------


def case_of(flags: argparse.Namespace, task: str, size: tuple[int, int], batch: int, **more: Any) -> Case:
    """A row's case: what the flags say, and where they say nothing the full network in bfloat16 or a narrow one."""
    return Case(
        task=task,
        size=size,
        widths=flags.widths or (FULL_WIDTHS if flags.full else NARROW_WIDTHS),
        batch=batch,
        dtype="bfloat16" if flags.full else "float32",
        device=flags.device,
        threads=flags.threads,
        layers=flags.layers or (2 if flags.full else 1),
        attention=flags.attention,
        **more,
    )


def row_of(flags: argparse.Namespace, case: Case, peers: Sequence[str], repeats: int, *, apart: bool = False) -> Row:
    """peers, repeats: where the flags name none."""
    peers = tuple(flags.peers.split(",")) if flags.peers else peers
    return Row(case, peers, flags.repeats or repeats, flags.patience or PATIENCE[flags.device], apart)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--full", action="store_true", help="the full network at the paper's sizes, in bfloat16")
    parser.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH of the photos, for every row")
    parser.add_argument("--widths", type=_widths, help="of the UNets' levels, as in 64,128,256,256")
    parser.add_argument("--layers", type=int, help="of a UNet's level on the way down (SD1.5: 2)")
    parser.add_argument("--batch", type=int, action="append", help="one row for each")
    parser.add_argument("--peers", help="forms of the peer, separated by commas")
    parser.add_argument("--attention", default="", help="ours' attention by name, of " + ", ".join(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, help="rounds")
    parser.add_argument("--patience", type=float, help="seconds until a form that does not answer counts as failed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side")
    parser.add_argument("--xla-flags", default="", help="more of them, for ours")
    parser.add_argument("--programs", type=pathlib.Path, help="folder of gpu_aot.py's programs, and of compiled ones to keep")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="replace the rows of this call where they are there")


def check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace, known: Sequence[str]) -> None:
    """Ends with one line and code 2 where something cannot work."""
    if flags.device == "gpu" and shutil.which("nvidia-smi") is None:
        parser.error("--device=gpu, and this machine has no nvidia-smi")
    if flags.full and flags.device == "cpu":
        parser.error("--full is the network of 1.8 billion parameters; it wants --device=gpu")
    for value, name in (
        (flags.repeats, "repeats"),
        (flags.threads, "threads"),
        (flags.layers, "layers"),
        *((b, "batch") for b in flags.batch or ()),
    ):
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    if flags.patience is not None and not 0 < flags.patience < math.inf:
        parser.error(f"--patience is {flags.patience}; it must be a number of seconds above 0")
    if flags.threads > len(os.sched_getaffinity(0)):
        parser.error(f"--threads is {flags.threads}; this process may use {len(os.sched_getaffinity(0))} cores")
    for form in (flags.peers or "").split(",") if flags.peers else ():
        if form not in known:
            parser.error(f"--peers names '{form}'; choose of {', '.join(known)}")
        if GRAPHS in form.split("_") and flags.device != "gpu":
            parser.error(f"--peers names '{form}'; CUDA graphs want --device=gpu")
    if flags.attention and flags.attention not in IMPLEMENTATIONS:
        parser.error(f"--attention is '{flags.attention}'; choose of {', '.join(IMPLEMENTATIONS)}")
    if flags.size and any(side % 8 for side in flags.size):
        parser.error(f"--size is {flags.size[0]}x{flags.size[1]}; both sides must be divisible by 8")
    for width in flags.widths or ():
        if width < 1 or width % 32:
            parser.error(f"--widths has {width}; each must be a multiple of 32 (norm groups)")


def _widths(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' is not numbers separated by commas, as in 64,128,256,256")
    return tuple(int(part) for part in text.split(","))
