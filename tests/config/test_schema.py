"""The strict reader of configurations, and every file in configs/."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import pathlib

import pytest

from configs import (
    demo,
    fpdm_deepfashion_512,
    imagpose_deepfashion_512,
    imagpose_market,
    synthetic_ablation,
    synthetic_clip,
    synthetic_fpdm,
    synthetic_imagpose,
    truepose_deepfashion_256,
    truepose_deepfashion_512,
)
from configs.base import get_config
from configs.variants import RECIPE, VARIANTS, vary
from experiments.contrastive import ClipTraining
from tests import tiny
from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict, with_defaults
from truepose_jax.training.checkpoint import read_config


def paths(group, prefix=""):
    """(dotted path, value) of every group and setting."""
    for key, value in group.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")


LEAVES = {path: value for path, value in paths(to_dict(Config())) if not isinstance(value, dict)}
GROUPS = [path for path, value in paths(to_dict(Config())) if isinstance(value, dict)]
FLOATS = [path for path, value in LEAVES.items() if type(value) is float]
WHOLE = [path for path, value in LEAVES.items() if type(value) is int]
OTHER_CONFIGS = {"variants", "synthetic_clip"}
"""A table of changes, and the settings of another program."""
CONFIGS = sorted(
    path for path in (pathlib.Path(__file__).parents[2] / "configs").glob("[!_]*.py") if path.stem not in OTHER_CONFIGS
)


def changed(values, value=None):
    """configs/base.py as a plain dict with values replaced, by dotted path: {path: value}, or one path and its value."""
    found = get_config().to_dict()
    for path, new in (values if isinstance(values, dict) else {values: value}).items():
        *groups, key = path.split(".")
        functools.reduce(dict.__getitem__, groups, found)[key] = new
    return found


def refusal(values) -> str:
    with pytest.raises(ConfigError) as error:
        from_config_dict(Config, values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_loads(file):
    """As ml_collections does: by its path. Each is documented and its groups are the schema's."""
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__
    assert len(file.read_text().splitlines()) <= 120
    required = [p for p in inspect.signature(module.get_config).parameters.values() if p.default is p.empty]
    config = from_config_dict(Config, module.get_config(*["" for _ in required]))
    assert from_config_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "module,variants",
    [
        (fpdm_deepfashion_512, fpdm_deepfashion_512.VARIANTS),
        (imagpose_deepfashion_512, [*imagpose_deepfashion_512.STAGES, "B0", "B1", "B2", "B3"]),
        (imagpose_market, ["stage1", "stage3"]),
        (synthetic_fpdm, synthetic_fpdm.VARIANTS),
        (synthetic_imagpose, list(synthetic_imagpose.VARIANTS)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_variant_of_the_other_papers_loads(module, variants):
    found = [to_dict(from_config_dict(Config, module.get_config(name))) for name in variants]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    with pytest.raises(KeyError, match="unknown variant 'none'; known: "):
        module.get_config("none")


def flat(config):
    return {path: value for path, value in paths(to_dict(config)) if not isinstance(value, dict)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads(variant):
    """It changes what it says and nothing else; without our recipe its ablations and readings are those of the paper."""
    wanted = VARIANTS[variant]
    for module in (synthetic_ablation, truepose_deepfashion_512, truepose_deepfashion_256):
        full, found = (flat(from_config_dict(Config, module.get_config(name))) for name in ("full", variant))
        moved = {path for path in full if full[path] != found[path]} - {"total_steps"}  # B2's are the paper's
        assert moved <= set(wanted) and {path: found[path] for path in wanted} == wanted
        if module is synthetic_ablation:  # full has the recipe but for the limb warp, so that every change is one
            assert moved == (set() if variant == "flow" else set(wanted) - {"model.carry.limb_warp"})
        else:
            assert bool(moved) == (variant not in {"full": 0, "zero_init": 0, **RECIPE})


def test_recipe_without_all_of_it():
    """Variant "paper" of the demo is the demo without every setting that is ours, and each part of it is in another variant."""
    found = from_config_dict(Config, vary(demo.get_config(), "paper"))
    assert found.model.fusion.is_paper and found.model.carry == Config().model.carry
    assert found.diffusion.losses == Config().diffusion.losses
    parts = {path for name, change in RECIPE.items() if name != "paper" for path in change}
    assert parts | {"diffusion.losses.latents"} == set(RECIPE["paper"])


@pytest.mark.parametrize("module", [truepose_deepfashion_512, truepose_deepfashion_256])
def test_the_variant_that_carries_latents(module):
    plain, flow = (from_config_dict(Config, module.get_config(name)) for name in ("full", "flow"))
    assert flow.diffusion.losses.flow == 0.3 and flow.model.fusion.out_init == "zeros"
    ours = dict(carry_latents=True, cosine=True, residual=True)
    assert flow.model.fusion == dataclasses.replace(plain.model.fusion, **ours)
    assert dataclasses.replace(flow, model=plain.model, diffusion=plain.diffusion) == plain


def test_unknown_variant():
    with pytest.raises(KeyError, match="unknown variant 'B5'; known: full, B1"):
        synthetic_ablation.get_config("B5")


def test_settings_of_the_clip_trainer():
    values = synthetic_clip.get_config()
    assert from_config_dict(ClipTraining, values).clip.image_size == 32
    values.identities_per_step = 5_000
    with pytest.raises(ConfigError, match="identities_per_step is 5000; it must be from 2 to"):
        from_config_dict(ClipTraining, values)


def test_config_of_an_older_run():
    """The other settings stay as they were saved, and what is no setting is still refused."""
    config = tiny.config()
    saved = json.loads(json.dumps(to_dict(config)))
    del saved["model"]["fusion"], saved["model"]["clip"]["seed"], saved["mesh"]
    assert from_config_dict(Config, with_defaults(Config, saved)) == config
    saved["model"]["fuson"] = {}
    with pytest.raises(ConfigError, match=r"config\.model\.fuson is not a setting; did you mean 'fusion'\?"):
        from_config_dict(Config, with_defaults(Config, saved))


@pytest.mark.parametrize("path", [*LEAVES, *GROUPS])
def test_run_saved_before_a_setting_existed(path, tmp_path):
    """From metadata.json, of every group; a user's own config must have it."""
    saved = json.loads(json.dumps(to_dict(Config())))
    *groups, key = path.split(".")
    group = functools.reduce(dict.__getitem__, groups, saved)
    del group[key]
    assert refusal(saved) == f"{'.'.join(['config', *groups])} lacks {key}"
    (tmp_path / "metadata.json").write_text(json.dumps({"config": saved}))
    assert read_config(tmp_path) == Config()


def test_defaults_are_of_their_types():
    assert from_config_dict(Config, to_dict(Config())) == Config()
    assert repr(from_config_dict(Config, to_dict(Config()))) == repr(Config())


def test_flags_have_the_types_of_the_defaults():
    """What --config.a.b=text is parsed as: the type that stands in base.py's ConfigDict."""
    found = get_config()
    assert type(found.model.size) is tuple and type(found.model.unet.attention_head_dim) is tuple
    assert found.to_dict() == to_dict(Config())


def test_base_is_the_paper():
    config = from_config_dict(Config, get_config())
    fusion, diffusion = config.model.fusion, config.diffusion
    assert (fusion.regions, fusion.delta, fusion.sigma) == (2, 0.6, 0.3)
    assert (fusion.reading, fusion.mask_axis, fusion.out_init) == ("printed", "key", "zeros")
    assert (diffusion.drop_rate, diffusion.steps, diffusion.guidance, diffusion.spacing) == (0.3, 35, 3.5, "leading")
    assert dataclasses.astuple(diffusion.schedule)[:5] == ("scaled_linear", 0.00085, 0.012, 1000, "eps")
    assert (config.optim.learning_rate, config.optim.schedule, config.optim.weight_decay) == (1e-5, "constant", 1e-2)
    assert (config.model.size, config.batch_size, diffusion.timestep_power) == ((512, 352), 12, 1.0)


@pytest.mark.parametrize(
    "path,hint",
    [
        ("seeed", "did you mean 'seed'?"),
        ("optim.learning_rat", "did you mean 'learning_rate'?"),
        ("model.unet.norm_groups", "did you mean 'norm_num_groups'?"),
        ("data.synthetic.xyzzy", "known: background"),
    ],
)
def test_unknown_key(path, hint):
    message = refusal(changed(path, 1))
    assert message.startswith(f"config.{path} is not a setting") and hint in message


@pytest.mark.parametrize(
    "path,value",
    [
        ("seed", 1.0),
        ("seed", "0"),
        ("seed", True),
        ("seed", None),
        ("optim.learning_rate", "1e-4"),
        ("optim.learning_rate", True),
        ("model.remat", 1),
        ("model.remat", "false"),
        ("model.size", 512),
        ("model.size", (512,)),
        ("model.size", (512, 352, 3)),
        ("model.size", "ab"),
        ("model.unet.attention_head_dim", "8"),
        ("model.vae", None),
        ("mesh", 8),
        ("mesh", "data"),
        ("model.unet", [1, 2]),
    ],
)
def test_ill_typed(path, value):
    message = refusal(changed(path, value))
    assert message.startswith(f"config.{path} is {value!r}") and "expected" in message


@pytest.mark.parametrize(
    "path,value,wrong",
    [
        ("model.size", (512.0, 352), "512.0 (float); expected int"),
        ("model.unet.block_out_channels", (320, "640"), "'640' (str); expected int"),
        ("model.unet.down_block_types", ("DownBlock2D", 2), "2 (int); expected str"),
    ],
)
def test_ill_typed_element(path, value, wrong):
    assert refusal(changed(path, value)) == f"config.{path} is {wrong}"


X0 = {"diffusion.schedule.prediction": "x0"}
CODEC = {"model.autoencoder": "patches", "model.unet.in_channels": 96, "model.unet.out_channels": 96}
COSINE = {"model.fusion.cosine": True}
HEAD = {"model.carry.head": True}


@pytest.mark.parametrize(
    "values,message",
    [
        (HEAD | X0 | COSINE, "model.carry.head composes pixels: it needs config.model.autoencoder 'patches'"),
        (
            HEAD | CODEC | X0,
            "model.carry.head joins limb coordinates to HPFA's logits: it needs config.model.fusion.cosine",
        ),
        (HEAD | CODEC | COSINE, "model.carry.head adds to x0: config.diffusion.schedule.prediction must be 'x0'"),
        (
            {"diffusion.losses.flow": 0.3},
            "losses.flow needs config.model.fusion.carry_latents or config.model.carry.head",
        ),
        ({"diffusion.losses.parsing": 0.3} | X0, "losses.parsing needs config.model.carry.head, which predicts it"),
        ({"diffusion.losses.pixels": 2.0}, "prediction is 'eps'; losses.pixels and losses.parsing need 'x0'"),
        ({"diffusion.losses.parsing": 0.3}, "prediction is 'eps'; losses.pixels and losses.parsing need 'x0'"),
        ({"diffusion.losses.latents": -1.0}, "config.diffusion.losses.latents is -1.0; it must be 0 or more"),
        ({"model.autoencoder": "patches"}, "channels are 4 and 4; autoencoder 'patches' needs 96"),
        (CODEC | {"model.patch_channels": 49}, "config.model.patch_channels is 49; it must be from 1 to 48"),
        ({"model.carry.limb_warp": True}, "config.model.carry: limb_warp is of the half-cell head: it needs head"),
        ({"model.carry.width": 12}, "config.model.carry: width is 12; it must be a multiple of 8"),
        (COSINE | {"model.fusion.texture": "concat"}, "settings of HPFA; texture 'concat' has none"),
    ],
)
def test_what_is_ours_refuses_what_it_cannot_do(values, message):
    """In one line; and all of it together is a configuration."""
    assert message in refusal(changed(values))
    every = HEAD | CODEC | X0 | COSINE | {"model.fusion.carry_latents": True, "model.fusion.residual": True}
    every |= {f"diffusion.losses.{name}": 0.5 for name in ("latents", "flow", "pixels", "parsing")}
    assert not from_config_dict(Config, changed(every)).model.fusion.is_paper


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "400 digits"])
@pytest.mark.parametrize("path", FLOATS)
def test_floats_are_finite(path, value):
    assert f"config.{path} is {value}; it must be" in refusal(changed(path, value))


@pytest.mark.parametrize("path", WHOLE)
def test_whole_numbers_have_a_range(path):
    """No setting is a number that may be anything."""
    for value in (-7, 10**400, -(10**400)):
        message = refusal(changed(path, value))
        assert path.rpartition(".")[2] in message and str(value) in message


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("model.method", "fpdm9", "model.method"),
        ("model.method", [1, -1], "model.method"),
        ("model.autoencoder", "vq", "model.autoencoder"),
        ("model.dtype", "float16", "model.dtype"),
        ("model.size", (512, 350), "divisible by 8"),
        ("model.size", (0, 352), "above 0"),
        ("model.unet.in_channels", 9, "in_channels"),
        ("model.unet.norm_num_groups", 7, "norm groups"),
        ("model.unet.up_block_types", ("UpBlock2D",), "up_block_types"),
        ("model.unet.attention_head_dim", (8, 8), "attention_head_dim"),
        ("model.fusion.reading", "literal", "reading"),
        ("model.fusion.mask_axis", "rows", "mask_axis"),
        ("model.fusion.regions", 0, "regions"),
        ("diffusion.schedule.prediction", "score", "prediction"),
        ("diffusion.schedule.betas", "sqrt", "betas"),
        ("diffusion.spacing", "linspace", "diffusion.spacing"),
        ("diffusion.drop_rate", 1.0, "drop_rate"),
        ("diffusion.steps", 0, "diffusion.steps"),
        ("diffusion.timestep_power", 0, "timestep_power"),
        ("data.dataset", "market", "data.dataset"),
        ("data.dataset", "folder", "data.root"),
        ("optim.schedule", "linear", "optim.schedule"),
        ("optim.learning_rate", 0, "optim.learning_rate"),
        ("optim.ema_decay", 1.5, "optim.ema_decay"),
        ("optim.accumulation", 5, "accumulation"),  # 12 is no multiple of 5
        ("total_steps", 0, "total_steps"),
        ("checkpoint.every", 0, "checkpoint.every"),
        ("seed", 2**63, f"config.seed is {2**63}; it must be within 64 bits"),
        ("eval.sheet_rows", -1, "config.eval.sheet_rows is -1; it must be 0 or more"),
        ("diffusion.schedule.steps", 0, "config.diffusion.schedule: schedule.steps is 0; it must be at least 1"),
        ("diffusion.schedule.beta_start", 0.5, "expected 0 < start <= end < 1"),
        ("diffusion.schedule.clip_x0", -1.0, "clip_x0 is -1.0; it must be 0 (none) or more"),
        ("diffusion.schedule.steps", 34, "diffusion.steps is 35; it must be at most diffusion.schedule.steps (34)"),
        ("eval.steps", 1001, "config.eval.steps is 1001; it must be at most diffusion.schedule.steps (1000)"),
        ("model.unet.norm_num_groups", 0, "config.model.unet: UNet norm_num_groups is 0; it must be at least 1"),
        ("model.unet.norm_eps", 0.0, "norm_eps is 0.0; it must be in (0, 1)"),
        ("model.unet.attention_head_dim", 0, "not divisible by 0 heads"),
        ("model.unet.attention_head_dim", (8, 8, 8, -8), "not divisible by -8 heads"),
        ("model.unet.block_out_channels", (), "expected 1 of"),
        ("model.fusion.regions", 21, "model.fusion.regions is 21; parsing maps have at most 20 regions"),
        ("model.clip.heads", 0, "config.model.clip.heads is 0; it must be above 0"),
        ("model.clip.heads", 3, "heads must divide hidden_size"),
        ("model.clip.patch_size", 0, "config.model.clip.patch_size is 0; it must be above 0"),
        ("model.clip.patch_size", 33, "a patch must fit into the image"),
        ("model.clip.layers", 0, "config.model.clip.layers is 0; it must be above 0"),
        ("model.attention", "flash", "config.model.attention is 'flash'; choose one of ('auto', 'reference'"),
        ("model.pixel_factor", 3, "config.model.pixel_factor is 3; choose one of (2, 4, 8)"),
        ("data.synthetic.poses_per_identity", 1, "poses_per_identity is 1; it must be 2 or more"),
        ("optim.b2", 1, "config.optim.b2 is 1.0; it must be in [0, 1)"),
        ("mesh.fsdp", 0, "config.mesh.fsdp is 0; it must be above 0, or -1 for the rest"),
    ],
)
def test_values_that_cannot_run(path, value, message):
    assert message in refusal(changed(path, value))


def test_conversions():
    """Lists become tuples (JSON has none), whole numbers become floats; heads are one number or one per level."""
    config = from_config_dict(Config, changed("model.unet.block_out_channels", [320, 640, 1280, 1280]))
    assert config.model.unet.block_out_channels == (320, 640, 1280, 1280)
    rate = from_config_dict(Config, changed("optim.learning_rate", 1)).optim.learning_rate
    assert rate == 1.0 and type(rate) is float
    for heads in (8, (8, 8, 8, 4)):
        found = from_config_dict(Config, changed("model.unet.attention_head_dim", heads)).model.unet
        assert found.attention_head_dim == heads
        assert found.heads == ((8,) * 4 if heads == 8 else heads)


def test_configs_are_frozen_and_have_the_hash_of_what_they_hold():
    config = tiny.config({"optim": {"learning_rate": 0.1 + 0.2}, "model": {"fusion": {"sigma": 1 / 3}}})
    again = from_config_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config and hash(again) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.config().seed = 1


def test_a_group_in_a_numbers_place_is_refused():
    saved = to_dict(Config()) | {"batch_size": {"a": None}}
    with pytest.raises(ConfigError, match="batch_size"):
        from_config_dict(Config, with_defaults(Config, saved))
