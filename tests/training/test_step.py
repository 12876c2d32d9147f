"""The train step: AdamW by hand, skipping, EMA, schedules, randomness and accumulation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from truepose_jax.config import ConfigError
from truepose_jax.diffusion.losses import timestep_bins, weighted_mean
from truepose_jax.training.optim import ema_update, is_decayed, learning_rate
from truepose_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Toy:
    """A linear network on noisy targets, so that many programs compile in no time. `unused` gets no gradient."""

    noise: float = 1.0
    no_decay = "^unused/"
    fresh = "(?!)"
    param_rules = ()

    def init(self, key, batch_spec):
        names = {"net/kernel": (4, 3), "net/bias": (3,), "unused/kernel": (2, 2)}
        flat = {n: jax.random.normal(jax.random.fold_in(key, i), s) for i, (n, s) in enumerate(names.items())}
        tree = {}
        for name, leaf in flat.items():
            group, leaf_name = name.split("/")
            tree.setdefault(group, {})[leaf_name] = leaf
        return tree

    def loss(self, params, frozen, batch, keys):
        noise = self.noise * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        source = jnp.repeat(batch["source"], len(batch["target"]) // len(batch["source"]), axis=0)
        predicted = source @ params["net"]["kernel"] + params["net"]["bias"] + frozen["shift"]
        errors = jnp.mean(jnp.square(predicted - batch["target"] - noise), axis=1)
        sums, counts = timestep_bins(errors, batch["valid"], jnp.arange(len(keys)), len(keys))
        loss = weighted_mean(errors, batch["valid"])
        return loss, {"loss": loss, "bin_sums": sums, "bin_counts": counts}


FROZEN = {"shift": np.float32(0.3)}


def toy_batch(seed, targets=12, sources=6):
    rng = np.random.default_rng(seed)
    return {
        "source": rng.standard_normal((sources, 4)).astype(np.float32),
        "target": rng.standard_normal((targets, 3)).astype(np.float32),
        "valid": np.ones(targets, np.float32),
    }


def trainer(method=None, **optim):
    seed = optim.pop("seed", 0)
    return Trainer(tiny.config({"seed": seed, "optim": optim}), method or Toy())


@functools.cache
def _step(method, settings):
    made = trainer(method, **dict(settings))
    return made, tiny.jit(made.step)


def steps(batches, *, method=None, state=None, **optim):
    """(states, metrics) after each batch; the first state is the initial one."""
    made, step = _step(method or Toy(), tuple(sorted(optim.items())))
    states = [made.init_state(jax.random.key(7), {}) if state is None else state]
    found = []
    for batch in batches:
        state, metrics = step(states[-1], FROZEN, batch)
        states.append(state)
        found.append(metrics)
    return states, found


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def adamw_by_hand(params, gradients, *, rate, b1=0.9, b2=0.999, decay, clip):
    """Parameters after each gradient, float64: clip by the global norm, Adam, decay of the matrices of `net`."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros(p.shape) for k, p in params.items()} for _ in range(2))
    for count, raw in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in raw.values()))
        for name, p in params.items():
            g = np.asarray(raw[name], np.float64) * min(1, clip / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            update = m[name] / (1 - b1**count) / (np.sqrt(v[name] / (1 - b2**count)) + 1e-8)
            if name == "net/kernel":
                update = update + decay * p
            params[name] = p - rate * update
        yield dict(params)


flat = tiny.named
LAYOUTS = pytest.mark.parametrize("layout", ["tree", "flat"])


@LAYOUTS
@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_adamw_with_clipping_and_masked_decay(clip, layout):
    """Three steps against the formulas; biases and what has no gradient do not decay."""
    optim = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": clip, "layout": layout}
    batches = [toy_batch(i) for i in range(3)]
    states, metrics = steps(batches, method=Toy(noise=0.0), **optim)
    grads = [
        flat(jax.grad(lambda p, b: Toy(noise=0.0).loss(p, FROZEN, b, tiny.keys(0, 12))[0])(state.params, batch))
        for state, batch in zip(states, batches, strict=False)
    ]
    for state, want in zip(
        states[1:], adamw_by_hand(flat(states[0].params), grads, rate=1e-2, decay=0.1, clip=clip), strict=True
    ):
        assert tiny.error(flat(state.params), want) < 1e-6
    np.testing.assert_array_equal(states[3].params["unused"]["kernel"], states[0].params["unused"]["kernel"])
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads[0].values()))
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (norm > clip) == (clip == 0.5)


def test_what_decays_in_truepose():
    _, made, params = tiny.base()
    decayed = dict(zip(flat(params), is_decayed(params, made.no_decay), strict=True))
    block = "mid_block/attentions_0/transformer_blocks_0"
    for name, leaf in flat(params).items():
        assert not (decayed[name] and leaf.ndim == 1), name
    for name in (
        "source_net/conv_in",
        "target_net/conv_out",
        f"target_net/{block}/attn2/to_q",
        f"source_net/{block}/ff/net_2",
    ):
        assert decayed[f"{name}/kernel"], name
    for name in ("conv_out", f"{block}/attn2/to_q", "up_blocks_0/attentions_0/proj_out"):
        assert not decayed[f"source_net/{name}/kernel"], name


def spoil(batch, value, row=4):
    target = batch["target"].copy()
    target[row] = value
    return {**batch, "target": target}


@LAYOUTS
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_non_finite_batches_change_nothing_but_counters(value, layout):
    """1e30: a finite number whose square is not."""
    good = [toy_batch(i) for i in range(4)]
    bad = spoil(toy_batch(9), value)
    optim = {"ema_decay": 0.9, "learning_rate": 1e-2, "layout": layout}
    states, metrics = steps([good[0], bad, bad, good[1]], **optim)
    for before, after in ((states[1], states[2]), (states[2], states[3])):
        assert same((before.params, before.ema, before.opt_state), (after.params, after.ema, after.opt_state))
    assert not same(states[3].params, states[4].params) and not same(states[3].ema, states[4].ema)
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4]
    assert [int(s.skipped) for s in states] == [0, 0, 1, 2, 2]
    assert [int(s.skips_in_a_row) for s in states] == [0, 0, 1, 2, 0]
    assert [int(m["skipped_now"]) for m in metrics] == [0, 1, 1, 0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[4]))
    if np.isnan(value):
        found = [int(m["first_bad_parameter"]) for m in metrics]
        names = [*flat(states[0].params), None]
        assert [names[i] for i in (found[0], found[3])] == [None, None]
        assert {names[i] for i in found[1:3]} <= {"net/bias", "net/kernel"}


def test_a_batch_without_valid_rows():
    """Counts as a step of gradient 0, not as a failure."""
    empty = toy_batch(0)
    empty["valid"][:] = 0
    (_, after), metrics = steps([empty])
    assert int(after.skipped) == 0
    assert metrics[0]["loss"] == metrics[0]["grad_norm"] == metrics[0]["valid"] == 0


@LAYOUTS
def test_ema(layout):
    """ema += (1 - d)(p - ema), d = min(decay, (1 + step) / (10 + step)); a copy of the parameters at birth."""
    states, _ = steps([toy_batch(i) for i in range(4)], ema_decay=0.3, learning_rate=1e-2, layout=layout)
    assert same(states[0].ema, states[0].params)
    want = flat(states[0].params)
    for i, d in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3]):
        now = flat(states[i + 1].params)
        want = {k: d * np.float64(want[k]) + (1 - d) * now[k] for k in want}
        assert tiny.error(flat(states[i + 1].ema), want) < 1e-6
    assert steps([], learning_rate=1e-2)[0][0].ema is None
    late = ema_update({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, jnp.int32(10**6), 0.999)
    np.testing.assert_allclose(late["a"], 0.001, rtol=1e-4)


def rates(total=100, **optim):
    schedule = learning_rate(tiny.config({"optim": optim}).optim, total)
    return np.array([schedule(i) for i in range(total)])


def test_learning_rate():
    np.testing.assert_allclose(rates(learning_rate=2.0), 2.0)
    warm = rates(learning_rate=2.0, warmup_steps=9)
    np.testing.assert_allclose(warm[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(warm[10:], 2.0)
    cosine = rates(learning_rate=2.0, warmup_steps=9, schedule="cosine", flat=0.4, final=0.1)
    np.testing.assert_allclose(cosine[:41], warm[:41], rtol=1e-6)
    shape = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(60) / 60)) / 2
    np.testing.assert_allclose(cosine[40:], 2.0 * shape, rtol=1e-5)
    assert np.all(np.diff(rates(learning_rate=2.0, schedule="cosine", flat=0.0)) < 0)


def test_learning_rate_counts_updates():
    bad = spoil(toy_batch(9), np.nan)
    optim = {"learning_rate": 1e-2, "warmup_steps": 5}
    _, metrics = steps([toy_batch(0), bad, bad, toy_batch(1)], **optim)
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], np.array([1, 2, 2, 2]) * 1e-2 / 6, rtol=1e-6)


def test_randomness_is_a_function_of_seed_and_step():
    batch = toy_batch(0)
    (start, first), (metrics,) = steps([batch])
    again, (metrics_again,) = steps([batch])
    assert same(first, again[1]) and same(metrics, metrics_again)
    later = dataclasses.replace(start, step=np.int32(1))
    other_step = steps([batch], state=later)[1][0]["loss"]
    other_seed = steps([batch], seed=1)[1][0]["loss"]
    assert len({float(metrics["loss"]), float(other_step), float(other_seed)}) == 3
    # The rest of the state has no say.
    worn = dataclasses.replace(start, skipped=np.int32(5), opt_state=first.opt_state)
    assert steps([batch], state=worn)[1][0]["loss"] == metrics["loss"]


WEIGHTS = {
    "all": np.ones(12),
    "uneven": np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]),
    "one": np.eye(12)[7],
}


@pytest.mark.parametrize("valid", WEIGHTS)
def test_accumulation_of_a_toy(valid):
    """1, 2, 3 and 6 micro-batches of 12 targets of 6 sources: the same gradient, loss and bins."""
    batch = toy_batch(3) | {"valid": WEIGHTS[valid].astype(np.float32)}
    params, keys = Toy().init(jax.random.key(0), {}), tiny.keys(1, 12)

    def gradients(pieces):
        made = Trainer(tiny.config({"batch_size": 12, "optim": {"accumulation": pieces}}), Toy())
        return tiny.jit(made.gradients)(params, FROZEN, batch, keys)

    want, want_metrics = gradients(1)
    for pieces in (2, 3, 6):
        got, metrics = gradients(pieces)
        for name, g in flat(got).items():
            np.testing.assert_allclose(g, flat(want)[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["bin_counts"].sum(), want_metrics["bin_counts"].sum())
        np.testing.assert_allclose(metrics["bin_sums"].sum(), want_metrics["bin_sums"].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "remat", "trainable"),
    [(tiny.MIDDLE_ONLY, True, ""), (tiny.HEAD, False, "^carry_target/parsing_out/")],
    ids=["paper", "head"],
)
def test_accumulation_and_rematerialisation_of_truepose(change, remat, trainable):
    """Three micro-batches of two, one of them without a valid row (NaN in it), against the whole batch at once without
    rematerialisation; every loss and metric too. Of the head they are the point: gradients add up as the paper's do."""
    cfg = tiny.config(change, {"optim": {"trainable": trainable}})
    three_config = tiny.config(change, {"optim": {"trainable": trainable, "accumulation": 3}, "model": {"remat": remat}})
    whole, three = (Trainer(c, tiny.method(c)) for c in (cfg, three_config))
    params = tiny.params(whole.method, cfg)
    batch = tiny.batch(cfg, 1, targets=tiny.TARGETS)
    batch["valid"] = np.float32([1, 0, 1, 0, 0, 1])
    for name in ("source", "target", "source_joints", "target_joints"):
        batch[name][batch["valid"] == 0] = np.nan
    (got, metrics), (want, want_metrics) = (
        tiny.jit(lambda p, b, k, made=made: made.gradients(p, {}, b, k))(params, batch, tiny.keys(9, tiny.TARGETS))
        for made in (three, whole)
    )
    tiny.check_gradients(got, want)
    assert 0 < want_metrics["kept"] < 3, (
        "else no micro-batch's share of the kept samples differs from that of the valid"
    )
    assert metrics.keys() == want_metrics.keys() >= {"loss", "bin_sums", "bin_counts", "kept", "hpfa_rms", "caa_rms"}
    for name, wanted in want_metrics.items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=2e-5, err_msg=name)


@LAYOUTS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_what_is_trainable_moves(layout, accumulation):
    """The rest keeps its bits, has no moments, and does not enter the norm that clips."""
    optim = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5, "ema_decay": 0.5, "layout": layout}
    optim |= {"trainable": "kernel$", "accumulation": accumulation}
    batches = [toy_batch(i) for i in range(2)]
    states, metrics = steps(batches, method=Toy(noise=0.0), **optim)
    first, last = flat(states[0].params), flat(states[-1].params)
    assert np.array_equal(first["net/bias"], last["net/bias"])
    assert np.array_equal(first["net/bias"], flat(states[-1].ema)["net/bias"])
    moments = [leaf.size for leaf in jax.tree.leaves(states[-1].opt_state) if leaf.size > 1]
    assert sum(moments) == 2 * (4 * 3 + 2 * 2)
    grads = [
        flat(jax.grad(lambda p, b: Toy(noise=0.0).loss(p, FROZEN, b, tiny.keys(0, 12))[0])(state.params, batch))
        for state, batch in zip(states, batches, strict=False)
    ]
    kernels = [{name: g[name] for name in ("net/kernel", "unused/kernel")} for g in grads]
    start = {name: first[name] for name in kernels[0]}
    for state, want in zip(states[1:], adamw_by_hand(start, kernels, rate=1e-2, decay=0.1, clip=0.5), strict=True):
        for name, value in want.items():
            np.testing.assert_allclose(flat(state.params)[name], value, rtol=2e-5)
    np.testing.assert_allclose(metrics[0]["grad_norm"], np.linalg.norm(grads[0]["net/kernel"]), rtol=1e-5)


def test_a_bad_gradient_names_its_place_among_the_trained():
    """first_bad_parameter counts the trained parameters alone, as the monitor's list of paths does."""
    bad = toy_batch(0)
    bad["source"][0, 0] = np.nan
    states, metrics = steps([bad], trainable="^net/kernel$")
    assert metrics[0]["first_bad_parameter"] == 0 and same(states[0].params, states[1].params)
    assert list(flat(trainer(trainable="^net/kernel$").trained(states[0].params))) == ["net/kernel"]


@LAYOUTS
def test_trainable_that_finds_nothing(layout):
    with pytest.raises(ConfigError, match=r"config\.optim\.trainable 'zzz' finds none of the parameters"):
        steps([], trainable="zzz", layout=layout)
