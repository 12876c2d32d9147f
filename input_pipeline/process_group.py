"""Work over many files that several processes do side by side, each its own share, with a word to one another at a few places.

What is here is the one process that does everything; `truepose_jax.runtime.distributed.Several` is one of several.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


class Share:
    """What a process has to do of a piece of work, and how it meets the others: here all of it, and there are no others.

    index, count: which process of how many. All processes call `meet`, `agree` and `lead` equally often, in one order.
    """

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Is this the process that prints, and writes what there is once?"""
        return self.index == 0

    def has(self, number: int) -> bool:
        """Is piece `number` of the whole work (not of what is left of it) this process's?

        A function of the number and the count of processes alone: every piece is exactly one process's, whoever starts
        late, and neighbours, which take about equally long, go to different ones.
        """
        return number % self.count == self.index

    def mine(self, items: Iterable[Item]) -> list[Item]:
        """The items that are this process's, in their order."""
        return [item for number, item in enumerate(items) if self.has(number)]

    def check(self) -> None:
        """Cheap, for between two pieces of work. Raises InputError where another process has failed, and SystemExit where one
        was asked to stop."""

    def asked(self, here: bool) -> bool:
        """Was any process asked to stop? here: was this one; the others then hear of it. Raises InputError as `check` does."""
        return here

    def meet(self, place: str, said: Any = None, *, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Waits until all processes are at `place`; what each of them says (JSON), by process.

        meanwhile: called now and then while waiting, in place of `check`.
        """
        del place, meanwhile
        return [said]

    def agree(self, place: str, said: Any) -> None:
        """Raises InputError where the processes do not all say the same: they were started with different settings."""

    def lead(self, place: str, work: Callable[[], Any]) -> Any:
        """What `work` returns (JSON), done by the leading process while the others wait."""
        return self.meet(place, work() if self.leads else None)[0]

    def see(self, path: pathlib.Path, size: int = 0) -> None:
        """Waits until a file that another process has written is seen here, `size` bytes at least. Raises InputError where it
        stays away: the folder is not one that all hosts share."""


ALONE = Share()
"""The one process that does everything."""
