"""TruePose: SourceNet, HPFA, CAA, TargetNet and the pose encoder wired as docs/paper.md reads the paper."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from truepose_jax import rng
from truepose_jax.diffusion import losses
from truepose_jax.methods.base import BatchSpec, Conditioning
from truepose_jax.methods.truepose_source import SourceReader, positions
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.pose_encoder import PoseEncoder
from truepose_jax.models.source_net import without_gradient
from truepose_jax.models.target_net import Fusion, target_net
from truepose_jax.models.vae import Autoencoder
from truepose_jax.schema import DiffusionConfig, ModelConfig
from truepose_jax.sharding import constrain

TENSOR_RULES = (
    (r"/(to_[qkv]|source_to_[qkv])/kernel$", (None, "tensor")),
    (r"/to_out_0/kernel$", ("tensor", None)),
    (r"/net_0/proj/kernel$", (None, "tensor")),
    (r"/net_2/kernel$", ("tensor", None)),
)


@dataclasses.dataclass(frozen=True)
class TruePose:
    """The Method of TruePose. Parameters: source_net, target_net, fusion (the source side of HPFA and CAA),
    pose_encoder; with model.source_parsing "coverage" also parsing_encoder. Frozen: autoencoder (empty for pixels).

    Its ablations are settings of model.fusion. With features "clip" (B1) there is no source_net but clip_source, and
    `clip` and frozen["clip"] are the network that sees the source; its `condition` needs photos, not latents.
    """

    model: ModelConfig
    diffusion: DiffusionConfig
    autoencoder: Autoencoder
    clip: CLIPVisionConfig | None = None

    param_rules = TENSOR_RULES

    @functools.cached_property
    def dtype(self):
        return jnp.dtype(self.model.dtype)

    @functools.cached_property
    def reader(self) -> SourceReader:
        return SourceReader(self.model, self.autoencoder.factor, self.clip)

    @property
    def source_net(self):
        return self.reader.source_net

    @functools.cached_property
    def target_net(self):
        return target_net(self.model.unet, self.model.fusion, remat=self.model.remat, dtype=self.dtype)

    @functools.cached_property
    def fusion(self):
        return Fusion(self.model.unet, self.model.fusion, dtype=self.dtype)

    @functools.cached_property
    def pose_encoder(self):
        return PoseEncoder(self.model.unet.block_out_channels[0], stride=self.autoencoder.factor, dtype=self.dtype)

    @functools.cached_property
    def no_decay(self) -> str:
        parts = [without_gradient(self.model.unet)]
        if self.model.fusion.alignment == "global":  # attn2 meets one key: its softmax is 1
            parts += [r"^target_net/.*/(norm2|attn2/to_q)/", r"^fusion/.*/attn2/to_k/"]
        return "|".join(parts)

    def latent_spec(self, image_hw):
        factor = self.autoencoder.factor
        if any(side % factor for side in image_hw):
            raise ValueError(f"image size {image_hw} is not divisible by the autoencoder's factor {factor}")
        return image_hw[0] // factor, image_hw[1] // factor, self.autoencoder.channels

    def init(self, key, batch_spec: BatchSpec):
        batch = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in batch_spec.items()}
        b = batch["target_pose"].shape[0]
        latents = jnp.zeros((b, *self.latent_spec(batch["target_pose"].shape[1:3])))
        t = jnp.zeros((b,), jnp.int32)
        # The twins start with the same weights, as they do when both come from SD1.5: like features then meet like
        # features in Eq. 8 from the first step.
        twin_key, fusion_key, pose_key = (rng.key(key, name) for name in ("twins", "fusion", "pose_encoder"))
        source = jnp.zeros((batch["source"].shape[0], *latents.shape[1:]))
        params = self.reader.init(key, twin_key, source, batch)
        side = self.reader.read(params, {}, source, batch)
        sites, fusion_params = self.fusion.init_with_output(fusion_key, side)
        pose, pose_params = self.pose_encoder.init_with_output(pose_key, batch["target_pose"])
        target_params = self.target_net.init(twin_key, latents, t, None, features=sites, after_conv_in=pose)["params"]
        return params | {
            "target_net": target_params,
            "fusion": fusion_params["params"],
            "pose_encoder": pose_params["params"],
        }

    def condition(self, params, frozen, batch, *, keep=None) -> Conditioning:
        """keep [b]: 0 drops that sample's F' and region tokens together, at the features (A15)."""
        latents = self.autoencoder.encode_mean(frozen.get("autoencoder"), batch["source"])
        latents = constrain(latents, "batch", "height", "width", "channels")
        side = self.reader.read(params, frozen, latents, batch)
        sites = self.fusion.apply({"params": params["fusion"]}, side, keep)
        pose = self.pose_encoder.apply({"params": params["pose_encoder"]}, batch["target_pose"])
        return Conditioning(pose=pose + positions(self.model, latents), sites=sites)

    def null(self, conditioning: Conditioning) -> Conditioning:
        """No source at all; the pose stays (C of the paper does not list it)."""
        return conditioning.replace(sites=None)

    def _target(self, params, x_t, t, conditioning: Conditioning):
        return self.target_net.apply(
            {"params": params["target_net"]},
            x_t,
            t,
            None,
            features=conditioning.sites,
            after_conv_in=conditioning.pose,
        )

    def denoise(self, params, x_t, t, conditioning):
        return self._target(params, x_t, t, conditioning)[0]

    def decode(self, frozen, latents):
        return jnp.clip(self.autoencoder.decode(frozen.get("autoencoder"), latents), -1.0, 1.0)

    def loss(self, params, frozen, batch, keys):
        """Eq. 2 / 10 with the schedule's prediction, mean over the valid samples of the global batch.

        Metrics: loss, bin_sums and bin_counts [NUM_BINS], kept, hpfa_rms (where there is HPFA) and caa_rms [sites] (updates'
        root mean squares over the kept samples, whose number kept is).
        """
        schedule = self.diffusion.schedule
        batch = _zero_invalid(batch)

        def per_sample(stream, sampler):
            return jax.vmap(lambda key: sampler(rng.key(key, stream)))(keys)

        x0 = self.autoencoder.encode_sample(frozen.get("autoencoder"), batch["target"], keys)
        x0 = constrain(x0, "batch", "height", "width", "channels")
        eps = per_sample("noise", lambda key: jax.random.normal(key, x0.shape[1:], x0.dtype))
        t = losses.timesteps(per_sample("timesteps", jax.random.uniform), schedule.steps, self.diffusion.timestep_power)
        keep = (per_sample("drop", jax.random.uniform) >= self.diffusion.drop_rate).astype(jnp.float32)

        conditioning = self.condition(params, frozen, batch, keep=keep)
        output, norms = self._target(params, schedule.add_noise(x0, eps, t), t, conditioning)
        errors = losses.squared_error(output, schedule.regression_target(x0, eps, t))
        loss = losses.weighted_mean(errors, batch["valid"])
        bin_sums, bin_counts = losses.timestep_bins(errors, batch["valid"], t, schedule.steps)
        metrics = {"loss": loss, "bin_sums": bin_sums, "bin_counts": bin_counts}
        weights = keep * batch["valid"]
        metrics["kept"] = jnp.sum(weights)
        for part in norms[self.model.unet.sites[0].name]:
            metrics[f"{part}_rms"] = jnp.stack(
                [losses.weighted_mean(norms[site.name][part], weights) for site in self.model.unet.sites]
            )
        return loss, jax.lax.stop_gradient(metrics)


def _zero_invalid(batch):
    """Zeros in the rows of weight 0: NaN there would reach every gradient (0 x NaN)."""
    valid = batch["valid"] > 0
    of_source = jnp.any(valid.reshape(batch["source"].shape[0], -1), axis=1)
    rows = {"target": valid, "target_pose": valid, "source": of_source, "region_tokens": of_source}
    shown = {
        name: jnp.where(row[(..., *[None] * (batch[name].ndim - 1))], batch[name], 0) for name, row in rows.items()
    }
    return {**batch, **shown}
