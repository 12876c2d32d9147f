"""Which program made a number: part of the name of all that is kept between runs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from importlib import resources

import cv2
import numpy as np
import PIL
import scipy

FILES = {
    "truepose_jax.evaluate": ("protocols.py", "scores.py", "statistics.py"),
    "input_pipeline.annotations": ("photo.py", "parsing.py", "grey_png.py", "run_lengths.py"),
}
"""What numbers depend on besides all of truepose_jax.metrics."""


@functools.cache
def program_hash() -> str:
    """sha256 over the source that numbers depend on, and the versions of the packages that read and resize images."""
    digest = hashlib.sha256()
    for package in (np, scipy, PIL, cv2):
        digest.update(f"{package.__name__} {package.__version__}\n".encode())
    for name, source in sources():
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def sources() -> Iterator[tuple[str, bytes]]:
    """(name, contents) of each file, in one order."""
    metrics = sorted(f.name for f in resources.files("truepose_jax.metrics").iterdir() if f.name.endswith(".py"))
    for package, names in ({"truepose_jax.metrics": metrics} | FILES).items():
        for name in names:
            yield f"{package}/{name}", (resources.files(package) / name).read_bytes()
