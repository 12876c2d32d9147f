"""The photos of a study, each with its parsing map and the pose it is to be put into."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from input_pipeline.annotations.parsing import LabelSet, label_set
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import ImageRecord, ImageSet, InputError
from input_pipeline.sources.folder import FolderImages
from input_pipeline.synthetic.people import SyntheticPeople
from truepose_jax.config import Config, TruePoseModel
from truepose_jax.data.datasets import EVAL_SEED, evenly_spaced, people_settings
from truepose_jax.inference.pipeline import Request
from truepose_jax.runtime.choices import SYNTHETIC

RECORDS_FILE = "dataset_info.json"
"""In a folder that `prepare build` wrote."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """photo: uint8 [h w 3], its map uint8 [h w] and own_joints [18 3]. joints: [18 3] of the target, in pixels of frame_hw."""

    name: str
    photo: np.ndarray
    parsing: np.ndarray
    own_joints: np.ndarray
    joints: np.ndarray
    frame_hw: tuple[int, int]

    def request(self, labels: LabelSet, seed: int, *, own: bool = False) -> Request:
        """own: with the photo's own pose, for a model that reads it."""
        request = Request(self.photo, self.joints, self.parsing, labels.name, self.frame_hw, self.name, seed)
        return dataclasses.replace(request, source_joints=self.own_joints) if own else request


def are_records(data: str) -> bool:
    """Whether the folder is one that `prepare build` wrote."""
    return (pathlib.Path(data) / RECORDS_FILE).is_file()


def read_samples(
    data: str,
    config: Config,
    count: int,
    *,
    labels: str | None = None,
    split: str = "test",
    keypoints: str | None = None,
    pose_frame: tuple[int, int] | None = None,
) -> tuple[list[Sample], LabelSet]:
    """At most `count` samples. data: "synthetic" (held-out people of the run's kind, in another pose), a folder of photos (each
    in the next one's pose) or of records (pairs of the split). Raises InputError."""
    if not isinstance(config.model, TruePoseModel):
        raise InputError(f"the studies look into TruePose; this model's method is {config.model.method!r}")
    if count < 1:
        raise InputError(f"--count is {count}; it must be 1 or more")
    if data == SYNTHETIC:
        images = _people(config, count)
        pairs = np.array([(2 * i, 2 * i + 1) for i in range(count)])
    elif are_records(data):
        images = RecordImages(data, split)
        pairs = evenly_spaced(images.pairs, count)
    else:
        if not labels:
            raise InputError(f"--data={data}: say whose labels its maps are by --labels=atr18|lip20|cihp20")
        images = FolderImages(data, labels=labels, size=config.model.size, keypoints=keypoints, pose_frame=pose_frame)
        posed = images.pairs[:, 0]
        pairs = evenly_spaced(np.stack([posed, np.roll(posed, -1)], axis=1), count)
    if len(pairs) == 0:
        raise InputError(f"{data}: its split '{split}' has no pairs; choose another --split")
    found = []
    for source, target in pairs:
        photo, parsing, name, own = _original(images, int(source))
        target_photo, _, _, joints = _original(images, int(target))
        found.append(Sample(name, photo, parsing, own, joints, target_photo.shape[:2]))
    return found, label_set(images.labels)


def _original(images: ImageSet, index: int) -> tuple[np.ndarray, np.ndarray, str, np.ndarray]:
    """(photo, map, name, joints in its pixels), as large as they are stored."""
    if isinstance(images, FolderImages):
        photo, parsing, joints = images.original(index)
        return photo, parsing, images.names[index], joints
    record: ImageRecord = images.image(index)
    return record.image, record.parsing, record.name, record.joints


def _people(config: Config, count: int) -> SyntheticPeople:
    found = people_settings(config.data.synthetic, "heldout", seed=config.seed + EVAL_SEED, size=config.model.size)
    return SyntheticPeople(**found | {"identities": count, "poses_per_identity": 2})
