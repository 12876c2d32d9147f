"""The study's numbers: one row per model, map, layer, timestep and region; as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from truepose_jax.study.ours import Seen
from truepose_jax.study.regions import REGIONS, densities

OURS = "TruePose"
BEFORE, AFTER = "source, before Eq. 6", "source, after Eq. 6"
TARGET, THROUGH = "target, Eq. 8", "target, Eq. 8 through 7"
MAPS = (BEFORE, AFTER, TARGET, THROUGH)
OVER_T = (TARGET, THROUGH)
"""Maps that change with t."""
LAST = "[CLS], last layer"
MEAN = "mean"
"""In place of a layer or a timestep: over all of them."""


@dataclasses.dataclass(frozen=True)
class Row:
    """density: mean over photos of attention per share of the picture (1: indifferent); sem: its standard error, None for
    one photo; photos: how many have the region. t: timestep, "mean", or "" where there is none (source attention: t = 0)."""

    model: str
    map: str
    layer: str
    t: int | str
    region: str
    density: float
    sem: float | None
    photos: int


def rows_of(model: str, map: str, layer: str, t: int | str, values: np.ndarray) -> list[Row]:
    """values: [photos regions], NaN where a photo lacks the region."""
    found = []
    for column, region in enumerate(REGIONS):
        there = values[:, column][np.isfinite(values[:, column])].astype(np.float64)
        if len(there):
            sem = float(there.std(ddof=1) / math.sqrt(len(there))) if len(there) > 1 else None
            found.append(Row(model, map, layer, t, region, float(there.mean()), sem, len(there)))
    return found


def our_rows(seen: Seen, coverage: Mapping[str, np.ndarray]) -> list[Row]:
    """coverage: {site: [photos m regions]}. Means over layers and timesteps are taken per photo, then over photos."""
    found, sites = [], list(seen.before)

    def of(masses: Mapping[str, np.ndarray]) -> np.ndarray:
        """[sites photos regions]"""
        return np.stack([[densities(m, c) for m, c in zip(masses[s], coverage[s], strict=True)] for s in sites])

    for name, masses in ((BEFORE, seen.before), (AFTER, seen.after)):
        values = of(masses)
        for site, value in zip(sites, values, strict=True):
            found += rows_of(OURS, name, site, "", value)
        found += rows_of(OURS, name, MEAN, "", values.mean(axis=0))
    for name, masses in ((TARGET, seen.target), (THROUGH, seen.through)):
        steps = [of({s: masses[s][i] for s in sites}) for i in range(len(seen.timesteps))]
        for t, values in [*zip(seen.timesteps.tolist(), steps, strict=True), (MEAN, np.mean(steps, axis=0))]:
            for site, value in zip(sites, values, strict=True):
                found += rows_of(OURS, name, site, t, value)
            found += rows_of(OURS, name, MEAN, t, values.mean(axis=0))
    return found


def select(rows: Sequence[Row], map: str, *, layer: str = MEAN, t: int | str | None = None) -> dict[str, Row]:
    """{region: row}; t None: the map's overall one."""
    t = (MEAN if map in OVER_T else "") if t is None else t
    return {r.region: r for r in rows if (r.map, r.layer, r.t) == (map, layer, t)}


def write_csv(rows: Sequence[Row], path: pathlib.Path) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([field.name for field in dataclasses.fields(Row)])
        for row in rows:
            values = ("" if value is None else value for value in dataclasses.astuple(row))
            out.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
