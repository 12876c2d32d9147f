"""Market-1501 with PATN's annotations: 128x64 photos of pedestrians, joints in that frame.

    RAW/bounding_box_train/0002_c1s1_000451_03.jpg      (and bounding_box_test/)
    RAW/market-annotation-{train,test}.csv              name:keypoints_y:keypoints_x (also in RAW/lists/, or --lists)
    RAW/market-pairs-{train,test}.csv                   from,to
    RAW/parsing/...png                                  label maps, 128x64 (not with none)

PID_cCsS_FRAME_BOX.jpg: the person is PID; 0000 and -1 are distractors. The pair rule (same person, shoulders and hips
seen) gives exactly PATN's 263,632 training pairs from the training annotations; its 12,000 test pairs were drawn at
random and need their list.
"""

from __future__ import annotations

import pathlib
import re

from input_pipeline.schema import InputError
from input_pipeline.sources import listing
from input_pipeline.sources.base import NO_MAP, NO_PHOTO, NO_POSE, Dropped, RawSet, RawSplit
from input_pipeline.sources.folder import first_folder

PHOTO_FOLDERS = {"train": ("bounding_box_train", "train"), "test": ("bounding_box_test", "test")}
LIST_FOLDERS = ("", "lists")
EXPECTED_PAIRS = {"train": 263_632, "test": 12_000}
PERSON = re.compile(r"(-?\d+)_c\d+s\d+_")
NOBODY = ("0000", "-1")

PHOTOS_FROM = "the Market-1501-v15.09.15 archive, requested from its authors (Zheng et al., ICCV 2015)"
LISTS_FROM = "from the data links of the PATN project (github.com/tengteng95/Pose-Transfer)"
DESCRIPTION = "Market-1501 for pose transfer: PATN's pairs and OpenPose-18 joints, 128x64 photos."
CITATION = """@inproceedings{zheng2015scalable,
  author = {Zheng, Liang and Shen, Liyue and Tian, Lu and Wang, Shengjin and Wang, Jingdong and Tian, Qi},
  title = {Scalable Person Re-identification: A Benchmark}, booktitle = {ICCV}, year = {2015}}"""
LICENCE = "Photos: research only, under the terms of the Market-1501 authors. Do not pass on."


def person_of(key: str) -> str | None:
    """The person's number in a file name; None for distractors and other names."""
    match = PERSON.match(pathlib.PurePosixPath(key).name)
    return match.group(1) if match and match.group(1) not in NOBODY else None


def read_market1501(
    raw: str | pathlib.Path, *, labels: str, lists: str | pathlib.Path | None = None
) -> tuple[RawSet, list[listing.Needed]]:
    """The dataset as its lists give it, and the checklist of its files. Raises InputError."""
    root = pathlib.Path(raw)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; make it and put the files of `--dataset=market1501` there")
    places = [pathlib.Path(lists)] if lists else [root / folder for folder in LIST_FOLDERS]
    maps = first_folder(root, listing.PARSING_FOLDERS)
    map_files = listing.maps_by_key(maps, labels)
    needed: list[listing.Needed] = []
    splits: dict[str, RawSplit] = {}
    problems: list[str] = []
    notes: list[str] = []
    dropped: list[Dropped] = []
    for split, folders in PHOTO_FOLDERS.items():
        folder = first_folder(root, folders)
        annotations = listing.first_file(places, [f"market-annotation-{split}.csv"])
        listed = listing.first_file(places, [f"market-pairs-{split}.csv"])
        needed += [
            listing.Needed(f"{split} photos", f"{root}/{folders[0]}/", PHOTOS_FROM, str(folder or "")),
            listing.Needed(
                f"{split} annotations", f"{root}/market-annotation-{split}.csv", LISTS_FROM, str(annotations or "")
            ),
            listing.Needed(f"{split} pairs", f"{root}/market-pairs-{split}.csv", LISTS_FROM, str(listed or "")),
        ]
        if folder is None or annotations is None or (split == "test" and listed is None):
            problems.append(f"{split}: photos, annotations or pairs are missing; the split is left out")
            continue
        poses = listing.read_poses(annotations, None)
        pairs = listing.read_pair_keys(listed) if listed else listing.derived_pairs(list(poses.rows), poses, person_of)
        if not listed:
            notes.append(f"{split}: no pair list; {len(pairs):,} pairs derived (same person, shoulders and hips seen)")
        if len(pairs) != EXPECTED_PAIRS[split]:
            problems.append(f"{split}: {len(pairs):,} pairs; {EXPECTED_PAIRS[split]:,} expected")
        content, lost = listing.paired_photos(
            pairs, photos=listing.photos_by_key(folder), poses=poses, maps=map_files, labels=labels,
            identity=lambda key: person_of(key) or key,
        )  # fmt: skip
        where = {NO_PHOTO: f"{folder} is incomplete", NO_POSE: f"not in {annotations.name}", NO_MAP: "parsing/"}
        problems += [f"{split}: {line}" for line in listing.missing_problems(pairs, content, lost, where=where)]
        dropped += lost
        if content.items:
            splits[split] = content
    if not splits:
        raise listing.MissingFiles(f"{root}: no split of Market-1501 is complete", needed)
    raw_set = RawSet(
        "market1501", labels, splits, DESCRIPTION, CITATION, "", LICENCE, dropped, problems, notes
    )  # fmt: skip
    return raw_set, needed
