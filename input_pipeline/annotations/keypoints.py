"""Poses from files: OpenPose-18, float32 [18 3] of (x, y in pixels, visible 0/1); missing joints are zeros.

Order: 0 nose, 1 neck, 2-4 right shoulder, elbow, wrist, 5-7 left, 8-10 right hip, knee, ankle, 11-13 left,
14/15 right/left eye, 16/17 right/left ear. Right is the person's right.

A pose is named by a "spec": a file, or FILE#NAME for one image of a file that holds many.

| file | frame that its pixels are in |
|---|---|
| OpenPose JSON, 18 or 25 joints (ControlNet's tools: a list of one) | `canvas_height` x `canvas_width`, else not implied |
| COCO-17 JSON: annotations or results (AlphaPose, MMPose) | the image's `height` x `width`, else not implied |
| text, 18 rows of `x y` or `x y score` | DeepFashion's padded 256x256 (40 white columns a side), where they fit into it |
| annotations.csv#image-name | 256x176 (PATN), padded 256x256 for pose-gan's names, 128x64 for Market's |

One rule for all: (0, 0), (-1, -1) and scores under MIN_SCORE are missing joints; of several people the largest of those with
most joints is taken; coordinates of which none passes 2 are fractions of the picture, or from -1 to 1, and not pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline.annotations.photo import one_line
from input_pipeline.files import MAX_TEXT, parse_json, read_json, read_text
from input_pipeline.schema import NUM_JOINTS, InputError
from input_pipeline.skeletons import joint_set

JOINT_NAMES = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist",
    "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip

FROM_BODY_25 = np.array([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
"""OpenPose BODY_25 has its mid-hip at 8; the rest is OpenPose-18 in order."""

FROM_COCO = np.array([0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3])
"""COCO-17 has no neck (-1): it is the mean of both shoulders where both are visible."""

COCO_JOINTS = (17, 26, 133, 136)
"""COCO's own, Halpe's two and whole bodies: all begin with COCO's 17."""

MIN_SCORE = 0.1
"""Joints of lower scores are missing. OpenPose draws from 0.05, others from 0.3; below 0.1 they lie anywhere."""

MAX_FRAME = 100_000
"""Pixels of a side of the picture that a pose was found in."""

FRACTIONS = 2.0
"""No person is so small in pixels, and no joint so far outside in fractions of the picture."""

DEEPFASHION_HW = (256, 176)
DEEPFASHION_PADDING = 40
"""Columns of white left and right that make the 256x176 frame 256x256 (docs/paper.md 8.2)."""
MARKET_HW = (128, 64)
FAR_OUTSIDE = 1.25
"""Text whose joints lie beyond so many times DeepFashion's padded frame is in other pixels."""

DEEPFASHION_NAME = re.compile(r"(WOMEN|MEN)([A-Z][A-Za-z]*?)id(\d{8})(\d{2})(\d)([a-z]+)(\.\w+)?$")
CANONICAL_NAME = re.compile(r"(WOMEN|MEN)/(\w+)/id_(\d{8})/(\d{2})_(\d)_([a-z]+)")
POSE_GAN_NAME = re.compile(r"fasion(WOMEN|MEN)")
MARKET_NAME = re.compile(r"-?\d+_c\d+s\d+_\d+_\d+(\.\w+)+$")
FILE_SUFFIXES = re.compile(r"(\.(jpe?g|jfif|png|webp|bmp|tiff?|gif|hei[cf]|json|txt))+$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Pose:
    """Joints float32 [18 3] in pixels of a frame of `frame_hw`; None where the file does not imply one. notes: what a person
    should know of how they were read, each the same words for every file."""

    joints: np.ndarray
    frame_hw: tuple[int, int] | None
    notes: tuple[str, ...] = ()


def load_pose(spec: str | pathlib.Path, *, frame_hw: tuple[int, int] | None = None) -> Pose:
    """The pose of a spec in its own frame; `frame_hw` overrides the frame the file implies. All zeros where nobody is seen.

    Raises InputError.
    """
    path, member = split_spec(spec)
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
    if not (np.abs(pose.joints) <= 10 * MAX_FRAME).all():  # nan too
        raise InputError(f"{spec}: holds coordinates that are nan or beyond {10 * MAX_FRAME} pixels; the file is broken")
    return pose


def split_spec(spec: str | os.PathLike[str]) -> tuple[str, str]:
    """(file, member) of FILE or FILE#NAME. Names of files may hold "#" too: the longest part that is a file is one."""
    text = os.fspath(spec)
    places = [i for i, letter in enumerate(text) if letter == "#"]
    if not places or os.path.isfile(text):
        return text, ""
    place = next((i for i in reversed(places) if os.path.isfile(text[:i])), places[0])
    return text[:place], text[place + 1 :]


def flip_joints(joints: np.ndarray, width: int) -> np.ndarray:
    """The joints of the mirrored picture: x -> width - 1 - x, left and right swapped. float32 [n 3]."""
    flipped = joints[joint_set(joints).flipped].astype(np.float32)
    seen = flipped[:, 2] > 0
    flipped[seen, 0] = width - 1 - flipped[seen, 0]
    return flipped


def inside(joints: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """bool [n]: visible and in a picture of `hw`.

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
    """What the spellings of one image share: the canonical name without suffixes of files. The key of a key is that key."""
    return FILE_SUFFIXES.sub("", canonical_name(name))


# ------------------------------------------------------------------------------------------ annotation CSV


def read_annotations(path: str | pathlib.Path) -> dict[str, str]:
    """Rows of a PATN / pose-gan annotation CSV by `name_key`, unparsed. Raises InputError.

    Read once per file.
    """
    path = pathlib.Path(path)
    try:
        modified = path.stat().st_mtime_ns
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot read the annotations ({why}); check the path") from error
    return _annotation_rows(path, modified)


@functools.lru_cache(maxsize=4)
def _annotation_rows(path: pathlib.Path, modified: int) -> dict[str, str]:
    lines = read_text(path, "the annotations").splitlines()
    header = [column.strip(" ,") for column in lines[0].split(":")] if lines else []
    if header != ["name", "keypoints_y", "keypoints_x"]:
        raise InputError(f"{path}: not an annotation CSV; its first line must be name:keypoints_y:keypoints_x")
    rows: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if row := line.strip(" ,"):
            name, _, numbers = row.partition(":")
            before, known = rows.get(name_key(name), (number, row))
            if known.partition(":")[2] != numbers:
                raise InputError(
                    f"{path}: lines {before} and {number} give {name} different joints; remove one of them"
                )
            rows[name_key(name)] = number, row
    return {name: row for name, (_, row) in rows.items()}


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
        yx = float32_of([parse_json(column.strip(' ,"')) for column in (y, x)])
        joints = _seen(yx[::-1].T)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: the row of {name} is broken ({one_line(error)})") from error
    if frame_hw is None and POSE_GAN_NAME.match(spelling):
        return _unpadded(joints)
    market = MARKET_NAME.match(spelling.strip())
    return Pose(joints, frame_hw or (MARKET_HW if market else DEEPFASHION_HW))


# --------------------------------------------------------------------------------------------------- text


def float32_of(numbers: Any) -> np.ndarray:
    """An array; what float32 cannot hold is infinite, without NumPy's warning, for callers to refuse. Raises ValueError."""
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float32)


def _seen(joints: np.ndarray) -> np.ndarray:
    """[18 2] of x, y or [18 3] of x, y, score -> float32 [18 3] of x, y, visible; see the module for what is missing.

    Other negative coordinates are real joints. Raises ValueError for another shape.
    """
    if joints.ndim != 2 or joints.shape[0] != NUM_JOINTS or joints.shape[1] not in (2, 3):
        raise ValueError(f"{joints.shape[0]} joints with {joints.shape[1:]} numbers; expected 18 of x, y")
    xy = joints[:, :2]
    missing = (xy == -1).all(1) | (xy == 0).all(1)
    if joints.shape[1] == 3:
        missing |= joints[:, 2] < MIN_SCORE
    seen = np.concatenate([float32_of(xy), np.ones((NUM_JOINTS, 1), np.float32)], axis=1)
    seen[missing] = 0
    return seen


def _unpadded(joints: np.ndarray) -> Pose:
    """From DeepFashion's padded 256x256 frame to its 256x176 frame."""
    joints = joints.copy()
    joints[joints[:, 2] > 0, 0] -= DEEPFASHION_PADDING
    return Pose(joints, DEEPFASHION_HW)


def _from_text(path: str, frame_hw: tuple[int, int] | None) -> Pose:
    text = read_text(path, "a pose", advice="a pose is JSON, CSV or 18 rows of 'x y'")
    lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip(" ,")]
    try:
        joints = _seen(float32_of(lines))
    except ValueError as error:
        raise InputError(
            f"{path}: not a pose; expected 18 rows of 'x y', -1 for missing ({one_line(error)})"
        ) from error
    if frame_hw:
        return Pose(joints, frame_hw)
    if joints[:, :2].max() > FAR_OUTSIDE * DEEPFASHION_HW[0]:
        return Pose(joints, None)
    return _unpadded(joints)


# --------------------------------------------------------------------------------------------------- JSON

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Image:
    """What a JSON file says of one image: its people as OpenPose's objects or as COCO's rows."""

    people: Rows
    frame_hw: tuple[int, int] | None = None


def _from_json(path: str, member: str, frame_hw: tuple[int, int] | None) -> Pose:
    images = _images(path)
    if member:
        image = images.get(name_key(member)) or images.get(_number(member))
        if image is None:
            raise InputError(f"{path}: has no image {member} ({_some(images)}); check the name after #")
    elif len(images) > 1:
        raise InputError(f"{path}: holds several images ({_some(images)}); say which, as {path}#{next(iter(images))}")
    else:
        image = next(iter(images.values()), _Image(()))
    try:
        people = [joints for person in image.people if (joints := _joints_of(person, path)) is not None]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _no_keypoints(path, error) from error
    return _pose_of(people, frame_hw or image.frame_hw, path)


def _images(path: str) -> dict[str, _Image]:
    """{name: what is said of it} of a JSON file, read once. Raises InputError."""
    try:
        modified = os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        modified = 0
    return _images_of(path, modified)


@functools.lru_cache(maxsize=2)
def _images_of(path: str, modified: int) -> dict[str, _Image]:
    content = read_json(path, (dict, list), what="a pose", limit=MAX_TEXT)
    try:
        pictures = content if isinstance(content, list) else [content]
        if pictures and all(isinstance(each, dict) and "people" in each for each in pictures):
            sizes = [_size(each, "canvas_height", "canvas_width") for each in pictures]
            return {str(i): _Image(each["people"], sizes[i]) for i, each in enumerate(pictures)}
        return _coco_images(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _no_keypoints(path, error) from error


def _no_keypoints(path: str, error: Exception) -> InputError:
    return InputError(f"{path}: neither OpenPose nor COCO keypoints ({type(error).__name__}: {one_line(error)})")


def _some(images: Mapping[str, _Image]) -> str:
    names = list(images)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _size(picture: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    """(h, w) that a file says; None where it does not. Raises ValueError."""
    h, w = picture.get(height), picture.get(width)
    if not (h and w):
        return None
    if not (1 <= h <= MAX_FRAME and 1 <= w <= MAX_FRAME):
        raise ValueError(f"a picture of {h:g}x{w:g} pixels")
    return int(h), int(w)


def _coco_images(content: dict | list) -> dict[str, _Image]:
    """By name where the file says names, else by number; results' `image_id` is either."""
    listed = content.get("images", []) if isinstance(content, dict) else []
    names = {image["id"]: name_key(image["file_name"]) for image in listed if "file_name" in image}
    sizes = {image["id"]: _size(image, "height", "width") for image in listed}
    if isinstance(content, list):
        rows = content
    elif "instance_info" in content:  # MMPose: people of the frames of a video or a folder
        frames = content["instance_info"]
        rows = [row | {"image_id": f.get("frame_id", 0)} for f in frames for row in f["instances"]]
    else:
        rows = content.get("annotations", [content])
    people: dict[Any, list] = {}
    for row in rows:
        if row.get("keypoints"):
            people.setdefault(row.get("image_id"), []).append(row)
    if not people and rows and not listed:
        raise ValueError("no row has keypoints")
    found = {}
    for key in dict.fromkeys([*names, *people]):
        name = names.get(key) or (_number(key) if isinstance(key, int) else name_key(str(key)))
        found[name] = _Image(people.get(key, ()), sizes.get(key))
    return found


def _number(name: Any) -> str:
    """COCO's files are called by their number, with zeros before it."""
    text = name_key(str(name))
    return text.lstrip("0") or "0"


def _joints_of(person: Mapping[str, Any], path: str) -> np.ndarray | None:
    """[18 3] of x, y, score, in whatever unit; None where the file says a person of no body."""
    if "keypoints" in person:
        numbers = np.array(person["keypoints"], np.float64)
        if numbers.ndim == 2 and "keypoint_scores" in person:
            numbers = np.concatenate([numbers[:, :2], np.array(person["keypoint_scores"], np.float64)[:, None]], axis=1)
        if numbers.size not in {3 * n for n in COCO_JOINTS}:
            raise InputError(f"{path}: {numbers.size} numbers in 'keypoints'; expected 51 (COCO's 17 joints)")
        return from_coco(numbers.reshape(-1, 3)[:17])
    body = person.get("pose_keypoints_2d", person.get("pose_keypoints"))
    if not body:
        return None
    numbers = np.array(body, np.float64)
    if numbers.size not in {3 * NUM_JOINTS, 75}:
        raise InputError(f"{path}: {numbers.size} numbers in pose_keypoints_2d; expected 54 (18 joints) or 75")
    return numbers.reshape(-1, 3)[FROM_BODY_25 if numbers.size == 75 else slice(None)]


def from_coco(coco: np.ndarray) -> np.ndarray:
    """COCO-17 [17 3] of x, y, visible or score (missing: zeros) -> [18 3]; the neck is between two visible shoulders."""
    joints = coco[FROM_COCO]
    shoulders = joints[[2, 5]]
    joints[1] = shoulders.mean(0) if (shoulders[:, 2] >= MIN_SCORE).all() and shoulders[:, :2].any(1).all() else 0
    return joints


def _pose_of(people: Sequence[np.ndarray], frame_hw: tuple[int, int] | None, path: str) -> Pose:
    """One of the people, in pixels of the frame: see the module. Raises InputError."""
    seen = [_seen(person) for person in people]
    notes = []
    seen = [person for person in seen if person[:, 2].any()]
    if not seen:
        return Pose(np.zeros((NUM_JOINTS, 3), np.float32), frame_hw)
    unit = _unit(np.concatenate([person[person[:, 2] > 0, :2] for person in seen]), path)
    if unit:
        if frame_hw is None:
            raise InputError(
                f"{path}: coordinates are {unit} of an image of unknown size; add --pose-frame=HxW, the size of its picture"
            )
        for person in seen:
            there = person[:, 2] > 0
            xy = person[there, :2] if unit == FRACTION else (person[there, :2] + 1) / 2
            person[there, :2] = xy * (frame_hw[1], frame_hw[0])
        notes.append(f"coordinates were {unit}, and are taken as such")
    counts = [int(person[:, 2].sum()) for person in seen]
    whole = [person for person, count in zip(seen, counts, strict=True) if 2 * count >= max(counts)]
    if len(whole) > 1:
        notes.append("shows several people; the largest is taken")
    return Pose(max(whole, key=_extent), frame_hw, tuple(notes))


FRACTION, CENTRED = "fractions", "fractions from -1 to 1 (OpenPose's --keypoint_scale 4)"


def _unit(xy: np.ndarray, path: str) -> str:
    """ "" for pixels. [n 2], of all people of a picture: a joint may lie outside of it. Raises InputError where it is unclear."""
    if np.abs(xy).max() > FRACTIONS:
        return ""
    if (xy < 0).mean() > 0.25:
        return CENTRED
    if xy.min() < -0.3:
        raise InputError(
            f"{path}: coordinates from {xy.min():g} to {xy.max():g} are neither pixels nor clearly fractions; write pixels"
        )
    return FRACTION


def _extent(person: np.ndarray) -> tuple[float, int]:
    """How large a person is: the area of the box of its joints, then how many there are."""
    xy = person[person[:, 2] > 0, :2]
    width, height = np.ptp(xy, axis=0)
    return float((width + 1e-3) * (height + 1e-3)), len(xy)
