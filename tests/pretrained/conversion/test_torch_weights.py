"""Weights of real classes there and back, bit for bit, and every way in which weights can be wrong."""

import copy

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from tests.parity.compare import normal, randomise
from tests.parity.test_clip import SMALL as CLIP_CONFIG
from tests.parity.test_clip import torch_clip
from tests.parity.test_unet import CASES, diffusers_unet
from tests.parity.test_vae import SMALL as VAE_CONFIG
from tests.parity.test_vae import torch_vae
from truepose_jax.models.attention import plain_block
from truepose_jax.models.clip import CLIPVisionModelWithProjection as OurCLIP
from truepose_jax.models.unet import UNet2DCondition
from truepose_jax.models.vae import KLAutoencoder
from truepose_jax.pretrained.conversion import from_torch, key_maps, to_torch
from truepose_jax.pretrained.conversion.from_torch import ConversionError

UNET_CONFIG = CASES["linear"][0]


def unet_shapes():
    inputs = normal(0, 1, 8, 8, UNET_CONFIG.in_channels), np.zeros(1, np.int32), normal(0, 1, 1, 24)
    return jax.eval_shape(UNet2DCondition(UNET_CONFIG, plain_block).init, jax.random.key(0), *inputs)["params"]


def clip_shapes():
    return jax.eval_shape(OurCLIP(CLIP_CONFIG).init, jax.random.key(0), normal(0, 1, 24, 24, 3))["params"]


# name: (our shapes, table, torch model, its class)
MODELS = {
    "unet": (unet_shapes, key_maps.UNET, lambda: diffusers_unet(UNET_CONFIG), UNet2DConditionModel),
    "vae": (
        lambda: jax.eval_shape(KLAutoencoder(VAE_CONFIG).init, jax.random.key(0)),
        key_maps.VAE,
        lambda: torch_vae(VAE_CONFIG),
        AutoencoderKL,
    ),
    "clip": (
        clip_shapes,
        key_maps.CLIP_VISION,
        lambda: torch_clip(CLIP_CONFIG),
        CLIPVisionModelWithProjection,
    ),
}
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """(name, our shapes, table, torch model, its class)"""
    shapes, keys, make, cls = MODELS[request.param]
    return request.param, shapes(), keys, randomise(make(), 0), cls


@pytest.fixture(scope="module")
def vae():
    """(our shapes, state dict of numpy arrays): the smallest model to try wrong weights on."""
    shapes, _, make, _ = MODELS["vae"]
    return shapes(), {name: tensor.numpy() for name, tensor in randomise(make(), 0).state_dict().items()}


@pytest.mark.parametrize("dtype,how", [("float32", "single"), ("float16", "sharded"), ("bfloat16", "sharded")])
def test_round_trip_is_bit_equal(model, tmp_path, dtype, how):
    """A folder by diffusers or transformers -> fp32 parameters -> a folder that the same class opens."""
    name, shapes, keys, reference, cls = model
    reference = copy.deepcopy(reference).to(TORCH_DTYPES[dtype])
    variant = "fp16" if dtype == "float16" else None
    size = "60KB" if how == "sharded" else "1GB"
    reference.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (how == "sharded")

    params = from_torch.load(tmp_path / "theirs", shapes, keys)
    jax.tree.map(lambda p, s: np.testing.assert_equal((p.shape, p.dtype), (s.shape, np.float32)), params, dict(shapes))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_bytes((tmp_path / "theirs/config.json").read_bytes())
    file = "model.safetensors" if name == "clip" else "diffusion_pytorch_model.safetensors"
    to_torch.save(params, tmp_path / "ours" / file, dtype)

    opened, info = cls.from_pretrained(
        tmp_path / "ours", torch_dtype=TORCH_DTYPES[dtype], output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = reference.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    for key, tensor in opened.state_dict().items():
        assert tensor.dtype == TORCH_DTYPES[dtype] and torch.equal(tensor, expected[key]), key


def test_parameters_may_be_bf16(vae):
    shapes, state = vae
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jax.numpy.bfloat16), shapes)
    back = dict(to_torch.stream(from_torch.load(narrow, shapes, key_maps.VAE)))
    assert all(back[name].tobytes() == array.tobytes() for name, array in narrow.items())


def test_float16_that_would_overflow_is_an_error():
    with pytest.raises(ConversionError, match="a/kernel reaches 7e\\+04"):
        list(to_torch.stream({"a": {"kernel": np.full((2, 2), 7e4, np.float32)}}, "float16"))


def test_two_parameters_of_one_name_are_an_error():
    with pytest.raises(ConversionError, match=r"both net\.0\.bias"):
        to_torch.infos({"net_0": {"bias": np.zeros(2)}, "net": {"0": {"bias": np.zeros(2)}}})


def test_vision_side_of_a_whole_clip(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = torch_clip(CLIP_CONFIG).config.to_dict()
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_CONFIG.projection_dim))
    state = {name: tensor.numpy() for name, tensor in whole.state_dict().items()}
    # Files of transformers < 4.31 hold this buffer.
    state["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    params = from_torch.load(state, clip_shapes(), key_maps.CLIP_VISION)
    back = dict(to_torch.stream(params))
    assert all(np.array_equal(array, state[name]) for name, array in back.items())
    left_out = from_torch.ignored(from_torch.open_source(state).infos, key_maps.CLIP_VISION)
    assert left_out.keys() == state.keys() - back.keys()
    assert (
        left_out["logit_scale"] == "CLIP's text side" and "buffer" in left_out["vision_model.embeddings.position_ids"]
    )


class Untouchable(from_torch.TensorSource):
    """Fails the test if a tensor is read before all headers are checked."""

    def __init__(self, state):
        self.infos = from_torch.open_source(state).infos

    def read(self, name):
        raise AssertionError(f"read {name}")


def test_all_that_is_wrong_is_listed_before_a_tensor_is_read(vae):
    shapes, state = vae
    zeros, blocks = np.zeros((16, 16, 3, 3)), "decoder.up_blocks.0.resnets"
    state = dict(state)
    state.pop(f"{blocks}.1.conv2.weight")
    state["extra.weight"] = np.zeros((2, 3))
    state[f"{blocks}.1.conv1.weight"] = np.zeros((3, 3, 16, 16), np.float32)
    state[f"{blocks}.0.conv1.weight"], state[f"{blocks}.0.conv2.weight"] = zeros.astype(np.int8), zeros
    state["encoder.mid_block.attentions.0.query.bias"] = np.zeros(16, np.float32)
    with pytest.raises(ConversionError) as error:
        from_torch.load(Untouchable(state), shapes, key_maps.VAE)
    said = str(error.value)
    assert said.startswith("these weights are not the expected AutoencoderKL\n")
    for line in (
        f"1 tensors missing:\n  {blocks}.1.conv2.weight [16, 16, 3, 3]",
        "1 tensors unexpected:\n  extra.weight [2, 3]",
        f"1 tensors of another shape:\n  {blocks}.1.conv1.weight is [3, 3, 16, 16], expected [16, 16, 3, 3]",
        "2 tensors of another type:\n",
        f"{blocks}.0.conv1.weight is int8, which float32 does not hold exactly",
        f"{blocks}.0.conv2.weight is float64, which float32 does not hold exactly",
        "1 tensors given twice:\n  encoder.mid_block.attentions.0.query.bias and",
    ):
        assert line in said, line


def test_long_lists_are_cut(vae):
    shapes, state = vae
    with pytest.raises(ConversionError, match=rf"\.\.\. and {len(state) - from_torch.LISTED} more"):
        from_torch.load({}, shapes, key_maps.VAE)


@pytest.mark.parametrize(
    "keys,tensors,what",
    [
        (key_maps.UNET, {"conv_in.weight": (320, 9, 3, 3)}, "an inpainting UNet"),
        (key_maps.UNET, {key_maps.UNET.strangers[3].name: (320, 1024)}, "an SD2.x UNet"),
        (key_maps.UNET, {"add_embedding.linear_1.weight": (1280, 2816)}, "an SDXL UNet"),
        (key_maps.UNET, {"quant_conv.weight": (8, 8, 1, 1)}, "an autoencoder"),
        (key_maps.VAE, {"time_embedding.linear_1.weight": (1280, 320)}, "a UNet"),
        (key_maps.VAE, {"decoder.conv_in.weight": (512, 16, 3, 3)}, "a 16-channel autoencoder"),
        (key_maps.CLIP_VISION, {"quant_conv.weight": (8, 8, 1, 1)}, "an autoencoder"),
    ],
)
def test_another_model_is_named(keys, tensors, what):
    state = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    with pytest.raises(ConversionError, match=f"not the expected {keys.title}: they are {what}"):
        from_torch.load(state, {"conv": {"bias": np.zeros(1, np.float32)}}, keys)


@pytest.mark.parametrize(
    "path,shape,name",
    [
        (
            "down_blocks_0/attentions_1/proj_in/kernel",
            (1, 1, 4, 8),
            "down_blocks.0.attentions.1.proj_in.weight",
        ),
        ("transformer_blocks_0/ff/net_0/proj/kernel", (4, 8), "transformer_blocks.0.ff.net.0.proj.weight"),
        ("attn1/to_out_0/bias", (8,), "attn1.to_out.0.bias"),
        ("time_embedding/linear_1/kernel", (4, 8), "time_embedding.linear_1.weight"),
        ("norm1/scale", (8,), "norm1.weight"),
        ("embeddings/position_embedding/embedding", (5, 8), "embeddings.position_embedding.weight"),
        ("embeddings/class_embedding", (8,), "embeddings.class_embedding"),
    ],
)
def test_the_rule(path, shape, name):
    in_torch = shape if not path.endswith("kernel") else shape[::-1] if len(shape) == 2 else (8, 4, 1, 1)
    assert key_maps.torch_name(path) == name
    assert key_maps.torch_shape(path, shape) == in_torch
    array = normal(0, *shape)
    there = key_maps.torch_layout(path, array)
    assert there.shape == in_torch
    np.testing.assert_array_equal(key_maps.our_layout(path, there), array)


def test_a_tensor_may_feed_several_parameters():
    """The starting point of TruePose: one UNet for two networks."""
    target = {
        "source_net": {"a": {"bias": np.zeros(2, "f")}},
        "target_net": {"a": {"bias": np.zeros(2, "f")}},
    }
    needs = from_torch.wanted(target, lambda path: key_maps.torch_name(path.split("/", 1)[1]))
    source = from_torch.open_source({"a.bias": np.arange(2, dtype=np.float32)})
    found = key_maps.nest(dict(from_torch.stream(source, needs, key_maps.UNET)))
    assert found["source_net"]["a"]["bias"].tolist() == found["target_net"]["a"]["bias"].tolist() == [0, 1]
    found["source_net"]["a"]["bias"][:] = 5
    assert found["target_net"]["a"]["bias"].tolist() == [0, 1]
