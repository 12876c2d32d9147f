"""What CLIP sees of the source: a rectangle per parsing class, and the whole image (docs/paper.md A16, A18)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from input_pipeline.annotations.parsing import LabelSet, class_areas
from input_pipeline.schema import MAX_CLASSES, WHOLE_IMAGE

MIN_AREA = 0.001
"""A class takes part from 0.1 % of the pixels on (A18)."""

CROP_SIZE = 224
"""CLIP ViT-L/14's input."""

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def region_boxes(parsing: np.ndarray, labels: LabelSet) -> tuple[np.ndarray, np.ndarray]:
    """(boxes int32 [21 4], valid bool [21]) of a map uint8 [h w].

    A box is (x0, y0, x1, y1), half open, around all pixels of the class; row 20 is the whole image. Valid:
    foreground and at least 0.1 % of the pixels. Boxes of other rows are zeros.
    """
    boxes = np.zeros((MAX_CLASSES + 1, 4), np.int32)
    valid = np.zeros(MAX_CLASSES + 1, bool)
    valid[:MAX_CLASSES] = labels.foreground & (class_areas(parsing) >= MIN_AREA)
    for index in np.flatnonzero(valid):
        mask = parsing == index
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    boxes[WHOLE_IMAGE] = 0, 0, parsing.shape[1], parsing.shape[0]
    valid[WHOLE_IMAGE] = True
    return boxes, valid


def region_crops(
    image: np.ndarray, parsing: np.ndarray, labels: LabelSet, *, out: int = CROP_SIZE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(crops uint8 [21 out out 3], valid bool [21], boxes int32 [21 4]) of a photo uint8 [h w 3].

    What lies in a box stays unmasked; it is padded to a square with white and resized as CLIP's processor
    does (Pillow's bicubic, antialiased). CLIP's own shortest-edge crop would cut off arms and legs. Rows that
    are not valid are zeros.
    """
    boxes, valid = region_boxes(parsing, labels)
    crops = np.zeros((MAX_CLASSES + 1, out, out, 3), np.uint8)
    for index in np.flatnonzero(valid):
        x0, y0, x1, y1 = boxes[index]
        crops[index] = square_crop(image[y0:y1, x0:x1], out=out)
    return crops, valid, boxes


def square_crop(crop: np.ndarray, *, out: int) -> np.ndarray:
    """uint8 [h w 3] -> uint8 [out out 3]: centred on a white square, then bicubic."""
    h, w = crop.shape[:2]
    side = max(h, w)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    square[top : top + h, left : left + w] = crop
    return np.asarray(Image.fromarray(square).resize((out, out), Image.Resampling.BICUBIC))


def clip_normalise(crops: np.ndarray) -> np.ndarray:
    """uint8 [... 3] -> float32 [... 3] with CLIP's mean and deviation."""
    return (crops.astype(np.float32) / np.float32(255) - CLIP_MEAN) / CLIP_STD
