"""Stages of gpu_quarter_hour.sh that have no program of their own. A case is a line of JSON in OUT/STAGE.jsonl when it is done.

    python benchmarks/gpu_stages.py ceilings|attention|table --out=FOLDER [--forms=reference,xla] [--toy]

ceilings: versions; what a bfloat16 product and a copy in memory reach. attention: forward and backward of every form against
the same in float32 by `reference`, seconds of one call. table: what all stages left, in Markdown. --toy: sizes for a CPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tpu_aot import SIZES  # noqa: E402

from truepose_jax.runtime.cli import Parser, program  # noqa: E402

IMAGES, HEADS = 2, 8
TOY_SIZES = ((48, 16),)
TOY_IMAGES, TOY_HEADS = 1, 2
REPEATS = 5
PLAIN, REWEIGHTED = "plain", "reweighted"


def seconds_of(call: Callable[[], Any]) -> float:
    """Median of REPEATS calls after one, results awaited."""
    import jax

    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def ceilings(toy: bool) -> list[Callable[[], dict[str, Any]]]:
    import jax
    import jax.numpy as jnp

    side, count = (128, 1 << 16) if toy else (8192, 1 << 30)

    def versions() -> dict[str, Any]:
        names = ("jax", "jaxlib", "flax", "torch", "numpy")
        found = {name: importlib.metadata.version(name) for name in names}
        return {"case": "versions", "device": jax.devices()[0].device_kind, "python": sys.version.split()[0], **found}

    def product() -> dict[str, Any]:
        x = jnp.ones((side, side), jnp.bfloat16)
        multiply = jax.jit(jnp.matmul)
        seconds = seconds_of(lambda: multiply(x, x))
        return {"case": f"product {side}^3 bf16", "seconds": seconds, "tflops": 2 * side**3 / seconds / 1e12}

    def copy() -> dict[str, Any]:
        x = jnp.ones(count, jnp.float32)
        move = jax.jit(lambda x: x + 1)
        seconds = seconds_of(lambda: move(x))
        return {"case": f"copy {4 * count / 1e9:.3g} GB", "seconds": seconds, "gb_per_s": 8 * count / seconds / 1e9}

    return [versions, product, copy]


def attention(toy: bool, forms: Sequence[str]) -> list[Callable[[], dict[str, Any]]]:
    """All forms of all sizes, forward and backward together: {"error": of the worst of out, dq, dk, dv} or {"failed": why}."""
    import jax
    import jax.numpy as jnp

    from truepose_jax.kernels.attention import api

    def both(operation: str, form: str, dtype) -> Callable:
        def run(q, k, v, bits, d_out):
            def forward(q, k, v):
                if operation == PLAIN:
                    return api.attention(q, k, v, implementation=form)
                return api.reweighted_attention(q, k, v, bits, implementation=form)

            out, pull = jax.vjp(forward, *(x.astype(dtype) for x in (q, k, v)))
            return out, *pull(d_out.astype(dtype))

        return jax.jit(run)

    def case(operation: str, form: str, n: int, d: int) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            keys = jax.random.split(jax.random.key(0), 5)
            q, k, v, d_out = (jax.random.normal(key, (images, n, heads, d)) for key in keys[:4])
            given = (q, k, v, jax.random.bernoulli(keys[4], 0.5, (images, n)), d_out)
            found: dict[str, Any] = {"case": f"{operation} {form} {n}x{d}"}
            try:
                with jax.default_matmul_precision("highest"):
                    wanted = both(operation, "reference", jnp.float32)(*given)
                run = both(operation, form, jnp.bfloat16)
                errors = [
                    float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs))
                    for ours, theirs in zip(run(*given), wanted, strict=True)
                ]
                return found | {"error": max(errors), "seconds": seconds_of(lambda: run(*given))}
            except Exception as error:  # a kernel's compiler, a device out of memory: the other cases go on
                return found | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}

        return measure

    sizes, images, heads = (TOY_SIZES, TOY_IMAGES, TOY_HEADS) if toy else (SIZES, IMAGES, HEADS)
    return [
        case(operation, form, n, d)
        for n, d in sizes
        for form in forms
        for operation in ((PLAIN,) if form == "cudnn" else (PLAIN, REWEIGHTED))
    ]


def table(out: pathlib.Path) -> str:
    """What the stages left in the folder: their codes, their cases, the side-by-side tables, the recipe's figures."""
    lines = ["# A quarter of an hour", "", "| stage | code | seconds |", "|---|---|---|"]
    for stage in _lines(out / "stages.jsonl"):
        lines.append(f"| {stage['stage']} | {stage['code']} | {stage['seconds']} |")
    for path in sorted(out.glob("*.jsonl")):
        if path.stem == "stages":
            continue
        lines += ["", f"## {path.stem}", ""]
        for row in _lines(path):
            facts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "case")
            lines.append(f"- {row['case']}: " + ", ".join(facts))
    for path in (out / "train_step.md", out / "sampling.md"):
        if path.exists():
            lines += ["", path.read_text().replace("# ", "## ", 1)]
    if (out / "recipe.json").exists():
        lines += ["", "## recipe", "", "```json", (out / "recipe.json").read_text().strip(), "```"]
    return "\n".join([*lines, ""])


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@program
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("ceilings", "attention", "table"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--forms", default="reference,xla,cudnn")
    parser.add_argument("--name", help="of the file, if not the stage's")
    parser.add_argument("--toy", action="store_true")
    flags = parser.parse_args(argv)
    if flags.stage == "table":
        print(table(flags.out))
        return 0
    cases = ceilings(flags.toy) if flags.stage == "ceilings" else attention(flags.toy, flags.forms.split(","))
    with open(flags.out / f"{flags.name or flags.stage}.jsonl", "a") as file:
        for case in cases:
            file.write(json.dumps(case()) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
