"""The Python API: fitting, batches, seeds and names, label sets, weights, frozen networks and their errors."""

import json
import logging
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from input_pipeline.annotations.parsing import whole_photo
from input_pipeline.annotations.photo import fit_photo
from input_pipeline.schema import InputError
from tests.shared_data import openpose_json, read_pose, standing_joints
from tests.tiny_run import SIZE, STEPS, shared_pipeline, shared_run, tiny_config
from truepose_jax.config import ConfigError, to_dict
from truepose_jax.inference import request
from truepose_jax.inference.pipeline import Pipeline, Request, Run, fit_request
from truepose_jax.pretrained import frozen_networks
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def pipe():
    return shared_pipeline()


def person(seed: int, hw=(40, 30), labels=18) -> Request:
    random = np.random.default_rng(seed)
    photo = random.integers(0, 256, (*hw, 3), dtype=np.uint8)
    rows = np.repeat((np.arange(hw[0]) * labels // hw[0])[:, None], hw[1], 1).astype(np.uint8)
    joints = standing_joints(*hw)
    joints[:, :2] += random.normal(0, 1.5, (18, 2))
    return Request(photo, joints, rows, name=f"person {seed}")


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --------------------------------------------------------------------------------------------------- fitting


def test_unpadded_poses_are_placed_as_read_pose_places_them(tmp_path):
    """DeepFashion: the photo fills the model's picture, so a pose of any frame lands where training puts it."""
    spec = tmp_path / "pose.json"
    spec.write_text(openpose_json(standing_joints(256, 176)))
    for frame in ((256, 176), (1101, 750), (512, 320), (100, 100)):
        request = Request(np.zeros((1101, 750, 3), np.uint8), standing_joints(256, 176), frame_hw=frame)
        fitted = fit_request(request, (256, 176))
        assert not fitted.framing.padded
        assert np.array_equal(fitted.joints, read_pose(spec, frame_hw=frame, out_hw=(256, 176)))


def test_a_pose_in_pixels_of_the_photo_is_placed_as_in_training():
    for hw in ((512, 320), (333, 777), (40, 30)):
        joints = standing_joints(*hw)
        fitted = fit_request(Request(np.zeros((*hw, 3), np.uint8), joints), (256, 176))
        trained = fit_photo(np.zeros((*hw, 3), np.uint8), whole_photo(hw), joints, (256, 176))[2]
        np.testing.assert_allclose(fitted.joints, trained, atol=0.5)
        if hw == (512, 320):
            assert np.array_equal(fitted.joints, trained)


def test_no_joint_of_a_frame_falls_into_the_padding():
    """A square photo in an upright picture: the pose of an upright frame keeps its head and feet."""
    fitted = fit_request(
        Request(np.zeros((90, 90, 3), np.uint8), standing_joints(256, 176), frame_hw=(256, 176)), (64, 48)
    )
    x0, y0, x1, y1 = fitted.framing.box
    assert (y0, y1) == (8, 56)
    assert fitted.joints[:, 1].min() > y0 and fitted.joints[:, 1].max() < y1
    assert x0 < fitted.joints[:, 0].min() and fitted.joints[:, 0].max() < x1
    assert fitted.framing.crop(fitted.skeleton).any() and fitted.skeleton[:y0].max() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": np.zeros((40, 30, 3), np.float32)}, "uint8 [h w 3]"),
        ({"source": np.zeros((40, 30), np.uint8)}, "uint8 [h w 3]"),
        ({"parsing": np.zeros((40, 30), np.int64)}, "parsing map is uint8"),
        ({"joints": np.zeros((17, 3))}, "a pose is [18 3]"),
        ({"joints": np.full((18, 3), np.nan)}, "finite"),
        ({"frame_hw": (0, 5)}, "0x5"),
    ],
)
def test_requests_that_cannot_be(change, words):
    """Beside those of the command line (tests/programs/test_generate.py)."""
    request = replace(person(0), joints=standing_joints(400, 300), frame_hw=(400, 300))
    with pytest.raises(InputError) as caught:
        fit_request(replace(request, **change), SIZE)
    assert words in str(caught.value)


# --------------------------------------------------------------------------------------------------- pictures


def test_batching_never_changes_a_picture(pipe):
    requests = [person(i) for i in range(4)]
    at_once = pipe.batch(requests, batch_size=3)
    backwards = pipe.batch(requests[::-1], batch_size=3)[::-1]
    alone = pipe(requests[0].source, requests[0].parsing, requests[0].joints, name="person 0")
    for a, b in zip([*at_once, at_once[0]], [*backwards, alone], strict=True):
        assert a.shape == (*SIZE, 3) and levels_apart(a, b) <= 1
    assert min(levels_apart(at_once[0], other) for other in at_once[1:]) > 20
    assert pipe.batch([]) == []


def test_what_a_picture_depends_on(pipe):
    """Source, map, label set, pose, seed and name: each shows; and so do steps and guidance."""
    one, two = person(0), person(1)
    one.joints[:8] = 0  # legs alone: label sets differ in the classes that they switch on
    variants = {
        "same": one,
        "source": replace(one, source=two.source),
        "parsing": replace(one, parsing=one.parsing[::-1].copy()),
        "labels": replace(one, labels="cihp20"),
        "no map": replace(one, parsing=None),
        "pose": replace(one, joints=two.joints),
        "seed": replace(one, seed=1),
        "name": replace(one, name="person 1"),
    }
    base, *others = pipe.batch([one, *variants.values()], batch_size=3)
    apart = {name: levels_apart(base, other) for name, other in zip(variants, others, strict=True)}
    assert apart.pop("same") <= 1
    assert min(apart.values()) > 1, apart


def test_progress_inside_a_picture(pipe):
    """The same pictures, every step told of once, in order; what the callback raises stops the sampling."""
    fitted = [pipe.run.fit(person(i)) for i in range(4)]
    told = []
    found = pipe.sample(fitted, batch_size=3, callback=lambda done, steps: told.append((done, steps)))
    for picture, plain in zip(found, pipe.sample(fitted, batch_size=3), strict=True):
        assert levels_apart(picture, plain) <= 1
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two batches of two steps

    def enough(done, steps):
        raise TimeoutError(f"{done} of {steps}")

    with pytest.raises(TimeoutError, match="1 of 4"):
        pipe.sample(fitted, batch_size=3, callback=enough)


def test_samplers_of_a_pipeline(pipe):
    """They show, and what is no sampler, no interval or no dtype is refused."""
    one = person(0)
    made = {name: pipe.batch([one], sampler=name, batch_size=3)[0] for name in ("ddim", "unipc")}
    assert levels_apart(*made.values()) > 1
    sampling = pipe.run.sampling(7, 2.0, "dpmpp_2m", (0.2, 0.8))
    assert str(sampling) == "7 DPM-Solver++ 2M steps, guidance 2 for t/T from 0.2 to 0.8"
    assert str(pipe.run.sampling()) == "2 DDIM steps, guidance 2"
    for wrong, words in (((None, None, "euler"), "sampler is 'euler'"), ((2, 2.0, "ddim", (0.8, 0.2)), "0.8 to 0.2")):
        with pytest.raises(InputError, match=words):
            pipe.run.sampling(*wrong)
    with pytest.raises(ConfigError, match="float16"):
        Pipeline.load(shared_run(), dtype="float16")
    held = jax.tree.leaves(Pipeline.load(shared_run(), dtype="bfloat16").params)
    assert {str(x.dtype) for x in held if x.ndim > 1} == {"bfloat16"}


def test_the_photos_framing_comes_back(pipe):
    wide = person(2, hw=(30, 60))
    assert pipe.batch([wide], batch_size=3)[0].shape == (12, 24, 3)
    almost = person(3, hw=(320, 242))
    assert pipe.batch([almost], batch_size=3)[0].shape == (32, 24, 3)


def test_no_map_is_said_once(pipe, caplog):
    request._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            fit_request(replace(person(seed), parsing=None), SIZE)
    assert [record.message for record in caplog.records] == [request.NO_MAP]


# --------------------------------------------------------------------------------------------------- weights


def test_which_weights_and_which_step(tmp_path):
    workdir = shared_run()
    run = Run.open(workdir)
    assert (run.step, run.weights) == (STEPS[-1], "ema")
    assert Run.open(workdir, weights="raw", step=STEPS[0]).step == STEPS[0]
    kernels = {
        (weights, step): np.asarray(
            Pipeline.load(workdir, weights=weights, step=step).params["source_net"]["conv_in"]["kernel"]
        )
        for weights, step in (("ema", None), ("raw", None), ("raw", STEPS[0]))
    }
    first, second, third = kernels.values()
    assert (first != second).all() and (second != third).all()
    with pytest.raises(CheckpointError, match=r"no step 4; its last is 7"):
        Run.open(workdir, step=4)
    with pytest.raises(ConfigError, match="choose one of"):
        Run.open(workdir, weights="best")
    with pytest.raises(CheckpointError, match="holds no training run"):
        Run.open(tmp_path)


def test_weights_that_are_not_finite_are_an_error_not_a_black_picture(pipe):
    broken = replace(pipe, params=jax.tree.map(lambda x: x * np.nan, pipe.params))
    with pytest.raises(CheckpointError, match="not finite"):
        broken.batch([person(0)], batch_size=3)


# --------------------------------------------------------------------------------------------------- frozen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real-format folders of tiny networks: SD with vae/, the VAE alone, CLIP's vision tower, a whole CLIP."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    vae.save_pretrained(root / "sd" / "vae")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision, projection_dim=16))
    tower.save_pretrained(root / "clip")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = transformers.CLIPConfig(text_config=text | {"vocab_size": 9}, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(whole).save_pretrained(root / "whole_clip")
    return root, vae.eval(), tower.eval()


def sd15_config(vae, clip=""):
    return tiny_config(
        model__autoencoder="sd15",
        model__vae=str(vae),
        model__clip__path=str(clip),
        model__unet__in_channels=4,
        model__unet__out_channels=4,
    )


def test_the_vae_of_a_diffusers_folder(folders):
    import torch

    root, vae, _ = folders
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    autoencoder, params, fingerprint = frozen_networks.load_autoencoder(sd15_config(root / "sd").model)
    again = frozen_networks.load_autoencoder(sd15_config(root / "sd" / "vae").model)[2]
    assert len(fingerprint) == 64 and again == fingerprint and autoencoder.factor == 8
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist.mean.numpy() * 0.18215
    found = np.asarray(jax.jit(autoencoder.encode_mean)(params, images)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert frozen_networks.load_autoencoder(tiny_config().model)[1:] == ({}, "pixels-4")


def test_clip_of_a_transformers_folder(folders):
    import torch

    root, _, tower = folders
    config = tiny_config(model__clip__path=str(root / "clip"))
    encoder = make_encoder(config.model.clip, config.token_width)
    assert encoder.trained and len(encoder.fingerprint) == 64
    crops = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    from input_pipeline.annotations.regions import clip_normalise

    with torch.no_grad():
        pixels = torch.from_numpy(clip_normalise(crops).transpose(0, 3, 1, 2))
        expected = tower(pixel_values=pixels).image_embeds.numpy()
    np.testing.assert_allclose(encoder.encode(crops), expected, atol=1e-5)
    whole = tiny_config(model__clip__path=str(root / "whole_clip")).model.clip
    assert make_encoder(whole, 16).encode(crops).shape == (3, 16)
    with pytest.raises(ConfigError, match="gives tokens of 16"):
        make_encoder(whole, 768)


def test_folders_that_do_not_serve(folders, tmp_path):
    """One line each: the setting, the folder, what is wrong, what to do."""
    root, _, _ = folders

    def damaged(name, change):
        shutil.copytree(root / "sd" / "vae", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    weights = "diffusion_pytorch_model.safetensors"
    (root / "sd15_unet").mkdir()
    (root / "sd15_unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    cases = {
        "": "config.model.vae is empty",
        tmp_path / "absent": "no such folder",
        tmp_path: "holds no config.json",
        root / "sd15_unet": "expected the config of an AutoencoderKL",
        damaged("config", lambda f: (f / "config.json").write_text("{")): "config.json does not serve",
        damaged("none", lambda f: (f / weights).unlink()): "holds no safetensors weights",
        damaged("cut", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-9])): "is truncated",
        damaged("clip", lambda f: shutil.copy(root / "clip" / "model.safetensors", f / weights)): "a CLIP model",
        damaged("wider", lambda f: _edit(f, "block_out_channels", [4, 4, 8, 16])): "of another shape",
        damaged("flat", lambda f: _edit(f, "latent_channels", 16)): "this model needs 4 at 1/8",
    }
    for folder, words in cases.items():
        with pytest.raises(ConfigError) as caught:
            frozen_networks.load_autoencoder(sd15_config(folder).model)
        text = str(caught.value)
        assert words in text and "\n" not in text and "stabilityai/sd-vae-ft-mse" in text, text
    with pytest.raises(ConfigError, match=r"clip\.path=.*these weights are not.*openai/clip") as caught:
        frozen_networks.load_torch_folder(str(root / "clip"), {"a": {"kernel": np.zeros((2, 3), np.float32)}}, "clip")
    assert "\n" not in str(caught.value)


def _edit(folder, key, value):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))


def test_frozen_weights_are_those_of_the_training_or_overridden(folders, tmp_path, caplog):
    """The shared run with the config of one on a VAE and a trained CLIP: nothing is sampled."""
    root, _, _ = folders
    workdir = shutil.copytree(shared_run(), tmp_path / "run")
    values = json.loads((workdir / "metadata.json").read_text())
    values["config"] = to_dict(sd15_config(root / "sd", root / "clip"))

    def load(frozen_then, **overrides):
        (workdir / "metadata.json").write_text(json.dumps(values | {"frozen": frozen_then}))
        return Pipeline.load(workdir, **overrides)

    pipe = load({})
    assert pipe.encoder.trained and pipe.frozen["autoencoder"]["encoder"]
    other = {"autoencoder": "e" * 64, "clip": pipe.encoder.fingerprint}
    with pytest.raises(ConfigError, match=r"other weights than those this run was trained with.*--vae=DIR"):
        load(other)
    with caplog.at_level(logging.WARNING):
        load(other, vae=str(root / "sd" / "vae"), clip=str(root / "clip"))
    assert "--vae" in caplog.text and "--clip" not in caplog.text
    with pytest.raises(ConfigError, match=r"other weights than those this run was trained with.*--clip=DIR"):
        load({"clip": "f" * 64})
    with pytest.raises(ConfigError, match="a VAE does not apply"):
        Pipeline.load(shared_run(), vae=str(root / "sd"))
