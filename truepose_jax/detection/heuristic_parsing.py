"""A parsing map from a person's joints, mask and colours, with no network: coarse, but there for every photo.

Each pixel of the mask goes to the nearest part of the body (limbs as capsules, head and torso as discs and hulls, all measured by
the torso). Skin is told from clothes by the colours of the face; where the upper garment ends, by the colours of chest and
thighs. Hats, glasses, bags, belts and scarves are not told from what they cover.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from input_pipeline.annotations.parsing import LABEL_SETS, convert_parsing

LABELS = LABEL_SETS["cihp20"]
"""Of the maps made here: it tells the neck's skin from the face."""
HAIR, FACE, NECK_SKIN, UPPER, LOWER, DRESS, RIGHT_ARM, LEFT_ARM, RIGHT_LEG, LEFT_LEG, RIGHT_SHOE, LEFT_SHOE = (
    LABELS.id_of(name)
    for name in (
        "Hair", "Face", "Torso-skin", "Upper-clothes", "Pants", "Dress", "Right-arm", "Left-arm", "Right-leg", "Left-leg",
        "Right-shoe", "Left-shoe",
    )
)  # fmt: skip

LONGEST_SIDE = 512
"""Larger photos are parsed at this size; the outline of the person stays that of the mask."""
ARMS, LEGS = ("right arm", "left arm"), ("right thigh", "left thigh", "right shank", "left shank")
LIMBS = (
    ("right arm", 2, 3, 0.20), ("right arm", 3, 4, 0.17), ("left arm", 5, 6, 0.20), ("left arm", 6, 7, 0.17),
    ("right thigh", 8, 9, 0.30), ("right shank", 9, 10, 0.22), ("left thigh", 11, 12, 0.30), ("left shank", 12, 13, 0.22),
)  # fmt: skip
"""Part, its two joints, its half width in shoulder widths."""
ENDS = (
    ("right hand", 3, 4, 0.11, 0.45, 0.16), ("left hand", 6, 7, 0.11, 0.45, 0.16),
    ("right foot", 9, 10, 0.11, 0.32, 0.22), ("left foot", 12, 13, 0.11, 0.32, 0.22),
)  # fmt: skip
"""Part, the joints that it goes on from, where it begins and ends beyond the second, its half width: hands in lengths of the
forearm (the width in shoulder widths), feet in shoulder widths."""
TORSO_WIDTH, NECK_WIDTH = 0.30, 0.22
FOREHEAD = 0.5
"""How far above the eyes the hair begins, in radii of the head, where it has the skin's colour."""
SKIN, SAME_COLOUR = 9.0, 1.2
"""Squared distance from the face's colour within which a pixel is skin; distance under which chest and thighs are one garment."""
BARE = 0.35
"""Share of the shanks that is skin from which one garment down to the thighs is a dress."""


def parse_person(photo: np.ndarray, joints: np.ndarray, mask: np.ndarray, *, labels: str = LABELS.name) -> np.ndarray:
    """uint8 [h w], ids of the label set `labels`; background outside of the mask.

    photo: uint8 [h w 3]. joints: [18 3] (x, y, visible). mask: bool [h w], what is person. Raises InputError where `labels` has
    nothing for a class of LABELS.
    """
    h, w = mask.shape
    scale = min(1.0, LONGEST_SIDE / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    found = np.zeros(inside.shape, np.uint8)
    if inside.any():
        found = _Figure.of(small, joints * (size[0] / w, size[1] / h, 1), inside).parse()
        # Slivers that the small mask lacks get their neighbours' class.
        found = found[tuple(distance_transform_edt(found == 0, return_distances=False, return_indices=True))]
    full = np.where(mask, cv2.resize(found, (w, h), interpolation=cv2.INTER_NEAREST), 0).astype(np.uint8)
    return full if labels == LABELS.name else convert_parsing(full, LABELS, LABEL_SETS[labels], name="the found map")


@dataclasses.dataclass(frozen=True)
class _Figure:
    """A person while it is parsed. joints: {joint: float [2]} of the visible ones. xy: float32 [h w 2], each pixel's place.
    colours: float32 [h w 3], Lab. unit: the width of the shoulders in pixels. part: str [h w], the nearest part."""

    joints: dict[int, np.ndarray]
    mask: np.ndarray
    xy: np.ndarray
    colours: np.ndarray
    unit: float
    head: _Head | None
    part: np.ndarray

    @classmethod
    def of(cls, photo: np.ndarray, joints: np.ndarray, mask: np.ndarray) -> _Figure:
        h, w = mask.shape
        seen = {i: joint[:2].astype(np.float32) for i, joint in enumerate(joints) if joint[2] > 0}
        xy = np.stack(np.meshgrid(np.arange(w), np.arange(h)), axis=-1).astype(np.float32)
        lab = cv2.cvtColor(photo, cv2.COLOR_RGB2LAB).astype(np.float32)
        unit = _unit(seen, height=float(np.ptp(np.flatnonzero(mask.any(1))) + 1))
        head = _Head.of(seen, unit)
        distances = _distances(seen, xy, unit, head)
        names = np.array([name for name, _ in distances] or ["torso"])
        nearest = np.argmin([d for _, d in distances], axis=0) if distances else np.zeros((h, w), int)
        return cls(seen, mask, xy, cv2.bilateralFilter(lab, 5, 20, 5), unit, head, names[nearest])

    def at(self, *parts: str) -> np.ndarray:
        return np.isin(self.part, parts) & self.mask

    def parse(self) -> np.ndarray:
        """uint8 [h w] of LABELS."""
        skin = self._skin()
        found = np.where(self.mask, UPPER, 0).astype(np.uint8)
        if self.head is not None:
            self._put_head(found, skin)
        found[self.at("torso") & (skin if skin is not None else False)] = NECK_SKIN
        bare = skin if skin is not None else np.zeros(self.mask.shape, bool)
        for side, arm, leg, shoe in (
            ("right", RIGHT_ARM, RIGHT_LEG, RIGHT_SHOE),
            ("left", LEFT_ARM, LEFT_LEG, LEFT_SHOE),
        ):
            found[self.at(f"{side} arm") & bare] = arm
            found[self.at(f"{side} hand")] = arm
            thigh_and_shank = self.at(f"{side} thigh", f"{side} shank")
            found[thigh_and_shank] = np.where(bare, leg, LOWER)[thigh_and_shank]
            found[self.at(f"{side} foot")] = shoe
        self._divide_clothes(found, bare)
        return _majority(found, self.mask)

    def _skin(self) -> np.ndarray | None:
        """bool [h w]: what has the colour of the face around the nose; None where there is no face to learn it from."""
        if self.head is None or 0 not in self.joints:
            return None
        eyes = [self.joints[i] for i in (14, 15) if i in self.joints]
        between = float(np.hypot(*(eyes[0] - eyes[1]))) if len(eyes) == 2 else 0.0
        near = _length(self.xy - self.joints[0]) < 0.75 * max(between, 0.35 * self.head.radius)
        samples = self.colours[near & self.mask]
        if len(samples) < 12:
            return None
        middle = np.median(samples, axis=0)
        for _ in range(2):  # eyes, hair and glasses are left out
            close = (np.abs(samples - middle) < 1.6 * np.array([35, 8, 10])).all(1)
            samples = samples[close] if close.sum() > 8 else samples
            middle = np.median(samples, axis=0)
        away = (self.colours - middle) / np.maximum(samples.std(axis=0), [10, 3.5, 4.5])
        skin = ((away * (0.45, 1, 1)) ** 2).sum(-1) < SKIN  # light varies more over a body than hue
        opened = cv2.morphologyEx((skin & self.mask).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        return opened > 0

    def _put_head(self, found: np.ndarray, skin: np.ndarray | None) -> None:
        head = self.head
        upper = self.at("head", "neck")
        found[upper] = HAIR
        from_middle = _length(self.xy - head.middle)
        if skin is not None:
            found[upper & skin] = FACE
            eyes = [self.joints[i] for i in (14, 15) if i in self.joints]
            if eyes:
                above = (self.xy - np.mean(eyes, axis=0)) @ head.up
                found[upper & (above > FOREHEAD * head.radius)] = HAIR
        elif 0 in self.joints:
            found[upper & (from_middle < 0.6 * head.radius)] = FACE
        neck = self.at("neck")
        bare = skin if skin is not None else np.zeros(neck.shape, bool)
        found[neck & bare & (from_middle > 0.9 * head.radius)] = NECK_SKIN
        if 1 in self.joints:  # collars
            found[neck & ~bare & ((self.xy - self.joints[1]) @ head.up < 0.2 * head.radius)] = UPPER

    def _divide_clothes(self, found: np.ndarray, skin: np.ndarray) -> None:
        """Draws the line between upper and lower garment, or finds that they are one."""
        hips = [self.joints[i] for i in (8, 11) if i in self.joints]
        if not ({2, 5} <= self.joints.keys() and hips):
            return
        shoulders = (self.joints[2] + self.joints[5]) / 2
        down = np.mean(hips, axis=0) - shoulders
        t = (self.xy - shoulders) @ down / max(float(down @ down), 1.0)  # 0 at the shoulders, 1 at the hips
        garment = self.mask & np.isin(found, (UPPER, LOWER))
        body = garment & self.at("torso", *LEGS) & (t > 0.3)
        chest = (found == UPPER) & self.at("torso") & (t > 0.15) & (t < 0.6)
        thighs = (found == LOWER) & (t > 1.15) & (t < 1.7)
        line = 1.0
        if min(chest.sum(), thighs.sum()) > 40:
            (a, spread_a), (b, spread_b) = (self._colour(where) for where in (chest, thighs))
            if np.sqrt((((a - b) / np.maximum(spread_a, spread_b)) ** 2).sum()) > SAME_COLOUR:
                line = _best_line(t[body], self._surprise(body, b, spread_b) - self._surprise(body, a, spread_a))
            else:
                shanks = self.at("right shank", "left shank")
                if shanks.any() and skin[shanks].mean() > BARE:
                    found[garment & (self.at("torso", *LEGS[:2], *ARMS) | shanks)] = DRESS
                    found[found == UPPER] = DRESS
                    return
        elif not {9, 12} & self.joints.keys():
            return  # a half-length photo: what is under the hips may be the upper garment's hem
        found[body & (t <= line)] = UPPER
        found[body & (t > line)] = LOWER

    def _colour(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(median, spread) of Lab there."""
        samples = self.colours[where]
        return np.median(samples, axis=0), np.maximum(samples.std(axis=0), [12, 5, 5])

    def _surprise(self, where: np.ndarray, middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
        """-2 log of a Gaussian's density, but for a constant."""
        return (((self.colours[where] - middle) / spread) ** 2).sum(-1) + 2 * np.log(spread).sum()


@dataclasses.dataclass(frozen=True)
class _Head:
    """A disc. middle: of the visible joints of the face. centre: of the disc, towards the crown. up: to the crown, length 1."""

    middle: np.ndarray
    centre: np.ndarray
    radius: float
    up: np.ndarray

    @classmethod
    def of(cls, joints: dict[int, np.ndarray], unit: float) -> _Head | None:
        face, neck = [joints[i] for i in (0, 14, 15, 16, 17) if i in joints], joints.get(1)
        if not face and neck is None:
            return None
        middle = np.mean(face, axis=0) if face else neck - (0, 0.55 * unit)
        radius, up = 0.4 * unit, np.array([0.0, -1.0])
        if neck is not None:
            length = float(np.hypot(*(middle - neck)))
            radius, up = 0.75 * length, (middle - neck) / max(length, 1.0)
        radius = max(radius, 0.28 * unit)
        return cls(middle, middle + up * radius * 0.25, radius, up)


def _unit(joints: dict[int, np.ndarray], height: float) -> float:
    """The width of the shoulders in pixels; of people seen from the side, what it would be by the torso's length."""
    shoulders, hips = (
        ([joints[i] for i in pair] if set(pair) <= joints.keys() else None) for pair in ((2, 5), (8, 11))
    )
    width = float(np.hypot(*(shoulders[0] - shoulders[1]))) if shoulders else 0.22 * height
    torso = float(np.hypot(*(np.mean(shoulders, 0) - np.mean(hips, 0)))) if shoulders and hips else 0.3 * height
    return max(width, 0.55 * torso, 1.0)


def _distances(
    joints: dict[int, np.ndarray], xy: np.ndarray, unit: float, head: _Head | None
) -> list[tuple[str, np.ndarray]]:
    """(part, float [h w]: the distance of each pixel from its axis in half widths) of each part that the joints show."""
    found = []
    if head is not None:
        found.append(("head", _length(xy - head.centre) / head.radius))
        if 1 in joints:
            found.append(("neck", _from_segment(xy, joints[1], head.middle) / (NECK_WIDTH * unit)))
    if {2, 5} <= joints.keys():
        bottom = xy.shape[0] - 1
        right, left = joints.get(8, joints.get(11)), joints.get(11, joints.get(8))
        if right is None:  # cut off above the hips
            right, left = ((joints[i][0], bottom) for i in (2, 5))
        corners = np.array([joints[2], joints[5], left, right])
        hull = np.zeros(xy.shape[:2], np.uint8)
        cv2.fillConvexPoly(hull, cv2.convexHull(corners.astype(np.int32)), 1)
        found.append(("torso", cv2.distanceTransform(1 - hull, cv2.DIST_L2, 5) / (TORSO_WIDTH * unit)))
    for part, a, b, width in LIMBS:
        if {a, b} <= joints.keys():
            found.append((part, _from_segment(xy, joints[a], joints[b]) / (width * unit)))
    for part, a, b, begin, end, width in ENDS:
        if b in joints and (a in joints or part.endswith("foot")):
            along = joints[b] - joints[a] if a in joints else np.array([0.0, 1.0])
            if part.endswith("foot"):
                along = along / max(float(np.hypot(*along)), 1.0) * unit
            start, stop = joints[b] + begin * along, joints[b] + end * along
            found.append((part, _from_segment(xy, start, stop) / (width * unit)))
    return found


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.hypot(vectors[..., 0], vectors[..., 1])


def _from_segment(xy: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float [h w]: the distance of each pixel from the segment a b."""
    along = b - a
    t = np.clip((xy - a) @ along / max(float(along @ along), 1e-6), 0, 1)
    return _length(xy - a - t[..., None] * along)


def _best_line(t: np.ndarray, evidence: np.ndarray) -> float:
    """Where to cut, from 0.55 to 1.9, so that most evidence for the upper garment lies above and most against it below."""
    bins = np.clip((t * 50).astype(int), 0, 149)
    above = np.cumsum(np.bincount(bins, weights=np.clip(evidence, -4, 4), minlength=150))
    score = 2 * above - above[-1]
    first, last = int(0.55 * 50), int(1.9 * 50)
    return (first + int(np.argmax(score[first:last])) + 1) / 50


def _majority(found: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each pixel's most frequent class around it; single pixels of skin or cloth go."""
    side = max(3, int((np.ptp(np.flatnonzero(mask.any(1))) + 1) * 0.008)) | 1
    ids = np.unique(found[mask])
    votes = np.stack([cv2.boxFilter((found == i).astype(np.float32), -1, (side, side)) for i in ids])
    return np.where(mask, ids[votes.argmax(0)], 0).astype(np.uint8)
