"""The other papers' methods on drawn people, from nothing: trains the stages one after the other and judges them. Writes JSON.

    python experiments/methods.py --scratch=runs/methods [--only=ipf,fpdm] [--steps=N] [--out=experiments/results/methods.json]

ipf, then fpdm on what it exports, stage2_only (fpdm without it), imagpose, no_cva (imagpose without attention among its tiles).
Stopped anywhere, the same command goes on where it was. --steps: another number of steps for all, to try the program out; figures
of so few say nothing, and the file says so. Each run takes one core: hours in all; not run at full length yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from truepose_jax.evaluate.judge import judge
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.runtime.atomic import write_text
from truepose_jax.runtime.cli import Parser, enable_compilation_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {
    "ipf": "configs/synthetic_fpdm.py:ipf",
    "fpdm": "configs/synthetic_fpdm.py:fpdm",
    "stage2_only": "configs/synthetic_fpdm.py:stage2_only",
    "imagpose": "configs/synthetic_imagpose.py",
    "no_cva": "configs/synthetic_imagpose.py:no_cva",
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="for the runs")
    parser.add_argument("--only", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--steps", type=int, help="of every run, in place of the configurations'")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "methods.json")
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
    words = [f"--config={RUNS[name]}", f"--workdir={workdir}"]
    if flags.steps:
        words += [f"--config.total_steps={flags.steps}", f"--config.checkpoint.every={flags.steps}"]
        words += [f"--config.eval.every={flags.steps}"]
    if name == "fpdm":
        words.append(f"--config.model.ipf.path={first_stage(flags)}")
    call("truepose_jax.train", *words)
    return workdir


def first_stage(flags: argparse.Namespace) -> pathlib.Path:
    """What the second stage reads of the first, exported where it is not there yet."""
    folder = (flags.scratch / "ipf_export").resolve()
    if not folder.exists():
        call("truepose_jax.convert", "to-torch", f"--workdir={flags.scratch / 'ipf'}", f"--dst={folder}")
    return folder


def found(name: str, workdir: pathlib.Path) -> dict[str, Any]:
    """The last evaluation of the run and, where it makes pictures, the judge's verdict by kind of clothes."""
    last = (workdir / "eval.jsonl").read_text().splitlines()[-1]
    row = {"steps": json.loads(last)["step"], "eval": json.loads(last)["eval"]}
    if name != "ipf":
        judged = judge(Pipeline.load(workdir))
        row["judged"] = {kind: dataclasses.asdict(each.verdict) for kind, each in judged.items()}
    return row


def main(argv: list[str]) -> int:
    flags = parse(argv)
    enable_compilation_cache()
    report = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    for name in flags.wanted:
        row = found(name, train(name, flags))
        report[name] = row | ({"note": f"a trial of {flags.steps} steps"} if flags.steps else {})
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(flags.out, json.dumps(report, indent=1) + "\n")
        print(f"{name}: written to {flags.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
