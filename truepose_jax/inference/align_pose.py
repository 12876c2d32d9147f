"""A pose on another body: the limbs' directions of one person, the limbs' lengths and the place of another."""

from __future__ import annotations

import numpy as np

NECK, HIPS, ANKLES = 1, (8, 11), (10, 13)
TREE = (
    (1, 2, "shoulder"), (2, 3, "upper arm"), (3, 4, "forearm"), (1, 5, "shoulder"), (5, 6, "upper arm"), (6, 7, "forearm"),
    (1, 8, "trunk"), (8, 9, "thigh"), (9, 10, "shank"), (1, 11, "trunk"), (11, 12, "thigh"), (12, 13, "shank"),
    (1, 0, "head"), (0, 14, "face"), (14, 16, "face"), (0, 15, "face"), (15, 17, "face"),
)  # fmt: skip
"""Joint, the next one outwards, what the bone is called; left and right share a name."""
MOST = 1.6
"""By how much one bone's ratio may differ from the whole body's: beyond it a limb that points at the camera is taken for a short
one."""


def align_pose(joints: np.ndarray, source_joints: np.ndarray) -> np.ndarray:
    """The pose `joints` on the body of `source_joints`, both [18 3] (x, y, visible): float32 [18 3] in the source's pixels.

    A bone keeps its direction and its foreshortening: its length is multiplied by how much longer that bone (the longer one of
    left and right) is of the source. Of bones that one of them lacks, by the median of the others. The feet, or where ankles
    are missing the neck, stand where the source's do. Joints that are missing, and joints that hang on missing ones, keep their
    offset from the neck at the body's ratio. ValueError where neither neck nor anything else is shared.
    """
    ours, theirs = _lengths(joints), _lengths(source_joints)
    ratios = {bone: theirs[bone] / ours[bone] for bone in ours.keys() & theirs.keys() if ours[bone] > 0}
    if not ratios:
        raise ValueError("the two poses share no bone")
    body = float(np.median(list(ratios.values())))
    ratios = {bone: float(np.clip(ratio, body / MOST, body * MOST)) for bone, ratio in ratios.items()}
    seen = joints[:, 2] > 0
    root = joints[NECK, :2] if seen[NECK] else joints[seen, :2].mean(axis=0)
    placed = (joints[:, :2].astype(np.float64) - root) * body
    for inner, outer, bone in TREE:
        if seen[inner] and seen[outer]:
            placed[outer] = placed[inner] + (joints[outer, :2] - joints[inner, :2]) * ratios.get(bone, body)
    placed += _place(placed, seen, source_joints)
    out = np.zeros((len(joints), 3), np.float32)
    out[seen, :2], out[seen, 2] = placed[seen], 1
    return out


def _lengths(joints: np.ndarray) -> dict[str, float]:
    """{bone: pixels}, of a pair the longer one."""
    found: dict[str, float] = {}
    for inner, outer, bone in TREE:
        if joints[inner, 2] > 0 and joints[outer, 2] > 0:
            length = float(np.hypot(*(joints[outer, :2] - joints[inner, :2])))
            found[bone] = max(found.get(bone, 0.0), length)
    return found


def _place(placed: np.ndarray, seen: np.ndarray, source: np.ndarray) -> np.ndarray:
    """float [2]: by how much to move the pose so that it stands where the source's person does."""
    there = source[:, 2] > 0

    def middle(xy: np.ndarray, known: np.ndarray, joints: tuple[int, ...]) -> np.ndarray | None:
        rows = [i for i in joints if known[i]]
        return xy[rows].mean(axis=0) if rows else None

    for joints in (HIPS, (NECK,), tuple(range(len(seen)))):  # the middle of the body, from side to side
        ours, theirs = middle(placed, seen, joints), middle(source[:, :2], there, joints)
        if ours is not None and theirs is not None:
            move = theirs - ours
            break
    feet, ground = [i for i in ANKLES if seen[i]], [i for i in ANKLES if there[i]]
    if feet and ground:
        move[1] = source[ground, 1].max() - placed[feet, 1].max()
    elif seen[NECK] and there[NECK]:
        move[1] = source[NECK, 1] - placed[NECK, 1]
    return move
