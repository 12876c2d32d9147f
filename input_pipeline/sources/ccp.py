"""Clothing Co-Parsing (street photos with hand-made 59-class labels), its classes mapped to ATR-18. No joints.

    RAW/photos/0007.jpg
    RAW/annotations/pixel-level/0007.mat        key `groundtruth`, uint8 [h w]
    RAW/label_list.mat                          the 59 names

ATR-18 is taken because it has a bag and a belt, which these photos show; LIP-20 would keep coats and socks apart
instead. What the map loses is in LOST, and goes into every report. Without joints nobody can be a target, so such a
set can be built, checked and looked at, and not trained on.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from input_pipeline.annotations.parsing import LABEL_SETS, check_parsing
from input_pipeline.annotations.photo import one_line
from input_pipeline.files import read_bytes
from input_pipeline.schema import InputError
from input_pipeline.sources import base
from input_pipeline.sources.listing import MissingFiles, Needed, photos_by_key

LABELS = "atr18"
MAX_MAT_BYTES = 64 << 20

TO_ATR: Mapping[str, tuple[str, ...]] = {
    "Background": ("null", "accessories", "gloves"),
    "Hat": ("hat",),
    "Hair": ("hair",),
    "Sunglasses": ("glasses", "sunglasses"),
    "Upper-clothes": (
        "blazer", "blouse", "bodysuit", "bra", "cape", "cardigan", "coat", "hoodie", "intimate", "jacket", "jumper",
        "shirt", "suit", "sweater", "sweatshirt", "t-shirt", "tie", "top", "vest",
    ),
    "Skirt": ("skirt",),
    "Pants": ("jeans", "leggings", "panties", "pants", "shorts", "stockings", "tights"),
    "Dress": ("dress", "romper", "swimwear"),
    "Belt": ("belt",),
    "Left-shoe": (
        "boots", "clogs", "flats", "heels", "loafers", "pumps", "sandals", "shoes", "sneakers", "socks", "wedges",
    ),
    "Face": ("skin", "bracelet", "earrings", "necklace", "ring", "watch"),
    "Bag": ("bag", "purse", "wallet"),
    "Scarf": ("scarf",),
}  # fmt: skip

LOST = (
    "59 classes become atr18's 18. Lost: skin is one class, so face, arms and legs are all Face (and jewellery with "
    "them); shoes have no side, so both are Left-shoe (socks too); coats, jackets, suits and ties are Upper-clothes; "
    "tights and stockings are Pants; rompers are Dress; gloves and unnamed accessories are Background"
)
PHOTOS_FROM = "from github.com/bearpaw/clothing-co-parsing (Apache-2.0)"
DESCRIPTION = "Clothing Co-Parsing (CCP): street photos with hand-made labels, mapped to ATR-18. No joints, no pairs."
CITATION = """@inproceedings{yang2014clothing,
  author = {Yang, Wei and Luo, Ping and Lin, Liang},
  title = {Clothing Co-Parsing by Joint Image Segmentation and Labeling}, booktitle = {CVPR}, year = {2014}}"""
HOMEPAGE = "https://github.com/bearpaw/clothing-co-parsing"


@dataclasses.dataclass(frozen=True)
class CcpItem:
    """A photo with its .mat of labels. table: the ATR-18 id of each of the 59."""

    name: str
    identity: str
    photo: str
    mat: str
    table: tuple[int, ...]

    def load(self) -> base.RawPicture:
        image, jpeg = base.read_photo_bytes(self.photo)
        try:
            ids = _read_mat(pathlib.Path(self.mat), "groundtruth")
            if ids.max(initial=0) >= len(self.table):
                raise InputError(f"{self.mat}: label {ids.max()} is outside the list of {len(self.table)}")
            parsing = np.array(self.table, np.uint8)[ids.astype(np.intp)]
            check_parsing(parsing, LABEL_SETS[LABELS], image.shape[:2], name=self.mat)
        except InputError as error:
            raise base.Unusable(base.BAD_MAP, str(error)) from error
        return base.RawPicture(image, parsing, base.joints_in(None, image.shape[:2]), jpeg)


def read_ccp(raw: str | pathlib.Path) -> tuple[base.RawSet, list[Needed]]:
    """The photos that have labels, and the checklist of the files. Raises InputError."""
    root = pathlib.Path(raw)
    folder, mats, names = root / "photos", root / "annotations" / "pixel-level", root / "label_list.mat"
    needed = [
        Needed(what, str(path), PHOTOS_FROM, str(path) if path.exists() else "")
        for what, path in (("photos", folder), ("labels", mats), ("names of the labels", names))
    ]
    if not all(item.found for item in needed):
        raise MissingFiles(f"{root}: not the whole Clothing Co-Parsing dataset", needed)
    table = label_table(names)
    photos = photos_by_key(folder)
    labelled = {path.stem: path for path in sorted(mats.glob("*.mat"))}
    items = [
        CcpItem(key, key, str(photo), str(labelled[key]), table) for key, photo in photos.items() if key in labelled
    ]
    dropped = [
        base.Dropped(key, base.NO_MAP, "no pixel-level labels", str(p))
        for key, p in photos.items()
        if key not in labelled
    ]
    split = base.RawSplit(items, np.zeros((0, 2), np.int32))
    notes = [LOST, "no joints: this set can be checked and inspected, not trained on"]
    licence = "Apache-2.0, as its repository says"
    raw_set = base.RawSet("ccp", LABELS, {"train": split}, DESCRIPTION, CITATION, HOMEPAGE, licence, dropped, (), notes)
    return raw_set, needed


def label_table(path: pathlib.Path) -> tuple[int, ...]:
    """The ATR-18 id of each class of a label_list.mat. Raises InputError for a name TO_ATR does not have."""
    ids = {name: LABEL_SETS[LABELS].classes.index(ours) for ours, theirs in TO_ATR.items() for name in theirs}
    names = [str(cell[0]) if cell.size else "" for cell in _read_mat(path, "label_list").ravel()]
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise InputError(f"{path}: has classes that are not Clothing Co-Parsing's: {', '.join(unknown[:3])}")
    return tuple(ids[name] for name in names)


def _read_mat(path: pathlib.Path, key: str) -> np.ndarray:
    import scipy.io
    from scipy.io.matlab import MatReadError

    try:
        return scipy.io.loadmat(io.BytesIO(read_bytes(path, "a label map", limit=MAX_MAT_BYTES)))[key]
    except InputError:
        raise
    except (OSError, LookupError, ValueError, TypeError, NotImplementedError, zlib.error, MatReadError) as error:
        raise InputError(f"{path}: not a MATLAB file with '{key}' ({one_line(error)})") from error
