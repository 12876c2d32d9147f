"""What a trained model looks at, and what it makes of two photos. What it is told: flags.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from truepose_jax.runtime.cli import run_program
from truepose_jax.study.flags import make_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns the exit code (2 and one line where the input is bad)."""
    return run_program(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> None:
    flags = make_parser().parse_args(argv)
    from truepose_jax.study.attention import study_attention
    from truepose_jax.study.style import study_style

    {"attention": study_attention, "style": study_style}[flags.command](flags)
