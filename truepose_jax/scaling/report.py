"""Markdown: tables and the paragraph that says where the numbers come from."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from truepose_jax.config import Config


def number(value: Any, digits: int = 3) -> str:
    """For a table: '-' where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def interval(low: float | None, high: float | None) -> str:
    """'12 to 30'; 'above 12' or 'not bounded' where ends are missing."""
    lost = [x is None or not math.isfinite(x) for x in (low, high)]
    if all(lost):
        return "not bounded"
    return f"above {number(low)}" if lost[1] else f"{number(low)} to {number(high)}"


def table(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Markdown lines; values that are no text are set by `number`. Columns after the first are right-aligned."""
    names = list(columns)
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    for values in zip(*columns.values(), strict=True):
        lines.append(f"| {' | '.join(v if isinstance(v, str) else number(v) for v in values)} |")
    return lines


def origin(config: Config, command: str) -> list[str]:
    """What ran, where, and how to run it again."""
    h, w = config.model.size
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    unet = getattr(config.model, "unet", None)
    widths = f", widths {', '.join(map(str, unet.block_out_channels))}" if unet else ""
    return [
        f"Network: {config.model.method}{widths}, {h}x{w} pixels, {config.model.dtype}; data: {config.data.dataset}. "
        f"Machine: {jax.device_count()} x {device.device_kind} ({device.platform}), {platform.machine()}. {versions}.",
        "",
        "```",
        command,
        "```",
    ]
