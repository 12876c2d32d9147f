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

from input_pipeline.annotations.parsing import LABEL_SETS
from truepose_jax.runtime.choices import SYNTHETIC, WEIGHTS
from truepose_jax.runtime.cli import Parser, parse_size

SPLIT = "test"
CLASSES = "Upper-clothes,Dress,Skirt,Pants"


def make_parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="python -m truepose_jax.study", description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_attention(commands)
    _add_style(commands)
    return parser


def _add_attention(commands) -> None:
    parser = commands.add_parser("attention", help="attention on head, clothes and the rest of the source photo")
    model = parser.add_argument_group("the model")
    add = model.add_argument
    what = model.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", metavar="RUN", help="the run: its last checkpoint is read")
    what.add_argument("--weights", metavar="FOLDER", help="in its place a folder that `convert from-torch` wrote")
    add("--size", type=parse_size, metavar="HxW", help="picture size for --weights (the one it was trained at)")
    add("--kind", choices=tuple(WEIGHTS), help="of the run's weights: ema where it keeps one, else raw")
    add("--step", type=int, help="checkpoint of the run (the last)")
    add = parser.add_argument_group("the photos").add_argument
    add(
        "--data",
        default=SYNTHETIC,
        metavar="DIR",
        help="photos with maps and poses, or records; or synthetic (default)",
    )
    add("--labels", help=f"label set of a folder's maps: {', '.join(LABEL_SETS)}")
    add("--split", help=f"of records ({SPLIT})")
    add("--keypoints", help="annotation CSV or folder of poses, in place of DIR/keypoints")
    add("--pose-frame", type=parse_size, metavar="HxW", help="size of the frame the poses are in")
    add("--count", type=int, default=50, help="photos (50, as many as the paper has)")
    add = parser.add_argument_group("to compare with").add_argument
    add("--clip", metavar="DIR", help="CLIP's vision tower in transformers' format, to compare with; [torch]")
    add("--dino", metavar="DIR", help="DINOv2 in transformers' format; [torch]")
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, help="DDIM steps (the run's)")
    add("--guidance", type=float, help="classifier-free guidance, 1: none (the run's)")
    add("--seed", type=int, default=0, help="of the noise (0)")
    add("--batch-size", type=int, default=8, help="photos at a time (8)")
    add = parser.add_argument_group("files").add_argument
    add("--shown", type=int, default=3, help="photos on the sheet of overlays (3)")
    add("--out", required=True, metavar="D", help="folder for the results")
    add("--overwrite", action="store_true", help="replace what is there")


def _add_style(commands) -> None:
    parser = commands.add_parser("style", help="a sheet of style transfers among synthetic people")
    add = parser.add_argument
    add("--workdir", required=True, metavar="RUN", help="the run: its last checkpoint is read")
    add("--count", type=int, default=6, help="rows (6)")
    add("--classes", default=CLASSES, help=f"what is made anew ({CLASSES})")
    add("--steps", type=int, help="DDIM steps (the run's)")
    add("--guidance", type=float, help="classifier-free guidance, 1: none (the run's)")
    add("--seed", type=int, default=0, help="of the noise (0)")
    add("--out", required=True, metavar="PNG", help="the sheet")
    add("--overwrite", action="store_true", help="replace what is there")
