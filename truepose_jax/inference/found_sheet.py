"""--show-found: what was seen of a photo and of a pose photo, to be looked at before the picture is believed."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from input_pipeline.annotations.parsing import colour_parsing, label_set
from input_pipeline.annotations.photo import Framing
from input_pipeline.annotations.skeleton import draw_skeleton_uint8
from truepose_jax.inference.photo_requests import Seen
from truepose_jax.sampling.image_grid import sheet

CELL = (480, 480)
BOX_COLOUR = (255, 0, 255)


def found_sheet(seen: Sequence[Seen]) -> np.ndarray:
    """uint8 [H W 3]: a row for each; the photo with the crop, the skeleton, the regions in their label set's colours."""
    columns: dict[str, list[np.ndarray]] = {"photo and crop": [], "skeleton": [], "regions": []}
    for one in seen:
        framing = Framing.fit(one.photo.shape[:2], CELL)
        photo = np.array(framing.image(one.photo))
        corners = np.array([[*one.box[:2], 1], [*one.box[2:], 1]], float)
        (x0, y0, _), (x1, y1, _) = framing.joints(corners).round().astype(int).tolist()
        boxed = cv2.rectangle(photo.copy(), (x0, y0), (x1 - 1, y1 - 1), BOX_COLOUR, 2)
        skeleton = photo
        if one.joints is not None:
            skeleton = draw_skeleton_uint8(framing.joints(one.joints), joints_hw=CELL, out_hw=CELL, onto=photo)
        columns["photo and crop"].append(boxed)
        columns["skeleton"].append(skeleton)
        columns["regions"].append(
            photo if one.parsing is None else regions_over(photo, framing.parsing(one.parsing), one.labels)
        )
    return sheet(columns)


def regions_over(photo: np.ndarray, parsing: np.ndarray, labels: str) -> np.ndarray:
    """uint8 [h w 3]: the regions' colours laid over the photo, what is background left as it is."""
    coloured = colour_parsing(parsing, label_set(labels))
    return np.where((parsing > 0)[..., None], photo * 0.4 + coloured * 0.6, photo).astype(np.uint8)
