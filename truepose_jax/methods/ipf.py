"""FPDM's first stage: an embedding of a person in a pose, from a photo and a pose picture, near that of the photo itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from truepose_jax.config import Config, FirstStageModel
from truepose_jax.methods.base import Needs, heeds_attention
from truepose_jax.methods.denoising import without_invalid
from truepose_jax.models.fpdm import ImagePoseFusion, spf_loss
from truepose_jax.runtime import rng

READ = ("source_small", "target_small", "pose_small")


def needs(model: FirstStageModel) -> Needs:
    letters = {"r": model.clip.image_size}
    return Needs(READ, READ, letters, networks=(), drawing=model.skeleton)


def make(config: Config, autoencoder: None, networks: Mapping[str, Any]) -> FirstStage:
    del autoencoder, networks
    return FirstStage(config.model)


@heeds_attention
@dataclasses.dataclass(frozen=True)
class FirstStage:
    """The Trainable of FPDM's first stage. Parameters: clip (one tower for all three pictures), combiner."""

    model: FirstStageModel

    param_rules = (
        (r"/self_attn/[qkv]_proj/kernel$", (None, "tensor")),
        (r"/self_attn/out_proj/kernel$", ("tensor", None)),
        (r"/mlp/fc1/kernel$", (None, "tensor")),
        (r"/mlp/fc2/kernel$", ("tensor", None)),
    )
    no_decay = "(?!)"
    fresh = "(?!)"

    @property
    def needs(self) -> Needs:
        return needs(self.model)

    @functools.cached_property
    def network(self) -> ImagePoseFusion:
        return ImagePoseFusion(self.model.clip, self.model.dropout, dtype=jnp.dtype(self.model.dtype))

    def init(self, key, batch_spec):
        batch = {name: jnp.zeros((1, *spec.shape[1:])) for name, spec in batch_spec.items()}
        return self.network.init(rng.key(key, "ipf"), batch["source_small"], batch["pose_small"])["params"]

    def loss(self, params, frozen, batch, keys):
        """SPF over all valid rows of the global batch.

        Metrics: loss; top1, top5: share of the targets nearest to, or among the five nearest to, their own fused embedding
        among all fused embeddings and sources of the batch; place: the mean position of their own there, from 1.
        """
        del frozen
        batch = without_invalid(batch)
        b, apply = len(batch["valid"]), functools.partial(self.network.apply, {"params": params})
        photos = [(batch[name] + 1) / 2 for name in ("source_small", "target_small")]
        found = apply(jnp.concatenate([*photos, batch["pose_small"]]), method="embed")
        source, target, pose = jnp.split(found, [b, 2 * b])
        fused = apply(pose, source, jax.vmap(lambda key: rng.key(key, "dropout"))(keys), method="combine")
        loss, logits = spf_loss(
            target, fused, source, batch["valid"], temperature=self.model.temperature, raw=self.model.raw
        )
        own = jnp.diagonal(logits[:, :b])
        place = 1 + jnp.sum(logits > own[:, None], axis=1)
        total = jnp.maximum(jnp.sum(batch["valid"]), 1.0)
        share = lambda hit: jnp.sum(hit * batch["valid"]) / total  # noqa: E731
        metrics = {"loss": loss, "top1": share(place <= 1), "top5": share(place <= 5), "place": share(place)}
        return loss, jax.lax.stop_gradient(metrics)
