"""Which room may import which: one row per room, from the ground up (walks the syntax tree, runs nothing)."""

import ast
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = {"torch", "transformers", "diffusers", "torchvision"}
TRAINING_ONLY = {"orbax", "optax", "absl", "ml_collections", "tensorboardX", "grain", "PIL", "cv2"}


class Room(NamedTuple):
    """rooms: that it may import, beside itself. torch: "never", "late" (inside functions), "always". outside: the only
    packages it may import, None for any. never: packages it may not import."""

    rooms: str
    torch: str = "never"
    outside: frozenset[str] | None = None
    never: frozenset[str] = frozenset()


DATA = frozenset({"numpy", "PIL", "cv2", "scipy", "tqdm", "grain", "simplejpeg", "tensorflow_datasets", "array_record"})
ARRAYS = frozenset({"numpy", "safetensors", "ml_dtypes"})
INPUT = "input_pipeline input_pipeline.annotations"
ROOMS = {
    "input_pipeline": Room("", outside=DATA),
    "input_pipeline.annotations": Room("input_pipeline", outside=DATA),
    "input_pipeline.synthetic": Room("input_pipeline", outside=DATA),
    "input_pipeline.sources": Room(f"{INPUT} input_pipeline.synthetic", outside=DATA),
    "input_pipeline.records": Room(f"{INPUT} input_pipeline.sources", outside=DATA),
    "input_pipeline.batches": Room(f"{INPUT} input_pipeline.records", outside=DATA),
    "runtime": Room(INPUT),
    "detection": Room(f"{INPUT} runtime", torch="late"),
    "metrics": Room(""),
    "interop": Room("", torch="always"),
    "kernels": Room("runtime", never=frozenset(TRAINING_ONLY)),
    "models": Room("kernels runtime", never=frozenset(TRAINING_ONLY)),
    "diffusion": Room("", never=frozenset(TRAINING_ONLY)),
    "config": Room("input_pipeline models diffusion"),
    "configs": Room("config", outside=frozenset({"ml_collections"})),
    "methods": Room("config kernels models diffusion runtime", never=frozenset(TRAINING_ONLY)),
    "pretrained.conversion": Room("input_pipeline config runtime", outside=ARRAYS),
    "pretrained": Room(f"{INPUT} input_pipeline.batches config methods models pretrained.conversion runtime"),
    "sampling": Room(f"{INPUT} config diffusion methods models runtime"),
    "data": Room(
        f"{INPUT} input_pipeline.synthetic input_pipeline.sources input_pipeline.records input_pipeline.batches config methods "
        "models pretrained runtime"
    ),
    "training.checkpoint": Room("input_pipeline config runtime"),
    "training": Room(
        f"{INPUT} input_pipeline.synthetic input_pipeline.batches config data diffusion methods metrics models pretrained "
        "pretrained.conversion runtime sampling training.checkpoint"
    ),
    "inference": Room(
        f"{INPUT} input_pipeline.records input_pipeline.batches config data detection kernels methods models "
        "pretrained pretrained.conversion runtime sampling training training.checkpoint"
    ),
    "prepare": Room(
        f"{INPUT} input_pipeline.synthetic input_pipeline.sources input_pipeline.records input_pipeline.batches detection models "
        "pretrained runtime",
        torch="late",
    ),
    "evaluate": Room(
        f"{INPUT} input_pipeline.synthetic input_pipeline.sources input_pipeline.batches config data inference methods metrics "
        "pretrained pretrained.conversion runtime sampling training",
        torch="late",
    ),
    "study": Room(
        f"configs {INPUT} input_pipeline.synthetic input_pipeline.sources input_pipeline.records config data diffusion "
        "inference kernels methods models pretrained pretrained.conversion runtime sampling training",
        torch="late",
    ),
    "serve": Room(f"{INPUT} input_pipeline.synthetic detection inference runtime"),
    "flags": Room(
        f"{INPUT} pretrained.conversion runtime", never=frozenset({"jax", "flax", "optax", "orbax", "grain"})
    ),
    "programs": Room(
        f"configs flags {INPUT} input_pipeline.synthetic input_pipeline.sources input_pipeline.records input_pipeline.batches "
        "config data detection evaluate inference kernels methods metrics models pretrained pretrained.conversion runtime "
        "sampling training training.checkpoint",
        torch="late",
    ),
    "scaling": Room("input_pipeline programs config data kernels methods pretrained runtime training training.checkpoint"),
}
"""From the ground up: a room imports rooms above its row only, so there is no circle. "programs" are the files at the top of
truepose_jax/."""


def room_of(module: str) -> str | None:
    """The innermost room that a module lies in; None for other packages'."""
    parts = module.split(".")
    if parts[0] not in {"truepose_jax", "input_pipeline", "configs"}:
        return None
    inside = parts[1:] if parts[0] == "truepose_jax" else parts
    for length in range(len(inside), 0, -1):
        if ".".join(inside[:length]) in ROOMS:
            return ".".join(inside[:length])
    package = len(inside) > 0 and (ROOT / "truepose_jax" / inside[0]).is_dir()
    assert not package, f"{module}: unknown room '{inside[0]}'; give it a row in ROOMS and say there what it may import"
    return "programs"


def imports_of(path: pathlib.Path):
    """(module, is it at the top level) for every import; `from package import x` counts as package.x."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in inside


def house_files():
    for folder in ("truepose_jax", "input_pipeline", "configs"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", list(house_files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_table(path):
    room = room_of(module_of(path).removesuffix(".__init__"))
    row = ROOMS[room]
    for module, top_level in imports_of(path):
        package = module.split(".")[0]
        assert package not in {"tests", "benchmarks", "experiments"}, f"{room}: {module} is not in the wheel"
        if module in {"truepose_jax", "truepose_jax.__version__", "truepose_jax.BUNDLED"}:
            continue
        other = room_of(module)
        if other is not None:
            assert other in {room, *row.rooms.split()}, f"{room} may not import {module}"
            continue
        if package in TORCH:
            assert row.torch == "always" or (row.torch == "late" and not top_level), (
                f"{room}: {module} is behind [torch]"
            )
        assert package not in row.never, f"{room} does no I/O and no training: {module}"
        if row.outside is not None:
            assert package in sys.stdlib_module_names or package in row.outside, f"{room} may not import {module}"


def test_no_arrow_runs_back_up():
    known = list(ROOMS)
    for number, (room, row) in enumerate(ROOMS.items()):
        for other in row.rooms.split():
            assert other in known[:number], f"{room} names {other}, whose row is not above"


def test_nothing_private_of_jax_but_mosaics_interpreter():
    found = {
        path.relative_to(ROOT).as_posix(): [module for module, _ in imports_of(path) if module.startswith("jax._src")]
        for path in house_files()
    }
    told = {path: modules for path, modules in found.items() if modules}
    mosaic = "jax._src.pallas.mosaic_gpu.interpret.params.InterpretGPUParams"  # not public in JAX 0.10
    assert told == {"truepose_jax/kernels/attention/pallas_gpu.py": [mosaic]}


def test_every_room_says_what_it_is_for():
    for folder in ("truepose_jax", "input_pipeline"):
        for place in (ROOT / folder).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(place.read_text())), f"{place.relative_to(ROOT)} has no docstring"


def test_no_file_is_over_500_lines():
    for folder in ("truepose_jax", "input_pipeline", "configs", "tests", "benchmarks", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"


def test_tensorflow_and_torch_stay_off_the_training_path():
    """Importing the trainer loads neither, and stays quick to start."""
    heavy = ("torch", "tensorflow", "diffusers", "transformers")
    code = f"import sys, truepose_jax.train; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]"
