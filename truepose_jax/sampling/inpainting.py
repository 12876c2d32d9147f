"""Style transfer (TruePose section 5.4): one region of a reference photo made anew with the clothes of another photo.

The source is the photo whose style is wanted, the pose is the reference's own. At every noise level the latent outside the
region is replaced by the reference's, noised to that level (the rule of PIDM, whose application the paper's is; the paper's
text blends "predicted noise", docs/paper.md 5). The reference is noised with the very noise that the picture begins with: DDIM
with eta 0 keeps one noise on its whole way, so what stands outside is at every level what DDIM itself would have there had
it predicted the reference, and a picture needs no further random numbers. The last level is the clean reference.

What stays as it was: outside the region's latent cells the result's latent is the reference's, bit for bit. With the pixel
codec that is the reference's own pixels. A VAE gives decode(encode(reference)), and near the border a mixture, for its
convolutions see some cells far; its norms and its attention see the whole picture, so that even far away values differ a
little. outside="pasted" puts the reference's pixels back everywhere outside the mask.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from input_pipeline.annotations.parsing import LabelSet, label_set, read_parsing
from input_pipeline.annotations.photo import Framing, read_photo
from input_pipeline.schema import InputError
from truepose_jax.config import ConfigError
from truepose_jax.diffusion.samplers import State, StepCallback
from truepose_jax.methods.base import Batch, Frozen
from truepose_jax.runtime.choices import OUTSIDE
from truepose_jax.sampling.sampler import Sampler

MASK_FIELD = "edit_mask"
"""Field of an edited batch beside those of input_pipeline/fields.py: bool [b h w], where the picture is made anew. Its
`target` is the reference."""

LIGHT = 127
"""Brighter pixels of a mask's file are the region."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """reference: uint8 [h w 3], RGB. mask: bool [h w], True where it is made anew. outside: "decoded" (as the codec gives the
    kept latent) or "pasted" (the reference's own pixels)."""

    reference: np.ndarray
    mask: np.ndarray
    outside: str = "decoded"


@dataclasses.dataclass(frozen=True)
class FittedEdit:
    """The same at the model's size; framing: where the reference lies in it, as the result will."""

    reference: np.ndarray
    mask: np.ndarray
    outside: str
    framing: Framing

    @classmethod
    def fit(cls, edit: Edit, size: tuple[int, int], name: str) -> FittedEdit:
        """Raises InputError for arrays that do not fit one another and an empty mask. Padding is never edited."""
        photo, mask = edit.reference, edit.mask
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise InputError(f"{name}: the reference is uint8 [h w 3]; got {photo.dtype} {list(photo.shape)}")
        if mask.dtype != bool or mask.ndim != 2:
            raise InputError(f"{name}: the edit mask is bool [h w]; got {mask.dtype} {list(mask.shape)}")
        if mask.shape != photo.shape[:2]:
            (h, w), (photo_h, photo_w) = mask.shape, photo.shape[:2]
            raise InputError(
                f"{name}: the edit mask is {h}x{w} but the reference is {photo_h}x{photo_w}; make them one size"
            )
        if edit.outside not in OUTSIDE:
            raise InputError(f"{name}: outside is {edit.outside!r}; choose one of {OUTSIDE}")
        framing = Framing.fit(photo.shape[:2], size)
        fitted = framing.parsing(mask.astype(np.uint8)) > 0
        if not fitted.any():
            at = "" if not mask.any() else f" at the model's {size[0]}x{size[1]}"
            raise InputError(f"{name}: the edit mask is empty{at}; there is nothing to edit")
        return cls(framing.image(photo), fitted, edit.outside, framing)

    def finish(self, picture: np.ndarray) -> np.ndarray:
        """The model's picture uint8 [h w 3], with the reference's pixels outside the mask where those were asked for."""
        return np.where(self.mask[..., None], picture, self.reference) if self.outside == "pasted" else picture


@dataclasses.dataclass(frozen=True)
class EditSampler(Sampler):
    """A Sampler of batches with MASK_FIELD, whose `target` is the reference; rows with a full mask come out as without.

    Raises ConfigError (while tracing) for a method whose latent is not that of one picture.
    """

    def edit(self, frozen: Frozen, batch: Batch, noise: Float[Array, "b h w c"]) -> tuple[Array, Array, Array]:
        """(region [b h w 1], the reference's latent, noise)."""
        reference = self.method.encode(frozen, batch["target"])
        if reference.shape != noise.shape:
            raise ConfigError(
                f"{type(self.method).__name__} samples latents {noise.shape[1:]} of {reference.shape[1:]} pictures; it cannot "
                "edit"
            )
        return latent_mask(batch[MASK_FIELD], noise.shape[1:3]), reference, noise

    def step_callback(self, edit: tuple[Array, Array, Array]) -> StepCallback:
        return keep_outside(*edit)

    def finish(self, frozen: Frozen, fixed: tuple[Any, Any], state: State) -> Float[Array, "b h w 3"]:
        region, reference, _ = fixed[1]
        return self.method.decode(frozen, jnp.where(region, state.x, reference))


def latent_mask(mask: Bool[Array, "b H W"], hw: tuple[int, int]) -> Bool[Array, "b h w 1"]:
    """Max-pooled to the latent's size: a cell with one pixel of the region is made anew."""
    b, height, width = mask.shape
    h, w = hw
    return jnp.any(mask.reshape(b, h, height // h, w, width // w), axis=(2, 4))[..., None]


def keep_outside(
    region: Bool[Array, "b h w 1"], reference: Float[Array, "b h w c"], noise: Float[Array, "b h w c"]
) -> StepCallback:
    """Outside the region, the reference's latent at the noise level in question (Eq. 1)."""
    return lambda x, abar: jnp.where(region, x, jnp.sqrt(abar) * reference + jnp.sqrt(1.0 - abar) * noise)


# ------------------------------------------------------------------------------------------------ from files


def read_edit(
    reference: str, mask: str, *, parsing: str | None = None, labels: str | None = None, outside: str = "decoded"
) -> Edit:
    """reference: a photo. mask: a picture of its size, light where it is edited (not where it is transparent), or classes of
    its parsing map `parsing` (of the set `labels`) as in Upper-clothes,Dress. Raises InputError."""
    photo = read_photo(reference)
    hw = photo.shape[:2]
    if pathlib.PurePath(mask).suffix:
        chosen = read_photo(mask, over="black").min(axis=2) > LIGHT
        if chosen.shape == hw and not chosen.any():
            raise InputError(f"{mask}: no pixel is lighter than {LIGHT}; paint white what is to be edited")
        return Edit(photo, chosen, outside)
    if not parsing or not labels:
        missing = "reference-labels" if parsing else "reference-parsing"
        raise InputError(
            f"--edit-mask={mask} names parsing classes, so --{missing} is missing; a file of a mask ends in .png"
        )
    found = label_set(labels)
    chosen = class_mask(read_parsing(parsing, found, hw), found, mask)
    if not chosen.any():
        raise InputError(f"{parsing}: holds no pixel of {mask}; choose a class that is in it")
    return Edit(photo, chosen, outside)


def class_mask(parsing: np.ndarray, labels: LabelSet, names: str) -> np.ndarray:
    """bool [h w]: where the map shows one of the classes, named as in 'Upper-clothes,Dress' (case does not matter).
    Raises InputError for a name that the set has not."""
    ids = {name.casefold(): i for i, name in enumerate(labels.classes)}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name.casefold() not in ids:
            raise InputError(f"{labels.name} has no class '{name}'; choose from {', '.join(labels.classes)}")
    return np.isin(parsing, [ids[name.casefold()] for name in wanted])


def sheet_columns(source: np.ndarray, skeleton: np.ndarray, edit: FittedEdit, picture: np.ndarray):
    """What `image_grid.sheet` draws of an edit, all at the model's size: {title: [uint8 [h w 3]]}. picture: the result without
    padding."""
    shown = edit.reference.copy()
    x0, y0, x1, y1 = edit.framing.box
    shown[y0:y1, x0:x1] = picture
    dark = (edit.reference * 0.25).astype(np.uint8)
    region = np.where(edit.mask[..., None], edit.reference, dark)
    cells = {"style": source, "reference": edit.reference, "region": region, "pose": skeleton, "result": shown}
    return {title: [cell] for title, cell in cells.items()}
