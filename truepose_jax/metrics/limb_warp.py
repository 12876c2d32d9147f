"""A baseline without a network: each limb's pixels moved to where its two joints are in the target pose. NumPy, OpenCV.

What a patient person would do by hand with the photo, its parsing map and both skeletons, and nothing else: what the source
does not show stays unseen. Joints are OpenPose-18, (x, y in pixels, visible).
"""

from __future__ import annotations

import itertools

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

NECK, R_SHOULDER, R_HIP, L_SHOULDER, L_HIP = 1, 2, 8, 5, 11
FACE = (0, 14, 15, 16, 17)
SKULL, MID_HIP = 18, 19
"""Points beside the joints: the mean of what is seen of the face, and the middle of the hips."""

LIMBS = {
    "torso": (NECK, MID_HIP, 0.16),
    "head": (NECK, SKULL, 0.15),
    "right upper arm": (2, 3, 0.10),
    "right forearm": (3, 4, 0.08),
    "left upper arm": (5, 6, 0.10),
    "left forearm": (6, 7, 0.08),
    "right thigh": (8, 9, 0.13),
    "right shin": (9, 10, 0.12),
    "left thigh": (11, 12, 0.13),
    "left shin": (12, 13, 0.12),
}
"""The pieces that move as one: the two joints that move them, and half of their width in torso lengths. Shoulders and
sides of the torso are one piece."""

REST = {3: 0.56, 6: 0.56, 4: 0.48, 7: 0.48, 9: 0.83, 12: 0.83, 10: 0.77, 13: 0.77}
"""Length of the bone that ends in a joint, in torso lengths: where it is not seen, it hangs down by this."""
SKULL_ABOVE = 0.44
"""Middle of the skull over the neck, in torso lengths."""
TORSO_DEPTH = 0.45
"""From front to back, in torso lengths: a torso seen from the side is no narrower."""
JOINT_REACH = 0.13
"""Pixels this near to a joint go along with both its limbs, in torso lengths, so that bent joints do not gape."""
LEAST_SCALE, MOST_SCALE = 0.4, 2.5
"""Of a limb along itself: where the source shows it from the end, there is nothing to stretch."""


def limb_warp(
    source: Float[np.ndarray, "h w 3"],
    parsing: UInt8[np.ndarray, "h w"],
    source_joints: Float[np.ndarray, "18 3"],
    target_joints: Float[np.ndarray, "18 3"],
    joints_of_class: Bool[np.ndarray, "18 p"],
) -> Float[np.ndarray, "h w 3"]:
    """The person of `source` in the target's pose, before the source's own background.

    joints_of_class: which joints a parsing class belongs to (`input_pipeline.annotations.parsing.LabelSet.joints`); class 0 is
    background. Missing joints are guessed from the others; without a neck or any hip or shoulder on either side, the source
    comes back as it is.
    """
    here, there = _points(source_joints), _points(target_joints)
    if here is None or there is None:
        return source
    person = parsing > 0
    pieces = _pieces(here, parsing, joints_of_class)
    picture = _background(source, person)
    for name in _far_to_near(there):
        move = _torso_map(here, there) if name == "torso" else _limb_map(here, there, *LIMBS[name][:2])
        cloth, mask = source, pieces[name]
        if name == "torso":  # where an arm lies before it, with what is beside the arm
            cloth, mask = _filled(source, mask), mask | (person & _trunk(here, parsing.shape))
        weight = mask.astype(np.float32)[..., None]
        drawn = cv2.warpAffine(np.concatenate([cloth * weight, weight], -1), move, parsing.shape[::-1])
        picture = drawn[..., :3] + (1 - drawn[..., 3:]) * picture
    return picture


def _points(joints: np.ndarray) -> np.ndarray | None:
    """[20 2]: joints, skull and middle of the hips, all of them somewhere; None where that cannot be told."""
    seen = joints[:, 2] > 0
    points = np.concatenate([joints[:, :2].astype(np.float64), np.zeros((2, 2))])
    trunk = (R_SHOULDER, L_SHOULDER, R_HIP, L_HIP)
    if not (seen[NECK] and seen[[R_SHOULDER, L_SHOULDER]].any() and seen[[R_HIP, L_HIP]].any()):
        return None
    for one, other in (trunk[:2], trunk[2:]):
        if not seen[one]:
            points[one] = points[other]
        if not seen[other]:
            points[other] = points[one]
    points[MID_HIP] = (points[R_HIP] + points[L_HIP]) / 2
    down = points[MID_HIP] - points[NECK]
    if np.linalg.norm(down) < 1:
        return None
    for start in (R_SHOULDER, L_SHOULDER, R_HIP, L_HIP):
        middle, end = start + 1, start + 2
        if not seen[middle] and seen[end]:
            points[middle] = (points[start] + points[end]) / 2
        elif not seen[middle]:
            points[middle] = points[start] + REST[middle] * down
        if not seen[end]:
            points[end] = points[middle] + REST[end] * down
    face = [j for j in FACE if seen[j]]
    points[SKULL] = points[face].mean(0) if face else points[NECK] - SKULL_ABOVE * down
    return points


def _pieces(points: np.ndarray, parsing: np.ndarray, joints_of_class: np.ndarray) -> dict[str, np.ndarray]:
    """{limb: bool [h w]}: the person's pixels by the nearest bone, in its widths, that their class may belong to; and those
    of the next limb about the joint between them."""
    rows, columns = np.indices(parsing.shape)
    pixels = np.stack([columns, rows], -1).astype(np.float64)
    torso_length = np.linalg.norm(points[MID_HIP] - points[NECK])
    joints = {name: ends[:2] for name, ends in LIMBS.items()}
    joints |= {"torso": (NECK, R_SHOULDER, L_SHOULDER, R_HIP, L_HIP), "head": (NECK, *FACE)}
    distances = []
    for name, (a, b, width) in LIMBS.items():
        distance = _distance(pixels, points[a], points[b]) / (width * torso_length)
        if name == "torso":
            outside = cv2.distanceTransform((~_trunk(points, parsing.shape)).astype(np.uint8), cv2.DIST_L2, 5)
            distance = 1 + outside / (width * torso_length)  # within its own width a limb comes before the torso
        allowed = joints_of_class[list(joints[name] if name != "head" else FACE)].any(0)
        distances.append(np.where(allowed[parsing], distance, np.inf))
    person = (parsing > 0) & np.isfinite(np.min(distances, axis=0))
    own = {name: person & (np.argmin(distances, axis=0) == i) for i, name in enumerate(LIMBS)}
    found = {name: mask.copy() for name, mask in own.items()}
    for joint, point in enumerate(points):
        about = np.linalg.norm(pixels - point, axis=-1) < JOINT_REACH * torso_length
        meeting = [name for name in LIMBS if joint in joints[name] and own[name].any()]
        for name, other in itertools.permutations(meeting, 2):
            found[name] |= own[other] & about
    return found


def _trunk(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool [h w]: between the shoulders and the hips."""
    hull = cv2.convexHull(points[[R_SHOULDER, L_SHOULDER, L_HIP, R_HIP]].astype(np.float32))
    return cv2.fillConvexPoly(np.zeros(shape, np.uint8), np.rint(hull).astype(np.int32), 1) > 0


def _filled(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Every pixel in the colour of the nearest one of the mask."""
    if not mask.any():
        return source
    outside = (~mask).astype(np.uint8)
    _, labels = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    colours = np.zeros((labels.max() + 1, 3), source.dtype)
    colours[labels[mask]] = source[mask]
    return colours[labels]


def _distance(pixels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """From each pixel [h w 2] to the segment."""
    bone = b - a
    along = np.clip((pixels - a) @ bone / max(bone @ bone, 1e-9), 0, 1)
    return np.linalg.norm(pixels - a - along[..., None] * bone, axis=-1)


def _limb_map(here: np.ndarray, there: np.ndarray, a: int, b: int) -> np.ndarray:
    """Affine [2 3] that takes the limb's two joints along; across, it grows as the torso does."""
    wide = np.linalg.norm(there[MID_HIP] - there[NECK]) / np.linalg.norm(here[MID_HIP] - here[NECK])
    return _stretched(here[a], here[b], there[a], there[b], wide)


def _torso_map(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The same of the torso by its four corners; mirrored where one side shows its front and the other its back."""

    def width(points):
        down = points[MID_HIP] - points[NECK]
        length = np.linalg.norm(down)
        sides = points[[L_SHOULDER, L_HIP]] - points[[R_SHOULDER, R_HIP]]
        across = float((sides @ np.array([down[1], -down[0]]) / length)[0])
        return np.copysign(np.hypot(across, TORSO_DEPTH * length), across)

    return _stretched(here[NECK], here[MID_HIP], there[NECK], there[MID_HIP], width(there) / width(here))


def _stretched(a: np.ndarray, b: np.ndarray, to_a: np.ndarray, to_b: np.ndarray, wide: float) -> np.ndarray:
    """Affine [2 3]: a to to_a, the direction of b to that of to_b, `wide` times as wide across."""
    before, after = b - a, to_b - to_a
    lengths = np.maximum([np.linalg.norm(before), np.linalg.norm(after)], 1e-6)
    along, (x, y), (u, v) = lengths[1] / lengths[0], before / lengths[0], after / lengths[1]
    along = np.clip(along, LEAST_SCALE, MOST_SCALE)
    matrix = np.array([[u, -v], [v, u]]) @ np.diag([along, wide]) @ np.array([[x, y], [-y, x]])
    return np.column_stack([matrix, to_a - matrix @ a])


def _far_to_near(points: np.ndarray) -> list[str]:
    """Limbs in the order of drawing, as far as joints in the picture tell: from behind, arms lie behind the back."""
    from_behind = points[R_SHOULDER, 0] > points[L_SHOULDER, 0]
    legs = ["right thigh", "right shin", "left thigh", "left shin"]
    if points[10, 1] > points[13, 1]:  # the lower foot is the nearer one
        legs = legs[2:] + legs[:2]
    arms = ["right upper arm", "right forearm", "left upper arm", "left forearm"]
    return [*legs, *arms, "torso", "head"] if from_behind else [*legs, "torso", "head", *arms]


def _background(source: np.ndarray, person: np.ndarray) -> np.ndarray:
    """The source without its person: what is seen of the background, spread into where the person was, along rows first."""
    hidden = cv2.dilate(person.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    seen = (~hidden).astype(np.float32)
    picture = source.astype(np.float32) * seen[..., None]
    filled = np.broadcast_to(picture.sum((0, 1)) / max(seen.sum(), 1), picture.shape)
    for columns in (0.4, 0.12, 0.04):
        sigma = columns * len(source)
        sums, share = (cv2.GaussianBlur(x, (0, 0), sigmaX=sigma, sigmaY=sigma / 4) for x in (picture, seen))
        filled = np.where((share > 1e-3)[..., None], sums / np.maximum(share, 1e-3)[..., None], filled)
    return np.where(hidden[..., None], filled, source).astype(np.float32)
