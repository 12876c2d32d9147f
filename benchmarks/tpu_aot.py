"""What the attention costs on TPUs, from programs compiled for them without one. Writes JSON and Markdown.

    python benchmarks/tpu_aot.py --setup=FOLDER [--chips=v5e,v5p,v6e] [--sizes=2816x40,...] [--out=benchmarks/results]

--setup makes a virtual environment with jax[tpu] in FOLDER (once) and runs there; without it this Python must have libtpu.
A program is compiled for one chip: two images, 8 heads, bfloat16; q, k and v are [b n 8*d] in row-major order, as projections
leave them.

`temporaries` is XLA's own plan of memory (memory_analysis), in HBM. `HBM bytes`:
- of `reference`, what XLA's cost analysis says it accesses. It counts every buffer as HBM, also one that XLA keeps in VMEM,
  as it does with all intermediates of the small sizes on v5e and v6e;
- of `pallas_tpu`, the blocks its kernels move, plus XLA's count of everything around them (its cost analysis counts nothing
  for a Pallas call). A kernel walks its grid in order, fetches a block where the block's index differs from the step before,
  and writes one where it changes:
      bytes = sum over operands of (changes of index along the grid) x (bytes of a block),
  a block's last dimension padded to whole 128 lanes, the one before it to whole tiles of 8 x 4 bytes where it is one or
  more (fewer rows are counted as they are). The plans are the very ones that the kernels are launched with
  (pallas_tpu.forward_plan, dq_plan, dkv_plan);
- of `xla`, nothing is given: the cost analysis counts a loop's body once.

Nothing here was timed: these are counts, no TPU was at hand. Every row says of which versions and, by a hash, of which code of
kernels/attention it is; rows of others stay, and the report names them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks a cloud's metadata server which machine this is
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing here holds a TPU that another process could want

from benchmarks import tables  # noqa: E402
from truepose_jax.runtime.cli import Parser, program  # noqa: E402
from truepose_jax.runtime.markdown import table  # noqa: E402

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SIZES = ((2816, 40), (704, 80), (176, 160), (48, 160))
"""(tokens, head width) of SD1.5's levels at 512x352."""
FORMS = ("reference", "xla", "pallas_tpu")
IMAGES, HEADS = 2, 8
SOURCES = ("truepose_jax/kernels/attention/*.py",)
NO_PIP = 3
"""Exit code where pip cannot set up the environment."""


TPU_WHEELS = (f"jax[tpu]=={importlib.metadata.version('jax')}", "jaxtyping")


def set_up(folder: pathlib.Path, wanted: Sequence[str] = TPU_WHEELS, interpreter: str = sys.executable) -> pathlib.Path:
    """The Python of a virtual environment with what pip installs of `wanted`; made where it is not there yet.

    Raises SystemExit(NO_PIP) where pip fails.
    """
    python, done = folder / "bin" / "python", folder / ".done"
    if not done.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        call = subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True)
        if call.returncode:
            print(f"pip cannot install {' '.join(wanted)}: {call.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            raise SystemExit(NO_PIP)
        done.touch()
    return python


# --- what a compilation is of ----------------------------------------------------------------------------------------


def hash_of(patterns: Sequence[str]) -> str:
    """Of the project's files that these find: their names and code."""
    hashed = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        hashed.update(f"{path.relative_to(ROOT)}\0{code_of(path.read_text())}\0".encode())
    return hashed.hexdigest()[:16]


class _Strings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        return ast.Expr(ast.Constant(...)) if isinstance(node.value, ast.Constant) else node


def code_of(text: str) -> str:
    """A source without comments, docstrings and layout."""
    return ast.dump(_Strings().visit(ast.parse(text)))


# --- bytes by formula ------------------------------------------------------------------------------------------------


def block_bytes(operand) -> int:
    """Of one block in HBM: whole 128 lanes, and whole tiles of 8 rows of 4 bytes where there is one."""
    size = operand.array.dtype.itemsize
    *outer, rows, lanes = (1 if side is None else side for side in operand.spec.block_shape)
    unit = 8 * 4 // size
    rows = rows if rows < unit else -(-rows // unit) * unit
    return math.prod(outer) * rows * -(-lanes // 128) * 128 * size


def plan_bytes(plan) -> int:
    """What one kernel moves between HBM and VMEM."""
    total = 0
    for operand in (*plan.operands.values(), *plan.outputs.values()):
        before, changes = None, 0
        for at in itertools.product(*map(range, plan.grid)):
            index = operand.spec.index_map(*at)
            changes += index != before
            before = index
        total += changes * block_bytes(operand)
    return total


def kernel_bytes(n: int, d: int, direction: str) -> int:
    """Of the fused form's kernels."""
    import jax.numpy as jnp

    from truepose_jax.kernels.attention import pallas_tpu

    sizes = pallas_tpu.sizes(IMAGES, n, n, HEADS, d, jnp.bfloat16, has_rows=True)
    plans = [pallas_tpu.forward_plan(sizes)]
    if direction == "forward+backward":
        plans += [pallas_tpu.dq_plan(sizes), pallas_tpu.dkv_plan(sizes)]
    return sum(map(plan_bytes, plans))


# --- compilation -----------------------------------------------------------------------------------------------------


def operation(form: str, n: int, d: int, direction: str):
    """(function, shapes and dtypes of its arguments) of one reweighted attention."""
    import jax
    import jax.numpy as jnp

    from truepose_jax.kernels.attention import api

    def forward(q, k, v, bits):
        q, k, v = (x.reshape(IMAGES, n, HEADS, d) for x in (q, k, v))
        return api.reweighted_attention(q, k, v, bits, implementation=form).reshape(IMAGES, n, HEADS * d)

    def both(q, k, v, bits, d_out):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, bits), q, k, v)
        return out, *pull(d_out)

    array, bits = ((IMAGES, n, HEADS * d), jnp.bfloat16), ((IMAGES, n), jnp.bool_)
    if direction == "forward":
        return forward, [array, array, array, bits], 1
    return both, [array, array, array, bits, array], 4


def compile_for(chip: str, function, arguments: list, outputs: int):
    """The program for one chip; every array in row-major order."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from truepose_jax.runtime.sharding import AXES

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    whole = NamedSharding(mesh, PartitionSpec())

    def row_major(rank: int) -> Format:
        return Format(Layout(tuple(range(rank))), whole)

    shapes = [jax.ShapeDtypeStruct(*argument, sharding=row_major(len(argument[0]))) for argument in arguments]
    out = row_major(3) if outputs == 1 else (row_major(3),) * outputs
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=out).lower(*shapes).compile()


def measure(chip: str, n: int, d: int, direction: str, form: str) -> dict:
    """One line of the table."""
    start = time.perf_counter()
    compiled = compile_for(chip, *operation(form, n, d, direction))
    seconds = time.perf_counter() - start
    accessed = int(compiled.cost_analysis()["bytes accessed"])
    by_kernels = kernel_bytes(n, d, direction) if form == "pallas_tpu" else 0
    return {
        "chip": chip,
        "tokens": n,
        "head_width": d,
        "direction": direction,
        "form": form,
        "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "hbm_bytes": None if form == "xla" else accessed + by_kernels,
        "of_it_by_kernels": by_kernels,
        "logits_bytes": IMAGES * HEADS * n * n * 4,
        "compile_seconds": round(seconds, 1),
    }


def attention_section(chips: list[str], sizes: list[tuple[int, int]]) -> list[dict]:
    rows = []
    cells = itertools.product(chips, sizes, ("forward", "forward+backward"), FORMS)
    for chip, (n, d), direction, form in cells:
        rows.append(measure(chip, n, d, direction, form))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


# --- the report ------------------------------------------------------------------------------------------------------


def cell_of(row: dict) -> tuple:
    """What a row is of; the form comes last."""
    return tuple(row[name] for name in ("chip", "tokens", "head_width", "direction", "form"))


def order(row: dict) -> tuple:
    """In the report: the larger sizes first."""
    chip, tokens, width, direction, form = cell_of(row)
    return list(TOPOLOGIES).index(chip), -tokens, -width, direction, FORMS.index(form)


def attention_table(rows: list[dict]) -> list[str]:
    """One line per chip, size and direction: the three forms side by side."""

    def mega(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:,.1f}"

    heads = "chip | tokens x width | direction | logits MB | temporaries MB: reference | xla | fused | "
    heads += "HBM MB: reference | fused | fewer | compile s: reference | xla | fused"
    lines = []
    for (chip, n, d, direction), forms in itertools.groupby(rows, lambda row: cell_of(row)[:-1]):
        plain, blocks, fused = forms
        each = plain, blocks, fused
        fewer = f"{plain['hbm_bytes'] / fused['hbm_bytes']:.1f}x"
        cells = [chip, f"{n} x {d}", direction, mega(plain["logits_bytes"])]
        cells += [mega(row["temporaries_bytes"]) for row in each]
        cells += [mega(plain["hbm_bytes"]), mega(fused["hbm_bytes"]), fewer]
        lines.append(cells + [f"{row['compile_seconds']:.0f}" for row in each])
    return table(heads.split(" | "), lines)


def report(rows: list[dict]) -> str:
    return "\n".join(
        [
            "# TPU programs, compiled without a TPU",
            "",
            "`python benchmarks/tpu_aot.py --setup=FOLDER`. Counts, not timings: no TPU was at hand. benchmarks/tpu_aot.py says "
            "what is counted how. "
            "The compile times are rough, of one core of a machine that others used too. Where the reference has no temporaries "
            "its logits lie in VMEM, and XLA's count takes them for HBM: `fewer` is at most that there.",
            "",
            f"## The reweighted attention, {IMAGES} images, {HEADS} heads, bfloat16, one chip",
            "",
            *attention_table(rows),
            "",
            *tables.origins(rows, lambda row: f"{row['chip']} {row['tokens']}x{row['head_width']}"),
            "",
        ]
    )


def sizes_of(text: str) -> list[tuple[int, int]]:
    """'2816x40,48x160'. A `type` for add_argument."""
    found = []
    for size in text.split(","):
        n, _, d = size.partition("x")
        if not (n.isdecimal() and d.isdecimal() and int(n) and int(d)):
            raise argparse.ArgumentTypeError(f"'{size}' is not TOKENSxWIDTH, as in 2816x40")
        found.append((int(n), int(d)))
    return found


def chips_of(text: str) -> list[str]:
    """'v5e,v6e'. A `type` for add_argument."""
    for chip in text.split(","):
        if chip not in TOPOLOGIES:
            raise argparse.ArgumentTypeError(f"'{chip}' is no chip; choose of {', '.join(TOPOLOGIES)}")
    return text.split(",")


@program
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", type=pathlib.Path, help="folder of the virtual environment to make and run in")
    parser.add_argument("--chips", type=chips_of, default=list(TOPOLOGIES))
    parser.add_argument("--sizes", type=sizes_of, default=list(SIZES), help="tokens x head width, as in 2816x40,48x160")
    parser.add_argument("--out", type=pathlib.Path, default=tables.RESULTS)
    flags = parser.parse_args(argv)
    path = tables.result(parser, flags.out, "tpu_aot")
    before = tables.read(path)
    if flags.setup is not None:
        sizes = ",".join(f"{n}x{d}" for n, d in flags.sizes)
        wanted = [f"--chips={','.join(flags.chips)}", f"--sizes={sizes}", f"--out={flags.out.resolve()}"]
        return subprocess.run([set_up(flags.setup), __file__, *wanted]).returncode
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    of = tables.words(versions | {"sources": hash_of(SOURCES), "machine": machine})
    found = attention_section(flags.chips, flags.sizes)
    rows = sorted(tables.merged(before, [row | {"of": of} for row in found], cell_of), key=order)
    tables.write(path, {"rows": rows}, report(rows))
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
