"""The gradient noise scale on eight devices: what tests/runtime/sharded.py runs for it."""

import jax
import numpy as np
import optax

from tests import tiny
from tests.training.test_step import FROZEN, Toy, toy_batch
from truepose_jax.runtime.sharding import make_mesh, put_global_batch, replicate
from truepose_jax.scaling.collectives import collective_bytes
from truepose_jax.training.noise_scale import BIG_SQ, SMALL_BATCH, SMALL_SQ
from truepose_jax.training.step import Trainer

ON = {"batch_size": 8, "optim": {"noise_scale": "on"}}


def gradients(method, cfg, params, frozen, batch, keys, **mesh):
    made = make_mesh(**mesh)
    with jax.set_mesh(made):
        call = jax.jit(Trainer(cfg, method).gradients, compiler_options=tiny.compiler_options())
        lowered = call.lower(params, frozen, put_global_batch(made, batch), replicate(made, keys))
        compiled = lowered.compile()
        found = compiled(params, frozen, put_global_batch(made, batch), replicate(made, keys))
    return jax.device_get(found), collective_bytes(compiled.as_text(), made.size)


def toy():
    """Four shares of the data axis, one of which holds no valid row; each share's gradient by hand."""
    batch = toy_batch(0, targets=16, sources=8)
    batch["valid"][[1, 12, 13, 14, 15]] = 0
    params, keys = Toy().init(jax.random.key(0), {}), tiny.keys(1, 16)
    (grads, metrics), sent = gradients(Toy(), tiny.config(ON), params, FROZEN, batch, keys, data=4, fsdp=2, tensor=1)

    def by_hand(rows):
        mine = {
            name: x[(rows if name != "source" else slice(rows.start // 2, rows.stop // 2))] for name, x in batch.items()
        }
        return tiny.named(jax.grad(lambda p: Toy().loss(p, FROZEN, mine, keys[rows])[0])(params))

    def squared(tree):
        return sum(float(np.sum(np.square(leaf))) for leaf in tree.values())

    shares = [3 / 11, 4 / 11, 4 / 11]
    parts = [by_hand(slice(4 * i, 4 * i + 4)) for i in range(3)]
    want = {name: sum(s * g[name] for s, g in zip(shares, parts, strict=True)) for name in parts[0]}
    return {
        "gradient": tiny.error(tiny.named(grads), want),
        "small": float(metrics[SMALL_SQ]) / sum(s * squared(g) for s, g in zip(shares, parts, strict=True)),
        "big": float(metrics[BIG_SQ]) / squared(want),
        "small_batch": float(metrics[SMALL_BATCH]),
        "all_reduce": sent["all-reduce"]["operand_bytes"],
    }


def truepose(made, params, batch, keys, whole):
    """On all three axes, against the metrics of one device."""
    cfg = tiny.config(tiny.MIDDLE_ONLY, ON)
    (grads, metrics), _ = gradients(made, cfg, params, {}, batch, keys, data=2, fsdp=2, tensor=2)
    norm = float(optax.tree.norm(grads)) ** 2
    return {
        "loss": float(metrics["loss"]) / float(whole["loss"]),
        "kept": [float(whole["kept"]), float(metrics["kept"])],
        "rms": max(float(np.max(np.abs(metrics[n] / whole[n] - 1))) for n in whole if n.endswith("_rms")),
        "big": float(metrics[BIG_SQ]) / norm,
        "above": float(metrics[SMALL_SQ]) / norm,
    }
