"""What benchmarks leave: a JSON file with the machine in it, the page made from it, and of what each row is."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from input_pipeline import atomic
from input_pipeline.schema import InputError
from truepose_jax.runtime.markdown import narrow

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache
def machine(device: str = "cpu") -> dict[str, Any]:
    """What a measurement is of: two that differ in any of it are not compared."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "diffusers")}
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "system": platform.system(), **versions}
    if device == "gpu":
        call = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        told = subprocess.run(call, capture_output=True, text=True).stdout.strip().splitlines()
        found["gpu"] = told[0] if told else "unknown"
    return found


def commit() -> str | None:
    """The commit that is checked out, "+" where tracked files differ from it; None outside of a git tree."""

    def told(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    name, sources = told("rev-parse", "--short", "HEAD"), ("truepose_jax", "configs", "benchmarks/*.py")
    changed = told("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return name + "+" * bool(changed) or None


def result(parser: argparse.ArgumentParser, out: pathlib.Path, name: str) -> pathlib.Path:
    """OUT/NAME.json. Ends with one line and code 2 where `out` is no folder."""
    if out.exists() and not out.is_dir():
        parser.error(f"--out={out} is a file; name a folder")
    return out / f"{name}.json"


def read(path: pathlib.Path, of_row: str = "of") -> Any:
    """The file's rows, a list or {name: row}, each with a field `of_row`; [] where there is no file. Raises InputError."""
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        for row in rows.values() if isinstance(rows, dict) else rows:
            row[of_row]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no result of this program ({error}); move it away or name another --out"
        ) from error
    return rows


def write(path: pathlib.Path, found: Mapping[str, Any], page: str) -> None:
    """The JSON at `path`, and the page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(found, indent=1) + "\n")
    atomic.write_text(path.with_suffix(".md"), narrow(page))


def merged(rows: Sequence[dict], new: Sequence[dict], key: Callable[[dict], Any]) -> list[dict]:
    """The new rows among the others, in the place of older ones of the same key."""
    return list(({key(row): row for row in rows} | {key(row): row for row in new}).values())


def words(of: Mapping[str, Any]) -> str:
    """What a row is of, as its field `of` has it."""
    return ", ".join(f"{name} {value}" for name, value in of.items())


def origins(rows: Sequence[dict], name_of: Callable[[dict], str]) -> list[str]:
    """An item for each `of` of the rows: which rows, and what they are of."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row["of"], {})[name_of(row)] = None
    return [f"- {', '.join(names)}: {text}." for text, names in found.items()]
