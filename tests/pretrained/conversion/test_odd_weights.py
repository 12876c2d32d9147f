"""Weights as people save them: what torch.compile and DataParallel put before names, NaN, and .ckpt files of odd kinds."""

import ml_dtypes
import numpy as np
import pytest
import torch

from truepose_jax.convert import _open_ckpt
from truepose_jax.pretrained.conversion import report
from truepose_jax.pretrained.conversion.from_torch import load
from truepose_jax.pretrained.conversion.key_maps import ModelKeys, wrapping
from truepose_jax.pretrained.conversion.plan import Plan, Source, copies
from truepose_jax.pretrained.conversion.safetensors_io import ArraySource, ConversionError

KEYS = ModelKeys("a layer", ignored=((r"ema\..*", "an EMA"),))
TREE = {"conv": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
DETAILS = {
    "method": "truepose", "origin": {"name": "x", "licence": "y"}, "fresh": (),
    "schedule": {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 9, "prediction": "eps"},
}  # fmt: skip


def arrays(prefix="") -> dict[str, np.ndarray]:
    return {f"{prefix}conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3), f"{prefix}conv.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_names_are_read_without_them_and_said(prefix):
    source = ArraySource(arrays(prefix) | {f"{prefix}ema.x": np.zeros(1)})
    found = load(source, TREE, KEYS)
    np.testing.assert_array_equal(found["conv"]["kernel"], arrays()["conv.weight"].T)
    checked = Plan({"f": copies(TREE, Source("place", source, KEYS, {}))}, {}, DETAILS).check()
    said = "\n".join(report.summary(checked))
    assert (f"read without '{prefix}' before their names: 2 tensors" in said) == bool(prefix)
    assert wrapping(f"{prefix}conv.weight") == prefix and wrapping("modules.x") == ""


def test_nan_in_weights_is_said(tmp_path):
    good = arrays()
    for bad, count in ((good, 0), (good | {"conv.bias": np.array([1, np.nan], np.float32)}, 1)):
        checked = Plan({"f": copies(TREE, Source("place", ArraySource(bad), KEYS, {}))}, {}, DETAILS).check()
        assert len(dict(checked.tensors("f"))) == 2 and len(checked.not_finite) == count
        said = "\n".join(report.closing(checked, tmp_path, peak=1))
        assert ("1 tensors hold NaN or infinity, such as conv.bias" in said) == bool(count)


def test_ckpts_of_plain_tensors_are_read_bit_for_bit(tmp_path):
    values = torch.randn(3, 2)
    kinds = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "f16": torch.float16}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {name: values.to(kind) for name, kind in kinds.items()}, "epoch": 3}, path)
    source, others = _open_ckpt(path)
    for name, kind in kinds.items():
        ours = np.asarray(source.read(name), np.float32)
        np.testing.assert_array_equal(ours, values.to(kind).float().numpy())
    assert source.infos["bf16"].dtype == ml_dtypes.bfloat16 and sum(others.values()) == 1


ODD = {
    "a number for a name": {3: torch.zeros(2)},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "meta": {"a": torch.zeros(2, device="meta")},
    "a list": [torch.zeros(2)],
    "a list inside": {"state_dict": [torch.zeros(2)]},
    "complex": {"a": torch.zeros(2, dtype=torch.complex32)},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_ckpts_are_one_line(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    torch.save(ODD[kind], path)
    with pytest.raises(ConversionError) as caught:
        _open_ckpt(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
