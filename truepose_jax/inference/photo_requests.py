"""Requests whose poses and maps are yet to be found in photos, made whole: detection, alignment, crops."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from input_pipeline.annotations.parsing import check_parsing, label_set
from input_pipeline.annotations.photo import Framing
from input_pipeline.schema import NUM_JOINTS, InputError
from truepose_jax.detection.embedded import LABELS, find_person
from truepose_jax.inference.align_pose import align_pose
from truepose_jax.inference.person_crop import Box, Crop, box_of_joints, box_of_mask, crop_box, moved
from truepose_jax.inference.request import Request

AUTO = "auto"
"""In place of a parsing map: find it."""
GIVEN = "given"
"""What there is to say of a pose or a photo that nothing was looked for in."""


@dataclasses.dataclass(frozen=True)
class PhotoOptions:
    """person, pose_person: whom to take of the photo and of the pose photo, 1 the largest. crop: give the model the person with
    a margin, and put the picture back into the photo; None: where parsing is "auto" and nothing is edited. align: the target
    pose with the limb lengths and in the place of the source's person. parser: photo -> (map, its label set), where no map is
    given, in place of what comes along."""

    person: int = 1
    pose_person: int = 1
    crop: bool | None = None
    align: bool = False
    parser: Callable[[np.ndarray], tuple[np.ndarray, str]] | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of a photo, for --show-found. photo: uint8 [h w 3], black where a file gave the pose. joints: [18 3] in its
    pixels, None where nothing asked for them. parsing: with its label set, or None. box: the part that the model gets."""

    photo: np.ndarray
    joints: np.ndarray | None
    parsing: np.ndarray | None
    labels: str
    box: Box
    about: str


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A request that `Run.fit` takes, and what was seen of the source and of the pose."""

    request: Request
    source: Seen
    pose: Seen


def is_photo(pose: np.ndarray) -> bool:
    """Is this a photo to find a pose in, uint8 [h w 3], and not joints [18 3]?"""
    return pose.dtype == np.uint8 and pose.ndim == 3


def resolve(
    request: Request,
    size: tuple[int, int],
    *,
    head: bool,
    options: PhotoOptions = PhotoOptions(),
    names: tuple[str, str] = ("the photo", "the pose photo"),
) -> Resolved:
    """The request with arrays alone. Its `joints` may be a photo, its `parsing` "auto"; where the model has the half-cell head,
    or a crop or the alignment needs them, its source_joints are found as well. size: the model's (h, w). names: what messages
    call source and pose. Raises InputError."""
    photo, pose = request.source, np.asarray(request.joints)
    for name, image in ((names[0], photo), (names[1], pose)):
        if image is photo or is_photo(pose):
            check_photo(image, name)
    auto = isinstance(request.parsing, str)
    if auto and request.parsing != AUTO:
        raise InputError(f"parsing is {request.parsing!r}; give a map, None, or {AUTO!r}")
    crop = (auto and request.edit is None) if options.crop is None else options.crop
    if crop and request.edit is not None:
        raise InputError("a crop to the person means nothing to an edit, whose picture is framed as its reference")
    hw, own, known = photo.shape[:2], request.source_joints, isinstance(request.parsing, np.ndarray)
    if known:
        check_parsing(request.parsing, label_set(request.labels), hw, name=f"{names[0]}, map")
    if own is not None and (crop or options.align):
        own = in_pixels(own, request.source_frame_hw or hw, hw, f"{names[0]}, its own pose")
        request = dataclasses.replace(request, source_joints=own, source_frame_hw=None)
    frame_hw = request.frame_hw or (hw if request.edit is None else request.edit.reference.shape[:2])
    found, parsing, labels = None, request.parsing, request.labels
    if (auto and options.parser is None) or (own is None and (head or options.align or (crop and not known))):
        found = find_person(photo, person=options.person, name=names[0])
        own = found.joints if own is None else own
    if auto:
        parsing, labels = options.parser(photo) if options.parser else (found.parsing, LABELS)
    target, pose_seen = pose, None
    if is_photo(pose):
        pose_found = find_person(pose, person=options.pose_person, name=names[1])
        target, frame_hw = pose_found.joints, pose.shape[:2]
        pose_seen = Seen(pose, target, pose_found.parsing, LABELS, _whole(frame_hw), pose_found.about)
    elif crop or options.align:
        target = in_pixels(pose, frame_hw, frame_hw, names[1])
    if options.align:
        try:
            target, frame_hw = align_pose(target, own), hw
        except ValueError as error:
            raise InputError(f"{names[1]}: cannot be aligned ({error}); take another pose") from error
    box, pose_box = _whole(hw), _whole(frame_hw)
    if crop:
        around = [box_of_joints(own, hw)] if own is not None else []
        around += [box_of_mask(parsing > 0)] if parsing is not None else []
        around += [box_of_joints(target, hw)] if options.align else []
        box = crop_box(_union(around), hw, size)
        like = box[3] - box[1], box[2] - box[0]
        pose_box = box if options.align else crop_box(box_of_joints(target, frame_hw), frame_hw, like)
    if pose_seen is None:
        black = np.zeros((*frame_hw, 3), np.uint8)
        pose_seen = Seen(photo if options.align else black, target, None, LABELS, pose_box, GIVEN)
    elif not options.align:
        pose_seen = dataclasses.replace(pose_seen, box=pose_box)
    source_seen = Seen(photo, own, parsing, labels, box, found.about if found else GIVEN)
    x0, y0, x1, y1 = box
    resolved = dataclasses.replace(
        request,
        parsing=parsing,
        parsing_found=auto and options.parser is None,
        labels=labels,
        joints=target,
        frame_hw=frame_hw,
        source_joints=own if head or request.source_joints is not None else None,
    )
    if crop:
        resolved = dataclasses.replace(
            resolved,
            source=np.ascontiguousarray(photo[y0:y1, x0:x1]),
            parsing=None if parsing is None else np.ascontiguousarray(parsing[y0:y1, x0:x1]),
            joints=moved(target, pose_box),
            frame_hw=(pose_box[3] - pose_box[1], pose_box[2] - pose_box[0]),
            source_joints=None if resolved.source_joints is None else moved(own, box),
            crop=Crop(photo, box),
        )
    return Resolved(resolved, source_seen, pose_seen)


def in_pixels(joints: np.ndarray, frame_hw: tuple[int, int], hw: tuple[int, int], name: str) -> np.ndarray:
    """Joints [18 3] of a frame in pixels of a picture of hw into which it is put as a photo would be. Raises InputError."""
    joints = np.asarray(joints, np.float64)
    if joints.shape != (NUM_JOINTS, 3) or not np.isfinite(joints).all():
        raise InputError(f"{name}: a pose is [18 3] of finite x, y, visible; got {list(joints.shape)}")
    if not (joints[:, 2] > 0).any():
        raise InputError(f"{name}: no joint is visible; choose another pose")
    return Framing.fit(frame_hw, hw).joints(joints)


def check_photo(photo: np.ndarray, name: str) -> None:
    """Raises InputError where this is no photo as arrays are here."""
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
        raise InputError(f"{name}: a photo is uint8 [h w 3]; got {photo.dtype} {list(photo.shape)}")


def segformer(folder: str | os.PathLike[str]) -> Callable[[np.ndarray], tuple[np.ndarray, str]]:
    """A parser by a segmentation model of people in transformers' layout. Raises InputError."""
    from truepose_jax.detection.parsing_model import ParsingModel

    model = ParsingModel(os.fspath(folder), None, "cpu")
    return lambda photo: (model([photo])[0], model.map.labels.name)


def _whole(hw: tuple[int, int]) -> Box:
    return 0, 0, hw[1], hw[0]


def _union(boxes: list[np.ndarray]) -> np.ndarray:
    low, high = np.min([box[:2] for box in boxes], axis=0), np.max([box[2:] for box in boxes], axis=0)
    return np.concatenate([low, high])
