"""The other papers' methods on drawn people, from nothing: trains the stages one after the other and judges them.

    python experiments/methods.py --scratch=runs/methods [--only=ipf,fpdm] [--steps=N] [--out=experiments/results/papers.json]

ipf, then fpdm on what it exports, stage2_only (fpdm without it), imagpose, and its ablations at equal terms, full and B0 to B4.
Writes JSON, and beside it a table and sheets. Stopped anywhere, the same command goes on where it was. --steps: another number
of steps for all, which the file says. --judge: train nothing, judge the runs as they are. It ends with 1 where ipf, fpdm or
imagpose misses a threshold; of the others is told what they reach.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
from typing import Any

from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.tables import machine
from configs.imagpose_deepfashion_512 import ABLATIONS
from experiments.methods_judge import canvases, first_stage, pictures, thresholds
from input_pipeline.atomic import write_text
from truepose_jax.inference.pipeline import Pipeline, Run
from truepose_jax.runtime.cli import Parser, enable_compilation_cache
from truepose_jax.runtime.markdown import narrow, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {
    "ipf": "configs/synthetic_fpdm.py:ipf",
    "fpdm": "configs/synthetic_fpdm.py:fpdm",
    "stage2_only": "configs/synthetic_fpdm.py:stage2_only",
    "imagpose": "configs/synthetic_imagpose.py",
    **{name: f"configs/synthetic_imagpose.py:{name}" for name in ("full", *ABLATIONS)},
}
PROVED = ("ipf", "fpdm", "imagpose")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="for the runs")
    parser.add_argument("--only", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--steps", type=int, help="of every run, in place of the configurations'")
    parser.add_argument("--judge", action="store_true", help="train nothing: the runs as they are")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "papers.json")
    flags = parser.parse_args(argv)
    flags.wanted = list(RUNS) if flags.only is None else flags.only.split(",")
    if unknown := [name for name in flags.wanted if name not in RUNS]:
        parser.error(f"--only: no run '{unknown[0]}'; known: {', '.join(RUNS)}")
    return flags


def call(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)


def train(name: str, flags: argparse.Namespace) -> pathlib.Path:
    """The run's folder, trained to its end."""
    workdir = (flags.scratch / name).resolve()
    if flags.judge:
        return workdir
    words = [f"--config={RUNS[name]}", f"--workdir={workdir}"]
    if flags.steps:
        words += [f"--config.total_steps={flags.steps}", f"--config.eval.every={flags.steps}"]
    if name == "fpdm":
        words.append(f"--config.model.ipf.path={exported(flags)}")
    call("truepose_jax.train", *words)
    return workdir


def exported(flags: argparse.Namespace) -> pathlib.Path:
    """What the second stage reads of the first, exported where it is not there yet."""
    folder = (flags.scratch / "ipf_export").resolve()
    if not folder.exists():
        call("truepose_jax.convert", "to-torch", f"--workdir={flags.scratch / 'ipf'}", f"--dst={folder}")
    return folder


def found(name: str, workdir: pathlib.Path, sheet: pathlib.Path) -> dict[str, Any]:
    """The run's last evaluation, where it came to one; what is measured of it; whether thresholds are met. Draws the sheet of
    pictures."""
    run, evaluations = Run.open(workdir), workdir / "eval.jsonl"
    last = json.loads(evaluations.read_text().splitlines()[-1])["eval"] if evaluations.exists() else {}
    row = {"date": datetime.date.today().isoformat(), "machine": machine(), "steps": run.step, "eval": last}
    if name == "ipf":
        row["galleries"] = first_stage(run)
    else:
        kind, measure = ("canvases", canvases) if "imagpose" in RUNS[name] else ("judged", pictures)
        row[kind], drawn = measure(Pipeline.load(workdir))
        Image.fromarray(drawn).save(sheet)
    return row | {"thresholds": thresholds(name, row)}


def page(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Methods of the other papers on drawn people",
        "",
        "`python experiments/methods.py --scratch=runs/methods`",
        "",
    ]
    ablations = {name: report[name] for name in ("full", *ABLATIONS) if name in report}
    for name, row in report.items():
        if name in ablations:
            continue
        lines += [f"## {name}", ""]
        note = f" {row['note']}." if "note" in row else ""
        lines += [f"{RUNS[name]}, {row['steps']} steps, {row['date']}, {row['machine']['cpu']}.{note}", ""]
        for text, met in row["thresholds"].items():
            said = ("met: " if met else "MISSED: ") if name in PROVED else ""
            lines.append(f"- {said}{text}")
        costs = {key.removeprefix("swap_cost_"): cost for key, cost in row["eval"].items() if "swap_cost" in key}
        if costs:
            each = ", ".join(f"{swap} {cost:.2f}" for swap, cost in costs.items())
            lines.append(f"- swaps, dB lost inside the person of the run's own evaluation: {each}")
        lines.append("")
        for kind, each in row.get("judged", {}).items():
            regions = ("face", "clothes", "person", "whole")
            rows = [[which, *(f"{psnr[region]:.2f}" for region in regions)] for which, psnr in each["psnr"].items()]
            lines += [*table((f"PSNR, {kind} clothes", *regions), rows), ""]
        if "canvases" in row:
            places = [(region, side) for side in ("back", "front") for region in ("clothes", "person")]
            found = row["canvases"]["scenarios"].items()
            rows = [[which, *(f"{sides[side][region]:.2f}" for region, side in places)] for which, sides in found]
            lines += table(("PSNR", *map(", ".join, places)), rows)
        lines.append("")
    return narrow("\n".join(lines + ablation_table(ablations)).rstrip() + "\n")


def ablation_table(rows: dict[str, Any]) -> list[str]:
    """IMAGPose with parts left out, at equal terms: dB inside the clothes, and what a second source gains in a back view's."""
    if not rows:
        return []
    lines = [
        "## imagpose's parts", "",
        f"{min(row['steps'] for row in rows.values())} steps each, one seed; PSNR of clothes.", "",
    ]  # fmt: skip
    heads = ("", "CVA, texture, given tiles", "T1, front", "T3, front", "T3, back", "a second photo of the back; of the front")
    cells = []
    for name, row in rows.items():
        left_in = {"cva": True, "texture": True, "ilc_image": True} | ABLATIONS.get(name, {})
        parts = ", ".join("yes" if there else "no" for there in left_in.values())
        scenarios, gains = row["canvases"]["scenarios"], row["canvases"]["second_source_gain"]
        shown = (scenarios[which][side]["clothes"] for which, side in (("T1", "front"), ("T3", "front"), ("T3", "back")))
        gained = f"{gains['other side']:+.2f}; {gains['same side']:+.2f}"
        cells.append([name, parts, *(f"{cell:.2f}" for cell in shown), gained])
    return [*lines, *table(heads, cells)]


def main(argv: list[str]) -> int:
    flags = parse(argv)
    enable_compilation_cache()
    report = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    for name in flags.wanted:
        row = found(name, train(name, flags), flags.out.with_name(f"{flags.out.stem}_{name}.png"))
        report[name] = row | (
            {"note": f"{row['steps']} steps, not the configuration's"} if flags.steps or flags.judge else {}
        )
        write_text(flags.out, json.dumps(report, indent=1) + "\n")
        write_text(flags.out.with_suffix(".md"), page(report))
        print(f"{name}: written to {flags.out}", flush=True)
    return 0 if all(met for name in PROVED if name in report for met in report[name]["thresholds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
