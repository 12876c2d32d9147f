"""kill -9 and SIGTERM for programs that leave many files: generate, evaluate, prepare annotate (rows of faults.py)."""

from __future__ import annotations

import csv
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from benchmarks.fault_runs import LOOK, ROOT, TIMEOUT, Bench, environment, row

KILLS = 10
Done = Callable[[], set]
"""What is whole by now: (name, what tells whether it is still the same)."""


def _start(words: Sequence[str], log: pathlib.Path) -> subprocess.Popen:
    with log.open("w") as file:
        how = {"cwd": ROOT, "env": environment(log.parent), "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-m", *words], **how)


def _stamp(path: pathlib.Path) -> tuple:
    stat = path.stat()
    return path.name, stat.st_ino, stat.st_mtime_ns


def _killed(
    bench: Bench, name: str, words: Sequence[str], fresh: Callable[[], None], done: Done, at_end: Done, made: Callable
) -> dict:
    """Through once without a fault, then from `fresh` again with KILLS kills: what `made` tells must be the same, and what was
    `done` at a kill must still be there `at_end`."""
    log = bench.scratch / f"{name.replace(' ', '_')}.log"
    fresh()
    assert _start(words, log).wait() == 0, log.read_text()
    whole = made()
    fresh()
    draw, seen, early, waited = random.Random(0), set(), 0, []
    for kill in range(KILLS):
        before, process, began = len(done()), _start(words, log), time.monotonic()
        if kill % 3 < 2:
            while len(done()) <= before and process.poll() is None and time.monotonic() < began + TIMEOUT:
                time.sleep(LOOK)
            waited.append(time.monotonic() - began)
            time.sleep(draw.uniform(0.0, 0.1))
        else:
            time.sleep(draw.uniform(0.0, min(waited)))
        assert process.poll() is None, f"{name}: through before kill {kill + 1}: {log.read_text()}"
        process.kill()
        process.wait()
        early += len(done()) == before
        seen |= done()
        print(f"{name}: kill {kill + 1}: {len(done())} are whole", flush=True)
    code = _start(words, log).wait()
    equal, lost = code == 0 and made() == whole, len(seen - at_end())
    said = f"in the end the bytes of an undisturbed call: {equal}; {len(seen)} whole outputs at kills, {lost} made again"
    name = f"kill -9 to {name} ({early} before, {KILLS - early} between outputs)"
    return row(name, KILLS if equal else 0, said, injected=KILLS, lost=lost, code=code)


def _bytes(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _list(bench: Bench, count: int) -> pathlib.Path:
    from tests.shared_data import write_folder

    photos = write_folder(bench.workdir(f"photos_{count}"), [f"{i:02d}" for i in range(10)], hw=(32, 24))
    with (photos / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "source_pose", "parsing", "pose", "out"])
        for i in range(count):
            a, b = f"{i % 10:02d}", f"{i // 10:02d}"
            poses = (f"keypoints/{name}.json" for name in (a, b))
            writer.writerow([f"image/{a}.png", next(poses), f"parsing/{a}.png", next(poses), f"{i:02d}.png"])
    return photos / "pairs.csv"


def _generate(bench: Bench, pairs: pathlib.Path, out: pathlib.Path) -> list[str]:
    flags = [f"--workdir={bench.straight()}", f"--pairs={pairs}", f"--out-dir={out}", "--labels=atr18"]
    return ["truepose_jax.generate", *flags, "--pose-frame=32x24", "--batch-size=2", "--steps=20"]


def generating(bench: Bench) -> list[dict]:
    """`generate` over a list of 40, asked to stop between batches of 2."""
    out, log = bench.workdir("generated"), bench.scratch / "generating.log"
    words = _generate(bench, _list(bench, 40), out)
    process, deadline = _start(words, log), time.monotonic() + TIMEOUT
    while not list(out.glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(LOOK)
    process.send_signal(signal.SIGTERM)
    process.wait()
    said = log.read_text().splitlines()[-1]
    there = len(list(out.glob("*.png")))
    again = _start(words, log).wait()
    good = process.returncode == 143 and 0 < there < 40 and there % 2 == 0 and again == 0
    good = good and f"{there} of them done before" in log.read_text() and len(list(out.glob("*.png"))) == 40
    return [row("SIGTERM to generate, between batches", good, said, code=process.returncode)]


def killed_generate(bench: Bench) -> list[dict]:
    out = bench.workdir("killed_generate")
    words = _generate(bench, _list(bench, 100), out)
    pictures = lambda: {_stamp(path) for path in out.glob("*.png")}  # noqa: E731
    again = lambda: shutil.rmtree(out, ignore_errors=True)  # noqa: E731
    return [_killed(bench, "generate", words, again, pictures, pictures, lambda: _bytes(out))]


def killed_evaluate(bench: Bench) -> list[dict]:
    place, rng = bench.workdir("evaluated"), np.random.default_rng(0)
    for folder in ("made", "real"):
        (place / folder).mkdir(parents=True)
        for i in range(600):
            Image.fromarray(rng.integers(0, 256, (256, 176, 3), dtype=np.uint8)).save(place / folder / f"{i}.png")
    out, cache = place / "out", place / "out/report.cache"
    flags = [f"--generated={place}/made", f"--reference={place}/real", f"--out={out}/report.json", "--batch-size=2"]

    def rows() -> set:
        lines = (line for path in cache.glob("pairs-*.jsonl") for line in path.read_bytes().split(b"\n")[:-1])
        return {line for line in lines if line.endswith(b"}")}

    again = lambda: shutil.rmtree(out, ignore_errors=True)  # noqa: E731
    report = lambda: ((out / "report.json").read_bytes(), sorted(rows()))  # noqa: E731
    words = ["truepose_jax.evaluate", *flags, "--protocol=plain"]
    return [_killed(bench, "evaluate", words, again, rows, rows, report)]


def killed_annotate(bench: Bench) -> list[dict]:
    from tests.records import built, noise_set
    from tests.torch_models import tiny_clip, tiny_vae

    place = bench.workdir("annotated")
    (place / "models").mkdir(parents=True)
    tiny_clip(place / "models/clip"), tiny_vae(place / "models/vae")
    built(place / "built", noise_set(train=90, test=6), shard_records=2)
    records = place / "records"

    def again() -> None:
        shutil.rmtree(records, ignore_errors=True)
        shutil.copytree(place / "built", records)

    noted = lambda: [path.name.split("-", 2)[2].removesuffix(".json") for path in records.glob("build/annotated-*.json")]  # noqa: E731
    done = lambda: {_stamp(records / shard) for shard in noted()}  # noqa: E731
    at_end = lambda: {_stamp(path) for path in records.glob("*.array_record*")}  # noqa: E731
    flags = [str(records), f"--clip={place}/models/clip", f"--vae={place}/models/vae", "--size=32x24"]
    words = ["truepose_jax.prepare", "annotate", *flags]
    return [_killed(bench, "prepare annotate", words, again, done, at_end, lambda: _bytes(records))]


PROGRAMS = {
    "generating": generating,
    "killed_generate": killed_generate,
    "killed_evaluate": killed_evaluate,
    "killed_annotate": killed_annotate,
}
