"""Measures generated images against the true ones: SSIM, PSNR, LPIPS, FID, and what happens inside regions.

    python -m truepose_jax.evaluate --generated=DIR --reference=DIR --protocol=cfld --size=256x176 --out=report.json
    python -m truepose_jax.evaluate weights --pth=FILE.pth --out=FILE.safetensors

Images are paired by name: TARGET, SOURCE_2_TARGET_vis or SOURCE_to_TARGET, DeepFashion's in any spelling. The report
states the protocol in full, each metric's image count and 95 % interval over images, and the hash of all weights; FID and
LPIPS of unknown weights are not called so. Work is kept in --cache: run the same command again after a stop. What another
version of the program has left there is not used.
The work can be done in parts: --shard=I/N, with folders, --cache and --out where all of them see them, and --shard=merge when all
are done, for the report. SLURM, Kubernetes and JAX_PROCESS_ID say the part where nothing is given.
"""

from __future__ import annotations

import argparse

from input_pipeline.annotations.parsing import LABEL_SETS
from truepose_jax.evaluate.protocols import PROTOCOLS
from truepose_jax.runtime.cli import Parser, parse_size
from truepose_jax.runtime.shards import add_shard_flag


def make_parser() -> argparse.ArgumentParser:
    parser = Parser.of_program("evaluate", __doc__)
    add = parser.add_argument_group("images").add_argument
    add("--generated", required=True, metavar="DIR", help="folder of generated images")
    add("--reference", required=True, metavar="DIR", help="folder of true images, or one with image/ beside parsing/")
    add("--pairs", metavar="CSV", help="columns from,to: the pairs that should be there")
    add("--allow-missing", action="store_true", help="evaluate what is there, and name what is not")
    add = parser.add_argument_group("the comparison").add_argument
    add("--protocol", required=True, choices=tuple(PROTOCOLS), help="how images are resized and compared")
    add("--size", type=parse_size, metavar="HxW", help="at which size (not for plain)")
    add("--lpips-weights", metavar="FILE", help="AlexNet and linear layers; see: evaluate weights")
    add("--parsing", metavar="DIR", help="parsing maps of the true images, for region metrics")
    add("--labels", help=f"label set of the maps: {', '.join(LABEL_SETS)}")
    add = parser.add_argument_group("FID").add_argument
    add("--fid-reference", action="append", default=[], metavar="DIR|FILE", help="images, or statistics of them")
    add("--fid-names", metavar="LIST", help="take only these images of it (train.lst)")
    add("--fid-weights", metavar="FILE", help="torchvision's Inception-v3")
    add("--clean-fid-weights", metavar="FILE", help="the Inception of 2015-12-05")
    add = parser.add_argument_group("work and files").add_argument
    add("--out", required=True, metavar="JSON", help="the report")
    add("--batch-size", type=int, default=32, help="of the networks (32)")
    add("--cache", metavar="DIR", help="for work that is kept (OUT without its suffix, .cache)")
    add("--overwrite", action="store_true", help="replace the report")
    add_shard_flag(parser)
    return parser
