"""The names of an export to PyTorch, and `convert from-torch --model=truepose`, which reads one."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests import tiny
from tests.pretrained.conversion.sd15 import (
    assert_bit_equal,
    diffusers_unet,
    edit_json,
    quick_shapes,
    run,
    save_scheduler,
)
from truepose_jax.config import ConfigError, to_dict
from truepose_jax.models import patch_codec
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import write_export
from truepose_jax.pretrained.conversion.truepose_names import EXTRAS, STEMS, Place, path_of, place_of
from truepose_jax.pretrained.conversion.weights_folder import open_weights
from truepose_jax.runtime.sharding import path_of as tree_path
from truepose_jax.training.init import resolve_init_from

__all__ = ["quick_shapes"]  # a fixture for every test here

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SITE = "down_blocks_1_attentions_0_transformer_blocks_0"
IN_NET = "down_blocks_1/attentions_0/transformer_blocks_0"


@pytest.mark.parametrize(
    "path,stem,tensor",
    [
        (f"target_net/{IN_NET}/attn1/to_k/kernel", "target_net", f"{BLOCK}.attn1.to_k.weight"),
        (f"fusion/{SITE}/attn2/to_v/kernel", "target_net", f"{BLOCK}.attn2.to_v.weight"),
        (f"fusion/{SITE}/hpfa/source_to_q/kernel", "truepose", f"hpfa.{BLOCK}.source_to_q.weight"),
        (f"fusion/{SITE}/hpfa/to_k/kernel", "truepose", f"hpfa.{BLOCK}.to_k.weight"),
        (f"target_net/{IN_NET}/hpfa/to_q/kernel", "truepose", f"hpfa.{BLOCK}.to_q.weight"),
        (f"target_net/{IN_NET}/hpfa/norm/scale", "truepose", f"hpfa.{BLOCK}.norm.weight"),
        (f"target_net/{IN_NET}/hpfa/to_out_0/kernel", "truepose", f"hpfa.{BLOCK}.to_out.0.weight"),
        (
            "fusion/mid_block_attentions_0_transformer_blocks_0/hpfa/to_v/kernel",
            "truepose",
            "hpfa.mid_block.attentions.0.transformer_blocks.0.to_v.weight",
        ),
        ("pose_encoder/conv_2/bias", "truepose", "pose_encoder.conv_2.bias"),
        ("pose_encoder/conv_out/kernel", "truepose", "pose_encoder.conv_out.weight"),
        ("parsing_encoder/class_bias/kernel", "truepose", "parsing_encoder.class_bias.weight"),
        (f"fusion/{SITE}/hpfa/limbs/kernel", "truepose", f"hpfa.{BLOCK}.limbs.weight"),
        (f"target_net/{IN_NET}/hpfa/cosine_scale", "truepose", f"hpfa.{BLOCK}.cosine_scale"),
        (f"target_net/{IN_NET}/hpfa/limb_scale", "truepose", f"hpfa.{BLOCK}.limb_scale"),
        ("limb_encoder/kernel", "truepose", "limb_encoder.weight"),
        ("carry_source/trunk/resnet/norm1/scale", "truepose", "carry_source.trunk.resnet.norm1.weight"),
        ("carry_target/parsing_scale", "truepose", "carry_target.parsing_scale"),
        ("carry_target/alpha_norm/scale", "truepose", "carry_target.alpha_norm.weight"),
        ("carry_target/out_norm/bias", "truepose", "carry_target.out_norm.bias"),
        ("carry_target/out/kernel", "truepose", "carry_target.out.weight"),
    ],
)
def test_names(path, stem, tensor):
    assert place_of(path) == Place(stem, tensor)
    assert path_of(Place(stem, tensor)) == path


@pytest.mark.parametrize("path", ["autoencoder/conv_in/kernel", "fusion/nowhere/hpfa/to_k/kernel"])
def test_paths_that_truepose_has_not(path):
    with pytest.raises(ValueError, match=r"no parameter|no site"):
        place_of(path)


def test_tensors_that_an_export_has_not():
    with pytest.raises(ValueError, match=r"no tensor conv_in\.weight in truepose"):
        path_of(Place(EXTRAS, "conv_in.weight"))


CONFIG = tiny.config({"model": {"source_parsing": "coverage"}})
UNET = CONFIG.model.unet


@pytest.fixture(scope="module")
def params():
    """{path: random array}, float32."""
    shapes = jax.eval_shape(lambda: tiny.method(CONFIG).init(jax.random.key(0), tiny.spec(CONFIG)))
    leaves = jax.tree_util.tree_leaves_with_path(tiny.randomise(shapes, 0))
    return {tree_path(path): np.asarray(leaf) for path, leaf in leaves}


def test_every_parameter_has_a_place_of_its_own(params):
    places = [place_of(path) for path in params]
    assert len(set(places)) == len(places) and {place.stem for place in places} == set(STEMS)
    assert [path_of(place) for place in places] == list(params)


@pytest.fixture
def src(params, tmp_path):
    """An export, made of the names and of diffusers' own config."""
    src = tmp_path / "src"
    tensors = {stem: {} for stem in STEMS}
    for path, array in params.items():
        stem, name = place_of(path)
        tensors[stem][name] = np.ascontiguousarray(key_maps.torch_layout(path, array))
    reference = diffusers_unet(UNET)
    for network in ("source_net", "target_net"):
        assert {n: a.shape for n, a in tensors[network].items()} == {
            n: tuple(t.shape) for n, t in reference.state_dict().items()
        }
        reference.save_config(src / network)
        safetensors.numpy.save_file(tensors[network], src / network / "diffusion_pytorch_model.safetensors")
    safetensors.numpy.save_file(tensors[EXTRAS], src / "truepose.safetensors")
    settings = {"method": "truepose", "source_parsing": "coverage", "fusion": {"regions": 2}}
    (src / "truepose.json").write_text(json.dumps(settings))
    (src / "README.md").write_text("---\nlicense: other\nlicense_name: my-own\n---\n")
    save_scheduler(src, prediction_type="v_prediction")
    return src


def test_an_export_comes_back_bit_for_bit(params, src, tmp_path, capsys):
    code, out, _ = run(capsys, "--model=truepose", f"--src={src}", f"--dst={tmp_path / 'dst'}")
    assert code == 0 and "begins random" not in out and "--config.model.vae=DIR --config.model.clip.path=DIR" in out
    weights = open_weights(tmp_path / "dst")
    assert_bit_equal({path: weights.read(path) for path in weights.infos}, params)
    assert weights.fresh == () and weights.unet == to_dict(UNET) and weights.schedule["prediction"] == "v"
    assert weights.settings["fusion"] == {"regions": 2}
    assert weights.origin["model"] == "truepose" and weights.origin["licence"] == "my-own"
    assert set(weights.origin["files"]) == {
        "source_net/diffusion_pytorch_model.safetensors",
        "target_net/diffusion_pytorch_model.safetensors",
        "truepose.safetensors",
    }


def test_the_head_and_its_codec_come_back(tmp_path, capsys):
    """Of an export with all that is ours; and a run that begins with it finds the codec and is refused other settings."""
    config = tiny.config(tiny.HEAD)
    params = jax.device_get(tiny.params(tiny.method(config), config))
    codec = tmp_path / "mine.safetensors"
    patches = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    safetensors.numpy.save_file(patch_codec.fit(patches)._asdict(), codec)
    about = {"step": 1, "weights": "raw", "frozen": {}}
    write_export(tmp_path / "src", params, config=config, run=about, codec=codec)
    assert run(capsys, "--model=truepose", f"--src={tmp_path / 'src'}", f"--dst={tmp_path / 'dst'}")[0] == 0
    weights = open_weights(tmp_path / "dst")
    found = {path: weights.read(path) for path in weights.infos}
    assert_bit_equal(found, {path: np.asarray(x) for path, x in key_maps.leaves(params)})
    begun = dataclasses.replace(config, init_from=str(tmp_path / "dst"))
    vae = resolve_init_from(begun).model.vae
    for mine, theirs in zip(patch_codec.load(vae)[0], patch_codec.load(str(codec))[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for change, words in (
        ({"carry": {"head": False, "limb_warp": False}}, "--config.model.carry.head=True"),
        ({"fusion": {"residual": False}}, "--config.model.fusion.residual=True"),
    ):
        losses = {"diffusion": {"losses": {"parsing": 0.0}}}
        other = tiny.config(tiny.HEAD, {"model": change, "init_from": str(tmp_path / "dst")}, losses)
        with pytest.raises(ConfigError, match=re.escape(words)):
            resolve_init_from(other)


def refused(capsys, src, dst) -> str:
    code, _, err = run(capsys, "--model=truepose", f"--src={src}", f"--dst={dst}")
    assert code == 2 and err.startswith("error: ") and not dst.exists()
    return err


def test_exports_that_do_not_serve(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    extras = safetensors.numpy.load_file(src / "truepose.safetensors")
    extras["hpfa.other.weight"] = extras.pop("pose_encoder.conv_out.bias")
    safetensors.numpy.save_file(extras, src / "truepose.safetensors")
    err = refused(capsys, src, dst)
    assert "truepose.safetensors: these weights are not the expected" in err
    assert f"missing:\n  pose_encoder.conv_out.bias [{UNET.block_out_channels[0]}]" in err
    assert "unexpected:\n  hpfa.other.weight" in err
    edit_json(src / "target_net/config.json", norm_eps=1e-3)
    assert "configs of source_net and target_net differ" in refused(capsys, src, dst)
    edit_json(src / "truepose.json", method="fpdm")
    assert "method is 'fpdm'" in refused(capsys, src, dst)
    assert "truepose.json: cannot read the JSON file" in refused(capsys, src / "source_net", dst)
