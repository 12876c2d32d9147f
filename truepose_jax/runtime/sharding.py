"""Meshes, logical axes and parameter placement: the one place that knows how arrays lie on devices."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_AXES: Mapping[str, tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "height": None,
    "width": None,
    "channels": None,
    "tokens": None,
    "heads": ("tensor",),
    "classes": None,
}
"""Logical activation axis -> mesh axes. A name that is not here is an error, never a silent copy (docs/paper.md 11)."""


ABOVE_ALL_MIB = 1_000_000
"""No activation has so many; XLA's own threshold is 100."""


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices with axes data, fsdp, tensor; one of the sizes may be -1 (the rest).

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or (free and len(devices) % fixed):
        raise ValueError(f"mesh sizes {sizes} do not fit {len(devices)} devices")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh sizes {sizes} use {math.prod(sizes.values())} devices; there are {len(devices)}")
    # Auto axes: with make_mesh's default (Explicit) Linen and plain jnp code would have to name every sharding.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What a train step over this mesh is compiled with beside the compiler's own choices.

    On TPUs no product goes round in a ring while its matrix comes in ("collective matmul"), as XLA has it under FSDP: its
    schedule then holds most blocks' activations and gradients at once. SD1.5, 256x176, 63 images a chip, FSDP over a v5e:4x4:
    temporaries of 20.5 GiB with the rings, 7.6 without (compiled; which is faster was not measured).
    """
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": ABOVE_ALL_MIB} if is_tpu else None


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the global batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@functools.cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): of every global batch, cut into `count` equal blocks, this process loads block `index`.

    Processes whose devices hold the same rows, as those of one tensor group do, load the same block. A process's rows may
    lie apart: JAX lays the mesh along a TPU slice's wires, which run in and out of its hosts (v5e:4x4, data 16: host 0
    holds parts 0, 1, 6 and 15). Its block then fills them in order, so each row is there once, but not in the order of
    one host. Raises ValueError where two processes hold some rows in common and others not.
    """
    held = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).devices_indices_map((batch_parts(mesh),))
    return _share_of(held, jax.process_index())


def _share_of(held: Mapping[Any, tuple[slice, ...]], process: int) -> tuple[int, int]:
    """held: device -> the part of the batch that it holds."""
    parts: dict[int, set[int]] = {}
    for device, (part,) in held.items():
        parts.setdefault(device.process_index, set()).add(part.start or 0)
    blocks = sorted({tuple(sorted(found)) for found in parts.values()})
    uneven = len({len(block) for block in blocks}) > 1
    if uneven or sum(map(len, blocks)) != len(set().union(*blocks)):
        raise ValueError(
            f"the batch cannot be cut by processes: process {min(parts)} holds its parts {sorted(parts[min(parts)])} and "
            f"process {max(parts)} {sorted(parts[max(parts)])}; let tensor divide, or be a multiple of, a process's devices"
        )
    return blocks.index(tuple(sorted(parts[process]))), len(blocks)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Pins an activation's layout by logical axis names, one per dimension. Outside a mesh: returns x.

    Raises KeyError for an unknown name and ValueError for a wrong count.
    """
    spec = PartitionSpec(*(LOGICAL_AXES[name] for name in names))
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names for an array of {x.ndim} dimensions")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if mesh.manual_axes:  # inside a shard_map x is already this device's part along those
        spec = PartitionSpec(*(tuple(axis for axis in a or () if axis not in mesh.manual_axes) or None for a in spec))
    return jax.lax.with_sharding_constraint(x, spec)


def path_of(key_path: Sequence[Any]) -> str:
    """'source_net/conv_in/kernel' for a jax key path."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in key_path)


Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""A method's `param_rules`: (regex over 'a/b/kernel' paths, a mesh axis or None per dimension); the first that fits serves."""

WHOLE_BELOW = 1 << 16
"""Elements of the smallest array that fsdp cuts: each cut one is a message of its own, and norms and biases are most of the
arrays and next to nothing of the memory."""


def param_specs(params: Any, mesh: Mesh, rules: Rules, *, whole_below: int = WHOLE_BELOW) -> Any:
    """A NamedSharding for every parameter: the first rule that finds its path and has its number of dimensions places
    `tensor`; of the remaining dimensions fsdp cuts the largest that it divides. What nothing divides, and what has fewer than
    whole_below elements, fsdp leaves whole.

    Raises ValueError for a rule that places no parameter: misspelt, it would leave a network whole without a word.
    """
    used = set()

    def place(key_path, leaf) -> NamedSharding:
        path, axes = path_of(key_path), (None,) * len(leaf.shape)
        for number, (pattern, named) in enumerate(rules):
            if len(named) == len(leaf.shape) and re.search(pattern, path):
                used.add(number)
                axes = named
                break
        spec = [a if a and leaf.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes)]
        free = [i for i, a in enumerate(spec) if a is None and leaf.shape[i] % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] > 1 and free and math.prod(leaf.shape) >= whole_below:
            spec[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    specs = jax.tree_util.tree_map_with_path(place, params)
    for number, (pattern, axes) in enumerate(rules):
        if number not in used:
            raise ValueError(
                f"the parameter rule {pattern!r} places no parameter of {len(axes)} dimensions; correct it, or take it out"
            )
    return specs


def like_params(state: Any, params: Any, specs: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameter tree (optimizer moments, EMA) among other leaves.

    A leaf whose path ends with a parameter's path and has its shape lies as that parameter; the rest is replicated.
    """
    by_path = {
        path_of(key_path): (leaf.shape, spec)
        for (key_path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(key_path, leaf):
        parts = path_of(key_path).split("/")
        for start in range(len(parts)):
            shape, spec = by_path.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return spec
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts host arrays, the same on every process, whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    if whole.is_fully_addressable:
        return jax.device_put(tree, whole)
    hosted = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), hosted)


def put_global_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's block (batch_share) of every field -> global arrays cut along their first axis over data x fsdp."""
    sharding, (_, count) = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), batch_share(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (len(array) * count, *array.shape[1:]))
        for name, array in batch.items()
    }


def put_whole_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The same, where every process holds all rows (evaluation)."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, a=array: a[index])
        for name, array in batch.items()
    }
