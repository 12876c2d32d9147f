"""The paper's ablations B1 to B4 and the readings that sweeps compare: each against its equation, every weight random."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates

from configs import synthetic_ablation
from input_pipeline.annotations.regions import clip_normalise, square_crop
from tests import oracle, tiny
from truepose_jax.config import Config, from_config_dict
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.attention import Site
from truepose_jax.models.caa import reweighted_scores
from truepose_jax.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection
from truepose_jax.models.clip_source import ClipSource, clip_patches
from truepose_jax.models.hpfa import FusionConfig, KeysValues, SourceAttention
from truepose_jax.models.source_net import self_attention_of, source_features, source_net
from truepose_jax.models.target_net import SiteFeatures, SourceTokens, TruePoseBlock
from truepose_jax.models.vae import PixelAutoencoder
from truepose_jax.pretrained.factory import planned
from truepose_jax.training.init import batch_spec

N = 4
SMALL_CLIP = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=256,
    projection_dim=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
SITE = Site("site", 0, 8, 2)
CONCAT = FusionConfig(texture="concat")
NETS = ("source_net", "target_net")
VARIANTS = {
    "B1": {"features": "clip"},
    "B2": {"texture": "concat", "alignment": "global"},
    "B4": {"texture": "concat"},
    "A5": {"source_attention": "inplace"},
}


@functools.cache
def made(variant):
    """(config, method, params, value and gradients of the loss, denoised with these sources kept and with none at all)."""
    cfg = tiny.config(tiny.MIDDLE_ONLY, {"model": {"fusion": VARIANTS[variant]}, "diffusion": {"drop_rate": 0.5}})
    method = TruePose(cfg.model, cfg.diffusion, PixelAutoencoder(cfg.model.pixel_factor), SMALL_CLIP)
    params = tiny.params(method, cfg)
    frozen = {"clip": clip_params()} if cfg.model.uses_clip else {}
    gradient = tiny.jit(jax.value_and_grad(lambda p, b, k: method.loss(p, frozen, b, k), has_aux=True))

    def denoised(params, batch, keep):
        x, t = jnp.ones((N, 8, 5, 12)), jnp.full(N, 500)
        conditioning = method.condition(params, frozen, batch, keep=keep)
        return method.denoise(params, x, t, conditioning), method.denoise(params, x, t, method.null(conditioning))

    return cfg, method, params, gradient, functools.partial(tiny.jit(denoised), params)


@functools.cache
def clip_params():
    module, pixels = CLIPVisionModelWithProjection(SMALL_CLIP), jnp.zeros((1, 32, 32, 3))
    return tiny.randomise(jax.eval_shape(lambda: module.init(jax.random.key(0), pixels)["params"]), 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_drops(variant):
    """Finite losses, a gradient wherever one belongs, and a dropped source gives what no source at all gives."""
    cfg, method, params, gradient, denoised = made(variant)
    batch = tiny.batch(cfg, 1, targets=N)
    keys = tiny.keys(3, N)
    (loss, metrics), grads = gradient(params, batch, keys)
    assert np.isfinite(loss) and ("hpfa_rms" in metrics) == (cfg.model.fusion.texture == "hpfa")
    still = {name for name, g in tiny.named(grads).items() if not np.any(g)}
    assert all(re.search(method.no_decay, name) for name in still), sorted(still)

    dropped, null = denoised(batch, np.float32([1, 0, 0, 1]))
    full, _ = denoised(batch, np.ones(N, np.float32))
    assert tiny.error(dropped[1:3], null[1:3]) < 2e-6
    assert tiny.error(dropped[[0, 3]], full[[0, 3]]) < 1e-6
    assert tiny.error(full, null) > 1e-2


def test_sources_repeat_for_their_targets():
    """Two targets of one source give what the same pairs give one by one (A5's SourceNet runs per target)."""
    for variant in ("A5", "B1"):
        cfg, *_, denoised = made(variant)
        batch, keep = tiny.batch(cfg, 2, targets=N, sources=2), np.ones(N, np.float32)
        together, _ = denoised(batch, keep)
        apart, _ = denoised(tiny.rows(batch, [0, 1, 2, 3], sources=[0, 0, 1, 1]), keep)
        assert tiny.error(together, apart) < 2e-6, variant


@functools.cache
def concat_inputs():
    rng = np.random.default_rng(0)
    x, f = rng.standard_normal((2, 5, 8)), rng.standard_normal((2, 7, 8))
    block = TruePoseBlock(SITE, CONCAT)
    caa = KeysValues(*(jnp.asarray(rng.standard_normal((2, 2, 2, 4)), jnp.float32) for _ in "kv"))
    features = SiteFeatures(SourceTokens(jnp.asarray(f, jnp.float32), None), caa)
    x32 = jnp.asarray(x, jnp.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x32, None, features)["params"])
    return block, tiny.randomise(shapes, 4), x32, features


def test_concatenated_self_attention_against_torch():
    """B2's and B4's attn1: queries of x, keys and values of [x; F'], one projection for both. Values and gradients."""
    block, params, x, features = concat_inputs()
    # attn2 and the feed-forward add nothing, so that attn1 alone is seen.
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0 if any(p.key in ("attn2", "ff") for p in path) else a, params
    )
    weight = np.random.default_rng(9).standard_normal(x.shape).astype(np.float32)

    @tiny.jit
    def ours(params, x, tokens):
        def total(params, x, tokens):
            out = block.apply({"params": params}, x, None, features._replace(texture=SourceTokens(tokens, None)))[0]
            return jnp.sum(out * weight), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(params, x, tokens)

    (of_params, of_x, of_tokens), out = ours(params, x, features.texture.tokens)
    t = {k: torch.tensor(np.asarray(v, np.float64), requires_grad=True) for k, v in tiny.named(params).items()}
    tx, tf = (torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, features.texture.tokens))
    normed = torch.nn.functional.layer_norm(tx, (8,), t["norm1/scale"], t["norm1/bias"], 1e-5)
    context = torch.cat([normed, tf], 1)
    q, k, v = (
        (y @ t[f"attn1/to_{n}/kernel"]).unflatten(-1, (2, 4)).transpose(1, 2)
        for n, y in (("q", normed), ("k", context), ("v", context))
    )
    fused = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
    want = tx + fused.transpose(1, 2).flatten(2) @ t["attn1/to_out_0/kernel"] + t["attn1/to_out_0/bias"]
    (want * torch.tensor(weight)).sum().backward()
    assert tiny.error(out, want.detach().numpy()) < 1e-5
    assert tiny.error(of_x, tx.grad.numpy()) < 1e-5 and tiny.error(of_tokens, tf.grad.numpy()) < 1e-5
    found = tiny.named(of_params)
    for name in ("attn1/to_q/kernel", "attn1/to_k/kernel", "attn1/to_v/kernel", "attn1/to_out_0/kernel", "norm1/scale"):
        assert tiny.error(found[name], t[name].grad.numpy()) < 1e-5, name


def test_self_attention_of_a_site_is_what_the_block_uses():
    cfg, _, params, *_ = made("B4")
    site = cfg.model.unet.sites[0]
    features = np.random.default_rng(1).standard_normal((2, 40, site.channels)).astype(np.float32)
    found = self_attention_of(params["source_net"], features, site)
    block = params["source_net"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]
    for name, made_here in zip("qk", found, strict=True):
        want = features.astype(np.float64) @ np.asarray(block[f"to_{name}"]["kernel"], np.float64)
        assert tiny.error(np.asarray(made_here).reshape(want.shape), want) < 1e-5


@pytest.mark.parametrize("axis", ["none", "key"])
def test_inplace_source_net(axis):
    """A5: without a mask its features are those of the plain network's own attention; with one, Eq. 7's."""
    unet = made("A5")[0].model.unet
    plain = source_net(unet, FusionConfig())
    config = FusionConfig(source_attention="inplace", mask_axis=axis)
    rng = np.random.default_rng(2)
    x, token = rng.standard_normal((1, 4, 3, 12)).astype(np.float32), rng.standard_normal((1, 12)).astype(np.float32)
    mask = rng.random((1, 12)) < 0.5
    (site,) = unet.sites
    params = made("A5")[2]["source_net"]
    inside = source_net(unet, config)

    @tiny.jit
    def run(params):
        t = jnp.zeros(1, jnp.int32)
        taps = source_features(inside, params, x, token, masks={site.name: mask})
        outs = [
            plain.apply({"params": params}, x, t, token[:, None])[0],
            inside.apply({"params": params}, x, t, token[:, None], features={site.name: mask})[0],
        ]
        return taps[site.name], source_features(plain, params, x, token)[site.name], outs

    tap, normed, (out_plain, out_inside) = run(params)
    block = params["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]
    q, k, v = (normed[0].astype(np.float64) @ np.asarray(block[f"to_{n}"]["kernel"], np.float64) for n in "qkv")
    settings = {"delta": 0.6, "sigma": 0.3, "reading": "printed", "mask_axis": axis}
    want = oracle.eq7(np, q, k, v, mask[0], heads=2, **settings)
    assert tiny.error(tap.fused[0], want) < 2e-5
    assert (tiny.error(out_inside, out_plain) < 1e-6) == (axis == "none")


@pytest.mark.parametrize("score", ["reweighted", "softmax"])
def test_other_scores(score):
    rng = np.random.default_rng(3)
    q, k = (2 * rng.standard_normal((1, 6, 2, 4)).astype(np.float32) for _ in "qk")
    coverage, mask = rng.random((1, 6, 3)).astype(np.float32), rng.random((1, 6)) < 0.5
    got = reweighted_scores(SourceAttention(q, k), coverage, mask, FusionConfig(score=score))
    want = np.zeros(3)
    for head in range(2):
        a = np.array(
            oracle.scores(q[0].reshape(6, 8).astype(np.float64), k[0].reshape(6, 8).astype(np.float64), 2, head)
        )
        for i, j in np.ndindex(6, 6):
            a[i, j] *= oracle.weight_eq6(a[i, j], mask[0, j], delta=0.6, sigma=0.3, reading="printed")
        if score == "softmax":
            a = np.stack([oracle.softmax_row(np, row) for row in a])
        for region in range(3):
            share = coverage[0, :, region] / coverage[0, :, region].sum()
            want[region] += (a.mean(0) * share).sum() / 2
    assert tiny.error(got[0], want) < 1e-5


def test_clip_patches_see_the_whole_picture():
    """B1's CLIP input is the whole-image crop of the region tokens, but for their rounding to bytes."""
    rng = np.random.default_rng(4)
    small = rng.integers(0, 256, (1, 8, 6, 3), np.uint8)
    photo = np.asarray(Image.fromarray(small[0]).resize((48, 64), Image.Resampling.BICUBIC))
    crop = clip_normalise(square_crop(photo, out=32)[None])
    network = CLIPVisionModelWithProjection(SMALL_CLIP)
    states = tiny.jit(lambda p, x: network.apply({"params": p}, x).last_hidden_state)(clip_params(), crop)
    found = tiny.jit(lambda p, x: clip_patches(SMALL_CLIP, p, x))(clip_params(), photo[None] / np.float32(127.5) - 1)
    want = states[:, 1:].reshape(1, 4, 4, -1)
    assert np.abs(found - want).mean() < 0.02 * np.abs(want).mean()


def test_clip_source_reads_where_the_cells_lie():
    """Channel means before the norm: the grid at the cells' centres, by scipy's linear interpolation."""
    from truepose_jax.models.clip_source import _over_image

    grid = np.random.default_rng(5).standard_normal((1, 4, 4, 2)).astype(np.float32)
    found = tiny.jit(lambda x: _over_image(x, (16, 11)))(grid).reshape(16, 11, 2)
    rows = (np.arange(16) + 0.5) * 4 / 16 - 0.5
    columns = (np.arange(11) + 0.5 + (16 - 11) / 2) * 4 / 16 - 0.5
    at = np.meshgrid(rows, columns, indexing="ij")
    for c in range(2):
        want = map_coordinates(grid[0, :, :, c].astype(np.float64), at, order=1, mode="nearest")
        assert tiny.error(found[..., c], want) < 1e-5
    cfg = made("B1")[0]
    net = ClipSource(cfg.model.unet)
    patches, beside = jnp.zeros((2, 4, 4, 64)), [None] * len(cfg.model.unet.block_out_channels)
    shapes = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), patches, (8, 5), beside)[0])
    assert {name: leaf.shape for name, leaf in shapes.items()} == {cfg.model.unet.sites[0].name: (2, 40, 8)}


def test_clip_source_is_told_what_source_net_is_told():
    """Without pretrained weights SourceNet gets coverages and positions; so does the MLP, each at its own cells."""
    changes = {"source_parsing": "coverage", "positions": "sincos", "fusion": VARIANTS["B1"]}
    cfg = tiny.config(tiny.MIDDLE_ONLY, {"model": changes})
    method = TruePose(cfg.model, cfg.diffusion, PixelAutoencoder(cfg.model.pixel_factor), SMALL_CLIP)
    params, batch = tiny.params(method, cfg), dict(tiny.batch(cfg, 1, targets=1))
    p, width = batch["class_on"].shape[1], cfg.model.unet.block_out_channels[0]
    site = cfg.model.unet.sites[0]
    assert params["clip_source"][site.name]["fc1"]["kernel"].shape[0] == SMALL_CLIP.hidden_size + p + width

    @tiny.jit
    def features(parsing):
        return method.reader.read(params, {}, latents, batch | {"source_parsing": parsing}).features

    h, w = (side // cfg.model.pixel_factor for side in cfg.model.size)
    latents, cells = jnp.zeros((1, h, w, cfg.model.unet.in_channels)), -(-w // 2**site.level)
    parsing = np.zeros_like(batch["source_parsing"])
    plain = features(parsing)[site.name]
    assert len(np.unique(plain[0].round(4), axis=0)) > cells, "CLIP sees nothing here: positions tell cells apart"
    step = cfg.model.pixel_factor * 2**site.level
    parsing[:, :step, step : 2 * step] = 3
    changed = np.abs(features(parsing)[site.name] - plain).max(-1) > 1e-4
    assert changed[0].nonzero()[0].tolist() == [1]


def test_eq7_in_place_starts_like_hpfa():
    """fusion.init is of the projections of Eq. 7, wherever they are; TargetNet's own attention stays random."""
    cfg = tiny.config(tiny.MIDDLE_ONLY, {"model": {"fusion": VARIANTS["A5"] | {"init": "identity"}}})

    @tiny.jit
    def kernels():
        params = tiny.method(cfg).init(jax.random.key(0), tiny.spec(cfg))
        inside = (params[net]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"] for net in NETS)
        return [[attn1[name]["kernel"] for name in ("to_q", "to_k", "to_v")] for attn1 in inside]

    for found, identity in zip(kernels(), (True, False), strict=True):
        assert [np.array_equal(x, np.eye(len(x))) for x in found] == [identity] * 3


@pytest.mark.parametrize("variant", ["B1", "B4"])
def test_with_the_recipe(variant):
    """What is ours stays on in the ablations but for what is HPFA's, and goes where a variant says so. Traced only."""
    cfg = from_config_dict(Config, synthetic_ablation.get_config(variant))
    method, frozen = planned(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, clip=Config().model.clip)))
    shapes = jax.eval_shape(lambda key: method.init(key, batch_spec(cfg)), jax.random.key(0))
    _, metrics = jax.eval_shape(method.loss, shapes, frozen, batch_spec(cfg), jax.eval_shape(lambda: tiny.keys(0, 3)))
    ours = {"flow", "pixels", "parsing", "carry_tokens", "hpfa_tokens"} & set(metrics)
    head = {"pixels", "parsing", "carry_tokens"}
    wanted = {"B1": {"flow", "hpfa_tokens"} | head, "B4": {"flow"} | head}
    assert ours == wanted[variant] and "carry_target" in shapes and method.carries
