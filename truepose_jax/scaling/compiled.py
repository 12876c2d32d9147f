"""The train step of a configuration, compiled for devices that are here or only described, and what that tells."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from truepose_jax.config import Config
from truepose_jax.data.datasets import training_form
from truepose_jax.pretrained.factory import planned
from truepose_jax.runtime.sharding import BATCH_AXES, make_mesh
from truepose_jax.scaling.collectives import collective_bytes, wire_bytes
from truepose_jax.training.init import abstract_state, batch_spec
from truepose_jax.training.step import Trainer

LITTLE_EFFORT = {
    "cpu": {"xla_backend_optimization_level": 0},
    "tpu": {"exec_time_optimization_effort": -1.0},
}
"""Compiler options for programs that are not run: on CPU the buffers are the same and it takes half the time; on TPU
minutes instead of tens of minutes (docs/paper.md 11), with fusions that a full compilation would improve."""


def mesh_of(config: Config, devices: Sequence[Any]) -> Mesh:
    """The configuration's mesh over these devices. Raises ValueError where it does not fit."""
    return make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor, devices=devices)


def compile_step(config: Config, mesh: Mesh, *, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
    """The train step on the mesh, from shapes alone, as the trainer jits it."""
    method, shapes = planned(config)
    whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    with jax.set_mesh(mesh):
        trainer = Trainer(config, method)
        state = abstract_state(config, trainer, mesh)
        frozen = placed(shapes, whole)
        batch = placed(batch_spec(config, targets=config.batch_size, form=training_form(config)), cut)
        return trainer.jitted(state).lower(state, frozen, batch).compile(compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one device: bytes in use during a step (arguments + results + temporaries - donated), FLOPs and HBM bytes of a
    step as XLA counts them (loops once; a Pallas kernel counts as nothing), and what it sends (collectives.py)."""

    bytes: int
    argument_bytes: int
    temporary_bytes: int
    flops: float
    hbm_bytes: float
    collectives: dict[str, dict[str, float]]
    wire_bytes: float
    compile_seconds: float


def facts(config: Config, mesh: Mesh, *, little_effort: str = "") -> Facts:
    """Compiles and tells. little_effort: a key of LITTLE_EFFORT, or "" for the compiler's defaults."""
    start = time.perf_counter()
    compiled = compile_step(config, mesh, options=LITTLE_EFFORT.get(little_effort))
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sent = collective_bytes(compiled.as_text(), mesh.size) if mesh.size > 1 else {}
    return Facts(
        bytes=total_bytes(memory),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        hbm_bytes=float(cost.get("bytes accessed", 0.0)),
        collectives=sent,
        wire_bytes=wire_bytes(sent),
        compile_seconds=round(seconds, 2),
    )


def total_bytes(memory: Any) -> int:
    """Bytes that a program holds while it runs."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
