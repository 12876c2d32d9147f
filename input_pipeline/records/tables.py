"""The tables beside the records: whom each image shows, and the pairs. They are mapped into memory, never read whole.

    DIR/images-SPLIT.npy    of each record: name and identity (UTF-8), height, width, joints (visible)
    DIR/pairs-SPLIT.npy     int32 [m 2]: records (source, target)

Builds of earlier versions have CSVs in their place, images-SPLIT.csv of the same columns and pairs-SPLIT.csv of names; they
are read into such arrays.
"""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from input_pipeline import files
from input_pipeline.schema import InputError

IMAGE_COLUMNS = ("name", "identity", "height", "width", "joints")
PAIR_COLUMNS = ("source", "target")
WHAT, ADVICE = "a table of the build", "build the dataset again"


class Texts(Sequence[str]):
    """A column of UTF-8 texts of an image table."""

    def __init__(self, column: np.ndarray):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index):
        found = self.column[index]
        return Texts(found) if isinstance(index, slice) else found.decode(errors="replace")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


def image_dtype(name: int, identity: int) -> np.dtype:
    """Of a row of an image table, whose texts take so many bytes at most."""
    texts = [("name", f"S{max(name, 1)}"), ("identity", f"S{max(identity, 1)}")]
    return np.dtype([*texts, ("height", "<i4"), ("width", "<i4"), ("joints", "<u2")])


def image_row(row: Sequence) -> tuple:
    """(name, identity, height, width, joints), texts encoded."""
    name, identity, *numbers = row
    return (name.encode(), identity.encode(), *map(int, numbers))


def table_files(split: str) -> tuple[str, str]:
    """Names of the split's image table and list of pairs."""
    return f"images-{split}.npy", f"pairs-{split}.npy"


def read_tables(root: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [n], pairs int32 [m 2]) of a split. Raises InputError where one is missing or is no such table."""
    images_file, pairs_file = (root / name for name in table_files(split))
    if not images_file.exists() and images_file.with_suffix(".csv").exists():
        return _read_csvs(images_file.with_suffix(".csv"), pairs_file.with_suffix(".csv"))
    images, pairs = (files.map_npy(file, WHAT, advice=ADVICE) for file in (images_file, pairs_file))
    if images.dtype.names != IMAGE_COLUMNS or images.dtype != image_dtype(*(images.dtype[i].itemsize for i in (0, 1))):
        raise InputError(f"{images_file}: its columns must be {', '.join(IMAGE_COLUMNS)}; {ADVICE}")
    if images.ndim != 1 or pairs.dtype != np.int32 or pairs.shape[1:] != (2,):
        raise InputError(f"{pairs_file}: {pairs.dtype} {list(pairs.shape)} is no list of pairs; {ADVICE}")
    return images, pairs


def _read_csvs(images_file: pathlib.Path, pairs_file: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    rows = _read_csv(images_file, IMAGE_COLUMNS)
    if not all(number.isdecimal() and len(number) < 10 for row in rows for number in row[2:]):
        raise InputError(f"{images_file}: does not say each image's size and joints; {ADVICE}")
    encoded = [image_row(row) for row in rows]
    widths = (max((len(row[i]) for row in encoded), default=0) for i in (0, 1))
    index = {row[0]: i for i, row in enumerate(rows)}
    listed = _read_csv(pairs_file, PAIR_COLUMNS)
    unknown = sorted({name for pair in listed for name in pair if name not in index})
    if unknown:
        raise InputError(f"{pairs_file}: names {len(unknown)} images that have no record, such as {unknown[0]}")
    pairs = np.array([[index[name] for name in pair] for pair in listed], np.int32).reshape(-1, 2)
    return np.array(encoded, image_dtype(*widths)), pairs


def _read_csv(path: pathlib.Path, columns: Sequence[str]) -> list[list[str]]:
    try:
        rows = list(csv.reader(io.StringIO(files.read_text(path, WHAT, advice=ADVICE), newline="")))
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read ({error}); {ADVICE}") from error
    if not rows or tuple(rows[0]) != tuple(columns) or any(len(row) != len(columns) for row in rows):
        raise InputError(f"{path}: every line must have {','.join(columns)}; {ADVICE}")
    return rows[1:]


def write_images(path: pathlib.Path, count: int, widths: tuple[int, int], parts: Iterable[Sequence[Sequence]]) -> None:
    """An image table of `count` rows, which come in parts. widths: bytes of the longest name and identity."""
    table = np.lib.format.open_memmap(path, "w+", image_dtype(*widths), (count,))
    first = 0
    for rows in parts:
        table[first : first + len(rows)] = [image_row(row) for row in rows]
        first += len(rows)
    table.flush()
