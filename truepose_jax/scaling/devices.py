"""The devices study: weak and strong scaling on what is at hand, and a plan for TPU slices that are not."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from input_pipeline import atomic
from truepose_jax.config import Config, ConfigError, checked
from truepose_jax.runtime import plots
from truepose_jax.runtime.markdown import narrow
from truepose_jax.scaling import worker
from truepose_jax.scaling.hardware import Topology, predicted
from truepose_jax.scaling.report import number, origin, table
from truepose_jax.scaling.table import Row, Table

FAKE = (
    "Devices of one CPU share its cores, with each other and with whatever else runs: these rows show that the programs are "
    "correct, NOT how anything scales."
)
PREDICTION = "PREDICTION: compiled for the slice, never run on it."


@dataclasses.dataclass(frozen=True)
class Settings:
    """per_device: examples per device of the weak scaling and the TPU plan. strong: global batch of the strong scaling.
    steps: timed steps per figure."""

    per_device: int
    strong: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Run:
    """kind "weak" or "strong" on `devices` devices at hand, or "plan" on a topology."""

    kind: str
    devices: int
    batch: int
    topology: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.topology.replace(':', '-') or self.devices}-b{self.batch}"


def plan(counts: Sequence[int], topologies: Sequence[Topology], settings: Settings) -> list[Run]:
    weak = [Run("weak", n, n * settings.per_device) for n in counts]
    strong = [Run("strong", n, settings.strong) for n in counts]
    return weak + strong + [Run("plan", t.chips, t.chips * settings.per_device, t.name) for t in topologies]


def config_of(run: Run, config: Config) -> Config:
    """Data-parallel over what the configuration's fsdp and tensor leave. Raises ConfigError where it cannot be cut."""
    mesh = config.mesh
    fixed = mesh.fsdp * mesh.tensor
    if mesh.fsdp < 1 or mesh.tensor < 1 or run.devices % fixed:
        raise ConfigError(f"config.mesh.fsdp {mesh.fsdp} x tensor {mesh.tensor} does not fit {run.devices} device(s)")
    parts = run.devices // mesh.tensor * config.data.targets_per_source * config.optim.accumulation
    if run.batch % parts:
        raise ConfigError(
            f"{run.kind} scaling on {run.devices} device(s): batch {run.batch} must be a multiple of {parts} (parts of the "
            "batch x targets_per_source x accumulation)"
        )
    mesh = dataclasses.replace(mesh, data=run.devices // fixed)
    return checked(dataclasses.replace(config, batch_size=run.batch, mesh=mesh))


def row(run: Run, config: Config, settings: Settings, folder: pathlib.Path, *, on_cpu: bool, tpu_python: str) -> Row:
    """Measures or compiles, in a process of its own."""
    wanted = config_of(run, config)
    common = {"name": run.name, "kind": run.kind, "devices": run.devices, "batch": run.batch}
    if run.kind == "plan":
        task = worker.task_of(wanted, "compile", topology=run.topology)
        found = worker.run(task, folder / "runs" / run.name, python=tpu_python)
        if "error" in found:
            return common | {"topology": run.topology, "prediction": True, "error": found["error"]}
        chip = Topology(run.topology).chip
        seconds = predicted(chip, flops=found["flops"], hbm_bytes=found["hbm_bytes"], wire_bytes=found["wire_bytes"])
        return common | {"topology": run.topology, "prediction": True} | found | seconds
    cache = str(folder / "cache")
    task = worker.task_of(wanted, "measure", devices=run.devices, steps=settings.steps, cache=cache)
    found = worker.run(task, folder / "runs" / run.name, fake_devices=run.devices if on_cpu else 0)
    return common | {"fake": on_cpu and run.devices > 1} | found


def efficiencies(rows: Sequence[Row]) -> dict[str, float]:
    """Images a second per device, over those of the fewest devices of the same kind, by the row's name."""
    found = {}
    for kind in ("weak", "strong"):
        mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["devices"])
        for r in mine:
            one = mine[0]["images_per_second"] / mine[0]["devices"]
            found[r["name"]] = r["images_per_second"] / r["devices"] / one
    return found


def write_report(found: Table, config: Config, settings: Settings, command: str, notes: Sequence[str]) -> pathlib.Path:
    """report.md and its figures; returns the path. notes: what was left out, and why."""
    measured = [r for r in found.rows if r["kind"] != "plan"]
    plans = [r for r in found.rows if r["kind"] == "plan"]
    lines = ["# Devices: throughput, and a plan for TPU slices", "", *origin(config, command), ""]
    lines += [*notes, ""] if notes else []
    if measured:
        lines += _measured(found.folder, measured, settings)
    if plans:
        lines += _planned(found.folder, plans, config)
    path = found.folder / "report.md"
    atomic.write_text(path, narrow("\n".join(lines) + "\n"))
    return path


def _measured(folder: pathlib.Path, rows: Sequence[Row], settings: Settings) -> list[str]:
    fake, efficient = any(r["fake"] for r in rows), efficiencies(rows)
    lines = ["## Measured on the devices at hand", ""]
    if fake:
        lines += [f"**{FAKE}**", ""]
    lines += [
        f"Weak: {settings.per_device} examples per device; strong: {settings.strong} examples in all. Medians of "
        f"{settings.steps} steps. Input: what the loader adds to a step whose batch lies on the devices already, "
        "each picture read or rendered for the first time. "
        "Collectives: a device's time in them, waiting for the others included, by the profiler's trace. Efficiency: "
        "images a second per device over those of the fewest devices.",
        "",
        *table(
            {
                "run": [r["kind"] for r in rows],
                "devices": [r["devices"] for r in rows],
                "batch": [r["batch"] for r in rows],
                "images/s": [r["images_per_second"] for r in rows],
                "efficiency": [f"{efficient[r['name']]:.0%}" for r in rows],
                "step (s)": [r["step_seconds"] for r in rows],
                "compute (s)": [r["compute_seconds"] for r in rows],
                "collectives (s)": [r["collective_seconds"] for r in rows],
                "input (s)": [r["input_seconds"] for r in rows],
                "sent (MB)": [r["wire_bytes"] / 1e6 for r in rows],
                "memory/device (MB)": [r["bytes_per_device"] / 1e6 for r in rows],
            }
        ),
        "",
    ]
    strong = [r for r in rows if r["kind"] == "strong"]
    if len(strong) > 1:
        worst = max(abs(r[key] / strong[0][key] - 1) for r in strong for key in ("first_loss", "second_loss"))
        lines += [
            "Correctness: the strong rows train on the same batch from the same parameters; the losses of their first two "
            f"steps (before and after an update) differ by {worst:.1e} at most, relatively.",
            "",
        ]
    counts = sorted({r["devices"] for r in rows})
    with plots.figure(folder / "throughput.png", x="devices", y="images/s") as axis:
        if fake:
            axis.set_title("devices share the cores of one CPU: no scaling result", fontsize=9)
        for i, kind in enumerate(("weak", "strong")):
            mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["devices"])
            speeds = [r["images_per_second"] for r in mine]
            axis.plot([r["devices"] for r in mine], speeds, label=f"{kind} scaling", **plots.style(i))
            if mine and not fake:
                ideal = [speeds[0] * n / mine[0]["devices"] for n in counts]
                axis.plot(counts, ideal, color=plots.style(i)["color"], ls=":", lw=1, label=f"{kind}, ideal")
        plots.doubling(axis, counts)
        axis.set_ylim(bottom=0)
    return [*lines, "![throughput](throughput.png)", ""]


def _planned(folder: pathlib.Path, rows: Sequence[Row], config: Config) -> list[str]:
    good = [r for r in rows if "error" not in r]
    mesh = f"data x fsdp {config.mesh.fsdp} x tensor {config.mesh.tensor}"
    lines = [
        "## Planned for TPU slices",
        "",
        f"**{PREDICTION}** The compiler's own account of memory and FLOPs (loops counted once, Pallas kernels not at all; "
        "little compiler effort, so a full compilation moves fewer bytes), the collectives of the compiled program, and "
        f"the bandwidths that the public documentation states ({_bandwidths(rows)}). Mesh: {mesh}. Collectives as rings "
        "over all links of a chip. Efficiency against one chip that sends nothing: from nothing hidden behind computing "
        "to all of it; no latency counted.",
        "",
        *table(
            {
                "slice": [r["topology"] for r in good],
                "chips": [r["devices"] for r in good],
                "batch": [r["batch"] for r in good],
                "memory/chip (GiB)": [r["bytes"] / 2**30 for r in good],
                "of HBM": [f"{r['bytes'] / Topology(r['topology']).chip.memory:.1%}" for r in good],
                "GFLOP/chip": [r["flops"] / 1e9 for r in good],
                "HBM traffic/chip (GB)": [r["hbm_bytes"] / 1e9 for r in good],
                "operands of collectives (MB)": [_operands(r) / 1e6 for r in good],
                "sent/chip (MB)": [r["wire_bytes"] / 1e6 for r in good],
                "step, roofline (ms)": [1e3 * max(r["compute_seconds"], r["memory_seconds"]) for r in good],
                "sending (ms)": [1e3 * r["collective_seconds"] for r in good],
                "efficiency, predicted": [f"{r['efficiency_lower']:.1%} to {r['efficiency_upper']:.1%}" for r in good],
            }
        ),
        "",
    ]
    lines += [f"{r['topology']}: does not fit: {r['error'][:200]}" for r in rows if "error" in r]
    if good:
        y = "predicted efficiency, nothing hidden (%)"
        with plots.figure(folder / "tpu_plan.png", x="chips", y=y) as axis:
            for i, kind in enumerate(sorted({r["topology"].partition(":")[0] for r in good})):
                mine = sorted((r for r in good if r["topology"].startswith(kind)), key=lambda r: r["devices"])
                values = [100 * r["efficiency_lower"] for r in mine]
                axis.plot([r["devices"] for r in mine], values, label=f"{kind} (prediction)", **plots.style(i))
            plots.doubling(axis, sorted({r["devices"] for r in good}))
            axis.set_ylim(0, 105)
        lines += ["![predicted efficiency](tpu_plan.png)", ""]
    return lines


def _operands(row: Mapping) -> float:
    return sum(entry["operand_bytes"] for entry in row["collectives"].values())


def _bandwidths(rows: Sequence[Row]) -> str:
    chips = {r["topology"].partition(":")[0]: Topology(r["topology"]).chip for r in rows}
    return "; ".join(
        f"{kind}: {chip.flops / 1e12:g} TFLOP/s bf16, HBM {chip.hbm / 1e9:g} GB/s, links {number(chip.ici / 1e9)} GB/s"
        for kind, chip in sorted(chips.items())
    )
