"""Checks a built dataset: what is wrong, where, one line each."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterator

import numpy as np
import tqdm

from input_pipeline.annotations.keypoints import inside
from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.plausibility import SetOfDoubts, judge
from input_pipeline.records.reader import RecordImages, open_build, read_json
from input_pipeline.records.schema import unpack_latents, unpack_tokens
from input_pipeline.records.writer import file_checksum
from input_pipeline.schema import InputError

FAR_OUTSIDE = 0.25
"""A joint farther outside than this share of the picture is a defect; detectors place joints up to 31 of 176 px out."""

SHOWN = 20
"""Defects of one split that are listed; the rest are counted."""


def check_records(root: str | pathlib.Path) -> tuple[list[str], list[str]]:
    """(defects, facts): every file's checksum, every record, the pairs, and that the splits are apart.

    Raises InputError where the folder cannot be opened as a dataset at all.
    """
    root = pathlib.Path(root)
    splits = sorted(open_build(root).info.splits)
    defects, facts = list(_file_defects(root)), []
    names: dict[str, dict[str, set[str]]] = collections.defaultdict(dict)
    for split in splits:
        try:
            images = RecordImages(root, split)
        except InputError as error:
            defects.append(str(error))
            continue
        found, told = _split_defects(images)
        defects += found[:SHOWN] + ([f"{split}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])
        facts += told
        names["names"][split], names["identities"][split] = set(images.names), set(images.identities)
    for what, sets in names.items():
        for i, a in enumerate(splits):
            for b in splits[i + 1 :]:
                both = sorted(sets.get(a, set()) & sets.get(b, set()))
                if both:
                    defects.append(f"splits {a} and {b} share {len(both)} {what}, such as {both[0]}")
    return defects, facts


def _file_defects(root: pathlib.Path) -> Iterator[str]:
    for file, checksum in tqdm.tqdm(read_json(root / "checksums.json")["sha256"].items(), desc="checksums", delay=1):
        path = root / file
        if not path.is_file():
            yield f"{path}: is missing"
        elif file_checksum(path) != checksum:
            yield f"{path}: is corrupt (its checksum is not the one of the build); remove the folder and build again"


def _split_defects(images: RecordImages) -> tuple[list[str], list[str]]:
    defects, outside, targets, doubts = [], 0, np.unique(images.pairs[:, 1]), SetOfDoubts()
    with tqdm.tqdm(total=len(images), desc=f"records of {images.split}", unit="image", delay=1) as bar:
        for index in range(len(images)):
            try:
                outside += _check_record(images, index, doubts)
            except InputError as error:
                defects.append(str(error))
            bar.update()
    repeated = [name for name, count in collections.Counter(images.names).items() if count > 1]
    if repeated:
        defects.append(f"{images.split}: {len(repeated)} names occur twice, such as {repeated[0]}")
    poseless = [images.names[i] for i in targets if images.joint_counts[i] == 0]
    if poseless:
        defects.append(f"{images.split}: {len(poseless)} targets have no visible joint, such as {poseless[0]}")
    people = len(set(images.identities))
    fact = f"{images.split}: {len(images)} images of {people} identities, {len(images.pairs)} pairs, labels {images.labels}"
    if outside:
        fact += f"; {outside} joints lie outside their picture"
    if not images.joint_counts.any():
        fact += "; no joints, so it cannot be trained on"
    return defects, [fact, *(f"warning: {images.split}: {line}" for line in doubts.lines())]


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
