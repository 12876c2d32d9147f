"""The papers' configurations at full size, as shapes: parameter counts to the last one, and a traced training step."""

import math

import jax
import pytest

from configs import fpdm_deepfashion_512, imagpose_deepfashion_512, ipf_deepfashion
from truepose_jax.config import Config, from_config_dict
from truepose_jax.pretrained.factory import planned
from truepose_jax.training.init import batch_spec

POSE = 1_086_480
"""ControlNet's encoder to 320 features."""


def counts(values) -> dict[str, int]:
    """Of what is trained, and of the frozen towers."""
    config = from_config_dict(Config, values)
    method, frozen = planned(config)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), batch_spec(config)))
    towers = {f"frozen {role}": tree for role, tree in frozen.items() if role != "autoencoder"}
    return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in {**params, **towers}.items()}


@pytest.mark.parametrize("variant,unet", [("sd21", 865_910_724), ("sd15", 859_520_964)])
def test_fpdm(variant, unet):
    """attn2's keys and values are counted apart; together it is the UNet of its Stable Diffusion."""
    found = counts(fpdm_deepfashion_512.get_config(variant))
    assert found.pop("unet") + found.pop("context") == unet
    # DINOv2-L of 37 x 37 positions and a mask token, here for 36 x 36; CLIP and combiner are test_first_stage's.
    assert found.pop("frozen dino") == 304_368_640 - 1024 * (37**2 - 36**2 + 1)
    assert found.pop("frozen ipf") == 303_966_208 + 4_133_377
    projection = {"sd21": 1_576_192, "sd15": 1_379_328}[variant]
    assert found == {"source_projection": projection, "fusion_embedding": 1_574_912, "pose_encoder": POSE}


def test_imagpose():
    """CVA at 21 places is as large as AnimateAnyone's file of motion modules; conv_in reads nine channels."""
    first, last = (counts(imagpose_deepfashion_512.get_config(stage)) for stage in ("stage1", "stage3"))
    assert first["unet"] + first["context"] == 859_535_364
    assert last["unet"] - first["unet"] == 453_209_280
    assert {name: last[name] for name in ("flc", "pose_encoder")} == {"flc": 787_200, "pose_encoder": POSE}
    assert last["frozen dino"] == 86_580_480 - 768 * (37**2 - 16**2 + 1)  # DINOv2-B, for 16 x 16 positions


def test_first_stage():
    found = counts(ipf_deepfashion.get_config())
    assert found == {"clip": 303_966_208, "combiner": 4_133_377}
