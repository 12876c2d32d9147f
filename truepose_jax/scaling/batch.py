"""The batch study: how many steps does each batch size take to the same loss?

Every run is one of `train`, at a constant rate after its warm-up, with the gradient noise
scale measured, and ends at the first held-out evaluation that reaches the target. Evaluations come at steps whose ratio
is EVALUATED_EVERY, so that every batch size is judged at the same relative resolution.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from truepose_jax.config import Config, ConfigError, checked
from truepose_jax.data.datasets import Dataset
from truepose_jax.methods.base import Trainable
from truepose_jax.scaling.fits import noise_estimate, steps_to
from truepose_jax.scaling.table import Row
from truepose_jax.train import DIVERGED, train
from truepose_jax.training import noise_scale
from truepose_jax.training.checkpoint import STOPPED
from truepose_jax.training.validation import EmbeddingEvaluator, Watch

RULES: dict[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "sqrt": math.sqrt,
    "linear": lambda ratio: ratio,
}
"""Learning rate over the reference batch's, by batch / reference batch."""

EVALUATED_EVERY = 1.1
SAVES = 20
"""Checkpoints of a run that takes all its steps: the steps between two are what a kill costs."""

LATE = 0.5
"""The noise scale of a run is that of this last part of its steps: it rises while the loss falls."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """target: held-out loss to reach, or None: to `examples` and no further. examples: the most that a run sees.
    micro: examples per micro-batch. reference: the batch size whose learning rate is the configuration's (lamb_rate for
    LAMB); its warm-up is the configuration's too, and other batch sizes warm up over as many examples."""

    target: float | None
    examples: int
    micro: int
    reference: int
    lamb_rate: float


@dataclasses.dataclass(frozen=True)
class Run:
    """rule "any": the reference batch, where all rules agree; it counts for each of them."""

    optimizer: str
    rule: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.rule}-b{self.batch:05d}-s{self.seed}"


def plan(batches: Sequence[int], curves: Sequence[tuple[str, str]], seeds: int, settings: Settings) -> list[Run]:
    """Every run once, in the order of the curves (optimizer, rule), largest batches first: they are the shortest."""
    found: dict[Run, None] = {}
    for seed in range(seeds):
        for optimizer, rule in curves:
            for batch in sorted(batches, reverse=True):
                found[Run(optimizer, "any" if batch == settings.reference else rule, batch, seed)] = None
    return list(found)


def curves_of(text: str) -> list[tuple[str, str]]:
    """'adamw/sqrt,lamb/none' -> [("adamw", "sqrt"), ("lamb", "none")]. Raises ConfigError."""
    found = []
    for part in text.split(","):
        optimizer, _, rule = part.strip().partition("/")
        if optimizer not in ("adamw", "lamb") or rule not in RULES:
            raise ConfigError(
                f"--curves holds {part.strip()!r}; each is adamw or lamb, a slash, and one of {', '.join(RULES)}"
            )
        found.append((optimizer, rule))
    return found


def config_of(run: Run, config: Config, settings: Settings) -> Config:
    """The configuration of one run. Raises ConfigError where the batch cannot be cut."""
    k = config.data.targets_per_source
    if settings.micro % k or run.batch % settings.micro or run.batch < 2 * settings.micro:
        raise ConfigError(
            f"batch {run.batch} cannot be cut: micro-batches are {settings.micro}, a multiple of targets_per_source {k} "
            "(--micro), and each batch must be 2 or more of them"
        )
    ratio = run.batch / settings.reference
    rate = settings.lamb_rate if run.optimizer == "lamb" else config.optim.learning_rate
    optim = dataclasses.replace(
        config.optim,
        name=run.optimizer,
        layout="tree" if run.optimizer == "lamb" else config.optim.layout,
        learning_rate=rate * (1.0 if run.rule == "any" else RULES[run.rule](ratio)),
        warmup_steps=math.ceil(config.optim.warmup_steps / ratio) if config.optim.warmup_steps else 0,
        schedule="constant" if settings.target is not None else config.optim.schedule,
        accumulation=run.batch // settings.micro,
        noise_scale="on",
        ema_decay=0.0,
    )
    steps = max(settings.examples // run.batch, 1)
    changed = dataclasses.replace(
        config,
        optim=optim,
        seed=config.seed + run.seed,
        batch_size=run.batch,
        total_steps=steps,
        checkpoint=dataclasses.replace(config.checkpoint, every=max(steps // SAVES, 1), keep=1, keep_every=0),
    )
    return checked(changed)


def again(run: Run, row: Row, config: Config, settings: Settings) -> bool:
    """It gave up, and may now take longer: it begins anew, for its checkpoint is gone. One that diverged would again."""
    gave_up = settings.target is not None and row["steps_to_target"] is None and not row.get("diverged")
    return gave_up and row["steps"] < config_of(run, config, settings).total_steps


def evaluated_steps(total: int) -> list[int]:
    """1, ... in the ratio EVALUATED_EVERY, to `total`."""
    found = {min(math.ceil(EVALUATED_EVERY**i), total) for i in range(math.ceil(math.log(total, EVALUATED_EVERY)) + 2)}
    return sorted(found)


class HeldOutLoss(EmbeddingEvaluator):
    """Of any method the mean loss over the evaluation's pairs, the same noise every time."""

    def __init__(self, config: Config, method: Trainable, dataset: Dataset, mesh: Mesh):
        super().__init__(config, method, dataset, mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        self._loss = jax.jit(lambda *inputs: (None, {"loss": method.loss(*inputs)[0]}), out_shardings=whole)

    def run(self, *arguments: Any) -> tuple[dict[str, float], None]:
        (loss,) = super().run(*arguments)[0].values()
        return {"heldout_loss": loss}, None


def row(run: Run, config: Config, settings: Settings, folder: pathlib.Path) -> Row | None:
    """Trains in folder/runs and judges; None: asked to stop, and saved. Goes on where the run's folder stands. A run that
    diverges gets its row too: nothing random is left in it, so that it would diverge again."""
    workdir = folder / "runs" / run.name
    wanted, target = config_of(run, config, settings), settings.target
    watch = Watch(
        make=HeldOutLoss,
        due=set(evaluated_steps(wanted.total_steps)).__contains__,
        enough=lambda results: reached(results["heldout_loss"], target),
    )
    code = 0
    if not any(reached(loss, target) for _, loss in evaluations(workdir)):  # killed before its row was written
        code = train(wanted, str(workdir), watch=watch, cache=str(folder / "cache"))
    if code == STOPPED:
        return None
    found = judged(run, wanted, settings, workdir, diverged=code == DIVERGED)
    shutil.rmtree(workdir / "checkpoints")  # the row and the logs stay
    return found


def reached(loss: float, target: float | None) -> bool:
    return target is not None and loss <= target


def evaluations(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """(step, held-out loss) so far."""
    path = workdir / "eval.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [(r["step"], math.inf if (x := r["eval"]["heldout_loss"]) is None else x) for r in records]


def step_moments(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(step, |G|^2, tr(Sigma)) of each logged step."""
    names = (noise_scale.SMALL_SQ, noise_scale.BIG_SQ, noise_scale.SMALL_BATCH, "valid")
    found = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if all(record.get(name) is not None for name in names) and not record["skipped_now"]:
            found.append([record["step"], *(record[name] for name in names)])
    columns = np.array(found, float).reshape(-1, 5).T
    return columns[0], *noise_scale.moments(*columns[1:])


def judged(run: Run, config: Config, settings: Settings, workdir: pathlib.Path, *, diverged: bool = False) -> Row:
    """The row of a finished run, from its logs. diverged: its steps end where too many in a row were not finite."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seen = evaluations(workdir)
    steps, losses = [step for step, _ in seen], [loss for _, loss in seen] or [math.inf]
    needed = None if settings.target is None or diverged else steps_to(settings.target, steps, losses)
    _, signal, noise = step_moments(workdir)
    late = slice(int(len(signal) * (1 - LATE)), None)
    noise_is = noise_estimate(signal[late], noise[late])
    rates = [line["steps_per_second"] for line in lines]
    return {
        "name": run.name,
        "optimizer": run.optimizer,
        "rule": run.rule,
        "batch": run.batch,
        "seed": run.seed,
        "learning_rate": config.optim.learning_rate,
        "warmup_steps": config.optim.warmup_steps,
        "accumulation": config.optim.accumulation,
        "diverged": diverged,
        "steps": lines[-1]["step"] if diverged else steps[-1],
        "steps_to_target": needed,
        "examples_to_target": None if needed is None else needed * run.batch,
        "best_loss": finite(min(losses)),
        "last_loss": finite(losses[-1]),
        "noise_scale": finite(noise_is.value),
        "noise_scale_low": finite(noise_is.low),
        "noise_scale_high": finite(noise_is.high),
        "seconds_per_step": finite(float(np.median([1 / r for r in rates if r] or [math.nan]))),
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
