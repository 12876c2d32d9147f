"""THE training loop: python -m truepose_jax.train --config=configs/demo.py --workdir=DIR [--config.key=value].

Run the same command again to go on where it stopped. Read from top to bottom: settings, data, state, steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from input_pipeline.sources.folder import PARSING_FOLDERS, PHOTO_FOLDERS, POSE_FOLDERS
from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict
from truepose_jax.data.annotations import training_method
from truepose_jax.data.datasets import Dataset, evaluation_set, training_batches, training_set
from truepose_jax.kernels.attention.api import cannot_run
from truepose_jax.pretrained.factory import assemble, region_encoder
from truepose_jax.runtime import distributed
from truepose_jax.runtime.cli import enable_compilation_cache, run_with_config
from truepose_jax.runtime.sharding import (
    batch_parts,
    batch_share,
    make_mesh,
    path_of,
    put_global_batch,
    replicate,
)
from truepose_jax.training import lora
from truepose_jax.training.checkpoint import (
    STOPPED,
    CheckpointError,
    Checkpoints,
    Preemption,
    as_metadata,
    check_place,
    check_same_config,
    check_same_contents,
    check_there,
    data_digest,
    lock_workdir,
    parameter_table,
    without_closed_loops,
    write_metadata,
)
from truepose_jax.training.flops import mfu_per_image_rate
from truepose_jax.training.init import abstract_state, first_state, origin, resolve_init_from
from truepose_jax.training.memory import memory_report
from truepose_jax.training.optim import put_trained
from truepose_jax.training.run_log import CannotWrite, Monitor, NonFinite, Profiler
from truepose_jax.training.step import Trainer, TrainState
from truepose_jax.training.time_budget import TimeBudget, kept_steps
from truepose_jax.training.tracker import Tracker, check_installed
from truepose_jax.training.validation import EmbeddingEvaluator, Evaluator, Watch

DIVERGED = 1
"""Exit code of a run that met config.optim.max_skips non-finite steps in a row: starting it again does not help."""


class Stopped(Exception):
    """The run was asked to end, and has saved the step that this names."""


def train(
    config: Config,
    workdir: str,
    *,
    profile: bool = False,
    minutes: float | None = None,
    watch: Watch | None = None,
    cache: str | None = None,
) -> int:
    """Trains until config.total_steps; returns the exit code (0, STOPPED or DIVERGED). minutes: for about so long from now,
    set-up included and config.total_steps at most, without evaluations; a second start goes on to the same last step. watch:
    other evaluations than config.eval's, and an earlier end. cache: the folder of region tokens; None: the workdir's own."""
    check_place(workdir)
    check_installed(config.tracker)
    watch = watch or Watch()
    budget = None if minutes is None else TimeBudget(minutes)
    if budget is not None and (kept := kept_steps(workdir)):
        config = dataclasses.replace(config, total_steps=kept)
    stoppable = Preemption(safe_to_exit=lambda: True)
    with stoppable as preemption, lock_workdir(workdir), without_closed_loops():
        distributed.same_folder(pathlib.Path(workdir))
        config = resolve_init_from(config)
        distributed.on_primary(lambda: check_same_config(workdir, config))
        try:
            mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
            batch_share(mesh)
        except ValueError as error:
            raise ConfigError(f"config.mesh: {error}") from error
        _announce(config, mesh)

        # What never changes: the autoencoder and the region tokens.
        encoder = region_encoder(config)
        method, frozen, autoencoder, prints = assemble(config, encoder)
        cache = cache or os.path.join(workdir, "cache")
        train_set = training_set(config, encoder, cache)
        evaluates = (watch.due or config.eval.every) and not budget
        eval_set = evaluation_set(config, encoder, cache) if evaluates else None
        if eval_set is not None and not eval_set.heldout:
            logging.warning("config.data.eval_pairs is empty: evaluation runs on the training pairs")
        data = data_digest(train_set.images, config.data.root, (*PHOTO_FOLDERS, *PARSING_FOLDERS, *POSE_FOLDERS))
        contents = {**prints, "clip": train_set.clip, "data": data, "origin": origin(config)}
        distributed.assert_same("frozen networks and data", contents)
        distributed.on_primary(lambda: check_same_contents(workdir, contents))
        frozen = replicate(mesh, frozen)

        with jax.set_mesh(mesh):
            trainer = Trainer(config, training_method(config, method, train_set.images, autoencoder, prints))
            abstract = abstract_state(config, trainer, mesh)
            metadata = write_metadata(
                workdir,
                config=config,
                parameter_table=parameter_table(abstract.params),
                mesh=mesh,
                extra=as_metadata(contents),
            )
            _print_counts(trainer, abstract.params)
            every, keep, forever = config.checkpoint.every, config.checkpoint.keep, config.checkpoint.keep_every
            checkpoints = Checkpoints(workdir, keep=keep, every=every, keep_every=forever)
            distributed.same_steps(checkpoints)
            state = first_state(config, trainer, checkpoints, abstract)
            try:
                _loop(
                    config, workdir, mesh, trainer, state, frozen, train_set,
                    watch.make(config, method, eval_set, mesh) if evaluates else None, watch,
                    checkpoints, metadata, preemption, profile, budget,
                )  # fmt: skip
            except Stopped as stopped:
                print(f"asked to stop: saved step {stopped}; run the same command again to go on", flush=True)
                return STOPPED
            except NonFinite as error:
                # Not saved: the same command repeats these very steps from the last checkpoint, for whoever looks into
                # it; automatic restarts that each saved one step more would push the good checkpoints out.
                print(f"error: {error}; saved steps: {checkpoints.said()}", file=sys.stderr)
                return DIVERGED
            except CannotWrite as error:
                raise CheckpointError(str(error)) from error
            finally:
                checkpoints.close()
    return 0


def _loop(
    config: Config,
    workdir: str,
    mesh: Mesh,
    trainer: Trainer,
    state: TrainState,
    frozen: Any,
    data: Dataset,
    evaluator: Evaluator | EmbeddingEvaluator | None,
    watch: Watch,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    preemption: Preemption,
    profile: bool,
    budget: TimeBudget | None,
) -> None:
    """Steps from the state's on; raises Stopped once everything is saved. evaluator: None, no evaluations."""
    start = reached = int(state.step)
    total = config.total_steps
    # An argument of the program where the first steps are to tell it, so that no second compilation is needed.
    schedule = (jnp.int32(total),) if budget else ()
    if budget and kept_steps(workdir):
        budget = None
    # Until the first step is through its compilation there is nothing to save; afterwards while the last step is saved.
    preemption.safe_to_exit = lambda: reached == start or checkpoints.is_committed(reached)
    host_index, host_count = batch_share(mesh)
    loader = training_batches(
        config,
        data,
        start_step=start,
        host_index=host_index,
        host_count=host_count,
    )
    train_step = trainer.jitted(state)

    def save(step: int) -> None:
        monitor.flush()
        rest = {
            "step": state.step,
            "opt_state": state.opt_state,
            "skipped": state.skipped,
            "skips_in_a_row": state.skips_in_a_row,
        }
        parts = {"params": state.params, "ema": state.ema, "rest": rest}
        # Where the data stand is a function of the seed and the step.
        extra = {"step": step, "seed": config.seed, "batch_size": config.batch_size, "metadata": metadata}
        checkpoints.save(step, parts, extra=extra)

    def check_preemption() -> None:
        if preemption.stop(int(state.step)):
            save(int(state.step))
            raise Stopped(int(state.step))

    tracker = None
    if config.tracker != "none" and jax.process_index() == 0:
        tracker = Tracker(config.tracker, config.tracker_project, pathlib.Path(workdir), to_dict(config))
    with (
        Monitor(
            workdir,
            total_steps=config.total_steps,
            start_step=start,
            log_every=config.log_every,
            is_writer=jax.process_index() == 0,
            max_skips=config.optim.max_skips,
            max_invalid=config.data.max_invalid,
            checkpoint_every=config.checkpoint.every,
            parameter_paths=[
                path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainer.trained(state.params))
            ],
            mfu_per_image_rate=mfu_per_image_rate(config, jax.devices()[0].device_kind, jax.device_count()),
            tracker=tracker,
        ) as monitor,
        contextlib.ExitStack() as stack,
    ):

        def evaluate(step: int) -> bool:
            """Whether the results are enough."""
            with monitor.paused():
                weights = state.params if state.ema is None else put_trained(state.params, state.ema)
                weights = lora.merged(weights, config.optim.lora)
                results, picture = evaluator.run(weights, frozen, check_preemption)
            monitor.evaluation(step, results)
            if picture is not None:
                monitor.image(step, "sheet", picture)
            return watch.enough(results)

        def evaluation_due(step: int) -> bool:
            due = watch.due or (lambda step: step % config.eval.every == 0)
            return evaluator is not None and step > 0 and (step == total or due(step))

        trace = None
        if profile:
            trace = stack.enter_context(Profiler(f"{workdir}/profile", start, config.total_steps, say=monitor.say))
        # The run before may have been stopped or killed between saving this step and evaluating it. All evaluate or none,
        # so one looks into the file.
        if evaluation_due(start) and not distributed.on_primary(lambda: monitor.evaluated(start)) and evaluate(start):
            return
        step = start
        while step < total:
            step += 1
            if trace:
                trace.before(step)
            batch = put_global_batch(mesh, next(loader))
            assert len(batch["valid"]) == config.batch_size, "the processes' rows are not the batch"
            state, metrics = train_step(state, frozen, batch, *schedule)
            reached = step
            if budget and (chosen := budget.steps(step, metrics)):
                total, rate = min(chosen[0], config.total_steps), chosen[1]
                budget.keep(workdir, total, rate)
                monitor.say(f"{rate:.2f} steps/s on this machine: {total:,} steps in the time there is")
                monitor.last_step(total)
                schedule, budget = (jnp.int32(total),), None
            checkpoints.check()
            check_there(workdir)
            monitor.step(step, metrics, config.batch_size)
            if trace:
                trace.after(step, state)

            stop = preemption.stop(step)
            if stop or step == total or checkpoints.due(step):
                with monitor.paused():
                    save(step)
            if evaluation_due(step) and not stop and evaluate(step):
                return
            if stop:
                raise Stopped(step)


def _announce(config: Config, mesh: Mesh) -> None:
    parts = batch_parts(mesh) * config.optim.accumulation
    if config.batch_size % (parts * config.data.targets_per_source):
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of the {batch_parts(mesh)} parts of the "
            f"batch x accumulation {config.optim.accumulation} x targets_per_source {config.data.targets_per_source}"
        )
    config.check_noise_scale(mesh.shape["data"])
    if reason := cannot_run(config.model.attention):
        raise ConfigError(f"config.model.attention: {reason}; take auto, xla or reference")
    print(
        f"{jax.process_count()} host(s), {jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh "
        f"{dict(mesh.shape)}; batch {config.batch_size} = {config.batch_size // parts} per device x "
        f"{config.optim.accumulation} accumulated x {batch_parts(mesh)}",
        flush=True,
    )


def _print_counts(trainer: Trainer, params: Any) -> None:
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    trained = sum(x.size for x in jax.tree.leaves(trainer.trained(params)))
    every = sum(counts.values())
    rest = "" if trained == every else f", of which {trained:,} are trained"
    print("parameters: " + ", ".join(f"{n} {c:,}" for n, c in counts.items()) + f"; all {every:,}{rest}", flush=True)


def main(argv: list[str]) -> int:
    # Here, for a flag counts for a whole process, and other programs train too.
    from truepose_jax.flags import train as told

    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    if told.ESTIMATE.value:
        print(memory_report(told.CONFIG.value, told.MEMORY.value))
        return 0
    if told.MEMORY.value is not None:
        raise ConfigError("--memory is for --estimate: add it, or leave --memory out")
    if not told.WORKDIR.value:
        raise ConfigError("--workdir is missing: name the folder for checkpoints, metrics and samples")
    check_place(told.WORKDIR.value)
    if told.CONFIG.value is None:
        raise ConfigError("--config is missing: name an experiment, such as --config=configs/demo.py")
    config = from_config_dict(Config, told.CONFIG.value)
    place = {"coordinator": told.COORDINATOR, "process": told.PROCESS, "processes": told.PROCESSES}
    joined = distributed.start(told.DISTRIBUTED.value, **{name: flag.value for name, flag in place.items()})
    print(joined, flush=True)
    enable_compilation_cache()
    return train(config, told.WORKDIR.value, profile=told.PROFILE.value)


if __name__ == "__main__":
    from truepose_jax.flags import train as told

    run_with_config(main, told)
