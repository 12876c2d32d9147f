"""One picture to make: what is asked for, and how it is fitted to a model's size."""

from __future__ import annotations

import dataclasses
import functools
import logging

import numpy as np

from input_pipeline.annotations.keypoints import inside
from input_pipeline.annotations.parsing import LabelSet, check_parsing, convert_parsing, label_set, whole_photo
from input_pipeline.annotations.photo import Framing, fit_photo
from input_pipeline.annotations.plausibility import doubts, judge
from input_pipeline.annotations.skeleton import draw_skeleton_uint8
from input_pipeline.schema import NUM_JOINTS, ImageRecord, InputError
from truepose_jax.inference.person_crop import Crop
from truepose_jax.sampling.inpainting import Edit, FittedEdit

SEEDS = 2**32

NO_MAP = "no parsing map: the whole photo counts as foreground, with the token of the whole image"
NO_MAP_OF_HEAD = (
    f"{NO_MAP}; the target's parsing, which this model predicts, finds nothing to match, and no empty studio"
)
UNREAD_POSE = "the source's own pose was given, and this model does not read it"
UNREAD_MAP = "a parsing map was given, and this model reads none"
UNKNOWN_LABELS = "this model's label set is not known (its records are gone); parsing maps are taken as they are"


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to make: the person of `source` in the pose of `joints`.

    source: uint8 [h w 3], RGB. joints: [18 3] (x, y in pixels of a frame of `frame_hw`, visible), OpenPose order;
    frame_hw None: the source's size. parsing: uint8 [h w], ids of the label set `labels`, which need not be the
    one of the training; None: all of the photo is person. source_joints: as joints, the source's own, in a frame of
    source_frame_hw; models that read them (the half-cell head's, IMAGPose) need them. name, seed: key the noise. edit: what is to
    be made is a region of this reference; frame_hw None is then the reference's size, and the picture is framed as it is. crop:
    of which photo the source is a part. parsing_found: this program made the map, so it is not doubted. What is to be found in
    photos first: photo_requests.resolve.
    """

    source: np.ndarray
    joints: np.ndarray
    parsing: np.ndarray | None = None
    labels: str = "atr18"
    frame_hw: tuple[int, int] | None = None
    name: str = ""
    seed: int = 0
    edit: Edit | None = None
    source_joints: np.ndarray | None = None
    source_frame_hw: tuple[int, int] | None = None
    crop: Crop | None = None
    parsing_found: bool = False


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A request at the model's size. joints: the target's, float32 [18 3] in the model's pixels. framing: of the picture
    that will be made, so the source's, or the reference's where one is edited."""

    source: ImageRecord
    labels: LabelSet
    joints: np.ndarray
    framing: Framing
    name: str
    seed: int
    edit: FittedEdit | None = None
    crop: Crop | None = None

    def finish(self, picture: np.ndarray) -> np.ndarray:
        """A sample, uint8 [h w 3], as users get it: put back into the photo where the source is a part of one."""
        return picture if self.crop is None else self.crop.put_back(picture)

    @property
    def skeleton(self) -> np.ndarray:
        """The target pose as the model sees it, uint8 [h w 3], black where there is no limb."""
        hw = self.framing.out_hw
        return draw_skeleton_uint8(self.joints, joints_hw=hw, out_hw=hw)


def fit_request(
    request: Request,
    size: tuple[int, int],
    *,
    head: bool = False,
    labels: str = "",
    source_pose: bool = False,
    mapped: bool = True,
    joint_count: int = NUM_JOINTS,
) -> Fitted:
    """The request at the model's `size` (h, w). head: whether the model has the half-cell head; labels: its label set, into
    which the map is then converted (""; it is not known). source_pose, mapped: whether it reads the source's own pose (as the
    head does), and its map. joint_count: of the poses that it knows. Raises InputError for arrays that do not fit one another, a
    map with foreign labels and a pose without a joint in its frame."""
    photo, name = request.source, request.name or "source"
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
        raise InputError(f"{name}: a photo is uint8 [h w 3]; got {photo.dtype} {list(photo.shape)}")
    if not 0 <= request.seed < SEEDS:
        raise InputError(f"{name}: seed is {request.seed}; it must be from 0 to {SEEDS - 1}")
    hw = photo.shape[:2]
    source_pose = source_pose or head
    if source_pose and request.source_joints is None:
        why = "carries the source's pixels by its pose" if head else "lays the source out beside its pose"
        raise InputError(
            f"{name}: this model {why}, so it needs the photo's own pose too: give "
            "--source-pose=FILE (a list: the column source_pose; Python: source_joints)"
        )
    if request.source_joints is not None and not source_pose:
        _say_once(UNREAD_POSE)
    if not mapped:
        if request.parsing is not None:
            _say_once(UNREAD_MAP)
        own, parsing = label_set("whole"), whole_photo(hw)
    elif request.parsing is None:
        _say_once(NO_MAP_OF_HEAD if head else NO_MAP)
        own, parsing = label_set("whole"), whole_photo(hw)
    else:
        own = label_set(request.labels)
        parsing = check_parsing(request.parsing, own, hw, name=f"{name}, map")
        if parsing.dtype != np.uint8:
            raise InputError(f"{name}: a parsing map is uint8 [h w]; got {parsing.dtype}")
        if head and not labels:
            _say_once(UNKNOWN_LABELS)
        elif head and labels != own.name:
            parsing, own = convert_parsing(parsing, own, label_set(labels), name=name), label_set(labels)
    image, parsing, source_joints, framing = fit_photo(photo, parsing, np.zeros((joint_count, 3)), size)
    if source_pose:
        frame = request.source_frame_hw or hw
        source_joints = _place_joints(request.source_joints, joint_count, frame, framing, name, "the source's pose")
    edit = None if request.edit is None else FittedEdit.fit(request.edit, size, name)
    if edit is not None:
        framing, hw = edit.framing, edit.framing.photo_hw
    joints = _place_joints(request.joints, joint_count, request.frame_hw or hw, framing, name)
    for line in _doubts(request, hw):
        logging.warning("%s: %s", name, line)
    record = ImageRecord(image, parsing, source_joints, name, identity=name, photo=photo)
    return Fitted(record, own, joints, framing, request.name, request.seed, edit, request.crop)


def _doubts(request: Request, hw: tuple[int, int]) -> list[str]:
    """What looks wrong about the pose in its frame and about the map on its photo. hw: of the picture to make."""
    found = doubts(judge(np.asarray(request.joints), None, label_set("whole"), request.frame_hw or hw))
    if request.parsing is not None and not request.parsing_found:
        size, none = request.source.shape[:2], np.zeros((NUM_JOINTS, 3), np.float32)
        in_photo = request.source_joints is not None and request.source_frame_hw in (None, size)
        own = np.asarray(request.source_joints) if in_photo else none
        found += doubts(judge(own, request.parsing, label_set(request.labels), size))
    return found


def _place_joints(
    joints: np.ndarray, count: int, frame_hw: tuple[int, int], framing: Framing, name: str, pose: str = "the pose"
) -> np.ndarray:
    """Joints of a frame -> the model's pixels, the whole frame inside the part of the picture that is photo. pose: what errors
    call them."""
    joints = np.asarray(joints)
    if joints.shape != (count, 3) or not np.isfinite(joints).all():
        raise InputError(
            f"{name}: {pose.replace('the', 'a', 1)} is [{count} 3] of finite x, y, visible; got {list(joints.shape)}"
        )
    if not (joints[:, 2] > 0).any():
        raise InputError(f"{name}: no joint of {pose} is visible; choose another pose")
    if min(frame_hw) < 1:
        raise InputError(f"{name}: {pose}'s frame is {frame_hw[0]}x{frame_hw[1]} pixels; give its real size")
    x0, y0, x1, y1 = framing.box
    left, top, right, bottom = Framing.fit(frame_hw, (y1 - y0, x1 - x0)).box
    placed = Framing(frame_hw, framing.out_hw, (x0 + left, y0 + top, x0 + right, y0 + bottom)).joints(joints)
    if not inside(placed, framing.out_hw).any():
        h, w = frame_hw
        raise InputError(f"{name}: every joint lies outside {pose}'s {h}x{w} frame; give the right frame size")
    return placed


@functools.cache
def _say_once(text: str) -> None:
    logging.warning(text)
