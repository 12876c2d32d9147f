"""Who a synthetic person is: body, skin, hair, face and wardrobe, drawn from (seed, split, identity)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from input_pipeline.schema import InputError
from input_pipeline.synthetic.canvas import Material
from input_pipeline.synthetic.garments import (
    BOTTOMS,
    DRESSES,
    PATTERNS,
    SHOES,
    TOPS,
    TWO_SIDED,
    Design,
    cloth,
    draw_design,
    other_patterns,
)
from input_pipeline.synthetic.poses import HIP_HALF
from input_pipeline.synthetic.shading import fold_texture, texture_at

SPLITS = ("train", "heldout")
HELD_OUT_OFFSET = 1 << 40
"""Identity numbers of held-out people start here, so that no number means a person of both splits."""

SKINS = (
    (250, 218, 196),
    (238, 196, 166),
    (226, 178, 142),
    (198, 146, 108),
    (160, 110, 78),
    (122, 82, 58),
    (88, 58, 44),
)
HAIRS = ((28, 24, 24), (58, 38, 28), (92, 60, 38), (138, 92, 52), (196, 150, 88), (226, 196, 134),
         (156, 60, 34),
         (150, 150, 152), (222, 220, 216), (70, 90, 150), (190, 90, 140))  # fmt: skip
HAIR_ODDS = np.array([5, 5, 4, 3, 3, 2, 2, 1, 0.7, 0.5, 0.5])
EYES = ((70, 44, 30), (96, 66, 40), (70, 110, 150), (84, 120, 80), (110, 116, 120))

WARDROBES = {"all": PATTERNS, "solid": ("solid",), "two_sided": (TWO_SIDED,)}
"""Patterns of clothes, by what is asked for."""

SHORT_STYLES = ("bald", "buzz", "short", "side part", "curls", "afro")
LONG_STYLES = ("bob", "long", "long, centre part", "ponytail", "bun", "long curls")


@dataclasses.dataclass(frozen=True)
class Build:
    """Half-widths in head heights: front (a) and side (b) of the torso, and factors of the limbs."""

    chest: float
    waist: float
    hip: float
    depth: float
    arm: float
    leg: float
    neck: float


@dataclasses.dataclass(frozen=True)
class Face:
    """Colours [0, 255] and shapes of a face; lengths in head heights."""

    eyes: tuple[int, int, int]
    lips: tuple[float, float, float]
    eye_size: float
    brow: float
    brow_tilt: float
    jaw: float
    nose: float
    mouth: float
    beard: float
    lashes: float


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """Everything about a person that does not depend on the pose or the picture size."""

    key: tuple[int, ...]
    build: Build
    face: Face
    skin: Material
    hair: Material
    hair_style: str
    garments: dict[str, Design]
    materials: dict[str, Material]
    side: int
    background: str

    @property
    def designs(self) -> tuple[Design, ...]:
        return tuple(self.garments.values())


@dataclasses.dataclass(frozen=True, eq=False)
class _Strands:
    """Hair: streaks along the strands and one soft gloss, as a share of `change`; a pattern like cloth's."""

    curl: float

    def __call__(self, x, y, step):
        wave = self.curl * 0.07 * np.sin(9 * y + 3 * x)
        strands = min(90.0, 1.2 / step)  # no finer than the samples, else short hair would be noise
        streak = texture_at(fold_texture(), (x + wave + 8) * strands, (y + 16) * 10)
        gloss = np.maximum(np.exp(-(((y - 0.24) / 0.1) ** 2)) * (0.20 + 0.5 * streak), 0)
        return 0.75 * streak + gloss


def _material_of(design: Design) -> Material:
    radius, folds = 0.6, 0.16
    if design.kind in ("jeans", "wide trousers", "leggings", "shorts"):
        radius, folds = 0.3, {"leggings": 0.05, "wide trousers": 0.26}.get(design.kind, 0.2)
    elif "skirt" in design.kind or "dress" in design.kind:
        radius, folds = 0.7, 0.24
    elif design.kind in SHOES or design.kind in ("belt", "sunglasses"):
        radius, folds = 0.2, 0.0
    elif design.kind in ("hoodie", "jacket", "scarf"):
        folds = 0.24
    return cloth(design, radius=radius, folds=folds)


def _wardrobe(rng: np.random.Generator, patterns: tuple[str, ...], split: str, feminine: bool) -> dict[str, Design]:
    """Designs by the slot they fill: top and bottom, or dress; shoes; and extras now and then."""
    plain = tuple(p for p in patterns if p in ("solid", "plaid", "gingham", "bars", "dots", "camouflage")) or ("solid",)

    def choose(kinds, allowed):
        return draw_design(rng, kinds[rng.integers(len(kinds))], allowed, split=split)

    garments = {}
    if feminine and rng.random() < 0.36:
        garments["dress"] = choose(DRESSES, patterns)
    else:
        skirts = 7 if feminine else 4
        mostly_solid = ("solid",) if rng.random() < 0.55 else plain
        garments["bottom"] = choose(BOTTOMS[:skirts], mostly_solid)
        garments["top"] = choose(TOPS, patterns)
    garments["shoes"] = choose(SHOES if feminine else ("sneakers", "boots", "loafers"), ("solid",))
    odds = rng.random(6)
    if odds[0] < 0.2:
        hats = ("beanie", "cap", "brimmed hat")
        garments["hat"] = choose(hats, ("solid",) if odds[0] < 0.1 else plain)
    if odds[1] < 0.14:
        garments["scarf"] = choose(("scarf",), plain)
    if odds[2] < 0.26:
        garments["bag"] = choose(("handbag", "shoulder bag"), ("solid",))
    if odds[3] < 0.3:
        garments["belt"] = choose(("belt",), ("solid",))
    if odds[4] < 0.14:
        garments["sunglasses"] = choose(("sunglasses",), ("solid",))
    return garments


def _build(rng: np.random.Generator, feminine: bool) -> Build:
    size = rng.normal(1, 0.055)
    if feminine:
        chest, waist, leg = 0.70, 0.56, 1.0
    else:
        chest, waist, leg = 0.79, 0.68, 0.93
    chest, waist, leg = np.array([chest, waist, leg]) * size * rng.normal(1, 0.03, 3)
    slim = 0.90 if feminine else 1.06
    hip = HIP_HALF + 0.335 * leg  # the rim of the thighs, so that hips and legs are one line
    return Build(chest, waist, hip, 0.50 * size, slim * size, leg, slim * 0.215)


def _face(rng: np.random.Generator, skin: np.ndarray, feminine: bool) -> Face:
    u = rng.random(10)
    lips = skin * (0.86, 0.60, 0.60) if feminine and u[0] < 0.6 else skin * (0.90, 0.72, 0.70)
    if feminine and u[1] < 0.25:
        lips = np.array([182, 38, 52]) * (0.7 + 0.3 * u[1] / 0.25)
    return Face(
        eyes=EYES[int(u[2] * len(EYES))],
        lips=tuple(lips),
        eye_size=0.9 + 0.25 * u[3] + 0.1 * feminine,
        brow=(0.020 if feminine else 0.030) + 0.012 * u[4],
        brow_tilt=0.024 * (u[5] - 0.72),
        jaw=(0.88 if feminine else 1.0) + 0.12 * u[6],
        nose=0.85 + 0.4 * u[7],
        mouth=0.105 + 0.04 * u[8],
        beard=0.0 if feminine or u[9] < 0.62 else 0.35 + 1.6 * (u[9] - 0.62),
        lashes=0.010 + 0.011 * feminine,
    )


def _in_another_pattern(who: Identity, number: int) -> Identity:
    """The same person; top or dress in the same cut and the same two colours, in the pattern of this number."""
    slot = "dress" if "dress" in who.garments else "top"
    split = SPLITS[who.key[1] >= HELD_OUT_OFFSET]
    designs = other_patterns(who.garments[slot], np.random.default_rng([*who.key, 3]), split=split)
    if number >= len(designs):
        raise InputError(f"there are {len(designs)} patterns in one cut and two colours; same_colours asks for more")
    return dataclasses.replace(
        who,
        garments=who.garments | {slot: designs[number]},
        materials=who.materials | {slot: _material_of(designs[number])},
    )


@functools.lru_cache(maxsize=512)
def draw_identity(
    *, seed: int, split: str, identity: int, patterns: str = "all", background: str = "all", same_colours: int = 0
) -> Identity:
    """The person with this number. patterns: "all" | "solid" | "mixed" (odd numbers solid, even ones all) | "two_sided" (the
    trunk's cloth has one colour in front and another behind); background: "all" | "plain". same_colours: where it is not 0, so
    many numbers in a row are one person whose top (or dress) differs in its pattern alone."""
    if same_colours:
        one = draw_identity(
            seed=seed, split=split, identity=identity // same_colours, patterns=patterns, background=background
        )
        return _in_another_pattern(one, identity % same_colours)
    if split not in SPLITS:
        raise InputError(f"split '{split}' is neither 'train' nor 'heldout'")
    if patterns == "mixed":
        patterns = "solid" if identity % 2 else "all"
    if patterns not in WARDROBES or background not in ("all", "plain"):
        kinds = ", ".join(WARDROBES)
        raise InputError(f"patterns '{patterns}' must be {kinds} or mixed, background '{background}' all or plain")
    if seed < 0 or not 0 <= identity < HELD_OUT_OFFSET:
        raise InputError(f"seed {seed} and identity {identity} must not be negative (identity below 2^40)")
    number = identity + HELD_OUT_OFFSET * SPLITS.index(split)
    body, clothes, scene = (np.random.default_rng([seed, number, stream]) for stream in range(3))

    feminine = bool(body.random() < 0.55)
    tone = body.random() * (len(SKINS) - 1.001)
    low, high = np.array(SKINS[int(tone)]), np.array(SKINS[int(tone) + 1])
    skin = low + (high - low) * (tone % 1)
    hair_odds = HAIR_ODDS * np.where(np.arange(len(HAIRS)) > 3, 1 - 0.6 * tone / len(SKINS), 1)
    hair = np.array(HAIRS[body.choice(len(HAIRS), p=hair_odds / hair_odds.sum())]) * body.uniform(0.85, 1.12)
    styles = (*LONG_STYLES, "side part", "afro") if feminine else (*SHORT_STYLES, "long, centre part")
    style = styles[body.integers(len(styles))]
    curl = 1.0 if "cur" in style or style == "afro" else 0.25

    garments = _wardrobe(clothes, WARDROBES[patterns], split, feminine)
    busy = scene.random() < 0.45
    return Identity(
        key=(seed, number),
        build=_build(body, feminine),
        face=_face(body, skin, feminine),
        skin=Material(tuple(skin)),
        hair=Material(tuple(hair), _Strands(curl), tuple(hair + 14)),
        hair_style=style,
        garments=garments,
        materials={slot: _material_of(design) for slot, design in garments.items()},
        side=-1 if clothes.random() < 0.5 else 1,
        background="busy" if busy and background == "all" else "plain",
    )
