"""Several photos of a person and several poses at once: what a canvas of four tiles is asked for, and how it is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from input_pipeline.annotations.photo import Framing
from input_pipeline.annotations.skeleton import draw_skeleton_uint8
from input_pipeline.batches.plans import TILES
from input_pipeline.schema import ImageRecord, InputError
from truepose_jax.inference.request import Fitted, Request
from truepose_jax.runtime.choices import FILLS

if TYPE_CHECKING:
    from truepose_jax.inference.pipeline import Run


@dataclasses.dataclass(frozen=True)
class Source:
    """A photo, uint8 [h w 3], and its own pose: joints [18 3] in a frame of `frame_hw` (None: the photo's size)."""

    photo: np.ndarray
    joints: np.ndarray
    frame_hw: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Pose:
    """A pose to make: joints [18 3] in a frame of `frame_hw` (None: the first photo's size)."""

    joints: np.ndarray
    frame_hw: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class FittedCanvas:
    """Four tiles at the model's size, the first `given` of them photos; wanted: the tiles whose pictures were asked for."""

    tiles: tuple[ImageRecord, ...]
    given: int
    wanted: tuple[int, ...]
    framing: Framing
    name: str
    seed: int

    def skeleton(self, tile: int) -> np.ndarray:
        """A tile's pose as the model sees it, uint8 [h w 3]."""
        hw = self.framing.out_hw
        return draw_skeleton_uint8(self.tiles[tile].joints, joints_hw=hw, out_hw=hw)


def fit_canvas(
    sources: Sequence[Source], poses: Sequence[Pose], run: Run, *, fill: str = "pose", seed: int = 0, name: str = ""
) -> FittedCanvas:
    """At most four sources and poses together, at least one of each; the texture comes from the first source, and pictures are
    framed as it is. What is not asked for is filled. Raises InputError."""
    n, m = len(sources), len(poses)
    if run.needs.draw != "canvas":
        method = run.config.model.method
        raise InputError(
            f"this run's method, {method}, takes one source and one pose; imagpose takes up to {TILES} together"
        )
    if n < 1 or m < 1 or n + m > TILES:
        raise InputError(
            f"{n} sources and {m} poses: a canvas has {TILES} tiles, so 1 to {TILES - 1} of each, {TILES} together"
        )
    if fill not in FILLS:
        raise InputError(f"fill is {fill!r}; choose one of {FILLS}")
    free = TILES - n - m
    shown = [*sources, *[sources[-1]] * (free if fill == "source" else 0)]

    def fit(source: Source, pose: Pose) -> Fitted:
        frame_hw, own = pose.frame_hw or sources[0].photo.shape[:2], source.frame_hw
        request = Request(source.photo, pose.joints, frame_hw=frame_hw, name=name, seed=seed)
        return run.fit(dataclasses.replace(request, source_joints=source.joints, source_frame_hw=own))

    fits = [fit(source, poses[0]) for source in shown]
    asked = [fit(sources[0], pose) for pose in poses]
    black = [dataclasses.replace(a.source, image=np.zeros_like(a.source.image), joints=a.joints) for a in asked]
    black += [black[-1]] * (TILES - len(shown) - m)
    tiles = (*(fit.source for fit in fits), *black)
    wanted = tuple(range(len(shown), len(shown) + m))
    return FittedCanvas(tiles, len(shown), wanted, fits[0].framing, name, seed)
