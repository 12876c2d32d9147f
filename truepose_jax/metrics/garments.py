"""Garment retrieval by colour: do the generated clothes look more like the right ones than like other people's?

The descriptor is a histogram of colours inside the clothes of the target's map, so it costs nothing and needs no weights.
It knows no texture and no shape. Chance is 1 / GALLERY.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

BINS = 6
"""Per channel: 216 colours."""
GALLERY = 16
"""The right garment and 15 others."""


def colour_histogram(image: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, " k"]:
    """Shares of BINS^3 colours among the masked pixels of an image of 0 to 255."""
    levels = np.clip(image[mask] * (BINS / 256.0), 0, BINS - 1).astype(np.int64)
    index = (levels[:, 0] * BINS + levels[:, 1]) * BINS + levels[:, 2]
    return np.bincount(index, minlength=BINS**3) / max(len(index), 1)


def retrieval_rate(
    generated: Float[np.ndarray, "n k"], truth: Float[np.ndarray, "n k"], garments: Sequence[str], *, seed: int = 0
) -> tuple[float, int]:
    """(share of generated clothes nearest to their own truth among GALLERY, how many were asked).

    garments[i]: what image i shows; the others of a gallery show other garments. Images with fewer than GALLERY - 1 of
    those are left out; NaN where all are.
    """
    names = np.asarray(garments)
    random = np.random.default_rng(seed)
    hits = []
    for i in range(len(generated)):
        order = random.permutation(len(names))
        others = order[names[order] != names[i]]
        _, first = np.unique(names[others], return_index=True)
        chosen = others[np.sort(first)][: GALLERY - 1]
        if len(chosen) < GALLERY - 1:
            continue
        distances = np.abs(truth[np.concatenate([[i], chosen])] - generated[i]).sum(-1)
        hits.append(bool(distances[0] < distances[1:].min()))
    return (float(np.mean(hits)) if hits else float("nan")), len(hits)
