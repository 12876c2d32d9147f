"""Images per second of the train step on the devices at hand, and where the time goes."""

from __future__ import annotations

import glob
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from truepose_jax.config import Config
from truepose_jax.data.annotations import training_method
from truepose_jax.data.datasets import training_batches, training_set
from truepose_jax.pretrained.factory import assemble, region_encoder
from truepose_jax.runtime.sharding import put_global_batch, replicate
from truepose_jax.scaling.collectives import KINDS, collective_bytes, wire_bytes
from truepose_jax.scaling.compiled import mesh_of, total_bytes
from truepose_jax.training.init import abstract_state, batch_spec
from truepose_jax.training.step import Trainer

WARM_UP = 2
TRACED = 3
"""Steps under the profiler, which slows them: its shares are used, not its seconds."""

_COLLECTIVE = re.compile(rf"^(?:{'|'.join(KINDS)}|all-reduce-scatter)(?:-start|-done)?(?:\.\d+)*$|^nccl", re.IGNORECASE)


def measure(config: Config, *, devices: int, steps: int, cache: str) -> dict[str, Any]:
    """The row's numbers from the first `devices` devices: medians over `steps` steps each with a batch that lies on the
    devices and with the loader. cache: folder for region tokens."""
    mesh = mesh_of(config, jax.devices()[:devices])
    encoder = region_encoder(config)
    method, frozen, autoencoder, prints = assemble(config, encoder)
    data = training_set(config, encoder, cache)
    method = training_method(config, method, data.images, autoencoder, prints)
    frozen = replicate(mesh, frozen)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, method)
        abstract = abstract_state(config, trainer, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(lambda key: trainer.init_state(key, batch_spec(config)), out_shardings=shardings)
        state = init(jax.random.key(config.seed))
        loader = training_batches(config, data)
        batch = put_global_batch(mesh, next(loader))
        start = time.perf_counter()
        compiled = trainer.jitted(state).lower(state, frozen, batch).compile()
        compile_seconds = time.perf_counter() - start
        holder, losses = [state], []

        def one(batch) -> None:
            holder[0], metrics = compiled(holder[0], frozen, batch)
            losses.append(metrics["loss"])
            jax.block_until_ready(holder[0])

        for _ in range(WARM_UP):
            one(batch)
        resident = _median_seconds(lambda: one(batch), steps)
        fed = _median_seconds(lambda: one(put_global_batch(mesh, next(loader))), steps)
        share = _collective_share(lambda: one(batch), devices) if devices > 1 else 0.0
    found = collective_bytes(compiled.as_text(), devices) if devices > 1 else {}
    return {
        "device_kind": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "step_seconds": fed,
        "images_per_second": config.batch_size / fed,
        "compute_seconds": None if share is None else resident * (1 - share),
        "collective_seconds": None if share is None else resident * share,
        "input_seconds": max(fed - resident, 0.0),
        "collectives": found,
        "wire_bytes": wire_bytes(found),
        "bytes_per_device": total_bytes(compiled.memory_analysis()),
        "first_loss": float(losses[0]),
        "second_loss": float(losses[1]),
        "compile_seconds": round(compile_seconds, 2),
        "steps": steps,
    }


def _median_seconds(call: Callable[[], None], times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def _collective_share(call: Callable[[], None], devices: int) -> float | None:
    """Part of a step's time that a device spends in collectives, waiting for the others included; from a trace. None
    where the trace shows none (another platform's names)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for _ in range(TRACED):
                call()
            seconds = time.perf_counter() - start
        (path,) = glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(path)
        spent, seen = 0.0, False
        for plane in profile.planes:
            for line in plane.lines:
                for event in line.events:
                    if _COLLECTIVE.match(event.name):
                        spent, seen = spent + event.duration_ns * 1e-9, True
    return min(spent / devices / seconds, 1.0) if seen else None
