"""What test_tpu_aot.py compiles for a v5e in an environment with libtpu: odd sizes, float32, plain attention, four chips."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing here holds a TPU that another process could want

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from truepose_jax.kernels.attention import api
from truepose_jax.runtime.sharding import AXES, BATCH_AXES

CALLS = (
    # batch, queries, keys, heads, head width, dtype, key mask
    (4, 12, 12, 8, 160, "bfloat16", "reweighted"),
    (4, 300, 700, 8, 40, "bfloat16", "reweighted"),
    (4, 257, 131, 6, 33, "float32", "reweighted"),
    (4, 2816, 2816, 8, 40, "bfloat16", None),
    (4, 704, 704, 8, 80, "bfloat16", "plain"),
    (3, 176, 176, 3, 160, "bfloat16", "reweighted"),
    # By pallas_tpu.vmem_bytes 15.5 and 12.4 of 16 MiB: the first is the most that it admits, near it.
    (3, 512, 512, 5, 160, "float32", "reweighted"),
    (3, 2048, 2048, 8, 120, "float32", "reweighted"),
)
SIZES = (1, 2, 2)


def main():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(SIZES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    for b, n, m, g, d, dtype, mask in CALLS:
        batch = BATCH_AXES if b % 2 == 0 else None
        place = NamedSharding(mesh, PartitionSpec(batch, None, "tensor" if g % 2 == 0 else None))

        def run(q, k, v, bits, d_out, mask=mask):
            def attend(q, k, v):
                if mask == "reweighted":
                    return api.reweighted_attention(q, k, v, bits, implementation="pallas_tpu")
                return api.attention(q, k, v, key_mask=bits if mask else None, implementation="pallas_tpu")

            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(d_out)

        q, k = (jax.ShapeDtypeStruct((b, length, g, d), jnp.dtype(dtype), sharding=place) for length in (n, m))
        bits = jax.ShapeDtypeStruct((b, m), bool, sharding=NamedSharding(mesh, PartitionSpec(batch)))
        with jax.set_mesh(mesh):
            program = jax.jit(run).lower(q, k, k, bits, q).compile()
        assert program.as_text().count("tpu_custom_call") >= 3, "no kernel was compiled"


if __name__ == "__main__":
    main()
