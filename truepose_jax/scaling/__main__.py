"""python -m truepose_jax.scaling: each study as rows to make, and the table of rows. What it is told: scaling/flags.py."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tqdm

from input_pipeline import atomic
from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict
from truepose_jax.runtime import files, plots
from truepose_jax.runtime.cli import enable_compilation_cache, parse_size, run_with_config
from truepose_jax.scaling import batch, batch_report, devices, memory
from truepose_jax.scaling import flags as told
from truepose_jax.scaling.hardware import Topology
from truepose_jax.scaling.table import Row, Table
from truepose_jax.training.checkpoint import STOPPED, lock_workdir
from truepose_jax.training.init import resolve_init_from


@dataclasses.dataclass(frozen=True)
class Work:
    """A study ready to go. runs have a `name`; row(run) is None where it was asked to stop. again(run, row): whether a row that
    is there is to be made anew."""

    common: Any
    runs: Sequence[Any]
    row: Callable[[Any], Row | None]
    report: Callable[[Table], pathlib.Path]
    again: Callable[[Any, Row], bool] = lambda run, row: False


def _numbers(name: str, texts: Sequence[str]) -> list[int]:
    if not texts or not all(t.strip().isdecimal() and int(t) > 0 for t in texts):
        raise ConfigError(f"--{name}={','.join(texts)} is not a list of positive whole numbers")
    return sorted({int(t) for t in texts})


def _topologies() -> tuple[list[Topology], list[str]]:
    """(slices that can be compiled for, lines about what was left out)."""
    wanted = [Topology(text.strip()) for text in told.TOPOLOGIES.value]
    if wanted and not told.TPU_PYTHON.value:
        return [], [
            f"Left out: {', '.join(t.name for t in wanted)} (no --tpu-python, an interpreter with jax[tpu], was named)."
        ]
    if wanted and shutil.which(told.TPU_PYTHON.value) is None:
        raise ConfigError(f"--tpu-python={told.TPU_PYTHON.value} is no program that can be run")
    return wanted, []


def _batch(config: Config, folder: pathlib.Path) -> Work:
    sizes, curves = _numbers("batches", told.BATCHES.value), batch.curves_of(told.CURVES.value)
    settings = batch.Settings(
        target=told.TARGET.value or None,
        examples=told.EXAMPLES.value,
        micro=told.MICRO.value or sizes[0] // 2,
        reference=told.REFERENCE.value or config.batch_size,
        lamb_rate=told.LAMB_RATE.value,
    )
    runs = batch.plan(sizes, curves, told.SEEDS.value, settings)
    for run in runs:
        batch.config_of(run, config, settings)  # raises where it cannot be

    shared = dataclasses.asdict(settings)
    if settings.target is not None:
        del shared["examples"]  # only where a run gives up: more may be allowed later
    return Work(
        common={"study": "batch", "config": to_dict(config), "settings": shared},
        runs=runs,
        row=lambda run: batch.row(run, config, settings, folder),
        report=lambda found: batch_report.write_report(found, config, settings, _commands(folder)),
        again=lambda run, row: batch.again(run, row, config, settings),
    )


def _devices(config: Config, folder: pathlib.Path) -> Work:
    on_cpu = jax.default_backend() == "cpu"
    here = [1, 2, 4] if on_cpu else [n for n in (2**i for i in range(20)) if n <= jax.device_count()]
    counts = [] if told.DEVICES.value == ["none"] else _numbers("devices", told.DEVICES.value or [str(n) for n in here])
    if not on_cpu and max(counts, default=0) > jax.device_count():
        raise ConfigError(f"--devices={max(counts)}, but there are {jax.device_count()}")
    slices, notes = _topologies()
    per_device = told.PER_DEVICE.value or config.batch_size
    settings = devices.Settings(per_device, told.STRONG.value or per_device * max(counts, default=1), told.STEPS.value)
    runs = devices.plan(counts, slices, settings)
    if not runs:
        raise ConfigError("--devices=none leaves nothing to do without --topologies and --tpu-python")
    for run in runs:
        devices.config_of(run, config)

    return Work(
        common={"study": "devices", "config": to_dict(config), "settings": dataclasses.asdict(settings)},
        runs=runs,
        row=lambda run: devices.row(run, config, settings, folder, on_cpu=on_cpu, tpu_python=told.TPU_PYTHON.value),
        report=lambda found: devices.write_report(found, config, settings, _commands(folder), notes),
    )


def _memory(config: Config, folder: pathlib.Path) -> Work:
    try:
        sizes = [parse_size(text) for text in told.SIZES.value] or [config.model.size]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--sizes: {error}") from error
    if unknown := set(told.REMAT.value) - {"off", "on"}:
        raise ConfigError(f"--remat holds {sorted(unknown)[0]!r}; it takes off and on")
    slices, notes = _topologies()
    budget = int(told.MEMORY_GIB.value * 2**30) or (0 if slices else _device_bytes())
    settings = memory.Settings(budget, told.RESOLUTION.value)
    on_cpu = jax.default_backend() == "cpu"
    places = [t.name for t in slices] or [""]
    fsdp = _numbers("fsdp", told.FSDP.value)
    if not on_cpu and not slices and fsdp[-1] > jax.device_count():
        raise ConfigError(f"--fsdp={fsdp[-1]}, but there are {jax.device_count()} devices")
    runs = [
        memory.Run(size, dtype, remat == "on", n, place)
        for place in places for size in sizes for dtype in told.DTYPES.value for remat in told.REMAT.value for n in fsdp
    ]  # fmt: skip
    for run in runs:
        memory.config_of(run, config, config.data.targets_per_source)

    return Work(
        common={"study": "memory", "config": to_dict(config), "settings": dataclasses.asdict(settings)},
        runs=runs,
        row=lambda run: memory.row(run, config, settings, folder, on_cpu=on_cpu, tpu_python=told.TPU_PYTHON.value),
        report=lambda found: memory.write_report(found, config, settings, _commands(folder), notes, on_cpu=on_cpu),
    )


def _device_bytes() -> int:
    """Of the devices at hand. Raises ConfigError where they do not say (CPU)."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise ConfigError("--memory_gib is missing: this device does not say how much memory it has")
    return limit


def _command() -> str:
    """The command that was given, for the report; this machine's interpreters are left out."""
    words = [w for w in sys.argv[1:] if not w.startswith("--tpu-python")]
    words += ["--tpu-python=PYTHON"] if told.TPU_PYTHON.value else []
    return " ".join(["python -m truepose_jax.scaling", *(shlex.quote(w) for w in words)])


def _commands(folder: pathlib.Path) -> str:
    """Every command that rows came from, this one last; kept in commands.txt."""
    path = folder / "commands.txt"
    known = path.read_text().splitlines() if path.exists() else []
    if _command() not in known:
        known.append(_command())
        with files.writing(path):
            atomic.write_text(path, "\n".join(known) + "\n")
    return "\n".join(known)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    for flag, value in (("study", told.STUDY.value), ("config", told.CONFIG.value), ("out", told.OUT.value)):
        if not value:
            raise ConfigError(f"--{flag} is missing; python -m truepose_jax.scaling --help tells what there is")
    plots.need_matplotlib()
    if jax.process_count() > 1:
        raise ConfigError("the studies run in one process")
    config = resolve_init_from(from_config_dict(Config, told.CONFIG.value))
    folder = pathlib.Path(told.OUT.value)
    work = {"batch": _batch, "devices": _devices, "memory": _memory}[told.STUDY.value](config, folder)
    if told.DRY_RUN.value:
        return _dry_run(work, folder)
    found = Table(folder, work.common)
    _commands(folder)
    enable_compilation_cache()
    with lock_workdir(folder):
        todo = [run for run in work.runs if (row := found.done(run.name)) is None or work.again(run, row)]
        for run in tqdm.tqdm(todo, desc="rows", dynamic_ncols=True):
            tqdm.tqdm.write(run.name, file=sys.stdout)
            row = work.row(run)
            if row is None:
                return STOPPED
            found.add(row)
            said = ", ".join(f"{k} {v}" for k, v in row.items() if isinstance(v, int | float | str))
            tqdm.tqdm.write(f"  {said[:300]}", file=sys.stdout)
        print(f"report: {work.report(found)}", flush=True)
    return 0


def _dry_run(work: Work, folder: pathlib.Path) -> int:
    """Lists; writes nothing."""
    done: list[Row] = Table(folder, work.common).rows if (folder / "study.json").exists() else []
    names = {row["name"] for row in done}
    for run in work.runs:
        print(f"{run.name:48} {'done' if run.name in names else 'to do'}")
    print(f"{len(work.runs)} runs, {len(work.runs) - len(names)} to do")
    return 0


if __name__ == "__main__":
    run_with_config(main, told)
