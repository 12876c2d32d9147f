"""AnimateAnyone's files, fabricated at a tiny size under their names: to a model that generates, and back."""

import pathlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import numpy as np  # noqa: E402

from configs.base import get_config  # noqa: E402
from configs.variants import vary  # noqa: E402
from tests import tiny  # noqa: E402
from tests.parity.compare import difference, normal, randomise  # noqa: E402
from tests.parity.test_papers_torch import TorchPoseEncoder  # noqa: E402
from tests.pretrained.conversion import sd15  # noqa: E402
from tests.shared_data import standing_joints  # noqa: E402
from tests.tiny_run import make_run  # noqa: E402
from truepose_jax import convert  # noqa: E402
from truepose_jax.config import Config, from_config_dict, to_dict  # noqa: E402
from truepose_jax.inference.pipeline import Pipeline, Run  # noqa: E402
from truepose_jax.methods.truepose import Conditioning  # noqa: E402
from truepose_jax.models.pose_encoder import CONTROLNET  # noqa: E402
from truepose_jax.pretrained.conversion import animate_anyone  # noqa: E402
from truepose_jax.pretrained.conversion.safetensors_io import open_source  # noqa: E402
from truepose_jax.training.checkpoint import CheckpointError  # noqa: E402

LEFT_OUT = ("conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight", "conv_out.bias")
READ_BY_NOTHING = ("source_net/conv_norm_out", "source_net/conv_out")


def networks() -> dict[str, torch.nn.Module]:
    reference, denoising = (randomise(sd15.diffusers_unet(sd15.FLAT), seed) for seed in (11, 12))
    guider = randomise(TorchPoseEncoder(sd15.FLAT.block_out_channels[0], CONTROLNET, 3), 13)
    return {"reference_unet": reference, "denoising_unet": denoising, "pose_guider": guider}


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setattr(animate_anyone, "UNET", sd15.FLAT)
    monkeypatch.setitem(animate_anyone.SETTINGS, "image_size", [64, 48])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("animate")
    for stem, network in networks().items():
        state = {n: x for n, x in network.state_dict().items() if stem != "reference_unet" or n not in LEFT_OUT}
        torch.save(state, folder / f"{stem}.pth")
    return folder


def from_torch(files, dst, *more) -> int:
    return convert.main(["from-torch", "--model=animate-anyone", f"--src={files}", f"--dst={dst}", *more])


def test_two_commands_make_a_picture(files, tmp_path):
    """And without the source the network says what diffusers' UNet says at a zero token, with the guider on conv_in."""
    sd15.clip().save_pretrained(tmp_path / "clip")
    sd15.vae().save_pretrained(tmp_path / "sd" / "vae")
    assert from_torch(files, tmp_path / "w", f"--clip={tmp_path / 'clip'}") == 0
    pipe = Pipeline.load(tmp_path / "w", vae=str(tmp_path / "sd"))
    config = pipe.run.config
    assert config.diffusion.schedule.zero_snr and config.diffusion.schedule.prediction == "v"
    assert config.model.pose_encoder == "controlnet"
    assert (config.diffusion.steps, config.diffusion.spacing) == (30, "trailing")
    photo = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    picture = pipe(photo, None, standing_joints(64, 48), steps=1)
    assert picture.dtype == np.uint8 and np.ptp(picture) > 0
    x, t, pose = normal(1, 2, 8, 6, 4), np.array([3, 981], np.int32), np.abs(normal(2, 2, 64, 48, 3))
    made = pipe.method

    @tiny.jit
    def prediction(params):
        features = made.pose_encoder.apply({"params": params["pose_encoder"]}, pose)
        return made.denoise(params, x, t, Conditioning(pose=features, sites=None))

    ours = prediction(pipe.params)
    theirs = networks()
    guided = theirs["pose_guider"](torch.from_numpy(pose.transpose(0, 3, 1, 2).copy()))
    hook = theirs["denoising_unet"].conv_in.register_forward_hook(lambda module, inputs, out: out + guided)
    zero = torch.zeros(2, 1, sd15.FLAT.cross_attention_dim)
    with torch.no_grad():
        want = theirs["denoising_unet"](
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), zero
        ).sample
    hook.remove()
    assert difference(ours, want.numpy().transpose(0, 2, 3, 1)) < 2e-2  # bfloat16


def test_both_ways_bit_for_bit(files, tmp_path):
    """A run of B2 leaves as these files, and what is made of them again has its parameters."""
    values = vary(get_config(), "B2")
    values.model.size = (64, 48)
    values.model.pose_encoder = "controlnet"
    with values.ignore_type():
        values.model.unet = to_dict(sd15.FLAT)
    sd15.vae().save_pretrained(tmp_path / "sd" / "vae")
    values.model.vae = str(tmp_path / "sd")
    values.model.clip.update(image_size=16, hidden_size=16, layers=1)
    run = make_run(tmp_path / "run", from_config_dict(Config, values))
    assert convert.main(["to-torch", f"--workdir={run}", f"--dst={tmp_path / 'out'}", "--weights=raw"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"{s}.safetensors" for s in animate_anyone.STEMS}
    for stem, network in networks().items():
        found = open_source(tmp_path / "out" / f"{stem}.safetensors").infos
        names = {name for name in network.state_dict() if stem != "reference_unet" or name not in LEFT_OUT}
        assert found.keys() == names
    assert from_torch(tmp_path / "out", tmp_path / "w") == 0
    again, first = (tiny.named(Run.open(folder, weights="raw").params()) for folder in (tmp_path / "w", run))
    assert again.keys() == first.keys()
    for path, array in again.items():
        if not path.startswith(READ_BY_NOTHING):
            np.testing.assert_array_equal(array, first[path], err_msg=path)


def test_what_is_refused(files, tmp_path, capsys):
    narrow = {"conv_out.weight": torch.zeros(8, 128, 3, 3)}
    cases = {
        "holds no pose_guider.pth or pose_guider.safetensors": lambda d: (d / "pose_guider.pth").unlink(),
        "is MCLD's": lambda d: torch.save({"a.to_k_ip.weight": torch.zeros(1)}, d / "denoising_unet.pth"),
        "its last layer reads 128 channels": lambda d: torch.save(narrow, d / "pose_guider.pth"),
        "holds pickled Python objects": lambda d: torch.save({"a": pathlib.PurePath("x")}, d / "reference_unet.pth"),
    }
    for i, (words, harm) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in files.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        harm(folder)
        assert from_torch(folder, tmp_path / "w") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_starting_point_is_no_model(tmp_path):
    sd15.save_folder(tmp_path / "sd")
    assert convert.main(["from-torch", "--model=sd15", f"--src={tmp_path / 'sd'}", f"--dst={tmp_path / 'w'}"]) == 0
    with pytest.raises(CheckpointError, match=r"is a starting point, not a trained model \(pose_encoder\)"):
        Pipeline.load(tmp_path / "w")
