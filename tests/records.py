"""What the tests of records share: small raw sets in memory or on disk, and built folders."""

import dataclasses
import pathlib

import numpy as np
from PIL import Image

from input_pipeline.fields import Layout
from input_pipeline.records.writer import build_records
from input_pipeline.sources.base import BAD_PHOTO, RawPicture, RawSet, RawSplit, Unusable
from input_pipeline.synthetic.people import render
from tests.shared_data import standing_joints

OF_PAIRS = (
    "source", "target", "source_joints", "target_joints", "target_pose", "source_parsing", "class_on", "region_tokens",
    "region_valid",
)  # fmt: skip
"""What TruePose reads of a pair."""


def pair_layout(form: str = "float32", *, maps: bool = True, width: int = 8) -> Layout:
    """Of batches that hold OF_PAIRS, with the targets' maps or without."""
    return Layout((*OF_PAIRS, *(["target_parsing"] if maps else [])), form, {"e": width})


IN_RECORD_1 = 6000
"""A byte within record 1 of any shard of NoiseItems: each record takes 4.2 kB of it."""


@dataclasses.dataclass(frozen=True)
class NoiseItem:
    """A picture of noise with stripes for a map, by its number; `bad` ones cannot be read."""

    number: int
    hw: tuple[int, int] = (40, 30)
    bad: bool = False
    posed: bool = True
    outside: float = 0.0

    @property
    def name(self) -> str:
        return f"p{self.number:03d}"

    @property
    def identity(self) -> str:
        return f"who{self.number // 4}"

    def load(self) -> RawPicture:
        if self.bad:
            raise Unusable(BAD_PHOTO, "made so")
        h, w = self.hw
        rng = np.random.default_rng(self.number)
        stripes = np.repeat((np.arange(h) * 18 // h)[:, None], w, 1).astype(np.uint8)
        joints = standing_joints(h, w) * self.posed
        joints[:, 0] += self.outside * w * self.posed
        return RawPicture(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), stripes, joints)


def all_pairs(count: int, first: int = 0) -> np.ndarray:
    """All ordered pairs of different items of one identity of NoiseItem."""
    numbers = range(count)
    found = [(a, b) for a in numbers for b in numbers if a != b and (a + first) // 4 == (b + first) // 4]
    return np.array(found, np.int32).reshape(-1, 2)


def noise_set(train: int = 8, test: int = 4, **changes: dict) -> RawSet:
    """Items 0.. in train and 100.. in test; `changes`: number -> fields of that item, as p3={"bad": True}."""
    splits = {}
    for split, first, count in (("train", 0, train), ("test", 100, test)):
        items = [NoiseItem(first + i, **changes.get(f"p{first + i}", {})) for i in range(count)]
        splits[split] = RawSplit(items, all_pairs(count, first))
    return RawSet("noise", "atr18", splits, "Noise.", citation="@misc{noise}", licence="Nobody's.")


def built(root: pathlib.Path, raw: RawSet | None = None, **settings) -> pathlib.Path:
    """A build of `raw` (noise_set()) in `root`."""
    build_records(raw or noise_set(), root, **settings)
    return root


def write_people(root: pathlib.Path, count: int = 4, hw=(64, 48)) -> pathlib.Path:
    """A folder of synthetic people as FolderImages reads it, photos as JPEG."""
    for name in ("image", "parsing", "keypoints"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        record = render(seed=0, identity=i // 2, pose=2 * i, size=hw)
        Image.fromarray(record.image).save(root / "image" / f"p{i}.jpg", quality=90)
        Image.fromarray(record.parsing).save(root / "parsing" / f"p{i}.png")
        rows = [f"{x} {y}" if seen else "-1 -1" for x, y, seen in record.joints]
        (root / "keypoints" / f"p{i}.txt").write_text("\n".join(rows) + "\n")
    return root
