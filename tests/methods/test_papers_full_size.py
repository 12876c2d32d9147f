"""The papers' configurations at full size, as shapes: parameter counts to the last one, and a traced training step."""

import math

import jax
import pytest

from configs import fpdm_deepfashion_512, imagpose_deepfashion_512, ipf_deepfashion
from truepose_jax.config import Config, from_config_dict
from truepose_jax.methods import make_method
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.dinov2 import Dinov2Config
from truepose_jax.models.vae import KLAutoencoder
from truepose_jax.training.init import batch_spec

POSE = 1_086_480
"""ControlNet's encoder to 320 features."""


def counts(values) -> dict[str, int]:
    config = from_config_dict(Config, values)
    width = 1024 if config.model.method == "fpdm" else 768
    networks = {"dino": Dinov2Config(hidden_size=width, num_attention_heads=16), "ipf": CLIPVisionConfig()}
    method = make_method(config, KLAutoencoder(), networks)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), batch_spec(config)))
    return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in params.items()}


@pytest.mark.parametrize("variant,unet", [("sd21", 865_910_724), ("sd15", 859_520_964)])
def test_fpdm(variant, unet):
    """attn2's keys and values are counted apart; together it is the UNet of its Stable Diffusion."""
    found = counts(fpdm_deepfashion_512.get_config(variant))
    assert found.pop("unet") + found.pop("context") == unet
    projection = {"sd21": 1_576_192, "sd15": 1_379_328}[variant]
    assert found == {"source_projection": projection, "fusion_embedding": 1_574_912, "pose_encoder": POSE}


def test_fpdm_of_the_second_stage_alone():
    assert "fusion_embedding" not in counts(fpdm_deepfashion_512.get_config("stage2_only"))


def test_imagpose():
    """CVA at 21 places is as large as AnimateAnyone's file of motion modules; conv_in reads nine channels."""
    first, last = (counts(imagpose_deepfashion_512.get_config(stage)) for stage in ("stage1", "stage3"))
    assert first["unet"] + first["context"] == 859_535_364
    assert last["unet"] - first["unet"] == 453_209_280
    assert {name: last[name] for name in ("flc", "pose_encoder")} == {"flc": 787_200, "pose_encoder": POSE}


def test_first_stage():
    found = counts(ipf_deepfashion.get_config())
    assert found == {"clip": 303_966_208, "combiner": 4_133_377}
