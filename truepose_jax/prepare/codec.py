"""`prepare codec`: the patch codec of a folder of photos (models/patch_codec.py), for config.model.vae."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from input_pipeline.annotations.photo import Framing, read_photo
from input_pipeline.schema import InputError
from input_pipeline.sources.folder import PHOTO_SUFFIXES, files_under
from truepose_jax.runtime.cli import parse_size
from truepose_jax.runtime.files import atomic_write, check_new_file

PHOTOS = 500
"""Of larger folders this many photos, evenly spread."""
PATCHES = 400
"""Of one photo, evenly spread: with PHOTOS 200,000, for 1,176 numbers of a covariance."""
LEAST = 480
"""Patches: ten times the numbers in one."""
SHOWN = (8, 12, 16, 20, 24, 32, 40, 48)
"""Components whose error is told."""


def add_codec(commands) -> None:
    """The flags of `codec`."""
    parser = commands.add_parser("codec", help="fit the linear patch codec to a folder of photos; seconds")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="photos, in it and in folders within it")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="size in training (the photos as they are)")
    parser.add_argument("--count", type=int, default=PHOTOS, help=f"photos at most, evenly spread ({PHOTOS})")
    parser.add_argument("--out", required=True, metavar="FILE", help="the codec, a .safetensors for --config.model.vae")
    parser.set_defaults(run=codec)


def codec(flags: argparse.Namespace) -> None:
    """Fits, writes, and prints what each number of components reconstructs. Raises InputError."""
    out = pathlib.Path(flags.out)
    if flags.count < 1:
        raise InputError(f"--count is {flags.count}; it must be 1 or more")
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: a codec is written as safetensors; give a name that ends in .safetensors")
    if out.exists():
        raise InputError(f"{out}: is there already; give another name")
    check_new_file(out)
    files = _photos(pathlib.Path(flags.images))
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(flags.count, len(files))).astype(int))]
    patches = np.concatenate([_patches(file, flags.size) for file in chosen])
    if len(patches) < LEAST:
        raise InputError(
            f"{flags.images}: {len(patches)} patches in {len(chosen)} photos; {LEAST} are needed, so give more"
        )
    # Here and not above: JAX takes a second, and the other sub-commands start without.
    from safetensors.numpy import save

    from truepose_jax.models.patch_codec import fit

    basis = fit(patches)
    with atomic_write(out) as partial:
        partial.write_bytes(save(basis._asdict()))
    print(f"{out}: of {len(patches):,} patches in {len(chosen)} of {len(files)} photos")
    for kept, psnr in _psnrs(str(out), patches).items():
        print(f"{kept:>3} of {patches[0].size} components {psnr:6.2f} dB")


def _photos(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --images names a folder of photos")
    found = files_under(folder)
    if not found:
        raise InputError(f"{folder}: holds no photos ({', '.join(PHOTO_SUFFIXES)})")
    return found


def _patches(file: pathlib.Path, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [n 4 4 3]: of the photo, as training fits it to `size`, without padding and the edge that no patch fills."""
    from truepose_jax.models.patch_codec import PATCH

    photo = read_photo(file)
    if size is not None:
        framing = Framing.fit(photo.shape[:2], size)
        photo = framing.crop(framing.image(photo))
    h, w = (side // PATCH for side in photo.shape[:2])
    if h * w == 0:
        raise InputError(f"{file}: {photo.shape[0]}x{photo.shape[1]} pixels; a patch has {PATCH}x{PATCH}")
    whole_patches = (
        photo[: h * PATCH, : w * PATCH].reshape(h, PATCH, w, PATCH, 3).swapaxes(1, 2).reshape(-1, PATCH, PATCH, 3)
    )
    return whole_patches[np.unique(np.linspace(0, h * w - 1, min(PATCHES, h * w)).astype(int))]


def _psnrs(file: str, patches: np.ndarray) -> dict[int, float]:
    """{components: dB} of the patches out of a codec's latents."""
    from truepose_jax.models.patch_codec import PatchAutoencoder

    pixels = patches.reshape(len(patches), -1).astype(np.float32) / 127.5 - 1.0
    found = {}
    for kept in SHOWN:
        made = PatchAutoencoder(kept, file)
        error = np.mean(np.square(np.asarray(made.to_pixels(made.to_patches(pixels))) - pixels, dtype=np.float64))
        found[kept] = 10.0 * np.log10(4.0 / max(error, 1e-12))
    return found
