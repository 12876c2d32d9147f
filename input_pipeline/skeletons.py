"""Sets of joints, and the ways in which papers draw them: what config.model.skeleton chooses among.

| name | joints | drawn as |
|---|---|---|
| cfld | OpenPose's 18 | CFLD: lines, then discs (skeleton.py) |
| openpose | the same | ControlNet and DWPose: filled ellipses, darkened, then discs; no hands, no face |
| pidm | the same | GFLA, PIDM and FPDM: discs, then ellipses blended over them, red and blue exchanged, at 550x375 |
| wholebody133 | COCO-WholeBody's 133 | FPDM's sign language, so at 260x210 |
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from input_pipeline.schema import NUM_JOINTS, InputError

SHADE = 0.6
"""Of limbs, CFLD's and ControlNet's."""


@dataclasses.dataclass(frozen=True, eq=False)
class JointSet:
    """bones: pairs of joints. colours [n 3]: RGB of joint i, and of bone i. flipped [n]: flipped[j] is the joint that j becomes
    in the mirror."""

    bones: tuple[tuple[int, int], ...]
    colours: tuple[tuple[int, ...], ...]
    flipped: np.ndarray

    @functools.cached_property
    def shades(self) -> list[tuple[int, ...]]:
        """The colours of limbs that are darker than their joints."""
        return [tuple(int(SHADE * c) for c in colour) for colour in self.colours]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a model is shown poses. joints: how many there are. limbs "lines"; "filled" ellipses, all darkened before the discs;
    "blended" ellipses over the discs, which come first. disc: its radius. frame: (h, w) of the picture that is drawn and then
    stretched to the model's size; None: at that size."""

    joints: int = NUM_JOINTS
    limbs: str = "lines"
    disc: int = 3
    frame: tuple[int, int] | None = None


DRAWINGS = {
    "cfld": Drawing(),
    "openpose": Drawing(limbs="filled", disc=4),
    "pidm": Drawing(limbs="blended", disc=4, frame=(550, 375)),
    "wholebody133": Drawing(133, limbs="blended", disc=2, frame=(260, 210)),
}

OPENPOSE = JointSet(
    bones=(
        (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
        (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
    ),
    colours=(
        (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
        (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
        (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
    ),
    flipped=np.array([0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]),
)  # fmt: skip


def _wholebody() -> JointSet:
    """COCO-WholeBody: 17 body joints (COCO's), 6 of the feet, 68 of the face (300-W's), 21 of the left hand, 21 of the right.

    Each chain of joints once. FPDM's own list of 117 limbs draws three of the jaw twice and gives one limb six ends. Feet and
    eyes to ears are not drawn, as there. Colours: NumPy's generator of old, seed 777, as there.
    """
    body = [(5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)]
    open_chains = [(0, 17), (17, 22), (22, 27), (27, 31), (31, 36)]  # jaw, brows, bridge and base of the nose
    rings = [(36, 42), (42, 48), (48, 60), (60, 68)]  # eyes, lips outside and inside
    face = [pair for start, stop in open_chains + rings for pair in itertools.pairwise(range(start, stop))]
    face += [(stop - 1, start) for start, stop in rings]
    fingers = [(0, 4 * f + 1) for f in range(5)] + [(4 * f + k, 4 * f + k + 1) for f in range(5) for k in (1, 2, 3)]
    bones = body + [(23 + a, 23 + b) for a, b in face]
    bones += [(hand + a, hand + b) for hand in (91, 112) for a, b in fingers]

    swapped = [*range(133)]
    mirrored = [(left, left + 1) for left in range(1, 17, 2)] + [(17 + i, 20 + i) for i in range(3)]
    mirrored += [(91 + i, 112 + i) for i in range(21)]
    around = [(i, 16 - i) for i in range(8)] + [(17 + i, 26 - i) for i in range(5)] + [(31, 35), (32, 34)]
    around += [(36 + i, 45 - i) for i in range(4)] + [(40, 47), (41, 46)]
    around += [(48 + i, 54 - i) for i in range(3)] + [(55, 59), (56, 58), (60, 64), (61, 63), (65, 67)]
    for a, b in mirrored + [(23 + a, 23 + b) for a, b in around]:
        swapped[a], swapped[b] = b, a
    colours = np.random.RandomState(777).choice(256, 3 * 133).reshape(133, 3)
    return JointSet(tuple(bones), tuple(map(tuple, colours.tolist())), np.array(swapped))


JOINT_SETS = {NUM_JOINTS: OPENPOSE, 133: _wholebody()}
"""By how many joints they have."""


def joint_set(joints: np.ndarray) -> JointSet:
    """Of joints [n 3]. Raises InputError."""
    if len(joints) not in JOINT_SETS:
        raise InputError(f"a pose of {len(joints)} joints; known are sets of {', '.join(map(str, JOINT_SETS))}")
    return JOINT_SETS[len(joints)]
