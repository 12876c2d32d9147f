"""What the readers of published datasets share: finding files by name, and saying which ones to ask for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from input_pipeline.annotations.keypoints import annotation_pose, load_pose, name_key, read_annotations
from input_pipeline.annotations.parsing import check_said_labels
from input_pipeline.annotations.photo import PHOTO_SUFFIXES
from input_pipeline.files import read_text
from input_pipeline.schema import InputError
from input_pipeline.sources.base import BAD_POSE, NO_MAP, NO_PHOTO, NO_POSE, Dropped, Item, PhotoItem, RawSplit
from input_pipeline.sources.folder import files_under, pairs_within, read_pairs

POSE_FOLDERS = ("keypoints", "pose")
PARSING_FOLDERS = ("parsing",)
PAIR_JOINTS = [2, 5, 8, 11]
"""Both shoulders and both hips: whom PATN's lists pair (docs/paper.md 8.1)."""


@dataclasses.dataclass(frozen=True)
class Needed:
    """A file or folder of a dataset: found, or where to get it."""

    what: str
    place: str
    source: str
    found: str = ""


class MissingFiles(InputError):
    """Files of a dataset are not there; `needed` says which to request from whom and where to put them."""

    def __init__(self, text: str, needed: Sequence[Needed]):
        super().__init__(f"{text}; the list above says what to request and where to put it")
        self.needed = needed


def checklist(needed: Sequence[Needed]) -> str:
    """One line each: what was found, and for the rest what to request from whom and where to put it."""
    lines = []
    for item in needed:
        if item.found:
            lines.append(f"  found    {item.what}: {item.found}")
        else:
            lines.append(f"  MISSING  {item.what}: put it at {item.place}; {item.source}")
    return "\n".join(lines)


def first_file(folders: Iterable[pathlib.Path], names: Sequence[str]) -> pathlib.Path | None:
    """The first of these names in the first of these folders that has one."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def files_by_key(folder: pathlib.Path | None, suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """Files anywhere under `folder` by the `name_key` of their path in it: any spelling, flat or in folders."""
    return {
        name_key(path.relative_to(folder).as_posix().replace("_keypoints.json", ".json")): path
        for path in (files_under(folder, suffixes) if folder else ())
    }


def maps_by_key(folder: pathlib.Path | None, labels: str) -> dict[str, pathlib.Path] | None:
    """The parsing maps under `folder`; None for labels "whole". Raises InputError where the folder says another label set."""
    if labels == "whole":
        return None
    if folder:
        check_said_labels(folder, labels)
    return files_by_key(folder, (".png",))


def photos_by_key(folder: pathlib.Path | None) -> dict[str, pathlib.Path]:
    return files_by_key(folder, PHOTO_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Poses:
    """Poses of a split by `name_key`: rows of an annotation CSV, else files of a folder."""

    rows: Mapping[str, str]
    path: pathlib.Path | None
    files: Mapping[str, pathlib.Path]

    def __contains__(self, key: str) -> bool:
        return key in self.rows or key in self.files

    def __len__(self) -> int:
        return len(self.rows) + len(self.files)

    def of(self, key: str):
        """The pose, or None where there is none. Raises InputError where it is broken."""
        if key in self.rows:
            return annotation_pose(self.rows, key, path=self.path)
        return load_pose(self.files[key]) if key in self.files else None


def read_poses(annotations: pathlib.Path | None, folder: pathlib.Path | None) -> Poses:
    """The annotation CSV (None: none), and for images it lacks the pose files under `folder`."""
    rows = read_annotations(annotations) if annotations else {}
    return Poses(rows, annotations, files_by_key(folder, (".json", ".txt")))


def read_names(path: pathlib.Path) -> list[str]:
    """The `name_key` of every line of a .lst file."""
    lines = read_text(path, "a list").splitlines()
    return [name_key(line.strip(" ,")) for line in lines if line.strip(" ,")]


def read_pair_keys(path: pathlib.Path) -> list[tuple[str, str]]:
    """The pairs of a CSV as `name_key`s."""
    return [(name_key(source), name_key(target)) for source, target in read_pairs(path)]


def derived_pairs(keys: Sequence[str], poses: Poses, identity: Callable[[str], str | None]) -> list[tuple[str, str]]:
    """All ordered pairs of different images of one identity, all with PAIR_JOINTS: the rule behind the published
    lists. identity: None for images that belong to nobody."""
    people = [identity(key) for key in keys]
    poses_of = [None if who is None else poses.of(key) for who, key in zip(people, keys, strict=True)]
    usable = np.array([pose is not None and (pose.joints[PAIR_JOINTS, 2] > 0).all() for pose in poses_of], bool)
    return [(keys[a], keys[b]) for a, b in pairs_within(people, usable)]


def paired_photos(
    pairs: Sequence[tuple[str, str]],
    *,
    photos: Mapping[str, pathlib.Path],
    poses: Poses,
    maps: Mapping[str, pathlib.Path] | None,
    labels: str,
    identity: Callable[[str], str],
) -> tuple[RawSplit, list[Dropped]]:
    """The images that pairs name, as items sorted by name, and those that lack a photo, a pose or a map.

    Pairs of dropped images stay out. maps: None where the set is built without.
    """
    dropped, items = [], []
    for key in sorted({key for pair in pairs for key in pair}):
        made = _item(key, photos, poses, maps, labels, identity)
        (dropped if isinstance(made, Dropped) else items).append(made)
    index = {item.name: i for i, item in enumerate(items)}
    kept = [(index[a], index[b]) for a, b in pairs if a in index and b in index]
    return RawSplit(items, np.array(kept, np.int32).reshape(-1, 2)), dropped


def _item(key, photos, poses, maps, labels, identity) -> Item | Dropped:
    if key not in photos:
        return Dropped(key, NO_PHOTO, "no photo of that name")
    photo = str(photos[key])
    try:
        pose = poses.of(key)
    except InputError as error:
        return Dropped(key, BAD_POSE, str(error), photo)
    if pose is None:
        return Dropped(key, NO_POSE, "no pose of that name", photo)
    if maps is not None and key not in maps:
        return Dropped(key, NO_MAP, f"no {labels} map of that name", photo)
    return PhotoItem(key, identity(key), photo, pose, str(maps[key]) if maps is not None else None, labels)


def missing_problems(
    pairs: Sequence[tuple[str, str]], content: RawSplit, dropped: Sequence[Dropped], *, where: Mapping[str, str]
) -> list[str]:
    """One line for each reason: how many of the images that `pairs` name, for instance which, and where they belong."""
    lines, listed = [], len({key for pair in pairs for key in pair})
    for reason in (NO_PHOTO, NO_POSE, NO_MAP, BAD_POSE):
        names = [drop.name for drop in dropped if drop.reason == reason]
        if names:
            lines.append(f"{reason}: {len(names):,} of {listed:,} images, such as {names[0]} ({where.get(reason, '')})")
    if len(content.pairs) < len(pairs):
        lines.append(f"{len(pairs) - len(content.pairs):,} of {len(pairs):,} pairs name such an image")
    return lines
