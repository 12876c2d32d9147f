"""What test_sharding.py runs in a process of its own, on eight pretended devices; prints one JSON object."""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from tests.training import noise_sharded
from tests.training.test_step import FROZEN, Toy, toy_batch
from truepose_jax.runtime import sharding
from truepose_jax.scaling.collectives import collective_bytes
from truepose_jax.training.step import Trainer

MESHES = {"fsdp": (1, 8, 1), "tensor": (2, 2, 2)}
"""Data alone: two processes, tests/training/test_killed.py."""
BATCH = 8
RATE = 0.1


def step(made):
    """(params, batch, keys) -> metrics, gradients, parameters after one step of SGD."""

    def call(params, batch, keys):
        grads, metrics = jax.grad(lambda p: made.loss(p, {}, batch, keys), has_aux=True)(params)
        return metrics, grads, jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    return call


def on_mesh(sizes, made, cfg, params, batch, keys, want):
    mesh = sharding.make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    specs = sharding.param_specs(params, mesh, made.param_rules, whole_below=0)
    placed = jax.device_put(params, specs)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        call = jax.jit(step(made), out_shardings=(whole, specs, specs), compiler_options=tiny.compiler_options())
        lowered = call.lower(placed, sharding.put_global_batch(mesh, batch), sharding.replicate(mesh, keys))
        compiled = lowered.compile()
        metrics, grads, moved = compiled(placed, sharding.put_global_batch(mesh, batch), sharding.replicate(mesh, keys))
        trainer = Trainer(cfg, made)
        state = jax.eval_shape(lambda: trainer.init_state(jax.random.key(0), tiny.spec(cfg)))
        layout = sharding.like_params(state, params, specs, mesh)
        begin = jax.jit(trainer.state_of, out_shardings=layout, compiler_options=tiny.compiler_options())
        whole_state = begin.lower(placed).compile()
    tiny.check_gradients(grads, want[1])
    tiny.check_gradients(moved, want[2])
    cut = {axis: 0 for axis in ("fsdp", "tensor")}
    shards_fit = True
    for leaf, spec in zip(jax.tree.leaves(placed), jax.tree.leaves(specs), strict=True):
        parts = 1
        for axis in cut:
            if axis in spec.spec and mesh.shape[axis] > 1:
                cut[axis] += leaf.size
                parts *= mesh.shape[axis]
        shards_fit &= leaf.addressable_shards[0].data.size * parts == leaf.size
    adam = [s for path, s in jax.tree_util.tree_leaves_with_path(layout.opt_state) if "/mu/" in sharding.path_of(path)]
    return {
        "loss": abs(float(metrics["loss"]) / float(want[0]["loss"]) - 1),
        "leaf": tiny.error(grads, want[1]),
        "gradients": apart(grads, want[1]),
        "moved": apart(moved, want[2]),
        # What one device holds, as the compiler counts it, over what all of it takes.
        "bytes": {
            "params": (
                compiled.memory_analysis().argument_size_in_bytes - bytes_of((batch, keys), sharding.batch_parts(mesh))
            )
            / bytes_of(params),
            "gradients": compiled.memory_analysis().output_size_in_bytes / bytes_of((params, params)),
            "state": whole_state.memory_analysis().output_size_in_bytes / bytes_of(state),
        },
        "cut": {axis: size / sum(leaf.size for leaf in jax.tree.leaves(params)) for axis, size in cut.items()},
        "shards_fit": bool(shards_fit),
        "moments_like_params": adam == jax.tree.leaves(specs),
        "ema_like_params": jax.tree.leaves(layout.ema) == jax.tree.leaves(specs),
        "step_replicated": layout.step.spec == PartitionSpec(),
        "constraints": lowered.as_text().count("sharding_constraint"),
    }


def apart(found, want):
    """Norm of the difference of two trees over the norm of the second."""
    a, b = (np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)]) for tree in (found, want))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def bytes_of(tree, parts=1):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / parts


def batches():
    mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
    host = {"valid": np.arange(8, dtype=np.float32), "target": np.arange(96, dtype=np.float32).reshape(8, 4, 3)}
    found = {}
    for name, put in (("global", sharding.put_global_batch), ("whole", sharding.put_whole_batch)):
        placed = put(mesh, host)
        rows = {tuple(np.asarray(s.data).tolist()) for s in placed["valid"].addressable_shards}
        found[name] = {
            "equal": all(np.array_equal(placed[k], host[k]) for k in host),
            "rows": sorted(rows),
            "shape": placed["target"].addressable_shards[0].data.shape,
        }
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "tokens", "heads"))(np.zeros((8, 3, 4)))
    return found | {"parts": sharding.batch_parts(mesh), "constrained": x.addressable_shards[0].data.shape}


def messages():
    """What eight normed layers send between eight devices in a step, [with every array cut, with small ones whole]."""
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    params = {
        f"layer{i}": {"kernel": np.ones((256, 256), np.float32), "scale": np.ones(256, np.float32)} for i in range(8)
    }

    def loss(params, x):
        for layer in params.values():
            x = jax.nn.relu(x * layer["scale"]) @ layer["kernel"]
        return (x**2).mean()

    x = jax.device_put(np.ones((64, 256), np.float32), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    found = []
    for whole_below in (0, sharding.WHOLE_BELOW):
        specs = sharding.param_specs(params, mesh, (), whole_below=whole_below)
        step = jax.jit(jax.grad(loss), out_shardings=specs).lower(jax.device_put(params, specs), x).compile()
        found.append(collective_bytes(step.as_text(), 8))
    return found


def adapters():
    """After a step of adapters alone: how far a mesh that cuts the frozen matrix is from one device, and where each lies."""
    lora = {"rank": 2, "targets": "^net/kernel$"}
    config = tiny.config({"init_from": "a base", "optim": {"lora": lora, "learning_rate": 0.1}})
    made, batch = Trainer(config, Toy(noise=0.0)), toy_batch(0, targets=8, sources=8)
    state = made.init_state(jax.random.key(7), {})
    want, _ = tiny.jit(made.step)(state, FROZEN, batch)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    specs = sharding.param_specs(state.params, mesh, (("^net/kernel$", ("tensor", None)),), whole_below=0)
    placed = jax.device_put(state, sharding.like_params(state, state.params, specs, mesh))
    with jax.set_mesh(mesh):
        found, _ = made.jitted(placed)(placed, sharding.replicate(mesh, FROZEN), sharding.put_global_batch(mesh, batch))
    where = {path: leaf.sharding.spec for path, leaf in parameters_of(found.params).items()}
    moments = {path: leaf.sharding.spec for path, leaf in parameters_of(found.opt_state).items() if "/mu/" in path}
    return {
        "apart": tiny.error(found.params, want.params),
        "cut": {path: list(spec) for path, spec in where.items() if any(spec)},
        "moments": {path.split("/mu/")[1]: list(spec) for path, spec in moments.items()},
    }


def parameters_of(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def main():
    assert jax.device_count() == 8
    cfg = tiny.config(tiny.MIDDLE_ONLY, {"batch_size": BATCH, "optim": {"ema_decay": 0.9}})
    made = tiny.method(cfg)
    params, batch = jax.device_get(tiny.params(made, cfg)), tiny.batch(cfg, 0, targets=BATCH)
    batch["valid"][3] = 0
    keys = tiny.keys(1, BATCH)
    want = tiny.jit(step(made))(params, batch, keys)
    found = {name: on_mesh(sizes, made, cfg, params, batch, keys, want) for name, sizes in MESHES.items()}
    noise = {"toy": noise_sharded.toy(), "truepose": noise_sharded.truepose(made, params, batch, keys, want[0])}
    print(json.dumps(found | {"batches": batches(), "messages": messages(), "adapters": adapters(), "noise": noise}))


if __name__ == "__main__":
    main()
