"""TargetNet: the denoising UNet whose blocks read the source through HPFA and CAA, and the source side of both."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.models.attention import Attention, FeedForward, Site, layer_norm
from truepose_jax.models.caa import CAA, CAASource, region_scores, reweighted_scores
from truepose_jax.models.hpfa import HPFA, FusionConfig, HPFASource, KeysValues, SourceAttention
from truepose_jax.models.unet import UNet2DCondition, UNetConfig


class SourceTokens(NamedTuple):
    """F' itself [b n c], for self-attention that reads it beside its own tokens; keep [b]: 0 drops the sample's."""

    tokens: Array
    keep: Array | None


class SiteFeatures(NamedTuple):
    """What one block of TargetNet reads of the source: its texture through HPFA (or as tokens, where
    config.texture is "concat"), and attn2's keys and values."""

    texture: KeysValues | SourceTokens
    caa: KeysValues


class SourceSide(NamedTuple):
    """What the fusion modules are given: F' [b n c] by site; A' by site where SourceNet's own attention serves for it
    (None: HPFA makes it); masks M [b n] and coverages [b n p] by UNet level; the regions' tokens [b p e], which of them
    are present [b p], and the whole image's token [b e]. By UNet level too: the source's latents [b n c], where they are
    carried or shown, and coordinates of the source's and the target's cells, where limbs guide the attention. One row per
    target, but for hidden [s h w d], SourceNet's last hidden state, where the half-cell head reads it."""

    features: dict[str, Array]
    attention: dict[str, SourceAttention] | None
    masks: list[Array]
    coverages: list[Array]
    tokens: Array
    present: Array
    whole: Array
    latents: list[Array] | None = None
    limbs: list[tuple[Array, Array]] | None = None
    hidden: Array | None = None


class Fusion(nn.Module):
    """The source side of HPFA and CAA at every site: F', masks and region tokens in, keys and values out.

    Everything here is independent of t and of TargetNet's hidden state; sampling runs it once per image.
    """

    unet: UNetConfig
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, source: SourceSide, keep: Float[Array, " b"] | None = None) -> dict[str, SiteFeatures]:
        """keep [b]: 0 drops the sample's F' and tokens together (A15)."""
        return {
            site.name: _FusionSite(site, self.config, dtype=self.dtype, name=site.name)(source, keep)
            for site in self.unet.sites
        }


class _FusionSite(nn.Module):
    site: Site
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, source: SourceSide, keep) -> SiteFeatures:
        site, config = self.site, self.config
        features, mask, coverage = source.features[site.name], source.masks[site.level], source.coverages[site.level]
        attention = None if source.attention is None else source.attention[site.name]
        if config.texture == "hpfa":
            hpfa = HPFASource(site, config, dtype=self.dtype, name="hpfa")
            latents, limbs = (None if x is None else x[site.level] for x in (source.latents, source.limbs))
            texture, attention = hpfa(features, mask, keep, attention, latents, limbs)
        else:
            texture = SourceTokens(features, keep)
        if config.alignment == "global":
            caa = CAASource(site, regions=1, dtype=self.dtype, name="attn2")
            one = jnp.ones((source.whole.shape[0], 1), bool)
            return SiteFeatures(texture, caa(source.whole[:, None], one, one.astype(jnp.float32), keep))
        if config.score == "logits":
            scores = region_scores(attention, coverage)
        else:
            scores = reweighted_scores(attention, coverage, mask, config)
        caa = CAASource(site, regions=config.regions, dtype=self.dtype, name="attn2")
        return SiteFeatures(texture, caa(source.tokens, source.present, scores, keep))


class TruePoseBlock(nn.Module):
    """attn1, HPFA, CAA (as attn2), feed-forward; each normed first and added (A7 to A9). features None: dropped.

    config.texture "concat" (ablations B2 and B4): no HPFA; attn1's own projections also make keys and values of F',
    beside those of the hidden state (AnimateAnyone's spatial attention). latent_channels: of latents that HPFA carries.
    """

    site: Site
    config: FusionConfig
    latent_channels: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: None, features: SiteFeatures | None
    ) -> tuple[Float[Array, "b n c"], dict[str, Float[Array, " b"]]]:
        """Returns the hidden state and signs of life of both paths: each update's root mean square ("hpfa_rms", "caa_rms"), and
        HPFA's account ("hpfa_tokens", "hpfa_inside", and "carried" where latents are)."""
        texture, caa = (None, None) if features is None else features
        signs = {}
        normed = layer_norm(self.dtype, "norm1")(x)
        attn1 = Attention(self.site.heads, dtype=self.dtype, name="attn1")
        if self.config.texture == "hpfa":
            x = x + attn1(normed)
            hpfa = HPFA(self.site, self.config, self.latent_channels, dtype=self.dtype, name="hpfa")
            from_hpfa, account = hpfa(x, texture)
            x, signs["hpfa_rms"] = x + from_hpfa, _rms(from_hpfa)
            signs |= {name if name == "carried" else f"hpfa_{name}": value for name, value in account.items()}
        else:
            x = x + attn1(normed, *_beside(normed, texture))
        from_caa = CAA(self.site, dtype=self.dtype, name="attn2")(layer_norm(self.dtype, "norm2")(x), caa)
        x, signs["caa_rms"] = x + from_caa, _rms(from_caa)
        return x + FeedForward(dtype=self.dtype, name="ff")(layer_norm(self.dtype, "norm3")(x)), signs


def _beside(x: Float[Array, "b n c"], source: SourceTokens | None) -> tuple[Array, Bool[Array, "b m"] | None]:
    """(context, key mask) of self-attention that reads the source's tokens beside its own. A dropped sample sees only
    its own, as it does where `source` is None."""
    if source is None:
        return x, None
    context = jnp.concatenate([x, source.tokens.astype(x.dtype)], axis=1)
    if source.keep is None:
        return context, None
    b, n = x.shape[:2]
    kept = jnp.broadcast_to(source.keep[:, None] > 0, (b, source.tokens.shape[1]))
    return context, jnp.concatenate([jnp.ones((b, n), bool), kept], axis=1)


def _rms(x: Float[Array, "b n c"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(1, 2)))


def target_net(
    unet: UNetConfig, config: FusionConfig, *, remat: bool = False, tap_hidden: bool = False, dtype=jnp.float32
) -> UNet2DCondition:
    """SD1.5's UNet with TruePose blocks. Its call's `features` are Fusion's result, or None where dropped; its taps
    are TruePoseBlock's signs of life."""

    def make_block(site: Site, *, name: str) -> nn.Module:
        return TruePoseBlock(site, config, unet.in_channels, dtype=dtype, name=name)

    return UNet2DCondition(unet, make_block, remat=remat, tap_hidden=tap_hidden, dtype=dtype)
