"""Poses for synthetic people: a table of 3-D base poses with unlimited variants, and poses of real photos.

Frame: the *normalised frame* is 256x176 photos with the height as the unit: y in [0, 1] downwards, x in [0,
FRAME_WIDTH]. Joints are in OpenPose order; "left" and "right" are the person's. Depth grows towards the
camera, in the same unit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib

import numpy as np

from input_pipeline.schema import NUM_JOINTS, InputError

FRAME_WIDTH = 176 / 256
"""Width of the normalised frame, in frame heights."""

POSE_STREAM = 7101
"""Keeps pose randomness apart from every other use of the same numbers."""

NOSE, NECK, R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST = range(8)
R_HIP, R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE, R_EYE, L_EYE, R_EAR, L_EAR = range(8, 18)

# Bones in head heights, as the median front view of DeepFashion has them.
SHOULDER_HALF, HIP_HALF, TORSO = 0.80, 0.43, 2.10
UPPER_ARM, FOREARM, THIGH, SHIN = 1.18, 1.00, 1.74, 1.62
NECK_TO_HEAD = 0.92
"""From the shoulder line to the middle of the skull."""

FACE_JOINTS = [NOSE, R_EYE, L_EYE, R_EAR, L_EAR]
FACE_MODEL = np.array(
    [(0.0, 0.15, 0.45), (-0.155, 0.0, 0.33), (0.155, 0.0, 0.33), (-0.355, 0.05, -0.03), (0.355, 0.05, -0.03)]
)
"""FACE_JOINTS of a head that faces the camera, in head heights from the middle of the skull: x right, y down, z out."""
ABOVE_THE_HIPS = [*range(8), R_EYE, L_EYE, R_EAR, L_EAR]

# Crop -> (head height in frame heights, y of the neck). "full" shows shoes, "knee" and "hip" end there.
CROPS = {"full": (0.124, 0.205), "knee": (0.158, 0.25), "hip": (0.205, 0.33)}


@dataclasses.dataclass(frozen=True, eq=False)
class Pose:
    """One pose in the normalised frame.

    joints: float32 [18 2], (x, y). present: bool [18]; absent joints hold (0, 0). depth: float32 [18], larger
    is nearer.
    view: "front" or "back", whichever side of the person the camera sees. name: for people.
    """

    joints: np.ndarray
    present: np.ndarray
    view: str
    depth: np.ndarray
    name: str = "pose"

    @staticmethod
    def from_joints(joints: np.ndarray, *, present: np.ndarray | None = None, view: str | None = None, name="pose"):
        """A pose from 2-D joints [18 2]; the view and the depths are guessed where 2-D does not tell.

        The guesses: a person whose right shoulder is at image right is seen from the back; arms are in front
        of the torso in a front view and behind it in a back view where they cross it; the lower ankle is the
        nearer one.
        """
        joints = np.asarray(joints, np.float32)
        if joints.shape != (NUM_JOINTS, 2):
            raise InputError(f"a pose has {NUM_JOINTS} joints of (x, y); got an array of shape {joints.shape}")
        present = np.ones(NUM_JOINTS, bool) if present is None else np.asarray(present, bool)
        if not present[[R_SHOULDER, L_SHOULDER, R_HIP, L_HIP]].all():
            raise InputError(f"pose '{name}' lacks a shoulder or a hip; nobody can be drawn from it")
        if view is None:
            view = "front" if joints[R_SHOULDER, 0] <= joints[L_SHOULDER, 0] else "back"
        if view not in ("front", "back"):
            raise InputError(f"view '{view}' of pose '{name}' is neither 'front' nor 'back'")
        depth = np.zeros(NUM_JOINTS, np.float32)
        if present[NOSE]:  # a turned person looks the way the chest faces, and that brings the other shoulder near
            depth[R_SHOULDER] = joints[NOSE, 0] - joints[NECK, 0]
        low, high = sorted((joints[R_SHOULDER, 0], joints[L_SHOULDER, 0]))
        for elbow, wrist in ((R_ELBOW, R_WRIST), (L_ELBOW, L_WRIST)):
            crosses = low < joints[wrist, 0] < high
            depth[[elbow, wrist]] = -0.1 if view == "back" and crosses else 0.1
        depth[[R_KNEE, R_ANKLE]] = joints[R_ANKLE, 1] - joints[L_ANKLE, 1]
        return Pose(np.where(present[:, None], joints, 0).astype(np.float32), present, view, depth, name)


@dataclasses.dataclass(frozen=True)
class BasePose:
    """Joint angles in degrees: each bone is (outward, forward) from hanging down; 180 outward is straight up.

    turn: of the whole body, 0 faces the camera, positive faces image right, 180 is a back view.
    lean: sideways, positive to image right. bend: forward. head: (turn beyond the body's, tilt).
    """

    name: str
    right_arm: tuple[tuple[float, float], tuple[float, float]] = ((9, 0), (5, 8))
    left_arm: tuple[tuple[float, float], tuple[float, float]] = ((9, 0), (5, 8))
    right_leg: tuple[tuple[float, float], tuple[float, float]] = ((3, 0), (2, 0))
    left_leg: tuple[tuple[float, float], tuple[float, float]] = ((3, 0), (2, 0))
    turn: float = 0
    lean: float = 0
    bend: float = 0
    head: tuple[float, float] = (0, 0)
    crop: str = "full"


_HIP_ARM = ((36, -12), (-44, 18))
_POCKET = ((17, -8), (-24, 14))
_PHONE = ((10, 6), (-22, 128))
_WAVE = ((72, 6), (166, 14))
_CROSSED = ((14, 16), (-78, 72))
_BEHIND = ((14, -24), (-26, -30))
_CLASPED = ((8, 10), (-46, 34))
_TO_HEAD = ((138, 0), (-112, 0))
_UP = ((158, 0), (172, 0))
_OUT = ((58, 0), (52, 10))
_SWING_F, _SWING_B = ((6, 22), (2, 42)), ((6, -26), (4, -10))
_STEP_F, _STEP_B = ((1, 24), (0, 8)), ((1, -20), (0, -34))

BASES: tuple[BasePose, ...] = (
    BasePose("stand"),
    BasePose("stand, legs apart", right_leg=((9, 0), (7, 0)), left_leg=((9, 0), (7, 0))),
    BasePose("hand on hip", right_arm=_HIP_ARM, left_leg=((10, 0), (5, 0)), lean=-2),
    BasePose("both hands on hips", right_arm=_HIP_ARM, left_arm=_HIP_ARM, right_leg=((8, 0), (6, 0))),
    BasePose("hands in pockets", right_arm=_POCKET, left_arm=_POCKET, left_leg=((7, 0), (3, 0))),
    BasePose("one hand in a pocket", right_arm=_POCKET, head=(12, 3)),
    BasePose("arms crossed", right_arm=_CROSSED, left_arm=((14, 14), (-70, 62)), right_leg=((6, 0), (4, 0))),
    BasePose("hands clasped", right_arm=_CLASPED, left_arm=_CLASPED, head=(-14, -4)),
    BasePose("waving", right_arm=_WAVE, lean=2, head=(8, 4)),
    BasePose("hand to the hair", left_arm=_TO_HEAD, right_arm=_HIP_ARM, lean=-3, left_leg=((8, 0), (4, 0))),
    BasePose("both arms up", right_arm=_UP, left_arm=_UP),
    BasePose("arms out", right_arm=_OUT, left_arm=((50, 0), (62, 6)), right_leg=((7, 0), (6, 0))),
    BasePose("walking to the camera", right_arm=_SWING_B, left_arm=_SWING_F, right_leg=_STEP_F,
             left_leg=_STEP_B),
    BasePose("walking, half turned", turn=38, right_arm=_SWING_F, left_arm=_SWING_B, right_leg=_STEP_B,
             left_leg=_STEP_F),
    BasePose("walking past", turn=72, right_arm=_SWING_B, left_arm=_SWING_F, right_leg=_STEP_F,
             left_leg=_STEP_B),
    BasePose("half turned, hand on hip", turn=32, right_arm=_HIP_ARM, left_leg=((3, 12), (2, 2)),
             head=(-24, 0)),
    BasePose("turned, looking at the camera", turn=55, head=(-42, 0), left_leg=((2, 10), (1, -4))),
    BasePose("profile", turn=80, right_leg=((1, 4), (0, -2)), left_leg=((1, -5), (0, -8))),
    BasePose("leaning", lean=9, right_arm=((6, 4), (8, 10)), left_arm=_POCKET, right_leg=((13, 0), (9, 0)),
             head=(0, 6)),
    BasePose("crossed legs", right_leg=((-4, 4), (-5, 0)), left_leg=((-2, -3), (-4, -4)), left_arm=_POCKET),
    BasePose("knee up", right_leg=((12, 46), (6, -22)), right_arm=((20, 12), (-6, 40)), left_arm=_OUT),
    BasePose("sitting", right_leg=((14, 66), (3, 4)), left_leg=((12, 68), (4, 0)),
             right_arm=((10, 16), (-14, 44)), left_arm=((12, 12), (-8, 46)), turn=18, bend=4),
    BasePose("sitting, turned", turn=48, right_leg=((8, 76), (2, -8)), left_leg=((8, 70), (3, 8)),
             right_arm=((8, 20), (-8, 60)), left_arm=_POCKET, bend=6),
    BasePose("back", turn=180),
    BasePose("back, hand on hip", turn=176, right_arm=_HIP_ARM, left_leg=((7, 0), (4, 0)), head=(14, 0)),
    BasePose("back, walking", turn=190, right_arm=_SWING_F, left_arm=_SWING_B, right_leg=_STEP_B,
             left_leg=_STEP_F),
    BasePose("back, legs apart", turn=180, right_leg=((10, 0), (8, 0)), left_leg=((10, 0), (8, 0)),
             left_arm=_OUT),
    BasePose("back, half turned", turn=148, right_arm=((12, 4), (4, 20)), head=(-26, 0)),
    BasePose("back, hand to the hair", turn=178, right_arm=_TO_HEAD, lean=2),
    BasePose("hands behind the back", right_arm=_BEHIND, left_arm=_BEHIND, head=(16, 4)),
    BasePose("phone", right_arm=_PHONE, left_arm=_POCKET, head=(8, -3)),
    BasePose("knee shot, stand", crop="knee", head=(-10, 2)),
    BasePose("knee shot, hand on hip", crop="knee", left_arm=_HIP_ARM, turn=14, right_arm=_SWING_F),
    BasePose("knee shot, pockets", crop="knee", right_arm=_POCKET, left_arm=_POCKET, turn=-20, head=(12, 0)),
    BasePose("knee shot, back", crop="knee", turn=180, left_arm=_HIP_ARM),
    BasePose("half shot, stand", crop="hip", turn=8),
    BasePose("half shot, arms crossed", crop="hip", right_arm=_CROSSED, left_arm=((14, 14), (-70, 62))),
    BasePose("half shot, half turned", crop="hip", turn=36, right_arm=_HIP_ARM, head=(-20, 0)),
    BasePose("half shot, hand to the hair", crop="hip", left_arm=_TO_HEAD, head=(-8, 5)),
    BasePose("half shot, back", crop="hip", turn=182, right_arm=_HIP_ARM),
)  # fmt: skip


def _turned(points: np.ndarray, degrees: float) -> np.ndarray:
    """Turns points [n 3] (x right, y down, z to the camera) about the vertical; positive: to image right."""
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    return np.stack([x * c + z * s, y, z * c - x * s], -1)


def _bone(length: float, angles, outward: float) -> np.ndarray:
    """Bone vector [3] from (outward, forward) degrees; `outward` is -1 for the person's right side."""
    out, forward = np.deg2rad(angles)
    return length * np.array([outward * np.sin(out), np.cos(out) * np.cos(forward), np.cos(out) * np.sin(forward)])


def _mirrored(base: BasePose) -> BasePose:
    return dataclasses.replace(
        base, right_arm=base.left_arm, left_arm=base.right_arm, right_leg=base.left_leg,
        left_leg=base.right_leg,
        turn=-base.turn, lean=-base.lean, head=(-base.head[0], -base.head[1]),
    )  # fmt: skip


def _body(base: BasePose, wobble: np.ndarray) -> np.ndarray:
    """Joints 1 to 13 [18 3] in head heights, neck at the origin, before turning. wobble: [18] in [-1, 1]."""
    joints = np.zeros((NUM_JOINTS, 3))
    bend = np.deg2rad(base.bend)
    hips = TORSO * np.array([0.0, np.cos(bend), -np.sin(bend)])
    drop = np.deg2rad(2.5 * wobble[:2])
    angles = np.array([(base.right_arm, base.right_leg), (base.left_arm, base.left_leg)], float)
    angles += wobble[2:].reshape(2, 2, 2, 2) * np.array([7.0, 3.0])[:, None, None]
    for row, side, shoulder, hip in ((0, -1, R_SHOULDER, R_HIP), (1, 1, L_SHOULDER, L_HIP)):
        joints[shoulder] = SHOULDER_HALF * np.array([side, side * drop[0], 0])
        joints[hip] = hips + HIP_HALF * np.array([side, side * drop[1], 0])
        arm, leg = angles[row]
        joints[shoulder + 1] = joints[shoulder] + _bone(UPPER_ARM, arm[0], side)
        joints[shoulder + 2] = joints[shoulder + 1] + _bone(FOREARM, arm[1], side)
        joints[hip + 1] = joints[hip] + _bone(THIGH, leg[0], side)
        joints[hip + 2] = joints[hip + 1] + _bone(SHIN, leg[1], side)
    return joints


def _face(turn: float, head_turn: float, tilt: float) -> np.ndarray:
    """Nose, eyes and ears [5 3] in head heights from the neck; angles in degrees."""
    features = _turned(FACE_MODEL, head_turn)
    c, s = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    features[:, :2] = features[:, :2] @ np.array([[c, s], [-s, c]])
    forward = 0.12 * np.sin(np.deg2rad(turn))  # the head sits in front of the shoulders
    return features + np.array([forward + 0.3 * s, -NECK_TO_HEAD, 0])


def _seen(head_turn: float) -> np.ndarray:
    """bool [18]: what a detector would find of a head turned by so many degrees; limbs are always there."""
    present = np.ones(NUM_JOINTS, bool)
    facing, aside = np.cos(np.deg2rad(head_turn)), np.sin(np.deg2rad(head_turn))
    present[NOSE] = facing > -0.1
    present[R_EYE], present[L_EYE] = (facing > max(0.35 * away, -0.05) for away in (-aside, aside))
    present[R_EAR], present[L_EAR] = (1.4 * abs(facing) > away for away in (-aside, aside))
    return present


@functools.lru_cache(maxsize=4096)
def generated_pose(index: int) -> Pose:
    """Pose number `index` of the built-in generator: a base pose, mirrored or not, with every angle jittered.

    A function of the number alone. Even and odd numbers share no variant: train takes even, held-out odd ones.
    """
    if index < 0:
        raise InputError(f"pose number {index} is negative")
    wobble = np.random.default_rng([POSE_STREAM, index]).uniform(-1, 1, 26)
    base = BASES[(index // 2) % len(BASES)]
    if wobble[0] < 0:
        base = _mirrored(base)
    turn = base.turn + 9 * wobble[1]
    head_turn = turn + base.head[0] + 9 * wobble[2]
    joints = _turned(_body(base, wobble[8:]), turn)
    joints[FACE_JOINTS] = _face(turn, head_turn, base.head[1] + 3 * wobble[3])

    lean = np.deg2rad(base.lean + 1.5 * wobble[4])
    pivot = (joints[R_HIP] + joints[L_HIP]) / 2
    joints[ABOVE_THE_HIPS, 0] += np.sin(lean) * (pivot[1] - joints[ABOVE_THE_HIPS, 1])

    head, neck_y = CROPS[base.crop]
    head *= 0.995 + 0.055 * wobble[5]
    middle = 0.5 * (joints[NECK, 0] + 0.5 * (joints[R_ANKLE, 0] + joints[L_ANKLE, 0]))
    x = FRAME_WIDTH / 2 + head * (joints[:, 0] - middle) + 0.02 * wobble[6]
    y = neck_y + head * joints[:, 1] + 0.012 * wobble[7]
    view = "front" if np.cos(np.deg2rad(turn)) >= 0 else "back"
    xy = np.stack([x, y], -1).astype(np.float32)
    return Pose(xy, _seen(head_turn), view, (head * joints[:, 2]).astype(np.float32), base.name)


FRAMINGS = ("all", "close")
CLOSE_TORSO, CLOSE_NECK = 0.36, 0.25
"""In a close picture: neck to mid-hips and top to neck, in heights. What lies under the knees is mostly cut off."""


def framed_pose(number: int, framing: str = "all") -> Pose:
    """generated_pose(number) as it comes ("all": full and three-quarter figures), or seen from nearer ("close")."""
    pose = generated_pose(number)
    if framing == "all":
        return pose
    neck, hips = pose.joints[NECK], (pose.joints[R_HIP] + pose.joints[L_HIP]) / 2
    zoom = max(1.0, CLOSE_TORSO / float(np.linalg.norm(hips - neck)))
    middle = np.array([(neck[0] + hips[0]) / 2, neck[1]])
    joints = (pose.joints - middle) * zoom + np.array([FRAME_WIDTH / 2, CLOSE_NECK])
    return dataclasses.replace(
        pose, joints=np.where(pose.present[:, None], joints, 0).astype(np.float32), depth=pose.depth * zoom
    )


def load_real_poses(path: str, *, split: str | None = None, frame: tuple[int, int] = (256, 176)) -> list[Pose]:
    """Drawable poses of an annotation list (`name:[18 y]:[18 x]`, -1 = missing), e.g. DeepFashion's.

    Kept: both shoulders, both hips, a head, no upside-down torso, and legs that are annotated or leave the
    frame at the bottom. split: None keeps all rows; "train" and "heldout" part them by a hash of the name,
    one in eight held out. frame: (h, w) pixels of the coordinates.
    """
    if split not in (None, "train", "heldout"):
        raise InputError(f"split '{split}' is neither 'train' nor 'heldout'")
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    poses = []
    for line in lines:
        fields = line.replace(" ", "").rstrip(",").split(":")
        if len(fields) != 3 or not fields[1].startswith("["):
            continue
        y, x = ([int(v) for v in re.findall(r"-?\d+", field)] for field in fields[1:])
        if len(x) != NUM_JOINTS or len(y) != NUM_JOINTS:
            raise InputError(f"{path}: '{fields[0]}' has {len(x)} x and {len(y)} y; expected {NUM_JOINTS} of each")
        if split is not None and (zlib.crc32(fields[0].encode()) % 8 == 0) != (split == "heldout"):
            continue
        pixels = np.array([x, y], np.float32).T
        present = (pixels != -1).all(1)
        # Pixel centres are half a pixel inside; widths other than the normalised frame's are centred.
        joints = (pixels + 0.5) / frame[0]
        joints[:, 0] += (FRAME_WIDTH - frame[1] / frame[0]) / 2
        if _drawable(joints, present):
            poses.append(Pose.from_joints(joints, present=present, name=fields[0]))
    return poses


def _drawable(joints: np.ndarray, present: np.ndarray) -> bool:
    if not present[[NECK, R_SHOULDER, L_SHOULDER, R_HIP, L_HIP]].all():
        return False
    if not present[[NOSE, R_EAR, L_EAR]].any():
        return False
    torso = (joints[R_HIP] + joints[L_HIP] - joints[R_SHOULDER] - joints[L_SHOULDER]) / 2
    if torso[1] < 0.1 or abs(torso[0]) > 0.6 * torso[1]:
        return False
    head = joints[present & np.isin(np.arange(NUM_JOINTS), FACE_JOINTS)]
    if head[:, 1].max() > joints[NECK, 1]:
        return False
    for hip, knee, ankle in ((R_HIP, R_KNEE, R_ANKLE), (L_HIP, L_KNEE, L_ANKLE)):
        last = hip if not present[knee] else knee if not present[ankle] else None
        if last is not None and joints[last, 1] + 0.45 * torso[1] < 1:
            return False  # the leg would end in mid-air
    return True
