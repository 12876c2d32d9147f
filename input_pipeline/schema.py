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


class UserError(ValueError):
    """An error whose text is written for people. Programs print it as one line and end with 2 (truepose_jax/runtime/cli.py)."""


class InputError(UserError):
    """Bad input from a person: one line that says what is wrong, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One photo with its annotations.

    image: uint8 [h w 3], RGB; or stored latents, float16 [h/8 w/8 8] (batches/readers.py). parsing: uint8 [h w], ids of the
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
class TokenTable:
    """Region tokens of all images of a set, in its order (region crops through CLIP, made by truepose_jax).

    tokens: float32 [n 21 e]. valid: bool [n 21]. flipped_*: the same of the mirrored photos with their
    mirrored maps, needed only where flips are drawn.
    """

    tokens: np.ndarray
    valid: np.ndarray
    flipped_tokens: np.ndarray | None = None
    flipped_valid: np.ndarray | None = None

    @property
    def width(self) -> int:
        return self.tokens.shape[-1]

    @property
    def has_flipped(self) -> bool:
        return self.flipped_tokens is not None

    def of(self, index: int, *, flip: bool) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [21 e], valid [21]) of an image as it enters."""
        if flip:
            return self.flipped_tokens[index], self.flipped_valid[index]
        return self.tokens[index], self.valid[index]

    def check(self, images: int) -> None:
        """Raises InputError where this is not the table of so many images."""
        want = (images, MAX_CLASSES + 1)
        if self.tokens.shape[:2] != want or self.valid.shape != want:
            raise InputError(
                f"token table of shape {self.tokens.shape} with valid {self.valid.shape}; "
                f"expected {want} for this image set"
            )


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
    "float32": BATCH_FIELDS,
    "uint8": _TRAINED_ON | _BYTES,
    "uint8+maps": dict(BATCH_FIELDS) | _BYTES,
    "latents": _TRAINED_ON | _MOMENTS,
}
"""How a batch travels. "float32" is what a Method sees. "uint8" is what training loads: a quarter of the memory to fill and to
send, made floats on the device; "uint8+maps" has the targets' maps too, where a loss reads them. "latents" has stored latents
for photos."""

LATENT_FACTOR = 8
"""Pixels per latent cell and side of stored latents."""


def check_batch(batch: Mapping[str, np.ndarray], form: str = "float32") -> dict[str, int]:
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
    *, batch_size: int, targets_per_source: int, size: tuple[int, int], token_width: int, form: str = "float32"
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
