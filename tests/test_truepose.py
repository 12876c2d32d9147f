"""TruePose as a whole: loss, dropping, guidance and sampling, with every parameter random."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.schema import MAX_CLASSES, WHOLE_IMAGE
from tests import oracle, tiny
from tests.test_masks import brute_force, brute_force_mask
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.source_net import source_features, source_net, without_gradient
from truepose_jax.models.unet import UNetConfig
from truepose_jax.models.vae import PixelAutoencoder
from truepose_jax.sampling import Sampler
from truepose_jax.sharding import path_of

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


def with_rows(made, new, chosen, fields=None):
    """Rows `chosen` of `made` (of these fields) replaced by those of `new`."""
    mask = np.isin(np.arange(N), chosen)
    return {
        k: np.where(mask.reshape(-1, *[1] * (v.ndim - 1)), new[k], v) if fields is None or k in fields else v
        for k, v in made.items()
    }


def named(tree):
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_every_parameter_gets_a_gradient_but_those_of_no_decay():
    """No gradient ever: SourceNet after its last tap, and its queries, keys and their norm over ONE context token."""
    grads = named(loss_of(batch())[1])
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
    net, rng = source_net(config), np.random.default_rng(0)
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
    for i, name in enumerate(named(params)):
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
    strange = only(with_rows(batch(), other(), [0, 1, 2, 3, 5]), 4)
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
    clean = loss_of({**with_rows(batch(), other(), [2, 5]), **weights})
    nan = {k: np.full_like(v, np.nan) if k in JUNK else v for k, v in batch().items()}
    spoilt = with_rows(batch(), nan, [2, 5], JUNK)
    spoilt["source_parsing"] = with_rows(batch(), other(), [2, 5])["source_parsing"] * 0 + 255
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
    assert np.isnan(loss_of(with_rows(batch(), nan, [1], {"target"}))[0][0])


def test_dropping_is_per_sample_and_keeps_the_pose():
    """A dropped row does not see its source at all (image, map, tokens), a kept one does; both see the pose."""
    of_source = {"source", "source_parsing", "region_tokens", "region_valid", "class_on"}
    dropped = []
    for row in range(N):
        base, metrics = loss_of(only(batch(), row))[0]
        dropped.append(not np.any(metrics["hpfa_rms"]))
        assert np.any(metrics["caa_rms"]) != dropped[-1]
        moved = loss_of(with_rows(only(batch(), row), other(), [row], of_source))[0][0]
        posed = loss_of(with_rows(only(batch(), row), other(), [row], {"target_pose"}))[0][0]
        assert abs(posed - base) > 1e-5 * base
        assert abs(moved - base) < 1e-6 * base if dropped[-1] else abs(moved - base) > 1e-5 * base
        opposite = other() | {"class_on": ~batch()["class_on"]}
        for field in ("source", "region_tokens", "class_on"):
            moved = loss_of(with_rows(only(batch(), row), opposite, [row], {field}))[0][0]
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
                return output, {site.name: {"hpfa": one, "caa": one} for site in self.model.unet.sites}

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


# The parts of sampling, each compiled once. Conditioning needs no TargetNet, denoising no SourceNet and no fusion.


def without(params, *names):
    return {name: tree for name, tree in params.items() if name not in names}


@functools.cache
def parts():
    made = tiny.base()[1]
    condition = tiny.jit(lambda p, b, keep: made.condition(p, {}, b, keep=keep))

    def denoise(p, x, t, c):
        call = made.target_net.apply
        out, norms = call({"params": p["target_net"]}, x, t, None, features=c.sites, after_conv_in=c.pose)
        return out, norms, made.denoise(p, x, t, c)

    params = tiny.base()[2]
    target_only = without(params, "source_net", "fusion", "pose_encoder")
    return (
        lambda b, keep: condition(without(params, "target_net"), b, np.asarray(keep, np.float32)),
        functools.partial(tiny.jit(denoise), target_only),
    )


def noisy():
    rng = np.random.default_rng(11)
    x = rng.standard_normal((N, 8, 5, 12)).astype(np.float32)
    return x, np.array([1, 999, 500, 29, 953, 700], np.int32)


def test_conditioning_equals_the_oracle():
    """From batch to keys and values of every block: F' at t = 0 under the whole image's token, M from the parsing map,
    Eq. 6 and 7, and the K regions of lowest score among the valid ones."""
    _, made, params = tiny.base()
    got = parts()[0](batch(), np.ones(N))
    latents = made.autoencoder.encode_mean({}, batch()["source"])
    call = tiny.jit(lambda p, x, token: made.source_net.apply({"params": p}, x, jnp.zeros(N, jnp.int32), token)[1])
    features = call(params["source_net"], latents, batch()["region_tokens"][:, WHOLE_IMAGE:])
    chosen_rows = set()
    for row in range(N):
        cells = brute_force(batch()["source_parsing"][row], 2).reshape(-1, MAX_CLASSES)
        mask = brute_force_mask(cells, batch()["class_on"][row])
        for site in made.model.unet.sites:
            f = features[site.name][row].astype(np.float64)
            weights = {path: w.astype(np.float64) for path, w in named(params["fusion"][site.name]).items()}
            q, k, v = (f @ weights[f"hpfa/source_to_{x}/kernel"] for x in "qkv")
            settings = {"delta": 0.6, "sigma": 0.3, "reading": "printed", "mask_axis": "key"}
            h = oracle.eq7(np, q, k, v, mask, heads=2, **settings)
            average = oracle.average_scores(q, k, cells, heads=2)
            regions = oracle.chosen_regions(average, batch()["region_valid"][row], 2)
            tokens = batch()["region_tokens"][row, regions]
            chosen_rows.add(tuple(regions))
            for part, x, weight in (("hpfa", h, "hpfa/to_"), ("caa", tokens, "attn2/to_")):
                kv = getattr(got.sites[site.name], part)
                for name in "kv":
                    want = x @ weights[f"{weight}{name}/kernel"]
                    assert tiny.error(getattr(kv, name)[row].reshape(want.shape), want) < 5e-5, (row, site.name, part)
    assert len(chosen_rows) > 3, "always the same regions: the test would see little"


def test_dropped_equals_null_and_zero_features():
    """Everything dropped: keys and values are exactly 0 and each HPFA and CAA adds exactly its output bias."""
    made, params = tiny.base()[1:]
    condition, denoise = parts()
    kept, dropped = condition(batch(), np.ones(N)), condition(batch(), np.zeros(N))
    for site in dropped.sites.values():
        for kv in site:
            assert not np.any(kv.k) and not np.any(kv.v)
    zero = jax.tree.map(lambda x: x if x.dtype == bool else jnp.zeros_like(x), kept.sites)
    out, norms, prediction = denoise(*noisy(), dropped)
    np.testing.assert_array_equal(out, prediction)
    np.testing.assert_array_equal(out, denoise(*noisy(), kept.replace(sites=zero))[0])
    null = denoise(*noisy(), made.null(kept))[0]
    assert tiny.error(out, null) < 2e-6
    assert tiny.error(out, denoise(*noisy(), kept)[0]) > 1e-2
    for site in made.model.unet.sites:
        block, inner = re.fullmatch(r"(.*)_attentions_(.*)", site.name).groups()
        attention, transformer = inner.split("_transformer_blocks_")
        block = params["target_net"][block][f"attentions_{attention}"][f"transformer_blocks_{transformer}"]
        for part, name in (("hpfa", "hpfa"), ("caa", "attn2")):
            bias = np.asarray(block[name]["to_out_0"]["bias"], np.float64)
            np.testing.assert_allclose(norms[site.name][part], np.sqrt(np.mean(bias**2)), rtol=1e-6)


def test_dropping_some_rows_leaves_the_others():
    condition, denoise = parts()
    keep = np.array([1, 0, 1, 1, 0, 1])
    some, every, none = (denoise(*noisy(), condition(batch(), k))[0] for k in (keep, np.ones(N), np.zeros(N)))
    np.testing.assert_array_equal(some[keep == 1], every[keep == 1])
    np.testing.assert_array_equal(some[keep == 0], none[keep == 0])


STEPS, GUIDANCE = 3, 3.5


@functools.cache
def sampler():
    cfg, made, params = tiny.base()
    found = Sampler(made, cfg.diffusion.schedule, STEPS, "leading", GUIDANCE)
    return functools.partial(tiny.jit(found.sample), params, {})


def test_cached_sampler_equals_the_uncached_loop():
    """condition() anew at every step, Eq. 11 and DDIM by hand in float64."""
    cfg, made, _ = tiny.base()
    condition, denoise = parts()
    x = np.stack([jax.random.normal(key, (8, 5, 12)) for key in KEYS()])
    abar = cfg.diffusion.schedule.alphas_cumprod.astype(np.float64)
    timesteps = [667, 334, 1]
    for i, t in enumerate(timesteps):
        conditioning = condition(batch(), np.ones(N))
        at = (x.astype(np.float32), np.full(N, t, np.int32))
        eps = np.asarray(denoise(*at, made.null(conditioning))[0], np.float64)
        eps += GUIDANCE * (np.asarray(denoise(*at, conditioning)[0]) - eps)
        after = abar[timesteps[i + 1]] if i + 1 < STEPS else abar[0]
        x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * eps
    images = np.clip(made.autoencoder.decode({}, x.astype(np.float32)), -1, 1)
    got = np.asarray(sampler()(batch(), KEYS()))
    assert np.mean(np.abs(images) < 1) > 0.05, "everything is clipped: the test would see little"
    assert np.abs(got - images).max() < 1e-4


def test_a_picture_depends_on_its_own_row_and_key_alone():
    order = np.array([2, 0, 1, 5, 4, 3])
    images = np.asarray(sampler()(batch(), KEYS()))
    moved = np.asarray(sampler()(tiny.rows(batch(), order), KEYS()[order]))
    np.testing.assert_allclose(moved, images[order], atol=1e-4)
    mixed = np.asarray(sampler()(with_rows(batch(), other(), [0, 1, 2, 4, 5]), KEYS()))
    np.testing.assert_allclose(mixed[3], images[3], atol=1e-4)
    assert np.abs(mixed[0] - images[0]).max() > 1e-2


@pytest.mark.parametrize("guidance,branches", [(1.0, ["source"]), (3.5, ["none", "source"]), (0.0, ["none", "source"])])
def test_branches_of_the_guidance(guidance, branches):
    """SourceNet and fusion are traced once, outside the loop; at guidance 1 no unconditional branch exists."""
    cfg, _, params = tiny.base()
    seen = []

    class Counting(TruePose):
        def condition(self, *args, **kwargs):
            seen.append("condition")
            return super().condition(*args, **kwargs)

        def denoise(self, params, x_t, t, conditioning):
            seen.append("none" if conditioning.sites is None else "source")
            return super().denoise(without(params, "source_net", "fusion", "pose_encoder"), x_t, t, conditioning)

    made = Counting(cfg.model, cfg.diffusion, PixelAutoencoder(2))
    found = Sampler(made, cfg.diffusion.schedule, 35, "leading", guidance)
    image = jax.eval_shape(found.sample, params, {}, batch(), KEYS())
    assert image.shape == (N, 16, 10, 3)
    assert seen[0] == "condition" and sorted(seen[1:]) == branches


@functools.cache
def gradient_of_pairs():
    """As base_gradient, for N targets of two sources."""
    made = tiny.base()[1]
    return tiny.jit(jax.value_and_grad(lambda p, b, k: made.loss(p, {}, b, k)[0]))


def test_targets_per_source():
    """Three targets a source equal the same sources repeated; a corrupt target leaves its siblings alone."""
    cfg, _, params = tiny.base()
    pairs = tiny.batch(cfg, 4, targets=N, sources=2)
    repeated = tiny.rows(pairs, np.arange(N), sources=np.arange(N) // 3)
    for valid in (np.ones(N), np.array([0, 1, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1])):
        weights = {"valid": valid.astype(np.float32)}
        broken = np.where(valid[:, None, None, None] > 0, pairs["target"], np.nan)
        loss, grads = gradient_of_pairs()(params, {**pairs, **weights, "target": broken}, KEYS())
        (want, _), want_grads = loss_of({**repeated, **weights})
        assert tiny.error(loss, want) < 1e-6
        tiny.check_gradients(grads, want_grads)


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


def test_three_uneven_levels():
    """64x44 pixels at factor 4: latents 16x11 -> 8x6 -> 4x3 and back, loss and shapes."""
    unet = {
        "in_channels": 48,
        "out_channels": 48,
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2, 4),
    }
    cfg = tiny.config({"model": {"size": (64, 44), "pixel_factor": 4, "unet": unet}})
    made = tiny.method(cfg)
    assert made.latent_spec((64, 44)) == (16, 11, 48)
    loss, metrics = tiny.jit(lambda p, b, k: made.loss(p, {}, b, k))(
        tiny.params(made, cfg), tiny.batch(cfg, 3, targets=2), KEYS()[:2]
    )
    assert np.isfinite(loss) and loss > 0.1
    assert metrics["hpfa_rms"].shape == (len(cfg.model.unet.sites),)
    with pytest.raises(ValueError, match="not divisible"):
        made.latent_spec((64, 42))


def test_init():
    """Twins start alike; what must start at zero does, so that HPFA and the pose add nothing at birth."""
    cfg = tiny.config()
    # rbg keys: a third of the time to compile.
    init = tiny.jit(lambda key: tiny.method(cfg).init(key, tiny.spec(cfg)))
    params = init(jax.random.key(0, impl="rbg"))
    flat = named(params)
    source, target = (
        {n.removeprefix(net) for n in flat if n.startswith(net) and "attn2" not in n}
        for net in ("source_net/", "target_net/")
    )
    assert len(source & target) == len(source) > 40
    for name in source:
        np.testing.assert_array_equal(flat[f"source_net/{name}"], flat[f"target_net/{name}"])
    zero = [n for n in flat if re.search(r"hpfa/to_out_0/kernel|conv_out/kernel|resnets_./conv2/kernel", n)]
    assert len(zero) == 2 + 3 + 2 * 3  # HPFA's; conv_out of both and of the pose encoder; the resnets' of both
    for name in flat:
        assert np.any(flat[name]) != (name in zero or name.endswith("/bias")), name
    assert np.any(
        flat["target_net/conv_in/kernel"] != init(jax.random.key(1, impl="rbg"))["target_net"]["conv_in"]["kernel"]
    )
