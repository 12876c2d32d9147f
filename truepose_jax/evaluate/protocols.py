"""How images are brought to size before they are compared: four published habits (docs/paper.md 9.1).

Every frame is float32 of 0 to 255. Papers compare at one size for SSIM and PSNR and, in PIDM's case, at another for LPIPS
and FID.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float
from PIL import Image

from input_pipeline.schema import InputError

Size = tuple[int, int]
"""(h, w) in pixels."""


def _pil_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased, rounded to whole levels: what a uint8 picture becomes in Pillow and torchvision's Resize."""
    pixels = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)


def _float_bicubic_truncated(image: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased in floating point, clipped, decimals cut off: CFLD's way with its samples."""
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize(size[::-1], Image.Resampling.BICUBIC)) for c in channels]
    return np.floor(np.clip(np.stack(resized, -1), 0, 255)).astype(np.float32)


def _cv2_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    """No antialias, not rounded, not clipped."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)


def _cv2_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    """No antialias, not rounded."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def _as_it_is(image: np.ndarray, size: Size) -> np.ndarray:
    return image


class Filter(NamedTuple):
    """resize(image, (h, w)) for images of another size; those of that size stay as they are."""

    text: str
    resize: Callable[[np.ndarray, Size], np.ndarray]


PIL_BICUBIC = Filter("Pillow bicubic, antialiased, rounded to uint8", _pil_bicubic)
CFLD_SAMPLE = Filter(
    "bicubic, antialiased, in floating point, truncated to uint8 (pictures of that size stay as they are)",
    _float_bicubic_truncated,
)
SAVED_AT_SIZE = Filter(
    "saved beforehand as PNG of that size (Pillow bicubic, antialiased, rounded to uint8); OpenCV's bicubic, which PCDM "
    "then calls, finds nothing to do",
    _pil_bicubic,
)
CV2_BICUBIC = Filter("OpenCV bicubic without antialias, floating point", _cv2_bicubic)
CV2_BILINEAR = Filter("OpenCV bilinear without antialias, floating point", _cv2_bilinear)
UNCHANGED = Filter("none", _as_it_is)


class Frames(NamedTuple):
    """One image as SSIM and PSNR see it, and as LPIPS and FID do; float32, 0 to 255."""

    similarity: Float[np.ndarray, "h w 3"]
    perceptual: Float[np.ndarray, "h2 w2 3"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """generated, truth: filters to the size of SSIM and PSNR (FID's reference images go the truth's way).

    similarity_size: of the size asked for; perceptual: filter from there to the size of LPIPS and FID.
    lpips_range: what LPIPS is fed. sigma: of ssim_256's window. departs: where we do not follow the source's code.
    """

    generated: Filter
    truth: Filter
    perceptual: Filter
    similarity_size: Callable[[Size], Size]
    lpips_range: tuple[float, float]
    sigma: float
    source: str
    departs: str = "in nothing that is known"

    def frames(self, image: np.ndarray, role: str, size: Size | None) -> Frames:
        """image: uint8 [h w 3]. role: "generated" or "truth". size: None for `plain`."""
        filters = {"generated": self.generated, "truth": self.truth}
        similarity = _to_size(image.astype(np.float32), filters[role], self.similarity_size(size) if size else None)
        return Frames(similarity, _to_size(similarity, self.perceptual, size))

    def lpips_input(self, frame: np.ndarray) -> np.ndarray:
        low, high = self.lpips_range
        return frame / np.float32(255) * np.float32(high - low) + np.float32(low)

    def describe(self, size: Size | None) -> dict[str, object]:
        """The protocol in words, for the report."""
        compared = self.similarity_size(size) if size else None
        return {
            "source": self.source,
            "departs from its code": self.departs,
            "size of SSIM and PSNR": "x".join(map(str, compared)) if compared else "each image's own",
            "size of LPIPS and FID": "x".join(map(str, size)) if size else "each image's own",
            "resize of generated images": self.generated.text,
            "resize of reference images": self.truth.text,
            "then, for LPIPS and FID": self.perceptual.text,
            "ssim": "uniform window 51, images in [0, 1], data range 1, sample covariances, mean over channels",
            "ssim_256": f"Gaussian window, sigma {self.sigma}, images of 0 to 255, data range max - min of the "
            "generated image, population covariances, mean over channels",
            "psnr": "per image, data range 1, then the mean",
            "lpips": f"0.1, AlexNet, images in [{self.lpips_range[0]:g}, {self.lpips_range[1]:g}]",
        }


def _to_size(image: np.ndarray, resize: Filter, size: Size | None) -> np.ndarray:
    return image if size is None or image.shape[:2] == size else resize.resize(image, size)


PROTOCOLS: Mapping[str, Protocol] = {
    "cfld": Protocol(
        CFLD_SAMPLE, PIL_BICUBIC, UNCHANGED, lambda size: size, (-1.0, 1.0), 1.5, "CFLD (FPDM: the same on PIL files)"
    ),
    "pidm": Protocol(
        PIL_BICUBIC,
        PIL_BICUBIC,
        CV2_BILINEAR,
        lambda size: (size[0], size[0]),
        (-1.0, 1.0),
        1.2,
        "PIDM (GFLA's files)",
        "all images count; its LPIPS and FID leave out the last part of a batch of 64 (of 8,570 images 58)",
    ),
    "pcdm": Protocol(
        CV2_BICUBIC,
        SAVED_AT_SIZE,
        UNCHANGED,
        lambda size: size,
        (0.0, 1.0),
        1.2,
        "PCDM",
        "all images count; its FID leaves out the last part of a batch of 128. One sample of each pair is judged; its "
        "script keeps the best of four by SSIM to the truth",
    ),
    "plain": Protocol(
        UNCHANGED, UNCHANGED, UNCHANGED, lambda size: size, (-1.0, 1.0), 1.5, "no resizing: images as they are"
    ),
}


def check_size(name: str, size: Size | None) -> None:
    """Raises InputError where the protocol needs a size and has none, or the reverse."""
    if name == "plain" and size:
        raise InputError("--size goes with --protocol=cfld, pidm or pcdm; plain resizes nothing")
    if name != "plain" and not size:
        raise InputError(f"--size is missing: --protocol={name} compares at one size, such as 256x176 or 512x352")
