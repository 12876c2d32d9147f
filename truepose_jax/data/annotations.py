"""What `prepare annotate` left in records, region tokens and latents, and whether it serves a run.

DIR/metadata.json tells of which weights they are and at which size they were made: "annotations" is {"clip": {...},
"vae": {...}}, each with fingerprint, size and flipped, clip also with width. Tokens that do not serve are made again;
latents that do not serve are an error, for training on others would be another run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from input_pipeline.batches.readers import RecordTokens
from input_pipeline.records.annotate import annotations
from input_pipeline.records.reader import RecordImages
from truepose_jax.config import Config, ConfigError
from truepose_jax.methods import Trainable
from truepose_jax.models.vae import Autoencoder, MomentsAutoencoder
from truepose_jax.pretrained.region_tokens import LazyEncoder, RegionEncoder


def stored_tokens(
    config: Config, images: RecordImages, encoder: RegionEncoder | LazyEncoder
) -> tuple[RecordTokens, str] | None:
    """(the tokens in the records, fingerprint of their CLIP); None where there are none or they do not serve.

    Where config.model.clip.path is empty the records' own CLIP is taken as meant.
    """
    found = annotations(images.root).get("clip")
    if found is None:
        return None
    why = ""
    if tuple(found["size"]) != config.model.size:
        why = f"they are of pictures of {found['size'][0]}x{found['size'][1]}"
    elif found["width"] != config.token_width:
        why = f"they are {found['width']} wide"
    elif config.data.flip and not found["flipped"]:
        why = "those of the mirrored photos are missing"
    elif config.model.clip.path and encoder.fingerprint != found["fingerprint"]:
        why = f"they are of another CLIP than {config.model.clip.path}"
    if why:
        logging.warning("%s: the region tokens stored there do not serve (%s); making others", images.root, why)
        return None
    return RecordTokens(images, found["width"], found["flipped"]), found["fingerprint"]


def training_method(
    config: Config, method: Trainable, images: Any, autoencoder: Autoencoder, prints: Mapping[str, str]
) -> Trainable:
    """The method to train with: `method`, or one that reads stored latents in place of photos (config.data.latents).

    images: what is trained on. prints: fingerprints of the run's frozen networks by role. Raises ConfigError where the
    latents are missing, of another size or of another VAE.
    """
    if config.data.latents == "off":
        return method
    found = annotations(images.root).get("vae")
    h, w = config.model.size
    setting = "config.data.latents is 'stored'"
    advice = f"make them by `prepare annotate {images.root} --vae={config.model.vae} --size={h}x{w}`"
    if found is None:
        raise ConfigError(f"{setting} and {images.root} has no latents; {advice}")
    if tuple(found["size"]) != config.model.size:
        there = f"{found['size'][0]}x{found['size'][1]}"
        raise ConfigError(
            f"{setting} and those of {images.root} are of {there} pictures; config.model.size is {h}x{w}; {advice}"
        )
    if config.data.flip and not found["flipped"]:
        raise ConfigError(
            f"{setting}, config.data.flip is True and {images.root} has none of mirrored photos; {advice}"
        )
    if found["fingerprint"] != prints["autoencoder"]:
        raise ConfigError(f"{setting} and those of {images.root} are of another VAE than {config.model.vae}; {advice}")
    return dataclasses.replace(method, autoencoder=MomentsAutoencoder(autoencoder))
