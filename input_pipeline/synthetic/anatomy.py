"""From a pose to the axes of a body: scale, torso, turns of torso and head, guesses for absent joints."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from input_pipeline.synthetic.poses import (
    FACE_JOINTS,
    FACE_MODEL,
    FOREARM,
    L_ANKLE,
    L_ELBOW,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    L_WRIST,
    NECK,
    NECK_TO_HEAD,
    R_ANKLE,
    R_ELBOW,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    R_WRIST,
    SHIN,
    SHOULDER_HALF,
    THIGH,
    TORSO,
    UPPER_ARM,
    Pose,
)

_TURNS = np.deg2rad(np.arange(-180, 180, 4.0))
_FACING = np.cos(_TURNS)
_TURNED_FACES = np.stack(
    [
        FACE_MODEL[:, 0] * np.cos(_TURNS)[:, None] + FACE_MODEL[:, 2] * np.sin(_TURNS)[:, None],
        np.broadcast_to(FACE_MODEL[:, 1], (len(_TURNS), len(FACE_MODEL))),
    ],
    -1,
)
"""(x, y) [t 5 2] of nose, eyes and ears about the middle of the skull, in head heights, for every turn."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Middle of the skull [2] in frame units; turn in radians, 0 = to the camera, positive = to image right."""

    centre: np.ndarray
    turn: float
    axes: np.ndarray  # [2 2]: image right and down of the head, one head height long
    unit: float

    @functools.cached_property
    def sin(self) -> float:
        return float(np.sin(self.turn))

    @functools.cached_property
    def cos(self) -> float:
        return float(np.cos(self.turn))

    def at(self, points) -> np.ndarray:
        """Frame points of head points [... 2] (x right in the image, y down, head heights)."""
        return self.centre + np.asarray(points) @ self.axes

    def on(self, points) -> np.ndarray:
        """Frame points of surface points [n 3] (x to the person's left, y down, z out of the face)."""
        turning = np.array([(self.cos, 0.0), (0.0, 1.0), (self.sin, 0.0)])
        return self.centre + np.asarray(points) @ (turning @ self.axes)


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A pose made ready for drawing, in the normalised frame. joints [18 2]: completed. unit: head height."""

    pose: Pose
    joints: np.ndarray
    unit: float
    turn: float
    head: Head
    left_side: int
    """+1 where the person's left is at image right (front view), else -1."""
    shoulders: np.ndarray
    hips: np.ndarray
    across: np.ndarray  # [2 2]: image-right unit vector at the shoulders and at the hips

    def spine(self, t) -> np.ndarray:
        """Points [k 2] on the spine; t = 0 at the shoulder line, 1 at the hip line."""
        t = np.asarray(t)[:, None]
        return self.shoulders + t * (self.hips - self.shoulders)

    def sections(self, t, front, side, shift=0.0):
        """Rims (minus, plus) [k 2] of torso sections at t, half-widths front and side [k] in head heights."""
        t, front = np.asarray(t, float), np.asarray(front, float)
        half = self.unit * np.hypot(front * np.cos(self.turn), np.asarray(side) * np.sin(self.turn))
        blend = np.clip(t, 0, 1)[:, None]
        across = self.across[0] * (1 - blend) + self.across[1] * blend
        middle = self.spine(t) + across * (self.unit * shift)
        return middle - across * half[:, None], middle + across * half[:, None]


def anatomy(pose: Pose) -> Anatomy:
    """Measures a pose. Depends on nothing but the pose, so that all identities share their joints."""
    joints = pose.joints.astype(np.float64)
    shoulders = (joints[R_SHOULDER] + joints[L_SHOULDER]) / 2
    hips = (joints[R_HIP] + joints[L_HIP]) / 2
    unit = _head_height(pose, joints, shoulders, hips)
    left_side = 1 if pose.view == "front" else -1
    down = (hips - shoulders) / max(float(np.hypot(*(hips - shoulders))), 1e-6)
    level = np.array([down[1], -down[0]])
    across = []
    for right, left in ((R_SHOULDER, L_SHOULDER), (R_HIP, L_HIP)):
        # Where the line between the joints is foreshortened its direction means little: the spine's normal
        # steps in.
        line = left_side * (joints[left] - joints[right]) / unit + 0.8 * level
        across.append(line / max(float(np.hypot(*line)), 1e-6))
    joints = _completed(pose, joints, unit, down)
    return Anatomy(
        pose, joints, unit, _torso_turn(pose, joints, unit), _head(pose, joints, unit, level), left_side,
        shoulders, hips, np.array(across),
    )  # fmt: skip


def _head_height(pose, joints, shoulders, hips) -> float:
    """Head height from the longest of the bones that foreshortening can only shorten."""
    estimates = [np.hypot(*(hips - shoulders)) / TORSO]
    for hip, knee in ((R_HIP, R_KNEE), (L_HIP, L_KNEE)):
        if pose.present[knee]:
            estimates.append(0.9 * np.hypot(*(joints[knee] - joints[hip])) / THIGH)
    return float(max([*estimates, 0.03]))


def _torso_turn(pose: Pose, joints, unit) -> float:
    """Turn of the torso in radians: 0 = front, pi = back, positive = facing image right."""
    width = np.abs(joints[L_SHOULDER, 0] - joints[R_SHOULDER, 0]) / (2 * SHOULDER_HALF * unit)
    angle = np.arccos(np.clip(width, 0, 1))
    toward_right = pose.depth[R_SHOULDER] >= pose.depth[L_SHOULDER]
    angle = angle if toward_right else -angle
    return float(angle if pose.view == "front" else np.pi - angle)


def _completed(pose: Pose, joints, unit, down) -> np.ndarray:
    """Fills absent joints so that everything has a place: arms behind the back, legs straight on."""
    joints, there = joints.copy(), pose.present
    middle = (joints[R_HIP] + joints[L_HIP]) / 2
    if not there[NECK]:
        joints[NECK] = (joints[R_SHOULDER] + joints[L_SHOULDER]) / 2
    for shoulder, elbow, wrist in ((R_SHOULDER, R_ELBOW, R_WRIST), (L_SHOULDER, L_ELBOW, L_WRIST)):
        if not there[elbow]:
            joints[elbow] = joints[shoulder] + unit * UPPER_ARM * 0.9 * down
        if not there[wrist]:
            inward = middle - joints[elbow]
            straight = joints[elbow] - joints[shoulder] if there[elbow] else inward
            joints[wrist] = joints[elbow] + unit * 0.8 * FOREARM * straight / max(float(np.hypot(*straight)), 1e-6)
    for hip, knee, ankle in ((R_HIP, R_KNEE, R_ANKLE), (L_HIP, L_KNEE, L_ANKLE)):
        if not there[knee]:
            joints[knee] = joints[hip] + unit * THIGH * np.array([0.0, 1.0])
        if not there[ankle]:
            joints[ankle] = joints[knee] + unit * SHIN * np.array([0.0, 1.0])
    return joints


def _head(pose: Pose, joints, unit, level) -> Head:
    """Fits the rigid head model to the face joints: the turn by search, the middle by least squares."""
    seen = pose.present[FACE_JOINTS]
    side = 1 if pose.view == "front" else -1
    if not seen.any():
        up = np.array([level[1], -level[0]])
        centre = joints[NECK] + unit * NECK_TO_HEAD * up
        return Head(centre, 0.0 if side > 0 else np.pi, unit * np.array([level, -up]), unit)
    points = joints[FACE_JOINTS]
    tilt = 0.0
    facing = 1 if seen[0] or seen[1] or seen[2] else -1
    for left, right in ((2, 1), (4, 3)):
        line = (points[left] - points[right]) * facing
        if seen[left] and seen[right] and line[0] > 0.1 * unit:
            tilt = float(np.clip(np.arctan2(line[1], line[0]), -0.6, 0.6))
            break
    right, down = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    axes = np.array([right, down])
    local = points[seen] @ axes.T / unit
    model = _TURNED_FACES[:, seen]
    offset = (local - model).mean(1, keepdims=True)
    error = ((local - model - offset) ** 2).sum((1, 2)) + 0.02 * (np.sign(_FACING) != facing)
    # One or two points leave the turn open: then look the way the torso does.
    error += 0.004 * (1 - np.cos(_TURNS - _torso_turn(pose, joints, unit)))
    best = int(np.argmin(error))
    return Head(offset[best, 0] @ axes * unit, float(_TURNS[best]), axes * unit, unit)


def arm_joints(side: int) -> tuple[int, int, int]:
    """Shoulder, elbow, wrist of the person's left (+1) or right (-1) arm."""
    return (L_SHOULDER, L_ELBOW, L_WRIST) if side > 0 else (R_SHOULDER, R_ELBOW, R_WRIST)


def leg_joints(side: int) -> tuple[int, int, int]:
    """Hip, knee, ankle of the person's left (+1) or right (-1) leg."""
    return (L_HIP, L_KNEE, L_ANKLE) if side > 0 else (R_HIP, R_KNEE, R_ANKLE)
