"""The paper's ablations on synthetic people: five variants, three seeds, one step budget. Writes JSON, Markdown, a sheet.

    python experiments/ablation.py --scratch=runs/ablation [--out=experiments/results] [--steps=600] [--seeds=3] [--jobs=2]
    python experiments/ablation.py --scratch=runs/ablation --recipe       without each thing that is ours, one seed
    python experiments/ablation.py --scratch=runs/ablation --sweep        each reading we decided by ourselves, one seed
    python experiments/ablation.py --scratch=runs/ablation --variants=full,B1 --steps=2000      some of them, at another budget
    python experiments/ablation.py --scratch=runs/ablation --variants=full,B1 --patterns=solid  the same in plain clothes

First a small region encoder is trained (configs/synthetic_clip.py), then frozen; people are rendered into records with its
tokens; then every run trains, on one CPU core each, and is judged on held-out people. Stopped anywhere, the same command goes
on: finished rows stay, a run goes on from its checkpoint. The report is written anew after every run, from the rows there are.
Other budgets and clothes are reported in files of their own. Compiling a variant takes about 80 seconds of one core, beside its
600 steps.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import queue
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs.variants import ABLATIONS, READINGS, RECIPE, VARIANTS
from experiments import ablation_report
from experiments.ablation_runs import PATTERNS, ROOT, STEPS, Bench, prepare, run
from truepose_jax.runtime.cli import Parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="for runs, people and the encoder")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "experiments" / "results")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, help="of each variant (3; with --recipe and --sweep 1)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once, a core each")
    parser.add_argument("--patterns", choices=("solid", "mixed", "all"), default=PATTERNS, help="of the clothes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--recipe", action="store_true", help="in place of the ablations: what is ours, left out")
    which.add_argument("--sweep", action="store_true", help="in place of the ablations: the readings")
    which.add_argument("--variants", metavar="NAME,...", help=f"in place of all ablations: of {', '.join(VARIANTS)}")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report what is there")
    flags = parser.parse_args(argv)
    if flags.seeds is None:
        flags.seeds = 1 if flags.recipe or flags.sweep else 3
    for name in ("steps", "seeds", "jobs"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} is {getattr(flags, name)}; it must be 1 or more")
    asked = RECIPE if flags.recipe else READINGS if flags.sweep else ABLATIONS
    flags.variants = [*asked] if flags.variants is None else flags.variants.split(",")
    if unknown := [name for name in flags.variants if name not in VARIANTS]:
        parser.error(f"--variants: no variant '{unknown[0]}'; known: {', '.join(VARIANTS)}")
    flags.bench = Bench(flags.scratch.resolve(), flags.steps, flags.patterns)
    # Seeds outside: after any number of runs the variants are compared on equal terms.
    flags.wanted = [(variant, seed) for seed in range(flags.seeds) for variant in flags.variants]
    if lost := ablation_report.would_lose(flags.bench, flags.out, [] if flags.report_only else flags.wanted):
        parser.error(f"{lost}, more than {flags.scratch} will have: name another --out, or the scratch that made it")
    return flags


def main(argv: list[str]) -> int:
    flags = parse(argv)
    bench, wanted = flags.bench, flags.wanted
    if not flags.report_only:
        prepare(bench)
        cores: queue.Queue[int] = queue.Queue()
        for core in sorted(os.sched_getaffinity(0))[: flags.jobs]:
            cores.put(core)

        def work(variant: str, seed: int) -> None:
            core = cores.get()
            try:
                run(bench, variant, seed, core)
            finally:
                cores.put(core)

        with ThreadPoolExecutor(flags.jobs) as pool:
            jobs = {pool.submit(work, *each): each for each in wanted}
            for job in tqdm.tqdm(as_completed(jobs), total=len(jobs), desc="runs", unit="run"):
                job.result()
                ablation_report.write(bench, flags.out)
    for path in ablation_report.write(bench, flags.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
