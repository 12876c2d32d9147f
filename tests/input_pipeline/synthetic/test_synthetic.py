"""Synthetic people: determinism, exact ground truth, splits, and the cloth that moves with the body."""

import itertools
import math

import numpy as np
import pytest

from input_pipeline.schema import InputError
from input_pipeline.synthetic import people as synthetic
from input_pipeline.synthetic import poses
from input_pipeline.synthetic.anatomy import anatomy
from input_pipeline.synthetic.canvas import Canvas
from input_pipeline.synthetic.figure import draw_person
from input_pipeline.synthetic.garments import (
    KINDS,
    PALETTE,
    PATTERNS,
    SCALES,
    Design,
    canonical,
    cloth,
    is_held_out,
    motif_mask,
)
from input_pipeline.synthetic.identity import draw_identity
from input_pipeline.synthetic.people import SyntheticPeople, frame_to_pixels, pixel_joints, render
from input_pipeline.synthetic.poses import BASES, Pose, generated_pose, load_real_poses
from tests.shared_data import shared_data

SIZE = (256, 176)
HAT, HAIR, SUNGLASSES, UPPER, SKIRT, PANTS, DRESS, FACE = 1, 2, 3, 4, 5, 6, 7, 11
LEFT_SHOE, RIGHT_SHOE, LEFT_LEG, RIGHT_LEG, LEFT_ARM, RIGHT_ARM, BAG, SCARF = 9, 10, 12, 13, 14, 15, 16, 17
STAND, BACK, FULL_BODY = 0, 2 * [b.name for b in BASES].index("back"), range(0, 2 * 20, 2)


def near(record, joint: int, labels: set[int], radius: float = 4.0) -> bool:
    """Whether one of the labels occurs within `radius` pixels (at 256 rows) of a joint."""
    x, y, _ = record.joints[joint]
    h, w = record.parsing.shape
    r = radius * h / 256
    rows = slice(max(0, math.floor(y - r)), min(h, math.ceil(y + r) + 1))
    columns = slice(max(0, math.floor(x - r)), min(w, math.ceil(x + r) + 1))
    return bool(np.isin(record.parsing[rows, columns], list(labels)).any())


def person_with(slot: str, *, kind=None, pattern=None, start=0, split="train") -> int:
    """The first identity whose garment in this slot is of the kind and pattern."""
    for identity in range(start, start + 3000):
        design = draw_identity(seed=0, split=split, identity=identity).garments.get(slot)
        if design and kind in (None, design.kind) and pattern in (None, design.pattern):
            return identity
    raise AssertionError(f"nobody wears a {kind} {slot} with {pattern}")


def test_a_rendering_is_a_function_of_its_arguments_alone():
    arguments = [
        dict(seed=s, identity=i, pose=p, size=(64, 48)) for s, i, p in itertools.product((0, 1), (0, 5), (0, 47))
    ]
    first = [render(**a) for a in arguments]
    for cached in (draw_identity, generated_pose, synthetic.background_picture, synthetic._measured):
        cached.cache_clear()
    np.random.seed(1)  # global random state must not matter
    second = [render(**a) for a in reversed(arguments)][::-1]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.image, b.image) and np.array_equal(a.parsing, b.parsing)
        assert np.array_equal(a.joints, b.joints) and (a.name, a.identity) == (b.name, b.identity)
    assert len({a.image.tobytes() for a in first}) == len(first)
    assert len({a.name for a in first}) == len(first)


@pytest.mark.parametrize("size", [(64, 48), (256, 176), (128, 128), (512, 352)])
def test_shapes_dtypes_and_ranges(size):
    record = render(seed=3, identity=2, pose=4, size=size)
    assert record.image.shape == (*size, 3) and record.image.dtype == np.uint8
    assert record.parsing.shape == size and record.parsing.dtype == np.uint8
    assert record.joints.shape == (18, 3) and record.joints.dtype == np.float32
    assert record.parsing.max() <= 17
    visible = record.joints[:, 2] == 1
    assert set(record.joints[:, 2]) <= {0, 1} and (record.joints[~visible] == 0).all()
    assert (record.joints[visible, 0] <= size[1] - 0.5).all() and (record.joints[visible, 1] <= size[0] - 0.5).all()
    assert (record.parsing[0] == 0).mean() > 0.3 and 0.05 < (record.parsing > 0).mean() < 0.6


def test_every_class_appears_and_every_garment_worn_is_seen():
    labels = set()
    slots = {"scarf": {SCARF}, "bag": {BAG}, "hat": {HAT}, "sunglasses": {SUNGLASSES}, "dress": {DRESS}, "top": {UPPER},
             "bottom": {SKIRT, PANTS}, "shoes": {LEFT_SHOE, RIGHT_SHOE}}  # fmt: skip
    for identity in range(70):
        record = render(seed=0, identity=identity, pose=STAND, size=SIZE)
        present = set(np.unique(record.parsing))
        labels |= present
        for slot in draw_identity(seed=0, split="train", identity=identity).garments:
            if slot in slots:
                assert present & slots[slot], f"identity {identity}: the {slot} is nowhere"
        assert {LEFT_SHOE, RIGHT_SHOE, LEFT_ARM, RIGHT_ARM, FACE} <= present
    assert labels == set(range(18))


HEAD = {HAT, HAIR, SUNGLASSES, FACE}
ANY_ARM = {LEFT_ARM, RIGHT_ARM, UPPER, DRESS, BAG}
LEG_WEAR = {PANTS, SKIRT, DRESS, LEFT_SHOE, RIGHT_SHOE, LEFT_LEG, RIGHT_LEG}


@pytest.mark.parametrize("identity", [0, 3, 11, 20])
def test_joints_lie_in_their_parts(identity):
    for pose in range(0, 2 * len(BASES), 2):
        record = render(seed=0, identity=identity, pose=pose, size=SIZE)
        for joint in (0, 14, 15, 16, 17):
            if record.joints[joint, 2]:
                assert near(record, joint, HEAD | ANY_ARM), (pose, joint)
        for joint, arm in ((4, RIGHT_ARM), (7, LEFT_ARM)):
            if record.joints[joint, 2]:  # an arm may be behind the body, or a bag before the hand
                assert near(record, joint, ANY_ARM | {arm, PANTS, SKIRT} | HEAD), (pose, joint)
        for joint in (9, 12):
            if record.joints[joint, 2]:
                assert near(record, joint, LEG_WEAR | ANY_ARM), (pose, joint)
        for joint in (2, 5, 8, 11):
            if record.joints[joint, 2]:
                assert near(record, joint, set(range(1, 18)), 2), (pose, joint)


@pytest.mark.parametrize("pose, outward", [(STAND, 1), (BACK, -1)])
def test_left_and_right_are_the_persons(pose, outward):
    for identity in range(12):
        record = render(seed=0, identity=identity, pose=pose, size=SIZE)
        x = np.arange(SIZE[1])[None]
        for left, right in ((LEFT_SHOE, RIGHT_SHOE), (LEFT_ARM, RIGHT_ARM)):
            assert near(record, 7, {LEFT_ARM, BAG, UPPER, DRESS}) and near(record, 4, {RIGHT_ARM, BAG, UPPER, DRESS})
            middles = [np.broadcast_to(x, SIZE)[record.parsing == label].mean() for label in (left, right)]
            assert outward * (middles[0] - middles[1]) > 3
        assert outward * (record.joints[5, 0] - record.joints[2, 0]) > 10
        assert near(record, 13, {LEFT_SHOE, LEFT_LEG, PANTS, DRESS, SKIRT}) and not near(record, 13, {RIGHT_LEG}, 1)


def test_a_back_view_shows_no_face():
    for identity in range(10):
        front = render(seed=0, identity=identity, pose=STAND, size=SIZE)
        back = render(seed=0, identity=identity, pose=BACK, size=SIZE)
        assert front.joints[[0, 14, 15], 2].all() and not back.joints[[0, 14, 15], 2].any()
        if draw_identity(seed=0, split="train", identity=identity).hair_style != "bald":
            assert (back.parsing == HAIR).sum() > 0 or (back.parsing == HAT).sum() > 0
        assert not (back.parsing == SUNGLASSES).any()


def test_the_same_pose_gives_everybody_the_same_joints():
    for pose in (0, 35, 46, 60):
        joints = [render(seed=s, identity=i, pose=pose, size=SIZE, split=t).joints
                  for s, i, t in ((0, 0, "train"), (0, 9, "train"), (4, 2, "heldout"))]  # fmt: skip
        assert np.array_equal(joints[0], joints[1]) and np.array_equal(joints[0], joints[2])


def test_sizes_show_the_same_picture():
    """Joints scale exactly; the small picture is nearly the large one reduced, and so is its parsing map."""
    large, small = (render(seed=0, identity=6, pose=8, size=size) for size in ((512, 352), (256, 176)))
    assert np.allclose((large.joints[:, :2] + 0.5) / 2 - 0.5, small.joints[:, :2], atol=1e-4)
    reduced = large.image.reshape(256, 2, 176, 2, 3).mean((1, 3))
    assert np.abs(reduced - small.image).mean() < 3.0
    assert (large.parsing[::2, ::2] == small.parsing).mean() > 0.985
    scale, offset = frame_to_pixels((64, 48))
    assert scale == 64 and offset[0] == pytest.approx((48 - 44) / 2 - 0.5)


def test_two_sided_clothes_hide_the_colour_behind():
    """The front, with its sleeves, has the first colour nearly everywhere, the back the second but for sleeves."""
    for split, identity in itertools.product(("train", "heldout"), range(6)):
        who = draw_identity(seed=0, split=split, identity=identity, patterns="two_sided")
        slot, label = ("dress", DRESS) if "dress" in who.garments else ("top", UPPER)
        design = who.garments[slot]
        assert is_held_out(design) == (split == "heldout") and design.pattern == "two-sided"
        share = {}
        for pose in (STAND, BACK):
            record = render(seed=0, split=split, identity=identity, pose=pose, size=SIZE, patterns="two_sided")
            cloth = record.image[record.parsing == label].astype(float)
            first, second = (np.abs(cloth - PALETTE[i]).sum(1) for i in (design.colour, design.second))
            share[pose] = (second < first).mean()
        assert share[STAND] < 0.15 and share[BACK] > 0.4, (split, identity, share)


def test_patterns_move_with_the_body():
    """The chest keeps its cloth when it moves: sampled in its own coordinates it is the same in two poses; in image
    coordinates it is not."""
    identity = person_with("top", kind="t-shirt", pattern="rings")
    who = draw_identity(seed=0, split="train", identity=identity)
    records, grids = [], []
    for name in ("stand", "leaning"):
        pose = generated_pose(2 * [b.name for b in BASES].index(name))
        records.append(render(seed=0, identity=identity, pose=pose, size=(512, 352)))
        body = anatomy(pose)
        scale, offset = frame_to_pixels((512, 352))
        t = np.linspace(0.3, 0.8, 60)
        grids.append(np.rint(body.spine(t) * scale + offset).astype(int))
    assert np.abs(grids[0] - grids[1]).max() > 8
    own = [r.image[g[:, 1], g[:, 0]].astype(float) for r, g in zip(records, grids, strict=True)]
    same_place = records[1].image[grids[0][:, 1], grids[0][:, 0]].astype(float)
    moving, fixed = np.abs(own[0] - own[1]).mean(), np.abs(own[0] - same_place).mean()
    assert moving < 0.6 * fixed, (moving, fixed)
    for samples in own:  # both show the two colours of the design
        for colour in (who.garments["top"].colour, who.garments["top"].second):
            assert np.abs(samples - PALETTE[colour]).sum(1).min() < 90


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "solid"])
def test_every_pattern_shows_both_colours(pattern):
    material = cloth(Design("t-shirt", pattern, 0, 1, 1, 3), radius=0.6, folds=0.0)
    x, y = (v.ravel().astype(np.float32) for v in np.meshgrid(np.linspace(-0.9, 0.9, 200), np.linspace(0, 2.1, 200)))
    weight = material.pattern(x, y, 0.01)
    assert weight.shape == x.shape and 0 <= weight.min() <= 0.2 and 0.5 <= weight.max() <= 1


def test_text_is_on_the_front_only():
    material = cloth(Design("t-shirt", "text", 0, 1, 0, 0), radius=0.6, folds=0.0)
    y = np.linspace(0, 2, 400).astype(np.float32)
    front = material.pattern(np.zeros_like(y) + 0.2, y, 0.01)
    behind = material.pattern(np.zeros_like(y) + np.float32(np.pi * 0.6 - 0.3), y, 0.01)
    assert front.max() > 0.9 and behind.max() == 0
    assert motif_mask("text", 0).shape == (96, 160)


def test_designs_of_the_splits_are_disjoint_by_construction():
    """Every design obeys `is_held_out`, a function of the design alone, so no design can be in both splits; and equal
    looks are equal designs, since fields that do not show are zero."""
    seen = {"train": set(), "heldout": set()}
    for split, designs in seen.items():
        for seed, identity in itertools.product((0, 1), range(300)):
            designs.update(draw_identity(seed=seed, split=split, identity=identity).designs)
        assert all(is_held_out(d) == (split == "heldout") and canonical(d) == d for d in designs)
    assert not seen["train"] & seen["heldout"]
    for kind, pattern in itertools.product(KINDS, PATTERNS):
        space = {canonical(Design(kind, pattern, c, s, k, m))
                 for c, s, k, m in itertools.product(range(8), range(8), range(len(SCALES)), range(4))}  # fmt: skip
        assert 0.1 < np.mean([is_held_out(d) for d in space]) < 0.4, (kind, pattern)


def test_people_of_the_splits_are_different_people():
    keys = {s: {draw_identity(seed=0, split=s, identity=i).key for i in range(50)} for s in ("train", "heldout")}
    assert not keys["train"] & keys["heldout"] and len(keys["train"]) == 50
    train, held_out = (render(seed=0, identity=0, pose=0, size=(64, 48), split=s) for s in ("train", "heldout"))
    assert train.identity != held_out.identity and not np.array_equal(train.image, held_out.image)


def test_image_set():
    sets = [
        SyntheticPeople(seed=5, split=s, identities=6, poses_per_identity=4, size=(64, 48))
        for s in ("train", "heldout")
    ]
    for people in sets:
        assert len(people) == 24 and people.labels == "atr18"
        assert people.pairs.dtype == np.int32 and people.pairs.shape == (6 * 4 * 3, 2)
        assert (people.pairs[:, 0] // 4 == people.pairs[:, 1] // 4).all() and (
            people.pairs[:, 0] != people.pairs[:, 1]
        ).all()
        assert len(np.unique(people.pairs, axis=0)) == len(people.pairs)
        assert people.image(5).identity == people.image(6).identity != people.image(8).identity
        assert len({people.image(i).name for i in range(24)}) == 24
        assert len({people.pose(i) for i in range(4)}) == 4
    assert {sets[0].pose(i) % 2 for i in range(24)} == {0} and {sets[1].pose(i) % 2 for i in range(24)} == {1}
    chosen = [generated_pose(i) for i in range(5)]
    listed = SyntheticPeople(seed=0, split="train", identities=2, poses_per_identity=3, size=(64, 48), pose_list=chosen)
    assert len({id(listed.pose(i)) for i in range(3)}) == 3 and listed.pose(0) in chosen
    with pytest.raises(IndexError):
        sets[0].image(24)


def test_knobs():
    busy = [draw_identity(seed=0, split="train", identity=i).background for i in range(40)]
    assert {"busy", "plain"} == set(busy)
    for split, i in itertools.product(("train", "heldout"), range(20)):
        plain = draw_identity(seed=0, split=split, identity=i, patterns="solid", background="plain")
        assert plain.background == "plain" and {d.pattern for d in plain.designs} == {"solid"}
    a, b = (render(seed=0, identity=busy.index("busy"), pose=0, size=(64, 48), background=k) for k in ("all", "plain"))
    assert np.array_equal(a.parsing, b.parsing) and not np.array_equal(a.image, b.image)


def test_people_in_the_same_colours():
    """Sixteen in a row are one person: the cut and the colours of the clothes are the same, the pattern is not."""
    people = SyntheticPeople(
        seed=1, split="heldout", identities=32, poses_per_identity=1, size=(64, 48), pose_list=[generated_pose(1)],
        background="plain", same_colours=16,
    )  # fmt: skip
    worn = {}
    for group in range(2):
        members = [draw_identity(seed=1, split="heldout", identity=16 * group + k, same_colours=16) for k in range(16)]
        slot = "dress" if "dress" in members[0].garments else "top"
        designs = [who.garments[slot] for who in members]
        assert len(set(designs)) == 16 and len({d.pattern for d in designs}) > 8
        assert len({d.kind for d in designs}) == 1 and len({frozenset((d.colour, d.second)) for d in designs}) == 1
        assert all(is_held_out(d) and d == canonical(d) and d.pattern != "solid" for d in designs)
        others = [{s: d for s, d in who.garments.items() if s != slot} for who in members]
        assert all(o == others[0] for o in others) and len({(w.build, w.face, w.hair_style) for w in members}) == 1
        worn[group] = [people.image(16 * group + k) for k in range(16)]
        first = worn[group][0]
        differing = np.any([np.any(r.image != first.image, -1) for r in worn[group][1:]], 0)
        clothes = np.isin(first.parsing, [UPPER, DRESS])
        assert all(np.array_equal(r.parsing, first.parsing) for r in worn[group])
        assert differing[clothes].mean() > 0.9 and (differing & (first.parsing == 0)).sum() <= clothes.sum() / 4
        assert len({r.image.tobytes() for r in worn[group]}) == 16 and len({r.identity for r in worn[group]}) == 16
    assert not np.array_equal(worn[0][0].parsing, worn[1][0].parsing), "the next sixteen are somebody else"
    solid = [draw_identity(seed=1, split="heldout", identity=i, patterns="solid", same_colours=8) for i in range(8)]
    assert "solid" not in {d.pattern for who in solid for s, d in who.garments.items() if s in ("dress", "top")}
    with pytest.raises(InputError, match="same_colours asks for more"):
        draw_identity(seed=1, split="heldout", identity=99, same_colours=100)


def test_generated_poses_are_plausible_and_varied():
    assert len(BASES) >= 24 and len({b.name for b in BASES}) == len(BASES)
    drawn = [generated_pose(i) for i in range(400)]
    assert {p.view for p in drawn} == {"front", "back"}
    units = np.array([anatomy(p).unit for p in drawn])
    assert (units > 0.1).all() and (units < 0.24).all()
    joints = np.array([p.joints for p in drawn])
    assert np.isfinite(joints).all() and len(np.unique(joints[:, 4].round(4), axis=0)) == 400
    assert (joints[:, 1, 0] > 0.15).all() and (joints[:, 1, 0] < poses.FRAME_WIDTH - 0.15).all()
    assert (joints[:, 0, 1] > 0).all(), "heads stay in the picture"


def test_a_pose_may_lack_limbs_but_not_the_trunk():
    whole = generated_pose(0)
    present = np.ones(18, bool)
    present[[3, 4, 10, 13]] = False
    pose = Pose.from_joints(whole.joints, present=present, name="partial")
    record = render(seed=0, identity=0, pose=pose, size=SIZE)
    assert (record.joints[[3, 4, 10, 13]] == 0).all() and record.joints[2, 2] == 1
    assert record.name.endswith("partial") and pose.view == "front"
    present[8] = False
    with pytest.raises(InputError, match="lacks a shoulder or a hip"):
        Pose.from_joints(whole.joints, present=present)
    with pytest.raises(InputError, match="18 joints"):
        Pose.from_joints(whole.joints[:17])


def test_bad_arguments_are_told_in_one_line():
    good = dict(seed=0, identity=0, pose=0, size=(64, 48))
    for change in ({"split": "test"}, {"size": (20, 10)}, {"pose": -2}, {"identity": -1}, {"patterns": "none"}):
        with pytest.raises(InputError) as error:
            render(**{**good, **change})
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="empty"):
        SyntheticPeople(seed=0, split="train", identities=0, poses_per_identity=2, size=(64, 48))


def test_the_front_of_the_figure_is_painted_last():
    """Clasped hands are seen from the front and hidden by the back from behind."""
    body = anatomy(generated_pose(2 * [b.name for b in BASES].index("hands clasped")))
    canvas = Canvas(body.unit)
    draw_person(canvas, body, draw_identity(seed=0, split="train", identity=1))
    scale, offset = frame_to_pixels(SIZE)
    image, coverage, labels, columns = canvas.paint(scale=scale, offset=offset, size=SIZE, samples=2, margin=0)
    assert {LEFT_ARM, RIGHT_ARM} <= set(np.unique(labels))
    assert image.shape[:2] == coverage.shape == labels[:, columns].shape
    assert not image[coverage == 0].any() and image[coverage == 255, 3].all()
    assert (labels[:, columns][coverage == 255] > 0).all() and not labels[:, columns][coverage == 0].any()


def test_real_poses():
    path = shared_data("deepfashion_lists", "patn", "fasion-resize-annotation-test.csv")
    everything = load_real_poses(str(path))
    parts = {s: load_real_poses(str(path), split=s) for s in ("train", "heldout")}
    assert 1500 < len(everything) < 3300 and len(everything) == sum(map(len, parts.values()))
    assert not {p.name for p in parts["train"]} & {p.name for p in parts["heldout"]}
    assert {p.view for p in everything} == {"front", "back"}
    for pose in everything[::97]:
        record = render(seed=0, identity=3, pose=pose, size=(64, 48))
        assert 0.05 < (record.parsing > 0).mean() < 0.75
        assert near(record, 2, set(range(1, 18)), 6) and near(record, 5, set(range(1, 18)), 6)
        assert np.array_equal(record.joints, pixel_joints(pose, (64, 48)))
