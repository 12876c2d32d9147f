"""From annotated images and their region tokens to rows of a batch. The fields are schema.FORMS."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from input_pipeline.annotations.keypoints import flip_joints
from input_pipeline.annotations.parsing import LabelSet, class_on, flip_parsing
from input_pipeline.annotations.skeleton import draw_skeleton_into
from input_pipeline.schema import ImageRecord, InputError, batch_shapes


def flip_record(record: ImageRecord, labels: LabelSet) -> ImageRecord:
    """The mirrored photo with its joints and labels: left and right swapped in both."""
    return dataclasses.replace(
        record,
        image=cv2.flip(record.image, 1),  # 40 times as fast as a copy through a negative stride
        parsing=None if record.parsing is None else flip_parsing(record.parsing, labels),
        joints=flip_joints(record.joints, record.image.shape[1]),
    )


def empty_batch(
    *, batch_size: int, targets_per_source: int, size: tuple[int, int], token_width: int, form: str = "float32"
):
    """Zeros in the shapes of FORMS[form]; `valid` is 0 until a row is written."""
    shapes = batch_shapes(
        batch_size=batch_size, targets_per_source=targets_per_source, size=size, token_width=token_width, form=form
    )
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}


def write_source(
    batch: dict[str, np.ndarray], row: int, record: ImageRecord, tokens: np.ndarray, tokens_valid: np.ndarray
) -> None:
    """Fills source row `row` (of s). Raises InputError where the record does not fit the batch."""
    _check_size(record, batch, "source")
    write_picture(record.image, out=batch["source"][row])
    batch["source_joints"][row] = record.joints
    batch["source_parsing"][row] = record.parsing
    batch["region_tokens"][row] = tokens
    batch["region_valid"][row] = tokens_valid


def write_target(batch: dict[str, np.ndarray], row: int, record: ImageRecord, labels: LabelSet) -> None:
    """Fills target row `row` (of b) and marks it valid.

    Raises InputError where the record does not fit the batch.
    """
    _check_size(record, batch, "target")
    hw = batch["target_pose"].shape[1:3]
    write_picture(record.image, out=batch["target"][row])
    batch["target_joints"][row] = record.joints
    if "target_parsing" in batch:
        batch["target_parsing"][row] = record.parsing
    pose = batch["target_pose"][row]
    if pose.dtype == np.uint8:
        draw_skeleton_into(pose, record.joints, joints_hw=hw)
    else:
        skeleton = np.zeros(pose.shape, np.uint8)
        draw_skeleton_into(skeleton, record.joints, joints_hw=hw)
        np.divide(skeleton, np.float32(255), out=pose, dtype=np.float32)
    batch["class_on"][row] = class_on(record.joints, labels, hw=hw)
    batch["valid"][row] = 1


def write_picture(image: np.ndarray, *, out: np.ndarray) -> None:
    """uint8 0 to 255 -> float32 [-1, 1]; or a copy, where `out` has the image's own dtype (bytes, moments)."""
    if out.dtype == image.dtype:
        np.copyto(out, image)
        return
    np.divide(image, np.float32(127.5), out=out, dtype=np.float32)
    out -= 1


def _check_size(record: ImageRecord, batch: dict[str, np.ndarray], part: str) -> None:
    picture, size = batch[part].shape[1:], batch["target_pose"].shape[1:3]
    if record.image.shape != picture or (record.parsing is not None and record.parsing.shape != size):
        map_shape = None if record.parsing is None else record.parsing.shape
        raise InputError(
            f"{record.name}: photo {record.image.shape} and map {map_shape} in a batch of {picture}; "
            "an image set must give one size"
        )
