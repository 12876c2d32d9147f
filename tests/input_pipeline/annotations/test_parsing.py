"""Label sets, the keypoint -> class table, maps from disk, region boxes and crops."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations import parsing, regions
from input_pipeline.annotations.keypoints import flip_joints
from input_pipeline.annotations.parsing import (
    LABEL_SETS,
    class_areas,
    class_on,
    convert_parsing,
    decode_parsing,
    flip_parsing,
    label_set,
    read_parsing,
    whole_photo,
)
from input_pipeline.annotations.run_lengths import encode_runs
from input_pipeline.schema import MAX_CLASSES, InputError
from input_pipeline.sources.folder import FolderImages
from tests.shared_data import shared_data, standing_joints

HW = (100, 60)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("Background", "Cape"), "label set toy: class Cape has no colour; add it to COLOUR_OF_CLASS"),
        (("Background", "Left-arm"), "label set toy: Left-arm has no Right-arm, with which flips exchange it"),
    ],
)
def test_what_a_new_label_set_lacks_is_named(monkeypatch, classes, words):
    with pytest.raises(ValueError, match=words):
        parsing._label_set("toy", classes)
    monkeypatch.setitem(parsing.COLOUR_OF_CLASS, "Cape", (1, 2, 3))
    with pytest.raises(ValueError, match=r"Cape on; add it to JOINTS_OF_CLASS|flips"):
        parsing._label_set("toy", classes)


# docs/paper.md 4, written out by hand for LIP, joint by joint.
LIP_TABLE = {
    "head": ({0, 14, 15}, "Face Sunglasses Hair Hat"),
    "ears": ({16, 17}, "Hair Hat"),
    "neck, shoulders": ({1, 2, 5}, "Upper-clothes Dress Coat Jumpsuits Scarf"),
    "right elbow, wrist": ({3, 4}, "Right-arm Glove Upper-clothes Coat"),
    "left elbow, wrist": ({6, 7}, "Left-arm Glove Upper-clothes Coat"),
    "hips": ({8, 11}, "Upper-clothes Dress Coat Jumpsuits Pants Skirt"),
    "right knee": ({9}, "Pants Skirt Dress Jumpsuits Right-leg"),
    "left knee": ({12}, "Pants Skirt Dress Jumpsuits Left-leg"),
    "right ankle": ({10}, "Right-leg Right-shoe Socks Pants"),
    "left ankle": ({13}, "Left-leg Left-shoe Socks Pants"),
}
# What ATR and CIHP add (and Jumpsuits, which they lack, falls away).
ADDED = {
    "atr18": {"Bag": {4, 7, 8, 11}, "Belt": {8, 11}},
    "cihp20": {"Torso-skin": {1, 2, 5}},
    "lip20": {},
}


def classes_of(mask: np.ndarray, labels) -> set[str]:
    return {labels.classes[i] for i in np.flatnonzero(mask)}


@pytest.mark.parametrize("name", ["lip20", "atr18", "cihp20"])
def test_every_joint_switches_on_its_row_of_the_table(name):
    labels = LABEL_SETS[name]
    everything = standing_joints(*HW)
    for joint in range(18):
        only = np.zeros_like(everything)
        only[joint] = everything[joint]
        expected = {c for joints, row in LIP_TABLE.values() if joint in joints for c in row.split()}
        expected |= {c for c, joints in ADDED[name].items() if joint in joints}
        assert classes_of(class_on(only, labels, hw=HW), labels) == expected & set(labels.classes), joint


def test_class_on_needs_joints_in_the_frame():
    labels = LABEL_SETS["lip20"]
    joints = np.zeros((18, 3), np.float32)
    assert not class_on(joints, labels, hw=HW).any()
    joints[0] = 60.0, 10, 1  # the first column outside
    assert not class_on(joints, labels, hw=HW).any()
    joints[0, 0] = 59.9
    assert "Face" in classes_of(class_on(joints, labels, hw=HW), labels)
    assert not class_on(standing_joints(*HW), labels, hw=HW)[0], "background is never on"


def test_label_sets():
    assert [len(LABEL_SETS[n]) for n in ("atr18", "lip20", "cihp20", "pascal7", "whole")] == [
        18,
        20,
        20,
        7,
        2,
    ]
    atr, lip, cihp = (LABEL_SETS[n] for n in ("atr18", "lip20", "cihp20"))
    assert [atr.id_of(c) for c in ("Left-shoe", "Right-arm", "Scarf", "Face")] == [9, 15, 17, 11]
    assert [lip.id_of(c) for c in ("Jumpsuits", "Left-arm", "Right-shoe", "Coat")] == [10, 14, 19, 7]
    assert cihp.classes[10] == "Torso-skin" and cihp.id_of("Jumpsuits") is None
    assert label_set("none") is LABEL_SETS["whole"]
    with pytest.raises(InputError, match="unknown label set 'lip'; choose one of atr18"):
        label_set("lip")
    for labels in LABEL_SETS.values():
        np.testing.assert_array_equal(labels.flipped[labels.flipped], np.arange(MAX_CLASSES))
        assert not labels.foreground[0] and labels.foreground.sum() == len(labels) - 1
        assert len(np.unique(labels.palette[: len(labels)], axis=0)) == len(labels)
    swapped = {lip.classes[i] for i in range(20) if lip.flipped[i] != i}
    assert swapped == {f"{s}-{p}" for s in ("Left", "Right") for p in ("arm", "leg", "shoe")}


def test_the_whole_photo_is_one_class():
    labels = label_set("none")
    joints = np.zeros((18, 3), np.float32)
    joints[16] = 5, 5, 1
    np.testing.assert_array_equal(np.flatnonzero(class_on(joints, labels, hw=HW)), [1])
    boxes, valid = regions.region_boxes(whole_photo(HW), labels)
    np.testing.assert_array_equal(np.flatnonzero(valid), [1, MAX_CLASSES])
    np.testing.assert_array_equal(boxes[[1, MAX_CLASSES]], [[0, 0, 60, 100]] * 2)


def test_read_parsing_takes_palette_indices(tmp_path):
    ids = np.arange(100 * 60).reshape(HW).astype(np.uint8) % 18
    Image.fromarray(ids).save(tmp_path / "l.png")
    paletted = Image.fromarray(ids, "P")
    paletted.putpalette(list(range(255, -1, -1)) * 3)
    paletted.save(tmp_path / "p.png", bits=8)
    (tmp_path / "runs").write_bytes(encode_runs(ids))
    labels = LABEL_SETS["atr18"]
    for name in ("l.png", "p.png", "runs"):
        np.testing.assert_array_equal(read_parsing(tmp_path / name, labels, HW), ids)
        swapped = decode_parsing((tmp_path / name).read_bytes(), labels, HW, name=name, swap=True)
        np.testing.assert_array_equal(swapped, flip_parsing(ids, labels)[:, ::-1])


def test_bad_maps_say_so_in_one_line(tmp_path):
    ids = np.zeros(HW, np.uint8)
    ids[:3, :3] = 19
    ids[9, 9] = 255
    Image.fromarray(ids).save(tmp_path / "range.png")
    Image.fromarray(np.stack([ids] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(ids).save(tmp_path / "grey.jpg")
    noise = np.random.default_rng(0).integers(0, 18, HW, dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    cases = {
        "range.png": "label 19, 255 is outside atr18's 0 to 17",
        "rgb.png": "mode RGB",
        "grey.jpg": "JPEG",
        "cut.png": "truncated",
        "text.png": "truncated",
        "absent.png": "cannot read the parsing map",
    }
    for name, words in cases.items():
        with pytest.raises(InputError) as excinfo:
            read_parsing(tmp_path / name, LABEL_SETS["atr18"], HW)
        assert words in str(excinfo.value) and "\n" not in str(excinfo.value), name
    Image.fromarray(noise[:50]).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="the map is 50x60 but its photo is 100x60"):
        read_parsing(tmp_path / "small.png", LABEL_SETS["atr18"], HW)


def test_schp_maps_in_palette_mode():
    root = shared_data("schp_demo")
    hw = np.asarray(Image.open(root / "demo.jpg")).shape[:2]
    seen = {"atr18": {0, 2, 4, 6, 10, 11, 15, 16}, "lip20": {0, 2, 5, 7, 13, 14, 15}}
    for name, ids in seen.items():
        parsing = read_parsing(root / f"demo_{name[:3]}.png", LABEL_SETS[name], hw)
        assert set(np.unique(parsing)) == ids
    read_parsing(root / "demo_pascal.png", LABEL_SETS["pascal7"], hw)


@pytest.mark.parametrize("mirrored", [False, True])
def test_joints_of_real_photos_lie_in_their_own_side(mirrored):
    """The same share of arm and leg joints lies in the label of its own side before and after a flip."""
    images = FolderImages(shared_data("zalora_parsed"), labels="cihp20", size=(256, 176))
    labels = LABEL_SETS["cihp20"]
    own = other = faces = 0
    for index in range(len(images)):
        record = images.image(index)
        joints, parsing = record.joints, record.parsing
        if mirrored:
            joints, parsing = flip_joints(joints, 176), flip_parsing(parsing, labels)
        at = {j: labels.classes[parsing[int(joints[j, 1]), int(joints[j, 0])]] for j in (0, 3, 4, 6, 7, 9, 10, 12, 13)}
        faces += at[0] == "Face"
        for joint, label in at.items():
            side = "Right" if joint in {3, 4, 9, 10} else "Left"
            own += label.startswith(side)
            other += label.startswith("Left" if side == "Right" else "Right") if joint else 0
    assert faces == 13 and other == 0 and own > 60


def test_maps_in_the_ids_of_another_set():
    """By name, else by what covers the same part of the body; nothing that is person becomes background."""

    def names(of, to):
        labels, wanted = LABEL_SETS[of], LABEL_SETS[to]
        found = convert_parsing(np.arange(len(labels), dtype=np.uint8)[None], labels, wanted, name="a")[0]
        assert found.dtype == np.uint8 and found[0] == 0 and found[1:].all()
        return {label: wanted.classes[i] for label, i in zip(labels.classes, found, strict=True)}

    others = {"Coat": "Upper-clothes", "Torso-skin": "Face", "Glove": "Upper-clothes", "Socks": "Pants"}
    assert {k: v for k, v in names("cihp20", "atr18").items() if k != v} == others
    assert {k: v for k, v in names("atr18", "lip20").items() if k != v} == {"Belt": "Pants", "Bag": "Upper-clothes"}
    assert {k: v for k, v in names("lip20", "cihp20").items() if k != v} == {"Jumpsuits": "Dress"}
    assert set(names("atr18", "whole").values()) == {"Background", "Person"}
    for of, to in (("pascal7", "atr18"), ("atr18", "pascal7")):
        with pytest.raises(
            InputError, match=f"photo: the map's labels are {of}, and the model's {to} have nothing for its H"
        ):
            convert_parsing(np.zeros((1, 1), np.uint8), LABEL_SETS[of], LABEL_SETS[to], name="photo")


def test_regions_of_a_simple_map():
    labels = LABEL_SETS["atr18"]
    parsing = np.zeros((200, 100), np.uint8)
    parsing[10:30, 40:60] = 11
    parsing[30:90, 20:80] = 4
    parsing[100:104, 0:4] = 9  # 16 of 20,000 pixels: 0.08 %
    parsing[110:115, 50:54] = 10  # 20 of 20,000: 0.1 %
    image = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    crops, valid, boxes = regions.region_crops(image, parsing, labels, out=32)
    np.testing.assert_array_equal(np.flatnonzero(valid), [4, 10, 11, 20])
    np.testing.assert_array_equal(
        boxes[[4, 10, 11, 20]], [[20, 30, 80, 90], [50, 110, 54, 115], [40, 10, 60, 30], [0, 0, 100, 200]]
    )
    assert crops.shape == (21, 32, 32, 3) and not crops[~valid].any() and not boxes[~valid].any()
    square = np.asarray(Image.fromarray(image[30:90, 20:80]).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crops[4], square)  # square boxes need no padding, and nothing in them is masked
    assert (crops[20][:, :6] == 255).all() and (crops[20][:, -6:] == 255).all()  # 200x100: a quarter white a side
    assert abs(class_areas(parsing)[4] - 0.18) < 1e-6 and abs(class_areas(parsing).sum() - 1) < 1e-6


def test_crops_match_the_clip_processor():
    """Our resize and normalisation are transformers' CLIP image processor's, on a square photo."""
    transformers = pytest.importorskip("transformers")
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil()
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = regions.clip_normalise(regions.square_crop(image, out=224))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
