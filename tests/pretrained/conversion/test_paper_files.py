"""FPDM's public checkpoint and IMAGPose's stage files, fabricated at a tiny size under their names, and what is refused."""

import pathlib
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from transformers import Dinov2Config, Dinov2Model  # noqa: E402

from tests import tiny, tiny_methods  # noqa: E402
from tests.parity.compare import randomise  # noqa: E402
from tests.parity.test_papers_torch import TorchCombiner, TorchPoseEncoder  # noqa: E402
from tests.pretrained.conversion import sd15  # noqa: E402
from truepose_jax import convert  # noqa: E402
from truepose_jax.config import ConfigError, to_dict  # noqa: E402
from truepose_jax.inference.pipeline import Run  # noqa: E402
from truepose_jax.models.pose_encoder import CONTROLNET  # noqa: E402
from truepose_jax.pretrained import vision_networks  # noqa: E402
from truepose_jax.pretrained.conversion import paper_files  # noqa: E402
from truepose_jax.pretrained.conversion.key_maps import nest  # noqa: E402
from truepose_jax.pretrained.conversion.weights_folder import open_weights  # noqa: E402
from truepose_jax.training.checkpoint import CheckpointError  # noqa: E402
from truepose_jax.training.init import resolve_init_from  # noqa: E402

WIDTH, DINO, HIDDEN = sd15.UNET.cross_attention_dim, 20, 6


def sized(method: str):
    """The public model's configuration, but small."""
    unet = to_dict(sd15.UNET) | ({"in_channels": 9} if method == "imagpose" else {})
    model = {"autoencoder": "sd15", "pose_encoder": "controlnet", "size": (64, 64), "unet": unet}
    return tiny_methods.config(method, {"model": model | ({"projection": HIDDEN} if method == "fpdm" else {})})


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setattr(convert, "published", lambda method, variant: sized(method))


def from_torch(method, src, dst, *more) -> int:
    return convert.main(["from-torch", f"--model={method}", f"--src={src}", f"--dst={dst}", *more])


def read(folder) -> dict[str, np.ndarray]:
    weights = open_weights(folder)
    return {path: weights.read(path) for path in weights.infos}


def fpdm_state() -> dict[str, torch.Tensor]:
    """What the public code's Lightning module saves, as its two lines leave it."""
    linear, rest = torch.nn.Linear, (torch.nn.GELU(), torch.nn.Dropout(0.2))
    e, temb, clip = WIDTH, 4 * sd15.UNET.block_out_channels[0], sd15.clip()
    fusion = torch.nn.Module()
    fusion.img_encoder = fusion.pose_encoder = clip
    fusion.combiner = randomise(TorchCombiner(e), 4)
    unet = randomise(sd15.diffusers_unet(sd15.UNET), 5)
    unet.class_embedding = torch.nn.Module()
    unet.class_embedding.net = torch.nn.Sequential(linear(e, HIDDEN), *rest, linear(HIDDEN, temb))
    model = torch.nn.Module()
    model.unet = unet
    model.srcimage_proj_model = torch.nn.Module()
    model.srcimage_proj_model.net = torch.nn.Sequential(
        linear(DINO, HIDDEN), *rest, torch.nn.LayerNorm(HIDDEN), linear(HIDDEN, e), torch.nn.Dropout(0.2)
    )
    model.pose_t_proj = TorchPoseEncoder(sd15.UNET.block_out_channels[0], CONTROLNET, 3)
    randomise(model, 6)
    whole = torch.nn.Module()
    whole.sd_model, whole.unet, whole.fusion_model, whole.vae = model, unet, fusion, sd15.vae()
    whole.src_image_encoder = linear(2, 2)
    return whole.state_dict()


def test_fpdms_checkpoint(tmp_path, capsys):
    """Every tensor of it in its place, the first stage as config.model.ipf.path takes it; and a run begins with both."""
    state = fpdm_state()
    torch.save(state, tmp_path / "state.pth")
    small = Dinov2Config(
        hidden_size=DINO, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4, mlp_ratio=2
    )
    randomise(Dinov2Model(small), 7).save_pretrained(tmp_path / "dino")
    assert from_torch("fpdm", tmp_path / "state.pth", tmp_path / "w", f"--dino={tmp_path / 'dino'}") == 0
    said = capsys.readouterr().out
    assert "configs/fpdm_deepfashion_512.py" in said and "--config.model.vae=DIR" in said and "--config.model.dino" not in said
    found, theirs = read(tmp_path / "w"), {name: x.numpy() for name, x in state.items()}
    for path, name in {
        "source_projection/fc1/kernel": "srcimage_proj_model.net.0.weight",
        "source_projection/norm/scale": "srcimage_proj_model.net.3.weight",
        "source_projection/fc2/bias": "srcimage_proj_model.net.4.bias",
        "fusion_embedding/fc2/kernel": "unet.class_embedding.net.3.weight",
        "pose_encoder/blocks_5/bias": "pose_t_proj.blocks.5.bias",
        "unet/conv_out/bias": "unet.conv_out.bias",
        "context/mid_block_attentions_0_transformer_blocks_0/attn2/to_v/kernel": (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
        ),
    }.items():
        np.testing.assert_array_equal(found[path].T, theirs[f"sd_model.{name}"], err_msg=path)
    read_once = [name for name in theirs if name.startswith("sd_model.")]
    assert len(found) == len(read_once)
    combiner = load_file(tmp_path / "w" / "combiner.safetensors")
    assert all(np.array_equal(x, theirs[f"fusion_model.combiner.{name}"]) for name, x in combiner.items()) and combiner
    image = sd15.clip().config.image_size
    model = to_dict(sized("fpdm").model) | {"dino": {"hidden_size": DINO}, "ipf": {"image_size": image}}
    config = resolve_init_from(tiny_methods.config("fpdm", {"init_from": str(tmp_path / "w"), "model": model}))
    assert config.model.ipf.path == str(tmp_path / "w")
    run = Run.open(tmp_path / "w")  # what generate opens
    assert run.params().keys() == {"unet", "context", "pose_encoder", "source_projection", "fusion_embedding"}
    assert run.config.model.dino.path == run.config.model.ipf.path == str(tmp_path / "w")
    tokens = vision_networks.load("dino", run.config.model.dino).params
    np.testing.assert_array_equal(tokens["layernorm"]["bias"], load_file(tmp_path / "dino/model.safetensors")["layernorm.bias"])
    frozen = vision_networks.load("ipf", config.model.ipf).params
    np.testing.assert_array_equal(frozen["combiner"]["output_layer"]["bias"], combiner["output_layer.bias"])
    paper_files.write(tmp_path / "out", nest(found), config=config)
    unet, info = UNet2DConditionModel.from_pretrained(
        tmp_path / "out", subfolder="unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()) and unet.config.class_embed_type == "identity"
    beside = load_file(tmp_path / "out" / "fpdm.safetensors")
    assert len(beside) + len(unet.state_dict()) == len(read_once)
    for name, array in beside.items():
        np.testing.assert_array_equal(array, theirs[paper_files.released_name("fpdm", name)], err_msg=name)
    with pytest.raises(ConfigError, match="holds weights of 'fpdm'"):
        resolve_init_from(tiny_methods.config("imagpose", {"init_from": str(tmp_path / "w")}))


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """(IMAGPose's files after its stages 1 and 2, the parameters in them by our paths)."""
    folder, config = tmp_path_factory.mktemp("stages"), sized("imagpose")
    params = tiny.randomise(convert.param_shapes(config), 0)
    paper_files.write(folder / "out", params, config=config)
    unet = {name: torch.from_numpy(x) for name, x in load_file(folder / "out" / "denoising_unet.safetensors").items()}
    still = {name: x for name, x in unet.items() if ".motion_modules." not in name}
    block = "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0"
    pe = {f"{block}.attention_blocks.0.pos_encoder.pe": torch.ones(1, 4, 16)}
    (folder / "theirs").mkdir()
    torch.save(
        still | {"conv_in.bias": torch.zeros_like(unet["conv_in.bias"])}, folder / "theirs" / "denoising_unet-900.pth"
    )
    torch.save(still, folder / "theirs" / "denoising_unet-1000.pth")
    torch.save(unet | pe, folder / "theirs" / "motion_module-2000.pth")
    for stem in ("pose_guider", "patch"):
        tensors = load_file(folder / "out" / f"{stem}.safetensors")
        torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, folder / "theirs" / f"{stem}-1000.pth")
    return folder / "theirs", tiny.named(params)


def test_imagposes_stages(stages, tmp_path, capsys):
    """The last step of each file; of motion_module, which is a whole UNet, the motion modules."""
    folder, want = stages
    assert from_torch("imagpose", folder, tmp_path / "w") == 0
    assert "motion_module is a whole UNet" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds no dino, through which its network sees the source"):
        Run.open(tmp_path / "w")
    found = read(tmp_path / "w")
    assert found.keys() == want.keys() and any("/motion_modules_" in path for path in want)
    for path, array in want.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    patch = load_file(folder.parent / "out" / "patch.safetensors")
    assert patch["proj.weight"].shape == (WIDTH, 4, 2, 2)


def test_what_is_refused(stages, tmp_path, capsys):
    state = fpdm_state()
    other = state | {"unet.conv_in.bias": state["unet.conv_in.bias"] + 1}
    torch.save(other, tmp_path / "other.pth")
    torch.save({"state_dict": state, "hyper_parameters": pathlib.PurePath("x")}, tmp_path / "last.ckpt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    folder, _ = stages
    for name in ("empty", "less"):
        (tmp_path / name).mkdir()
    shutil.copy(folder / "denoising_unet-1000.pth", tmp_path / "less")
    cases = {
        "unet.conv_in.bias and sd_model.unet.conv_in.bias should be the same": ("fpdm", "other.pth"),
        "torch.save(state['state_dict'], 'state.pth')": ("fpdm", "last.ckpt"),
        "no tensor is named sd_model.unet.conv_in.weight": ("fpdm", "a.pth"),
        "no such file or folder": ("fpdm", "nowhere"),
        "holds neither training_config.json nor denoising_unet-STEP.pth": ("imagpose", "empty"),
        "holds no file patch": ("imagpose", "less"),
        "is of method 'imagpose'; --model=fpdm reads its own": ("fpdm", folder.parent / "out"),
        "is of method 'imagpose'; --model=truepose reads its own": ("truepose", folder.parent / "out"),
    }
    for words, (method, src) in cases.items():
        assert from_torch(method, tmp_path / src, tmp_path / "w") == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "w").exists()
