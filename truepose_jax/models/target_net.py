"""TargetNet: the denoising UNet whose blocks read the source through HPFA and CAA, and the source side of both."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from truepose_jax.models.attention import Attention, FeedForward, Site, layer_norm
from truepose_jax.models.caa import CAA, CAASource
from truepose_jax.models.hpfa import HPFA, FusionConfig, HPFASource, KeysValues
from truepose_jax.models.unet import UNet2DCondition, UNetConfig


class SiteFeatures(NamedTuple):
    """What one block of TargetNet reads of the source."""

    hpfa: KeysValues
    caa: KeysValues


class Fusion(nn.Module):
    """The source side of HPFA and CAA at every site: F', masks and region tokens in, keys and values out.

    Everything here is independent of t and of TargetNet's hidden state; sampling runs it once per image.
    """

    unet: UNetConfig
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: dict[str, Float[Array, "b n c"]],
        masks: list[Bool[Array, "b n"]],
        coverages: list[Float[Array, "b n p"]],
        tokens: Float[Array, "b p e"],
        present: Bool[Array, "b p"],
        keep: Float[Array, " b"] | None = None,
    ) -> dict[str, SiteFeatures]:
        """masks and coverages: one per UNet level. keep [b]: 0 drops the sample's F' and tokens together (A15)."""
        return {
            site.name: _FusionSite(site, self.config, dtype=self.dtype, name=site.name)(
                features[site.name], masks[site.level], coverages[site.level], tokens, present, keep
            )
            for site in self.unet.sites
        }


class _FusionSite(nn.Module):
    site: Site
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features, mask, coverage, tokens, present, keep) -> SiteFeatures:
        keys_values, source = HPFASource(self.site, self.config, dtype=self.dtype, name="hpfa")(features, mask, keep)
        caa = CAASource(self.site, regions=self.config.regions, dtype=self.dtype, name="attn2")
        return SiteFeatures(keys_values, caa(tokens, present, source, coverage, keep))


class TruePoseBlock(nn.Module):
    """attn1, HPFA, CAA (as attn2), feed-forward; each normed first and added (A7 to A9). features None: dropped."""

    site: Site
    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: None, features: SiteFeatures | None
    ) -> tuple[Float[Array, "b n c"], dict[str, Float[Array, " b"]]]:
        """Returns the hidden state and the root-mean-square of each update, a sign of life of its path."""
        hpfa, caa = (None, None) if features is None else features
        x = x + Attention(self.site.heads, dtype=self.dtype, name="attn1")(layer_norm(self.dtype, "norm1")(x))
        from_hpfa = HPFA(self.site, self.config, dtype=self.dtype, name="hpfa")(x, hpfa)
        x = x + from_hpfa
        from_caa = CAA(self.site, dtype=self.dtype, name="attn2")(layer_norm(self.dtype, "norm2")(x), caa)
        x = x + from_caa
        x = x + FeedForward(dtype=self.dtype, name="ff")(layer_norm(self.dtype, "norm3")(x))
        return x, {"hpfa": _rms(from_hpfa), "caa": _rms(from_caa)}


def _rms(x: Float[Array, "b n c"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(1, 2)))


def target_net(unet: UNetConfig, config: FusionConfig, *, remat: bool = False, dtype=jnp.float32) -> UNet2DCondition:
    """SD1.5's UNet with TruePose blocks. Its call's `features` are Fusion's result, or None where dropped; its taps
    are {"hpfa", "caa"} output norms."""

    def make_block(site: Site, *, name: str) -> nn.Module:
        return TruePoseBlock(site, config, dtype=dtype, name=name)

    return UNet2DCondition(unet, make_block, remat=remat, dtype=dtype)
