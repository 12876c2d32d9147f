"""A built dataset as an image set: random access to its records, its pairs, and whatever else was stored.

    DIR/dataset_info.json, features.json, metadata.json     tensorflow_datasets' own
    DIR/NAME-SPLIT.array_record-00000-of-00012              the records, one image each (records/schema.py)
    DIR/images-SPLIT.npy, pairs-SPLIT.npy                   whom each record shows, and the pairs (records/tables.py)
    DIR/checksums.json, report.json                         what `prepare check` reads; what was dropped and why

`tensorflow_datasets.builder_from_directory(DIR).as_data_source(SPLIT)` opens the same folder.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import pathlib
import resource
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from input_pipeline import files
from input_pipeline.annotations.parsing import decode_parsing, label_set, whole_photo
from input_pipeline.annotations.photo import decode_photo, fit_photo, one_line
from input_pipeline.records.schema import parse_record
from input_pipeline.records.tables import Texts, read_tables, table_files
from input_pipeline.schema import NUM_JOINTS, ImageRecord, InputError

OPEN_SHARDS = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""Shards a process keeps open, the ones used last: 33 kB each, and opening one takes as long as a dozen reads."""


class RecordImages:
    """ImageSet of one split of a built dataset, at `size` (h, w), or as stored where `size` is None.

    names, identities: of the images. joints: of a pose. joint_counts: uint16 [n], those visible. pairs: int32 [m 2], what may be
    trained or tested on; empty where no image has a pose. digest: of all the records' checksums, the key of caches. Opening
    reads no record and no table. Raises InputError where the folder is not a finished build or has no such split.
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
        images, self.pairs = read_tables(self.root, split)
        self.names, self.identities, self.joint_counts = Texts(images["name"]), Texts(images["identity"]), images["joints"]
        if len(images) != len(self):
            raise InputError(f"{root}: {table_files(split)[0]} has {len(images)} rows for {len(self)} records; build it again")

    def __getstate__(self) -> dict[str, Any]:
        """Without the open shards."""
        return {name: value for name, value in vars(self).items() if name != "_shard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Imports what reading needs, here: two threads that import it at once can wait for one another for ever."""
        from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401

        vars(self).update(state)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @functools.cached_property
    def _shard(self) -> Callable[[str], Any]:
        return functools.lru_cache(OPEN_SHARDS)(_open_shard)  # what falls out is closed when its last reader is done

    @functools.cached_property
    def digest(self) -> str:
        return read_json(self.root / "checksums.json")["digest"]

    def image(self, index: int) -> ImageRecord:
        """The photo with its map and joints. Raises InputError, naming shard and record, where it cannot be read."""
        fields = self.fields(index)
        photo = decode_photo(fields["image"], name=self.place(index))
        parsing, joints = self.parsing(fields, index, photo.shape[:2]), fields["joints"]
        if self.size is not None:
            photo, parsing, joints, _ = fit_photo(photo, parsing, joints, self.size)
        return ImageRecord(photo, parsing, joints, fields["name"], fields["identity"])

    def fields(self, index: int) -> Mapping[str, Any]:
        """All fields of a record (records.schema.RECORD_FIELDS), pictures still encoded. Raises InputError."""
        try:
            return parse_record(self._bytes(index))
        except (RuntimeError, ValueError, IndexError, OSError) as error:  # array_record: RuntimeError for a broken file
            raise InputError(f"{self.place(index)}: cannot be read ({one_line(error)}); see `prepare check`") from error

    def parsing(
        self, fields: Mapping[str, Any], index: int, hw: tuple[int, int], *, swap: bool = False
    ) -> np.ndarray:
        """The map of a record that is read already, whose photo is hw. swap: as in decode_parsing. Raises InputError."""
        where = self.place(index)
        if fields["parsing"]:
            return decode_parsing(fields["parsing"], self._label_set, hw, name=where, swap=swap)
        if self.labels == "whole":
            return whole_photo(hw)
        raise InputError(f"{where}: has no parsing map, though the set's labels are {self.labels}")

    def _bytes(self, index: int) -> bytes:
        shard, position = self._where(index)
        return self._shard(self._paths[shard]).read([position])[0]

    def place(self, index: int) -> Place:
        """What messages call a record."""
        return Place(self, index)

    def _where(self, index: int) -> tuple[int, int]:
        """(number of its shard, its place there)."""
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Shard, record within it and name: a text that is made when it is shown, for every record that is read has one."""

    images: RecordImages
    index: int

    def __str__(self) -> str:
        shard, position = self.images._where(self.index)
        return f"{self.images._paths[shard]}, record {position} ({self.images.names[self.index]})"


def _open_shard(path: str):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


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
