"""Checks a built dataset: what is wrong, where, one line each."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from input_pipeline import atomic
from input_pipeline.annotations.keypoints import inside
from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.plausibility import SetOfDoubts, judge
from input_pipeline.files import sha256_of
from input_pipeline.records.reader import RecordImages, open_build, read_json
from input_pipeline.records.schema import unpack_latents, unpack_tokens
from input_pipeline.records.writer import writing
from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard

FAR_OUTSIDE = 0.25
"""A joint farther outside than this share of the picture is a defect; detectors place joints up to 31 of 176 px out."""

SHOWN = 20
"""Defects of one split that are listed; the rest are counted."""


def check_records(root: str | pathlib.Path, *, share: Shard = WHOLE) -> tuple[list[str], list[str]]:
    """(defects, facts): every file's checksum, every record, the pairs, and that the splits are apart.

    share: the part of the files of records that this call reads; what it finds waits in DIR/build/ for the call that merges,
    which says it all. A part's own lists are empty. Raises InputError where the folder cannot be opened as a dataset at all.
    """
    root = pathlib.Path(root)
    infos = open_build(root).info.splits
    told = read_json(root / "checksums.json")
    sets, defects = {}, []
    for split in sorted(infos):
        try:
            sets[split] = RecordImages(root, split)
        except InputError as error:
            sets[split] = None
            defects.append(str(error))
    tasks = [
        (split, path.name, range(end - count, end))
        for split in sets
        for path, count, end in zip(
            infos[split].filepaths, infos[split].shard_lengths, np.cumsum(infos[split].shard_lengths).tolist(), strict=True
        )
    ]
    note_of = {file: root / "build" / f"checked-{told['digest'][:8]}-{file}.json" for _, file, _ in tasks}
    found: dict[str, dict[str, Any]] = {}
    mine = [task for task in share.mine(tasks) if share.finishes or not note_of[task[1]].is_file()]
    total = sum(len(rows) for *_, rows in mine)
    with tqdm.tqdm(total=total, desc="check", unit="image", delay=1, disable=not share.first) as bar:
        for split, file, rows in mine:
            found[file] = _check_file(root / file, told["sha256"].get(file), sets[split], rows, bar)
            if not share.finishes:
                with writing(root):
                    note_of[file].parent.mkdir(exist_ok=True)
                    atomic.write_text(note_of[file], json.dumps(found.pop(file)))
    if not share.finishes:
        return [], []
    if share.merge:
        share.require(sum(not note.is_file() for note in note_of.values()), len(tasks), "checked files of records")
        found = {file: read_json(note) for file, note in note_of.items()}
    tables = [_file_defect(root / file, checksum) for file, checksum in told["sha256"].items() if file not in found]
    facts = []
    files = [each["file"] for each in found.values()] + tables
    defects = [line for line in files if line] + defects
    for split, images in sets.items():
        if images is not None:
            lines, fact = _split_defects(images, [found[file] for of, file, _ in tasks if of == split])
            defects += lines[:SHOWN] + ([f"{split}: and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
            facts += fact
    defects += _shared({split: images for split, images in sets.items() if images is not None})
    for note in note_of.values() if share.merge else ():
        note.unlink()
    return defects, facts


def _file_defect(path: pathlib.Path, checksum: str | None) -> str:
    if not path.is_file():
        return f"{path}: is missing"
    if sha256_of(path) != checksum:
        return f"{path}: is corrupt (its checksum is not the one of the build); remove the folder and build again"
    return ""


def _check_file(path: pathlib.Path, checksum: str | None, images: RecordImages | None, rows: range, bar) -> dict[str, Any]:
    """What a file of records holds: {"file": its defect, "records": theirs, "outside": joints, "doubts": SetOfDoubts.counts}."""
    defects, outside, doubts = [], 0, SetOfDoubts()
    for index in rows if images is not None else ():
        try:
            outside += _check_record(images, index, doubts)
        except InputError as error:
            defects.append(str(error))
        bar.update()
    return {"file": _file_defect(path, checksum), "records": defects, "outside": outside, "doubts": doubts.counts}


def _split_defects(images: RecordImages, found: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(defects, facts) of a split. found: of its files."""
    defects = [line for each in found for line in each["records"]]
    outside, doubts = sum(each["outside"] for each in found), SetOfDoubts()
    for each in found:
        doubts.merge(each["doubts"])
    names, counts = np.unique(images.names.column, return_counts=True)
    if (repeated := names[counts > 1]).size:
        defects.append(f"{images.split}: {len(repeated)} names occur twice, such as {repeated[0].decode()}")
    pairs = np.asarray(images.pairs)
    if ((pairs < 0) | (pairs >= len(images))).any():
        defects.append(f"{images.split}: a pair names record {pairs.max()} of {len(images)}, counted from 0")
    elif (poseless := np.unique(pairs[images.joint_counts[pairs[:, 1]] == 0, 1])).size:
        defects.append(f"{images.split}: {len(poseless)} targets have no visible joint, such as {images.names[poseless[0]]}")
    people = len(np.unique(images.identities.column))
    fact = f"{images.split}: {len(images)} images of {people} identities, {len(pairs)} pairs, labels {images.labels}"
    if outside:
        fact += f"; {outside} joints lie outside their picture"
    if not images.joint_counts.any():
        fact += "; no joints, so it cannot be trained on"
    return defects, [fact, *(f"warning: {images.split}: {line}" for line in doubts.lines())]


def _shared(sets: Mapping[str, RecordImages]) -> Iterator[str]:
    """Defects: what two splits have in common."""
    for what in ("names", "identities"):
        for (a, ours), (b, theirs) in itertools.combinations(sets.items(), 2):
            both = np.intersect1d(getattr(ours, what).column, getattr(theirs, what).column)
            if both.size:
                yield f"splits {a} and {b} share {len(both)} {what}, such as {both[0].decode()}"


def _check_record(images: RecordImages, index: int, doubts: SetOfDoubts) -> int:
    """The number of joints outside the picture; what is doubtful goes into `doubts`. Raises InputError: what is wrong with
    the record, and where."""
    record = images.image(index)  # decodes; checks the map's shape and ids
    where = images.place(index)
    fields = images.fields(index)
    hw = record.image.shape[:2]
    if tuple(fields["size"]) != hw:
        raise InputError(f"{where}: says {tuple(int(s) for s in fields['size'])} and is {hw}")
    if (record.name, record.identity) != (images.names[index], images.identities[index]):
        raise InputError(f"{where}: the record is of {record.name} ({record.identity})")
    joints = record.joints
    seen = joints[:, 2] > 0
    if not np.isin(joints[:, 2], (0, 1)).all() or joints[~seen].any() or not np.isfinite(joints).all():
        raise InputError(f"{where}: joints must be finite, visible 0 or 1, and (0, 0, 0) where missing")
    if int(seen.sum()) != images.joint_counts[index]:
        raise InputError(f"{where}: has {int(seen.sum())} joints; its table says {images.joint_counts[index]}")
    margin = FAR_OUTSIDE * np.array(hw[::-1])
    if ((joints[seen, :2] < -margin) | (joints[seen, :2] > hw[::-1] + margin)).any():
        raise InputError(f"{where}: a joint lies far outside the picture; is the pose frame right?")
    doubts.add(record.name, judge(joints, record.parsing, label_set(images.labels), hw))
    for kind in ("", "flipped_"):
        try:
            unpack_tokens(fields[f"{kind}region_tokens"], fields[f"{kind}region_valid"])
            unpack_latents(fields[f"{kind}latents"], fields["latents_size"])
        except ValueError as error:
            raise InputError(f"{where}: {kind}tokens or latents do not fit their shape ({error})") from error
    return int((seen & ~inside(joints, hw)).sum())
