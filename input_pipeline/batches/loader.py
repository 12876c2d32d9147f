"""The order of training: a function of (seed, step) alone, on any number of hosts, from any step on.

Grain's MapDataset gives random access to an endless list of groups (shuffle, reseeded each epoch); a step's
batch is a slice of that list, so resuming needs a step and nothing else. Threads fill whole batches ahead of
the trainer.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np

from input_pipeline.batches.plans import CanvasPlan, Group, GroupPlan, Plan, groups_of
from input_pipeline.batches.readers import Reader, RecordTokens, make_reader
from input_pipeline.batches.transforms import write_source, write_target, write_views
from input_pipeline.fields import FIELDS, Layout
from input_pipeline.records.encode import end_with_parent
from input_pipeline.schema import ImageRecord, ImageSet, InputError, TokenTable

Batch = dict[str, np.ndarray]

ENDLESS = 1 << 48
"""Groups until the loader would end. Grain's own endless repeat overflows where a batch is one group."""

PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What the trainer answers by saving, and its workers leave to it."""


class RecordCache:
    """An image set that keeps what it has read, up to `max_bytes`: for sets that fit into memory."""

    def __init__(self, images: ImageSet, *, max_bytes: int):
        self.labels, self.pairs = images.labels, images.pairs
        self._images, self._records, self._room, self._max_bytes = images, {}, max_bytes, max_bytes

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: loader processes begin with an empty cache instead of a copy of gigabytes."""
        return vars(self) | {"_records": {}, "_room": self._max_bytes}

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> ImageRecord:
        record = self._records.get(index)
        if record is None:
            record = self._images.image(index)
            size = record.image.nbytes + record.parsing.nbytes + record.joints.nbytes
            if size <= self._room:
                self._room -= size
                self._records[index] = record
        return record


@dataclasses.dataclass(frozen=True)
class BatchWriter:
    """Turns groups into a batch of the reader's layout.

    A record that cannot be read keeps its slot: zeros, valid = 0, and one line in the log. Where there are more of them than
    config.data.max_invalid allows, the run ends (training/run_log.py).
    """

    reader: Reader
    complained: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, groups: Sequence[Group], *, targets_per_source: int, rows: int | None = None) -> Batch:
        """The batch of these groups; `rows` > len(groups) leaves empty groups at the end."""
        k, reader, drawing = targets_per_source, self.reader, self.reader.layout.drawing
        rows = rows or len(groups)
        shapes = reader.layout.shapes(batch_size=rows * k, targets_per_source=k, size=reader.size)
        # Rows are written whole, so the memory is not cleared before: a tenth of the time.
        batch = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        batch["valid"].fill(0)
        read = np.zeros(rows, bool)
        for row, group in enumerate(groups):
            found = self._read(reader.source, group.source, flip=group.flip)
            if found is None:
                continue
            source, tokens = found
            read[row] = True
            write_source(batch, row, source, tokens, hw=reader.size)
            targets = [
                source if index == group.source else self._read(reader.target, index, flip=group.flip)
                for index in group.targets
            ]
            if "views" in reader.layout:
                if all(targets):
                    write_views(batch, row, [source, *targets], shown=1, hw=reader.size, drawing=drawing)
                    write_target(batch, row, targets[0], reader.labels, hw=reader.size, drawing=drawing)
                continue
            for i, target in enumerate(targets):
                if target is not None:
                    write_target(batch, row * k + i, target, reader.labels, hw=reader.size, drawing=drawing)
        for name, array in batch.items():
            array[~read if FIELDS[name].shape[0] == "s" else batch["valid"] == 0] = 0
        return batch

    def _read(self, read: Callable[..., Any], index: int, *, flip: bool) -> Any:
        try:
            return read(index, flip=flip)
        except InputError as error:
            if index not in self.complained:
                self.complained.add(index)
                logging.warning("%s (its rows weigh nothing)", error)
            return None


def make_loader(
    images: ImageSet,
    tokens: TokenTable | RecordTokens | None,
    layout: Layout,
    *,
    seed: int,
    batch_size: int,
    draw: str = "pairs",
    targets_per_source: int = 1,
    flip: bool = False,
    self_pair: float = 0.0,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 2,
    workers: int = 0,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """Endless batches of the layout, as NumPy arrays, from `start_step` on. tokens: None where the layout has none.

    draw "pairs", or "canvas": four photos of one person a row. batch_size: global, in targets. targets_per_source: rows that
    share a source; source arrays have batch_size / targets_per_source rows. self_pair: probability that a target is its own
    source. Each host
    gets its contiguous rows of the one global batch. threads: batches filled at once ahead of use; 0 fills in
    the caller. workers: processes that fill them, with `threads` each (0: this one; on few cores threads are faster);
    outside programs of absl, absl.flags.FLAGS.mark_as_parsed() must come first. Neither changes a batch. Raises
    InputError where the sizes do not divide, the set has no pairs, or flips lack their tokens.
    """
    if batch_size % (targets_per_source * host_count):
        raise InputError(
            f"batch_size {batch_size} is not a multiple of targets_per_source {targets_per_source} x {host_count} hosts"
        )
    if flip and tokens is not None and not tokens.has_flipped:
        raise InputError("flip needs the region tokens of the mirrored photos (TokenTable.flipped_rows)")
    writer = BatchWriter(make_reader(images, tokens, layout))
    pairs = check_pairs(images.pairs, len(images))
    plan: Plan = GroupPlan(pairs, seed, targets_per_source, flip, self_pair)
    if draw == "canvas":
        plan = CanvasPlan(groups_of(pairs, len(images)), seed, flip)

    groups = grain.MapDataset.range(len(plan)).seed(seed)
    groups = (groups.shuffle() if shuffle else groups).repeat(ENDLESS // len(plan) + 1)
    groups = groups.map_with_index(lambda position, index: plan.draw(int(index), position // len(plan)))
    local = batch_size // targets_per_source // host_count
    batches = groups.batch(local, batch_fn=tuple)
    batches = batches.slice(slice(start_step * host_count + host_index, None, host_count))
    batches = batches.map(lambda chosen: writer(chosen, targets_per_source=targets_per_source))
    filled = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not workers:
        return iter(filled)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return _signals_held_at_start(iter(filled.mp_prefetch(options, worker_init_fn=_leave_signals_to_the_parent)))


def _signals_held_at_start(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches. Workers start with the first, by threads of grain; both inherit this thread's blocked signals,
    without which one that comes before a worker has run _leave_signals_to_the_parent would end it."""
    resource_tracker.ensure_running()  # or the first worker's start would, and unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        first = next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield first
    yield from batches


def _leave_signals_to_the_parent(index: int, count: int) -> None:
    """In a worker: Ctrl-C and a whole job step's SIGTERM reach it too, and the trainer needs batches until it has saved.

    grain ends its workers by an event and then by SIGKILL; after a trainer that was killed outright they end themselves.
    """
    del index, count
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def eval_batches(
    images: ImageSet, tokens: TokenTable | RecordTokens | None, layout: Layout, pairs: np.ndarray, batch_size: int
) -> Iterator[Batch]:
    """The pairs int [n 2] in order, not flipped; the last batch is filled up with valid = 0."""
    writer = BatchWriter(make_reader(images, tokens, layout))
    pairs = check_pairs(pairs, len(images))
    for start in range(0, len(pairs), batch_size):
        chosen = [
            Group(int(source), (int(target),), flip=False) for source, target in pairs[start : start + batch_size]
        ]
        yield writer(chosen, targets_per_source=1, rows=batch_size)


def check_pairs(pairs: np.ndarray, images: int) -> np.ndarray:
    """The pairs as int [n 2]; InputError where there are none or one names an image that does not exist."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise InputError(f"the image set has no pairs (shape {pairs.shape}); expected [n 2] with n > 0")
    if pairs.min() < 0 or pairs.max() >= images:
        wrong = pairs.min() if pairs.min() < 0 else pairs.max()
        raise InputError(f"pairs name image {wrong}, but the set has {images}, numbered from 0")
    return pairs
