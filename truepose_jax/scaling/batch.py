"""The batch study: how many steps does each batch size take to the same loss?

Every run trains as `train` does (same data, same step), at a constant rate after its warm-up, with the gradient noise
scale measured, and ends at the first held-out evaluation that reaches the target. Evaluations come at steps whose ratio
is EVALUATED_EVERY, so that every batch size is judged at the same relative resolution.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from truepose_jax.config import Config, ConfigError, checked
from truepose_jax.data.annotations import training_method
from truepose_jax.data.datasets import Dataset, evaluation_set, training_batches, training_set
from truepose_jax.pretrained.factory import assemble, region_encoder
from truepose_jax.runtime.sharding import batch_parts, put_global_batch, put_whole_batch, replicate
from truepose_jax.scaling.compiled import mesh_of
from truepose_jax.scaling.fits import noise_estimate, steps_to
from truepose_jax.scaling.table import Row
from truepose_jax.training import noise_scale
from truepose_jax.training.checkpoint import Checkpoints, Preemption, check_same_config, parameter_table, write_metadata
from truepose_jax.training.init import abstract_state, first_state
from truepose_jax.training.run_log import CannotWrite, Monitor, NonFinite
from truepose_jax.training.step import Trainer, TrainState
from truepose_jax.training.validation import Pairs

RULES: dict[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "sqrt": math.sqrt,
    "linear": lambda ratio: ratio,
}
"""Learning rate over the reference batch's, by batch / reference batch."""

EVALUATED_EVERY = 1.1
SAVED_EVERY = 30.0
"""Seconds between checkpoints: what a kill costs."""

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
    changed = dataclasses.replace(
        config,
        optim=optim,
        seed=config.seed + run.seed,
        batch_size=run.batch,
        total_steps=max(settings.examples // run.batch, 1),
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


class Study:
    """What the runs share: data, networks, the first parameters of each seed, the evaluation."""

    def __init__(self, config: Config, settings: Settings, folder: pathlib.Path):
        self.config, self.settings, self.folder = config, settings, folder
        self.mesh: Mesh = mesh_of(config, jax.devices())
        if settings.micro % (batch_parts(self.mesh) * config.data.targets_per_source):
            raise ConfigError(
                f"--micro={settings.micro} cannot be cut over {batch_parts(self.mesh)} parts of the batch"
            )
        encoder = region_encoder(config)
        method, frozen, autoencoder, prints = assemble(config, encoder)
        self.data: Dataset = training_set(config, encoder, str(folder / "cache"))
        self.method = training_method(config, method, self.data.images, autoencoder, prints)
        self.pairs = Pairs.read(evaluation_set(config, encoder, str(folder / "cache")), method.needs)
        self.frozen = replicate(self.mesh, frozen)
        parts = batch_parts(self.mesh)
        self.eval_batch = -(-min(config.eval.batch_size, len(self.pairs)) // parts) * parts
        self._loss = jax.jit(
            lambda *arguments: method.loss(*arguments)[0], out_shardings=NamedSharding(self.mesh, PartitionSpec())
        )

    @functools.cache  # noqa: B019  one study lives as long as the program
    def first_parameters(self, seed: int) -> Any:
        """The same for every run of a seed, whatever its optimizer and batch."""
        config = dataclasses.replace(self.config, seed=self.config.seed + seed)
        trainer = Trainer(config, self.method)
        with tempfile.TemporaryDirectory() as nothing:
            empty = Checkpoints(nothing, keep=1, every=1)
            found = first_state(config, trainer, empty, abstract_state(config, trainer, self.mesh)).params
            empty.close()
        return found

    def heldout_loss(self, params: Any) -> float:
        """Mean over the evaluation's pairs, the same noise every time."""
        total = weight = 0.0
        for piece, keys in self.pairs.pieces(self.config.seed, self.eval_batch):
            count = float(piece["valid"].sum())
            total += float(self._loss(params, self.frozen, put_whole_batch(self.mesh, piece), keys)) * count
            weight += count
        return total / max(weight, 1.0)

    def loader(self, config: Config, start: int) -> Any:
        return training_batches(config, self.data, start_step=start)

    def row(self, run: Run, preemption: Preemption) -> Row | None:
        """Trains and judges; None: asked to stop, and saved. Goes on where the run's folder stands. A run that diverges
        gets its row too: nothing random is left in it, so that it would diverge again."""
        workdir = self.folder / "runs" / run.name
        config = config_of(run, self.config, self.settings)
        check_same_config(workdir, config)
        with jax.set_mesh(self.mesh):
            trainer = Trainer(config, self.method)
            abstract = abstract_state(config, trainer, self.mesh)
            write_metadata(workdir, config=config, parameter_table=parameter_table(abstract.params), mesh=self.mesh)
            checkpoints = Checkpoints(workdir, keep=1, every=1)
            try:
                if checkpoints.latest_step() is not None:
                    state = first_state(config, trainer, checkpoints, abstract)
                else:
                    state = trainer.state_of(jax.tree.map(jnp.copy, self.first_parameters(run.seed)))
                    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
                finished, diverged = self._train(run, config, trainer, state, checkpoints, workdir, preemption), False
            except NonFinite as error:
                print(f"{run.name} has diverged: {error}", flush=True)
                finished, diverged = True, True
            except CannotWrite as error:
                raise ConfigError(str(error)) from error
            finally:
                checkpoints.close()
        if not finished:
            return None
        row = judged(run, config, self.settings, workdir, diverged=diverged)
        shutil.rmtree(workdir / "checkpoints")  # the row and the logs stay
        return row

    def _train(
        self,
        run: Run,
        config: Config,
        trainer: Trainer,
        state: TrainState,
        checkpoints: Checkpoints,
        workdir: pathlib.Path,
        preemption: Preemption,
    ) -> bool:
        train_step = trainer.jitted(state)
        start, due = int(state.step), set(evaluated_steps(config.total_steps))
        loader, saved = self.loader(config, start), time.monotonic()
        bar = tqdm.tqdm(total=config.total_steps, initial=start, desc=run.name, dynamic_ncols=True, mininterval=2)
        with bar, Monitor(
            workdir, total_steps=config.total_steps, start_step=start, log_every=config.log_every, is_writer=True,
            quiet=True, max_skips=config.optim.max_skips,
        ) as monitor:  # fmt: skip

            def save(step: int) -> None:
                monitor.flush()
                names = ("step", "opt_state", "skipped", "skips_in_a_row")
                rest = {name: getattr(state, name) for name in names}
                checkpoints.save(step, {"params": state.params, "ema": None, "rest": rest}, extra={"step": step})

            if any(reached(loss, self.settings.target) for _, loss in evaluations(workdir)):
                return True  # killed after this evaluation, before its row was written
            for step in range(start + 1, config.total_steps + 1):
                state, metrics = train_step(state, self.frozen, put_global_batch(self.mesh, next(loader)))
                monitor.step(step, metrics, config.batch_size)
                bar.update()
                loss = math.inf
                if step in due:
                    with monitor.paused():
                        loss = self.heldout_loss(state.params)
                    monitor.evaluation(step, {"heldout_loss": loss})
                    bar.set_postfix_str(f"held-out loss {loss:.4f}")
                stop = preemption.stop(step)
                if stop or time.monotonic() - saved > SAVED_EVERY:
                    save(step)
                    saved = time.monotonic()
                if reached(loss, self.settings.target):
                    return True
                if stop:
                    return False
        return True


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
