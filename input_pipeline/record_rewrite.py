"""Fills optional fields into the records of a finished build, shard by shard, so that it can be stopped and run again.

Each shard is replaced whole or not at all, and its checksum with it. metadata.json tells of an annotation only while
every record holds it: what is about to be replaced is struck out before the first shard, and entered after the last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from input_pipeline.builder import file_checksum, write_whole
from input_pipeline.record_schema import RecordWriter
from input_pipeline.records import RecordImages, open_build, read_json
from input_pipeline.schema import ImageRecord, InputError

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
    root: str | pathlib.Path, wanted: Mapping[str, Mapping[str, Any]], fill: Fill, *, size: tuple[int, int]
) -> int:
    """Puts what `fill` gives into all records of all splits; returns how many images could not be decoded.

    wanted: {annotation: what metadata.json says of it}, for instance {"clip": {"fingerprint": ...}}; a run that was
    stopped goes on where it was if it wanted the same. size: (h, w) that photos are fitted to. Raises InputError.
    """
    root = pathlib.Path(root)
    shards_of = open_build(root).info.splits
    splits = sorted(shards_of)
    work = root / "build"
    work.mkdir(exist_ok=True)
    note = work / "annotate.json"
    wanted = json.loads(json.dumps(wanted))
    done = _begin(root, note, wanted)
    sets = [RecordImages(root, split, size=size) for split in splits]
    total = sum(len(images) for images in sets)
    broken = 0
    writer = RecordWriter()
    with tqdm.tqdm(total=total, desc=f"annotate {', '.join(wanted)}", unit="image", delay=0.5) as bar:
        for images in sets:
            first = 0
            for shard, count in zip(images.shards, shards_of[images.split].shard_lengths, strict=True):
                if shard not in done:
                    records = []
                    for start in range(first, first + count, CHUNK):
                        chunk = range(start, min(start + CHUNK, first + count))
                        records += _filled(images, chunk, fill)
                        bar.update(len(chunk))
                    broken += sum(record is None for _, record in records)
                    _replace(root, work, shard, [fields for fields, _ in records], writer)
                    done.append(shard)
                    write_whole(note, json.dumps({"wanted": wanted, "done": done}))
                else:
                    bar.update(count)
                first += count
    _finish(root, wanted, splits, sets)
    note.unlink()
    return broken


def _begin(root: pathlib.Path, note: pathlib.Path, wanted: dict) -> list[str]:
    """The shards that an interrupted run with the same wishes has finished."""
    if note.is_file():
        before = read_json(note)
        if before.get("wanted") == wanted:
            return before["done"]
    metadata = read_json(root / "metadata.json")
    kept = {name: value for name, value in metadata.get(ANNOTATIONS, {}).items() if name not in wanted}
    write_whole(root / "metadata.json", json.dumps(metadata | {ANNOTATIONS: kept}, indent=2))
    write_whole(note, json.dumps({"wanted": wanted, "done": []}))
    return []


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
    filled = [old | new if r is not None else old for old, new, r in zip(fields, changes, records, strict=True)]
    return list(zip(filled, records, strict=True))


def _replace(root: pathlib.Path, work: pathlib.Path, shard: str, records: Sequence[dict], writer: RecordWriter) -> None:
    partial = work / f"{shard}.partial"
    writer.write_shard(partial, records)
    sums = read_json(root / "checksums.json")["sha256"] | {shard: file_checksum(partial)}
    os.replace(partial, root / shard)
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    write_whole(root / "checksums.json", json.dumps({"digest": digest, "sha256": sums}, indent=1))


def _finish(root: pathlib.Path, wanted: dict, splits: Sequence[str], sets: Sequence[RecordImages]) -> None:
    """Sizes in dataset_info.json, then the entry that says that all records have it."""
    info = read_json(root / "dataset_info.json")
    for split, images in zip(splits, sets, strict=True):
        for entry in info["splits"]:
            if entry["name"] == split:
                entry["numBytes"] = str(sum((root / shard).stat().st_size for shard in images.shards))
    write_whole(root / "dataset_info.json", json.dumps(info, indent=2))
    metadata = read_json(root / "metadata.json")
    metadata[ANNOTATIONS] = metadata.get(ANNOTATIONS, {}) | wanted
    write_whole(root / "metadata.json", json.dumps(metadata, indent=2))
