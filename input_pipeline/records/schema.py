"""What one record of a built dataset holds: one image with its annotations, as a tf.train.Example.

One record is one image, not one pair: DeepFashion's 101,966 training pairs share 37,016 images, and the pairs lie
beside the records (records/tables.py). Everything of variable size is bytes, because tensorflow_datasets cannot store
an absent array; `pack_*` and `unpack_*` here are the only places that know the layouts. tensorflow_datasets is
imported where it is used (it takes a second); TensorFlow never is.

Letters: h w pixels of the stored image, v valid region rows, e token width, l the latents' 1/8 of the picture.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline.schema import MAX_CLASSES

VERSION = "1.1.0"
"""Since 1.1.0 a pose may have other than 18 joints; records of 1.0.0 are read as they are."""
SHARD_OPTIONS = "group_size:1,uncompressed"
"""Random access to single records; any reader of ArrayRecord reads them. Uncompressed: JPEG, PNG and half-precision noise
do not shrink (5 %), and reading one takes 50 us against 240."""

REGION_ROWS = MAX_CLASSES + 1


@dataclasses.dataclass(frozen=True)
class RecordField:
    """kind "image" (encoded picture), "bytes", "text" (UTF-8), "array" (little-endian, of `shape` and `dtype`) or
    "integer". unit: of the numbers. absent: the value that says "there is none" ("": always there)."""

    kind: str
    shape: tuple
    dtype: str
    unit: str
    meaning: str
    absent: str = ""


_TOKENS = ("v", "e")
_LATENTS = (2, "l", "l", 4)

RECORD_FIELDS: Mapping[str, RecordField] = {
    "image": RecordField("image", ("h", "w", 3), "uint8", "RGB", "JPEG; the photo's own bytes unless it was resized"),
    "parsing": RecordField("bytes", ("h", "w"), "uint8", "class id", "annotations/run_lengths.py; in old builds a PNG", "empty"),
    "joints": RecordField("array", (None, 3), "float32", "pixels of the image; visible 0/1",
                          "x, y, visible; of a set of input_pipeline/skeletons.py; may lie outside the picture", "rows of zeros"),
    "size": RecordField("array", (2,), "int32", "pixels", "height, width of the image"),
    "name": RecordField("text", (), "str", "", "unique in the dataset"),
    "identity": RecordField("text", (), "str", "", "same person in the same clothes"),
    "boxes": RecordField("array", (REGION_ROWS, 4), "int32", "pixels, half open",
                         "x0, y0, x1, y1 of each class and, last, of the whole image", "rows of zeros"),
    "region_tokens": RecordField("bytes", _TOKENS, "float16", "", "CLIP embedding of each valid region, in row order",
                                 "empty"),
    "region_valid": RecordField("integer", (), "int32", "", "bit i: row i of 21 has a token", "0"),
    "flipped_region_tokens": RecordField("bytes", _TOKENS, "float16", "", "the same of the mirrored photo", "empty"),
    "flipped_region_valid": RecordField("integer", (), "int32", "", "the same of the mirrored photo", "0"),
    "latents": RecordField("bytes", _LATENTS, "float16", "VAE's own, unscaled",
                           "mean and log-variance [2 l l 4] of the photo fitted to latents_size", "empty"),
    "flipped_latents": RecordField("bytes", _LATENTS, "float16", "VAE's own, unscaled", "of the mirrored picture",
                                   "empty"),
    "latents_size": RecordField("array", (2,), "int32", "pixels", "height, width of the picture that was encoded",
                                "0, 0"),
}  # fmt: skip


_STORED = tuple(
    (
        name,
        field.kind,
        np.dtype(field.dtype).newbyteorder("<") if field.kind == "array" else None,
        tuple(-1 if side is None else side for side in field.shape),
    )
    for name, field in RECORD_FIELDS.items()
)


def new_fields(
    *,
    image: bytes,
    parsing: bytes,
    joints: np.ndarray,
    size: tuple[int, int],
    name: str,
    identity: str,
    boxes: np.ndarray,
) -> dict[str, Any]:
    """The fields of a record with everything optional absent; annotators fill it in later."""
    return {
        "image": image,
        "parsing": parsing,
        "joints": np.asarray(joints, np.float32),
        "size": np.array(size, np.int32),
        "name": name,
        "identity": identity,
        "boxes": np.asarray(boxes, np.int32),
        "region_tokens": b"",
        "region_valid": 0,
        "flipped_region_tokens": b"",
        "flipped_region_valid": 0,
        "latents": b"",
        "flipped_latents": b"",
        "latents_size": np.zeros(2, np.int32),
    }


def pack_tokens(tokens: np.ndarray, valid: np.ndarray) -> tuple[bytes, int]:
    """(tokens [21 e], valid bool [21]) -> (region_tokens, region_valid)."""
    return tokens[valid].astype("<f2").tobytes(), sum(1 << int(row) for row in np.flatnonzero(valid))


def unpack_tokens(data: bytes, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(region_tokens, region_valid) -> (tokens float32 [21 e], valid bool [21]); e is 0 where there are none.

    Raises ValueError where the bytes do not fill the valid rows.
    """
    valid = (bits >> np.arange(REGION_ROWS) & 1).astype(bool)
    rows = int(valid.sum())
    if rows == 0 and data:
        raise ValueError(f"{len(data)} bytes of tokens for no valid region")
    found = np.frombuffer(data, "<f2").reshape(rows, -1) if rows else np.zeros((0, 0))
    tokens = np.zeros((REGION_ROWS, found.shape[1]), np.float32)
    tokens[valid] = found
    return tokens, valid


def pack_latents(mean: np.ndarray, log_variance: np.ndarray) -> bytes:
    """Two arrays [l l 4] of the VAE's posterior, unscaled -> `latents`."""
    return np.stack([mean, log_variance]).astype("<f2").tobytes()


def unpack_latents(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """`latents` of a picture of `size` -> float16 [2 l l 4] (mean, log-variance); None where absent."""
    if not data:
        return None
    return np.frombuffer(data, "<f2").reshape(2, -(-int(size[0]) // 8), -(-int(size[1]) // 8), 4)


def features():
    """RECORD_FIELDS as a tensorflow_datasets FeaturesDict."""
    import tensorflow_datasets as tfds

    def feature(field: RecordField):
        if field.kind == "image":
            return tfds.features.Image(shape=(None, None, 3), doc=field.meaning)
        if field.kind == "integer":
            return tfds.features.Scalar(dtype=np.dtype(field.dtype), doc=field.meaning)
        if field.kind == "array":
            encoding = tfds.features.Encoding.BYTES
            return tfds.features.Tensor(
                shape=field.shape, dtype=np.dtype(field.dtype), encoding=encoding, doc=field.meaning
            )
        return tfds.features.Text(doc=field.meaning)

    return tfds.features.FeaturesDict({name: feature(field) for name, field in RECORD_FIELDS.items()})


class RecordWriter:
    """Fields -> the bytes of a tf.train.Example, the same for the same fields in every process."""

    def __init__(self):
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self.features = features()
        self._serializer = ExampleSerializer(self.features.get_serialized_info())

    def serialise(self, fields: Mapping[str, Any]) -> bytes:
        example = self._serializer.get_tf_example(self.features.encode_example(fields))
        return example.SerializeToString(deterministic=True)

    def write_shard(self, path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
        """All records into one ArrayRecord file. Raises OSError where the disk does not take it."""
        from array_record.python.array_record_module import ArrayRecordWriter

        try:
            writer = ArrayRecordWriter(os.fspath(path), SHARD_OPTIONS)
            try:
                for fields in records:
                    writer.write(self.serialise(fields))
            finally:
                writer.close()
        except RuntimeError as error:  # ArrayRecord's own, for whatever the system said
            raise OSError(str(error)) from error


class StoredFields(Mapping):
    """The fields of a record. What is large (pictures, tokens, latents) is copied out when it is asked for: a batch of stored
    latents never asks for the photo, nor a mirrored photo for the plain one's."""

    def __init__(self, small: dict[str, Any], found: Mapping[str, Any]):
        self._small, self._found = small, found

    def __getitem__(self, name: str) -> Any:
        return self._small[name] if name in self._small else self._found[name].bytes_list.value[0]

    def __iter__(self) -> Iterator[str]:
        return iter(RECORD_FIELDS)

    def __len__(self) -> int:
        return len(RECORD_FIELDS)


def parse_record(data: bytes) -> StoredFields:
    """The fields of a serialised tf.train.Example, pictures still encoded. Raises ValueError where it is not a record.

    Several times as fast as the reader of tensorflow_datasets, whose result it equals.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    found = tf_example_pb2.Example.FromString(data).features.feature
    missing = [name for name in RECORD_FIELDS if name not in found]
    if missing:
        raise ValueError(f"lacks the fields {', '.join(missing)}; it is of another version than {VERSION}")
    fields: dict[str, Any] = {}
    for name, kind, dtype, shape in _STORED:
        value = found[name]
        if kind == "integer":
            fields[name] = value.int64_list.value[0]
            continue
        content = value.bytes_list.value
        if len(content) != 1:
            raise ValueError(f"field {name} holds {len(content)} values; expected one")
        if kind == "text":
            fields[name] = content[0].decode()
        elif kind == "array":
            fields[name] = np.frombuffer(content[0], dtype).reshape(shape)
    return StoredFields(fields, found)
