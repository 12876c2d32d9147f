"""How much memory a training step takes, from shapes alone: no device is touched and nothing is compiled.

The step is traced, and its operations are walked in order with what is alive at each: an array lives from the operation that
makes it to the last that reads it. What a compiler fuses away is taken as free (broadcasts, reshapes) or as written in place
(elementwise operations whose operand dies). benchmarks/results tells how near that comes to XLA's own account.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from truepose_jax.frozen import autoencoder_shapes
from truepose_jax.initial import batch_spec
from truepose_jax.methods import make_method
from truepose_jax.schema import Config
from truepose_jax.train_step import Trainer

GIB = 1 << 30
DEVICE_GIB = (16, 32, 80, 141)
"""v5e, v6e, A100 / H100, H200."""

FSDP = (1, 8)

TRACED = (8, 16)
"""Sources in the two batches whose difference is the cost of an image: enough for activations to outweigh gradients."""

_FREE = frozenset({"broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "stop_gradient", "copy"})
"""Operations whose result is their operand looked at differently, or is made where it is read."""

_IN_PLACE = frozenset(
    {"abs", "add", "add_any", "and", "clamp", "convert_element_type", "cos", "div", "eq", "erf", "erf_inv", "exp", "exp2",
     "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not",
     "or", "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", "transpose", "xor"}
)  # fmt: skip
"""Operations that can be written over an operand which nobody reads after them."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device that holds everything. networks: parameters (counts, not bytes) by network.

    step_fixed + batch * step_per_image: what a step needs beside the state: gradients, activations, cast weights.
    """

    networks: Mapping[str, int]
    parameters: int
    trained: int
    optimizer: int
    ema: int
    frozen: int
    step_fixed: int
    step_per_image: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.ema + self.frozen

    def largest_batch(self, memory: int, *, fsdp: int = 1) -> int:
        """Images per device that fit into `memory` bytes where state and gradients are cut over `fsdp` devices."""
        fixed = (self.parameters + self.optimizer + self.ema + self.step_fixed) / fsdp + self.frozen
        return max(int((memory - fixed) / max(self.step_per_image, 1)), 0)


def estimate(config: Config) -> Estimate:
    """Of the configuration's train step; its mesh and accumulation do not matter here."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulation=1, noise_scale="off"))
    autoencoder, shapes = autoencoder_shapes(config.model)
    frozen = {"autoencoder": shapes} if shapes else {}
    trainer = Trainer(config, make_method(config, autoencoder))
    k = config.data.targets_per_source
    state = jax.eval_shape(lambda key: trainer.init_state(key, batch_spec(config)), jax.random.key(0))
    eight, sixteen = (_step_bytes(trainer, state.params, frozen, batch_spec(config, targets=n * k)) for n in TRACED)
    return Estimate(
        networks={name: _count(tree) for name, tree in state.params.items()},
        parameters=_bytes_of(state.params),
        trained=_count(trainer.trained(state.params)),
        optimizer=_bytes_of(state.opt_state),
        ema=_bytes_of(state.ema),
        frozen=_bytes_of(frozen),
        step_fixed=max(2 * eight - sixteen, 0),
        step_per_image=-(-(sixteen - eight) // (TRACED[0] * k)),
    )


def report(config: Config, found: Estimate) -> str:
    """The estimate for people."""
    h, w = config.model.size
    counts = ", ".join(f"{name} {count:,}" for name, count in found.networks.items())
    rows = [
        f"{h}x{w}, {config.model.dtype}, rematerialisation {'on' if config.model.remat else 'off'}; an estimate from shapes",
        f"parameters           {found.parameters / GIB:8.2f} GiB   {sum(found.networks.values()):,} ({counts})",
        f"optimizer            {found.optimizer / GIB:8.2f} GiB   of {found.trained:,} trained parameters",
        f"EMA                  {found.ema / GIB:8.2f} GiB",
        f"frozen networks      {found.frozen / GIB:8.2f} GiB",
        f"step, any batch      {found.step_fixed / GIB:8.2f} GiB   gradients, cast weights",
        f"step, per image      {found.step_per_image / GIB:8.2f} GiB   activations",
        "largest batch per device:",
        "  memory   " + "".join(f"{f'fsdp {n}':>10}" for n in FSDP),
    ]
    for memory in DEVICE_GIB:
        batches = (found.largest_batch(memory * GIB, fsdp=n) for n in FSDP)
        rows.append(f"  {memory:>4} GiB " + "".join(f"{batch or '-':>10}" for batch in batches))
    return "\n".join(rows)


def _step_bytes(trainer: Trainer, params: Any, frozen: Any, spec: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Peak of the gradient's operations, inputs left out."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), spec["target"].shape[0]))
    closed = jax.make_jaxpr(trainer.gradients)(params, frozen, dict(spec), keys)
    return peak_bytes(closed.jaxpr)


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Most bytes alive at once among what the operations make, results included and inputs left out."""
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if isinstance(var, core.Var)}
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if isinstance(var, core.Var)}
    root: dict[core.Var, core.Var] = {}  # of a reshaped array, the array
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _FREE - {"broadcast_in_dim", "iota"} and isinstance(eqn.invars[0], core.Var):
            source = root.get(eqn.invars[0], eqn.invars[0])
            root[eqn.outvars[0]] = source
            last_use[source] = max(last_use.get(source, -1), last_use.get(eqn.outvars[0], -1))
    alive: dict[core.Var, int] = {}
    now = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = max((peak_bytes(sub) for sub in _inner(eqn.params)), default=0)
        made = {var: _bytes(var) for var in eqn.outvars if var not in root}
        dying = {
            v: alive[v] for v in (root.get(v, v) for v in _variables(eqn.invars)) if v in alive and last_use[v] == i
        }
        name = eqn.primitive.name
        if name in _FREE:
            made = dict.fromkeys(made, 0)
        size = sum(made.values())
        reused = min(size, max(dying.values(), default=0)) if name in _IN_PLACE else 0
        peak = max(peak, now + max(size, inner) - reused)
        now += size
        alive |= made
        for var in [*dying, *(v for v in made if last_use.get(v, -1) <= i)]:
            now -= alive.pop(var, 0)
    return peak


def _inner(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def _variables(invars: Sequence[Any]) -> set[core.Var]:
    return {v for v in invars if isinstance(v, core.Var)}


def _bytes(var: Any) -> int:
    aval = var.aval
    if not hasattr(aval, "shape"):
        return 0
    size = 16 if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else aval.dtype.itemsize
    return math.prod(aval.shape) * size


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
