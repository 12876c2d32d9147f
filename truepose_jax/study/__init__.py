"""Pictures and numbers of what the model looks at.

    python -m truepose_jax.study attention --workdir=RUN --out=DIR
    python -m truepose_jax.study attention --workdir=RUN --data=PHOTOS --labels=cihp20 --clip=CLIP --dino=DINO --out=DIR
    python -m truepose_jax.study attention --weights=FOLDER --data=RECORDS --split=test --out=DIR
    python -m truepose_jax.study style --workdir=RUN --out=SHEET.png

`attention` is Fig. 2 of the TruePose paper: how much attention falls on head, clothes and the rest of the source photo. `style`
draws style transfers (its section 5.4) among synthetic people.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from truepose_jax.runtime.cli import Parser, run_program
from truepose_jax.study.attention import add_attention
from truepose_jax.study.style import add_style

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns the exit code (2 and one line where the input is bad)."""
    parser = Parser(
        prog="python -m truepose_jax.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_attention(commands)
    add_style(commands)

    def run(argv: Sequence[str]) -> None:
        flags = parser.parse_args(argv)
        flags.run(flags)

    return run_program(run, sys.argv[1:] if argv is None else argv)
