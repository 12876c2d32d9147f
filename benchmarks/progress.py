"""What it costs to tell of the steps of one picture: sampled by the model that comes along with a callback and without, in turn.
Writes benchmarks/results/progress.json.

    python benchmarks/progress.py [--rounds=30] [--out=benchmarks/results]

Processor time of the whole process, which other programs on the machine lengthen less than the clock's; the median of the
rounds' ratios. Calls are as far apart as a step of an idle core makes them (SOON by the clock, a busy core's steps being longer).
Under 5 % is asked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.tables import machine
from input_pipeline.synthetic.people import SyntheticPeople
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.runtime.bundled import SHIPPED
from truepose_jax.runtime.cli import enable_compilation_cache
from truepose_jax.sampling import sampler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    flags = parser.parse_args()
    enable_compilation_cache()
    pipe = Pipeline.from_pretrained(SHIPPED)
    size = pipe.run.config.model.size
    people = SyntheticPeople(seed=5, split="heldout", identities=2, poses_per_identity=1, size=size)
    source, target = people.image(0), people.image(1)
    told, own = [], {"source_joints": source.joints, "labels": people.labels}

    def picture(callback=None) -> tuple[np.ndarray, float, float]:
        began, used = time.perf_counter(), time.process_time()
        made = pipe(source.image, source.parsing, target.joints, callback=callback, **own)
        return made, time.process_time() - used, time.perf_counter() - began

    callback = lambda done, steps: told.append(done)  # noqa: E731
    plain, with_it = picture()[0], picture(callback)[0]  # compiled
    assert np.array_equal(plain, with_it), "the same picture"
    used, seconds = zip(*(picture()[1:] for _ in range(5)), strict=True)
    sampler.SOON *= max(statistics.median(seconds) / statistics.median(used), 1.0)
    rounds = []
    for _ in range(flags.rounds):
        told.clear()
        rounds.append((picture()[1:], picture(callback)[1:]))
    cpu, clock = ([(a[i], b[i]) for a, b in rounds] for i in (0, 1))
    results = machine() | {
        "date": datetime.date.today().isoformat(),
        "rounds": flags.rounds,
        "calls_of_the_last_picture": len(told),
        "cpu_seconds": [statistics.median(column) for column in zip(*cpu, strict=True)],
        "seconds": [statistics.median(column) for column in zip(*clock, strict=True)],
        "cpu_ratio": statistics.median(b / a for a, b in cpu),
        "ratio": statistics.median(b / a for a, b in clock),
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "progress.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
