"""TruePose: SourceNet, HPFA, CAA, TargetNet and the pose encoder wired as docs/paper.md reads the paper."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.config import Config, DiffusionConfig, TruePoseModel
from truepose_jax.diffusion import losses
from truepose_jax.diffusion.guidance import Branches, two_branches
from truepose_jax.methods.base import BatchSpec, Needs, Swap, heeds_attention
from truepose_jax.methods.denoising import TENSOR_RULES, loss_metrics, noised, per_row, positions
from truepose_jax.methods.truepose_source import SourceReader
from truepose_jax.models.carry import (
    Carried,
    CarrySource,
    CarryTarget,
    Moved,
    carry_losses,
    half_cells,
    move_limbs,
    whole_cells,
)
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.limbs import Limbs, limb_coordinates
from truepose_jax.models.masks import coverage_levels
from truepose_jax.models.patch_codec import PATCH
from truepose_jax.models.pose_encoder import pose_encoder
from truepose_jax.models.source_net import without_gradient
from truepose_jax.models.target_net import Fusion, target_net
from truepose_jax.models.unet import HIDDEN
from truepose_jax.models.vae import Autoencoder
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import constrain

HALF = -1
"""Level of the half cells, beside the UNet's 0, 1, ..."""

CARRY_FLOW = 1.5
"""Weight of the half-cell head's flow beside one HPFA site's."""


SOURCE = ("source", "source_joints", "source_parsing")
TOKENS = ("region_tokens", "region_valid")
READ = (*SOURCE, *TOKENS, "target_joints", "target_pose", "class_on")


def needs(model: TruePoseModel) -> Needs:
    """The target's map is read by the half-cell head's losses alone, and no photo of a target when sampling."""
    train = (*READ, "target", *(("target_parsing",) if model.carry.head else ()))
    networks = ("autoencoder", "clip") if model.uses_clip else ("autoencoder",)
    letters = {"e": model.unet.cross_attention_dim}
    return Needs(
        train, READ, letters, networks=networks, tokens=True, source_pose=model.carry.head, drawing=model.skeleton
    )


def make(config: Config, autoencoder: Autoencoder, networks: Mapping[str, Any]) -> TruePose:
    """networks: "clip", of ablation B1."""
    return TruePose(config.model, config.diffusion, autoencoder, networks.get("clip"))


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


@heeds_attention
@dataclasses.dataclass(frozen=True)
class TruePose:
    """The Denoiser of TruePose. Parameters: source_net, target_net, fusion (the source side of HPFA and CAA),
    pose_encoder; with model.source_parsing "coverage" also parsing_encoder, with model.carry.head also limb_encoder,
    carry_source and carry_target (models/carry.py). Frozen: autoencoder (empty for pixels and patches).

    Its ablations are settings of model.fusion. With features "clip" (B1) there is no source_net but clip_source, and
    `clip` and frozen["clip"] are the network that sees the source; its `condition` needs photos, not latents.
    """

    model: TruePoseModel
    diffusion: DiffusionConfig
    autoencoder: Autoencoder
    clip: CLIPVisionConfig | None = None

    param_rules = TENSOR_RULES
    fresh = "(?!)"
    swaps = {  # noqa: RUF012
        "image_swapped": Swap(SOURCE, meet=("region_valid",)),
        "tokens_swapped": Swap(TOKENS, meet=("region_valid",)),
        "both_swapped": Swap(SOURCE + TOKENS),
    }

    @property
    def needs(self) -> Needs:
        return needs(self.model)

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
        model = self.model
        return target_net(model.unet, model.fusion, remat=model.remat, tap_hidden=model.carry.head, dtype=self.dtype)

    @functools.cached_property
    def fusion(self):
        return Fusion(self.model.unet, self.model.fusion, dtype=self.dtype)

    @functools.cached_property
    def pose_encoder(self):
        width, factor = self.model.unet.block_out_channels[0], self.autoencoder.factor
        return pose_encoder(self.model.pose_encoder, width, stride=factor, dtype=self.dtype)

    @functools.cached_property
    def no_decay(self) -> str:
        parts = [without_gradient(self.model.unet, tap_hidden=self.model.carry.head)]
        if self.model.fusion.alignment == "global":  # attn2 meets one key: its softmax is 1
            parts += [r"^target_net/.*/(norm2|attn2/to_q)/", r"^fusion/.*/attn2/to_k/"]
        return "|".join(parts)

    @functools.cached_property
    def limb_encoder(self):
        """What limb coordinates add after both networks' conv_in."""
        return nn.Dense(self.model.unet.block_out_channels[0], dtype=self.dtype)

    @functools.cached_property
    def carry_source(self):
        return CarrySource(self.model.carry.width, dtype=self.dtype)

    def carry_target(self, classes: int):
        return CarryTarget(self.model.carry.width, self.autoencoder, classes, dtype=self.dtype)

    def latent_spec(self, image_hw):
        factor = self.autoencoder.factor
        if any(side % factor for side in image_hw):
            raise ValueError(f"image size {image_hw} is not divisible by the autoencoder's factor {factor}")
        return image_hw[0] // factor, image_hw[1] // factor, self.autoencoder.channels

    def sample_spec(self, batch):
        return self.latent_spec(batch["target_pose"].shape[1:3])

    def init(self, key, batch_spec: BatchSpec):
        batch = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in batch_spec.items()}
        b = batch["target_pose"].shape[0]
        latents = jnp.zeros((b, *self.sample_spec(batch)))
        t = jnp.zeros((b,), jnp.int32)
        # The twins start with the same weights, as they do when both come from SD1.5: like features then meet like
        # features in Eq. 8 from the first step.
        twin_key, fusion_key, pose_key = (rng.key(key, name) for name in ("twins", "fusion", "pose_encoder"))
        source = jnp.zeros((batch["source"].shape[0], *latents.shape[1:]))
        params = self.reader.init(key, twin_key, source, batch)
        limbs, told = self._limbs(batch, latents), None
        if self.model.carry.head:
            context = limbs[0][1].context
            params["limb_encoder"] = self.limb_encoder.init(rng.key(key, "limb_encoder"), context)["params"]
            told = self._told(params, limbs, latents)
        side = self._read(params, {}, source, batch, limbs, told)
        sites, fusion_params = self.fusion.init_with_output(fusion_key, side)
        pose, pose_params = self.pose_encoder.init_with_output(pose_key, batch["target_pose"])
        target_params = self.target_net.init(twin_key, latents, t, None, features=sites, after_conv_in=pose)["params"]
        params |= {
            "target_net": target_params,
            "fusion": fusion_params["params"],
            "pose_encoder": pose_params["params"],
        }
        if self.model.carry.head:
            inputs = side.hidden, half_cells(source), self._coverage(batch, "source"), *limbs[HALF]
            moved = self._moved(batch, source)
            carry, made = self.carry_source.init_with_output(rng.key(key, "carry_source"), *inputs, moved=moved)
            params["carry_source"] = made["params"]
            hidden = jnp.zeros((*latents.shape[:3], self.model.unet.block_out_channels[0]))
            net = self.carry_target(batch["class_on"].shape[1])
            params["carry_target"] = net.init(rng.key(key, "carry_target"), hidden, half_cells(latents), carry)[
                "params"
            ]
        return params

    def condition(self, params, frozen, batch, *, keep=None, shown=False) -> Conditioning:
        """keep [b]: 0 drops that sample's F' and region tokens together, at the features (A15). shown: HPFA is given the
        latents also where its configuration does not carry them, for `carried`."""
        latents = self.autoencoder.encode_mean(frozen.get("autoencoder"), batch["source"])
        latents = constrain(latents, "batch", "height", "width", "channels")
        limbs = self._limbs(batch, latents)
        told = self._told(params, limbs, latents) if limbs else None
        side = self._read(params, frozen, latents, batch, limbs, told, shown=shown)
        sites = self.fusion.apply({"params": params["fusion"]}, side, keep)
        pose = self.pose_encoder.apply({"params": params["pose_encoder"]}, batch["target_pose"])
        carry = None
        if limbs:
            pose = pose + told[1]
            inputs = side.hidden, half_cells(latents), self._coverage(batch, "source"), *limbs[HALF]
            carry = self.carry_source.apply(
                {"params": params["carry_source"]}, *inputs, keep, self._moved(batch, latents)
            )
        return Conditioning(pose=pose + positions(self.model, latents), sites=sites, carry=carry)

    def _read(self, params, frozen, latents, batch, limbs, told, *, shown: bool = False):
        carried = shown or self.model.fusion.carry_latents
        told = told[0] if told else 0.0
        return self.reader.read(params, frozen, latents, batch, limbs=limbs, told=told, carried=carried)

    def _limbs(self, batch, latents) -> dict[int, tuple[Limbs, Limbs]] | None:
        """(of the source, of the target) by UNet level, and of half cells as level HALF."""
        if not self.model.carry.head:
            return None
        image_hw = batch["target_pose"].shape[1:3]
        h, w = latents.shape[1:3]
        cells = {HALF: (2 * h, 2 * w)}
        cells |= {i: (-(-h // 2**i), -(-w // 2**i)) for i in range(len(self.model.unet.block_out_channels))}
        return {
            level: tuple(
                limb_coordinates(batch[f"{who}_joints"], image_hw=image_hw, cells_hw=hw) for who in ("source", "target")
            )
            for level, hw in cells.items()
        }

    def _moved(self, batch, latents) -> Moved | None:
        """The source limb by limb, where the half-cell head is given it."""
        if not self.model.carry.limb_warp:
            return None
        joints = batch["source_joints"], batch["target_joints"]
        classes = batch["class_on"].shape[1]
        return move_limbs(self.autoencoder, half_cells(latents), batch["source_parsing"], *joints, classes=classes)

    def _told(self, params, limbs, latents) -> tuple[Array, Array]:
        """What SourceNet and TargetNet are told after conv_in."""
        encode = functools.partial(self.limb_encoder.apply, {"params": params["limb_encoder"]})
        return tuple(encode(x.context).reshape(-1, *latents.shape[1:3], self.limb_encoder.features) for x in limbs[0])

    def _coverage(self, batch, who: str) -> Float[Array, "b n p"]:
        """Of half cells."""
        parsing, classes = batch[f"{who}_parsing"], batch["class_on"].shape[1]
        (found,) = coverage_levels(parsing, num_classes=classes, factor=PATCH, levels=1)
        return found.reshape(len(parsing), -1, classes)

    def null(self, conditioning: Conditioning) -> Conditioning:
        """No source at all; the pose stays (C of the paper does not list it)."""
        carry = None if conditioning.carry is None else conditioning.carry.dropped(None)
        return conditioning.replace(sites=None, carry=carry)

    def branches(self, conditioning: Conditioning, scale: float) -> Branches:
        return two_branches(conditioning, self.null(conditioning), scale)

    def _target(self, params, x_t, t, conditioning: Conditioning):
        """(prediction, signs of life by site, what the half-cell head carried or None)."""
        output, signs = self.target_net.apply(
            {"params": params["target_net"]},
            x_t,
            t,
            None,
            features=conditioning.sites,
            after_conv_in=conditioning.pose,
        )
        if conditioning.carry is None:
            return output, signs, None
        net = self.carry_target(params["carry_target"]["parsing_out"]["bias"].shape[0])
        carried: Carried = net.apply(
            {"params": params["carry_target"]}, signs.pop(HIDDEN), half_cells(x_t), conditioning.carry
        )
        return output + whole_cells(carried.x0), signs, carried

    def denoise(self, params, x_t, t, conditioning):
        return self._target(params, x_t, t, conditioning)[0]

    def encode(self, frozen, images):
        return self.autoencoder.encode_mean(frozen.get("autoencoder"), images)

    def decode(self, frozen, latents):
        return jnp.clip(self.autoencoder.decode(frozen.get("autoencoder"), latents), -1.0, 1.0)

    @property
    def _full_sites(self) -> list[str]:
        """Sites at the latent's own size."""
        return [site.name for site in self.model.unet.sites if site.level == 0]

    @property
    def carries(self) -> bool:
        return self.model.carry.head or (self.model.fusion.texture == "hpfa" and bool(self._full_sites))

    def carried(self, params, frozen, batch):
        """See Denoiser. Of the half-cell head, else of the last HPFA at the latent's own size."""
        conditioning = self.condition(params, frozen, batch, shown=True)
        latents = self.autoencoder.encode_mean(frozen.get("autoencoder"), batch["target"])
        _, signs, carried = self._target(params, latents, jnp.zeros((len(latents),), jnp.int32), conditioning)
        if carried is not None:
            return self.decode(frozen, whole_cells(carried.warp))
        return self.decode(frozen, signs[self._full_sites[-1]]["carried"].reshape(latents.shape))

    def loss(self, params, frozen, batch, keys):
        """Eq. 2 / 10 with the schedule's prediction, mean over the valid samples of the global batch; plus, where their weights
        are not 0, what is ours: how far the carried latents lie from the target's (flow), the error of the pixels, and those
        of the predicted parsing and alpha.

        Metrics: loss (of the latents alone), bin_sums and bin_counts [NUM_BINS], kept, what each further loss is by its name;
        of HPFA (where there is one) and CAA by site [sites]: hpfa_rms and caa_rms, the updates' root mean squares, hpfa_tokens,
        the effective number of tokens that a query looks at, hpfa_inside, its share inside the mask; of the half-cell head
        carry_tokens and carry_inside.
        """
        weighs = self.diffusion.losses
        batch = _zero_invalid(batch)

        x0 = self.autoencoder.encode_sample(frozen.get("autoencoder"), batch["target"], keys)
        x0 = constrain(x0, "batch", "height", "width", "channels")
        noisy = noised(self.diffusion, x0, keys)
        keep = (per_row(keys, "drop", jax.random.uniform) >= self.diffusion.drop_rate).astype(jnp.float32)

        conditioning = self.condition(params, frozen, batch, keep=keep)
        output, signs, carried = self._target(params, noisy.x_t, noisy.t, conditioning)
        metrics = loss_metrics(noisy, noisy.errors(output), batch["valid"], self.diffusion.schedule.steps)
        weights = keep * batch["valid"]
        metrics["kept"] = jnp.sum(weights)

        more = {}
        if weighs.pixels:
            shown = self.autoencoder.decode(frozen.get("autoencoder"), x0)
            more["pixels"] = losses.charbonnier(self.autoencoder.decode(frozen.get("autoencoder"), output), shown)
        if weighs.flow:
            at_full = self._full_sites if self.model.fusion.carry_latents else []
            flows = [losses.squared_error(signs[name]["carried"].reshape(x0.shape), x0) for name in at_full]
            more["flow"] = sum(flows, start=jnp.zeros(len(x0))) * keep
        if carried is not None:
            of_head = carry_losses(carried, half_cells(x0), batch["target_parsing"], self._coverage(batch, "target"))
            more["parsing"] = of_head["parsing"]
            if weighs.flow:
                more["flow"] += CARRY_FLOW * of_head["flow"] * keep
            for name, value in carried.account.items():
                metrics[f"carry_{name}"] = losses.weighted_mean(value, weights)
        total = weighs.latents * metrics["loss"]
        for name, values in more.items():
            metrics[name] = losses.weighted_mean(values, batch["valid"])
            total += getattr(weighs, name) * metrics[name]

        for part in (name for name in signs[self.model.unet.sites[0].name] if name != "carried"):
            metrics[part] = jnp.stack(
                [losses.weighted_mean(signs[site.name][part], weights) for site in self.model.unet.sites]
            )
        return total, jax.lax.stop_gradient(metrics)


def _zero_invalid(batch):
    """Zeros in the rows of weight 0: NaN there would reach every gradient (0 x NaN)."""
    valid = batch["valid"] > 0
    of_source = jnp.any(valid.reshape(batch["source"].shape[0], -1), axis=1)
    of_target = dict.fromkeys(("target", "target_pose", "target_joints"), valid)
    rows = of_target | dict.fromkeys(("source", "source_joints", "region_tokens"), of_source)
    shown = {
        name: jnp.where(row[(..., *[None] * (batch[name].ndim - 1))], batch[name], 0) for name, row in rows.items()
    }
    return {**batch, **shown}
