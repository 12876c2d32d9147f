"""What one group of a batch is made of: which photos, mirrored or not. A draw is a function of (seed, index, epoch)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from input_pipeline.schema import InputError

TILES = 4
"""Photos of one canvas."""

TRIES = 8
"""Draws of four photos until two differ; then the last is replaced."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One source and its targets (image indices), which of a canvas are its other tiles; flipped together, so that writing on
    clothes agrees."""

    source: int
    targets: tuple[int, ...]
    flip: bool


class Plan(Protocol):
    """An endless order of training: epochs of len() groups."""

    def __len__(self) -> int: ...

    def draw(self, index: int, epoch: int) -> Group: ...


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Draws group `index` of `epoch`: pair `index` with its own target, and more among the source's partners.

    So at one target per source an epoch is the list of pairs, and at k it shows each source k times as often,
    with every pair once at least. Draws are keyed by (seed, pair index, epoch).
    """

    pairs: np.ndarray
    seed: int
    targets_per_source: int
    flip: bool
    self_pair: float
    @functools.cached_property
    def _by_source(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs' sources [n], sorted, and their targets [n]."""
        sources, targets = np.ascontiguousarray(self.pairs[:, 0]), self.pairs[:, 1]
        if (sources[1:] >= sources[:-1]).all():
            return sources, targets
        order = np.argsort(sources, kind="stable")
        return sources[order], targets[order]

    def __len__(self) -> int:
        return len(self.pairs)

    def partners(self, source: int) -> np.ndarray:
        """Targets that `source` is paired with, in the order of the pairs."""
        sources, targets = self._by_source
        # Of the sources' type: else NumPy would convert all of them first.
        first, last = np.searchsorted(sources, np.array([source, source + 1], sources.dtype))
        return targets[first:last]

    def draw(self, index: int, epoch: int) -> Group:
        source, first = (int(i) for i in self.pairs[index])
        rng = np.random.default_rng((self.seed, index, epoch))
        flip = self.flip and bool(rng.random() < 0.5)
        targets = [first]
        if self.targets_per_source > 1:
            others = rng.permutation([t for t in self.partners(source) if t != first])
            # Without replacement where there are enough partners, else round and round.
            cycle = [first, *(int(t) for t in others)]
            targets = [cycle[i % len(cycle)] for i in range(self.targets_per_source)]
        if self.self_pair > 0:
            own = rng.random(len(targets)) < self.self_pair
            targets = [source if mine else target for target, mine in zip(targets, own, strict=True)]
        return Group(source, tuple(targets), flip)


@dataclasses.dataclass(frozen=True)
class CanvasPlan:
    """Draws four photos of group `index`: with replacement, two of them different at least (IMAGPose's code). An epoch is every
    group once."""

    groups: Sequence[np.ndarray]
    seed: int
    flip: bool

    def __len__(self) -> int:
        return len(self.groups)

    def draw(self, index: int, epoch: int) -> Group:
        group = self.groups[index]
        rng = np.random.default_rng((self.seed, index, epoch))
        flip = self.flip and bool(rng.random() < 0.5)
        for _ in range(TRIES):
            tiles = rng.choice(group, TILES)
            if len(set(tiles.tolist())) > 1:
                break
        else:
            tiles[-1] = rng.choice(group[group != tiles[0]])
        first, *others = (int(tile) for tile in tiles)
        return Group(first, tuple(others), flip)


def groups_of(pairs: np.ndarray, images: int) -> list[np.ndarray]:
    """Indices of the photos that pairs join, of one person in one outfit: the parts of the pairs' graph, in the order of their
    first photos. Raises InputError where no two photos are joined."""
    ones = np.ones(len(pairs), np.int8)
    _, part = connected_components(
        coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(images, images)), directed=False
    )
    order = np.argsort(part, kind="stable")
    found = np.split(order, np.flatnonzero(np.diff(part[order])) + 1)
    found = sorted((group for group in found if len(group) > 1), key=lambda group: group[0])
    if not found:
        raise InputError("no person of the image set has two usable photos, which a canvas of four needs")
    return found
