"""Head of a synthetic person: skull, face, hair, hat and glasses, turned with the pose.

Local coordinates: head heights about the middle of the skull, x to image right and y down. Surface points
have a third coordinate out of the face and turn with it.
"""

from __future__ import annotations

import functools

import numpy as np

from input_pipeline.synthetic.anatomy import Anatomy, Head
from input_pipeline.synthetic.canvas import Canvas, Material, ellipse
from input_pipeline.synthetic.identity import Identity

HAT, HAIR, SUNGLASSES, FACE = 1, 2, 3, 11
WHITE, DARK = Material((244.0, 242.0, 238.0)), Material((30.0, 24.0, 24.0))

# Outline of the face from the temple down to the chin: (y, half-width).
_OUTLINE = np.array([(-0.34, 0.25), (-0.26, 0.32), (-0.12, 0.355), (0.05, 0.355), (0.20, 0.325),
                     (0.32, 0.255), (0.41, 0.175), (0.47, 0.10), (0.495, 0.04)])  # fmt: skip
# Patches of the face, (x to the person's left, y, z) about the middle of the skull. Eyes and brows: of the
# left one about its middle, from the nose outwards; lips and nostrils: x in units of their half-width.
_BEARD = np.array([(0.33, 0.10, 0.10), (0.30, 0.30, 0.14), (0.17, 0.43, 0.22), (-0.01, 0.50, 0.26),
                   (-0.01, 0.215, 0.38), (0.22, 0.22, 0.30)])  # fmt: skip
_UPPER_LIP = np.array([(-1, 0.302, 0.31), (-0.35, 0.285, 0.36), (0, 0.295, 0.37), (0.35, 0.285, 0.36),
                       (1, 0.302, 0.31), (0, 0.330, 0.37)])  # fmt: skip
_LOWER_LIP = np.array([(-1, 0.302, 0.31), (0, 0.322, 0.37), (1, 0.302, 0.31), (0.5, 0.36, 0.35),
                       (0, 0.37, 0.36), (-0.5, 0.36, 0.35)])  # fmt: skip
_NOSTRILS = np.array([(-1, 0.175, 0.35), (-0.55, 0.14, 0.40), (0, 0.17, 0.46), (0.55, 0.14, 0.40),
                      (1, 0.175, 0.35), (0.5, 0.205, 0.36), (0, 0.20, 0.40), (-0.5, 0.205, 0.36)])  # fmt: skip
_NOSE_RIDGE = np.array([(0.0, -0.04, 0.355), (-0.035, -0.01, 0.34), (-0.045, 0.14, 0.38),
                        (-0.02, 0.165, 0.44), (0.03, 0.165, 0.45), (0.045, 0.14, 0.40), (0.02, 0.0, 0.36)])  # fmt: skip
_ALMOND = np.array([(-0.075, 0.010, 0.33), (-0.03, -0.034, 0.33), (0.03, -0.034, 0.32),
                    (0.075, 0.0, 0.29), (0.03, 0.030, 0.32), (-0.03, 0.030, 0.33)])  # fmt: skip
_BROW = np.array([(-0.105, -0.095, 0.33), (0, -0.125, 0.33), (0.105, -0.095, 0.29), (0.08, -0.095, 0.30),
                  (0, -0.122, 0.33), (-0.08, -0.095, 0.33)])  # fmt: skip
# Fringes: swept to the person's left, parted in the middle, straight.
_SWEPT = np.array([(-0.10, -0.47, 0.20), (0.14, -0.45, 0.20), (0.30, -0.30, 0.16), (0.345, -0.04, 0.10),
                   (0.26, -0.19, 0.26), (0.02, -0.29, 0.34), (-0.20, -0.30, 0.30), (-0.30, -0.20, 0.18),
                   (-0.30, -0.34, 0.14)])  # fmt: skip
_PARTED = np.array([(0, -0.46, 0.20), (0.25, -0.40, 0.16), (0.365, -0.10, 0.08),
                    (0.35, 0.16, 0.10), (0.27, -0.12, 0.24), (0, -0.36, 0.32), (-0.27, -0.12, 0.24),
                    (-0.35, 0.16, 0.10), (-0.365, -0.10, 0.08), (-0.25, -0.40, 0.16)])  # fmt: skip
_STRAIGHT = np.array([(-0.28, -0.38, 0.16), (0, -0.46, 0.20), (0.28, -0.38, 0.16), (0.33, -0.12, 0.14),
                      (0.20, -0.15, 0.30), (0, -0.14, 0.34), (-0.20, -0.15, 0.30), (-0.33, -0.12, 0.14)])  # fmt: skip
_FRINGES = {"side part": _SWEPT, "ponytail": _SWEPT, "long": _SWEPT, "long, centre part": _PARTED, "bob": _STRAIGHT}
LONG = {"long": 1.75, "long, centre part": 1.5, "bob": 0.62, "long curls": 1.45}
"""How far hair hangs below the middle of the skull, in head heights."""
VOLUME = {
    "afro": 0.26,
    "long curls": 0.11,
    "curls": 0.10,
    "bob": 0.06,
    "long": 0.05,
    "buzz": 0.012,
    "bald": 0.0,
}


def _frame(head: Head, half: float, top: float):
    """Texture frame over the head: u from -1 to 1 over its width, v = 0 at `top`."""
    return head.at((0.0, top)), head.axes[0] * half, head.axes[1]


def draw_back_hair(canvas: Canvas, body: Anatomy, who: Identity, *, in_front: bool) -> None:
    """Hair that hangs down: behind the torso in a front view, in front of it in a back view."""
    head, style = body.head, who.hair_style
    s, c = head.sin, head.cos
    if style in LONG:
        length, spread = LONG[style], 0.45 + VOLUME.get(style, 0.02)
        y = np.array([-0.32, -0.15, 0.1, 0.35, 0.35 + 0.5 * (length - 0.35), length])
        half = spread * np.array([0.55, 0.86, 1.0, 1.0, 0.98, 0.74 if style != "bob" else 0.96])
        half = half * (abs(c) + 0.72 * abs(s))
        middle = np.array([-0.08, -0.10, -0.13, -0.15, -0.2, -0.22]) * s
        minus, plus = head.at(np.stack([middle - half, y], -1)), head.at(np.stack([middle + half, y], -1))
        shade = 1.0 if in_front else 0.72
        canvas.ribbon(minus, plus, y + 0.45, material=who.hair, label=HAIR, radius=0.45, shade=shade,
                      cap=(0.0, 0.10 * head.unit))  # fmt: skip
    elif style == "ponytail":
        y = np.array([-0.22, 0.1, 0.6, 1.25])
        half = np.array([0.10, 0.15, 0.13, 0.05])
        x = -0.42 * s + np.array([0, -0.1, -0.12, -0.08]) * s
        minus, plus = head.at(np.stack([x - half, y], -1)), head.at(np.stack([x + half, y], -1))
        canvas.ribbon(minus, plus, y + 0.3, material=who.hair, label=HAIR, radius=0.2, cap=(0.0, 0.03 * head.unit))


def draw_front_strand(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """Long hair laid over one shoulder, in front of the clothes."""
    head = body.head
    if who.hair_style not in ("long", "long curls") or head.cos < 0.3:
        return
    y = np.array([-0.1, 0.15, 0.42, 0.8, LONG[who.hair_style] * 0.92])
    x = who.side * np.array([0.35, 0.37, 0.40, 0.44, 0.46]) - 0.05 * head.sin
    half = np.array([0.05, 0.085, 0.12, 0.13, 0.05])
    minus, plus = head.at(np.stack([x - half, y], -1)), head.at(np.stack([x + half, y], -1))
    canvas.ribbon(minus, plus, y + 0.45, material=who.hair, label=HAIR, radius=0.2, turn=2.0 * who.side, shade=0.95,
                  cap=(0.0, 0.05 * head.unit))  # fmt: skip


def _crown(canvas: Canvas, head: Head, who: Identity) -> None:
    """The mass of hair around the skull."""
    volume = VOLUME.get(who.hair_style, 0.035)
    s, c = head.sin, head.cos
    half = np.hypot((0.365 + volume) * c, (0.44 + volume) * s)
    rise = 0.46 + 1.1 * volume
    curly = who.hair_style in ("curls", "afro", "long curls")
    points = np.add(ellipse(half, rise, n=72 if curly else 28), (-0.06 * s, -0.02))
    if curly:
        n = np.arange(72)
        points = points * (1 + 0.022 * np.cos(n * np.pi / 2) + 0.012 * np.cos(n * 1.31))[:, None]
    if who.hair_style in ("short", "buzz", "side part", "ponytail", "bun"):
        # Cut around the ears: nothing hangs beside the jaw, the nape stays covered.
        low = 0.14 if c > 0 else 0.40
        points[:, 1] = np.minimum(points[:, 1], low + np.maximum(0, -points[:, 0] * np.sign(s)) * abs(s) * 0.7)
    elif c > 0:
        points[:, 1] = np.minimum(points[:, 1], 0.27)  # not below the chin; what hangs lies behind the neck
    frame = _frame(head, half, -0.5)
    canvas.polygon(head.at(points), material=who.hair, label=HAIR, frame=frame, radius=half, edge=0.5)


def _bun(canvas: Canvas, head: Head, who: Identity) -> None:
    if who.hair_style == "bun":
        x, y = (-0.30 * head.sin, -0.52 + 0.16 * (head.cos < 0))
        points = np.add(ellipse(0.19, 0.17), (x, y))
        canvas.polygon(head.at(points), material=who.hair, label=HAIR, radius=0.2, edge=0.6,
                       frame=(head.at((x, y - 0.2)), head.axes[0] * 0.19, head.axes[1]))  # fmt: skip


def face_outline(head: Head, jaw: float) -> np.ndarray:
    """Closed outline [18 2] of the bare face and jaw in local coordinates."""
    s, c = head.sin, head.cos
    y, half = _OUTLINE.T
    half = half * np.where(y > 0.1, jaw, 1.0)
    width = np.hypot(half * c, (0.26 + 0.15 * (half / 0.355)) * half / 0.355 * s)
    low = np.clip((y - 0.1) / 0.4, 0, 1)
    middle = 0.17 * low * s
    return np.concatenate([np.stack([middle + width, y], -1), np.stack([middle - width, y], -1)[::-1]])


def draw_neck(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """From the shoulders up into the head."""
    head, r = body.head, who.build.neck
    top = head.at((-0.06 * head.sin, 0.22))
    base = body.spine(np.array([-0.07]))[0]
    rows = np.array([top, base + 0.5 * (top - base), base])
    half = np.array([r * 0.97, r, r * 1.15])[:, None] * head.unit
    side = body.across[0]
    skin = dict(material=who.skin, label=FACE, radius=0.2, edge=0.3, shade=0.94)
    canvas.ribbon(rows - side * half, rows + side * half, (0, 0.25, 0.5), cap=(0.0, 0.12 * head.unit), **skin)


def draw_head(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """Skull, hair, face, features; and what is worn on the head."""
    head = body.head
    s, c = head.sin, head.cos
    outline = face_outline(head, who.face.jaw)
    skull = np.add(ellipse(np.hypot(0.355 * c, 0.43 * s), 0.45, n=24), (-0.05 * s, -0.05))
    skin_frame = _frame(head, 0.4, -0.5)
    canvas.polygon(head.at(skull), material=who.skin, label=FACE, frame=skin_frame, radius=0.4, edge=0.35)
    if c > -0.35:
        canvas.polygon(head.at(outline), material=who.skin, label=FACE, frame=skin_frame, radius=0.4, edge=0.3)
    hairy = who.hair_style != "bald"
    if hairy and c <= -0.35:
        _crown(canvas, head, who)
        _bun(canvas, head, who)
        _ears(canvas, head, who)
    elif hairy:
        _bun(canvas, head, who)
        _crown(canvas, head, who)
        _bare_face(canvas, head, who, outline)
        _ears(canvas, head, who)
    else:
        _ears(canvas, head, who)
    if c > -0.35:
        _features(canvas, head, who)
        if hairy and c > 0.6:  # further round, the strands would lie over the eyes
            _fringe(canvas, head, who)
    if "sunglasses" in who.garments and c > -0.2:
        _sunglasses(canvas, head, who)
    if "hat" in who.garments:
        _hat(canvas, head, who)


def _bare_face(canvas: Canvas, head: Head, who: Identity, outline) -> None:
    """The part of the face that hair leaves free: down from the hairline, in from the temples."""
    s, c = head.sin, head.cos
    hairline = {"buzz": -0.33, "short": -0.31, "side part": -0.31, "bun": -0.31, "afro": -0.22}.get(
        who.hair_style, -0.26
    )
    half = 0.315 * c + 0.10 * abs(s)
    centre = 0.235 * s
    t = np.linspace(np.pi, 2 * np.pi, 9)
    arch = np.stack([centre + half * np.cos(t), -0.06 + (0.06 + hairline) * -np.sin(t)], -1)
    # Below the temples the outline of the jaw takes over, on the hidden side as far as the ear.
    lower = outline[(outline[:, 1] > 0.03)]
    if who.hair_style in LONG and abs(c) > 0.3:
        lower = lower.copy()
        lower[:, 0] = np.clip(lower[:, 0], centre - half * 1.05, centre + half * 1.05)
    points = np.concatenate([arch, lower])
    low, high = outline[:, 0].min(), outline[:, 0].max()
    points[:, 0] = np.clip(points[:, 0], low, high)
    canvas.polygon(head.at(points), material=who.skin, label=FACE, frame=_frame(head, 0.4, -0.5), radius=0.4, edge=0.3)


def _ears(canvas: Canvas, head: Head, who: Identity) -> None:
    if who.hair_style in LONG or who.hair_style == "afro":
        return
    s, c = head.sin, head.cos
    for side in (-1, 1):
        nearness = -side * s
        if nearness < -0.35:
            continue
        x = side * 0.365 * c - 0.03 * s
        points = np.add(ellipse(0.05 + 0.045 * max(nearness, 0), 0.105, n=12), (x, 0.06))
        canvas.flat(head.at(points), material=who.skin, label=FACE, shade=0.90)
        if nearness > 0.3:
            canvas.flat(head.at(points * 0.55 + 0.45 * points.mean(0)), material=who.skin, label=FACE, shade=0.74)


@functools.lru_cache(maxsize=512)
def _face_patches(who: Identity):
    """Beard, mouth, nose, eyes and brows as flat patches: (surface points [n 3], [(start, stop, material,
    shade, side)]).

    side: -1 or 1 for what belongs to the person's right or left eye, -2 or 2 for the halves of a beard, 0 for the rest.
    """
    face, points, patches = who.face, [], []

    def patch(corners, material, shade=1.0, side=0):
        start = patches[-1][1] if patches else 0
        points.append(np.asarray(corners, float))
        patches.append((start, start + len(corners), material, shade, side))

    skin, hair = np.array(who.skin.rgb), np.array(who.hair.rgb)
    if face.beard:
        share = 0.8 * face.beard
        mixed = Material(tuple(skin * (1 - share) + hair * share))
        for side in (-1, 1):
            patch(_BEARD * (side * 0.97 * face.jaw, 1, 1), mixed, 1.0, 2 * side)
    patch(_UPPER_LIP * (face.mouth, 1, 1), Material(face.lips), 0.86)
    patch(_LOWER_LIP * (face.mouth, 1, 1), Material(face.lips))
    patch(_NOSTRILS * (0.075 * face.nose, 1, 1), who.skin, 0.84)
    patch(_NOSE_RIDGE, who.skin, 1.04)
    brow = Material(tuple(0.62 * hair + 0.12 * skin))
    for side in (-1, 1):
        at, size = np.array([side * 0.155, 0.0, 0.0]), face.eye_size
        almond = _ALMOND * (side * size, size, 1) + at
        patch(almond, WHITE, 0.96, side)
        for radius, material in ((0.034, Material(face.eyes)), (0.016, DARK)):
            disc = ellipse(radius * size, radius * size, 10)
            patch(np.column_stack([disc, np.full(10, 0.33)]) + at - (0, 0.003, 0), material, 1.0, side)
        lash = almond[[0, 1, 2, 3, 2, 1]]
        lash[4:, 1] -= face.lashes * 1.5
        lash[[0, 3], 1] -= 0.004
        patch(lash, DARK, 1.0, side)
        arch = _BROW * (side, 1, 1) + at
        arch[[0, 5], 1] += face.brow_tilt
        arch[[2, 3], 1] -= face.brow_tilt
        arch[3:, 1] += face.brow * np.array([0.5, 1.0, 0.5])
        patch(arch, brow, 1.0, side)
    return np.concatenate(points), patches


def _features(canvas: Canvas, head: Head, who: Identity) -> None:
    """Everything on the bare face; an eye or a half beard on the hidden side is left out."""
    points, patches = _face_patches(who)
    points = head.on(points)
    dimmed = 1 - 0.13 * abs(head.sin)  # in profile the features lie at the darker rim of the head
    for start, stop, material, shade, side in patches:
        limit = 0.35 * side if abs(side) < 2 else 0.6 * side
        if side == 0 or head.cos > limit * head.sin:
            canvas.flat(points[start:stop], material=material, label=FACE, shade=shade * dimmed)


def _fringe(canvas: Canvas, head: Head, who: Identity) -> None:
    """Hair over the forehead: swept to a side, parted in the middle, or straight."""
    if who.hair_style not in _FRINGES:
        return
    points = _FRINGES[who.hair_style] * (who.side, 1, 1)
    top = points[:, 1] < -0.4  # the root of the fringe lies on the crown, as high as the style is full
    points[top, 1] *= 1 + 2 * VOLUME.get(who.hair_style, 0.035)
    canvas.polygon(head.on(points), material=who.hair, label=HAIR, radius=0.4, edge=0.2, turn=0.4 * head.sin,
                   frame=_frame(head, 0.42, -0.5))  # fmt: skip


def _sunglasses(canvas: Canvas, head: Head, who: Identity) -> None:
    dark = Material(tuple(0.25 * c for c in who.materials["sunglasses"].rgb))
    for side in (-1, 1):
        lens = np.add(ellipse(0.135, 0.095, n=14), (side * 0.16, 0.01))
        points = head.on(np.column_stack([lens, np.full(14, 0.34)]))
        canvas.polygon(points, material=dark, label=SUNGLASSES, radius=1.0, edge=0.9,
                       frame=(head.at((0, -0.1)), head.axes[0] * 0.4, head.axes[1]))  # fmt: skip
        ear = [
            (side * 0.26, -0.035, 0.30),
            (side * 0.37, -0.01, 0.02),
            (side * 0.37, 0.02, 0.02),
            (side * 0.26, 0.005, 0.30),
        ]
        if -side * head.sin > -0.25:
            canvas.flat(head.on(ear), material=dark, label=SUNGLASSES)
    bridge = [(-0.06, -0.03, 0.36), (0.06, -0.03, 0.36), (0.06, 0.0, 0.36), (-0.06, 0.0, 0.36)]
    canvas.flat(head.on(bridge), material=dark, label=SUNGLASSES)


def _hat(canvas: Canvas, head: Head, who: Identity) -> None:
    kind, material = who.garments["hat"].kind, who.materials["hat"]
    s, c = head.sin, head.cos
    volume = min(VOLUME.get(who.hair_style, 0.035), 0.08) + 0.045
    half = np.hypot((0.365 + volume) * c, (0.44 + volume) * s)
    x = -0.05 * s
    low, top = -0.20, -0.60 - volume
    y = np.array([low, -0.34, -0.46, top + 0.05, top])[::-1]
    widths = half * np.array([1.0, 0.98, 0.88, 0.66, 0.34])[::-1]
    if kind == "brimmed hat":
        widths = half * np.array([1.0, 0.95, 0.90, 0.84, 0.74])[::-1]
    minus, plus = head.at(np.stack([x - widths, y], -1)), head.at(np.stack([x + widths, y], -1))
    canvas.ribbon(minus, plus, y - top, material=material, label=HAT, radius=0.42, turn=-head.turn, edge=0.4,
                  cap=(0.05 * head.unit, 0.0))  # fmt: skip
    if kind == "beanie":
        fold = np.array([low - 0.14, low + 0.03])
        wide = half * np.array([1.05, 1.06])
        minus, plus = head.at(np.stack([x - wide, fold], -1)), head.at(np.stack([x + wide, fold], -1))
        canvas.ribbon(
            minus,
            plus,
            fold,
            material=material,
            label=HAT,
            radius=0.42,
            turn=-head.turn,
            edge=0.45,
            shade=0.86,
        )
    elif kind == "cap" and c > -0.3:
        t = np.linspace(0, np.pi, 9)
        rim = np.column_stack([0.34 * np.cos(t), -0.22 + 0.07 * np.sin(t), 0.22 + 0.42 * np.sin(t)])
        canvas.flat(head.on(rim), material=material.shaded(0.72), label=HAT)
    elif kind == "brimmed hat":
        rim = np.add(ellipse(0.80, 0.13, n=24), (x, low - 0.02))
        front = rim if c > 0 else rim - (0, 0.03)
        canvas.polygon(head.at(front), material=material.shaded(0.82), label=HAT, radius=0.8, edge=0.5,
                       frame=(head.at((x, low - 0.12)), head.axes[0] * 0.8, head.axes[1]))  # fmt: skip
        band = np.array([low - 0.16, low - 0.055])
        wide = half * np.array([0.97, 1.0])
        minus, plus = head.at(np.stack([x - wide, band], -1)), head.at(np.stack([x + wide, band], -1))
        canvas.ribbon(minus, plus, band, material=material.shaded(0.45), label=HAT, radius=0.4, edge=0.4)
