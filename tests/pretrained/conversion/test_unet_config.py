"""UNetConfig.from_diffusers against UNet2DConditionModel's own fields."""

import inspect
import json

import pytest
from diffusers import UNet2DConditionModel

from tests.parity.test_unet import CASES, diffusers_unet
from truepose_jax.models import unet
from truepose_jax.models.unet import UNetConfig

# config.json of stable-diffusion-v1-5's UNet: diffusers 0.6 knew no more fields.
SD15 = """{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
  "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}"""


def test_sd15():
    assert UNetConfig.from_diffusers(json.loads(SD15)) == UNetConfig()


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_writes(case, tmp_path):
    config = CASES[case][0]
    diffusers_unet(config).save_config(tmp_path)
    assert UNetConfig.from_diffusers(json.loads((tmp_path / "config.json").read_text())) == config


def test_every_field_of_diffusers_is_known():
    """Read, fixed, or without influence; and what is left out means what it means there."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    known = unet._DIFFUSERS_DEFAULTS.keys() | unet._FIXED_FIELDS.keys() | {"sample_size", "upcast_attention"}
    assert defaults.keys() == known
    for name, value in unet._DIFFUSERS_DEFAULTS.items():
        assert defaults[name] == value, name
    for name, value in unet._FIXED_FIELDS.items():
        assert defaults[name] == value or (name == "mid_block_only_cross_attention" and not defaults[name]), name


@pytest.mark.parametrize("field", unet._FIXED_FIELDS)
def test_other_values_are_refused(field):
    with pytest.raises(ValueError, match=f"UNet {field} is 'other'; only"):
        UNetConfig.from_diffusers(json.loads(SD15) | {field: "other"})


def test_one_value_per_level():
    values = json.loads(SD15)
    every = {"layers_per_block": [2] * 4, "cross_attention_dim": [768] * 4, "transformer_layers_per_block": [1] * 4}
    assert UNetConfig.from_diffusers(values | every | {"only_cross_attention": [False] * 4}) == UNetConfig()
    for field, value in (("transformer_layers_per_block", [1, 2, 10]), ("cross_attention_dim", [])):
        with pytest.raises(ValueError, match=f"UNet {field} is .*; levels that differ in it are not supported"):
            UNetConfig.from_diffusers(values | {field: value})
