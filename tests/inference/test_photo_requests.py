"""Photos as requests: poses on other bodies, crops and pictures put back, what is found and what is given. Detection is faked."""

import dataclasses

import numpy as np
import pytest

from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.schema import InputError
from tests.shared_data import standing_joints
from truepose_jax.detection.embedded import FoundPerson
from truepose_jax.inference import photo_requests
from truepose_jax.inference.align_pose import TREE, align_pose
from truepose_jax.inference.found_sheet import found_sheet
from truepose_jax.inference.person_crop import Crop, box_of_joints, box_of_mask, crop_box, moved
from truepose_jax.inference.photo_requests import AUTO, PhotoOptions, resolve
from truepose_jax.inference.request import Request
from truepose_jax.sampling.inpainting import Edit

SIZE = (128, 96)


def bone(joints, a, b):
    return joints[b, :2].astype(float) - joints[a, :2]


def placed(joints, scale, x, y):
    return np.where(joints[:, 2:] > 0, joints * (scale, scale, 1) + (x, y, 0), 0).astype(np.float32)


def test_a_pose_of_the_same_body_comes_back_in_its_place():
    source = standing_joints(400, 300)
    np.testing.assert_allclose(align_pose(placed(source, 0.37, 55, -20), source), source, atol=1e-3)
    half = source.copy()
    half[8:14] = 0  # no legs: the neck says the place
    np.testing.assert_allclose(align_pose(placed(half, 2.0, 5, 70), source), half, atol=1e-3)


def test_limbs_keep_their_directions_and_get_the_sources_lengths():
    source, target = standing_joints(400, 300), standing_joints(200, 150)
    target[[3, 4], :2] += ((-9, -20), (-30, -60))  # an arm up, of another length
    target[[10, 13], 1] += 15  # long shanks
    found = align_pose(target, source)
    for a, b, name in TREE:
        ours, theirs = bone(found, a, b), bone(target, a, b)
        assert ours @ theirs == pytest.approx(np.hypot(*ours) * np.hypot(*theirs), rel=1e-4), name
    for a, b in ((9, 10), (12, 13), (8, 9), (1, 8)):
        assert np.hypot(*bone(found, a, b)) == pytest.approx(np.hypot(*bone(source, a, b)), rel=1e-3)
    longest = max(np.hypot(*bone(source, a, b)) for a, b in ((3, 4), (6, 7)))
    assert max(np.hypot(*bone(found, a, b)) for a, b in ((3, 4), (6, 7))) == pytest.approx(longest, rel=1e-3)
    assert found[[10, 13], 1].max() == pytest.approx(source[[10, 13], 1].max(), abs=1e-3), (
        "the feet stand where they stood"
    )
    missing = target.copy()
    missing[[4, 9]] = 0
    assert np.array_equal(align_pose(missing, source)[:, 2], missing[:, 2])
    only = np.zeros((18, 3))
    only[4] = 5, 5, 1
    with pytest.raises(ValueError, match="share no bone"):
        align_pose(only, source)


def test_a_limb_towards_the_camera_is_no_short_limb():
    """Foreshortening is kept, and where both arms are foreshortened the ratio is held near the body's."""
    source, target = standing_joints(400, 300), standing_joints(400, 300)
    target[4, :2] = target[3, :2] + (target[4, :2] - target[3, :2]) * 0.2
    found = align_pose(target, source)
    np.testing.assert_allclose(found, target, atol=1e-3)
    target[7, :2] = target[6, :2] + (target[7, :2] - target[6, :2]) * 0.2
    assert np.hypot(*bone(align_pose(target, source), 3, 4)) <= 1.7 * np.hypot(*bone(target, 3, 4))


@pytest.mark.parametrize("hw", [(300, 200), (200, 900), (128, 96), (50, 50)])
def test_crops_hold_the_person_and_lie_in_the_photo(hw):
    joints = placed(standing_joints(*hw), 0.6, 0.15 * hw[1], 0.2 * hw[0])
    person = box_of_joints(joints, hw)
    x0, y0, x1, y1 = box = crop_box(person, hw, SIZE)
    assert 0 <= x0 <= person[0] and person[2] <= x1 <= hw[1] and 0 <= y0 <= person[1] and person[3] <= y1 <= hw[0]
    if x1 - x0 < hw[1] and y1 - y0 < hw[0]:
        assert (y1 - y0) / (x1 - x0) == pytest.approx(SIZE[0] / SIZE[1], rel=0.05)
    inside = moved(joints, box)
    assert np.array_equal(inside[:, :2] + (x0, y0), joints[:, :2]) and not moved(joints * 0, box).any()
    mask = np.zeros(hw, bool)
    mask[5:20, 7:30] = True
    assert box_of_mask(mask).tolist() == [7, 5, 30, 20] and box_of_mask(mask & False).tolist() == [0, 0, hw[1], hw[0]]


def test_pictures_are_put_back_at_the_photos_aspect():
    photo = np.full((400, 1000, 3), 40, np.uint8)
    crop = Crop(photo, (300, 40, 540, 360))
    picture = np.full((128, 96, 3), 200, np.uint8)
    made = crop.put_back(picture)
    assert made.shape == (160, 400, 3), "of the picture's own pixels"
    assert (made[60:100, 140:200] == 200).all() and (made[:, :115] == 40).all() and (made[:14] == 40).all()
    edge = made[80, 120:128, 0].astype(int)
    assert (np.diff(edge) >= 0).all() and 40 < edge[1] < 200, "it fades in"
    assert crop.put_back(picture.repeat(8, 0).repeat(8, 1)).shape == (400, 1000, 3), "never larger than the photo"
    touching = Crop(photo, (0, 0, 300, 400)).put_back(np.full((128, 96, 3), 200, np.uint8))
    assert (touching[:, :80] == 200).all(), "no seam at the photo's own edges"
    whole = Crop(photo, (0, 0, 1000, 400))
    assert whole.put_back(picture) is picture


@pytest.fixture
def finds(monkeypatch):
    """Everybody stands in the middle third of their photo; the calls are noted."""
    calls = []

    def find(photo, *, person, name):
        calls.append((name, person))
        h, w = photo.shape[:2]
        joints = placed(standing_joints(h // 2, w // 4), 1, w // 3, h // 4)
        parsing = np.zeros((h, w), np.uint8)
        parsing[h // 4 : 3 * h // 4, w // 3 : 2 * w // 3] = LABEL_SETS["atr18"].id_of("Upper-clothes")
        return FoundPerson(joints, parsing, f"found {name}")

    monkeypatch.setattr(photo_requests, "find_person", find)
    return calls


def photo(h=300, w=400):
    return np.random.default_rng(h).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_two_photos(finds):
    options = PhotoOptions(person=2, pose_person=3)
    found = resolve(Request(photo(), photo(500, 350), AUTO), SIZE, head=True, options=options, names=("me", "you"))
    assert finds == [("me", 2), ("you", 3)] and (found.source.about, found.pose.about) == ("found me", "found you")
    request, (x0, y0, x1, y1) = found.request, found.source.box
    assert request.labels == "atr18" and np.array_equal(request.source, photo()[y0:y1, x0:x1])
    assert request.parsing.shape == request.source.shape[:2] and (request.parsing > 0).any()
    np.testing.assert_allclose(request.source_joints, moved(found.source.joints, found.source.box))
    h, w = request.frame_hw
    assert (request.joints[:, :2] >= 0).all() and (request.joints[:, :2] < (w, h)).all()
    assert h / w == pytest.approx((y1 - y0) / (x1 - x0), rel=0.03) and request.crop.box == found.source.box
    sheet = found_sheet([found.source, found.pose])
    assert sheet.ndim == 3 and sheet.dtype == np.uint8 and sheet.shape[0] > 900

    plain = resolve(Request(photo(), photo(500, 350), AUTO), SIZE, head=False, options=PhotoOptions(crop=False)).request
    assert plain.crop is None and plain.source.shape == (300, 400, 3) and plain.frame_hw == (500, 350)
    assert plain.source_joints is None, "this model does not read it"


def test_joints_of_a_photo_give_what_the_photo_gives(finds):
    pose = photo(500, 350)
    by_photo = resolve(Request(photo(), pose, AUTO), SIZE, head=True)
    by_joints = resolve(Request(photo(), by_photo.pose.joints, AUTO, frame_hw=(500, 350)), SIZE, head=True)
    for field in dataclasses.fields(Request):
        ours, theirs = (getattr(one.request, field.name) for one in (by_photo, by_joints))
        if field.name != "crop":
            assert np.array_equal(ours, theirs), field.name


def test_nothing_is_looked_for_where_all_is_given(finds):
    own, parsing = standing_joints(300, 400), np.ones((300, 400), np.uint8)
    request = Request(photo(), standing_joints(40, 30), parsing, frame_hw=(40, 30), source_joints=own)
    found = resolve(request, SIZE, head=True).request
    assert not finds and found.crop is None
    for field in dataclasses.fields(Request):
        assert np.array_equal(getattr(found, field.name), getattr(request, field.name)), field.name
    assert (
        resolve(dataclasses.replace(request, parsing=None, source_joints=None), SIZE, head=False).request.parsing
        is None
    )
    cropped = resolve(request, SIZE, head=True, options=PhotoOptions(crop=True)).request
    assert not finds and cropped.crop is not None
    resolve(dataclasses.replace(request, source_joints=None), SIZE, head=True)
    assert finds == [("the photo", 1)], "the pose alone is missing"


def test_an_aligned_pose_stands_on_the_sources_place(finds):
    target = placed(standing_joints(100, 80), 1, 0, 0)
    options = PhotoOptions(align=True)
    found = resolve(Request(photo(), target, AUTO, frame_hw=(100, 80)), SIZE, head=True, options=options)
    source = found.source.joints
    assert found.pose.joints[[10, 13], 1].max() == pytest.approx(source[[10, 13], 1].max(), abs=1e-3)
    np.testing.assert_allclose(found.request.joints, moved(found.pose.joints, found.source.box), atol=1e-3)
    uncropped = resolve(
        Request(photo(), target, AUTO, frame_hw=(100, 80)),
        SIZE,
        head=True,
        options=PhotoOptions(align=True, crop=False),
    ).request
    np.testing.assert_allclose(uncropped.joints, found.pose.joints) and uncropped.frame_hw == (300, 400)


def test_another_parser_makes_the_map(finds):
    def parser(image):
        return np.full(image.shape[:2], 2, np.uint8), "lip20"

    found = resolve(Request(photo(), standing_joints(40, 30), AUTO, frame_hw=(40, 30)), SIZE, head=False,
                    options=PhotoOptions(parser=parser, crop=False)).request  # fmt: skip
    assert not finds and found.labels == "lip20" and (found.parsing == 2).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parsing": "none"}, "parsing is 'none'"),
        ({"source": np.zeros((4, 4), np.uint8)}, "a photo is uint8"),
        ({"joints": np.zeros((5, 5, 4), np.uint8)}, "the pose photo: a photo is uint8"),
        ({"joints": np.zeros((18, 3))}, "no joint is visible"),
        ({"joints": np.zeros((17, 3))}, "got [17, 3]"),
        ({"source_joints": np.full((18, 3), np.nan)}, "its own pose: a pose is [18 3]"),
        ({"parsing": np.zeros((3, 3), np.uint8)}, "the map is 3x3 but its photo is 300x400"),
        ({"edit": Edit(photo(), np.ones((300, 400), bool))}, "means nothing to an edit"),
    ],
)
def test_what_cannot_be(finds, change, words):
    request = dataclasses.replace(Request(photo(), standing_joints(40, 30), AUTO, frame_hw=(40, 30)), **change)
    with pytest.raises(InputError) as caught:
        resolve(request, SIZE, head=True, options=PhotoOptions(crop=True))
    assert words in str(caught.value) and "\n" not in str(caught.value)
