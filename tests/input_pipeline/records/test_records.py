"""Records: the schema, reading them back as an image set, and what happens where a shard is broken."""

import csv
import io
import os
import pathlib
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from configs.demo import get_config
from input_pipeline.annotations.photo import read_photo
from input_pipeline.batches.loader import eval_batches
from input_pipeline.files import MappedArray
from input_pipeline.records import reader, schema
from input_pipeline.records.encode import DOUBTS, make_fields
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.tables import IMAGE_COLUMNS, PAIR_COLUMNS, read_tables, table_files
from input_pipeline.records.writer import records_of_a_shard
from input_pipeline.schema import InputError, TokenTable
from input_pipeline.sources.folder import FolderImages
from input_pipeline.sources.own_photos import read_folder
from tests.records import IN_RECORD_1, NoiseItem, built, noise_set, pair_layout, write_people
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.data.datasets import evaluation_set, training_set


def test_a_record_comes_back_as_it_was_and_as_tensorflow_datasets_reads_it():
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    fields = make_fields(NoiseItem(3), "atr18", None)
    del fields[DOUBTS]
    valid = np.zeros(21, bool)
    valid[[0, 4, 20]] = True
    tokens = rng.normal(size=(21, 5)).astype(np.float32)
    fields["region_tokens"], fields["region_valid"] = schema.pack_tokens(tokens, valid)
    fields["latents"] = schema.pack_latents(np.zeros((8, 6, 4)), np.ones((8, 6, 4)))  # starts and ends with zero bytes
    fields["flipped_latents"] = b"\0abc\0\0"
    fields["latents_size"] = np.array([64, 48], np.int32)
    fields["name"] = "WOMEN/Kleid ü/03"
    writer = schema.RecordWriter()
    data = writer.serialise(fields)
    assert data == schema.RecordWriter().serialise(dict(reversed(fields.items())))

    read = schema.parse_record(data)
    other = writer.features.deserialize_example_np(data, decoders={"image": tfds.decode.SkipDecoding()})
    assert read.keys() == fields.keys() == schema.RECORD_FIELDS.keys() == other.keys()
    for name, value in fields.items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)
        theirs = other[name].decode() if isinstance(value, str) else other[name]
        np.testing.assert_array_equal(theirs, value, err_msg=name)
    found, found_valid = schema.unpack_tokens(read["region_tokens"], read["region_valid"])
    np.testing.assert_array_equal(found_valid, valid)
    np.testing.assert_array_equal(found[valid], tokens[valid].astype(np.float16).astype(np.float32))
    assert not found[~valid].any()
    latents = schema.unpack_latents(read["latents"], read["latents_size"])
    assert latents.shape == (2, 8, 6, 4) and not latents[0].any() and (latents[1] == 1).all()


def test_absent_fields_say_so():
    fields = make_fields(NoiseItem(0, posed=False), "atr18", None)
    del fields[DOUBTS]
    read = schema.parse_record(schema.RecordWriter().serialise(fields))
    assert schema.unpack_latents(read["latents"], read["latents_size"]) is None
    assert not schema.unpack_tokens(read["region_tokens"], read["region_valid"])[1].any()
    assert not read["joints"].any()
    with pytest.raises(ValueError, match="no valid region"):
        schema.unpack_tokens(b"ab", 0)
    with pytest.raises(ValueError, match=r"lacks the fields .*boxes"):
        schema.parse_record(b"")


def test_tensorflow_datasets_opens_the_folder(tmp_path):
    import tensorflow_datasets as tfds

    built(tmp_path / "r", noise_set(train=10, test=4), shard_records=4)
    builder = tfds.builder_from_directory(str(tmp_path / "r"))
    assert str(builder.info.version) == "1.1.0" and builder.info.citation == "@misc{noise}"
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 10, "test": 4}
    assert builder.info.splits["train"].shard_lengths == [4, 4, 2]
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert [record["name"].decode() for record in source] == [f"p{i:03d}" for i in range(10)]
    picture = np.asarray(Image.open(io.BytesIO(source[9]["image"])))
    np.testing.assert_array_equal(picture, RecordImages(tmp_path / "r", "train").image(9).image)
    decoded = builder.as_data_source("test")[0]["image"]
    assert decoded.shape == (40, 30, 3) and decoded.dtype == np.uint8
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("size", [None, (32, 32)])
def test_records_equal_the_folder_they_were_made_of(tmp_path, size):
    root = write_people(tmp_path / "photos")
    built(tmp_path / "r", read_folder(root, labels="atr18", pairs="self"))
    folder = FolderImages(root, labels="atr18", size=size or (64, 48))
    images = RecordImages(tmp_path / "r", "train", size=size)
    assert images.labels == "atr18" and list(images.names) == folder.names and len(images) == 4
    np.testing.assert_array_equal(images.pairs, folder.pairs)
    for i in range(4):
        ours, theirs = images.image(i), folder.image(i)
        assert (ours.name, ours.identity) == (theirs.name, theirs.identity)
        for field in ("image", "parsing", "joints"):  # the JPEG is stored as it is, so even the pixels are equal
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
    assert images.fields(0)["image"] == (root / "image" / "p0.jpg").read_bytes()


def test_a_size_is_stored_fitted(tmp_path):
    root = write_people(tmp_path / "photos")
    built(tmp_path / "r", read_folder(root, labels="atr18", pairs="self"), size=(32, 32))
    stored, folder = RecordImages(tmp_path / "r", "train"), FolderImages(root, labels="atr18", size=(32, 32))
    for i in range(4):
        ours, theirs = stored.image(i), folder.image(i)
        assert np.abs(ours.image.astype(int) - theirs.image).mean() < 4  # encoded once more
        np.testing.assert_array_equal(ours.parsing, theirs.parsing)
        np.testing.assert_allclose(ours.joints, theirs.joints)
    assert not np.array_equal(stored.image(0).image.shape, read_photo(root / "image" / "p0.jpg").shape)


def test_rotated_and_transparent_photos_are_stored_as_they_look(tmp_path):
    root = write_people(tmp_path / "photos", count=2)
    photo = Image.open(root / "image" / "p0.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    photo.rotate(180).save(root / "image" / "p0.jpg", exif=exif, quality=95)
    Image.open(root / "image" / "p1.jpg").convert("RGBA").save(root / "image" / "p1.png")
    (root / "image" / "p1.jpg").unlink()
    built(tmp_path / "r", read_folder(root, labels="atr18", pairs="self"))
    images = RecordImages(tmp_path / "r", "train")
    for i, file in enumerate(("p0.jpg", "p1.png")):
        assert np.abs(images.image(i).image.astype(int) - read_photo(root / "image" / file)).mean() < 4
        with Image.open(io.BytesIO(images.fields(i)["image"])) as stored:
            assert stored.format == "JPEG" and not stored.getexif()


def broken_shard(root, how):
    (shard,) = root.glob("*train*00001-of-00002")
    data = bytearray(shard.read_bytes())
    if how == "flipped":
        data[IN_RECORD_1] ^= 255
    shard.write_bytes(b"" if how == "empty" else bytes(data))
    if how == "gone":
        shard.unlink()
    return shard


@pytest.mark.parametrize("how", ["flipped", "empty", "gone"])
def test_a_broken_shard_is_named_and_keeps_its_slots(tmp_path, caplog, how):
    root = built(tmp_path / "r", shard_records=4)
    shard = broken_shard(root, how)
    images = RecordImages(root, "train")
    with pytest.raises(InputError, match=rf"{shard.name}, record 1 \(p005\): cannot be read") as caught:
        images.image(5)
    assert "\n" not in str(caught.value)
    tokens = TokenTable.packed(np.zeros((8, 21, 2), np.float32), np.zeros((8, 21), bool))
    (batch,) = eval_batches(images, tokens, pair_layout(width=2), np.array([[0, 1], [5, 6], [1, 5], [1, 0]]), 4)
    np.testing.assert_array_equal(batch["valid"], [1, 0, 0, 1])
    assert "record 1 (p005)" in caplog.text


def as_before(root, split="train"):
    """The build with the tables that earlier versions wrote."""
    images, pairs = read_tables(root, split)
    rows = [(row["name"].decode(), row["identity"].decode(), *row.tolist()[2:]) for row in images]
    named = [(rows[source][0], rows[target][0]) for source, target in pairs]
    for file, columns, lines in zip(table_files(split), (IMAGE_COLUMNS, PAIR_COLUMNS), (rows, named), strict=True):
        (root / file).unlink()
        with open((root / file).with_suffix(".csv"), "w", newline="", encoding="utf-8") as table:
            csv.writer(table, lineterminator="\n").writerows([columns, *lines])
    return root


def test_builds_of_earlier_versions_open(tmp_path):
    ours = RecordImages(built(tmp_path / "r", noise_set(train=8, p3={"bad": True}, p5={"posed": False})), "train")
    theirs = RecordImages(as_before(shutil.copytree(tmp_path / "r", tmp_path / "before")), "train")
    for name in ("pairs", "joint_counts"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    assert list(theirs.names) == list(ours.names) and list(theirs.identities[2:]) == list(ours.identities)[2:]
    assert len(ours) == 7 and ours.names[3] == "p004" and 4 not in ours.pairs[:, 1] and 4 in ours.pairs[:, 0]
    assert isinstance(ours.pairs, MappedArray) and isinstance(ours.names.column.base, MappedArray)


def test_few_files_are_open_at_once_also_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    images = RecordImages(built(tmp_path / "r", noise_set(train=12), shard_records=2), "train")
    again = pickle.dumps(images)  # before a shard is open, and after
    for index in (0, 11, 5, 3, 0, 8):
        assert images.fields(index)["name"] == f"p{index:03d}"
        opened = [os.path.realpath(file) for file in pathlib.Path("/proc/self/fd").iterdir()]
        assert 1 <= sum(name.startswith(f"{tmp_path / 'r' / 'noise-train.array_record'}") for name in opened) <= 2
    assert len(again) == len(pickle.dumps(images)) < 5000
    assert pickle.loads(pickle.dumps(images)).image(7).name == "p007"


def test_shards_grow_with_the_set():
    sizes = {37_016: 1024, 1 << 20: 1024, (1 << 20) + 1: 2048, 10**7: 8192, 10**8: 8192}
    assert {images: records_of_a_shard(images) for images in sizes} == sizes


TABLES = {
    "text": (lambda file: file.write_text("source,target\n"), "no .npy file"),
    "header": (lambda file: file.write_bytes(file.read_bytes().replace(b"'shape': (", b"'shape': (((", 1)), "no .npy file"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "cannot read the table of the build"),
    "objects": (lambda file: np.save(file, np.array([{}]), allow_pickle=True), "cannot read the table"),
    "others": (lambda file: np.save(file, np.zeros((3, 2))), "float64 [3, 2] is no list of pairs"),
    "gone": (pathlib.Path.unlink, "build the dataset again"),
}


@pytest.mark.parametrize("how", TABLES)
def test_a_broken_table_is_one_line(tmp_path, how):
    root = built(tmp_path / "r", noise_set(train=2, test=0))
    damage, words = TABLES[how]
    damage(root / "pairs-train.npy")
    with pytest.raises(InputError, match=re.escape(words)):
        RecordImages(root, "train")


def test_what_is_not_a_build_says_so(tmp_path):
    root = built(tmp_path / "r")
    with pytest.raises(InputError, match="has no split 'val'; choose one of test, train"):
        RecordImages(root, "val")
    with pytest.raises(InputError, match="no such folder"):
        RecordImages(tmp_path / "absent", "train")
    with pytest.raises(InputError, match="not a build"):
        RecordImages(tmp_path, "train")
    as_before(root)
    (root / "pairs-train.csv").write_text("source,target\np000,elsewhere\n")
    with pytest.raises(InputError, match="1 images that have no record, such as elsewhere"):
        RecordImages(root, "train")
    (root / "images-train.csv").write_text("name\n")
    with pytest.raises(InputError, match="every line must have name,identity"):
        RecordImages(root, "train")
    (root / "metadata.json").unlink()
    with pytest.raises(InputError, match="cannot read the file of the build"):
        RecordImages(root, "train")
    (root / "dataset_info.json").unlink()
    with pytest.raises(InputError, match="not finished; run its command again"):
        RecordImages(root, "train")


class NoEncoder:
    """Stands in for CLIP, whose compilation takes longer than all that is tested here."""

    fingerprint = "none"

    def tokens(self, records, labels):
        return np.ones((len(records), 21, 64), np.float32), np.ones((len(records), 21), bool)


def config_for(root, **data):
    values = get_config()
    values.model.size = (64, 48)
    values.data.dataset, values.data.root, values.data.labels = "records", str(root), ""
    values.data.update(data)
    return from_config_dict(Config, values)


def test_training_reads_records(tmp_path):
    root = built(tmp_path / "r", noise_set(train=4, test=4))
    config = config_for(root)
    encoder = NoEncoder()
    train = training_set(config, encoder, str(tmp_path / "cache"))
    assert len(train.images) == 4 and train.pairs.shape == (12, 2) and not train.heldout
    assert train.images.image(0).image.shape == (64, 48, 3) and train.tokens.valid[:, -1].all()
    heldout = evaluation_set(config, encoder, None)
    assert heldout.heldout and heldout.images.image(0).name == "p100"
    assert evaluation_set(config_for(root, eval_pairs="train"), encoder, None).images.image(0).name == "p000"
    (root / "dataset_info.json").rename(root / "kept")
    with pytest.raises(InputError, match="not finished"):
        training_set(config, encoder, None)


def test_a_set_that_cannot_be_trained_on_is_refused_in_one_line(tmp_path):
    root = built(tmp_path / "r", noise_set(train=2, test=0, p0={"posed": False}, p1={"posed": False}))
    with pytest.raises(InputError, match="'train' cannot be trained or evaluated on: no photo has a visible joint"):
        training_set(config_for(root), None, None)
    with pytest.raises(ConfigError, match=r"config\.data\.labels is 'lip20'; the maps in .* are 'atr18'"):
        training_set(config_for(root, labels="lip20"), None, None)
    with pytest.raises(ConfigError, match=r"config\.data\.root is empty"):
        config_for("")
