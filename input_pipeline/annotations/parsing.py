"""Parsing maps: label sets, which classes a pose switches on (docs/paper.md 4), reading, flipping, areas.

Left and right are the person's own, as in OpenPose. A map is converted into another label set only for a network that predicts
that set's classes (convert_parsing).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import cv2
import numpy as np

from input_pipeline.annotations.grey_png import decode_grey_png
from input_pipeline.annotations.keypoints import inside
from input_pipeline.annotations.photo import MAX_PIXELS, one_line, open_picture
from input_pipeline.annotations.run_lengths import decode_runs
from input_pipeline.files import MAX_PICTURE, MAX_SETTINGS, read_bytes, read_text
from input_pipeline.schema import MAX_CLASSES, NUM_JOINTS, InputError

NOSE, NECK, HIPS, EYES, EARS = (0,), (1,), (8, 11), (14, 15), (16, 17)
SHOULDERS, ELBOWS, WRISTS, KNEES, ANKLES = (2, 5), (3, 6), (4, 7), (9, 12), (10, 13)
RIGHT_ELBOW_WRIST, LEFT_ELBOW_WRIST = (3, 4), (6, 7)
RIGHT_KNEE_ANKLE, LEFT_KNEE_ANKLE = (9, 10), (12, 13)

LABELS_FILE = "labels.txt"
"""Beside maps whose label set is known, such as those of `prepare label`."""

JOINTS_OF_CLASS: Mapping[str, tuple[int, ...]] = {
    "Hat": NOSE + EYES + EARS,
    "Hair": NOSE + EYES + EARS,
    "Face": NOSE + EYES,
    "Sunglasses": NOSE + EYES,
    "Scarf": NECK + SHOULDERS,
    "Torso-skin": NECK + SHOULDERS,
    "Upper-clothes": NECK + SHOULDERS + ELBOWS + WRISTS + HIPS,
    "Coat": NECK + SHOULDERS + ELBOWS + WRISTS + HIPS,
    "Dress": NECK + SHOULDERS + HIPS + KNEES,
    "Jumpsuits": NECK + SHOULDERS + HIPS + KNEES,
    "Pants": HIPS + KNEES + ANKLES,
    "Skirt": HIPS + KNEES,
    "Belt": HIPS,
    "Bag": WRISTS + HIPS,
    "Glove": ELBOWS + WRISTS,
    "Socks": ANKLES,
    "Left-arm": LEFT_ELBOW_WRIST,
    "Right-arm": RIGHT_ELBOW_WRIST,
    "Left-leg": LEFT_KNEE_ANKLE,
    "Right-leg": RIGHT_KNEE_ANKLE,
    "Left-shoe": (13,),
    "Right-shoe": (10,),
    # Pascal's parts of the body
    "Head": NOSE + EYES + EARS,
    "Torso": NECK + SHOULDERS + HIPS,
    "Upper-arms": SHOULDERS + ELBOWS,
    "Lower-arms": ELBOWS + WRISTS,
    "Upper-legs": HIPS + KNEES,
    "Lower-legs": KNEES + ANKLES,
    # A photo without a map
    "Person": tuple(range(NUM_JOINTS)),
}
"""Any of these joints in the target switches the class on (docs/paper.md 4, A3 `any`). Background: never."""

COLOUR_OF_CLASS: Mapping[str, tuple[int, int, int]] = {
    "Background": (0, 0, 0), "Hat": (128, 0, 128), "Hair": (139, 69, 19), "Face": (255, 160, 122),
    "Sunglasses": (25, 25, 112), "Scarf": (255, 105, 180), "Torso-skin": (244, 164, 96),
    "Upper-clothes": (220, 20, 60),
    "Coat": (0, 139, 139), "Dress": (199, 21, 133), "Jumpsuits": (148, 0, 211), "Pants": (30, 144, 255),
    "Skirt": (255, 215, 0), "Belt": (85, 107, 47), "Bag": (184, 134, 11), "Glove": (112, 128, 144),
    "Socks": (175, 238, 238),
    "Left-arm": (154, 205, 50), "Right-arm": (34, 139, 34), "Left-leg": (0, 206, 209),
    "Right-leg": (65, 105, 225), "Left-shoe": (255, 140, 0), "Right-shoe": (210, 60, 0),
    "Head": (255, 160, 122), "Torso": (220, 20, 60),
    "Upper-arms": (154, 205, 50), "Lower-arms": (34, 139, 34),
    "Upper-legs": (30, 144, 255), "Lower-legs": (0, 206, 209), "Person": (220, 20, 60),
}  # fmt: skip
"""RGB for drawing; one class looks the same in every set."""


SIMILAR: Mapping[str, str] = {
    "Coat": "Upper-clothes", "Jumpsuits": "Dress", "Torso-skin": "Face", "Glove": "Upper-clothes", "Socks": "Pants",
    "Belt": "Pants", "Bag": "Upper-clothes",
}  # fmt: skip
"""What a class becomes in a set without it: what covers the same part of the body. ATR counts the neck's skin to the face."""

FACE = ("Face", "Head")
CLOTHES = (
    "Hat", "Glove", "Sunglasses", "Upper-clothes", "Dress", "Coat", "Socks", "Pants", "Jumpsuits", "Scarf",
    "Skirt", "Belt", "Bag", "Left-shoe", "Right-shoe",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """A parsing label set: ids 0 to len(classes) - 1, all per-class arrays padded to MAX_CLASSES.

    foreground: bool [20], the classes that are person. palette: uint8 [20 3] RGB. flipped: uint8 [20], the id
    that each id becomes in the mirror. joints: bool [18 20], joint switches class on.
    """

    name: str
    classes: tuple[str, ...]
    foreground: np.ndarray
    palette: np.ndarray
    flipped: np.ndarray
    joints: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Ids of what metrics are reported for: face, clothes (worn or carried), person; groups the set lacks are
        left out."""
        wanted = {"face": FACE, "clothes": CLOTHES, "person": self.classes[1:]}
        found = {group: tuple(i for i, c in enumerate(self.classes) if c in names) for group, names in wanted.items()}
        return {group: ids for group, ids in found.items() if ids}

    def id_of(self, name: str) -> int | None:
        """The id of a class by its name; None where the set has no such class."""
        return self.classes.index(name) if name in self.classes else None


def _label_set(name: str, classes: tuple[str, ...]) -> LabelSet:
    """Raises ValueError that names the table to fill in, for a set that was added without."""
    for label in classes:
        if label not in COLOUR_OF_CLASS:
            raise ValueError(f"label set {name}: class {label} has no colour; add it to COLOUR_OF_CLASS")
        if label != "Background" and label not in JOINTS_OF_CLASS:
            raise ValueError(f"label set {name}: no joint switches class {label} on; add it to JOINTS_OF_CLASS")
    foreground = np.zeros(MAX_CLASSES, bool)
    foreground[1 : len(classes)] = True
    palette = np.zeros((MAX_CLASSES, 3), np.uint8)
    palette[: len(classes)] = [COLOUR_OF_CLASS[c] for c in classes]
    mirror = {"Left": "Right", "Right": "Left"}
    flipped = np.arange(MAX_CLASSES, dtype=np.uint8)
    joints = np.zeros((NUM_JOINTS, MAX_CLASSES), bool)
    for index, label in enumerate(classes):
        side, dash, part = label.partition("-")
        other = mirror.get(side, side) + dash + part
        if other not in classes:
            raise ValueError(f"label set {name}: {label} has no {other}, with which flips exchange it")
        flipped[index] = classes.index(other)
        if label != "Background":
            joints[list(JOINTS_OF_CLASS[label]), index] = True
    return LabelSet(name, classes, foreground, palette, flipped, joints)


_LIP = (
    "Background", "Hat", "Hair", "Glove", "Sunglasses", "Upper-clothes", "Dress", "Coat", "Socks", "Pants",
    "Jumpsuits", "Scarf", "Skirt", "Face", "Left-arm", "Right-arm", "Left-leg", "Right-leg",
    "Left-shoe", "Right-shoe",
)  # fmt: skip
_ATR = (
    "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt",
    "Left-shoe",
    "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf",
)  # fmt: skip
_PASCAL = ("Background", "Head", "Torso", "Upper-arms", "Lower-arms", "Upper-legs", "Lower-legs")

LABEL_SETS: Mapping[str, LabelSet] = {
    "atr18": _label_set("atr18", _ATR),
    "lip20": _label_set("lip20", _LIP),
    "cihp20": _label_set("cihp20", tuple("Torso-skin" if c == "Jumpsuits" else c for c in _LIP)),
    "pascal7": _label_set("pascal7", _PASCAL),
    "whole": _label_set("whole", ("Background", "Person")),
}
"""docs/paper.md 8.4. "whole" serves photos without a map: one foreground class that every joint switches on."""

WHOLE_PHOTO = 1
"""The one foreground id of "whole"."""


def label_set(name: str) -> LabelSet:
    """The label set of that name; "none" means "whole". Raises InputError for an unknown name."""
    key = "whole" if name == "none" else name
    if key not in LABEL_SETS:
        raise InputError(f"unknown label set '{name}'; choose one of {', '.join(LABEL_SETS)}, or none")
    return LABEL_SETS[key]


def said_labels(folder: str | pathlib.Path) -> str:
    """The name of the label set of a folder's maps as LABELS_FILE says it; "" where nothing does. Raises InputError."""
    path = pathlib.Path(folder) / LABELS_FILE
    try:
        return label_set(read_text(path, "a label set's name", limit=MAX_SETTINGS).strip()).name if path.is_file() else ""
    except InputError as error:
        raise InputError(
            f"{path}: names no label set ({one_line(error)}); write the maps' own into it, or remove it"
        ) from error


def check_said_labels(folder: str | pathlib.Path, labels: str) -> None:
    """Ids of one set read as another's are wrong without a sign. Raises InputError where the folder says another set."""
    said = said_labels(folder)
    if said and said != labels:
        raise InputError(
            f"{folder}: its maps are {said} ({LABELS_FILE} there), not {labels}; name {said} as their label set"
        )


def class_on(joints: np.ndarray, labels: LabelSet, *, hw: tuple[int, int]) -> np.ndarray:
    """bool [20]: classes that a target pose switches on.

    A joint outside its frame of `hw` pixels counts as absent. Without maps (set "whole") any set of joints will do.
    """
    there = inside(joints, hw)
    if labels.name == "whole":
        return labels.joints.any(0) & there.any()
    return labels.joints[there].any(0)


def whole_photo(image_hw: tuple[int, int]) -> np.ndarray:
    """The map of a photo without one (set "whole"): uint8 [h w], person everywhere."""
    return np.full(image_hw, WHOLE_PHOTO, np.uint8)


def read_parsing(path: str | pathlib.Path, labels: LabelSet, image_hw: tuple[int, int]) -> np.ndarray:
    """A parsing map as uint8 [h w] of ids: PNG, mode L or P (ids are palette indices, never colours).

    Raises InputError where the file is missing, truncated or of another kind, where its shape is not the
    photo's `image_hw`, and where an id is outside the set.
    """
    data = read_bytes(path, "a parsing map", limit=MAX_PICTURE, advice="check the path, or give none")
    return decode_parsing(data, labels, image_hw, name=str(path))


def decode_parsing(
    data: bytes, labels: LabelSet, image_hw: tuple[int, int], *, name: object, swap: bool = False
) -> np.ndarray:
    """The same from an encoded map in memory; `name` is what errors call it. swap: left and right ids in each other's places."""
    parsing = decode_runs(data, max_pixels=MAX_PIXELS, table=_swapped(labels) if swap else None)
    if parsing is not None:
        return check_parsing(parsing, labels, image_hw, name=name)
    parsing = check_parsing(_decode_png(data, name), labels, image_hw, name=name)
    return cv2.LUT(parsing, _swapped(labels)) if swap else parsing


def _decode_png(data: bytes, name: object) -> np.ndarray:
    parsing = decode_grey_png(data, max_pixels=MAX_PIXELS)
    if parsing is not None:
        return parsing
    with open_picture(data, name=name, what="parsing map") as image:
        if image.format == "JPEG" or image.mode not in {"L", "P"}:
            seen = " (a picture of the map in colours?)" if image.mode.startswith("RGB") else ""
            raise InputError(
                f"{name}: {image.format} of mode {image.mode}{seen}; a parsing map is a PNG of ids, mode L or P"
            )
        return np.array(image)


def check_parsing(parsing: np.ndarray, labels: LabelSet, image_hw: tuple[int, int], *, name: object) -> np.ndarray:
    """The map itself; InputError where its shape is not `image_hw` or an id is outside the set."""
    if parsing.shape != tuple(image_hw):
        (h, w), (image_h, image_w) = parsing.shape[:2], image_hw
        turned = (h, w) == (image_w, image_h)
        advice = (
            "its EXIF tag turns the photo, and the map was made of it unturned: turn the map" if turned else "make them one size"
        )
        raise InputError(f"{name}: the map is {h}x{w} but its photo is {image_h}x{image_w}; {advice}")
    if parsing.max(initial=0) >= len(labels):
        strange = [int(i) for i in np.unique(parsing) if i >= len(labels)]
        shown = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
        why = "255 often means void: make it 0, the background" if strange == [255] else "is it another set's?"
        raise InputError(f"{name}: label {shown} is outside {labels.name}'s 0 to {len(labels) - 1}; {why}")
    return parsing


def convert_parsing(parsing: np.ndarray, labels: LabelSet, wanted: LabelSet, *, name: str) -> np.ndarray:
    """The map in the ids of another set: classes of the same name, else SIMILAR ones; in "whole" all that is person.

    Raises InputError where the sets are too different.
    """
    if wanted.name == "whole":
        return np.where(parsing > 0, WHOLE_PHOTO, 0).astype(np.uint8)
    table = np.zeros(MAX_CLASSES, np.uint8)
    for index, label in enumerate(labels.classes):
        found = wanted.id_of(label if label in wanted.classes else SIMILAR.get(label, ""))
        if found is None:
            raise InputError(
                f"{name}: the map's labels are {labels.name}, and the model's {wanted.name} have nothing for its {label}; give a "
                f"map of {wanted.name}"
            )
        table[index] = found
    return table[parsing]


def flip_parsing(parsing: np.ndarray, labels: LabelSet) -> np.ndarray:
    """The map of the mirrored photo: columns reversed, left and right ids swapped. uint8 [h w]."""
    return cv2.LUT(cv2.flip(parsing, 1), _swapped(labels))  # six times as fast as indexing


def _swapped(labels: LabelSet) -> np.ndarray:
    """uint8 [256]: id -> the id of the other side; ids outside of the set stay."""
    table = np.arange(256, dtype=np.uint8)
    table[:MAX_CLASSES] = labels.flipped
    return table


def class_areas(parsing: np.ndarray) -> np.ndarray:
    """float32 [20]: each class's share of the pixels."""
    return (np.bincount(parsing.reshape(-1), minlength=MAX_CLASSES) / parsing.size).astype(np.float32)


def colour_parsing(parsing: np.ndarray, labels: LabelSet) -> np.ndarray:
    """uint8 [h w 3]: the map in the set's colours."""
    return labels.palette[parsing]
