"""The one error of this room, and the one line it says."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint or a workdir that cannot be used: one line naming the step, the folder and what to do."""


def first_line(error: BaseException) -> str:
    """The cause: orbax and tensorstore put it into the first sentence and write pages after it."""
    text = str(error).strip().split("\n", 1)[0].split(". See full", 1)[0].split(" [tensorstore_spec", 1)[0]
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
