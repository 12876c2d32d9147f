"""Work over many files in order: threads that read ahead, and no more of it in memory than a few batches."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from input_pipeline.schema import InputError

READERS = 4

Item, Result = TypeVar("Item"), TypeVar("Result")


def read_ahead(work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in order; at most `ahead` results wait. An exception of `work` comes out at its item."""
    later = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        waiting = collections.deque((item, pool.submit(work, item)) for item in itertools.islice(later, ahead))
        try:
            while waiting:
                item, result = waiting.popleft()
                waiting.extend((item, pool.submit(work, item)) for item in itertools.islice(later, 1))
                yield item, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def readable(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    ahead: int,
    unreadable: Callable[[Item, InputError], object],
) -> Iterator[tuple[Item, Result]]:
    """The same without the items of which `work` raises InputError; `unreadable` is told of them."""

    def read(item: Item) -> Result | InputError:
        try:
            return work(item)
        except InputError as error:
            return error

    for item, found in read_ahead(read, items, ahead=ahead):
        if isinstance(found, InputError):
            unreadable(item, found)
        else:
            yield item, found


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size`; the last may be shorter."""
    later = iter(items)
    while batch := list(itertools.islice(later, size)):
        yield batch
