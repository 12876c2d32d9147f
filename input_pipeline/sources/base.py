"""What the readers of datasets hand to the builder of records: photos still to be read, their annotations, pairs.

A reader (deepfashion.py, market1501.py, wpose.py, ccp.py, own_photos.py) lists a raw folder and reads no pixels; the
items it returns read one photo each, in whichever process works on them.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from input_pipeline.annotations.keypoints import Pose
from input_pipeline.annotations.parsing import label_set, read_parsing
from input_pipeline.annotations.photo import Framing, decode_photo, is_plain_jpeg, open_picture
from input_pipeline.files import MAX_PICTURE, read_bytes
from input_pipeline.schema import NUM_JOINTS, InputError

NO_PHOTO, NO_POSE, NO_MAP = "photo missing", "pose missing", "parsing map missing"
BAD_PHOTO, BAD_MAP, BAD_POSE = "photo unreadable", "parsing map unreadable", "pose unreadable"
"""Why an image is dropped. Reports count by these."""


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An image that does not become a record. photo: its file, where there is one."""

    name: str
    reason: str
    detail: str
    photo: str = ""


class Unusable(Exception):
    """Raised by an item that cannot be read: (reason, detail)."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class RawPicture:
    """One photo as read: image uint8 [h w 3], parsing uint8 [h w] or None, joints float32 [n 3] in its pixels.

    jpeg: the file's bytes where they can be stored as they are (an upright RGB JPEG), else None.
    """

    image: np.ndarray
    parsing: np.ndarray | None
    joints: np.ndarray
    jpeg: bytes | None = None


class Item(Protocol):
    """One image of a raw dataset; picklable. `load` raises Unusable."""

    name: str
    identity: str

    def load(self) -> RawPicture: ...


@dataclasses.dataclass(frozen=True)
class PhotoItem:
    """A photo file with its pose (None: no joints) and its parsing map of the label set `labels` (None: no map)."""

    name: str
    identity: str
    photo: str
    pose: Pose | None
    parsing: str | None = None
    labels: str = "whole"

    def load(self) -> RawPicture:
        image, jpeg = read_photo_bytes(self.photo)
        parsing = None
        if self.parsing is not None:
            try:
                parsing = read_parsing(self.parsing, label_set(self.labels), image.shape[:2])
            except InputError as error:
                raise Unusable(BAD_MAP, str(error)) from error
        return RawPicture(image, parsing, joints_in(self.pose, image.shape[:2]), jpeg)


@dataclasses.dataclass(frozen=True)
class RawSplit:
    """items: the images, in the order of their records. pairs: int32 [n 2], (source, target) indices of items."""

    items: Sequence[Item]
    pairs: np.ndarray


@dataclasses.dataclass(frozen=True)
class RawSet:
    """A dataset ready to be built.

    labels: the label set of the maps, "whole" where there are none. joints: how many a pose has. dropped: images of the lists
    that are not among the items. problems: what is not as published; lines for people, fatal unless they are allowed. notes:
    what a reader of the report should know.
    """

    name: str
    labels: str
    splits: Mapping[str, RawSplit]
    description: str
    citation: str = ""
    homepage: str = ""
    licence: str = ""
    dropped: Sequence[Dropped] = ()
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    joints: int = NUM_JOINTS


def read_photo_bytes(path: str) -> tuple[np.ndarray, bytes | None]:
    """(pixels uint8 [h w 3], the file's bytes if they are an upright RGB JPEG). Raises Unusable."""
    try:
        data = read_bytes(path, "a photo", limit=MAX_PICTURE)
    except InputError as error:
        raise Unusable(BAD_PHOTO if pathlib.Path(path).exists() else NO_PHOTO, str(error)) from error
    try:
        image = decode_photo(data, name=path)
        with open_picture(data, name=path) as header:
            return image, data if is_plain_jpeg(header) else None
    except InputError as error:
        raise Unusable(BAD_PHOTO, str(error)) from error


def joints_in(pose: Pose | None, hw: tuple[int, int]) -> np.ndarray:
    """Joints float32 [18 3] of a pose in pixels of a photo of `hw`; zeros where there is none."""
    if pose is None:
        return np.zeros((NUM_JOINTS, 3), np.float32)
    return Framing.fit(pose.frame_hw or hw, hw).joints(pose.joints)


def limited(split: RawSplit, limit: int | None) -> RawSplit:
    """The first `limit` pairs and the images they name; without pairs the first `limit` images."""
    if limit is None:
        return split
    if len(split.pairs) == 0:
        return RawSplit(split.items[:limit], split.pairs)
    return restricted(split, split.pairs[:limit])


def restricted(split: RawSplit, pairs: np.ndarray) -> RawSplit:
    """These pairs and only the images that they name, in their old order."""
    used, places = np.unique(pairs, return_inverse=True)
    return RawSplit([split.items[i] for i in used], places.reshape(-1, 2).astype(np.int32))
