"""The convolution that is a product where there are few cells, against jax.lax's, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from truepose_jax.models import layers


@pytest.mark.parametrize(
    ("hw", "stride", "padding"), [((6, 5), 1, 1), ((7, 5), 2, 1), ((6, 4), 2, ((0, 1), (0, 1))), ((1, 1), 1, 1)]
)
def test_few_cells(hw, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *hw, 4)), jnp.float32)
    ours = layers.conv3x3(8, jnp.float32, "conv", stride=stride, padding=padding)
    plain = nn.Conv(8, (3, 3), strides=stride, padding=padding)
    params = plain.init(jax.random.key(0), x)
    weight = jnp.asarray(rng.standard_normal(plain.apply(params, x).shape), jnp.float32)

    @tiny.jit
    def run(params, x):
        return [
            (net.apply(params, x), jax.grad(lambda p, x, n=net: jnp.vdot(n.apply(p, x), weight), (0, 1))(params, x))
            for net in (ours, plain)
        ]

    found, expected = run(params, x)
    assert tiny.error(found, expected) < 1e-5
    products = str(jax.make_jaxpr(ours.apply)(params, x))
    assert "dot_general" in products and "conv_general_dilated" not in products


def test_many_cells_and_accelerators_convolve(monkeypatch):
    conv = layers.conv3x3(4, jnp.float32, "conv")
    params = conv.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
    assert "conv_general_dilated" in str(jax.make_jaxpr(conv.apply)(params, jnp.zeros((2, 9, 8, 3))))
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    assert "conv_general_dilated" in str(jax.make_jaxpr(conv.apply)(params, jnp.zeros((1, 2, 2, 3))))
