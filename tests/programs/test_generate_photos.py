"""generate from two photos alone: one command, what it says and draws, what it refuses, and the same from Python."""

import socket
import sys

import numpy as np
import pytest
from PIL import Image

from input_pipeline.synthetic.people import SyntheticPeople
from tests.programs.test_generate_head import head_run
from truepose_jax import generate
from truepose_jax.inference.csv_requests import is_photo_file
from truepose_jax.inference.pipeline import Pipeline

pytest.importorskip("ai_edge_litert", reason="the [pose] extra is not installed")
pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(head_run())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """me.png: somebody small in a wide photo. other.png: somebody else; two.png: both; noise.png: nobody."""
    folder = tmp_path_factory.mktemp("photos")
    people = SyntheticPeople(seed=5, split="train", identities=6, poses_per_identity=1, size=(384, 288))
    me, other = people.image(3).image, people.image(5).image
    wide = np.full((480, 900, 3), 235, np.uint8)
    wide[60:444, 500:788] = me
    both = wide.copy()
    both[200:392, 60:204] = other[::2, ::2]
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    for name, picture in {"me": wide, "other": other, "two": both, "noise": noise}.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def alone(monkeypatch, pipe):
    """Without torch, without a network, and with the model at hand."""

    def refuse(*_):
        raise AssertionError("no connection is made")

    for name in ("torch", "transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)


def run(*flags) -> int:
    return generate.main([f"--workdir={head_run()}", *map(str, flags)])


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_one_command(photos, tmp_path, capsys, alone, pipe):
    two = f"--source={photos / 'me.png'}", f"--pose={photos / 'other.png'}"
    out, found = tmp_path / "out.png", tmp_path / "found.png"
    assert run(*two, f"--out={out}", f"--show-found={found}") == 0
    said = capsys.readouterr().out
    assert "me.png: 18 of 18 joints, front view" in said and "other.png: " in said
    picture, me = read(out), read(photos / "me.png")
    assert picture.shape[1] / picture.shape[0] == pytest.approx(900 / 480, rel=0.05), "at the photo's own aspect"
    assert np.abs(picture[:, :10].astype(int) - 235).max() <= 1, "the rest of the photo is there"
    assert read(found).std() > 20
    other = read(photos / "other.png")
    assert np.array_equal(pipe(me, pose=other, callback=lambda done, steps: None), picture)

    listed = tmp_path / "list.csv"
    listed.write_text(f"source,parsing,pose,out,source_pose\n{photos}/me.png,auto,{photos}/other.png,a.png,auto\n")
    assert run(f"--pairs={listed}", f"--out-dir={tmp_path / 'd'}", "--align-pose", "--batch-size=1") == 0
    assert read(tmp_path / "d" / "a.png").shape == picture.shape
    assert run(f"--pairs={listed}", f"--out-dir={tmp_path / 'd'}", "--batch-size=1") == 2
    assert "align_pose was True and is None" in capsys.readouterr().err


def test_what_is_refused_in_one_line_before_any_model(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "of_run", None)
    me, other = f"--source={photos / 'me.png'}", f"--pose={photos / 'other.png'}"
    out = f"--out={tmp_path / 'o.png'}"
    for flags, words in (
        ((f"--source={photos / 'noise.png'}", other, out), "noise.png: nobody found"),
        ((me, f"--pose={photos / 'noise.png'}", out), "noise.png: nobody found"),
        ((me, other, out, "--person=2"), "me.png: --person=2, but people found: 1"),
        ((f"--source={photos / 'two.png'}", other, out, "--person=0"), "--person=0, but people found: 1"),
        ((me, other, out, "--pose-frame=40x30"), "leave --pose-frame out"),
        ((me, other, out, "--labels=atr18"), "--parsing=auto knows its own"),
        ((me, f"--pose={photos / 'gone.png'}", out), "gone.png: cannot read the photo"),
        (("--pairs=l.csv", "--out-dir=d", "--person=2"), "--person is for one picture"),
        (("--records=r", "--out-dir=d", "--crop=none"), "--crop means nothing to --records"),
    ):
        assert run(*flags) == 2
        error = capsys.readouterr().err.replace("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n", "")
        assert words in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_which_poses_are_photos():
    photos = ("a.jpg", "b/c.d.PNG", "a.tif")
    others = ("a.json", "a.txt", "ann.csv#a/b/c.jpg", "coco.json#x.png", "a.csv#fashionWOMEN.jpg")
    assert all(map(is_photo_file, photos)) and not any(map(is_photo_file, others))


def test_without_the_extra(photos, tmp_path, capsys, monkeypatch):
    from truepose_jax.detection import blazepose

    blazepose.blazepose.cache_clear()
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    assert run(f"--source={photos / 'me.png'}", f"--pose={photos / 'other.png'}", f"--out={tmp_path / 'o.png'}") == 2
    assert "pip install -e '.[pose]'" in capsys.readouterr().err
