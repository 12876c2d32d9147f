"""From the items of a raw set to the fields of their records, in parallel and in order."""

from __future__ import annotations

import collections
import io
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline.annotations.parsing import label_set, whole_photo
from input_pipeline.annotations.photo import fit_photo
from input_pipeline.annotations.plausibility import judge
from input_pipeline.annotations.regions import region_boxes
from input_pipeline.annotations.run_lengths import encode_runs
from input_pipeline.records.schema import new_fields
from input_pipeline.schema import InputError
from input_pipeline.sources.base import Dropped, Item, RawPicture, Unusable

CHUNK = 16
"""Images a worker reads at a time."""

DOUBTS = "doubts"
"""Beside the fields of a record: what plausibility.judge says of it. Not stored; counted in the report."""

JPEG_QUALITY = 95
"""Of photos that had to be encoded again; with full colour resolution (4:4:4)."""


def read_items(items: Sequence[Item], labels: str, size, workers: int) -> Iterator[dict[str, Any] | Dropped]:
    """The fields of every item and its DOUBTS, in order; a Dropped where it cannot be read."""
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    if workers <= 1:
        for chunk in chunks:
            for item in chunk:
                yield make_fields(item, labels, size)
        return
    # Spawned, not forked: the annotators' threads (JAX's, torch's) do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    waiting: collections.deque = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_make_chunk, chunk, labels, size))
            if len(waiting) > 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was ended from outside (too little memory?); run the same command again, "
            "perhaps with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Ends this worker process when its parent is killed; it would wait for work, or for a reader, for ever."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_chunk(items: Sequence[Item], labels: str, size) -> list[dict[str, Any] | Dropped]:
    return [make_fields(item, labels, size) for item in items]


def make_fields(item: Item, labels: str, size: tuple[int, int] | None) -> dict[str, Any] | Dropped:
    """The fields of the record of one image, and DOUBTS; a Dropped where it cannot be read."""
    try:
        picture = item.load()
    except Unusable as error:
        return Dropped(item.name, error.reason, error.detail, getattr(item, "photo", ""))
    picture = fitted(picture, size)
    hw = picture.image.shape[:2]
    parsing = whole_photo(hw) if picture.parsing is None else picture.parsing
    boxes, valid = region_boxes(parsing, label_set(labels))
    doubts = judge(picture.joints, picture.parsing, label_set(labels), hw)
    return {DOUBTS: doubts} | new_fields(
        image=picture.jpeg or encode_jpeg(picture.image),
        parsing=b"" if picture.parsing is None else encode_runs(picture.parsing),
        joints=picture.joints,
        size=hw,
        name=item.name,
        identity=item.identity,
        boxes=np.where(valid[:, None], boxes, 0),
    )


def fitted(picture: RawPicture, size: tuple[int, int] | None) -> RawPicture:
    """The picture at `size` (h, w); it keeps its bytes where it has that size already."""
    if size is None or picture.image.shape[:2] == tuple(size):
        return picture
    parsing = np.zeros(picture.image.shape[:2], np.uint8) if picture.parsing is None else picture.parsing
    image, parsing, joints, _ = fit_photo(picture.image, parsing, picture.joints, tuple(size))
    return RawPicture(image, None if picture.parsing is None else parsing, joints)


def encode_jpeg(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return data.getvalue()
