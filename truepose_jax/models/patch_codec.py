"""A linear autoencoder: principal components of 4x4 patches, and back. For networks that are trained from nothing.

Its latents are small, of even strength, and exact to grey levels; four patches make one cell of a 1/8 latent. Fitted in
seconds (`fit`); the one that comes along was fitted on synthetic people, and serves photos nearly as well.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors.numpy import load_file

from truepose_jax.models.vae import depth_to_space, space_to_depth

PATCH = 4
"""Pixels per patch and side."""

BUILT_IN = pathlib.Path(__file__).with_name("patch_codec.safetensors")


class PatchBasis(NamedTuple):
    """mean [48] of a patch (row, column, channel); components [48 48], each a column, the strongest first; deviations [48]
    of the patches along them."""

    mean: np.ndarray
    components: np.ndarray
    deviations: np.ndarray


def fit(images: UInt8[np.ndarray, "n h w 3"]) -> PatchBasis:
    """Of all patches of the images; sides must divide by PATCH."""
    values = np.asarray(images, np.float32) / 127.5 - 1.0
    patches = np.asarray(space_to_depth(values, PATCH)).reshape(-1, 3 * PATCH**2).astype(np.float64)
    mean = patches.mean(axis=0)
    variances, components = np.linalg.eigh(np.cov((patches - mean).T))
    components = components[:, ::-1]
    # A component's sign is chance: its largest entry is made positive.
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(len(mean))])
    deviations = np.sqrt(np.maximum(variances[::-1], 0.0))
    return PatchBasis(*(np.ascontiguousarray(x, np.float32) for x in (mean, components, deviations)))


@functools.cache
def load(path: str = "") -> tuple[PatchBasis, str]:
    """(basis, sha256 of the file); "": the one that comes along. Raises OSError, and ValueError for another file."""
    file = pathlib.Path(path) if path else BUILT_IN
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    try:
        found = load_file(file)
        basis = PatchBasis(*(found[name].astype(np.float32) for name in PatchBasis._fields))
    except Exception as error:  # the reader has errors of its own for each way to be broken
        raise ValueError(f"{file} is no patch codec ({type(error).__name__}: {error})") from error
    size = 3 * PATCH**2
    shapes = [x.shape for x in basis]
    if shapes != [(size,), (size, size), (size,)] or not all(np.isfinite(x).all() for x in basis):
        raise ValueError(f"{file} is no patch codec: its tensors have the shapes {shapes}, or are not finite")
    return basis, digest


@dataclasses.dataclass(frozen=True)
class PatchAutoencoder:
    """`Autoencoder` without trainable parameters (pass {}). path: file of its basis, "" the built-in one. kept: components.

    A latent cell of 8x8 pixels holds 2x2 patches of `kept` numbers each. Their scale is deviation^-1/2 (strong components
    stay stronger), then such that the mean square is 1.
    """

    kept: int = 24
    path: str = ""

    factor = 2 * PATCH
    scale = 1.0

    @property
    def channels(self) -> int:
        return 4 * self.kept

    @property
    def fingerprint(self) -> str:
        return f"patches-{self.kept}-{load(self.path)[1]}"

    def _parts(self):
        """mean [48], components [48 kept], scale [kept]."""
        basis, _ = load(self.path)
        deviations = np.maximum(basis.deviations[: self.kept], 1e-6)
        scale = deviations**-0.5
        scale = scale / np.sqrt(np.mean(np.square(deviations * scale)))
        return basis.mean, basis.components[:, : self.kept], scale.astype(np.float32)

    def init(self, key) -> Mapping[str, Any]:
        del key
        return {}

    def encode_mean(self, params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        del params
        return space_to_depth(self.to_patches(space_to_depth(images, PATCH)), 2)

    def encode_sample(self, params, images: Float[Array, "b H W 3"], keys) -> Float[Array, "b h w c"]:
        del keys
        return self.encode_mean(params, images)

    def decode(self, params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        del params
        return depth_to_space(self.to_pixels(depth_to_space(latents, 2)), PATCH)

    def to_patches(self, pixels: Float[Array, "... 48"]) -> Float[Array, "... kept"]:
        """Latents of patches of pixels in [-1, 1]."""
        mean, components, scale = self._parts()
        return (pixels - mean) @ (components * scale)

    def to_pixels(self, patches: Float[Array, "... kept"]) -> Float[Array, "... 48"]:
        """The inverse, exact in the span of what is kept."""
        mean, components, scale = self._parts()
        return jnp.asarray(patches) @ (components / scale).T + mean
