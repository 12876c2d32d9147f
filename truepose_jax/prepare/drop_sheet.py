"""The picture sheet of a build: what was dropped, and why, a row of photos for each reason."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw

from input_pipeline.annotations.photo import read_photo
from input_pipeline.schema import InputError
from truepose_jax.prepare.sheet import EDGE, FAINT, GAP, INK, PAPER, font

ACROSS = 8
"""Photos of each reason that are shown."""
THUMB = (150, 110)
"""(h, w) of a photo on the sheet."""
NAME_LETTERS = 18


def drop_sheet(report: Mapping[str, Any]) -> Image.Image:
    """The sheet of a report.json; a title alone where nothing was dropped."""
    rows = list(report["dropped"].items())
    row_height = 26 + THUMB[0] + 18 + GAP
    width = GAP + ACROSS * (THUMB[1] + GAP)
    splits = ", ".join(
        f"{split} {counts['images']:,} images and {counts['pairs']:,} pairs"
        for split, counts in report["splits"].items()
    )
    sheet = Image.new("RGB", (width, 62 + max(1, len(rows)) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 8), f"{report['dataset']}: {splits or 'nothing could be built'}", fill=INK, font=font(15))
    total = sum(reason["count"] for _, reason in rows)
    pen.text((GAP, 32), f"dropped: {total:,} images" if total else "no image was dropped", fill=FAINT, font=font(13))
    for i, (reason, found) in enumerate(rows):
        top = 62 + i * row_height
        pen.text((GAP, top), f"{reason}: {found['count']:,}", fill=INK, font=font(14))
        for k, image in enumerate(found["images"][:ACROSS]):
            left = GAP + k * (THUMB[1] + GAP)
            sheet.paste(_thumb(image["photo"]), (left, top + 24))
            pen.rectangle((left, top + 24, left + THUMB[1] - 1, top + 23 + THUMB[0]), outline=EDGE)
            name = image["name"]
            shown = name if len(name) <= NAME_LETTERS else "..." + name[3 - NAME_LETTERS :]
            pen.text((left, top + 26 + THUMB[0]), shown, fill=FAINT, font=font(10))
    return sheet


def _thumb(photo: str) -> Image.Image:
    """The photo, or a grey card that says why there is none to show."""
    card = Image.new("RGB", THUMB[::-1], (236, 236, 240))
    text = "no file"
    if photo and pathlib.Path(photo).is_file():
        try:
            picture = Image.fromarray(read_photo(photo))
        except InputError:
            text = "cannot be read"
        else:
            picture.thumbnail(THUMB[::-1])
            card.paste(picture, ((card.width - picture.width) // 2, (card.height - picture.height) // 2))
            return card
    pen = ImageDraw.Draw(card)
    pen.text(((card.width - pen.textlength(text, font(11))) / 2, card.height / 2 - 7), text, fill=FAINT, font=font(11))
    return card
