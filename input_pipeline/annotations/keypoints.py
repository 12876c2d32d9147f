"""Poses from files: OpenPose-18, float32 [18 3] of (x, y in pixels, visible 0/1); missing joints are zeros.

Order: 0 nose, 1 neck, 2-4 right shoulder, elbow, wrist, 5-7 left, 8-10 right hip, knee, ankle, 11-13 left,
14/15 right/left eye, 16/17 right/left ear. Right is the person's right.

A pose is named by a "spec": a file, or FILE#NAME for one image of a file that holds many.

| file | frame that its pixels are in |
|---|---|
| OpenPose JSON, 18 or 25 joints | `canvas_height` x `canvas_width` where written, else not implied |
| COCO-17 JSON (annotations or results) | the image's `height` x `width` where written, else not implied |
| text, 18 rows of `x y`, -1 missing | DeepFashion's padded 256x256: 256x176 and 40 columns left and right |
| annotations.csv#image-name | 256x176 (PATN), padded 256x256 for pose-gan's names, 128x64 for Market's |
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re

import numpy as np

from input_pipeline.annotations.photo import Framing, one_line
from input_pipeline.schema import NUM_JOINTS, InputError

JOINT_NAMES = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist",
    "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip

FLIPPED = np.array([0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16])
"""FLIPPED[j] is the joint that j becomes in the mirror."""

FROM_BODY_25 = np.array([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
"""OpenPose BODY_25 has its mid-hip at 8; the rest is OpenPose-18 in order."""

FROM_COCO = np.array([0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3])
"""COCO-17 has no neck (-1): it is the mean of both shoulders where both are visible."""

DEEPFASHION_HW = (256, 176)
DEEPFASHION_PADDING = 40
"""Columns of white left and right that make the 256x176 frame 256x256 (docs/paper.md 8.2)."""
MARKET_HW = (128, 64)

DEEPFASHION_NAME = re.compile(r"(WOMEN|MEN)([A-Z][A-Za-z]*?)id(\d{8})(\d{2})(\d)([a-z]+)(\.\w+)?$")
CANONICAL_NAME = re.compile(r"(WOMEN|MEN)/(\w+)/id_(\d{8})/(\d{2})_(\d)_([a-z]+)")
POSE_GAN_NAME = re.compile(r"fasion(WOMEN|MEN)")
MARKET_NAME = re.compile(r"-?\d+_c\d+s\d+_\d+_\d+(\.\w+)+$")


@dataclasses.dataclass(frozen=True)
class Pose:
    """Joints float32 [18 3] in pixels of a frame of `frame_hw`; None where the file does not imply one."""

    joints: np.ndarray
    frame_hw: tuple[int, int] | None


def read_pose(
    spec: str | pathlib.Path, *, frame_hw: tuple[int, int] | None = None, out_hw: tuple[int, int]
) -> np.ndarray:
    """Joints float32 [18 3] of a spec (see the module) in pixels of a picture of `out_hw`.

    `frame_hw` (--pose-frame=HxW) overrides the frame; the frame is put into the picture as a photo would be
    (`photo.Framing.fit`: stretched if that is under 2 %, else padded). Raises InputError where the file is
    absent, unknown or broken, where the frame is neither implied nor given, and where no joint lies in the
    picture.
    """
    pose = load_pose(spec, frame_hw=frame_hw)
    if pose.frame_hw is None:
        raise InputError(f"{spec}: the file does not say how large its image was; add --pose-frame=HxW")
    return place_pose(pose, out_hw=out_hw, name=str(spec))


def place_pose(pose: Pose, *, out_hw: tuple[int, int], name: str) -> np.ndarray:
    """Joints of a pose with a known frame, in pixels of `out_hw`; InputError where none lies in it."""
    joints = Framing.fit(pose.frame_hw, out_hw).joints(pose.joints)
    if not pose.joints[:, 2].any():
        raise InputError(f"{name}: no joint is visible; choose another pose")
    if not inside(joints, out_hw).any():
        h, w = pose.frame_hw
        raise InputError(f"{name}: every joint lies outside its {h}x{w} frame; give the right --pose-frame=HxW")
    return joints


def load_pose(spec: str | pathlib.Path, *, frame_hw: tuple[int, int] | None = None) -> Pose:
    """The pose of a spec in its own frame; `frame_hw` overrides the frame the file implies.

    Raises InputError.
    """
    path, _, member = str(spec).partition("#")
    suffix = pathlib.Path(path).suffix.lower()
    if suffix == ".json":
        pose = _from_json(path, member, frame_hw)
    elif suffix == ".csv":
        if not member:
            raise InputError(f"{path}: say which image, as {path}#IMAGE-NAME")
        pose = annotation_pose(read_annotations(path), member, path=path, frame_hw=frame_hw)
    elif suffix == ".txt":
        pose = _from_text(path, frame_hw)
    else:
        raise InputError(f"{spec}: unknown pose format; use OpenPose or COCO .json, an 18-row .txt, or .csv#image-name")
    if not np.isfinite(pose.joints).all():
        raise InputError(f"{spec}: holds coordinates that are not finite numbers; the file is broken")
    return pose


def flip_joints(joints: np.ndarray, width: int) -> np.ndarray:
    """The joints of the mirrored picture: x -> width - 1 - x, left and right swapped. float32 [18 3]."""
    flipped = joints[FLIPPED].astype(np.float32)
    seen = flipped[:, 2] > 0
    flipped[seen, 0] = width - 1 - flipped[seen, 0]
    return flipped


def inside(joints: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """bool [18]: visible and in a picture of `hw`.

    Detectors place joints up to 31 px outside the 176x256 crop.
    """
    x, y, seen = joints.T
    return (seen > 0) & (x >= 0) & (x < hw[1]) & (y >= 0) & (y < hw[0])


def canonical_name(name: str) -> str:
    """One spelling for DeepFashion's five: WOMEN/Blouses_Shirts/id_00003372/03_3_back.jpg.

    Other names keep theirs, with forward slashes and without a leading './'.
    """
    path = name.strip().strip('"').replace("\\", "/")
    match = DEEPFASHION_NAME.search(path.replace("/", "").replace("_", ""))
    if match:
        gender, category, garment, colour, pose, view, suffix = match.groups()
        category = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", category)
        return f"{gender}/{category}/id_{garment}/{colour}_{pose}_{view}{suffix or ''}"
    return path.removeprefix("./")


def patn_name(name: str) -> str:
    """DeepFashion's images as PATN's lists and the projects after it spell them, without a suffix
    (fashionWOMENBlouses_Shirtsid0000337203_3back); other names as they are."""
    match = CANONICAL_NAME.fullmatch(canonical_name(name))
    return "fashion{}{}id{}{}_{}{}".format(*match.groups()) if match else name


def name_key(name: str) -> str:
    """What two spellings of one image share: the canonical name without its suffix."""
    return str(pathlib.PurePosixPath(canonical_name(name)).with_suffix("")) if name.strip() else ""


# ------------------------------------------------------------------------------------------ annotation CSV


def read_annotations(path: str | pathlib.Path) -> dict[str, str]:
    """Rows of a PATN / pose-gan annotation CSV by `name_key`, unparsed. Raises InputError.

    Read once per file.
    """
    path = pathlib.Path(path)
    try:
        return _annotation_rows(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: cannot read the annotations ({error.strerror}); check the path") from error


@functools.lru_cache(maxsize=4)
def _annotation_rows(path: pathlib.Path, modified: int) -> dict[str, str]:
    lines = _text(path).splitlines()
    header = [column.strip(" ,") for column in lines[0].split(":")] if lines else []
    if header != ["name", "keypoints_y", "keypoints_x"]:
        raise InputError(f"{path}: not an annotation CSV; its first line must be name:keypoints_y:keypoints_x")
    rows = (line.strip(" ,") for line in lines[1:])
    return {name_key(row.split(":", 1)[0]): row for row in rows if row}


def annotation_pose(
    rows: dict[str, str], name: str, *, path: str | pathlib.Path, frame_hw: tuple[int, int] | None = None
) -> Pose:
    """The pose of the image `name`, in any of its five spellings, from `read_annotations(path)`.

    Raises InputError.
    """
    row = rows.get(name_key(name))
    if row is None:
        raise InputError(f"{path}: has no row for {canonical_name(name)} (of {len(rows)}); check the image's name")
    try:
        spelling, y, x = row.split(":")
        yx = np.array([json.loads(column.strip(' ,"')) for column in (y, x)], np.float32)
        joints = _from_xy(yx[::-1].T)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: the row of {name} is broken ({one_line(error)})") from error
    if frame_hw is None and POSE_GAN_NAME.match(spelling):
        return _unpadded(joints)
    market = MARKET_NAME.match(spelling.strip())
    return Pose(joints, frame_hw or (MARKET_HW if market else DEEPFASHION_HW))


# ------------------------------------------------------------------------------------------ text and JSON


def _text(path: str | pathlib.Path) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read the pose ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file; a pose is JSON, CSV or 18 rows of 'x y'") from error


def _from_xy(xy: np.ndarray) -> np.ndarray:
    """[18 2] with -1, -1 (or 0, 0) for missing -> joints [18 3].

    Other negative coordinates are real joints.
    """
    if xy.shape != (NUM_JOINTS, 2):
        raise ValueError(f"{xy.shape[0]} joints with {xy.shape[1:]} numbers; expected 18 of x, y")
    missing = (xy == -1).all(1) | (xy == 0).all(1)
    joints = np.concatenate([xy, np.ones((NUM_JOINTS, 1))], axis=1).astype(np.float32)
    joints[missing] = 0
    return joints


def _unpadded(joints: np.ndarray) -> Pose:
    """From DeepFashion's padded 256x256 frame to its 256x176 frame."""
    joints = joints.copy()
    joints[joints[:, 2] > 0, 0] -= DEEPFASHION_PADDING
    return Pose(joints, DEEPFASHION_HW)


def _from_text(path: str, frame_hw: tuple[int, int] | None) -> Pose:
    lines = [line.replace(",", " ").split() for line in _text(path).splitlines() if line.strip(" ,")]
    try:
        joints = _from_xy(np.array(lines, np.float32))
    except ValueError as error:
        raise InputError(
            f"{path}: not a pose; expected 18 rows of 'x y', -1 for missing ({one_line(error)})"
        ) from error
    return Pose(joints, frame_hw) if frame_hw else _unpadded(joints)


def _from_json(path: str, member: str, frame_hw: tuple[int, int] | None) -> Pose:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)})") from error
    try:
        if isinstance(content, dict) and "people" in content:
            people, implied = _openpose_people(content, path)
        else:
            people, implied = _coco_people(content, member, path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: neither OpenPose nor COCO keypoints ({type(error).__name__}: {one_line(error)})"
        ) from error
    people = [person for person in people if person[:, 2].any()]
    if not people:
        raise InputError(f"{path}: no joint of any person is visible; choose another pose")
    joints, frame = max(people, key=_extent), frame_hw or implied
    if np.abs(joints[:, :2]).max() <= 1:
        if frame is None:
            raise InputError(f"{path}: coordinates are fractions of an image of unknown size; add --pose-frame=HxW")
        joints = joints * (frame[1], frame[0], 1)
    return Pose(joints.astype(np.float32), frame)


def _extent(person: np.ndarray) -> tuple[float, int]:
    """How large a person is: the area of the box of its joints, then how many there are."""
    xy = person[person[:, 2] > 0, :2]
    width, height = np.ptp(xy, axis=0)
    return float((width + 1e-3) * (height + 1e-3)), len(xy)


def _openpose_people(content: dict, path: str) -> tuple[list[np.ndarray], tuple[int, int] | None]:
    people = []
    for person in content["people"]:
        numbers = np.array(person.get("pose_keypoints_2d", person.get("pose_keypoints", [])), np.float32)
        if numbers.size not in {3 * NUM_JOINTS, 75}:
            raise InputError(f"{path}: {numbers.size} numbers in pose_keypoints_2d; expected 54 (18 joints) or 75")
        people.append(_scored(numbers.reshape(-1, 3)[FROM_BODY_25 if numbers.size == 75 else slice(None)]))
    canvas = content.get("canvas_height"), content.get("canvas_width")
    return people, (int(canvas[0]), int(canvas[1])) if all(canvas) else None


def _scored(joints: np.ndarray) -> np.ndarray:
    """(x, y, score) -> (x, y, visible): score 0 and (0, 0) are missing."""
    missing = (joints[:, 2] <= 0) | (joints[:, :2] == 0).all(1)
    return np.where(missing[:, None], 0, np.concatenate([joints[:, :2], np.ones_like(joints[:, :1])], axis=1))


def _coco_people(content, member: str, path: str) -> tuple[list[np.ndarray], tuple[int, int] | None]:
    images = content.get("images", []) if isinstance(content, dict) else []
    rows = content.get("annotations", [content]) if isinstance(content, dict) else content
    rows = [row for row in rows if row.get("keypoints")]
    if member:
        images = [image for image in images if name_key(image["file_name"]) == name_key(member)]
        if not images:
            raise InputError(f"{path}: 'images' has no file_name {member}; check the name after #")
        rows = [row for row in rows if row["image_id"] == images[0]["id"]]
    elif len({row.get("image_id") for row in rows}) > 1:
        raise InputError(f"{path}: holds several images; say which, as {path}#IMAGE-NAME")
    people = []
    for row in rows:
        numbers = np.array(row["keypoints"], np.float32)
        if numbers.size != 51:
            raise InputError(f"{path}: {numbers.size} numbers in 'keypoints'; expected 51 (COCO's 17 joints)")
        people.append(from_coco(_scored(numbers.reshape(17, 3))))
    sizes = [(int(i["height"]), int(i["width"])) for i in images if "height" in i and "width" in i]
    return people, sizes[0] if len(sizes) == 1 else None


def from_coco(coco: np.ndarray) -> np.ndarray:
    """COCO-17 [17 3] of x, y, visible 0/1 (missing: zeros) -> [18 3]; the neck is between two visible shoulders."""
    joints = coco[FROM_COCO]
    shoulders = joints[[2, 5]]
    joints[1] = shoulders.mean(0) if shoulders[:, 2].all() else 0
    return joints
