"""How a batch gets its images and region tokens: from an image set with a table of tokens, or straight from records.

Records are read part by part: a target's map is never decoded where nobody asks for it, and where latents are stored no
photo is. Both readers give an image as it enters, mirrored or not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from input_pipeline.annotations.keypoints import flip_joints
from input_pipeline.annotations.parsing import LabelSet, label_set
from input_pipeline.annotations.photo import Framing, decode_photo
from input_pipeline.batches.transforms import SQUARES, flip_record
from input_pipeline.fields import LATENT_FACTOR, Layout
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.schema import unpack_latents, unpack_tokens
from input_pipeline.schema import ImageRecord, ImageSet, InputError, TokenTable

Tokens = tuple[np.ndarray, np.ndarray]
"""(tokens float32 [21 e], valid bool [21])."""


@dataclasses.dataclass(frozen=True)
class RecordTokens:
    """The region tokens that lie in the records of `images`, read when they are wanted: 37,016 images' are 5 GB."""

    images: RecordImages
    width: int
    has_flipped: bool

    def of(self, index: int, *, flip: bool) -> Tokens:
        """(tokens [21 e], valid [21]) of an image as it enters. Raises InputError."""
        return self.of_fields(self.images.fields(index), index, flip=flip)

    def of_fields(self, fields: Mapping[str, Any], index: int, *, flip: bool) -> Tokens:
        """The same of a record that is read already."""
        kind = "flipped_region" if flip else "region"
        try:
            tokens, valid = unpack_tokens(fields[f"{kind}_tokens"], fields[f"{kind}_valid"])
        except ValueError as error:
            raise InputError(f"{self.images.place(index)}: its region tokens are broken ({error})") from error
        if tokens.shape[1] != self.width:
            raise InputError(f"{self.images.place(index)}: region tokens of {tokens.shape[1]}; expected {self.width}")
        return tokens, valid

    def check(self, images: int) -> None:
        """Raises InputError where these are not the tokens of so many images."""
        if len(self.images) != images:
            raise InputError(f"the tokens of {len(self.images)} records for a set of {images} images")


@dataclasses.dataclass(frozen=True)
class Reader:
    """Images for a batch by their index; every method raises InputError where a record cannot be read."""

    images: ImageSet
    tokens: TokenTable | RecordTokens | None
    size: tuple[int, int]
    layout: Layout

    @functools.cached_property
    def labels(self) -> LabelSet:
        return label_set(self.images.labels)

    def source(self, index: int, *, flip: bool) -> tuple[ImageRecord, Tokens | None]:
        """With its region tokens, where the layout has them."""
        raise NotImplementedError

    def target(self, index: int, *, flip: bool) -> ImageRecord:
        """The map may be missing (None) where the batch has none of the target."""
        raise NotImplementedError


class TableReader(Reader):
    """Of any ImageSet."""

    def source(self, index: int, *, flip: bool) -> tuple[ImageRecord, Tokens | None]:
        return self.target(index, flip=flip), None if self.tokens is None else self.tokens.of(index, flip=flip)

    def target(self, index: int, *, flip: bool) -> ImageRecord:
        record = self.images.image(index)
        return flip_record(record, self.labels) if flip else record


class StoredReader(Reader):
    """Of records: what the layout asks for of each, stored latents in the place of photos where it says so."""

    images: RecordImages

    def source(self, index: int, *, flip: bool) -> tuple[ImageRecord, Tokens | None]:
        fields = self.images.fields(index)
        # A source may be its own target.
        mapped = "source_parsing" in self.layout or "target_parsing" in self.layout
        record = self._record(fields, index, flip=flip, mapped=mapped)
        if self.tokens is None:
            return record, None
        if isinstance(self.tokens, RecordTokens):
            return record, self.tokens.of_fields(fields, index, flip=flip)
        return record, self.tokens.of(index, flip=flip)

    def target(self, index: int, *, flip: bool) -> ImageRecord:
        fields = self.images.fields(index)
        return self._record(fields, index, flip=flip, mapped="target_parsing" in self.layout)

    def _record(self, fields: Mapping[str, Any], index: int, *, flip: bool, mapped: bool) -> ImageRecord:
        framing = Framing.fit(tuple(fields["size"].tolist()), self.size)
        joints = fields["joints"] if framing.photo_hw == self.size else framing.joints(fields["joints"])
        parsing = photo = None
        if mapped:  # ids swap sides as runs, of which there are fewer than pixels
            parsing = framing.parsing(self.images.parsing(fields, index, framing.photo_hw, swap=flip))
        if self.layout.stored:
            image = self._moments(fields, index, flip=flip)  # the mirrored photo has latents of its own
        else:
            whole = decode_photo(fields["image"], name=self.images.place(index))
            if whole.shape[:2] != framing.photo_hw:
                raise InputError(f"{self.images.place(index)}: says {framing.photo_hw} and is {whole.shape[:2]}")
            image = framing.image(whole)
            photo = whole if any(name in self.layout for name in SQUARES) else None
        if flip:
            joints = flip_joints(joints, self.size[1])
            parsing, photo = (None if array is None else cv2.flip(array, 1) for array in (parsing, photo))
            image = image if self.layout.stored else cv2.flip(image, 1)
        return ImageRecord(image, parsing, joints, fields["name"], fields["identity"], photo)

    def _moments(self, fields: Mapping[str, Any], index: int, *, flip: bool) -> np.ndarray:
        """float16 [h/8 w/8 8]."""
        size = tuple(int(side) for side in fields["latents_size"])
        try:
            latents = unpack_latents(fields["flipped_latents" if flip else "latents"], size)
        except ValueError as error:
            raise InputError(f"{self.images.place(index)}: its latents are broken ({error})") from error
        if latents is None or size != tuple(self.size):
            what = "no latents" if latents is None else f"latents of a {size[0]}x{size[1]} picture"
            raise InputError(f"{self.images.place(index)}: has {what}; run `prepare annotate` to the end")
        h, w = (side // LATENT_FACTOR for side in self.size)
        moments = np.empty((h * w, 2), np.uint64)  # four halves moved at once
        moments[:, 0], moments[:, 1] = latents.view(np.uint64).reshape(2, -1)
        return moments.view(np.float16).reshape(h, w, -1)


def make_reader(images: ImageSet, tokens: TokenTable | RecordTokens | None, layout: Layout) -> Reader:
    """The reader for batches of the layout. Raises InputError where tokens and images do not belong together, where no image
    can be read, and for stored latents of anything but records."""
    if tokens is not None:
        tokens.check(len(images))
    if isinstance(images, RecordImages) and images.size is not None:
        return StoredReader(images, tokens, tuple(images.size), layout)
    if layout.stored:
        raise InputError("stored latents are read from records; this set of images is none")
    return TableReader(images, tokens, _size(images), layout)


def _size(images: ImageSet) -> tuple[int, int]:
    """Of the first image that can be read."""
    for index in range(len(images)):
        try:
            return images.image(index).image.shape[:2]
        except InputError as error:
            first = error
    raise InputError(f"no image of the set can be read; the last error: {first}")
