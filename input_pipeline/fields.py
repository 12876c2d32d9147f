"""The catalogue of what a batch can hold, and the layout of one batch: the fields that a method asks for by name.

Letters of shapes: b rows (the batch size), s sources (b / targets_per_source), h w pixels, p = MAX_CLASSES parsing classes,
e width of a region token, q r sides of the squares that DINOv2 and CLIP see, j joints.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from input_pipeline.schema import MAX_CLASSES, InputError
from input_pipeline.skeletons import DRAWINGS


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: shape (letters as above), dtype as a method sees it, kind and meaning.

    Of kind "photo" are pictures in [-1, 1], of kind "skeleton" drawings in [0, 1]; both may travel as bytes. encoded: the
    autoencoder may read it as stored latents.
    """

    shape: tuple[str | int, ...]
    dtype: str
    meaning: str
    kind: str = ""
    encoded: bool = False


def _photo(shape: tuple[str | int, ...], meaning: str, *, encoded: bool = False) -> Field:
    return Field(shape, "float32", meaning, "photo", encoded)


def _skeleton(shape: tuple[str | int, ...], meaning: str) -> Field:
    return Field(shape, "float32", meaning, "skeleton")


FIELDS: Mapping[str, Field] = {
    "source": _photo(("s", "h", "w", 3), "source photos", encoded=True),
    "target": _photo(("b", "h", "w", 3), "target photos; target i has source i // (b / s)", encoded=True),
    "source_joints": Field(("s", "j", 3), "float32", "x, y in pixels, visible"),
    "target_joints": Field(("b", "j", 3), "float32", "x, y in pixels, visible"),
    "target_pose": _skeleton(("b", "h", "w", 3), "skeleton picture of the target pose"),
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
    "source_square": _photo(("s", "q", "q", 3), "the whole source photo squashed to the square that DINOv2 sees"),
    "source_small": _photo(("s", "r", "r", 3), "the same to the square that CLIP sees"),
    "target_small": _photo(("b", "r", "r", 3), "the target photo so"),
    "pose_small": _skeleton(("b", "r", "r", 3), "the target pose drawn at that size"),
    "views": _photo(("b", 4, "h", "w", 3), "four photos of one person"),
    "view_poses": _skeleton(("b", 4, "h", "w", 3), "their skeletons"),
    "given": Field(("b", 4), "bool", "which of the views are shown; the others are made"),
    "reference": _photo(("b", "h", "w", 3), "the view that the texture comes from"),
    "valid": Field(("b",), "float32", "0 where the record could not be read: no weight in the loss"),
}

FORMS = ("float32", "uint8", "latents")
"""How a batch travels. "float32" is what a method sees. "uint8": photos and skeletons as bytes, a quarter of the memory to
fill and to send, made floats on the device. "latents": the same with the VAE's moments for the photos that it reads."""

LATENT_FACTOR = 8
"""Pixels per latent cell and side of stored latents."""


def in_form(field: Field, form: str) -> Field:
    """The field as it travels. Moments are the posterior of the photo: mean, log-variance."""
    if form == "latents" and field.encoded:
        cells = {"h": "h/8", "w": "w/8", 3: 8}
        return dataclasses.replace(field, shape=tuple(cells.get(x, x) for x in field.shape), dtype="float16")
    return dataclasses.replace(field, dtype="uint8") if form != "float32" and field.kind else field


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields of a batch, "valid" always among them, the form in which they travel, the sizes of their letters beside b, s, h,
    w and j, and how poses are drawn (input_pipeline/skeletons.py)."""

    names: tuple[str, ...]
    form: str = "float32"
    letters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    drawing: str = "cfld"

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """In the catalogue's order."""
        unknown = sorted({*self.names} - FIELDS.keys())
        if unknown or self.form not in FORMS:
            raise ValueError(f"no such fields {unknown} or form {self.form!r}; see input_pipeline/fields.py")
        return {
            name: in_form(field, self.form) for name, field in FIELDS.items() if name in self.names or name == "valid"
        }

    def also(self, names: Iterable[str]) -> Layout:
        """With these fields too."""
        return dataclasses.replace(self, names=(*self.names, *names))

    @property
    def stored(self) -> bool:
        """Whether photos travel as stored latents."""
        return self.form == "latents"

    def shapes(self, *, batch_size: int, targets_per_source: int, size: tuple[int, int]):
        """(shape, dtype) of every field for these sizes: {name: (tuple of ints, dtype name)}. size is (h, w)."""
        sizes = {"b": batch_size, "s": batch_size // targets_per_source, "h": size[0], "w": size[1], **self.letters}
        sizes["j"] = DRAWINGS[self.drawing].joints
        sizes |= {"h/8": size[0] // LATENT_FACTOR, "w/8": size[1] // LATENT_FACTOR}
        return {
            name: (tuple(sizes.get(letter, letter) for letter in field.shape), field.dtype)
            for name, field in self.fields.items()
        }

    def empty(self, *, batch_size: int, targets_per_source: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Zeros in these shapes; `valid` is 0 until a row is written."""
        shapes = self.shapes(batch_size=batch_size, targets_per_source=targets_per_source, size=size)
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def check(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Checks names, shapes and dtypes; returns the sizes of the letters. Raises InputError."""
        fields = self.fields
        missing, unknown = sorted(fields.keys() - batch.keys()), sorted(batch.keys() - fields.keys())
        if missing or unknown:
            raise InputError(f"batch lacks fields {missing} and has unknown {unknown}; see input_pipeline/fields.py")
        sizes: dict[str, int] = {"j": DRAWINGS[self.drawing].joints, **self.letters}
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
        if sizes.get("s") and sizes["b"] % sizes["s"]:
            raise InputError(f"batch has {sizes['b']} targets for {sizes['s']} sources; must be a multiple")
        return sizes
