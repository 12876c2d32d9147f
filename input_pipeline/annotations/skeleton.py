"""Skeleton pictures: what the pose encoder sees (docs/paper.md 8.3), drawn as CFLD draws them.

From 192 pixels of height on, the drawing is CFLD's own, bit for bit: coordinates truncated to whole pixels,
anti-aliased limbs 2 pixels wide in 0.6 of a joint colour, then anti-aliased discs of radius 3. Smaller
pictures (64x48, 128x64) get thinner limbs and smaller discs at sub-pixel positions, so that neighbouring
limbs stay apart and a pose does not snap to the grid.
"""

from __future__ import annotations

import cv2
import numpy as np

BONES = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip

COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""RGB of joint i; bone i is drawn in 0.6 of colour i."""

LIMB_COLOURS = tuple(tuple(int(0.6 * c) for c in colour) for colour in COLOURS)

CFLD_HEIGHT = 192
"""Pictures at least this high are drawn as CFLD's."""

SUBPIXEL_BITS = 4
"""Smaller pictures are drawn at 1/16 of a pixel."""

FAR = 1 << 12
"""Joints farther out than this are clipped to it: cv2 takes 16 + 4 bit coordinates."""


def draw_skeleton(joints: np.ndarray, *, joints_hw: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
    """float32 [h w 3] in [0, 1], black where there is no limb.

    joints: [18 3] in pixels of a frame `joints_hw`, which is stretched over `out_hw` (h, w) whatever their
    aspects, as CFLD stretches 176 columns to 256. Joints outside the frame are drawn as far as they reach
    into it.
    """
    return draw_skeleton_uint8(joints, joints_hw=joints_hw, out_hw=out_hw).astype(np.float32) / np.float32(255)


def draw_skeleton_uint8(
    joints: np.ndarray,
    *,
    joints_hw: tuple[int, int],
    out_hw: tuple[int, int],
    onto: np.ndarray | None = None,
) -> np.ndarray:
    """The same as uint8 [h w 3]; drawn over a copy of the picture `onto` (uint8) where one is given."""
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
    seen = (joints[:, 2] > 0).tolist()
    xy = np.clip(joints[:, :2].astype(np.float64) * scale, -FAR, FAR) * (1 << bits)
    points = [(int(x), int(y)) for x, y in xy.tolist()]
    for (a, b), colour in zip(BONES, LIMB_COLOURS, strict=False):
        if seen[a] and seen[b]:
            cv2.line(canvas, points[a], points[b], colour, width, cv2.LINE_AA, bits)
    for point, colour, visible in zip(points, COLOURS, seen, strict=True):
        if visible:
            cv2.circle(canvas, point, radius << bits, colour, cv2.FILLED, cv2.LINE_AA, bits)
    return canvas
