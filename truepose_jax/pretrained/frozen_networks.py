"""Networks that no optimizer touches, from folders of PyTorch weights: the autoencoder and CLIP's vision tower.

A folder holds config.json and safetensors, as diffusers and transformers save them. Whatever is wrong with it is
a ConfigError, one line that names the setting. The fingerprint of weights is a sha256 over the tensors that our network
reads: name, shape, type and bits of each. So a folder of the hub and the copy of it that `convert from-torch` wrote have
the same one, in one file or in shards, with CLIP's text side or without. Weights in another precision have another one:
they are other numbers. metadata.json records it, and every cache of region tokens is keyed by it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import files
from truepose_jax.config import ConfigError, DenoiserModel
from truepose_jax.models.patch_codec import PatchAutoencoder
from truepose_jax.models.vae import Autoencoder, AutoencoderKLConfig, KLAutoencoder, PixelAutoencoder
from truepose_jax.pretrained.conversion import from_torch, key_maps
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.safetensors_io import (
    ConversionError,
    TensorInfo,
    TensorSource,
    open_source,
    weight_files,
)
from truepose_jax.pretrained.conversion.weights_folder import CLIP_FOLDER, DINO_FOLDER

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What can be loaded. setting: where the config names the folder. inside: the sub-folder of a larger model
    that holds it. advice: what to do about a folder that does not serve."""

    keys: ModelKeys
    setting: str
    inside: str
    advice: str


KINDS = {
    "vae": Kind(
        key_maps.VAE,
        "config.model.vae",
        "vae",
        "give a diffusers folder with SD1.5's autoencoder (config.json and safetensors), such as "
        "stabilityai/sd-vae-ft-mse or stable-diffusion-v1-5, or in config.init_from the folder "
        "of `convert from-torch`, which holds it beside the UNets to start from; generate: --vae=DIR",
    ),
    "clip": Kind(
        key_maps.CLIP_VISION,
        "config.model.clip.path",
        CLIP_FOLDER,
        "give a transformers folder with CLIP's vision tower (config.json and safetensors), such as "
        "openai/clip-vit-large-patch14; generate: --clip=DIR",
    ),
    "dino": Kind(
        key_maps.DINOV2,
        "config.model.dino.path",
        DINO_FOLDER,
        "give a transformers folder with DINOv2 (config.json and safetensors) such as facebook/dinov2-large",
    ),
    "ipf": Kind(
        key_maps.CLIP_VISION,
        "config.model.ipf.path",
        CLIP_FOLDER,
        "give what `convert to-torch` wrote of a run of config.model.method 'ipf'",
    ),
}


def load_autoencoder(config: DenoiserModel) -> tuple[Autoencoder, dict[str, Any], str]:
    """(autoencoder, its parameters, fingerprint); the parameters belong into frozen["autoencoder"].

    "pixels" has no parameters ({}) and the fingerprint "pixels-FACTOR". The VAE computes in config.dtype.
    Raises ConfigError.
    """
    if config.autoencoder == "pixels":
        return PixelAutoencoder(config.pixel_factor), {}, f"pixels-{config.pixel_factor}"
    if config.autoencoder == "patches":
        codec = PatchAutoencoder(config.patch_channels, config.vae)
        try:
            return codec, {}, codec.fingerprint
        except (OSError, ValueError) as error:
            raise ConfigError(f"config.model.vae={config.vae}: {error}; fit one by `prepare codec`") from error
    kind = KINDS["vae"]
    if not config.vae:
        raise ConfigError(f"{kind.setting} is empty and autoencoder 'sd15' needs weights; {kind.advice}")
    return load_vae(config.vae, channels=config.latent_channels, dtype=config.dtype)


def load_vae(folder: str, *, channels: int = 4, dtype: str = "float32") -> tuple[KLAutoencoder, dict[str, Any], str]:
    """(autoencoder, its parameters, fingerprint) of a diffusers folder. channels: of a latent. Raises ConfigError."""
    kind = KINDS["vae"]
    found = read_torch_config(folder, AutoencoderKLConfig.from_diffusers, "vae")
    if (found.factor, found.latent_channels) != (8, channels):
        raise ConfigError(
            f"{kind.setting}={folder}: {found.latent_channels} latent channels at 1/{found.factor} of the "
            f"size; this model needs {channels} at 1/8; {kind.advice}"
        )
    autoencoder = KLAutoencoder(found, dtype=jnp.dtype(dtype))
    params, fingerprint = load_torch_folder(folder, _shapes(autoencoder), "vae")
    return autoencoder, params, fingerprint


def autoencoder_shapes(config: DenoiserModel) -> tuple[Autoencoder, dict[str, Any]]:
    """(autoencoder, the shapes of its parameters) without any weights: SD1.5's where config.vae is empty."""
    if config.autoencoder == "pixels":
        return PixelAutoencoder(config.pixel_factor), {}
    if config.autoencoder == "patches":
        return PatchAutoencoder(config.patch_channels, config.vae), {}
    found = read_torch_config(config.vae, AutoencoderKLConfig.from_diffusers, "vae") if config.vae else None
    autoencoder = KLAutoencoder(*([found] if found else []), dtype=jnp.dtype(config.dtype))
    return autoencoder, _shapes(autoencoder)


@functools.cache
def _shapes(autoencoder: KLAutoencoder) -> dict[str, Any]:
    return jax.eval_shape(autoencoder.init, jax.random.key(0))


def read_torch_config(folder: str, parse: Callable[[Mapping[str, Any]], T], kind: str) -> T:
    """parse(the folder's config.json). Raises ConfigError where it is missing, broken or of another model."""
    path = folder_of(folder, kind) / "config.json"
    try:
        return parse(files.read_json(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise refusal(folder, kind, f"{path.name} does not serve ({_one_line(error)})") from error


def load_torch_folder(folder: str, abstract_params: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], str]:
    """(parameters on the default device, fingerprint) of a folder's weights.

    abstract_params: the tree of shapes and dtypes that is wanted; every tensor must fit, and none may be left
    over. kind: "vae" or "clip". Raises ConfigError.
    """
    place, keys = folder_of(folder, kind), KINDS[kind].keys
    try:
        source = _Hashed(open_source(place), keys)
        params = from_torch.load(source, abstract_params, keys)
        return jax.tree.map(jnp.asarray, params), source.fingerprint()
    except (OSError, ConversionError) as error:
        raise refusal(folder, kind, _one_line(error)) from error


def folder_fingerprint(folder: str, kind: str) -> str:
    """The fingerprint of a folder's weights, which are hashed and not loaded. Raises ConfigError."""
    try:
        return _Hashed(open_source(folder_of(folder, kind)), KINDS[kind].keys).fingerprint()
    except (OSError, ConversionError) as error:
        raise refusal(folder, kind, _one_line(error)) from error


class _Hashed:
    """A TensorSource that hashes every tensor when it is read, so that loading reads the weights once."""

    def __init__(self, source: TensorSource, keys: ModelKeys):
        self._source, self._keys = source, keys
        self._digests: dict[str, str] = {}
        self.infos: Mapping[str, TensorInfo] = source.infos

    def read(self, name: str) -> np.ndarray:
        array = self._source.read(name)
        if name not in self._digests:
            bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._digests[name] = hashlib.sha256(bits).hexdigest()
        return array

    def fingerprint(self) -> str:
        """Over the tensors that count, by their canonical names; those not read yet are read now, one at a time."""
        lines = []
        for name, (shape, dtype) in self.infos.items():
            if self._keys.reason_to_ignore(name):
                continue
            if name not in self._digests:
                self.read(name)
            lines.append(f"{self._keys.canonical(name)} {list(shape)} {dtype} {self._digests[name]}")
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def folder_of(folder: str, kind: str) -> pathlib.Path:
    """Where config.json lies: `folder`, or its sub-folder where it is a whole Stable Diffusion's."""
    place = pathlib.Path(folder)
    if not place.is_dir():
        raise refusal(folder, kind, "no such folder")
    for found in (place, place / KINDS[kind].inside):
        if (found / "config.json").is_file():
            return found
    raise refusal(folder, kind, "holds no config.json")


def refusal(folder: str, kind: str, why: str) -> ConfigError:
    """The error of a folder that does not serve as KINDS[kind]."""
    return ConfigError(f"{KINDS[kind].setting}={folder}: {why}; {KINDS[kind].advice}")


def _one_line(error: Exception) -> str:
    """Of a ConversionError, which lists every tensor: its title, then each kind of trouble with one name."""
    title, *rest = str(error).splitlines() or [type(error).__name__]
    parts = [title]
    for line, following in itertools.pairwise(rest):
        if not line.startswith(" "):
            parts.append(f"{line} {following.strip()}{'' if line.startswith('1 ') else ', ...'}")
    return "; ".join(parts)


def files_sha256(folder: pathlib.Path) -> str:
    """Of one file of weights its sha256, the number that model hubs list; of shards the sha256 of theirs in a row. Raises
    ConversionError."""
    digests = [files.sha256_of(file) for file in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
