"""Readers of published datasets: DeepFashion, Market-1501, WPose, Clothing Co-Parsing; their lists, names and counts."""

import pickle

import numpy as np
import pytest
import scipy.io
from PIL import Image

from input_pipeline.annotations.keypoints import annotation_pose, read_annotations
from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import InputError
from input_pipeline.sources.ccp import LABELS, LOST, TO_ATR, label_table, read_ccp
from input_pipeline.sources.deepfashion import EXPECTED_PAIRS, read_deepfashion
from input_pipeline.sources.listing import MissingFiles, checklist, derived_pairs, read_names, read_poses
from input_pipeline.sources.market1501 import EXPECTED_PAIRS as MARKET_PAIRS
from input_pipeline.sources.market1501 import person_of, read_market1501
from input_pipeline.sources.wpose import connected, read_wpose, wpose_pairs
from tests.records import built
from tests.shared_data import openpose_json, shared_data, standing_joints
from truepose_jax import prepare

# One garment in five pictures, each in another spelling: of files, of the annotations, of the pairs, of the lists.
CANONICAL = [f"WOMEN/Blouses_Shirts/id_00003372/03_{view}" for view in ("1_front", "2_side", "3_back", "4_full")]
SPELLINGS = [
    "fashionWOMENBlouses_Shirtsid00003372{}",
    "fasionWOMENBlousesShirtsid00003372{}",
    "fashion/WOMEN/Blouses_Shirts/id_00003372/{}",
    "WOMEN/Blouses_Shirts/id_00003372/{}",
    "fashion\\WOMEN\\Blouses_Shirts\\id_00003372{}",
]


def spelt(index: int, way: int) -> str:
    """Name of picture `index` in spelling `way`, with its suffix."""
    view = CANONICAL[index].rpartition("/")[2] + ".jpg"
    flat = view[:3].replace("_", "") + view[3:]
    return SPELLINGS[way % 5].format(flat if way % 5 in (0, 1) else view)


def row(name: str, x: int, missing=()) -> str:
    """An annotation row: joint j at (x + j, 10 j + 20), y first; `missing` joints are -1."""
    ys = [-1 if j in missing else 20 + 10 * j for j in range(18)]
    xs = [-1 if j in missing else x + j for j in range(18)]
    return f"{name}:{ys}:{xs}"


def write_deepfashion(root, *, files=2, rows=0, pairs=None, names=4):
    """Four photos of one person; `files`, `rows`, `pairs`, `names` choose the spellings."""
    for i in range(4):
        path = root / "img_highres" / spelt(i, files + i if files < 2 else files).replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (75, 110), (40 * i, 80, 90)).save(path)
    table = [row(spelt(i, rows + i), 80, missing=(0, 14) if i else (2,)) for i in range(4)]
    (root / "fasion-resize-annotation-train.csv").write_text(
        "\r\n".join(["name:keypoints_y:keypoints_x,,,,", *table, ",,,,"]) + "\r\n"
    )
    (root / "train.lst").write_text("\n".join(spelt(i, names) for i in range(4)) + "\n")
    if pairs is not None:
        lines = [f"{spelt(a, pairs)},{spelt(b, pairs + 1)}" for a, b in ((0, 1), (2, 3), (3, 2))]
        (root / "fasion-resize-pairs-train.csv").write_text("from,to\n" + "\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("way", range(5))
def test_five_spellings_of_files_rows_pairs_and_lists(tmp_path, way):
    write_deepfashion(tmp_path, files=way % 4, rows=way, pairs=way, names=way)
    raw, _ = read_deepfashion(tmp_path, labels="whole")
    split = raw.splits["train"]
    assert [item.name for item in split.items] == CANONICAL and not raw.dropped
    assert split.pairs.tolist() == [[0, 1], [2, 3], [3, 2]]
    assert {item.identity for item in split.items} == {"WOMEN/Blouses_Shirts/id_00003372/03"}
    picture, padded = split.items[1].load(), way == 0  # pose-gan spells the row of picture 1: its frame is padded
    np.testing.assert_allclose(picture.joints[5], [(80 + 5 - 40 * padded) * 75 / 176, 70 * 110 / 256, 1], rtol=1e-6)
    assert not picture.joints[[0, 14]].any() and picture.joints[:, 2].sum() == 16


def test_without_a_pair_list_the_pairs_are_derived_and_counted(tmp_path):
    raw, needed = read_deepfashion(write_deepfashion(tmp_path), labels="whole")
    # The first picture lacks a shoulder (joint 2), so six ordered pairs of three are left.
    assert len(raw.splits["train"].pairs) == 6 and CANONICAL[0] not in [i.name for i in raw.splits["train"].items]
    assert "train: 6 pairs by the pair rule; 101,966 expected" in raw.problems
    assert "train.lst names 4 images; 48,674 expected" in raw.problems
    assert any("test: no pose at all" in line for line in raw.problems)
    text = checklist(needed)
    assert "MISSING  test pairs: put it at" in text and "the pairs are derived" in text and "found    photos" in text


def test_what_is_missing_is_dropped_or_fatal(tmp_path, capsys):
    root = write_deepfashion(tmp_path / "raw", pairs=3)
    (root / "img_highres" / spelt(3, 2)).unlink()
    (root / "fasion-resize-annotation-train.csv").write_text(
        "name:keypoints_y:keypoints_x\n"
        + "\n".join([row(spelt(i, 0), 80) for i in (0, 1)])
        + f"\n{spelt(2, 0)}:[1]:[2]\n"
    )
    flags = ["build", "--dataset=deepfashion", f"--raw={root}", f"--out={tmp_path}/r", "--parsing=none", "--workers=1"]
    assert prepare.main(flags) == 2
    printed = capsys.readouterr()
    assert "NOT AS PUBLISHED  train: photo missing: 1 of 4 images" in printed.out
    assert "NOT AS PUBLISHED  train: pose unreadable: 1 of 4" in printed.out
    assert printed.err.count("\n") == 1 and "--allow-missing" in printed.err and not (tmp_path / "r").exists()
    assert prepare.main([*flags, "--allow-missing"]) == 0
    assert "train: 2 images of 1 identities, 1 pairs" in capsys.readouterr().out
    assert list(RecordImages(tmp_path / "r", "train").names) == CANONICAL[:2]
    assert prepare.main([*flags[:3], f"--out={tmp_path}/l", *flags[4:], "--limit=1"]) == 0


def test_maps_are_found_by_any_spelling(tmp_path):
    root = write_deepfashion(tmp_path, pairs=3)
    for i in range(3):
        path = root / "parsing" / spelt(i, i).replace("\\", "/").replace(".jpg", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((110, 75), 5 + i, np.uint8)).save(path)
    raw, _ = read_deepfashion(root, labels="lip20")
    assert [item.load().parsing[0, 0] for item in raw.splits["train"].items] == [5, 6, 7]
    assert [(drop.name, drop.reason) for drop in raw.dropped] == [(CANONICAL[3], "parsing map missing")]


def test_absent_files_say_what_to_request_from_whom(tmp_path, capsys):
    flags = ["build", f"--raw={tmp_path}", f"--out={tmp_path}/out", "--parsing=lip20"]
    words = {
        "deepfashion": ["img_highres/WOMEN", "Chinese University of Hong Kong", "train.lst", "run a human parser"],
        "market1501": ["bounding_box_train", "requested from its authors"],
        "wpose": ["get_wpose_data.py", "run a pose estimator"],
    }
    for dataset, expected in words.items():
        assert prepare.main([*flags, f"--dataset={dataset}"]) == 2
        printed = capsys.readouterr()
        assert all(word in printed.out for word in expected), printed.out
        assert printed.err.count("\n") == 1 and "what to request" in printed.err
    assert prepare.main(["build", "--dataset=ccp", *flags[1:3]]) == 2


# ------------------------------------------------------------------------------------------------- published lists


def test_the_deepfashion_samples(tmp_path):
    raw, _ = read_deepfashion(
        shared_data("deepfashion_samples"), labels="whole", lists=shared_data("deepfashion_lists", "patn")
    )
    assert "test: photo missing: 3,138 of 3,144 images" in " ".join(raw.problems)
    assert not any("expected" in line for line in raw.problems if line.startswith("test"))
    assert {name: len(split.pairs) for name, split in raw.splits.items()} == {"train": 12, "test": 6}
    images = RecordImages(built(tmp_path / "r", raw), "test")
    name = "WOMEN/Blouses_Shirts/id_00003372/03_3_back"
    record = images.image(images.names.index(name))
    assert record.image.shape == (1101, 750, 3) and record.identity == "WOMEN/Blouses_Shirts/id_00003372/03"
    csv = shared_data("deepfashion_lists", "patn", "fasion-resize-annotation-test.csv")
    pose = annotation_pose(read_annotations(csv), name, path=csv).joints
    np.testing.assert_allclose(record.joints[:, 0], pose[:, 0] * 750 / 176, rtol=1e-5)
    np.testing.assert_allclose(record.joints[:, 1], pose[:, 1] * 1101 / 256, rtol=1e-5)


def test_joints_left_of_the_frame_are_joints_and_people_without_a_pose_are_not():
    """-1 is missing and -2 is not: 19 rows of PATN's list have joints outside the frame, 619 none at all."""
    csv = shared_data("deepfashion_lists", "patn", "fasion-resize-annotation-test.csv")
    rows = read_annotations(csv)
    poses = [annotation_pose(rows, key, path=csv).joints for key in rows]
    xs = [joints[joints[:, 2] > 0, 0] for joints in poses]
    assert sum(len(x) == 0 for x in xs) == 619
    assert sum(bool(((x < 0) | (x >= 176)).any()) for x in xs) == 19
    assert min(x.min(initial=0) for x in xs) == -31 and max(x.max(initial=0) for x in xs) == 205


def test_train_list_and_market_pairs_are_those_published():
    assert len(set(read_names(shared_data("deepfashion_lists", "patn", "train.lst")))) == 48_674
    assert EXPECTED_PAIRS == {"train": 101_966, "test": 8_570}
    poses = read_poses(shared_data("market1501_lists", "market-annotation-train.csv"), None)
    assert len(derived_pairs(list(poses.rows), poses, person_of)) == MARKET_PAIRS["train"] == 263_632


# ------------------------------------------------------------------------------------------------- the others


def test_market1501(tmp_path):
    names = ["0002_c1s1_000451_03", "0002_c2s1_000801_01", "0007_c3s3_077419_03", "-1_c1s1_000401_03", "0000_c1s1_1_02"]
    (tmp_path / "bounding_box_train").mkdir()
    for name in names:
        Image.new("RGB", (64, 128)).save(tmp_path / "bounding_box_train" / f"{name}.jpg")
    rows = [row(f"{name}.jpg", 20) for name in names]
    (tmp_path / "market-annotation-train.csv").write_text("\n".join(["name:keypoints_y:keypoints_x", *rows]))
    raw, _ = read_market1501(tmp_path, labels="whole")
    (split,) = raw.splits.values()
    assert [item.name for item in split.items] == names[:2] and split.pairs.tolist() == [[0, 1], [1, 0]]
    assert {item.identity for item in split.items} == {"0002"}
    np.testing.assert_allclose(split.items[0].load().joints[3], [23, 50, 1])  # the frame is 128x64, the photo's own
    assert any("2 pairs; 263,632 expected" in line for line in raw.problems)
    assert person_of(names[3]) is person_of(names[4]) is person_of("anna") is None


@pytest.mark.parametrize("separator", ["\t", " ", ", "])
def test_wpose(tmp_path, separator):
    root = tmp_path / "wpose"
    for folder in ("images", "keypoints", "parsing"):
        (root / folder).mkdir(parents=True)
    for i in range(1, 6):
        Image.new("RGB", (30, 40)).save(root / "images" / f"{i}.png")
        Image.fromarray(np.full((40, 30), i, np.uint8)).save(root / "parsing" / f"{i}.png")
        (root / "keypoints" / f"{i}_keypoints.json").write_text(openpose_json(standing_joints(40, 30)))
    pairs = [("wpose/images/1.png", "2.png"), ("3.png", "2.png"), ("4.png", "5.png"), ("4.png", "6.png")]
    (root / "test_pairs.txt").write_text("\n".join(separator.join(pair) for pair in pairs) + "\n\n")
    (root / "test_data.pkl").write_bytes(b"cos\nabort\n(tR.")  # ends the process of whoever unpickles it
    raw, _ = read_wpose(tmp_path, labels="lip20")
    (split,) = raw.splits.values()
    assert [(item.name, item.identity) for item in split.items] == [
        (str(i), "1" if i < 4 else "4") for i in range(1, 6)
    ]
    assert split.pairs.tolist() == [[0, 1], [2, 1], [3, 4]] and [drop.name for drop in raw.dropped] == ["6"]
    assert "4 pairs; 2,304 expected" in raw.problems and "1 of 4 pairs name such an image" in raw.problems
    picture = pickle.loads(pickle.dumps(split.items[2])).load()
    assert (picture.parsing == 3).all() and picture.joints[:, 2].all()
    (root / "test_pairs.txt").write_text("1.png\n")
    with pytest.raises(InputError, match="line 1 names one image"):
        wpose_pairs(root / "test_pairs.txt")


def test_connected_people():
    assert connected([("b", "a"), ("c", "d"), ("d", "b"), ("x", "y")]) == dict.fromkeys("abcd", "a") | dict.fromkeys(
        "xy", "x"
    )


def write_ccp(root, names, labels):
    (root / "photos").mkdir(parents=True)
    (root / "annotations" / "pixel-level").mkdir(parents=True)
    cells = np.empty((1, len(names)), object)
    cells[0] = [np.array([name]) for name in names]
    scipy.io.savemat(root / "label_list.mat", {"label_list": cells})
    for name, ids in labels.items():
        Image.new("RGB", (8, 10)).save(root / "photos" / f"{name}.jpg")
        scipy.io.savemat(root / "annotations" / "pixel-level" / f"{name}.mat", {"groundtruth": ids})
    Image.new("RGB", (8, 10)).save(root / "photos" / "unlabelled.jpg")


def test_ccp_maps_its_classes_and_refuses_training(tmp_path, capsys):
    root = tmp_path / "raw"
    good = np.repeat(np.arange(5, dtype=np.uint8), 16).reshape(10, 8)
    write_ccp(root, ["null", "bag", "skin", "heels", "tights"], {"1": good, "2": good + 1, "3": good[:5], "4": good})
    (root / "annotations" / "pixel-level" / "4.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    assert prepare.main(["build", "--dataset=ccp", f"--raw={root}", f"--out={tmp_path}/r", "--workers=1"]) == 0
    printed = capsys.readouterr().out
    assert (
        LOST in printed and "3 images, parsing map unreadable" in printed and "1 images, parsing map missing" in printed
    )
    images = RecordImages(tmp_path / "r", "train")
    classes = [LABEL_SETS[LABELS].classes[i] for i in images.image(0).parsing[::2, 0]]
    assert classes == ["Background", "Bag", "Face", "Left-shoe", "Pants"]
    assert list(images.names) == ["1"] and len(images.pairs) == 0 and not images.joint_counts.any()
    assert prepare.main(["check", f"{tmp_path}/r"]) == 0
    assert "cannot be trained on" in capsys.readouterr().out
    write_ccp(tmp_path / "other", ["null", "rucksack"], {})
    with pytest.raises(InputError, match="classes that are not Clothing Co-Parsing's: rucksack"):
        read_ccp(tmp_path / "other")
    with pytest.raises(MissingFiles, match="not the whole"):
        read_ccp(tmp_path)


def test_all_59_classes_of_the_street_photos_have_a_place():
    table = label_table(shared_data("street_parsed", "label_list.mat"))
    assert len(table) == 59 == sum(len(names) for names in TO_ATR.values()) and table[0] == 0
    raw, _ = read_ccp(shared_data("street_parsed"))
    picture = raw.splits["train"].items[0].load()
    found = {LABEL_SETS["atr18"].classes[i] for i in np.unique(picture.parsing)}
    # 0007.mat: null, blouse, hair, purse, shoes, skin, skirt
    assert found == {"Background", "Upper-clothes", "Hair", "Bag", "Left-shoe", "Face", "Skirt"}
    assert not picture.joints.any()
