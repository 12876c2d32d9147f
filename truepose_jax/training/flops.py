"""How many floating-point operations a program of any method takes, counted where it is traced, and what share of a chip's peak
that is.

Model FLOPs: two per multiplication of every convolution (padding multiplied too), dense layer and attention product, heads at
their true width; sums, norms, activations, softmaxes and what nothing reads are left out, and rematerialisation is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
from jax.extend import core

from truepose_jax.config import Config
from truepose_jax.methods.base import BatchSpec, Frozen
from truepose_jax.pretrained.factory import planned
from truepose_jax.training.init import batch_spec
from truepose_jax.training.memory import inner_jaxprs
from truepose_jax.training.step import Trainer

PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL|H200 NVL", 835e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100|A800", 312e12),
    (r"TPU v4$|^v4$", 275e12),
    (r"TPU v5 lite|v5e", 197e12),
    (r"TPU v5p|TPU v5$|^v5p$", 459e12),
    (r"TPU v6 lite|v6e", 918e12),
)
"""(pattern over the device's name, dense bf16 FLOPs a second): the first that is found. NVIDIA's data sheets of A100, H100 and
H200 (halved where they state sparsity); cloud.google.com/tpu/docs, system architecture of each version."""


def flops_of(jaxpr: core.Jaxpr) -> int:
    """Of the products and convolutions of a traced program that its results need (padding multiplied too), loops of known length
    unrolled. Of a branch the longest is counted, of a loop of unknown length one round, of a Pallas kernel nothing."""
    total, needed = 0, set(map(id, jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if needed.isdisjoint(map(id, eqn.outvars)):
            continue
        needed |= set(map(id, eqn.invars))
        name, inner = eqn.primitive.name, [flops_of(sub) for sub in inner_jaxprs(eqn.params)]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            products = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
            total += products // math.prod(eqn.params["lhs_dilation"])  # the zeros between what a stride had skipped
        elif name == "cond":
            total += max(inner)
        elif name != "pallas_call":
            total += sum(inner) * eqn.params.get("length", 1)
    return total


def counted(config: Config) -> Config:
    """As programs are counted: all at once, nothing made twice, and attention as products that the trace shows."""
    model = dataclasses.replace(config.model, remat=False, attention="reference")
    return dataclasses.replace(
        config, model=model, optim=dataclasses.replace(config.optim, accumulation=1, noise_scale="off")
    )


def step_flops(trainer: Trainer, frozen: Frozen, batch: BatchSpec) -> int:
    """Of the gradients of one training step, the frozen networks that it runs included; from shapes alone."""
    params = jax.eval_shape(lambda: trainer.init(jax.random.key(0), batch))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch["valid"].shape[0]))
    gradients = jax.make_jaxpr(lambda *inputs: trainer.gradients(*inputs)[0])(params, frozen, dict(batch), keys)
    return flops_of(gradients.jaxpr)


def train_flops(config: Config) -> int:
    """Per image of a training step, where data.targets_per_source images share a source."""
    config = counted(config)
    method, frozen = planned(config)
    batch = batch_spec(config)
    return step_flops(Trainer(config, method), frozen, batch) // batch["valid"].shape[0]


def peak_flops(device_kind: str) -> float | None:
    """The dense bf16 peak of a chip by jax.Device.device_kind; None where it is not in the table (a CPU)."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)


def utilisation(flops: float, seconds: float, device_kind: str, *, devices: int = 1) -> float | None:
    """MFU: model FLOPs of a step over what `devices` chips could do in its time; None without a known peak."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops / seconds / (peak * devices)


def mfu_per_image_rate(config: Config, device_kind: str, devices: int) -> float | None:
    """What a training run's images a second are multiplied by to give its MFU on `devices` chips; None for a chip without a peak
    in the table (a CPU)."""
    if peak_flops(device_kind) is None:
        return None
    return utilisation(train_flops(config), 1.0, device_kind, devices=devices)
