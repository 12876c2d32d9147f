"""Pictures for people: sample sheets, PNG files."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from PIL import Image

from truepose_jax.runtime.files import atomic_write, writing

MARGIN, TITLE = 4, 22
LEAST_CELL = 128
"""Cells are enlarged by a whole factor to at least this height, so that small pictures can be seen."""


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0 to 255, rounded."""
    return np.clip(np.round((np.asarray(images, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def sheet(columns: Mapping[str, Sequence[np.ndarray]], *, blocks: int = 1, least_cell: int = LEAST_CELL) -> np.ndarray:
    """A white sheet uint8 [H W 3]: one titled column per entry, one row per index, all cells uint8 [h w 3] of one size.

    blocks: the rows are broken into this many blocks side by side. least_cell: cells are at least so high.
    """
    names, rows = list(columns), len(next(iter(columns.values())))
    h, w = columns[names[0]][0].shape[:2]
    zoom = max(1, -(-least_cell // h))
    h, w = h * zoom + MARGIN, w * zoom + MARGIN
    per_block = -(-rows // blocks)
    block_width = len(names) * w + 2 * MARGIN
    page = np.full((TITLE + per_block * h + MARGIN, blocks * block_width, 3), 255, np.uint8)
    for row in range(rows):
        block, line = divmod(row, per_block)
        for column, name in enumerate(names):
            cell = columns[name][row].repeat(zoom, 0).repeat(zoom, 1)
            top, left = TITLE + line * h, block * block_width + MARGIN + column * w
            page[top : top + h - MARGIN, left : left + w - MARGIN] = cell
            if line == 0:
                cv2.putText(page, name, (left, TITLE - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)
    return page


def save_png(picture: np.ndarray, path: pathlib.Path) -> None:
    """uint8 [h w 3]; the file appears when it is whole. Raises InputError where it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")
