"""Poses from every format: frames, the five spellings, errors. The skeleton against CFLD's picture."""

import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations import keypoints, skeleton
from input_pipeline.annotations.keypoints import canonical_name, flip_joints, load_pose
from input_pipeline.schema import InputError
from tests.shared_data import openpose_json, read_pose, shared_data, standing_joints

HW = (200, 100)
SPELLINGS = (
    "fashionWOMENBlouses_Shirtsid0000337203_3back.jpg",
    "fasionWOMENBlousesShirtsid0000337203_3back.jpg",
    "fashion/WOMEN/Blouses_Shirts/id_00003372/03_3_back.jpg",
    "WOMEN/Blouses_Shirts/id_00003372/03_3_back.jpg",
    "fashion\\WOMEN\\Blouses_Shirts\\id_0000337203_3_back.jpg",
)


def one_line_error(excinfo) -> str:
    text = str(excinfo.value)
    assert "\n" not in text and len(text) > 20
    return text


def test_openpose_18_and_body_25_agree(tmp_path):
    joints = standing_joints(*HW)
    joints[16] = 0
    (tmp_path / "a.json").write_text(openpose_json(joints))
    body25 = np.zeros((25, 3), np.float32)
    body25[keypoints.FROM_BODY_25] = joints
    body25[8] = 50, 100, 1  # the mid-hip, which OpenPose-18 lacks
    (tmp_path / "b.json").write_text(openpose_json(body25))
    a = read_pose(tmp_path / "a.json", frame_hw=HW, out_hw=HW)
    np.testing.assert_allclose(a, joints, rtol=1e-6)
    np.testing.assert_array_equal(a, read_pose(tmp_path / "b.json", frame_hw=HW, out_hw=HW))
    assert a.dtype == np.float32


def test_openpose_takes_the_largest_person_and_the_canvas(tmp_path):
    large = standing_joints(*HW)
    small = large * (0.2, 0.2, 1)
    people = [{"pose_keypoints_2d": p.reshape(-1).tolist()} for p in (small, large, np.zeros((18, 3)))]
    (tmp_path / "a.json").write_text(json.dumps({"people": people, "canvas_height": 200, "canvas_width": 100}))
    np.testing.assert_allclose(read_pose(tmp_path / "a.json", out_hw=HW), large, rtol=1e-6)
    fractions = large / (100, 200, 1)
    (tmp_path / "f.json").write_text(openpose_json(fractions))
    np.testing.assert_allclose(read_pose(tmp_path / "f.json", frame_hw=HW, out_hw=HW), large, rtol=1e-5)


def coco_of(joints: np.ndarray) -> list[float]:
    coco = np.zeros((17, 3))
    for openpose, index in enumerate(keypoints.FROM_COCO):
        if index >= 0:
            coco[index] = joints[openpose] * (1, 1, 2)
    return coco.reshape(-1).tolist()


def test_coco_17_makes_the_neck(tmp_path):
    joints = standing_joints(*HW)
    image = {"id": 7, "file_name": "x/p.jpg", "height": 200, "width": 100}
    rows = [{"image_id": 7, "keypoints": coco_of(joints)}]
    (tmp_path / "full.json").write_text(json.dumps({"images": [image], "annotations": rows}))
    (tmp_path / "results.json").write_text(json.dumps(rows))
    expected = joints.copy()
    expected[1, :2] = (joints[2, :2] + joints[5, :2]) / 2
    for spec in ("full.json", "full.json#x/p.jpg"):
        np.testing.assert_allclose(read_pose(f"{tmp_path}/{spec}", out_hw=HW), expected, rtol=1e-6)
    got = read_pose(tmp_path / "results.json", frame_hw=HW, out_hw=HW)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    joints[5] = 0  # a shoulder is missing: no neck
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 7, "keypoints": coco_of(joints)}]))
    assert not read_pose(tmp_path / "results.json", frame_hw=HW, out_hw=HW)[1].any()
    # COCO's order by name, not by our table: 1 is the left eye, 6 the right shoulder, 15 the left ankle.
    named = np.arange(51, dtype=float).reshape(17, 3) + 1
    (tmp_path / "n.json").write_text(json.dumps({"keypoints": named.reshape(-1).tolist()}))
    got = read_pose(tmp_path / "n.json", frame_hw=HW, out_hw=HW)
    for openpose, coco in (
        (0, 0),
        (15, 1),
        (14, 2),
        (17, 3),
        (16, 4),
        (5, 5),
        (2, 6),
        (7, 9),
        (8, 12),
        (13, 15),
    ):
        np.testing.assert_allclose(got[openpose, :2], named[coco, :2])


def test_text_is_in_the_padded_frame_unless_told(tmp_path):
    rows = ["125 37", "125,85"] + ["-1 -1"] * 15 + ["39 10"]  # the last lies one pixel outside the 176 columns
    (tmp_path / "p.txt").write_text("\r\n".join(rows))
    got = read_pose(tmp_path / "p.txt", out_hw=(512, 352))
    np.testing.assert_allclose(got[:3], [[170, 74, 1], [170, 170, 1], [0, 0, 0]])
    np.testing.assert_allclose(got[17], [-2, 20, 1])  # present though outside: only -1, -1 is missing
    told = read_pose(tmp_path / "p.txt", frame_hw=(256, 256), out_hw=(256, 256))
    np.testing.assert_allclose(told[0], [125, 37, 1])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_five_spellings(spelling, tmp_path):
    assert canonical_name(spelling) == "WOMEN/Blouses_Shirts/id_00003372/03_3_back.jpg"
    y = [10] + [-1] * 17
    x = [-3] + [-1] * 17
    for number, written in enumerate(SPELLINGS[::2]):
        file = tmp_path / f"{number}.csv"
        file.write_text(f"name:keypoints_y:keypoints_x,,,,\r\n,,,,\r\n\r\n{written}:{y}:{x}\r\n")
        pose = load_pose(f"{file}#{spelling}")
        np.testing.assert_array_equal(pose.joints[0], [-3, 10, 1])
        assert pose.frame_hw == (256, 176) and pose.joints[:, 2].sum() == 1


def test_other_names_stay():
    assert canonical_name("a\\b.jpg") == "a/b.jpg"
    assert canonical_name("./x y.png") == "x y.png"
    assert canonical_name("img/MEN/Tees_Tanks/id_00004047/01_1_front.jpg").startswith("MEN/Tees_Tanks/id_00004047/")


def test_dirty_csv_variants(tmp_path):
    y, x = list(range(10, 28)), list(range(30, 48))
    y[3] = x[3] = -1
    y[4] = x[4] = 0
    rows = {
        "clean.csv": f"name:keypoints_y:keypoints_x\nq.jpg:{y}:{x}\n",
        "spaces.csv": f"name:keypoints_y:keypoints_x\nq.jpg: {y}: {x}\n",
        "commas.csv": f"name:keypoints_y:keypoints_x,,,\nq.jpg:{y}:{x},,,\n,,,,\n",
        "crlf.csv": f"name:keypoints_y:keypoints_x\r\n\r\nq.jpg:{y}:{x}\r\n",
        "bom.csv": f"\ufeffname:keypoints_y:keypoints_x\nq.jpg:{y}:{x}\n",
        "quoted.csv": f'name:keypoints_y:keypoints_x\nq.jpg:"{y}":"{x}"\n',
    }
    for name, text in rows.items():
        (tmp_path / name).write_bytes(text.encode())
        joints = load_pose(f"{tmp_path}/{name}#q.jpg").joints
        np.testing.assert_array_equal(joints[0], [30, 10, 1], err_msg=name)
        assert joints[:, 2].sum() == 16 and not joints[3:5].any(), name


@pytest.mark.filterwarnings("error")
def test_bad_poses_say_so_in_one_line(tmp_path):
    joints = standing_joints(*HW)
    files = {
        "cut.json": openpose_json(joints)[:50],
        "list.json": "[1, 2]",
        "short.json": openpose_json(joints[:5]),
        "nan.json": openpose_json(joints).replace("1.0", "NaN", 1).replace("50.0", "NaN", 1),
        "far.json": openpose_json(joints).replace("50.0", "-1e308", 1),
        "far.txt": "1e39 2\n" * 18,
        "nan.txt": "nan 2\n" * 18,
        "farther.txt": "3e38 2\n" * 18,
        "far.csv": f"name:keypoints_y:keypoints_x\nq.jpg:{[1e308] * 18}:{[1] * 18}\n",
        "two.json": json.dumps([{"image_id": i, "keypoints": coco_of(joints)} for i in (1, 2)]),
        "short.txt": "1 2\n3 4\n",
        "words.txt": "a b\n" * 18,
        "header.csv": "from,to\na,b\n",
        "rows.csv": "name:keypoints_y:keypoints_x\nq.jpg:[1,2]:[3]\nr.jpg:oops\n",
        "pose.yaml": "x",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x89PNG")
    cases = {
        "absent.json": "cannot read the pose",
        "absent.csv#a": "cannot read the annotations",
        "cut.json": "not valid JSON",
        "list.json": "neither OpenPose nor COCO",
        "short.json": "expected 54",
        "nan.json": "no number of JSON",
        **dict.fromkeys(("far.json", "far.txt", "nan.txt", "farther.txt", "far.csv#q.jpg"), "nan or beyond 1000000 pixels"),
        "two.json": "several images",
        "short.txt": "18 rows",
        "words.txt": "18 rows",
        "header.csv#a": "name:keypoints_y:keypoints_x",
        "rows.csv#q.jpg": "broken",
        "rows.csv#r.jpg": "broken",
        "rows.csv#z.jpg": "no row",
        "rows.csv": "which image",
        "pose.yaml": "unknown pose format",
        "bytes.json": "no UTF-8 text",
    }
    for spec, words in cases.items():
        with pytest.raises(InputError) as excinfo:
            load_pose(f"{tmp_path}/{spec}", frame_hw=HW)
        assert words in one_line_error(excinfo), spec


def test_flip_joints_twice_is_the_identity():
    joints = standing_joints(*HW)
    joints[3] = 0
    flipped = flip_joints(joints, 100)
    np.testing.assert_allclose(flip_joints(flipped, 100), joints, rtol=1e-6)
    np.testing.assert_allclose(flipped[2], [99 - joints[5, 0], joints[5, 1], 1])
    assert not flipped[6].any() and flipped[3].any()


def test_skeleton_equals_cfld():
    oracle = np.asarray(Image.open(shared_data("skeleton_oracle", "target_skeleton.png")).convert("RGB"))
    annotations = shared_data("deepfashion_lists", "patn", "fasion-resize-annotation-test.csv")
    pose = load_pose(f"{annotations}#WOMEN/Sweaters/id_00006427/03_7_additional.jpg")
    drawn = skeleton.draw_skeleton_uint8(pose.joints, joints_hw=pose.frame_hw, out_hw=(256, 256))
    np.testing.assert_array_equal(drawn, oracle)


@pytest.mark.parametrize("hw", [(64, 48), (128, 64), (256, 176), (512, 352), (63, 47)])
def test_skeleton_shows_every_joint_and_missing_ones_vanish(hw):
    joints = standing_joints(*hw)
    drawn = skeleton.draw_skeleton_uint8(joints, joints_hw=hw, out_hw=hw)
    for joint in (4, 7, 10, 13):  # the ends of limbs
        x, y = joints[joint, :2].astype(int)
        assert drawn[y, x].max() > 120
    hidden = joints.copy()
    hidden[4] = 0
    without = skeleton.draw_skeleton_uint8(hidden, joints_hw=hw, out_hw=hw)
    x, y = joints[4, :2].astype(int)
    assert without[y, x].max() == 0
    assert not skeleton.draw_skeleton_uint8(joints * 0, joints_hw=hw, out_hw=hw).any()
    ink = (drawn.max(-1) > 0).mean()
    assert ink < 0.25, "limbs must stay apart"


def test_skeleton_reaches_in_from_outside_the_frame():
    joints = standing_joints(64, 48)
    joints[4, :2] = -1e6, 40
    drawn = skeleton.draw_skeleton_uint8(joints, joints_hw=(64, 48), out_hw=(64, 48))
    assert drawn[:, 0].any()
