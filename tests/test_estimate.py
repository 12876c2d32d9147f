"""The memory estimate: by hand on small functions, against XLA's account of a compiled gradient, and as people read it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from truepose_jax.estimate import GIB, Estimate, estimate, peak_bytes, report

KIB = 1024
X = jax.ShapeDtypeStruct((256,), np.float32)
"""1 KiB."""


def peak(function, *arguments) -> int:
    return peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    ("function", "kib"),
    [
        (lambda x: jnp.sin(jnp.sin(x)), 1),  # the second in place of the first
        (lambda x: jnp.cumsum(jnp.cumsum(x)), 2),  # not elementwise: operand and result
        (lambda x: jnp.sin(x.reshape(16, 16)).reshape(256), 1),  # reshapes are free
        (lambda x: jnp.cumsum(x) + jnp.cumsum(x[::-1]), 3),
        (lambda x: x + jnp.broadcast_to(jnp.float32(1), (256,)), 1),
        (lambda x: jax.lax.cond(True, lambda y: jnp.cumsum(jnp.cumsum(y)), jnp.sin, x), 2),  # inside a branch
    ],
)
def test_small_functions(function, kib):
    assert abs(peak(function, X) - kib * KIB) < 64


def mlp(remat):
    layer = lambda w, x: jnp.tanh(jax.nn.softmax(x @ w) @ w)  # noqa: E731
    layer = jax.checkpoint(layer) if remat else layer

    def loss(ws, x):
        for w in ws:
            x = layer(w, x)
        return jnp.mean(x**2)

    return jax.grad(loss)


def test_against_xla():
    """Gradient of eight layers: what XLA allots, at two batch sizes. The trace keeps more of each softmax than XLA does."""
    ws = [jax.ShapeDtypeStruct((64, 64), np.float32)] * 8
    for batch in (512, 2048):
        x = jax.ShapeDtypeStruct((batch, 64), np.float32)
        found = jax.jit(mlp(False)).lower(ws, x).compile().memory_analysis()
        theirs = found.temp_size_in_bytes + found.output_size_in_bytes
        assert 0.8 < peak(mlp(False), ws, x) / theirs < 1.4


def test_rematerialisation_keeps_one_array_a_layer():
    ws = [jax.ShapeDtypeStruct((64, 64), np.float32)] * 8
    x = jax.ShapeDtypeStruct((2048, 64), np.float32)
    assert peak(mlp(True), ws, x) < 0.75 * peak(mlp(False), ws, x)


def test_of_a_configuration():
    config = tiny.config(tiny.MIDDLE_ONLY, {"optim": {"ema_decay": 0.9}})
    found = estimate(config)
    count = sum(found.networks.values())
    assert found.parameters == found.ema == 4 * count and found.trained == count
    assert found.optimizer == pytest.approx(8 * count, rel=0.01) and found.frozen == 0
    assert found.step_per_image > 0 and found.step_fixed >= 0
    text = report(config, found)
    assert f"{count:,}" in text and "16x10, float32" in text
    half = estimate(tiny.config(tiny.MIDDLE_ONLY, {"optim": {"ema_decay": 0.9, "trainable": "^target_net/"}}))
    assert half.optimizer < 0.6 * found.optimizer and half.step_per_image < found.step_per_image


def test_largest_batch():
    found = Estimate({}, 4 * GIB, 0, 8 * GIB, 0, GIB, step_fixed=4 * GIB, step_per_image=GIB // 2)
    assert found.largest_batch(16 * GIB) == 0
    assert found.largest_batch(20 * GIB) == 6
    assert found.largest_batch(16 * GIB, fsdp=8) == 26
