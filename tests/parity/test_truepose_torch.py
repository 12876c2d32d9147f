"""The whole TruePose against interop/torch_truepose.py: two programs written apart from each other, joined by an export.

Every parameter is random. max|difference| / max|reference| per tensor.
"""

import functools
import json
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import synthetic_ablation
from input_pipeline.schema import MAX_CLASSES
from tests import tiny
from tests.parity.compare import difference, torch_epsilons
from truepose_jax.config import Config, from_config_dict
from truepose_jax.diffusion import losses
from truepose_jax.diffusion.guidance import guided
from truepose_jax.diffusion.samplers import sample_latents
from truepose_jax.interop.torch_truepose import SOURCE_MODES, Inputs, TargetBlock, TruePose, coverage_and_masks
from truepose_jax.methods import truepose
from truepose_jax.models import caa
from truepose_jax.models.hpfa import SourceAttention
from truepose_jax.models.masks import coverage_levels, parsing_mask
from truepose_jax.models.vae import PixelAutoencoder
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import write_export
from truepose_jax.pretrained.conversion.truepose_names import EXTRAS, place_of
from truepose_jax.runtime import rng

RUN = {"step": 1, "weights": "raw", "frozen": {}}

# Attention in the middle and on the way up, two heads everywhere. Latents of 16x11 -> 8x6.
PAPERS = {
    "model": {
        "size": (32, 22),
        "unet": {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    }
}
# Carried latents, cosine logits and H = F' + H', on two levels, of which the second has an odd edge.
FLOW = {
    "model": {
        "size": (32, 22),
        "unet": {
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        "fusion": {"carry_latents": True, "cosine": True, "residual": True},
    }
}
NETWORKS = {"the paper's": PAPERS, "carried latents": FLOW}
TARGETS, SOURCES = 6, 3
VALID = np.float32([1, 1, 1, 1, 0, 1])
SEED = 36
"""Of the batch's keys: rows 1, 2 and 5 are kept, with two, one and no region; rows 0 and 3 are dropped."""

WIDE = {"in_channels": 48, "out_channels": 48}

SAMPLING = 5e-5  # measured 5.2e-6
# Measured maxima: CPU, torch 2.13, jax 0.10.2. What HPFA and CAA read has passed through all of SourceNet.
TOLERANCES = {
    "HPFA keys and values": 1e-5,  # 1.2e-6
    "CAA keys and values": 1e-5,  # 1.5e-7
    "pose features": 1e-5,  # 6.6e-7
    "output": 1e-5,  # 1.1e-6
    "output of the null branch": 1e-5,  # 9.8e-7
    "loss": 1e-5,  # 8.9e-8
    "gradient of source_net": 1e-4,  # 3.1e-6
    "gradient of target_net": 1e-4,  # 2.6e-6
    "gradient of HPFA": 1e-4,  # 2.6e-6
    "gradient of CAA": 1e-4,  # 2.2e-6
    "gradient of pose_encoder": 1e-4,  # 1.5e-6
}


class Recording(truepose.TruePose):
    """Keeps what goes into TargetNet and what comes out, for the aux of the function that is being traced."""

    def _target(self, params, x_t, t, conditioning):
        result = super()._target(params, x_t, t, conditioning)
        RECORDED.append((x_t, t, conditioning, result[0]))
        return result


RECORDED: list = []


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def inputs_of(batch, latents) -> Inputs:
    """The batch as the torch program wants it; latents [s h w c]."""
    given = {
        "parsing": batch["source_parsing"],
        "tokens": batch["region_tokens"],
        "present": batch["region_valid"],
        "class_on": batch["class_on"],
    }
    tensors = {name: torch.from_numpy(np.asarray(x)) for name, x in given.items()}
    return Inputs(source=nchw(latents), pose=nchw(batch["target_pose"]), **tensors)


def exported(cfg, params, folder) -> TruePose:
    torch.set_num_threads(1)
    write_export(folder, params, config=cfg, run=RUN)
    return TruePose.from_pretrained(folder)


def torch_parameter(model: TruePose, path: str) -> torch.nn.Parameter:
    place = place_of(path)
    name = place.tensor if place.stem == EXTRAS else f"{place.stem}.{place.tensor}"
    return model.get_parameter(re.sub(r"^hpfa\.(.*\.transformer_blocks\.\d+)\.", r"target_net.\1.hpfa.", name))


def part_of(path: str) -> str:
    if "hpfa" in path:
        return "HPFA"
    return "CAA" if "attn2" in path and not path.startswith("source_net") else path.split("/")[0]


def random_params(made, cfg):
    """Every parameter random. Queries and keys of unit gain: softmaxes as sharp as tiny's turn rounding of 1e-6 into
    6e-5 of some gradients. The seed leaves no logit so near to Eq. 6's kink that the two programs differ on its sign.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf / 2 if path[-2].key.endswith(("to_q", "to_k")) else leaf, tiny.params(made, cfg, seed=1)
    )


@functools.cache
def case(network):
    """(config, parameters, batch, keys): 3 sources of two targets each. Source 1 has one region, source 2 none."""
    cfg = tiny.config(NETWORKS[network])
    made = tiny.method(cfg)
    batch = tiny.batch(cfg, 1, targets=TARGETS, sources=SOURCES)
    there = np.flatnonzero(batch["region_valid"][1, :MAX_CLASSES])
    batch["region_valid"][1, there[1:]] = False
    batch["region_valid"][2, :MAX_CLASSES] = False
    batch["valid"] = VALID
    return cfg, random_params(made, cfg), batch, tiny.keys(SEED, TARGETS)


def noting_epsilons(found):
    """Fills {torch's name of the norm within its UNet: its epsilon} while a network is traced."""

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.GroupNorm | nn.LayerNorm):
            name = key_maps.torch_name("/".join([*context.module.path, "scale"])).removesuffix(".weight")
            assert found.setdefault(name, context.module.epsilon) == context.module.epsilon
        return call(*args, **kwargs)

    return nn.intercept_methods(note)


@functools.cache
def ours(network):
    """(loss, what TargetNet got and gave in both branches, gradients, the eps, t and keep that the loss drew), and the
    epsilons of all norms."""
    cfg, params, batch, keys = case(network)
    made = Recording(cfg.model, cfg.diffusion, PixelAutoencoder(cfg.model.pixel_factor))

    @tiny.jit
    def run(params, batch, keys):
        def loss_of(params):
            RECORDED.clear()
            loss, _ = made.loss(params, {}, batch, keys)
            x_t, t, conditioning, _ = RECORDED[0]
            made.denoise(params, x_t, t, made.null(conditioning))
            return loss, [(c.pose, c.sites, output) for _, _, c, output in RECORDED]

        def drawn(stream, sampler):
            return jax.vmap(lambda key: sampler(rng.key(key, stream)))(keys)

        (loss, seen), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        shape = made.latent_spec(cfg.model.size)
        eps = drawn("noise", lambda key: jax.random.normal(key, shape))
        t = losses.timesteps(drawn("timesteps", jax.random.uniform), 1000)
        keep = drawn("drop", jax.random.uniform) >= cfg.diffusion.drop_rate
        x0, source = (made.autoencoder.encode_mean({}, batch[name]) for name in ("target", "source"))
        return loss, seen, grads, (x0, eps, t, keep.astype(jnp.float32), source)

    epsilons = {}
    with noting_epsilons(epsilons):
        return run(params, batch, keys), epsilons


@pytest.mark.parametrize("network", NETWORKS)
def test_output_loss_and_every_gradient(network, tmp_path):
    cfg, params, batch, _ = case(network)
    (loss, [(pose, sites, output), (_, _, null)], grads, (x0, eps, t, keep, source)), epsilons = ours(network)
    assert keep.tolist() == [0, 1, 1, 0, 1, 1], "choose another seed: rows of every kind are needed"
    rows = VALID > 0  # ours sees zeros in the other one
    model = exported(cfg, params, tmp_path / "export")
    # By value: a norm's epsilon of 1e-6 in the place of 1e-5 moves nothing by more than rounding does.
    assert epsilons == torch_epsilons(model.source_net) | torch_epsilons(model.target_net)
    inputs = inputs_of(batch, source)
    seen = []
    denoise = model.denoise
    model.denoise = lambda *args: seen.append((*args, denoise(*args))) or seen[-1][-1]
    tensors = nchw(x0), nchw(eps), torch.tensor(t), inputs, torch.tensor(keep), torch.tensor(VALID)
    their_loss = model.loss(*tensors)
    their_loss.backward()
    x_t, at, conditioning, their_output = seen[0]
    with torch.no_grad():
        their_null = denoise(x_t, at, conditioning._replace(sites=None))

    measured = dict.fromkeys(TOLERANCES, 0.0)

    def compare(part, mine, theirs):
        found = difference(mine, theirs)
        assert np.isfinite(found), part
        measured[part] = max(measured[part], found)

    compare("loss", loss, their_loss.item())
    for part, mine, theirs in (
        ("output", output, their_output),
        ("output of the null branch", null, their_null),
        ("pose features", pose, conditioning.pose),
    ):
        compare(part, mine[rows], theirs.detach().numpy().transpose(0, 2, 3, 1)[rows])
    assert [block.name for block in cfg.model.unet.sites] == [name.replace(".", "_") for name, _ in model.sites]
    for block, site in zip(cfg.model.unet.sites, conditioning.sites, strict=True):
        hpfa, caa = sites[block.name]
        theirs = {f: x.detach().numpy().transpose(0, 2, 1, 3) for f, x in site._asdict().items() if f != "caa_mask"}
        read = caa.key_mask
        assert read.sum(axis=1).tolist() == [2, 2, 1, 1, 0, 0]
        np.testing.assert_array_equal(read[:4], site.caa_mask[:4, 0, 0].numpy())
        values = hpfa.v
        if cfg.model.fusion.carry_latents:
            latents = np.broadcast_to(hpfa.latents[:, :, None], (*hpfa.v.shape[:3], hpfa.latents.shape[-1]))
            values = np.concatenate([hpfa.v, latents], axis=-1)
        for name, mine in (("k", hpfa.k), ("v", values)):
            compare("HPFA keys and values", mine, theirs[f"hpfa_{name}"])
            assert not mine[keep == 0].any() and not theirs[f"hpfa_{name}"][keep == 0].any()
        for name, mine in (("k", caa.k), ("v", caa.v)):
            compare("CAA keys and values", mine[read], theirs[f"caa_{name}"][read])

    flat = dict(key_maps.leaves(grads))
    theirs = {path: torch_parameter(model, path) for path in flat}
    assert {id(p) for p in theirs.values()} == {id(p) for p in model.parameters()}
    never = re.compile(truepose.without_gradient(cfg.model.unet))
    largest = max(np.abs(g).max() for g in flat.values())
    for path, g in flat.items():
        grad = theirs[path].grad
        if never.search(path):
            # No gradient in exact arithmetic: one key's softmax is 1, and what no tap depends on is not run.
            assert not np.any(g) and (grad is None or grad.abs().max() < 1e-6 * largest), path
            continue
        assert np.abs(g).max() > 1e-6 * largest, path
        compare(f"gradient of {part_of(path)}", key_maps.torch_layout(path, g), grad.numpy())
    report(measured)
    for part, tolerance in TOLERANCES.items():
        assert measured[part] < tolerance, (part, measured[part])


def report(measured):
    print("".join(f"\nparity TruePose: {part}: {value:.1e}" for part, value in measured.items()))


def test_a_network_from_nothing_samples_alike(tmp_path):
    """Pixels as latents, positions, the parsing map in SourceNet, x0 prediction, clipping: DDIM with guidance, and the
    source's side computed once or at every step."""
    settings = synthetic_ablation.get_config("paper")
    settings.model.unet.update(block_out_channels=(16, 16), layers_per_block=0)
    settings.model.autoencoder, settings.model.pixel_factor = "pixels", 4
    settings.model.unet.in_channels = settings.model.unet.out_channels = 48
    settings.diffusion.schedule.clip_x0 = 1.0
    cfg = from_config_dict(Config, settings)
    made, schedule = tiny.method(cfg), cfg.diffusion.schedule
    params, batch = random_params(made, cfg), tiny.batch(cfg, 1, targets=3, sources=1)
    noise = np.random.default_rng(0).standard_normal((3, *made.latent_spec(cfg.model.size)), np.float32)

    @tiny.jit
    def sample(params, batch, noise):
        conditioning = made.condition(params, {}, batch)

        def predict(x, t):
            null = made.null(conditioning)
            conditional = functools.partial(made.denoise, params, x, t, conditioning)
            return guided(lambda: made.denoise(params, x, t, null), [(2.0, conditional)])

        x = sample_latents(predict, noise, schedule, steps=4, spacing=cfg.diffusion.spacing)
        return x, made.autoencoder.encode_mean({}, batch["source"])

    expected, source = sample(params, batch, noise)
    model = exported(cfg, params, tmp_path / "export")
    assert model.parsing_encoder is not None and model.settings["positions"] == "sincos"
    for mode in SOURCE_MODES:
        found = model.sample(inputs_of(batch, source), nchw(noise), steps=4, guidance=2.0, source=mode)
        measured = difference(expected, found.numpy().transpose(0, 2, 3, 1))
        print(f"\nparity TruePose: four steps from nothing, {mode}: {measured:.1e}")
        assert 0.1 < np.abs(expected).max() < 1.1
        assert measured < SAMPLING


def test_denoise_is_one_graph(tmp_path):
    """Under torch.compile, both branches, without a graph break."""
    cfg = tiny.config(tiny.MIDDLE_ONLY)
    model = exported(cfg, tiny.params(tiny.method(cfg), cfg), tmp_path / "export")
    batch = tiny.batch(cfg, 1, targets=2)
    x = torch.randn(2, 12, 8, 5)
    with torch.no_grad():
        conditioning = model.condition(inputs_of(batch, x.numpy().transpose(0, 2, 3, 1)))
        for each in (conditioning, conditioning._replace(sites=None)):
            found = torch.compile(model.denoise, backend="eager", fullgraph=True)(x, torch.tensor([3, 700]), each)
            torch.testing.assert_close(found, model.denoise(x, torch.tensor([3, 700]), each))


def test_masks_and_coverage():
    """64x44 at a factor of 4: 16x11, 8x6, 4x3, 2x2, cells over the edge among them."""
    batch = tiny.batch(tiny.config({"model": {"size": (64, 44), "pixel_factor": 4, "unet": WIDE}}), 5, targets=4)

    @tiny.jit
    def masks(parsing, class_on):
        found = coverage_levels(parsing, num_classes=MAX_CLASSES, factor=4, levels=4)
        return found, [parsing_mask(coverage, class_on) for coverage in found]

    parsing, class_on = batch["source_parsing"], batch["class_on"]
    for ours, theirs in zip(
        zip(*masks(parsing, class_on), strict=True),
        zip(*coverage_and_masks(torch.tensor(parsing), torch.tensor(class_on), factor=4, levels=4), strict=True),
        strict=True,
    ):
        np.testing.assert_allclose(ours[0].reshape(theirs[0].shape), theirs[0], atol=1e-7)
        np.testing.assert_array_equal(ours[1], theirs[1])
        assert 0 < ours[1].mean() < 1


def test_another_models_tensors_are_an_error(tmp_path):
    cfg = tiny.config(tiny.MIDDLE_ONLY)
    exported(cfg, tiny.params(tiny.method(cfg), cfg), tmp_path / "export")
    settings = json.loads((tmp_path / "export/truepose.json").read_text())
    (tmp_path / "export/truepose.json").write_text(json.dumps(settings | {"source_parsing": "coverage", "classes": 20}))
    with pytest.raises(RuntimeError, match="parsing_encoder"):
        TruePose.from_pretrained(tmp_path / "export")
    (tmp_path / "export/truepose.json").write_text(json.dumps(settings | {"carry": {"head": True, "width": 40}}))
    with pytest.raises(RuntimeError, match=r"no half-cell head \(carry\.head\)"):
        TruePose.from_pretrained(tmp_path / "export")


def test_regions_of_one_score_are_taken_in_their_order():
    """Small regions that lie in one coarse cell have exactly one score; torch.topk takes any of them."""
    random = np.random.default_rng(0)
    n, regions, count = 4, 12, 3
    q, k = random.standard_normal((2, 64, n, 2, 8)).astype(np.float32)
    cells = np.eye(n, dtype=np.float32)[random.integers(0, n, (64, regions))].swapaxes(1, 2)
    present = random.random((64, regions)) < 0.8
    ours, _ = caa.lowest_regions(caa.region_scores(SourceAttention(q, k), cells), present, count)
    block = SimpleNamespace(settings={"regions": count})
    torchs = [torch.from_numpy(x) for x in (q.swapaxes(1, 2), k.swapaxes(1, 2), cells, present)]
    theirs, _ = TargetBlock.least_attended(block, *torchs)
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())
