"""The fingerprint of frozen weights: of what our network reads, however it is filed."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from truepose_jax.pretrained import frozen_networks
from truepose_jax.pretrained.conversion.safetensors_io import SafetensorsSource

TENSORS = {
    "vision_model.post_layernorm.weight": np.arange(6, dtype=np.float32),
    "visual_projection.weight": np.ones((2, 3), np.float32),
}
NAME = "visual_projection.weight"


def written(folder, tensors, shards=False):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if not shards:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        safetensors.numpy.save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_files_do_not_count_and_every_bit_does(tmp_path):
    one = frozen_networks.folder_fingerprint(str(written(tmp_path / "one", TENSORS)), "clip")
    text = TENSORS | {"text_model.x": np.zeros(3, np.float32), "logit_scale": np.ones((), np.float32)}
    for name, tensors, shards in (("order", dict(reversed(TENSORS.items())), True), ("whole", text, False)):
        folder = written(tmp_path / name, tensors, shards)
        assert frozen_networks.folder_fingerprint(str(folder), "clip") == one
        assert frozen_networks.files_sha256(folder) != frozen_networks.files_sha256(tmp_path / "one")
    value = TENSORS[NAME]
    others = {
        "bit": np.nextafter(value, 2),
        "shape": value.T,
        "type": value.astype(ml_dtypes.bfloat16),
    }
    prints = {one}
    for name, changed in others.items():
        folder = written(tmp_path / name, TENSORS | {NAME: np.ascontiguousarray(changed)})
        prints.add(frozen_networks.folder_fingerprint(str(folder), "clip"))
    assert len(prints) == 1 + len(others)


def test_loading_hashes_what_it_reads_and_reads_it_once(tmp_path, monkeypatch):
    folder, read = written(tmp_path / "one", TENSORS), []
    plain = SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: read.append(name) or plain(self, name))
    shapes = {
        "vision_model": {"post_layernorm": {"scale": np.empty(6, np.float32)}},
        "visual_projection": {"kernel": np.empty((3, 2), np.float32)},
    }
    params, fingerprint = frozen_networks.load_torch_folder(str(folder), shapes, "clip")
    assert sorted(read) == sorted(TENSORS) and params["visual_projection"]["kernel"].shape == (3, 2)
    assert fingerprint == frozen_networks.folder_fingerprint(str(folder), "clip")
    with pytest.raises(frozen_networks.ConfigError, match=r"holds no config\.json"):
        frozen_networks.folder_fingerprint(str(tmp_path), "clip")
