"""The papers, one file each; `PAPERS` is the only place that knows their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from truepose_jax.config import Config, ModelConfig
from truepose_jax.methods import fpdm, imagpose, ipf, truepose
from truepose_jax.methods.base import Denoiser, Needs, Trainable
from truepose_jax.models.vae import Autoencoder

__all__ = ["PAPERS", "Denoiser", "Needs", "Paper", "Trainable", "make_method", "needs"]


class Paper(NamedTuple):
    """needs(model config): what it reads. make(config, autoencoder, networks): the method, wired; networks: what is frozen
    beside the autoencoder, by role: configurations or modules as the method takes them."""

    needs: Callable[[ModelConfig], Needs]
    make: Callable[[Config, Autoencoder | None, Mapping[str, Any]], Trainable]


PAPERS: dict[str, Paper] = {
    "truepose": Paper(truepose.needs, truepose.make),
    "ipf": Paper(ipf.needs, ipf.make),
    "fpdm": Paper(fpdm.needs, fpdm.make),
    "imagpose": Paper(imagpose.needs, imagpose.make),
}


def needs(config: Config) -> Needs:
    """What the configuration's method reads."""
    return PAPERS[config.model.method].needs(config.model)


def make_method(
    config: Config, autoencoder: Autoencoder | None, networks: Mapping[str, Any] | None = None
) -> Trainable:
    """The configuration's method. networks: see Paper.make; only `loss` and `condition` look through them."""
    return PAPERS[config.model.method].make(config, autoencoder, networks or {})
