"""From conditioning to pictures: against the oracle, dropped and guided, cached and not. Every parameter is random."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.schema import MAX_CLASSES, WHOLE_IMAGE
from tests import oracle, tiny
from tests.methods.test_truepose import KEYS, N, batch, other
from tests.models.test_masks import brute_force, brute_force_mask
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.vae import PixelAutoencoder
from truepose_jax.sampling.sampler import Sampler, Sampling, cast_kernels, compiler_options

STEPS, GUIDANCE = 3, 3.5


def without(params, *names):
    return {name: tree for name, tree in params.items() if name not in names}


@functools.cache
def parts():
    """(condition, denoise), each compiled once; the first works without TargetNet, the second with nothing but it."""
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


def test_programs_on_a_cpu_do_without_ynnpack():
    """And where XLA knows no such option, as XLA makes them."""
    with pytest.raises(jax.errors.JaxRuntimeError):  # what compiler_options would see of a jaxlib without it
        jax.jit(lambda: 0, compiler_options={"xla_cpu_no_such_option": ""})()
    x = np.ones((256, 256), np.float32)

    def text(**options):
        return jax.jit(lambda x: x @ x + 1, **options).lower(x).compile().as_text()

    assert compiler_options() and "ynn_fusion" not in text(compiler_options=compiler_options())


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
            weights = {path: w.astype(np.float64) for path, w in tiny.named(params["fusion"][site.name]).items()}
            q, k, v = (f @ weights[f"hpfa/source_to_{x}/kernel"] for x in "qkv")
            settings = {"delta": 0.6, "sigma": 0.3, "reading": "printed", "mask_axis": "key"}
            h = oracle.eq7(np, q, k, v, mask, heads=2, **settings)
            average = oracle.average_scores(q, k, cells, heads=2)
            regions = oracle.chosen_regions(average, batch()["region_valid"][row], 2)
            tokens = batch()["region_tokens"][row, regions]
            chosen_rows.add(tuple(regions))
            for part, x, weight in (("texture", h, "hpfa/to_"), ("caa", tokens, "attn2/to_")):
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
            np.testing.assert_allclose(norms[site.name][f"{part}_rms"], np.sqrt(np.mean(bias**2)), rtol=1e-6)


def test_dropping_some_rows_leaves_the_others():
    condition, denoise = parts()
    keep = np.array([1, 0, 1, 1, 0, 1])
    some, every, none = (denoise(*noisy(), condition(batch(), k))[0] for k in (keep, np.ones(N), np.zeros(N)))
    np.testing.assert_array_equal(some[keep == 1], every[keep == 1])
    np.testing.assert_array_equal(some[keep == 0], none[keep == 0])


@functools.cache
def sampler():
    cfg, made, params = tiny.base()
    found = Sampler(made, cfg.diffusion.schedule, "leading", Sampling(STEPS, GUIDANCE))
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
    mixed = np.asarray(sampler()(tiny.with_rows(batch(), other(), [0, 1, 2, 4, 5]), KEYS()))
    np.testing.assert_allclose(mixed[3], images[3], atol=1e-4)
    assert np.abs(mixed[0] - images[0]).max() > 1e-2


@pytest.mark.parametrize("guidance,branches", [(1.0, ["source"]), (3.5, ["none", "source"]), (0.0, ["none"])])
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
    found = Sampler(made, cfg.diffusion.schedule, "leading", Sampling(35, guidance))
    image = jax.eval_shape(found.sample, params, {}, batch(), KEYS())
    assert image.shape == (N, 16, 10, 3)
    assert seen[0] == "condition" and sorted(seen[1:]) == branches


def test_weights_held_in_bfloat16_change_no_bit():
    """Every layer casts them anyway. Vectors stay float32; float32 models are left alone."""
    cfg = tiny.config(tiny.MIDDLE_ONLY, {"model": {"dtype": "bfloat16"}})
    made = tiny.method(cfg)
    params = tiny.params(made, cfg)
    sample = tiny.jit(Sampler(made, cfg.diffusion.schedule, "leading", Sampling(2, 1.0)).sample)
    want = sample(params, {}, batch(), KEYS())
    held = cast_kernels(params, "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(held) if x.ndim > 1} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(held) if x.ndim < 2} == {"float32"}
    np.testing.assert_array_equal(sample(held, {}, batch(), KEYS()), want)
    assert cast_kernels(held, "float32") is held
