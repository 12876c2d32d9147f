"""The study's charts."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from truepose_jax.runtime import plots
from truepose_jax.study.regions import REGIONS
from truepose_jax.study.table import AFTER, MAPS, MEAN, OVER_T, Row, select

COLOURS = {"head": plots.COLOURS[0], "clothes": plots.COLOURS[1], "rest": "#999999"}
SERIES = tuple(plots.COLOURS[i] for i in (5, 0, 2, 4, 3, 1))


@contextlib.contextmanager
def _axes(path: pathlib.Path, title: str, panels: int = 1, wide: float = 6.2) -> Iterator[Any]:
    """Axes (a list of them for panels > 1) with the line of indifference; saved to `path`."""
    y = "attention / share of the picture"
    with plots.figure(path, y=y, panels=panels, size=(wide, 3.4), title=title, legend="") as axes:
        for axis in [axes] if panels == 1 else axes:
            axis.axhline(1.0, color="#444444", linewidth=0.8, linestyle=":")
        yield axes


def _line(axis: Any, at: Sequence[float], rows: Sequence[Row], region: str) -> None:
    """A region's densities with their errors of the mean over photos."""
    density, sem = [row.density for row in rows], [row.sem or 0.0 for row in rows]
    axis.errorbar(at, density, sem, marker="o", markersize=4, color=COLOURS[region], label=region)


def bars(path: pathlib.Path, series: Sequence[tuple[str, dict[str, Row]]], title: str) -> None:
    """series: (legend, {region: row}). One group of bars per region, errors of the mean over photos."""
    with _axes(path, title, wide=7.2) as axis:
        width = 0.8 / len(series)
        for i, (name, found) in enumerate(series):
            at = [r for r, region in enumerate(REGIONS) if region in found]
            axis.bar(
                [r + (i - (len(series) - 1) / 2) * width for r in at],
                [found[REGIONS[r]].density for r in at],
                0.92 * width,
                yerr=[found[REGIONS[r]].sem or 0.0 for r in at],
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                color=SERIES[i % len(SERIES)],
                label=name,
            )
        axis.set_xticks(range(len(REGIONS)), REGIONS)
        axis.legend(bbox_to_anchor=(1.0, 0.5), loc="center left")


def layers(path: pathlib.Path, rows: Sequence[Row], sites: Sequence[str], title: str) -> None:
    """One panel per map, one line per region over the transformer blocks."""
    with _axes(path, title, panels=len(MAPS), wide=10.8) as axes:
        for axis, name in zip(axes, MAPS, strict=True):
            for region in REGIONS:
                found = [select(rows, name, layer=site).get(region) for site in sites]
                at = [i for i, row in enumerate(found) if row]
                _line(axis, at, [found[i] for i in at], region)
            axis.set_title(name + (", mean over t" if name in OVER_T else ""), fontsize=8)
            axis.set_xticks(range(len(sites)), [short(site) for site in sites], rotation=60, ha="right", fontsize=7)
            axis.set_xlim(-0.5, len(sites) - 0.5)
        axes[0].legend()


def over_t(path: pathlib.Path, rows: Sequence[Row], timesteps: Sequence[int], title: str) -> None:
    """TargetNet's attention on the source over the sampling steps; dashed, the source attention after Eq. 6, which has no t."""
    with _axes(path, title, panels=len(OVER_T), wide=8.4) as axes:
        for axis, name in zip(axes, OVER_T, strict=True):
            for region in REGIONS:
                found = [(t, row) for t in timesteps if (row := select(rows, name, t=t).get(region))]
                _line(axis, [t for t, _ in found], [row for _, row in found], region)
                fixed = select(rows, AFTER).get(region)
                if fixed:
                    axis.axhline(fixed.density, color=COLOURS[region], linestyle="--", linewidth=1)
            axis.set_title(f"{name}; dashed: {AFTER} (t = 0)", fontsize=8)
            axis.set_xlabel("timestep t (sampling goes to the right)")
            axis.invert_xaxis()
        axes[-1].legend(bbox_to_anchor=(1.0, 0.5), loc="center left")


def short(site: str) -> str:
    """'up_blocks_1_attentions_0_transformer_blocks_0' -> 'up 1.0'."""
    if site == MEAN:
        return site
    block, _, inside = site.partition("_attentions_")
    attention, _, transformer = inside.partition("_transformer_blocks_")
    where = block.replace("_blocks_", " ").replace("_block", "")
    return f"{where}.{attention}" + (f".{transformer}" if transformer != "0" else "")
