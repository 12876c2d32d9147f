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

    image: uint8 [h w 3], RGB; or stored latents, float16 [h/8 w/8 8] (readers.py). parsing: uint8 [h w], ids of the
    set's own labels; None where a reader was not asked for it. joints: float32 [18 3], (x pixels, y pixels, visible
    0/1), OpenPose order; missing joints are (0, 0, 0). name: unique within its set. identity: same person in the same
    clothes.
    """

    image: np.ndarray
    parsing: np.ndarray | None
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
    "target_parsing": Field(
        ("b", "h", "w"), "uint8", "the same of the target: for metrics and losses, never for the model"
    ),
    "class_on": Field(("b", MAX_CLASSES), "bool", "classes the target pose switches on (docs/paper.md 4)"),
    "region_tokens": Field(
        ("s", MAX_CLASSES + 1, "e"),
        "float32",
        "CLIP embedding per class of the source; last row: whole image",
    ),
    "region_valid": Field(("s", MAX_CLASSES + 1), "bool", "rows of region_tokens that exist (area >= 0.1 %)"),
    "valid": Field(("b",), "float32", "0 where the record could not be read: no weight in the loss"),
}


_BYTES = {
    "source": Field(("s", "h", "w", 3), "uint8", "source photos, 0 to 255"),
    "target": Field(("b", "h", "w", 3), "uint8", "target photos, 0 to 255"),
    "target_pose": Field(("b", "h", "w", 3), "uint8", "skeleton picture, 0 to 255"),
}
_MOMENTS = {
    "source": Field(("s", "h/8", "w/8", 8), "float16", "the VAE's posterior of the source photo: mean, log-variance"),
    "target": Field(("b", "h/8", "w/8", 8), "float16", "the same of the target photo"),
    "target_pose": _BYTES["target_pose"],
}
_TRAINED_ON = {name: field for name, field in BATCH_FIELDS.items() if name != "target_parsing"}

FORMS: Mapping[str, Mapping[str, Field]] = {
    "floats": BATCH_FIELDS,
    "bytes": _TRAINED_ON | _BYTES,
    "bytes+maps": dict(BATCH_FIELDS) | _BYTES,
    "moments": _TRAINED_ON | _MOMENTS,
}
"""How a batch travels. "floats" is what a Method sees. "bytes" is what training loads: a quarter of the memory to fill and to
send, made floats on the device; "bytes+maps" has the targets' maps too, where a loss reads them. "moments" has stored latents
for photos."""

LATENT_FACTOR = 8
"""Pixels per latent cell and side of stored latents."""


def check_batch(batch: Mapping[str, np.ndarray], form: str = "floats") -> dict[str, int]:
    """Checks names, shapes and dtypes against FORMS[form]; returns the sizes of the letters.

    Raises InputError.
    """
    fields = FORMS[form]
    missing, unknown = sorted(fields.keys() - batch.keys()), sorted(batch.keys() - fields.keys())
    if missing or unknown:
        raise InputError(f"batch lacks fields {missing} and has unknown {unknown}; see input_pipeline/schema.py")
    sizes: dict[str, int] = {}
    for name, field in fields.items():
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


def batch_shapes(
    *, batch_size: int, targets_per_source: int, size: tuple[int, int], token_width: int, form: str = "floats"
):
    """(shape, dtype) of every field for these sizes: {name: (tuple of ints, dtype name)}.

    `size` is (h, w), `form` a key of FORMS.
    """
    sources = batch_size // targets_per_source
    sizes = {"b": batch_size, "s": sources, "h": size[0], "w": size[1], "e": token_width}
    sizes |= {"h/8": size[0] // LATENT_FACTOR, "w/8": size[1] // LATENT_FACTOR}
    return {
        name: (tuple(sizes.get(letter, letter) for letter in field.shape), field.dtype)
        for name, field in FORMS[form].items()
    }
