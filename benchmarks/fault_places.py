"""Faults of the places that a run works in: its cache, its workdir, its disk and its standard output (rows of faults.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.fault_runs import EVERY, ROOT, SMALL, Bench, Run, committed, metrics, row


def token_cache(bench: Bench) -> list[dict]:
    """A bit flipped in the region tokens, and their file cut in half: other tokens would be another training."""
    rows = []
    for kind in ("bit-flipped", "truncated"):
        workdir = bench.workdir(f"tokens_{kind}")
        run = Run(workdir)
        run.until_committed(EVERY)
        run.kill()
        newest = max(committed(workdir))
        for file in (workdir / "cache").glob("region_tokens_*.safetensors"):
            data = bytearray(file.read_bytes())
            if kind == "truncated":
                del data[len(data) // 2 :]
            else:
                data[-9] ^= 16
            file.write_bytes(data)
        on, lost = bench.goes_on(workdir, newest)
        said = sorted(bench.scratch.glob(f"{workdir.name}.*.err"))[-1].read_text()
        line = next((x.split("] ", 1)[-1] for x in said.splitlines() if "made anew" in x), "")
        line = line.replace(str(bench.scratch), "RUNS")
        rows.append(row(f"region-token cache {kind}", 1, int(on and bool(line)), lost, line))
    return rows


def vanished(bench: Bench) -> list[dict]:
    """The workdir moved away under a run: it ends, and goes on in the new place."""
    workdir = bench.workdir("vanished")
    run = Run(workdir)
    run.until_committed(EVERY)
    elsewhere = bench.workdir("elsewhere")
    workdir.rename(elsewhere)
    code, said = run.end(), run.said()
    newest = max(committed(elsewhere))
    on, lost = bench.goes_on(elsewhere, newest)
    return [row("workdir moved away", 1, int(code == 2 and run.clean() and on), lost, said, code=code)]


def moved_checkpoints(bench: Bench) -> list[dict]:
    """checkpoints/ moved away: a new start tells of the old metrics and keeps them; with both back the run goes on."""
    workdir = bench.workdir("moved")
    run = Run(workdir)
    run.until_committed(2 * EVERY)
    run.kill()
    newest, told = max(committed(workdir)), (workdir / "metrics.jsonl").read_bytes()
    (workdir / "checkpoints").rename(workdir / "away")
    again = Run(workdir)
    again.until_step(3)
    again.kill()
    kept = workdir / "metrics.before-1.jsonl"
    good = kept.exists() and kept.read_bytes() == told and [r["step"] for r in metrics(workdir)][:3] == [1, 2, 3]
    said = next((x.split("] ", 1)[-1] for x in again.err.read_text().splitlines() if "it is kept as" in x), "")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "away").rename(workdir / "checkpoints")
    kept.replace(workdir / "metrics.jsonl")
    on, lost = bench.goes_on(workdir, newest)
    said = said.replace(str(bench.scratch), "RUNS")
    return [row("checkpoints moved away, then back", 1, int(good and bool(said) and on), lost, said)]


def full_before(bench: Bench) -> list[dict]:
    """A disk without a free byte, and a standard output that takes none, from the start on."""
    place = bench.workdir("full")
    place.mkdir()
    train = [sys.executable, "-m", "truepose_jax.train", *SMALL]
    fill = f"mount -t tmpfs -o size=64k none {place} && dd if=/dev/zero of={place}/filler bs=4k status=none; "
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", fill + 'exec "$@"', "sh", *train]
    rows = []
    for name, command, out in (
        ("disk full before the start (tmpfs)", [*inside, f"--workdir={place}/run"], subprocess.DEVNULL),
        ("standard output full (/dev/full)", [*train, f"--workdir={bench.workdir('silent')}"], None),
    ):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command, cwd=ROOT, stdout=out or full, stderr=subprocess.PIPE, text=True, timeout=600
            )
        errors = [x for x in done.stderr.splitlines() if x.strip() and not x.startswith(("dd:", "WARNING"))]
        said = errors[-1].replace(str(bench.scratch), "RUNS") if errors else ""
        good = done.returncode == 2 and len(errors) == 1 and said.startswith("error: ")
        rows.append(row(name, 1, int(good), 0, said, code=done.returncode))
    return rows


PLACES = {
    "token_cache": token_cache,
    "vanished": vanished,
    "moved_checkpoints": moved_checkpoints,
    "full_before": full_before,
}
