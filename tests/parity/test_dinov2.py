"""DINOv2 against transformers' at small configurations, and its table of positions against torch's interpolation."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import Dinov2Config as TorchConfig
from transformers import Dinov2Model

from tests.parity.compare import NETWORK, check, difference, epsilons, normal, randomise, torch_epsilons
from truepose_jax.models.dinov2 import Dinov2, Dinov2Config, GatedMLP
from truepose_jax.models.resample import bicubic_matrix
from truepose_jax.pretrained.conversion import from_torch, key_maps

SMALL = Dinov2Config(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=35, patch_size=7, position_offset=0.0
)
CASES = {
    # The trained size, where the table is taken as it is; a smaller and an oblong one, with a rest that is dropped.
    "as trained": ({}, (35, 35)),
    "smaller": ({}, (24, 24)),
    "oblong": ({"num_hidden_layers": 1}, (43, 28)),
}


def torch_dinov2(config: Dinov2Config) -> Dinov2Model:
    fields = dataclasses.asdict(config)
    del fields["position_offset"]
    return Dinov2Model(TorchConfig(**fields, layerscale_value=1.0))


@pytest.mark.parametrize("case", CASES)
def test_dinov2(case):
    """Every token after the last norm, and all gradients."""
    changes, hw = CASES[case]
    config = dataclasses.replace(SMALL, **changes)
    check(
        torch_dinov2(config),
        lambda m, pixels: m(pixels).last_hidden_state,
        Dinov2(config),
        [normal(1, 2, *hw, 3)],
        keys=key_maps.DINOV2,
        zero_gradients="/key/bias$",
        tolerance=NETWORK,
    )


class TorchGated(torch.nn.Module):
    """The original's feed-forward layer of giant, under the names of its published file."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.weights_in, self.weights_out = torch.nn.Linear(width, 2 * inner), torch.nn.Linear(inner, width)

    def forward(self, x):
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(torch.nn.functional.silu(gate) * value)


def test_the_gated_layer():
    """Its width is two thirds, in eights, as transformers counts it: 4096 of giant's 1536."""
    config = dataclasses.replace(SMALL, use_swiglu_ffn=True)
    theirs = torch_dinov2(config).encoder.layer[0].mlp
    assert config.inner == theirs.down_proj.in_features and dataclasses.replace(config, hidden_size=1536).inner == 4096
    check(TorchGated(24, config.inner), lambda m, x: m(x), GatedMLP(config), [normal(2, 2, 5, 24)])
    gated = randomise(TorchGated(24, config.inner), 4)
    state = gated.state_dict()
    halves = {"gate_proj": 0, "up_proj": 1}
    split = {f"{n}.{k}": state[f"weights_in.{k}"].chunk(2)[i] for n, i in halves.items() for k in ("weight", "bias")}
    theirs.load_state_dict(split | {f"down_proj.{k}": state[f"weights_out.{k}"] for k in ("weight", "bias")})
    x = torch.from_numpy(normal(5, 2, 24))
    assert difference(gated(x).detach().numpy(), theirs(x).detach().numpy()) < 1e-6


def test_epsilons_are_those_of_transformers():
    found, _ = epsilons(Dinov2(SMALL), normal(0, 1, 35, 35, 3))
    assert found == torch_epsilons(torch_dinov2(SMALL)) and set(found.values()) == {1e-6}


@pytest.mark.parametrize("cells", [16, 36])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_are_interpolated_as_torch_does(cells, offset):
    """offset 0.1: transformers before 2025 and the original gave torch a scale of (n + 0.1) / 37."""
    table = normal(3, 37, 37, 4)
    size = {"size": (cells, cells)} if not offset else {"scale_factor": ((cells + offset) / 37,) * 2}
    want = torch.nn.functional.interpolate(
        torch.from_numpy(table.transpose(2, 0, 1)[None]), mode="bicubic", align_corners=False, **size
    )
    matrix = bicubic_matrix(37, cells, offset)
    found = np.einsum("hi,wj,ijc->hwc", matrix, matrix, table)
    assert difference(found, want[0].numpy().transpose(1, 2, 0)) < 2e-5
    other = bicubic_matrix(37, cells, 0.1 - offset)
    assert np.abs(np.einsum("hi,wj,ijc->hwc", other, other, table) - found).max() > 1e-2


@pytest.mark.parametrize(
    "width,layers,heads,gated,parameters",
    [(1024, 24, 16, False, 304_368_640), (1536, 40, 24, True, 1_136_480_768)],
    ids=["large", "giant"],
)
def test_sizes_of_the_published_models(width, layers, heads, gated, parameters):
    """Less the token of masked training, which is left out; names and shapes are transformers'."""
    config = Dinov2Config(width, layers, heads, use_swiglu_ffn=gated)
    shapes = jax.eval_shape(Dinov2(config).init, jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters - width
    with torch.device("meta"):
        reference = torch_dinov2(config)
    theirs = {key_maps.DINOV2.canonical(name): tuple(x.shape) for name, x in reference.state_dict().items()}
    ours = {need.tensor: need.shape for need in from_torch.wanted(shapes)}
    if gated:  # transformers 5 cuts weights_in in two; save_pretrained writes it whole
        ours, theirs = ({n: s for n, s in x.items() if ".mlp." not in n} for x in (ours, theirs))
    assert ours == {name: shape for name, shape in theirs.items() if "mask_token" not in name}
    one = Dinov2(dataclasses.replace(config, num_hidden_layers=1))
    for side, tokens in ((512, 1297), (224, 257)):  # pixels that fill no patch are dropped
        picture = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        assert jax.eval_shape(one.init_with_output, jax.random.key(0), picture)[0].shape == (1, tokens, width)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"model_type": "dinov2_with_registers"}, "without registers"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_other_models_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Dinov2Config.from_transformers(values)
