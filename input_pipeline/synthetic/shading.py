"""Colours of painted quads: cloth coordinates, patterns, creases and light, for visible samples only."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

FOLD_SIZE = 128
FOLDS_PER_HEAD = 26.0
"""Cells of the fold texture per head height along the cloth; across it, folds are twice as wide."""

CHUNK = 16384
"""Samples coloured at a time, so that their arrays stay in the cache: a quarter faster at 512x352."""

Pattern = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(x around the body, y along it, width of a sample; in head heights) -> share of `change`, float32 [n]."""


@functools.lru_cache(maxsize=1)
def fold_texture() -> np.ndarray:
    """Smooth noise, float32 [FOLD_SIZE FOLD_SIZE] in [-1, 1], that repeats: creases of cloth, streaks of hair."""
    noise = np.random.default_rng(42).standard_normal((FOLD_SIZE, FOLD_SIZE))
    fy, fx = np.meshgrid(np.fft.fftfreq(FOLD_SIZE), np.fft.fftfreq(FOLD_SIZE), indexing="ij")
    spectrum = np.fft.fft2(noise) / (1e-3 + np.hypot(fy, fx)) ** 1.9 * (np.hypot(fy, fx) > 0.012)
    smooth = np.fft.ifft2(spectrum).real
    return (smooth / np.abs(smooth).max()).astype(np.float32)


def texture_at(tile: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of a square tile whose side is a power of two at cells x, y (any sign; it repeats)."""
    side = tile.shape[0]
    cell = ((y.astype(np.int32) & (side - 1)) * side) + (x.astype(np.int32) & (side - 1))
    return tile.ravel().take(cell, mode="clip")


def resolved(ids, samples, surface: dict[str, np.ndarray], patterns: list[Pattern], step: float):
    """Image uint8 [h w 4] (times coverage) and coverage uint8 [h w] of a buffer of ids [h*samples w*samples].

    surface: what is known of each quad (Canvas._surface); id 0 is nobody, id i the quad i - 1. Pixels
    inside one quad are coloured once, at their middle, since patterns smooth themselves over the width they are told;
    only pixels on the rim of a quad are made of all their samples. step: width of a sample in head heights.
    """
    corner = ids[::samples, ::samples]
    uniform = np.ones(corner.shape, bool)
    for i in range(1, samples * samples):
        uniform &= ids[i // samples :: samples, i % samples :: samples] == corner
    width = corner.shape[1]
    image, coverage = np.zeros(corner.size, np.uint32), np.zeros(corner.size, np.uint8)

    inside = np.flatnonzero(uniform & (corner != 0))
    row, column = np.divmod(inside.astype(np.int32), width)
    quad = ids[row * samples, column * samples].astype(np.intp) - 1
    half = (samples - 1) / 2
    x, y = (column * samples + half).astype(np.float32), (row * samples + half).astype(np.float32)
    image[inside] = _coloured(surface, patterns, quad, x, y, step * samples)
    coverage[inside] = 255

    rim = np.flatnonzero(~uniform)
    row, column = np.divmod(rim.astype(np.int32), width)
    down, right = np.divmod(np.arange(samples * samples, dtype=np.int32), samples)
    y, x = (row[:, None] * samples + down).ravel(), (column[:, None] * samples + right).ravel()
    quad = ids[y, x].astype(np.intp)
    there = np.flatnonzero(quad)
    colours = np.zeros(len(quad), np.uint32)
    x, y = x.take(there).astype(np.float32), y.take(there).astype(np.float32)
    colours[there] = _coloured(surface, patterns, quad.take(there) - 1, x, y, step)
    total = colours.view(np.uint8).reshape(len(rim), samples * samples, 4).sum(1, dtype=np.uint16)
    image[rim] = (total // (samples * samples)).astype(np.uint8).view(np.uint32)[:, 0]
    coverage[rim] = (quad != 0).reshape(len(rim), -1).sum(1) * 255 // (samples * samples)
    return image.view(np.uint8).reshape(*corner.shape, 4), coverage.reshape(corner.shape)


def _coloured(surface, patterns, quad, x, y, step) -> np.ndarray:
    """uint32 [n]: red, green, blue, layer bytes of the samples at x, y on quads number `quad`."""
    packed = np.empty(len(quad), np.uint32)
    for start in range(0, len(quad), CHUNK):
        some = slice(start, start + CHUNK)
        packed[some] = _coloured_chunk(surface, patterns, quad[some], x[some], y[some], step)
    return packed


def _coloured_chunk(surface, patterns, quad, x, y, step) -> np.ndarray:
    def of(column):
        return column.take(quad, mode="clip")

    def line(i):
        value = of(surface["map"][i]) * x
        value += of(surface["map"][i + 1]) * y
        value += of(surface["map"][i + 2])
        return value

    w = 1.0 / np.maximum(line(6), 1e-3)
    u = np.minimum(np.maximum(line(0) * w, -1), 1)
    t = np.minimum(np.maximum(line(3) * w, -2), 3)
    v = of(surface["v"]) + t * of(surface["dv"])
    # The side of a strip that faces the light is brighter; both rims fall off as on a cylinder.
    edges = np.maximum(of(surface["edge"]) + t * of(surface["dedge"]), 0)
    square = u * u
    light = of(surface["shade"]) + edges * (of(surface["lit"]) * u - square * square + 0.1)
    arc = u + 0.57 * u * square  # close to arcsin(u), exact at the rims
    arc += of(surface["turn"])
    arc *= of(surface["radius"])
    # Creases fade where the rims do, so that they do not break off where two strips of one garment meet.
    creases = texture_at(fold_texture(), (arc + 8) * (FOLDS_PER_HEAD / 2), v * FOLDS_PER_HEAD)
    light += of(surface["folds"]) * np.minimum(edges * (1 / 0.3), 1) * creases

    weight = np.zeros(len(quad), np.float32)
    pattern_of_sample = of(surface["pattern"])
    for number, pattern in enumerate(patterns, start=1):
        members = np.flatnonzero(pattern_of_sample == number)
        if len(members):
            weight[members] = pattern(arc.take(members), v.take(members), step)
    packed = np.empty((len(quad), 4), np.uint8)
    for channel in range(3):
        value = of(surface["rgb"][channel]) + weight * of(surface["change"][channel])
        value *= light
        packed[:, channel] = np.minimum(np.maximum(value, 0, out=value), 255, out=value)
    packed[:, 3] = of(surface["layer"])
    return packed.view(np.uint32)[:, 0]
