"""What test_attention.py runs in a process of its own, on eight pretended devices; prints one JSON object."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.kernels import oracle64
from tests.kernels.test_attention import SIDES, case, worst
from truepose_jax.kernels.attention import api, xla
from truepose_jax.runtime.sharding import BATCH_AXES, make_mesh

MESHES = {"data": (8, 1, 1), "all": (2, 2, 2)}


def placed(mesh, arrays):
    """Images over data and fsdp, heads over tensor, where they divide."""

    def put(x):
        axes = [BATCH_AXES, None, "tensor", None][: x.ndim]
        sizes = [4 if mesh.shape["tensor"] == 2 else 8, 1, mesh.shape["tensor"], 1]
        spec = [axis if size % parts == 0 else None for axis, size, parts in zip(axes, x.shape, sizes, strict=False)]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    floats = (jnp.asarray(x, jnp.float32) for x in (arrays.q, arrays.k, arrays.v, arrays.d_out))
    q, k, v, d_out = map(put, floats)
    return q, k, v, put(arrays.mask), d_out


def mesh_of(name):
    return make_mesh(**dict(zip(("data", "fsdp", "tensor"), MESHES[name], strict=True)))


def step_of(name, *, by_data):
    """Output and gradients; by_data: inside a shard_map over the data axis alone."""

    def step(q, k, v, bits, d_out):
        def attend(q, k, v):
            return api.reweighted_attention(q, k, v, bits, implementation=name)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    cut = PartitionSpec("data")
    if by_data:
        step = jax.shard_map(step, in_specs=cut, out_specs=cut, axis_names={"data"}, check_vma=False)
    return jax.jit(step)


def run(name, mesh_name, b, g, by_data=False):
    """(error of output and gradients, the output)."""
    arrays, mesh = case(b + g, 37, 19, b=b, g=g), mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        found = step_of(name, by_data=by_data)(*placed(mesh, arrays))
    return worst(found, oracle64.answer(arrays, *SIDES)), found[0]


def mosaic_calls(mesh_name):
    """Kernels in the program that a TPU would be given."""
    mesh, platform = mesh_of(mesh_name), api.platform
    api.platform = lambda: "tpu"
    try:
        with jax.set_mesh(mesh):
            traced = step_of("pallas_tpu", by_data=True).trace(*placed(mesh, case(12, 37, 19, b=8, g=4)))
            return traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")
    finally:
        api.platform = platform


def main():
    assert jax.device_count() == 8
    errors, parts, seen = {}, {}, []
    attend = xla.attend

    def watched(q, k, v, rows):
        seen.append(k.shape)
        return attend(q, k, v, rows)

    xla.attend = watched
    for name, mesh, b, g, *by_data in (
        ("reference", "all", 4, 4),
        ("reference", "all", 3, 3),
        ("xla", "data", 8, 1),
        ("xla", "all", 4, 4),
        ("xla", "all", 3, 4),
        ("xla", "all", 2, 3),
        ("pallas_tpu", "all", 4, 4),
        ("pallas_tpu", "all", 3, 3),
        ("xla", "data", 8, 4, "by data"),
        ("xla", "all", 4, 4, "by data"),
    ):
        errors[" ".join((f"{name} {mesh} {b}x{g}", *by_data))], out = run(name, mesh, b, g, bool(by_data))
        if name == "xla" and mesh == "all" and not by_data:
            parts[f"{b}x{g}"] = out.addressable_shards[0].data.shape
    assert np.all([len(shape) == 4 for shape in seen])
    calls = {mesh: mosaic_calls(mesh) for mesh in MESHES}
    print(json.dumps({"errors": errors, "parts": parts, "kernel_sees": seen[1], "mosaic_calls": calls}))


if __name__ == "__main__":
    main()
