"""The table of benchmarks/tpu_train_step.py: its rows, read and merged, and its Markdown."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from input_pipeline.schema import InputError

GIB = 1 << 30
NOT_RECORDED = "not recorded"
"""Of rows and compilations that do not say what they are of."""


def report(rows: list[dict], order: Sequence[str]) -> str:
    """order: names of all rows, for those that are missing."""

    def gib(value) -> str:
        return "-" if value is None else f"{value / GIB:.2f}"

    lines = [
        "| chips | mesh data x fsdp | size | remat | attention | largest batch/chip compiled that fits | one more | HBM GiB | "
        "of | arguments | temporaries | GiB/image | estimate GiB | estimate/compiler | GiB/image | its largest | kernels | "
        "collectives | sent MB | accessed GB | compilations | CPU s each |",
        "|---" * 22 + "|",
    ]
    for row in rows:
        more = "refused" if row["one_more_is_refused"] else "not tried"
        cells = [
            row["topology"],
            f"{row['chips'] // row['fsdp']} x {row['fsdp']}",
            " ".join((row["size"], row["network"])).strip(),
            "on" if row["remat"] else "off",
            row["attention"] or "pallas_tpu",
            str(row["largest_compiled_that_fits"] or f"none (refused: {row['refused']})"),
            more,
            gib(row["bytes"]),
            gib(row["available_bytes"]),
            gib(row["argument_bytes"]),
            gib(row["temporary_bytes"]),
            gib(row["bytes_per_image"]),
            gib(row["estimate_bytes"]),
            "-" if row["estimate_ratio"] is None else f"{row['estimate_ratio']:.2f}",
            gib(row["estimate_bytes_per_image"]),
            str(row["estimate_largest"]),
            str(row["kernels"]),
            f"{sum(sent['count'] for sent in row['collectives'].values()):,}" if row["collectives"] else "-",
            "-" if row["wire_bytes"] is None else f"{row['wire_bytes'] / 1e6:,.0f}",
            f"{row['accessed_bytes'] / 1e9:,.0f}" if row.get("accessed_bytes") else "-",
            str(row["compilations"]),
            ", ".join(f"{seconds:.0f}" for seconds in row["cpu_seconds"] if seconds is not None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    todo = [name for name in order if name not in {row["row"] for row in rows}]
    return "\n".join(
        [
            "# The whole train step on TPUs, compiled without one",
            "",
            "`python benchmarks/tpu_train_step.py --setup=FOLDER`. The configurations of configs/ as they stand: photos "
            "through the VAE inside the step, AdamW and EMA in float32, computing in bfloat16. Nothing was run: the compiler's "
            "own assignment of buffers, and its refusals. benchmarks/tpu_train_step.py says what is counted how. `estimate` is "
            "what `python -m truepose_jax.train --estimate` computes for the same batch and FSDP. CPU seconds: until the "
            "buffers are assigned, on a machine that others used too. Collective matmuls are off, as in training "
            "(sharding.compiler_options). `accessed`: HBM by the compiler's count, loops once, Pallas kernels as "
            "nothing; of rows whose code was generated.",
            "",
            *lines,
            "",
            *(f"{', '.join(names)}: {text}." for text, names in _origins(rows).items()),
            "",
            *([f"Not compiled: {', '.join(todo)}.", ""] if todo else []),
        ]
    )


def _origins(rows: list[dict]) -> dict[str, list[str]]:
    """What rows are of, in words, and the rows' names."""
    found: dict[str, list[str]] = {}
    for row in rows:
        about = row.get("about", {})
        of = row.get("of", NOT_RECORDED)
        versions = about if of == NOT_RECORDED else of["versions"]
        text = f"jax {versions.get('jax', '?')}, libtpu {versions.get('libtpu', '?')}; compiler options "
        text += (
            f"{about.get('options')} (what its compilations are of: {of})" if of == NOT_RECORDED else f"{of['options']}"
        )
        text += f"; compiled on {about.get('machine', '?')}" + (
            "" if of == NOT_RECORDED else f"; sources {of['sources']}"
        )
        found.setdefault(text, []).append(row["row"])
    return found


def read_rows(path: pathlib.Path, order: Sequence[str]) -> list[dict]:
    """The table's rows. In older files one `about` stands for all. Raises InputError."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {"rows": []}
        for row in found["rows"]:
            row.setdefault("about", found.get("about", {}))
        return sorted((row for row in found["rows"] if row["row"] in order), key=lambda row: order.index(row["row"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no result of this program ({error}); move it away or name another --out"
        ) from error


def merged(rows: list[dict], new: dict, order: Sequence[str]) -> list[dict]:
    """The new row among the others, in the place of an older one; in the order of `order`. One that was read from the same
    compilations of which nobody recorded what they are of keeps what was said then."""
    before = next((row for row in rows if row["row"] == new["row"]), None)
    if before is not None and new["of"] == NOT_RECORDED and before["tried"] == new["tried"]:
        new = new | {"about": before["about"]}
    return sorted([*(row for row in rows if row["row"] != new["row"]), new], key=lambda row: order.index(row["row"]))
