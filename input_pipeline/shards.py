"""Work over many files in parts that know nothing of one another: `--shard=I/N` does one of them, `--shard=merge` ends the work.

Parts leave whole files in folders that all of them see, and nothing else passes between them. So they may run in any order, at
once or one by one, again after a kill, and what comes out is the same for every N, to the byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

from input_pipeline.schema import InputError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`; merge: no part of the work, but what comes when all are done. One part of one does both."""

    index: int = 0
    count: int = 1
    merge: bool = False

    @property
    def finishes(self) -> bool:
        """Whether this call makes what there is once of all parts (tables, a report), at its end."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this call shows how far it is: others would write over its bar."""
        return self.index == 0

    def mine(self, items: Iterable[Item]) -> list[Item]:
        """The items of this part, in their order: a function of their numbers alone, whatever is done already. Neighbours, which
        take about equally long, go to different parts."""
        return [] if self.merge else [item for number, item in enumerate(items) if number % self.count == self.index]

    def require(self, missing: int, total: int, what: str) -> None:
        """Raises InputError where the parts have not left all that they should."""
        if missing:
            raise InputError(
                f"{missing} of {total} {what} are not there: let every shard of this command (--shard=I/N) end with 0 before "
                "--shard=merge"
            )

    def __str__(self) -> str:
        return "merge" if self.merge else f"shard {self.index} of {self.count}"


WHOLE = Shard()
"""All of the work, and what comes at its end."""
