"""The table of benchmarks/tpu_train_step.py."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import tables
from truepose_jax.runtime.markdown import table

GIB = 1 << 30


def report(rows: list[dict], order: Sequence[str]) -> str:
    """order: names of all rows, for those that are missing."""

    def gib(value) -> str:
        return "-" if value is None else f"{value / GIB:.2f}"

    heads = "chips | mesh data x fsdp | size | remat | attention | largest batch/chip compiled that fits | one more | HBM GiB | "
    heads += "of | arguments | temporaries | GiB/image | estimate GiB | estimate/compiler | GiB/image | its largest | kernels | "
    heads += "collectives | sent MB | accessed GB | compilations | CPU s each"
    lines = []
    for row in rows:
        cells = [
            row["topology"],
            f"{row['chips'] // row['fsdp']} x {row['fsdp']}",
            " ".join((row["size"], row["network"])).strip(),
            "on" if row["remat"] else "off",
            row["attention"] or "pallas_tpu",
            str(row["largest_compiled_that_fits"] or f"none (refused: {row['refused']})"),
            "refused" if row["one_more_is_refused"] else "not tried",
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
            ", ".join("-" if seconds is None else f"{seconds:.0f}" for seconds in row["cpu_seconds"]),
        ]
        lines.append(cells)
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
            *table(heads.split(" | "), lines),
            "",
            *tables.origins(rows, lambda row: row["row"]),
            "",
            *([f"Not compiled: {', '.join(todo)}.", ""] if todo else []),
        ]
    )
