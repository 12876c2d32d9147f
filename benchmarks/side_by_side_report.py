"""The table of what side_by_side.py has measured, for people."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.side_by_side_case import CHECKED_STEPS, Case, batch_of, method_of, sampling_keys
from benchmarks.side_by_side_forms import OURS
from truepose_jax.kernels.attention.api import default_implementation
from truepose_jax.runtime.markdown import table
from truepose_jax.sampling.sampler import Sampler, Sampling
from truepose_jax.training.flops import counted, flops_of, step_flops, utilisation
from truepose_jax.training.step import Trainer

MIB = 1 << 20
COLUMNS = (
    "form", "seconds", "images/s", "ours / form", "CPU s", "memory MiB", "before timing", "program's own", "compile s", "of peak",
    "difference",
)  # fmt: skip


def summary(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def ratio(row: Mapping[str, Any], form: str) -> dict[str, float]:
    """Ours over the form's time in the same round, so that a load that comes and goes weighs on both: median and quartiles.
    Of forms that were timed apart the ratio of medians alone."""
    ours, theirs = np.array(row[form]["ours_times"]), np.array(row[form]["times"])
    return (
        summary(ours / theirs) if not row["about"]["apart"] else {"median": float(np.median(ours) / np.median(theirs))}
    )


def report(name: str, title: str, rows: Mapping[str, Any]) -> str:
    lines = [
        f"# {title}",
        "",
        f"`python benchmarks/{name}.py`. Seconds of a call: median [quartiles]. A round is one call of ours and one of the form; "
        "ours / form: median [quartiles] over the form's rounds (but where `apart` is said: then of the medians). CPU s: "
        "processor seconds of a call, which other programs disturb less. memory: on a CPU the most that the form's process held "
        "while it was timed. `before timing`: what it held when that began: weights, state, inputs, and what building and "
        "compiling left in the process and the system did not get back; memory counts all of that too. `program's own`: what "
        "ours' compiled program holds by XLA's account, its arguments and results included, the compiler's leavings not. On GPUs "
        "memory is the peer's allocator at its peak, and of ours the program's own.",
    ]
    for case_name, row in rows.items():
        about = row["about"]
        case, machine = Case.of(about["case"]), about["machine"]
        per_call = call_flops(case)
        device = row[OURS].get("device", "")
        lines += [
            "",
            f"## {case_name}",
            "",
            f"{about['when']}, {_of_commit(about)}{machine['cores']} cores of {machine['cpu']}, jax {machine['jax']}, torch "
            f"{machine['torch']}; {device}, {case.threads} threads, load {about['load_before']} before and "
            f"{about['load_after']} after"
            + (", apart" if about["apart"] else "")
            + f"; {per_call / 1e9:,.1f} GFLOP a call.",
            "",
            *table(
                COLUMNS,
                [
                    [form, found["failed"], *[""] * (len(COLUMNS) - 2)]
                    if "failed" in found
                    else _cells(form, found, row, case, per_call, device, machine.get("product_flops"))
                    for form, found in row.items()
                    if form != "about"
                ],
            ),
        ]
    return "\n".join([*lines, "", _note(rows), ""])


def _of_commit(found: Mapping[str, Any]) -> str:
    return f"commit {found['commit']}, " if found.get("commit") else ""


def _cells(form: str, found, row, case: Case, per_call: float, device: str, product: float | None) -> tuple[str, ...]:
    share = utilisation(per_call, found["median"], device)
    of_cpu = f"({per_call / found['median'] / product:.0%})" if product and case.device == "cpu" else "-"
    compiling = found.get("trace_seconds", 0) + found.get("compile_seconds", 0)
    if "compiled" in form or "flex" in form:
        calls = CHECKED_STEPS if case.task == "train" else 1
        compiling = max(found["first_seconds"] - calls * found["median"], 0.0)
    earlier = [found.get(name) for name in ("commit", "when")] if form != OURS and "when" in found else None
    of_row = [row["about"].get(name) for name in ("commit", "when")]
    return (
        form if earlier in (None, of_row) else f"{form} ({_of_commit(found)}{found['when']})",
        _spread(found),
        f"{case.batch / found['median']:.3g}",
        "" if form == OURS else _spread(ratio(row, form)),
        f"{np.median(found['cpu_times']):.3g}",
        *(_mib(found.get(name)) for name in ("peak_bytes", "resident_bytes", "program_bytes")),
        f"{compiling:.0f}" if compiling else "-",
        f"{share:.1%}" if share is not None else of_cpu,
        "" if form == OURS else f"{found['difference']:.0e}",
    )


def _spread(found: Mapping[str, float]) -> str:
    quartiles = f" [{found['low']:.3g} {found['high']:.3g}]" if "low" in found else ""
    return f"{found['median']:.3g}{quartiles}"


def _mib(found: int | None) -> str:
    return "-" if found is None else f"{found / MIB:,.0f}"


def _note(rows: Mapping[str, Any]) -> str:
    rates = sorted({f"{row['about']['machine'].get('product_flops', 0) / 1e9:.0f}" for row in rows.values()} - {"0"})
    return (
        "of peak: model FLOPs (truepose_jax/training/flops.py) over the chip's dense bf16 peak; in brackets, on a CPU, over "
        f"{' and '.join(rates) or '-'} GFLOP/s, which a float32 product of NumPy reached there. compile: ours traces and "
        "compiles before the first call; a compiled peer's first calls less as many later ones."
    )


@functools.cache
def call_flops(case: Case) -> int:
    """Model FLOPs of a timed call."""
    config, method = counted(case.config()), method_of(case)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(case).items()}
    with default_implementation("reference"):
        if case.task == "train":
            return step_flops(Trainer(config, method), {}, batch)
        sampler = Sampler(
            method, config.diffusion.schedule, config.diffusion.spacing, Sampling(case.steps, case.guidance)
        )
        params = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))
        keys = jax.eval_shape(lambda: sampling_keys(case))
        return flops_of(jax.make_jaxpr(sampler.sample)(params, {}, batch, keys).jaxpr)
