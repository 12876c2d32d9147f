"""Ours and PyTorch's side by side: the same weights, batch, precision and machine, one call of each in turn.

Every form is a process of its own (side_by_side_forms.py) and waits while another is timed. Before anything is timed all
must give ours' numbers; one that does not is refused. A row goes into the JSON when it is done, and a second start goes on
with the rows that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.side_by_side_case import CHECKED_STEPS, Case
from benchmarks.side_by_side_forms import OURS, PREPARE
from truepose_jax import atomic
from truepose_jax.flops import model_flops, utilisation
from truepose_jax.programs import parse_size

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WARM_UP = 1
"""Calls of each form after the check that are not counted."""
TOLERANCES = {
    ("train", "float32"): 2e-5,
    ("sample", "float32"): 2e-4,
    ("train", "bfloat16"): 2e-2,
    ("sample", "bfloat16"): 0.1,
}
"""Of |theirs - ours| / |ours|, Euclidean norms, over the losses of the first steps or the latents. Measured in float32: 5e-7
and 4e-6. Of bfloat16 nothing is measured: 256 times float32's rounding, which sampling carries on from step to step."""
MIB = 1 << 20
OUR_PATIENCE = 3600.0
PATIENCE = {"cpu": 200.0, "gpu": 3600.0}
"""Seconds that a peer's form may take to answer: on a CPU torch.compile makes and compiles hundreds of C++ programs."""


class FormFailed(Exception):
    """A form's process ended, or its numbers are others; the text says why."""


class Worker:
    """A form's process and its two pipes."""

    def __init__(self, form: str, folder: pathlib.Path, row: Row, environment: dict[str, str]):
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
                f"no answer in {self.patience:.0f} s (--patience); building or compiling takes longer here"
            )
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            lines = [text.strip() for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise FormFailed(f"ended with code {code}: {lines[-1][:200] if lines else 'no output'}")
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
    """A case and the peer's forms that it is timed against. apart: one form after the other and not in turn, for cases of
    which a device's memory holds one form only. patience: seconds after which a form counts as failed."""

    case: Case
    peers: Sequence[str]
    repeats: int
    patience: float
    apart: bool = False


def environment_of(case: Case, xla_flags: str) -> dict[str, str]:
    found = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": str(ROOT)}
    found |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    found["TORCHINDUCTOR_COMPILE_THREADS"] = str(case.threads)
    found["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[case.device]
    found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the forms share the card
    if case.dtype == "float32":
        found["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # no TF32 on either side
    if xla_flags:
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
    return found


def measure(row: Row, *, xla_flags: str = "", say: Callable[[str], None] = print) -> dict[str, Any]:
    """The row's numbers. A peer that fails has {"failed": why}. Raises FormFailed where ours fails."""
    case = row.case
    with tempfile.TemporaryDirectory(prefix="side_by_side_") as root:
        folder = pathlib.Path(root)
        (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
        environment = environment_of(case, xla_flags)
        prepared = Worker(PREPARE, folder, row, environment | {"JAX_PLATFORMS": "cpu"})
        prepared.answer()
        prepared.stop()
        before, started, found = os.getloadavg()[0], time.time(), {}
        groups = [[form] for form in (OURS, *row.peers)] if row.apart else [[OURS, *row.peers]]
        for forms in groups:
            found |= _in_turn(forms, row, folder, environment, say)
        found["about"] = {
            "case": dataclasses.asdict(case),
            "xla_flags": xla_flags,
            "apart": row.apart,
            "load_before": round(before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "seconds": round(time.time() - started, 1),
            "when": time.strftime("%Y-%m-%d", time.gmtime()),
        }
    return found


def _in_turn(forms: Sequence[str], row: Row, folder: pathlib.Path, environment, say) -> dict[str, Any]:
    workers: dict[str, Worker] = {}
    found: dict[str, Any] = {}
    try:
        for form in forms:
            worker = Worker(form, folder, row, environment)
            workers[form] = worker
            try:
                device = worker.answer()["device"]
                first = worker.ask("check")["seconds"]
                difference = _difference(row.case, folder, form)
                found[form] = {"first_seconds": first, "difference": difference, "times": [], "cpu_times": []}
                if form == OURS:
                    found[form]["device"] = device
                for _ in range(WARM_UP):
                    worker.ask("time")
                say(f"  {form}: ready, difference {found[form]['difference']:.1e}")
            except FormFailed as error:
                _give_up(form, error, found, workers, say)
        for _ in range(row.repeats):
            for form in list(workers):
                try:
                    answer = workers[form].ask("time")
                    found[form]["times"].append(answer["seconds"])
                    found[form]["cpu_times"].append(answer["cpu_seconds"])
                except FormFailed as error:
                    _give_up(form, error, found, workers, say)
        for form in workers:
            found[form] |= workers[form].ask("end")
            found[form] |= summary(found[form]["times"])
    finally:
        for worker in workers.values():
            worker.stop()
    return found


def _give_up(form: str, error: FormFailed, found, workers, say) -> None:
    if form == OURS:
        raise error
    workers.pop(form).stop()
    found[form] = {"failed": str(error)}
    say(f"  {form}: {error}")


def _difference(case: Case, folder: pathlib.Path, form: str) -> float:
    """|form's - ours| / |ours|. Raises FormFailed where they are not the same program."""
    found, ours = (np.load(folder / f"{name}.npy") for name in (form, OURS))
    measured = float(np.linalg.norm(found - ours) / np.linalg.norm(ours)) if found.shape == ours.shape else np.inf
    allowed = TOLERANCES[case.task, case.dtype]
    if not measured <= allowed:
        raise FormFailed(f"its numbers differ from ours by {measured:.1e} (allowed: {allowed:.0e}); not timed")
    return measured


def summary(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def ratio(row: dict[str, Any], form: str) -> float:
    """Ours over the form's time: the median over the rounds, so that a load that comes and goes weighs on both."""
    ours, theirs = (np.array(row[name]["times"]) for name in (OURS, form))
    return float(np.median(ours / theirs)) if not row["about"]["apart"] else float(np.median(ours) / np.median(theirs))


# --- results ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "diffusers")}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "system": platform.system(), **versions}


def product_rate(size: int = 2048) -> float:
    """FLOPs a second of a float32 product of this machine's CPU, all cores: the best of five."""
    x = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def run(name: str, title: str, rows: Sequence[Row], flags: argparse.Namespace) -> int:
    """Measures the rows that OUT/NAME.json lacks and writes it and OUT/NAME.md. 1 where a peer's numbers differed."""
    path = flags.out / f"{name}.json"
    flags.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": {}, "rows": {}} if flags.again or not path.exists() else json.loads(path.read_text())
    if results["machine"] and _machine_only(results["machine"]) != machine():
        print(
            f"error: {path} is of another machine or other versions; name another --out or begin --again",
            file=sys.stderr,
        )
        return 2
    if not results["machine"]:
        results["machine"] = machine() | {"product_flops": product_rate()}
    for row in rows:
        known = results["rows"].get(row.case.name)
        if known:
            before, now = known["about"], {"case": dataclasses.asdict(row.case), "xla_flags": flags.xla_flags}
            if other := _first_other(json.loads(json.dumps(now)), before):
                print(f"error: {path} has {row.case.name} with {other}; name another --out", file=sys.stderr)
                return 2
            if set(row.peers) <= set(known):
                print(f"{row.case.name}: done before")
                continue
            # Forms are compared within one run: those that are there are measured again beside the new ones.
            row = dataclasses.replace(row, peers=list(dict.fromkeys([*(set(known) - {OURS, "about"}), *row.peers])))
        print(row.case.name, flush=True)
        try:
            results["rows"][row.case.name] = measure(
                row, xla_flags=flags.xla_flags, say=lambda text: print(text, flush=True)
            )
        except FormFailed as error:
            print(f"error: {row.case.name}, ours: {error}", file=sys.stderr)
            return 1
        atomic.write_text(path, json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(name, title, results))
    print(report(name, title, results))
    differs = [n for n, r in results["rows"].items() for f in r.values() if "not timed" in f.get("failed", "")]
    return 1 if differs else 0


def _first_other(now: dict[str, Any], before: dict[str, Any]) -> str:
    """The first setting that a row was measured with otherwise, in words."""
    wanted = {**now["case"], "xla_flags": now["xla_flags"]}
    had = {**before["case"], "xla_flags": before.get("xla_flags", "")}
    return next((f"{k} {had.get(k)!r} where {v!r} is asked for" for k, v in wanted.items() if had.get(k) != v), "")


def _machine_only(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "product_flops"}


def report(name: str, title: str, results: dict[str, Any]) -> str:
    about = results["machine"]
    lines = [
        f"# {title}",
        "",
        f"`python benchmarks/{name}.py`; {about['cores']} cores of {about['cpu']}, jax {about['jax']}, torch {about['torch']}. "
        "Seconds of a call: median [quartiles], every form called once in each round (but where `apart` is said). ours / form: "
        "the median over the rounds. CPU s: processor seconds of a call, which other programs disturb less. Memory: of the "
        "form's process at its peak while timed; on GPUs the peer's allocator at its peak, and of ours what its program holds.",
    ]
    for case_name, row in results["rows"].items():
        case = Case.of(row["about"]["case"])
        per_call = call_flops(case)
        device = row[OURS].get("device", "")
        lines += [
            "",
            f"## {case_name}",
            "",
            f"{row['about']['when']}, {device}, {case.threads} threads, load {row['about']['load_before']} before and "
            f"{row['about']['load_after']} after"
            + (", apart" if row["about"]["apart"] else "")
            + f"; {per_call / 1e9:,.1f} GFLOP a call.",
            "",
            "| form | seconds | images/s | ours / form | CPU s | memory MiB | compile s | of peak | difference |",
            "|---" * 9 + "|",
        ]
        for form, found in row.items():
            if form == "about":
                continue
            if "failed" in found:
                lines.append(f"| {form} | {found['failed']} |" + " |" * 7)
                continue
            lines.append(_line(form, found, row, case, per_call, device, about["product_flops"]))
    return "\n".join([*lines, "", _note(results), ""])


def _line(form: str, found, row, case: Case, per_call: float, device: str, product: float) -> str:
    share = utilisation(per_call, found["median"], device)
    of_peak = f"{share:.1%}" if share is not None else f"({per_call / found['median'] / product:.0%})"
    compiling = found.get("trace_seconds", 0) + found.get("compile_seconds", 0)
    if "compiled" in form or "flex" in form:
        calls = CHECKED_STEPS if case.task == "train" else 1
        compiling = max(found["first_seconds"] - calls * found["median"], 0.0)
    cells = (
        form,
        f"{found['median']:.3g} [{found['low']:.3g} {found['high']:.3g}]",
        f"{case.batch / found['median']:.3g}",
        "" if form == OURS else f"{ratio(row, form):.2f}",
        f"{np.median(found['cpu_times']):.3g}",
        "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MIB:,.0f}",
        f"{compiling:.0f}" if compiling else "-",
        of_peak,
        "" if form == OURS else f"{found['difference']:.0e}",
    )
    return f"| {' | '.join(cells)} |"


def _note(results) -> str:
    return (
        "of peak: model FLOPs (truepose_jax/flops.py) over the chip's dense bf16 peak; in brackets, on a CPU, over "
        f"{results['machine']['product_flops'] / 1e9:.0f} GFLOP/s, which a float32 product of NumPy reached there. compile: ours "
        "traces and compiles before the first call; a compiled peer's first calls less as many later ones."
    )


def call_flops(case: Case) -> int:
    """Model FLOPs of a timed call."""
    flops = model_flops(case.config())
    each = flops.train if case.task == "train" else flops.sample(case.steps, case.guidance)
    return case.batch * each


# --- flags -----------------------------------------------------------------------------------------------------------


def patience_of(flags: argparse.Namespace) -> float:
    return flags.patience or PATIENCE[flags.device]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--full", action="store_true", help="the full network at the paper's sizes, in bfloat16")
    parser.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH of the photos, for every row")
    parser.add_argument("--widths", type=_widths, help="of the UNets' levels, as in 64,128,256,256")
    parser.add_argument("--layers", type=int, help="of a UNet's level on the way down (SD1.5: 2)")
    parser.add_argument("--batch", type=int, action="append", help="one row for each")
    parser.add_argument("--peers", help="forms of the peer, separated by commas")
    parser.add_argument("--repeats", type=int, help="rounds")
    parser.add_argument("--patience", type=float, help="seconds until a form that does not answer counts as failed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side")
    parser.add_argument("--xla-flags", default="", help="more of them, for ours")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="forget the rows that are there")


def check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace, known: Sequence[str]) -> None:
    """Ends with one line and code 2 where something cannot work."""
    if flags.device == "gpu" and shutil.which("nvidia-smi") is None:
        parser.error("--device=gpu, and this machine has no nvidia-smi")
    if flags.full and flags.device == "cpu":
        parser.error("--full is the network of 1.8 billion parameters; it wants --device=gpu")
    for value, name in (
        (flags.repeats, "repeats"),
        (flags.threads, "threads"),
        *((b, "batch") for b in flags.batch or ()),
    ):
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    if flags.threads > len(os.sched_getaffinity(0)):
        parser.error(f"--threads is {flags.threads}; this process may use {len(os.sched_getaffinity(0))} cores")
    for form in (flags.peers or "").split(",") if flags.peers else ():
        if form not in known:
            parser.error(f"--peers names '{form}'; choose of {', '.join(known)}")
    if flags.size and any(side % 8 for side in flags.size):
        parser.error(f"--size is {flags.size[0]}x{flags.size[1]}; both sides must be divisible by 8")
    for width in flags.widths or ():
        if width < 1 or width % 32:
            parser.error(f"--widths has {width}; each must be a multiple of 32 (norm groups)")


def _widths(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' is not numbers separated by commas, as in 64,128,256,256")
    return tuple(int(part) for part in text.split(","))
