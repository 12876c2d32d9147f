"""WPose, UniHuman's 2,304 test pairs of people in the wild, in the layout of its archive and download script.

    RAW/wpose/images/1.png           made by UniHuman's get_wpose_data.py from image_urls.txt (or right in RAW/)
    RAW/wpose/test_pairs.txt         two columns: source, target (also a CSV test_pairs.csv with source,target)
    RAW/wpose/parsing/1.png          its parsing maps (older archives: gt_parsing/); not with none
    RAW/wpose/keypoints/1.json       NOT in the archive, which has DensePose only: make OpenPose or COCO-17 keypoints

Column separators (tabs, spaces, commas), paths before the names and more columns are accepted. The archive does not
say which label set its maps have: say it with --labels, and look with `prepare inspect`. test_data.pkl is never read
(a pickle can run code). Links die, so some photos are usually missing. An identity is what the pairs connect.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from input_pipeline.annotations.keypoints import name_key
from input_pipeline.files import read_text
from input_pipeline.schema import InputError
from input_pipeline.sources import listing
from input_pipeline.sources.base import NO_MAP, NO_PHOTO, NO_POSE, RawSet
from input_pipeline.sources.folder import first_folder, read_pairs

EXPECTED_PAIRS = 2_304
PHOTO_FOLDERS, MAP_FOLDERS = ("images", "image"), ("parsing", "gt_parsing")

PHOTOS_FROM = "made by get_wpose_data.py of UniHuman (github.com/NannanLi999/UniHuman), which downloads the photos"
LISTS_FROM = "in wpose.zip, linked from UniHuman's README (github.com/adobe-research/UniHuman)"
POSES_FROM = "not published: run a pose estimator (OpenPose, or COCO-17 such as ViTPose) over images/"
DESCRIPTION = "WPose (UniHuman): 2,304 test pairs of people in the wild. A test set; there is no training split."
CITATION = """@inproceedings{li2024unihuman,
  author = {Li, Nannan and Liu, Qing and Singh, Krishna Kumar and Wang, Yilin and Zhang, Jianming and
            Plummer, Bryan A. and Lin, Zhe},
  title = {UniHuman: A Unified Model for Editing Human Images in the Wild}, booktitle = {CVPR}, year = {2024}}"""
LICENCE = "Annotations: Adobe Research License, non-commercial research only. Photos: each has its own licence."


def read_wpose(raw: str | pathlib.Path, *, labels: str) -> tuple[RawSet, list[listing.Needed]]:
    """The test split as its list gives it, and the checklist of its files. Raises InputError."""
    root = pathlib.Path(raw)
    root = root / "wpose" if (root / "wpose").is_dir() else root
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; make it and put the files of `--dataset=wpose` there")
    photos, maps = first_folder(root, PHOTO_FOLDERS), first_folder(root, MAP_FOLDERS)
    poses, listed = (
        first_folder(root, listing.POSE_FOLDERS),
        listing.first_file([root], ["test_pairs.txt", "test_pairs.csv"]),
    )
    needed = [
        listing.Needed("photos", f"{root}/images/", PHOTOS_FROM, str(photos or "")),
        listing.Needed("pairs", f"{root}/test_pairs.txt", LISTS_FROM, str(listed or "")),
        listing.Needed("poses", f"{root}/keypoints/", POSES_FROM, str(poses or "")),
    ]
    if labels != "whole":
        needed.append(listing.Needed("parsing maps", f"{root}/parsing/", LISTS_FROM, str(maps or "")))
    absent = [item.what for item in needed if not item.found]
    if absent:
        raise listing.MissingFiles(f"{root}: no {', no '.join(absent)}", needed)
    pairs = wpose_pairs(listed)
    people = connected(pairs)
    content, dropped = listing.paired_photos(
        pairs,
        photos=listing.photos_by_key(photos),
        poses=listing.read_poses(None, poses),
        maps=listing.maps_by_key(maps, labels),
        labels=labels,
        identity=lambda key: people[key],
    )
    problems = [] if len(pairs) == EXPECTED_PAIRS else [f"{len(pairs):,} pairs; {EXPECTED_PAIRS:,} expected"]
    where = {NO_PHOTO: "its link may be dead", NO_POSE: "keypoints/ is incomplete", NO_MAP: "parsing/ is incomplete"}
    problems += listing.missing_problems(pairs, content, dropped, where=where)
    raw_set = RawSet(
        "wpose", labels, {"test": content}, DESCRIPTION, CITATION, "", LICENCE, dropped, problems
    )  # fmt: skip
    return raw_set, needed


def wpose_pairs(path: pathlib.Path) -> list[tuple[str, str]]:
    """(source, target) keys of the list: the first two columns, whatever separates them."""
    if path.suffix == ".csv":
        return [(_key(source), _key(target)) for source, target in read_pairs(path)]
    lines = read_text(path, "a list of pairs").splitlines()
    pairs = []
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t") if "\t" in line else line.replace(",", " ").split()
        if len(columns) == 1:
            raise InputError(f"{path}: line {number} names one image; every line needs a source and a target")
        if columns:
            pairs.append((_key(columns[0]), _key(columns[1])))
    return pairs


def connected(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """An identity for every key: the first, in order of names, of those that pairs connect it with."""
    first: dict[str, str] = {}

    def find(key: str) -> str:
        first.setdefault(key, key)
        while first[key] != key:
            first[key] = first[first[key]]
            key = first[key]
        return key

    for source, target in pairs:
        a, b = sorted((find(source), find(target)))
        first[b] = a
    return {key: find(key) for key in list(first)}


def _key(name: str) -> str:
    """1 for wpose/images/1.png."""
    return name_key(pathlib.PurePosixPath(name.strip().replace("\\", "/")).name)
