"""The report of a batch study."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline import atomic
from truepose_jax.config import Config
from truepose_jax.runtime import plots
from truepose_jax.runtime.markdown import narrow
from truepose_jax.scaling.batch import Settings, evaluations, step_moments
from truepose_jax.scaling.fits import Hyperbola, hyperbola, noise_estimate
from truepose_jax.scaling.report import interval, number, origin, table
from truepose_jax.scaling.table import Row, Table

WINDOWS = 6
"""Pieces of equal length in log examples that a run's noise scale is shown over."""

LOOSE = 10
"""Points whose upper bound is this many times their value, or is none, are not shown."""

FEWEST = 8
"""Steps that such a piece must have."""


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by "optimizer, rule", ordered by batch; the reference batch's rows belong to every rule of their optimizer."""
    named = {(r["optimizer"], r["rule"]) for r in rows if r["rule"] != "any"}
    named |= {(r["optimizer"], "any") for r in rows} - {(o, "any") for o, _ in named}
    return {
        f"{'LAMB' if optimizer == 'lamb' else 'AdamW'}, {rule}": sorted(
            (r for r in rows if r["optimizer"] == optimizer and r["rule"] in (rule, "any")),
            key=lambda r: (r["batch"], r["seed"]),
        )
        for optimizer, rule in sorted(named)
    }


def write_report(found: Table, config: Config, settings: Settings, command: str) -> pathlib.Path:
    """report.md and its figures in the table's folder; returns the path."""
    folder, series = found.folder, curves(found.rows)
    reached = {name: [r for r in rows if r["steps_to_target"]] for name, rows in series.items()}
    fits = {
        name: hyperbola([r["batch"] for r in rows], [r["steps_to_target"] for r in rows])
        for name, rows in reached.items()
    }
    seeds = len({r["seed"] for r in found.rows})
    lines = ["# Batch size: steps to a loss, and the gradient noise scale", "", *origin(config, command), ""]
    lines += _protocol(config, settings, seeds)
    if settings.target is not None:
        _steps_figure(folder / "steps_to_target.png", reached, fits)
        lines += ["", "![steps against batch](steps_to_target.png)", "", *_fit_table(fits)]
    _loss_figure(folder / "losses.png", folder, series, settings.target)
    _noise_figure(folder / "noise_scale.png", folder, series)
    lines += ["", "![held-out loss against examples](losses.png)", ""]
    lines += ["![gradient noise scale against examples](noise_scale.png)", "", *_noise_words(found.rows, fits, seeds)]
    lines += ["", "## Runs", "", *_runs(found.rows), *_diverged_words(found.rows)]
    path = folder / "report.md"
    atomic.write_text(path, narrow("\n".join(lines) + "\n"))
    return path


def _protocol(config: Config, settings: Settings, seeds: int) -> list[str]:
    goal = (
        f"to a held-out loss of {settings.target:g}, or gives up at the commands' --examples"
        if settings.target is not None
        else f"over {settings.examples:,} examples"
    )
    k = config.data.targets_per_source
    return [
        f"Every run trains {goal}. The held-out loss is the training loss over {config.eval.pairs} pairs of people that no "
        "run trains on, with the same noise and timesteps every time, of the raw weights; it is taken at steps in the "
        "ratio 1.1, and the step at which it passes the target is read between two of them. The gradient of a batch is "
        f"accumulated over micro-batches of {settings.micro} examples"
        + (f" ({k} targets of each source)" if k > 1 else "")
        + f". Learning rate at the reference batch of {settings.reference}: {config.optim.learning_rate:g} for AdamW, "
        f"{settings.lamb_rate:g} for LAMB; rules: none (the same), sqrt and linear in the batch. Warm-up: "
        f"{config.optim.warmup_steps} steps at the reference batch, as many examples at the others"
        + (", then a constant rate." if settings.target is not None else "."),
        "",
        "**One seed**: differences between runs may be luck, and no interval below holds the spread between seeds."
        if seeds == 1
        else f"{seeds} seeds: each another initialisation, order and noise, over the same people.",
    ]


def _fit_table(fits: Mapping[str, Hyperbola | None]) -> list[str]:
    good, bad = {name: fit for name, fit in fits.items() if fit}, [name for name, fit in fits.items() if not fit]
    if not good:
        return ["No curve reached the target at three or more batch sizes: nothing was fitted."]
    return [
        "Fitted (lines): steps = S_min (1 + B_crit / B), least squares in log steps. B_crit is the batch at which the "
        "steps are twice the fewest possible. 95 % intervals from the residuals of the fit.",
        "",
        *table(
            {
                "curve": list(good),
                "batch sizes": [f.points for f in good.values()],
                "S_min (steps)": [f.least.value for f in good.values()],
                "95 %": [interval(f.least.low, f.least.high) for f in good.values()],
                "B_crit (examples)": [f.critical.value for f in good.values()],
                "95 % ": [interval(f.critical.low, f.critical.high) for f in good.values()],
            }
        ),
        *(["", f"Not fitted, for want of three batch sizes that reached the target: {', '.join(bad)}."] if bad else []),
    ]


def _noise_words(rows: Sequence[Row], fits: Mapping[str, Hyperbola | None], seeds: int) -> list[str]:
    scales = [r["noise_scale"] for r in rows if r["noise_scale"]]
    lines = [
        "The gradient noise scale B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018), from the squared norms of the "
        "micro-batches' gradients and of their mean, before clipping; both moments are averaged over steps, then divided. "
        "Bars: 95 % by bootstrap over blocks of steps; points that this does not bound from above are left out.",
    ]
    if scales:
        low, high = min(scales), max(scales)
        lines[0] += f" Over the last half of each run it lies between {number(low)} and {number(high)} examples"
        lines[0] += f", {number(math.exp(np.mean(np.log(scales))))} in the geometric mean over runs."
    critical = [f.critical for f in fits.values() if f]
    if scales and critical:
        least, most = min(c.value for c in critical), max(c.value for c in critical)
        lines += [
            "",
            f"The hyperbolas put B_crit at {number(least)}"
            + (f" to {number(most)}" if most > least else "")
            + " examples. The theory's two numbers agree only for plain SGD with the best rate at each batch size; here "
            "the rate follows a rule, and the optimizer rescales the gradient, so an agreement within a small factor is "
            "all that can be asked.",
        ]
    return lines


def _runs(rows: Sequence[Row]) -> list[str]:
    shown = sorted(rows, key=lambda r: (r["optimizer"], r["rule"], r["batch"], r["seed"]))
    return table(
        {
            "run": [r["name"] for r in shown],
            "batch": [r["batch"] for r in shown],
            "rate": [f"{r['learning_rate']:.3g}" for r in shown],
            "steps to target": [
                f"diverged at {r['steps']}" if r.get("diverged") else r["steps_to_target"] or "not reached"
                for r in shown
            ],
            "examples to target": [r["examples_to_target"] for r in shown],
            "best loss": [f"{r['best_loss']:.4f}" if r["best_loss"] else "-" for r in shown],
            "noise scale": [r["noise_scale"] for r in shown],
            "95 %": [interval(r["noise_scale_low"], r["noise_scale_high"]) for r in shown],
            "s a step": [r["seconds_per_step"] for r in shown],
        }
    )


def _diverged_words(rows: Sequence[Row]) -> list[str]:
    names = [f"{r['name']} (step {r['steps']})" for r in rows if r.get("diverged")]
    if not names:
        return []
    return ["", f"Diverged, and so without steps to the target: {', '.join(names)}. These count in no fit."]


def _steps_figure(path: pathlib.Path, reached: Mapping[str, list[Row]], fits: Mapping[str, Hyperbola | None]) -> None:
    batches = sorted({r["batch"] for rows in reached.values() for r in rows})
    with plots.figure(path, x="batch (examples)", y="steps to the target loss") as axis:
        for i, (name, rows) in enumerate(reached.items()):
            if not rows:
                continue
            axis.plot([r["batch"] for r in rows], [r["steps_to_target"] for r in rows], ls="", **plots.style(i))
            label = name
            if fit := fits[name]:
                line = np.geomspace(batches[0], batches[-1], 100)
                axis.plot(line, fit.steps(line), color=plots.style(i)["color"])
                label += f": B_crit {number(fit.critical.value, 2)}"
            axis.plot([], [], label=label, **plots.style(i))
        if batches:
            plots.doubling(axis, batches)
        plots.decades(axis)


def _loss_figure(
    path: pathlib.Path, folder: pathlib.Path, series: Mapping[str, list[Row]], target: float | None
) -> None:
    batches = sorted({r["batch"] for rows in series.values() for r in rows})
    colours = dict(zip(batches, plots.shades(len(batches)), strict=True))
    with plots.figure(path, x="examples", y="held-out loss", panels=len(series), legend="beside") as axes:
        for axis, (name, rows) in zip(axes if len(series) > 1 else [axes], series.items(), strict=True):
            for row in rows:
                seen = evaluations(folder / "runs" / row["name"])
                if not seen:  # it diverged before the first one
                    continue
                steps, losses = zip(*seen, strict=True)
                label = f"batch {row['batch']}" if row["seed"] == 0 else None
                axis.plot(np.multiply(steps, row["batch"]), losses, color=colours[row["batch"]], label=label)
            if target is not None:
                axis.axhline(target, color="#555555", lw=0.8, ls="--")
            axis.set_title(name, fontsize=9)
            plots.decades(axis)
            plots.decades(axis, "x", (1.0, 3.0))


def _noise_figure(path: pathlib.Path, folder: pathlib.Path, series: Mapping[str, list[Row]]) -> None:
    batches = sorted({r["batch"] for rows in series.values() for r in rows})
    colours = dict(zip(batches, plots.shades(len(batches)), strict=True))
    y = "gradient noise scale (examples)"
    with plots.figure(path, x="examples seen", y=y, panels=len(series), legend="beside") as axes:
        for axis, (name, rows) in zip(axes if len(series) > 1 else [axes], series.items(), strict=True):
            for row in rows:
                steps, signal, noise = step_moments(folder / "runs" / row["name"])
                edges = np.geomspace(FEWEST, max(steps[-1], FEWEST) + 1, WINDOWS + 1) if len(steps) else []
                points = []
                for low, high in itertools.pairwise(edges):
                    inside = (steps >= low) & (steps < high)
                    if inside.sum() >= FEWEST:
                        found = noise_estimate(signal[inside], noise[inside])
                        if found.value > 0 and found.low > 0 and found.high < LOOSE * found.value:
                            points.append((row["batch"] * math.sqrt(low * high), found.value, found.low, found.high))
                if points:
                    at, value, low, high = np.array(points).T
                    label = f"batch {row['batch']}" if row["seed"] == 0 else None
                    axis.errorbar(
                        at, value, [value - np.minimum(low, value), np.maximum(high, value) - value],
                        color=colours[row["batch"]], marker="o", ms=3, lw=1, elinewidth=0.7, label=label,
                    )  # fmt: skip
            axis.set_title(name, fontsize=9)
            plots.decades(axis)
            plots.decades(axis, "x", (1.0, 3.0))
