"""From a configuration to its method and the networks that no optimizer touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from truepose_jax.config import Config
from truepose_jax.methods import Method, make_method
from truepose_jax.models.vae import Autoencoder, MomentsAutoencoder
from truepose_jax.pretrained.frozen_networks import autoencoder_shapes, load_autoencoder
from truepose_jax.pretrained.region_tokens import LazyEncoder, RegionEncoder, vision_config, vision_shapes


class Assembly(NamedTuple):
    """frozen: host arrays, {"autoencoder": ...} (none for pixels) and, where the network looks through CLIP, "clip".
    fingerprint: of the autoencoder's weights."""

    method: Method
    frozen: Mapping[str, Any]
    autoencoder: Autoencoder
    fingerprint: str


def assemble(config: Config, encoder: RegionEncoder | LazyEncoder) -> Assembly:
    """Raises ConfigError where weights are missing or not what the config says."""
    autoencoder, params, fingerprint = load_autoencoder(config.model)
    frozen = {"autoencoder": params} if params else {}
    clip = None
    if config.model.uses_clip:
        clip, frozen["clip"] = encoder.network.config, encoder.network.params
    return Assembly(make_method(config, autoencoder, clip), frozen, autoencoder, fingerprint)


def planned(config: Config) -> tuple[Method, Mapping[str, Any]]:
    """(the method that a run trains with, its frozen networks as shapes), without any weights: for plans and estimates."""
    autoencoder, shapes = autoencoder_shapes(config.model)
    frozen = {"autoencoder": shapes} if shapes else {}
    clip = None
    if config.model.uses_clip:
        clip = vision_config(config.model.clip, config.token_width)
        frozen["clip"] = vision_shapes(clip)
    reads = MomentsAutoencoder(autoencoder) if config.data.latents == "stored" else autoencoder
    return make_method(config, reads, clip), frozen
