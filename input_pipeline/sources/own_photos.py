"""Raw sets that need no download: a folder of your own photos (folder.py's layout), and synthetic people."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np

from input_pipeline.schema import InputError
from input_pipeline.sources.base import PhotoItem, RawPicture, RawSet, RawSplit, restricted
from input_pipeline.sources.folder import FolderImages, identity_of
from input_pipeline.synthetic.people import SyntheticPeople

ANY_SIZE = (64, 64)
"""FolderImages wants a size; the items read the photos at their own."""

TEST_SHARE = 20
"""One test person for so many training people, at least one."""

TEST_SEED = 1
"""Added to the seed for people of the test split, as in training without records."""


def read_folder(
    root: str | pathlib.Path,
    *,
    labels: str,
    pairs: str,
    test_pairs: str | None = None,
    keypoints: str | None = None,
    pose_frame: tuple[int, int] | None = None,
) -> RawSet:
    """All photos of a folder. test_pairs: a CSV whose photos become the split test; the others are train.

    Training pairs between a test photo and another are left out, and counted in the notes. Raises InputError.
    """
    images = FolderImages(
        root, labels=labels, size=ANY_SIZE, pairs=pairs, keypoints=keypoints, pose_frame=pose_frame
    )  # fmt: skip
    files = images.files
    items = [
        PhotoItem(
            name,
            identity_of(name),
            str(files[f"image/{name}"]),
            images.pose(i),
            str(files[f"parsing/{name}"]) if f"parsing/{name}" in files else None,
            images.labels,
        )
        for i, name in enumerate(images.names)
    ]
    notes: list[str] = []
    held = images.listed_pairs(test_pairs) if test_pairs else None
    if held is None:
        splits = {"train": RawSplit(items, images.pairs)}
    else:
        tested = np.zeros(len(items), bool)
        tested[held] = True
        people = {items[i].identity for i in np.flatnonzero(tested)}
        tested = np.array([item.identity in people for item in items])
        within = images.pairs[~tested[images.pairs].any(1)]
        notes.append(
            f"{tested.sum()} of {len(items)} photos show the people of {test_pairs} and are kept from training, "
            f"with {len(images.pairs) - len(within)} of {len(images.pairs)} pairs"
        )
        splits = {"train": _part(items, ~tested, within), "test": restricted(RawSplit(items, images.pairs), held)}
    return RawSet("folder", images.labels, splits, f"Photos of {pathlib.Path(root).name}.", notes=notes)


def _part(items, keep: np.ndarray, pairs: np.ndarray) -> RawSplit:
    """The kept items, paired or not, and their pairs."""
    place = np.cumsum(keep) - 1
    return RawSplit([item for item, k in zip(items, keep, strict=True) if k], place[pairs].astype(np.int32))


# ------------------------------------------------------------------------------------------- synthetic people


@dataclasses.dataclass(frozen=True)
class SyntheticPool:
    """Arguments of SyntheticPeople that every worker makes its own from."""

    seed: int
    split: str
    identities: int
    poses_per_identity: int
    size: tuple[int, int]
    patterns: str
    background: str
    framing: str


@dataclasses.dataclass(frozen=True)
class SyntheticItem:
    """Picture `index` of a pool."""

    name: str
    identity: str
    pool: SyntheticPool
    index: int

    def load(self) -> RawPicture:
        record = _people(self.pool).image(self.index)
        return RawPicture(record.image, record.parsing, record.joints)


@functools.lru_cache(maxsize=4)
def _people(pool: SyntheticPool) -> SyntheticPeople:
    return SyntheticPeople(**dataclasses.asdict(pool))


def synthetic_people(
    *,
    pairs: int,
    size: tuple[int, int],
    seed: int = 0,
    poses_per_identity: int = 4,
    patterns: str = "all",
    background: str = "all",
    framing: str = "all",
) -> RawSet:
    """At least `pairs` training pairs of synthetic people, and one test person for every 20. Raises InputError."""
    if pairs < 1 or poses_per_identity < 2:
        raise InputError(f"{pairs} pairs of people in {poses_per_identity} poses make no set; use 1 and 2 at least")
    people = -(-pairs // (poses_per_identity * (poses_per_identity - 1)))
    splits = {}
    for name, split, count in (("train", "train", people), ("test", "heldout", max(1, people // TEST_SHARE))):
        pool = SyntheticPool(
            seed + (TEST_SEED if name == "test" else 0), split, count, poses_per_identity, tuple(size), patterns,
            background, framing,
        )  # fmt: skip
        images = _people(pool)
        items = []
        for i in range(len(images)):
            identity, k = divmod(i, poses_per_identity)
            who = f"{name}-{pool.seed}-{identity:06d}"
            items.append(SyntheticItem(f"{who}-{k}", who, pool, i))
        splits[name] = RawSplit(items, images.pairs)
    return RawSet("synthetic", SyntheticPeople.labels, splits, "Synthetic people with exact ATR-18 maps and joints.")
