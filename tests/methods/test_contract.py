"""What every method promises the trainer and the samplers, whatever paper it is. Every parameter random."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, tiny_methods
from tests.methods import sharded
from tests.process import environment, run
from truepose_jax import convert
from truepose_jax.config import ConfigError
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.methods import PAPERS, needs
from truepose_jax.pretrained.conversion import paper_files
from truepose_jax.pretrained.conversion.weights_folder import open_weights
from truepose_jax.pretrained.factory import planned
from truepose_jax.sampling.sampler import Sampler, Sampling
from truepose_jax.training.init import batch_spec, resolve_init_from
from truepose_jax.training.step import Trainer

# TruePose's are in test_truepose.py, test_sampling.py.
denoisers = pytest.mark.parametrize("method", ["fpdm", "imagpose"])
ROWS = sharded.ROWS


def test_all_papers_are_tried():
    assert set(PAPERS) == set(tiny_methods.METHODS)


def frozen_of(method):
    return tiny_methods.one(method)[2]


@functools.cache
def gradient(method):
    """(params, frozen, batch, keys) -> (gradients, metrics), compiled once; of `accumulation` micro-batches."""
    cfg, made, *_ = tiny_methods.one(method)
    return tiny.jit(Trainer(cfg, made).gradients)


def inputs(method, seed: int = 1):
    cfg, _, frozen, params = tiny_methods.one(method)
    return params, frozen, tiny_methods.batch(cfg, seed, ROWS), tiny.keys(2, ROWS)


def of_three_rows(method):
    """These, of which row 1 weighs nothing."""
    params, frozen, batch, keys = inputs(method)
    batch["valid"][1] = 0
    return params, frozen, batch, keys


@pytest.mark.parametrize("method", ["ipf", "fpdm", "imagpose"])  # TruePose: test_invalid_rows_weigh_nothing
def test_rows_that_are_not_there_may_hold_anything(method):
    """NaN in every float of a row of weight 0 changes no bit, and neither do fields that the loss does not read."""
    params, frozen, batch, keys = of_three_rows(method)
    want, metrics = gradient(method)(params, frozen, batch, keys)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(want)) and np.isfinite(metrics["loss"])
    assert any(np.any(x) for x in jax.tree.leaves(want))
    read = {*needs(tiny_methods.one(method)[0]).train, "valid"}
    other = {name: x.copy() for name, x in batch.items()}
    for name, x in other.items():
        if name not in read:
            x[:] = x[::-1].copy()
        elif x.dtype == np.float32 and name != "valid":
            x[1] = np.nan
    found, _ = gradient(method)(params, frozen, other, keys)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@denoisers
def test_rows_add_up_wherever_they_stand(method):
    """So that micro-batches (tests/training/test_step.py) are the batch: the gradient of rows 0, 2 and 3 is that of row 0 and
    that of the others, in another order and beside another row."""
    params, frozen, batch, keys = of_three_rows(method)
    want, metrics = gradient(method)(params, frozen, batch, keys)
    parts = []
    for order, valid in (([1, 3, 0, 2], [0, 0, 1, 0]), ([3, 1, 2, 1], [1, 0, 1, 0])):
        rows = {name: x[order] for name, x in batch.items()} | {"valid": np.float32(valid)}
        parts.append(gradient(method)(params, frozen, rows, keys[np.array(order)]))
    (one, of_one), (two, of_two) = parts
    tiny.check_gradients(jax.tree.map(lambda a, b: (a + 2 * b) / 3, one, two), want, whole=1e-4)
    np.testing.assert_allclose((of_one["loss"] + 2 * of_two["loss"]) / 3, metrics["loss"], rtol=1e-5)


def test_a_mesh_gives_the_same(tmp_path):
    """Gradients (compared there) and loss of one device, ipf's matrix of the whole batch too, with parameters cut along both axes
    that cut them."""
    for method in sharded.CUT:
        grads, metrics = gradient(method)(*of_three_rows(method))
        np.savez(tmp_path / f"{method}.npz", loss=metrics["loss"], **tiny.named(grads))
    code, out, errors = run("-m", "tests.methods.sharded", tmp_path, env=environment(devices=8))
    assert code == 0, errors[-3000:]
    report = json.loads(out.splitlines()[-1])
    assert report.keys() == {*sharded.CUT}
    for method, found in report.items():
        assert found["loss"] < 1e-5 and {*found["cut"]} == {"fsdp", "tensor"}, method


def test_a_loss_of_whole_batches_is_not_cut():
    with pytest.raises(ConfigError, match=r"compares all rows of a batch: optim\.accumulation must be 1"):
        tiny_methods.config("ipf", {"optim": {"accumulation": 2}})


@functools.cache
def parts(method):
    """(condition of a batch with everything kept and with everything dropped, denoise), compiled once."""
    _, made, *_ = tiny_methods.one(method)
    names = {"fpdm": ("pose", "tokens", "fusion"), "imagpose": ("keep_high", "keep_low")}[method]

    def run(params, frozen, batch, x, t):
        none = jnp.zeros(ROWS)
        dropped = {"keep": dict.fromkeys(names, none)} if method == "fpdm" else dict.fromkeys(names, none)
        full, empty = made.condition(params, frozen, batch), made.condition(params, frozen, batch, **dropped)
        denoise = functools.partial(made.denoise, params, x, t)
        return denoise(full), denoise(empty), denoise(made.null(full))

    return tiny.jit(run)


@denoisers
def test_a_dropped_row_is_the_null_branch(method):
    cfg, made, frozen, params = tiny_methods.one(method)
    batch = tiny_methods.batch(cfg, 1, ROWS)
    x = np.random.default_rng(3).standard_normal((ROWS, *made.sample_spec(batch))).astype(np.float32)
    full, dropped, null = parts(method)(params, frozen, batch, x, np.array([1, 999, 500, 29], np.int32))
    np.testing.assert_allclose(dropped, null, atol=2e-5 * np.abs(null).max())
    assert np.abs(full - null).max() > 1e-2 * np.abs(null).max()


@denoisers
def test_pictures_do_not_depend_on_their_batch(method):
    cfg, made, frozen, params = tiny_methods.one(method)
    # Of x0: where eps is predicted a random network's pictures are clipped everywhere.
    sample = tiny.jit(Sampler(made, Schedule(prediction="x0"), "trailing", Sampling(2, 2.0, "ddpm")).sample)
    batch, keys = tiny_methods.batch(cfg, 1, ROWS), tiny.keys(3, ROWS)
    images = sample(params, frozen, batch, keys)
    assert images.shape == (ROWS, *((4,) if needs(cfg).pictures == 4 else ()), *cfg.model.size, 3)
    assert np.mean(np.abs(images) < 1) > 0.05, "everything is clipped: the test would see little"
    order = np.array([2, 0, 3, 1])
    moved = sample(params, frozen, {name: x[order] for name, x in batch.items()}, keys[order])
    np.testing.assert_allclose(moved, images[order], atol=2e-4)


@denoisers
def test_an_export_comes_back_bit_for_bit(method, tmp_path):
    two_sites = {"model": {"unet": {"up_block_types": ("CrossAttnUpBlock2D",)}}}
    cfg = tiny_methods.config(method, two_sites)
    made, _ = planned(cfg)
    params = tiny.randomise(jax.eval_shape(lambda: made.init(jax.random.key(0), batch_spec(cfg))), 0)
    paper_files.write(tmp_path / "out", params, config=cfg)
    words = [f"--model={method}", f"--src={tmp_path / 'out'}", f"--dst={tmp_path / 'back'}"]
    assert convert.main(["from-torch", *words]) == 0
    weights = open_weights(tmp_path / "back")
    want = tiny.named(params)
    assert weights.infos.keys() == want.keys() and not weights.fresh and weights.method == method
    for path, array in want.items():
        np.testing.assert_array_equal(weights.read(path), array, err_msg=path)
    again = tiny_methods.config(method, {"init_from": str(tmp_path / "back")}, two_sites)
    assert resolve_init_from(again).model.unet == cfg.model.unet


@denoisers
def test_a_branch_of_weight_0_is_not_run(method):
    cfg, made, *_ = tiny_methods.one(method)
    full = jax.eval_shape(made.condition, *inputs(method)[:1], frozen_of(method), tiny_methods.batch(cfg, 1, ROWS))
    assert made.branches(full, 1.0).others == () and made.branches(full, 1.0).base is full
    ((weight, other),) = made.branches(full, 2.0).others
    assert weight == 2.0 and other is full
