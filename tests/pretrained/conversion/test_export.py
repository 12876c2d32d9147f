"""An export is opened by diffusers' own classes, holds every parameter to the bit, and says where it comes from."""

import dataclasses
import errno
import functools
import hashlib
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from configs import synthetic_ablation
from configs.variants import vary
from tests import tiny
from tests.pretrained.conversion.sd15 import assert_bit_equal
from tests.records import built, noise_set
from truepose_jax import convert
from truepose_jax.config import Config, from_config_dict, to_dict
from truepose_jax.data.datasets import about_records
from truepose_jax.inference.exported import Exported
from truepose_jax.interop import torch_truepose
from truepose_jax.models import patch_codec
from truepose_jax.models.unet import UNetConfig
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import FILES, write_export
from truepose_jax.pretrained.conversion.origins import SCHEDULE_FIELDS, UNKNOWN_LICENCE, licence_of, schedule_of
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, SafetensorsSource
from truepose_jax.pretrained.conversion.truepose_names import Place, path_of, place_of
from truepose_jax.pretrained.conversion.weights_folder import open_weights
from truepose_jax.pretrained.factory import planned
from truepose_jax.pretrained.frozen_networks import load_autoencoder
from truepose_jax.training.init import batch_spec

RUN = {"step": 1234, "weights": "ema", "frozen": {"autoencoder": "a" * 64, "clip": "c" * 64}}
ORIGIN = {
    "model": "sd15",
    "name": "someone/stable-thing",
    "licence": "creativeml-openrail-m",
    "files": {"unet.safetensors": "b" * 64},
    "clip": {"name": "someone/clip", "licence": "mit"},
}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@functools.cache
def case(name: str):
    """(config, parameters as NumPy arrays) at small widths: the ablations' UNet and one of SD2's kind."""
    if name == "head":
        cfg = tiny.config(tiny.HEAD)
    elif name == "sincos":
        settings = synthetic_ablation.get_config("paper")
        settings.model.unet.block_out_channels = (16, 24)
        cfg = from_config_dict(Config, settings)
    else:
        unet = {
            "in_channels": 12,
            "out_channels": 12,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "use_linear_projection": True,
            "transformer_layers_per_block": 2,
            "attention_head_dim": (1, 4),
            "norm_eps": 1e-3,
        }
        cfg = tiny.config({"model": {"unet": unet}})
    return cfg, jax.device_get(tiny.params(tiny.method(cfg), cfg))


def leaves(params) -> dict[str, np.ndarray]:
    return dict(key_maps.leaves(params))


def written(folder) -> dict[str, np.ndarray]:
    """{our path: the tensor in our layout} of a folder's three files."""
    found = {}
    for stem, file in FILES.items():
        source = SafetensorsSource([folder / file])
        for name in source.infos:
            path = path_of(Place(stem, name))
            found[path] = key_maps.our_layout(path, source.read(name))
    return found


@pytest.mark.parametrize("name", ["linear", "sincos"])
def test_diffusers_opens_both_unets(name, tmp_path):
    """No key missing or left over, every tensor equal, the shape of the network as our configuration has it."""
    cfg, params = case(name)
    report = write_export(tmp_path / "out", params, config=cfg, run=RUN)
    flat = leaves(params)
    placed = {place_of(path): key_maps.torch_layout(path, array) for path, array in flat.items()}
    assert sum(report.tensors.values()) == len(flat) == len(placed)
    assert sum(report.parameters.values()) == sum(x.size for x in flat.values())
    for stem in ("source_net", "target_net"):
        net, info = UNet2DConditionModel.from_pretrained(
            tmp_path / "out", subfolder=stem, output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(info.values()), info
        mine = {place.tensor: array for place, array in placed.items() if place.stem == stem}
        theirs = net.state_dict()
        assert theirs.keys() == mine.keys()
        for key, tensor in theirs.items():
            np.testing.assert_array_equal(tensor.numpy(), mine[key], err_msg=key)
        heads = [block.attentions[0].transformer_blocks[0].attn1.heads for block in (net.mid_block, net.up_blocks[-1])]
        assert heads == [cfg.model.unet.heads[-1], cfg.model.unet.heads[0]]
        again = UNetConfig.from_diffusers(json.loads((tmp_path / "out" / stem / "config.json").read_text()))
        assert again == dataclasses.replace(cfg.model.unet, attention_head_dim=cfg.model.unet.heads)
        assert list(net.config.sample_size) == list(tiny.method(cfg).latent_spec(cfg.model.size)[:2])


@pytest.mark.parametrize("dtype,wide", [("float32", False), ("float16", True), ("bfloat16", False), ("bfloat16", True)])
def test_round_trip_is_bit_equal(dtype, wide, tmp_path):
    """Tensors of a dtype -> parameters of that dtype or of float32 -> tensors of that dtype."""
    cfg, params = case("sincos")
    narrow = jax.tree.map(lambda x: x.astype(NUMPY[dtype]), params)
    held = jax.tree.map(lambda x: x.astype(np.float32), narrow) if wide else narrow
    write_export(tmp_path / "one", held, config=cfg, dtype=dtype if wide else None, run=RUN)
    found = written(tmp_path / "one")
    expected = leaves(narrow)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert array.dtype == NUMPY[dtype] and array.tobytes() == expected[path].tobytes(), path
    # And once more from what was read.
    again = key_maps.nest({path: np.asarray(found[path], held_dtype(wide, dtype)) for path in expected})
    write_export(tmp_path / "two", again, config=cfg, dtype=dtype, run=RUN)
    for file in FILES.values():
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    net = UNet2DConditionModel.from_pretrained(
        tmp_path / "one/target_net", torch_dtype=TORCH[dtype], low_cpu_mem_usage=False
    )
    assert {tensor.dtype for tensor in net.state_dict().values()} == {TORCH[dtype]}


def held_dtype(wide, dtype):
    return np.float32 if wide else NUMPY[dtype]


@pytest.mark.parametrize(
    "betas,prediction,theirs",
    [("scaled_linear", "eps", "epsilon"), ("linear", "v", "v_prediction"), ("cosine", "x0", "sample")],
)
def test_diffusers_opens_the_schedule(betas, prediction, theirs, tmp_path):
    """abar to float32's rounding; the last one of the cosine, 2e-9, to that of 1 - beta."""
    cfg, params = case("linear")
    changed = tiny.config(
        {
            "model": {"unet": to_dict(cfg.model.unet)},
            "diffusion": {
                "schedule": {"betas": betas, "prediction": prediction, "clip_x0": 1.5 if prediction == "x0" else 0.0},
                "spacing": "trailing" if prediction == "v" else "leading",
            },
        }
    )
    write_export(tmp_path / "out", params, config=changed, run=RUN)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    config = scheduler.config
    texts = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert config.items() >= texts.items() - {("_class_name", "DDIMScheduler")}
    schedule = changed.diffusion.schedule
    assert schedule_of(texts, "here") == {name: getattr(schedule, name) for name in SCHEDULE_FIELDS}
    ours = schedule.alphas_cumprod
    np.testing.assert_allclose(scheduler.alphas_cumprod[:-1], ours[:-1], rtol=2e-6)
    np.testing.assert_allclose(scheduler.alphas_cumprod[-1], ours[-1], rtol=2e-5)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert config.prediction_type == theirs and config.steps_offset == 1
    assert (config.clip_sample, config.clip_sample_range) == ((True, 1.5) if prediction == "x0" else (False, 1.0))
    assert config.timestep_spacing == changed.diffusion.spacing


def test_settings_beside_the_unets(tmp_path):
    cfg, params = case("sincos")
    write_export(tmp_path / "out", params, config=cfg, run=RUN)
    settings = json.loads((tmp_path / "out/truepose.json").read_text())
    ours = dict.fromkeys(("carry_latents", "cosine", "residual"), False)
    paper = {"regions": 2, "delta": 0.6, "sigma": 0.3, "reading": "printed", "mask_axis": "key"}
    assert settings["fusion"] == paper | ours and settings["carry"]["head"] is False
    assert settings["pose_encoder"] == {"features": 16, "stride": 8}
    assert settings["autoencoder"] == {"kind": "patches", "factor": 8, "channels": 96}
    assert settings["image_size"] == [64, 48] and settings["prediction"] == "x0" and settings["classes"] == 20
    assert (settings["method"], settings["positions"], settings["source_parsing"]) == ("truepose", "sincos", "coverage")
    again = json.loads((tmp_path / "out/training_config.json").read_text())
    assert from_config_dict(Config, again) == cfg


@pytest.fixture
def codec(tmp_path):
    """A patch codec that is not the one that comes along."""
    file = tmp_path / "mine.safetensors"
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    safetensors.numpy.save_file(patch_codec.fit(images)._asdict(), file)
    return file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_is_ours_comes_back(dtype, codec, tmp_path):
    """The half-cell head, what HPFA carries and the codec: every parameter to the bit, in the files and in a run made of them."""
    cfg, params = case("head")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vae="/gone"))
    narrow = jax.tree.map(lambda x: x.astype(NUMPY[dtype]), params)
    write_export(tmp_path / "out", narrow, config=cfg, run=RUN, codec=codec)
    found, expected = written(tmp_path / "out"), leaves(narrow)
    assert {path.split("/")[0] for path in found} >= {"limb_encoder", "carry_source", "carry_target"}
    assert_bit_equal(found, expected)
    opened = Exported.open(tmp_path / "out")
    assert opened.config.model.vae == str(tmp_path / "out" / "patch_codec.safetensors") and opened.labels == "atr18"
    assert load_autoencoder(opened.config.model)[2].endswith(hashlib.sha256(codec.read_bytes()).hexdigest())
    restored = leaves(opened.restore_part("ema"))
    assert_bit_equal(
        {path: np.asarray(x) for path, x in restored.items()},
        {path: x.astype(np.float32) for path, x in expected.items()},
    )
    assert "/gone" not in (tmp_path / "out/training_config.json").read_text()
    settings = json.loads((tmp_path / "out/truepose.json").read_text())
    assert settings["carry"] == to_dict(cfg.model.carry) and settings["autoencoder"]["channels"] == 16
    text = " ".join(card_of(tmp_path / "out")[1].split())
    for words in (
        "has no half-cell head and refuses the folder",
        "needs the source's pose",
        "`patch_codec.safetensors`",
    ):
        assert words in text, words
    with pytest.raises(ConversionError, match=r"differ by 1 tensors, such as carry_source"):
        write_export(tmp_path / "less", {k: v for k, v in params.items() if k != "carry_source"}, config=cfg, run=RUN)


def card_of(folder) -> tuple[dict[str, str], str]:
    """(front matter's plain entries, the text)."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return dict(re.findall(r"^(\w+): (.+)$", front, re.MULTILINE)), text


def test_model_card(tmp_path):
    """Licence and origin in front, the whole configuration, the step, the frozen networks' hashes."""
    cfg, params = case("linear")
    write_export(tmp_path / "out", params, config=cfg, origin=ORIGIN, run=RUN)
    front, text = card_of(tmp_path / "out")
    assert front == {"library_name": "diffusers", "license": ORIGIN["licence"], "base_model": ORIGIN["name"]}
    for needed in (
        ORIGIN["licence"],
        "b" * 64,
        "a" * 64,
        "c" * 64,
        "step 1,234",
        "`ema`",
        "from_pretrained",
        "TruePose",
    ):
        assert needed in text, needed
    config = re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1]
    assert from_config_dict(Config, json.loads(config)) == cfg


def of_records(config: Config, **optim) -> Config:
    """A run on records whose labels the configuration does not say."""
    data = dataclasses.replace(config.data, dataset="records", root="/absent", labels="")
    return dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, **optim))


@pytest.mark.parametrize(
    ("records", "labels", "said"),
    [
        ({"name": "deepfashion", "labels": "lip20"}, "lip20", ("records of `deepfashion`", "Parsing labels: lip20.")),
        ({}, None, ("records (`prepare build`)", "Parsing labels: as the records say")),
    ],
)
def test_what_a_run_on_records_was_trained_on(records, labels, said, tmp_path):
    """Labels and name from the records where they are at hand; the optimizer's own name; fingerprints called such."""
    cfg, params = case("linear")
    frozen = {"autoencoder": "pixels-2", "clip": "untrained-00"}
    run = RUN | {"records": records, "frozen": frozen}
    write_export(tmp_path / "out", params, config=of_records(cfg, name="lamb", layout="tree"), run=run)
    assert json.loads((tmp_path / "out/truepose.json").read_text())["labels"] == labels
    text = " ".join(card_of(tmp_path / "out")[1].split())
    for words in (*said, "LAMB at", "pixels are rearranged", "random weights", "no hub lists it"):
        assert words in text, words
    assert "a folder of photos" not in text


def test_records_at_hand_are_read(tmp_path):
    root = built(tmp_path / "r", noise_set(train=1, test=0))
    cfg = case("linear")[0]
    here = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset="records", root=str(root)))
    assert about_records(here) == {"name": "noise", "labels": "atr18"}
    assert about_records(of_records(cfg)) == about_records(cfg) == {}


@pytest.mark.parametrize(
    "origin,licence,said",
    [
        (None, {"license": "apache-2.0"}, "no other model's weights"),
        (
            {"name": "my folder", "licence": "CreativeML Open RAIL-M"},
            {"license": "other", "license_name": "creativeml-open-rail-m"},
            "`CreativeML Open RAIL-M`",
        ),
        ({"name": "my folder"}, {"license": "unknown"}, UNKNOWN_LICENCE),
    ],
)
def test_licences_of_the_card(origin, licence, said, tmp_path):
    cfg, params = case("linear")
    write_export(tmp_path / "out", params, config=cfg, origin=origin, run={**RUN, "weights": "raw"})
    front, text = card_of(tmp_path / "out")
    assert front.items() >= licence.items() and "base_model" not in front
    assert said in " ".join(text.split()) and "`raw`" in text
    assert licence_of(tmp_path / "out") == licence.get("license_name", licence["license"])


def without(params, path):
    return key_maps.nest({name: leaf for name, leaf in leaves(params).items() if name != path})


HPFA = "fusion/mid_block_attentions_0_transformer_blocks_0/hpfa/to_k/kernel"
HUGE = "target_net/conv_out/bias"


@pytest.mark.parametrize(
    "change,settings,message",
    [
        (lambda p: p, {"dtype": "float64"}, r"dtype is 'float64'; choose one of"),
        (lambda p: p, {"run": RUN | {"weights": "best"}}, r"weights are 'best'; choose one of"),
        (lambda p: p | {"decoder": {"bias": np.zeros(2)}}, {}, r"decoder/bias is no parameter of TruePose"),
        (lambda p: without(p, HPFA), {}, r"1 tensors, such as hpfa\.mid_block.*to_k\.weight"),
        (lambda p: without(p, HUGE), {}, r"source_net and target_net differ by 1 tensors, such as conv_out\.bias"),
        (lambda p: without(p, "pose_encoder/conv_0/bias"), {}, r"such as pose_encoder\.conv_0\.bias"),
        (
            lambda p: key_maps.nest(leaves(p) | {HUGE: leaves(p)[HUGE] + np.float32(7e4)}),
            {"dtype": "float16"},
            rf"{HUGE} reaches 7e\+04, beyond the range of float16",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(change, settings, message, tmp_path):
    cfg, params = case("linear")
    with pytest.raises(ConversionError, match=message) as error:
        write_export(tmp_path / "out", change(params), config=cfg, **{"run": RUN, **settings})
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_another_configurations_parameters_are_an_error(tmp_path):
    with pytest.raises(ConversionError, match="not the whole of this configuration's TruePose"):
        write_export(tmp_path / "out", case("sincos")[1], config=case("linear")[0], run=RUN)
    wider = tiny.config({"model": {"unet": {**to_dict(case("linear")[0].model.unet), "block_out_channels": (16, 16)}}})
    with pytest.raises(ConversionError, match=r"conv_in has the shape \(8, 12, 3, 3\)"):
        write_export(tmp_path / "out", case("linear")[1], config=wider, run=RUN)


@pytest.mark.parametrize("variant", ["B1", "B2", "B3", "B4"])
def test_ablations_leave_and_come_back(variant, tmp_path):
    """Bit for bit, as a run and as weights to begin with; TargetNet as diffusers' own. B1 has no SourceNet."""
    settings = tiny.settings(tiny.MIDDLE_ONLY, {"model": {"clip": {"hidden_size": 16, "layers": 1}}})
    config = from_config_dict(Config, vary(settings, variant))
    shapes = jax.eval_shape(lambda: planned(config)[0].init(jax.random.key(0), batch_spec(config)))
    params = jax.device_get(tiny.randomise(shapes, 0))
    write_export(tmp_path / "out", params, config=config, run=RUN)
    assert (tmp_path / "out/source_net").exists() == (variant != "B1")
    found = Exported.open(tmp_path / "out").restore_part("ema")
    assert_bit_equal({path: np.asarray(x) for path, x in leaves(found).items()}, leaves(params))
    _, info = UNet2DConditionModel.from_pretrained(
        tmp_path / "out", subfolder="target_net", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()), info
    words = ["--model=truepose", f"--src={tmp_path / 'out'}", f"--dst={tmp_path / 'w'}"]
    assert convert.main(["from-torch", *words]) == 0
    weights = open_weights(tmp_path / "w")
    assert_bit_equal({path: weights.read(path) for path in weights.infos}, leaves(params))
    with pytest.raises(RuntimeError, match="ablation"):
        torch_truepose.TruePose.from_pretrained(tmp_path / "out")


def test_nothing_is_overwritten(tmp_path):
    cfg, params = case("linear")
    (tmp_path / "out").mkdir()
    report = write_export(tmp_path / "out", params, config=cfg, run=RUN)  # an empty folder is taken
    assert report.bytes == 4 * sum(report.parameters.values())
    before = sorted(tmp_path.rglob("*"))
    for dst in (tmp_path / "out", tmp_path / "out/README.md"):
        with pytest.raises(ConversionError, match="is there already and is not an empty folder"):
            write_export(dst, params, config=cfg, run=RUN)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    cfg, params = case("linear")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("truepose_jax.pretrained.conversion.export.write_safetensors", full)
    with pytest.raises(ConversionError, match=r"cannot be written: the disk is full, [\d.]+ MiB are needed"):
        write_export(tmp_path / "out", params, config=cfg, run=RUN)
    assert not any(tmp_path.iterdir())
