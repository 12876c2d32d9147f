"""The figures of the studies: PNG, labelled axes with units, colours that print and are told apart by colour-blind eyes.

matplotlib is imported where it is used: it is the extra [scaling], and the program says so in one line where it is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from input_pipeline.schema import InputError
from truepose_jax.runtime.cli import install

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Okabe and Ito's palette; a series keeps its colour and marker in every figure of a report."""

_STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 5,
    "lines.linewidth": 1.4,
}


def style(i: int) -> dict[str, Any]:
    """Colour and marker of series i."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def need_matplotlib() -> None:
    """Raises InputError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the figures need matplotlib: " + install("scaling"))


@contextlib.contextmanager
def figure(
    path: pathlib.Path,
    *,
    x: str = "",
    y: str,
    panels: int = 1,
    size: tuple[float, float] | None = None,
    title: str = "",
    legend: str = "inside",
) -> Iterator[Any]:
    """Axes (a list of them for panels > 1) to draw on; saved to `path`. x, y: what the axes show, with units. size: inches.
    legend: of the first panel's series, "inside" it, "beside" them all, or "" for none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        size = size or ((5.2, 3.6) if panels == 1 else (3.4 * panels, 3.3))
        made, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False)
        for axis in axes[0]:
            axis.set_xlabel(x)
        axes[0][0].set_ylabel(y)
        made.suptitle(title, fontsize=9)
        yield axes[0][0] if panels == 1 else list(axes[0])
        made.tight_layout()
        if legend == "beside":
            made.legend(*axes[0][0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5))
        elif legend == "inside" and axes[0][0].get_legend_handles_labels()[0]:
            axes[0][0].legend()
        made.savefig(path, metadata={"Software": None}, bbox_inches="tight")
        plt.close(made)


def doubling(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis to base 2, labelled at these values."""
    from matplotlib.ticker import NullFormatter

    axis.set_xscale("log", base=2)
    axis.xaxis.set_ticks(list(values), [f"{v:g}" for v in values])
    axis.xaxis.set_minor_formatter(NullFormatter())


def decades(axis: Any, which: str = "y", at: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """A logarithmic axis with plain numbers at these places of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_major_locator(LogLocator(base=10, subs=at))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    side.set_minor_formatter(NullFormatter())


def shades(count: int) -> list[Any]:
    """Colours of an ordered series, from light to dark."""
    import matplotlib
    import numpy as np

    return list(matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1.0, count) if count > 1 else [0.7]))
