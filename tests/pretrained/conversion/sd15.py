"""A tiny Stable Diffusion by diffusers' and transformers' own classes, and what TruePose's parameters should be of it.

`starting_point` says docs/paper.md A24 once more, on the torch modules: layouts come from their types, not from a rule on names.
"""

import copy
import functools
import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from transformers import CLIPConfig, CLIPModel

from tests.parity.compare import randomise
from tests.parity.test_clip import SMALL as SMALL_CLIP
from tests.parity.test_clip import torch_clip
from tests.parity.test_unet import CROSS, PLAIN, config_of, diffusers_unet
from tests.parity.test_vae import torch_vae
from truepose_jax import convert
from truepose_jax.models.vae import AutoencoderKLConfig
from truepose_jax.pretrained.conversion.safetensors_io import open_source

UNET = config_of(CROSS, PLAIN, block_out_channels=(8, 16), attention_head_dim=2, norm_num_groups=4)
FLAT = config_of(CROSS, block_out_channels=(8,), layers_per_block=0, attention_head_dim=2, norm_num_groups=4)
"""One level of two blocks, in the middle and on the way up, for tests that compile it."""
VAE = AutoencoderKLConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@functools.cache
def unet(config=UNET):
    return randomise(diffusers_unet(config), 0)


@functools.cache
def vae():
    return randomise(torch_vae(VAE), 1)


@functools.cache
def clip(width: int = UNET.cross_attention_dim):
    return randomise(torch_clip(SMALL_CLIP.__class__(**(SMALL_CLIP.__dict__ | {"projection_dim": width}))), 2)


def whole_clip():
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, width = clip().config.to_dict(), UNET.cross_attention_dim
    return randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)), 3)


def save_scheduler(folder, **changes):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    PNDMScheduler(**(config | changes)).save_pretrained(folder / "scheduler")


def save_folder(folder, dtype="float32", *, variant=None, shards="1GB", config=UNET):
    """A diffusers folder as the hub has it."""
    for name, model in (("unet", unet(config)), ("vae", vae())):
        model = copy.deepcopy(model).to(DTYPES[dtype])
        model.save_pretrained(folder / name, variant=variant, max_shard_size=shards)
    save_scheduler(folder)
    (folder / "text_encoder").mkdir()
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: creativeml-openrail-m\n---\n# A tiny model\n")
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def numpy(tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def starting_point(dtype="float32") -> dict[str, np.ndarray]:
    """{our path: array in our layout}."""
    found = {}
    for name, module in unet().named_modules():
        kernel = isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        for part, tensor in module.named_parameters(recurse=False):
            array = numpy(tensor.to(DTYPES[dtype]))
            if kernel and part == "weight":
                array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
            leaf = "bias" if part == "bias" else "kernel" if kernel else "scale"
            _place(found, re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/"), leaf, array)
    return found


def _place(found, module, leaf, array):
    found[f"source_net/{module}/{leaf}"] = array
    block, _, inside = module.partition("/transformer_blocks_0/")
    site = f"fusion/{block.replace('/', '_')}_transformer_blocks_0"
    block += "/transformer_blocks_0"
    if inside in ("attn2/to_k", "attn2/to_v"):
        found[f"{site}/{inside}/{leaf}"] = array
    else:
        found[f"target_net/{module}/{leaf}"] = array
    if inside == "attn1/to_q":
        found[f"{site}/hpfa/source_to_q/{leaf}"] = found[f"target_net/{block}/hpfa/to_q/{leaf}"] = array
        width = array.shape[0]
        found[f"target_net/{block}/hpfa/to_out_0/kernel"] = np.zeros((width, width), array.dtype)
        found[f"target_net/{block}/hpfa/to_out_0/bias"] = np.zeros(width, array.dtype)
    if inside in ("attn1/to_k", "attn1/to_v"):
        which = inside.removeprefix("attn1/")
        found[f"{site}/hpfa/source_{which}/{leaf}"] = found[f"{site}/hpfa/{which}/{leaf}"] = array
    if inside == "norm1":
        found[f"target_net/{block}/hpfa/norm/{leaf}"] = array


def read_all(path) -> dict[str, np.ndarray]:
    source = open_source(path)
    return {name: source.read(name) for name in source.infos}


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="package", autouse=True)
def quick_shapes():
    """Tracing the networks takes longer than converting them: once per configuration is enough."""
    traced = convert.truepose_shapes, convert.autoencoder_shapes, convert.clip_shapes
    convert.truepose_shapes, convert.autoencoder_shapes, convert.clip_shapes = map(_cached, traced)
    yield
    convert.truepose_shapes, convert.autoencoder_shapes, convert.clip_shapes = traced


def _cached(function):
    known = {}

    def call(*config):
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in known:
            known[key] = function(*config)
        return known[key]

    return call


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `convert from-torch` in this process."""
    capsys.readouterr()
    code = convert.main(["from-torch", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, "\n".join(line for line in out.err.splitlines() if "convert:" not in line)
