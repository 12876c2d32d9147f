"""Synthetic people: articulated figures in patterned clothes, with exact ATR-18 parsing maps and 18 joints.

`render` is a function of its arguments alone (seed, identity, pose, size, split and the two difficulty
knobs); nothing depends on call order or on global random state. `SyntheticPeople` is an ImageSet of such
renderings.

Conventions. The person's left and right (a front view has the right hand at image left). Pixel centres lie at
whole coordinates. Neck and chest skin count as Face, as in ATR; shorts count as Pants. Any aspect works: the
normalised frame (poses.py) is scaled uniformly and centred. A background belongs to the identity, as the
pictures of one garment in a shop share their studio: it is the same in all poses.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Sequence

import cv2
import numpy as np

from input_pipeline.schema import ImageRecord, InputError
from input_pipeline.synthetic.anatomy import Anatomy, anatomy
from input_pipeline.synthetic.background import background as background_picture
from input_pipeline.synthetic.canvas import Canvas
from input_pipeline.synthetic.figure import draw_person
from input_pipeline.synthetic.identity import SPLITS, Identity, draw_identity
from input_pipeline.synthetic.poses import FRAME_WIDTH, FRAMINGS, Pose, framed_pose, generated_pose

POSE_CHOICE_STREAM = 7102
GENERATED_POSES = 1 << 30
"""Pose numbers that SyntheticPeople draws from; even ones for training, odd ones held out."""

CONTACT_REACH, CAST_REACH = 0.16, 0.3
"""How far shadows reach within the person and on the scene behind, in head heights."""

_CONTACT_SHADOW = (255 * (1 - 0.30 * np.minimum(np.arange(256) / 40.0, 1))).astype(np.uint8)
_CAST_SHADOW = (255 - 0.22 * np.arange(256)).astype(np.uint8)
"""Brightness [256] by the difference of layers, and by how much of the person is around."""


def person_in(name: str) -> str | None:
    """Whom a record's name shows, as `render` and `prepare build` name synthetic people; None for other names."""
    found = re.match(r"(train|heldout|test)-\d+-\d+(?=-)", pathlib.PurePosixPath(name).name)
    return found and found[0]


def render(
    *,
    seed: int,
    identity: int,
    pose: int | Pose,
    size: tuple[int, int],
    split: str = "train",
    patterns: str = "all",
    background: str = "all",
    same_colours: int = 0,
) -> ImageRecord:
    """One picture of one person, with its parsing map and joints.

    pose: a number of the built-in generator, or a Pose. size: (h, w) pixels, at least 32 high. patterns, same_colours: see
    draw_identity. background: "all" | "plain" (a studio for everybody).
    """
    who = draw_identity(
        seed=seed, split=split, identity=identity, patterns=patterns, background=background, same_colours=same_colours
    )
    number = pose if isinstance(pose, (int, np.integer)) else None
    pose = generated_pose(int(pose)) if number is not None else pose
    image, parsing = _picture(who, pose, size)
    name = f"{split}-{seed}-{identity}-{pose.name if number is None else number}"  # person_in reads it
    return ImageRecord(image, parsing, pixel_joints(pose, size), name, f"{split}-{seed}-{identity}")


def frame_to_pixels(size: tuple[int, int]) -> tuple[float, np.ndarray]:
    """(scale, offset [2]): pixel = scale * normalised point + offset, pixel centres at whole numbers."""
    h, w = size
    if h < 32 or w < 22:
        raise InputError(f"a picture of {h}x{w} pixels is too small for a person; 32x22 is the least")
    scale = min(h, w / FRAME_WIDTH)
    return scale, np.array([(w - scale * FRAME_WIDTH) / 2 - 0.5, (h - scale) / 2 - 0.5])


def pixel_joints(pose: Pose, size: tuple[int, int]) -> np.ndarray:
    """Joints float32 [18 3] = (x, y, visible); joints outside the picture count as missing, (0, 0, 0)."""
    scale, offset = frame_to_pixels(size)
    xy = pose.joints * scale + offset
    inside = ((xy > -0.5) & (xy < np.array([size[1], size[0]]) - 0.5)).all(1) & pose.present
    return np.where(inside[:, None], np.column_stack([xy, np.ones(len(xy))]), 0).astype(np.float32)


def _picture(who: Identity, pose: Pose, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [h w 3], parsing uint8 [h w])."""
    body = _measured(pose)
    scale, offset = frame_to_pixels(size)
    canvas = Canvas(body.unit)
    draw_person(canvas, body, who)
    margin = round(CAST_REACH * body.unit * scale * 1.4) + 1
    person, coverage, parsing, columns = canvas.paint(
        scale=scale, offset=offset, size=size, samples=3 if size[0] <= 128 else 2, margin=margin
    )
    image = background_picture(who.key, who.background, size).copy()
    image[:, columns] = _composite(person, coverage, image[:, columns], body.unit * scale)
    return image, parsing


def _composite(person, alpha, scene, unit: float) -> np.ndarray:
    """Puts the person [h w 4] (colours and layer, premultiplied by coverage) before the scene; uint8 [h w 3].

    The light comes from the upper left. What lies close behind nearer parts of the person is darkened, and a
    soft shadow falls on the scene. unit: head height in pixels.
    """
    layers = np.ascontiguousarray(person[..., 3])
    behind = cv2.subtract(_spread(layers, CONTACT_REACH * unit), layers)  # saturates at 0: only what lies behind
    lit = _scaled(person[..., :3], cv2.LUT(behind, _CONTACT_SHADOW))
    shade = cv2.LUT(_spread(alpha, CAST_REACH * unit), _CAST_SHADOW)
    free = cv2.multiply(shade, 255 - alpha, scale=1 / 255)
    return cv2.add(lit, _scaled(scene, free))


def _spread(layer: np.ndarray, reach: float) -> np.ndarray:
    """A blur over about `reach` pixels, shifted to the lower right by a third of that."""
    reach = max(1, round(reach))
    shift = max(1, reach // 3)
    return cv2.blur(
        layer,
        (2 * reach + 1, 2 * reach + 1),
        anchor=(min(2 * reach, reach + shift), min(2 * reach, reach + shift)),
    )


def _scaled(image: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """uint8 image [h w 3] times factor [h w] / 255."""
    return cv2.multiply(image, cv2.merge([factor, factor, factor]), scale=1 / 255)


@functools.lru_cache(maxsize=256)
def _measured(pose: Pose) -> Anatomy:
    return anatomy(pose)


class SyntheticPeople:
    """An ImageSet (schema.py) of people in several poses each; image i = identity * poses_per_identity + k.

    Poses are drawn from the seed: numbers of the built-in generator (even in training, odd held out), or
    entries of `pose_list`, distinct within an identity; splitting a list between train and held-out is the
    caller's part (`poses.load_real_poses(split=...)` does it). same_colours: so many identities in a row are one
    person in as many patterns (draw_identity).
    """

    labels = "atr18"

    def __init__(
        self,
        *,
        seed: int,
        split: str,
        identities: int,
        poses_per_identity: int,
        size: tuple[int, int],
        pose_list: Sequence[Pose] | None = None,
        patterns: str = "all",
        background: str = "all",
        framing: str = "all",
        same_colours: int = 0,
    ):
        if split not in SPLITS:
            raise InputError(f"split '{split}' is neither 'train' nor 'heldout'")
        if identities < 1 or poses_per_identity < 1:
            raise InputError(f"{identities} identities x {poses_per_identity} poses is an empty set")
        if pose_list is not None and len(pose_list) < poses_per_identity:
            raise InputError(f"{len(pose_list)} poses in the list are fewer than {poses_per_identity} per identity")
        self.seed, self.split, self.size = seed, split, tuple(size)
        self.identities, self.poses_per_identity = identities, poses_per_identity
        if framing not in FRAMINGS:
            raise InputError(f"framing '{framing}' is not one of {FRAMINGS}")
        self._framing = framing
        self._pose_list, self._looks = pose_list, {"patterns": patterns, "background": background}
        self._looks["same_colours"] = same_colours
        self.pairs = _ordered_pairs(identities, poses_per_identity)

    def __len__(self) -> int:
        return self.identities * self.poses_per_identity

    def pose(self, index: int) -> int | Pose:
        """The pose of image `index`: a generator number, or an entry of the pose list."""
        identity, k = divmod(self._checked(index), self.poses_per_identity)
        rng = np.random.default_rng([POSE_CHOICE_STREAM, self.seed, SPLITS.index(self.split), identity])
        if self._pose_list is not None:
            return self._pose_list[rng.permutation(len(self._pose_list))[k]]
        numbers = rng.integers(GENERATED_POSES // 2, size=self.poses_per_identity)
        number = int(2 * numbers[k] + SPLITS.index(self.split))
        return number if self._framing == "all" else framed_pose(number, self._framing)

    def image(self, index: int) -> ImageRecord:
        """Picture number `index` with its annotations."""
        identity = self._checked(index) // self.poses_per_identity
        return render(
            seed=self.seed, identity=identity, pose=self.pose(index), size=self.size, split=self.split,
            **self._looks
        )  # fmt: skip

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a set of {len(self)}")
        return int(index)


def _ordered_pairs(identities: int, poses: int) -> np.ndarray:
    """int32 [identities * poses * (poses - 1), 2]: all ordered pairs of two pictures of one identity."""
    source, target = np.divmod(np.arange(poses * poses), poses)
    within = np.stack([source, target], -1)[source != target]
    return (within + poses * np.arange(identities)[:, None, None]).reshape(-1, 2).astype(np.int32)
