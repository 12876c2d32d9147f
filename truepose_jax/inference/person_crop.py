"""A person cut out of a photo for the model, and the picture put back into the photo."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from input_pipeline.annotations.keypoints import inside

MARGIN = 0.08
"""Around the person, in its heights."""
CROWN, SOLE = 0.12, 0.05
"""How far a person reaches above the joints of its face and below its ankles, in heights of its joints."""
FACE_JOINTS, ANKLES = (0, 14, 15, 16, 17), (10, 13)
SEAM = 0.04
"""Width of the strip over which a picture fades into its photo, in the crop's sides."""

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Crop:
    """A part of a photo, uint8 [h w 3]: its box (x0, y0, x1, y1), half open, in whole pixels."""

    photo: np.ndarray
    box: Box

    def put_back(self, picture: np.ndarray) -> np.ndarray:
        """The photo with this picture, uint8 [h w 3], in the place of the box: of the photo's aspect, and of the picture's pixels
        where those are the larger ones. The picture fades into the photo at the sides of the box that lie inside of it."""
        h, w = self.photo.shape[:2]
        x0, y0, x1, y1 = self.box
        if (y1 - y0, x1 - x0) == (h, w):
            return picture
        scale = min(1.0, picture.shape[0] / (y1 - y0), picture.shape[1] / (x1 - x0))
        size = max(1, round(w * scale)), max(1, round(h * scale))
        canvas = cv2.resize(self.photo, size, interpolation=cv2.INTER_AREA)
        left, right = (round(x * size[0] / w) for x in (x0, x1))
        top, bottom = (round(y * size[1] / h) for y in (y0, y1))
        shrunk = picture.shape[0] > bottom - top
        how = cv2.INTER_AREA if shrunk else cv2.INTER_CUBIC
        made = cv2.resize(picture, (right - left, bottom - top), interpolation=how).astype(np.float32)
        columns = _fade(right - left, left > 0, right < size[0])
        rows = _fade(bottom - top, top > 0, bottom < size[1])
        weight = (rows[:, None] * columns)[..., None]
        part = canvas[top:bottom, left:right]
        canvas[top:bottom, left:right] = np.rint(weight * made + (1 - weight) * part).astype(np.uint8)
        return canvas


def _fade(length: int, first: bool, last: bool) -> np.ndarray:
    """float32 [length]: 1 inside, falling to 0 at the ends that fade."""
    strip = max(1.0, SEAM * length)
    at = np.arange(length, dtype=np.float32) + 0.5
    ramps = [np.minimum(1, at / strip)] * first + [np.minimum(1, (length - at) / strip)] * last
    return np.prod(ramps, axis=0).astype(np.float32) if ramps else np.ones(length, np.float32)


def box_of_joints(joints: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """float [4]: x0, y0, x1, y1 around the person of these joints, [18 3] in a frame of hw, crown and soles guessed, cut off at
    the frame."""
    seen = joints[inside(joints, hw), :2] if inside(joints, hw).any() else joints[joints[:, 2] > 0, :2]
    (x0, y0), (x1, y1) = seen.min(axis=0), seen.max(axis=0)
    height = y1 - y0
    y0 -= CROWN * height * (joints[list(FACE_JOINTS), 2] > 0).any()
    y1 += SOLE * height * (joints[list(ANKLES), 2] > 0).any()
    return _clipped(np.array([x0, y0, x1, y1]), hw)


def box_of_mask(mask: np.ndarray) -> np.ndarray:
    """float [4]: around what is True of bool [h w]; all of it where nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return np.array([0.0, 0, mask.shape[1], mask.shape[0]])
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def crop_box(person: np.ndarray, hw: tuple[int, int], like: tuple[int, int]) -> Box:
    """The part of a photo of hw to give to a model of size `like` (both h, w): the person's box and a margin, grown to the
    model's aspect, moved into the photo, and cut off where the photo is too small for it."""
    h, w = hw
    margin = MARGIN * max(person[3] - person[1], person[2] - person[0])
    x0, y0, x1, y1 = person + np.array([-margin, -margin, margin, margin])
    # What the photo does not show beyond its edge needs no margin there.
    x0, y0, x1, y1 = _clipped(np.array([x0, y0, x1, y1]), hw)
    height = min(max(y1 - y0, (x1 - x0) * like[0] / like[1]), h)
    width = min(max(x1 - x0, height * like[1] / like[0]), w)
    left, right = _placed(x0, x1, width, w)
    top, bottom = _placed(y0, y1, height, h)
    return left, top, right, bottom


def _placed(start: float, stop: float, length: float, limit: int) -> tuple[int, int]:
    """A stretch of this length around the middle of another, moved into 0 to limit; whole numbers, at least one apart."""
    begin = min(max((start + stop - length) / 2, 0), limit - length)
    first = min(int(np.floor(begin)), limit - 1)
    return first, max(first + 1, min(limit, int(np.ceil(begin + length))))


def _clipped(box: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    return np.clip(box, 0, np.array([hw[1], hw[0], hw[1], hw[0]], float))


def moved(joints: np.ndarray, box: Box) -> np.ndarray:
    """Joints [18 3] of a photo in pixels of a part of it; missing ones stay zeros."""
    return np.where(joints[:, 2:] > 0, joints - (box[0], box[1], 0), 0).astype(np.float32)
