"""How many steps fit into a time: told by the rate of a run's first steps, and kept for its next start."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from input_pipeline import atomic, files
from truepose_jax.training.checkpoint import CheckpointError, has_steps

FILE = "time_budget.json"
"""In the workdir: minutes, steps_per_second, total_steps."""

SKIPPED, TIMED = 3, 20
"""Steps that go by first (compilation), and steps whose rate is measured."""


class TimeBudget:
    """Chooses total_steps so that training ends `minutes` after this was made, set-up and compilation included."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self._minutes, self._clock = minutes, clock
        self._end = clock() + 60 * minutes
        self._seen, self._since = 0, 0.0

    def steps(self, step: int, result: Any) -> tuple[int, float] | None:
        """Call it after every step. (total_steps, steps a second) once they are known, None before. result: of the step, for
        which it waits where it measures. Where no time is left, as many steps more as were measured."""
        self._seen += 1
        if self._seen == SKIPPED:
            jax.block_until_ready(result)
            self._since = self._clock()
        if self._seen < SKIPPED + TIMED:
            return None
        jax.block_until_ready(result)
        now = self._clock()
        rate = TIMED / max(now - self._since, 1e-6)
        return step + max(int(rate * (self._end - now)), TIMED), rate

    def keep(self, workdir: str | os.PathLike[str], total_steps: int, rate: float) -> None:
        """Writes them for the run's next start. Raises CheckpointError."""
        record = {"minutes": self._minutes, "steps_per_second": rate, "total_steps": total_steps}
        path = Path(workdir) / FILE
        try:
            atomic.write_text(path, json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {path} ({error.strerror or error})") from error


def kept_steps(workdir: str | os.PathLike[str]) -> int | None:
    """total_steps that were chosen before in this workdir; None where none were, or no step of them was saved. Raises
    CheckpointError."""
    path = Path(workdir) / FILE
    if not (has_steps(workdir) and path.exists()):
        return None
    advice = "remove it to have the number of steps chosen anew"
    return files.read_json(path, {"total_steps": int}, what="a time budget", advice=advice, error=CheckpointError)[
        "total_steps"
    ]
