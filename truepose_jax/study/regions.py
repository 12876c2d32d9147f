"""Head, clothes and the rest of a photo, and how much of an attention map falls on each."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from input_pipeline.annotations.parsing import LabelSet
from input_pipeline.schema import MAX_CLASSES, InputError

REGIONS = ("head", "clothes", "rest")
HEAD = ("Hat", "Hair", "Sunglasses", "Face")
CLOTHES = (
    "Upper-clothes", "Coat", "Dress", "Jumpsuits", "Skirt", "Pants", "Belt", "Scarf", "Bag", "Glove", "Socks", "Left-shoe",
    "Right-shoe",
)  # fmt: skip
"""What is worn or carried below the head. The rest: bare arms, legs and torso, background, and white padding."""

LEAST_SHARE = 0.005
"""Of a photo's cells: smaller regions say nothing about that photo and are left out of its means (a face of one cell of
8x6 is 2 %)."""


def membership(labels: LabelSet) -> Float[np.ndarray, "p r"]:
    """1 where class p belongs to region r. Raises InputError for a set without heads or garments."""
    found = np.zeros((MAX_CLASSES, len(REGIONS)), np.float32)
    for index in range(MAX_CLASSES):
        name = labels.classes[index] if index < len(labels) else ""
        found[index, 0 if name in HEAD else 1 if name in CLOTHES else 2] = 1
    if not found[:, 0].any() or not found[:, 1].any():
        raise InputError(
            f"the study needs parsing maps with heads and garments; {labels.name} has not both (atr18, lip20, cihp20 have)"
        )
    return found


def region_classes(labels: LabelSet) -> dict[str, list[str]]:
    """The classes of each region, by name."""
    of = membership(labels)[: len(labels)]
    return {r: [labels.classes[i] for i in np.flatnonzero(of[:, j])] for j, r in enumerate(REGIONS)}


def grid_coverage(parsing: UInt8[np.ndarray, "h w"], labels: LabelSet, grid: tuple[int, int], cell: int):
    """Share of each of grid (rows, columns) cells that each region covers, after the map was stretched to `cell` pixels a
    cell: float32 [rows * columns 3]."""
    rows, columns = grid
    stretched = cv2.resize(parsing, (columns * cell, rows * cell), interpolation=cv2.INTER_NEAREST)
    pixels = membership(labels)[stretched].reshape(rows, cell, columns, cell, len(REGIONS))
    return pixels.mean(axis=(1, 3)).reshape(rows * columns, len(REGIONS))


def densities(mass: Float[np.ndarray, "*any m"], coverage: Float[np.ndarray, "m r"]) -> Float[np.ndarray, "*any r"]:
    """Attention on each region per share of the picture: sum_m mass coverage / mean_m coverage.

    mass sums to 1 over the m key cells. Attention that is the same everywhere gives 1 for every region, whatever its size;
    2 means twice as much as that. The share is counted in cells, which is pixels but for levels whose last cells reach over
    the picture's edge. NaN where the region covers less than LEAST_SHARE.
    """
    share = coverage.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share >= LEAST_SHARE, mass @ coverage / share, np.nan)


def outlines(parsing: UInt8[np.ndarray, "h w"], labels: LabelSet) -> list[Bool[np.ndarray, "h w"]]:
    """Where head and clothes are, for drawing."""
    of = membership(labels)[parsing] > 0
    return [of[..., 0], of[..., 1]]
