"""The memory study: the largest batch per device that fits, from compiled programs' own accounts; nothing is run."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

from input_pipeline import atomic
from truepose_jax.config import Config, ConfigError, checked
from truepose_jax.runtime import plots
from truepose_jax.runtime.markdown import narrow
from truepose_jax.scaling import worker
from truepose_jax.scaling.devices import PREDICTION
from truepose_jax.scaling.hardware import Topology
from truepose_jax.scaling.report import origin, table
from truepose_jax.scaling.table import Row, Table

MOST = 1 << 20
"""Examples per device beyond which nobody looks."""


CPU_ROWS = (
    "**Rows of this machine are the accounts of XLA's CPU compiler, which merges the recomputation of remat away and widens "
    "bfloat16: they show how the search works and what fsdp divides, and say nothing of remat or precision on accelerators.**"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """budget: bytes per device; 0: each slice's own memory. resolution: the answer's relative error that is good enough;
    0: exact."""

    budget: int
    resolution: float


@dataclasses.dataclass(frozen=True)
class Run:
    """topology "": pretended devices of this machine."""

    size: tuple[int, int]
    dtype: str
    remat: bool
    fsdp: int
    topology: str = ""

    def budget(self, settings: Settings) -> int:
        return settings.budget or Topology(self.topology).chip.memory

    @property
    def name(self) -> str:
        h, w = self.size
        place = self.topology.replace(":", "-") or "here"
        return f"{place}-{h}x{w}-{self.dtype}-remat-{'on' if self.remat else 'off'}-fsdp{self.fsdp}"


def config_of(run: Run, config: Config, per_device: int) -> Config:
    """Raises ConfigError where the configuration does not allow it."""
    chips = Topology(run.topology).chips if run.topology else run.fsdp
    if chips % run.fsdp:
        raise ConfigError(f"fsdp {run.fsdp} does not divide the {chips} chips of {run.topology}")
    optim = dataclasses.replace(config.optim, accumulation=1, noise_scale="off")
    if run.fsdp > 1:
        optim = dataclasses.replace(optim, layout="tree")
    changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, size=run.size, dtype=run.dtype, remat=run.remat),
        mesh=dataclasses.replace(config.mesh, data=chips // run.fsdp, fsdp=run.fsdp, tensor=1),
        optim=optim,
        batch_size=per_device * chips,
    )
    return checked(changed)


def largest(bytes_at: Callable[[int], float], budget: float, *, unit: int, resolution: float) -> int:
    """The largest multiple of `unit` whose bytes_at is within the budget; 0: none is.

    bytes_at may be inf (the compiler refused) and must not fall. Bytes are nearly straight in the batch, so a guess is
    where the line through the last two batches meets the budget; where a guess does not halve the bracket, the next one
    does. With resolution r the answer fits, and one of (1 + r) times it (or a unit more) does not.
    """
    first = bytes_at(unit)
    if first > budget:
        return 0
    fits, fails = (1, first), None
    guess, halve = 2, False
    while fails is None or fails[0] - fits[0] > max(1, int(resolution * fits[0])):
        if guess * unit > MOST:
            break
        found, width = bytes_at(guess * unit), math.inf if fails is None else fails[0] - fits[0]
        slope = (found - fits[1]) / (guess - fits[0])
        if found <= budget:
            fits = (guess, found)
        else:
            fails = (guess, found)
        straight = fits[0] + (budget - fits[1]) / slope if 0 < slope < math.inf else math.inf
        if fails is None:
            # A little beyond, so that the next one closes the bracket; bounded, where the line is not yet straight.
            guess = max(fits[0] + 1, int(min(straight + 1, 64 * fits[0])))
            continue
        halve = not halve and fails[0] - fits[0] > width / 2
        middle = (fits[0] + fails[0]) // 2
        guess = middle if halve or straight == math.inf else min(max(math.floor(straight), fits[0] + 1), fails[0] - 1)
    return fits[0] * unit


def row(run: Run, config: Config, settings: Settings, folder: pathlib.Path, *, on_cpu: bool, tpu_python: str) -> Row:
    """Every batch that is tried is compiled in a process of its own, and kept under runs/."""
    unit, tried = config.data.targets_per_source, {}

    def bytes_at(per_device: int) -> float:
        if per_device not in tried:
            task = worker.task_of(config_of(run, config, per_device), "compile", topology=run.topology)
            place = folder / "runs" / run.name / f"b{per_device:07d}"
            python = tpu_python if run.topology else sys.executable
            fake = run.fsdp if on_cpu and not run.topology else 0
            tried[per_device] = worker.run(task, place, python=python, fake_devices=fake)
            print(f"  {run.name}: {per_device} per device: {_said(tried[per_device])}", flush=True)
        return tried[per_device].get("bytes", math.inf)

    budget = run.budget(settings)
    found = largest(bytes_at, budget, unit=unit, resolution=settings.resolution)
    at = tried[found] if found else tried[unit]
    two = sorted(b for b in tried if "bytes" in tried[b])
    slope = (tried[two[-1]]["bytes"] - tried[two[0]]["bytes"]) / (two[-1] - two[0]) if len(two) > 1 else None
    return {
        "name": run.name,
        "topology": run.topology,
        "prediction": bool(run.topology),
        "height": run.size[0],
        "width": run.size[1],
        "dtype": run.dtype,
        "remat": "on" if run.remat else "off",
        "fsdp": run.fsdp,
        "budget_bytes": budget,
        "largest_batch": found,
        "bytes": at.get("bytes"),
        "argument_bytes": at.get("argument_bytes"),
        "temporary_bytes": at.get("temporary_bytes"),
        "bytes_per_example": slope,
        "compiled": len(tried),
        "compile_seconds": round(sum(t.get("compile_seconds", 0.0) for t in tried.values()), 1),
    }


def _said(found: dict) -> str:
    return f"{found['bytes'] / 2**20:,.1f} MiB" if "bytes" in found else f"refused ({found['error'][:80]})"


def write_report(
    found: Table, config: Config, settings: Settings, command: str, notes: Sequence[str], *, on_cpu: bool
) -> pathlib.Path:
    """report.md and its figure; returns the path. on_cpu: rows without a slice are of this machine's CPU."""
    rows, on_cpu = found.rows, on_cpu and not all(r["topology"] for r in found.rows)
    budgets = sorted({r["budget_bytes"] for r in rows})
    within = f"within {settings.resolution:.0%}" if settings.resolution else "exactly"
    lines = [
        "# Memory: the largest batch per device",
        "",
        *origin(config, command),
        "",
        *([*notes, ""] if notes else []),
        f"Budget: {' or '.join(f'{b / 2**20:,.0f}' for b in budgets)} MiB per device. "
        "Of each setting the train step was compiled at several batch sizes and its memory_analysis read (arguments + "
        f"results + temporaries - donated buffers); nothing was run. The largest batch is found {within}, by closing in on "
        "the budget from both sides. What a "
        "runtime keeps beside the program is not in these numbers."
        + (
            " With fsdp above 1 optim.layout is 'tree', since 'flat' cannot be cut."
            if config.optim.layout == "flat"
            else ""
        ),
        "",
    ]
    if on_cpu:
        lines += [CPU_ROWS, ""]
    if any(r["prediction"] for r in rows):
        lines += [f"Rows of a TPU slice are a {PREDICTION}", ""]
    lines += table(
        {
            "where": [r["topology"] or f"{r['fsdp']} device(s) here" for r in rows],
            "size": [f"{r['height']}x{r['width']}" for r in rows],
            "budget (MiB)": [r["budget_bytes"] / 2**20 for r in rows],
            "precision": [r["dtype"] for r in rows],
            "remat": [r["remat"] for r in rows],
            "fsdp": [r["fsdp"] for r in rows],
            "largest batch/device": [r["largest_batch"] for r in rows],
            "memory then (MiB)": [r["bytes"] / 2**20 if r["bytes"] else None for r in rows],
            "per example (MiB)": [r["bytes_per_example"] / 2**20 if r["bytes_per_example"] else None for r in rows],
            "state and batch (MiB)": [r["argument_bytes"] / 2**20 if r["argument_bytes"] else None for r in rows],
            "compilations": [r["compiled"] for r in rows],
        }
    )
    lines += _effects([r for r in rows if r["topology"] or not on_cpu], ("remat", "dtype", "fsdp"))
    lines += _effects([r for r in rows if not r["topology"] and on_cpu], ("fsdp",))
    if rows:
        _figure(found.folder / "largest_batch.png", rows)
        lines += ["", "![largest batch per device](largest_batch.png)"]
    path = found.folder / "report.md"
    atomic.write_text(path, narrow("\n".join(lines) + "\n"))
    return path


def _effects(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """What one setting does to the largest batch, the others being equal: geometric means over the pairs of rows."""
    said = []
    fewest = min((r["fsdp"] for r in rows), default=1)
    changes = [("remat", "off", "on"), ("dtype", "float32", "bfloat16")]
    changes += [("fsdp", fewest, n) for n in sorted({r["fsdp"] for r in rows} - {fewest})]
    for column, before, after in (change for change in changes if change[0] in columns):
        others = [k for k in ("topology", "height", "width", "dtype", "remat", "fsdp") if k != column]
        base = {tuple(r[k] for k in others): r["largest_batch"] for r in rows if r[column] == before}
        ratios = [
            r["largest_batch"] / base[key]
            for r in rows
            if r[column] == after and base.get(key := tuple(r[k] for k in others)) and r["largest_batch"]
        ]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            said.append(f"{column} {before} to {after}: x {mean:.2f} ({len(ratios)} pair{'s' * (len(ratios) > 1)})")
    return ["", f"Effect on the largest batch, the rest being equal: {'; '.join(said)}."] if said else []


def _figure(path: pathlib.Path, rows: Sequence[Row]) -> None:
    series: dict[str, list[Row]] = {}
    for r in rows:
        place = f"{r['topology']}, " if r["topology"] else ""
        label = f"{place}{r['dtype']}, remat {r['remat']}, fsdp {r['fsdp']}"
        series.setdefault(label, []).append(r)
    pixels = sorted({r["height"] * r["width"] for r in rows})
    names = {r["height"] * r["width"]: f"{r['height']}x{r['width']}" for r in rows}
    with plots.figure(path, x="size (pixels, height x width)", y="largest batch per device (examples)") as axis:
        for i, (label, mine) in enumerate(series.items()):
            mine = sorted((r for r in mine if r["largest_batch"]), key=lambda r: r["height"] * r["width"])
            axis.plot(
                [r["height"] * r["width"] for r in mine],
                [r["largest_batch"] for r in mine],
                label=label,
                **plots.style(i),
            )
        plots.doubling(axis, pixels)
        axis.xaxis.set_ticks(pixels, [names[p] for p in pixels])
        plots.decades(axis)
