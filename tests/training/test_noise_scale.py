"""The gradient noise scale against problems whose covariance is known, and LAMB against optax and its formula. Over several
devices: tests/runtime/test_sharding.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from tests.training.test_step import FROZEN, Toy, toy_batch
from truepose_jax.config import ConfigError
from truepose_jax.training import noise_scale
from truepose_jax.training.noise_scale import BIG_SQ, SMALL_BATCH, SMALL_SQ
from truepose_jax.training.optim import make_optimizer
from truepose_jax.training.run_log import Monitor
from truepose_jax.training.step import Trainer

TARGETS, PIECES, STEPS = 12, 3, 1500
NOISE = 1.5
MASKS = {"all": np.ones(TARGETS), "uneven": np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0])}


def config(**optim):
    return tiny.config({"batch_size": TARGETS, "optim": {"noise_scale": "on", "accumulation": PIECES, **optim}})


def toy_moments(params):
    """(|G|^2, tr(Sigma)) of Toy with every input normal: an example's gradient is c x r by the kernel and c r by the
    bias, with c = 2/3, r = x W + b' - y - n, and E|x|^2 |x W|^2 = (4 + 2) |W|^2 for x in four dimensions."""
    kernel, bias = (np.asarray(params["net"][name], float) for name in ("kernel", "bias"))
    w, b = np.sum(kernel**2), np.sum((bias + FROZEN["shift"]) ** 2)
    whole = 7 * w + 5 * b + 5 * 3 * (1 + NOISE**2)
    return (2 / 3) ** 2 * (w + b), (2 / 3) ** 2 * (whole - w - b)


@pytest.mark.parametrize("mask", MASKS)
def test_estimate_of_a_known_covariance(mask):
    """Both moments within four of their own standard errors, which are under 5 % of tr(Sigma) and 15 % of |G|^2;
    B_simple accordingly. Micro-batches of uneven weight change nothing."""
    params, valid = Toy().init(jax.random.key(2), {}), MASKS[mask].astype(np.float32)
    made = Trainer(config(), Toy(noise=NOISE))

    def one(batch, keys):
        metrics = made.gradients(params, FROZEN, batch, keys)[1]
        return [metrics[name] for name in (SMALL_SQ, BIG_SQ, SMALL_BATCH)]

    rng = np.random.default_rng(0)
    shapes = {"source": (TARGETS, 4), "target": (TARGETS, 3)}
    batches = {name: rng.standard_normal((STEPS, *shape)).astype(np.float32) for name, shape in shapes.items()}
    batches["valid"] = np.tile(valid, (STEPS, 1))
    keys = tiny.keys(5, STEPS * TARGETS).reshape(STEPS, TARGETS)
    found = tiny.jit(jax.vmap(one))(batches, keys)
    assert np.all(found[2] == valid.sum() / PIECES)
    moments = noise_scale.moments(*found, valid.sum())
    wanted = toy_moments(params)
    errors = [np.std(x) / np.sqrt(STEPS) for x in moments]
    for estimate, want, error, at_most in zip(moments, wanted, errors, (0.15, 0.05), strict=True):
        assert abs(np.mean(estimate) - want) < 4 * error < 4 * at_most * want
    want, relative = wanted[1] / wanted[0], sum(e / w for e, w in zip(errors, wanted, strict=True))
    assert noise_scale.quotient(*moments) == pytest.approx(want, rel=4 * relative)


def test_a_problem_without_noise_has_the_scale_0():
    """Every example the same: the parts' gradients are the whole's."""
    batch = {name: np.repeat(x[:1], TARGETS, axis=0) for name, x in toy_batch(0, 1, 1).items()}
    made = Trainer(config(), Toy(noise=0.0))
    metrics = tiny.jit(made.gradients)(Toy().init(jax.random.key(0), {}), FROZEN, batch, tiny.keys(0, TARGETS))[1]
    signal, noise = noise_scale.moments(metrics[SMALL_SQ], metrics[BIG_SQ], metrics[SMALL_BATCH], TARGETS)
    assert noise_scale.quotient(signal, noise) == pytest.approx(0, abs=1e-5)
    assert signal == pytest.approx(float(metrics[BIG_SQ]), rel=1e-5) and signal > 0.1


def test_measuring_changes_no_step():
    batch, key = toy_batch(1), jax.random.key(7)
    states = []
    for noise in ("off", "on"):
        made = Trainer(config(noise_scale=noise, learning_rate=0.1, clip_norm=0.01), Toy())
        state, metrics = tiny.jit(made.step)(made.init_state(key, {}), FROZEN, batch)
        states.append(state)
    assert tiny.error(states[0].params, states[1].params) == 0
    assert metrics[BIG_SQ] == pytest.approx(float(metrics["grad_norm"]) ** 2, rel=1e-5)  # before clipping
    assert metrics["grad_norm"] > 1


@pytest.mark.parametrize("value", [[1.0, 2.0], [np.nan, 2.0]])
def test_moments(value):
    """|g_4|^2 = 3 + 8/4 and |g_16|^2 = 3 + 8/16 say |G|^2 = 3 and tr(Sigma) = 8; steps that say nothing are left out."""
    assert [float(x) for x in noise_scale.moments(5.0, 3.5, 4, 16)] == [3.0, 8.0]
    assert np.isnan(noise_scale.moments(5.0, 5.0, 16, 16)).all()
    signal, noise = np.array(value), np.array([6.0, 2.0])
    assert noise_scale.quotient(signal, noise) == (1.0 if np.isnan(value[0]) else 8 / 3)
    assert np.isnan(noise_scale.quotient(-signal, noise))


def test_the_monitor_tells_the_running_estimate(tmp_path):
    """Quotient of the means (not the mean of quotients), over good steps alone."""
    common = {"skipped_now": 0, "skips_in_a_row": 0, "valid": 16.0, SMALL_BATCH: 4.0}
    steps = [(5.0, 3.5), (9.0, 7.5), (1e9, 1.0)]
    with Monitor(tmp_path, total_steps=3, start_step=0, log_every=3, is_writer=True, quiet=True) as monitor:
        for i, (small, big) in enumerate(steps):
            monitor.step(i + 1, common | {SMALL_SQ: small, BIG_SQ: big, "skipped_now": int(i == 2)}, 16)
    *others, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert last["noise_scale"] == pytest.approx(8 / 5)
    assert not any("noise_scale" in record for record in others)


def test_config_errors():
    with pytest.raises(ConfigError, match="the gradient comes in one piece"):
        tiny.config({"optim": {"noise_scale": "on"}, "mesh": {"data": 1}})
    alone = tiny.config({"optim": {"noise_scale": "on"}})  # the mesh is not known yet
    with pytest.raises(ConfigError, match="one piece"):
        Trainer(alone, Toy()).gradients(Toy().init(jax.random.key(0), {}), FROZEN, toy_batch(0), tiny.keys(0, 12))
    with pytest.raises(ConfigError, match="LAMB needs the norm of each"):
        tiny.config({"optim": {"name": "lamb", "layout": "flat"}})
    with pytest.raises(ConfigError, match=r"optim.name is 'sgd'; choose one of \('adamw', 'lamb'\)"):
        tiny.config({"optim": {"name": "sgd"}})
    with pytest.raises(ConfigError, match=r"optim\.noise_scale"):
        tiny.config({"optim": {"noise_scale": "maybe"}})


def lamb_by_hand(params, gradients, *, rate, b1, b2, decay):
    """You et al. 2020, algorithm 2, in float64; kernels decay."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros(p.shape) for k, p in params.items()} for _ in range(2))
    for count, gradient in enumerate(gradients, 1):
        for name, p in params.items():
            m[name] = b1 * m[name] + (1 - b1) * gradient[name]
            v[name] = b2 * v[name] + (1 - b2) * gradient[name] ** 2
            update = m[name] / (1 - b1**count) / (np.sqrt(v[name] / (1 - b2**count)) + 1e-6)
            update = update + decay * p * (name == "kernel")
            norms = np.linalg.norm(p), np.linalg.norm(update)
            params[name] = p - rate * update * (norms[0] / norms[1] if all(norms) else 1.0)
    return params


def test_lamb():
    """Against optax.lamb and the formula; a parameter at zero moves with the ratio 1."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3), "zero": np.zeros(4)}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    gradients = [{n: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for n, x in params.items()} for _ in range(4)]
    settings = {"learning_rate": 0.05, "b1": 0.8, "b2": 0.95, "weight_decay": 0.1}
    cfg = tiny.config({"optim": {"name": "lamb", "clip_norm": 1e6, **settings}})
    decayed = {"kernel": 1.0, "bias": 0.0, "zero": 0.0}
    ours = make_optimizer(cfg.optim, 100, decayed)
    theirs = optax.lamb(**settings, mask={name: bool(d) for name, d in decayed.items()})

    def run(optimizer):
        def steps(found):
            state = optimizer.init(found)
            for gradient in gradients:
                updates, state = optimizer.update(gradient, state, found)
                found = optax.apply_updates(found, updates)
            return found

        return tiny.jit(steps)(params)

    found = run(ours)
    assert tiny.error(found, run(theirs)) < 1e-6
    want = lamb_by_hand(params, gradients, rate=0.05, b1=0.8, b2=0.95, decay=0.1)
    assert tiny.error(found, {name: want[name] for name in found}) < 1e-5
    adamw = run(make_optimizer(dataclasses.replace(cfg.optim, name="adamw"), 100, decayed))
    assert tiny.error(found, adamw) > 0.01
