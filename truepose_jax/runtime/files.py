"""Files that appear when they are whole, and one line where the disk does not take them."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping

from safetensors import SafetensorError

from input_pipeline import atomic
from input_pipeline.annotations.photo import one_line
from input_pipeline.schema import InputError


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Errors of the disk inside become InputError. safetensors has its own kind, which is no OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({one_line(error)}); free space there, see its permissions, or name another place"
        ) from error


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`with atomic_write(path) as partial:` as atomic.replacing; errors of the disk become InputError."""
    with writing(path), atomic.replacing(path) as partial:
        yield partial


def make_folder(folder: pathlib.Path) -> None:
    """Before the work rather than after it. Raises InputError where nothing can be written there."""
    probe = atomic.partial_of(folder / "probe")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)


def check_apart(outputs: Mapping[str, str | os.PathLike[str]], inputs: Mapping[str, str | os.PathLike[str]]) -> None:
    """{what it is called: path} each. Raises InputError where an output is an input, or another output: it would be lost."""
    taken = {os.path.realpath(path): name for name, path in inputs.items()}
    for name, path in outputs.items():
        if (other := taken.setdefault(os.path.realpath(path), name)) != name:
            said = name if "=" in name else f"{name}={os.fspath(path)}"
            raise InputError(f"{said} is {other} too, and would replace it; name another place")


def check_new_file(path: pathlib.Path) -> None:
    """Before the work rather than after it. Raises InputError where no such file can be written."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or name another place")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    make_folder(path.parent)
