"""The errors of this room, and the one line each says."""

from __future__ import annotations

from input_pipeline.schema import UserError

LONGEST = 240
"""Characters of a library's message that a line may quote."""


class CheckpointError(UserError):
    """A checkpoint or a workdir that cannot be used: one line naming the step, the folder and what to do."""


class DamagedStep(CheckpointError):
    """A step that cannot be read: `what` is wrong with it, and how to go on without it."""

    def __init__(self, what: str, advice: str):
        super().__init__(f"{what}; {advice}")
        self.what = what


def first_line(error: BaseException) -> str:
    """The cause: orbax and tensorstore put it into the first sentence and write pages after it."""
    text = str(error).strip().split("\n", 1)[0].split(". See full", 1)[0].split(" [tensorstore_spec", 1)[0]
    if len(text) > LONGEST:  # paths mostly; what the system said comes last
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
