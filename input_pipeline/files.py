"""Files from outside, read with one rule: a plain file of bounded size, and one line where it is not what it should be.

What a person names may be a pipe that never ends, a web page saved as a photo, a pointer of git-lfs, or a list whose names
lead out of its folder. Everything that is read from such names comes through here.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import mmap
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from input_pipeline.schema import InputError, UserError

MAX_PICTURE = 256 << 20
"""Bytes of one photo, map or mask: 64 MP of PNG that do not compress are 192 MiB."""
MAX_TEXT = 512 << 20
"""Of a list or an annotation file: COCO's own keypoint file has 240 MiB."""
MAX_SETTINGS = 16 << 20
"""Of a small JSON file, such as a model's config."""
MAX_NAME = 255
"""Bytes of one part of a path, as file systems have it."""

DELIMITERS = ",;\t"
LFS_POINTER = b"version https://git-lfs"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_STARTS = (
    (b"\xff\xd8\xff", "a JPEG"),
    (b"\x89PNG", "a PNG"),
    (b"GIF8", "a GIF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a zip archive (or a PyTorch file)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"8BPS", "a Photoshop file"),
)


def looks_like(data: bytes) -> str:
    """What the first bytes of a file show, for messages; "" where they show nothing known."""
    start = data[:512]
    if not data:
        return "empty"
    if start.startswith(LFS_POINTER):
        return "a pointer of git-lfs, not the file: run `git lfs pull` where it came from"
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        return "a HEIC or AVIF picture: save it as JPEG or PNG" if brand in _HEIF else "a video"
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "a web page or XML: a download that gave a page in place of the file"
    return next((what for begin, what in _STARTS if start.startswith(begin)), "")


_HEIF = (b"heic", b"heix", b"heif", b"hevc", b"mif1", b"msf1", b"avif", b"avis")


@contextlib.contextmanager
def open_plain(
    path: str | os.PathLike[str], what: str, *, advice: str = "", error: type[UserError] = InputError
) -> Iterator[BinaryIO]:
    """A plain file, open for reading. what: what it should be ("a photo"), for messages; advice: what to do.

    Raises `error`, one line, for what is missing or no plain file (a pipe would be waited for for ever), and for what the disk
    says inside the `with`.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                kind = next((name for test, name in _KINDS if test(mode)), "no plain file")
                raise error(_unreadable(path, what, f"it is {kind}", advice))
            yield file
    except UserError:
        raise
    except (OSError, ValueError) as caught:  # ValueError: a name with a NUL
        why = getattr(caught, "strerror", None) or str(caught)
        raise error(_unreadable(path, what, why, advice or "check the path")) from caught


def _unreadable(path: str | os.PathLike[str], what: str, why: object, advice: str = "") -> str:
    the = what.replace("an ", "the ", 1) if what.startswith("an ") else what.replace("a ", "the ", 1)
    return f"{os.fspath(path)}: cannot read {the} ({why})" + (f"; {advice}" if advice else "")


def read_bytes(
    path: str | os.PathLike[str], what: str, *, limit: int, advice: str = "", error: type[UserError] = InputError
) -> bytes:
    """The bytes of a plain file (open_plain) of at most `limit` bytes. Raises `error`, one line."""
    with open_plain(path, what, advice=advice, error=error) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(_unreadable(path, what, f"it is larger than {limit >> 20} MiB", advice))
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def read_text(
    path: str | os.PathLike[str],
    what: str,
    *,
    limit: int = MAX_TEXT,
    advice: str = "",
    error: type[UserError] = InputError,
) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises `error`."""
    data = read_bytes(path, what, limit=limit, advice=advice, error=error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as caught:
        seen = looks_like(data)
        why = f"it is {seen}" if seen else "it is no UTF-8 text"
        raise error(_unreadable(path, what, why, advice)) from caught


# --------------------------------------------------------------------------------------------------- arrays


class MappedArray(np.memmap):
    """An array in a file, mapped for reading: a process holds the pages that it looks at. It is pickled as its place, so loader
    processes map it too instead of getting a copy."""

    def __reduce__(self):
        if isinstance(self.base, mmap.mmap):  # the whole array, no slice of it
            return MappedArray, (self.filename, self.dtype, "r", self.offset, self.shape)
        return np.asarray(self).__reduce__()


def map_npy(path: str | os.PathLike[str], what: str = "an array", *, advice: str = "") -> MappedArray:
    """The array of an .npy file. Raises InputError where it is none, is cut off, or holds Python objects."""
    with open_plain(path, what, advice=advice) as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # a header is read as Python's text, and raises whatever Python's parser does
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(_unreadable(path, what, f"no .npy file: {why}", advice)) from error
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject or dtype.itemsize == 0 or size != offset + math.prod(shape) * dtype.itemsize:
        raise InputError(_unreadable(path, what, f"{size} bytes for {dtype} {list(shape)}", advice))
    return MappedArray(path, dtype, "r", offset, shape)


# ----------------------------------------------------------------------------------------------------- JSON


def parse_json(text: str) -> Any:
    """json.loads of what may be hostile. Raises ValueError, one line: numbers beyond float64, NaN and Infinity (which JSON does
    not have), and nesting that Python cannot follow."""
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("brackets nested too deep") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _integer(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"the number {text[:20]}... is out of range")
    return int(text)


Form = Any
"""What JSON must look like: a type or a tuple of types, [form] for a list of such, {"name": form} for an object with these
entries ("name?" may be absent, others may be there), {str: form} for an object of any names."""


def check_form(value: Any, form: Form, where: str = "") -> None:
    """Raises ValueError that names the first place where `value` is not of `form`. bool is no number here."""
    at = where or "it"
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{at} is {_type(value)}, not an object")
        for key, inner in form.items():
            if key is str:
                for name, each in value.items():
                    check_form(each, inner, f"{where}.{name}" if where else name)
                continue
            name = key.removesuffix("?")
            if name in value:
                check_form(value[name], inner, f"{where}.{name}" if where else name)
            elif name == key:
                raise ValueError(f"{at} has no '{name}'")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{at} is {_type(value)}, not a list")
        for index, each in enumerate(value):
            check_form(each, form[0], f"{where}[{index}]")
    else:
        allowed = form if isinstance(form, tuple) else (form,)
        right = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            right = True
        if not right:
            raise ValueError(f"{at} is {_type(value)}, not {' or '.join(_NAMES.get(t, t.__name__) for t in allowed)}")


_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", type(None): "null"}


def _type(value: Any) -> str:
    return {bool: "true or false"}.get(type(value)) or _NAMES[type(value)]


def read_json(
    path: str | os.PathLike[str],
    form: Form = dict,
    *,
    what: str = "a JSON file",
    limit: int = MAX_SETTINGS,
    advice: str = "",
    error: type[UserError] = InputError,
) -> Any:
    """A JSON file of `form` (check_form). Raises `error`, one line."""
    text = read_text(path, what, limit=limit, advice=advice, error=error)
    try:
        content = parse_json(text)
        check_form(content, form)
    except ValueError as caught:
        seen = looks_like(text[:512].encode())
        why = f"it is {seen}" if seen else f"not valid JSON: {caught}" if isinstance(caught, json.JSONDecodeError) else caught
        raise error(_unreadable(path, what, why, advice)) from caught
    return content


# ---------------------------------------------------------------------------------------------------- lists


def read_list(path: str | os.PathLike[str], what: str = "a list", *, advice: str = "") -> list[tuple[int, list[str]]]:
    """[(line, cells)] of a CSV file: cells stripped, empty lines left out; commas, semicolons or tabs part them, whichever its
    first line has. Raises InputError."""
    text = read_text(path, what, advice=advice)
    first = text.lstrip().split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first.count)  # the comma where it has none of them
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as caught:
        raise InputError(_unreadable(path, what, caught, advice)) from caught
    return [(line, cells) for line, cells in rows if any(cells)]


# ---------------------------------------------------------------------------------------------------- names


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_in(folder: pathlib.Path, name: str, what: str) -> pathlib.Path:
    """The file `name` of `folder`, links followed. what: what the name is, for messages.

    Raises InputError where it leaves the folder, or where no file system takes it (NUL, a circle of links, over 255 bytes).
    """
    if any(len(os.fsencode(part)) > MAX_NAME for part in pathlib.PurePath(name).parts):
        raise InputError(f"{what} '{name[:40]}...' is longer than a file's name can be ({MAX_NAME} bytes)")
    try:
        place, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links is a RuntimeError before Python 3.13
        why = "its links go in a circle" if isinstance(error, RuntimeError) else str(error).split(":")[0]
        raise InputError(f"{what} '{name}' is no name of a file ({why})") from error
    if not place.is_relative_to(root):
        raise InputError(f"{what} '{name}' leaves the folder {folder}")
    return place
