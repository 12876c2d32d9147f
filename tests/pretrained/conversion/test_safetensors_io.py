"""The one-tensor-at-a-time reader and writer against the safetensors package, and on damaged folders."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from truepose_jax.pretrained.conversion import from_torch, key_maps, to_torch
from truepose_jax.pretrained.conversion import safetensors_io as io

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "scalar": np.asarray(2.5, np.float32),
    "ids": np.arange(3, dtype=np.int64),
}


def write(path, arrays=ARRAYS):
    safetensors.numpy.save_file(dict(arrays), path, metadata={"format": "pt"})
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_reads_what_safetensors_writes(tmp_path):
    source = io.open_source(write(tmp_path / "x.safetensors"))
    assert_same({name: source.read(name) for name in source.infos}, ARRAYS)
    assert source.infos["ids"] == ((3,), np.int64)


def test_safetensors_reads_what_it_writes(tmp_path):
    arrays = ARRAYS | {"c": np.ones((3, 2), ml_dtypes.bfloat16)}
    infos = io.ArraySource(arrays).infos
    io.write_safetensors(tmp_path / "x.safetensors", infos, arrays.items())
    assert_same(safetensors.numpy.load_file(tmp_path / "x.safetensors"), arrays)
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt"}


def test_a_write_that_fails_leaves_nothing(tmp_path):
    infos = {"a": io.TensorInfo((2,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="expected tensor a"):
        io.write_safetensors(tmp_path / "x.safetensors", infos, [("a", np.zeros(3, np.float32))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda b: b[:-1], "truncated: tensor"),
        (lambda b: b[:40], "truncated"),
        (lambda b: b"", "truncated"),
        (lambda b: b"PK\x03\x04" + b[4:], "truncated|not a safetensors"),
        (lambda b: b[:8] + b"?" * (len(b) - 8), "not a safetensors file"),
        (lambda b: b.replace(b'"F16"', b'"X16"'), "b.weight has the unknown dtype X16"),
        (lambda b: b.replace(b'"shape":[2,3]', b'"shape":[2,4]'), "a.weight of shape .* does not fill"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(io.ConversionError, match=message) as error:
        io.open_source(path)
    assert "x.safetensors" in str(error.value)


def test_which_file_of_a_folder(tmp_path):
    def names(variant=None):
        return [f.name for f in io.weight_files(tmp_path, variant)]

    with pytest.raises(io.ConversionError, match="no safetensors weights"):
        names()
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(io.ConversionError, match=r"\.bin files are not read"):
        names()
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").touch()
    assert names() == ["diffusion_pytorch_model.fp16.safetensors"]
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert names() == ["diffusion_pytorch_model.safetensors"]
    assert names("non_ema") == ["diffusion_pytorch_model.non_ema.safetensors"]
    with pytest.raises(io.ConversionError, match="no variant 'bf16'"):
        names("bf16")
    with pytest.raises(io.ConversionError, match="does not exist"):
        io.weight_files(tmp_path / "nowhere")


def sharded(folder, variant=""):
    shards = {f"model-0000{i}-of-00002.safetensors": names for i, names in ((1, ["a.weight"]), (2, ["b.weight"]))}
    for shard, names in shards.items():
        write(folder / shard, {name: ARRAYS[name] for name in names})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    path = folder / f"model.safetensors.index{variant}.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(tmp_path, variant):
    index = sharded(tmp_path, variant)
    for src in (tmp_path, index):
        source = io.open_source(src)
        assert_same({n: source.read(n) for n in source.infos}, {n: ARRAYS[n] for n in ("a.weight", "b.weight")})


def test_shards_that_do_not_fit_their_index(tmp_path):
    index = sharded(tmp_path)
    text = index.read_text()
    index.write_text(text.replace('"b.weight"', '"c.weight"'))
    with pytest.raises(io.ConversionError, match=r"\['c\.weight'\]"):
        io.open_source(tmp_path)
    shard = sorted({*json.loads(text)["weight_map"].values()})[0]
    index.write_text(text.replace(shard, f"../{shard}"))
    with pytest.raises(io.ConversionError, match="outside its folder"):
        io.open_source(tmp_path)
    index.write_text("{}")
    with pytest.raises(io.ConversionError, match=r"the index of safetensors shards .*no 'weight_map'"):
        io.open_source(tmp_path)
    index.write_text(text)
    write(
        tmp_path / "model-00002-of-00002.safetensors",
        {name: ARRAYS[name] for name in ("a.weight", "b.weight")},
    )
    with pytest.raises(io.ConversionError, match=r"not in the shard it names: \['a\.weight'\]"):
        io.open_source(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(io.ConversionError, match=r"missing: \['model-00002-of-00002\.safetensors'\]"):
        io.open_source(tmp_path)


def test_a_name_in_two_files(tmp_path):
    with pytest.raises(io.ConversionError, match=r"tensor \S+ is in x\.safetensors and in y\.safetensors"):
        io.SafetensorsSource([write(tmp_path / "x.safetensors"), write(tmp_path / "y.safetensors")])


def test_memory_is_the_result_and_one_tensor(tmp_path):
    """16 tensors of 1 MiB in bf16: 32 MiB as parameters, and peaks well under 1.3 times that, both ways."""
    params = {f"m{i}": {"kernel": np.full((512, 1024), i, np.float32)} for i in range(16)}
    to_torch.save(params, tmp_path / "x.safetensors", "bfloat16")
    tracemalloc.start()
    try:
        loaded = from_torch.load(tmp_path / "x.safetensors", params, key_maps.UNET)
        peak_load = tracemalloc.get_traced_memory()[1]
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        to_torch.save(loaded, tmp_path / "y.safetensors", "bfloat16")
        peak_save = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak_load < 1.15 * 32 * 2**20
    assert peak_save < 6 * 2**20
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
