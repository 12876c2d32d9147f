"""The half-cell head: what it carries, how it composes, what a dropped source leaves, and its losses."""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.shared_data import standing_joints
from truepose_jax.models import carry
from truepose_jax.models.carry import (
    CarryConfig,
    CarrySource,
    CarryTarget,
    Moved,
    carry_losses,
    compose,
    half_cells,
    move_limbs,
    studio,
    whole_cells,
)
from truepose_jax.models.limbs import limb_coordinates, limb_positions
from truepose_jax.models.masks import coverage_levels
from truepose_jax.models.patch_codec import PatchAutoencoder

H, W, KEPT, CLASSES, HIDDEN = 8, 6, 4, 5, 8
CELLS = H * W
CODEC = PatchAutoencoder(KEPT)
SOURCE, TARGET = CarrySource(8), CarryTarget(8, CODEC, CLASSES)
OPEN, SHUT = 60.0, -60.0
"""Logits of 1 and of 0."""


def inputs(seed=0, sources=2, targets=2):
    """{hidden, latents, coverage, joints of the source; of the target hidden, joints and x_t}, all of half cells of 4 pixels."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    share = np.exp(3 * draw(sources, CELLS, CLASSES))

    def joints(count):
        return standing_joints(4 * H, 4 * W) + 3 * draw(count, 18, 3) * (1, 1, 0)

    return {
        "hidden": draw(sources, H // 2, W // 2, HIDDEN),
        "latents": draw(sources, H, W, KEPT),
        "coverage": share / share.sum(axis=-1, keepdims=True),
        "joints": joints(sources).astype(np.float32),
        "target_hidden": draw(targets, H // 2, W // 2, HIDDEN),
        "target_joints": joints(targets).astype(np.float32),
        "x_t": draw(targets, H, W, KEPT),
    }


def limbs_of(joints):
    return limb_coordinates(joints, image_hw=(4 * H, 4 * W), cells_hw=(H, W))


limbs_seen = tiny.jit(limbs_of)


def side_of(params, made, keep=None):
    limbs = (limbs_of(made[name]) for name in ("joints", "target_joints"))
    given = {"params": params["source"]}
    return SOURCE.apply(given, made["hidden"], made["latents"], made["coverage"], *limbs, keep)


def head_of(params, made, side):
    return TARGET.apply({"params": params["target"]}, made["target_hidden"], made["x_t"], side)


@functools.cache
def random_params():
    def init():
        made = {name: jnp.asarray(x) for name, x in inputs().items()}
        limbs = (limbs_of(made[name]) for name in ("joints", "target_joints"))
        side, source = SOURCE.init_with_output(
            jax.random.key(0), made["hidden"], made["latents"], made["coverage"], *limbs
        )
        target = TARGET.init(jax.random.key(1), made["target_hidden"], made["x_t"], side)
        return {"source": source["params"], "target": target["params"]}

    return tiny.randomise(jax.eval_shape(init), 2)


def params(**target):
    """Random ones, with some of the target's own replaced: scales in logits, modules by {"kernel": ..., "bias": ...}."""
    found = random_params()
    return {"source": found["source"], "target": found["target"] | target}


@functools.cache
def program():
    """(params, inputs, keep) -> (side, what is carried)."""

    def run(params, made, keep):
        side = side_of(params, made, keep)
        return side, head_of(params, made, side)

    return tiny.jit(run)


def run(params, made=None, keep=(1, 1)):
    return program()(params, inputs() if made is None else made, np.asarray(keep, np.float32))


def logit(x):
    return jnp.full((1,), np.log(x), jnp.float32)


OFF = logit(1e-9)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cells(x):
    return x.reshape(len(x), CELLS, -1)


def test_a_one_hot_warp_returns_the_sources_cell():
    """By the limbs' coordinates alone, which are compared through one shared projection."""
    made = inputs()
    _, found = run(params(content_scale=OFF, limb_scale=logit(1e5), parsing_scale=OFF))
    kernel = np.asarray(random_params()["source"]["limbs"]["kernel"], np.float64)
    keys, queries = (
        unit(np.asarray(limbs_seen(made[name]).features, np.float64) @ kernel) for name in ("joints", "target_joints")
    )
    for i in range(2):
        best = (queries[i] @ keys[i].T).argmax(axis=1)
        assert len(set(best)) > 5
        np.testing.assert_allclose(cells(found.warp)[i], cells(made["latents"])[i][best], atol=1e-4)
    np.testing.assert_allclose(found.account["tokens"], 1, atol=1e-3)


def test_content_alone_finds_a_cell_too():
    made = inputs()
    _, found = run(params(content_scale=logit(1e7), limb_scale=OFF, parsing_scale=OFF))
    distances = np.abs(cells(found.warp)[:, :, None] - cells(made["latents"])[:, None]).max(axis=-1)
    assert distances.min(axis=2).max() < 1e-4 and len(np.unique(distances.argmin(axis=2))) > 5


def test_limbs_and_predicted_parsing_add_up_in_one_softmax():
    """logits = s_l cos + s_p (P . coverage - background's share), P the softmax over the person's classes."""
    made = inputs()
    _, found = run(params(content_scale=OFF, limb_scale=logit(5.0), parsing_scale=logit(3.0)))
    kernel = np.asarray(random_params()["source"]["limbs"]["kernel"], np.float64)
    keys, queries = (
        unit(np.asarray(limbs_seen(made[name]).features, np.float64) @ kernel) for name in ("joints", "target_joints")
    )
    for i in range(2):
        worn = softmax(found.parsing[i, :, 1:].astype(np.float64))
        coverage = made["coverage"][i].astype(np.float64)
        logits = 5.0 * queries[i] @ keys[i].T + 3.0 * (worn @ coverage[:, 1:].T - coverage[:, 0])
        p = softmax(logits)
        assert tiny.error(cells(found.warp)[i], p @ cells(made["latents"])[i].astype(np.float64)) < 1e-4
        person = coverage[:, 0] < 0.5
        assert 0 < person.sum() < CELLS
        tokens = np.exp(-(p * np.log(p)).sum(axis=1)).mean()
        assert found.account["tokens"][i] == pytest.approx(tokens, rel=1e-3)
        assert found.account["inside"][i] == pytest.approx(p[:, person].sum(axis=1).mean(), rel=1e-3)


@pytest.mark.parametrize("alpha,shown", [(OPEN, "warp"), (SHUT, "studio")])
def test_alpha_1_shows_what_is_carried_and_alpha_0_the_studio(alpha, shown):
    """To the codec's rounding; and x0 is the residual and what the gates let through of it."""
    alpha_out = {"kernel": jnp.zeros((8, 16)), "bias": jnp.full((16,), alpha)}
    gates = np.repeat(np.float32([0.5, 0.0]), KEPT)
    gates[KEPT:] = [100, 100, -2.5, -100]  # open, open, half, shut
    out = {"kernel": jnp.zeros((3, 3, 8, 2 * KEPT)), "bias": jnp.asarray(gates)}
    side, found = run(params(alpha_out=alpha_out, out=out))
    wanted = found.warp if shown == "warp" else side.studio
    np.testing.assert_allclose(found.composite, wanted, atol=1e-4)
    assert np.abs(found.warp - side.studio).max() > 0.1
    np.testing.assert_allclose(found.x0, 0.5 + found.composite * (1, 1, 0.5, 0), atol=1e-4)


def test_compose_mixes_pixels():
    """Half of the sub-pixels from each side, a row of pixels after the other; as pictures, in the span of the codec."""
    rng = np.random.default_rng(0)
    whole = PatchAutoencoder(48)
    person, behind = (rng.standard_normal((1, 2, 3, 48)).astype(np.float32) for _ in range(2))
    alpha = np.zeros((1, 2, 3, 16), np.float32)
    alpha[..., :6], alpha[..., 6] = 1, 0.25  # the first row and half of the second, and a quarter of the next pixel
    mixed, first, second = (
        np.asarray(whole.to_pixels(x)).reshape(1, 2, 3, 16, 3) for x in (compose(whole, person, behind, alpha), person, behind)
    )  # fmt: skip
    np.testing.assert_allclose(mixed[..., :6, :], first[..., :6, :], atol=1e-4)
    np.testing.assert_allclose(mixed[..., 7:, :], second[..., 7:, :], atol=1e-4)
    np.testing.assert_allclose(mixed[..., 6, :], 0.25 * first[..., 6, :] + 0.75 * second[..., 6, :], atol=1e-4)


def test_studio_is_filled_from_the_background_alone():
    """A plain backdrop comes back everywhere whatever stands before it, and a changing one from the cells about."""
    rng = np.random.default_rng(0)
    background = np.ones((1, 12, 10, 1), np.float32)
    background[:, 2:9, 3:8] = rng.uniform(0, 0.2, (1, 7, 5, 1))
    person = background < 0.5
    plain = np.broadcast_to(np.float32([0.3, -1, 2]), (1, 12, 10, 3))
    junk = 50 * rng.standard_normal(plain.shape).astype(np.float32)
    np.testing.assert_allclose(studio(np.where(person, junk, plain), background), plain, atol=1e-3)

    scene = rng.standard_normal(plain.shape).astype(np.float32)
    found = np.asarray(studio(scene, background))
    wanted = np.zeros((12, 10, 3))
    for y in range(12):
        for x in range(10):
            total, weight = 0.0, 1e-9
            for strength, rows, columns in ((1.0, 1.2, 4.0), (1e-3, 3.0, 12.0), (1e-6, 15.0, 15.0)):
                for r in range(12):
                    for s in range(10):
                        free = np.exp(20 * (background[0, r, s, 0] - 1.0))
                        near = strength * np.exp(-((y - r) ** 2) / 2 / rows**2 - (x - s) ** 2 / 2 / columns**2)
                        total, weight = total + near * free * scene[0, r, s].astype(float), weight + near * free
            wanted[y, x] = total / weight
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


def test_a_picture_without_background_has_a_finite_studio():
    found = np.asarray(studio(np.ones((1, 4, 4, 2), np.float32), np.zeros((1, 4, 4, 1), np.float32)))
    assert np.isfinite(found).all() and np.abs(found).max() <= 1


OF_SOURCE = ("hidden", "latents", "coverage", "joints")


def test_a_dropped_sample_knows_nothing_of_its_source():
    """Whatever the source is, and as `dropped(None)`, which is the branch without a source; the kept one does know."""
    made, other = inputs(), inputs(1)
    exchanged = made | {name: other[name] for name in OF_SOURCE}
    side, found = run(params(), made, keep=(0, 1))
    _, moved = run(params(), exchanged, keep=(0, 1))
    for name in ("x0", "warp", "composite", "parsing", "alpha"):
        np.testing.assert_array_equal(getattr(found, name)[0], getattr(moved, name)[0], err_msg=name)
    assert np.abs(found.x0[1] - moved.x0[1]).max() > 0.01
    assert not np.any(found.warp[0]) and not np.any(found.composite[0])
    kept, _ = run(params(), made)
    none = kept.dropped(None)
    for name in ("values", "studio"):
        assert not np.any(getattr(none, name)) and np.any(getattr(kept, name)[1])
        np.testing.assert_array_equal(getattr(side, name)[0], getattr(none, name)[0])
        np.testing.assert_array_equal(getattr(side, name)[1], getattr(kept, name)[1])


def test_sources_repeat_for_their_targets():
    """A source of two targets, as two pairs."""
    made = inputs(sources=1)
    repeated = made | {name: made[name].repeat(2, axis=0) for name in OF_SOURCE}
    side, found = run(params(), made)
    want_side, wanted = run(params(), repeated)
    for got, want in ((side.keys, want_side.keys), (side.studio, want_side.studio), (found.x0, wanted.x0)):
        assert tiny.error(got, want) < 1e-5


def test_without_source_net_there_is_no_hidden_state():
    """Ablation B1: CLIP in SourceNet's place; the trunk lacks that one projection."""
    made = inputs() | {"hidden": None}
    limbs = [limbs_seen(made[name]) for name in ("joints", "target_joints")]
    shapes = jax.eval_shape(SOURCE.init, jax.random.key(0), None, made["latents"], made["coverage"], *limbs)["params"]
    assert set(random_params()["source"]["trunk"]) - set(shapes["trunk"]) == {"hidden_in"}


# --- the source moved limb by limb ---------------------------------------------------------------------------------------

WHOLE = PatchAutoencoder(48)


@functools.cache
def moving():
    """Of pictures [s 32 24 3] in [-1, 1], with a codec that loses nothing: (pictures, shares of classes)."""

    def run(pictures, parsing, source, target):
        moved = move_limbs(WHOLE, half_cells(WHOLE.encode_mean({}, pictures)), parsing, source, target, classes=CLASSES)
        return WHOLE.decode({}, whole_cells(moved.latents)), moved.coverage

    return tiny.jit(run)


def scene(seed=0, sources=1):
    rng = np.random.default_rng(seed)
    pictures = rng.uniform(-1, 1, (sources, 4 * H, 4 * W, 3)).astype(np.float32)
    return pictures, rng.integers(0, CLASSES, (sources, 4 * H, 4 * W)).astype(np.uint8)


def test_limbs_move_as_opencv_samples():
    """Two targets of one source; colours by four pixels, classes by one, beyond the edge by the last."""
    pictures, parsing = scene()
    standing = standing_joints(4 * H, 4 * W).astype(np.float32)
    targets = np.stack([standing + (7, -2, 0), inputs()["target_joints"][0]]).astype(np.float32)
    found, shares = moving()(pictures, parsing, standing[None], targets)
    positions = tiny.jit(functools.partial(limb_positions, image_hw=(4 * H, 4 * W)))
    at = positions(standing[None].repeat(2, 0), targets) - 0.5
    for i in range(2):
        moved = cv2.remap(pictures[0], at[i], None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        assert np.abs(found[i] - moved).max() < 0.04  # OpenCV places to a 32nd of a pixel
        x, y = np.moveaxis(np.rint(at[i]).astype(int), -1, 0)
        classes = parsing[0][np.clip(y, 0, 4 * H - 1), np.clip(x, 0, 4 * W - 1)]
        (wanted,) = coverage_levels(classes[None], num_classes=CLASSES, factor=4, levels=1)
        assert np.mean(np.abs(shares[i] - wanted.reshape(CELLS, CLASSES)).max(axis=1) > 1e-6) < 0.02


@functools.cache
def head_with_moved():
    """(side without it, what is moved, random parameters, program of the head)."""
    rng = np.random.default_rng(3)
    latents = rng.standard_normal((2, H, W, KEPT)).astype(np.float32)
    moved = Moved(latents, rng.dirichlet(np.ones(CLASSES), (2, CELLS)).astype(np.float32))
    side, _ = run(params())
    made = inputs()
    given = made["target_hidden"], made["x_t"], side.replace(moved=moved)
    shapes = jax.eval_shape(TARGET.init, jax.random.key(0), *given)["params"]
    return (
        side,
        moved,
        tiny.randomise(shapes, 4),
        tiny.jit(lambda params, side: TARGET.apply({"params": params}, *given[:2], side)),
    )


@pytest.mark.parametrize("share, shown", [(OPEN, "moved"), (SHUT, "warp")])
def test_the_predicted_share_is_of_what_moved_limb_by_limb(share, shown):
    side, moved, found, head = head_with_moved()
    kernel = jnp.zeros_like(found["limb_share"]["kernel"])
    found = found | {
        "limb_share": {"kernel": kernel, "bias": jnp.full((KEPT,), share)},
        "alpha_out": {"kernel": jnp.zeros((8, 16)), "bias": jnp.full((16,), OPEN)},
    }
    carried = head(found, side.replace(moved=moved))
    np.testing.assert_allclose(carried.composite, {"moved": moved.latents, "warp": carried.warp}[shown], atol=1e-4)


def test_a_dropped_sample_knows_nothing_of_what_moved():
    side, moved, found, head = head_with_moved()
    other = Moved(moved.latents[::-1], moved.coverage[::-1])
    keep = np.float32([0, 1])
    first, second = (head(found, side.replace(moved=each).dropped(keep)) for each in (moved, other))
    for name in ("x0", "composite", "parsing", "alpha"):
        np.testing.assert_array_equal(getattr(first, name)[0], getattr(second, name)[0], err_msg=name)
        assert np.abs(getattr(first, name)[1] - getattr(second, name)[1]).max() > 1e-3


# --- losses --------------------------------------------------------------------------------------------------------------


def carried(warp, parsing=None, alpha=None):
    empty = np.zeros((len(warp), H, W, 16), np.float32)
    parsing = np.zeros((len(warp), CELLS, CLASSES), np.float32) if parsing is None else parsing
    return carry.Carried(warp, warp, warp, parsing, empty if alpha is None else alpha, {})


def target_of(seed=0):
    """(x0 as half cells, parsing, coverage) of two targets; the first is half background, the second has no person."""
    rng = np.random.default_rng(seed)
    parsing = rng.integers(0, CLASSES, (2, 4 * H, 4 * W)).astype(np.uint8)
    parsing[0, : 2 * H] = 0
    parsing[1] = 0
    coverage = np.zeros((2, CELLS, CLASSES), np.float32)
    for n, (i, j) in enumerate(np.ndindex(H, W)):
        for each in range(CLASSES):
            coverage[:, n, each] = (parsing[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] == each).mean(axis=(1, 2))
    return rng.standard_normal((2, H, W, KEPT)).astype(np.float32), parsing, coverage


def test_flow_is_the_error_of_what_is_carried_on_the_person():
    x0, parsing, coverage = target_of()
    assert not np.any(carry_losses(carried(x0), x0, parsing, coverage)["flow"])
    warp = x0 + np.random.default_rng(1).standard_normal(x0.shape).astype(np.float32)
    found = carry_losses(carried(warp), x0, parsing, coverage)["flow"]
    weights = (1 - coverage[0, :, 0].astype(np.float64)) ** 2
    errors = ((warp - x0)[0].reshape(CELLS, -1).astype(np.float64) ** 2).mean(axis=1)
    assert found[0] == pytest.approx((weights * errors).sum() / (weights.sum() + 1), rel=1e-5)
    assert found[1] == 0
    background = np.where(coverage.reshape(2, H, W, CLASSES)[..., :1] == 1, 9.0, 0.0)
    assert tiny.error(carry_losses(carried(warp + background), x0, parsing, coverage)["flow"], found) < 1e-5


def test_parsing_is_cross_entropy_and_thrice_the_outlines():
    x0, parsing, coverage = target_of()
    rng = np.random.default_rng(2)
    logits, alpha = rng.standard_normal((2, CELLS, CLASSES)), 3 * rng.standard_normal((2, H, W, 16))
    found = carry_losses(carried(x0, *(x.astype(np.float32) for x in (logits, alpha))), x0, parsing, coverage)[
        "parsing"
    ]
    for i in range(2):
        log_p = np.log(softmax(logits[i]))
        classes = -np.mean([coverage[i, n].astype(float) @ log_p[n] for n in range(CELLS)])
        outline = []
        for y in range(4 * H):
            for x in range(4 * W):
                inside, p = parsing[i, y, x] > 0, 1 / (1 + np.exp(-alpha[i, y // 4, x // 4, 4 * (y % 4) + x % 4]))
                outline.append(-np.log(p if inside else 1 - p))
        assert found[i] == pytest.approx(classes + 3 * np.mean(outline), rel=1e-4)
    certain = np.where(coverage > 0, 60.0, SHUT)
    exact = np.where(parsing > 0, OPEN, SHUT).reshape(2, H, 4, W, 4).transpose(0, 1, 3, 2, 4).reshape(2, H, W, 16)
    sure = carry_losses(carried(x0, certain.astype(np.float32), exact.astype(np.float32)), x0, parsing, coverage)
    assert np.all(sure["parsing"] < found) and sure["parsing"][1] < 1e-5


@pytest.mark.parametrize("width", [0, 4, 12, -8])
def test_width_makes_whole_groups(width):
    with pytest.raises(ValueError, match=f"width is {width}; it must be a multiple of 8"):
        CarryConfig(width=width)
