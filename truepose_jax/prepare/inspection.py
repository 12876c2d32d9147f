"""`prepare inspect`: the sheet of a set of photos, and counts per class and joint."""

from __future__ import annotations

import argparse
import collections
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline.annotations.keypoints import JOINT_NAMES, inside
from input_pipeline.annotations.parsing import LABEL_SETS, LabelSet, class_areas, class_on, label_set
from input_pipeline.annotations.plausibility import SetOfDoubts, judge
from input_pipeline.annotations.regions import region_boxes
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import MAX_CLASSES, ImageRecord, ImageSet, InputError
from input_pipeline.sources.folder import FolderImages
from input_pipeline.synthetic.people import SyntheticPeople
from truepose_jax.prepare.sheet import contact_sheet
from truepose_jax.runtime import files
from truepose_jax.runtime.cli import parse_size, reject_unused_flags

MAX_COUNTED = 1000
"""Of larger sets this many photos, evenly spread, are counted and drawn."""
SETS = ("root", "records", "synthetic")
FLAGS_USED_BY = {"labels": ("--root",), "keypoints": ("--root",), "pose-frame": ("--root",), "split": ("--records",)}
SPLIT = "train"


def add_inspect(commands) -> None:
    """The flags of `inspect`."""
    parser = commands.add_parser("inspect", help="draw labels, skeletons, region boxes and masks over photos")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--root", help="folder with image/, parsing/ and keypoints/ (see input_pipeline/sources/folder.py)"
    )
    what.add_argument("--records", metavar="DIR", help="a dataset that `build` wrote")
    what.add_argument("--synthetic", type=int, metavar="N", help="N synthetic people, two poses each, instead")
    parser.add_argument("--split", help=f"of the records: {SPLIT} (default), test")
    parser.add_argument("--labels", help=f"label set of the maps: {', '.join(LABEL_SETS)}, or none (default)")
    parser.add_argument("--keypoints", help="annotation CSV or folder of poses, in place of ROOT/keypoints")
    parser.add_argument("--pose-frame", type=parse_size, metavar="HxW", help="size of the frame the poses are in")
    parser.add_argument("--size", type=parse_size, default=(512, 352), metavar="HxW", help="size in training (512x352)")
    parser.add_argument("--pose-from", choices=("own", "next"), default="next", help="whose pose the mask is for")
    parser.add_argument("--count", type=int, default=12, help="photos on the sheet (12); the counts cover more")
    parser.add_argument("--out", required=True, help="the sheet, a PNG")
    parser.set_defaults(run=inspect)


def inspect(flags: argparse.Namespace) -> None:
    """Draws the sheet and prints the counts. Raises InputError."""
    if flags.count < 1:
        raise InputError(f"--count is {flags.count}; at least one photo must be on the sheet")
    out = pathlib.Path(flags.out)
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE or out.is_dir():
        raise InputError(f"--out={out} does not name a picture; end it in .png")
    files.make_folder(out.parent)
    (given,) = (name for name in SETS if getattr(flags, name) is not None)
    reject_unused_flags(flags, FLAGS_USED_BY, f"--{given}")
    if flags.synthetic is not None:
        images = synthetic_images(flags.synthetic, flags.size)
    elif flags.records is not None:
        images = RecordImages(flags.records, flags.split or SPLIT, size=flags.size)
    else:
        images = FolderImages(
            flags.root,
            labels=flags.labels or "none",
            size=flags.size,
            keypoints=flags.keypoints,
            pose_frame=flags.pose_frame,
        )
    read = list(images.files.values()) if isinstance(images, FolderImages) else [images.root] if flags.records else []
    files.check_apart({"--out": out}, {f"{path}, which is read,": path for path in read})
    labels = label_set(images.labels)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MAX_COUNTED)).astype(int))
    records = [images.image(int(index)) for index in chosen]
    print_counts(records, labels)
    sheet = contact_sheet(records[: flags.count], labels, pose_from=flags.pose_from)
    with files.atomic_write(out) as partial:
        Image.fromarray(sheet).save(partial, format=Image.registered_extensions()[out.suffix.lower()])
    h, w = flags.size
    print(f"{flags.out}: {min(flags.count, len(records))} of {len(images)} photos at {h}x{w}")


def synthetic_images(count: int, size: tuple[int, int]) -> ImageSet:
    """`count` synthetic people in two poses each, next to one another."""
    return SyntheticPeople(seed=0, split="train", identities=count, poses_per_identity=2, size=size)


def print_counts(records: Sequence[ImageRecord], labels: LabelSet) -> None:
    """Per class: photos that have it, mean area, photos whose pose switches it on.

    Per joint: the labels under it.
    """
    areas = np.stack([class_areas(record.parsing) for record in records])
    valid = np.stack([region_boxes(record.parsing, labels)[1][:MAX_CLASSES] for record in records])
    on = np.stack([class_on(record.joints, labels, hw=record.image.shape[:2]) for record in records])
    print(f"{len(records)} photos, labels {labels.name}")
    print(f"{'class':>18} {'photos':>7} {'regions':>8} {'mean area':>10} {'switched on':>12}")
    for index, name in enumerate(labels.classes):
        present = areas[:, index] > 0
        area = f"{100 * areas[present, index].mean():.1f} %" if present.any() else "-"
        regions, switched = valid[:, index].sum(), on[:, index].sum()
        print(f"{index:>3} {name:>14} {present.sum():>7} {regions:>8} {area:>10} {switched:>12}")
    print(f"{'joint':>18} {'visible':>7} {'in frame':>8}  labels under it")
    count = len(records[0].joints)
    for joint, name in enumerate(JOINT_NAMES if count == len(JOINT_NAMES) else [""] * count):
        visible = sum(record.joints[joint, 2] > 0 for record in records)
        under = labels_under(records, labels, joint)
        listed = ", ".join(f"{label} {count}" for label, count in under.most_common(4))
        print(f"{joint:>3} {name:>14} {visible:>7} {under.total():>8}  {listed}")
    doubts = SetOfDoubts()
    for record in records:
        doubts.add(record.name, judge(record.joints, record.parsing, labels, record.image.shape[:2]))
    for line in doubts.lines():
        print(f"warning: {line}")


def labels_under(records: Sequence[ImageRecord], labels: LabelSet, joint: int) -> collections.Counter[str]:
    """How often each class lies under a joint, over the photos where the joint is in the frame."""
    under = collections.Counter()
    for record in records:
        if inside(record.joints, record.parsing.shape)[joint]:
            h, w = record.parsing.shape
            x, y = np.rint(record.joints[joint, :2]).astype(int)
            under[labels.classes[record.parsing[min(y, h - 1), min(x, w - 1)]]] += 1
    return under
