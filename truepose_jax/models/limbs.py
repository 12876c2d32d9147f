"""Limb coordinates: where a cell of a picture lies along and across every bone of a skeleton, as Fourier features.

Two cells that lie at the same place of the same limb have like features, whatever the poses, so that attention finds
what a limb wears without having learned it. Made from the 18 joints alone. Ours, not the paper's.

Lengths are in torso lengths (neck to the middle of the hips), so that moving or scaling a skeleton changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NECK, NOSE = 1, 0
HEAD = (0, 14, 15, 16, 17)
ARMS = ((2, 3, 4), (5, 6, 7))
LEGS = ((8, 9, 10), (11, 12, 13))
HIPS = (8, 11)

# start joint, end joint, its usual length, the width over which a cell counts as its own
BONES = (
    (1, 2, 0.35, 0.15), (2, 3, 0.60, 0.11), (3, 4, 0.50, 0.10),
    (1, 5, 0.35, 0.15), (5, 6, 0.60, 0.11), (6, 7, 0.50, 0.10),
    (1, 8, 1.00, 0.20), (8, 9, 0.85, 0.17), (9, 10, 0.80, 0.13),
    (1, 11, 1.00, 0.20), (11, 12, 0.85, 0.17), (12, 13, 0.80, 0.13),
    (1, 0, 0.45, 0.25),
)  # fmt: skip
OTHER_SIDE = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
"""The joint of the other side of the body, by OpenPose number."""

BACKGROUND_WIDTHS = 1.9
"""Bone widths from every bone at which a cell counts as background."""

BACKGROUND_FRAME = 2.7
"""Torso lengths of the background's coordinates over the picture's height: a usual person fills the picture."""

SHARPNESS = 20.0
"""By which bones that meet share pixels less than they share cells' features: positions, unlike features, do not add up."""

FREQUENCIES = 8
"""Per bone; every second of a scale of 0.12 and 0.4 torso lengths."""

PARTS = len(BONES) + 1
FEATURES = 2 * FREQUENCIES * PARTS
CONTEXT = FEATURES + 2 * PARTS + len(OTHER_SIDE) + 1


class Limbs(NamedTuple):
    """features [b n FEATURES] of length 1, for logits. context [b n CONTEXT], for a network: the features, how much each bone
    counts, signed by the facing too, which joints are visible, and the facing (1 seen from the front, -1 from behind)."""

    features: Array
    context: Array


def limb_coordinates(joints: Float[Array, "b 18 3"], *, image_hw: tuple[int, int], cells_hw: tuple[int, int]) -> Limbs:
    """joints: x, y in pixels of the picture, visible. n: the cells row by row. Any joints may be missing."""
    height = image_hw[0]
    bones, cells = _bones(joints, height), _centres(image_hw, cells_hw)
    on, across, nearness = _placed(bones, cells)
    background = jnp.full((*nearness.shape[:2], 1), -0.5 * BACKGROUND_WIDTHS**2)
    nearness = jnp.concatenate([nearness, background], axis=-1)
    counts = jnp.exp(nearness - jnp.max(nearness, axis=-1, keepdims=True))
    counts = counts / jnp.sum(counts, axis=-1, keepdims=True)

    rest = np.array([bone[2] for bone in BONES], np.float32)
    place = jnp.stack([on / bones.stretched[:, None] * rest, across / bones.unit[:, None, None]], axis=-1)
    framed = jnp.broadcast_to((cells / height * BACKGROUND_FRAME)[None, :, None], (*place.shape[:2], 1, 2))
    place = jnp.clip(jnp.concatenate([place, framed], axis=2), -3.0, 3.0)
    phases = jnp.einsum("bnpi,fi->bnpf", place, _frequencies())
    waves = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)
    features = waves * jnp.sqrt(counts / FREQUENCIES)[..., None]
    features = features.reshape(*features.shape[:2], FEATURES)

    per_cell = (features.shape[0], features.shape[1])
    visible = jnp.broadcast_to((joints[:, None, :, 2] > 0).astype(jnp.float32), (*per_cell, joints.shape[1]))
    front = jnp.broadcast_to(bones.facing[:, None, None], (*per_cell, 1))
    context = jnp.concatenate([2.0 * features, counts, counts * front, visible, front], axis=-1)
    return Limbs(features, context)


def limb_positions(
    source: Float[Array, "b 18 3"], target: Float[Array, "b 18 3"], *, image_hw: tuple[int, int]
) -> Float[Array, "b H W 2"]:
    """Where in the source's picture (x, y in pixels, a pixel's centre at + 0.5) the place of the limb lies that each pixel of
    the target's shows: the same share of the way along the bone, the same distance across it in torso lengths. Bones that
    meet share the pixels between them, so that joints bend smoothly. Joints as in `limb_coordinates`."""
    here, there = (_bones(joints, image_hw[0]) for joints in (source, target))
    on, across, nearness = _placed(there, _centres(image_hw, image_hw))
    share = jax.nn.softmax(SHARPNESS * nearness, axis=-1)
    inside = jnp.clip(on, 0.0, there.stretched[:, None])
    wider = (here.unit / there.unit)[:, None, None]
    on = inside * (here.length / there.stretched)[:, None] + (on - inside) * wider
    across = across * wider
    x = here.start[:, None, :, 0] + on * here.along[:, None, :, 0] + across * here.along[:, None, :, 1]
    y = here.start[:, None, :, 1] + on * here.along[:, None, :, 1] - across * here.along[:, None, :, 0]
    found = jnp.stack([jnp.sum(share * x, axis=-1), jnp.sum(share * y, axis=-1)], axis=-1)
    return found.reshape(-1, *image_hw, 2)


class _Bones(NamedTuple):
    """start, along [b bones 2] and length [b bones] in pixels; stretched: length, but at least a fifth of the usual one, for
    what a foreshortened bone shows is not stretched beyond five times; known [b bones]; unit [b], the torso's length; facing
    [b], 1 seen from the front, -1 from behind."""

    start: Array
    along: Array
    length: Array
    stretched: Array
    known: Array
    unit: Array
    facing: Array


def _bones(joints: Float[Array, "b 18 3"], height: int) -> _Bones:
    points, seen, unit, facing = _completed(joints.astype(jnp.float32), height)
    starts, ends = ([bone[i] for bone in BONES] for i in (0, 1))
    rest = np.array([bone[2] for bone in BONES], np.float32)
    along = points[:, ends] - points[:, starts]
    length = jnp.sqrt(jnp.sum(along**2, axis=-1) + 1e-6)
    stretched = jnp.maximum(length, 0.2 * unit[:, None] * rest)
    known = seen[:, starts] & seen[:, ends]
    return _Bones(points[:, starts], along / length[..., None], length, stretched, known, unit, facing)


def _centres(image_hw: tuple[int, int], cells_hw: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
    """x, y in pixels of the cells' centres, row by row."""
    (height, width), (h, w) = image_hw, cells_hw
    rows, columns = (np.arange(n, dtype=np.float32) + 0.5 for n in cells_hw)
    y, x = np.meshgrid(rows * height / h, columns * width / w, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def _placed(bones: _Bones, cells: Float[np.ndarray, "n 2"]) -> tuple[Array, Array, Array]:
    """[b n bones] each: pixels along the bone from its start, pixels across it, and the logit by which the cell is its own."""
    offset = cells[None, :, None] - bones.start[:, None]  # [b n bones 2]
    on = jnp.sum(offset * bones.along[:, None], axis=-1)
    across = offset[..., 0] * bones.along[:, None, :, 1] - offset[..., 1] * bones.along[:, None, :, 0]
    beyond = jnp.maximum(jnp.maximum(-on, on - bones.length[:, None]), 0.0)
    spread = np.array([bone[3] for bone in BONES], np.float32)
    distance = jnp.sqrt(across**2 + beyond**2 + 1e-6) / bones.unit[:, None, None] / spread
    return on, across, jnp.where(bones.known[:, None], -0.5 * distance**2, -50.0)


def _frequencies() -> Float[np.ndarray, "f 2"]:
    """Of a Gaussian kernel at each scale: quantiles of its radius, turned by the golden angle."""
    i = np.arange(FREQUENCIES)
    quantile = (i // 2 + 0.5) / (FREQUENCIES // 2)
    radius = np.sqrt(-2.0 * np.log(1.0 - quantile)) / np.where(i % 2 == 0, 0.12, 0.4)
    angle = i * np.pi * (3.0 - np.sqrt(5.0))
    return (radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)).astype(np.float32)


def _completed(joints: Float[Array, "b 18 3"], height: int):
    """(points [b 18 2], seen bool [b 18], torso length [b] in pixels, facing [b]): the nose's place taken by the middle of the
    head, missing elbows, wrists, knees and ankles put along the body. Seen from behind, sides are those of the picture:
    what lies left of a limb then lies left of it in a front view too, and no cell has to be mirrored."""
    seen = joints[..., 2] > 0
    weight = seen.astype(jnp.float32)
    points = joints[..., :2]

    def middle(of):
        of = np.array(of)
        total = jnp.sum(weight[:, of], axis=1)
        mean = jnp.sum(points[:, of] * weight[:, of, None], axis=1) / jnp.maximum(total, 1.0)[:, None]
        return mean, total > 0

    hips, has_hips = middle(HIPS)
    torso = hips - points[:, NECK]
    measured = jnp.sqrt(jnp.sum(torso**2, axis=-1) + 1e-6)
    known = has_hips & seen[:, NECK]
    unit = jnp.where(known, jnp.maximum(measured, 0.15 * height), 0.37 * height)
    down = jnp.where(known[:, None], torso / measured[:, None], jnp.array([0.0, 1.0]))
    step = unit[:, None] * down

    head, has_head = middle(HEAD)
    put = {NOSE: jnp.where(has_head[:, None], head, points[:, NECK] - 0.42 * step)}
    there = {NOSE: seen[:, NECK]}  # a head stands on every neck
    for limbs, first, second in ((ARMS, 0.58, 0.85), (LEGS, 0.83, 0.95)):
        for start, bend, end in limbs:
            put[bend] = jnp.where(seen[:, bend, None], points[:, bend], points[:, start] + first * step)
            onward = put[bend] + second * (put[bend] - points[:, start])
            put[end] = jnp.where(seen[:, end, None], points[:, end], onward)
            there[bend] = there[end] = seen[:, start]
    points = jnp.stack([put.get(i, points[:, i]) for i in range(joints.shape[1])], axis=1)
    seen = jnp.stack([there.get(i, seen[:, i]) for i in range(joints.shape[1])], axis=1)

    pairs = ((2, 5), HIPS)
    turned = sum(weight[:, r] * weight[:, left] * (points[:, left, 0] - points[:, r, 0]) for r, left in pairs)
    behind = turned < 0
    swap = np.array(OTHER_SIDE)
    points = jnp.where(behind[:, None, None], points[:, swap], points)
    seen = jnp.where(behind[:, None], seen[:, swap], seen)
    return points, seen, unit, jnp.where(behind, -1.0, 1.0)
