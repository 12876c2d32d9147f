"""Faults of the places that a run works in: its cache, its workdir, its disk and its standard output (rows of faults.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.fault_runs import EVERY, ROOT, SMALL, TIMEOUT, Bench, Run, committed, environment, metrics, row


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
        rows.append(row(f"region-token cache {kind}", on and bool(line), line, lost=lost))
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
    return [row("workdir moved away", code == 2 and run.clean() and on, said, lost=lost, code=code)]


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
    return [row("checkpoints moved away, then back", good and bool(said) and on, said, lost=lost)]


def full_before(bench: Bench) -> list[dict]:
    """Disks without a free byte, and too small for one checkpoint; a standard output that takes nothing."""
    train = [sys.executable, "-m", "truepose_jax.train", *SMALL]

    def on_disk(name: str, size: str, fill: str) -> list[str]:
        place = bench.workdir(name)
        place.mkdir()
        inside = f"mount -t tmpfs -o size={size} none {place} && {fill.format(place)} exec \"$@\""
        unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
        return [*unshare, *train, f"--workdir={place}/run"]

    full = "dd if=/dev/zero of={}/filler bs=4k status=none;"
    rows = []
    for name, command, out, alone in (
        ("disk full before the start (tmpfs)", on_disk("full", "64k", full), subprocess.DEVNULL, True),
        ("disk of 3 MB, too small for a checkpoint (tmpfs)", on_disk("tiny", "3m", ""), subprocess.DEVNULL, False),
        ("standard output full (/dev/full)", [*train, f"--workdir={bench.workdir('silent')}"], None, True),
    ):
        with open("/dev/full", "w") as takes_nothing:
            how = {"cwd": ROOT, "env": environment(bench.scratch), "text": True, "timeout": TIMEOUT}
            done = subprocess.run(command, stdout=out or takes_nothing, stderr=subprocess.PIPE, **how)
        errors = [x for x in done.stderr.splitlines() if x.strip() and not x.startswith(("dd:", "WARNING"))]
        said = errors[-1].replace(str(bench.scratch), "RUNS") if errors else ""
        good = done.returncode == 2 and said.startswith("error: ") and "Traceback" not in done.stderr
        rows.append(row(name, good and (len(errors) == 1 or not alone), said, code=done.returncode))
    return rows


PLACES = {
    "token_cache": token_cache,
    "vanished": vanished,
    "moved_checkpoints": moved_checkpoints,
    "full_before": full_before,
}
