"""What flows through the input pipeline: one image, one set of images, one batch, with shapes and units.

Letters: b targets in the batch (the batch size), s sources in the batch (b / targets_per_source), h w pixels,
p = MAX_CLASSES parsing classes, e width of a region token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

MAX_CLASSES = 20
"""Parsing classes are padded to this many rows, so that one program serves ATR-18, LIP-20 and CIHP-20."""

WHOLE_IMAGE = MAX_CLASSES
"""Row of `region_tokens` that holds the token of the whole image."""

NUM_JOINTS = 18


class InputError(ValueError):
    """Bad input from a person: one line that says what is wrong, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One photo with its annotations.

    image: uint8 [h w 3], RGB. parsing: uint8 [h w], ids of the set's own labels.
    joints: float32 [18 3], (x pixels, y pixels, visible 0/1), OpenPose order; missing joints are (0, 0, 0).
    name: unique within its set. identity: same person in the same clothes.
    """

    image: np.ndarray
    parsing: np.ndarray
    joints: np.ndarray
    name: str
    identity: str


class ImageSet(Protocol):
    """Random access to annotated images, and the pairs that may be trained or tested on."""

    labels: str
    """Name of the label set of the parsing maps, a key of `parsing.LABEL_SETS`."""

    pairs: np.ndarray
    """int32 [n 2]: (source image, target image) indices."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> ImageRecord: ...


@dataclasses.dataclass(frozen=True)
class Field:
    """Shape (letters as above), dtype and meaning of one array of the batch."""

    shape: tuple[str | int, ...]
    dtype: str
    meaning: str


BATCH_FIELDS: Mapping[str, Field] = {
    "source": Field(("s", "h", "w", 3), "float32", "source photos, [-1, 1]"),
    "target": Field(("b", "h", "w", 3), "float32", "target photos, [-1, 1]; target i has source i // (b / s)"),
    "source_joints": Field(("s", NUM_JOINTS, 3), "float32", "x, y in pixels, visible"),
    "target_joints": Field(("b", NUM_JOINTS, 3), "float32", "x, y in pixels, visible"),
    "target_pose": Field(("b", "h", "w", 3), "float32", "skeleton picture of the target pose, [0, 1]"),
    "source_parsing": Field(("s", "h", "w"), "uint8", "label of each source pixel, in the set's own ids"),
    "target_parsing": Field(("b", "h", "w"), "uint8", "the same of the target: for metrics, never for the model"),
    "class_on": Field(("b", MAX_CLASSES), "bool", "classes the target pose switches on (methods.md 1.5)"),
    "region_tokens": Field(
        ("s", MAX_CLASSES + 1, "e"),
        "float32",
        "CLIP embedding per class of the source; last row: whole image",
    ),
    "region_valid": Field(("s", MAX_CLASSES + 1), "bool", "rows of region_tokens that exist (area >= 0.1 %)"),
    "valid": Field(("b",), "float32", "0 where the record could not be read: no weight in the loss"),
}


def check_batch(batch: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Checks names, shapes and dtypes against BATCH_FIELDS; returns the sizes of the letters.

    Raises InputError.
    """
    missing, unknown = sorted(BATCH_FIELDS.keys() - batch.keys()), sorted(batch.keys() - BATCH_FIELDS.keys())
    if missing or unknown:
        raise InputError(f"batch lacks fields {missing} and has unknown {unknown}; see input_pipeline/schema.py")
    sizes: dict[str, int] = {}
    for name, field in BATCH_FIELDS.items():
        array = batch[name]
        if len(array.shape) != len(field.shape):
            raise InputError(f"batch['{name}'] has shape {tuple(array.shape)}; expected {field.shape}")
        for size, letter in zip(array.shape, field.shape, strict=True):
            want = letter if isinstance(letter, int) else sizes.setdefault(letter, size)
            if size != want:
                raise InputError(f"batch['{name}'] has shape {array.shape}; expected {field.shape} with {sizes}")
        if str(array.dtype) != field.dtype:
            raise InputError(f"batch['{name}'] is {array.dtype}; expected {field.dtype}")
    if sizes["s"] and sizes["b"] % sizes["s"]:
        raise InputError(f"batch has {sizes['b']} targets for {sizes['s']} sources; must be a multiple")
    return sizes


def batch_shapes(*, batch_size: int, targets_per_source: int, size: tuple[int, int], token_width: int):
    """(shape, dtype) of every field for these sizes: {name: (tuple of ints, dtype name)}.

    `size` is (h, w).
    """
    sources = batch_size // targets_per_source
    sizes = {"b": batch_size, "s": sources, "h": size[0], "w": size[1], "e": token_width}
    return {
        name: (tuple(sizes.get(letter, letter) for letter in field.shape), field.dtype)
        for name, field in BATCH_FIELDS.items()
    }
