"""The papers, one file each; `make_method` is the only place that knows their names."""

from truepose_jax.methods.base import Method
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.vae import Autoencoder
from truepose_jax.schema import Config

METHODS = {"truepose": TruePose}


def make_method(config: Config, autoencoder: Autoencoder) -> Method:
    return METHODS[config.model.method](config.model, config.diffusion, autoencoder)
