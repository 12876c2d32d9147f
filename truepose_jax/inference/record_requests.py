"""The pairs of a split of records as pictures to make, and the names that other projects look for.

| --naming | file | who reads it |
|---|---|---|
| cfld | SOURCE_to_TARGET.png | `evaluate`; PCDM's scripts. CFLD's own code writes no files: the names are its lists' |
| pidm | SOURCE_2_TARGET_vis.png | `evaluate`; PIDM's, GFLA's and FPDM's scripts |

SOURCE and TARGET are DeepFashion's images as PATN's lists spell them (fashionWOMENSkirtsid0000062904_3back), else names of
records.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence

from input_pipeline.annotations.keypoints import patn_name
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import InputError
from truepose_jax.inference.pipeline import Fitted, Request, Run
from truepose_jax.runtime.choices import NAMINGS


@dataclasses.dataclass(frozen=True)
class RecordRow:
    """A picture to make: record `source` in the pose of record `target`. line: of pairs-SPLIT.csv."""

    line: int
    images: RecordImages
    source: int
    target: int
    out: pathlib.Path

    @property
    def name(self) -> str:
        """What keys the noise."""
        return f"{self.images.names[self.source]} > {self.images.names[self.target]}"

    def read(self, run: Run, seed: int) -> Fitted:
        """Reads both records and fits them to the model's size. Raises InputError."""
        record, pose = self.images.image(self.source), self.images.fields(self.target)
        h, w = pose["size"].tolist()
        parsing = None if self.images.labels == "whole" else record.parsing
        request = Request(record.image, pose["joints"], parsing, self.images.labels, (h, w), self.name, seed)
        if run.needs.source_pose:
            request = dataclasses.replace(request, source_joints=record.joints)
        return run.fit(request)


def record_rows(images: RecordImages, out_dir: pathlib.Path, naming: str) -> list[RecordRow]:
    """A row for every pair, in their order. Raises InputError where there are none, or where two would be one file."""
    if len(images.pairs) == 0:
        raise InputError(f"{images.root}: its split '{images.split}' has no pairs to make pictures of")
    rows, taken = [], {}
    for line, (source, target) in enumerate(images.pairs.tolist(), start=2):
        names = {"source": patn_name(images.names[source]), "target": patn_name(images.names[target])}
        out = out_dir / NAMINGS[naming].format(**names)
        if not out.resolve().is_relative_to(out_dir.resolve()):
            raise InputError(f"{images.root}: a record's name leaves the folder {out_dir}: {out}")
        if taken.setdefault(out, line) != line:
            raise InputError(f"{images.root}: lines {taken[out]} and {line} of its pairs would both be {out.name}")
        rows.append(RecordRow(line, images, source, target, out))
    return rows


def pair_list(rows: Sequence[RecordRow], out_dir: pathlib.Path) -> str:
    """A CSV with from,to,out for `evaluate --pairs` and others' scripts."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("from", "to", "out"))
    for row in rows:
        names = (patn_name(row.images.names[i]) for i in (row.source, row.target))
        table.writerow((*names, row.out.relative_to(out_dir).as_posix()))
    return text.getvalue()
