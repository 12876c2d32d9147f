"""Coverage per cell and the mask M against brute force over pixels, at sizes that halve unevenly."""

import functools

import jax
import numpy as np
import pytest

from truepose_jax.models import masks

coverage_levels = functools.partial(jax.jit, static_argnames=("num_classes", "factor", "levels"))(masks.coverage_levels)
parsing_mask = jax.jit(masks.parsing_mask)

CLASSES = 20


def random_map(seed, hw, blobs=14):
    rng = np.random.default_rng(seed)
    found = np.zeros((2, *hw), np.uint8)
    for each in found:
        for label in rng.integers(0, 18, blobs):
            top, left = rng.integers(0, hw[0]), rng.integers(0, hw[1])
            each[top : top + rng.integers(2, hw[0]), left : left + rng.integers(2, hw[1] // 2)] = label
        each[-1, -1] = 18  # one pixel of its own
    return found


def brute_force(parsing, side):
    """[h w p]: share of the pixels of each side x side cell (cut at the edge) that have each label."""
    h, w = parsing.shape
    found = np.zeros((-(-h // side), -(-w // side), CLASSES))
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            cell = parsing[i * side : (i + 1) * side, j * side : (j + 1) * side]
            found[i, j] = np.bincount(cell.reshape(-1), minlength=CLASSES) / cell.size
    return found


def brute_force_mask(cells, class_on):
    """M [n] of coverages [n p]: half of the cell, or the best cell of a switched-on class."""
    found = []
    for cell in cells:
        found.append(sum(share for share, on in zip(cell, class_on, strict=True) if on) >= 0.5 - 1e-6)
    for label in np.flatnonzero(class_on):
        if max(cells[:, label]) > 0:
            found[int(np.argmax(cells[:, label]))] = True
    return np.array(found)


@pytest.mark.parametrize(
    "hw,factor,sizes",
    [
        ((512, 352), 8, [(64, 44), (32, 22), (16, 11), (8, 6)]),  # 11 -> 6: uneven
        ((256, 176), 8, [(32, 22), (16, 11), (8, 6), (4, 3)]),  # 11 -> 6 -> 3: uneven twice
        ((64, 44), 4, [(16, 11), (8, 6), (4, 3)]),
        ((20, 36), 4, [(5, 9), (3, 5), (2, 3), (1, 2), (1, 1)]),
    ],
)
def test_coverage(hw, factor, sizes):
    maps = random_map(1, hw)
    levels = coverage_levels(maps, num_classes=CLASSES, factor=factor, levels=len(sizes))
    assert [level.shape for level in levels] == [(2, *size, CLASSES) for size in sizes]
    for depth, level in enumerate(levels):
        np.testing.assert_allclose(np.sum(level, axis=-1), 1, rtol=1e-6)
        for row, parsing in zip(level, maps, strict=True):
            np.testing.assert_allclose(row, brute_force(parsing, factor * 2**depth), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hw,factor,levels", [((64, 44), 8, 3), ((32, 22), 2, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_mask(hw, factor, levels, seed):
    """On where the switched-on classes have half of a cell's pixels, or where one of them has its best cell."""
    maps = random_map(seed, hw)
    class_on = np.random.default_rng(seed).random((2, CLASSES)) < 0.4
    class_on[:, 18] = True
    rescued = 0
    for level in coverage_levels(maps, num_classes=CLASSES, factor=factor, levels=levels):
        got = np.asarray(parsing_mask(level, class_on))
        for b in range(2):
            cells = np.asarray(level[b], np.float64).reshape(-1, CLASSES)
            want = brute_force_mask(cells, class_on[b])
            np.testing.assert_array_equal(got[b], want)
            rescued += np.sum(want & (cells[:, class_on[b]].sum(axis=1) < 0.5 - 1e-6))
    assert rescued, "no class needed its best cell: the test would see nothing"


def test_half_a_cell_is_enough_and_less_is_not():
    parsing = np.zeros((2, 8, 8), np.uint8)
    parsing[0, :, :2] = 5  # 50 % of the left cells
    parsing[1, :, :2] = 5
    parsing[1, 0, 0] = 0  # 7 of 16 pixels of the upper left cell
    (level,) = coverage_levels(parsing, num_classes=CLASSES, factor=4, levels=1)
    on = np.broadcast_to(np.arange(CLASSES) == 5, (2, CLASSES))
    np.testing.assert_array_equal(parsing_mask(level, on), [[True, False, True, False], [False, False, True, False]])
    # Two classes count together.
    parsing[1, 0, 0] = 6
    (level,) = coverage_levels(parsing, num_classes=CLASSES, factor=4, levels=1)
    both = on | (np.arange(CLASSES) == 6)
    np.testing.assert_array_equal(parsing_mask(level, both)[1], [True, False, True, False])


def test_nothing_on_is_an_empty_mask():
    for level in coverage_levels(random_map(0, (32, 22)), num_classes=CLASSES, factor=2, levels=4):
        assert not np.any(parsing_mask(level, np.zeros((2, CLASSES), bool)))
        assert np.all(parsing_mask(level, np.ones((2, CLASSES), bool)))


def test_a_cell_that_is_exactly_half_covered_is_on():
    """Of 192 pixels, 32 for each of three classes: the rounded shares 1/6 sum to less than 0.5 in some order."""
    coverage = np.zeros((1, 1, 2, CLASSES), np.float32)
    for classes in range(1, 17):
        coverage[0, 0, 0] = 0.0
        coverage[0, 0, 0, 1 : classes + 1] = np.float32(0.5 / classes)
        coverage[0, 0, 1, 1 : classes + 1] = 1.0  # the best cell of each class, on by the other rule
        class_on = np.arange(CLASSES)[None] > 0
        assert np.all(parsing_mask(coverage, class_on)), classes
