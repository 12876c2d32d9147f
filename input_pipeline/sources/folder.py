"""A folder of your own photos as an image set.

    ROOT/image/NAME.jpg        photos, sub-folders allowed (also images/ or img/)
    ROOT/parsing/NAME.png      label maps of the photos' sizes (labels "none": none, all of it is person)
    ROOT/keypoints/NAME.json   poses: .json, _keypoints.json or .txt (also pose/; or one annotation CSV)

or VITON-HD's train/ and test/ as they are (image-parse-v3/, openpose_json/), and segm/NAME_segm.png of DeepFashion-MultiModal.

Files belong together by their path without suffix. Poses without a frame of their own are in pixels of their
photo.
"""

from __future__ import annotations

import collections
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from input_pipeline.annotations.keypoints import (
    Pose,
    annotation_pose,
    canonical_name,
    load_pose,
    name_key,
    read_annotations,
)
from input_pipeline.annotations.parsing import check_said_labels, label_set, read_parsing, whole_photo
from input_pipeline.annotations.photo import PHOTO_SUFFIXES, Framing, fit_photo, read_photo
from input_pipeline.annotations.plausibility import SetOfDoubts, judge
from input_pipeline.files import read_list
from input_pipeline.schema import ImageRecord, InputError

__all__ = ["FolderImages", "fit_photo", "identity_of", "pairs_within", "read_pairs", "read_photo"]

PHOTO_FOLDERS = ("image", "images", "img")
POSE_FOLDERS = ("keypoints", "pose", "openpose_json", "openpose-json")
PARSING_FOLDERS = ("parsing", "image-parse-v3", "image-parse", "segm")
"""Ours; VITON-HD's; DeepFashion-MultiModal's and UPGPT's."""
MAP_SUFFIXES = (".png", "_segm.png")
POSE_SUFFIXES = (".json", "_keypoints.json", ".txt")
PAIR_COLUMNS = (("from", "to"), ("source", "target"))


class FolderImages:
    """ImageSet of a folder, at `size` (h, w); see the module for the layout.

    labels: a key of parsing.LABEL_SETS, or "none". pairs: "self" (each photo its own target), "identity" (all
    ordered pairs of photos of one identity, see `identity_of`), or a CSV with columns from,to or
    source,target. keypoints: an annotation CSV or a folder of poses in place of ROOT/keypoints. pose_frame:
    (h, w) that overrides the poses' frame. Raises InputError, naming what is missing, at construction; photos
    are read on access. Photos without a visible joint can be sources of listed pairs but nobody's target;
    `image(i).joints` are then zeros.
    """

    def __init__(
        self,
        root: str | pathlib.Path,
        *,
        labels: str,
        size: tuple[int, int],
        pairs: str | pathlib.Path = "self",
        keypoints: str | pathlib.Path | None = None,
        pose_frame: tuple[int, int] | None = None,
    ):
        self.root = pathlib.Path(root)
        self.size = size
        self._label_set = label_set(labels)
        self.labels = self._label_set.name
        self._photos = find_photos(self.root)
        self.names = sorted(self._photos)
        self._maps = None if self.labels == "whole" else self._find_maps()
        self._poses = self._read_poses(keypoints, pose_frame)
        self.pairs = self._make_pairs(str(pairs))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> dict[str, pathlib.Path]:
        """The photos and maps of the set, by kind and name: what its pixels and region tokens depend on."""
        found = {f"image/{name}": path for name, path in self._photos.items()}
        return found | {f"parsing/{name}": path for name, path in (self._maps or {}).items()}

    def pose(self, index: int) -> Pose:
        """The pose as its file gives it; a frame of None means the photo's own pixels."""
        return self._poses[index]

    def image(self, index: int) -> ImageRecord:
        """The photo with its map and joints at `size`.

        Raises InputError where photo or map cannot be read.
        """
        photo, parsing, joints = self.original(index)
        image, parsing, joints, _ = fit_photo(photo, parsing, joints, self.size)
        name = self.names[index]
        return ImageRecord(image, parsing, joints, name, identity_of(name))

    def doubts(self, count: int) -> list[str]:
        """What is doubtful (annotations/plausibility.py) of `count` photos at even distances; unreadable ones are passed over."""
        found = SetOfDoubts()
        for index in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)):
            try:
                photo, parsing, joints = self.original(int(index))
            except InputError:
                continue
            found.add(self.names[index], judge(joints, parsing, self._label_set, photo.shape[:2]))
        return found.lines()

    def original(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(photo uint8 [h w 3], map uint8 [h w], joints [18 3]) at the photo's own size."""
        name = self.names[index]
        photo = read_photo(self._photos[name])
        hw = photo.shape[:2]
        parsing = whole_photo(hw) if self._maps is None else read_parsing(self._maps[name], self._label_set, hw)
        pose = self._poses[index]
        return photo, parsing, Framing.fit(pose.frame_hw or hw, hw).joints(pose.joints)

    def _find_maps(self) -> dict[str, pathlib.Path]:
        folder = first_folder(self.root, PARSING_FOLDERS)
        if folder is None:
            ours = PARSING_FOLDERS[0]
            raise InputError(f"{self.root}: has no {ours}/ with {self.labels} maps; add it or use labels none")
        if folder.name != PARSING_FOLDERS[0]:
            logging.warning("%s: read as %s maps, as labels says; VITON-HD's are cihp20", folder, self.labels)
        check_said_labels(folder, self.labels)
        maps = {name: _file_of(folder, name, MAP_SUFFIXES) for name in self.names}
        missing = [name for name, path in maps.items() if path is None]
        if missing:
            raise InputError(_missing(self.root, "parsing map", f"{folder.name}/NAME.png", missing, len(self.names)))
        return maps

    def _read_poses(self, keypoints: str | pathlib.Path | None, frame_hw: tuple[int, int] | None) -> list[Pose]:
        place = pathlib.Path(keypoints) if keypoints else first_folder(self.root, POSE_FOLDERS)
        if place is None or not place.exists():
            raise InputError(
                f"{place or self.root}: no poses; add {POSE_FOLDERS[0]}/NAME.json or give an annotation CSV"
            )
        if place.is_file() and place.suffix.lower() == ".json":
            return [load_pose(f"{place}#{name}", frame_hw=frame_hw) for name in self.names]
        if place.is_file():
            rows = read_annotations(place)
            missing = [name for name in self.names if name_key(name) not in rows]
            if missing:
                raise InputError(_missing(self.root, "row", place.name, missing, len(self.names)))
            return [annotation_pose(rows, name, path=place, frame_hw=frame_hw) for name in self.names]
        files = {name: _file_of(place, name, POSE_SUFFIXES) for name in self.names}
        missing = [name for name, path in files.items() if path is None]
        if missing:
            raise InputError(_missing(self.root, "pose", f"{place.name}/NAME.json or .txt", missing, len(self.names)))
        return [load_pose(files[name], frame_hw=frame_hw) for name in self.names]

    def _make_pairs(self, pairs: str) -> np.ndarray:
        for note, count in collections.Counter(note for pose in self._poses for note in pose.notes).items():
            logging.warning("%s: %d of %d poses: %s", self.root, count, len(self._poses), note)
        posed = np.array([bool(pose.joints[:, 2].any()) for pose in self._poses])
        if not posed.all():
            logging.warning("%s: %d of %d photos have no visible joint", self.root, (~posed).sum(), len(posed))
        if pairs == "self":
            found = np.repeat(np.flatnonzero(posed), 2).reshape(-1, 2)
        elif pairs == "identity":
            found = pairs_within([identity_of(name) for name in self.names], posed)
        else:
            found = self.listed_pairs(pairs)
            found = found[posed[found[:, 1]]]
        if len(found) == 0:
            raise InputError(
                f"{self.root}: no pairs '{pairs}' among {len(self.names)} photos ({posed.sum()} with a pose)"
            )
        return found.astype(np.int32)

    def listed_pairs(self, path: str) -> np.ndarray:
        """int32 [n 2]: the pairs of a CSV as indices. Raises InputError where it names a photo that is not there."""
        index = {name_key(name): i for i, name in enumerate(self.names)}
        listed = read_pairs(path, advice="give a CSV, or 'self' or 'identity'")
        unknown = sorted({name for pair in listed for name in pair if name_key(name) not in index})
        if unknown:
            raise InputError(f"{path}: names {len(unknown)} photos that {self.root} does not hold: {_some(unknown)}")
        return np.array([[index[name_key(name)] for name in pair] for pair in listed], np.int32).reshape(-1, 2)


def find_photos(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Photos of ROOT/image by their path without suffix.

    Raises InputError where there are none, or two of one name.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds image/, parsing/ and keypoints/")
    folder = first_folder(root, PHOTO_FOLDERS)
    if folder is None:
        parts = [path for path in sorted(root.iterdir()) if path.is_dir() and first_folder(path, PHOTO_FOLDERS)]
        advice = f"; {parts[0].name}/ has one: give {parts[0]}" if parts else ""
        raise InputError(f"{root}: has no folder {PHOTO_FOLDERS[0]}/ with photos{advice}")
    photos: dict[str, pathlib.Path] = {}
    others: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() not in PHOTO_SUFFIXES:
            others.append(path.relative_to(folder).as_posix())
        else:
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in photos:
                raise InputError(f"{path}: two photos are called {name}; rename one")
            photos[name] = path
    if not photos:
        seen = f"; there are {_some(others)}" if others else ""
        raise InputError(f"{folder}: holds no photos ({', '.join(PHOTO_SUFFIXES)}){seen}")
    if others:
        logging.warning("%s: %d files are left out, their suffixes are no photos': %s", folder, len(others), _some(others))
    return photos


def identity_of(name: str) -> str:
    """Who wears what: DeepFashion's garment and colour (WOMEN/Dresses/id_00005537/05), else the sub-folder.

    A photo at the top of the folder is an identity of its own.
    """
    canonical = canonical_name(name)
    folder, _, file = canonical.rpartition("/")
    if folder.startswith(("WOMEN/", "MEN/")) and "/id_" in folder:
        return f"{folder}/{file[:2]}"
    return folder or file


def pairs_within(identities: Sequence[str], usable: np.ndarray) -> np.ndarray:
    """All ordered pairs of different usable images of one identity: int32 [n 2], grouped by identity.

    With `usable` = both shoulders and both hips seen (joints 2, 5, 8, 11) this is the rule behind
    DeepFashion's published lists (PATN; docs/paper.md 8.1).
    """
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index in np.flatnonzero(usable):
        groups[identities[index]].append(int(index))
    found = [(a, b) for members in groups.values() for a in members for b in members if a != b]
    return np.array(found, np.int32).reshape(-1, 2)


def read_pairs(path: str | pathlib.Path, *, advice: str = "give a CSV with from,to") -> list[tuple[str, str]]:
    """(source, target) names of a CSV with columns from,to or source,target; empty lines are skipped."""
    rows = read_list(path, "a list of pairs", advice=advice)
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    columns = next((names for names in PAIR_COLUMNS if set(names) <= set(header)), None)
    if columns is None:
        raise InputError(f"{path}: not a list of pairs; its first line must be from,to or source,target")
    first, second = (header.index(name) for name in columns)
    pairs = []
    for number, row in rows[1:]:
        if len(row) <= max(first, second) or not row[first] or not row[second]:
            raise InputError(f"{path}: line {number} names no pair; every line needs {columns[0]} and {columns[1]}")
        pairs.append((row[first], row[second]))
    return pairs


def files_under(folder: pathlib.Path, suffixes: Sequence[str] = PHOTO_SUFFIXES) -> list[pathlib.Path]:
    """Files of these suffixes anywhere under it, in order, none that is hidden (macOS leaves ._NAME beside a copy)."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes)
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def first_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """The first of these sub-folders that exists."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def _file_of(folder: pathlib.Path, name: str, suffixes: Sequence[str]) -> pathlib.Path | None:
    return next((path for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()), None)


def _missing(root: pathlib.Path, what: str, where: str, names: Sequence[str], total: int) -> str:
    return f"{root}: no {what} ({where}) for {len(names)} of {total} photos: {_some(names)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
