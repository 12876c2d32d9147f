"""CAA (Eq. 9) against the oracle: scores, the choice of regions, values and gradients. Every weight is random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import oracle, tiny
from truepose_jax.models.attention import Site
from truepose_jax.models.caa import CAA, CAASource, lowest_regions, region_scores
from truepose_jax.models.hpfa import SourceAttention

SITE = Site(name="site", level=0, channels=8, heads=2)
TOKEN = 6
PATHS = {
    "to_k": ("source", "to_k", "kernel"),
    "to_v": ("source", "to_v", "kernel"),
    "to_q": ("target", "to_q", "kernel"),
    "out": ("target", "to_out_0", "kernel"),
    "out_bias": ("target", "to_out_0", "bias"),
}


@functools.partial(jax.jit, static_argnames="regions")
def run(params, q, k, coverage, tokens, present, x, keep=None, *, regions=2):
    source = SourceAttention(*(a.reshape(*a.shape[:2], 2, -1) for a in (q, k)))
    caa = CAASource(SITE, regions=regions)
    kv = caa.apply({"params": params["source"]}, tokens, present, region_scores(source, coverage), keep)
    return CAA(SITE).apply({"params": params["target"]}, x, kv)


@functools.cache
def params():
    def init():
        flat = jnp.zeros((1, 3, 8))
        tokens, present = jnp.zeros((1, 4, TOKEN)), jnp.ones((1, 4), bool)
        kv, made = CAASource(SITE).init_with_output(jax.random.key(0), tokens, present, jnp.zeros((1, 4)))
        return {"source": made["params"], "target": CAA(SITE).init(jax.random.key(1), flat, kv)["params"]}

    return tiny.randomise(jax.eval_shape(init), 1)


def as_oracle(p):
    return {name: np.asarray(p[a][b][c], np.float64) for name, (a, b, c) in PATHS.items()}


def inputs(seed, n, *, queries=None, classes=6, batch=3):
    """q', k' [b n 8], coverage [b n p] that sums to 1 over classes, class 2 nowhere; tokens, present, hidden state."""
    rng = np.random.default_rng(seed)
    q, k = (2 * rng.standard_normal((batch, n, 8)).astype(np.float32) for _ in range(2))
    coverage = rng.random((batch, n, classes)) ** 4
    coverage[:, :, 2] = 0
    coverage = (coverage / coverage.sum(-1, keepdims=True)).astype(np.float32)
    tokens = 2 * rng.standard_normal((batch, classes, TOKEN)).astype(np.float32)
    present = np.ones((batch, classes), bool)
    present[:, [0, 2]] = False  # background, and the class that is nowhere
    x = rng.standard_normal((batch, queries or n, 8)).astype(np.float32)
    return q, k, coverage, tokens, present, x


def expected(p, q, k, coverage, tokens, present, x, *, regions=2, xp=np):
    rows = []
    for i in range(len(q)):
        average = oracle.average_scores(q[i], k[i], coverage[i], heads=2)
        chosen = oracle.chosen_regions(average, present[i], regions)
        rows.append(oracle.caa(xp, p, x[i], tokens[i], chosen, heads=2))
    return xp.stack(rows)


@pytest.mark.parametrize("n", [5 * 3, 7 * 4])
def test_scores_equal_the_full_average(n):
    """O(n) against the mean over heads, queries and coverage-weighted keys of the whole n x n x heads A'."""
    q, k, coverage, *_ = inputs(n, n)
    got = region_scores(SourceAttention(*(a.reshape(*a.shape[:2], 2, 4) for a in (q, k))), coverage)
    assert np.all(np.asarray(got)[:, 2] == 0)
    for i in range(len(q)):
        want = oracle.average_scores(*(a[i].astype(np.float64) for a in (q, k, coverage)), heads=2)
        assert sorted(want) == [0, 1, 3, 4, 5]
        np.testing.assert_allclose(np.asarray(got)[i, sorted(want)], [want[r] for r in sorted(want)], atol=1e-6)


def test_the_lowest_present_regions():
    scores = np.array([[5.0, -1, 3, -9, 0], [1, 2, 3, 4, 5], [0, 0, 7, 0, 0], [1, 2, 3, 4, 5]], np.float32)
    present = np.array([[1, 1, 1, 0, 1], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    index, valid = lowest_regions(scores, present, 2)
    np.testing.assert_array_equal(valid, [[1, 1], [1, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(index[:2], [[1, 4], [2, 3]])
    assert index[2, 0] == 2


@pytest.mark.parametrize("n,queries,regions", [(5 * 3, 5 * 3, 2), (7 * 4, 5 * 1, 2), (6, 4, 1), (6, 4, 3)])
def test_values(n, queries, regions):
    made = inputs(n + regions, n, queries=queries)
    want = expected(as_oracle(params()), *(a.astype(np.float64) for a in made), regions=regions)
    assert tiny.error(run(params(), *made, regions=regions), want) < 2e-5


def test_fewer_regions_than_slots():
    """K = 4 with 3, 1 and no region present: the empty slots take no attention; without any, exactly the bias."""
    q, k, coverage, tokens, present, x = inputs(7, 15)
    present[:] = False
    present[0, [1, 3, 5]] = True
    present[1, 4] = True
    got = run(params(), q, k, coverage, tokens, present, x, regions=4)
    want = expected(as_oracle(params()), q, k, coverage, tokens, present, x, regions=4)
    assert tiny.error(got[:2], want[:2]) < 2e-5
    bias = params()["target"]["to_out_0"]["bias"]
    np.testing.assert_array_equal(got[2], np.broadcast_to(bias, got[2].shape))
    none = CAA(SITE).apply({"params": params()["target"]}, x, None)
    np.testing.assert_array_equal(none[0, 0], bias)


def test_absent_region_and_its_token_change_nothing():
    """Whatever stands in the tokens of absent regions, NaN included."""
    q, k, coverage, tokens, present, x = inputs(8, 15)
    base = run(params(), q, k, coverage, tokens, present, x)
    junk = np.where(present[..., None], tokens, np.nan)
    np.testing.assert_array_equal(run(params(), q, k, coverage, junk, present, x), base)


def test_gradients():
    """By every weight, the tokens and the hidden state, of samples with two, one and no region present."""
    q, k, coverage, tokens, present, x = inputs(11, 9, queries=8)
    present[1] = np.arange(6) == 3
    present[2] = False
    noise = np.random.default_rng(0).standard_normal((*x.shape[:2], 8))

    def loss(p, tokens, x):
        return jnp.sum(run(p, q, k, coverage, tokens, present, x) * noise)

    by_params, by_tokens, by_x = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params(), tokens, x)
    got = as_oracle(by_params) | {"tokens": by_tokens, "x": by_x}
    arrays = as_oracle(params()) | {"tokens": tokens.astype(np.float64), "x": x.astype(np.float64)}
    tensors = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in arrays.items()}
    out = expected(tensors, q, k, coverage, tensors["tokens"], present, tensors["x"], xp=torch)
    (out * torch.from_numpy(noise)).sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad.abs().max() > 1e-3, f"{name} has no gradient: the test would see nothing"
        assert tiny.error(got[name], tensor.grad.numpy()) < 3e-5, name
    assert not np.any(by_tokens[2]) and not np.any(by_x[2])


def test_no_gradient_through_the_choice():
    """Q' and K' get exactly none from CAA, which reads them to choose only."""
    q, k, coverage, tokens, present, x = inputs(12, 15)

    def loss(q, k):
        return jnp.sum(run(params(), q, k, coverage, tokens, present, x) ** 2)

    for grad in jax.jit(jax.grad(loss, argnums=(0, 1)))(q, k):
        assert not np.any(grad)
