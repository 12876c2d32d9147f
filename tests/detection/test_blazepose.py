"""Joints, masks and maps of photos by what comes along: on scikit-image's portrait, drawn people, and real photos at hand."""

import json
import logging
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from input_pipeline.annotations.keypoints import load_pose
from input_pipeline.annotations.parsing import LABEL_SETS, read_parsing
from input_pipeline.annotations.photo import read_photo
from input_pipeline.schema import InputError
from input_pipeline.skeletons import OPENPOSE
from input_pipeline.synthetic.people import SyntheticPeople
from tests.shared_data import shared_data, standing_joints, write_folder
from truepose_jax import prepare
from truepose_jax.detection import blazepose as module
from truepose_jax.detection import embedded, heuristic_parsing
from truepose_jax.detection.blazepose import BlazePose, NobodyFound, blazepose
from truepose_jax.detection.embedded import find_person

pytest.importorskip("ai_edge_litert", reason="the [pose] extra is not installed")

ATR = LABEL_SETS["atr18"]
SEEN_BY_HAND = {
    0: (218, 131),
    2: (108, 222),
    5: (312, 248),
    14: (203, 104),
    15: (242, 110),
    16: (184, 106),
    17: (268, 122),
}
"""Joints of scikit-image's astronaut, clicked: nose, shoulders, eyes, ears."""


@pytest.fixture(scope="module")
def astronaut():
    skimage = pytest.importorskip("skimage")
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def people():
    return SyntheticPeople(seed=5, split="train", identities=6, poses_per_identity=1, size=(384, 288))


def test_the_portrait(astronaut):
    person = blazepose()(astronaut)
    assert person.score > module.DOUBTFUL and person.facing == "front" and person.people == 1
    joints = person.joints()
    for joint, xy in SEEN_BY_HAND.items():
        assert np.hypot(*(joints[joint, :2] - xy)) < 16 and joints[joint, 2] == 1, joint
    np.testing.assert_allclose(joints[1, :2], joints[[2, 5], :2].mean(0), atol=0.01)
    assert not joints[8:14].any(), "hips, knees and ankles are not in the picture"
    assert person.mask[300, 200] > 0.9 and person.mask[60, 400] < 0.1 and person.mask.shape == (512, 512)

    found = find_person(astronaut)
    places = {"cheek": (195, 140), "hair": (215, 20), "suit": (170, 300), "flag": (30, 60), "shuttle": (420, 90)}
    names = {name: ATR.classes[found.parsing[y, x]] for name, (x, y) in places.items()}
    assert names == {
        "cheek": "Face", "hair": "Hair", "suit": "Upper-clothes", "flag": "Background", "shuttle": "Background",
    }  # fmt: skip


def test_a_mirrored_photo_gives_the_mirrored_pose(astronaut, people):
    for photo in (astronaut, *(people.image(i).image for i in (0, 2, 4))):
        one, other = blazepose()(photo), blazepose()(np.ascontiguousarray(photo[:, ::-1]))
        back = other.joints()[OPENPOSE.flipped]
        seen = (one.joints()[:, 2] > 0) & (back[:, 2] > 0)
        assert one.facing == other.facing and seen.sum() >= 7
        moved = np.abs(photo.shape[1] - 1 - back[seen, 0] - one.joints()[seen, 0])
        assert np.median(moved) < 0.01 * photo.shape[0]


def test_drawn_people(people):
    """Their joints, outline and view are known; people with their backs to the viewer show neither nose nor eyes."""
    for i, facing in ((0, "back"), (2, "front"), (3, "front"), (4, "back"), (5, "front")):
        record = people.image(i)
        person, true = blazepose()(record.image), record.joints[:, 2] > 0
        apart = np.hypot(*(person.points - record.joints[:, :2])[true].T) / np.ptp(record.joints[true, 1])
        assert apart.max() < 0.05 and person.facing == facing
        assert person.joints()[[0, 14, 15], 2].any() == (facing == "front")
        inside, truth = person.mask > 0.5, record.parsing > 0
        assert (inside & truth).sum() / (inside | truth).sum() > 0.94
    found, truth = find_person(people.image(3).image).parsing, people.image(3).parsing
    assert (found == truth)[truth > 0].mean() > 0.93


def stick_figure(width: int) -> np.ndarray:
    """Lines between joints and a circle."""
    joints = standing_joints(512, 352)[:, :2]
    picture = Image.new("RGB", (352, 512), "white")
    draw = ImageDraw.Draw(picture)
    for a, b in OPENPOSE.bones[:13]:
        draw.line([tuple(joints[a]), tuple(joints[b])], fill="black", width=width)
    draw.circle(tuple(joints[0]), 32, outline="black", width=width)
    return np.asarray(picture)


def cartoon() -> np.ndarray:
    """A large head with round eyes on a box."""
    picture = Image.new("RGB", (352, 512), (150, 210, 240))
    draw = ImageDraw.Draw(picture)
    draw.circle((176, 120), 80, fill=(255, 220, 180), outline="black", width=4)
    for x in (141, 211):
        draw.circle((x, 118), 18, fill="white", outline="black", width=3)
        draw.circle((x, 118), 6, fill="black")
        draw.line([(x, 240), (3 * x - 352, 310)], fill=(255, 220, 180), width=22)
        draw.line([(x, 350), (x, 460)], fill="black", width=26)
    draw.arc([136, 120, 216, 180], 20, 160, fill="black", width=4)
    draw.rectangle([121, 200, 231, 360], fill=(255, 210, 0), outline="black", width=4)
    return np.asarray(picture)


NOISE = np.random.default_rng(0).integers(0, 256, (200, 150, 3), dtype=np.uint8)
NOBODY = {
    "noise": lambda: NOISE,
    "white": lambda: np.full_like(NOISE, 255),
    "grey": lambda: np.full_like(NOISE, 90),
    "thin stick figure": lambda: stick_figure(2),
    "stick figure": lambda: stick_figure(6),
    "thick stick figure": lambda: stick_figure(12),
    "cartoon": cartoon,
}


@pytest.mark.parametrize("what", NOBODY)
def test_what_is_no_person(what):
    picture = NOBODY[what]()
    with pytest.raises(NobodyFound, match=r"x\.jpg: (nobody found|shows no person)") as caught:
        find_person(picture, name="x.jpg")
    assert "\n" not in str(caught.value)


def test_the_largest_of_several_is_taken_and_said(people, caplog):
    large, small = people.image(2).image, people.image(5).image[::2, ::2]
    both = np.full((384, 480, 3), 235, np.uint8)
    both[:, :288], both[150:342, 320:464] = large, small
    with caplog.at_level(logging.WARNING):
        first, second = (find_person(both, person=n, name="two.jpg").joints for n in (1, 2))
    assert first[first[:, 2] > 0, 0].max() < 300 < second[second[:, 2] > 0, 0].min()
    assert "two.jpg: 2 people; number 1 by size is taken (--person=N)" in caplog.text
    with pytest.raises(NobodyFound, match="--person=3, but people found: 2"):
        find_person(both, person=3, name="two.jpg")


def test_a_doubtful_pose_is_said(astronaut, caplog, monkeypatch):
    monkeypatch.setattr(embedded, "DOUBTFUL", 0.999)
    with caplog.at_level(logging.WARNING):
        find_person(astronaut, name="me.jpg")
    assert "me.jpg: not sure of the pose (score 0.9" in caplog.text and "left and right" in caplog.text


def test_files_are_checked(tmp_path, monkeypatch):
    assert {p.name for p in module.WEIGHTS.iterdir()} == {*module.SHA256, "LICENSE", "NOTICE"}
    for digest in module.SHA256.values():
        assert digest in (module.WEIGHTS / "NOTICE").read_text()
    folder = shutil.copytree(module.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(module, "WEIGHTS", folder)
    (folder / module.LANDMARKS).write_bytes((folder / module.LANDMARKS).read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="sha256"):
        BlazePose()
    (folder / module.DETECTOR).unlink()
    with pytest.raises(InputError, match="install the package again"):
        BlazePose()


def test_maps_without_a_face_or_legs():
    """A mask alone, and joints without one another, still give a map of the mask's outline."""
    photo = np.random.default_rng(0).integers(0, 256, (700, 300, 3), dtype=np.uint8)
    mask = np.zeros((700, 300), bool)
    mask[100:600, 100:200] = True
    joints = np.zeros((18, 3), np.float32)
    for shown in ((), (1,), (2, 5), (2, 5, 8, 9, 10), (0, 1, 14)):
        joints[list(shown), 2] = 1
        joints[:, :2] = np.stack([np.full(18, 150), np.linspace(110, 590, 18)], axis=1)
        joints[5, 0] = 180
        found = heuristic_parsing.parse_person(photo, joints, mask)
        assert np.array_equal(found > 0, mask), shown
        joints[:] = 0
    assert not heuristic_parsing.parse_person(photo, joints, ~mask & False).any()


def test_prepare_label_with_what_comes_along(people, tmp_path, capsys):
    """Maps and poses as files that the folder's readers take; nobody on noise; label sets and flags that do not fit."""
    raw = write_folder(tmp_path / "raw", ["noise"], parsing=False)
    (raw / "keypoints" / "noise.json").unlink()
    record = people.image(5)
    Image.fromarray(record.image).save(raw / "image" / "a.png")
    assert prepare.main(["label", f"--raw={raw}", "--parsing=embedded", "--pose=embedded"]) == 0
    said = capsys.readouterr().out
    assert "nobody was found in 1 photos, such as noise" in said and "as atr18" in said
    pose = load_pose(raw / "keypoints" / "a.json")
    true = record.joints[:, 2] > 0
    assert pose.frame_hw == (384, 288)
    assert np.hypot(*(pose.joints - record.joints)[true, :2].T).max() < 0.05 * 384
    assert (raw / "parsing" / "labels.txt").read_text() == "atr18\n"
    found = read_parsing(raw / "parsing" / "a.png", ATR, (384, 288))
    assert ((found > 0) == (record.parsing > 0)).mean() > 0.97
    assert not read_parsing(raw / "parsing" / "noise.png", ATR, (60, 40)).any()
    fresh = write_folder(tmp_path / "fresh", ["b"], parsing=False)
    for flags, words in (
        (["--pose=embedded", "--detector=X"], "--detector means nothing"),
        (["--parsing=embedded", "--labels=pascal7"], "its classes are not pascal7's"),
    ):
        assert prepare.main(["label", f"--raw={fresh}", *flags]) == 2
        assert words in capsys.readouterr().err


def test_real_photos_are_as_good_as_the_table_says():
    """benchmarks/results/photo_accuracy.json, on three of its photos and over all of them as committed."""
    committed = json.loads(
        (pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "photo_accuracy.json").read_text()
    )
    joints, mask = committed["Joints"], committed["Mask"]
    assert joints["studio"]["within 5 %"] >= 0.99 and joints["DeepFashion"]["within 5 %"] >= 0.88
    assert min(mask["studio"]["mean IoU"], mask["street"]["mean IoU"]) >= 0.95
    assert committed["Map, studio"]["auto"]["mean"] >= 0.68
    root = shared_data("zalora_parsed")
    for path in sorted((root / "image").glob("*.jpg"))[::6]:
        photo = read_photo(path)
        true = load_pose(root / "keypoints" / f"{path.stem}_keypoints.json", frame_hw=photo.shape[:2]).joints
        truth = read_parsing(root / "parsing" / f"{path.stem}.png", LABEL_SETS["cihp20"], photo.shape[:2]) > 0
        person, seen = blazepose()(photo), true[:, 2] > 0
        height = np.ptp(np.flatnonzero(truth.any(1)))
        assert np.hypot(*(person.points - true[:, :2])[seen].T).max() < 0.05 * height
        inside = person.mask > 0.5
        assert (inside & truth).sum() / (inside | truth).sum() > 0.93
