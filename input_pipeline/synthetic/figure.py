"""A whole synthetic person: which parts there are, in which order they are painted; and the limbs, dressed.

Lengths are in head heights.
"""

from __future__ import annotations

import functools

import numpy as np

from input_pipeline.synthetic.anatomy import Anatomy, arm_joints, leg_joints
from input_pipeline.synthetic.canvas import EDGE, Canvas, Material
from input_pipeline.synthetic.clothes import (
    ARM_LAYER,
    BEHIND,
    DRESS,
    EASE,
    FRONT,
    HEAD_LAYER,
    LEGS,
    NEAR_LEG,
    PANTS,
    TORSO_LAYER,
    TROUSERS,
    UPPER,
    draw_collar,
    draw_handbag,
    draw_scarf,
    draw_shoulder_bag,
    draw_torso,
)  # fmt: skip
from input_pipeline.synthetic.garments import TWO_SIDED
from input_pipeline.synthetic.head import draw_back_hair, draw_front_strand, draw_head, draw_neck
from input_pipeline.synthetic.identity import Identity
from input_pipeline.synthetic.poses import FOREARM, SHIN, THIGH, TORSO, UPPER_ARM

LACES = Material((245.0, 245.0, 245.0))
ARM = {-1: 15, 1: 14}
LEG = {-1: 13, 1: 12}
SHOE = {-1: 10, 1: 9}

SLEEVES = {"t-shirt": 0.62, "tank top": 0.0, "long sleeve": 2.0, "shirt": 2.0, "hoodie": 2.0, "jacket": 2.0,
           "summer dress": 0.0, "long dress": 0.45, "sleeved dress": 1.9}  # fmt: skip
"""How far the sleeve reaches: 1 = elbow, 2 = wrist."""
LIMB_WIDTHS = {
    "upper arm": (np.array([0.0, 0.35, 0.75, 1.0]), np.array([0.165, 0.175, 0.148, 0.138])),
    "forearm": (np.array([0.0, 0.3, 0.7, 1.0]), np.array([0.138, 0.140, 0.108, 0.088])),
    "hand": (np.array([0.0, 0.3, 0.62, 1.0]), np.array([0.085, 0.115, 0.100, 0.055])),
    "thumb": (np.array([0.0, 1.0]), np.array([0.045, 0.030])),
    "thigh": (np.array([0.0, 0.3, 0.7, 1.0]), np.array([0.335, 0.310, 0.235, 0.190])),
    "shin": (np.array([0.0, 0.12, 0.35, 0.7, 1.0]), np.array([0.190, 0.185, 0.200, 0.140, 0.098])),
    "shoe": (np.array([0.0, 0.3, 0.7, 1.0]), np.array([0.115, 0.135, 0.150, 0.125])),
    "pump": (np.array([0.0, 0.3, 0.7, 1.0]), np.array([0.095, 0.100, 0.115, 0.070])),
    "instep": (np.array([0.0, 1.0]), np.array([0.125, 0.135])),
    "lace": (np.array([0.0, 1.0]), np.array([0.070, 0.070])),
}
"""(fractions of the bone, half-widths in head heights)"""


def draw_person(canvas: Canvas, body: Anatomy, who: Identity) -> None:
    """Paints the whole person, back to front."""
    back = np.cos(body.turn) < 0
    near = {side: _arm_is_near(body, side) for side in (-1, 1)}

    canvas.layer = BEHIND
    if not back:
        draw_back_hair(canvas, body, who, in_front=False)
    for side in (-1, 1):
        if not near[side]:
            _arm(canvas, body, who, side)

    canvas.layer = LEGS
    far_leg = -1 if body.pose.depth[leg_joints(-1)[2]] <= body.pose.depth[leg_joints(1)[2]] else 1
    _leg(canvas, body, who, far_leg)
    canvas.layer = NEAR_LEG
    _leg(canvas, body, who, -far_leg)

    canvas.layer = TORSO_LAYER
    draw_torso(canvas, body, who)

    canvas.layer = HEAD_LAYER
    if back:
        draw_neck(canvas, body, who)
        draw_scarf(canvas, body, who)
        draw_head(canvas, body, who)
        draw_back_hair(canvas, body, who, in_front=True)
    else:
        draw_neck(canvas, body, who)
        draw_collar(canvas, body, who)
        draw_head(canvas, body, who)
        draw_scarf(canvas, body, who)
        draw_front_strand(canvas, body, who)

    canvas.layer = FRONT
    draw_shoulder_bag(canvas, body, who)
    arms = sorted((side for side in (-1, 1) if near[side]), key=lambda side: body.pose.depth[arm_joints(side)[2]])
    for side in arms:
        canvas.layer = ARM_LAYER
        _arm(canvas, body, who, side)


def _arm_is_near(body: Anatomy, side: int) -> bool:
    """Whether an arm is painted after the torso."""
    shoulder, elbow, wrist = arm_joints(side)
    if not body.pose.present[elbow]:
        return False
    depth = body.pose.depth
    chest = (depth[arm_joints(-1)[0]] + depth[arm_joints(1)[0]]) / 2
    return bool(0.35 * depth[shoulder] + 0.3 * depth[elbow] + 0.35 * depth[wrist] - chest > -0.16 * body.unit)


@functools.lru_cache(maxsize=4096)
def _taper(limb: str, factor: float, *, start=0.0, stop=1.0, ease=(0.0, 0.0)):
    """(fractions, half-widths in head heights) of a limb from start to stop of its bone, widened by ease (at
    start, at stop)."""
    at, widths = LIMB_WIDTHS[limb]
    inner = at[(at > start + 0.05) & (at < stop - 0.05)]
    fractions = np.concatenate([[start], inner, [stop]])
    share = (fractions - start) / (stop - start)
    return fractions, factor * (np.interp(fractions, at, widths) + ease[0] * (1 - share) + ease[1] * share)


def _arm(canvas: Canvas, body: Anatomy, who: Identity, side: int) -> None:
    shoulder, elbow, wrist = (body.joints[j] for j in arm_joints(side))
    factor, unit = who.build.arm, body.unit
    slot = "top" if "top" in who.garments else "dress"
    kind, cloth = who.garments[slot].kind, who.materials[slot]
    label = UPPER if slot == "top" else DRESS
    if who.garments[slot].pattern == TWO_SIDED:  # sleeves would show the back's colour in front
        cloth = cloth.shaded(1.0)
    reach, ease = SLEEVES[kind], EASE.get(kind, 0.03)
    root = dict(edge=(0.05, EDGE))  # above the armpit the arm is one with the body: no dark rims there
    skin = dict(material=who.skin, label=ARM[side], radius=0.15)
    sleeve = dict(material=cloth, label=label, radius=0.22, turn=4.2 * side)

    canvas.limb(shoulder, elbow, _taper("upper arm", factor), v=(0, UPPER_ARM), caps=(0.5, 1), **root, **skin)
    if reach > 0:
        profile = _taper("upper arm", factor, stop=min(reach, 1.0), ease=(ease, ease + 0.03 * (reach < 1)))
        canvas.limb(
            shoulder,
            elbow,
            profile,
            v=(0.1, 0.1 + UPPER_ARM),
            caps=(0.5, 1.0 if reach > 1 else 0),
            **root,
            **sleeve,
        )
    if canvas.layer >= TORSO_LAYER and body.pose.depth[arm_joints(side)[2]] > 0.2 * unit:
        canvas.layer = FRONT
    profile = _taper("forearm", factor)
    canvas.limb(elbow, wrist, profile, v=(UPPER_ARM, UPPER_ARM + FOREARM), caps=(1, 0.6), **skin)
    _hand(canvas, elbow, wrist, who, side, unit)
    if "bag" in who.garments and who.garments["bag"].kind == "handbag" and side == who.side:
        draw_handbag(canvas, body, who, wrist, elbow)
    if reach > 1:
        stop = reach - 1 - 0.04
        profile = _taper("forearm", factor, stop=stop, ease=(ease, ease + 0.01))
        canvas.limb(elbow, wrist, profile, v=(0.1 + UPPER_ARM, 0.1 + UPPER_ARM + FOREARM), caps=(1, 0), **sleeve)
        if kind in ("hoodie", "jacket", "shirt"):
            cuff = _taper("forearm", factor, start=stop - 0.1, stop=stop, ease=(ease + 0.015, ease + 0.015))
            canvas.limb(elbow, wrist, cuff, v=(0, 0.1), label=label, radius=0.2, material=cloth.shaded(0.85))


def _hand(canvas: Canvas, elbow, wrist, who: Identity, side: int, unit: float) -> None:
    """A relaxed hand: palm and closed fingers along the forearm, the thumb towards the body."""
    along = wrist - elbow
    length = max(float(np.hypot(along[0], along[1])), 1e-9)
    along = along / length
    across = np.array([along[1], -along[0]]) * side
    style = dict(material=who.skin, label=ARM[side], radius=0.1)
    factor = 0.4 + 0.6 * who.build.arm
    size = 0.42 * unit * min(max(length / (0.8 * FOREARM * unit), 0.6), 1.0)
    thumb = wrist + (along * 0.10 - across * 0.06) * unit
    tip = thumb + (along * 0.20 - across * 0.10) * unit
    canvas.limb(thumb, tip, _taper("thumb", factor), v=(0, 0.1), caps=(1, 1), shade=0.93, **style)
    canvas.limb(wrist, wrist + along * size, _taper("hand", factor), v=(0, 0.4), caps=(0.5, 0.9), **style)


def _leg(canvas: Canvas, body: Anatomy, who: Identity, side: int) -> None:
    hip, knee, ankle = (body.joints[j] for j in leg_joints(side))
    factor = who.build.leg
    skin = dict(material=who.skin, label=LEG[side], radius=0.22)
    bottom = who.garments.get("bottom")
    covered = bottom is not None and bottom.kind in TROUSERS
    end = TROUSERS[bottom.kind][0] if covered else 0.0
    if end <= 1:
        canvas.limb(hip, knee, _taper("thigh", factor), v=(0, THIGH), caps=(0.6, 1), **skin)
    canvas.limb(knee, ankle, _taper("shin", factor), v=(THIGH, THIGH + SHIN), caps=(1, 1), **skin)
    boots = who.garments["shoes"].kind == "boots"
    if not boots:
        _shoe(canvas, body, who, side)
    if covered:
        _, ease, hem = TROUSERS[bottom.kind]
        cloth = dict(material=who.materials["bottom"], label=PANTS, radius=0.3)
        profile = _taper("thigh", factor, stop=min(end, 1.0), ease=(ease, ease if end > 1 else hem))
        canvas.limb(
            hip,
            knee,
            profile,
            v=(TORSO, TORSO + THIGH),
            caps=(0.6, 1.0 if end > 1 else 0),
            edge=(0.05, EDGE),
            **cloth,
        )
        if end > 1:
            profile = _taper("shin", factor, stop=end - 1, ease=(ease, hem))
            canvas.limb(knee, ankle, profile, v=(TORSO + THIGH, TORSO + THIGH + SHIN), caps=(1, 0), **cloth)
    if boots:
        if not (covered and bottom.kind == "wide trousers"):  # those fall over the shaft
            ease = 0.075 if covered and bottom.kind != "leggings" else 0.035
            canvas.limb(knee, ankle, _taper("shin", factor, start=0.52, ease=(ease, ease)), v=(0, 1),
            caps=(0, 1),
                        label=SHOE[side], material=who.materials["shoes"], radius=0.2)  # fmt: skip
        _shoe(canvas, body, who, side)


def _shoe(canvas: Canvas, body: Anatomy, who: Identity, side: int) -> None:
    """A shoe that points where the body faces, the toes a little outward; from behind one sees the heel."""
    knee, ankle = (body.joints[j] for j in leg_joints(side)[1:])
    unit, kind, material = body.unit, who.garments["shoes"].kind, who.materials["shoes"]
    splay = body.turn + np.deg2rad(16) * side
    reach = unit * np.array([0.66 * np.sin(splay), 0.36 * max(np.cos(splay), 0.0) + 0.10])
    lower = ankle - knee
    lower = lower * (unit / max(float(np.hypot(lower[0], lower[1])), 1e-6))
    heel = ankle + 0.10 * lower
    sole = {"sneakers": Material((236, 234, 228)), "boots": Material((44, 38, 36))}.get(kind, material.shaded(0.5))
    style = dict(v=(0, 0.6), label=SHOE[side], radius=0.2)
    drop = np.array([0.0, 0.055 * unit])
    shape = "pump" if kind == "pumps" else "shoe"
    canvas.limb(
        heel + drop,
        heel + reach + drop,
        _taper(shape, 1.0, ease=(0.012, 0.012)),
        material=sole,
        caps=(1, 0.9),
        **style,
    )
    if kind == "pumps":  # the instep is bare: the shoe is a heel cup and the toes
        canvas.limb(heel - drop, heel + reach * 0.55, _taper(shape, 0.8), material=who.skin, v=(0, 0.6),
        caps=(1, 1),
                    label=LEG[side], radius=0.2)  # fmt: skip
        canvas.limb(heel + reach * 0.5, heel + reach, _taper(shape, 1.0), material=material, caps=(1, 0.9), **style)
        return
    canvas.limb(heel, heel + reach, _taper(shape, 1.0), material=material, caps=(1, 0.9), **style)
    canvas.limb(heel - 0.07 * lower, heel, _taper("instep", 1.0), material=material, caps=(0.3, 0.3), **style)
    if kind == "sneakers" and np.cos(splay) > -0.2:
        for f in (0.22, 0.42):
            spot = heel + reach * f
            canvas.limb(spot, spot + reach * 0.08, _taper("lace", 1.0), material=LACES, **style)
