"""Faults injected into real training runs, and what became of them. Writes faults.json and faults.md.

    python benchmarks/faults.py [--kills=20] [--only=NAME,NAME] [--out=benchmarks/results] [--scratch=DIR]

Each fault hits a run of the demo's kind, made small (32x24, 96,000 parameters), from outside: signals, a full disk, damaged
files, a second run. Afterwards the same command is given again, and the run must go on from its newest committed step with
the losses of a run that nobody disturbed, bit for bit. Rows land in faults.json as they end; a second start goes on with
those that are missing. Two processes on this machine stand for two hosts. About half an hour on one busy core.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import platform
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.fault_places import PLACES
from benchmarks.fault_programs import PROGRAMS
from benchmarks.fault_runs import (
    EVERY,
    FALL_BACK,
    ROOT,
    STEPS,
    Bench,
    Run,
    committed,
    last_step,
    metrics,
    row,
    same_state,
    saving,
)
from benchmarks.tables import RESULTS, write
from truepose_jax.runtime.markdown import table


def kills(bench: Bench) -> list[dict]:
    """One run, killed again and again until it is through."""
    workdir, draw = bench.workdir("killed"), random.Random(0)
    bench.straight()
    rows, waiting = [], []
    while True:
        run = Run(workdir)
        through = len(rows) == bench.kills
        if through:
            code = run.end()
        else:
            _until_a_moment(run, len(rows), draw)
            in_save, step = saving(workdir), run.step()
            assert run.process.poll() is None, f"through before kill {len(rows) + 1}: {run.said()}"
            run.kill()
        # What it says of the kills before; where it had no time to say it, the next one will.
        if run.resumed() or not any(kill["newest"] for kill in waiting):
            for kill in waiting:
                kill["resumed"] = run.resumed()
            waiting.clear()
        if through:
            break
        phase = "before a first step" if not step else "during a save" if in_save else "between saves"
        rows.append({"phase": phase, "step": step, "newest": max(committed(workdir), default=0)})
        waiting.append(rows[-1])
        print(f"kill {len(rows)}: {rows[-1]}", flush=True)
    equal = code == 0 and bench.same_losses(workdir, STEPS) and same_state(workdir, bench.straight())
    said = f"in the end all {STEPS} losses, parameters, EMA and moments equal the undisturbed run's: {equal}"
    phases = collections.Counter(kill["phase"] for kill in rows)
    name = "kill -9 at a random moment (" + ", ".join(f"{n} {p}" for p, n in sorted(phases.items())) + ")"
    survived = sum(kill["resumed"] == kill["newest"] for kill in rows)
    lost = sum(max(kill["newest"] - kill["resumed"], 0) for kill in rows)
    return [row(name, survived if equal else 0, said, injected=len(rows), lost=lost, kills=rows, bit_equal=equal)]


def _until_a_moment(run: Run, count: int, draw: random.Random) -> None:
    if count % 3 == 0:  # anywhere, start and compilation included
        time.sleep(draw.uniform(0.0, 40.0))
    elif count % 3 == 1:
        run.until_step(1)
        time.sleep(draw.uniform(0.0, 4.0))
    else:
        run.until_saving()
        time.sleep(draw.uniform(0.0, 0.5))


def sigterm(bench: Bench) -> list[dict]:
    """Once in each phase; and once again while it is saving."""
    rows = []

    def stop(
        name: str, run: Run, *, number: int = signal.SIGTERM, at_once: bool = False, more: Sequence[str] = ()
    ) -> None:
        sent = time.monotonic()
        run.signal(number)
        code, seconds = run.end(), time.monotonic() - sent
        workdir, text = run.workdir, run.err.read_text()
        newest, last = max(committed(workdir), default=0), last_step(workdir)
        good = code == 143 and run.clean() and ("nothing unsaved" in text) == at_once
        good = good and (last == newest)  # every step that was done is saved
        on, lost = bench.goes_on(workdir, newest, *more)
        said = run.said() if at_once else run.out.read_text().splitlines()[-1]
        fault = f"{signal.Signals(number).name} {name}"
        rows.append(row(fault, good and on, said, lost=lost, code=code, seconds=seconds))
        print(rows[-1], flush=True)

    run = Run(bench.workdir("sigterm_compile"), cold=True)
    run.until_said("parameters:")
    time.sleep(4)
    stop("while the first step is compiled", run, at_once=True)

    run = Run(bench.workdir("sigterm_step"))
    run.until_step(EVERY + 3)
    stop("between steps", run)

    run = Run(bench.workdir("sigint_step"))
    run.until_step(EVERY + 4)
    stop("between steps", run, number=signal.SIGINT)

    run = Run(bench.workdir("sigterm_save"))
    run.until_saving()
    stop("during a save", run)

    evaluation = ("--config.eval.every=15", "--config.eval.pairs=100")
    run = Run(bench.workdir("sigterm_evaluation"), *evaluation)
    run.until_step(15)
    time.sleep(8)  # its program is being loaded or the first of 250 batches sampled
    assert not (run.workdir / "eval.jsonl").exists()
    stop("in an evaluation", run, more=("--config.eval.every=100000",))

    run = Run(bench.workdir("sigterm_resumed"))
    run.until_step(EVERY + 2)
    run.until_committed(EVERY)
    run.kill()
    again = Run(run.workdir)
    again.until_said("resuming from step")
    sent = time.monotonic()
    again.signal(signal.SIGTERM)
    code, seconds = again.end(), time.monotonic() - sent
    on, lost = bench.goes_on(run.workdir, EVERY)
    good = code == 143 and "nothing unsaved" in again.err.read_text() and on
    fault = "SIGTERM after a resume, before its first step"
    rows.append(row(fault, good, again.said(), lost=lost, code=code, seconds=seconds))

    run = Run(bench.workdir("sigterm_twice"), *evaluation)
    run.until_step(15)
    time.sleep(4)
    run.signal(signal.SIGTERM)
    time.sleep(0.2)
    sent = time.monotonic()
    run.signal(signal.SIGTERM)
    code, seconds = run.end(), time.monotonic() - sent
    on, lost = bench.goes_on(run.workdir, max(committed(run.workdir)), "--config.eval.every=100000")
    fault = "SIGTERM twice, 0.2 s apart"
    return [*rows, row(fault, code == 143 and on, run.said(), lost=lost, code=code, seconds=seconds)]


def damage(bench: Bench) -> list[dict]:
    """The newest checkpoint truncated or a bit of it flipped; with and without allow_fallback."""
    rows = []
    for kind in ("truncated", "bit-flipped"):
        workdir = bench.workdir(f"damage_{kind}")
        run = Run(workdir)
        run.until_committed(2 * EVERY)
        run.kill()
        newest = max(committed(workdir))
        file = max((workdir / "checkpoints" / str(newest) / "rest").rglob("*"), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        if kind == "truncated":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 16
        file.write_bytes(data)
        run = Run(workdir)
        refused = run.end() == 2 and run.clean() and FALL_BACK in run.said() and newest in committed(workdir)
        rows.append(row(f"newest checkpoint {kind}", refused, run.said()))
        on, _ = bench.goes_on(workdir, newest - EVERY, FALL_BACK)
        err = sorted(workdir.parent.glob(f"{workdir.name}.*.err"))[-1].read_text()
        said = next(line for line in err.splitlines() if "moved it" in line).split("] ", 1)[-1]
        moved = (workdir / "damaged" / str(newest)).is_dir()
        said = said.replace(str(workdir.parent), "RUNS")
        rows.append(row(f"the same with allow_fallback ({kind})", on and moved, said, recomputed=EVERY))
    return rows


def two_runs(bench: Bench) -> list[dict]:
    workdir = bench.workdir("twice")
    first = Run(workdir)
    first.until_step(2)
    second = Run(workdir)
    refused = second.end() == 2 and second.clean()
    first.until_step(EVERY + 2)
    first.kill()
    good = refused and bench.same_losses(workdir, EVERY + 2)
    return [row("a second run opens the workdir", good, second.said())]


def not_finite(bench: Bench) -> list[dict]:
    """NaN in one batch, and in all batches from one on."""
    program = [str(ROOT / "benchmarks" / "faults.py"), "--poison", "13", "13"]
    workdir = bench.workdir("poison_one")
    run = Run(workdir, program=program)
    run.until_step(18)
    run.kill()
    records = metrics(workdir)
    good = records[12]["loss"] is None and records[12]["skipped_now"] == 1 and records[17]["skipped"] == 1
    good = good and all(r["loss"] is not None for r in records[:12] + records[13:18])
    line = next(x for x in run.out.read_text().splitlines() if x.startswith("step 13:"))
    rows = [row("NaN in one batch", good, line)]

    first = EVERY + 1  # the tenth bad step is a step to save; it is not saved
    workdir = bench.workdir("poison_all")
    run = Run(workdir, program=[*program[:2], str(first), str(10**9)])
    code = run.end()
    good = code == 1 and run.clean() and committed(workdir) == [EVERY]
    on, lost = bench.goes_on(workdir, EVERY)
    return [*rows, row(f"NaN in every batch from step {first} on", good and on, run.said(), lost=lost, code=code)]


def poisoned_main(first: int, last: int) -> None:
    """The training program with NaN in the batches of steps `first` to `last`."""
    from truepose_jax import train
    from truepose_jax.flags import train as told

    put, count = train.put_global_batch, 0

    def poisoned(mesh, batch):
        nonlocal count
        count += 1
        if first <= count <= last:
            batch = {**batch, "target": batch["target"] * float("nan")}
        return put(mesh, batch)

    train.put_global_batch = poisoned
    train.run_with_config(train.main, told)


def corrupt_records(bench: Bench) -> list[dict]:
    """One byte of three records changed, in a dataset of 32 photos."""
    from input_pipeline.records.writer import build_records
    from input_pipeline.sources.own_photos import synthetic_people

    folder = bench.workdir("records")
    build_records(
        synthetic_people(pairs=96, size=(32, 24), patterns="solid", background="plain", framing="close"), folder
    )
    shard = next(p for p in sorted(folder.rglob("*")) if "-train." in p.name and p.stat().st_size > 10_000)
    data = bytearray(shard.read_bytes())
    for i in (2, 9, 20):
        data[len(data) * i // 32] ^= 16
    use = ["--config.data.dataset=records", f"--config.data.root={folder}"]
    Run(bench.workdir("records_tokens"), *use).until_step(1)  # tokens of the whole pictures first
    shard.write_bytes(data)
    rows = []
    for share, name in ((0.9, "records_some"), (0.01, "records_many")):
        workdir = bench.workdir(name)
        run = Run(workdir, *use, f"--config.data.max_invalid={share}")
        if share > 0.5:
            run.until_step(30)
            run.kill()
            records = metrics(workdir)
            invalid = sum(r["invalid"] for r in records[:30])
            good = 0 < invalid < 90 and all(r["loss"] is not None for r in records[:30])
            said = next((x.split("] ", 1)[-1] for x in run.err.read_text().splitlines() if "cannot be read" in x), "")
            said = said.replace(str(bench.scratch), "RUNS")
            rows.append(row("three corrupt records of 32", 3 * good, said, injected=3, invalid_examples=invalid, of=180))
        else:
            good = run.end() == 2 and run.clean()
            rows.append(row("the same, more than config.data.max_invalid", good, run.said()))
    return rows


def full_disk(bench: Bench) -> list[dict]:
    """Two ways that need no privileges: a limit on the size of files, and a small disk in a namespace of its own."""
    workdir = bench.workdir("file_limit")
    run = Run(workdir)
    run.until_committed(EVERY)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    code, newest = run.end(), max(committed(workdir))
    on, lost = bench.goes_on(workdir, newest)
    good = code == 2 and run.clean() and on
    rows = [row("files limited to 300 kB during a save", good, run.said(), lost=lost, code=code)]

    place = bench.workdir("small_disk")
    place.mkdir()
    inside = f"mount -t tmpfs -o size=8m none {place} && exec {sys.executable} {__file__} --inside={place}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside], capture_output=True, text=True
    )
    if done.returncode:
        print(f"no small disk here: {done.stderr[-2000:]}", file=sys.stderr)
        return rows
    result = json.loads(done.stdout.splitlines()[-1])
    good = result["code"] == 2 and result["clean"] and result["resumed"] == result["newest"] > 0
    reference = [r["loss"] for r in metrics(bench.straight())]
    good = good and result["losses"] == reference[: len(result["losses"])]
    lost = result["newest"] - result["resumed"]
    fault, said = "disk full (8 MB tmpfs) during a save", result["said"]
    return [*rows, row(fault, good, said, lost=lost, newest=result["newest"])]


def inside_small_disk(place: pathlib.Path) -> None:
    """Fills the disk, makes it larger, goes on. Prints JSON."""
    programs = place.parent / "programs"
    (place / "programs").symlink_to(programs)
    workdir = place / "run"
    run = Run(workdir)
    code, newest = run.end(), max(committed(workdir), default=0)
    result = {"code": code, "clean": run.clean(), "said": run.said(), "newest": newest}
    if code in (1, 2):
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        again = Run(workdir)
        again.until_step(newest + 3)
        again.kill()
        result |= {"resumed": again.resumed(), "losses": [r["loss"] for r in metrics(workdir)][: newest + 3]}
    print(json.dumps(result))


def hosts(bench: Bench) -> list[dict]:
    """Two processes joined by gloo: one killed, then both started again; one asked to stop."""

    def both(workdir: pathlib.Path) -> list[Run]:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        join = [f"--coordinator=localhost:{port}", "--processes=2", "--config.data.synthetic.identities=8"]
        return [Run(workdir, *join, f"--process={i}") for i in range(2)]

    workdir = bench.workdir("hosts")
    first, second = both(workdir)
    first.until(lambda: EVERY in committed(workdir) and last_step(workdir) >= EVERY + 4, "the first save")
    second.kill()
    killed = time.monotonic()
    code, seconds = first.end(), time.monotonic() - killed
    newest, before = max(committed(workdir)), {r["step"]: r["loss"] for r in metrics(workdir)}
    first, second = both(workdir)
    reach = max(max(before), newest + 3)
    first.until_step(reach)
    first.signal(signal.SIGTERM)
    codes = [first.end(), second.end()]
    after = {r["step"]: r["loss"] for r in metrics(workdir)}
    lost = newest - first.resumed()
    same = [after[s] == before[s] for s in before]
    good = first.resumed() == second.resumed() == newest and all(same)
    said = f"the other ended by itself after {seconds:.0f} s (code {code}); both started again: resuming from step {newest}"
    rows = [row("one of two hosts killed -9", good, said, lost=lost, compared=len(same), bit_equal=sum(same))]
    ends = [run.out.read_text().splitlines()[-1] for run in (first, second)]
    stopped = ends[0] == ends[1] and codes == [143, 143] and f"saved step {max(committed(workdir))};" in ends[0]
    return [*rows, row("SIGTERM to one of two hosts", stopped, f"both: {ends[0]}", codes=codes)]


CASES = {
    "kills": kills,
    "sigterm": sigterm,
    "hosts": hosts,
    "full_disk": full_disk,
    "damage": damage,
    "two_runs": two_runs,
    "not_finite": not_finite,
    "corrupt_records": corrupt_records,
} | PROGRAMS | PLACES


COUNTS = ("injected", "survived", "lost")


def cells(row: dict) -> list[str]:
    """Of what was said the beginning, and the end, where the system's reason and the advice stand."""
    said = row["said"].replace("|", "/")
    said = said if len(said) <= 260 else f"{said[:120]} ... {said[-130:]}"
    return [row["fault"], *(str(row[name]) for name in COUNTS), said]


def report(results: dict) -> str:
    rows = [row for name in CASES for row in results["cases"].get(name, {}).get("rows", [])]
    total = {key: sum(row[key] for row in rows) for key in COUNTS} | {"fault": "all", "said": ""}
    lines = [
        "# Faults",
        "",
        f"`python benchmarks/faults.py`, {results['machine']}. Small demo model, {STEPS} steps, a checkpoint every {EVERY}.",
        "Survived: it ended as it should and, where it is started again, went on from its newest intact checkpoint with the",
        "losses of an undisturbed run, bit for bit; other programs: with the bytes that an undisturbed call leaves. Lost: steps",
        "of intact checkpoints that it did not go on from; a newest",
        f"checkpoint that was damaged on disk costs the {EVERY} steps since the one before it.",
        "",
        *table(("fault", "injected", "survived", "committed steps lost", "what the run said"), map(cells, [*rows, total])),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for the runs (a temporary one)")
    parser.add_argument("--again", action="store_true", help="do cases again that are in faults.json")
    parser.add_argument("--inside", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.inside:
        inside_small_disk(flags.inside)
        return 0
    scratch = flags.scratch or pathlib.Path(tempfile.mkdtemp(prefix="faults"))
    scratch.mkdir(parents=True, exist_ok=True)
    bench, path = Bench(scratch, flags.kills), flags.out / "faults.json"
    results = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    results["machine"] = f"{len(os.sched_getaffinity(0))} core(s), Python {platform.python_version()}"
    for name in flags.only.split(","):
        if name in results["cases"] and not flags.again:
            print(f"{name}: done before (--again injects it anew)")
            continue
        begun = time.monotonic()
        rows = CASES[name](bench)
        results["cases"][name] = {"rows": rows, "seconds": round(time.monotonic() - begun)}
        write(path, results, report(results))
        print(json.dumps(rows, indent=1), flush=True)
    rows = [row for case in results["cases"].values() for row in case["rows"]]
    bad = [r["fault"] for r in rows if r["survived"] < r["injected"] or r["lost"]]
    print(f"not survived: {bad}" if bad else "all survived")
    return int(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--poison"]:
        poisoned_steps = int(sys.argv[2]), int(sys.argv[3])
        del sys.argv[1:4]
        poisoned_main(*poisoned_steps)
    sys.exit(main())
