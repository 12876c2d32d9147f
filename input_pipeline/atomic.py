"""Files that appear when they are whole: written beside their place under a name of their own, then renamed.

Errors of the disk are OSErrors here; truepose_jax.runtime.files gives them a program's words.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


def partial_of(path: pathlib.Path) -> pathlib.Path:
    """A hidden name beside `path` that no one else has: in containers every Python is process 1, so its number is not enough."""
    # With the rest it is a name too, however long the file's own is.
    name = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "surrogateescape")
    return path.with_name(f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`with replacing(path) as partial:` what is written to `partial` is the file at the end, in place of an older one.

    After an error inside, the older one stands and `partial` is gone.
    """
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """UTF-8, on the disk before it takes the older one's place: a machine that stops leaves one of the two."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
