"""Photos from disk, framing, folders as image sets, pairs, and what the errors say."""

import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations import photo
from input_pipeline.annotations.keypoints import annotation_pose, canonical_name, read_annotations
from input_pipeline.annotations.photo import Framing, decode_photo, fit_photo, read_photo
from input_pipeline.schema import InputError
from input_pipeline.sources.folder import FolderImages, identity_of, pairs_within, read_pairs
from tests.shared_data import openpose_json, shared_data, standing_joints, write_folder

SIZE = (64, 48)


def smooth(h: int, w: int) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, 255 - x * 255 // w], -1).astype(np.uint8)


def test_jpeg_equals_pillow_and_exif_is_applied(tmp_path):
    image = Image.fromarray(smooth(64, 40))
    image.save(tmp_path / "a.jpg", quality=90)
    np.testing.assert_array_equal(read_photo(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise by 90 degrees to show
    image.save(tmp_path / "turned.jpg", quality=90, exif=exif)
    turned = read_photo(tmp_path / "turned.jpg")
    assert turned.shape == (40, 64, 3)
    np.testing.assert_array_equal(turned, np.rot90(read_photo(tmp_path / "a.jpg"), k=-1))


@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_bad_photos_say_so_in_one_line(tmp_path, monkeypatch, decoder):
    if decoder == "pillow":
        monkeypatch.setattr(photo, "simplejpeg", None)
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "header.jpg").write_bytes(data[:100])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a photo")
    Image.fromarray(np.zeros((1, 8193), np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((3, 3), np.uint16)).save(tmp_path / "deep.png")
    cases = {
        "cut.jpg": "truncated",
        "header.jpg": "truncated",
        "empty.jpg": "it is empty",
        "text.jpg": "truncated",
        "wide.png": "at most 8192 a side",
        "deep.png": "16 or 32 bits",
        "absent.jpg": "cannot read the photo",
    }
    for name, words in cases.items():
        with pytest.raises(InputError) as excinfo:
            read_photo(tmp_path / name)
        assert words in str(excinfo.value) and "\n" not in str(excinfo.value), name
    with pytest.raises(InputError, match="upload: not a readable image"):
        decode_photo(b"GIF89a", name="upload")


def test_framing_stretches_under_two_percent_and_pads_above():
    assert not Framing.fit((1101, 750), (256, 176)).padded  # 0.9 %
    assert Framing.fit((1101, 750), (512, 352)).box == (0, 0, 352, 512)
    assert Framing.fit((512, 320), (256, 176)).box == (8, 0, 168, 256)
    assert Framing.fit((100, 400), (64, 48)).box == (0, 26, 48, 38)
    assert Framing.fit((256, 176), (256, 256)).box == (40, 0, 216, 256)  # DeepFashion's own padding


def test_fit_photo_moves_photo_map_and_joints_alike():
    h, w = 120, 60
    image = np.full((h, w, 3), 90, np.uint8)
    parsing = np.full((h, w), 3, np.uint8)
    joints = standing_joints(h, w)
    spots = [2, 4, 10, 13]
    for number, joint in enumerate(spots):
        x, y = joints[joint, :2].astype(int)
        parsing[y - 4 : y + 5, x - 4 : x + 5] = 5 + number
    fitted, map_, moved, framing = fit_photo(image, parsing, joints, (96, 96))
    assert fitted.shape == (96, 96, 3) and framing.box == (24, 0, 72, 96)
    assert (fitted[:, :24] == 255).all() and (map_[:, :24] == 0).all() and (map_[:, 24:72] > 0).all()
    for number, joint in enumerate(spots):
        x, y = moved[joint, :2].astype(int)
        assert map_[y, x] == 5 + number
    assert (framing.crop(fitted) == 90).all() and framing.crop(fitted).shape == (96, 48, 3)
    same, *_ = fit_photo(image, parsing, joints, (h, w))
    np.testing.assert_array_equal(same, image)


def test_resize_is_pillows_bicubic():
    image = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((50, 100), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(Framing.fit((200, 100), (100, 50)).image(image), expected)


@pytest.mark.parametrize("layout", ["VITON-HD", "DeepFashion-MultiModal"])
def test_layouts_of_other_tools_as_they_are(tmp_path, caplog, layout):
    """Photos, maps and poses under their names; what else lies there is nobody's."""
    plain = FolderImages(write_folder(tmp_path / "plain", ["a", "b"]), labels="cihp20", size=SIZE)
    root = write_folder(tmp_path / "data/train", ["a", "b"])
    if layout == "VITON-HD":
        for name, other in (("parsing", "image-parse-v3"), ("keypoints", "openpose_json")):
            (root / name).rename(root / other)
        for path in (root / "openpose_json").iterdir():
            path.rename(path.with_name(f"{path.stem}_keypoints.json"))
        for name in ("openpose_img", "image-densepose", "agnostic-v3.2", "cloth", "image-parse-agnostic-v3.2"):
            (root / name).mkdir()
            Image.fromarray(smooth(60, 40)).save(root / name / "a.png")
        with pytest.raises(InputError, match=r"data: has no folder image/ with photos; train/ has one: give .*/data/train$"):
            FolderImages(tmp_path / "data", labels="cihp20", size=SIZE)
    else:
        (root / "image").rename(root / "images")
        (root / "parsing").rename(root / "segm")
        for path in (root / "segm").iterdir():
            path.rename(path.with_name(f"{path.stem}_segm.png"))
    images = FolderImages(root, labels="cihp20", size=SIZE)
    assert "read as cihp20 maps, as labels says; VITON-HD's are cihp20" in caplog.text
    for i in range(2):
        for ours, theirs in zip(plain.original(i), images.original(i), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_folder_of_flat_files(tmp_path):
    root = write_folder(tmp_path, ["b", "a", "c"])
    images = FolderImages(root, labels="atr18", size=SIZE)
    assert images.names == ["a", "b", "c"] and len(images) == 3 and images.labels == "atr18"
    np.testing.assert_array_equal(images.pairs, [[0, 0], [1, 1], [2, 2]])
    record = images.image(1)
    assert record.image.shape == (*SIZE, 3) and record.image.dtype == np.uint8
    assert record.parsing.shape == SIZE and record.joints.shape == (18, 3) and record.name == "b"
    photo_, map_, joints = images.original(1)
    assert photo_.shape == (60, 40, 3) and map_.shape == (60, 40)
    np.testing.assert_allclose(joints, standing_joints(60, 40))


def test_identities_by_folder_and_listed_pairs(tmp_path):
    root = write_folder(tmp_path, ["ann/1", "ann/2", "ben/1", "ben/2", "ben/3"], parsing=False)
    images = FolderImages(root, labels="none", size=SIZE, pairs="identity")
    assert images.labels == "whole" and len(images.pairs) == 2 + 6
    names = [(images.names[a], images.names[b]) for a, b in images.pairs]
    assert all(a != b and a.split("/")[0] == b.split("/")[0] for a, b in names)
    listing = tmp_path / "pairs.csv"
    listing.write_bytes(b"from,to,,\r\nann\\1.jpg,ann/2.png,,\r\n,,,\r\n./ben/1,ann/1.jpg\r\n")
    listed = FolderImages(root, labels="none", size=SIZE, pairs=listing)
    assert [(images.names[a], images.names[b]) for a, b in listed.pairs] == [
        ("ann/1", "ann/2"),
        ("ben/1", "ann/1"),
    ]
    listing.write_text("id,source,target\n1,ann/1,../../etc/passwd\n")
    with pytest.raises(InputError, match=r"names 1 photos that .* does not hold: \.\./\.\./etc/passwd"):
        FolderImages(root, labels="none", size=SIZE, pairs=listing)


def test_a_photo_without_a_pose_is_nobodys_target(tmp_path):
    root = write_folder(tmp_path, ["p/1", "p/2", "p/3"], parsing=False)
    csv = tmp_path / "a.csv"
    missing, some = [-1] * 18, list(range(20, 38))
    rows = [f"p/1.jpg:{some}:{some}", f"p/2.jpg:{missing}:{missing}", f"p/3.jpg:{some}:{some}"]
    csv.write_text("\n".join(["name:keypoints_y:keypoints_x", *rows]))
    images = FolderImages(root, labels="none", size=SIZE, pairs="identity", keypoints=csv)
    np.testing.assert_array_equal(images.pairs, [[0, 2], [2, 0]])
    assert not images.image(1).joints.any()


def test_folder_errors_name_what_is_missing(tmp_path):
    root = write_folder(tmp_path / "r", ["a", "b", "c", "d", "e"])

    def error(**changes):
        with pytest.raises(InputError) as excinfo:
            FolderImages(**{"root": root, "labels": "atr18", "size": SIZE} | changes)
        assert "\n" not in str(excinfo.value)
        return str(excinfo.value)

    assert "no such folder" in error(root=tmp_path / "absent")
    assert "no folder image/" in error(root=tmp_path)
    assert "unknown label set" in error(labels="atr")
    assert "cannot read the list of pairs" in error(pairs=tmp_path / "absent.csv")
    assert "no pairs 'identity'" in error(pairs="identity")
    assert "no poses" in error(keypoints=tmp_path / "absent")
    (root / "parsing" / "b.png").unlink()
    assert "no parsing map (parsing/NAME.png) for 1 of 5 photos: b" in error()
    for name in "acde":
        (root / "keypoints" / f"{name}.json").unlink()
    assert "no pose (keypoints/NAME.json or .txt) for 4 of 5 photos: a, c, d and 1 more" in error(labels="none")
    (tmp_path / "a.csv").write_text("name:keypoints_y:keypoints_x\n")
    assert "no row (a.csv) for 5 of 5 photos" in error(labels="none", keypoints=tmp_path / "a.csv")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="first line must be from,to or source,target"):
        read_pairs(tmp_path / "bad.csv")
    (tmp_path / "half.csv").write_text("from,to\na\n")
    with pytest.raises(InputError, match="line 2 names no pair"):
        read_pairs(tmp_path / "half.csv")


def test_map_of_another_shape_or_set_fails_at_access(tmp_path):
    root = write_folder(tmp_path, ["a"], label_max=18)
    assert FolderImages(root, labels="atr18", size=SIZE).image(0)
    with pytest.raises(InputError, match="outside pascal7's 0 to 6"):
        FolderImages(root, labels="pascal7", size=SIZE).image(0)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "parsing" / "a.png")
    with pytest.raises(InputError, match="the map is 9x9 but its photo is 60x40"):
        FolderImages(root, labels="atr18", size=SIZE).image(0)


def test_pose_frame_overrides(tmp_path):
    root = write_folder(tmp_path, ["a"], hw=(60, 40), parsing=False)
    (root / "keypoints" / "a.json").write_text(openpose_json(standing_joints(600, 400)))
    images = FolderImages(root, labels="none", size=(60, 40), pose_frame=(600, 400))
    np.testing.assert_allclose(images.image(0).joints, standing_joints(60, 40), rtol=1e-5)


def test_identities_of_deepfashion():
    same = {identity_of(f"WOMEN/Dresses/id_00005537/05_{view}") for view in ("4_full", "1_front")}
    assert same == {"WOMEN/Dresses/id_00005537/05"}
    assert identity_of("fashionWOMENDressesid0000553705_4full") == "WOMEN/Dresses/id_00005537/05"
    assert identity_of("ann/1") == "ann" and identity_of("photo") == "photo"


@pytest.mark.parametrize(
    ("folder", "annotations", "pairs", "count"),
    [
        ("patn", "fasion-resize-annotation-test.csv", "fasion-resize-pairs-test.csv", 8570),
        ("pose_gan", "fasion-annotation-test.csv", "fasion-pairs-test.csv", 8670),
    ],
)
def test_the_pair_rule_gives_the_published_lists(folder, annotations, pairs, count):
    path = shared_data("deepfashion_lists", folder, annotations)
    rows = read_annotations(path)
    names = list(rows)
    poses = [annotation_pose(rows, name, path=path) for name in names]
    usable = np.array([pose.joints[[2, 5, 8, 11], 2].all() for pose in poses])
    found = pairs_within([identity_of(name) for name in names], usable)
    published = {tuple(map(canonical_name, pair)) for pair in read_pairs(path.parent / pairs)}
    assert len(found) == count
    assert {(f"{names[a]}.jpg", f"{names[b]}.jpg") for a, b in found} == published


def test_pose_gan_and_patn_frames_agree():
    """The same photos in both lists: pose-gan's padded 256x256 frame, unpadded, is PATN's 256x176."""
    paths = [
        shared_data("deepfashion_lists", "patn", "fasion-resize-annotation-test.csv"),
        shared_data("deepfashion_lists", "pose_gan", "fasion-annotation-test.csv"),
    ]
    patn, gan = (read_annotations(path) for path in paths)
    common = sorted(patn.keys() & gan.keys())
    assert len(common) > 100
    off = []
    for name in common:
        a, b = annotation_pose(patn, name, path=paths[0]), annotation_pose(gan, name, path=paths[1])
        both = (a.joints[:, 2] * b.joints[:, 2]) > 0
        assert a.frame_hw == b.frame_hw == (256, 176)
        off.extend(np.abs(a.joints[both, :2] - b.joints[both, :2]).max(-1))
    assert np.mean(np.array(off) <= 1) > 0.98


def test_real_folders():
    deepfashion = FolderImages(shared_data("deepfashion_samples"), labels="none", size=(256, 176), pairs="identity")
    assert len(deepfashion) == 10 and len(deepfashion.pairs) == 18
    record = deepfashion.image(deepfashion.names.index("MEN/Tees_Tanks/id_00004047/01_1_front"))
    np.testing.assert_allclose(record.joints[0], [85, 37, 1])  # 125 - 40 in the 176 columns of the crop
    zalora = FolderImages(shared_data("zalora_parsed"), labels="cihp20", size=(256, 176))
    assert len(zalora) == 13
    first = zalora.image(0)
    assert (first.image[:, :8] == 255).all() and (first.parsing[:, :8] == 0).all()
    with pytest.raises(InputError, match="outside atr18's 0 to 17"):
        FolderImages(shared_data("zalora_parsed"), labels="atr18", size=(256, 176)).image(0)
    source = json.loads((shared_data("deepfashion_samples") / "test_pairs_data.json").read_text())[0]["source_image"]
    assert canonical_name(source) == "WOMEN/Blouses_Shirts/id_00003372/03_3_back.jpg"
