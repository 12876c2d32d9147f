"""People found by what comes along with the package: a pose and a map for any photo, with what is doubtful said."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from input_pipeline.annotations.parsing import LABEL_SETS, convert_parsing
from input_pipeline.schema import NUM_JOINTS, InputError
from truepose_jax.detection.blazepose import DOUBTFUL, NobodyFound, Person, blazepose
from truepose_jax.detection.heuristic_parsing import LABELS as OWN_LABELS
from truepose_jax.detection.heuristic_parsing import parse_person

EMBEDDED = "embedded"
"""What `prepare label` calls these in place of a model's name."""
LABELS = "atr18"
MASK = 0.5
"""Probability from which a pixel is person."""
FEW_JOINTS = 4


@dataclasses.dataclass(frozen=True)
class FoundPerson:
    """joints: float32 [18 3] in pixels of the photo. parsing: uint8 [h w] of LABELS. about: one line for people."""

    joints: np.ndarray
    parsing: np.ndarray
    about: str


def find_person(photo: np.ndarray, *, person: int = 1, name: str = "the photo") -> FoundPerson:
    """The person-th largest person of a photo, uint8 [h w 3]; warns of what is doubtful. name: what messages call the photo.

    Raises InputError where nobody is found, or not so many.
    """
    found = blazepose()(photo, person=person, name=name)
    joints = found.joints()
    seen = int((joints[:, 2] > 0).sum())
    if seen < FEW_JOINTS:
        raise InputError(f"{name}: only {seen} of 18 joints can be seen; take a photo that shows more of the person")
    if found.score < DOUBTFUL:
        logging.warning(
            "%s: not sure of the pose (score %.2f); look whether left and right are right (--show-found=SHEET.png)",
            name,
            found.score,
        )
    if found.people > 1:
        logging.warning("%s: %d people; number %d by size is taken (--person=N)", name, found.people, person)
    parsing = parse_person(photo, joints, found.mask > MASK, labels=LABELS)
    return FoundPerson(joints, parsing, f"{seen} of 18 joints, {found.facing} view, score {found.score:.2f}")


class EmbeddedPose:
    """Photos -> joints, as PoseModel gives them."""

    def __init__(self, joint_score: float):
        self._find, self._score = blazepose(), joint_score

    def __call__(self, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [h w 3] each -> float32 [18 3] (x, y, visible) each; zeros where there is no person."""
        people = [_person_in(photo) for photo in photos]
        return [np.zeros((NUM_JOINTS, 3), np.float32) if p is None else p.joints(self._score) for p in people]


class EmbeddedParsing:
    """Photos -> maps, as ParsingModel gives them. Raises InputError for a label set without the classes that are found."""

    def __init__(self, labels: str | None):
        self.labels = LABEL_SETS[labels or LABELS]
        try:
            convert_parsing(np.zeros((1, 1), np.uint8), OWN_LABELS, self.labels, name="")
        except InputError as error:
            raise InputError(
                f"--parsing=embedded: its classes are not {labels}'s; take --labels=atr18, lip20 or cihp20"
            ) from error
        blazepose()

    def __call__(self, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [h w 3] each -> uint8 [h w] each; background alone where there is no person."""
        maps = []
        for photo in photos:
            person = _person_in(photo)
            if person is None:
                maps.append(np.zeros(photo.shape[:2], np.uint8))
            else:
                maps.append(parse_person(photo, person.joints(), person.mask > MASK, labels=self.labels.name))
        return maps


def _person_in(photo: np.ndarray) -> Person | None:
    try:
        return blazepose()(photo)
    except NobodyFound:
        return None
