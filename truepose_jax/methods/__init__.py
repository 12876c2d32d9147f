"""The papers, one file each; `make_method` is the only place that knows their names."""

from truepose_jax.config import Config
from truepose_jax.methods.base import Method
from truepose_jax.methods.truepose import TruePose
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.vae import Autoencoder

METHODS = {"truepose": TruePose}


def make_method(config: Config, autoencoder: Autoencoder, clip: CLIPVisionConfig | None = None) -> Method:
    """clip: of frozen["clip"], for methods that see the source through CLIP (config.model.uses_clip)."""
    return METHODS[config.model.method](config.model, config.diffusion, autoencoder, clip)
