"""A built dataset as an image set: random access to its records, its pairs, and whatever else was stored.

    DIR/dataset_info.json, features.json, metadata.json     tensorflow_datasets' own
    DIR/NAME-SPLIT.array_record-00000-of-00012              the records, one image each (records/schema.py)
    DIR/images-SPLIT.csv                                    name,identity,height,width,joints (visible) of each record
    DIR/pairs-SPLIT.csv                                     source,target names
    DIR/checksums.json, report.json                         what `prepare check` reads; what was dropped and why

`tensorflow_datasets.builder_from_directory(DIR).as_data_source(SPLIT)` opens the same folder.
"""

from __future__ import annotations

import bisect
import csv
import functools
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from input_pipeline import files
from input_pipeline.annotations.parsing import decode_parsing, label_set, whole_photo
from input_pipeline.annotations.photo import decode_photo, fit_photo, one_line
from input_pipeline.records.schema import parse_record, unpack_tokens
from input_pipeline.schema import NUM_JOINTS, ImageRecord, InputError, TokenTable

IMAGE_COLUMNS = ("name", "identity", "height", "width", "joints")
PAIR_COLUMNS = ("source", "target")


class RecordImages:
    """ImageSet of one split of a built dataset, at `size` (h, w), or as stored where `size` is None.

    names, identities: of the images. joints: of a pose. joint_counts: int32 [n], those visible. pairs: int32 [m 2], what may be
    trained or tested on; empty where no image has a pose. digest: of all the records' checksums, the key of caches. Opening
    reads the tables only. Raises InputError where the folder is not a finished build or has no such split.
    """

    def __init__(self, root: str | pathlib.Path, split: str, *, size: tuple[int, int] | None = None):
        self.root, self.split, self.size = pathlib.Path(root), split, size
        builder = open_build(self.root)
        if split not in builder.info.splits:
            raise InputError(f"{root}: has no split '{split}'; choose one of {', '.join(sorted(builder.info.splits))}")
        self._label_set = label_set(builder.info.metadata["labels"])
        self.labels = self._label_set.name
        self.joints = builder.info.metadata.get("joints", NUM_JOINTS)
        self.shards = [path.name for path in builder.info.splits[split].filepaths]
        self._ends = np.cumsum(builder.info.splits[split].shard_lengths).tolist()
        self._paths = [f"{self.root / shard}" for shard in self.shards]
        self._records = _raw_records(builder, split)
        images = read_table(self.root / f"images-{split}.csv", IMAGE_COLUMNS)
        if len(images) != len(self._records):
            raise InputError(
                f"{root}: images-{split}.csv has {len(images)} rows for {len(self._records)} records; build it again"
            )
        self.names = [row[0] for row in images]
        self.identities = [row[1] for row in images]
        if not all(row[4].isdecimal() and len(row[4]) < 4 for row in images):
            raise InputError(f"{root}: images-{split}.csv does not say how many joints each has; build it again")
        self.joint_counts = np.array([int(row[4]) for row in images], np.int32)
        self.pairs = self._read_pairs()

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def digest(self) -> str:
        return read_json(self.root / "checksums.json")["digest"]

    def image(self, index: int) -> ImageRecord:
        """The photo with its map and joints. Raises InputError, naming shard and record, where it cannot be read."""
        fields, where = self.fields(index), self.place(index)
        photo = decode_photo(fields["image"], name=where)
        if fields["parsing"]:
            parsing = decode_parsing(fields["parsing"], self._label_set, photo.shape[:2], name=where)
        elif self.labels == "whole":
            parsing = whole_photo(photo.shape[:2])
        else:
            raise InputError(f"{where}: has no parsing map, though the set's labels are {self.labels}")
        joints = fields["joints"]
        if self.size is not None:
            photo, parsing, joints, _ = fit_photo(photo, parsing, joints, self.size)
        return ImageRecord(photo, parsing, joints, fields["name"], fields["identity"])

    def fields(self, index: int) -> Mapping[str, Any]:
        """All fields of a record (records.schema.RECORD_FIELDS), pictures still encoded. Raises InputError."""
        try:
            return parse_record(self._records[index])
        except (RuntimeError, ValueError, OSError) as error:  # array_record raises RuntimeError for a broken file
            raise InputError(f"{self.place(index)}: cannot be read ({one_line(error)}); see `prepare check`") from error

    def place(self, index: int) -> str:
        """Shard, record within it and name, for messages. Made for every image that is read, so it must be quick."""
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        return f"{self._paths[shard]}, record {index - first} ({self.names[index]})"

    def stored_tokens(self) -> TokenTable | None:
        """The region tokens in the records; None where an image has none. Reads every record.

        They are of the encoder that metadata.json names; whether that is the one wanted is the caller's part.
        """
        kinds: dict[str, list] = {"": [], "flipped_": []}
        for index in range(len(self)):
            fields = self.fields(index)
            for kind, rows in kinds.items():
                rows.append(unpack_tokens(fields[f"{kind}region_tokens"], fields[f"{kind}region_valid"]))
        tables = []
        for rows in kinds.values():
            there = bool(rows) and all(valid.any() for _, valid in rows)
            tables += [np.stack([row[i] for row in rows]) if there else None for i in (0, 1)]
        return TokenTable(*tables) if tables[0] is not None else None

    def _read_pairs(self) -> np.ndarray:
        path = self.root / f"pairs-{self.split}.csv"
        index = {name: i for i, name in enumerate(self.names)}
        listed = read_table(path, PAIR_COLUMNS)
        unknown = sorted({name for pair in listed for name in pair if name not in index})
        if unknown:
            raise InputError(f"{path}: names {len(unknown)} images that have no record, such as {unknown[0]}")
        return np.array([[index[name] for name in pair] for pair in listed], np.int32).reshape(-1, 2)


def open_build(root: pathlib.Path):
    """The tensorflow_datasets builder of a finished build. Raises InputError."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give what `prepare build --out` wrote")
    if not (root / "dataset_info.json").is_file():
        half = "a build that is not finished; run its command again" if (root / "build").is_dir() else "not a build"
        raise InputError(f"{root}: {half} (it has no dataset_info.json)")
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        read_json(root / name, dict)  # tensorflow_datasets would wait for a pipe
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(root))
        labels = builder.info.metadata["labels"]
        for split in builder.info.splits.values():
            _ = split.filepaths, split.shard_lengths  # made when they are asked for
    except Exception as error:  # for broken files tensorflow_datasets raises whatever its parts do
        raise InputError(f"{root}: its metadata cannot be read ({one_line(error)}); build it again") from error
    if not isinstance(labels, str):
        raise InputError(f"{root}: its metadata.json does not say the maps' labels; build it again")
    label_set(labels)
    return builder


def split_names(root: str | pathlib.Path) -> list[str]:
    """The splits of a finished build. Raises InputError."""
    return sorted(open_build(pathlib.Path(root)).info.splits)


def _raw_records(builder, split: str):
    import tensorflow_datasets as tfds

    try:
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        len(records)  # opens the files
        return records
    except Exception as error:  # of tensorflow_datasets' parts, as above
        raise InputError(f"{builder.data_dir}: its records cannot be opened ({one_line(error)}); see `prepare check`") from error


def read_table(path: pathlib.Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The rows of one of our own CSVs. Raises InputError where it is missing or has other columns."""
    try:
        text = files.read_text(path, "a table of the build", advice="build the dataset again")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read ({error}); build the dataset again") from error
    if not rows or tuple(rows[0]) != columns or any(len(row) != len(columns) for row in rows):
        raise InputError(f"{path}: every line must have {','.join(columns)}; build the dataset again")
    return rows[1:]


FORMS: dict[str, files.Form] = {
    "checksums.json": {"sha256": {str: str}, "digest": str},
    "metadata.json": {
        "labels?": str,
        "size?": (list, type(None)),
        "joints?": int,
        "settings?": dict,
        "annotations?": {str: {"fingerprint": str, "size": [int], "flipped": bool, "width?": int}},
    },
    "dataset_info.json": {"splits": [{"name": str}]},
}
"""Files of a build that are read again -> what must be in them; of others an object is expected."""


def read_json(path: pathlib.Path, form: files.Form = None) -> dict[str, Any]:
    """A JSON object of ours. form: of FORMS by the file's name where none is given. Raises InputError."""
    form = form or FORMS.get(path.name, dict)
    return files.read_json(
        path, form, what="a file of the build", limit=files.MAX_TEXT, advice="build the dataset again"
    )
