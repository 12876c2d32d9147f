"""TruePose with all that is ours: carried latents, cosine logits, H = F' + H', the half-cell head and every loss."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from truepose_jax.diffusion import losses
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.carry import Carried, carry_losses, half_cells, whole_cells
from truepose_jax.models.masks import coverage_levels, mean_levels
from truepose_jax.runtime import rng

N = tiny.TARGETS
OF_SOURCE = ("source", "source_joints", "source_parsing", "region_tokens", "region_valid")
WEIGHTS = {"flow": 0.3, "pixels": 2.0, "parsing": 0.3}
KEYS = functools.cache(lambda: tiny.keys(3, N))


@functools.cache
def head():
    """(config, method, random parameters)."""
    cfg = tiny.config(tiny.HEAD)
    made = tiny.method(cfg)
    return cfg, made, tiny.params(made, cfg)


@functools.cache
def gradient():
    made = head()[1]
    return tiny.jit(jax.value_and_grad(lambda p, b, k: made.loss(p, {}, b, k), has_aux=True))


def batch(seed=1, **sizes):
    return tiny.batch(head()[0], seed, **{"targets": N, **sizes})


def loss_of(made):
    """((total loss, metrics), gradients)."""
    return gradient()(head()[2], made, KEYS())


def only(made, row):
    return {**made, "valid": (np.arange(N) == row).astype(np.float32)}


def test_every_parameter_gets_a_gradient_but_those_of_no_decay():
    (total, metrics), grads = loss_of(batch())
    grads = tiny.named(grads)
    assert {name.split("/")[0] for name in grads} == {
        "source_net", "target_net", "fusion", "pose_encoder", "limb_encoder", "carry_source", "carry_target",
    }  # fmt: skip
    without = {name for name in grads if re.search(head()[1].no_decay, name)}
    assert {name for name, g in grads.items() if not np.any(g)} == without
    assert without and all(name.startswith("source_net/") for name in without)
    assert "source_net/conv_norm_out/scale" not in without, "the head reads what the last convolution reads"
    assert all(np.isfinite(g).all() for g in grads.values())
    largest = max(np.abs(g).max() for g in grads.values())
    least = {name: np.abs(g).max() / largest for name, g in grads.items() if name not in without}
    assert min(least.values()) > 1e-6, min(least, key=least.get)
    assert total == pytest.approx(0.5 * metrics["loss"] + sum(w * metrics[n] for n, w in WEIGHTS.items()), rel=1e-5)
    assert 1 <= metrics["carry_tokens"] <= 48 and np.all((metrics["hpfa_tokens"] >= 1) & (metrics["hpfa_tokens"] <= 12))
    assert 0 < metrics["carry_inside"] < 1 and head()[1].autoencoder.init(jax.random.key(0)) == {}


def test_dropping_is_per_sample_and_keeps_the_pose():
    """A dropped row does not see its source, nor that one's joints; a kept one sees every field; both see the target's joints."""
    other, dropped = batch(2), []
    for row in range(N):
        total, metrics = loss_of(only(batch(), row))[0]
        dropped.append(metrics["kept"] == 0)

        def moved(*fields, row=row, total=total):
            (found, _), _ = loss_of(tiny.with_rows(only(batch(), row), other, [row], fields))
            return abs(found - total) / total

        assert moved("target_joints") > 1e-6
        if dropped[-1]:
            assert moved(*OF_SOURCE) < 1e-6 and metrics["flow"] == 0
        else:
            assert all(moved(name) > 1e-6 for name in ("source", "source_joints", "source_parsing"))
    assert 0 < sum(dropped) < N, "choose other keys: rows of both kinds are needed"


def test_targets_per_source():
    """Three targets a source equal the same sources repeated, joints and limbs too; a corrupt target leaves the others alone."""
    loss = tiny.jit(lambda p, b, k: head()[1].loss(p, {}, b, k))
    pairs = batch(4, sources=2)
    repeated = tiny.rows(pairs, np.arange(N), sources=np.arange(N) // 3)
    for valid in (np.ones(N), np.array([0, 1, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1])):
        weights = {"valid": valid.astype(np.float32)}
        broken = np.where(valid[:, None, None, None] > 0, pairs["target"], np.nan)
        total, metrics = loss(head()[2], {**pairs, **weights, "target": broken}, KEYS())
        (want, want_metrics), _ = loss_of({**repeated, **weights})
        assert tiny.error(total, want) < 1e-5
        assert tiny.error(metrics["flow"], want_metrics["flow"]) < 1e-5


@pytest.mark.parametrize("change", [tiny.HEAD, {"model": {"fusion": {"cosine": True}}}], ids=["head", "HPFA"])
def test_a_source_of_one_colour_is_carried_as_that_colour(change):
    """`carried`: of the head, or of the last HPFA where nothing is carried else; a softmax over equal cells."""
    cfg = tiny.config(change) if change is tiny.HEAD else tiny.config(tiny.MIDDLE_ONLY, change)
    made = tiny.method(cfg)
    assert made.carries
    given = tiny.batch(cfg, 0, targets=2)
    colour = np.float32([0.3, -0.6, 0.1])
    given["source"][:] = colour
    found = tiny.jit(lambda p, b: made.carried(p, {}, b))(tiny.params(made, cfg), given)
    expected = made.decode({}, made.autoencoder.encode_mean({}, given["source"]))
    assert found.shape == given["target"].shape and np.abs(expected - colour).max() < 0.2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_nothing_is_carried_without_an_attention_at_the_latents_size():
    assert not tiny.method(tiny.config({"model": {"fusion": {"texture": "concat"}}})).carries
    coarse = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    assert not tiny.method(tiny.config({"model": {"size": (16, 12), "unet": coarse}})).carries
    assert tiny.base()[1].carries and head()[1].carries


# --- the losses, of a network whose outputs are known --------------------------------------------------------------------


def known_outputs(count=3):
    random = np.random.default_rng(5)
    draw = lambda *shape: random.standard_normal((count, *shape)).astype(np.float32)  # noqa: E731
    empty = {"tokens": np.full(count, 3.0, np.float32), "inside": np.linspace(0, 1, count, dtype=np.float32)}
    halves = Carried(draw(8, 6, 4), draw(8, 6, 4), draw(8, 6, 4), draw(48, 20), draw(8, 6, 16), empty)
    return draw(4, 3, 16), draw(12, 16), halves


class Known(TruePose):
    """Ends in known arrays; condition gives what was kept."""

    def condition(self, params, frozen, batch, *, keep=None, shown=False):
        return keep

    def _target(self, params, x_t, t, keep):
        output, carried, halves = known_outputs()
        one = jnp.arange(1.0, 4.0)
        return output, {self.model.unet.sites[0].name: {"hpfa_rms": one, "carried": carried}}, halves


def test_each_loss_is_what_it_says():
    """Weights, which samples count (flow: those whose source was kept), the whole cells that HPFA carries, and the halves."""
    cfg = head()[0]
    made = Known(cfg.model, cfg.diffusion, head()[1].autoencoder)
    given = tiny.batch(cfg, 0, targets=3)
    keys = KEYS()[:3]
    total, metrics = tiny.jit(lambda b: made.loss({}, {}, b, keys))(given)
    output, carried, halves = known_outputs()
    codec = made.autoencoder
    x0 = np.asarray(codec.encode_mean({}, given["target"]), np.float64)
    u = tiny.jit(jax.vmap(lambda key: jax.random.uniform(rng.key(key, "drop"))))(keys)
    keep = (u >= cfg.diffusion.drop_rate).astype(float)
    assert metrics["kept"] == keep.sum() and 0 < keep.sum() < 3, "choose other keys: rows of both kinds are needed"

    assert metrics["loss"] == pytest.approx(np.mean((output - x0) ** 2), rel=1e-4)

    @tiny.jit
    def losses_of_head(x0, parsing):
        coverage = coverage_levels(parsing, num_classes=20, factor=4, levels=1)[0].reshape(3, 48, 20)
        return carry_losses(halves, half_cells(x0), parsing, coverage)

    of_head = losses_of_head(x0.astype(np.float32), given["target_parsing"])
    of_site = np.mean((carried.reshape(x0.shape) - x0) ** 2, axis=(1, 2, 3))
    assert metrics["flow"] == pytest.approx(np.mean(keep * (of_site + 1.5 * of_head["flow"])), rel=1e-4)
    assert metrics["parsing"] == pytest.approx(np.mean(of_head["parsing"]), rel=1e-4)
    pictures = [np.asarray(codec.decode({}, x.astype(np.float32))) for x in (output, x0)]
    assert metrics["pixels"] == pytest.approx(np.mean(np.asarray(losses.charbonnier(*pictures))), rel=1e-4)
    weighed = 0.5 * metrics["loss"] + sum(weight * metrics[name] for name, weight in WEIGHTS.items())
    assert total == pytest.approx(weighed, rel=1e-5)
    assert metrics["hpfa_rms"] == pytest.approx(keep @ np.arange(1.0, 4.0) / keep.sum())
    assert metrics["carry_tokens"] == pytest.approx(3) and "carried" not in metrics
    assert metrics["carry_inside"] == pytest.approx(keep @ np.linspace(0, 1, 3) / keep.sum())


# --- cells of several sizes ----------------------------------------------------------------------------------------------


def test_half_cells_and_whole_cells():
    """A whole cell holds its halves row by row, each a patch of 4x4 pixels of the decoded picture."""
    codec = head()[1].autoencoder
    latents = np.random.default_rng(0).standard_normal((2, 4, 3, 16)).astype(np.float32)
    halves = np.asarray(half_cells(latents))
    np.testing.assert_array_equal(whole_cells(halves), latents)
    np.testing.assert_array_equal(halves[:, 3, 4], latents[:, 1, 2, 8:12])
    picture = np.asarray(codec.decode({}, latents))
    patch = np.asarray(codec.to_pixels(halves[:, 3, 4])).reshape(2, 4, 4, 3)
    np.testing.assert_allclose(picture[:, 12:16, 16:20], patch, atol=1e-5)


def test_levels_of_means():
    """5x3 -> 3x2 -> 2x1: an edge cell is the mean of what is there."""
    cells = np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)
    found = mean_levels(cells, 3)
    for level, size in enumerate((1, 2, 4)):
        wanted = [
            cells[:, y : y + size, x : x + size].mean(axis=(1, 2)) for y in range(0, 5, size) for x in range(0, 3, size)
        ]
        np.testing.assert_allclose(found[level], np.stack(wanted, axis=1), atol=1e-6)
