"""How well the files that come along find people in real photos: joints, masks, parsing maps, views. Writes JSON and a table.

    python benchmarks/photo_accuracy.py --data=../shared/data [--out=benchmarks/results/photo_accuracy]

--data holds zalora_parsed (studio photos with OpenPose joints and hand-made CIHP maps), deepfashion_samples (photos with joints;
their names say front, side or back) and street_parsed (Clothing Co-Parsing). Needs the [pose] extra.
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import tables
from input_pipeline.annotations.keypoints import load_pose
from input_pipeline.annotations.parsing import LABEL_SETS, read_parsing
from input_pipeline.annotations.photo import read_photo
from input_pipeline.schema import InputError
from input_pipeline.skeletons import OPENPOSE
from input_pipeline.sources.ccp import read_ccp
from input_pipeline.synthetic.people import SyntheticPeople
from truepose_jax.detection.blazepose import Person, blazepose
from truepose_jax.detection.heuristic_parsing import parse_person
from truepose_jax.runtime.cli import Parser, program
from truepose_jax.runtime.markdown import narrow, table

OUT = tables.RESULTS / "photo_accuracy"
TRUNK = 0.29
"""From the neck to the hips, in body heights: DeepFashion's photos show half of a body, and have no map."""
WITHIN = (0.025, 0.05, 0.1)
STUDIO_CLASSES = {
    "head": ("Hat", "Hair", "Sunglasses", "Face"),
    "upper": ("Upper-clothes", "Coat", "Dress", "Scarf"),
    "lower": ("Pants", "Skirt"),
    "arms": ("Left-arm", "Right-arm", "Glove"),
    "legs": ("Left-leg", "Right-leg"),
    "feet": ("Left-shoe", "Right-shoe", "Socks"),
    "torso skin": ("Torso-skin",),
}
STREET_CLASSES = {
    "hair": ("Hair",),
    "skin": ("Face", "Left-arm", "Right-arm", "Left-leg", "Right-leg"),
    "upper": ("Upper-clothes", "Scarf"),
    "lower": ("Pants", "Skirt"),
    "shoes": ("Left-shoe", "Right-shoe"),
}
NOT_SCORED = ("Hat", "Sunglasses", "Bag", "Belt")
"""What a photo shows over a person and the heuristic does not tell; on the street maps alone such pixels are left out."""
VIEW = re.compile(r"_(front|side|back)\b")


class Found:
    """A photo with what is known of it and what was found."""

    def __init__(self, name: str, photo: np.ndarray, joints: np.ndarray | None = None, truth: np.ndarray | None = None):
        self.name, self.photo, self.joints, self.truth = name, photo, joints, truth
        start = time.process_time()
        self.person: Person = blazepose()(photo, name=name)
        self.seconds = time.process_time() - start
        self.mirrored = blazepose()(np.ascontiguousarray(photo[:, ::-1]), name=f"{name}, mirrored")

    def parsed(self, labels: str) -> np.ndarray:
        return parse_person(self.photo, self.person.joints(), self.person.mask > 0.5, labels=labels)

    @property
    def height(self) -> float:
        """Of the body in pixels."""
        if self.truth is not None:
            return float(np.ptp(np.flatnonzero(self.truth.any(1))))
        hips = [self.joints[i, :2] for i in (8, 11) if self.joints[i, 2]]
        return float(np.hypot(*(self.joints[1, :2] - np.mean(hips, axis=0)))) / TRUNK


def studio(root: pathlib.Path) -> Iterator[Found]:
    for path in sorted((root / "image").glob("*.jpg")):
        photo = read_photo(path)
        pose = load_pose(root / "keypoints" / f"{path.stem}_keypoints.json", frame_hw=photo.shape[:2])
        truth = read_parsing(root / "parsing" / f"{path.stem}.png", LABEL_SETS["cihp20"], photo.shape[:2])
        yield Found(path.stem, photo, pose.joints, truth)


def deepfashion(root: pathlib.Path) -> Iterator[Found]:
    for path in sorted((root / "img").rglob("*.jpg")):
        rows = root / "pose" / path.relative_to(root / "img").with_suffix(".txt")
        if rows.exists():
            pose = load_pose(rows)  # in 256x176
            photo = read_photo(path)
            scale = photo.shape[1] / pose.frame_hw[1], photo.shape[0] / pose.frame_hw[0]
            yield Found(path.stem, photo, pose.joints * (*scale, 1))


def street(root: pathlib.Path) -> Iterator[Found]:
    (split,) = read_ccp(root)[0].splits.values()
    for item in split.items:
        picture = item.load()
        yield Found(item.name, picture.image, truth=picture.parsing)


def joint_row(found: Sequence[Found]) -> dict[str, float]:
    errors, shown, known = [], [], []
    for one in found:
        true = one.joints[:, 2] > 0
        errors.append(np.hypot(*(one.person.points - one.joints[:, :2])[true].T) / one.height)
        shown.append(one.person.joints()[:, 2] > 0)
        known.append(true)
    apart, shown, known = np.concatenate(errors), np.array(shown), np.array(known)
    row = {"photos": len(found), "joints": len(apart)}
    row |= {f"within {100 * limit:g} %": float((apart < limit).mean()) for limit in WITHIN}
    row["shown that are there"] = float((shown & known).sum() / shown.sum())
    row["there that are shown"] = float((shown & known).sum() / known.sum())
    return row | {"CPU s a photo": float(np.median([one.seconds for one in found]))}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def mask_row(found: Sequence[Found]) -> dict[str, float]:
    each = [overlap(one.person.mask > 0.5, one.truth > 0) for one in found]
    return {"photos": len(each), "mean IoU": float(np.mean(each)), "least IoU": min(each)}


def map_row(found: Sequence[Found], maps: Sequence[np.ndarray], labels: str, groups: Mapping) -> dict[str, float]:
    """IoU of merged classes, over all photos' pixels together."""
    set_of, row = LABEL_SETS[labels], {}
    care = [np.ones(one.truth.shape, bool) for one in found]
    if groups is STREET_CLASSES:
        care = [~np.isin(one.truth, [set_of.id_of(name) for name in NOT_SCORED]) for one in found]
    for group, names in groups.items():
        ids = [i for i in map(set_of.id_of, names) if i is not None]
        ours = np.concatenate([np.isin(m, ids)[where] for m, where in zip(maps, care, strict=True)])
        theirs = np.concatenate([np.isin(one.truth, ids)[where] for one, where in zip(found, care, strict=True)])
        row[group] = overlap(ours, theirs)
    return {"photos": len(found), **row, "mean": float(np.mean(list(row.values())))}


def mirror_row(found: Sequence[Found]) -> dict[str, float]:
    """The mirrored photo must show the mirrored pose: the same view, and joints of exchanged sides."""
    same_view = [one.person.facing == one.mirrored.facing for one in found]
    apart = []
    for one in found:
        back = one.mirrored.points[OPENPOSE.flipped] * (-1, 1) + (one.photo.shape[1] - 1, 0)
        size = np.ptp(one.person.points[:, 1])
        seen = one.person.joints()[:, 2] > 0
        apart.append(np.hypot(*(back - one.person.points)[seen].T) / size)
    row = {"photos": len(found), "the same view": float(np.mean(same_view))}
    return row | {"joints within 5 %": float((np.concatenate(apart) < 0.05).mean())}


def view_row(found: Sequence[Found]) -> dict[str, int]:
    """Of photos whose names say the view, by name and what was found, mirrored ones too."""
    row: dict[str, int] = {}
    for one in found:
        said = VIEW.search(one.name)
        for person in (one.person, one.mirrored) if said else ():
            key = f"{said[1]} found {person.facing}"
            row[key] = row.get(key, 0) + 1
    return dict(sorted(row.items()))


def refused_row() -> dict[str, float]:
    """What shows no person: the share that is refused."""
    random = np.random.default_rng(0)
    hw, people = (256, 192), SyntheticPeople(seed=5, split="train", identities=8, poses_per_identity=1, size=(256, 192))
    pictures = {
        "noise": [random.integers(0, 256, (*hw, 3), dtype=np.uint8) for _ in range(8)],
        "one colour": [np.full((*hw, 3), value, np.uint8) for value in (0, 90, 255)],
        "drawn people": [people.image(i).image for i in range(8)],
    }
    row = {}
    for kind, images in pictures.items():
        refused = 0
        for image in images:
            try:
                blazepose()(image)
            except InputError:
                refused += 1
        row[f"{kind} refused"] = refused / len(images)
    return row


def measure(root: pathlib.Path) -> dict[str, dict]:
    studio_found, fashion = list(studio(root / "zalora_parsed")), list(deepfashion(root / "deepfashion_samples"))
    street_found = list(street(root / "street_parsed"))
    cihp, atr = LABEL_SETS["cihp20"], LABEL_SETS["atr18"]
    whole = [np.full(one.truth.shape, cihp.id_of("Upper-clothes"), np.uint8) for one in studio_found]
    return {
        "Joints": {"studio": joint_row(studio_found), "DeepFashion": joint_row(fashion)},
        "Mask": {"studio": mask_row(studio_found), "street": mask_row(street_found)},
        "Map, studio": {
            "auto": map_row(studio_found, [f.parsed(cihp.name) for f in studio_found], cihp.name, STUDIO_CLASSES),
            "none": map_row(studio_found, whole, cihp.name, STUDIO_CLASSES),
        },
        "Map, street": {
            "auto": map_row(street_found, [f.parsed(atr.name) for f in street_found], atr.name, STREET_CLASSES)
        },
        "Mirrored": {
            "studio": mirror_row(studio_found), "DeepFashion": mirror_row(fashion), "street": mirror_row(street_found),
        },
        "Views of DeepFashion": {"photos and their mirrors": view_row(fashion)},
        "Not people": {"made pictures": refused_row()},
    }  # fmt: skip


def report(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown."""
    lines = ["# What the files that come along find in photos", ""]
    lines += ["`python benchmarks/photo_accuracy.py --data=DIR`; its docstring says what the photos are.", ""]
    for title, part in rows.items():
        heads = list(next(iter(part.values())))
        cells = [[name, *(_text(row[head]) for head in heads)] for name, row in part.items()]
        lines += [f"## {title}", "", *table(["", *heads], cells), ""]
    return narrow("\n".join(lines))


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


@program
def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    flags = parser.parse_args(argv)
    rows = measure(flags.data)
    tables.write(flags.out.with_suffix(".json"), rows, report(rows))
    print(report(rows))


if __name__ == "__main__":
    sys.exit(main())
