"""What pictures will take, from shapes alone and a product timed on the devices at hand: no weights are read, nothing of the
model is compiled."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp

from truepose_jax.inference.pipeline import Run
from truepose_jax.pretrained.factory import planned
from truepose_jax.runtime.durations import describe
from truepose_jax.sampling.sampler import Sampler, Sampling
from truepose_jax.training.flops import flops_of
from truepose_jax.training.init import batch_spec
from truepose_jax.training.memory import GIB, bytes_of, peak_bytes

SHARE = 0.4
"""Of the rate of a large product, what sampling is taken to reach: 41 of 98 GFLOP a second on one CPU core (the shipped model,
float32); anywhere else a guess."""

SIDE = 1024
"""Of the square product that is timed."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """weights, frozen, working: bytes, the last of one batch. flops: of one picture. seconds: of one picture, without reading,
    writing and compilation."""

    weights: int
    frozen: int
    working: int
    flops: float
    seconds: float

    def report(self, *, pictures: int, batch: int) -> str:
        """For people; of `pictures` pictures, `batch` at once."""
        total = (self.weights + self.frozen + self.working) / GIB
        kind, count = jax.devices()[0].device_kind, jax.local_device_count()
        return "\n".join(
            [
                f"memory   {total:.2f} GiB: weights {self.weights / GIB:.2f}, frozen networks {self.frozen / GIB:.2f}, "
                f"{batch} pictures at once {self.working / GIB:.2f} (from shapes; the program and its libraries come on top)",
                f"work     {self.flops / 1e9:.4g} GFLOP a picture",
                f"time     about {describe(self.seconds)} a picture, {describe(self.seconds * pictures)} for {pictures} "
                f"({count} x {kind}, by a product timed just now: right to a factor of two on CPUs); compilation comes before",
            ]
        )


def estimate(run: Run, sampling: Sampling, *, batch: int, dtype: str | None = None) -> Estimate:
    """Of a run's pictures, `batch` at once on one device."""
    config = run.config
    model = dataclasses.replace(config.model, dtype=dtype or config.model.dtype, remat=False)
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, targets_per_source=1))
    method, frozen = planned(config)
    params = jax.eval_shape(lambda key: method.init(key, batch_spec(config)), jax.random.key(0))
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype if x.ndim > 1 else x.dtype), params)
    spec = dict(batch_spec(config, targets=batch))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    sampler = Sampler(method, config.diffusion.schedule, config.diffusion.spacing, sampling)
    jaxpr = jax.make_jaxpr(sampler.sample)(held, frozen, spec, keys).jaxpr
    flops = flops_of(jaxpr) / batch
    rate = SHARE * product_rate(model.dtype) * jax.local_device_count()
    return Estimate(bytes_of(held), bytes_of(frozen), peak_bytes(jaxpr), flops, flops / rate)


def product_rate(dtype: str, *, seconds: float = 0.2) -> float:
    """FLOPs a second of a square product of SIDE on the first device, timed for about so long."""
    multiply = jax.jit(lambda a: a @ a)
    a = jnp.full((SIDE, SIDE), 1.0 / SIDE, dtype)
    multiply(a).block_until_ready()
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds or count < 2:
        multiply(a).block_until_ready()
        count += 1
    return count * 2 * SIDE**3 / spent
