"""TruePose as a whole: its loss and gradients, with every parameter random."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.hpfa import FusionConfig
from truepose_jax.models.source_net import source_features, source_net, without_gradient
from truepose_jax.models.unet import UNetConfig
from truepose_jax.models.vae import PixelAutoencoder

N = tiny.TARGETS
JUNK = {"source", "target", "target_pose", "region_tokens"}
"""Floating fields that the loss reads."""


@functools.cache
def batch():
    return tiny.batch(tiny.base()[0], 1, targets=N)


@functools.cache
def other():
    """As good a batch, with nothing in common."""
    return tiny.batch(tiny.base()[0], 2, targets=N)


KEYS = functools.cache(lambda: tiny.keys(3, N))


def loss_of(made, keys=None, params=None):
    return tiny.base_gradient()(tiny.base()[2] if params is None else params, made, KEYS() if keys is None else keys)


def only(made, row):
    """Weight for one row alone."""
    return {**made, "valid": (np.arange(N) == row).astype(np.float32)}


def test_every_parameter_gets_a_gradient_but_those_of_no_decay():
    """No gradient ever: SourceNet after its last tap, and its queries, keys and their norm over ONE context token."""
    grads = tiny.named(loss_of(batch())[1])
    without = {name for name in grads if re.search(tiny.base()[1].no_decay, name)}
    assert {name for name, g in grads.items() if not np.any(g)} == without
    assert all(name.startswith("source_net/") for name in without)
    assert all(np.isfinite(g).all() for g in grads.values())
    largest = max(np.abs(g).max() for g in grads.values())
    assert min(np.abs(g).max() for name, g in grads.items() if name not in without) > 1e-6 * largest


CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@pytest.mark.parametrize(
    "levels,layers,latent",
    [
        ((CROSS, PLAIN), 1, (7, 5)),  # as SD1.5: the lowest level plain, the last block with attention
        ((PLAIN, CROSS), 0, (7, 4)),  # the last block with attention is not the last block
        ((PLAIN, PLAIN), 0, (6, 4)),  # attention in the middle alone
    ],
)
def test_what_no_tap_depends_on(levels, layers, latent):
    """NaN in a parameter reaches a tap exactly where no_decay does not say otherwise (or where its softmax is 1)."""
    down, up = zip(*levels, strict=True)
    config = UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,) * len(levels),
        down_block_types=down,
        up_block_types=up[::-1],
        layers_per_block=layers,
        attention_head_dim=2,
        cross_attention_dim=4,
        norm_num_groups=4,
    )
    net, rng = source_net(config, FusionConfig()), np.random.default_rng(0)
    x, token = rng.standard_normal((1, *latent, 3)).astype(np.float32), rng.standard_normal((1, 4)).astype(np.float32)
    t = jnp.zeros(1, jnp.int32)
    params = tiny.randomise(jax.eval_shape(lambda: net.init(jax.random.key(0), x, t, token[:, None])["params"]), 0)

    @tiny.jit
    def any_nan(params):
        taps = source_features(net, params, x, token)
        assert set(taps) == {site.name for site in config.sites}
        return sum(jnp.sum(jnp.isnan(tap)) for tap in taps.values())

    assert not any_nan(params)
    leaves, structure = jax.tree.flatten(params)
    softmax_of_one = r"transformer_blocks_\d+/(norm2|attn2/to_[qk])/"
    for i, name in enumerate(tiny.named(params)):
        spoilt = structure.unflatten([*leaves[:i], jnp.full_like(leaves[i], jnp.nan), *leaves[i + 1 :]])
        said = re.search(without_gradient(config), f"source_net/{name}")
        if said and re.search(softmax_of_one, name):
            continue
        assert bool(any_nan(spoilt)) == (not said), name


def test_loss_is_the_mean_over_rows_and_rows_are_independent():
    (loss, metrics), grads = loss_of(batch())
    assert metrics["loss"] == loss
    alone = [loss_of(only(batch(), i)) for i in range(N)]
    assert len({float(one[0][0]) for one in alone}) == N
    assert tiny.error(loss, np.mean([one[0][0] for one in alone])) < 1e-6
    tiny.check_gradients(grads, jax.tree.map(lambda *g: sum(g) / N, *(one[1] for one in alone)))
    # Row 4 among strangers.
    strange = only(tiny.with_rows(batch(), other(), [0, 1, 2, 3, 5]), 4)
    (loss, _), grads = loss_of(strange)
    assert tiny.error(loss, alone[4][0][0]) < 1e-6
    tiny.check_gradients(grads, alone[4][1])


def test_order_of_rows_does_not_matter():
    order = np.array([3, 0, 5, 1, 4, 2])
    (loss, _), grads = loss_of(batch())
    (moved, _), moved_grads = loss_of(tiny.rows(batch(), order), keys=KEYS()[order])
    assert tiny.error(moved, loss) < 1e-6
    tiny.check_gradients(moved_grads, grads)


def test_invalid_rows_weigh_nothing():
    """NaN in an invalid row moves neither the loss nor a gradient; without any valid row both are 0."""
    weights = {"valid": np.float32([1, 1, 0, 1, 1, 0])}
    clean = loss_of({**tiny.with_rows(batch(), other(), [2, 5]), **weights})
    nan = {k: np.full_like(v, np.nan) if k in JUNK else v for k, v in batch().items()}
    spoilt = tiny.with_rows(batch(), nan, [2, 5], JUNK)
    spoilt["source_parsing"] = tiny.with_rows(batch(), other(), [2, 5])["source_parsing"] * 0 + 255
    spoilt["source_parsing"][[0, 1, 3, 4]] = batch()["source_parsing"][[0, 1, 3, 4]]
    got = loss_of({**spoilt, **weights})
    assert tiny.error(got[0][0], clean[0][0]) < 1e-6
    tiny.check_gradients(got[1], clean[1])
    assert tiny.error(got[0][1], clean[0][1]) < 1e-5
    (loss, _), grads = loss_of({**nan, "valid": np.zeros(N, np.float32)})
    assert loss == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_nan_in_a_valid_row_is_not_hidden():
    nan = {k: np.full_like(v, np.nan) if k in JUNK else v for k, v in batch().items()}
    assert np.isnan(loss_of(tiny.with_rows(batch(), nan, [1], {"target"}))[0][0])


def test_dropping_is_per_sample_and_keeps_the_pose():
    """A dropped row does not see its source at all (image, map, tokens), a kept one does; both see the pose."""
    of_source = {"source", "source_parsing", "region_tokens", "region_valid", "class_on"}
    dropped = []
    for row in range(N):
        base, metrics = loss_of(only(batch(), row))[0]
        dropped.append(not np.any(metrics["hpfa_rms"]))
        assert np.any(metrics["caa_rms"]) != dropped[-1]
        moved = loss_of(tiny.with_rows(only(batch(), row), other(), [row], of_source))[0][0]
        posed = loss_of(tiny.with_rows(only(batch(), row), other(), [row], {"target_pose"}))[0][0]
        assert abs(posed - base) > 1e-5 * base
        assert abs(moved - base) < 1e-6 * base if dropped[-1] else abs(moved - base) > 1e-5 * base
        opposite = other() | {"class_on": ~batch()["class_on"]}
        for field in ("source", "region_tokens", "class_on"):
            moved = loss_of(tiny.with_rows(only(batch(), row), opposite, [row], {field}))[0][0]
            assert dropped[-1] or abs(moved - base) > 1e-6 * base, field
    assert 0 < sum(dropped) < N, "choose other keys: rows of both kinds are needed"


class _Seen(Exception):
    pass


class _Spy(TruePose):
    """Ends at the network, with all that went into it."""

    def condition(self, params, frozen, batch, *, keep=None):
        return keep

    def _target(self, params, x_t, t, conditioning):
        raise _Seen(x_t, t, conditioning)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_noise_timesteps_and_drops(drop_rate):
    """Over 3000 rows: t uniform, eps unit normal and alike for no two rows, drops at their rate, all independent."""
    cfg = tiny.config({"model": {"size": (4, 4)}, "diffusion": {"drop_rate": drop_rate}})
    count = 3000
    made = {name: np.zeros((count, *s.shape[1:]), s.dtype) for name, s in tiny.spec(cfg).items()}
    made["valid"] += 1

    @tiny.jit
    def inputs(made):
        try:
            _Spy(cfg.model, cfg.diffusion, PixelAutoencoder(2)).loss({}, {}, made, tiny.keys(0, count))
        except _Seen as seen:
            return seen.args

    x_t, t, keep = inputs(made)
    assert set(np.unique(keep)) <= {0.0, 1.0}
    assert abs(np.mean(keep) - (1 - drop_rate)) < 0.03
    assert t.min() >= 0 and t.max() <= 999
    np.testing.assert_allclose(np.histogram(t, 10, (0, 1000))[0] / count, 0.1, atol=0.025)
    eps = x_t / np.sqrt(1 - cfg.diffusion.schedule.alphas_cumprod[t])[:, None, None, None]  # x0 is 0
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert len(np.unique(eps[:, 0, 0, 0])) > 0.99 * count
    if drop_rate:
        assert abs(np.corrcoef(keep, t)[0, 1]) < 0.06
        assert abs(np.corrcoef(keep, eps[:, 0, 0, 0])[0, 1]) < 0.06


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_loss_is_the_squared_error_of_the_prediction(prediction):
    """Eq. 2 / 10 by hand, for a network whose output is a known array."""
    cfg = tiny.config({"diffusion": {"schedule": {"prediction": prediction}}})
    cfg_batch = tiny.batch(cfg, 0, targets=3)
    output = np.random.default_rng(5).standard_normal((3, 8, 5, 12)).astype(np.float32)

    @tiny.jit
    def call(cfg_batch):
        seen = []

        class Fake(_Spy):
            def _target(self, params, x_t, t, conditioning):
                seen.append((x_t, t))
                one = jnp.ones(3)
                return output, {site.name: {"hpfa_rms": one, "caa_rms": one} for site in self.model.unet.sites}, None

        return *Fake(cfg.model, cfg.diffusion, PixelAutoencoder(2)).loss({}, {}, cfg_batch, KEYS()[:3]), *seen

    loss, metrics, (x_t, t) = call(cfg_batch)
    x0 = np.zeros((3, 8, 5, 12))
    for i in range(8):
        for j in range(5):
            x0[:, i, j] = cfg_batch["target"][:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(3, -1)
    abar = cfg.diffusion.schedule.alphas_cumprod.astype(np.float64)[t][:, None, None, None]
    eps = (x_t - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    wanted = {"eps": eps, "v": np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0, "x0": x0}[prediction]
    assert tiny.error(loss, np.mean((output - wanted) ** 2)) < 1e-5
    assert metrics["bin_counts"].sum() == 3
    assert tiny.error(metrics["bin_sums"].sum() / 3, loss) < 1e-6


def test_bfloat16():
    """Finite and close to float32; parameters and gradients stay float32."""
    made = tiny.method(tiny.config({"model": {"dtype": "bfloat16"}}))
    call = tiny.jit(jax.value_and_grad(lambda p, b, k: made.loss(p, {}, b, k)[0]))
    half_loss, half_grads = call(tiny.base()[2], batch(), KEYS())
    (loss, _), grads = loss_of(batch())
    assert tiny.error(half_loss, loss) < 0.02
    flat, half = (np.concatenate([g.reshape(-1) for g in jax.tree.leaves(tree)]) for tree in (grads, half_grads))
    assert half.dtype == np.float32
    assert flat @ half / np.linalg.norm(flat) / np.linalg.norm(half) > 0.99


def test_sizes_that_the_codec_cuts():
    made = tiny.base()[1]
    assert made.latent_spec((64, 44)) == (32, 22, 12)
    with pytest.raises(ValueError, match="not divisible"):
        made.latent_spec((64, 43))


def test_init():
    """Twins start alike; what must start at zero does, so that HPFA and the pose add nothing at birth."""
    cfg = tiny.config(tiny.MIDDLE_ONLY)
    # rbg keys: a third of the time to compile.
    init = tiny.jit(lambda key: tiny.method(cfg).init(key, tiny.spec(cfg)))
    params = init(jax.random.key(0, impl="rbg"))
    flat = tiny.named(params)
    source, target = (
        {n.removeprefix(net) for n in flat if n.startswith(net) and "attn2" not in n}
        for net in ("source_net/", "target_net/")
    )
    assert len(source & target) == len(source) > 30
    for name in source:
        np.testing.assert_array_equal(flat[f"source_net/{name}"], flat[f"target_net/{name}"])
    zero = [n for n in flat if re.search(r"hpfa/to_out_0/kernel|conv_out/kernel|resnets_./conv2/kernel", n)]
    assert len(zero) == 1 + 3 + 2 * 3  # HPFA's; conv_out of both and of the pose encoder; the resnets' of both
    for name in flat:
        assert np.any(flat[name]) != (name in zero or name.endswith("/bias")), name
    assert np.any(
        flat["target_net/conv_in/kernel"] != init(jax.random.key(1, impl="rbg"))["target_net"]["conv_in"]["kernel"]
    )
