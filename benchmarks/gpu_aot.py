"""What the programs of a training and of sampling are on an H200, compiled for one without one. Writes JSON and Markdown.

    python benchmarks/gpu_aot.py --setup=FOLDER --python=python3.12 [--cases=REGEX] [--limit=900] [--keep=FOLDER]

--setup makes a virtual environment with the project's [gpu] extra and jax 0.11.2 in FOLDER (once, 5 GB) and runs there; without
it this Python must have the CUDA plugin. Every case is a process of its own of at most --limit seconds; what takes longer is
named in the table as not compiled. --keep: the programs as files, NAME.program, which train_step.py and sampling.py load by
--programs on a machine with such a GPU; they hold pickled parts of JAX's own, so load none but your own.

Attention: two images, 8 heads, bfloat16, forward, and forward with gradients; `cudnn` is the plain attention, for it takes no
Eq. 6, and where no GPU is at hand to be asked JAX refuses heads over 128. Steps and sampling: the full network of
benchmarks/train_step.py and sampling.py, from latents, without rematerialisation, the attention that `auto` takes. Registers and
spills are ptxas' account of Pallas' kernels; XLA shows none of its own. Nothing here was timed: no GPU was at hand.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tpu_aot import SIZES, hash_of, operation, set_up  # noqa: E402

from benchmarks import tables  # noqa: E402
from benchmarks.side_by_side_case import Case  # noqa: E402
from truepose_jax.runtime.cli import Parser, run_program  # noqa: E402
from truepose_jax.runtime.markdown import table  # noqa: E402

JAX = "0.11.2"
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }
"""
"""An H200 in XLA's words (GpuTargetConfigProto): NVIDIA's public figures."""
FULL = {"widths": (320, 640, 1280, 1280), "dtype": "bfloat16", "device": "gpu", "threads": 1}
CASES: dict[str, Case | tuple[str, int, int, str]] = {
    f"attention-{form}-{n}x{d}-{direction}": (form, n, d, direction)
    for n, d in SIZES
    for form in ("reference", "xla", "pallas_gpu", "cudnn")
    for direction in ("forward", "forward+backward")
} | {
    f"{task}-{size[0]}x{size[1]}-batch{batch}": Case(task=task, size=size, batch=batch, **FULL)
    for task, size, batch in (
        ("train", (512, 352), 12), ("train", (256, 176), 60), ("sample", (512, 352), 1), ("sample", (512, 352), 8),
    )
}  # fmt: skip
ROOMS = ("kernels", "models", "methods", "diffusion", "sampling")
SOURCES = (*(f"truepose_jax/{room}/**/*.py" for room in ROOMS), "truepose_jax/training/step.py")


# --- programs ----------------------------------------------------------------------------------------------------


def program(case: Case | tuple[str, int, int, str]) -> tuple[Callable, tuple, dict[str, Any]]:
    """(function, its arguments as shapes, options of jit)."""
    import jax

    if isinstance(case, tuple):
        form, n, d, direction = case
        if form == "cudnn":
            function, shapes = _plain(n, d, direction)
        else:
            function, shapes, _ = operation(form, n, d, direction)
        return function, tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes), {}
    from benchmarks import side_by_side_case as cases
    from truepose_jax.sampling.sampler import Sampler, Sampling, cast_kernels
    from truepose_jax.training.step import Trainer

    method, config = cases.method_of(case), case.config()
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in cases.batch_of(case).items()}
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))
    if case.task == "train":
        trainer = Trainer(config, method)
        return trainer.step, (jax.eval_shape(trainer.state_of, params), {}, batch), {"donate_argnums": 0}
    diffusion = config.diffusion
    sampler = Sampler(method, diffusion.schedule, diffusion.spacing, Sampling(case.steps, case.guidance))
    held = jax.eval_shape(lambda tree: cast_kernels(tree, case.dtype), params)
    return sampler.sample, (held, {}, batch, jax.eval_shape(lambda: cases.sampling_keys(case))), {}


def _plain(n: int, d: int, direction: str) -> tuple[Callable, list]:
    """The plain attention by cuDNN, of the arrays of tpu_aot.operation."""
    import jax
    import jax.numpy as jnp

    from truepose_jax.kernels.attention import cudnn

    array = ((2, n, 8, d), jnp.bfloat16)
    if direction == "forward":
        return functools.partial(cudnn.attend, rows=None), [array] * 3

    def both(q, k, v, d_out):
        out, pull = jax.vjp(functools.partial(cudnn.attend, rows=None), q, k, v)
        return out, *pull(d_out)

    return both, [array] * 4


def load(path: pathlib.Path, function: Callable, arguments: tuple) -> Callable | None:
    """The program in a file that --keep left, on this machine; None, and why, where it is not there or does not fit."""
    import jax
    from jax.experimental.serialize_executable import deserialize_and_load

    if not path.is_file():
        return None
    trees = jax.tree.structure((arguments, {})), jax.tree.structure(jax.eval_shape(function, *arguments))
    try:
        return deserialize_and_load(path.read_bytes(), *trees)
    except Exception as error:  # of another version, another GPU: whatever JAX and the plugin raise
        print(f"{path}: not loaded ({type(error).__name__}: {str(error)[:200]}); compiling", file=sys.stderr)
        return None


def compile_case(name: str, keep: pathlib.Path | None) -> dict[str, Any]:
    """What the compiler says of one case."""
    import jax
    from jax.experimental import topologies
    from jax.experimental.serialize_executable import serialize
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from truepose_jax.runtime.sharding import AXES

    function, arguments, options = program(CASES[name])
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices
    mesh = jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
    start = _cpu_seconds()
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, **options).lower(*placed)
        traced = _cpu_seconds()
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    arguments, results, temporaries = (getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp"))
    found = {
        "trace_cpu_s": round(traced - start, 1),
        "compile_cpu_s": round(_cpu_seconds() - traced, 1),
        "temporary_bytes": temporaries,
        "held_bytes": arguments + results + temporaries - memory.alias_size_in_bytes,
        "library_calls": len(re.findall(r'custom_call_target="__cu(?:blas|dnn)', compiled.as_text())),
    }
    payload, _, _ = serialize(compiled)
    found["program_bytes"] = len(payload)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{CASES[name].name if isinstance(CASES[name], Case) else name}.program").write_bytes(payload)
    return found


def _cpu_seconds() -> float:
    """Of this process and of ptxas, which is one of its own."""
    return sum(os.times()[:4])


def registers(said: str) -> dict[str, int]:
    """Of ptxas' account of Pallas' kernels: how many, most registers of one, bytes spilled by all; {} where there are none."""
    used = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))
    return {"kernels": len(used), "registers": max(used), "spilled_bytes": spilled} if used else {}


# --- the report --------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    about = found["about"]
    sources = " and ".join(dict.fromkeys(row["sources"] for row in found["rows"].values()))
    lines = [
        "# Programs for an H200, compiled without one",
        "",
        f"`python benchmarks/gpu_aot.py --setup=FOLDER`; jax {about['jax']}, CUDA plugin {about['plugin']}, sources "
        f"{sources}; compiled on {about['machine']}, {about['when']}. The compiler's account, not timings: no GPU was "
        "at hand, and none of these programs has run. `held`: arguments, results, temporaries. `kernels`: Pallas', with the most "
        "registers of one and the bytes that all of them spill. `compile s`: of CPU time.",
        "",
    ]
    heads = ("program", "held MB", "temporaries MB", "kernels", "registers", "spilled bytes", "library calls", "compile s")
    rows = []
    for name, row in sorted(found["rows"].items(), key=lambda item: list(CASES).index(item[0])):
        if "failed" in row:
            continue
        cells = [f"{row[key] / 1e6:,.1f}" for key in ("held_bytes", "temporary_bytes")]
        cells += [f"{row[key]:,}" if key in row else "-" for key in ("kernels", "registers", "spilled_bytes", "library_calls")]
        cells += [f"{row['compile_cpu_s']:,.0f}"]
        rows.append([name, *cells])
    failed = [f"- {name}: {row['failed']}" for name, row in found["rows"].items() if "failed" in row]
    return "\n".join([*lines, *table(heads, rows), "", *(["Not compiled:", "", *failed, ""] if failed else [])])


def _of_process(name: str, limit: float, keep: pathlib.Path | None) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--case={name}", *([f"--keep={keep}"] if keep else [])]
    before = sum(os.times()[2:4])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_TRACEBACK_FILTERING": "off"}
    try:
        call = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {limit:,.0f} s, {sum(os.times()[2:4]) - before:.0f} of them of CPU time"}
    if call.returncode:
        return {"failed": call.stderr.strip().splitlines()[-1][:200]}
    return json.loads(call.stdout.splitlines()[-1]) | registers(call.stdout + call.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", type=pathlib.Path, help="folder of the virtual environment to make and run in")
    parser.add_argument("--python", default=sys.executable, help="that the environment is made of: 3.12 or newer")
    parser.add_argument("--cases", default="", help="those whose name matches; all of: " + ", ".join(CASES))
    parser.add_argument("--limit", type=float, default=900, help="seconds of a case")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the programs")
    parser.add_argument("--out", type=pathlib.Path, default=tables.RESULTS)
    parser.add_argument("--case", choices=CASES, help="compile one here and print what comes of it")
    flags = parser.parse_args(argv)
    if flags.setup is not None:
        rest = [word for word in argv if not word.startswith(("--setup", "--python"))]
        python = set_up(flags.setup, (f"jax=={JAX}", "-e", f"{ROOT}[gpu]"), flags.python)
        return subprocess.run([python, __file__, *rest]).returncode
    if flags.case:
        print(json.dumps(compile_case(flags.case, flags.keep)))
        return 0
    path = tables.result(parser, flags.out, "gpu_aot")
    rows = dict(tables.read(path, "sources"))
    for name in CASES:
        if re.search(flags.cases, name):
            sources = hash_of(SOURCES)
            rows[name] = _of_process(name, flags.limit, flags.keep) | {"sources": sources}
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
            about = {
                "jax": importlib.metadata.version("jax"),
                "plugin": importlib.metadata.version("jax-cuda13-plugin"),
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                "when": datetime.date.today().isoformat(),
            }
            found = {"about": about, "rows": rows}
            tables.write(path, found, report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
