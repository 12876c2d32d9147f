"""Adapters as a file: a run's out and in again, by the documented names and equation, by PEFT itself, and what is refused."""

import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from tests import tiny  # noqa: E402
from tests.pretrained.conversion import sd15  # noqa: E402
from tests.tiny_run import make_run, tiny_config  # noqa: E402
from tests.training.test_init import write_folder  # noqa: E402
from truepose_jax import convert  # noqa: E402
from truepose_jax.config import LoraConfig  # noqa: E402
from truepose_jax.inference.pipeline import Run  # noqa: E402
from truepose_jax.pretrained.conversion.key_maps import nest, torch_layout  # noqa: E402
from truepose_jax.pretrained.conversion.lora import FILE, tensor_of, write  # noqa: E402
from truepose_jax.pretrained.conversion.weights_folder import open_weights  # noqa: E402


def add(src, base, dst) -> int:
    return convert.main(["from-torch", "--model=lora", f"--src={src}", f"--base={base}", f"--dst={dst}"])


def read(folder) -> dict[str, np.ndarray]:
    weights = open_weights(folder)
    return {path: weights.read(path) for path in weights.infos}


def test_a_run_leaves_and_comes_back(tmp_path):
    """Its adapters alone and its base, added up again, are what the run is; so is --merge, bit for bit."""
    config = tiny_config(optim__lora__rank=2, init_from="a base")
    make_run(tmp_path / "run", config)
    run = Run.open(tmp_path / "run")
    apart, want = run.unmerged(), tiny.named(run.params())
    base = tiny.named({name: tree for name, tree in apart.items() if name != "lora"})
    write_folder(tmp_path / "base", base, config, fresh=[])
    out = ["to-torch", f"--workdir={tmp_path / 'run'}"]
    assert convert.main([*out, f"--dst={tmp_path / 'out'}"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]
    tensors = load_file(tmp_path / "out" / FILE)
    assert {name.split(".")[0] for name in tensors} == {"source_net", "target_net", "truepose"}
    block = "mid_block.attentions.0.transformer_blocks.0"
    for name, path in {
        f"target_net.{block}.attn1.to_out.0": "target_net/mid_block/attentions_0/transformer_blocks_0/attn1/to_out_0",
        f"target_net.{block}.attn2.to_k": "fusion/mid_block_attentions_0_transformer_blocks_0/attn2/to_k",
        f"truepose.hpfa.{block}.source_to_q": "fusion/mid_block_attentions_0_transformer_blocks_0/hpfa/source_to_q",
    }.items():
        a, b = (tensors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        assert a.shape[0] == b.shape[1] == 2
        np.testing.assert_allclose(
            want[f"{path}/kernel"], (base[f"{path}/kernel"].T + 4.0 * b @ a).T, rtol=1e-5, atol=1e-6
        )
    assert add(tmp_path / "out", tmp_path / "base", tmp_path / "sum") == 0
    found = read(tmp_path / "sum")
    assert found.keys() == want.keys()
    for path, array in found.items():
        np.testing.assert_allclose(array, want[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert json.loads((tmp_path / "sum" / "weights.json").read_text())["origin"]["lora"] == str(tmp_path / "out")
    assert convert.main([*out, "--merge", f"--dst={tmp_path / 'whole'}"]) == 0
    export = Run.open(tmp_path / "whole")
    for path, array in tiny.named(export.params()).items():
        np.testing.assert_array_equal(array, want[path], err_msg=path)


@pytest.fixture(scope="module")
def of_unet(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, dict[str, np.ndarray]]:
    """(FPDM's starting point in bfloat16, adapters of every projection of it, these by path)."""
    folder = tmp_path_factory.mktemp("of_unet")
    sd15.save_folder(folder / "sd", "float32")
    words = ["from-torch", "--model=sd15", "--for=fpdm", f"--src={folder / 'sd'}", f"--dst={folder / 'base'}"]
    assert convert.main(words) == 0
    rng, pairs = np.random.default_rng(0), {}
    for path, info in open_weights(folder / "base").infos.items():
        if "/to_" in path and path.endswith("/kernel"):
            (width, out), module = info.shape, path.removesuffix("/kernel")
            pairs[f"{module}/lora_A/kernel"] = rng.standard_normal((width, 2)).astype(np.float32)
            pairs[f"{module}/lora_B/kernel"] = rng.standard_normal((2, out)).astype(np.float32)
    write(folder / "out", nest(pairs), method="fpdm", config=LoraConfig(rank=2, alpha=6.0))
    return folder / "base", folder / "out" / FILE, pairs


def test_diffusers_adds_the_same(of_unet, tmp_path):
    """load_lora_adapter takes the file, every module and alpha with it, and fuses what from-torch adds up; what PEFT saves of
    it again is read as well."""
    pytest.importorskip("peft")
    base, file, _ = of_unet
    unet = sd15.diffusers_unet(sd15.UNET)
    unet.load_state_dict(sd15.unet().state_dict())
    unet.load_lora_adapter(file.parent, weight_name=FILE, prefix="unet", adapter_name="ours")
    config = unet.peft_config["ours"]
    assert (config.r, config.lora_alpha) == (2, 6.0)
    unet.save_lora_adapter(tmp_path / "theirs", adapter_name="ours")
    unet.fuse_lora()
    fused = {name.replace(".base_layer.", "."): x.detach().numpy() for name, x in unet.state_dict().items()}
    assert add(file, base, tmp_path / "sum") == 0
    for path, array in read(tmp_path / "sum").items():
        name = tensor_of("fpdm", path).removeprefix("unet.")
        np.testing.assert_allclose(torch_layout(path, array), fused[name], rtol=1e-5, atol=1e-5, err_msg=name)
    theirs = {f"unet.{name}": x for name, x in load_file(tmp_path / "theirs" / FILE).items()}
    ours = load_file(file)
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in ours)


def test_one_line_for_what_does_not_fit(of_unet, tmp_path, capsys):
    base, file, _ = of_unet
    tensors = load_file(file)
    with safe_open(file, "np") as opened:
        told = opened.metadata()
    some = next(name for name in tensors if "lora_A" in name)
    module = some.removesuffix(".lora_A.weight")
    less = {name: x for name, x in tensors.items() if name != some}
    meta = json.loads(told["lora_adapter_metadata"])
    cases = {
        f"{module} has lora_B alone": (less, told),
        "unet.elsewhere is no matrix of": (
            {"unet.elsewhere.lora_A.weight": np.zeros((1, 4)), "unet.elsewhere.lora_B.weight": np.zeros((4, 1))}, {},
        ),
        f"the adapter of {module} is of": (tensors | {some: np.zeros((2, 3), np.float32)}, told),
        "have ranks 3 and others": (tensors | {some: np.zeros((3, tensors[some].shape[1]), np.float32)}, told),
        "is no NETWORK.MODULE.lora_A.weight": ({"lora_unet_mid.lora_down.weight": np.zeros((1, 4))}, {}),
        "unet.use_dora is True": (tensors, {"lora_adapter_metadata": json.dumps(meta | {"unet.use_dora": True})}),
        "unet.lora_alpha is 'x'": (tensors, {"lora_adapter_metadata": json.dumps(meta | {"unet.lora_alpha": "x"})}),
        "is no JSON object": (tensors, {"lora_adapter_metadata": "["}),
        "holds no adapters": ({}, {"format": "pt"}),
    }  # fmt: skip
    for words, (arrays, texts) in cases.items():
        save_file(arrays, tmp_path / "bad.safetensors", metadata=texts)
        assert add(tmp_path / "bad.safetensors", base, tmp_path / "sum") == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert convert.main(["from-torch", "--model=lora", f"--src={file}", f"--dst={tmp_path / 'sum'}"]) == 2
    assert "--model=lora and --base=DIR" in capsys.readouterr().err
    run = make_run(tmp_path / "run", tiny_config())
    assert convert.main(["to-torch", f"--workdir={run}", "--merge", f"--dst={tmp_path / 'sum'}"]) == 2
    assert f"--merge: {run} trains no adapters" in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()
