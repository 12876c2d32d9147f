"""What test_contract.py runs in a process of its own, on eight pretended devices: methods on a mesh of all three
axes, against one device (a folder of METHOD.npz: its loss and gradients); prints one JSON object. TruePose's meshes are in
tests/runtime/sharded.py; FPDM has the rules and the UNet of IMAGPose."""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny, tiny_methods
from truepose_jax.runtime.sharding import make_mesh, param_specs, put_global_batch, replicate
from truepose_jax.training.step import Trainer

CUT = ("ipf", "imagpose")
ROWS = 4


def moving(gradients):
    """Without those of CLIP's key biases, which are 0 but for rounding: they shift all logits of a query alike."""
    return {name: x for name, x in gradients.items() if not name.endswith("k_proj/bias")}


def main(folder):
    assert jax.device_count() == 8
    report = {}
    for name in CUT:
        want = dict(np.load(f"{folder}/{name}.npz"))
        loss = float(want.pop("loss"))
        cfg, made, frozen, params = tiny_methods.one(name)
        params, frozen = jax.device_get((params, frozen))
        batch, keys, trainer = tiny_methods.batch(cfg, 1, ROWS), tiny.keys(2, ROWS), Trainer(cfg, made)
        batch["valid"][1] = 0
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        specs = param_specs(params, mesh, made.param_rules, whole_below=0)
        whole = NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            inputs = jax.device_put(params, specs), replicate(mesh, frozen), put_global_batch(mesh, batch)
            call = jax.jit(trainer.gradients, out_shardings=(specs, whole), compiler_options=tiny.compiler_options())
            found, seen = call(*inputs, replicate(mesh, keys))
        # Worst array 1.1e-4, of a norm.
        tiny.check_gradients(moving(tiny.named(found)), moving(want), whole=2e-4, leaf=4e-4)
        cut = [axis for leaf in jax.tree.leaves(specs) for axis in leaf.spec]
        report[name] = {
            "loss": abs(float(seen["loss"]) / loss - 1),
            "cut": [*dict.fromkeys(filter(None, cut))],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
