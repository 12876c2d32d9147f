"""From a configuration to image sets with region tokens: a folder of photos, its cache, and one file for several processes."""

import math
import pickle
import types

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs.demo import get_config
from input_pipeline import atomic
from input_pipeline.files import MappedArray
from input_pipeline.schema import InputError
from input_pipeline.synthetic.people import render
from tests.shared_data import NoiseImages
from truepose_jax.config import Config, from_config_dict
from truepose_jax.data.datasets import evaluation_set, training_set
from truepose_jax.pretrained import region_tokens
from truepose_jax.pretrained.region_tokens import make_encoder, token_table
from truepose_jax.runtime import files


def write_folder(root, count=3):
    for name in ("image", "parsing", "keypoints"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        record = render(seed=0, identity=i, pose=2 * i, size=(64, 48))
        Image.fromarray(record.image).save(root / "image" / f"p{i}.png")
        Image.fromarray(record.parsing).save(root / "parsing" / f"p{i}.png")
        rows = [f"{x} {y}" if seen else "-1 -1" for x, y, seen in record.joints]
        (root / "keypoints" / f"p{i}.txt").write_text("\n".join(rows) + "\n")


def test_folder_gets_tokens_of_both_sides_and_keeps_them(tmp_path):
    write_folder(tmp_path / "photos")
    values = get_config()
    values.model.size = (64, 48)
    values.data.dataset, values.data.root, values.data.flip = "folder", str(tmp_path / "photos"), True
    config = from_config_dict(Config, values)
    encoder = make_encoder(config.model.clip, config.token_width)
    cache = tmp_path / "cache"
    first = training_set(config, encoder, str(cache))
    assert len(first.images) == 3 and first.tokens.valid[:, -1].all() and first.tokens.flipped_valid[:, -1].all()
    ours, flipped = (np.stack([first.tokens.of(i, flip=flip)[0] for i in range(3)]) for flip in (False, True))
    assert np.abs(ours - flipped).max() > 0
    (kept,) = cache.glob("region_tokens_*.safetensors")
    written = kept.stat().st_mtime_ns
    again = training_set(config, encoder, str(cache))
    np.testing.assert_array_equal(first.tokens.rows, again.tokens.rows)
    assert all(isinstance(array, MappedArray) for array in vars(again.tokens).values())
    there = again.tokens.valid[1]
    tokens, valid = encoder.tokens([first.images.image(1)], first.images.labels)
    np.testing.assert_array_equal(there, valid[0])
    for table in (again.tokens, pickle.loads(pickle.dumps(again.tokens))):
        np.testing.assert_allclose(table.of(1, flip=False)[0], tokens[0], atol=1e-5)
    assert kept.stat().st_mtime_ns == written
    assert not evaluation_set(config, encoder, None).heldout

    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(tmp_path / "photos" / "image" / "p0.png")
    changed = training_set(config, encoder, str(cache))
    assert np.abs(changed.tokens.of(0, flip=False)[0] - first.tokens.of(0, flip=False)[0]).max() > 0


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "a bit": (flip_bit, "its digest is not"),
    "its end": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "everything": (lambda path: path.write_text("<html>"), "cannot be read"),
    "its digest": (lambda path: save_file(load_file(path), path), "an older version"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_of_tokens_is_made_anew_and_said(tmp_path, caplog, kind):
    """Never trained on: the tokens are those of the first time."""
    images, encoder = NoiseImages(), Encoder()
    settings = {"flip": True, "cache": str(tmp_path), "fingerprint": "f"}
    first = token_table(images, encoder, **settings)
    (path,) = tmp_path.glob("region_tokens_*.safetensors")
    rows = np.array(first.rows)  # the file is mapped, and about to be spoiled in place
    damage, words = DAMAGE[kind]
    damage(path)
    seen = encoder.seen
    again = token_table(images, encoder, **settings)
    assert words in caplog.text and "made anew" in caplog.text and encoder.seen == 2 * seen
    np.testing.assert_array_equal(rows, again.rows)
    token_table(images, encoder, **settings)
    assert encoder.seen == 2 * seen, "the new file serves"


class Encoder:
    """Tokens are functions of the photo; counts the images that it was given."""

    fingerprint = "e"

    def __init__(self, error=None):
        self.seen, self.error = 0, error

    def tokens(self, records, labels):
        if self.error:
            raise self.error
        self.seen += len(records)
        found = np.stack([np.resize(r.image.reshape(-1)[:500].astype(np.float32), (21, 4)) for r in records])
        return found, np.ones(found.shape[:2], bool)


def test_one_of_several_processes_makes_the_tokens(tmp_path, monkeypatch):
    """The others wait for its file; all have the same table, and so has a second start."""
    images, settings = NoiseImages(), {"flip": True, "fingerprint": "f"}
    alone = token_table(images, Encoder(), cache=None, **settings)
    first, second = Encoder(), Encoder()

    def wait(path, within):
        assert within == math.inf and not path.exists()
        with monkeypatch.context() as patch:  # meanwhile, process 0
            patch.setattr(jax, "process_index", lambda: 0)
            token_table(images, first, cache=str(tmp_path), **settings)

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(region_tokens, "is_seen", wait)
    table = token_table(images, second, cache=str(tmp_path), **settings)
    for ours, theirs in zip(vars(table).values(), vars(alone).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    token_table(images, first, cache=str(tmp_path), **settings)
    assert (first.seen, second.seen) == (2 * len(images), 0)


def test_tokens_that_cannot_be_kept_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no CLIP here"):
        token_table(NoiseImages(), Encoder(InputError("no CLIP here")), flip=False, cache=str(tmp_path), fingerprint="f")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        token_table(NoiseImages(), Encoder(), flip=False, cache=str(tmp_path / "file"), fingerprint="f")


def test_unfinished_files_of_process_1_on_two_hosts_are_two(tmp_path, monkeypatch):
    """In containers every Python is process 1; the folder is one."""
    monkeypatch.setattr(atomic, "os", types.SimpleNamespace(getpid=lambda: 1, fsync=lambda file: None))
    with atomic.replacing(tmp_path / "x") as ours, atomic.replacing(tmp_path / "x") as theirs:
        ours.write_text("a")
        theirs.write_text("b")
        assert ours != theirs and all(p.name.startswith(".x.1-") and p.suffix == ".partial" for p in (ours, theirs))
    assert (tmp_path / "x").read_text() == "a"
    files.make_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
