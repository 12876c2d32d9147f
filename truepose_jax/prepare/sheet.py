"""The sheet of `prepare inspect`: what the model is told about each photo, drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.annotations.parsing import LabelSet, class_areas, class_on, colour_parsing
from input_pipeline.annotations.regions import region_boxes
from input_pipeline.annotations.skeleton import draw_skeleton_uint8
from input_pipeline.schema import MAX_CLASSES, ImageRecord

PANEL_HEIGHT = 440
LEGEND_WIDTH = 172
GAP, HEADER, CAPTION = 10, 34, 24
INK, FAINT, EDGE, PAPER = (30, 30, 34), (120, 120, 128), (214, 214, 220), (255, 255, 255)
LATENT_FACTOR = 8
MASK_LEVELS = (0, 2)
"""UNet levels whose mask is drawn: the latent itself, and the coarse cells that lose small classes first."""


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
