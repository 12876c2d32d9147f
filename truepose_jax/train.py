"""THE training loop: python -m truepose_jax.train --config=configs/demo.py --workdir=DIR [--config.key=value].

Run the same command again to go on where it stopped. Read from top to bottom: settings, data, state, steps.
"""

from __future__ import annotations

import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from input_pipeline.loader import make_loader
from input_pipeline.schema import batch_shapes
from truepose_jax.checkpoint import (
    Checkpoints,
    Preemption,
    check_same_config,
    lock_workdir,
    parameter_table,
    write_metadata,
)
from truepose_jax.datasets import Dataset, evaluation_set, training_set
from truepose_jax.evaluation import Evaluator
from truepose_jax.frozen import load_autoencoder
from truepose_jax.methods import make_method
from truepose_jax.monitor import Monitor
from truepose_jax.programs import run_with_config
from truepose_jax.region_tokens import make_encoder
from truepose_jax.schema import Config, ConfigError, from_config_dict
from truepose_jax.sharding import (
    batch_parts,
    like_params,
    make_mesh,
    param_specs,
    path_of,
    put_global_batch,
    replicate,
)
from truepose_jax.train_step import Trainer, TrainState

PROFILED_STEPS = range(10, 15)
"""Steps after the start that --profile traces: past compilation and the first reads."""

STOPPED = 143
"""Exit code of a run that saved and ended on SIGTERM or SIGINT."""


class Stopped(Exception):
    """The run was asked to end, and has saved the step that this names."""


def main_of(config: Config, workdir: str, *, profile: bool = False) -> int:
    """Trains until config.total_steps; returns the exit code (0, or STOPPED)."""
    with Preemption() as preemption, _locked(workdir):
        check_same_config(workdir, config)
        try:
            mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
        except ValueError as error:
            raise ConfigError(f"config.mesh: {error}") from error
        _announce(config, mesh)

        # What never changes: the autoencoder and the region tokens.
        autoencoder, autoencoder_params, autoencoder_hash = load_autoencoder(config.model)
        encoder = make_encoder(config.model.clip, config.token_width)
        cache = os.path.join(workdir, "cache")
        train_set = training_set(config, encoder, cache)
        eval_set = evaluation_set(config, encoder, cache)
        if not eval_set.heldout:
            logging.warning("config.data.eval_pairs is empty: evaluation runs on the training pairs")
        frozen = replicate(mesh, {"autoencoder": autoencoder_params} if autoencoder_params else {})

        with jax.set_mesh(mesh):
            method = make_method(config, autoencoder)
            trainer = Trainer(config, method)
            abstract = abstract_state(config, trainer, mesh)
            write_metadata(
                workdir,
                config=config,
                parameter_table=parameter_table(abstract.params),
                mesh=mesh,
                extra={"frozen": {"autoencoder": autoencoder_hash, "clip": encoder.fingerprint}},
            )
            _print_counts(abstract.params)
            checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, every=config.checkpoint.every)
            state = _first_state(config, trainer, checkpoints, abstract)
            try:
                _loop(
                    config, workdir, mesh, trainer, state, frozen, train_set,
                    Evaluator(config, method, eval_set, mesh), checkpoints, preemption, profile,
                )  # fmt: skip
            except Stopped as stopped:
                print(f"asked to stop: saved step {stopped}; run the same command again to go on", flush=True)
                return STOPPED
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
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    preemption: Preemption,
    profile: bool,
) -> None:
    """Steps from the state's on; raises Stopped once everything is saved."""
    start = int(state.step)
    loader = make_loader(
        data.images,
        data.tokens,
        seed=config.seed,
        batch_size=config.batch_size,
        targets_per_source=config.data.targets_per_source,
        flip=config.data.flip,
        self_pair=config.data.self_pair,
        start_step=start,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        threads=config.data.threads,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = jax.jit(trainer.step, donate_argnums=0, out_shardings=(shardings, None))

    def save(step: int) -> None:
        monitor.flush()
        rest = {
            "step": state.step,
            "opt_state": state.opt_state,
            "skipped": state.skipped,
            "skips_in_a_row": state.skips_in_a_row,
        }
        parts = {"params": state.params, "ema": state.ema, "rest": rest}
        checkpoints.save(step, parts, extra={"step": step, "seed": config.seed, "batch_size": config.batch_size})

    def poll() -> None:
        if preemption.stop(int(state.step)):
            save(int(state.step))
            raise Stopped(int(state.step))

    with Monitor(
        workdir,
        total_steps=config.total_steps,
        start_step=start,
        log_every=config.log_every,
        is_writer=jax.process_index() == 0,
        max_skips=config.optim.max_skips,
        parameter_paths=[path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)],
    ) as monitor:

        def evaluate(step: int) -> None:
            with monitor.paused():
                results, picture = evaluator.run(state.params if state.ema is None else state.ema, frozen, poll)
            monitor.evaluation(step, results)
            monitor.image(step, "sheet", picture)

        def evaluation_due(step: int) -> bool:
            return step == config.total_steps or (step > 0 and step % config.eval.every == 0)

        if evaluation_due(start) and not monitor.evaluated(start):
            evaluate(start)  # the run before was stopped or killed between saving this step and evaluating it
        for step in range(start + 1, config.total_steps + 1):
            if profile and step - start == PROFILED_STEPS.start:
                jax.profiler.start_trace(os.path.join(workdir, "profile"))
            batch = put_global_batch(mesh, next(loader))
            state, metrics = train_step(state, frozen, batch)
            monitor.step(step, metrics, config.batch_size)
            if profile and step - start == PROFILED_STEPS.stop:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                monitor.say(f"wrote a trace of {len(PROFILED_STEPS)} steps to {workdir}/profile")

            stop = preemption.stop(step)
            if stop or step == config.total_steps or checkpoints.due(step):
                with monitor.paused():
                    save(step)
            if evaluation_due(step) and not stop:
                evaluate(step)
            if stop:
                raise Stopped(step)


def abstract_state(config: Config, trainer: Trainer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; nothing is computed."""
    spec = batch_spec(config)
    shapes = jax.eval_shape(lambda key: trainer.init_state(key, spec), jax.random.key(0))
    specs = param_specs(shapes.params, mesh, trainer.method.param_rules)
    shardings = like_params(shapes, shapes.params, specs, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that parameters are initialised with: one source; no parameter's shape depends on the batch size."""
    k = config.data.targets_per_source
    shapes = batch_shapes(batch_size=k, targets_per_source=k, size=config.model.size, token_width=config.token_width)
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def _first_state(config: Config, trainer: Trainer, checkpoints: Checkpoints, abstract: TrainState) -> TrainState:
    """Resume order: this workdir's checkpoint, else random parameters. A checkpoint that cannot be restored is an
    error, never a fresh start."""
    if checkpoints.latest_step() is None:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(lambda key: trainer.init_state(key, batch_spec(config)), out_shardings=shardings)
        return init(jax.random.key(config.seed))
    rest = {name: getattr(abstract, name) for name in ("step", "opt_state", "skipped", "skips_in_a_row")}
    parts, _, step = checkpoints.restore({"params": abstract.params, "ema": abstract.ema, "rest": rest})
    print(f"resuming from step {step}", flush=True)
    return TrainState(params=parts["params"], ema=parts["ema"], **parts["rest"])


def _announce(config: Config, mesh: Mesh) -> None:
    parts = batch_parts(mesh) * config.optim.accumulation
    if config.batch_size % (parts * config.data.targets_per_source):
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of the {batch_parts(mesh)} parts of the "
            f"batch x accumulation {config.optim.accumulation} x targets_per_source {config.data.targets_per_source}"
        )
    print(
        f"{jax.process_count()} host(s), {jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh "
        f"{dict(mesh.shape)}; batch {config.batch_size} = {config.batch_size // parts} per device x "
        f"{config.optim.accumulation} accumulated x {batch_parts(mesh)}",
        flush=True,
    )


def _print_counts(params: Any) -> None:
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    print("parameters: " + ", ".join(f"{n} {c:,}" for n, c in counts.items()) + f"; all {sum(counts.values()):,}")


def _locked(workdir: str):
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    return lock_workdir(workdir)


CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file under configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go.")
PROFILE = flags.DEFINE_bool("profile", False, "Write a profiler trace of a few steps to WORKDIR/profile.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: name the folder for checkpoints, metrics and samples")
    if CONFIG.value is None:
        raise ConfigError("--config is missing: name an experiment, such as --config=configs/demo.py")
    return main_of(from_config_dict(Config, CONFIG.value), WORKDIR.value, profile=PROFILE.value)


if __name__ == "__main__":
    run_with_config(main)
