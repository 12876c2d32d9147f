"""The strict reader of configurations, and every file in configs/."""

import dataclasses
import importlib.util
import inspect
import json
import pathlib

import pytest

from configs import synthetic_ablation, synthetic_clip, truepose_deepfashion_256, truepose_deepfashion_512
from configs.base import get_config
from configs.variants import VARIANTS
from tests import tiny
from truepose_jax.contrastive import ClipTraining
from truepose_jax.schema import Config, ConfigError, from_config_dict, to_dict, with_defaults

OTHER_CONFIGS = {"variants", "synthetic_clip"}
"""A table of changes, and the settings of another program."""
CONFIGS = sorted(
    path
    for path in (pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py")
    if path.stem not in OTHER_CONFIGS
)


def changed(path, value):
    """configs/base.py as a plain dict with one value replaced; `path` dotted."""
    found = get_config().to_dict()
    group = found
    *groups, key = path.split(".")
    for name in groups:
        group = group[name]
    group[key] = value
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
    assert config.token_width == config.model.unet.cross_attention_dim
    assert from_config_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads(variant):
    changed = {**VARIANTS["full"], **VARIANTS[variant]}
    for module in (synthetic_ablation, truepose_deepfashion_512, truepose_deepfashion_256):
        fusion = from_config_dict(Config, module.get_config(variant)).model.fusion
        assert {name: getattr(fusion, name) for name in changed} == changed
    # zero_init is the paper's default, and the synthetic network's change.
    assert variant in ("full", "zero_init") or fusion != from_config_dict(Config, get_config()).model.fusion


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
    """Settings that came later have their defaults; a setting without one is still missed."""
    config = from_config_dict(Config, get_config())
    saved = json.loads(json.dumps(to_dict(config)))
    del saved["model"]["fusion"]["texture"], saved["model"]["unet"]["norm_eps"]
    assert from_config_dict(Config, with_defaults(Config, saved)) == config
    del saved["model"]["remat"]
    with pytest.raises(ConfigError, match=r"config\.model lacks remat"):
        from_config_dict(Config, with_defaults(Config, saved))


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


@pytest.mark.parametrize("path", ["seed", "model.unet.in_channels", "diffusion.schedule.betas", "data.synthetic"])
def test_missing_key(path):
    values = changed(path, None)
    group = values
    *groups, key = path.split(".")
    for name in groups:
        group = group[name]
    del group[key]
    assert refusal(values) == f"{'.'.join(['config', *groups])} lacks {key}"


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


@pytest.mark.parametrize(
    "path,value,mentions",
    [
        ("model.method", "fpdm9", "model.method"),
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
        ("batch_size", -4, "batch_size"),
        ("total_steps", 0, "total_steps"),
        ("checkpoint.every", 0, "checkpoint.every"),
    ],
)
def test_values_that_cannot_run(path, value, mentions):
    assert mentions in refusal(changed(path, value))


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


def test_json_round_trip():
    config = tiny.config({"optim": {"learning_rate": 0.1 + 0.2}, "model": {"fusion": {"sigma": 1 / 3}}})
    again = from_config_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config and hash(again) == hash(config)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.config().seed = 1
