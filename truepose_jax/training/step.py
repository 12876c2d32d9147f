"""TrainState and the train step: pure functions of state, batch and step number, jitted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from input_pipeline.fields import FIELDS
from truepose_jax.config import Config
from truepose_jax.methods.base import OF_KEPT, Batch, BatchSpec, Frozen, Params, Trainable
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import compiler_options
from truepose_jax.training import lora, noise_scale
from truepose_jax.training.optim import (
    ParamLayout,
    ema_update,
    learning_rate,
    make_optimizer,
    make_param_layout,
    put_trained,
    trained_part,
)


@flax.struct.dataclass
class TrainState:
    """step: batches consumed. skipped: those whose gradients were not finite (parameters left alone).
    skips_in_a_row: the same, since the last good one. ema: None where the config has no EMA; of adapters where they train."""

    step: Int[Array, ""]
    params: Params
    ema: Params | None
    opt_state: Any
    skipped: Int[Array, ""]
    skips_in_a_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Wires a method and an optimizer into init and step."""

    config: Config
    method: Trainable

    def packing(self, params: Any) -> ParamLayout:
        return make_param_layout(self.config.optim.layout, params, self.method.no_decay)

    def optimizer(self, packing: ParamLayout, total_steps: jax.Array | None = None) -> optax.GradientTransformation:
        return make_optimizer(self.config.optim, self._total(total_steps), packing.decayed)

    def _total(self, total_steps: jax.Array | None) -> int | jax.Array:
        return self.config.total_steps if total_steps is None else total_steps

    def trained(self, params: Any) -> Any:
        """The parameters that optim.trainable names, or the adapters alone, as a tree without the others."""
        optim = self.config.optim
        return trained_part(params, lora.ADAPTERS if optim.lora.rank else optim.trainable)

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> Params:
        """The method's random parameters, with adapters where the configuration has any."""
        params = self.method.init(key, batch_spec)
        if not self.config.optim.lora.rank:
            return params
        return {**params, lora.LORA: lora.adapters(rng.key(key, lora.LORA), params, self.config.optim.lora)}

    @property
    def fresh(self) -> str:
        """Regex of parameters that may begin random though the weights of config.init_from have none."""
        return f"{lora.ADAPTERS}|{self.method.fresh}" if self.config.optim.lora.rank else self.method.fresh

    def init_state(self, key: jax.Array, batch_spec: BatchSpec) -> TrainState:
        return self.state_of(self.init(key, batch_spec))

    def state_of(self, params: Params) -> TrainState:
        """The state of step 0 with these parameters."""
        trained, optim = self.trained(params), self.config.optim
        packing = self.packing(trained)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            # A copy, and three zeros: donated buffers must not alias.
            ema=jax.tree.map(jnp.copy, trained if optim.lora.rank else params) if optim.ema_decay else None,
            opt_state=self.optimizer(packing).init(packing.pack(trained)),
            skipped=jnp.zeros((), jnp.int32),
            skips_in_a_row=jnp.zeros((), jnp.int32),
        )

    def jitted(self, state: TrainState) -> jax.stages.Wrapped:
        """`step` as programs run it: the state is used up, and comes back where it lay. state: arrays or shapes, on a mesh."""
        shardings = jax.tree.map(lambda x: x.sharding, state)
        options = compiler_options(state.step.sharding.mesh)
        return jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)

    def step(
        self, state: TrainState, frozen: Frozen, batch: Batch, total_steps: Int[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from a batch of any form (input_pipeline/fields.py). Randomness is a function of (seed,
        state.step). Non-finite gradients change nothing but the counters; metrics then hold bad_loss and bad_gradients,
        the index of the first bad parameter among them. total_steps: in place of the config's, for the schedule."""
        batch = normalize_batch(batch)
        key = rng.key(jax.random.key(self.config.seed), "train", state.step)
        keys = jax.random.split(key, batch["valid"].shape[0])
        grads, metrics = self.gradients(state.params, frozen, batch, keys)
        packing = self.packing(grads)
        grads, old_params = packing.pack(grads), packing.pack(self.trained(state.params))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

        old_ema = None if state.ema is None else packing.pack(self.trained(state.ema))
        old = (old_params, old_ema, state.opt_state)

        def update(params, ema, opt_state):
            updates, opt_state = self.optimizer(packing, total_steps).update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            if ema is not None:
                ema = ema_update(ema, params, state.step, self.config.optim.ema_decay)
            return params, ema, opt_state

        # A branch and not a select: nothing is computed for a bad step, and XLA cannot fuse the whole update into each
        # of the hundreds of slices that unpack a vector (measured: compilation 62 s instead of 25).
        params, ema, opt_state = jax.lax.cond(finite, update, lambda *unchanged: unchanged, *old)
        skipped_now = (~finite).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=put_trained(state.params, packing.unpack(params)),
            ema=None if ema is None else put_trained(state.ema, packing.unpack(ema)),
            opt_state=opt_state,
            skipped=state.skipped + skipped_now,
            skips_in_a_row=jnp.where(finite, 0, state.skips_in_a_row + 1),
        )
        metrics = {
            **metrics,
            "grad_norm": norm,
            "learning_rate": learning_rate(self.config.optim, self._total(total_steps))(state.step - state.skipped),
            "valid": jnp.sum(batch["valid"]),
            "skipped": new_state.skipped,
            "skipped_now": skipped_now,
            "skips_in_a_row": new_state.skips_in_a_row,
            "first_bad_parameter": packing.first_bad(grads),
        }
        return new_state, metrics

    def gradients(self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array):
        """Gradient by the trained parameters and metrics of the whole batch, in `accumulation` micro-batches one after
        the other.

        Every sample brings its own key and each micro-batch weighs by its valid samples, so the sum is the gradient
        that the whole batch would have given at once.
        """
        pieces = self.config.optim.accumulation

        def loss(trained, *inputs):
            return self.method.loss(lora.merged(put_trained(params, trained), self.config.optim.lora), *inputs)

        gradient = jax.grad(loss, has_aux=True)
        trained = self.trained(params)
        measured = self.config.optim.noise_scale == "on"
        if pieces == 1 and measured:
            return self._by_device(gradient, trained, frozen, batch, keys)
        if pieces == 1:
            return gradient(trained, frozen, batch, keys)
        total = jnp.maximum(jnp.sum(batch["valid"]), 1.0)
        groups = min(len(x) for x in batch.values())  # sources, or rows where there are none

        def cut(x):
            # Interleaved by group: each device keeps its own rows, and a source its targets, in every micro-batch.
            grouped = x.reshape(groups // pieces, pieces, x.shape[0] // groups, *x.shape[1:])
            return jnp.moveaxis(grouped, 1, 0).reshape(pieces, x.shape[0] // pieces, *x.shape[1:])

        def one(piece):
            grads, metrics = gradient(trained, frozen, *piece)
            share = jnp.sum(piece[0]["valid"]) / total
            metrics = _summands(metrics, share)
            if measured:
                metrics |= noise_scale.partial_norms(grads, share)
            return jax.tree.map(lambda g: share * g, grads), metrics

        micro_batches = jax.tree.map(cut, (dict(batch), keys))
        first = jax.tree.map(lambda x: x[0], micro_batches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
        add = lambda sums, piece: (jax.tree.map(jnp.add, sums, one(piece)), None)  # noqa: E731
        grads, metrics = jax.lax.scan(add, zeros, micro_batches)[0]
        metrics = _of_sums(metrics)
        return grads, noise_scale.of_whole(grads, metrics, total) if measured else metrics

    def _by_device(self, gradient, trained: Any, frozen: Frozen, batch: Batch, keys: jax.Array):
        """The same gradient and metrics, with each share of the mesh's data axis seen alone for the noise scale.

        Along data every device holds all of a parameter, so the shares' gradients are there before they are summed;
        fsdp and tensor stay with the compiler.
        """
        mesh = jax.sharding.get_abstract_mesh()
        self.config.check_noise_scale(mesh.shape.get("data", 1))

        def one(trained, frozen, batch, keys):
            grads, metrics = gradient(trained, frozen, batch, keys)
            valid = jnp.sum(batch["valid"])
            total = jnp.maximum(jax.lax.psum(valid, "data"), 1.0)
            share = valid / total
            metrics = _summands(metrics, share)
            metrics |= noise_scale.partial_norms(grads, share)
            grads, metrics = jax.lax.psum((jax.tree.map(lambda g: share * g, grads), metrics), "data")
            return grads, noise_scale.of_whole(grads, _of_sums(metrics), total)

        whole, cut = PartitionSpec(), PartitionSpec("data")
        call = jax.shard_map(
            # check_vma: with it, the gradient by what all devices share would come summed
            one, in_specs=(whole, whole, cut, cut), out_specs=whole, axis_names={"data"}, check_vma=False
        )  # fmt: skip
        return call(trained, frozen, dict(batch), keys)


def _summands(metrics: Mapping[str, Any], share: Any) -> dict[str, Any]:
    """What a part of a batch adds to the metrics of the whole. share: of the valid samples that are in it."""
    weights = {name: metrics["kept"] if name.startswith(OF_KEPT) else share for name in metrics}
    return {name: x if name.startswith("bin_") or name == "kept" else weights[name] * x for name, x in metrics.items()}


def _of_sums(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics from the sum of all parts' summands: OF_KEPT are means over the kept samples, of which a part may have none."""
    return {
        name: x / jnp.maximum(metrics["kept"], 1.0) if name.startswith(OF_KEPT) else x for name, x in metrics.items()
    }


def normalize_batch(batch: Batch) -> Batch:
    """The batch as a method sees it: bytes become photos in [-1, 1] and skeletons in [0, 1], halves become floats."""

    def widened(name: str, x: jax.Array) -> jax.Array:
        if x.dtype == jnp.float16:
            return x.astype(jnp.float32)
        kind = FIELDS[name].kind if name in FIELDS else ""
        if x.dtype != jnp.uint8 or not kind:
            return x
        return x.astype(jnp.float32) / 255.0 if kind == "skeleton" else x.astype(jnp.float32) / 127.5 - 1.0

    return {name: widened(name, x) for name, x in batch.items()}
