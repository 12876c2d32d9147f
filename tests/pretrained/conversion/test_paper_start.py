"""Stable Diffusion as the starting point of FPDM and IMAGPose: every tensor in its place, and a run that begins with them."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from tests import tiny_methods  # noqa: E402
from tests.pretrained.conversion import sd15  # noqa: E402
from truepose_jax import convert  # noqa: E402
from truepose_jax.config import ConfigError, to_dict  # noqa: E402
from truepose_jax.pretrained.conversion.key_maps import leaves, our_layout, torch_name  # noqa: E402
from truepose_jax.pretrained.conversion.paper_start import unet_tensor  # noqa: E402
from truepose_jax.runtime.sharding import make_mesh  # noqa: E402
from truepose_jax.training.checkpoint import Checkpoints  # noqa: E402
from truepose_jax.training.init import abstract_state, first_state, resolve_init_from  # noqa: E402
from truepose_jax.training.step import Trainer  # noqa: E402


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return sd15.save_folder(tmp_path_factory.mktemp("original"), config=sd15.FLAT)


@pytest.mark.parametrize("method", ["fpdm", "imagpose"])
def test_a_run_begins_with_the_unet(original, tmp_path, method):
    weights = tmp_path / "weights"
    assert convert.main(["from-torch", "--model=sd15", f"--for={method}", f"--src={original}", f"--dst={weights}"]) == 0
    unet = to_dict(sd15.FLAT) | {"in_channels": 9 if method == "imagpose" else 4}
    changes = {"init_from": str(weights), "model": {"autoencoder": "sd15", "size": (64, 32), "unet": unet}}
    config = resolve_init_from(tiny_methods.config(method, changes))
    assert config.model.vae == str(weights)
    made, _ = tiny_methods.assembled(config)
    trainer, mesh = Trainer(config, made), make_mesh(data=1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        state = first_state(
            config, trainer, Checkpoints(tmp_path / "run", keep=1, every=1), abstract_state(config, trainer, mesh)
        )
    theirs = {name: tensor.detach().numpy() for name, tensor in sd15.unet(sd15.FLAT).state_dict().items()}
    seen = set()
    for path, leaf in leaves(state.params):
        wide = method == "imagpose" and path.startswith("unet/conv_in/")
        if path.split("/")[0] not in ("unet", "context") or "motion_modules" in path or wide:
            continue
        np.testing.assert_array_equal(leaf, our_layout(path, theirs[unet_tensor(path)]), err_msg=path)
        seen.add(unet_tensor(path))
    missing = {"conv_in.weight", "conv_in.bias"} if method == "imagpose" else set()
    assert theirs.keys() - seen == missing
    other = "imagpose" if method == "fpdm" else "fpdm"
    with pytest.raises(ConfigError, match=f"holds weights of '{method}'; config.model.method is '{other}'"):
        resolve_init_from(tiny_methods.config(other, {"init_from": str(weights)}))


def test_the_first_stage_begins_with_a_clip(tmp_path):
    network = sd15.clip(8)
    network.save_pretrained(tmp_path / "clip")
    fields = {name: getattr(network.config, name) for name in to_dict(tiny_methods.config("ipf").model.clip)}
    changes = {"init_from": str(tmp_path / "clip"), "model": {"clip": fields}}
    config = resolve_init_from(tiny_methods.config("ipf", changes))
    trainer, mesh = Trainer(config, tiny_methods.assembled(config)[0]), make_mesh(data=1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        empty = Checkpoints(tmp_path / "run", keep=1, every=1)
        state = first_state(config, trainer, empty, abstract_state(config, trainer, mesh))
    theirs = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    for path, leaf in leaves(state.params["clip"]):
        np.testing.assert_array_equal(leaf, our_layout(path, theirs[torch_name(path)]), err_msg=path)
    assert all(np.any(x) for x in jax.tree.leaves(state.params["combiner"]["output_layer"]["kernel"]))
    changes["model"]["clip"]["hidden_size"] = 24
    with pytest.raises(ConfigError, match="holds a CLIP with hidden_size 48"):
        resolve_init_from(tiny_methods.config("ipf", changes))


def test_what_is_not_for_them(original, tmp_path, capsys):
    for words in (["--model=truepose"], ["--model=sd15", f"--clip={original}"]):
        assert convert.main(["from-torch", "--for=fpdm", *words, f"--src={original}", f"--dst={tmp_path / 'w'}"]) == 2
        assert "--for=fpdm starts from --model=sd15 alone" in capsys.readouterr().err
