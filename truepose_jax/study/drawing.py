"""The study's charts. matplotlib is the extra [scaling]; it is imported where it is used."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from input_pipeline.schema import InputError
from truepose_jax.runtime.cli import install
from truepose_jax.study.regions import REGIONS
from truepose_jax.study.table import AFTER, MAPS, MEAN, OVER_T, Row, select

COLOURS = {"head": "#0072B2", "clothes": "#D55E00", "rest": "#999999"}
SERIES = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00")
"""Okabe and Ito's palette, told apart by colour-blind eyes."""
DENSITY = "attention / share of the picture"
STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def need_matplotlib() -> None:
    """Raises InputError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the charts need matplotlib: " + install("scaling"))


@contextlib.contextmanager
def _axes(path: pathlib.Path, title: str, panels: int = 1, wide: float = 6.2) -> Iterator[Any]:
    """Axes (a list of them for panels > 1) with the line of indifference; saved to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        made, axes = plt.subplots(1, panels, figsize=(wide, 3.4), sharey=True, squeeze=False)
        for axis in axes[0]:
            axis.axhline(1.0, color="#444444", linewidth=0.8, linestyle=":")
        axes[0][0].set_ylabel(DENSITY)
        made.suptitle(title, fontsize=9)
        yield axes[0][0] if panels == 1 else list(axes[0])
        made.tight_layout()
        made.savefig(path, metadata={"Software": None})
        plt.close(made)


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
                values = [found[i].density for i in at]
                axis.errorbar(
                    at,
                    values,
                    [found[i].sem or 0.0 for i in at],
                    marker="o",
                    markersize=4,
                    color=COLOURS[region],
                    label=region,
                )
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
                axis.errorbar(
                    [t for t, _ in found],
                    [row.density for _, row in found],
                    [row.sem or 0.0 for _, row in found],
                    marker="o",
                    markersize=4,
                    color=COLOURS[region],
                    label=region,
                )
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
