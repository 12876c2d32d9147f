"""Photos from disk, and how a photo of one size is put into a picture of another without bending people.

Sizes are (h, w) in pixels, boxes (x0, y0, x1, y1) half open, joints (x, y, visible).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import re
import struct
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from input_pipeline.files import MAX_PICTURE, looks_like, read_bytes
from input_pipeline.schema import InputError

try:  # Three times Pillow's speed and bit-identical to it (docs/paper.md 11); without it Pillow serves.
    import simplejpeg
except ImportError:
    simplejpeg = None

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")

MAX_SIDE = 8192
MAX_PIXELS = 64_000_000
"""Larger photos are refused before they are decoded: nothing here needs them, and they fill the memory."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What is read. Pillow knows many more and tries all of them on any bytes: PostScript would start another program."""

MAX_CHUNKS = 100_000
"""Parts of a PNG; encoders write one for each 8 to 64 KiB. Pillow takes 10 us for each."""

LARGE = 8_000_000
"""Photos of more pixels are decoded one at a time: each takes twice its pixels while it is."""
_large = threading.Semaphore()
STRIP = 512
"""Rows whose colours are converted at once: of a whole picture each step would be a copy of it."""

MAX_STRETCH = 0.02
"""Aspects that differ by less are stretched (750x1101 against 176x256 is 0.9 %); others are padded."""

EXIF_ORIENTATION = 0x0112


def read_photo(path: str | pathlib.Path, *, over: str = "white") -> np.ndarray:
    """Reads a photo: uint8 [h w 3] RGB, upright (EXIF orientation applied), transparency over the colour `over`.

    Raises InputError where the file is missing, not an image, truncated, or larger than 8192 px a side or 64
    MP.
    """
    return decode_photo(read_bytes(path, "a photo", limit=MAX_PICTURE), name=str(path), over=over)


def decode_photo(data: bytes, *, name: object, over: str = "white") -> np.ndarray:
    """The same from an encoded image in memory; `name`, as text, is what errors call it."""
    with open_picture(data, name=name) as image, _large if image.width * image.height > LARGE else contextlib.nullcontext():
        if is_plain_jpeg(image) and simplejpeg:
            with contextlib.suppress(_Padded):
                return _decode_jpeg(data)
        if image.mode.startswith(("I", "F")):
            raise InputError(f"{name}: {image.mode} pixels (16 or 32 bits); save the photo with 8 bits a channel")
        ImageOps.exif_transpose(image, in_place=True)
        rgb = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, STRIP):
            part = image.crop((0, top, image.width, min(top + STRIP, image.height)))
            if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
                part = part.convert("RGBA")
                part = Image.alpha_composite(Image.new("RGBA", part.size, over), part)
            rgb[top : top + STRIP] = np.asarray(part.convert("RGB"))
        return rgb


@contextlib.contextmanager
def open_picture(data: bytes | BinaryIO, *, name: object, what: str = "image") -> Iterator[Image.Image]:
    """Pillow's image of a picture in memory or of an open file, of FORMATS and no larger than check_size allows.

    Raises InputError, one line with `name`, also for what goes wrong with the pixels inside the `with`.
    """
    try:
        if isinstance(data, bytes):
            _check_chunks(data, name=name)
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(file, formats=FORMATS) as image:
            check_size(image, name=name)
            yield image
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        seen = looks_like(file.read(512))
        why = f"it is {seen}" if seen else "its bytes are no picture's, or it is truncated"
        raise InputError(f"{name}: not a readable {what}: {why}; {', '.join(FORMATS)} are read") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not a readable {what} ({one_line(error)}); it may be truncated") from error


def _check_chunks(data: bytes, *, name: object) -> None:
    """A PNG of so many parts that reading them takes minutes is refused. Raises InputError."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 12 * MAX_CHUNKS:
        return
    place, chunks = 8, 0
    while place + 12 <= len(data):
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise InputError(f"{name}: a PNG of more than {MAX_CHUNKS:,} chunks; save it again")


def is_plain_jpeg(image: Image.Image) -> bool:
    """A JPEG of three channels that is not turned by its EXIF tag."""
    return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(EXIF_ORIENTATION, 1) == 1


class _Padded(Exception):
    """A JPEG with up to 16 bytes between its last row and its end marker, as some cameras write them: Pillow reads it, to the
    same pixels. More of them are what a damaged row leaves."""


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as error:
        if re.search(r"\b(\d|1[0-6]) extraneous bytes before marker 0xd9", str(error)):
            raise _Padded from error
        raise


def check_size(image: Image.Image, *, name: object) -> None:
    """Raises InputError where the header announces more pixels than this project reads."""
    w, h = image.size
    if max(h, w) > MAX_SIDE or h * w > MAX_PIXELS:
        raise InputError(
            f"{name}: {h}x{w} pixels; make it smaller, at most {MAX_SIDE} a side and {MAX_PIXELS // 10**6} MP"
        )


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, for messages that promise one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True)
class Framing:
    """Where a photo of `photo_hw` lies in a picture of `out_hw`: over `box` (x0, y0, x1, y1), white else."""

    photo_hw: tuple[int, int]
    out_hw: tuple[int, int]
    box: tuple[int, int, int, int]

    @classmethod
    def fit(cls, photo_hw: tuple[int, int], out_hw: tuple[int, int]) -> Framing:
        """The whole picture where the aspect ratios differ by less than 2 %, else the largest centred box."""
        (h, w), (out_h, out_w) = photo_hw, out_hw
        if abs((w * out_h) / (h * out_w) - 1) < MAX_STRETCH:
            return cls(photo_hw, out_hw, (0, 0, out_w, out_h))
        scale = min(out_h / h, out_w / w)
        box_h, box_w = max(1, round(h * scale)), max(1, round(w * scale))
        x0, y0 = (out_w - box_w) // 2, (out_h - box_h) // 2
        return cls(photo_hw, out_hw, (x0, y0, x0 + box_w, y0 + box_h))

    @property
    def padded(self) -> bool:
        return self.box != (0, 0, self.out_hw[1], self.out_hw[0])

    def image(self, photo: np.ndarray) -> np.ndarray:
        """uint8 [h w 3] -> uint8 [out_h out_w 3], Pillow's bicubic (with antialias), white where padded."""
        return self._place(photo, Image.Resampling.BICUBIC, fill=255)

    def parsing(self, parsing: np.ndarray) -> np.ndarray:
        """uint8 [h w] -> uint8 [out_h out_w], nearest, background (0) where padded."""
        return self._place(parsing, Image.Resampling.NEAREST, fill=0)

    def joints(self, joints: np.ndarray) -> np.ndarray:
        """[18 3] in pixels of the photo -> float32 [18 3] in pixels of the picture; missing stay zeros."""
        x0, y0, x1, y1 = self.box
        scale = ((x1 - x0) / self.photo_hw[1], (y1 - y0) / self.photo_hw[0])
        placed = np.zeros((len(joints), 3), np.float32)
        seen = joints[:, 2] > 0
        placed[seen, :2] = joints[seen, :2] * scale + (x0, y0)
        placed[seen, 2] = 1
        return placed

    def crop(self, picture: np.ndarray) -> np.ndarray:
        """The inverse crop: [out_h out_w ...] -> the part of the picture that is photo, no padding."""
        x0, y0, x1, y1 = self.box
        return picture[y0:y1, x0:x1]

    def _place(self, pixels: np.ndarray, resampling: Image.Resampling, *, fill: int) -> np.ndarray:
        if pixels.shape[:2] != self.photo_hw:
            raise ValueError(f"framing of a {self.photo_hw} photo got an array of shape {pixels.shape}")
        x0, y0, x1, y1 = self.box
        if pixels.shape[:2] != (y1 - y0, x1 - x0):
            pixels = np.asarray(Image.fromarray(pixels).resize((x1 - x0, y1 - y0), resampling))
        if not self.padded:
            return pixels
        out = np.full((*self.out_hw, *pixels.shape[2:]), fill, np.uint8)
        out[y0:y1, x0:x1] = pixels
        return out


def fit_photo(
    image: np.ndarray, parsing: np.ndarray, joints: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Framing]:
    """Photo uint8 [h w 3], map uint8 [h w] and joints [18 3] -> the same at `size` (h, w), and the framing.

    `framing.crop(picture)` takes the padding off again.
    """
    framing = Framing.fit(image.shape[:2], size)
    return framing.image(image), framing.parsing(parsing), framing.joints(joints), framing
