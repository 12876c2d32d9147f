"""What TruePose reads of the source, before HPFA and CAA: F', the masks, the regions; and how its ablations differ in that."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from truepose_jax.config import TruePoseModel
from truepose_jax.methods.base import Batch, Frozen, Params
from truepose_jax.methods.denoising import positions
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.clip_source import ClipSource, clip_patches
from truepose_jax.models.hpfa import SourceAttention
from truepose_jax.models.limbs import Limbs
from truepose_jax.models.masks import coverage_levels, mean_levels, parsing_mask
from truepose_jax.models.source_net import ParsingEncoder, self_attention_of, source_features, source_net
from truepose_jax.models.target_net import SourceSide
from truepose_jax.models.unet import HIDDEN
from truepose_jax.runtime import rng


@dataclasses.dataclass(frozen=True)
class SourceReader:
    """SourceNet (or, in ablation B1, CLIP and an MLP) and what the masks and regions need.

    factor: pixels per latent cell and side. clip: the network of frozen["clip"], where model.uses_clip.
    """

    model: TruePoseModel
    factor: int
    clip: CLIPVisionConfig | None

    @functools.cached_property
    def dtype(self):
        return jnp.dtype(self.model.dtype)

    @functools.cached_property
    def source_net(self):
        model = self.model
        return source_net(model.unet, model.fusion, remat=model.remat, tap_hidden=model.carry.head, dtype=self.dtype)

    @functools.cached_property
    def parsing_encoder(self):
        return ParsingEncoder(self.model.unet.block_out_channels[0], dtype=self.dtype)

    @functools.cached_property
    def clip_source(self):
        return ClipSource(self.model.unet, dtype=self.dtype)

    @property
    def _levels(self) -> int:
        return len(self.model.unet.block_out_channels)

    def init(self, key: jax.Array, twin_key: jax.Array, latents: Float[Array, "s h w c"], batch: Batch) -> Params:
        """Random parameters of what makes F'; SourceNet's from twin_key, as TargetNet's."""
        if self.model.uses_clip:
            beside = self._beside_clip([x[:1] for x in self._coverages(batch)])
            made = self.clip_source.init(rng.key(key, "clip_source"), self._no_patches(1), latents.shape[1:3], beside)
            return {"clip_source": made["params"]}
        s, h, w = latents.shape[:3]
        masks = None
        if self.model.fusion.source_attention == "inplace":
            cells = [-(-h // 2**level) * -(-w // 2**level) for level in range(self._levels)]
            masks = self._by_site([jnp.ones((s, n), bool) for n in cells])
        t, context = jnp.zeros((s,), jnp.int32), batch["region_tokens"][:, -1:]
        params = {"source_net": self.source_net.init(twin_key, latents, t, context, features=masks)["params"]}
        if self.model.source_parsing == "coverage":
            coverage = jnp.zeros((s, h, w, batch["class_on"].shape[1]))
            params["parsing_encoder"] = self.parsing_encoder.init(rng.key(key, "parsing_encoder"), coverage)["params"]
        return params

    def read(
        self,
        params: Params,
        frozen: Frozen,
        latents: Float[Array, "s h w c"],
        batch: Batch,
        *,
        limbs: Mapping[int, tuple[Limbs, Limbs]] | None = None,
        told: Float[Array, "s h w d"] | float = 0.0,
        carried: bool = False,
    ) -> SourceSide:
        """One row per target: sources repeat for their targets. frozen without "clip" (init): CLIP sees nothing. limbs: of
        the source and the target, by level. told: added after SourceNet's conv_in. carried: HPFA is given the latents.
        """
        b, s = batch["target_pose"].shape[0], latents.shape[0]
        each = functools.partial(jnp.repeat, repeats=b // s, axis=0)
        coverages = self._coverages(batch)
        masks = [parsing_mask(each(c), batch["class_on"]) for c in coverages]
        tokens, present = batch["region_tokens"], batch["region_valid"]
        attention = hidden = None
        if self.model.uses_clip:
            features = self._clip_features(params, frozen, latents, batch, coverages)
        elif self.model.fusion.source_attention == "inplace":
            # M depends on the target's pose, so SourceNet runs for every target, and its taps are per target.
            extra = told + self._after_conv_in(params, latents, coverages[0])
            taps = source_features(
                self.source_net,
                params["source_net"],
                each(latents),
                each(tokens[:, -1]),
                after_conv_in=each(extra) if jnp.ndim(extra) == 4 else extra,
                masks=self._by_site(masks),
            )
            hidden = taps.pop(HIDDEN, None)
            hidden = (
                None if hidden is None else hidden[:: b // s]
            )  # the head reads one row a source: its first target's
            features = {name: tap.fused for name, tap in taps.items()}
            attention = {name: tap.attention for name, tap in taps.items()}
        else:
            features = source_features(
                self.source_net,
                params["source_net"],
                latents,
                tokens[:, -1],
                after_conv_in=told + self._after_conv_in(params, latents, coverages[0]),
            )
            hidden = features.pop(HIDDEN, None)
            if self.model.fusion.texture == "concat":
                attention = self._own_attention(params, features, each)
        if self.model.fusion.source_attention == "side":
            features = {name: each(tap) for name, tap in features.items()}
        return SourceSide(
            features=features,
            attention=attention,
            masks=masks,
            coverages=[each(c).reshape(b, -1, c.shape[-1]) for c in coverages],
            tokens=each(tokens[:, :-1]),
            present=each(present[:, :-1]),
            whole=each(tokens[:, -1]),
            latents=[each(level) for level in mean_levels(latents, self._levels)] if carried else None,
            limbs=None if limbs is None else self._limb_features(limbs, each),
            hidden=hidden,
        )

    def _limb_features(self, limbs: Mapping[int, tuple[Limbs, Limbs]], each) -> list[tuple[Array, Array]]:
        return [(each(limbs[i][0].features), limbs[i][1].features) for i in range(self._levels)]

    def _coverages(self, batch: Batch) -> list[Float[Array, "s h w p"]]:
        classes = batch["class_on"].shape[1]
        return coverage_levels(batch["source_parsing"], num_classes=classes, factor=self.factor, levels=self._levels)

    def _after_conv_in(self, params: Params, latents: Array, coverage: Array) -> Array | float:
        extra = positions(self.model, latents)
        if self.model.source_parsing == "coverage":
            extra = extra + self.parsing_encoder.apply({"params": params["parsing_encoder"]}, coverage)
        return extra

    def _own_attention(self, params: Params, features: Mapping[str, Array], each) -> dict[str, SourceAttention]:
        """A' of SourceNet's self-attention at every site, one row per target (B4; unused, and so free, in B2)."""
        found = {}
        for site in self.model.unet.sites:
            own = self_attention_of(params["source_net"], features[site.name], site)
            found[site.name] = SourceAttention(each(own.q), each(own.k))
        return found

    def _beside_clip(self, coverages: Sequence[Float[Array, "s h w p"]]) -> list[Float[Array, "s n d"] | None]:
        """By level: what SourceNet would be told after conv_in, for B1's MLP, so that the two differ in CLIP alone."""
        found = []
        for coverage in coverages:
            s, h, w = coverage.shape[:3]
            parts = [coverage] if self.model.source_parsing == "coverage" else []
            if self.model.positions != "none":
                place = positions(self.model, coverage)
                parts.append(jnp.broadcast_to(place, (s, *place.shape)))
            found.append(jnp.concatenate(parts, axis=-1).reshape(s, h * w, -1) if parts else None)
        return found

    def _clip_features(
        self, params: Params, frozen: Frozen, latents: Array, batch: Batch, coverages: Sequence[Array]
    ) -> dict[str, Array]:
        if "clip" in frozen:
            patches = clip_patches(self.clip, frozen["clip"], batch["source"])
        else:
            patches = self._no_patches(latents.shape[0])
        beside = self._beside_clip(coverages)
        return self.clip_source.apply({"params": params["clip_source"]}, patches, latents.shape[1:3], beside)

    def _no_patches(self, count: int) -> Float[Array, "s g g e"]:
        grid = math.isqrt(self.clip.patches)
        return jnp.zeros((count, grid, grid, self.clip.hidden_size))

    def _by_site(self, levels: Sequence[Array]) -> dict[str, Array]:
        return {site.name: levels[site.level] for site in self.model.unet.sites}
