"""The rows of a study: written to rows.json and rows.csv as each one is done, and kept when the study is stopped."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from input_pipeline import atomic
from input_pipeline.files import MAX_TEXT, read_json
from truepose_jax.config import ConfigError
from truepose_jax.runtime import files

Row = dict[str, Any]


class Table:
    """folder/study.json says what every row has in common; a folder of another study is refused (ConfigError), and one that
    cannot be written too (InputError)."""

    def __init__(self, folder: pathlib.Path, common: Mapping[str, Any]):
        """common: JSON-able; what a row's number depends on besides its own columns."""
        self.folder = folder
        self.rows: list[Row] = []
        with files.writing(folder):
            self._open(common)

    def _open(self, common: Mapping[str, Any]) -> None:
        folder = self.folder
        common = json.loads(json.dumps(common))
        about, rows = folder / "study.json", folder / "rows.json"
        if about.exists():
            self._check_same(common, read_json(about, error=ConfigError))
        elif folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"--out={folder} holds files, but no study.json of a study: name a folder of its own")
        else:
            files.make_folder(folder)
            atomic.write_text(about, json.dumps(common, indent=1) + "\n")
        if rows.exists():
            self.rows = read_json(rows, [dict], limit=MAX_TEXT, error=ConfigError)

    def _check_same(self, now: Mapping[str, Any], before: Any) -> None:
        new, old = (flatten_dict(each, sep=".") for each in (now, before))
        for key in dict.fromkeys((*new, *old)):
            if new.get(key) != old.get(key):
                raise ConfigError(
                    f"--out={self.folder} is of another study: {key} was {old.get(key)!r} and is {new.get(key)!r}; "
                    "name another folder"
                )

    def done(self, name: str) -> Row | None:
        return next((row for row in self.rows if row["name"] == name), None)

    def add(self, row: Row) -> None:
        """Takes a row (a "name" and plain values), in the place of one of its name, and writes both files."""
        self.rows = [*(r for r in self.rows if r["name"] != row["name"]), row]
        with files.writing(self.folder):
            self._write()

    def _write(self) -> None:
        atomic.write_text(self.folder / "rows.json", json.dumps(self.rows, indent=1, allow_nan=False) + "\n")
        text = io.StringIO()
        columns = list(dict.fromkeys(key for each in self.rows for key in each))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for each in self.rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in each.items()})
        atomic.write_text(self.folder / "rows.csv", text.getvalue())
