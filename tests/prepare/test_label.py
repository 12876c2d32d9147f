"""`prepare label`: real loading code on tiny checkpoints; what is there is kept; one line for what does not serve."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.keypoints import load_pose
from input_pipeline.annotations.parsing import LABEL_SETS, read_parsing
from input_pipeline.schema import InputError
from input_pipeline.sources.folder import FolderImages
from input_pipeline.sources.listing import maps_by_key
from truepose_jax import prepare
from truepose_jax.detection.parsing_model import ParsingModel, class_map
from truepose_jax.detection.pose_model import PoseModel, main_person
from truepose_jax.prepare import label

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests import torch_models  # noqa: E402

HW = ((40, 30), (52, 28), (40, 30))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch_models.tiny_segformer(root / "segformer")
    torch_models.tiny_segformer(root / "streets", ("road", "person", "car"))
    torch_models.tiny_vitpose(root / "vitpose")
    torch_models.tiny_vitpose(root / "hands", joints=21)
    torch_models.tiny_detector(root / "detector")
    torch_models.tiny_detector(root / "animals", ("cat", "dog"))
    return root


@pytest.fixture
def raw(tmp_path):
    random = np.random.default_rng(0)
    for i, hw in enumerate(HW):
        path = tmp_path / "raw" / "image" / "sub" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        low.resize(hw[::-1], Image.Resampling.BICUBIC).save(path)
    return tmp_path / "raw"


def photos_of(raw):
    return [np.asarray(Image.open(raw / "image" / "sub" / f"{i}.png")) for i in range(len(HW))]


def test_maps_are_the_models_largest_classes(models, raw):
    photos = photos_of(raw)
    found = ParsingModel(str(models / "segformer"), "lip20", "cpu")(photos)
    processor = transformers.SegformerImageProcessorPil.from_pretrained(models / "segformer")
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(models / "segformer").eval()
    with torch.no_grad():
        outputs = model(**processor(images=photos, return_tensors="pt"))
    reference = processor.post_process_semantic_segmentation(outputs, target_sizes=HW)
    shown = set()
    for ours, theirs in zip(found, reference, strict=True):
        assert ours.dtype == np.uint8
        names = np.array(torch_models.ATR_NAMES)[theirs.numpy()]
        shown |= set(names.reshape(-1).tolist())
        lost = (names == "Belt") | (names == "Bag")  # LIP has neither
        kept = np.array(LABEL_SETS["lip20"].classes)[ours]
        np.testing.assert_array_equal(kept[~lost], names[~lost])
    assert len(shown) > 3, "random weights must show several classes"


def test_names_are_mapped_and_what_is_lost_is_said():
    ours = class_map(torch_models.ATR_NAMES, None, model="m")
    assert ours.labels.name == "atr18" and ours.lost == () and ours.table.tolist() == list(range(18))
    lip = [name.upper().replace("-", "_") for name in LABEL_SETS["lip20"].classes]
    assert class_map(lip, None, model="m").labels.name == "lip20"
    narrow = class_map(lip, "atr18", model="m")
    assert {"COAT becomes Upper-clothes", "GLOVE becomes Background", "SOCKS becomes Background"} <= set(narrow.lost)
    assert narrow.table[lip.index("COAT")] == LABEL_SETS["atr18"].id_of("Upper-clothes")
    with pytest.raises(InputError, match="no Face or Head and no Upper-clothes or Torso"):
        class_map(("road", "person"), "atr18", model="m")


def test_poses_are_vitposes_in_openpose_order(models, raw):
    photos = photos_of(raw)[:2]
    model = PoseModel(str(models / "vitpose"), str(models / "detector"), "cpu", joint_score=0.0)
    found = [model([photo])[0] for photo in photos]
    processor = transformers.VitPoseImageProcessorPil.from_pretrained(models / "vitpose")
    network = transformers.VitPoseForPoseEstimation.from_pretrained(models / "vitpose").eval()
    order = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    for photo, joints in zip(photos, found, strict=True):
        ((x0, y0, x1, y1),) = model._boxes([photo])
        boxes = [[[x0, y0, x1 - x0, y1 - y0]]]
        with torch.no_grad():
            outputs = network(**processor(images=photo, boxes=boxes, return_tensors="pt"))
        (person,) = processor.post_process_pose_estimation(outputs, boxes=[[np.array(boxes[0][0])]])[0]
        coco = person["keypoints"].numpy()
        seen = person["scores"].numpy() >= 0
        for ours, theirs in enumerate(order):
            if theirs is not None:
                wanted = [*coco[theirs], 1] if seen[theirs] else [0, 0, 0]
                np.testing.assert_allclose(joints[ours], wanted, atol=1e-3)
        if seen[[5, 6]].all():
            np.testing.assert_allclose(joints[1, :2], coco[[5, 6]].mean(0), atol=1e-3)
    none = PoseModel(str(models / "vitpose"), str(models / "detector"), "cpu", joint_score=1e9)(photos)
    assert not np.any(none)


def test_the_main_person_is_large_and_central():
    small, left, middle = [40, 40, 50, 50], [0, 0, 45, 100], [28, 0, 72, 100]
    assert main_person(np.array([small, left, middle], float), (100, 100)).tolist() == middle
    assert main_person(np.zeros((0, 4)), (100, 100)) is None
    assert main_person(np.array([[120.0, 0, 140, 10]]), (100, 100)) is None


def test_label_writes_what_is_missing_and_build_reads_it(models, raw, capsys):
    Image.fromarray(np.zeros(HW[0], np.uint8)).save(raw / "own.png")
    (raw / "parsing" / "sub").mkdir(parents=True)
    (raw / "own.png").rename(raw / "parsing" / "sub" / "0.png")
    (raw / "pose").mkdir()
    command = ["label", f"--raw={raw}", f"--parsing={models}/segformer", f"--pose={models}/vitpose"]
    command += [f"--detector={models}/detector", "--score=0", "--batch-size=2"]
    assert prepare.main(command) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 photos have a map" in printed and "0 of 3 photos have a pose" in printed
    assert not (raw / "parsing/labels.txt").exists(), "of the map that was there nobody has said it"
    assert not read_parsing(raw / "parsing/sub/0.png", LABEL_SETS["atr18"], HW[0]).any(), "what is there is kept"
    pose = load_pose(raw / "pose/sub/1.json")
    assert pose.frame_hw == HW[1] and pose.joints[:, 2].any()
    content = json.loads((raw / "pose/sub/1.json").read_text())
    np.testing.assert_allclose(np.reshape(content["people"][0]["pose_keypoints_2d"], (18, 3)), pose.joints, atol=1e-3)
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*") if path.is_file()}
    assert prepare.main(["label", f"--raw={raw}", "--parsing=gone", "--pose=gone", "--detector=gone"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in raw.rglob("*") if path.is_file()}
    images = FolderImages(raw, labels="atr18", size=(32, 24), pairs="self")
    assert len(images) == 3 and images.image(1).parsing.any()


def test_the_label_set_of_made_maps_is_said_and_heeded(models, raw, capsys, refuses):
    """By `build`, by training from the folder, and by the next `label`; maps whose set nobody said stay unsaid."""
    command = ["label", f"--raw={raw}", f"--parsing={models}/segformer"]
    assert prepare.main([*command, "--labels=lip20"]) == 0
    assert (raw / "parsing/labels.txt").read_text() == "lip20\n"
    capsys.readouterr()
    for call in (
        [*command, "--labels=atr18"],
        ["build", "--dataset=folder", f"--raw={raw}", "--parsing=atr18", f"--out={raw}/o"],
    ):
        assert "not atr18" in refuses("its maps are lip20", prepare.main, *call)
    with pytest.raises(InputError, match="not cihp20"):
        maps_by_key(raw / "parsing", "cihp20")
    assert maps_by_key(raw / "parsing", "whole") is None and len(maps_by_key(raw / "parsing", "lip20")) == 3
    (raw / "parsing/sub/1.png").unlink()
    assert prepare.main(command) == 0, "goes on in the set that the folder says"
    assert "as lip20" in capsys.readouterr().out
    (raw / "parsing/labels.txt").write_text("lip21")
    assert prepare.main(command) == 2
    assert "labels.txt: names no label set" in capsys.readouterr().err


def test_nobody_found_is_written_and_said(models, raw, capsys):
    command = ["label", f"--raw={raw}", f"--pose={models}/vitpose", f"--detector={models}/detector", "--score=1"]
    assert prepare.main(command) == 0
    assert "nobody was found in 3 photos" in capsys.readouterr().out
    assert not load_pose(raw / "keypoints/sub/0.txt").joints.any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do"),
        (["--pose=x"], "belong together"),
        (["--parsing=x", "--score=0.5"], "--score means nothing to --parsing; it is for --pose"),
        (["--pose=x", "--detector=x", "--labels=atr18"], "--labels means nothing to --pose; it is for --parsing"),
        (["--parsing={raw}"], "not a checkpoint that AutoModelForSemanticSegmentation"),
        (["--parsing={models}/detector"], "not a checkpoint|lack"),
        (["--parsing={models}/streets"], "its 3 classes (road, person, car) give"),
        (["--pose={models}/vitpose", "--detector={models}/animals"], "no class 'person'"),
        (["--pose={models}/hands", "--detector={models}/detector"], "21 joints"),
        (["--parsing={models}/segformer", "--device=cuda:7"], "--device=cuda:7"),
        (["--parsing={models}/segformer", "--photos=nowhere"], "no folder of photos"),
    ],
)
def test_one_line_and_exit_code_2(models, raw, refuses, flags, words):
    error = refuses("", prepare.main, "label", f"--raw={raw}", *(f.format(models=models, raw=raw) for f in flags))
    assert any(part in error for part in words.split("|")), error
    assert not (raw / "parsing").exists() and not (raw / "keypoints").exists()


@pytest.mark.parametrize("flag", ["--parsing=gone", "--pose=gone --detector=gone"])
def test_a_folder_that_cannot_be_written_is_found_before_the_models(raw, refuses, monkeypatch, flag):
    for name in (*label.PARSING_FOLDERS, *label.POSE_FOLDERS):
        (raw / name).write_text("a file")
    refuses("cannot be written", prepare.main, "label", f"--raw={raw}", *flag.split())


def test_a_disk_that_fills_up_is_one_line(raw, monkeypatch):
    (raw / "full").write_text("a file")
    for write in (
        lambda: label.write_map(raw / "full", "a", np.zeros((4, 4), np.uint8)),
        lambda: label.write_pose(raw / "full", "a", np.zeros((18, 3)), (4, 4)),
        lambda: label.write_pose(raw / "full", "a", np.ones((18, 3)), (4, 4)),
    ):
        with pytest.raises(InputError, match="cannot be written"):
            write()


def test_without_the_extra_it_is_one_line(raw, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses("pip install -e '.[torch]' in the project's folder", prepare.main, "label", f"--raw={raw}", "--parsing=x")
