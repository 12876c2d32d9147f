"""Skeleton pictures: what the pose encoder sees (docs/paper.md 8.3), drawn as CFLD draws them, or as others do (skeletons.py).

From 192 pixels of height on, the drawing is CFLD's own, bit for bit: coordinates truncated to whole pixels,
anti-aliased limbs 2 pixels wide in 0.6 of a joint colour, then anti-aliased discs of radius 3. Smaller
pictures (64x48, 128x64) get thinner limbs and smaller discs at sub-pixel positions, so that neighbouring
limbs stay apart and a pose does not snap to the grid.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from input_pipeline.skeletons import DRAWINGS, SHADE, Drawing, joint_set

CFLD_HEIGHT = 192
"""Pictures at least this high are drawn as CFLD's."""

SUBPIXEL_BITS = 4
"""Smaller pictures are drawn at 1/16 of a pixel."""

BLEND = 0.6
"""The share of a limb that is blended over what lies below."""

HALF_WIDTH = 4
"""Of limbs that are ellipses, in pixels of their frame."""

FAR = 1 << 12
"""Joints farther out than this are clipped to it: cv2 takes 16 + 4 bit coordinates."""


def draw_skeleton_uint8(
    joints: np.ndarray,
    *,
    joints_hw: tuple[int, int],
    out_hw: tuple[int, int],
    onto: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 [h w 3], black where there is no limb; drawn over a copy of the picture `onto` (uint8) where one is given.

    joints: [n 3] of a set of JOINT_SETS, in pixels of a frame `joints_hw`, which is stretched over `out_hw` (h, w) whatever their
    aspects, as CFLD stretches 176 columns to 256. Joints outside the frame are drawn as far as they reach into it.
    """
    canvas = np.zeros((*out_hw, 3), np.uint8) if onto is None else np.ascontiguousarray(onto).copy()
    return draw_skeleton_into(canvas, joints, joints_hw=joints_hw)


def draw_skeleton_into(canvas: np.ndarray, joints: np.ndarray, *, joints_hw: tuple[int, int]) -> np.ndarray:
    """The same over `canvas` itself, uint8 [h w 3], contiguous; returns it."""
    out_hw = canvas.shape[:2]
    scale = (out_hw[1] / joints_hw[1], out_hw[0] / joints_hw[0])
    if out_hw[0] >= CFLD_HEIGHT:
        width, radius, bits = 2, 3, 0
    else:
        width, radius, bits = 1, (2 if out_hw[0] >= CFLD_HEIGHT // 2 else 1), SUBPIXEL_BITS
    kind, seen = joint_set(joints), (joints[:, 2] > 0).tolist()
    xy = np.clip(joints[:, :2].astype(np.float64) * scale, -FAR, FAR) * (1 << bits)
    points = [(int(x), int(y)) for x, y in xy.tolist()]
    for (a, b), colour in zip(kind.bones, kind.shades, strict=False):
        if seen[a] and seen[b]:
            cv2.line(canvas, points[a], points[b], colour, width, cv2.LINE_AA, bits)
    for point, colour, visible in zip(points, kind.colours, seen, strict=True):
        if visible:
            cv2.circle(canvas, point, radius << bits, colour, cv2.FILLED, cv2.LINE_AA, bits)
    return canvas


def draw_pose_into(canvas: np.ndarray, joints: np.ndarray, *, joints_hw: tuple[int, int], drawing: str) -> np.ndarray:
    """The pose as a model is shown it, over all of a black `canvas`, uint8 [h w 3], contiguous; returns it. drawing: of
    DRAWINGS."""
    how = DRAWINGS[drawing]
    if how.limbs == "lines":
        return draw_skeleton_into(canvas, joints, joints_hw=joints_hw)
    out_hw = canvas.shape[:2]
    picture = _ellipses(joints, how, how.frame or out_hw, joints_hw)
    if picture.shape[:2] != out_hw:
        smaller = out_hw[0] * out_hw[1] < picture.shape[0] * picture.shape[1]
        picture = cv2.resize(picture, out_hw[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    canvas[:] = picture
    return canvas


def _ellipses(joints: np.ndarray, how: Drawing, hw: tuple[int, int], joints_hw: tuple[int, int]) -> np.ndarray:
    """uint8 [h w 3]: limbs as ellipses of whole pixels and degrees, discs at the joints."""
    kind, canvas, blended = joint_set(joints), np.zeros((*hw, 3), np.uint8), how.limbs == "blended"
    xy = np.clip(joints[:, :2].astype(np.float64) * (hw[1] / joints_hw[1], hw[0] / joints_hw[0]), -FAR, FAR)
    seen, colours = joints[:, 2] > 0, [c[::-1] if blended else c for c in kind.colours]

    def discs() -> None:
        for (x, y), colour, visible in zip(xy, colours, seen, strict=True):
            if visible:
                cv2.circle(canvas, (int(x), int(y)), how.disc, colour, cv2.FILLED)

    if blended:
        discs()
    for (a, b), colour in zip(kind.bones, colours, strict=False):
        if not (seen[a] and seen[b]):
            continue
        (x, y), (dx, dy) = (xy[a] + xy[b]) / 2, xy[a] - xy[b]
        size, angle = (int(math.hypot(dx, dy) / 2), HALF_WIDTH), int(math.degrees(math.atan2(dy, dx)))
        outline = cv2.ellipse2Poly((int(x), int(y)), size, angle, 0, 360, 1)
        below = canvas.copy() if blended else None
        cv2.fillConvexPoly(canvas, outline, colour)
        if blended:
            canvas = cv2.addWeighted(below, 1 - BLEND, canvas, BLEND, 0)
    if not blended:
        canvas = (canvas * SHADE).astype(np.uint8)
        discs()
    return canvas
