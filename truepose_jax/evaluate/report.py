"""From rows and statistics to the report: means with intervals, and the table that is printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from input_pipeline.schema import InputError
from input_pipeline.sources.folder import identity_of
from input_pipeline.sources.market1501 import person_of
from input_pipeline.synthetic.people import person_in
from truepose_jax.evaluate.scores import Row
from truepose_jax.evaluate.statistics import ANOTHER_VERSION
from truepose_jax.metrics.garments import BINS, GALLERY, retrieval_rate
from truepose_jax.metrics.psnr import LEAST_PIXELS

Z95 = 1.96
Summary = dict[str, Any]
"""mean, ci95 (half its width; over images, nothing else), count; undefined: images that have no number."""

METRICS = ("ssim", "ssim_256", "psnr")
"""And LPIPS, by its network's name."""

SAID = {"ssim_256": "ssim_256 (range: the generated's)"}
"""In the table: others divide by 255, and their numbers are not these."""


def summarise(
    rows: Iterable[Row], *, lpips_name: str, expected: int
) -> tuple[dict[str, Summary], dict[str, dict[str, Summary]]]:
    """({metric: summary}, {region: {"psnr", "ssim": summary}}); garment retrieval is a metric where there are clothes.

    lpips_name: what LPIPS is called in the rows and may be called. Raises InputError where there are not `expected` rows.
    """
    values: dict[str, list[float]] = {name: [] for name in (*METRICS, lpips_name)}
    seen = 0
    regions: dict[str, tuple[list[float], list[float]]] = {}
    clothes: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    garments: list[str] = []
    for row in rows:
        seen += 1
        for name, numbers in values.items():
            if name in row:
                numbers.append(row[name])
        for region, (decibels, similar) in row.get("regions", {}).items():
            of_psnr, of_ssim = regions.setdefault(region, ([], []))
            of_psnr.append(decibels)
            of_ssim.append(similar)
        if "clothes" in row:
            garments.append(garment_of(row["reference"]))
            for kept, sparse in zip(clothes, row["clothes"], strict=True):
                kept.append(_dense(sparse))
    if seen != expected:
        raise InputError(
            f"only {seen} of {expected} pairs have a row; does another evaluation write to the same --cache? "
            "Let it end, and run the same command again"
        )
    metrics = {name: summary(numbers) for name, numbers in values.items() if numbers}
    if garments:
        rate, asked = retrieval_rate(np.stack(clothes[0]), np.stack(clothes[1]), garments)
        if asked:
            error = Z95 * math.sqrt(rate * (1 - rate) / asked)
            metrics[f"garment_colour_retrieval_of_{GALLERY}"] = {
                "mean": rate,
                "ci95": error,
                "count": asked,
                "undefined": 0,
            }
    return metrics, {r: {"psnr": summary(p), "ssim_256": summary(s)} for r, (p, s) in sorted(regions.items())}


def garment_of(name: str) -> str:
    """What two photos of one person in one outfit share, as far as names tell: Market's person, a synthetic person,
    DeepFashion's garment, the sub-folder. Others are taken for somebody of their own each."""
    return person_of(name) or person_in(name) or identity_of(name)


def _dense(sparse: Iterable[tuple[float, float]]) -> np.ndarray:
    histogram = np.zeros(BINS**3, np.float32)
    for index, share in sparse:
        histogram[int(index)] = share
    return histogram


def summary(numbers: list[float]) -> Summary:
    """The mean of those that are defined. One exact copy makes the mean PSNR inf."""
    array = np.array(numbers, np.float64)
    defined = array[~np.isnan(array)]
    if not len(defined):
        return {"mean": math.nan, "ci95": math.nan, "count": 0, "undefined": len(array)}
    spread = defined.std(ddof=1) if len(defined) > 1 and np.isfinite(defined).all() else math.nan
    return {
        "mean": float(defined.mean()),
        "ci95": float(Z95 * spread / math.sqrt(len(defined))),
        "count": len(defined),
        "undefined": int(len(array) - len(defined)),
    }


def table(report: Mapping[str, Any]) -> str:
    """The report's numbers for people."""
    lines = [f"{'metric':34}{'value':>12}{'+- 95 %':>12}{'images':>10}"]
    for name, found in report["metrics"].items():
        lines.append(_line(name, found))
    if report.get("regions"):
        lines.append(f"{'region':18}{'PSNR':>8}{'+- 95 %':>10}{'SSIM_256':>9}{'+- 95 %':>10}{'images':>10}")
        for region, found in report["regions"].items():
            psnr, similar = found["psnr"], found["ssim_256"]
            if not psnr["count"]:
                lines.append(f"{region:18} no image shows {LEAST_PIXELS} pixels of it")
                continue
            lines.append(
                f"{region:18}{psnr['mean']:8.3f}{psnr['ci95']:10.3f}{similar['mean']:9.4f}{similar['ci95']:10.4f}"
                f"{psnr['count']:10}"
            )
    lines += [
        f"{name}: its reference statistics were {facts['reference_made_by']}"
        for name, facts in report.get("fid", {}).items()
        if facts.get("reference_made_by") == ANOTHER_VERSION
    ]
    lines += [f"{name} not computed: {why}" for name, why in report["not_computed"].items()]
    return "\n".join(lines)


def _line(name: str, found: Summary) -> str:
    interval = f"{found['ci95']:12.4f}" if "ci95" in found and not math.isnan(found["ci95"]) else " " * 12
    name = SAID.get(name, name)
    return f"{name:34}{found['mean']:12.4f}{interval}{found['count']:10}"
