"""Fills optional fields into the records of a finished build, shard by shard, so that it can be stopped and run again.

Each shard is replaced whole or not at all, and its checksum with it. metadata.json tells of an annotation only while
every record holds it: what is about to be replaced is struck out before the first shard, and entered after the last.

A replaced shard has a note with its checksum in DIR/build/, whose name tells what was wanted. One process enters it into
checksums.json at once; what several have replaced, each its part of the shards, is entered by the one that merges.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from input_pipeline import atomic
from input_pipeline.records.reader import RecordImages, open_build, read_json
from input_pipeline.records.schema import RecordWriter
from input_pipeline.records.writer import write_shard, writing
from input_pipeline.schema import ImageRecord, InputError
from input_pipeline.shards import WHOLE, Shard

ANNOTATIONS = "annotations"
"""Key of metadata.json."""

Fill = Callable[[Sequence[ImageRecord | None], str], Sequence[Mapping[str, Any]]]
"""(images at one size, None where one cannot be decoded, their label set) -> the fields of each that change."""

CHUNK = 64
"""Images given to `fill` at once."""


def annotations(root: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """What all records of a built dataset hold beyond the build, by name. Raises InputError."""
    return read_json(pathlib.Path(root) / "metadata.json").get(ANNOTATIONS, {})


def rewrite_records(
    root: str | pathlib.Path,
    wanted: Mapping[str, Mapping[str, Any]],
    fill: Fill,
    *,
    size: tuple[int, int],
    share: Shard = WHOLE,
) -> int | None:
    """Puts what `fill` gives into all records of all splits; returns how many images could not be decoded, None for one part of
    several, which does not know.

    wanted: {annotation: what metadata.json says of it}, for instance {"clip": {"fingerprint": ...}}; a run that was
    stopped goes on where it was if it wanted the same. size: (h, w) that photos are fitted to. share: the part of
    the files that this call fills. Raises InputError.
    """
    with writing(pathlib.Path(root)):
        return _rewrite(pathlib.Path(root), wanted, fill, size, share)


def _rewrite(
    root: pathlib.Path, wanted: Mapping[str, Mapping[str, Any]], fill: Fill, size: tuple[int, int], share: Shard
) -> int | None:
    shards_of = open_build(root).info.splits
    splits = sorted(shards_of)
    work = root / "build"
    wanted = json.loads(json.dumps(wanted))
    key = hashlib.sha256(json.dumps([wanted, size], sort_keys=True).encode()).hexdigest()[:8]
    sets = [RecordImages(root, split, size=size) for split in splits]
    _begin(root, work, wanted)
    tasks = []
    for images in sets:
        first = 0
        for shard, count in zip(images.shards, shards_of[images.split].shard_lengths, strict=True):
            tasks.append((images, _note(work, key, shard), shard, range(first, first + count)))
            first += count
    mine = share.mine(tasks)
    writer = RecordWriter()
    if share.finishes:
        _enter_checksums(root, [note for _, note, _, _ in tasks])
    total = sum(len(rows) for *_, rows in mine)
    settings = {"desc": f"annotate {', '.join(wanted)}", "unit": "image", "delay": 0.5, "disable": not share.first}
    with tqdm.tqdm(total=total, **settings) as bar:
        for images, note, shard, rows in mine:
            if note.is_file():
                bar.update(len(rows))
                continue
            records = []
            for start in range(rows.start, rows.stop, CHUNK):
                chunk = range(start, min(start + CHUNK, rows.stop))
                records += _filled(images, chunk, fill)
                bar.update(len(chunk))
            broken = sum(record is None for _, record in records)
            for other in work.glob(f"annotated-*{shard}.json"):  # of another wish, which will have to begin anew
                other.unlink()
            checksum = write_shard(root / shard, work, writer, [fields for fields, _ in records])
            atomic.write_text(note, json.dumps({"shard": shard, "sha256": checksum, "broken": broken}))
            if share.finishes:
                _enter_checksums(root, [note])
    if not share.finishes:
        return None
    notes = [note for _, note, _, _ in tasks]
    share.require(sum(not note.is_file() for note in notes), len(notes), "annotated files of records")
    _enter_checksums(root, notes)
    return _finish(root, work, notes, wanted, splits, sets)


def _note(work: pathlib.Path, key: str, shard: str) -> pathlib.Path:
    """Of a shard that is done: {"shard", "sha256", "broken"}. key: of what was wanted."""
    return work / f"annotated-{key}-{shard}.json"


def _begin(root: pathlib.Path, work: pathlib.Path, wanted: dict) -> None:
    """Strikes out what is about to be replaced."""
    work.mkdir(exist_ok=True)
    metadata = read_json(root / "metadata.json")
    if metadata.get(ANNOTATIONS, {}).keys() & wanted.keys():
        kept = {name: value for name, value in metadata[ANNOTATIONS].items() if name not in wanted}
        atomic.write_text(root / "metadata.json", json.dumps(metadata | {ANNOTATIONS: kept}, indent=2))


def _filled(images: RecordImages, chunk: range, fill: Fill) -> list[tuple[dict[str, Any], ImageRecord | None]]:
    """(fields with the new ones in, the image) of these records; a photo that cannot be decoded keeps its fields."""
    fields = [images.fields(index) for index in chunk]
    records: list[ImageRecord | None] = []
    for index in chunk:
        try:
            records.append(images.image(index))
        except InputError as error:
            logging.warning("%s (left as it is)", error)
            records.append(None)
    changes = fill(records, images.labels)
    filled = [{**old, **(new if r is not None else {})} for old, new, r in zip(fields, changes, records, strict=True)]
    return list(zip(filled, records, strict=True))


def _enter_checksums(root: pathlib.Path, notes: Sequence[pathlib.Path]) -> None:
    """What those of the notes that are there say of replaced shards goes into checksums.json."""
    before = read_json(root / "checksums.json")["sha256"]
    sums = before | {note["shard"]: note["sha256"] for note in map(read_json, filter(pathlib.Path.is_file, notes))}
    if sums != before:
        digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
        atomic.write_text(root / "checksums.json", json.dumps({"digest": digest, "sha256": sums}, indent=1))


def _finish(
    root: pathlib.Path,
    work: pathlib.Path,
    notes: Sequence[pathlib.Path],
    wanted: dict,
    splits: Sequence[str],
    sets: Sequence[RecordImages],
) -> int:
    """Sizes in dataset_info.json, then the entry that says that all records have it; how many could not be decoded."""
    info = read_json(root / "dataset_info.json")
    for split, images in zip(splits, sets, strict=True):
        for entry in info["splits"]:
            if entry["name"] == split:
                entry["numBytes"] = str(sum((root / shard).stat().st_size for shard in images.shards))
    atomic.write_text(root / "dataset_info.json", json.dumps(info, indent=2))
    metadata = read_json(root / "metadata.json")
    metadata[ANNOTATIONS] = metadata.get(ANNOTATIONS, {}) | wanted
    atomic.write_text(root / "metadata.json", json.dumps(metadata, indent=2))
    broken = sum(read_json(note)["broken"] for note in notes)
    for note in notes:
        note.unlink()
    return broken
