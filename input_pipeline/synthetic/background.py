"""What is behind a synthetic person: a studio wall and floor, or a busy scene. One per identity."""

from __future__ import annotations

import functools

import cv2
import numpy as np

from input_pipeline.synthetic.garments import PALETTE

WORKING_HEIGHT = 128
"""Backgrounds are drawn at this height and enlarged: a little out of focus, as behind a portrait."""


@functools.lru_cache(maxsize=64)
def background(key: tuple[int, ...], kind: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h w 3] of an identity key. kind: "plain" or "busy". One scene at all sizes of one aspect."""
    rng = np.random.default_rng([*key, 9])
    h, w = size
    working = (WORKING_HEIGHT, max(8, round(WORKING_HEIGHT * w / h)))
    scene = _studio(rng, working) if kind == "plain" else _SCENES[rng.integers(len(_SCENES))](rng, working)
    scene = np.clip(scene, 0, 255).astype(np.uint8)
    shrinking = h <= WORKING_HEIGHT
    image = cv2.resize(scene, (w, h), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    image.setflags(write=False)
    return image


def _studio(rng, size):
    """A wall with soft light, often white, and a floor that melts into it or has an edge."""
    h, w = size
    y, x = np.mgrid[0:h, 0:w].astype(np.float32) / h
    base = np.array(PALETTE[rng.integers(len(PALETTE))], np.float32)
    wall = 236 + 14 * rng.random() + 0 * base if rng.random() < 0.5 else 150 + 0.36 * base
    glow = np.exp(-((x - rng.uniform(0.1, 0.6)) ** 2 + (y - rng.uniform(0.1, 0.5)) ** 2) / 0.35)
    image = wall * (0.90 + 0.12 * glow)[..., None]
    edge = rng.uniform(0.76, 0.84)
    floor = np.clip((y - edge) * (h if rng.random() < 0.5 else 8), 0, 1)
    return image * (1 - 0.09 * floor)[..., None]


def _street(rng, size):
    """Buildings with windows, a pavement, and blurred lights."""
    h, w = size
    sky = np.array([(196, 214, 232), (222, 206, 190), (150, 160, 176)][rng.integers(3)], np.float32)
    image = np.ones((h, w, 3), np.float32) * sky
    horizon, x = int(h * rng.uniform(0.62, 0.74)), 0
    while x < w:
        width, top = int(rng.integers(14, 34)), int(rng.integers(0, h // 3))
        wall = (np.array(PALETTE[rng.integers(len(PALETTE))]) * 0.45 + 70) * rng.uniform(0.7, 1.05)
        image[top:horizon, x : x + width] = wall
        pane = wall * rng.uniform(0.5, 0.7) if rng.random() < 0.6 else np.minimum(wall * 1.35, 245)
        for wy in range(top + 5, horizon - 8, 12):
            for wx in range(x + 3, min(x + width, w) - 4, 8):
                image[wy : wy + 7, wx : wx + 4] = pane
        x += width
    image[horizon:] = rng.uniform(110, 175)
    image[horizon : horizon + 2] *= 0.8
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 2.0))


def _brick(rng, size):
    """A brick or tile wall over a floor."""
    h, w = size
    brick = np.array([(168, 92, 72), (196, 176, 150), (120, 120, 128), (206, 206, 208)][rng.integers(4)], np.float32)
    rows, length = int(rng.integers(5, 9)), int(rng.integers(12, 20))
    y, x = np.mgrid[0:h, 0:w]
    course = y // rows
    number = (x + (course % 2) * length // 2) // length
    tone = np.random.default_rng(rng.integers(1 << 30)).uniform(0.82, 1.12, (course.max() + 1, number.max() + 1))
    image = brick * tone[course, number][..., None]
    mortar = (y % rows == 0) | ((x + (course % 2) * length // 2) % length == 0)
    image = np.where(mortar[..., None], brick * 0.6 + 70, image)
    image[int(h * 0.84) :] = image[int(h * 0.84) :].mean((0, 1)) * 0.75
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.6)


def _garden(rng, size):
    """Foliage out of focus, with a path."""
    h, w = size
    noise = rng.random((h // 6 + 2, w // 6 + 2, 1)).astype(np.float32)
    leaves = cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)[..., None]
    dark, light = np.array([36, 66, 36], np.float32), np.array([150, 182, 96], np.float32)
    image = dark + (light - dark) * np.clip(leaves * 1.3 - 0.15, 0, 1)
    path = int(h * rng.uniform(0.7, 0.8))
    image[path:] = np.array([178, 168, 148]) * (0.92 + 0.12 * leaves[path:])
    for _ in range(int(rng.integers(0, 12))):
        centre = (int(rng.integers(w)), int(rng.integers(path)))
        colour = [float(c) for c in PALETTE[rng.integers(7, 13)]]
        cv2.circle(image, centre, int(rng.integers(1, 4)), colour, -1, cv2.LINE_AA)
    return cv2.GaussianBlur(np.ascontiguousarray(image, np.float32), (0, 0), rng.uniform(0.8, 1.8))


def _room(rng, size):
    """A room: wall, skirting, floor boards, a picture, a shelf or a lamp."""
    h, w = size
    wall = 110 + 0.5 * np.array(PALETTE[rng.integers(len(PALETTE))], np.float32)
    image = np.ones((h, w, 3), np.float32) * wall
    if rng.random() < 0.5:
        image[:, :: int(rng.integers(5, 11))] *= 0.93
    edge = int(h * rng.uniform(0.76, 0.84))
    wood = np.array([(150, 108, 74), (196, 160, 118), (112, 84, 64)][rng.integers(3)], np.float32)
    image[edge:] = wood
    for x in range(0, w, int(rng.integers(8, 16))):
        cv2.line(image, (x, edge), (int(x + (x - w / 2) * 0.4), h), (wood * 0.82).tolist(), 1, cv2.LINE_AA)
    image[edge - 3 : edge] = np.minimum(wall * 1.2, 248)
    for _ in range(int(rng.integers(1, 4))):
        x, y = int(rng.integers(-6, w - 10)), int(rng.integers(6, h // 2))
        dx, dy = int(rng.integers(12, 28)), int(rng.integers(12, 30))
        cv2.rectangle(image, (x, y), (x + dx, y + dy), [40.0, 36.0, 34.0], -1)
        paint = [float(c) for c in PALETTE[rng.integers(len(PALETTE))]]
        cv2.rectangle(image, (x + 2, y + 2), (x + dx - 2, y + dy - 2), paint, -1)
        cv2.circle(image, (x + dx // 2, y + dy // 2), dx // 4, [float(c) for c in PALETTE[rng.integers(28)]], -1)
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.4))


_SCENES = (_street, _brick, _garden, _room)
