"""The Method protocol: what the trainer and the samplers need to know of a paper, and all they may know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
from jaxtyping import Array, Float, Int

Params = Mapping[str, Any]
"""Trainable parameters, a tree of float32 arrays."""

Frozen = Mapping[str, Any]
"""Parameters that no optimizer touches (the autoencoder); empty where there are none."""

Batch = Mapping[str, jax.Array]
"""input_pipeline/schema.py, BATCH_FIELDS, as device arrays."""

OF_KEPT = ("hpfa_", "caa_", "carry_")
"""Beginnings of the names of metrics that are means over the samples whose source was not dropped."""

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]


@flax.struct.dataclass
class Conditioning:
    """Everything denoise needs that does not depend on t; computed once per image when sampling.

    pose: features of the target pose, kept in both branches of the guidance.
    sites: what each transformer block reads of the source, by site name; None where the source is dropped,
        so that the unconditional branch runs no source computation.
    carry: what the half-cell head reads (models/carry.py); None where there is no head.
    """

    pose: Float[Array, "b h w c"]
    sites: Mapping[str, Any] | None
    carry: Any = None


class Method(Protocol):
    """One paper: its modules wired, its loss, its denoiser. The loop never asks which paper it is."""

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> Params:
        """Random parameters. The tree's top level names the networks (source_net, target_net, fusion, ...)."""
        ...

    def latent_spec(self, image_hw: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latent of an image of `image_hw` pixels. Raises ValueError where it does not fit."""
        ...

    def condition(self, params: Params, frozen: Frozen, batch: Batch) -> Conditioning:
        """The t-independent part. Reads params['source_net'], ['fusion'], ['pose_encoder']; no TargetNet."""
        ...

    def null(self, conditioning: Conditioning) -> Conditioning:
        """The unconditional branch's conditioning (guidance, Eq. 11)."""
        ...

    def denoise(
        self, params: Params, x_t: Float[Array, "b h w c"], t: Int[Array, " b"], conditioning: Conditioning
    ) -> Float[Array, "b h w c"]:
        """The network's prediction (eps, v or x0 as the schedule says) for noisy latents at timesteps t."""
        ...

    def encode(self, frozen: Frozen, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Images in [-1, 1] to latents, without noise: what an edit keeps of its reference."""
        ...

    def decode(self, frozen: Frozen, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Latents to images in [-1, 1] (clipped)."""
        ...

    carries: bool
    """Whether there is an attention over the source's cells that `carried` can show."""

    def carried(self, params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "b H W 3"]:
        """The source as images, seen through the last attention that reads it, when the sample is batch["target"]: what a sheet
        shows beside the picture. Only where `carries`."""
        ...

    def loss(
        self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
    ) -> tuple[Float[Array, ""], Mapping[str, jax.Array]]:
        """The training loss and its metrics. Randomness (noise, timesteps, drops) comes from `keys` [b] alone, one
        key per target, so that however the batch is cut every sample meets the same noise.

        Of metrics, bin_* and kept are sums, those of OF_KEPT means over the kept samples, the others over the valid ones."""
        ...

    param_rules: tuple[tuple[str, tuple[str | None, ...]], ...]
    """(regex over 'a/b/kernel' paths, mesh axes) for tensor parallelism; first match wins, no match: FSDP default."""

    no_decay: str
    """Regex of parameters that weight decay must leave alone (those that never get a gradient)."""
