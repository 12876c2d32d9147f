"""All programs under one name: truepose COMMAND [ARGUMENT ...], or python -m truepose_jax COMMAND [ARGUMENT ...].

truepose generate --workdir=synthetic_128x96 --source=anna.jpg ... --out=anna_moved.png
truepose train --config=demo --workdir=runs/mine
truepose COMMAND --help
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence

from truepose_jax import BUNDLED, __version__
from truepose_jax.runtime.cli import HELP, Parser, show_help

COMMANDS = {
    "train": "train, or go on where a run has stopped",
    "generate": "pictures from a trained model",
    "prepare": "data: build, label, annotate, check and inspect",
    "serve": "a page and POST /v1/repose, on this machine",
    "evaluate": "SSIM, PSNR, LPIPS and FID of generated pictures",
    "convert": "weights from PyTorch, and trained models to PyTorch",
    "study": "where attention falls; style transfer",
    "scaling": "studies of batch size, devices and memory",
    "demo": "pictures of the model that comes along, and one trained from nothing",
    "env": "versions, devices, caches and disk, for a report of a fault",
}
"""Programs, truepose_jax.NAME each, and what they do."""

FLAGS = {name: f"truepose_jax.flags.{name}" for name in ("train", "generate", "convert", "demo")} | {
    name: f"truepose_jax.{name}.flags" for name in ("evaluate", "study", "scaling", "serve")
}
"""Where --help is found without the second or two that a program takes to import; the others take none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the rest of the line to a program, which ends Python itself as `python -m truepose_jax.NAME` does."""
    parser = Parser(
        prog="truepose",
        description=__doc__,
        epilog="commands:\n" + "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"truepose-jax {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    flags = parser.parse_args(argv)
    if str(BUNDLED) in sys.path:  # first, in this program of ours: a folder `configs` of somebody's is not meant
        sys.path.insert(0, str(BUNDLED))
    if HELP & set(flags.arguments) and flags.command in FLAGS:
        told = importlib.import_module(FLAGS[flags.command])
        told.make_parser().parse_args(flags.arguments) if hasattr(told, "make_parser") else show_help(told)
    sys.argv = [flags.command, *flags.arguments]
    runpy.run_module(f"truepose_jax.{flags.command}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
