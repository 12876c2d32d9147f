"""CLIP's vision tower with projection against transformers' at small configurations."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as TorchConfig

from tests.parity.compare import NETWORK, check, epsilons, normal, torch_epsilons
from truepose_jax.models import clip
from truepose_jax.pretrained.conversion import from_torch, key_maps

SMALL = clip.CLIPVisionConfig(
    hidden_size=48,
    intermediate_size=80,
    projection_dim=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=24,
    patch_size=8,
)
# The keys' bias adds the same number to all logits of a query.
KEY_BIAS = "k_proj/bias"


def torch_clip(config: clip.CLIPVisionConfig) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(TorchConfig(**dataclasses.asdict(config)))


@pytest.mark.parametrize(
    "changes,batch",
    [
        ({}, 2),
        ({"hidden_act": "gelu", "layer_norm_eps": 1e-3}, 1),
        # 30 pixels hold three patches of 8 and a rest that is dropped.
        ({"image_size": 30, "num_hidden_layers": 1}, 2),
    ],
)
def test_clip(changes, batch):
    """The embedding, and the residual stream after every layer."""
    config = dataclasses.replace(SMALL, **changes)

    def call_torch(m, pixels):
        out = m(pixels, output_hidden_states=True)
        return out.image_embeds, *out.hidden_states

    def call_ours(apply, pixels):
        out = apply(pixels)
        return (out.image_embeds, *out.hidden_states) if isinstance(out, clip.CLIPVisionOutput) else out

    check(
        torch_clip(config),
        call_torch,
        clip.CLIPVisionModelWithProjection(config),
        [normal(1, batch, config.image_size, config.image_size, 3)],
        call_ours=call_ours,
        keys=key_maps.CLIP_VISION,
        zero_gradients=KEY_BIAS,
        tolerance=NETWORK,
    )


def test_quick_gelu_is_not_gelu():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    assert 0.01 < np.abs(clip.quick_gelu(x) - clip.exact_gelu(x)).max() < 0.03


def test_config_from_transformers():
    assert clip.CLIPVisionConfig.from_transformers(TorchConfig(**dataclasses.asdict(SMALL)).to_dict()) == SMALL
    whole = CLIPConfig(vision_config=dataclasses.asdict(SMALL), projection_dim=SMALL.projection_dim).to_dict()
    assert clip.CLIPVisionConfig.from_transformers(whole) == SMALL
    assert clip.CLIPVisionConfig.from_transformers({}).hidden_size == TorchConfig().hidden_size == 768
    with pytest.raises(ValueError, match="siglip"):
        clip.CLIPVisionConfig.from_transformers({"model_type": "siglip"})
    with pytest.raises(ValueError, match="hidden_act"):
        clip.CLIPVisionConfig(hidden_act="relu")


def test_full_size_has_the_parameters_and_epsilons_of_vit_l_14():
    config = clip.CLIPVisionConfig()
    module, pixels = clip.CLIPVisionModelWithProjection(config), normal(0, 1, 224, 224, 3)
    found, shapes = epsilons(module, pixels)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 303_966_208
    with torch.device("meta"):
        reference = torch_clip(config)
    expected = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert {need.tensor: need.shape for need in from_torch.wanted(shapes)} == expected
    assert found == torch_epsilons(reference)


def test_another_image_size_is_an_error():
    with pytest.raises(ValueError, match="24"):
        clip.CLIPVisionModelWithProjection(SMALL).init(jax.random.key(0), normal(0, 1, 32, 32, 3))
