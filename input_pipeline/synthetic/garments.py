"""Garments of synthetic people: designs (kind, pattern, colours, scale, motif) and their cloth.

A design is a point of a finite space, and `is_held_out` parts that space in two: a design of held-out people
cannot occur in training. Cloth coordinates: x runs around the body (0 = middle of the front, +-pi radius =
middle of the back), y along it; both in head heights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.synthetic.canvas import Material
from input_pipeline.synthetic.shading import fold_texture, texture_at

PALETTE: tuple[tuple[int, int, int], ...] = (
    (240, 238, 232), (28, 28, 32), (120, 122, 128), (196, 198, 202), (22, 38, 84), (44, 92, 172), (120, 170,
    220),
    (176, 28, 40), (226, 74, 66), (242, 150, 150), (112, 24, 60), (236, 128, 36), (246, 198, 62), (250, 232,
    160),
    (34, 92, 56), (92, 156, 84), (176, 206, 150), (86, 92, 50), (20, 124, 128), (132, 206, 196), (92, 52,
    130),
    (176, 142, 206), (216, 62, 138), (98, 62, 40), (168, 122, 78), (218, 190, 150), (64, 86, 120), (150, 74,
    52),
)  # fmt: skip

PATTERNS = ("solid", "rings", "bars", "diagonal", "gingham", "plaid", "dots", "text", "emblem", "gradient",
            "blocks",
            "flowers", "camouflage", "chest band")  # fmt: skip
TWO_SIDED = "two-sided"
"""One colour in front and another behind, which no photo of the front tells; only where it is asked for, on the trunk."""
MOTIF_PATTERNS = ("text", "emblem")
LEAST_CONTRAST = 190
"""Between the two colours of a pattern: sum over the channels."""
SCALES = (0.20, 0.30, 0.44)
"""Repeat of a pattern, in head heights."""

WORDS = ("JAX", "POSE", "LOVE", "1984", "SURF", "TRUE", "OSLO", "RUN", "HELLO", "42", "WILD", "KYOTO")
EMBLEMS = ("star", "heart", "bolt", "ring", "moon", "flower", "cross", "wave", "peak", "eye", "leaf", "bars")
MOTIFS = len(WORDS)
FLOWER_TILE = 128
MOTIF_CELLS = 96

TOPS = ("t-shirt", "long sleeve", "tank top", "shirt", "hoodie", "jacket")
BOTTOMS = ("jeans", "wide trousers", "leggings", "shorts", "mini skirt", "pleated skirt", "long skirt")
DRESSES = ("summer dress", "long dress", "sleeved dress")
SHOES = ("sneakers", "boots", "pumps", "loafers")
EXTRAS = ("beanie", "cap", "brimmed hat", "scarf", "handbag", "shoulder bag", "belt", "sunglasses")
KINDS = TOPS + BOTTOMS + DRESSES + SHOES + EXTRAS


@dataclasses.dataclass(frozen=True, order=True)
class Design:
    """One garment design, in canonical form (fields that the pattern does not use are 0, so equal looks are
    equal designs). kind, pattern: names. colour, second: PALETTE numbers. scale: number in SCALES. motif:
    WORDS or EMBLEMS."""

    kind: str
    pattern: str
    colour: int
    second: int = 0
    scale: int = 0
    motif: int = 0


def is_held_out(design: Design) -> bool:
    """Whether a design is for held-out people only: a quarter of the space, of every kind and pattern."""
    kind, pattern = KINDS.index(design.kind), (*PATTERNS, TWO_SIDED).index(design.pattern)
    return (3 * kind + pattern + design.colour + 2 * design.second + design.scale + design.motif) % 4 == 0


def canonical(design: Design) -> Design:
    """Zeroes the fields that the design's pattern does not show."""
    scaled = design.pattern not in ("solid", "gradient", "blocks", "chest band", TWO_SIDED, *MOTIF_PATTERNS)
    return dataclasses.replace(
        design,
        second=0 if design.pattern == "solid" else design.second,
        scale=design.scale if scaled else 0,
        motif=design.motif if design.pattern in MOTIF_PATTERNS else 0,
    )


def _contrast(colour: int, second: int) -> int:
    return sum(abs(a - b) for a, b in zip(PALETTE[colour], PALETTE[second], strict=True))


_DESIGN_SPACE = np.array([len(PALETTE), len(PALETTE), len(SCALES), MOTIFS])


def draw_design(rng: np.random.Generator, kind: str, patterns: tuple[str, ...], *, split: str) -> Design:
    """A random design of the split, its two colours well apart in brightness or hue."""
    while True:
        pattern = patterns[rng.integers(len(patterns))]
        colour, second, scale, motif = (rng.random(4) * _DESIGN_SPACE).astype(int).tolist()
        design = canonical(Design(kind, pattern, colour, second, scale, motif))
        if (pattern == "solid" or _contrast(colour, second) > LEAST_CONTRAST) and is_held_out(design) == (
            split == "heldout"
        ):
            return design


def other_patterns(design: Design, rng: np.random.Generator, *, split: str) -> list[Design]:
    """All designs of the split in the cut and the two colours of this one (a solid one's second colour is drawn); which of
    them is the ground may differ. In random order, but each pattern once before any comes again, and what is on the chest
    alone, which a back view does not show, at the end."""
    second = design.second if design.pattern != "solid" else design.colour
    while _contrast(design.colour, second) <= LEAST_CONTRAST:
        second = int(rng.integers(len(PALETTE)))
    pairs = ((design.colour, second), (second, design.colour))
    found: dict[str, list[Design]] = {pattern: [] for pattern in rng.permutation(PATTERNS[1:]).tolist()}
    for pattern, designs in found.items():
        space = itertools.product(pairs, range(len(SCALES)), range(MOTIFS))
        every = {canonical(Design(design.kind, pattern, *pair, scale, motif)) for pair, scale, motif in space}
        designs += rng.permutation(sorted(d for d in every if is_held_out(d) == (split == "heldout"))).tolist()
    rounds = itertools.zip_longest(*found.values())
    return sorted((d for each in rounds for d in each if d is not None), key=lambda d: d.pattern in MOTIF_PATTERNS)


@dataclasses.dataclass(frozen=True)
class _Cloth:
    """Pattern of a design: (x, y, sample width) in head heights -> share of the second colour, float32
    [n].
    """

    design: Design
    radius: float

    def __call__(self, x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        return _WEIGHTS[self.design.pattern](self, x, y, step)

    @property
    def repeat(self) -> float:
        return SCALES[self.design.scale]

    @property
    def repeat_around(self) -> float:
        """The repeat nearest to `repeat` that closes around the body."""
        turns = 2 * np.pi * self.radius
        return turns / max(1, round(turns / self.repeat))

    def rings(self, x, y, step):
        return _stripe(y, self.repeat, 0.5, step)

    def bars(self, x, y, step):
        return _stripe(x, self.repeat_around, 0.4, step)

    def diagonal(self, x, y, step):
        return _stripe(x + y * (self.repeat_around / self.repeat), self.repeat_around, 0.5, step)

    def gingham(self, x, y, step):
        return (_stripe(x, self.repeat_around, 0.5, step) + _stripe(y, self.repeat, 0.5, step)) * 0.5

    def plaid(self, x, y, step):
        wide = _stripe(x, self.repeat_around, 0.45, step) + _stripe(y, self.repeat, 0.45, step)
        thin = _stripe(x + 0.1, self.repeat_around, 0.12, step) + _stripe(y + 0.1, self.repeat, 0.12, step)
        return np.minimum(0.3 * wide + 0.5 * thin, 1)

    def dots(self, x, y, step):
        across, along = self.repeat_around, self.repeat
        row = np.floor(y / along)
        dx = np.abs((x + 0.5 * across * (row % 2)) % across - across / 2)
        dy = np.abs(y % along - along / 2)
        return np.clip(0.5 + (0.30 * along - np.hypot(dx, dy)) / step, 0, 1)

    def gradient(self, x, y, step):
        return np.clip((y - 0.2) / 1.9, 0, 1)

    def blocks(self, x, y, step):
        return np.clip(0.5 + (y - 0.85) / step, 0, 1)

    def chest_band(self, x, y, step):
        return np.clip(0.5 + (0.24 - np.abs(y - 0.85)) / step, 0, 1)

    def two_sided(self, x, y, step):
        half = np.pi * self.radius
        around = np.abs((x + half) % (2 * half) - half)  # 0 in front, half at the back
        return np.clip(0.5 + (around - half / 2) / step, 0, 1)

    def flowers(self, x, y, step):
        tile = _blossoms(_halvings(FLOWER_TILE / (2 * self.repeat) * step))
        cells = tile.shape[0] / (2 * self.repeat)
        return texture_at(tile, (x + 16) * cells, (y + 16) * cells)

    def camouflage(self, x, y, step):
        cells = 12 / self.repeat
        value = texture_at(fold_texture(), (x + 16) * cells, (y + 16) * cells)
        return np.clip(value * 14 + 0.5, 0, 1) * 0.65 + np.clip((value - 0.2) * 14, 0, 1) * 0.35

    def motif(self, x, y, step):
        """Text or emblem on the chest; a small emblem between the shoulder blades; nothing elsewhere."""
        width, height = (1.02 if self.design.pattern == "text" else 0.66) * min(1.0, self.radius / 0.6), 0.62
        mask = motif_mask(self.design.pattern, self.design.motif, _halvings(MOTIF_CELLS / height * step))
        front = _lookup(mask, x / width + 0.5, (y - 0.42) / height)
        behind = np.pi * self.radius
        label = motif_mask("emblem", self.design.motif, _halvings(MOTIF_CELLS / 0.22 * step))
        back = _lookup(label, (np.abs(x) - behind) * np.sign(x) / 0.34 + 0.5, (y - 0.22) / 0.22)
        return np.maximum(front, back)


_WEIGHTS = {
    "rings": _Cloth.rings, "bars": _Cloth.bars, "diagonal": _Cloth.diagonal, "gingham": _Cloth.gingham,
    "plaid": _Cloth.plaid, "dots": _Cloth.dots, "gradient": _Cloth.gradient, "blocks": _Cloth.blocks,
    "flowers": _Cloth.flowers, "camouflage": _Cloth.camouflage, "chest band": _Cloth.chest_band,
    "text": _Cloth.motif, "emblem": _Cloth.motif, TWO_SIDED: _Cloth.two_sided,
}  # fmt: skip


def cloth(design: Design, *, radius: float, folds: float) -> Material:
    """The material of a design on a body part of this radius (head heights)."""
    first, second = PALETTE[design.colour], PALETTE[design.second]
    if design.pattern == "solid":
        return Material(first, folds=folds)
    change = tuple(float(b - a) for a, b in zip(first, second, strict=True))
    return Material(first, _Cloth(design, radius), change, folds)


def _stripe(x, repeat, share, step):
    """Stripes that fill a share of each repeat, smoothed over one sample."""
    distance = np.abs(x % repeat - repeat / 2)
    return np.clip(0.5 + (share * repeat / 2 - distance) / step, 0, 1)


def _lookup(mask, x, y):
    """Bilinear samples of mask [h w] at x, y in [0, 1]; 0 outside."""
    h, w = mask.shape
    rows = -(-len(x) // 256)  # cv2.remap wants an image, not a list
    grid_x, grid_y = np.full((2, rows * 256), -9, np.float32)
    grid_x[: len(x)], grid_y[: len(x)] = x * w - 0.5, y * h - 0.5
    taken = cv2.remap(mask, grid_x.reshape(rows, 256), grid_y.reshape(rows, 256), cv2.INTER_LINEAR)
    return taken.ravel()[: len(x)]


def _halvings(cells_per_step: float) -> int:
    """How often to halve a tile until about one cell falls on one sample, so that detail is averaged, not skipped."""
    return int(min(max(np.log2(max(cells_per_step, 1)), 0), 5))


def _halved(tile: np.ndarray) -> np.ndarray:
    return cv2.resize(tile, (tile.shape[1] // 2, tile.shape[0] // 2), interpolation=cv2.INTER_AREA)


@functools.lru_cache(maxsize=8)
def _blossoms(halvings: int) -> np.ndarray:
    """A tile of five-petalled flowers, float32 [128 128] in [0, 1] before halving, wrapping at its borders."""
    if halvings:
        return _halved(_blossoms(halvings - 1))
    tile = np.zeros((3 * FLOWER_TILE, 3 * FLOWER_TILE), np.uint8)
    rng = np.random.default_rng(7)
    for cx, cy in ((30, 34), (94, 26), (60, 92), (118, 96)):
        turn, size = rng.uniform(0, 2), rng.uniform(9, 12)
        for petal in range(5):
            angle = turn + petal * 2 * np.pi / 5
            centre = np.array([cx + size * np.cos(angle), cy + size * np.sin(angle)])
            for ox in (0, FLOWER_TILE, 2 * FLOWER_TILE):
                for oy in (0, FLOWER_TILE, 2 * FLOWER_TILE):
                    cv2.circle(
                        tile,
                        (int(centre[0] + ox), int(centre[1] + oy)),
                        int(size * 0.72),
                        255,
                        -1,
                        cv2.LINE_AA,
                    )
        for ox in (0, FLOWER_TILE, 2 * FLOWER_TILE):
            for oy in (0, FLOWER_TILE, 2 * FLOWER_TILE):
                cv2.circle(tile, (cx + ox, cy + oy), int(size * 0.45), 90, -1, cv2.LINE_AA)
    return tile[FLOWER_TILE:-FLOWER_TILE, FLOWER_TILE:-FLOWER_TILE].astype(np.float32) / 255


@functools.lru_cache(maxsize=256)
def motif_mask(pattern: str, motif: int, halvings: int = 0) -> np.ndarray:
    """A word or an emblem, float32 [96 160] or [96 96] in [0, 1], so many times halved."""
    if halvings:
        return _halved(motif_mask(pattern, motif, halvings - 1))
    if pattern == "text":
        return _word_mask(WORDS[motif])
    image = np.zeros((384, 384), np.uint8)
    _EMBLEM_DRAWERS[EMBLEMS[motif]](image)
    return cv2.resize(image, (MOTIF_CELLS, MOTIF_CELLS), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _word_mask(word: str) -> np.ndarray:
    font = ImageFont.load_default(size=160)
    left, top, right, bottom = font.getbbox(word, stroke_width=8)
    image = Image.new("L", (right - left + 16, bottom - top + 16))
    ImageDraw.Draw(image).text((8 - left, 8 - top), word, fill=255, font=font, stroke_width=8)
    return np.asarray(image.resize((160, MOTIF_CELLS), Image.Resampling.LANCZOS), np.float32) / 255


def _fill(image, points, value=255):
    cv2.fillPoly(image, [np.rint(np.asarray(points) * 384).astype(np.int32)], value, cv2.LINE_AA)


def _polar(radii, turn=-90.0):
    angles = np.deg2rad(turn + np.arange(len(radii)) * 360 / len(radii))
    return 0.5 + np.asarray(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)


def _heart(image):
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    _fill(image, np.stack([0.5 + x / 38, 0.47 - y / 38], -1))


def _ring(image):
    cv2.circle(image, (192, 192), 150, 255, 52, cv2.LINE_AA)


def _moon(image):
    cv2.circle(image, (180, 192), 160, 255, -1, cv2.LINE_AA)
    cv2.circle(image, (250, 160), 130, 0, -1, cv2.LINE_AA)


def _flower(image):
    t = np.linspace(0, 2 * np.pi, 120)
    r = 0.30 + 0.13 * np.cos(6 * t)
    _fill(image, np.stack([0.5 + r * np.cos(t), 0.5 + r * np.sin(t)], -1))
    cv2.circle(image, (192, 192), 50, 0, -1, cv2.LINE_AA)


def _wave(image):
    t = np.linspace(0, 1, 60)
    for y in (0.25, 0.5, 0.75):
        line = np.stack([t, y + 0.08 * np.sin(t * 12)], -1)
        _fill(image, np.concatenate([np.add(line, (0, 0.06)), np.subtract(line[::-1], (0, 0.06))]))


def _eye(image):
    t = np.linspace(0, 1, 40)
    lid = 0.28 * np.sin(np.pi * t)
    _fill(image, np.concatenate([np.stack([t, 0.5 - lid], -1), np.stack([t, 0.5 + lid], -1)[::-1]]))
    cv2.circle(image, (192, 192), 70, 0, -1, cv2.LINE_AA)
    cv2.circle(image, (192, 192), 34, 255, -1, cv2.LINE_AA)


def _leaf(image):
    t = np.linspace(0, 1, 40)
    side = 0.3 * np.sin(np.pi * t) ** 0.8
    _fill(image, np.concatenate([np.stack([0.5 - side, t], -1), np.stack([0.5 + side, t], -1)[::-1]]))
    cv2.line(image, (192, 60), (192, 384), 0, 18, cv2.LINE_AA)


def _three_bars(image):
    for x in (0.12, 0.42, 0.72):
        _fill(image, [(x, 1 - x), (x + 0.18, 0.9 - x), (x + 0.18, 1), (x, 1)])


def _cross(image):
    _fill(image, [(0.38, 0.05), (0.62, 0.05), (0.62, 0.95), (0.38, 0.95)])
    _fill(image, [(0.05, 0.38), (0.95, 0.38), (0.95, 0.62), (0.05, 0.62)])


_EMBLEM_DRAWERS = {
    "star": lambda image: _fill(image, _polar([0.48, 0.2] * 5)),
    "heart": _heart,
    "bolt": lambda image: _fill(
        image, [(0.55, 0.02), (0.2, 0.56), (0.45, 0.56), (0.35, 0.98), (0.8, 0.4), (0.53, 0.4), (0.72, 0.02)]
    ),
    "ring": _ring, "moon": _moon, "flower": _flower, "cross": _cross, "wave": _wave, "eye": _eye,
    "leaf": _leaf,
    "peak": lambda image: _fill(image, [(0.02, 0.85), (0.36, 0.2), (0.52, 0.5), (0.66, 0.32), (0.98, 0.85)]),
    "bars": _three_bars,
}  # fmt: skip
