"""From a parsing map at image size to what each UNet level needs: class coverage per cell, and the mask M (A2, A3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

HALF = 0.5 - 1e-5
"""Of a cell, less the rounding of a sum of shares: a cell that is exactly half covered is on. One pixel of the largest cell of
512x352 (64 x 64) is 2.4e-4."""


def _sum_pool(x: Float[Array, "b h w p"], factor: int) -> Float[Array, "b h2 w2 p"]:
    """Sums over factor x factor cells; a window that reaches over the edge sums what it holds."""
    b, h, w, p = x.shape
    down, right = -h % factor, -w % factor
    x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
    return x.reshape(b, (h + down) // factor, factor, (w + right) // factor, factor, p).sum(axis=(2, 4), dtype=x.dtype)


def coverage_levels(
    parsing: UInt8[Array, "b H W"], *, num_classes: int, factor: int, levels: int
) -> list[Float[Array, "b h w p"]]:
    """Share of each cell's pixels that each class covers, in [0, 1], for `levels` UNet levels.

    Level 0 is the latent (H/factor x W/factor); each next level halves it, rounding up, as the UNet does, so that
    cell i of a level lies over cells 2i and 2i + 1 of the level before. A cell that reaches over the edge counts the
    pixels that it holds.
    """
    h, w = parsing.shape[1:]
    # Pixels are counted and divided once: means of means would weigh the columns of an odd edge double (11 -> 6 -> 3).
    # In bytes where a cell's count fits into one: exact, and a quarter of the memory.
    pixels = jax.nn.one_hot(parsing, num_classes, dtype=jnp.uint8 if factor < 16 else jnp.int32)
    found = []
    for level in range(levels):
        pixels = _sum_pool(pixels, 2 if level else factor).astype(jnp.float32)
        side = factor * 2**level
        rows = np.minimum(side, h - side * np.arange(pixels.shape[1]))
        columns = np.minimum(side, w - side * np.arange(pixels.shape[2]))
        found.append(pixels / (rows[:, None] * columns)[..., None].astype(np.float32))
    return found


def parsing_mask(coverage: Float[Array, "b h w p"], class_on: Bool[Array, "b p"]) -> Bool[Array, "b n"]:
    """The mask M of one level, flattened to keys: on where the switched-on classes cover at least half of a cell.

    Every switched-on class keeps the cell that it covers best, so that shoes and faces survive the coarse levels.
    """
    b, h, w, p = coverage.shape
    cells = coverage.reshape(b, h * w, p)
    on = class_on[:, None, :]
    mask = jnp.sum(jnp.where(on, cells, 0.0), axis=-1) >= HALF
    present = jnp.any(cells > 0, axis=1)
    best = jax.nn.one_hot(jnp.argmax(cells, axis=1), h * w, axis=1, dtype=jnp.bool_)
    rescued = best & (class_on & present)[:, None, :]
    return mask | jnp.any(rescued, axis=-1)


def mean_levels(cells: Float[Array, "b h w c"], levels: int) -> list[Float[Array, "b n c"]]:
    """The cells and their means over 2 x 2, 4 x 4, ... for `levels` UNet levels; at an edge the mean of what is there."""
    sums, counts, found = cells, jnp.ones((1, *cells.shape[1:3], 1)), []
    for level in range(levels):
        if level:
            sums, counts = _sum_pool(sums, 2), _sum_pool(counts, 2)
        found.append((sums / counts).reshape(len(cells), -1, cells.shape[-1]))
    return found
