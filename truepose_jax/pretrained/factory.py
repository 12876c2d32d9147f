"""From a configuration to its method and the networks that no optimizer touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from truepose_jax.config import Config
from truepose_jax.methods import Trainable, make_method, needs
from truepose_jax.models.vae import Autoencoder, MomentsAutoencoder
from truepose_jax.pretrained import vision_networks
from truepose_jax.pretrained.frozen_networks import autoencoder_shapes, load_autoencoder
from truepose_jax.pretrained.region_tokens import LazyEncoder, RegionEncoder, vision_config, vision_shapes

VISION = frozenset({"dino", "ipf"})
"""Roles whose settings are config.model.ROLE."""


class Assembly(NamedTuple):
    """frozen: host arrays by role, of networks that have any ({"autoencoder": ...}). fingerprints: of the weights, by role;
    of CLIP's the region tokens tell."""

    method: Trainable
    frozen: Mapping[str, Any]
    autoencoder: Autoencoder | None
    fingerprints: Mapping[str, str]


def region_encoder(config: Config) -> LazyEncoder | None:
    """What makes region tokens; None where the method reads none."""
    return LazyEncoder(config.model.clip, config.token_width) if needs(config).tokens else None


def assemble(config: Config, encoder: RegionEncoder | LazyEncoder | None) -> Assembly:
    """Raises ConfigError where weights are missing or not what the config says."""
    roles = needs(config).networks
    autoencoder, frozen, prints, networks = None, {}, {}, {}
    if "autoencoder" in roles:
        autoencoder, params, prints["autoencoder"] = load_autoencoder(config.model)
        frozen = {"autoencoder": params} if params else {}
    if "clip" in roles:
        networks["clip"], frozen["clip"] = encoder.network.config, encoder.network.params
    for role in (r for r in roles if r in VISION):
        network = vision_networks.load(role, getattr(config.model, role))
        networks[role], frozen[role], prints[role] = network
    return Assembly(make_method(config, autoencoder, networks), frozen, autoencoder, prints)


def planned(config: Config) -> tuple[Trainable, Mapping[str, Any]]:
    """(the method that a run trains with, its frozen networks as shapes), without any weights: for plans and estimates."""
    roles = needs(config).networks
    reads, frozen, networks = None, {}, {}
    if "autoencoder" in roles:
        autoencoder, shapes = autoencoder_shapes(config.model)
        frozen = {"autoencoder": shapes} if shapes else {}
        reads = MomentsAutoencoder(autoencoder) if config.data.latents == "stored" else autoencoder
    if "clip" in roles:
        networks["clip"] = vision_config(config.model.clip, config.token_width)
        frozen["clip"] = vision_shapes(networks["clip"])
    for role in (r for r in roles if r in VISION):
        networks[role], frozen[role], _ = vision_networks.plan(role, getattr(config.model, role))
    return make_method(config, reads, networks), frozen
