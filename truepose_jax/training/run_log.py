"""What a run says while it runs: metrics.jsonl, TensorBoard, the progress bar, pictures; the guard against
NaN.

workdir/metrics.jsonl              one object a step: step, loss, rates, time, ...; numbers of every block each log_every
workdir/eval.jsonl                 one object an evaluation
workdir/samples/NAME_0000500.png   pictures
workdir/tensorboard/               the same for TensorBoard
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image

from input_pipeline import atomic
from truepose_jax.config import ConfigError
from truepose_jax.metrics.psnr import LEAST_PIXELS
from truepose_jax.training import noise_scale
from truepose_jax.training.tensorboard import EventFile
from truepose_jax.training.tracker import Tracker

RATE_WINDOW = 50
"""Steps that the bar's rate and ETA are averaged over."""

INVALID_WINDOW = 200
"""Steps that unreadable examples are counted over."""

TRACED, FIRST_TRACED = 5, 10
"""Steps that Profiler traces, and the first of them, counted from the start: past compilation and the first reads."""

BINS = ("bin_sums", "bin_counts")
"""Metrics that are summed over the log window: loss and weight per timestep bin."""


class NonFinite(RuntimeError):
    """Too many steps in a row had a loss or gradients that were not finite; one line says since when and
    why."""


class CannotWrite(OSError):
    """A file of the workdir cannot be written, as on a full disk; one line."""


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise CannotWrite(f"cannot write in {folder} ({why}); free space there, or see its permissions") from error


def _plain(value: Any) -> Any:
    """A number or nested list of numbers for JSON; what is not finite becomes None."""
    value = np.asarray(value).tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_finite(value: Any) -> bool:
    return bool(np.all(np.isfinite(np.asarray(value, np.float64))))


def _why(name: str, value: Any) -> str:
    """A PSNR of a region is NaN where no picture shows enough of it."""
    return f" (no picture shows {LEAST_PIXELS} pixels of it)" if name.startswith("psnr_") and np.isnan(value) else ""


def _step_of(line: str) -> int | None:
    """The step that a line tells of; None where it is torn or of something else."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _cut_after(path: Path, step: int, most: int | None) -> None:
    """Drops lines after `step`, torn lines, repeated steps: what a killed run wrote past its checkpoint. Where that would be
    more than `most` steps, checkpoints were moved away or are damaged: the file is kept under another name, and said."""
    if not path.exists():
        return
    if most is not None and _last_step(path) > step + most:
        kept = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.stem}.before-{n}{path.suffix}")).exists())
        shutil.copy2(path, kept)
        logging.warning("%s tells of step %d, and this run goes on from %d; it is kept as %s", path, _last_step(path), step, kept)
    last = -1
    with atomic.replacing(path) as partial, path.open(errors="replace") as old, partial.open("w") as new:
        for line in old:
            found = _step_of(line)
            if found is not None and last < found <= step and line.endswith("\n"):
                new.write(line)
                last = found
        new.flush()
        os.fsync(new.fileno())


def _last_step(path: Path) -> int:
    with path.open(errors="replace") as file:
        return max((found for line in file if (found := _step_of(line)) is not None), default=-1)


def peak_device_bytes() -> int | None:
    """Most bytes that were in use on any local device; None where the backend does not count (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


class Profiler:
    """A profiler trace of TRACED steps in `folder`; of the last ones where fewer than that are left after FIRST_TRACED.

    `with Profiler(...) as trace: for step ...: trace.before(step); ...; trace.after(step, state)`. What is traced when the run
    ends earlier is written too, and said.
    """

    def __init__(self, folder: str, start_step: int, total_steps: int, *, say: Callable[[str], None]):
        """say: takes the line that tells what was written. Raises ConfigError where no step is left."""
        left = total_steps - start_step
        if left < 1:
            raise ConfigError(
                f"--profile: step {start_step} of config.total_steps {total_steps} is done, and no step is left to trace; "
                "raise config.total_steps"
            )
        first = start_step + max(min(FIRST_TRACED, left - TRACED + 1), 1)
        self.steps = range(first, min(first + TRACED, total_steps + 1))
        self._folder, self._say, self._begun, self._traced = folder, say, False, 0
        if left < FIRST_TRACED + TRACED - 1:
            logging.warning(
                "--profile: %d steps are left, too few to let %d go by; the trace is of steps %d to %d%s",
                left, FIRST_TRACED - 1, first, self.steps[-1], ", compilation among them" if first == start_step + 1 else "",
            )  # fmt: skip

    def before(self, step: int) -> None:
        if step == self.steps[0]:
            jax.profiler.start_trace(self._folder)
            self._begun = True

    def after(self, step: int, state: Any) -> None:
        if step in self.steps:
            self._traced += 1
        if step == self.steps[-1]:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._begun:
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first cause counts
                self._stop()
        elif not self._traced:
            logging.warning("--profile: the run ended before step %d, so nothing is traced", self.steps[0])

    def _stop(self) -> None:
        self._begun = False
        jax.profiler.stop_trace()
        self._say(f"wrote a trace of {self._traced} steps to {self._folder}")


class Monitor:
    """Writes each step's metrics one step late, so that the host never waits for the step just started.

    Call `flush` before saving a checkpoint: only then metrics.jsonl holds every step up to it, whatever
    happens next.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        start_step: int,
        log_every: int,
        is_writer: bool,
        quiet: bool = False,
        max_skips: int = 10,
        max_invalid: float = 1.0,
        parameter_paths: Sequence[str] = (),
        mfu_per_image_rate: float | None = None,
        checkpoint_every: int | None = None,
        tracker: Tracker | None = None,
    ):
        """start_step: steps done (0, or the restored checkpoint's). is_writer: process 0; the others only
        guard. quiet: nothing on the screen. max_skips: non-finite steps in a row that raise NonFinite.
        max_invalid: share of examples without weight (unreadable records) in the last INVALID_WINDOW steps
        above which ConfigError is raised. parameter_paths: names for the metric first_bad_parameter, in the order of
        jax.tree.leaves(params). mfu_per_image_rate: images a second times this are the MFU (truepose_jax.training.flops); None:
        it is not written. checkpoint_every: steps that a killed run may have written past its checkpoint; where the files tell
        of more, they are kept under other names (None: never). tracker: takes what TensorBoard takes; closed with the monitor."""
        self._mfu_per_image_rate = mfu_per_image_rate
        self._total, self._log_every, self._max_skips = total_steps, log_every, max_skips
        self._paths, self._is_writer, self._quiet = parameter_paths, is_writer, quiet
        self._max_invalid = max_invalid
        self._invalid: collections.deque[int] = collections.deque(maxlen=min(INVALID_WINDOW, max(total_steps, 1)))
        self._pending: tuple[int, Mapping[str, jax.Array], int] | None = None
        self._last_ready: float | None = None
        self._paused = 0.0
        self._durations: collections.deque[float] = collections.deque(maxlen=RATE_WINDOW)
        self._window: dict[str, Any] = {}
        self._noise = noise_scale.Running()
        self._bar = self._metrics = None
        self._sinks: list[EventFile | Tracker] = []
        self._folder = Path(workdir)
        if not is_writer:
            return
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "eval.jsonl"):
                _cut_after(self._folder / name, start_step, checkpoint_every)
            self._metrics = (self._folder / "metrics.jsonl").open("a", buffering=1)
            self._sinks.append(EventFile(self._folder / "tensorboard", start_step))
        if tracker is not None:
            self._sinks.append(tracker)
        if not quiet:
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                desc="train",
                dynamic_ncols=True,
                # In a log file each refresh is a line.
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def step(self, step: int, metrics: Mapping[str, jax.Array], examples: int) -> None:
        """Takes the metrics of `step`, still being computed; waits for those of the step before and writes
        them.

        examples: of the global batch. Raises NonFinite (see max_skips), on every process at the same step.
        """
        previous, self._pending = self._pending, (step, metrics, examples)
        self._write(previous)

    def last_step(self, total_steps: int) -> None:
        """The run ends there, and not where the monitor was told at first."""
        self._total = total_steps
        if self._bar is not None:
            self._bar.total = total_steps
            self._bar.refresh()

    def flush(self) -> None:
        """Waits for the step held back and writes it; files and TensorBoard are then complete."""
        previous, self._pending = self._pending, None
        self._write(previous)
        with _writing(self._folder):
            for sink in self._sinks:
                sink.flush()

    def close(self) -> None:
        """Flushes and closes. The monitor is of no use afterwards."""
        try:
            self.flush()
        finally:
            if self._bar is not None:
                self._bar.close()
            if self._metrics is not None:
                self._metrics.close()
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # The step held back may fail too; the first cause counts.
            self.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, sampling, saving) counts for no step's rate."""
        self.flush()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """One line in eval.jsonl and on the screen, one scalar each in TensorBoard and the tracker."""
        if not self._is_writer:
            return
        record: dict[str, Any] = {"step": step, "eval": {k: _plain(v) for k, v in results.items()}}
        bad = [name for name, value in results.items() if not _is_finite(value)]
        with _writing(self._folder):
            with (self._folder / "eval.jsonl").open("a") as file:
                file.write(json.dumps({**record, **({"nonfinite": bad} if bad else {}), "time": time.time()}) + "\n")
            for name, value in results.items():
                if np.ndim(value) == 0 and name not in bad:
                    self._scalar(f"eval/{name}", float(value), step)
        said = [f"{name} {float(value):.4g}{_why(name, value)}" for name, value in results.items() if np.ndim(value) == 0]
        self.say(f"step {step}: " + ", ".join(said))

    def evaluated(self, step: int) -> bool:
        """Is there an evaluation of `step` in eval.jsonl?"""
        path = self._folder / "eval.jsonl"
        return path.exists() and step in (_step_of(line) for line in path.read_text(errors="replace").splitlines())

    def image(self, step: int, name: str, picture: np.ndarray) -> Path | None:
        """workdir/samples/NAME_STEP.png of a uint8 [h w 3] picture, TensorBoard and the tracker. Returns the path."""
        if not self._is_writer:
            return None
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"image '{name}' is {picture.dtype}{list(picture.shape)}; expected uint8 [h, w, 3]")
        path = self._folder / "samples" / f"{name}_{step:07d}.png"
        with _writing(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.replacing(path) as partial:
                Image.fromarray(picture).save(partial, format="PNG")
            for sink in self._sinks:
                sink.image(name, picture, step)
        return path

    def say(self, text: str) -> None:
        """A line on standard output, above the bar."""
        if self._is_writer and not self._quiet:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _write(self, pending: tuple[int, Mapping[str, jax.Array], int] | None) -> None:
        if pending is None:
            return
        step, metrics, examples = pending
        values = jax.device_get(dict(metrics))
        if "valid" in values:
            values["invalid"] = examples - round(float(values["valid"]))
        seconds = self._duration()
        if self._is_writer:
            with _writing(self._folder):
                self._record(step, values, examples, seconds)
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(step, values), refresh=False)
            self._bar.update(step - self._bar.n)
        self._guard(step, values)
        self._guard_invalid(step, values.get("invalid", 0), examples)

    def _duration(self) -> float | None:
        """Seconds since the step before was ready; None for the first step, whose time is compilation."""
        now, before, paused = time.perf_counter(), self._last_ready, self._paused
        self._last_ready, self._paused = now, 0.0
        if before is None:
            return None
        seconds = max(now - before - paused, 1e-9)
        self._durations.append(seconds)
        return seconds

    def _record(self, step: int, values: Mapping[str, Any], examples: int, seconds: float | None) -> None:
        record: dict[str, Any] = {"step": step}
        logged = step % self._log_every == 0 or step == self._total
        # Numbers of every block fill the disk (0.4 GB in 425,000 steps of SD1.5's size), and each resume reads them all.
        shown = [name for name, value in values.items() if name not in BINS and (logged or np.ndim(value) == 0)]
        record.update({name: _plain(values[name]) for name in shown})
        record["steps_per_second"] = 1 / seconds if seconds else None
        record["examples_per_second"] = examples / seconds if seconds else None
        bad = [name for name, value in values.items() if name not in BINS and not _is_finite(value)]
        if bad:
            record["nonfinite"] = bad
        self._accumulate(values)
        if logged:
            record.update(self._close_window(examples))
            self._to_sinks(step, record)
        record["time"] = time.time()
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")

    def _accumulate(self, values: Mapping[str, Any]) -> None:
        self._noise.add(values)
        if "loss" in values and _is_finite(values["loss"]):
            self._window.setdefault("losses", []).append(float(values["loss"]))
        if all(name in values and _is_finite(values[name]) for name in BINS):
            for name in BINS:
                self._window[name] = self._window.get(name, 0.0) + np.asarray(values[name], np.float64)

    def _close_window(self, examples: int) -> dict[str, Any]:
        """Mean loss and mean loss per timestep bin (None: no sample) since the last call; the running noise scale;
        MFU of the last RATE_WINDOW steps; peak memory."""
        window, self._window = self._window, {}
        closed: dict[str, Any] = {}
        if window.get("losses"):
            closed["loss_mean"] = float(np.mean(window["losses"]))
        if "bin_sums" in window:
            pairs = zip(window["bin_sums"].tolist(), window["bin_counts"].tolist(), strict=True)
            closed["loss_bins"] = [total / count if count > 0 else None for total, count in pairs]
        noise = self._noise.estimate()
        if noise is not None:
            closed["noise_scale"] = noise
        if self._mfu_per_image_rate is not None and self._durations:
            closed["mfu"] = self._mfu_per_image_rate * examples * len(self._durations) / sum(self._durations)
        peak = peak_device_bytes()
        if peak is not None:
            closed["peak_device_bytes"] = peak
        return closed

    def _scalar(self, name: str, value: float, step: int) -> None:
        for sink in self._sinks:
            sink.scalar(name, value, step)

    def _to_sinks(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._scalar(f"train/{name}", value, step)
        for i, value in enumerate(record.get("loss_bins", ())):
            if value is not None:
                self._scalar(f"loss_bins/{i}", value, step)

    def _postfix(self, step: int, values: Mapping[str, Any]) -> str:
        """Rate, time to go, loss."""
        parts = []
        if self._durations:
            mean = sum(self._durations) / len(self._durations)
            rate = f"{1 / mean:.2f} step/s" if mean < 1 else f"{mean:.2f} s/step"
            parts += [rate, f"ETA {tqdm.tqdm.format_interval(mean * max(self._total - step, 0))}"]
        if "loss" in values:
            parts.append(f"loss {float(values['loss']):.4f}")
        if int(values.get("skipped", 0)):
            parts.append(f"skipped {int(values['skipped'])}")
        return " · ".join(parts)

    def _guard(self, step: int, values: Mapping[str, Any]) -> None:
        in_a_row = int(values.get("skips_in_a_row", 0))
        if int(values.get("skipped_now", 0)):
            cause = self._cause(values)
            self.say(f"step {step}: {cause}; parameters left alone ({in_a_row} in a row)")
            if in_a_row >= self._max_skips:
                first = step - in_a_row + 1
                raise NonFinite(
                    f"step {step}: {in_a_row} steps in a row were not finite (since step {first}; "
                    f"config.optim.max_skips is {self._max_skips}): {cause}"
                )

    def _guard_invalid(self, step: int, invalid: int, examples: int) -> None:
        """Counted on the device over all hosts, so every process stops at the same step."""
        self._invalid.append(invalid)
        lost, most = sum(self._invalid), self._max_invalid * examples * self._invalid.maxlen
        if lost > most:
            raise ConfigError(
                f"step {step}: {lost} examples of the last {len(self._invalid)} steps could not be read, and "
                f"config.data.max_invalid {self._max_invalid:g} allows {int(most)} in {self._invalid.maxlen}; "
                "the log names the records"
            )

    def _cause(self, values: Mapping[str, Any]) -> str:
        causes = []
        if "loss" in values and not _is_finite(values["loss"]):
            causes.append(f"the loss is {float(values['loss'])}")
            if "bin_sums" in values:
                sums = np.asarray(values["bin_sums"], np.float64)
                bins = np.flatnonzero(~np.isfinite(sums))
                if 0 < len(bins) < len(sums):
                    causes[-1] += f" (timestep bins {', '.join(map(str, bins))} of {len(sums)})"
        first = int(values.get("first_bad_parameter", -1))
        if first >= 0:
            name = self._paths[first] if first < len(self._paths) else f"number {first}"
            causes.append(f"the gradient is not finite, first at parameter {name}")
        elif "grad_norm" in values and not _is_finite(values["grad_norm"]):
            causes.append(f"the gradient's norm is {float(values['grad_norm'])} though every entry is finite")
        return ", ".join(causes) or "the step was skipped"
