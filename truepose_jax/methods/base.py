"""The protocols of a method: what training (Trainable) and sampling (Denoiser) need to know of a paper, and all they may know."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int

from truepose_jax.diffusion.guidance import Branches
from truepose_jax.kernels.attention.api import default_implementation

Params = Mapping[str, Any]
"""Trainable parameters, a tree of float32 arrays."""

Frozen = Mapping[str, Any]
"""Parameters that no optimizer touches, by the network's role (autoencoder, clip, ...); empty where there are none."""

Batch = Mapping[str, jax.Array]
"""Fields of input_pipeline/fields.py as device arrays: those that the method asks for by name."""

OF_KEPT = ("hpfa_", "caa_", "carry_", "context_")
"""Beginnings of the names of metrics that are means over the samples whose source was not dropped."""

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]

Conditioning = Any
"""Everything denoise needs that does not depend on t, computed once per image when sampling: a tree of the method's own."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a method reads, as its configuration alone tells.

    train, sample: names of fields (input_pipeline/fields.py) that `loss` and `condition` read, "valid" aside. letters: sizes of
    the fields' letters beside b, s, h and w. draw: rows are (source, target) "pairs", or a "canvas" of four photos of one
    person. pictures: that one row makes. networks: roles in Frozen. tokens: whether region tokens are made, and so a source's
    map is read. source_pose: whether a source's own pose is, when sampling. drawing: how poses are drawn
    (input_pipeline/skeletons.py).
    """

    train: tuple[str, ...]
    sample: tuple[str, ...]
    letters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    draw: str = "pairs"
    pictures: int = 1
    networks: tuple[str, ...] = ("autoencoder",)
    tokens: bool = False
    source_pose: bool = False
    drawing: str = "cfld"


class Swap(NamedTuple):
    """What the swap test takes from another person's row. meet: fields of bits that both rows must have, for half a swap."""

    fields: tuple[str, ...]
    meet: tuple[str, ...] = ()


class Trainable(Protocol):
    """One paper's network that can be trained. The loop never asks which paper it is."""

    needs: Needs

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> Params:
        """Random parameters. The tree's top level names the networks (source_net, target_net, fusion, ...)."""
        ...

    def loss(
        self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
    ) -> tuple[Float[Array, ""], Mapping[str, jax.Array]]:
        """The training loss and its metrics. Randomness (noise, timesteps, drops) comes from `keys` [b] alone, one
        key per row, so that however the batch is cut every sample meets the same noise.

        Of metrics, bin_* and kept are sums, those of OF_KEPT means over the kept samples, the others over the valid ones."""
        ...

    param_rules: tuple[tuple[str, tuple[str | None, ...]], ...]
    """(regex over 'a/b/kernel' paths, mesh axes) for tensor parallelism; first match wins, no match: FSDP default."""

    no_decay: str
    """Regex of parameters that weight decay must leave alone (those that never get a gradient)."""

    fresh: str
    """Regex of parameters that may begin random though the run that config.init_from names has none ("(?!)": none may)."""


class Denoiser(Trainable, Protocol):
    """One paper that makes pictures: its modules wired, its loss, its denoiser."""

    def sample_spec(self, batch: Batch) -> tuple[int, int, int]:
        """(h, w, c) of the latent of one row. Raises ValueError where the pictures' size does not fit."""
        ...

    def condition(self, params: Params, frozen: Frozen, batch: Batch) -> Conditioning:
        """The t-independent part; reads no parameters of the denoising network."""
        ...

    def branches(self, conditioning: Conditioning, scale: float) -> Branches:
        """What guidance of this scale runs `denoise` with."""
        ...

    def denoise(
        self, params: Params, x_t: Float[Array, "b h w c"], t: Int[Array, " b"], conditioning: Conditioning
    ) -> Float[Array, "b h w c"]:
        """The network's prediction (eps, v or x0 as the schedule says) for noisy latents at timesteps t."""
        ...

    def encode(self, frozen: Frozen, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Images in [-1, 1] to latents, without noise: what an edit keeps of its reference."""
        ...

    def decode(self, frozen: Frozen, latents: Float[Array, "b h w c"]) -> Float[Array, "b *v H W 3"]:
        """Latents to images in [-1, 1] (clipped); v where a row makes several pictures."""
        ...

    swaps: Mapping[str, Swap]
    """The swap test: name -> what is taken from another person."""

    carries: bool
    """Whether there is an attention over the source's cells that `carried` can show."""

    def carried(self, params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "b H W 3"]:
        """The source as images, seen through the last attention that reads it, when the sample is batch["target"]: what a sheet
        shows beside the picture. Only where `carries`."""
        ...


ATTENDING = ("condition", "denoise", "encode", "decode", "carried", "loss")
"""Functions of a method that may attend."""


def heeds_attention(method: type) -> type:
    """A decorator of a method's class: its functions take the attention that its `model.attention` names, while tracing."""

    def heeding(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(self, *args, **kwargs):
            if self.model.attention == "auto":  # whoever calls may have said something
                return function(self, *args, **kwargs)
            with default_implementation(self.model.attention):
                return function(self, *args, **kwargs)

        return call

    for name in ATTENDING:
        if hasattr(method, name):
            setattr(method, name, heeding(getattr(method, name)))
    return method
