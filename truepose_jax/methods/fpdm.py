"""FPDM's second stage: a denoising UNet that reads DINOv2's tokens of the source, the pose, and the first stage's embedding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.config import Config, DiffusionConfig, FPDMModel
from truepose_jax.diffusion import losses
from truepose_jax.diffusion.guidance import Branches, two_branches
from truepose_jax.methods.base import BatchSpec, Needs, Swap, heeds_attention
from truepose_jax.methods.denoising import (
    TENSOR_RULES,
    loss_metrics,
    noised,
    per_row,
    positions,
    without_invalid,
)
from truepose_jax.models.context import ContextKeys, ContextSide, context_block
from truepose_jax.models.dinov2 import IMAGENET_MEAN, IMAGENET_STD, Dinov2
from truepose_jax.models.fpdm import ImagePoseFusion, Projection
from truepose_jax.models.pose_encoder import pose_encoder
from truepose_jax.models.unet import UNet2DCondition
from truepose_jax.models.vae import Autoencoder
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import constrain


def needs(model: FPDMModel) -> Needs:
    read, networks = ("source_square", "target_pose"), ("autoencoder", "dino")
    letters = {"q": model.dino.image_size}
    if model.fusion_embedding:
        read, networks = (*read, "source_small", "pose_small"), (*networks, "ipf")
        letters |= {"r": model.ipf.image_size}
    return Needs(train=(*read, "target"), sample=read, letters=letters, networks=networks, drawing=model.skeleton)


def make(config: Config, autoencoder: Autoencoder, networks: Mapping[str, Any]) -> FPDM:
    """networks: "dino", a Dinov2Config, and "ipf", the first stage's CLIPVisionConfig."""
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    ipf = ImagePoseFusion(networks["ipf"], dtype=dtype) if model.fusion_embedding else None
    return FPDM(model, config.diffusion, autoencoder, Dinov2(networks["dino"], dtype=dtype), ipf)


@flax.struct.dataclass
class FPDMConditioning:
    """None: dropped. pose: features after conv_in. sites: attn2's keys and values. fused: what is added to the time embedding,
    unfused: the same of no embedding."""

    pose: Float[Array, "b h w c"] | None
    sites: Mapping[str, ContextKeys] | None
    fused: Float[Array, "b d"] | None
    unfused: Float[Array, "b d"] | None


@heeds_attention
@dataclasses.dataclass(frozen=True)
class FPDM:
    """The Denoiser of FPDM. Parameters: unet, context, pose_encoder, source_projection, fusion_embedding (with
    model.fusion_embedding). Frozen: autoencoder, dino, and ipf, whose dropout is off here."""

    model: FPDMModel
    diffusion: DiffusionConfig
    autoencoder: Autoencoder
    dino: Dinov2
    ipf: ImagePoseFusion | None

    param_rules = TENSOR_RULES
    no_decay = "(?!)"
    fresh = "(?!)"
    carries = False

    @property
    def needs(self) -> Needs:
        return needs(self.model)

    @functools.cached_property
    def swaps(self) -> dict[str, Swap]:
        tokens, fusion = Swap(("source_square",)), Swap(("source_small",))
        if not self.model.fusion_embedding:
            return {"tokens_swapped": tokens}
        both = Swap(tokens.fields + fusion.fields)
        return {"tokens_swapped": tokens, "fusion_swapped": fusion, "both_swapped": both}

    @functools.cached_property
    def dtype(self):
        return jnp.dtype(self.model.dtype)

    @functools.cached_property
    def unet(self) -> UNet2DCondition:
        block = functools.partial(context_block, dtype=self.dtype)
        return UNet2DCondition(self.model.unet, block, remat=self.model.remat, dtype=self.dtype)

    @functools.cached_property
    def context(self) -> ContextSide:
        return ContextSide(self.model.unet, dtype=self.dtype)

    @functools.cached_property
    def pose_encoder(self):
        width = self.model.unet.block_out_channels[0]
        return pose_encoder(self.model.pose_encoder, width, stride=self.autoencoder.factor, dtype=self.dtype)

    @functools.cached_property
    def source_projection(self) -> Projection:
        m = self.model
        return Projection(m.unet.cross_attention_dim, m.projection, m.dropout, norm=True, dtype=self.dtype)

    @functools.cached_property
    def fusion_embedding(self) -> Projection:
        m = self.model
        return Projection(4 * m.unet.block_out_channels[0], m.projection, m.dropout, dtype=self.dtype)

    def sample_spec(self, batch):
        h, w = batch["target_pose"].shape[1:3]
        return h // self.autoencoder.factor, w // self.autoencoder.factor, self.autoencoder.channels

    def init(self, key, batch_spec: BatchSpec):
        pose = jnp.zeros(batch_spec["target_pose"].shape)
        x, t = jnp.zeros((len(pose), *self.sample_spec({"target_pose": pose}))), jnp.zeros((len(pose),), jnp.int32)
        params = {}

        def made(name, module, *inputs):
            found, variables = module.init_with_output(rng.key(key, name), *inputs)
            params[name] = variables["params"]
            return found

        tokens = made("source_projection", self.source_projection, jnp.zeros((1, 1, self.dino.config.hidden_size)))
        sites = made("context", self.context, tokens)
        features = made("pose_encoder", self.pose_encoder, pose)
        if self.model.fusion_embedding:
            made("fusion_embedding", self.fusion_embedding, jnp.zeros((1, self.ipf.config.projection_dim)))
        sites = {name: ContextKeys(*(jnp.repeat(a, len(x), axis=0) for a in (s.k, s.v))) for name, s in sites.items()}
        unet = self.unet.init(rng.key(key, "unet"), x, t, None, features=sites, after_conv_in=features)
        return {"unet": unet["params"], **params}

    def condition(self, params, frozen, batch, *, keep=None, keys=None) -> FPDMConditioning:
        """keep: {"pose", "tokens", "fusion"} [b]: 0 drops that row's. keys [b]: of the projections' dropout; None: off."""
        b, s = len(batch["target_pose"]), len(batch["source_square"])
        keep = keep or {}

        def apply(name, *inputs):
            return getattr(self, name).apply({"params": params[name]}, *inputs)

        def kept(part, x):
            return x * keep[part].reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype) if part in keep else x

        pixels = (batch["source_square"] + 1) / 2
        pixels = (pixels - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        seen = jax.lax.stop_gradient(self.dino.apply({"params": frozen["dino"]}, pixels))
        tokens = apply("source_projection", seen, None if keys is None else keys[:: b // s])
        tokens = kept("tokens", jnp.repeat(tokens, b // s, axis=0))
        pose = kept("pose", apply("pose_encoder", batch["target_pose"]))
        fused = unfused = None
        if self.model.fusion_embedding:
            both = self.ipf.apply({"params": frozen["ipf"]}, batch["source_small"], batch["pose_small"])
            both = kept("fusion", jax.lax.stop_gradient(both))
            fused = apply("fusion_embedding", both, keys)
            unfused = apply("fusion_embedding", jnp.zeros_like(both))
        return FPDMConditioning(pose, apply("context", tokens), fused, unfused)

    def null(self, conditioning: FPDMConditioning) -> FPDMConditioning:
        """Neither source nor pose nor embedding."""
        return conditioning.replace(pose=None, sites=None, fused=conditioning.unfused)

    def branches(self, conditioning: FPDMConditioning, scale: float) -> Branches:
        """u + w_s (p - u) + w_f (f - p): u nothing, p pose and source, f all three; w_f = scale, w_s = source_share x scale."""
        null, share = self.null(conditioning), self.model.source_share
        if share == 1.0 or not self.model.fusion_embedding:
            return two_branches(conditioning, null, scale)
        partial = conditioning.replace(fused=conditioning.unfused)
        return Branches(null, (((share - 1.0) * scale, partial), (scale, conditioning)))

    def denoise(self, params, x_t, t, conditioning):
        return self._unet(params, x_t, t, conditioning)[0]

    def _unet(self, params, x_t, t, conditioning: FPDMConditioning):
        after = positions(self.model, x_t)
        after = after if conditioning.pose is None else conditioning.pose + after
        x_t = constrain(x_t, "batch", "height", "width", "channels")
        return self.unet.apply(
            {"params": params["unet"]},
            x_t,
            t,
            None,
            features=conditioning.sites,
            after_conv_in=after,
            after_time=conditioning.fused,
        )

    def encode(self, frozen, images):
        return self.autoencoder.encode_mean(frozen.get("autoencoder"), images)

    def decode(self, frozen, latents):
        return jnp.clip(self.autoencoder.decode(frozen.get("autoencoder"), latents), -1.0, 1.0)

    def loss(self, params, frozen, batch, keys):
        """The mean weighted squared error over the valid rows. Metrics: loss, bin_sums, bin_counts; kept, the rows whose tokens
        were not dropped, and over these context_rms [sites], the root mean square of attn2's updates."""
        batch = without_invalid(batch)
        x0 = self.autoencoder.encode_sample(frozen.get("autoencoder"), batch["target"], keys)
        x0 = constrain(x0, "batch", "height", "width", "channels")
        noisy = noised(self.diffusion, x0, keys)
        rate = self.diffusion.drop_rate
        keep = {
            part: (per_row(keys, f"drop_{part}", jax.random.uniform) >= rate).astype(jnp.float32)
            for part in ("pose", "tokens", "fusion")
        }
        dropout = jax.vmap(lambda key: rng.key(key, "dropout"))(keys)
        conditioning = self.condition(params, frozen, batch, keep=keep, keys=dropout)
        output, rms = self._unet(params, noisy.x_t, noisy.t, conditioning)
        metrics = loss_metrics(noisy, noisy.errors(output), batch["valid"], self.diffusion.schedule.steps)
        weights = keep["tokens"] * batch["valid"]
        metrics["kept"] = jnp.sum(weights)
        metrics["context_rms"] = jnp.stack(
            [losses.weighted_mean(rms[site.name], weights) for site in self.model.unet.sites]
        )
        return metrics["loss"], jax.lax.stop_gradient(metrics)
