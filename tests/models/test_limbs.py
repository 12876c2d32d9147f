"""Limb coordinates: against loops over cells and bones, what they do not depend on, and what they tell apart."""

import functools

import numpy as np
import pytest

from tests import tiny
from tests.shared_data import standing_joints
from truepose_jax.models import limbs

HW, CELLS = (64, 48), (16, 12)


@functools.cache
def program(image_hw, cells_hw):
    return tiny.jit(lambda joints: limbs.limb_coordinates(joints, image_hw=image_hw, cells_hw=cells_hw))


def of(joints, image_hw=HW, cells_hw=CELLS):
    """Of one skeleton, or of an array of them."""
    many = np.ndim(joints) == 3
    found = program(image_hw, cells_hw)(np.asarray(joints if many else [joints], np.float32))
    return found if many else limbs.Limbs(*(x[0] for x in found))


def person(*, without=(), moved=None):
    """Standing, with some joints missing and some elsewhere: {joint: (x, y)}."""
    joints = standing_joints(*HW)
    for joint, place in (moved or {}).items():
        joints[joint, :2] = place
    joints[list(without)] = 0
    return joints


def from_behind(joints):
    """The same outline, seen from behind: every joint is named by the other side."""
    return joints[list(limbs.OTHER_SIDE)]


LYING = person()[:, [1, 0, 2]] * (0.7, 0.7, 1)
ONE_MISSING = [person(without=[joint]) for joint in range(18)]
SKELETONS = {
    "whole": person(),
    "behind": from_behind(person(moved={4: (3, 9)})),
    "lying": LYING,
    "nothing": person(without=range(18)),
    "no elbows": person(without=[3, 6]),
    "no forearms or shins": person(without=[3, 4, 10, 13]),
    "no hips": person(without=[8, 11]),
    "one hip": person(without=[11]),
    "no neck": person(without=[1]),
    "an ear of the head": person(without=[0, 14, 15, 16]),
    "no head": person(without=limbs.HEAD),
    "a short torso": person(moved={8: (22, 17), 11: (26, 17)}),
    "two joints at one place": person(moved={9: person()[8, :2]}),
}


def by_loops(joints, image_hw, cells_hw):
    """(features [n 224], weights [n 14]) by the recipe, in float64, one cell and one bone after the other."""
    height, width = image_hw
    places = {i: np.array(joints[i, :2], float) for i in range(18)}
    seen = {i: joints[i, 2] > 0 for i in range(18)}
    there = dict(seen)

    def mean(of):
        found = [places[i] for i in of if seen[i]]
        return sum(found) / len(found) if found else None

    hips, head = mean((8, 11)), mean((0, 14, 15, 16, 17))
    unit, down = 0.37 * height, np.array([0.0, 1.0])
    if hips is not None and seen[1]:
        torso = np.linalg.norm(hips - places[1])
        unit, down = max(torso, 0.15 * height), (hips - places[1]) / torso
    right_of = [joints[left, 0] - joints[right, 0] for right, left in ((2, 5), (8, 11)) if seen[right] and seen[left]]
    behind = sum(right_of) < 0
    places[0] = places[1] - 0.42 * unit * down if head is None else head
    there[0] = seen[1]
    for a, b, c, first, second in (
        *((*arm, 0.58, 0.85) for arm in ((2, 3, 4), (5, 6, 7))),
        *((*leg, 0.83, 0.95) for leg in ((8, 9, 10), (11, 12, 13))),
    ):
        if not seen[b]:
            places[b] = places[a] + first * unit * down
        if not seen[c]:
            places[c] = places[b] + second * (places[b] - places[a])
        there[b] = there[c] = seen[a]
    if behind:
        sides = {2: 5, 3: 6, 4: 7, 8: 11, 9: 12, 10: 13}
        swap = {i: i for i in range(18)} | sides | {b: a for a, b in sides.items()}
        places, there = {i: places[swap[i]] for i in places}, {i: there[swap[i]] for i in there}

    frequencies = []
    for i in range(8):
        radius = np.sqrt(-2 * np.log(1 - (i // 2 + 0.5) / 4)) / (0.4 if i % 2 else 0.12)
        angle = i * np.pi * (3 - np.sqrt(5))
        frequencies.append((radius * np.cos(angle), radius * np.sin(angle)))

    def waves(u, v):
        phases = [f * min(max(u, -3), 3) + g * min(max(v, -3), 3) for f, g in frequencies]
        return np.array([np.cos(p) for p in phases] + [np.sin(p) for p in phases])

    features, weights = [], []
    for row in range(cells_hw[0]):
        for column in range(cells_hw[1]):
            cell = np.array([(column + 0.5) * width / cells_hw[1], (row + 0.5) * height / cells_hw[0]])
            near, each = [], []
            for start, end, rest, spread in limbs.BONES:
                bone = places[end] - places[start]
                length = np.sqrt(bone @ bone + 1e-6)
                x, y = bone / length
                offset = cell - places[start]
                along, across = offset @ (x, y), offset[0] * y - offset[1] * x
                beyond = max(-along, along - length, 0)
                distance = np.sqrt(across**2 + beyond**2 + 1e-6) / unit / spread
                near.append(-(distance**2) / 2 if there[start] and there[end] else -50)
                each.append(waves(along / max(length, 0.2 * unit * rest) * rest, across / unit))
            near.append(-(1.9**2) / 2)
            each.append(waves(*(cell / height * 2.7)))
            counts = np.exp(np.array(near) - max(near))
            counts /= counts.sum()
            weights.append(counts)
            features.append(np.concatenate([w * np.sqrt(c / 8) for w, c in zip(each, counts, strict=True)]))
    return np.array(features), np.array(weights), behind


@pytest.mark.parametrize("name", SKELETONS)
def test_against_loops(name):
    joints = SKELETONS[name]
    found = of(joints)
    features, weights, behind = by_loops(joints.astype(np.float64), HW, CELLS)
    np.testing.assert_allclose(found.features, features, atol=2e-4)
    front = -1.0 if behind else 1.0
    visible = np.broadcast_to(joints[:, 2] > 0, (len(features), 18))
    context = [2 * features, weights, weights * front, visible, np.full((len(features), 1), front)]
    np.testing.assert_allclose(found.context, np.concatenate(context, axis=1), atol=4e-4)
    assert found.features.shape[1] == limbs.FEATURES == 224 and found.context.shape[1] == limbs.CONTEXT == 271


def test_length_1_and_finite_whatever_is_missing():
    """Every joint alone missing, all missing, and joints that say nothing of where they are (0, 0)."""
    found = of(np.array([*SKELETONS.values(), *ONE_MISSING]))
    assert np.isfinite(found.features).all() and np.isfinite(found.context).all()
    np.testing.assert_allclose(np.linalg.norm(found.features, axis=-1), 1, atol=1e-5)


def test_scaling_picture_and_skeleton_changes_nothing():
    large = person() * (3, 3, 1)
    found = of(large, image_hw=(3 * HW[0], 3 * HW[1]))
    np.testing.assert_allclose(found.features, of(person()).features, atol=1e-3)


def grid(x):
    return x.reshape(*CELLS, -1)


def test_moving_a_skeleton_by_whole_cells_moves_its_features():
    """Down by two cells and right by one (of 4x4 pixels). The background's own frame stays: it is compared alone."""
    here = of(person())
    there = of(person() + (4, 8, 0))
    bones = slice(0, -2 * limbs.FREQUENCIES)
    np.testing.assert_allclose(grid(there.features)[2:, 1:, bones], grid(here.features)[:-2, :-1, bones], atol=1e-4)
    by_weight = slice(limbs.FEATURES, limbs.FEATURES + limbs.PARTS)
    np.testing.assert_allclose(
        grid(there.context)[2:, 1:, by_weight], grid(here.context)[:-2, :-1, by_weight], atol=1e-5
    )


def test_the_same_place_of_a_limb_in_another_pose():
    """Half-way along a forearm that points up, then down: of all cells of the other picture its own is the most like it.
    What keeps it from 1 is the background, a seventh of what counts there."""
    up = person(moved={2: (16.5, 16.5), 3: (4.5, 16.5), 4: (4.5, 4.5)})
    down = person(moved={2: (16.5, 16.5), 3: (4.5, 20.5), 4: (4.5, 32.5)})
    first, second = of(np.array([up, down]), cells_hw=HW).features.reshape(2, *HW, -1)
    alike = second @ first[10, 4]
    assert np.unravel_index(alike.argmax(), HW) == (26, 4) and alike.max() > 0.85
    others = {"elbow": (20, 4), "wrist": (32, 4), "other arm": (20, 31), "knee": (48, 20), "background": (58, 44)}
    assert all(alike[place] < 0.6 for place in others.values()), {name: alike[at] for name, at in others.items()}


def test_seen_from_behind_sides_are_those_of_the_picture():
    """The same outline gives the same features, so that no cell has to be mirrored; the facing tells them apart."""
    found = of(np.array([person(), from_behind(person())]))
    np.testing.assert_allclose(found.features[1], found.features[0], atol=1e-5)
    assert np.all(found.context[0, :, -1] == 1) and np.all(found.context[1, :, -1] == -1)
    signed = slice(limbs.FEATURES + limbs.PARTS, limbs.FEATURES + 2 * limbs.PARTS)
    np.testing.assert_allclose(found.context[1, :, signed], -found.context[0, :, signed], atol=1e-6)


# --- positions ---------------------------------------------------------------------------------------------------------


@functools.cache
def positions_program():
    return tiny.jit(lambda source, target: limbs.limb_positions(source, target, image_hw=HW))


def positions(source, target):
    """Of one pair of skeletons: [H W 2]."""
    return positions_program()(*(np.asarray([joints], np.float32) for joints in (source, target)))[0]


CENTRES = np.stack(np.meshgrid(np.arange(HW[1]) + 0.5, np.arange(HW[0]) + 0.5), axis=-1)


def positions_by_loops(source, target, pixel):
    """One pixel's, in float64; both skeletons whole and from the front."""

    def bones(joints):
        at = joints[:, :2].astype(float)
        unit = np.linalg.norm((at[8] + at[11]) / 2 - at[1])
        at[0] = at[[0, 14, 15, 16, 17]].mean(axis=0)
        return unit, [(at[a], at[b] - at[a], rest, spread) for a, b, rest, spread in limbs.BONES]

    (here, sources), (there, targets) = bones(source), bones(target)
    logits, places = [], []
    for (a, bone, *_), (start, goal, rest, spread) in zip(sources, targets, strict=True):
        length, x = np.linalg.norm(goal), np.asarray(pixel) - start
        on, across = x @ goal / length, (x[0] * goal[1] - x[1] * goal[0]) / length
        beyond = max(-on, on - length, 0)
        logits.append(-20 * (across**2 + beyond**2) / (there * spread) ** 2 / 2)
        most = max(length, 0.2 * there * rest)
        inside = min(max(on, 0), most)
        on = inside / most * np.linalg.norm(bone) + (on - inside) * here / there
        (u, v), across = bone / np.linalg.norm(bone), across * here / there
        places.append(a + on * np.array([u, v]) + across * np.array([v, -u]))
    weights = np.exp(np.array(logits) - max(logits))
    return weights @ np.array(places) / weights.sum()


def test_positions_against_loops():
    other = person(moved={3: (9, 13), 4: (7, 5), 0: (25, 6), 9: (18, 43), 10: (15, 55)}) * (0.8, 0.9, 1) + (3, 4, 0)
    found = positions(person(), other)
    for x, y in ((24, 20), (9, 14), (20, 40), (21, 9), (2, 60), (30, 33)):
        wanted = positions_by_loops(person(), other, (x + 0.5, y + 0.5))
        np.testing.assert_allclose(found[y, x], wanted, atol=2e-3)


def test_a_pose_onto_itself_moves_nothing_and_a_moved_one_everything():
    np.testing.assert_allclose(positions(person(), person()), CENTRES, atol=1e-3)
    np.testing.assert_allclose(positions(person(), person() + (3, -2, 0)), CENTRES - (3, -2), atol=1e-3)
    np.testing.assert_allclose(positions(person(), person() * (0.5, 0.5, 1)), 2 * CENTRES, atol=1e-2)


def test_seen_from_behind_nothing_is_mirrored():
    np.testing.assert_allclose(positions(person(), from_behind(person())), CENTRES, atol=1e-3)


def test_positions_are_finite_whatever_is_missing():
    many = np.array([*SKELETONS.values(), *ONE_MISSING], np.float32)
    pairs = many, many[::-1]
    for source, target in (pairs, pairs[::-1]):
        assert np.isfinite(positions_program()(source, target)).all()
