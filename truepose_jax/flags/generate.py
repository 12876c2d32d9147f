"""Pictures from a trained model: the person of a photo in another pose.

    python -m truepose_jax.generate --workdir=DIR --source=PHOTO --pose=PHOTO --out=OUT.png
    python -m truepose_jax.generate --workdir=DIR --source=PHOTO --parsing=MAP.png --labels=atr18 --pose=FILE --out=OUT.png
    python -m truepose_jax.generate --workdir=DIR --source=STYLE --parsing=MAP.png --labels=atr18 \
        --reference=PHOTO --edit-mask=MASK --pose=FILE --out=OUT.png
    python -m truepose_jax.generate --workdir=DIR --source=A --source-pose=A.json --source=B --source-pose=B.json \
        --pose=FILE --out=OUT.png
    python -m truepose_jax.generate --workdir=DIR --pairs=LIST.csv --out-dir=D
    python -m truepose_jax.generate --workdir=DIR --records=RECORDS --split=test --out-dir=D

--pose: another photo, OpenPose JSON (18 or 25 joints), COCO-17 JSON, 18 rows of text, or annotations.csv#image-name.
--parsing=auto (where nothing is said): the person is found in the photo by what comes along with the [pose] extra, cut out for
the model, and the picture put back into the photo; --show-found draws what was found. --parsing=none: all of the photo is
person. A model with the half-cell head (config.model.carry.head) also reads the photo's own pose: --source-pose, in its pixels
unless the file or --source-pose-frame says otherwise, or found in the photo. --align-pose puts the pose on the source's body:
its limbs' lengths, in its place. --reference makes a region of that photo anew
with the source's clothes, in the reference's own --pose (its frame is the reference unless the file or --pose-frame says
otherwise). MASK is a picture of its size, white where it is made anew, or classes such as Upper-clothes,Dress of its
--reference-parsing.

A run of the method imagpose makes four tiles at once: --source and --source-pose up to three times, --pose and --out up to three
times, four of both together. --requests=LIST.jsonl: one such canvas a line, {"sources": [{"photo": .., "pose": ..}], "poses":
[..], "outs": [..]}. --records with --scenario: T1, a pair a canvas; T2, its source in three tiles; T3, with two other photos of
the person; star, three poses of a source at once.

LIST.csv has columns source,parsing,pose,out and may have labels, pose_frame, source_pose (auto: find it), source_pose_frame,
seed; its paths are relative to it, `out` (a .png) to D. --records makes all pairs of a split of what `prepare build` wrote, as
SOURCE_to_TARGET.png (or as --naming says), with D/pairs.csv for `evaluate --pairs`. Rows that are done are skipped: run the
same command again after a kill. SIGTERM or Ctrl-C: the batch under way is finished and written, then it ends with 143.
A list can be made in parts: --shard=I/N, with a D that all of them see, and --shard=merge, which looks whether all is there.
SLURM, Kubernetes and JAX_PROCESS_ID say the part where nothing is given.
"""

from __future__ import annotations

import argparse

from input_pipeline.annotations.parsing import LABEL_SETS
from truepose_jax.runtime.choices import DTYPES, FILLS, NAMINGS, OUTSIDE, SAMPLERS, SCENARIOS, WEIGHTS
from truepose_jax.runtime.cli import Parser, parse_size
from truepose_jax.runtime.shards import add_shard_flag

SPLIT, NAMING, BATCH = "test", "cfld", 8
"""Where nothing is said."""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser.of_program("generate", __doc__)
    add = parser.add_argument_group("the model").add_argument
    add("--workdir", help="the run: its last checkpoint is read, it may still be training (the model that comes along)")
    add("--weights", choices=tuple(WEIGHTS), help="ema where the run keeps one, else raw")
    add("--step", type=int, help="checkpoint (the last)")
    add("--vae", metavar="DIR", help="folder of the autoencoder (or file of the patch codec), in place of the config's")
    add("--clip", metavar="DIR", help="folder of CLIP, in place of the config's")
    add = parser.add_argument_group("one picture").add_argument
    add("--source", action="append", metavar="PHOTO", help="photo of the person (imagpose: up to three times)")
    add(
        "--parsing",
        metavar="MAP",
        help="its parsing map, a PNG of label ids; a SegFormer's folder; none; auto: find it (auto)",
    )
    add("--labels", help=f"label set of the map: {', '.join(LABEL_SETS)}")
    add("--source-pose", action="append", metavar="FILE", help="the pose of --source itself, in place of finding it")
    add(
        "--source-pose-frame",
        type=parse_size,
        metavar="HxW",
        help="size of the picture that one was found in (the photo's)",
    )
    add(
        "--pose",
        action="append",
        metavar="FILE",
        help="the pose to draw: another photo, or joints (imagpose: up to three)",
    )
    add("--pose-frame", type=parse_size, metavar="HxW", help="size of the picture the pose was found in")
    add("--out", action="append", metavar="PNG", help="the picture, one for each --pose")
    add("--fill", choices=FILLS, help="imagpose: what tiles hold that nothing was asked for (pose)")
    add("--sheet", metavar="PNG", help="also draw source, skeleton, what was carried and picture side by side")
    add = parser.add_argument_group("photos as they come").add_argument
    add("--show-found", metavar="PNG", help="draw skeleton, regions and crop over both photos")
    add("--person", type=int, metavar="N", help="which person of --source, by size (1, the largest)")
    add("--pose-person", type=int, metavar="N", help="which person of the --pose photo (1)")
    add(
        "--crop",
        choices=("person", "none"),
        help="what of the photo the model gets (person with --parsing=auto, else none)",
    )
    add("--align-pose", action="store_true", default=None, help="the pose with the source's limb lengths, in its place")
    add = parser.add_argument_group("style transfer").add_argument
    add("--reference", metavar="PHOTO", help="style transfer: the photo of which a region gets the source's clothes")
    add("--edit-mask", metavar="MASK", help="that region: a PNG, or classes of --reference-parsing")
    add("--reference-parsing", metavar="MAP", help="the reference's parsing map, for classes")
    add("--reference-labels", help="label set of that map (--labels)")
    add("--outside", choices=OUTSIDE, help="outside the region: as the autoencoder gives it (default), or pasted")
    add = parser.add_argument_group("a list in place of one picture").add_argument
    add("--pairs", metavar="CSV", help="a list in place of one picture")
    add("--records", metavar="DIR", help="all pairs of records in place of one picture")
    add("--requests", metavar="JSONL", help="a list of canvases, for imagpose")
    add("--split", help=f"of --records ({SPLIT})")
    add("--naming", choices=tuple(NAMINGS), help=f"of the pictures of --records ({NAMING})")
    add("--scenario", choices=SCENARIOS, help="imagpose: what a canvas of --records holds (T1)")
    add("--out-dir", metavar="D", help="folder for the pictures of --pairs or --records")
    add("--batch-size", type=int, help=f"of a list ({BATCH}); no picture depends on it")
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=tuple(SAMPLERS), help="the run's; dpmpp_2m and unipc want fewer steps (docs/generate.md)")
    add("--steps", type=int, help="of the sampler (the run's)")
    add("--guidance", type=float, help="classifier-free guidance, 1: none (the run's)")
    add("--guidance-interval", type=interval, metavar="LOW:HIGH", help="guided shares of the schedule (the run's)")
    add("--seed", type=int, default=0, help="of the noise, which also depends on the pair's names (0)")
    add("--num", type=int, metavar="K", help="pictures of each pair, of --seed and those after it, OUT_SEED.png (1)")
    add("--dtype", choices=DTYPES, help="what the networks compute in (the run's)")
    add = parser.add_argument_group("files").add_argument
    add("--overwrite", action="store_true", help="replace what is there")
    add("--estimate", action="store_true", help="tell memory and seconds of what would be made, and make nothing")
    add_shard_flag(parser)
    return parser


def interval(text: str) -> tuple[float, float]:
    """'0.2:0.8' -> (0.2, 0.8)."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not LOW:HIGH, as in 0.2:0.8") from error
    return low, high
