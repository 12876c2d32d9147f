"""`convert from-torch` on folders that diffusers and transformers wrote: bit for bit, or refused with every reason."""

import errno
import fnmatch
import hashlib
import json
import re
import shutil
import tracemalloc

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from diffusers import AutoencoderKL
from transformers import CLIPVisionModelWithProjection

from configs.base import get_config
from tests.pretrained.conversion import sd15
from tests.pretrained.conversion.sd15 import (
    DTYPES,
    assert_bit_equal,
    edit_json,
    quick_shapes,
    read_all,
    run,
    starting_point,
)
from truepose_jax import convert
from truepose_jax.config import Config, from_config_dict, to_dict
from truepose_jax.pretrained.conversion import readers, weights_folder
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.plan import Plan, Shapes, Source, parameters
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, open_source
from truepose_jax.pretrained.conversion.weights_folder import open_weights
from truepose_jax.pretrained.frozen_networks import load_autoencoder

__all__ = ["quick_shapes"]  # a fixture for every test here


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder in float32; not to be changed."""
    return sd15.save_folder(tmp_path_factory.mktemp("original"))


@pytest.fixture
def src(original, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(original, tmp_path / "src")


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    dst = tmp_path_factory.mktemp("converted") / "weights"
    assert convert.main(["from-torch", "--model=sd15", f"--src={original}", f"--dst={dst}"]) == 0
    return dst


def refused(capsys, src, dst, *more) -> str:
    """stderr of a conversion that must fail and leave nothing."""
    before = set(dst.parent.iterdir())
    code, _, err = run(capsys, "--model=sd15", f"--src={src}", f"--dst={dst}", *more)
    assert code == 2 and err.startswith("error: ")
    assert set(dst.parent.iterdir()) == before
    return err


@pytest.mark.parametrize(
    "dtype,variant,shards", [("float32", None, "1GB"), ("float16", "fp16", "1GB"), ("bfloat16", None, "20KB")]
)
def test_every_tensor_bit_for_bit(tmp_path, capsys, dtype, variant, shards):
    src, dst = sd15.save_folder(tmp_path / "src", dtype, variant=variant, shards=shards), tmp_path / "dst"
    assert (len(list((src / "unet").glob("*.safetensors"))) > 1) == (shards == "20KB")
    code, out, _ = run(
        capsys, "--model=sd15", f"--src={src}", f"--dst={dst}", *([f"--variant={variant}"] * bool(variant))
    )
    assert code == 0
    assert not list(tmp_path.glob(".*"))
    expected = starting_point(dtype)
    weights = open_weights(dst)
    assert_bit_equal({path: weights.read(path) for path in weights.infos}, expected)
    assert weights.infos["source_net/conv_in/kernel"] == ((3, 3, 4, 8), expected["source_net/conv_in/kernel"].dtype)
    opened, info = AutoencoderKL.from_pretrained(
        dst / "vae", torch_dtype=DTYPES[dtype], output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values())
    theirs = {name: sd15.numpy(tensor.to(DTYPES[dtype])) for name, tensor in sd15.vae().state_dict().items()}
    assert_bit_equal({name: sd15.numpy(tensor) for name, tensor in opened.state_dict().items()}, theirs)
    assert_bit_equal(read_all(dst / "vae"), theirs)
    assert (dst / "vae/config.json").read_bytes() == (src / "vae/config.json").read_bytes()
    assert "licence creativeml-openrail-m" in out and "folders not read: text_encoder" in out
    assert re.search(rf"source_net +{sum(p.startswith('source_net') for p in expected)} tensors", out)
    assert "pose_encoder         no weights: begins random" in out and "peak memory" in out
    assert f"--config.init_from={dst} --config.model.clip.path=DIR" in out


def test_what_the_folder_says_of_itself(converted, original):
    weights = open_weights(converted)
    assert weights.method == "truepose" and weights.fresh == ("pose_encoder",) and weights.settings == {}
    assert json.loads((converted / "weights.json").read_text())["dtype"] == "float32"
    assert weights.unet == to_dict(sd15.UNET)
    assert weights.schedule == {
        "betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000, "prediction": "eps",
    }  # fmt: skip
    assert weights.origin["licence"] == "creativeml-openrail-m" and weights.origin["name"] == str(original)
    for file in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert weights.origin["files"][file] == hashlib.sha256((original / file).read_bytes()).hexdigest()
    assert (converted / "scheduler/scheduler_config.json").read_bytes() == (
        original / "scheduler/scheduler_config.json"
    ).read_bytes()


def test_the_trainer_loads_its_autoencoder(converted):
    """frozen_networks.py takes the weights folder itself for the folder of the VAE."""
    values = get_config()
    values.model.vae = str(converted)
    autoencoder, _, fingerprint = load_autoencoder(from_config_dict(Config, values).model)
    assert autoencoder.config == sd15.VAE and len(fingerprint) == 64


def test_clip(original, tmp_path, capsys):
    """The vision side of a whole one; test_animate_anyone.py takes the tower alone."""
    model = sd15.whole_clip()
    model.save_pretrained(tmp_path / "clip")
    dst = tmp_path / "dst"
    code, out, _ = run(capsys, "--model=sd15", f"--src={original}", f"--clip={tmp_path / 'clip'}", f"--dst={dst}")
    assert code == 0 and "tensors: CLIP's text side" in out and "clip.path" not in out
    opened, info = CLIPVisionModelWithProjection.from_pretrained(dst / "image_encoder", output_loading_info=True)
    assert not any(info.values())
    theirs = model.state_dict()
    assert len(opened.state_dict()) == len(sd15.clip().state_dict())
    for name, tensor in opened.state_dict().items():
        assert tensor.equal(theirs[name]), name
    origin = open_weights(dst).origin
    assert origin["clip"]["name"] == str(tmp_path / "clip") and "image_encoder/model.safetensors" in origin["files"]


def test_a_clip_of_another_width(original, tmp_path, capsys):
    sd15.clip(20).save_pretrained(tmp_path / "clip")
    err = refused(capsys, original, tmp_path / "dst", f"--clip={tmp_path / 'clip'}")
    assert "this CLIP gives tokens of 20; the UNet reads 24" in err


def test_old_attention_names_of_the_autoencoder(src, converted, tmp_path, capsys):
    file = src / "vae/diffusion_pytorch_model.safetensors"
    arrays = read_all(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        for side in ("encoder", "decoder"):
            for part in ("weight", "bias"):
                before = f"{side}.mid_block.attentions.0.{new}.{part}"
                arrays[before.replace(new, old)] = arrays.pop(before)
    safetensors.numpy.save_file(arrays, file)
    assert run(capsys, "--model=sd15", f"--src={src}", f"--dst={tmp_path / 'dst'}")[0] == 0
    assert_bit_equal(read_all(tmp_path / "dst/vae"), read_all(converted / "vae"))


def test_all_that_is_wrong_is_listed(src, tmp_path, capsys):
    arrays = read_all(src / "unet")
    arrays.pop("mid_block.resnets.1.conv2.weight")
    arrays["mid_block.motion.weight"] = np.zeros((2, 3), np.float32)
    arrays["conv_out.weight"] = np.zeros((4, 9, 3, 3), np.float32)
    arrays["conv_out.bias"] = np.zeros(4, np.float64)
    safetensors.numpy.save_file(arrays, src / "unet/diffusion_pytorch_model.safetensors")
    (src / "vae/diffusion_pytorch_model.safetensors").unlink()
    safetensors.numpy.save_file(
        {"quant_conv.bias": np.zeros(8, np.int8)}, src / "vae/diffusion_pytorch_model.safetensors"
    )
    err = refused(capsys, src, tmp_path / "dst")
    for line in (
        f"{src / 'unet'}: these weights are not the expected UNet2DConditionModel",
        "1 tensors missing:\n  mid_block.resnets.1.conv2.weight [16, 16, 3, 3]",
        "1 tensors unexpected:\n  mid_block.motion.weight [2, 3]",
        "1 tensors of another shape:\n  conv_out.weight is [4, 9, 3, 3], expected [4, 8, 3, 3]",
        "1 tensors of another type:\n  conv_out.bias is float64",
        f"{src / 'vae'}: these weights are not the expected AutoencoderKL",
        "quant_conv.bias is int8",
    ):
        assert line in err


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"cross_attention_dim": 1024, "use_linear_projection": True}, "this is an SD2.x UNet (context of width 1024"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 2048}, "this is an SDXL UNet"),
        ({"in_channels": 9}, "this is an inpainting UNet (9 input channels)"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"out_channels": 8}, "4 input and 8 output channels; the autoencoder beside it has 4"),
        ({"_class_name": "UNet3DConditionModel"}, "_class_name is 'UNet3DConditionModel'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; only None is supported"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types is ('AttnDownBlock2D'"),
        ({"layers_per_block": [1, 2]}, "layers_per_block is [1, 2]; levels that differ"),
        ({"norm_num_groups": None}, "config.json: "),
    ],
)
def test_a_wrong_model_is_named(src, tmp_path, capsys, changes, message):
    edit_json(src / "unet/config.json", **changes)
    err = refused(capsys, src, tmp_path / "dst")
    assert message in err and "unet/config.json" in err and "\n" not in err


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2]"),
        ({"rescale_betas_zero_snr": True}, "schedule.zero_snr leaves no signal"),
        ({"beta_end": "0.012"}, "make no noise schedule"),
        ({"num_train_timesteps": 0}, "make no noise schedule"),
    ],
)
def test_an_unknown_schedule(src, tmp_path, capsys, changes, message):
    edit_json(src / "scheduler/scheduler_config.json", **changes)
    assert message in refused(capsys, src, tmp_path / "dst")


def test_a_flow_matching_scheduler(src, tmp_path, capsys):
    (src / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    assert "FlowMatchEulerDiscreteScheduler does not say its beta_schedule" in refused(capsys, src, tmp_path / "dst")


def test_dry_run_prints_the_table_and_writes_nothing(original, tmp_path, capsys):
    for more in ([], [f"--dst={tmp_path / 'dst'}"]):
        code, out, _ = run(capsys, "--model=sd15", f"--src={original}", "--dry-run", *more)
        assert code == 0 and not list(tmp_path.iterdir())
    lines = [line.split() for line in out.splitlines()]
    assert ["source_net/conv_in/kernel", "3x3x4x8", "float32", "<-", "conv_in.weight"] in lines
    site = "mid_block_attentions_0_transformer_blocks_0"
    tensor = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert [f"fusion/{site}/hpfa/source_to_q/kernel", "16x16", "float32", "<-", tensor] in lines
    zeros = "target_net/mid_block/attentions_0/transformer_blocks_0/hpfa/to_out_0/kernel"
    assert [zeros, "16x16", "float32", "zeros"] in lines
    assert {line[0] for line in lines} >= starting_point().keys() | sd15.vae().state_dict().keys()


def test_a_taken_destination(original, tmp_path, capsys):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine").write_text("x")
    assert "is there already" in refused(capsys, original, tmp_path / "dst")
    (tmp_path / "file").write_text("x")
    assert "is there already" in refused(capsys, original, tmp_path / "file")
    assert (tmp_path / "dst/mine").read_text() == (tmp_path / "file").read_text() == "x"
    (tmp_path / "dst/mine").unlink()  # an empty folder is free
    assert run(capsys, "--model=sd15", f"--src={original}", f"--dst={tmp_path / 'dst'}")[0] == 0


@pytest.mark.parametrize(
    "arguments", [["--model=sd15", "--src=x"], ["--model=sd21", "--src=x", "--dst=y"], ["--sorce=x"], []]
)
def test_bad_flags_are_one_line(capsys, arguments):
    try:
        code = convert.main(["from-torch", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_folders_that_do_not_serve(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert "does not exist, and is no name on the hub" in refused(capsys, tmp_path / "nowhere", dst)
    assert "holds no folder unet" in refused(capsys, src / "vae", dst)
    (src / "unet/diffusion_pytorch_model.safetensors").rename(src / "unet/diffusion_pytorch_model.bin")
    assert ".bin files are not read" in refused(capsys, src, dst)
    assert "holds no variant 'fp16'" in refused(capsys, src, dst, "--variant=fp16")
    (src / "unet/config.json").write_text("{")
    assert "config.json: cannot read the JSON file (not valid JSON" in refused(capsys, src, dst)
    shutil.rmtree(src / "scheduler")
    assert "holds no folder scheduler" in refused(capsys, src, dst)


def test_the_hub(original, converted, tmp_path, monkeypatch, capsys):
    """Only the files that are needed are fetched, and they suffice."""
    fetched = []
    (tmp_path / "hub").mkdir()

    def snapshot_download(name, *, allow_patterns):
        assert name == "tiny/sd15"
        place = tmp_path / "hub" / "abc123"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file in sorted(original.rglob("*")):
            relative = str(file.relative_to(original))
            if file.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                fetched.append(relative)
                (place / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place / relative)
        return str(place)

    (original / "text_encoder/model.safetensors").write_text("large")
    (original / "unet/diffusion_pytorch_model.non_ema.safetensors").write_text("large")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    try:
        assert run(capsys, "--model=sd15", "--src=tiny/sd15", f"--dst={tmp_path / 'dst'}")[0] == 0
        err = refused(capsys, "tiny/sd15", tmp_path / "bf16", "--variant=bf16")
        assert "on the hub has no unet/diffusion_pytorch_model.bf16.safetensors" in err
    finally:
        (original / "text_encoder/model.safetensors").unlink()
        (original / "unet/diffusion_pytorch_model.non_ema.safetensors").unlink()
    assert [file for file in fetched if "safetensors" in file] == [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",  # the second time, in case it has no such variant
    ]  # fmt: skip
    assert (tmp_path / "dst/params.safetensors").read_bytes() == (converted / "params.safetensors").read_bytes()
    assert open_weights(tmp_path / "dst").origin["name"] == "tiny/sd15@abc123"


def test_no_network(tmp_path, monkeypatch, capsys):
    def snapshot_download(name, *, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened:\nplease check your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    err = refused(capsys, "tiny/sd15", tmp_path / "dst")
    assert "tiny/sd15 does not exist here and cannot be fetched" in err and "connection" in err and "\n" not in err


def checked_plan(original):
    shapes = Shapes(convert.truepose_shapes, convert.autoencoder_shapes, convert.clip_shapes)
    return readers.sd15_folder(original, shapes, name="x").check()


def test_a_full_disk(original, tmp_path, monkeypatch):
    checked, dst = checked_plan(original), tmp_path / "dst"
    told = []

    def full(count):
        told.append(count)
        if len(told) == 100:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConversionError, match=r"the disk is full, [\d.]+ MiB are needed"):
        weights_folder.write(checked, dst, progress=full)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ConversionError, match=r"dst needs [\d.]+ MiB; .* has 0\.00 MiB free"):
        weights_folder.write(checked, dst)


def test_a_conversion_that_is_stopped(original, converted, tmp_path):
    checked, dst = checked_plan(original), tmp_path / "dst"

    def stop(count):
        assert not dst.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights_folder.write(checked, dst, progress=stop)
    assert not list(tmp_path.iterdir())
    # What a kill leaves is no weights folder, and does not disturb the next conversion.
    shutil.copytree(converted, tmp_path / ".dst.partial")
    (tmp_path / ".dst.partial/leftover").touch()
    with pytest.raises(ConversionError, match=r"no weights folder"):
        open_weights(dst)
    told = []
    weights_folder.write(checked, dst, progress=told.append)
    assert [p.name for p in tmp_path.iterdir()] == ["dst"] and not (dst / "leftover").exists()
    assert sum(told) == weights_folder.work(checked)


def test_memory_is_a_few_tensors(tmp_path):
    """16 tensors of 1 MiB, each written twice, take 3 MiB. (SD1.5 in float16: 3.5 GiB are written by a process of 0.44.)"""
    arrays = {f"m{i}.weight": np.full((512, 1024), i, np.float16) for i in range(16)}
    safetensors.numpy.save_file(arrays, tmp_path / "src.safetensors")
    del arrays
    source = Source(
        "src", open_source(tmp_path / "src.safetensors"), ModelKeys("x"), {"src": tmp_path / "src.safetensors"}
    )
    tree = {net: {f"m{i}": {"kernel": np.empty((1024, 512))} for i in range(16)} for net in ("a", "b")}
    items = parameters(tree, lambda path: (source, path.split("/")[1] + ".weight"))
    checked = Plan({"params.safetensors": items}, {}, {"origin": {}}).check()
    del tree
    tracemalloc.start()
    try:
        weights_folder.write(checked, tmp_path / "dst")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checked.bytes == 32 * 2**20 and peak < 5 * 2**20
    assert read_all(tmp_path / "dst/params.safetensors")["b/m7/kernel"].tolist() == np.full((1024, 512), 7).tolist()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format": "other"}, "format is 'other'"),
        ({"version": 2}, "version is 2; this program reads 1"),
        ({"fresh": "pose_encoder"}, "fresh is 'pose_encoder'; expected list"),
        ({"fresh": [1]}, "expected names of networks"),
        ({"unet": {"in_channels": 4}}, "unet lacks"),
        ({"schedule": {"betas": "linear"}}, "schedule has"),
        ({"origin": None}, "origin is None; expected dict"),
    ],
)
def test_a_damaged_weights_folder(converted, tmp_path, changes, message):
    shutil.copy(converted / "params.safetensors", tmp_path)
    shutil.copy(converted / "weights.json", tmp_path)
    assert open_weights(tmp_path).infos.keys() == starting_point().keys()
    edit_json(tmp_path / "weights.json", **changes)
    with pytest.raises(ConversionError) as error:
        open_weights(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_weights_folder_without_parameters(converted, tmp_path):
    shutil.copy(converted / "weights.json", tmp_path)
    with pytest.raises(ConversionError, match=r"has no params\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "params.safetensors").write_bytes((converted / "params.safetensors").read_bytes()[:-1])
    with pytest.raises(ConversionError, match="truncated"):
        open_weights(tmp_path)
