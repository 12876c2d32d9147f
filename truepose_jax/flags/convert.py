"""Weights from PyTorch, and trained models to PyTorch.

    python -m truepose_jax.convert from-torch --model=sd15 --src=DIR|FILE|HUB_NAME [--clip=DIR|HUB_NAME] --dst=DIR
    python -m truepose_jax.convert to-torch --workdir=DIR [--weights=ema|raw] [--dtype=bfloat16] --dst=DIR

from-torch makes a weights folder, which a run begins with: train --config.init_from=DIR. --model=sd15 reads a diffusers
folder of Stable Diffusion 1.5 (unet/, vae/, scheduler/) or its original single file (.safetensors, .ckpt) and makes
TruePose's starting point, or that of the method that --for names (whose folder may be of SD2.x); --model=truepose reads what
to-torch wrote. --model=animate-anyone reads reference_unet, denoising_unet and pose_guider, .pth or .safetensors, and what it
writes is a whole model, which generate takes as --workdir. --model=fpdm and imagpose read what to-torch wrote of such a run,
FPDM's public checkpoint saved as a plain state_dict, or a folder of IMAGPose's stage files. --model=lora adds the adapters of a
file of diffusers' or PEFT's to the weights folder that --base names. --clip is a transformers folder with CLIP's vision tower. A
name such as openai/clip-vit-large-patch14 that is no path is fetched from the Hugging Face hub. Everything is checked before the
first byte is written; --dry-run stops there and prints the table.

to-torch exports a run's last checkpoint: SourceNet and TargetNet as folders that diffusers opens, HPFA and the pose encoder
beside them, configs, the noise schedule and a model card. generate and study take the folder for a run's. FPDM, IMAGPose and
AnimateAnyone's form leave under their public code's names, for from-torch. Of a run that trains adapters (config.optim.lora) it
writes these alone, or with --merge the model with them added.
"""

from __future__ import annotations

import argparse
import pathlib

from truepose_jax.pretrained.conversion.to_torch import DTYPES
from truepose_jax.runtime.choices import WEIGHTS
from truepose_jax.runtime.cli import Parser

MODELS = ("sd15", "truepose", "animate-anyone", "fpdm", "imagpose", "lora")
METHODS = ("truepose", "fpdm", "imagpose")
"""That have a starting point in a Stable Diffusion."""


def make_parser() -> argparse.ArgumentParser:
    summary, details = __doc__.split("\n\n", 1)
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="python -m truepose_jax.convert", description=summary, epilog=details, **style)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("from-torch", help="a weights folder out of PyTorch's files", epilog=details, **style)
    add = add.add_argument
    add("--model", required=True, choices=MODELS, help="what --src is")
    add("--src", required=True, help="folder, single file, or hub name")
    add("--for", dest="method", choices=METHODS, default=METHODS[0], help="the method that starts from it (truepose)")
    add("--clip", metavar="DIR", help="folder or hub name of CLIP")
    add("--dino", metavar="DIR", help="of --model=fpdm, imagpose: folder of DINOv2, so that generate takes what is written")
    add("--base", type=pathlib.Path, metavar="DIR", help="of --model=lora: the weights folder that it was trained on")
    add("--dst", type=pathlib.Path, metavar="DIR", help="the weights folder, new or empty")
    add("--variant", help="of --src: fp16, non_ema, ...")
    add("--dry-run", action="store_true", help="check, print every tensor's name, shape and dtype, and write nothing")
    add = commands.add_parser(
        "to-torch", help="a trained model as a folder that diffusers opens", epilog=details, **style
    )
    add = add.add_argument
    add("--workdir", required=True, help="the run; it may still be training")
    add("--weights", choices=tuple(WEIGHTS), help="ema where the run keeps one, else raw")
    add("--step", type=int, help="checkpoint (the last)")
    add("--dtype", choices=tuple(DTYPES), help="of the tensors (float32, as they are trained)")
    add("--merge", action="store_true", help="of a run that trains adapters: the model with them added")
    add("--with-clip", action="store_true", help="copy the run's CLIP into the folder, so that it serves by itself")
    add("--dst", required=True, type=pathlib.Path, metavar="DIR", help="the folder, new or empty")
    return parser
