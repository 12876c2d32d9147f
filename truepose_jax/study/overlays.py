"""Heat maps over photos, with the outlines of head and clothes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from input_pipeline.annotations.parsing import LabelSet
from input_pipeline.annotations.photo import Framing
from truepose_jax.sampling.image_grid import sheet
from truepose_jax.study.regions import outlines

HEIGHT = 192
"""Of a photo on the sheet, in pixels."""
TOP = 3.0
"""Density at which the colours end: three times the mean."""
LINES = ((255, 255, 255), (255, 255, 0))
"""Around the head, around the clothes."""


def heat(density: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """[rows columns] of attention relative to its mean -> the same at hw pixels, linear between cells' centres."""
    return cv2.resize(np.ascontiguousarray(density, np.float32), hw[::-1], interpolation=cv2.INTER_LINEAR)


def of_cells(mass: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mass per cell, sum 1 -> density [rows columns], mean 1."""
    return (mass * mass.size).reshape(grid)


def overlay(photo: np.ndarray, parsing: np.ndarray, labels: LabelSet, density: np.ndarray | None) -> np.ndarray:
    """uint8 [HEIGHT w 3]: the photo with its outlines; under a heat map where `density` [h w], at any size, is given."""
    hw = (HEIGHT, round(HEIGHT * photo.shape[1] / photo.shape[0]))
    shown = cv2.resize(photo, hw[::-1], interpolation=cv2.INTER_AREA if photo.shape[0] > HEIGHT else cv2.INTER_NEAREST)
    if density is not None:
        level = (np.clip(heat(density, hw) / TOP, 0, 1) * 255).astype(np.uint8)
        colours = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
        grey = cv2.cvtColor(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        shown = cv2.addWeighted(grey, 0.3, colours, 0.7, 0)
    shown = np.ascontiguousarray(shown)
    large = cv2.resize(parsing, hw[::-1], interpolation=cv2.INTER_NEAREST)
    for mask, colour in zip(outlines(large, labels), LINES, strict=True):
        edges, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, edges, -1, colour, 1)
    return shown


def overlay_sheet(
    photos: Sequence[tuple[np.ndarray, np.ndarray]], maps: Mapping[str, Sequence[np.ndarray]], labels: LabelSet
) -> np.ndarray:
    """uint8 [H W 3]: a row per (photo, parsing map), a column per entry of maps ({title: density [h w] per photo})."""
    columns = {"photo": [overlay(photo, parsing, labels, None) for photo, parsing in photos]}
    for title, densities in maps.items():
        columns[title] = [
            overlay(photo, parsing, labels, density)
            for (photo, parsing), density in zip(photos, densities, strict=True)
        ]
    widest = max(cell.shape[1] for cell in columns["photo"])
    padded = {title: [_wide(cell, widest) for cell in cells] for title, cells in columns.items()}
    return sheet(padded)


def uncropped(density: np.ndarray, framing: Framing) -> np.ndarray:
    """A map over the model's picture -> its part that is photo, [h w] at the model's pixels."""
    return framing.crop(heat(density, framing.out_hw))


def _wide(cell: np.ndarray, width: int) -> np.ndarray:
    return np.pad(cell, ((0, 0), (0, width - cell.shape[1]), (0, 0)), constant_values=255)
