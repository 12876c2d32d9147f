"""The study in words: report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truepose_jax.runtime.markdown import table
from truepose_jax.study.drawing import short
from truepose_jax.study.regions import LEAST_SHARE, REGIONS
from truepose_jax.study.table import MAPS, OVER_T, TARGET, THROUGH, Row, select

MOST_STEPS = 8
"""Rows of the table over t; the CSV has all."""


def report(
    rows: Sequence[Row],
    series: Sequence[tuple[str, Mapping[str, Row]]],
    sites: Sequence[str],
    timesteps: Sequence[int],
    about: Mapping[str, Any],
) -> str:
    """series: (name as in the charts, {region: row}) of the first table."""
    shares = ", ".join(f"{region} {100 * about['mean_share_of_picture'][region]:.1f} %" for region in REGIONS)
    sampling = about["sampling"]
    lines = [
        "# Where the attention falls",
        "",
        f"Model: {about['model']}. Photos: {about['photos']} of {about['data']}, {about['size'][0]}x{about['size'][1]}, labels "
        f"{about['labels']}. {sampling['steps']} DDIM steps, guidance {sampling['guidance']:g}, seed {sampling['seed']}.",
        "",
        "```",
        about["command"],
        "```",
        "",
    ]
    for name, why in about["untrained"].items():
        lines += [f"**{name} is UNTRAINED** ({why}): its numbers say nothing about the method.", ""]
    if about["baselines"]:
        found = "; ".join(f"{n} {b['folder']}, sha256 {b['sha256'][:16]}" for n, b in about["baselines"].items())
        lines += [f"Encoders: {found}. Whose weights these are is not known beyond the hash.", ""]
    lines += [
        "Attention per share of the picture: 1 is what a region of that size gets by chance. Mean over photos ± its standard "
        f"error; a photo counts where the region covers at least {100 * LEAST_SHARE:g} % of it. Mean shares: {shares}.",
        *(f"{region.capitalize()}: {', '.join(about['regions'][region])}." for region in REGIONS),
        "",
        *_table("map", [(name, found) for name, found in series]),
        "",
        "![bars](bars.png)",
        "",
        "What Eq. 6 does is not learned: it raises every logit inside the mask M (the classes that the target pose switches on) "
        "and lowers every one outside. So the step from before to after shows the rule at work; what training has made of the "
        "network shows before it, and in the target attention.",
        "",
        "## Per layer",
        "",
    ]
    for name in MAPS:
        lines += [f"{name}{', mean over t' if name in OVER_T else ''}:", ""]
        lines += [*_table("layer", [(short(site), select(rows, name, layer=site)) for site in sites]), ""]
    stride = -(-len(timesteps) // MOST_STEPS)
    lines += [
        "![layers](layers.png)",
        "",
        "## Over t",
        "",
        "SourceNet reads the clean source once, at t = 0: the source attention is the same at every step. What changes is where "
        "TargetNet looks (mean over layers).",
        "",
        f"{TARGET}:",
        "",
        *_table("t", [(str(t), select(rows, TARGET, t=t)) for t in timesteps[::stride]]),
        "",
        f"{THROUGH}, the cells whose values it takes in:",
        "",
        *_table("t", [(str(t), select(rows, THROUGH, t=t)) for t in timesteps[::stride]]),
        "",
        "![over t](over_t.png)",
        "",
        "![overlays](overlays.png)",
        "",
        "Overlays: attention by cell, mean over layers (and t), from none (black) to three times the mean (yellow). Outlines: "
        "head white, clothes yellow.",
        "",
    ]
    return "\n".join(lines)


def _table(first: str, entries: Sequence[tuple[str, Mapping[str, Row]]]) -> list[str]:
    return table((first, *REGIONS), ([name, *(_cell(found.get(r)) for r in REGIONS)] for name, found in entries))


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.density:.2f}" + (f" ± {row.sem:.2f}" if row.sem is not None else "")
