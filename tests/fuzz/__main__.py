"""python -m tests.fuzz [--minutes=M] [--seed=N] [--only=TARGET] [--out=FILE.md]: bad inputs for so long; a table."""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time

from tests.fuzz.outcomes import ACCEPTED, GOOD, OUTCOMES, outcome
from tests.fuzz.targets import TARGETS, call, setting, write_good, write_records

SETTING_SHARE = 3.0
Counts = dict[str, collections.Counter]


def fuzz(
    seconds: float, seed: int, only: str = "", without: str = "(nothing)", say=None
) -> tuple[Counts, list[tuple[str, str, str, str]]]:
    """({target: how often each outcome}, [(outcome, target, what was bad, what was said)] of those that are not GOOD). only,
    without: what names of targets hold, and do not.

    One seed gives one order of inputs; how far it comes depends on the machine.
    """
    chosen = [target for target in TARGETS if only in target.name and without not in target.name]
    counts: Counts = collections.defaultdict(collections.Counter)
    wrong = []
    with tempfile.TemporaryDirectory(prefix="truepose_fuzz_") as folder:
        root = pathlib.Path(folder)
        good = root / "good"
        write_good(good)
        if any("records" in target.name for target in chosen):
            # Another process: those that fork must have no threads.
            writer = multiprocessing.get_context("spawn").Process(target=write_records, args=(good,))
            writer.start()
            writer.join()
            assert writer.exitcode == 0
        for target in chosen:
            found, said = outcome(call(target, good, root / "case", None))
            assert found == ACCEPTED, f"{target.name}: what is good is not taken: {said}"
        rng = random.Random(seed)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            places = [*chosen, None] if only in "setting" else chosen
            weights = [SETTING_SHARE if target is None else target.share for target in places]
            (target,) = rng.choices(places, weights)
            made = setting(good, rng) if target is None else call(target, good, root / "case", rng)
            found, said = outcome(made)
            counts[made.target][found] += 1
            if found not in GOOD:
                wrong.append((found, made.target, made.what, said))
                if say:
                    say(f"{found}: {made.target}: {made.what}\n    {said}")
    return counts, wrong


def table(counts: Counts) -> str:
    """Markdown: a row a target, a column an outcome."""
    head = ["input", *OUTCOMES]
    rows = [[name, *(f"{found[o]:,}" for o in OUTCOMES)] for name, found in sorted(counts.items())]
    total = sum(counts.values(), collections.Counter())
    rows.append(["all", *(f"{total[o]:,}" for o in OUTCOMES)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--without", default="(nothing)", help="and does not hold this")
    parser.add_argument("--out", type=pathlib.Path)
    flags = parser.parse_args()
    print(f"seed {flags.seed}", flush=True)
    counts, wrong = fuzz(60 * flags.minutes, flags.seed, flags.only, flags.without, say=lambda text: print(text, flush=True))
    found = table(counts)
    print(found)
    if flags.out:
        total = sum(sum(each.values()) for each in counts.values())
        title = f"# {total:,} bad inputs in {flags.minutes:g} minutes, seed {flags.seed}"
        how = "`python -m tests.fuzz`; \"accepted\" are changes that leave the input good, or are warned of."
        flags.out.write_text(f"{title}\n\n{how}\n\n{found}")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
