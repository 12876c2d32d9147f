"""What of HPFA is ours (carried latents, cosine logits, H = F' + H', limb coordinates, the account) against NumPy, and that
without it nothing of the paper's is touched."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle, tiny
from truepose_jax.kernels.attention import api
from truepose_jax.models import hpfa
from truepose_jax.models.attention import Site, layer_norm, merge_heads, split_heads
from truepose_jax.models.hpfa import HPFA, FusionConfig, HPFASource, KeysValues, attention_account

HEADS, WIDTH, LATENTS, LIMBS = 2, 8, 5, 6
SITE = Site(name="site", level=0, channels=WIDTH, heads=HEADS)
EVERYTHING = {"carry_latents": True, "cosine": True, "residual": True}
SWITCHES = {
    "none": {},
    "carry": {"carry_latents": True},
    "cosine": {"cosine": True},
    "residual": {"residual": True},
    "all": EVERYTHING,
    "limbs": EVERYTHING | {"limbs": True},
}


def inputs(seed=0, batch=2, keys=12, queries=9):
    """F', x, mask, latents, (limbs of the source, of the target)."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal((batch, *shape)).astype(np.float32)  # noqa: E731
    mask = rng.random((batch, keys)) < 0.5
    return 2 * draw(keys, WIDTH), 2 * draw(queries, WIDTH), mask, draw(keys, LATENTS), (
        draw(keys, LIMBS), draw(queries, LIMBS),
    )  # fmt: skip


@functools.cache
def case(name):
    """(config, whether limbs are given, parameters, compiled (params, keep, *inputs) -> (update, account))."""
    settings = dict(SWITCHES[name])
    guided = settings.pop("limbs", False)
    config = FusionConfig(**settings)
    source_net, target_net = HPFASource(SITE, config), HPFA(SITE, config, LATENTS)

    def init():
        features, x, mask, latents, limbs = map(jax.tree_util.Partial(jax.tree.map, jnp.asarray), inputs())
        (kv, _), p = source_net.init_with_output(
            jax.random.key(0), features, mask, latents=latents, limbs=limbs if guided else None
        )
        return {"source": p["params"], "target": target_net.init(jax.random.key(1), x, kv)["params"]}

    def run(params, keep, features, x, mask, latents, limbs):
        kv, _ = source_net.apply(
            {"params": params["source"]}, features, mask, keep, latents=latents, limbs=limbs if guided else None
        )
        return target_net.apply({"params": params["target"]}, x, kv)

    return config, guided, tiny.randomise(jax.eval_shape(init), 3), tiny.jit(run)


def heads_of(x):
    """[n c] -> [heads n d]."""
    return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def weights_and_values(name, params, features, x, mask, limbs):
    """Eq. 8's softmax [heads m n] and values [heads n d] of one sample, float64."""
    config, guided, *_ = case(name)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    source, target = p["source"], p["target"]
    q, k, v = (features @ source[f"source_to_{each}"]["kernel"] for each in "qkv")
    h = oracle.eq7(np, q, k, v, mask, heads=HEADS, delta=0.6, sigma=0.3, reading="printed", mask_axis="key")
    h = h + features if config.residual else h
    k, v = (heads_of(h @ source[each]["kernel"]) for each in ("to_k", "to_v"))
    normed = oracle.layer_norm(np, x, target["norm"]["scale"], target["norm"]["bias"])
    q = heads_of(normed @ target["to_q"]["kernel"])
    if not config.cosine:
        return softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])), v
    logits = unit(q) @ unit(k).transpose(0, 2, 1) * np.exp(target["cosine_scale"])[:, None]
    if guided:
        of_source, of_target = (unit(each @ source["limbs"]["kernel"]) for each in limbs)
        logits = logits + (of_target @ of_source.T) * np.exp(target["limb_scale"])[:, None]
    return softmax(logits), v


def loud(params):
    """Their random scales are near 1, at which every softmax is flat: six times as much."""
    target = {name: leaf + (np.log(6) if name.endswith("_scale") else 0) for name, leaf in params["target"].items()
              if not isinstance(leaf, dict)}  # fmt: skip
    return {"source": params["source"], "target": params["target"] | target}


@pytest.mark.parametrize("name", SWITCHES)
def test_against_numpy(name):
    """The update, what is carried, and the account."""
    config, _, params, run = case(name)
    params = loud(params)
    features, x, mask, latents, limbs = inputs()
    update, account = run(params, np.ones(2, np.float32), features, x, mask, latents, limbs)
    for i in range(2):
        of_target = None if limbs is None else [each[i].astype(np.float64) for each in limbs]
        p, v = weights_and_values(
            name, params, features[i].astype(np.float64), x[i].astype(np.float64), mask[i], of_target
        )
        carried = p @ latents[i].astype(np.float64)
        joined = [found.transpose(1, 0, 2).reshape(len(x[i]), -1) for found in (p @ v, carried)]
        joined = np.concatenate(joined if config.carry_latents else joined[:1], axis=1)
        out = params["target"]["to_out_0"]
        wanted = joined @ np.asarray(out["kernel"], np.float64) + np.asarray(out["bias"], np.float64)
        assert tiny.error(update[i], wanted) < 5e-5
        assert tiny.error(account["carried"][i], carried.mean(axis=0)) < 5e-5
        tokens = np.exp(-np.sum(p * np.log(p), axis=-1)).mean()
        assert account["tokens"][i] == pytest.approx(tokens, rel=1e-4) and 1.2 < tokens < 10
        assert account["inside"][i] == pytest.approx(p[..., mask[i]].sum(axis=-1).mean(), rel=1e-4)


def test_latents_that_are_shown_but_not_carried_change_nothing():
    """Method.carried asks for them where the configuration does not carry them."""
    config, _, params, run = case("cosine")
    features, x, mask, latents, _ = inputs()
    update, account = run(params, None, features, x, mask, latents, None)

    @tiny.jit
    def without_latents(params, features, x, mask):
        kv, _ = HPFASource(SITE, config).apply({"params": params["source"]}, features, mask)
        return HPFA(SITE, config, LATENTS).apply({"params": params["target"]}, x, kv)

    plain, without = without_latents(params, features, x, mask)
    assert tiny.error(update, plain) < 1e-6 and "carried" in account and "carried" not in without


def test_with_one_hot_attention_the_source_cell_itself():
    _, _, params, run = case("all")
    params = jax.tree.map(lambda a: a, params)
    params["target"]["cosine_scale"] = jnp.full((HEADS, 1), np.log(1e5))
    features, x, mask, latents, limbs = inputs()
    _, account = run(params, None, features, x, mask, latents, limbs)
    for i in range(2):
        p, _ = weights_and_values("all", params, features[i].astype(np.float64), x[i].astype(np.float64), mask[i], None)
        best = p.argmax(axis=-1)
        assert np.any(best[0] != best[1]) and len(set(best[0])) > 2
        np.testing.assert_allclose(account["carried"][i], latents[i][best].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(account["tokens"], 1, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "all"])
def test_only_cosine_logits_do_not_depend_on_the_scale_of_queries_and_keys(name):
    """The values' projection stays."""
    _, _, params, run = case(name)
    params = loud(params)
    larger = {
        "source": params["source"] | {"to_k": {"kernel": 3 * params["source"]["to_k"]["kernel"]}},
        "target": params["target"] | {"to_q": {"kernel": 7 * params["target"]["to_q"]["kernel"]}},
    }
    before, after = (run(each, None, *inputs())[0] for each in (params, larger))
    difference = tiny.error(after, before)
    assert difference < 1e-4 if name == "all" else difference > 0.1


@pytest.mark.parametrize("name", SWITCHES)
def test_a_dropped_sample_is_no_source_to_the_bit(name):
    config, _, params, run = case(name)
    features, x, mask, latents, limbs = inputs(batch=3)
    keep = np.array([1, 0, 1], np.float32)
    update, account = run(params, keep, features, x, mask, latents, limbs)
    none, _ = HPFA(SITE, config, LATENTS).apply({"params": params["target"]}, x, None)
    np.testing.assert_array_equal(update[1], np.broadcast_to(none[1], update[1].shape))
    np.testing.assert_array_equal(none[0, 0], params["target"]["to_out_0"]["bias"])
    assert not np.any(account["carried"][1]) and np.any(account["carried"][0])
    assert np.any(update[0] != none[0]) and np.any(update[2] != none[2])


# --- the paper's own, as it was before there was anything to switch ------------------------------------------------------


class PaperSource(nn.Module):
    """Eq. 6, 7 and the keys and values of Eq. 8."""

    config: FusionConfig

    @nn.compact
    def __call__(self, features, mask, keep=None):
        dense = lambda name: nn.Dense(WIDTH, use_bias=False, name=name, **self.config.square_init)  # noqa: E731
        q, k, v = (split_heads(dense(f"source_to_{x}")(features), HEADS) for x in "qkv")
        if keep is not None:
            q, k, v = (x * keep[:, None, None, None] for x in (q, k, v))
        fused = merge_heads(api.reweighted_attention(q, k, v, mask, delta=0.6, sigma=0.3))
        return KeysValues(*(split_heads(dense(name)(fused), HEADS) for name in ("to_k", "to_v")))


class PaperTarget(nn.Module):
    """Eq. 8."""

    config: FusionConfig

    @nn.compact
    def __call__(self, x, source):
        zeros = {"kernel_init": nn.initializers.zeros} if self.config.out_init == "zeros" else {}
        out = nn.Dense(WIDTH, name="to_out_0", **zeros)
        if source is None:
            return out(jnp.zeros((x.shape[0], 1, WIDTH), x.dtype))
        q = nn.Dense(WIDTH, use_bias=False, name="to_q", **self.config.square_init)(layer_norm(jnp.float32, "norm")(x))
        return out(merge_heads(api.attention(split_heads(q, HEADS), source.k, source.v)))


@pytest.mark.parametrize("settings", [{}, {"init": "identity", "out_init": "random"}])
def test_without_switches_parameters_and_outputs_are_the_papers_to_the_bit(settings):
    config = FusionConfig(**settings)
    assert config.is_paper and not any(FusionConfig(**{name: True}).is_paper for name in EVERYTHING)
    features, x, mask, *_ = map(jax.tree_util.Partial(jax.tree.map, jnp.asarray), inputs(4, batch=3))
    keep = jnp.array([1.0, 0.0, 1.0])
    keys = jax.random.split(jax.random.key(7))
    source_net, papers_source = HPFASource(SITE, config), PaperSource(config)
    target_net, papers_target = HPFA(SITE, config, LATENTS), PaperTarget(config)
    (ours_kv, _), ours_source = tiny.jit(source_net.init_with_output)(keys[0], features, mask)
    paper_kv, paper_source = tiny.jit(papers_source.init_with_output)(keys[0], features, mask)
    ours_target = tiny.jit(target_net.init)(keys[1], x, ours_kv)
    paper_target = tiny.jit(papers_target.init)(keys[1], x, paper_kv)
    for ours, papers in ((ours_source, paper_source), (ours_target, paper_target)):
        assert jax.tree.structure(ours) == jax.tree.structure(papers)
        jax.tree.map(np.testing.assert_array_equal, ours, papers)
    source, target = (tiny.randomise(each, 1) for each in (paper_source["params"], paper_target["params"]))
    kv, _ = tiny.jit(source_net.apply)({"params": source}, features, mask, keep)
    update, account = tiny.jit(target_net.apply)({"params": target}, x, kv)
    paper_kv = tiny.jit(papers_source.apply)({"params": source}, features, mask, keep)
    np.testing.assert_array_equal(kv.k, paper_kv.k)
    np.testing.assert_array_equal(kv.v, paper_kv.v)
    np.testing.assert_array_equal(update, tiny.jit(papers_target.apply)({"params": target}, x, paper_kv))
    none, _ = target_net.apply({"params": target}, x, None)
    np.testing.assert_array_equal(none, papers_target.apply({"params": target}, x, None))
    assert set(account) == {"tokens", "inside"}


# --- the account ---------------------------------------------------------------------------------------------------------


def test_account_of_uniform_and_of_one_hot_attention():
    """All of m keys, and one; the share inside is the mask's, or that of the keys that are looked at."""
    rng = np.random.default_rng(0)
    inside = rng.random((2, 12)) < 0.4
    k = np.zeros((2, 12, 1, 12), np.float32) + np.eye(12, dtype=np.float32)[None, :, None]
    uniform = attention_account(np.zeros((2, 5, 1, 12), np.float32), k, inside)
    np.testing.assert_allclose(uniform["tokens"], 12, rtol=1e-5)
    np.testing.assert_allclose(uniform["inside"], inside.mean(axis=1), rtol=1e-5)
    looked_at = rng.integers(0, 12, (2, 5))
    one = attention_account(200 * np.eye(12, dtype=np.float32)[looked_at][:, :, None], k, inside)
    np.testing.assert_allclose(one["tokens"], 1, rtol=1e-5)
    np.testing.assert_allclose(one["inside"], np.take_along_axis(inside, looked_at, 1).mean(axis=1), atol=1e-6)


def test_account_samples_queries_at_even_distances():
    """Of 200 queries 64, from the first on; heads are averaged; no gradient."""
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((2, n, HEADS, 4)).astype(np.float32) for n in (200, 7))
    inside = rng.random((2, 7)) < 0.5
    found = attention_account(q, k, inside)
    chosen = [i * 200 // 64 for i in range(64)]
    p = softmax(np.einsum("bngd,bmgd->bgnm", q[:, chosen].astype(np.float64), k))
    np.testing.assert_allclose(found["tokens"], np.exp(-(p * np.log(p)).sum(-1)).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["inside"], (p * inside[:, None, None]).sum(-1).mean((1, 2)), rtol=1e-5)
    assert hpfa.SAMPLED_QUERIES == 64
    assert not np.any(tiny.jit(jax.grad(lambda q: jnp.sum(attention_account(q, k, inside)["tokens"])))(q))


@pytest.mark.parametrize("switch", EVERYTHING)
def test_switches_of_hpfa_need_hpfa(switch):
    with pytest.raises(ValueError, match=f"{switch}.*texture 'concat' has none"):
        FusionConfig(texture="concat", **{switch: True})
