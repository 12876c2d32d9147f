"""RWTH-PHOENIX-2014T on a fabricated folder of its layout: records of 133 points, pairs, what trains on it, bad folders."""

import shutil

import numpy as np
import pytest
from PIL import Image

from configs import fpdm_phoenix
from input_pipeline.records.check import check_records
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import InputError
from input_pipeline.sources import phoenix
from tests import tiny_methods
from tests.tiny_run import make_run
from truepose_jax import generate, prepare
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.data.datasets import evaluation_set, training_batches, training_set

VIDEOS = {"train": {"v1": 4, "v2": 3, "v3": 1}, "test": {"t1": 3}}
"""Split -> {video: frames}."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("phoenix")
    random = np.random.default_rng(0)
    for split, videos in VIDEOS.items():
        for video, count in videos.items():
            folder = root / phoenix.FRAME_FOLDERS[0] / split / video
            folder.mkdir(parents=True)
            for frame in range(count):
                pixels = random.integers(0, 256, (26, 21, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
                Image.fromarray(pixels).save(folder / f"images{frame + 1:04d}.png")
            joints = random.uniform(5, 200, (count, 133, 3)).astype(np.float32)
            joints[..., 2] = 0.9
            joints[0, 10:20, 2] = phoenix.LEAST_SCORE / 2
            joints[0, 20, :2] = 0
            (root / "keypoints" / split).mkdir(parents=True, exist_ok=True)
            np.savez(root / "keypoints" / split / f"{video}.npz", keypoints=joints)
    joints = np.load(root / "keypoints" / "train" / "v2.npz")["keypoints"]
    np.savez(root / "keypoints" / "train" / "v2.npz", keypoints=joints[:2])  # its last frame has no pose
    return root


@pytest.fixture(scope="module")
def records(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "r"
    command = ["build", "--dataset=phoenix", f"--raw={raw}", f"--out={out}", "--workers=1", "--allow-missing"]
    assert prepare.main(command) == 0
    return out


def test_records_have_the_points_of_their_frames(raw, records):
    check_records(records)
    images = RecordImages(records, "train")
    assert (images.joints, images.labels) == (133, "whole")
    assert {*images.identities} == {"train/v1", "train/v2"}, "v3 has one frame alone"
    index = images.names.index("train/v1/images0001")
    found = images.image(index)
    wanted = np.load(raw / "keypoints" / "train" / "v1.npz")["keypoints"][0]
    seen = found.joints[:, 2] > 0
    assert np.flatnonzero(~seen).tolist() == [*range(10, 21)] and images.joint_counts[index] == 122
    np.testing.assert_array_equal(found.joints[seen, :2], wanted[seen, :2])
    assert not found.joints[~seen].any() and found.image.shape == (260, 210, 3)


def test_pairs(records):
    """All of two different frames of a video (three of the four videos' are few, so every one is drawn); of the test's videos
    the first frame into each."""
    images = RecordImages(records, "train")
    named = [(images.names[a], images.names[b]) for a, b in images.pairs]
    usable = [name for name in images.names if name != "train/v2/images0003"]
    assert sorted(named) == sorted(
        (a, b) for a in usable for b in usable if a != b and a.rpartition("/")[0] == b.rpartition("/")[0]
    )
    images = RecordImages(records, "test")
    frames = [f"test/t1/images{i:04d}" for i in (1, 2, 3)]
    assert [(images.names[a], images.names[b]) for a, b in images.pairs] == [(frames[0], frame) for frame in frames]


def settings(method: str, records, **model) -> Config:
    return tiny_methods.config(
        method,
        {
            "data": {"dataset": "records", "root": str(records), "labels": "", "threads": 1},
            "model": {"skeleton": "wholebody133", **model},
            "diffusion": {"steps": 1, "guidance": 1.0},
        },
    )


@pytest.mark.parametrize("method", ["ipf", "fpdm", "imagpose"])
def test_methods_without_class_switches_read_it(method, records):
    """Their batches hold the poses, drawn; what evaluation reads holds the 133 points."""
    config = settings(method, records)
    data = training_set(config, None, None)
    batch = next(training_batches(config, data))
    poses = batch["view_poses" if method == "imagpose" else "pose_small" if method == "ipf" else "target_pose"]
    assert batch["valid"].all() and all(pose.any() for pose in poses)
    assert len(evaluation_set(config, None, None).pairs) == 3


@pytest.mark.slow
def test_pictures_of_its_test_split(records, tmp_path):
    """`generate --records` with a run of the method: a picture for each frame."""
    run = make_run(tmp_path / "run", settings("fpdm", records))
    assert generate.main([f"--workdir={run}", f"--records={records}", f"--out-dir={tmp_path / 'out'}"]) == 0
    assert len([*(tmp_path / "out").rglob("*.png")]) == 3


def test_what_does_not_know_the_points_says_so(records):
    with pytest.raises(ConfigError, match=r"model\.skeleton is 'wholebody133' and model\.method 'truepose'"):
        settings("truepose", records)
    with pytest.raises(ConfigError, match=r"have 133 joints; config\.model\.skeleton 'cfld' has 18"):
        training_set(settings("fpdm", records, skeleton="cfld"), None, None)


@pytest.mark.parametrize("variant", fpdm_phoenix.VARIANTS)
def test_its_configurations_are_whole(variant):
    config = from_config_dict(Config, fpdm_phoenix.get_config(variant))
    assert config.model.skeleton == "wholebody133"


def broken(raw, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(raw, root)
    return root


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda root: shutil.rmtree(root / "keypoints"), "no poses; the list above says"),
        (lambda root: shutil.rmtree(root / "features" / "fullFrame-210x260px" / "test"), "no such folder"),
        (lambda root: (root / "keypoints" / "train" / "v1.npz").unlink(), "things are not as published"),
        (lambda root: [x.unlink() for x in root.glob("keypoints/train/*.npz")], "no video has two frames with poses"),
    ],
)
def test_bad_folders_are_one_line(break_it, words, raw, tmp_path, capsys):
    root = broken(raw, tmp_path)
    break_it(root)
    assert prepare.main(["build", "--dataset=phoenix", f"--raw={root}", f"--out={tmp_path / 'out'}"]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"poses": np.zeros((2, 133, 3))}, "has no array 'keypoints'"),
        ({"keypoints": np.zeros((2, 17, 3))}, r"is \[2, 17, 3\]"),
        ({"keypoints": np.full((2, 133, 3), np.nan)}, "expected finite"),
        ({"keypoints": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_bad_poses(arrays, words, tmp_path):
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(InputError, match=words):
        phoenix.read_wholebody(str(tmp_path / "v.npz"))
