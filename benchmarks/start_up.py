"""How long the programs take until they do something useful, first and second time. Writes results/start_up.{json,md}.

    python benchmarks/start_up.py [--config=configs/demo.py] [--rounds=2] [--out=benchmarks/results]

import: `import truepose_jax.train` in a new process, less an empty one. train: from the command until its first step is in
metrics.jsonl. generate: from the command until its picture is written. Each begins with an empty folder of compiled programs
(`first`), then does the same again (`again`). train goes on in its workdir, where region tokens are kept too, so it is also
started there without the compiled programs (`again, nothing compiled`) and in a new workdir with them (`new run`). Rounds
start from nothing each. Rows that are in the JSON are not measured again.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import python_path
from benchmarks.side_by_side_report import summary
from benchmarks.tables import RESULTS, ROOT, commit, machine, origins, read, result, write
from input_pipeline.schema import NUM_JOINTS, InputError
from truepose_jax.runtime.cli import Parser, program
from truepose_jax.runtime.markdown import table

IMPORTS = 7
PATIENCE = 400.0
"""Seconds until a program that shows nothing counts as failed."""
LOOK_EVERY = 0.02
STOPPED = 143
"""Exit code of training that was asked to end and has saved."""
PROMISED_IMPORT, PROMISED_RATIO = 5.0, 3.0
PHOTO = (96, 72)


class Failed(Exception):
    """A program ended before it did what was waited for; the text is its last line."""


def environment(cache: pathlib.Path) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_COMPILATION_CACHE"}
    return found | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": python_path()}


def until(
    command: list[str], log: pathlib.Path, env: dict[str, str], done: Callable[[], bool], *, saves: bool = False
) -> float:
    """Seconds from the start of `command` until `done`; a program that still runs is then asked to end, and waited for.
    Raises Failed; saves: also where it does not end as one that has saved."""
    with log.open("w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            while not done():
                if process.poll() is not None and not done():
                    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    raise Failed(f"{command[2]} ended with {process.returncode}: {lines[-1] if lines else 'no output'}")
                if time.perf_counter() - start > PATIENCE:
                    raise Failed(f"{command[2]} showed nothing for {PATIENCE:.0f} s; see {log}")
                time.sleep(LOOK_EVERY)
            seconds = time.perf_counter() - start
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=PATIENCE)
            if saves and process.returncode != STOPPED:
                raise Failed(f"{command[2]} did not save: it ended with {process.returncode}; see {log}")
            return seconds
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def import_row() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"import": [], "empty": []}
    for _ in range(IMPORTS):
        for name, code in (("empty", "pass"), ("import", "import truepose_jax.train")):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()}, check=True
            )
            found[name].append(time.perf_counter() - start)
    return found


def train(config: str, workdir: pathlib.Path, cache: pathlib.Path) -> float:
    metrics = workdir / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0

    def stepped() -> bool:
        return metrics.exists() and metrics.stat().st_size > before

    # Stays away from the end and from evaluations: what is wanted is the first step.
    settings = ["--config.total_steps=100000", "--config.eval.every=100000", "--config.checkpoint.every=100000"]
    command = [sys.executable, "-m", "truepose_jax.train", f"--config={config}", f"--workdir={workdir}", *settings]
    return until(command, workdir.with_suffix(".log"), environment(cache), stepped, saves=True)


def train_row(config: str, folder: pathlib.Path) -> dict[str, float]:
    cache = folder / "programs"
    return {
        "first": train(config, folder / "run", cache),
        "again": train(config, folder / "run", cache),
        "again, nothing compiled": train(config, folder / "run", folder / "no_programs"),
        "new run": train(config, folder / "other", cache),
    }


def generate_row(config: str, folder: pathlib.Path) -> dict[str, float]:
    """Of a run that a few training steps made; its own folder of programs stays out of it."""
    train(config, folder / "run", folder / "training_programs")
    pixels = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    y, x = np.linspace(0.1, 0.9, NUM_JOINTS) * PHOTO[0], np.linspace(0.3, 0.7, NUM_JOINTS) * PHOTO[1]
    (folder / "pose.txt").write_text("".join(f"{a:.1f} {b:.1f}\n" for a, b in zip(x, y, strict=True)))
    found = {}
    for name in ("first", "again"):
        out = folder / f"{name}.png"
        command = [sys.executable, "-m", "truepose_jax.generate", f"--workdir={folder / 'run'}", "--parsing=none"]
        command += [f"--source={folder / 'photo.png'}", f"--pose={folder / 'pose.txt'}", f"--out={out}"]
        command.append(f"--pose-frame={PHOTO[0]}x{PHOTO[1]}")
        found[name] = until(command, folder / f"{name}.log", environment(folder / "programs"), out.exists)
    return found


ROWS = {"train": train_row, "generate": generate_row}


def report(rows: Mapping[str, Any]) -> str:
    lines = ["# Start-up", "", "`python benchmarks/start_up.py`.", ""]
    lines += [*origins([{"of": _of(row), "name": name} for name, row in rows.items()], lambda row: row["name"]), ""]
    if "import" in rows:
        middle = {name: summary(times)["median"] for name, times in rows["import"]["times"].items()}
        seconds = middle["import"] - middle["empty"]
        lines += [
            f"`import truepose_jax.train`: {seconds:.2f} s, {middle['empty']:.2f} s of an empty process taken off; median of "
            f"{IMPORTS}; promised: under {PROMISED_IMPORT:.0f} s; load {rows['import']['load']}.",
            "",
        ]
    cells = []
    for name, row in rows.items():
        if name == "import":
            continue
        for start, times in row["times"].items():
            each = ", ".join(f"{seconds:.1f}" for seconds in times)
            ratios = [a / b for a, b in zip(row["times"]["first"], times, strict=True)]
            of_first = "" if start == "first" else f"{np.median(ratios):.1f}"
            cells.append([name, start, each, of_first, str(row["load"])])
    lines += [
        *table(("program", "start", "seconds, each round", "first / it", "load"), cells),
        "",
        f"Promised: the second start {PROMISED_RATIO:.0f} times sooner. Training's region tokens lie in its workdir: `again, "
        "nothing compiled` finds them and compiles everything, `new run` is a new workdir with the programs kept. The first "
        "step is written when the second has begun.",
        "",
    ]
    return "\n".join(lines)


def _of(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    commit = f"; commit {row['commit']}" if row.get("commit") else ""
    return f"{machine['cores']} cores of {machine['cpu']}, jax {machine['jax']}; {row['config']}{commit}"


@program
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", default="import,train,generate")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="replace the rows of this call where they are there")
    flags = parser.parse_args(argv)
    wanted = flags.rows.split(",")
    if flags.rounds < 1 or not set(wanted) <= {"import", *ROWS}:
        parser.error(f"--rounds is {flags.rounds} (at least 1), --rows is {flags.rows} (of import, {', '.join(ROWS)})")
    if not (ROOT / flags.config).is_file():
        parser.error(f"--config={flags.config} is not there; name a file under configs/")
    path = result(parser, flags.out, "start_up")
    rows = dict(read(path, "machine"))
    about = {"machine": machine(), "config": flags.config, "commit": commit()}
    for name in wanted if not flags.again else ():
        if name in rows and any(rows[name][key] != about[key] for key in ("machine", "config")):
            raise InputError(
                f"{path} has {name} of another machine, version or configuration; name another --out or measure it --again"
            )
    for name in wanted:
        if name in rows and not flags.again:
            print(f"{name}: done before")
            continue
        load, times = round(os.getloadavg()[0], 2), {}
        try:
            if name == "import":
                times = import_row()
            else:
                for _ in range(flags.rounds):
                    with tempfile.TemporaryDirectory(prefix="start_up_") as folder:
                        for start, seconds in ROWS[name](flags.config, pathlib.Path(folder)).items():
                            times.setdefault(start, []).append(seconds)
                            print(f"{name}, {start}: {seconds:.1f} s", flush=True)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        rows[name] = {"times": times, "load": load, **about}
        write(path, {"rows": rows}, report(rows))
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
