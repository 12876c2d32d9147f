"""Makes the pictures of a server: one request after the other, so many waiting and no more, for page and HTTP alike."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from input_pipeline.schema import InputError
from truepose_jax.inference import hub
from truepose_jax.inference.photo_requests import AUTO, PhotoOptions
from truepose_jax.inference.pipeline import Pipeline, Run
from truepose_jax.runtime.bundled import SHIPPED

MOST_STEPS, MOST_PICTURES = 200, 8
PARSINGS = {AUTO: AUTO, "none": None}


class Busy(Exception):
    """More wait than may."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a request asks for. source, pose: read once it is its turn, so that waiting ones hold no pixels; pose gives a photo,
    uint8 [h w 3], or joints [18 3] in a frame of frame_hw. model "": the first. Others: as Pipeline's."""

    source: Callable[[], np.ndarray]
    pose: Callable[[], np.ndarray]
    frame_hw: tuple[int, int] | None = None
    model: str = ""
    parsing: str = AUTO
    seed: int = 0
    num: int = 1
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    options: PhotoOptions = PhotoOptions()

    def __post_init__(self):
        if self.parsing not in PARSINGS:
            raise InputError(f"parsing is {self.parsing!r}; choose one of {', '.join(PARSINGS)}")
        if not 1 <= self.num <= MOST_PICTURES:
            raise InputError(f"num is {self.num}; it must be from 1 to {MOST_PICTURES}")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise InputError(f"steps is {self.steps}; it must be from 1 to {MOST_STEPS}")


class Engine:
    """runs: {name: an open run}, the first of which is what is used where no model is named. waiting: how many may wait."""

    def __init__(self, runs: dict[str, Run], waiting: int):
        if waiting < 0:
            raise InputError(f"--waiting is {waiting}; it must be 0 or more")
        self.runs, self.waiting, self._pipelines = runs, waiting, {}
        self._turn, self._places = threading.Lock(), threading.BoundedSemaphore(waiting + 1)

    @classmethod
    def open(cls, workdirs: Sequence[str], waiting: int) -> Engine:
        """Opens the runs, and loads the first. Raises InputError, CheckpointError and ConfigError."""
        runs: dict[str, Run] = {}
        for workdir in workdirs or [str(SHIPPED)]:
            name = os.path.basename(os.path.abspath(workdir))
            if name in runs:
                raise InputError(f"--workdir={workdir}: a model is called {name} already; rename one of the folders")
            runs[name] = Run.open(hub.fetch(workdir))
        engine = cls(runs, waiting)
        engine._pipeline("")
        return engine

    def make(self, ask: Ask, callback: Callable[[int, int], None] | None = None) -> list[np.ndarray]:
        """uint8 [h w 3] each, of ask.seed and those after it. Raises Busy at once where too many wait, and InputError."""
        if ask.model and ask.model not in self.runs:
            raise InputError(f"there is no model {ask.model[:60]!r}; there are {', '.join(self.runs)}")
        if not self._places.acquire(blocking=False):
            raise Busy("too many requests wait already; try again in a while")
        try:
            with self._turn:
                return self._pipeline(ask.model)(
                    ask.source(),
                    PARSINGS[ask.parsing],
                    ask.pose(),
                    frame_hw=ask.frame_hw,
                    steps=ask.steps,
                    guidance=ask.guidance,
                    sampler=ask.sampler,
                    seed=ask.seed,
                    num=ask.num,
                    options=ask.options,
                    # One program for page and HTTP: with and without a callback they differ by the last bits.
                    callback=callback or (lambda done, steps: None),
                )
        finally:
            self._places.release()

    def _pipeline(self, name: str) -> Pipeline:
        name = name or next(iter(self.runs))
        if name not in self._pipelines:
            self._pipelines[name] = Pipeline.of_run(self.runs[name])
        return self._pipelines[name]


def png(picture: np.ndarray) -> bytes:
    """The file that `generate` writes of a picture."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()
