"""TPU generations as their public documentation states them, and a step time predicted from that: a prediction."""

from __future__ import annotations

import dataclasses
import math
import re

from truepose_jax.config import ConfigError
from truepose_jax.training.flops import peak_flops
from truepose_jax.training.memory import DEVICES, GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: peak bf16 a second. hbm: bytes a second. ici: bytes a second that all of a chip's links send together.
    memory: bytes of HBM that the compiler leaves to a program."""

    flops: float
    hbm: float
    ici: float
    memory: int


GB = 1e9
_BANDWIDTHS = {"v5e": (819 * GB, 1600e9 / 8), "v5p": (2765 * GB, 4800e9 / 8), "v6e": (1600 * GB, 3200e9 / 8)}
"""(hbm, ici): docs.cloud.google.com/tpu/docs, the pages v5e, v5p and v6e."""
CHIPS = {
    kind: Chip(peak_flops(kind), *_BANDWIDTHS[kind], memory=int(gib * GIB))
    for kind, _, gib in DEVICES
    if kind in _BANDWIDTHS
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """name "v5e:4x4" as jax.experimental.topologies takes it."""

    name: str

    def __post_init__(self):
        if not re.fullmatch(r"(v5e|v5p|v6e):\d+(x\d+){1,2}", self.name):
            raise ConfigError(f"topology {self.name!r} is not KIND:AxB or KIND:AxBxC with KIND of {', '.join(CHIPS)}")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.name.partition(":")[2].split("x"))


def predicted(chip: Chip, *, flops: float, hbm_bytes: float, wire_bytes: float) -> dict[str, float]:
    """Seconds of a step's parts at the stated peaks, and the efficiency against one chip that sends nothing.

    Lower: nothing of the sending hides behind computing; upper: all that can. Latencies and launches are left out, and
    no program reaches the peaks: slower computing hides more, so the efficiency of a real run lies nearer to the upper.
    """
    compute, memory, send = flops / chip.flops, hbm_bytes / chip.hbm, wire_bytes / chip.ici
    busy = max(compute, memory)
    return {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "collective_seconds": send,
        "efficiency_lower": busy / (busy + send) if busy else math.nan,
        "efficiency_upper": busy / max(busy, send) if busy else math.nan,
    }
