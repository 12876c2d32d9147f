"""The import table of the house, enforced: which room may import which (walks the syntax tree, runs nothing)."""

import ast
import pathlib

import pytest

from tests.process import run

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {
    "train", "generate", "evaluate", "convert", "prepare", "study", "scaling", "demo", "train_clip",
}  # fmt: skip

# room -> rooms of the house it may import (its own room is always allowed)
HOUSE = {
    "__init__": set(),
    "kernels": {"sharding"},
    "diffusion": set(),
    "rng": set(),
    "schema": {"models", "diffusion"},  # their config dataclasses are its groups
    "sharding": set(),
    "metrics": set(),
    "models": {"kernels", "sharding"},
    "atomic": set(),
    "markdown": set(),
    "conversion": {"schema", "atomic", "markdown"},
    "methods": {"models", "diffusion", "sharding", "rng", "schema"},
    "time_budget": {"checkpoint", "atomic"},
    "optim": {"methods", "diffusion", "rng", "sharding", "schema"},
    "train_step": {"methods", "diffusion", "rng", "sharding", "schema", "optim", "noise_scale"},
    "noise_scale": {"sharding"},
    "checkpoint": {"schema", "sharding", "atomic"},
    "monitor": {"schema", "sharding", "noise_scale", "atomic"},
    "input_pipeline": set(),
    "configs": {"schema"},  # the defaults
}
# The parts that programs are made of: they may use anything but programs.
PARTS = {
    "pipeline", "programs", "files", "initial", "distributed", "estimate", "region_tokens", "datasets", "frozen", "sampling",
    "evaluation", "pictures", "stored", "record_rows", "file_rows", "assembly", "editing", "flops", "contrastive",
    "exported", "judge",
}  # fmt: skip
TORCH_STACK = {"torch", "transformers", "diffusers", "torchvision"}
THIRD_PARTY = {
    "input_pipeline": {
        "numpy",
        "PIL",
        "grain",
        "cv2",
        "simplejpeg",
        "tensorflow_datasets",
        "array_record",
        "scipy",
        "tqdm",
    },
    "configs": {"ml_collections"},
    "conversion": {"numpy", "safetensors", "ml_dtypes"},
}
NOT_FOR_MODELS = {"orbax", "ml_collections", "absl", "PIL", "cv2", "grain", "optax", "tensorboardX"}


def room_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "truepose_jax" else parts[1]


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in {"input_pipeline", "configs"}:
        return parts[0]
    if parts[0] == "truepose_jax":
        return parts[1] if len(parts) > 1 else "__init__"
    return None


def imports_of(path: pathlib.Path):
    """(module, is it at the top level) for every import; `from truepose_jax import x` counts as truepose_jax.x."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            if node.module == "truepose_jax":
                for alias in node.names:
                    yield f"truepose_jax.{alias.name}", id(node) not in inside
            else:
                yield node.module, id(node) not in inside


def house_files():
    for folder in ("truepose_jax", "input_pipeline", "configs"):
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", list(house_files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_table(path):
    room = room_of(path)
    for module, top_level in imports_of(path):
        other, package = room_of_module(module), module.split(".")[0]
        if other is not None and other not in {room, "__init__"}:
            if room in HOUSE:
                assert other in HOUSE[room], f"{room} may not import {module}"
            elif room in PROGRAMS or room in PARTS:
                assert other not in PROGRAMS or room == "demo", f"{room}: programs do not import programs ({module})"
            else:
                raise AssertionError(
                    f"{path}: unknown room '{room}'; add it to the table HOUSE and say there what it may import"
                )
        if package in TORCH_STACK:
            assert not top_level and room in {"prepare", "study", "convert", "evaluate"}, (
                f"{room}: {module} is behind [torch]"
            )
        if room in THIRD_PARTY and other is None:
            stdlib = package in __import__("sys").stdlib_module_names
            assert stdlib or package in THIRD_PARTY[room] | {"truepose_jax"}, f"{room} may not import {module}"
        if room == "models":
            assert package not in NOT_FOR_MODELS, f"models do no I/O and no training: {module}"


def test_no_file_is_over_500_lines():
    for folder in ("truepose_jax", "input_pipeline", "configs", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"


def test_tensorflow_and_torch_stay_off_the_training_path():
    """Importing the trainer loads neither, and stays quick to start."""
    heavy = ("torch", "tensorflow", "diffusers", "transformers")
    code = f"import sys, truepose_jax.train; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", code)[:2] == (0, "[]\n")
