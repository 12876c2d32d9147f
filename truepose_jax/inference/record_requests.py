"""The pairs of a split of records as pictures to make, and the names that other projects look for.

| --naming | file | who reads it |
|---|---|---|
| cfld | SOURCE_to_TARGET.png | `evaluate`; PCDM's scripts. CFLD's own code writes no files: the names are its lists' |
| pidm | SOURCE_2_TARGET_vis.png | `evaluate`; PIDM's, GFLA's and FPDM's scripts |

SOURCE and TARGET are DeepFashion's images as PATN's lists spell them (fashionWOMENSkirtsid0000062904_3back), else names of
records.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Sequence

from input_pipeline.annotations.keypoints import patn_name
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import InputError
from truepose_jax.inference.canvas import FittedCanvas, Pose, Source, fit_canvas
from truepose_jax.inference.pipeline import Fitted, Request, Run
from truepose_jax.runtime.choices import NAMINGS


@dataclasses.dataclass(frozen=True)
class RecordRow:
    """A picture to make: record `source` in the pose of record `target`. line: of the split's pairs, from 1."""

    line: int
    images: RecordImages
    source: int
    target: int
    out: pathlib.Path

    @property
    def name(self) -> str:
        """What keys the noise."""
        return f"{self.images.names[self.source]} > {self.images.names[self.target]}"

    @property
    def outs(self) -> tuple[pathlib.Path, ...]:
        return (self.out,)

    def read(self, run: Run, seed: int) -> Fitted:
        """Reads both records and fits them to the model's size. Raises InputError."""
        record, pose = self.images.image(self.source), self.images.fields(self.target)
        h, w = pose["size"].tolist()
        parsing = record.parsing if run.needs.tokens and self.images.labels != "whole" else None
        request = Request(record.image, pose["joints"], parsing, self.images.labels, (h, w), self.name, seed)
        if run.needs.source_pose:
            request = dataclasses.replace(request, source_joints=record.joints)
        return run.fit(request)


@dataclasses.dataclass(frozen=True)
class CanvasRow:
    """A canvas to make: the photos `sources` of one person, the first those of the pairs, in the poses of the pairs' targets.
    line: of the first pair."""

    pairs: tuple[RecordRow, ...]
    sources: tuple[int, ...]
    fill: str = "pose"

    @property
    def line(self) -> int:
        return self.pairs[0].line

    @property
    def outs(self) -> tuple[pathlib.Path, ...]:
        return tuple(pair.out for pair in self.pairs)

    def read(self, run: Run, seed: int) -> FittedCanvas:
        """Reads the records and fits them to the model's size. Raises InputError."""
        images, targets = self.pairs[0].images, [pair.target for pair in self.pairs]
        name = " > ".join(" + ".join(images.names[i] for i in group) for group in (self.sources, targets))
        records = {index: images.image(index) for index in set(self.sources)}
        sources = [Source(records[index].image, records[index].joints) for index in self.sources]
        fields = [images.fields(index) for index in targets]
        poses = [Pose(pose["joints"], tuple(pose["size"].tolist())) for pose in fields]
        return fit_canvas(sources, poses, run, fill=self.fill, seed=seed, name=name)


def canvas_rows(rows: Sequence[RecordRow], scenario: str) -> tuple[list[RecordRow] | list[CanvasRow], int]:
    """(the pairs as canvases of one of SCENARIOS, how many of these show a photo twice as there are no three of the person). T1:
    the pairs themselves. star: up to three pairs of one source, in their order. T3: the pair's source, then others of the person
    by name, never the target. Raises InputError where T3 finds no other for any pair."""
    if scenario == "T1":
        return list(rows), 0
    if scenario == "T2":
        return [CanvasRow((row,), (row.source,), fill="source") for row in rows], 0
    if scenario == "star":
        by_source = collections.defaultdict(list)
        for row in rows:
            by_source[row.source].append(row)
        found = [
            CanvasRow(tuple(of[i : i + 3]), (source,)) for source, of in by_source.items() for i in range(0, len(of), 3)
        ]
        return found, 0
    images, photos = rows[0].images, collections.defaultdict(list)
    for index in sorted(range(len(images)), key=images.names.__getitem__):
        if images.identities[index] and images.joint_counts[index]:
            photos[images.identities[index]].append(index)
    found, repeated, alone = [], 0, True
    for row in rows:
        others = [i for i in photos[images.identities[row.source]] if i not in (row.source, row.target)][:2]
        own = (row.source, *others)
        found.append(CanvasRow((row,), tuple(own[i % len(own)] for i in range(3))))
        repeated, alone = repeated + (len(others) < 2), alone and not others
    if alone:
        raise InputError(
            f"{images.root}: nobody in its split '{images.split}' has a photo besides source and target; take T2"
        )
    return found, repeated


def record_rows(images: RecordImages, out_dir: pathlib.Path, naming: str) -> list[RecordRow]:
    """A row for every pair, in their order. Raises InputError where there are none, or where two would be one file."""
    if len(images.pairs) == 0:
        raise InputError(f"{images.root}: its split '{images.split}' has no pairs to make pictures of")
    rows, taken = [], {}
    for line, (source, target) in enumerate(images.pairs.tolist(), start=1):
        names = {"source": patn_name(images.names[source]), "target": patn_name(images.names[target])}
        out = out_dir / NAMINGS[naming].format(**names)
        if not out.resolve().is_relative_to(out_dir.resolve()):
            raise InputError(f"{images.root}: a record's name leaves the folder {out_dir}: {out}")
        if taken.setdefault(out, line) != line:
            raise InputError(f"{images.root}: lines {taken[out]} and {line} of its pairs would both be {out.name}")
        rows.append(RecordRow(line, images, source, target, out))
    return rows


def pair_list(rows: Iterable[RecordRow], out_dir: pathlib.Path) -> str:
    """A CSV with from,to,out for `evaluate --pairs` and others' scripts."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("from", "to", "out"))
    for row in rows:
        names = (patn_name(row.images.names[i]) for i in (row.source, row.target))
        table.writerow((*names, row.out.relative_to(out_dir).as_posix()))
    return text.getvalue()
