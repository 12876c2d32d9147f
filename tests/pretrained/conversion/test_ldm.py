"""SD1.x in its original single file against diffusers' own converter of it, and `convert from-torch` on such files."""

import functools
import os
import pickle
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from tests.parity.test_unet import DEEPER, diffusers_unet
from tests.parity.test_vae import SMALL as SMALL_VAE
from tests.parity.test_vae import torch_vae
from tests.pretrained.conversion import sd15
from tests.pretrained.conversion.sd15 import assert_bit_equal, quick_shapes, read_all, run, starting_point
from truepose_jax import convert
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.models.unet import UNetConfig
from truepose_jax.models.vae import AutoencoderKLConfig
from truepose_jax.pretrained.conversion import ldm, readers
from truepose_jax.pretrained.conversion.safetensors_io import ArraySource
from truepose_jax.pretrained.conversion.weights_folder import open_weights

FULL_VAE = AutoencoderKLConfig()
__all__ = ["quick_shapes"]  # a fixture for every test here


def ldm_state(unet, unet_config, vae) -> dict[str, torch.Tensor]:
    """The two models' weights under our table's names."""
    state = {ldm.unet_name(name, unet_config): tensor for name, tensor in unet.state_dict().items()}
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        state[ldm.vae_name(name, levels)] = tensor.reshape(ldm.vae_shape(name, tuple(tensor.shape)))
    return state


def on_meta(make):
    with torch.device("meta"):
        return make()


MODELS = {
    "sd15": lambda: (on_meta(lambda: diffusers_unet(UNetConfig())), UNetConfig(), on_meta(lambda: torch_vae(FULL_VAE))),
    "two layers": lambda: (diffusers_unet(DEEPER), DEEPER, torch_vae(SMALL_VAE)),
}


@pytest.mark.parametrize("which", MODELS)
def test_names_are_those_that_diffusers_reads(which):
    """Its converter gives back every tensor under its name."""
    unet, config, vae = MODELS[which]()
    state = ldm_state(unet, config, vae)
    assert len(state) == len(unet.state_dict()) + len(vae.state_dict())
    back = {
        "unet": (unet, convert_ldm_unet_checkpoint(state, dict(unet.config))),
        "vae": (vae, convert_ldm_vae_checkpoint(state, dict(vae.config))),
    }
    for model, found in back.values():
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape, name
            assert tensor.is_meta or found[name].equal(tensor), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """{dtype: the folder's conversion}, what the single file must give too."""
    place = tmp_path_factory.mktemp("folder")
    for dtype in ("float32", "bfloat16"):
        sd15.save_folder(place / f"src_{dtype}", dtype)
        arguments = ["from-torch", "--model=sd15", f"--src={place / f'src_{dtype}'}", f"--dst={place / dtype}"]
        assert convert.main(arguments) == 0
    return place


@pytest.fixture
def tiny(monkeypatch):
    """Single files hold no configs, so SD1.5's are taken: here the tiny model's."""
    partial = functools.partial(readers.sd15_file, unet=sd15.UNET, vae=dict(sd15.vae().config))
    monkeypatch.setattr(readers, "sd15_file", partial)


def state_dict(dtype=torch.float32):
    """A checkpoint with all that the original has beside the two networks."""
    state = {name: tensor.to(dtype) for name, tensor in ldm_state(sd15.unet(), sd15.UNET, sd15.vae()).items()}
    ema = {
        f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in state.items() if name.startswith("model.")
    }
    text = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(7)[None],
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(8),
    }
    buffers = {
        "betas": torch.zeros(1000),
        "alphas_cumprod": torch.from_numpy(Schedule().alphas_cumprod.copy()),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
    }
    return state | ema | text | buffers


def save(path, state, **more):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, **more} if more else state, path)
    return path


@pytest.mark.parametrize(
    "file,dtype,more",
    [
        ("x.safetensors", "bfloat16", {}),
        ("x.ckpt", "float32", {"global_step": 470000, "optimizer_states": []}),
    ],
)
def test_a_single_file_gives_what_the_folder_gives(tiny, folder, tmp_path, capsys, file, dtype, more):
    state = state_dict(sd15.DTYPES[dtype])
    src, dst = save(tmp_path / file, state, **more), tmp_path / "dst"
    code, out, _ = run(capsys, "--model=sd15", f"--src={src}", f"--dst={dst}")
    assert code == 0
    assert_bit_equal(read_all(dst / "params.safetensors"), starting_point(dtype))
    for name in ("params.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (dst / name).read_bytes() == (folder / dtype / name).read_bytes()
    for line in (
        "left out: 2 tensors: the text encoder",
        "left out: 4 tensors: buffers of the noise schedule",
        f"left out: {len(sd15.unet().state_dict()) + 2} tensors: EMA copies",
        "the file says neither configs nor schedule; SD1.5's are taken",
    ):
        assert line in out
    assert ("left out: 2 tensors: what training kept" in out) == bool(more)
    weights = open_weights(dst)
    assert weights.schedule == open_weights(folder / dtype).schedule
    assert list(weights.origin["files"]) == [file] and weights.origin["licence"].startswith("unknown")
    _, info = AutoencoderKL.from_pretrained(dst / "vae", output_loading_info=True)
    assert not any(info.values())


def test_sd15s_own_configs():
    assert AutoencoderKLConfig.from_diffusers(ldm.SD15_VAE) == FULL_VAE
    assert UNetConfig() == readers.SD15_UNET


def test_the_older_checkpoint_format(tiny, tmp_path, capsys):
    """Which cannot be mapped."""
    torch.save(state_dict(), tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert run(capsys, "--model=sd15", f"--src={tmp_path / 'x.ckpt'}", f"--dst={tmp_path / 'dst'}")[0] == 0
    assert_bit_equal(read_all(tmp_path / "dst/params.safetensors"), starting_point())


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("pickled", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_pickled_code_is_not_run(tmp_path, capsys, pickled):
    mark, src = str(tmp_path / "mark"), tmp_path / "x.ckpt"
    pickled({"state_dict": {"betas": torch.zeros(3)}, "callbacks": Evil(mark)}, src)
    assert "holds pickled Python objects" in refused(capsys, src)
    assert not os.path.exists(mark)
    torch.load(src, weights_only=False) if pickled is torch.save else pickle.loads(src.read_bytes())
    assert os.path.exists(mark)  # so it was dangerous


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04nothing"])
def test_no_checkpoint_at_all(tmp_path, capsys, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    err = refused(capsys, tmp_path / "x.ckpt")
    assert "x.ckpt" in err and "\n" not in err


def refused(capsys, src, *more) -> str:
    before = set(src.parent.iterdir())
    code, _, err = run(capsys, "--model=sd15", f"--src={src}", f"--dst={src.parent / 'dst'}", *more)
    assert code == 2 and err.startswith("error: ") and set(src.parent.iterdir()) == before
    return err


def prefixed(name, *shape):
    return {ldm.UNET_PREFIX + name: torch.zeros(shape)}


@pytest.mark.parametrize(
    "change,what",
    [
        (prefixed("input_blocks.0.0.weight", 8, 9, 3, 3), "they are an inpainting checkpoint (9 input channels)"),
        (prefixed("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 8, 1024), "they are an SD2.x checkpoint"),
        (prefixed("label_emb.0.0.weight", 4, 4), "they are an SDXL checkpoint"),
    ],
)
def test_another_checkpoint_is_named(tiny, tmp_path, capsys, change, what):
    assert what in refused(capsys, save(tmp_path / "x.safetensors", state_dict() | change))


def test_another_file_is_named(tmp_path, capsys):
    unet = save(tmp_path / "x.safetensors", sd15.unet().state_dict())
    assert "is a UNet in diffusers' names; give the folder" in refused(capsys, unet)
    assert "is an autoencoder alone" in refused(capsys, save(unet, sd15.vae().state_dict()))
    assert "is no checkpoint in the original layout" in refused(capsys, save(unet, {"a": torch.zeros(1)}))
    assert "--variant" in refused(capsys, unet, "--variant=fp16")


def test_what_is_wrong_is_listed_in_the_files_own_names(tiny, tmp_path, capsys):
    state = state_dict()
    del state["first_stage_model.decoder.up.2.block.0.conv1.weight"]
    state["first_stage_model.encoder.mid.attn_1.q.weight"] = torch.zeros(8, 8)
    state["model.diffusion_model.out.2.bias"] = torch.zeros(4, dtype=torch.float64)
    state["model.diffusion_model.motion.weight"] = torch.zeros(2)
    err = refused(capsys, save(tmp_path / "x.safetensors", state))
    for line in (
        "1 tensors missing:\n  first_stage_model.decoder.up.2.block.0.conv1.weight [8, 8, 3, 3]",
        "1 tensors of another shape:\n  first_stage_model.encoder.mid.attn_1.q.weight is [8, 8], expected [8, 8, 1, 1]",
        "1 tensors of another type:\n  model.diffusion_model.out.2.bias is float64",
        "1 tensors unexpected:\n  model.diffusion_model.motion.weight [2]",
    ):
        assert line in err


@pytest.mark.parametrize(
    "abar",
    [Schedule(betas="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod, np.full(1000, np.nan, np.float32), np.zeros(3)],
    ids=["linear", "nan", "three steps"],
)  # fmt: skip
def test_another_noise_schedule(tiny, tmp_path, capsys, abar):
    state = state_dict() | {"alphas_cumprod": torch.tensor(abar)}
    assert "its noise schedule (alphas_cumprod) is not SD1.5's" in refused(
        capsys, save(tmp_path / "x.safetensors", state)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_rounded_noise_schedule_is_sd15s(dtype):
    ldm.check_schedule(ArraySource({"alphas_cumprod": Schedule().alphas_cumprod.astype(dtype)}), "x")
    ldm.check_schedule(ArraySource({}), "x")


def test_what_is_no_file_of_tensors(tmp_path, capsys):
    shutil.copy(__file__, tmp_path / "x.safetensors")
    assert "is not a safetensors file" in refused(capsys, tmp_path / "x.safetensors")
