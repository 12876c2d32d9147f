"""A person's joints and mask in a photo by Google's BlazePose (arXiv 2006.10204), whose two files come along (weights/NOTICE).

A detector finds people; a square around one, turned so that the body stands upright, goes through the landmark network twice,
the second time where the first found the body, and so does its mirror image; of both the one of the higher score counts.
Needs the [pose] extra (ai-edge-litert); neither torch nor network.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import threading
from collections.abc import Mapping

import cv2
import numpy as np
from scipy.special import expit

from input_pipeline.schema import NUM_JOINTS, InputError
from input_pipeline.skeletons import OPENPOSE
from truepose_jax.runtime.cli import install

WEIGHTS = pathlib.Path(__file__).parent / "weights"
DETECTOR, LANDMARKS = "pose_detection.tflite", "pose_landmark_full.tflite"
SHA256 = {
    DETECTOR: "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
    LANDMARKS: "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
}

NO_PERSON, DOUBTFUL = 0.5, 0.95
"""Landmark scores: below the first it is no person, below the second left and right may be exchanged."""

FROM_BLAZE = np.array([0, -1, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7])
"""OpenPose-18 of BlazePose's 33 landmarks; the neck (-1) is between the shoulders."""
NOSE, LEFT_EAR, RIGHT_EAR = 0, 7, 8
CENTRE, RIM = 33, 34
"""Auxiliary landmarks: the middle of the hips and a point of the circle around the body."""

DETECTOR_SIDE, DETECTOR_SCORE, OVERLAP = 224, 0.5, 0.3
LANDMARK_SIDE, MARGIN = 256, 1.25
HEATMAP_SIDE, HEATMAP_REACH, HEATMAP_SCORE = 64, 4, 0.5
"""A landmark is refined to the mean of its heatmap within 4 cells, where that is sure."""

BEHIND = 0.05
"""Metres that the nose must be behind (before) the ears for a back (front) view; between them it is a side view."""


class NobodyFound(InputError):
    """A photo shows no person that can be made out, or not so many."""


@dataclasses.dataclass(frozen=True)
class Person:
    """A person of a photo. points: float32 [18 2], x and y in its pixels, of all joints, the hidden ones too. visibility: float32
    [18], 0 to 1. mask: float32 [h w], the probability that a pixel is person. score: 0 to 1, that this is one. facing: front,
    side or back. people: how many were found."""

    points: np.ndarray
    visibility: np.ndarray
    mask: np.ndarray
    score: float
    facing: str
    people: int

    def joints(self, least: float = 0.5) -> np.ndarray:
        """float32 [18 3], x, y, visible: those of at least this visibility that lie in the photo; the others are zeros."""
        h, w = self.mask.shape
        inside = ((self.points >= 0) & (self.points < (w, h))).all(1)
        seen = (self.visibility >= least) & inside
        return np.concatenate([self.points, np.ones((NUM_JOINTS, 1))], axis=1, dtype=np.float32) * seen[:, None]


class BlazePose:
    """Photos -> people. Raises InputError where ai-edge-litert or a file is missing, or a file is not the one that it must be."""

    def __init__(self):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise InputError(
                f"finding people in photos needs ai-edge-litert: {install('pose')}; or give --parsing, --source-pose and --pose "
                "as files"
            ) from error
        self._detector, self._landmarks = (
            _Network(Interpreter(model_content=_checked(name), num_threads=1)) for name in (DETECTOR, LANDMARKS)
        )
        self._anchors = _anchors()

    def __call__(self, photo: np.ndarray, *, person: int = 1, name: str = "the photo") -> Person:
        """The person-th largest one of a photo, uint8 [h w 3]. name: what errors call the photo. Raises NobodyFound."""
        found = self._detect(photo)
        if not found:
            raise NobodyFound(
                f"{name}: nobody found; take a photo of a whole person, or give its pose as a file (--source-pose, --pose)"
            )
        if not 1 <= person <= len(found):
            raise NobodyFound(f"{name}: --person={person}, but people found: {len(found)}")
        # The photo and its mirror are both looked at: of the two the network is surer of one, and so is it more often right.
        look = max(
            (self._look_twice(photo, found[person - 1], mirrored) for mirrored in (False, True)), key=lambda x: x.score
        )
        if look.score < NO_PERSON:
            raise NobodyFound(
                f"{name}: shows no person that can be made out (score {look.score:.2f}, under {NO_PERSON:g})"
            )
        order = FROM_BLAZE[OPENPOSE.flipped] if look.mirrored else FROM_BLAZE
        xy, seen = look.points[order], look.visibility[order]
        xy[1], seen[1] = (xy[2] + xy[5]) / 2, min(seen[2], seen[5])
        facing, hidden = _facing(look)
        seen[hidden] = 0
        h, w = photo.shape[:2]
        mask = cv2.warpAffine(look.mask, look.to_photo, (w, h), flags=cv2.INTER_LINEAR)
        return Person(xy.astype(np.float32), seen.astype(np.float32), mask, look.score, facing, len(found))

    def _look_twice(self, photo: np.ndarray, square: tuple[np.ndarray, np.ndarray], mirrored: bool) -> _Look:
        first = self._look(photo, square, mirrored)
        return self._look(photo, (first.points[CENTRE], first.points[RIM]), mirrored)

    def _detect(self, photo: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(middle of the hips, a point of the circle around the body) of each person in pixels, the largest first."""
        h, w = photo.shape[:2]
        scale = DETECTOR_SIDE / max(h, w)
        size = max(1, round(w * scale)), max(1, round(h * scale))
        small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        left, top = (DETECTOR_SIDE - size[0]) // 2, (DETECTOR_SIDE - size[1]) // 2
        square = np.zeros((DETECTOR_SIDE, DETECTOR_SIDE, 3), np.float32)
        square[top : top + size[1], left : left + size[0]] = small
        outputs = self._detector(square / 127.5 - 1)
        scores = expit(outputs[1].reshape(-1))
        rows = np.flatnonzero(scores > DETECTOR_SCORE)
        # Box centre and size, then four points: offsets from the anchor in pixels of the square.
        values = outputs[12].reshape(-1, 6, 2)[rows]
        centres, points = values[:, 0] + self._anchors[rows], values[:, 2:] + self._anchors[rows][:, None]
        boxes = np.concatenate([centres - values[:, 1] / 2, centres + values[:, 1] / 2], axis=1)
        people, left_over = [], rows.size and list(np.argsort(-scores[rows]))
        while left_over:
            same = [i for i in left_over if _overlap(boxes[left_over[0]], boxes[i]) > OVERLAP]
            mean = np.average(points[same], axis=0, weights=scores[rows][same])
            people.append((mean - (left, top)) / scale)
            left_over = [i for i in left_over if i not in same]
        people.sort(key=lambda points: -np.hypot(*(points[1] - points[0])))
        return [(points[0], points[1]) for points in people]

    def _look(self, photo: np.ndarray, square: tuple[np.ndarray, np.ndarray], mirrored: bool) -> _Look:
        """At the person in the circle (centre, a point of it that is up)."""
        centre, rim = square
        up = rim - centre
        zoom = 2 * MARGIN * np.hypot(*up) / LANDMARK_SIDE
        y = -up / max(np.hypot(*up), 1e-6) * zoom
        x = np.array([y[1], -y[0]]) * (-1 if mirrored else 1)
        to_photo = np.stack([x, y, centre - (x + y) * LANDMARK_SIDE / 2], axis=1)
        # One pixel of the square covers zoom pixels: the photo is blurred first where that is many.
        sharp = cv2.GaussianBlur(photo, (0, 0), zoom / 3) if zoom >= 1.5 else photo
        side = LANDMARK_SIDE, LANDMARK_SIDE
        crop = cv2.warpAffine(sharp, to_photo, side, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        outputs = self._landmarks(crop.astype(np.float32) / 255)
        landmarks = outputs[195].reshape(39, 5)
        points = _refined(landmarks[:, :2], outputs[64 * 64 * 39].reshape(64, 64, 39))
        return _Look(
            points @ to_photo[:, :2].T + to_photo[:, 2],
            expit(landmarks[:, 3:]).min(1),  # seen, and within the square
            outputs[117].reshape(39, 3)[:, 2],
            expit(outputs[LANDMARK_SIDE**2].reshape(side)),
            float(outputs[1].item()),
            to_photo,
            mirrored,
        )


@dataclasses.dataclass(frozen=True)
class _Look:
    """What the landmark network says of a square. points: [39 2] in the photo. visibility: [39], 0 to 1. depths: [39], metres
    away from the camera. mask: [256 256], of the square's pixels, which to_photo [2 3] takes to the photo's."""

    points: np.ndarray
    visibility: np.ndarray
    depths: np.ndarray
    mask: np.ndarray
    score: float
    to_photo: np.ndarray
    mirrored: bool


class _Network:
    """A file's network: float32 [h w c] -> {number of values (of the detector: per anchor): the output}."""

    def __init__(self, interpreter):
        interpreter.allocate_tensors()
        self._interpreter, self._lock = interpreter, threading.Lock()
        self._input = interpreter.get_input_details()[0]["index"]
        self._outputs = interpreter.get_output_details()

    def __call__(self, image: np.ndarray) -> Mapping[int, np.ndarray]:
        with self._lock:  # An interpreter has one set of tensors, and lists are read by several threads.
            self._interpreter.set_tensor(self._input, image[None])
            self._interpreter.invoke()
            arrays = [self._interpreter.get_tensor(output["index"]) for output in self._outputs]
        anchors = len(arrays[0].shape) == 3
        return {array.shape[-1] if anchors else array.size: array for array in arrays}


@functools.cache
def blazepose() -> BlazePose:
    """The one of this process. Raises InputError."""
    return BlazePose()


def _checked(name: str) -> bytes:
    path = WEIGHTS / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the network ({error.strerror}); install the package again") from error
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise InputError(f"{path}: is not the file that this program was made for (sha256); install the package again")
    return data


def _anchors() -> np.ndarray:
    """float [2254 2]: the centres of the detector's cells in pixels; 2 each at strides 8 and 16, 6 at 32."""
    found = []
    for stride, count in ((8, 2), (16, 2), (32, 6)):
        middles = np.arange(stride / 2, DETECTOR_SIDE, stride)
        grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
        found.append(np.repeat(grid, count, axis=0))
    return np.concatenate(found)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


def _refined(points: np.ndarray, heatmaps: np.ndarray) -> np.ndarray:
    """Landmarks [39 2] in pixels of the square, each moved to the weighted mean of its heatmap ([64 64 39], logits) around it."""
    points = points.copy()
    cell = LANDMARK_SIDE // HEATMAP_SIDE
    for i, (column, row) in enumerate((points / cell).astype(int)):
        if 0 <= column < HEATMAP_SIDE and 0 <= row < HEATMAP_SIDE:
            top, left = max(0, row - HEATMAP_REACH), max(0, column - HEATMAP_REACH)
            near = expit(heatmaps[top : row + HEATMAP_REACH + 1, left : column + HEATMAP_REACH + 1, i])
            if near.max() >= HEATMAP_SCORE:
                rows, columns = np.indices(near.shape)
                points[i] = cell * np.array([(near * (columns + left)).sum(), (near * (rows + top)).sum()]) / near.sum()
    return points


def _facing(look: _Look) -> tuple[str, list[int]]:
    """(the view, the joints of the face that it hides) by how far the nose is behind the ears."""
    nose, left, right = (look.depths[i] for i in (NOSE, LEFT_EAR, RIGHT_EAR))
    behind = nose - (left + right) / 2
    if behind > BEHIND:
        return "back", [0, 14, 15]
    if behind > -BEHIND:
        return "side", [15, 17] if (left > right) != look.mirrored else [14, 16]
    return "front", []
