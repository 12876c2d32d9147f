"""From annotated images and their region tokens to rows of a batch: the fields that its layout has (input_pipeline/fields.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from input_pipeline.annotations.keypoints import flip_joints
from input_pipeline.annotations.parsing import LabelSet, class_on, flip_parsing
from input_pipeline.annotations.skeleton import draw_pose_into
from input_pipeline.fields import LATENT_FACTOR
from input_pipeline.schema import ImageRecord, InputError

SQUARES = ("source_square", "source_small", "target_small")
"""Fields of whole photos, squashed from the file."""


def flip_record(record: ImageRecord, labels: LabelSet) -> ImageRecord:
    """The mirrored photo with its joints and labels: left and right swapped in both."""
    return dataclasses.replace(
        record,
        image=cv2.flip(record.image, 1),  # 40 times as fast as a copy through a negative stride
        photo=None if record.photo is None else cv2.flip(record.photo, 1),
        parsing=None if record.parsing is None else flip_parsing(record.parsing, labels),
        joints=flip_joints(record.joints, record.image.shape[1]),
    )


def write_source(
    batch: dict[str, np.ndarray],
    row: int,
    record: ImageRecord,
    tokens: tuple[np.ndarray, np.ndarray] | None,
    *,
    hw: tuple[int, int],
) -> None:
    """Fills source row `row` (of s) of the fields that the batch has. tokens: (tokens, valid); None where it has none. Raises
    InputError where the record is not of the batch's size `hw`."""
    _check_size(record, hw)
    if "source" in batch:
        write_picture(record.image, out=batch["source"][row])
    if "source_joints" in batch:
        batch["source_joints"][row] = record.joints
    if "source_parsing" in batch:
        batch["source_parsing"][row] = record.parsing
    if tokens is not None:
        batch["region_tokens"][row], batch["region_valid"][row] = tokens
    for name in SQUARES:
        if name in batch and name.startswith("source"):
            write_picture(squashed(record, batch[name].shape[1]), out=batch[name][row])


def write_target(
    batch: dict[str, np.ndarray], row: int, record: ImageRecord, labels: LabelSet, *, hw: tuple[int, int], drawing: str
) -> None:
    """Fills target row `row` (of b) of the fields that the batch has, and marks it valid. drawing: of DRAWINGS.

    Raises InputError where the record is not of the batch's size `hw`.
    """
    _check_size(record, hw)
    if "target" in batch:
        write_picture(record.image, out=batch["target"][row])
    if "target_joints" in batch:
        batch["target_joints"][row] = record.joints
    if "target_parsing" in batch:
        batch["target_parsing"][row] = record.parsing
    for name in ("target_pose", "pose_small"):
        if name in batch:
            write_skeleton(record.joints, hw, drawing, out=batch[name][row])
    if "class_on" in batch:
        batch["class_on"][row] = class_on(record.joints, labels, hw=hw)
    if "target_small" in batch:
        write_picture(squashed(record, batch["target_small"].shape[1]), out=batch["target_small"][row])
    batch["valid"][row] = 1


def write_views(
    batch: dict[str, np.ndarray],
    row: int,
    records: Sequence[ImageRecord],
    *,
    shown: int,
    hw: tuple[int, int],
    drawing: str,
) -> None:
    """Fills row `row` of the canvas fields that the batch has: tile i is records[i], the last again where there are fewer; the
    first `shown` tiles are given, and the first of all is the reference. Raises InputError."""
    for tile in range(batch["views"].shape[1]):
        record = records[min(tile, len(records) - 1)]
        _check_size(record, hw)
        write_picture(record.image, out=batch["views"][row, tile])
        write_skeleton(record.joints, hw, drawing, out=batch["view_poses"][row, tile])
    if "given" in batch:
        batch["given"][row] = np.arange(batch["given"].shape[1]) < shown
    if "reference" in batch:
        write_picture(records[0].image, out=batch["reference"][row])


def write_skeleton(joints: np.ndarray, joints_hw: tuple[int, int], drawing: str, *, out: np.ndarray) -> None:
    """The skeleton of joints in a frame `joints_hw`, drawn over all of `out`: bytes, or floats in [0, 1]."""
    if out.dtype == np.uint8:
        out.fill(0)
        draw_pose_into(out, joints, joints_hw=joints_hw, drawing=drawing)
        return
    skeleton = np.zeros(out.shape, np.uint8)
    draw_pose_into(skeleton, joints, joints_hw=joints_hw, drawing=drawing)
    np.divide(skeleton, np.float32(255), out=out, dtype=np.float32)


def squashed(record: ImageRecord, side: int) -> np.ndarray:
    """uint8 [side side 3]: the whole photo, of the file where the record has it, by Pillow's bicubic."""
    photo = record.image if record.photo is None else record.photo
    return np.asarray(Image.fromarray(photo).resize((side, side), Image.Resampling.BICUBIC))


def write_picture(image: np.ndarray, *, out: np.ndarray) -> None:
    """uint8 0 to 255 -> float32 [-1, 1]; or a copy, where `out` has the image's own dtype (bytes, moments)."""
    if out.dtype == image.dtype:
        np.copyto(out, image)
        return
    np.divide(image, np.float32(127.5), out=out, dtype=np.float32)
    out -= 1


def _check_size(record: ImageRecord, hw: tuple[int, int]) -> None:
    h, w = hw
    stored = record.image.dtype == np.float16
    picture = (h // LATENT_FACTOR, w // LATENT_FACTOR, 8) if stored else (h, w, 3)
    if record.image.shape != picture or (record.parsing is not None and record.parsing.shape != tuple(hw)):
        map_shape = None if record.parsing is None else record.parsing.shape
        raise InputError(
            f"{record.name}: photo {record.image.shape} and map {map_shape} in a batch of {picture}; "
            "an image set must give one size"
        )
