"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|async_execution_thread)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(hlo: str, devices: int) -> dict[str, dict[str, float]]:
    """{kind: {"count", "operand_bytes", "wire_bytes"}} of one execution on one device.

    hlo: compiled.as_text(). Collectives in loops count as often as the loop runs, where XLA knows that (once where not).
    operand_bytes: what goes in, summed. wire_bytes: what a ring sends per device: 2 (g - 1)/g of an all-reduce's operand,
    (g - 1)/g of what a gather puts out or a scatter takes in, for groups of g devices; groups of one are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for times, kind, type_text, rest, started in _executed(hlo):
        group = _group(rest, devices)
        if group == 1:
            continue
        sizes = _sizes(type_text)
        ring = (group - 1) / group
        if started and kind in ("all-gather", "reduce-scatter"):
            # The tuple holds operands and results, any number of either: of g + 1 parts one is the smaller side.
            larger = sum(sizes) * group / (group + 1)
            operand = larger / group if kind == "all-gather" else larger
        else:
            out = max(sizes) if started and kind != "all-reduce" else sum(sizes)
            operand = {"all-gather": out / group, "reduce-scatter": out * group}.get(kind, out)
        wire = {"all-reduce": 2 * ring * operand, "all-gather": ring * operand * group}.get(kind, ring * operand)
        if kind.startswith("collective-"):
            wire = operand
        entry = found.setdefault(kind, {"count": 0, "operand_bytes": 0, "wire_bytes": 0})
        entry["count"] += times
        entry["operand_bytes"] += times * operand
        entry["wire_bytes"] += times * wire
    return found


def wire_bytes(found: Mapping[str, Mapping[str, float]]) -> float:
    """Bytes that a device sends in one step, all kinds together."""
    return sum(entry["wire_bytes"] for entry in found.values())


def _executed(hlo: str) -> Iterator[tuple[int, str, str, str, bool]]:
    """(times, kind, result's type, rest of the line, asynchronous) of every collective."""
    bodies: dict[str, list[re.Match]] = {}
    entry = current = None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            bodies[current].append(instruction)
    if entry is None:
        return
    times = {name: 0 for name in bodies}

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in bodies[name]:
            trips = _TRIPS.search(instruction["rest"]) if instruction["op"] == "while" else None
            for called in _CALLED.findall(instruction["rest"]):
                for callee in re.findall(r"[\w.\-]+", called):
                    if callee in bodies:
                        visit(callee, count * int(trips[1]) if trips else count)

    visit(entry, 1)
    for name, instructions in bodies.items():
        for instruction in instructions:
            op = instruction["op"]
            kind = op.removesuffix("-start")
            if kind in KINDS and times[name]:
                yield times[name], kind, instruction["type"], instruction["rest"], op != kind


def _sizes(type_text: str) -> list[float]:
    return [
        _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in _SHAPE.findall(type_text)
        if dtype in _BYTES
    ]


def _group(rest: str, devices: int) -> int:
    """Devices per group, from any of XLA's three notations; all of them where the line names none."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else axes[name] for name, part in named)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    return devices
