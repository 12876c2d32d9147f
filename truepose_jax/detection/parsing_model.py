"""Parsing maps by a semantic segmentation model of transformers, whose class names are mapped to a label set of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline.annotations.parsing import LABEL_SETS, LabelSet, label_set
from input_pipeline.schema import InputError
from truepose_jax.detection.torch_models import load_model

CLASS_OF_NAME: Mapping[str, tuple[str, ...]] = {
    "Background": ("background", "bg", "other", "others", "null", "unlabeled"),
    "Hat": ("hat", "cap", "headwear"),
    "Hair": ("hair",),
    "Sunglasses": ("sunglasses", "glasses", "eyewear"),
    "Upper-clothes": (
        "upperclothes", "upperclothing", "upperbody", "upper", "top", "shirt", "tshirt", "blouse", "sweater", "vest",
    ),
    "Coat": ("coat", "jacket", "outer", "outerwear", "cardigan"),
    "Skirt": ("skirt",),
    "Pants": ("pants", "trousers", "jeans", "shorts", "lowerclothes", "lowerbody", "leggings"),
    "Dress": ("dress",),
    "Jumpsuits": ("jumpsuits", "jumpsuit", "romper"),
    "Belt": ("belt",),
    "Bag": ("bag", "handbag", "purse"),
    "Scarf": ("scarf",),
    "Glove": ("glove", "gloves"),
    "Socks": ("socks", "sock"),
    "Face": ("face",),
    "Torso-skin": ("torsoskin", "neck", "torsoskinneck"),
    "Left-arm": ("leftarm",), "Right-arm": ("rightarm",), "Left-leg": ("leftleg",), "Right-leg": ("rightleg",),
    "Left-shoe": ("leftshoe",), "Right-shoe": ("rightshoe",),
    "Head": ("head",), "Torso": ("torso",), "Upper-arms": ("upperarms",), "Lower-arms": ("lowerarms",),
    "Upper-legs": ("upperlegs",), "Lower-legs": ("lowerlegs",),
}  # fmt: skip
"""What models call a class, in small letters without anything between."""

INSTEAD = {"Coat": "Upper-clothes", "Jumpsuits": "Dress", "Sunglasses": "Face", "Belt": "Upper-clothes"}
"""Where a label set has no such class, it is worn over this one. What is not here becomes background."""

ESSENTIAL = (("Face", "Head"), ("Upper-clothes", "Torso"))
"""Of each of these one must come out: without them a map says nothing of who and of what is worn."""


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """table: uint8 [model's classes], the id of each in `labels`. lost: lines that say what the map loses."""

    labels: LabelSet
    table: np.ndarray
    lost: tuple[str, ...]


def class_map(names: Sequence[str], wanted: str | None, *, model: str) -> ClassMap:
    """The map from a model's classes, by name, to the label set `wanted`; None: the one that loses fewest.

    Raises InputError where the names give no face or no clothes.
    """
    if wanted:
        return _class_map(names, label_set(wanted), model)
    maps, failed = [], None
    for labels in LABEL_SETS.values():
        try:
            maps.append(_class_map(names, labels, model))
        except InputError as error:
            failed = failed or error
    if not maps:
        raise failed
    return min(maps, key=lambda found: len(found.lost))


def _class_map(names: Sequence[str], labels: LabelSet, model: str) -> ClassMap:
    known = {alias: name for name, aliases in CLASS_OF_NAME.items() for alias in aliases}
    table = np.zeros(len(names), np.uint8)
    lost = []
    for i, name in enumerate(names):
        ours = known.get(re.sub(r"[^a-z]", "", name.lower()))
        found = labels.id_of(ours) if ours else None
        if found is None and ours in INSTEAD:
            found = labels.id_of(INSTEAD[ours])
            if found is not None:
                lost.append(f"{name} becomes {INSTEAD[ours]}")
        if found is None:
            lost.append(f"{name} becomes Background")
        table[i] = found or 0
    got = {labels.classes[i] for i in table}
    missing = [" or ".join(options) for options in ESSENTIAL if not got & set(options)]
    if missing:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise InputError(
            f"--parsing={model}: its {len(names)} classes ({shown}) give {labels.name} no {' and no '.join(missing)}; take "
            "a model trained on people and clothes"
        )
    return ClassMap(labels, table, tuple(lost))


class ParsingModel:
    """Photos -> maps. Raises InputError at once where the checkpoint does not serve."""

    def __init__(self, name: str, wanted: str | None, device: str):
        self._model, self._processor = load_model("parsing", name, "AutoModelForSemanticSegmentation", device)
        names = self._model.config.id2label
        self.map = class_map([names[i] for i in range(len(names))], wanted, model=name)

    def __call__(self, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [h w 3] each -> uint8 [h w] each: the logits at the photo's size, then the largest."""
        import torch

        inputs: Any = self._processor(images=list(photos), return_tensors="pt").to(self._model.device)
        maps = []
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
            for photo, scores in zip(photos, logits, strict=True):
                full = torch.nn.functional.interpolate(
                    scores[None], size=photo.shape[:2], mode="bilinear", align_corners=False
                )  # fmt: skip
                maps.append(self.map.table[full[0].argmax(0).cpu().numpy()])
        return maps
