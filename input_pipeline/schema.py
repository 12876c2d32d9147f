"""What flows into batches (input_pipeline/fields.py): one image, one set of them, its region tokens; shapes and units."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

MAX_CLASSES = 20
"""Parsing classes are padded to this many rows, so that one program serves ATR-18, LIP-20 and CIHP-20."""

WHOLE_IMAGE = MAX_CLASSES
"""Row of `region_tokens` that holds the token of the whole image."""

NUM_JOINTS = 18


class UserError(ValueError):
    """An error whose text is written for people. Programs print it as one line and end with 2 (truepose_jax/runtime/cli.py)."""

    lines = False
    """Whether its text has lines. In others a line break can only be a part of some name, and is written out."""

    def __init__(self, text: str = ""):
        super().__init__(text if self.lines else printable(text))


def printable(text: str) -> str:
    """The text in one line that a terminal shows as it is: control characters as in Python's escapes."""
    if str(text).isprintable():
        return str(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


class InputError(UserError):
    """Bad input from a person: one line that says what is wrong, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One photo with its annotations.

    image: uint8 [h w 3], RGB; or stored latents, float16 [h/8 w/8 8] (batches/readers.py). parsing: uint8 [h w], ids of the
    set's own labels; None where a reader was not asked for it. joints: float32 [n 3], (x pixels, y pixels, visible 0/1), of a
    set of skeletons.py (OpenPose's 18); missing joints are (0, 0, 0). name: unique within its set. identity: same person in the
    same clothes. photo: uint8 [H W 3], the picture as it lies in the file, where a reader was asked for it; None: `image` is
    all.
    """

    image: np.ndarray
    parsing: np.ndarray | None
    joints: np.ndarray
    name: str
    identity: str
    photo: np.ndarray | None = None


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

    rows: float32 [r e], the tokens that there are, image after image: about 8 of 21, and dense ones of 10^5 images would be
    6 GB. valid: bool [n 21], which those are. flipped_*: the same of the mirrored photos with their mirrored maps, needed only
    where flips are drawn. All of them may be mapped files.
    """

    rows: np.ndarray
    valid: np.ndarray
    flipped_rows: np.ndarray | None = None
    flipped_valid: np.ndarray | None = None

    @classmethod
    def packed(cls, *dense: np.ndarray) -> TokenTable:
        """Of tokens [n 21 e] and valid [n 21], perhaps also of the mirrored photos' two."""
        pairs = zip(dense[::2], dense[1::2], strict=True)
        return cls(*(array for tokens, valid in pairs for array in (tokens[valid], valid)))

    @property
    def has_flipped(self) -> bool:
        return self.flipped_rows is not None

    @functools.cached_property
    def _starts(self) -> tuple[np.ndarray, ...]:
        """int64 [n + 1] of each side: where an image's rows begin."""
        sides = (self.valid, self.flipped_valid) if self.has_flipped else (self.valid,)
        return tuple(np.concatenate(([0], np.cumsum(np.count_nonzero(valid, axis=1)))) for valid in sides)

    def of(self, index: int, *, flip: bool) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [21 e], valid [21]) of an image as it enters; rows without a region are zeros."""
        rows, valid = (self.flipped_rows, self.flipped_valid) if flip else (self.rows, self.valid)
        first, last = self._starts[flip][index : index + 2]
        there = np.array(valid[index])
        tokens = np.zeros((len(there), rows.shape[1]), np.float32)
        tokens[there] = rows[first:last]
        return tokens, there

    def check(self, images: int) -> None:
        """Raises InputError where this is not the table of so many images."""
        want = (images, MAX_CLASSES + 1)
        if self.valid.shape != want or self._starts[0][-1] != len(self.rows):
            raise InputError(
                f"token table of {len(self.rows)} rows with valid {self.valid.shape}; expected {want} for this image set"
            )
