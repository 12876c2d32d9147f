"""How much memory a training step takes, from shapes alone: no accelerator is touched and no step is compiled.

The step is traced as the platform it is planned for would run it (its attention above all), and its operations are walked in
order with what is alive at each: an array lives from the operation that makes it to the last that reads it. What a compiler
fuses away is taken as free (broadcasts, reshapes) or as written in place (elementwise operations whose operand dies); a Pallas
kernel is taken as its results. Of what XLA schedules side by side, and of memory in which nothing fits, the walk knows nothing.
benchmarks/tpu_train_step.py holds the estimate against XLA's own account (benchmarks/results/tpu_train_step.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ml_collections import ConfigDict

from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.data.datasets import training_form
from truepose_jax.pretrained.factory import planned
from truepose_jax.runtime.sharding import AXES
from truepose_jax.training.init import batch_spec
from truepose_jax.training.step import Trainer, normalize_batch

GIB = 1 << 30
DEVICES = (
    ("v5e", "tpu", 15.75),
    ("v6e", "tpu", 31.25),
    ("v5p", "tpu", 95.74),
    ("H100, A100 80GB", "gpu", 79.6),
    ("H200", "gpu", 140.4),
)
"""(name, platform, GiB). Of TPUs what the compiler leaves to a program, as its refusals say; of GPUs what the driver shows of
which JAX takes a share."""
MARGIN = 0.08
"""What compilers were found to need beyond the estimate, at most, at the largest batches with rematerialisation
(benchmarks/results/tpu_train_step.md). Without it they need far less: elementwise results are made anew where they are read."""
GPU_SHARE = 0.75
"""Of a GPU's memory that JAX takes where nothing else is said."""
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
PLATFORMS = ("tpu", "gpu")

FSDP = (1, 8)
"""Beside the configuration's own."""

PRIMES = (61, 67, 71, 73, 79, 83, 89, 97, 101, 103)
"""Sources in the traced batch: an array whose size the number divides grows with the batch. The first one is taken that divides
no other dimension."""

BATCHES = (1, 2, 64, 128)
"""Sources in the batches between which the bytes are taken as a straight line: the first two, and the last two."""

_FREE = frozenset({"broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "stop_gradient", "copy"})
"""Operations whose result is their operand looked at differently, or is made where it is read."""

_IN_PLACE = frozenset(
    {"abs", "add", "add_any", "and", "clamp", "convert_element_type", "cos", "div", "eq", "erf", "erf_inv", "exp", "exp2",
     "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not",
     "or", "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", "transpose", "xor"}
)  # fmt: skip
"""Operations that can be written over an operand which nobody reads after them."""

_KERNELS = frozenset({"pallas_call"})
"""Operations whose insides hold nothing in the device's memory."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Bytes that a step needs on one device beside the state: gradients, activations, cast weights.

    max(least, fixed + batch * per_image): with few images the gradients at the end outweigh the activations. FSDP cuts least
    and fixed.
    """

    least: int
    fixed: int
    per_image: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device that holds everything. networks: parameters (counts, not bytes) by network. steps: by platform."""

    networks: Mapping[str, int]
    parameters: int
    trained: int
    optimizer: int
    ema: int
    frozen: int
    steps: Mapping[str, Step]

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.ema + self.frozen

    def bytes(self, batch: int, platform: str, *, fsdp: int = 1) -> int:
        """Of `batch` images per device where state and gradients are cut over `fsdp` devices."""
        step, cut = self.steps[platform], (self.state - self.frozen) / fsdp
        return round(cut + self.frozen + max(step.least / fsdp, step.fixed / fsdp + batch * step.per_image))

    def largest_batch(self, memory: int, platform: str, *, fsdp: int = 1) -> int:
        """Images per device that fit into `memory` bytes; 0: none does."""
        if self.bytes(1, platform, fsdp=fsdp) > memory:
            return 0
        step = self.steps[platform]
        fixed = (self.state - self.frozen + step.fixed) / fsdp + self.frozen
        return max(int((memory - fixed) / max(step.per_image, 1)), 1)


def estimate(config: Config, *, platforms: Sequence[str] = PLATFORMS) -> Estimate:
    """Of the configuration's train step. Its mesh does not matter here; of accumulation the sum of gradients is counted, and
    images are those of a micro-batch."""
    accumulates = config.optim.accumulation > 1
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulation=1, noise_scale="off"))
    method, frozen = planned(config)
    trainer = Trainer(config, method)
    state = jax.eval_shape(lambda key: trainer.init_state(key, batch_spec(config)), jax.random.key(0))
    trained = trainer.trained(state.params)
    summed = bytes_of(trained) if accumulates else 0
    return Estimate(
        networks={name: _count(tree) for name, tree in state.params.items()},
        parameters=bytes_of(state.params),
        trained=_count(trained),
        optimizer=bytes_of(state.opt_state),
        ema=bytes_of(state.ema),
        frozen=bytes_of(frozen),
        steps={platform: _step(trainer, state.params, frozen, platform, summed) for platform in platforms},
    )


def gpu_share() -> tuple[float, str]:
    """The share of a GPU's memory that JAX will take, and what says so. Raises ConfigError where that is no share."""
    for name in SHARE_VARIABLES:
        if text := os.environ.get(name):
            try:
                share = float(text)
            except ValueError:
                share = math.nan
            if not share > 0:
                raise ConfigError(f"{name} is {text!r}; it must be a share of the GPU's memory, as in 0.9")
            return share, f"{name}={text}"
    return GPU_SHARE, f"JAX's own; {SHARE_VARIABLES[0]} sets another"


def memory_report(settings: ConfigDict | None, memory: float | None) -> str:
    """What `train --estimate` prints. memory: GiB that a program may have, in the place of DEVICES. Raises ConfigError.

    JAX starts on the CPU alone: the accelerators of this machine may be in use, and need not be there.
    """
    if settings is None:
        raise ConfigError("--config is missing: name an experiment, such as --config=configs/demo.py")
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--memory is {memory:g}; it must be GiB that a program may have, above 0")
    jax.config.update("jax_platforms", "cpu")
    config = from_config_dict(Config, settings)
    return report(config, estimate(config), memory=memory)


def report(config: Config, found: Estimate, *, memory: float | None = None) -> str:
    """The estimate for people. memory: GiB that a program may have, in the place of DEVICES."""
    h, w = config.model.size
    counts = ", ".join(f"{name} {count:,}" for name, count in found.networks.items())
    rows = [
        f"{h}x{w}, {config.model.dtype}, rematerialisation {'on' if config.model.remat else 'off'}; an estimate from shapes",
        f"parameters           {found.parameters / GIB:8.2f} GiB   {sum(found.networks.values()):,} ({counts})",
        f"optimizer            {found.optimizer / GIB:8.2f} GiB   of {found.trained:,} trained parameters",
        f"EMA                  {found.ema / GIB:8.2f} GiB",
        f"frozen networks      {found.frozen / GIB:8.2f} GiB",
    ]
    for platform, step in found.steps.items():
        rows += [
            f"step, any batch, {platform} {step.fixed / GIB:8.2f} GiB   gradients, cast weights; {step.least / GIB:.2f} at least",
            f"step, per image, {platform} {step.per_image / GIB:8.2f} GiB   activations",
        ]
    fsdps = sorted({*FSDP, config.mesh.fsdp})
    share, said_by = gpu_share()
    room = [(name, platform, gib * (share if platform == "gpu" else 1)) for name, platform, gib in DEVICES]
    if memory is not None:
        room = [("given", platform, memory) for platform in found.steps]
    elif "gpu" in found.steps:
        rows.append(f"of a GPU's memory JAX takes {share:g} ({said_by})")
    rows += [
        f"Compilers for TPUs were found to need up to {MARGIN:.0%} more than such an estimate; that much is left free here."
        if config.model.remat
        else "Without rematerialisation compilers for TPUs were found to need 0.47 to 0.70 of such an estimate: larger batches "
        "may fit.",
        "largest batch per device" + (", at once:" if config.optim.accumulation > 1 else ":"),
        "  device                a program's  " + "".join(f"{f'fsdp {n}':>8}" for n in fsdps),
    ]
    for name, platform, gib in room:
        if platform in found.steps:
            batches = (found.largest_batch(int(gib * GIB * (1 - MARGIN)), platform, fsdp=n) for n in fsdps)
            rows.append(
                f"  {f'{name} ({platform})':<21} {gib:>7.2f} GiB  " + "".join(f"{batch or '-':>8}" for batch in batches)
            )
    return "\n".join([*rows, *_of_this_run(config, found)])


def _of_this_run(config: Config, found: Estimate) -> list[str]:
    """What a device needs for config.batch_size images, on every number of devices that the configuration allows."""
    mesh, pieces = config.mesh, config.optim.accumulation
    copies = [mesh.data] if mesh.data > 0 else range(1, config.batch_size + 1)
    rows = [
        f"this run: {config.batch_size} images a step, fsdp {mesh.fsdp}, tensor {mesh.tensor} (which cuts nothing here), "
        f"accumulation {pieces}; a device needs",
    ]
    for count in copies:
        parts = count * mesh.fsdp * pieces
        if config.batch_size % (parts * config.data.targets_per_source) == 0:
            images = config.batch_size // parts
            needs = ", ".join(f"{found.bytes(images, p, fsdp=mesh.fsdp) / GIB:.2f} GiB ({p})" for p in found.steps)
            rows.append(f"  {count * mesh.fsdp * mesh.tensor:>4} devices  {images:>4} images at once  {needs}")
    return rows if len(rows) > 1 else [*rows, "  the batch does not divide over these devices"]


def described(platform: str) -> AbstractMesh:
    """One device of a platform that need not be here: what is traced under it is traced for it."""
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    return AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)


def _step(trainer: Trainer, params: Any, frozen: Any, platform: str, summed: int) -> Step:
    """summed: bytes of the gradients of the micro-batches before."""
    config, k = trainer.config, trainer.config.data.targets_per_source
    prime = _prime(params, frozen, batch_spec(config, form=training_form(config)))
    spec = batch_spec(config, targets=prime * k, form=training_form(config))

    def gradients(params, frozen, batch, keys):
        return trainer.gradients(params, frozen, normalize_batch(batch), keys)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prime * k))
    with jax.sharding.use_abstract_mesh(described(platform)):
        jaxpr = jax.make_jaxpr(gradients)(params, frozen, dict(spec), keys).jaxpr

    def scaled(sources: int) -> Callable[[int], int]:
        return lambda size: size // prime * sources if size % prime == 0 else size

    few, two, many, more = (peak_bytes(jaxpr, scaled=scaled(sources)) for sources in BATCHES)
    per_source = (more - many) / (BATCHES[3] - BATCHES[2])
    return Step(
        least=max(2 * few - two, 0) + summed,
        fixed=max(round(many - BATCHES[2] * per_source), 0) + summed,
        per_image=-(-round(per_source) // k),
    )


def _prime(*trees: Any) -> int:
    """The first of PRIMES that divides no dimension of these arrays. Raises ValueError where there is none."""
    sides = {side for leaf in jax.tree.leaves(trees) for side in leaf.shape}
    found = next((prime for prime in PRIMES if all(side % prime for side in sides)), None)
    if found is None:
        raise ValueError(
            f"every one of {PRIMES} divides some dimension of this model; the estimate cannot tell its batch"
        )
    return found


def peak_bytes(jaxpr: core.Jaxpr, *, scaled: Callable[[int], int] = lambda size: size) -> int:
    """Most bytes alive at once among what the operations make, results included and inputs left out.

    scaled: what an array of that many entries is counted as.
    """
    size_of = functools.partial(_bytes, scaled=scaled)
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
        name = eqn.primitive.name
        subs = [] if name in _KERNELS else inner_jaxprs(eqn.params)
        inner = max((peak_bytes(sub, scaled=scaled) for sub in subs), default=0)
        made = {var: size_of(var) for var in eqn.outvars if var not in root}
        dying = {
            v: alive[v] for v in (root.get(v, v) for v in _variables(eqn.invars)) if v in alive and last_use[v] == i
        }
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


def inner_jaxprs(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    """The programs inside an operation (of a jit, a loop, a branch), by its parameters."""
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


def _bytes(var: Any, *, scaled: Callable[[int], int]) -> int:
    aval = var.aval
    if not hasattr(aval, "shape"):
        return 0
    size = 16 if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else aval.dtype.itemsize
    return scaled(math.prod(aval.shape)) * size


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
