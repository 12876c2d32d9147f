"""What a trained model looks at, and what it makes of two photos. What it is told: flags.py."""

from __future__ import annotations

from collections.abc import Sequence

from truepose_jax.runtime.cli import program
from truepose_jax.study.flags import make_parser

__all__ = ["main"]


@program
def main(argv: Sequence[str]) -> None:
    """Runs a sub-command; returns the exit code (2 and one line where the input is bad)."""
    flags = make_parser().parse_args(argv)
    from truepose_jax.study.attention import study_attention
    from truepose_jax.study.style import study_style

    {"attention": study_attention, "style": study_style}[flags.command](flags)
