"""IMAGPose: four pictures of one person on one canvas, any of them given, the others made in their poses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from truepose_jax.config import Config, DiffusionConfig, IMAGPoseModel
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
from truepose_jax.models.clip import CLIP_MEAN, CLIP_STD
from truepose_jax.models.context import ContextKeys, ContextSide, context_block
from truepose_jax.models.dinov2 import Dinov2
from truepose_jax.models.imagpose import CrossViewAttention, TextureTokens, tile, untile
from truepose_jax.models.pose_encoder import pose_encoder
from truepose_jax.models.unet import AfterSite, UNet2DCondition
from truepose_jax.models.vae import Autoencoder
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import constrain

VIEWS = 4


def needs(model: IMAGPoseModel) -> Needs:
    return Needs(
        train=("views", "view_poses"),
        sample=("views", "view_poses", "given", "reference"),
        draw="canvas",
        pictures=VIEWS,
        networks=("autoencoder", "dino"),
        source_pose=True,
        drawing=model.skeleton,
    )


def make(config: Config, autoencoder: Autoencoder, networks: Mapping[str, Any]) -> IMAGPose:
    """networks: "dino", a Dinov2Config."""
    dino = Dinov2(networks["dino"], dtype=jnp.dtype(config.model.dtype))
    return IMAGPose(config.model, config.diffusion, autoencoder, dino)


@flax.struct.dataclass
class IMAGPoseConditioning:
    """pose: features after conv_in. ilc: which tiles are given, and their latents, beside the noisy latent. Both are kept in
    both branches. sites: attn2's keys and values of the reference; None: dropped."""

    pose: Float[Array, "b h w c"]
    ilc: Float[Array, "b h w d"]
    sites: Mapping[str, ContextKeys] | None


class FLC(nn.Module):
    """The reference's tokens for attn2: DINOv2's, brought to the context's width where it differs, and the texture's (None:
    left out). keep_high, keep_low [b]: 0 drops a row's."""

    features: int
    patch: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        seen: Float[Array, "b n d"],
        latents: Float[Array, "b h w c"] | None,
        keep_high: Float[Array, " b"] | None = None,
        keep_low: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b m e"]:
        high = seen.astype(self.dtype)
        if high.shape[-1] != self.features:
            high = nn.Dense(self.features, dtype=self.dtype, name="dino_projection")(high)
        parts = [high if keep_high is None else high * keep_high[:, None, None].astype(high.dtype)]
        if latents is not None:
            low = TextureTokens(self.features, self.patch, dtype=self.dtype, name="texture")(latents)
            parts.append(low if keep_low is None else low * keep_low[:, None, None].astype(low.dtype))
        return jnp.concatenate(parts, axis=1)


@heeds_attention
@dataclasses.dataclass(frozen=True)
class IMAGPose:
    """The Denoiser of IMAGPose. Parameters: unet (with motion_modules where model.cva), context, pose_encoder, flc. Frozen:
    autoencoder, dino."""

    model: IMAGPoseModel
    diffusion: DiffusionConfig
    autoencoder: Autoencoder
    dino: Dinov2

    param_rules = TENSOR_RULES
    no_decay = "(?!)"
    fresh = r"/motion_modules_\d+/"
    carries = False
    swaps = {  # noqa: RUF012
        "reference_swapped": Swap(("reference",)),
        "views_swapped": Swap(("views",)),
        "both_swapped": Swap(("reference", "views")),
    }

    @property
    def needs(self) -> Needs:
        return needs(self.model)

    @functools.cached_property
    def dtype(self):
        return jnp.dtype(self.model.dtype)

    @functools.cached_property
    def unet(self) -> UNet2DCondition:
        m = self.model
        block = functools.partial(context_block, dtype=self.dtype)
        kind = nn.remat(CrossViewAttention) if m.remat else CrossViewAttention

        def after(site: AfterSite, *, name: str) -> nn.Module:
            return kind(m.unet.norm_num_groups, dtype=self.dtype, name=name)

        return UNet2DCondition(m.unet, block, after if m.cva else None, remat=m.remat, dtype=self.dtype)

    @functools.cached_property
    def context(self) -> ContextSide:
        return ContextSide(self.model.unet, dtype=self.dtype)

    @functools.cached_property
    def flc(self) -> FLC:
        return FLC(self.model.unet.cross_attention_dim, self.model.patch, dtype=self.dtype)

    @functools.cached_property
    def pose_encoder(self):
        width = self.model.unet.block_out_channels[0]
        return pose_encoder(self.model.pose_encoder, width, stride=self.autoencoder.factor, dtype=self.dtype)

    def sample_spec(self, batch):
        h, w = batch["view_poses"].shape[2:4]
        return 2 * h // self.autoencoder.factor, 2 * w // self.autoencoder.factor, self.autoencoder.channels

    def init(self, key, batch_spec: BatchSpec):
        poses = jnp.zeros((1, *batch_spec["view_poses"].shape[1:]))
        shape = self.sample_spec({"view_poses": poses})
        params = {}

        def made(name, module, *inputs):
            found, variables = module.init_with_output(rng.key(key, name), *inputs)
            params[name] = variables["params"]
            return found

        h, w, c = shape
        latents = jnp.zeros((1, h // 2, w // 2, c)) if self.model.texture else None
        tokens = made("flc", self.flc, jnp.zeros((1, 1, self.dino.config.hidden_size)), latents)
        sites = made("context", self.context, tokens)
        features = made("pose_encoder", self.pose_encoder, tile(poses))
        x = jnp.zeros((1, h, w, c + self.model.extra_channels))
        t = jnp.zeros((1,), jnp.int32)
        unet = self.unet.init(rng.key(key, "unet"), x, t, None, features=sites, after_conv_in=features)
        return {"unet": unet["params"], **params}

    def condition(self, params, frozen, batch, *, keep_high=None, keep_low=None) -> IMAGPoseConditioning:
        """keep_high, keep_low [b]: 0 drops that row's tokens of DINOv2, of the texture."""
        m, given, vae = self.model, batch["given"], frozen.get("autoencoder")

        def apply(name, *inputs):
            return getattr(self, name).apply({"params": params[name]}, *inputs)

        latents = self.autoencoder.encode_mean(vae, batch["reference"]) if m.texture else None
        tokens = apply("flc", self._seen(frozen, batch["reference"]), latents, keep_high, keep_low)
        h, w, _ = self.sample_spec(batch)
        flags = jnp.broadcast_to(given[..., None, None, None], (len(given), VIEWS, h // 2, w // 2, 1))
        parts = [tile(flags.astype(jnp.float32))]
        if m.ilc_image:
            shown = jnp.where(given[..., None, None, None], batch["views"], -1.0)
            parts.append(self.autoencoder.encode_mean(vae, tile(shown)))
        pose = apply("pose_encoder", tile(batch["view_poses"]))
        ilc = constrain(jnp.concatenate(parts, axis=-1), "batch", "height", "width", "channels")
        return IMAGPoseConditioning(pose + positions(m, pose), ilc, apply("context", tokens))

    def _seen(self, frozen, photos: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """DINOv2's tokens of the photos squashed to its square, with CLIP's pixel statistics as the public code has it."""
        side = self.model.dino.image_size
        pixels = jax.image.resize((photos + 1) / 2, (len(photos), side, side, 3), "cubic")
        pixels = (jnp.clip(pixels, 0.0, 1.0) - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
        return jax.lax.stop_gradient(self.dino.apply({"params": frozen["dino"]}, pixels))

    def null(self, conditioning: IMAGPoseConditioning) -> IMAGPoseConditioning:
        """No reference; pose and given tiles stay."""
        return conditioning.replace(sites=None)

    def branches(self, conditioning: IMAGPoseConditioning, scale: float) -> Branches:
        return two_branches(conditioning, self.null(conditioning), scale)

    def denoise(self, params, x_t, t, conditioning):
        return self._unet(params, x_t, t, conditioning)[0]

    def _unet(self, params, x_t, t, conditioning: IMAGPoseConditioning):
        x = jnp.concatenate([x_t, conditioning.ilc.astype(x_t.dtype)], axis=-1)
        x = constrain(x, "batch", "height", "width", "channels")
        return self.unet.apply(
            {"params": params["unet"]}, x, t, None, features=conditioning.sites, after_conv_in=conditioning.pose
        )

    def encode(self, frozen, images):
        return self.autoencoder.encode_mean(frozen.get("autoencoder"), images)

    def decode(self, frozen, latents):
        """The four pictures of each row [b 4 h w 3], the given ones too as the model has them."""
        return untile(jnp.clip(self.autoencoder.decode(frozen.get("autoencoder"), latents), -1.0, 1.0))

    def loss(self, params, frozen, batch, keys):
        """The mean weighted squared error of whole canvases over the valid rows. Which tiles are given and which of them is the
        reference is drawn from each row's key. Metrics: loss, bin_sums, bin_counts; kept, the rows with a reference, and over
        these context_rms [sites], the root mean square of attn2's updates."""
        batch = without_invalid(batch)
        x0 = self.autoencoder.encode_sample(frozen.get("autoencoder"), tile(batch["views"]), keys)
        x0 = constrain(x0, "batch", "height", "width", "channels")
        # Else compilers run both passes of the VAE over the canvas at once, and hold twice the memory.
        views, x0 = jax.lax.optimization_barrier((batch["views"], x0))
        noisy = noised(self.diffusion, x0, keys)
        given = per_row(keys, "given", lambda key: draw_given(key, nothing=self.model.mask_all))
        chosen = jax.vmap(lambda key, g: draw_reference(rng.key(key, "reference"), g))(keys, given)
        reference = jnp.take_along_axis(views, chosen[:, None, None, None, None], axis=1)[:, 0]
        u, rate = per_row(keys, "drop", jax.random.uniform), self.diffusion.drop_rate
        keep_high = 1.0 - ((u < rate) | ((u >= 2 * rate) & (u < 3 * rate))).astype(jnp.float32)
        keep_low = 1.0 - ((u >= rate) & (u < 3 * rate)).astype(jnp.float32)
        conditioning = self.condition(
            params,
            frozen,
            {**batch, "views": views, "given": given, "reference": reference},
            keep_high=keep_high,
            keep_low=keep_low,
        )
        output, rms = self._unet(params, noisy.x_t, noisy.t, conditioning)
        metrics = loss_metrics(noisy, noisy.errors(output), batch["valid"], self.diffusion.schedule.steps)
        weights = jnp.maximum(keep_high, keep_low) * batch["valid"]
        metrics["kept"] = jnp.sum(weights)
        metrics["context_rms"] = jnp.stack(
            [losses.weighted_mean(rms[site.name], weights) for site in self.model.unet.sites]
        )
        return metrics["loss"], jax.lax.stop_gradient(metrics)


def draw_given(key: jax.Array, *, nothing: bool) -> Bool[Array, " 4"]:
    """One of the 14 patterns with one to three tiles given, uniformly; nothing: also the one with none."""
    bits = jax.random.randint(key, (), 0 if nothing else 1, 2**VIEWS - 1)
    return (bits >> jnp.arange(VIEWS)) & 1 == 1


def draw_reference(key: jax.Array, given: Bool[Array, " 4"]) -> Int[Array, ""]:
    """A given tile, uniformly; any where none is given."""
    logits = jnp.where(given | ~jnp.any(given), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits)
