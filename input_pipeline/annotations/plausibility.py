"""Do pose and map fit their picture? Doubts that no reader can be sure of: warned of, never refused.

Whoever takes in annotations asks here: `generate` of its one picture, `prepare inspect`, `build` and `check` and the start of
a training of their sets. The limits were set between what is right and what is wrong of drawn people, studio and street
photos (the rings of an interpolated map are 83 % of its runs, of others' at most 7 %).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.annotations.keypoints import inside
from input_pipeline.annotations.parsing import LabelSet

LEAST_JOINTS = 6
"""Fewer joints tell nothing of a person's size or place."""
SMALL = 0.1
"""Of the picture's longer side: a smaller person has 25 pixels of 256."""
OFF_PERSON = 0.6
"""Share of the joints that lie on the map's background."""
RINGS, RING_WIDTH, LEAST_RUNS = 0.25, 0.02, 30
"""Share of a map's runs that are thin and lie between their neighbours' ids; how thin, of its width; runs that tell."""
ROWS_READ = 64
BELOW_HIPS = 0.3
"""Share of a class's pixels."""
FACES = ("Face", "Head")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A doubt: what is said, and of how many pictures, and of which share of those where it could be told, it is said."""

    text: str
    least: int = 1
    share: float = 0.0


KINDS: Mapping[str, Kind] = {
    "outside": Kind("most joints lie outside of the picture: is the pose in another frame (--pose-frame)?"),
    "small": Kind("the person is smaller than a tenth of the picture: cut the photo to the person"),
    "astray": Kind("most joints lie off the map's person: are pose and map of this photo, and the pose in its pixels?"),
    "empty": Kind("the map shows no person"),
    "rings": Kind("thin rings of labels lie between classes: was the map resized with interpolation? use nearest"),
    "lip20": Kind("Torso-skin reaches below the hips: are the maps' labels lip20, where that id is Jumpsuits?"),
    "cihp20": Kind("Jumpsuits end above the hips: are the maps' labels cihp20, where that id is Torso-skin?"),
    "nose": Kind("no face lies under the nose: is it another label set?", 3, 0.5),
    "sides": Kind("joints lie in the other side's arm or leg: are sides swapped?", 3, 0.5),
}


def judge(joints: np.ndarray, parsing: np.ndarray | None, labels: LabelSet, hw: tuple[int, int]) -> dict[str, bool]:
    """{kind of KINDS: is it doubtful?} of what can be told. joints: [18 3] in pixels of a picture of `hw`; parsing: uint8
    [h w] of these labels, None where there is no map."""
    found = {}
    seen, there = joints[:, 2] > 0, inside(joints, hw)
    if seen.any():
        found["outside"] = bool(2 * there.sum() < seen.sum())
    if there.sum() >= LEAST_JOINTS:
        found["small"] = bool(np.ptp(joints[there, :2], axis=0).max() < SMALL * max(hw))
    if parsing is None or labels.name == "whole":
        return found
    found["empty"] = not parsing.any()
    found["rings"] = _has_rings(parsing)
    xy = np.minimum(np.rint(joints[:, :2]).clip(0), (hw[1] - 1, hw[0] - 1)).astype(int)
    under = parsing[xy[:, 1], xy[:, 0]]
    if there.sum() >= LEAST_JOINTS and not found["empty"]:
        found["astray"] = bool((under[there] == 0).mean() > OFF_PERSON)
    face = next((labels.id_of(name) for name in FACES if labels.id_of(name)), None)
    if face and there[0]:
        found["nose"] = bool(under[0] != face)
    own, other = _sides(under, there, labels)
    if own or other:
        found["sides"] = other > own
    if labels.name in ("lip20", "cihp20") and there[[2, 5, 8, 11]].all():
        y = np.flatnonzero((parsing == 10).any(1)) if (parsing == 10).mean() > 0.001 else []
        if len(y):
            shoulders, hips = joints[[2, 5], 1].mean(), joints[[8, 11], 1].mean()
            rows = (parsing == 10).sum(1)
            if labels.name == "cihp20":
                found["lip20"] = bool(rows[round(hips) :].sum() > BELOW_HIPS * rows.sum())
            else:
                found["cihp20"] = bool(y.max() < shoulders + 0.5 * (hips - shoulders))
    return found


def _has_rings(parsing: np.ndarray) -> bool:
    """Between two classes an interpolated map runs through all ids between theirs, each in a thin run."""
    h, w = parsing.shape
    rows = parsing[:: max(1, h // ROWS_READ)]
    change = np.ones(rows.shape, bool)
    change[:, 1:] = rows[:, 1:] != rows[:, :-1]
    start = np.flatnonzero(change)
    ids, length, first = rows.reshape(-1)[start].astype(int), np.diff(start, append=rows.size), start % w == 0
    inner = np.flatnonzero(~first[:-1] & ~first[1:]) if len(start) > 1 else start[:0]
    inner = inner[inner > 0]
    if len(inner) < LEAST_RUNS:
        return False
    before, here, after = ids[inner - 1], ids[inner], ids[inner + 1]
    between = (np.minimum(before, after) < here) & (here < np.maximum(before, after))
    return bool((between & (length[inner] <= max(2, RING_WIDTH * w))).mean() > RINGS)


def _sides(under: np.ndarray, there: np.ndarray, labels: LabelSet) -> tuple[int, int]:
    """How many elbows, wrists, knees and ankles lie in their own side's arm or leg, and in the other's."""
    own = other = 0
    for part, joints in (("arm", (3, 4)), ("leg", (9, 10))):
        ids = {side: labels.id_of(f"{side}-{part}") for side in ("Right", "Left")}
        for right in joints:
            for side, joint in (("Right", right), ("Left", right + 3)):
                if there[joint]:
                    own += under[joint] == ids[side]
                    other += under[joint] == ids["Left" if side == "Right" else "Right"]
    return int(own), int(other)


def doubts(judged: Mapping[str, bool]) -> list[str]:
    """What to say of one picture; what only many can tell is left out."""
    return [KINDS[kind].text for kind, doubtful in judged.items() if doubtful and KINDS[kind].least == 1]


class SetOfDoubts:
    """Counts over the pictures of a set."""

    def __init__(self):
        self.counts: dict[str, list] = {}
        """{kind: [pictures it was told of, doubtful ones, name of the first such]}, which is JSON too."""

    def add(self, name: str, judged: Mapping[str, bool]) -> None:
        """judged: of the picture `name`."""
        self.merge({kind: [1, int(doubtful), name if doubtful else ""] for kind, doubtful in judged.items()})

    def merge(self, counts: Mapping[str, Sequence]) -> None:
        """The `counts` of pictures that come after these."""
        for kind, (told, doubtful, name) in counts.items():
            if kind in KINDS:
                before = self.counts.setdefault(kind, [0, 0, ""])
                self.counts[kind] = [before[0] + told, before[1] + doubtful, before[2] or name]

    def lines(self) -> list[str]:
        """One a kind: of how many pictures, what, and which one for instance."""
        return [
            f"{doubtful:,} of {told:,} photos: {KINDS[kind].text} ({name})"
            for kind in KINDS
            if kind in self.counts
            for told, doubtful, name in (self.counts[kind],)
            if doubtful >= KINDS[kind].least and doubtful > KINDS[kind].share * told
        ]
