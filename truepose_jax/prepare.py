"""Prepare and inspect data.

    python -m truepose_jax.prepare inspect --root=FOLDER --labels=cihp20 --out=sheet.png
    python -m truepose_jax.prepare inspect --synthetic=6 --out=sheet.png

`inspect` draws what the model will be told about each photo: the parsing map with its classes, the skeleton,
the region boxes CLIP sees, and the mask M for a target pose. Wrong label sets and swapped sides show at a
glance; it also prints, for every joint, the labels that lie under it.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.folder import FolderImages
from input_pipeline.keypoints import JOINT_NAMES, inside
from input_pipeline.parsing import LABEL_SETS, LabelSet, class_areas, class_on, colour_parsing, label_set
from input_pipeline.regions import region_boxes
from input_pipeline.schema import MAX_CLASSES, ImageRecord, ImageSet, InputError
from input_pipeline.skeleton import draw_skeleton_uint8
from input_pipeline.synthetic import SyntheticPeople
from truepose_jax.programs import Parser, parse_size, run_program

PANEL_HEIGHT = 440
LEGEND_WIDTH = 172
GAP, HEADER, CAPTION = 10, 34, 24
INK, FAINT, EDGE, PAPER = (30, 30, 34), (120, 120, 128), (214, 214, 220), (255, 255, 255)
LATENT_FACTOR = 8
MAX_COUNTED = 1000
"""Of larger sets this many photos, evenly spread, are counted and drawn."""
MASK_LEVELS = (0, 2)
"""UNet levels whose mask is drawn: the latent itself, and the coarse cells that lose small classes first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns the exit code (2 and one line where the input is bad)."""
    parser = Parser(prog="python -m truepose_jax.prepare", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_inspect(commands)

    def run(argv: Sequence[str]) -> None:
        flags = parser.parse_args(argv)
        flags.run(flags)

    return run_program(run, sys.argv[1:] if argv is None else argv)


def add_inspect(commands) -> None:
    """The flags of `inspect`."""
    parser = commands.add_parser("inspect", help="draw labels, skeletons, region boxes and masks over photos")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--root", help="folder with image/, parsing/ and keypoints/ (see input_pipeline/folder.py)")
    what.add_argument("--synthetic", type=int, metavar="N", help="N synthetic people, two poses each, instead")
    parser.add_argument("--labels", default="none", help=f"label set of the maps: {', '.join(LABEL_SETS)}, or none")
    parser.add_argument("--keypoints", help="annotation CSV or folder of poses, in place of ROOT/keypoints")
    parser.add_argument("--pose-frame", type=parse_size, metavar="HxW", help="size of the frame the poses are in")
    parser.add_argument("--size", type=parse_size, default=(512, 352), metavar="HxW", help="size in training (512x352)")
    parser.add_argument("--pose-from", choices=("own", "next"), default="next", help="whose pose the mask is for")
    parser.add_argument("--count", type=int, default=12, help="photos on the sheet (12); the counts cover more")
    parser.add_argument("--out", required=True, help="the sheet, a PNG")
    parser.set_defaults(run=inspect)


def inspect(flags: argparse.Namespace) -> None:
    """Draws the sheet and prints the counts."""
    if flags.synthetic is not None:
        images = synthetic_images(flags.synthetic, flags.size)
    else:
        images = FolderImages(
            flags.root,
            labels=flags.labels,
            size=flags.size,
            keypoints=flags.keypoints,
            pose_frame=flags.pose_frame,
        )
    labels = label_set(images.labels)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MAX_COUNTED)).astype(int))
    records = [images.image(int(index)) for index in chosen]
    print_counts(records, labels)
    sheet = contact_sheet(records[: flags.count], labels, pose_from=flags.pose_from)
    try:
        pathlib.Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(flags.out)
    except (OSError, ValueError) as error:
        raise InputError(f"{flags.out}: cannot write the sheet ({error})") from error
    h, w = flags.size
    print(f"{flags.out}: {min(flags.count, len(records))} of {len(images)} photos at {h}x{w}")


def synthetic_images(count: int, size: tuple[int, int]) -> ImageSet:
    """`count` synthetic people in two poses each, next to one another."""
    return SyntheticPeople(seed=0, split="train", identities=count, poses_per_identity=2, size=size)


# ----------------------------------------------------------------------------------------------- counts


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
    for joint, name in enumerate(JOINT_NAMES):
        visible = sum(record.joints[joint, 2] > 0 for record in records)
        under = labels_under(records, labels, joint)
        listed = ", ".join(f"{label} {count}" for label, count in under.most_common(4))
        print(f"{joint:>3} {name:>14} {visible:>7} {under.total():>8}  {listed}")
    for line in side_warnings(records, labels):
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


def side_warnings(records: Sequence[ImageRecord], labels: LabelSet) -> list[str]:
    """Lines for a face without Face under it and for limbs whose joints lie in the other side's label."""
    warnings = []
    noses = labels_under(records, labels, 0)
    face = next((name for name in ("Face", "Head") if labels.id_of(name)), None)
    if face and noses.total() >= 3 and noses[face] < noses.total() / 2:
        warnings.append(f"only {noses[face]} of {noses.total()} noses lie in {face}: is it another label set?")
    for part, joints in (("arm", (3, 4)), ("leg", (9, 10))):
        own = other = 0
        for right in joints:
            for side, joint in (("Right", right), ("Left", right + 3)):
                under = labels_under(records, labels, joint)
                own += under[f"{side}-{part}"]
                other += under[f"{'Left' if side == 'Right' else 'Right'}-{part}"]
        if other > own:
            warnings.append(f"{other} joints lie in the other side's {part} and {own} in their own: are sides swapped?")
    return warnings


# ----------------------------------------------------------------------------------------------- sheet


def contact_sheet(records: Sequence[ImageRecord], labels: LabelSet, *, pose_from: str) -> np.ndarray:
    """uint8 [H W 3]: one row a photo; see the module for the columns."""
    h, w = records[0].image.shape[:2]
    panel = (PANEL_HEIGHT, round(PANEL_HEIGHT * w / h))
    whose = "the next photo's" if pose_from == "next" else "its own"
    cells = [f"{-(-h // LATENT_FACTOR // 2**level)}x{-(-w // LATENT_FACTOR // 2**level)}" for level in MASK_LEVELS]
    titles = ["photo", "parsing", "classes", "skeleton", "regions for CLIP"]
    titles += [f"mask M, {size}, {whose} pose" for size in cells]
    widths = [LEGEND_WIDTH if title == "classes" else panel[1] for title in titles]
    row_height = CAPTION + PANEL_HEIGHT + GAP
    sheet = Image.new("RGB", (GAP + sum(width + GAP for width in widths), HEADER + row_height * len(records)), PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [GAP + sum(width + GAP for width in widths[:i]) for i in range(len(widths))]
    for left, title in zip(lefts, titles, strict=True):
        pen.text((left, 9), title, fill=INK, font=font(15))
    for row, record in enumerate(records):
        top = HEADER + row * row_height
        pen.text((GAP, top + 4), record.name, fill=FAINT, font=font(13))
        target = records[(row + 1) % len(records)] if pose_from == "next" else record
        panels = draw_row(record, target, labels, panel)
        for left, picture in zip(lefts, panels, strict=True):
            sheet.paste(picture, (left, top + CAPTION))
            if picture.height == PANEL_HEIGHT and picture.width == panel[1]:
                pen.rectangle(
                    (left, top + CAPTION, left + panel[1] - 1, top + CAPTION + PANEL_HEIGHT - 1), outline=EDGE
                )
    return np.asarray(sheet)


def draw_row(record: ImageRecord, target: ImageRecord, labels: LabelSet, panel: tuple[int, int]) -> list[Image.Image]:
    """The pictures of one photo, each `panel` (h, w) large but for the legend."""
    hw = record.image.shape[:2]
    photo = Image.fromarray(record.image).resize(panel[::-1], Image.Resampling.BICUBIC)
    colours = Image.fromarray(colour_parsing(record.parsing, labels)).resize(panel[::-1], Image.Resampling.NEAREST)
    skeleton = draw_skeleton_uint8(record.joints, joints_hw=hw, out_hw=panel, onto=dimmed(photo, 0.45))
    on = class_on(target.joints, labels, hw=target.image.shape[:2])
    return [
        photo,
        Image.blend(photo, colours, 0.6),
        draw_legend(record, labels, on),
        Image.fromarray(skeleton),
        draw_boxes(photo, record, labels),
        *(draw_mask(photo, mask, target) for mask in latent_masks(record.parsing, on)),
    ]


def draw_legend(record: ImageRecord, labels: LabelSet, on: np.ndarray) -> Image.Image:
    """The map's classes with colours and areas; those that the target pose leaves off are struck out."""
    legend = Image.new("RGB", (LEGEND_WIDTH, PANEL_HEIGHT), PAPER)
    pen, areas, y = ImageDraw.Draw(legend), class_areas(record.parsing), 2
    for index in np.flatnonzero(areas):
        pen.rectangle((0, y + 2, 15, y + 17), fill=tuple(labels.palette[index]), outline=FAINT)
        text = f"{labels.classes[index]}  {100 * areas[index]:.1f} %"
        off = bool(labels.foreground[index] and not on[index])
        pen.text((23, y + 1), text, fill=FAINT if off else INK, font=font(13))
        if off:
            pen.line((23, y + 10, 23 + pen.textlength(text, font(13)), y + 10), fill=FAINT)
        y += 23
    if (labels.foreground & ~on & (areas > 0)).any():
        pen.text((0, y + 8), "struck out: off in\nthe target pose", fill=FAINT, font=font(12))
    return legend


def draw_boxes(photo: Image.Image, record: ImageRecord, labels: LabelSet) -> Image.Image:
    """The photo with box and name of every region; names move down where they would cover one another."""
    picture = Image.fromarray(dimmed(photo, 0.25))
    pen = ImageDraw.Draw(picture)
    boxes, valid = region_boxes(record.parsing, labels)
    scale = np.array([picture.width / record.image.shape[1], picture.height / record.image.shape[0]] * 2)
    shown = sorted(np.flatnonzero(valid[:MAX_CLASSES]), key=lambda i: boxes[i, 1])
    edges = {index: [round(v) for v in boxes[index] * scale] for index in shown}
    for index in shown:
        x0, y0, x1, y1 = edges[index]
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=tuple(labels.palette[index]), width=2)
    taken: list[tuple[float, float, float, float]] = []
    for index in shown:
        name, colour = labels.classes[index], tuple(int(v) for v in labels.palette[index])
        width = pen.textlength(name, font(12)) + 6
        x, y = min(edges[index][0], picture.width - width), min(edges[index][1], picture.height - 16)
        while any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + 15 for b in taken):
            y += 3
        taken.append((x, y, x + width, y + 15))
        pen.rectangle(taken[-1], fill=colour)
        dark = sum(colour) > 380
        pen.text((x + 3, y), name, fill=INK if dark else PAPER, font=font(12))
    return picture


def latent_masks(parsing: np.ndarray, on: np.ndarray) -> list[np.ndarray]:
    """bool [h w] per level of MASK_LEVELS: the mask M that the model makes of this map for these classes."""
    from truepose_jax.models.masks import (  # JAX starts only where a mask is drawn
        coverage_levels,
        parsing_mask,
    )

    levels = coverage_levels(parsing[None], num_classes=MAX_CLASSES, factor=LATENT_FACTOR, levels=max(MASK_LEVELS) + 1)
    masks = (np.asarray(parsing_mask(levels[i], on[None])[0]).reshape(levels[i].shape[1:3]) for i in MASK_LEVELS)
    return list(masks)


def draw_mask(photo: Image.Image, mask: np.ndarray, target: ImageRecord) -> Image.Image:
    """The photo, dark where M is off, with the target pose over it."""
    cells = Image.fromarray(mask).resize(photo.size, Image.Resampling.NEAREST)
    dark = (np.asarray(photo) * 0.22 + np.array([12, 18, 48])).astype(np.uint8)
    shown = np.where(np.asarray(cells)[..., None], np.asarray(photo), dark)
    hw = target.image.shape[:2]
    return Image.fromarray(draw_skeleton_uint8(target.joints, joints_hw=hw, out_hw=shown.shape[:2], onto=shown))


def dimmed(photo: Image.Image, amount: float) -> np.ndarray:
    """uint8 [h w 3], faded towards grey so that lines stand out."""
    return (np.asarray(photo) * (1 - amount) + 128 * amount).astype(np.uint8)


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font; no file of the system's is needed."""
    return ImageFont.load_default(size)


if __name__ == "__main__":
    sys.exit(main())
