"""Clothes on the trunk of a synthetic person: tops, skirts, dresses, belts, scarves, bags.

Lengths are in head heights. Torso sections run from t = 0 (shoulder line) to 1 (hip line); cloth y = t *
TORSO.
"""

from __future__ import annotations

import functools

import numpy as np

from input_pipeline.synthetic.anatomy import Anatomy, arm_joints, leg_joints
from input_pipeline.synthetic.canvas import Canvas, Material, ellipse
from input_pipeline.synthetic.identity import Build, Identity
from input_pipeline.synthetic.poses import L_HIP, R_HIP, SHOULDER_HALF, THIGH, TORSO

UPPER, SKIRT, PANTS, DRESS, BELT, SCARF, BAG, FACE = 4, 5, 6, 7, 8, 17, 16, 11

NECK_HOLES = {"tank top": (0.46, 0.30), "summer dress": (0.46, 0.30), "shirt": (0.36, 0.16), "jacket": (0.30, 0.15),
              "long dress": (0.40, 0.24), "hoodie": (0.12, 0.20)}  # fmt: skip
"""(depth, half-width) of the neck hole in head heights"""
_FLAP = np.array([(0.10, -0.30), (0.25, -0.20), (0.26, 0.02), (0.05, 0.18), (0.13, -0.10)])
_HOOD = np.array([(-0.36, -0.22), (-0.30, 0.03), (0, 0.16), (0.30, 0.03), (0.36, -0.22), (0.24, -0.2), (0, 0),
                  (-0.24, -0.2)])  # fmt: skip
"""One flap of a collar, and the fold of a hood: (across, down) from the middle of the shoulder line"""

# Layers decide contact shadows: a part is darkened near parts of a higher layer (people.py).
BEHIND, LEGS, NEAR_LEG, TORSO_LAYER, ARM_LAYER, HEAD_LAYER, FRONT = 30, 64, 76, 110, 130, 150, 180

EASE = {
    "hoodie": 0.08,
    "jacket": 0.07,
    "shirt": 0.045,
    "t-shirt": 0.04,
    "long sleeve": 0.025,
    "tank top": 0.02,
}
HEMS = {"hoodie": 1.06, "jacket": 1.10, "shirt": 1.08, "t-shirt": 1.04, "long sleeve": 1.02, "tank top": 1.0}
SKIRT_ENDS = {"mini skirt": (0.62, 0.10), "pleated skirt": (0.92, 0.26), "long skirt": (1.62, 0.24),
              "summer dress": (0.80, 0.26), "long dress": (1.70, 0.28), "sleeved dress": (0.86,
              0.12)}  # fmt: skip
"""(where it ends: 1 = knee, 2 = ankle; flare in head heights)"""
TROUSERS = {"jeans": (1.96, 0.030, 0.05), "wide trousers": (2.02, 0.06, 0.17), "leggings": (1.88, 0.012,
0.012),
            "shorts": (0.72, 0.07, 0.10)}  # fmt: skip
"""(where it ends: 1 = knee, 2 = ankle; ease at the thigh and at the hem)"""


@functools.lru_cache(maxsize=4096)
def _torso_widths(build: Build, t: tuple[float, ...], ease: float):
    """Half-widths (front, side) [k] of the torso at t, clothes included, in head heights."""
    at = np.array([0.14, 0.36, 0.62, 0.85, 1.0, 1.14])
    b = build
    front = np.array([b.chest * 0.98, b.chest * 0.95, b.waist, 0.35 * b.waist + 0.65 * b.hip, b.hip, b.hip * 0.98])
    side = b.depth * np.array([0.98, 1.04, 0.88, 1.0, 1.08, 1.02])
    return np.interp(t, at, front) + ease, np.interp(t, at, side) + ease


@functools.lru_cache(maxsize=4096)
def _shirt_rows(build: Build, *, neck: float, stop: float, ease: float, strap: float, flare: float):
    """Sections (t, front, side) [k] from the neck over the slope of the shoulders down to t = stop.

    neck: half-width of the neck hole. strap: how far out the cloth reaches, 1 = over the shoulder joints.
    flare: how much wider than the body it is at the hips.
    """
    reach = (SHOULDER_HALF + 0.06) * strap
    slope = np.array([0.0, 0.16, 0.5, 0.80, 0.97, 1.0])
    shoulders = np.array([-0.15, -0.126, -0.103, -0.080, -0.045, 0.05])
    t = (*(t for t in (0.16, 0.36, 0.5, 0.62, 0.74, 0.86, 1.0) if t < stop - 0.04), stop)
    front, side = _torso_widths(build, t, ease)
    widen = flare * np.clip((np.array(t) - 0.5) / 0.5, 0, 1)
    return (
        np.concatenate([shoulders, t]),
        np.concatenate([neck + slope * (reach - neck) + ease * 0.3, front + widen]),
        np.concatenate([(0.2 + 0.3 * slope) * (0.5 + build.depth) + ease * 0.3, side + widen]),
    )


def draw_torso(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """Bare torso, then what covers the lower body, then the top, then the belt."""
    skin = dict(material=who.skin, label=FACE, radius=0.6, shade=0.97, edge=0.15)
    _wrap(canvas, body, who, neck=0.2, stop=0.7, ease=-0.03, **skin)
    top, bottom = who.garments.get("top"), who.garments.get("bottom")
    if bottom is None:
        _dress(canvas, body, who)
        return
    tucked = top.kind in ("tank top", "shirt", "long sleeve") and who.key[-1] % 2 == 0
    if tucked:
        _top(canvas, body, who, hem=0.85)
    if bottom.kind in TROUSERS:
        canvas.layer = NEAR_LEG  # no contact shadow on the thighs, which are of the same piece
        _pelvis(canvas, body, who)
        canvas.layer = TORSO_LAYER
    else:
        _skirt(canvas, body, who, slot="bottom", label=SKIRT, start=0.60)
    if not tucked:
        _top(canvas, body, who, hem=HEMS[top.kind])
    else:
        _belt(canvas, body, who, t=0.63, ease=0.035)


def _wrap(canvas, body, who, *, neck, stop, ease, strap=1.0, flare=0.0, **style) -> None:
    """One strip of cloth (or skin) around the torso from the shoulders down to t = stop."""
    t, front, side = _shirt_rows(who.build, neck=neck, stop=stop, ease=ease, strap=strap, flare=flare)
    minus, plus = body.sections(t, front, side)
    canvas.ribbon(minus, plus, t * TORSO, turn=-body.turn, **style)


def _top(canvas: Canvas, body: Anatomy, who: Identity, *, hem: float) -> None:
    kind, cloth = who.garments["top"].kind, who.materials["top"]
    ease = EASE[kind]
    strap = 0.72 if kind == "tank top" else 1.0
    flare = {"jacket": 0.05, "shirt": 0.05, "t-shirt": 0.03}.get(kind, 0.0)
    _wrap(canvas, body, who, neck=0.30 if kind == "tank top" else 0.24, stop=hem, ease=ease, strap=strap,
          flare=flare, material=cloth, label=UPPER, radius=0.6)  # fmt: skip
    if kind in ("hoodie", "jacket"):
        _band(canvas, body, who, hem - 0.07, hem + 0.005, ease + flare + 0.012, cloth.shaded(0.85), UPPER)
    if np.cos(body.turn) > 0.25:
        if kind in ("shirt", "jacket"):
            _placket(canvas, body, who, hem, kind)
        if kind == "hoodie":
            _pocket(canvas, body, who)


def _band(canvas, body, who, start, stop, ease, material, label) -> None:
    t = (start, stop)
    minus, plus = body.sections(t, *_torso_widths(who.build, t, ease))
    canvas.ribbon(
        minus,
        plus,
        (start * TORSO, stop * TORSO),
        material=material,
        label=label,
        radius=0.6,
        turn=-body.turn,
    )


def _centre_line(body: Anatomy, who: Identity, t, angle=0.0):
    """Points on the surface of the torso at t, at an angle (radians) from the middle of the front."""
    front, side = _torso_widths(who.build, tuple(t), 0.03)
    x = np.sin(angle) * front * np.cos(body.turn) + np.cos(angle) * side * np.sin(body.turn)
    blend = np.clip(t, 0, 1)[:, None]
    across = body.across[0] * (1 - blend) + body.across[1] * blend
    return body.spine(t) + across * (x * body.unit)[:, None]


def _placket(canvas, body, who, hem, kind) -> None:
    """Buttons of a shirt or the zip of a jacket, down the middle of the front."""
    dark = who.materials["top"].shaded(0.62)
    t = np.array([0.06, hem - 0.01])
    line = _centre_line(body, who, t)
    half = body.across[0] * body.unit * (0.014 if kind == "shirt" else 0.028)
    canvas.ribbon(line - half, line + half, t, material=dark, label=UPPER, radius=0.1, edge=0.0)
    if kind == "shirt":
        pearl = Material((236, 232, 222))
        for spot in _centre_line(body, who, np.arange(0.16, hem - 0.05, 0.17)):
            canvas.flat(spot + ellipse(0.026, 0.026, n=8) * body.unit, material=pearl, label=UPPER)


def _pocket(canvas, body, who) -> None:
    """The pouch of a hoodie."""
    t = np.array([0.66, 0.74, 0.92])
    left, right = (_centre_line(body, who, t, angle) for angle in (-0.62, 0.62))
    inward = 0.25 * (right[0] - left[0])
    left[0] += inward
    right[0] -= inward
    canvas.ribbon(left, right, t, material=who.materials["top"].shaded(0.88), label=UPPER, radius=0.4, edge=0.12)


def draw_collar(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """Skin in the neck hole, and the rim, collar or hood around it."""
    if np.cos(body.turn) < 0.4:  # from the side the neck hole is a line
        return
    slot = "top" if "top" in who.garments else "dress"
    kind, cloth = who.garments[slot].kind, who.materials[slot]
    label = UPPER if slot == "top" else DRESS
    depth, wide = NECK_HOLES.get(kind, (0.17, 0.23))
    collared = kind in ("shirt", "jacket")
    angles = np.linspace(0, np.pi, 9)
    sag = np.sin(angles)
    throat = min(0.9 * who.build.neck, 0.7 * wide)
    x = np.concatenate([[throat], wide * np.cos(angles), [-throat]])
    out = np.concatenate([[0.0], 0.02 + 0.13 * sag, [0.0]])
    y = np.concatenate([[-0.21], depth * sag ** (0.7 if collared else 1.0) - 0.17, [-0.21]])
    if kind in ("t-shirt", "long sleeve", "sleeved dress"):  # a knitted rim
        wider, lower = np.zeros(11), np.zeros(11)
        wider[1:-1], lower[1:-1] = 0.05 * np.cos(angles), 0.05 * sag
        canvas.flat(_on_chest(body, x + wider, y + lower, out), material=cloth.shaded(0.82), label=label)
    frame = (body.shoulders, body.across[0] * 0.4 * body.unit, _down(body) * body.unit)
    hole = _on_chest(body, x, y, out)
    canvas.polygon(hole, material=who.skin, label=FACE, frame=frame, radius=0.4, edge=0.1, shade=0.97)
    if collared:
        for sign in (-1, 1):
            flap = _on_chest(body, sign * _FLAP[:, 0], _FLAP[:, 1], 0.22)
            canvas.flat(flap, material=cloth.shaded(1.08 if kind == "shirt" else 0.86), label=label)
    elif kind == "hoodie":
        hood = _on_chest(body, _HOOD[:, 0], _HOOD[:, 1], 0.1)
        canvas.flat(hood, material=cloth.shaded(0.82), label=label)


def _on_chest(body: Anatomy, x, y, out) -> np.ndarray:
    """Points [n 2] around the neck: x across, y down from the shoulder line, out of the chest; head heights."""
    x = x * np.cos(body.turn) + out * np.sin(body.turn)
    return body.shoulders + (x[:, None] * body.across[0] + y[:, None] * _down(body)) * body.unit


def _down(body: Anatomy) -> np.ndarray:
    down = body.hips - body.shoulders
    return down / max(float(np.hypot(down[0], down[1])), 1e-6)


def _pelvis(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """The trousers from the waistband to the crotch."""
    cloth = who.materials["bottom"]
    kind = who.garments["bottom"].kind
    ease = TROUSERS[kind][1] * 0.6
    t = (0.62, 0.74, 0.86, 0.95, 1.04)
    minus, plus = body.sections(t, *_torso_widths(who.build, t, ease))
    style = dict(material=cloth, label=PANTS, radius=0.6, turn=-body.turn)
    canvas.ribbon(minus, plus, np.multiply(t, TORSO), edge=np.array([0.3, 0.3, 0.25, 0.15, 0.05]), **style)
    # The wedge between the thighs is unshaded: the inner rims of the legs below it already are.
    t, taper = (1.03, 1.1, 1.17), np.array([0.8, 0.5, 0.2])
    front, side = _torso_widths(who.build, t, ease)
    minus, plus = body.sections(t, front * taper, side * taper)
    canvas.ribbon(minus, plus, np.multiply(t, TORSO), edge=0.0, **style)
    _band(canvas, body, who, 0.615, 0.665, ease + 0.008, cloth.shaded(0.84), PANTS)
    facing = np.cos(body.turn)
    if kind in ("jeans", "shorts") and abs(facing) > 0.3:  # slits in front, patches behind
        around, half, shade = (0.0, 0.012, 0.72) if facing > 0 else (np.pi, 0.13, 0.86)
        half = body.across[1] * body.unit * half
        pocket = dict(material=cloth.shaded(shade), label=PANTS, radius=0.2, edge=0.1)
        for sign in (-1, 1):
            line = _centre_line(body, who, (0.72, 0.86), around + 0.75 * sign)
            canvas.ribbon(line - half, line + half, (0, 0.3), **pocket)


def _skirt_rows(body: Anatomy, who: Identity, end: float, flare: float, ease: float):
    """Rims of the part of a skirt below the hips: it spans both legs down to `end` (1 = knee, 2 = ankle)."""
    across, down = body.across[1], np.array([-body.across[1][1], body.across[1][0]])
    fractions = np.linspace(0.25, end, 5)
    legs = []
    for side in (-1, 1):
        hip, knee, ankle = (body.joints[j] for j in leg_joints(side))
        upper, lower = np.clip(fractions, 0, 1)[:, None], np.clip(fractions - 1, 0, 1)[:, None]
        legs.append(hip + upper * (knee - hip) + lower * (ankle - knee))
    x = np.stack([(leg - body.hips) @ across for leg in legs])
    y = np.stack([(leg - body.hips) @ down for leg in legs]).mean(0)
    half = np.interp(fractions, (0, 1, 2), (0.31, 0.2, 0.13)) * who.build.leg + ease + flare * fractions / end
    low, high = x.min(0) - half * body.unit, x.max(0) + half * body.unit
    # A skirt hangs: it does not follow both legs inwards below the hips.
    front, side = _torso_widths(who.build, (1.0,), ease)
    hips = body.unit * float(np.hypot(front[0] * np.cos(body.turn), side[0] * np.sin(body.turn)))
    keep = 0.93 if flare < 0.15 else 1.0
    low, high = np.minimum(low, -keep * hips), np.maximum(high, keep * hips)
    base = body.hips + y[:, None] * down
    return base + low[:, None] * across, base + high[:, None] * across, TORSO + fractions * THIGH


def _skirt(canvas, body, who, *, slot, label, start, ease=0.03) -> None:
    end, flare = SKIRT_ENDS[who.garments[slot].kind]
    t = (start, 0.74, 0.86, 1.0)
    minus0, plus0 = body.sections(t, *_torso_widths(who.build, t, ease))
    minus1, plus1, v1 = _skirt_rows(body, who, end, flare, ease)
    cloth = who.materials[slot]
    style = dict(material=cloth, label=label, radius=0.7, turn=-body.turn, edge=0.3)
    canvas.ribbon(
        np.concatenate([minus0, minus1]),
        np.concatenate([plus0, plus1]),
        np.concatenate([np.multiply(t, TORSO), v1]),
        **style,
    )
    if who.garments[slot].kind == "pleated skirt":
        for f in np.linspace(0.08, 0.92, 7):
            left, right = (np.concatenate([m[2:], n]) for m, n in ((minus0, minus1), (plus0, plus1)))
            line = left + f * (right - left)
            half = (right - left) * 0.006
            v = np.arange(len(line))
            canvas.ribbon(line - half, line + half, v, material=cloth.shaded(0.72), label=label, radius=0.1, edge=0.0)


def _dress(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    kind = who.garments["dress"].kind
    strap = 0.70 if kind == "summer dress" else 1.0
    cloth = dict(material=who.materials["dress"], label=DRESS, radius=0.7)
    _wrap(canvas, body, who, neck=0.28, stop=0.66, ease=0.03, strap=strap, **cloth)
    _skirt(canvas, body, who, slot="dress", label=DRESS, start=0.62)
    _belt(canvas, body, who, t=0.60, ease=0.04)


def _belt(canvas: Canvas, body: Anatomy, who: Identity, *, t: float, ease: float) -> None:
    if "belt" not in who.garments:
        return
    _band(canvas, body, who, t, t + 0.062, ease, who.materials["belt"], BELT)
    if np.cos(body.turn) > 0.2:
        spot = _centre_line(body, who, np.array([t + 0.031]))[0]
        buckle = np.array([(-0.07, -0.06), (0.07, -0.06), (0.07, 0.06), (-0.07, 0.06)]) * body.unit
        canvas.flat(spot + buckle, material=Material((214, 180, 96)), label=BELT)


def draw_scarf(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """Wound around the neck; in front one end hangs down."""
    if "scarf" not in who.garments:
        return
    cloth = who.materials["scarf"]
    down, across = _down(body), body.across[0]
    middle = body.shoulders - down * 0.13 * body.unit
    if np.cos(body.turn) > -0.1:
        shift = 0.30 * np.sin(body.turn) + 0.10 * who.side
        rows = middle + np.array([0.0, 0.5, 1.05])[:, None] * down * body.unit
        rows = rows + across * body.unit * shift
        half = across * body.unit * 0.15
        canvas.ribbon(
            rows - half,
            rows + half,
            np.array([0, 0.5, 1.05]),
            material=cloth,
            label=SCARF,
            radius=0.15,
            edge=0.3,
        )
    t = np.array([-0.12, 0.0, 0.17])[:, None]
    half = np.array([0.27, 0.37, 0.30])[:, None] * across * body.unit * (0.75 + 0.25 * abs(np.cos(body.turn)))
    rows = middle + t * down * body.unit
    canvas.ribbon(rows - half, rows + half, t[:, 0] + 2, material=cloth, label=SCARF, radius=0.35, edge=0.45,
                  cap=(0.03 * body.unit, 0.08 * body.unit))  # fmt: skip


def _bag_body(canvas, top, unit, half, height, material) -> None:
    right, down = np.array([half * unit, 0.0]), np.array([0.0, height * unit])
    box = np.array([top - right * 0.9, top + right * 0.9, top + right + down * 0.94,
                    top + right * 0.94 + down,
                    top - right * 0.94 + down, top - right + down * 0.94])  # fmt: skip
    canvas.polygon(box, material=material, label=BAG, frame=(top, right, down), radius=0.5, edge=0.25)
    flap = np.array(
        [
            top - right * 0.9,
            top + right * 0.9,
            top + right * 0.95 + down * 0.36,
            top - right * 0.95 + down * 0.36,
        ]
    )
    canvas.flat(flap, material=material.shaded(0.82), label=BAG)
    clasp = top + down * 0.36 + ellipse(0.05, 0.05, n=8) * unit
    canvas.flat(clasp, material=Material((222, 190, 110)), label=BAG)


def draw_handbag(canvas: Canvas, body: Anatomy, who: Identity, wrist, elbow) -> None:
    unit = body.unit
    if wrist[1] < elbow[1]:  # a raised hand carries nothing; the bag slides to the elbow
        wrist = elbow
    grip = wrist + np.array([0.0, 0.20 * unit])
    top = grip + np.array([0.0, 0.38 * unit])
    dark = who.materials["bag"].shaded(0.7)
    for sign in (-1, 1):
        ends = np.array([grip, top + np.array([sign * 0.22 * unit, 0.02 * unit])])
        half = np.array([0.022 * unit, 0.0])
        canvas.ribbon(ends - half, ends + half, np.array([0, 0.4]), material=dark, label=BAG, radius=0.05)
    _bag_body(canvas, top, unit, 0.36, 0.54, who.materials["bag"])


def draw_shoulder_bag(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """A strap from one shoulder across the chest or the back to a bag at the other hip."""
    if "bag" not in who.garments or who.garments["bag"].kind != "shoulder bag":
        return
    unit, side = body.unit, who.side
    hip = body.joints[L_HIP if side > 0 else R_HIP]
    outward = body.across[1] * (side * body.left_side)
    top = hip + outward * unit * 0.42 * (0.35 + 0.65 * abs(np.cos(body.turn))) + np.array([0.0, -0.12 * unit])
    far = body.joints[arm_joints(-side)[0]]
    start = far + (body.shoulders - far) * 0.42 - _down(body) * 0.15 * unit
    points = np.array([start, top])
    along = top - start
    normal = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6) * 0.035 * unit
    canvas.ribbon(points + normal, points - normal, np.array([0, 2.0]),
                                                              material=who.materials["bag"].shaded(0.8),
                  label=BAG, radius=0.1)  # fmt: skip
    _bag_body(canvas, top, unit, 0.34, 0.48, who.materials["bag"])
