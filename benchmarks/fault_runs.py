"""The runs that faults.py disturbs: one start of a program, what it leaves, and the run that nobody disturbs."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from truepose_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent

STEPS, EVERY = 400, 10
SMALL = [
    "--config=configs/demo.py",
    f"--config.total_steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    "--config.checkpoint.keep=3",
    "--config.log_every=1",
    "--config.eval.every=100000",
    "--config.eval.pairs=2",
    "--config.eval.batch_size=2",
    "--config.eval.steps=2",
    "--config.batch_size=6",
    "--config.model.size=(32, 24)",
    "--config.model.unet.block_out_channels=(8,)",
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',)",
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',)",
    "--config.model.unet.attention_head_dim=(2,)",
    "--config.model.unet.norm_num_groups=4",
    "--config.data.synthetic.identities=6",
    "--config.data.synthetic.heldout_identities=2",
]
FALL_BACK = "--config.checkpoint.allow_fallback=true"
TIMEOUT = 600
"""Seconds that a run may take to get where it is waited for."""
LOOK = 0.005
"""Seconds between two looks at it."""


def environment(scratch: pathlib.Path) -> dict[str, str]:
    """Of every program: compiled quickly, and once for all of them."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_"))}
    return variables | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Run:
    """One start of a training program; what it says goes to files beside the workdir."""

    def __init__(
        self, workdir: pathlib.Path, *more: str, program: Sequence[str] = ("-m", "truepose_jax.train"), cold=False
    ):
        self.workdir, self.begun = workdir, time.monotonic()
        self._old = inode(workdir / "metrics.jsonl")
        count = len(list(workdir.parent.glob(f"{workdir.name}.*.out")))
        self.out, self.err = (workdir.parent / f"{workdir.name}.{count}.{kind}" for kind in ("out", "err"))
        variables = environment(workdir.parent) | ({"JAX_ENABLE_COMPILATION_CACHE": "false"} if cold else {})
        command = [sys.executable, *program, f"--workdir={workdir}", *SMALL, *more]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=err)

    def until(self, condition: Callable[[], object], what: str) -> None:
        for _ in range(int(TIMEOUT / LOOK)):  # not by the clock: somebody may pause both processes for a while
            if condition():
                return
            if self.process.poll() is not None:
                break
            time.sleep(LOOK)
        raise AssertionError(f"{self.workdir.name}: {what} never came; it said: {self.said()}")

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step, f"step {step}")

    def step(self) -> int:
        """The last step that this start has made, 0 before its first: it begins by cutting the metrics to its checkpoint."""
        return last_step(self.workdir) if inode(self.workdir / "metrics.jsonl") != self._old else 0

    def until_committed(self, step: int) -> None:
        self.until(lambda: step in committed(self.workdir), f"checkpoint {step}")

    def until_saving(self) -> None:
        self.until(lambda: self.step() and saving(self.workdir), "a save")

    def until_said(self, text: str) -> None:
        self.until(lambda: text in self.out.read_text(), f"'{text}'")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        for _ in range(int(TIMEOUT / LOOK)):
            if self.process.poll() is not None:
                return self.process.returncode
            time.sleep(LOOK)
        raise AssertionError(f"{self.workdir.name}: did not end; it said: {self.said()}")

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def resumed(self) -> int:
        """The step it went on from; 0: it began anew."""
        lines = [line for line in self.out.read_text().splitlines() if line.startswith("resuming from step")]
        return int(lines[-1].split()[-1]) if lines else 0

    def said(self) -> str:
        """The last line that is for people: of stderr without the bar, else of stdout."""
        for text in (self.err, self.out):
            lines = [line.split("\r")[-1].strip() for line in text.read_text(errors="replace").splitlines()]
            lines = [x for x in lines if x and not x.startswith(("train ", "W1", "I1", "E1", "W0", "I0", "E0", "["))]
            if lines:
                return lines[-1].replace(str(self.workdir.parent), "RUNS")
        return ""

    def clean(self) -> bool:
        """No page of a traceback among what it said."""
        return "Traceback" not in self.err.read_text(errors="replace")


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def inode(path: pathlib.Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 20_000, 0))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0


def committed(workdir: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def saving(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


class Bench:
    """The folder of all runs, the undisturbed one among them, and the rows."""

    def __init__(self, scratch: pathlib.Path, kills: int):
        self.scratch, self.kills = scratch, kills
        self._straight: list[float] | None = None

    def workdir(self, name: str) -> pathlib.Path:
        for old in self.scratch.glob(f"{name}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        return self.scratch / name

    def straight(self) -> pathlib.Path:
        """The run that nobody disturbs."""
        workdir = self.scratch / "straight"
        if last_step(workdir) < STEPS or STEPS not in committed(workdir):
            run = Run(workdir)
            assert run.end() == 0, run.said()
        return workdir

    def same_losses(self, workdir: pathlib.Path, upto: int) -> bool:
        """Each step once, with the loss of the undisturbed run, bit for bit."""
        if self._straight is None:
            self._straight = [record["loss"] for record in metrics(self.straight())]
        mine = metrics(workdir)[:upto]
        return [r["step"] for r in mine] == list(range(1, upto + 1)) and [r["loss"] for r in mine] == self._straight[
            :upto
        ]

    def goes_on(self, workdir: pathlib.Path, step: int, *more: str) -> tuple[bool, int]:
        """Starts again: (does it go on from `step` with the right losses, committed steps lost)."""
        run = Run(workdir, *more)
        run.until_step(step + 3)
        run.kill()
        found = run.resumed()
        return found == step and self.same_losses(workdir, step + 3), max(step - found, 0)


def same_state(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Are parameters, EMA and optimizer state of the last step the same bits?"""
    stores = [Checkpoints(w, keep=1, every=1, read_only=True) for w in (one, other)]
    if any(store.latest_step() != STEPS for store in stores):
        return False
    pairs = [jax.tree.leaves(store.restore_part(part)) for part in ("params", "ema", "rest") for store in stores]
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for mine, theirs in zip(pairs[::2], pairs[1::2], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


def row(fault: str, survived: bool | int, said: str, *, injected: int = 1, lost: int = 0, **detail: object) -> dict:
    said = re.sub(r"\(process \d+ on [^)]*\)", "(process N on HOST)", said)
    return {"fault": fault, "injected": injected, "survived": int(survived), "lost": lost, "said": said, "detail": detail}
