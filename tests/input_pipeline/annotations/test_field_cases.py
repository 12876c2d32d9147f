"""Inputs as the field has them: what public reports tell of poses, names, maps and lists, each made small here."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.keypoints import MIN_SCORE, load_pose, name_key, read_annotations, split_spec
from input_pipeline.annotations.parsing import label_set, read_parsing
from input_pipeline.schema import InputError
from input_pipeline.sources.folder import FolderImages
from tests.shared_data import standing_joints, write_folder

HW = (256, 176)
BODY = standing_joints(*HW)


def openpose(*people, canvas=HW, **more) -> dict:
    people = [
        p if isinstance(p, dict) else {"pose_keypoints_2d": np.asarray(p, float).reshape(-1).tolist()} for p in people
    ]
    size = {"canvas_height": canvas[0], "canvas_width": canvas[1]} if canvas else {}
    return {"people": people} | size | more


def changed(joints=(), xy=None, score=None) -> np.ndarray:
    body = BODY.copy()
    if xy is not None:
        body[list(joints), :2] = xy
    if score is not None:
        body[list(joints), 2] = score
    return body


def without(*joints) -> np.ndarray:
    body = BODY.copy()
    body[list(joints)] = 0
    return body


def scaled(joints, scale, shift=0.0) -> np.ndarray:
    out = joints.copy()
    out[:, :2] = out[:, :2] / (HW[1], HW[0]) * scale + shift
    return out


LEGS = (9, 10, 12, 13)
GHOST = np.zeros((18, 3))
GHOST[[2, 5, 10]] = [(1, 1, 0.06), (170, 3, 0.05), (175, 255, 0.05)]
LOW = changed((10, 13), xy=[(88, 261), (90, 264)])  # two ankles below the picture
FACE_ONLY = np.concatenate([BODY[:2], np.zeros((16, 3))])
COCO = [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]
"""Where COCO's joints stand in OpenPose's order."""
TOLD = {  # kind of file -> (content, the joints it means)
    "fractions, two joints outside": (openpose(scaled(LOW, 1)), LOW),
    "from -1 to 1": (openpose(scaled(BODY, 2, -1)), BODY),
    "a ghost before the person": (openpose(GHOST, BODY), BODY),
    "a ghost of certain joints": (openpose(np.where(GHOST[:, 2:] > 0, [1, 1, 1], 0) * GHOST.clip(1e-9), BODY), BODY),
    "the larger of two whole people": (openpose(scaled(BODY, (40, 60), 5), BODY), BODY),
    "a head nearer than a body": (openpose(changed()[:, :] * [1, 1, 1], FACE_ONLY * [3, 9, 1]), BODY),
    "legs of low score": (openpose(changed(LEGS, xy=(20, 30), score=0.03)), without(*LEGS)),
    "-1 with a score": (openpose(changed((9, 10), xy=(-1, -1))), without(9, 10)),
    "0 with a score": (openpose(changed((9, 10), xy=(0, 0))), without(9, 10)),
    "a list of one": ([openpose(BODY)], BODY),
    "a person of hands alone": (openpose({"pose_keypoints_2d": None, "hand_left_keypoints_2d": [1, 2, 1]}, BODY), BODY),
    "a person of nothing": (openpose({}, {"pose_keypoints_2d": []}, BODY), BODY),
    "nobody": (openpose(), BODY * 0),
    "MMPose": (
        {"instance_info": [{"frame_id": 1, "instances": [
            {"keypoints": BODY[COCO, :2].tolist(), "keypoint_scores": [0.9] * 17, "bbox": [[0, 0, 1, 1]]}]}]},
        BODY,
    ),
    "a whole body of 133": ([{"image_id": 3, "keypoints": BODY[COCO].reshape(-1).tolist() + [9.0] * 348}], BODY),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOLD)
def test_poses_as_tools_write_them(tmp_path, kind):
    content, wanted = TOLD[kind]
    path = tmp_path / "pose.json"
    path.write_text(json.dumps(content))
    pose = load_pose(path, frame_hw=HW)
    wanted = wanted.copy()
    if "MMPose" in kind or "133" in kind:
        wanted[1] = (BODY[2] + BODY[5]) / 2  # COCO has no neck
    np.testing.assert_allclose(pose.joints, wanted, atol=2e-3)


def test_scores_count_from_a_tenth_for_every_format(tmp_path):
    """One threshold: OpenPose, COCO's results and text with a third column."""
    body = changed((3,), score=MIN_SCORE - 0.01)
    body[4, 2] = MIN_SCORE
    coco = body[COCO]
    files = {
        "openpose.json": json.dumps(openpose(body)),
        "coco.json": json.dumps([{"image_id": 1, "keypoints": coco.reshape(-1).tolist()}]),
        "three.txt": "".join(f"{x} {y} {score}\n" for x, y, score in body),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        seen = load_pose(tmp_path / name, frame_hw=HW).joints[:, 2]
        assert not seen[3] and seen[4], name


def test_fractions_say_so_and_need_a_frame(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(openpose(scaled(LOW, 1), canvas=None)))
    with pytest.raises(InputError, match="fractions of an image of unknown size; add --pose-frame"):
        load_pose(path)
    assert "fractions" in load_pose(path, frame_hw=HW).notes[0]
    path.write_text(json.dumps(openpose(scaled(BODY, 2, -1))))
    assert "keypoint_scale 4" in load_pose(path).notes[0]
    path.write_text(json.dumps(openpose(changed((4,), xy=(-150, 60)) * [1 / 176, 1 / 256, 1])))
    with pytest.raises(InputError, match="neither pixels nor clearly fractions"):
        load_pose(path)
    path.write_text(json.dumps(openpose(BODY, BODY)))
    assert load_pose(path).notes == ("shows several people; the largest is taken",)


def test_results_of_many_images_are_found_by_name_and_by_number(tmp_path):
    rows = [
        {"image_id": name, "keypoints": (BODY[COCO] + [i, 0, 0]).reshape(-1).tolist()} for i, name in enumerate("ab")
    ]
    numbers = [row | {"image_id": 139 + i} for i, row in enumerate(rows)]
    images = [
        {"id": 139, "file_name": "x/first.jpg"},
        {"id": 140, "file_name": "x/second.jpg", "height": 9, "width": 8},
    ]
    for content, first, second in (
        ([row | {"image_id": f"{row['image_id']}.jpg"} for row in rows], "a.jpg", "b"),
        (numbers, "000000000139.jpg", "140"),
        ({"images": images, "annotations": numbers}, "x/first.jpg", "x/second"),
    ):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"several images \(.*\); say which, as .*results.json#"):
            load_pose(path, frame_hw=HW)
        for member, shift in ((first, 0), (second, 1)):
            np.testing.assert_allclose(
                load_pose(f"{path}#{member}", frame_hw=HW).joints[0, 0], BODY[0, 0] + shift, atol=1e-3
            )
        with pytest.raises(InputError, match=r"has no image z\.jpg"):
            load_pose(f"{path}#z.jpg")
    assert load_pose(f"{path}#x/second.jpg").frame_hw == (9, 8)


@pytest.mark.parametrize("size", [1e308, -1, 0.5, "9", [9]])
def test_pictures_of_no_size_are_one_line(tmp_path, size):
    image = {"id": 1, "file_name": "a.jpg", "height": size, "width": 176}
    row = {"image_id": 1, "keypoints": BODY[COCO].reshape(-1).tolist()}
    for content in ({"images": [image], "annotations": [row]}, openpose(BODY, canvas=(size, 176))):
        (tmp_path / "p.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="neither OpenPose nor COCO") as caught:
            load_pose(tmp_path / "p.json")
        assert "\n" not in str(caught.value)


def test_text_in_pixels_of_its_photo_is_not_taken_for_deepfashions_frame(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{x * 4:.0f} {y * 4:.0f}\n" for x, y, _ in BODY))
    assert load_pose(path).frame_hw is None
    path.write_text("".join(f"{x + 40:.0f} {y:.0f}\n" for x, y, _ in BODY))
    assert load_pose(path).frame_hw == (256, 176)


NAMES = (
    "look.1.jpg", "look.1", "a/b.c.PNG", "0002_c1s1_000451_03.jpg.jpg", "x", "v1.5/p",
    "fashionWOMENDressesid0000553705_1front.jpg",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_key_of_a_key_is_that_key(name):
    assert name_key(name_key(name)) == name_key(name)
    assert name_key("look.1.jpg") == "look.1" != name_key("look.4.jpg")
    assert name_key("0002_c1s1_000451_03.jpg.jpg") == name_key("0002_c1s1_000451_03.jpg")


def dotted(tmp_path) -> FolderImages:
    names = [f"look.{i}" for i in (1, 2, 3, 4)]
    write_folder(tmp_path, names)
    for text in ("look.1,look.2\nlook.3,look.4\n", "look.1.jpg;look.2.jpg\nlook.3.jpg;look.4.jpg\n"):
        (tmp_path / "pairs.csv").write_text(f"from{',' if ',' in text else ';'}to\n{text}")
        yield FolderImages(tmp_path, labels="atr18", size=(64, 48), pairs=tmp_path / "pairs.csv")


def test_dotted_names_pair_the_right_photos(tmp_path):
    for images in dotted(tmp_path):
        assert images.pairs.tolist() == [[0, 1], [2, 3]]


def test_names_with_a_hash_are_files(tmp_path):
    write_folder(tmp_path, ["look#1", "look#2"])
    assert len(FolderImages(tmp_path, labels="atr18", size=(64, 48))) == 2
    path = tmp_path / "keypoints" / "look#1.json"
    assert split_spec(path) == (str(path), "") and split_spec(f"{path}#a#b") == (str(path), "a#b")
    assert split_spec("absent.csv#a#b") == ("absent.csv", "a#b")


def test_a_photo_of_nobody_does_not_end_the_folder(tmp_path, caplog):
    write_folder(tmp_path, ["a", "b", "c"])
    (tmp_path / "keypoints" / "b.json").write_text('{"people": []}')
    with caplog.at_level(logging.WARNING):
        images = FolderImages(tmp_path, labels="atr18", size=(64, 48))
    assert images.pairs.tolist() == [[0, 0], [2, 2]] and "1 of 3 photos have no visible joint" in caplog.text


def test_what_is_no_photo_by_its_suffix_is_named(tmp_path, caplog):
    write_folder(tmp_path, ["a", "b", "c", "d"])
    folder = tmp_path / "image"
    Image.open(folder / "b.png").convert("RGB").save(folder / "b.jfif", "JPEG")
    Image.open(folder / "d.png").save(folder / "d.tif")
    (folder / "c.png").rename(folder / "c.heic")
    for name in "bd":
        (folder / f"{name}.png").unlink()
    with caplog.at_level(logging.WARNING):
        images = FolderImages(tmp_path, labels="none", size=(64, 48))
    assert images.names == ["a", "b", "d"] and images.image(1).image.shape == (64, 48, 3)
    assert "1 files are left out" in caplog.text and "c.heic" in caplog.text


def test_two_rows_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"{name}:{list(range(18))}:{list(range(9, 27))}" for name in ("a.jpg", "a.jpg", "b.jpg")]
    path.write_text("\n".join(["name:keypoints_y:keypoints_x", *rows]))
    assert list(read_annotations(path)) == ["a", "b"]
    path.write_text("\n".join(["name:keypoints_y:keypoints_x", *rows, rows[0].replace("[0,", "[7,")]))
    with pytest.raises(InputError, match=r"a\.csv: lines 3 and 5 give a\.jpg different joints"):
        read_annotations(path)


def test_maps_of_other_kinds_say_what_helps(tmp_path):
    """255 as void, a picture in colours, and a map of the photo as it was before its EXIF tag turned it."""
    path = tmp_path / "map.png"
    ids = np.zeros((8, 6), np.uint8)
    for pixels, hw, words in (
        (ids + 255, (8, 6), "255 often means void: make it 0"),
        (np.zeros((8, 6, 3), np.uint8), (8, 6), "a picture of the map in colours"),
        (ids, (6, 8), "turn the map"),
        (ids, (9, 9), "make them one size"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(InputError, match=words):
            read_parsing(path, label_set("atr18"), hw)


