"""FPDM's own parts (arXiv 2412.07333, and its public code): the image-pose fusion of the first stage, the projections of the
second. Names are the code's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.models.attention import layer_norm
from truepose_jax.models.clip import CLIP_MEAN, CLIP_STD, CLIPVisionConfig, CLIPVisionModelWithProjection
from truepose_jax.models.dropout import KeyedDropout

TINY = 1e-12


def normalise(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """x / max(|x|, 1e-12). The gradient at 0 is 0 and not NaN."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squares, TINY**2))


class Combiner(nn.Module):
    """Embeddings of a pose picture and of a photo [b e] -> one of that person in that pose [b e], of length 1.

    F = normalise(W_o h + g p + (1 - g) i) with h and the gate g from both (CLIP4Cir's combiner). keys [b]: of the dropout.
    """

    dropout: float = 0.5

    @nn.compact
    def __call__(
        self, pose: Float[Array, "b e"], image: Float[Array, "b e"], keys: jax.Array | None = None
    ) -> Float[Array, "b e"]:
        width = image.shape[-1]

        def layer(x, name):
            return KeyedDropout(self.dropout, name=f"{name}_dropout")(nn.relu(nn.Dense(width, name=name)(x)), keys)

        both = jnp.concatenate([layer(pose, "kpt_projection_layer"), layer(image, "image_projection_layer")], -1)
        gate = nn.sigmoid(nn.Dense(1, name="dynamic_scalar_3")(layer(both, "dynamic_scalar_0")))
        found = nn.Dense(width, name="output_layer")(layer(both, "combiner_layer"))
        return normalise(found + gate * pose + (1.0 - gate) * image)


class ImagePoseFusion(nn.Module):
    """The first stage: one CLIP tower for photos and pose pictures, and the combiner. Parameters: clip, combiner."""

    config: CLIPVisionConfig
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.clip = CLIPVisionModelWithProjection(self.config, dtype=self.dtype)
        self.combiner = Combiner(self.dropout)

    def embed(self, pictures: Float[Array, "b r r 3"]) -> Float[Array, "b e"]:
        """Of pictures in [0, 1], not normalised."""
        pixels = (pictures.astype(jnp.float32) - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
        return self.clip(pixels).image_embeds

    def combine(self, pose, image, keys=None) -> Float[Array, "b e"]:
        """Of embeddings."""
        return self.combiner(pose, image, keys)

    def __call__(self, source: Float[Array, "s r r 3"], pose: Float[Array, "b r r 3"]) -> Float[Array, "b e"]:
        """The fused embedding of each pose with its source, of photos in [-1, 1] and poses in [0, 1]; nothing is dropped."""
        image = jnp.repeat(self.embed((source + 1) / 2), len(pose) // len(source), axis=0)
        return self.combine(self.embed(pose), image)


class Projection(nn.Module):
    """Two layers to `features`: with norm, of DINOv2's tokens to attn2's context; without, of the fused embedding to what is
    added to the time embedding."""

    features: int
    hidden: int = 768
    dropout: float = 0.2
    norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *n d"], keys: jax.Array | None = None) -> Float[Array, "b *n e"]:
        x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x), approximate=False)
        x = KeyedDropout(self.dropout, name="dropout1")(x, keys)
        x = layer_norm(self.dtype, "norm")(x) if self.norm else x
        return KeyedDropout(self.dropout, name="dropout2")(
            nn.Dense(self.features, dtype=self.dtype, name="fc2")(x), keys
        )


def spf_loss(
    target: Float[Array, "b e"],
    fused: Float[Array, "b e"],
    source: Float[Array, "b e"],
    valid: Float[Array, " b"],
    *,
    temperature: float,
    raw: float,
) -> tuple[Float[Array, ""], Float[Array, "b 2*b"]]:
    """Source-enhanced pose fusion: InfoNCE of [T; S] against [F; S], each row's own column against all (its own source is
    among a target's negatives, which is the point), plus raw x mean |[S; S] - [F; S]|, whose second half is 0.

    Returns the loss and the targets' logits. Rows of valid 0 are neither rows nor columns.
    """
    rows, columns = jnp.concatenate([target, source]), jnp.concatenate([fused, source])
    weights = jnp.concatenate([valid, valid])
    there = weights > 0
    logits = normalise(rows) @ normalise(columns).T / temperature
    logits = jnp.where(there[None, :], logits, -jnp.inf)
    safe = jnp.where(there[:, None], logits, 0.0)
    each = jax.nn.logsumexp(safe, axis=1) - jnp.diagonal(safe)
    apart = jnp.mean(jnp.abs(jnp.concatenate([source, source]) - columns), axis=1)
    total = jnp.where(there, each + raw * apart, 0.0)
    return jnp.sum(total) / jnp.maximum(jnp.sum(weights), 1.0), safe[: len(target)]
