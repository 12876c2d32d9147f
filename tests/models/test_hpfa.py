"""HPFA (Eq. 6 to 8) against the oracle: values, and gradients by every parameter and input. Every weight is random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import oracle, tiny
from truepose_jax.kernels.attention import reference
from truepose_jax.models.attention import Site
from truepose_jax.models.hpfa import HPFA, FusionConfig, HPFASource

SITE = Site(name="site", level=0, channels=8, heads=2)
FROM_SOURCE = {f"source_to_{x}": ("source", f"source_to_{x}", "kernel") for x in "qkv"} | {
    f"to_{x}": ("source", f"to_{x}", "kernel") for x in "kv"
}
FROM_TARGET = {
    "to_q": ("target", "to_q", "kernel"),
    "norm_scale": ("target", "norm", "scale"),
    "norm_bias": ("target", "norm", "bias"),
    "out": ("target", "to_out_0", "kernel"),
    "out_bias": ("target", "to_out_0", "bias"),
}
PATHS = FROM_SOURCE | FROM_TARGET
"""The oracle's name of a weight -> its place in our tree."""


@functools.partial(jax.jit, static_argnames="config")
def run(params, features, x, mask, keep=None, *, config):
    """(update, k_h, v_h) of the two halves of our HPFA."""
    source, undropped = HPFASource(SITE, config).apply({"params": params["source"]}, features, mask, keep)
    del undropped
    update, _ = HPFA(SITE, config).apply({"params": params["target"]}, x, source)
    return update, source.k, source.v


@functools.cache
def params():
    def init():
        source, target = HPFASource(SITE, FusionConfig()), HPFA(SITE, FusionConfig())
        f, mask = jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), bool)
        (kv, _), p = source.init_with_output(jax.random.key(0), f, mask)
        return {"source": p["params"], "target": target.init(jax.random.key(1), f, kv)["params"]}

    return tiny.randomise(jax.eval_shape(init), 3)


def as_oracle(p):
    """{oracle's name: float64} of our tree."""
    return {name: np.asarray(p[a][b][c], np.float64) for name, (a, b, c) in PATHS.items()}


def inputs(seed, keys, queries, batch=2):
    """Features of large logits, so that a wrong weight shows."""
    rng = np.random.default_rng(seed)
    features = 2 * rng.standard_normal((batch, keys, 8)).astype(np.float32)
    x = 2 * rng.standard_normal((batch, queries, 8)).astype(np.float32)
    mask = rng.random((batch, keys)) < 0.4
    return features, x, mask


def expected(p, features, x, mask, xp=np, **settings):
    found = [oracle.hpfa(xp, p, f, row, m, heads=2, **settings) for f, row, m in zip(features, x, mask, strict=True)]
    return [xp.stack(parts) for parts in zip(*found, strict=True)]


MASKS = ("random", "empty", "full")


def with_mask(mask, kind):
    return {"random": mask, "empty": mask & False, "full": mask | True}[kind]


@pytest.mark.parametrize(
    "tokens,kind,changes",
    [
        *(((5 * 3, 5 * 3), kind, {}) for kind in MASKS),
        *(((7 * 2, 7 * 2), kind, {"reading": "prose"}) for kind in MASKS),
        *(((5 * 3, 5 * 3), "random", {"mask_axis": axis}) for axis in ("query", "outer", "none")),
        ((5 * 3, 5 * 3), "random", {"mask_axis": "outer", "reading": "prose"}),
        ((5 * 3, 5 * 3), "random", {"delta": 0.1, "sigma": 0.9}),
        ((7 * 4, 5 * 3), "random", {}),  # more keys than queries
        ((1, 6), "full", {}),  # one key
        ((1, 6), "empty", {}),
    ],
)
def test_values(tokens, kind, changes):
    features, x, mask = inputs(sum(tokens), *tokens)
    mask = with_mask(mask, kind)
    ours = run(params(), features, x, mask, config=FusionConfig(**changes))
    want = expected(as_oracle(params()), features, x, mask, **changes)
    assert tiny.error(ours[0], want[0]) < 2e-5
    for got, flat in zip(ours[1:], want[1:], strict=True):
        assert tiny.error(got.reshape(flat.shape), flat) < 2e-5


@pytest.mark.parametrize(
    "tokens,kind,changes",
    [
        ((5 * 3, 5 * 3), "random", {}),
        ((7 * 2, 3 * 2), "random", {"reading": "prose"}),
        ((3 * 3, 5 * 1), "empty", {}),
        ((3 * 3, 5 * 1), "full", {}),
        ((3 * 3, 3 * 3), "random", {"mask_axis": "outer"}),
    ],
)
def test_gradients(tokens, kind, changes):
    """Of sum(update * noise), by every weight, F' and the hidden state; torch's autograd over the oracle's loops."""
    features, x, mask = inputs(1 + sum(tokens), *tokens, batch=1)
    mask = with_mask(mask, kind)
    noise = np.random.default_rng(0).standard_normal(x.shape)

    def loss(p, f, h):
        return jnp.sum(run(p, f, h, mask, config=FusionConfig(**changes))[0] * noise)

    by_params, by_features, by_x = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params(), features, x)
    got = as_oracle(by_params) | {"features": by_features, "x": by_x}

    arrays = as_oracle(params()) | {"features": features.astype(np.float64), "x": x.astype(np.float64)}
    tensors = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in arrays.items()}
    value = expected(tensors, tensors["features"], tensors["x"], mask, xp=torch, **changes)[0]
    (value * torch.from_numpy(noise)).sum().backward()

    for name, tensor in tensors.items():
        assert tensor.grad.abs().max() > 1e-3, f"{name} has no gradient: the test would see nothing"
        assert tiny.error(got[name], tensor.grad.numpy()) < 3e-5, name


@pytest.mark.parametrize("reading", ["printed", "prose"])
@pytest.mark.parametrize("inside", [True, False])
def test_eq6_moves_every_logit_as_the_paper_says(reading, inside):
    """delta 0.6, sigma 0.3: in-mask logits become 1.6a or 0.6a and rise; printed, out-of-mask ones 0.3a or 1.3a, and
    fall (docs/paper.md 1). Monotone and continuous in a."""
    a = np.linspace(-4, 4, 81)
    a = a[a != 0]
    sides = reference.eq6_slopes(0.6, 0.3, reading)
    slope, kink = sides[0] if inside else sides[1]
    moved = slope * a + kink * np.maximum(a, 0)
    want = [oracle.weight_eq6(x, inside, delta=0.6, sigma=0.3, reading=reading) * x for x in a]
    np.testing.assert_allclose(moved, want, rtol=1e-12)
    assert np.all(np.diff(moved) > 0)
    if inside:
        np.testing.assert_allclose(moved / a, np.where(a > 0, 1.6, 0.6))
        assert np.all(moved > a)
    elif reading == "printed":
        np.testing.assert_allclose(moved / a, np.where(a > 0, 0.3, 1.3))
        assert np.all(moved < a)


def test_the_score_of_caa_is_taken_before_dropping():
    features, _, mask = inputs(4, 15, 15)
    call = HPFASource(SITE, FusionConfig()).apply
    p = {"params": params()["source"]}
    kept, dropped = call(p, features, mask)[1], call(p, features, mask, np.zeros(2, np.float32))[1]
    np.testing.assert_array_equal(kept.q, dropped.q)
    np.testing.assert_array_equal(kept.k, dropped.k)
    assert np.any(kept.q)


@pytest.mark.parametrize("changes", [{"mask_axis": "rows"}, {"reading": "loud"}, {"init": "ones"}, {"regions": 0}])
def test_unknown_settings(changes):
    with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]):
        FusionConfig(**changes)
