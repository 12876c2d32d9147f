"""Builds records: reads the photos of a RawSet, in parallel, and writes them shard by shard, so that a build that was
killed goes on where it stopped.

tensorflow_datasets' own `download_and_prepare` writes into a temporary folder that it throws away when it is stopped,
and shuffles through a bucket file first. So the shards are written here, with its features, serialiser and ArrayRecord
writer, and its DatasetInfo is written last: `tfds.builder_from_directory` opens the result like any other.

What a shard holds is a function of the raw set alone: `shard_records` images in the order of their items, less the
dropped ones. A finished shard has a note in DIR/build/; a shard without one is written again. So any number of
processes can build their parts (--shard), and another number can go on; tables, checksums and info are one process's, at the end.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from input_pipeline import atomic
from input_pipeline.annotations.photo import one_line
from input_pipeline.annotations.plausibility import SetOfDoubts
from input_pipeline.files import map_npy, sha256_of
from input_pipeline.records.encode import DOUBTS, read_items
from input_pipeline.records.reader import read_json
from input_pipeline.records.schema import VERSION, RecordWriter, features
from input_pipeline.records.tables import table_files, write_images
from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard
from input_pipeline.sources.base import Dropped, Item, RawSet

SHARD_RECORDS = range(1024, 8192 + 1)
"""Images in a shard, at least and at most: what a killed build loses. 37,016 photos of 512x352 make 37 shards of about 70 MB,
10^7 make 1,221 of 570 MB."""
MANY_SHARDS = 1024
"""From so many on shards grow instead: every reader holds open files."""

NO_JOINT, NO_RECORD = "its target has no visible joint", "one of its images has no record"
"""Why a pair is dropped."""

Annotator = Callable[[Sequence[dict[str, Any]]], None]
"""Fills in the optional fields of the records of one shard, in place."""


def build_records(
    raw: RawSet,
    out: str | pathlib.Path,
    *,
    size: tuple[int, int] | None = None,
    workers: int = 1,
    annotators: Sequence[Annotator] = (),
    settings: Mapping[str, Any] | None = None,
    shard_records: int | None = None,
    share: Shard = WHOLE,
) -> dict[str, Any] | None:
    """Builds `raw` in the folder `out`, or goes on with the build there; returns its report (report.json), None for one part of
    several, which lacks it.

    size: photos are fitted to (h, w) and stored so (None: as they are). workers: processes that read photos; 1 reads
    here. annotators: run in this process on every shard before it is written. settings: whatever else makes this
    build what it is; a build of other settings in the same folder is an error. share: the part of the files that
    this call builds. Raises InputError.
    """
    out = pathlib.Path(out)
    shard_records = shard_records or records_of_a_shard(sum(len(split.items) for split in raw.splits.values()))
    plan = _plan(raw, size, dict(settings or {}), shard_records)
    if _begin(out, plan):
        return read_json(out / "report.json")
    work = out / "build"
    shards = [
        _Shard(raw.name, split, i, -(-len(content.items) // shard_records), tuple(content.items[start:start + shard_records]))
        for split, content in sorted(raw.splits.items())
        for i, start in enumerate(range(0, len(content.items), shard_records))
    ]  # fmt: skip
    mine = share.mine(shards)
    todo = [shard for shard in mine if not shard.is_done(out, work)]
    total, left = (sum(len(shard.items) for shard in some) for some in (mine, todo))
    settings_of_bar = {"desc": raw.name, "unit": "image", "delay": 0.5, "disable": not share.first}
    with tqdm.tqdm(total=total, initial=total - left, **settings_of_bar) as bar:
        pictures = read_items([item for shard in todo for item in shard.items], raw.labels, size, workers)
        writer = RecordWriter() if todo else None
        for shard in todo:
            found = []
            for _ in shard.items:
                found.append(next(pictures))
                bar.update()
            records = [fields for fields in found if isinstance(fields, dict)]
            doubts = [(fields["name"], fields.pop(DOUBTS)) for fields in records]
            for annotate in annotators:
                annotate(records)
            with writing(out):
                shard.write(out, work, writer, records, [drop for drop in found if isinstance(drop, Dropped)], doubts)
    if not share.finishes:
        return None
    share.require(sum(not shard.is_done(out, work) for shard in shards), len(shards), "files of records")
    with writing(out):
        _finish(raw, out, work, plan, shards)
    return read_json(out / "report.json")


def records_of_a_shard(images: int) -> int:
    """How many a shard of a dataset of so many images holds: a power of two."""
    fits = 1 << (max(1, -(-images // MANY_SHARDS)) - 1).bit_length()
    return min(max(fits, SHARD_RECORDS[0]), SHARD_RECORDS[-1])


# ------------------------------------------------------------------------------------------------- one shard


@dataclasses.dataclass(frozen=True, eq=False)
class _Shard:
    dataset: str
    split: str
    index: int
    count: int
    items: tuple[Item, ...]

    @property
    def file(self) -> str:
        return f"{self.dataset}-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"

    def note(self, work: pathlib.Path) -> pathlib.Path:
        return work / f"{self.split}-{self.index:05d}.json"

    def is_done(self, out: pathlib.Path, work: pathlib.Path) -> bool:
        note, file = self.note(work), out / self.file
        return note.is_file() and file.is_file() and read_json(note)["bytes"] == file.stat().st_size

    def write(
        self,
        out: pathlib.Path,
        work: pathlib.Path,
        writer: RecordWriter,
        records: Sequence[dict],
        dropped: Sequence[Dropped],
        doubts: Sequence[tuple[str, dict[str, bool]]],
    ) -> None:
        """The shard under its own name only when it is whole, and its note after it."""
        checksum = write_shard(out / self.file, work, writer, records)
        rows = [
            [r["name"], r["identity"], *(int(side) for side in r["size"]), int((r["joints"][:, 2] > 0).sum())]
            for r in records
        ]
        note = {
            "sha256": checksum,
            "bytes": (out / self.file).stat().st_size,
            "images": rows,
            "dropped": [dataclasses.astuple(drop) for drop in dropped],
            DOUBTS: doubts,
        }
        atomic.write_text(self.note(work), json.dumps(note))


# ------------------------------------------------------------------------------------------------- plan and end


def _plan(raw: RawSet, size, settings: dict[str, Any], shard_records: int) -> dict[str, Any]:
    """What makes this build what it is."""
    splits = {}
    for name, split in raw.splits.items():
        if not name.isalnum():
            raise InputError(f"split '{name}' must be letters and digits, as in train or test")
        digest = hashlib.sha256("\n".join(f"{item.name}|{item.identity}" for item in split.items).encode())
        digest.update(np.ascontiguousarray(split.pairs, np.int64).tobytes())
        splits[name] = {"images": len(split.items), "pairs": len(split.pairs), "list": digest.hexdigest()[:16]}
    if not any(split["images"] for split in splits.values()):
        raise InputError(f"{raw.name}: there is no image to build")
    return {
        "dataset": raw.name,
        "version": VERSION,
        "labels": raw.labels,
        "size": list(size) if size else None,
        "shard_records": shard_records,
        "splits": splits,
        "settings": settings,
    }


def _begin(out: pathlib.Path, plan: dict[str, Any]) -> bool:
    """Makes the folder, or checks that what lies there is this build. True: it is finished."""
    note = out / "build" / "plan.json"
    if note.is_file():
        plan = json.loads(json.dumps(plan))
        old = read_json(note)
        other = sorted(key for key in plan.keys() | old.keys() if plan.get(key) != old.get(key))
        if other:
            raise InputError(
                f"{out}: holds a build with other {', '.join(other)}; choose another --out, or remove that folder"
            )
        return (out / "dataset_info.json").is_file()
    # Another part of this very build may be between making the folder and saying what it is.
    if out.exists() and (not out.is_dir() or any(path.name != "build" for path in out.iterdir())):
        raise InputError(f"{out}: exists and is not a build of this program; choose another --out")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(note, json.dumps(plan, indent=1))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    return False


def _finish(raw: RawSet, out: pathlib.Path, work: pathlib.Path, plan: dict, shards: Sequence[_Shard]) -> None:
    """Writes tables, checksums, the report and, last, what makes the folder a dataset."""
    dropped, sums, lengths = list(raw.dropped), {}, {}
    report: dict[str, Any] = {"dataset": raw.name, "plan": plan, "notes": [*raw.notes, *raw.problems], "doubts": [], "splits": {}}
    for split, content in raw.splits.items():
        mine = [shard for shard in shards if shard.split == split]
        told = _Told()
        for shard in mine:
            told.add(shard, read_json(shard.note(work)))
        dropped += told.dropped
        total = sum(told.lengths)
        if not total:
            report["notes"].append(f"split {split} has no image and is left out")
            continue
        lengths[split] = told.lengths
        sums |= told.sums
        report["doubts"] += [f"{split}: {line}" for line in told.doubts.lines()]
        images_file, pairs_file = (out / name for name in table_files(split))
        with atomic.replacing(images_file) as partial:
            write_images(partial, total, told.widths, (read_json(shard.note(work))["images"] for shard in mine))
        images = map_npy(images_file)
        pairs, lost = _kept_pairs(content.pairs, np.concatenate(told.places), images["joints"])
        with atomic.replacing(pairs_file) as partial, open(partial, "wb") as file:
            np.save(file, pairs)
        report["splits"][split] = {
            "images": total,
            "pairs": len(pairs),
            "identities": len(np.unique(images["identity"])),
            "images_without_joints": int((images["joints"] == 0).sum()),
            "pairs_dropped": lost,
            "bytes": told.bytes,
        }
    reasons = collections.Counter(drop.reason for drop in dropped)
    report["dropped"] = {
        reason: {"count": count, "images": [_told(drop) for drop in dropped if drop.reason == reason]}
        for reason, count in reasons.most_common()
    }
    atomic.write_text(out / "report.json", json.dumps(report, indent=1))
    if not lengths:
        raise InputError(f"{out}: no image could be read, so there is no dataset; report.json says why for each")
    sums |= {file: sha256_of(out / file) for split in lengths for file in table_files(split)}
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    atomic.write_text(out / "checksums.json", json.dumps({"digest": digest, "sha256": sums}, indent=1))
    _write_info(raw, out, plan, lengths, report)
    for left in (*(shard.note(work) for shard in shards), *work.glob(".*.partial"), *out.glob(".*.partial")):
        left.unlink()  # partial ones are of a kill


def _told(drop: Dropped) -> dict[str, str]:
    return {"name": drop.name, "detail": drop.detail, "photo": drop.photo}


class _Told:
    """What the notes of a split's shards say, in a few bytes an image: those of 10^7 images do not fit into memory at once."""

    def __init__(self):
        self.lengths: list[int] = []
        self.sums: dict[str, str] = {}
        self.dropped: list[Dropped] = []
        self.doubts = SetOfDoubts()
        self.bytes, self.widths = 0, (0, 0)
        self.places: list[np.ndarray] = []  # int32, of every item the number of its record, -1 where it was dropped

    def add(self, shard: _Shard, note: Mapping[str, Any]) -> None:
        rows, first = note["images"], sum(self.lengths)
        self.lengths.append(len(rows))
        self.sums[shard.file] = note["sha256"]
        self.dropped += [Dropped(*drop) for drop in note["dropped"]]
        for name, judged in note.get(DOUBTS, ()):
            self.doubts.add(name, judged)
        self.bytes += note["bytes"]
        self.widths = tuple(max([self.widths[i], *(len(row[i].encode()) for row in rows)]) for i in (0, 1))
        places, following = np.full(len(shard.items), -1, np.int32), 0
        for number, item in enumerate(shard.items):
            if following < len(rows) and rows[following][0] == item.name:  # rows are in the order of the items
                places[number] = first + following
                following += 1
        self.places.append(places)


def _kept_pairs(pairs: np.ndarray, record_of: np.ndarray, joints: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """(records of the pairs that can be used, int32 [m 2]; why the others cannot and how many). record_of: of every item."""
    found = record_of[np.asarray(pairs, np.int64).reshape(-1, 2)]
    there = (found >= 0).all(axis=1)
    posed = there & (joints[found[:, 1]] > 0)
    lost = {NO_RECORD: int((~there).sum()), NO_JOINT: int((there & ~posed).sum())}
    return found[posed], {why: count for why, count in lost.items() if count}


def _write_info(raw: RawSet, out: pathlib.Path, plan: dict, lengths: dict[str, list[int]], report: dict) -> None:
    """features.json, metadata.json, LICENSE and dataset_info.json, the one that says "finished", last."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.naming import ShardedFileTemplate
    from tensorflow_datasets.core.splits import SplitDict, SplitInfo

    identity = DatasetIdentity(
        name=raw.name,
        version=tfds.core.Version(VERSION),
        data_dir=str(out),
        module_name="input_pipeline.builder",  # as in every build so far
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features(),
        description=raw.description,
        citation=raw.citation or None,
        homepage=raw.homepage or None,
        license=raw.licence or None,
        metadata=tfds.core.MetadataDict({"labels": raw.labels, "size": plan["size"], "joints": raw.joints}),
    )
    info.set_file_format("array_record")
    infos = [
        SplitInfo(
            name=split,
            shard_lengths=counts,
            num_bytes=report["splits"][split]["bytes"],
            filename_template=ShardedFileTemplate(
                data_dir=out, dataset_name=raw.name, split=split, filetype_suffix="array_record"
            ),
        )
        for split, counts in lengths.items()
    ]
    info.set_splits(SplitDict(infos))
    info.write_to_directory(out)


# ------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """Errors of the disk inside become InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({one_line(error)}); free space there or see its permissions, then run the same "
            "command again"
        ) from error


def write_shard(path: pathlib.Path, work: pathlib.Path, writer: RecordWriter, records: Sequence[dict]) -> str:
    """A shard under its own name only when it is whole; returns its checksum. work: folder for the unfinished file."""
    partial = work / f"{path.name}.partial"
    try:
        writer.write_shard(partial, records)
        checksum = sha256_of(partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return checksum
