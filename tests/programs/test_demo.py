"""The demo's two ways: judging alone, and showing, training and judging; and what it refuses before long work."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from input_pipeline.schema import InputError
from tests.tiny_run import shared_run
from truepose_jax import demo, train
from truepose_jax.config import ConfigError
from truepose_jax.evaluate import judge
from truepose_jax.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("started_quickly")


def run(*given: str) -> int:
    with flagsaver.flagsaver():
        flags.FLAGS(["demo", *given])
        return demo.main(["demo"])


class Painter:
    """A model that paints the truth, a little too bright, from a person's own source, and grey from another's."""

    def __init__(self):
        self.own = {}

    def __call__(self, batch, keys):
        pairs = zip(batch["source"], batch["target"], strict=True)
        return np.stack([t + np.float32(0.02) if self._is_own(s, t) else 0 * t for s, t in pairs])

    def _is_own(self, source, target):
        return self.own.setdefault(target.tobytes(), source.tobytes()) == source.tobytes()


@pytest.fixture
def painted(monkeypatch):
    """Whatever model is loaded, its pictures are the Painter's."""
    monkeypatch.setattr(judge, "sampling", lambda pipe: Painter())
    monkeypatch.setattr(judge, "MEAN_OF", 2)
    for module in (judge, demo):
        monkeypatch.setattr(module, "PEOPLE", 6)


@pytest.mark.parametrize(
    "given, error, text",
    [
        (["--out=figures.json"], ConfigError, "--out means nothing without --judge"),
        (["--eval_seed=3"], ConfigError, "--eval_seed means nothing without --judge"),
        (["--judge=shipped", "--minutes=3"], ConfigError, "--minutes means nothing to --judge"),
        (["--judge=shipped", "--workdir=runs/a"], ConfigError, "--workdir means nothing to --judge"),
        (["--judge="], ConfigError, "--judge is empty"),
        (["--judge={tmp}"], CheckpointError, "holds no training run"),
        (["--judge={tmp}/nowhere"], CheckpointError, "holds no training run"),
        (["--judge=shipped", "--out={tmp}/no/figures.json"], InputError, "there is no folder"),
        (["--judge=shipped", "--out={tmp}"], InputError, "is a folder"),
        (["--judge=shipped", "--pictures={tmp}/file/a.png"], InputError, "there is no folder"),
        (["--judge=shipped", "--eval_seed=-1"], flags.IllegalFlagValueError, "eval_seed"),
        (["--judge=shipped", "--eval_seed=x"], flags.IllegalFlagValueError, "eval_seed"),
        (["--workdir={run}"], CheckpointError, "is of another configuration"),
        (["--minutes=0"], flags.IllegalFlagValueError, "minutes"),
    ],
)
def test_bad_input_is_refused_before_long_work(given, error, text, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "judge", None)
    monkeypatch.setattr(train, "train", None)
    if "--judge=shipped" in given:
        monkeypatch.setattr(demo.Pipeline, "load", None)
    (tmp_path / "file").touch()
    with pytest.raises(error, match=text) as raised:
        run(*(flag.format(tmp=tmp_path, run=shared_run()) for flag in given))
    assert "\n" not in str(raised.value)


def test_a_folder_where_nothing_can_be_written(monkeypatch):
    """/proc takes no file from anybody, root included."""
    monkeypatch.setattr(demo.Pipeline, "load", None)
    with pytest.raises(InputError, match="cannot be written"):
        run("--judge=shipped", "--out=/proc/figures.json")


def test_judging_alone(tmp_path, painted, capsys):
    """A run and its export give the same figures."""
    out, pictures = tmp_path / "figures.json", tmp_path / "all.png"
    assert run(f"--judge={shared_run()}", "--eval_seed=5", f"--out={out}", f"--pictures={pictures}") == 0
    found = json.loads(out.read_text())
    assert found.keys() == {"plain", "patterned"}
    common = {field.name for field in dataclasses.fields(judge.Verdict)} - {"pattern_retrieval"}
    common -= {"face_retrieval", "copied_face_retrieval"}  # faces are too small here
    assert found["plain"].keys() == common and found["patterned"].keys() == common | {"pattern_retrieval"}
    for figures in found.values():
        assert figures["psnr"].keys() == {judge.OURS, judge.COPIED, judge.WARPED, judge.MEAN}
        assert all(scores.keys() == {"whole", "face", "clothes", "person"} for scores in figures["psnr"].values())
        assert figures["swap_costs"].keys() == {"image_swapped", "tokens_swapped", "both_swapped"}
        assert figures["psnr"][judge.OURS]["person"] == pytest.approx(20 * np.log10(2 / 0.02), abs=0.1)
        assert figures["retrieval"] == 1 and figures["swap_costs"]["image_swapped"] > 20
    assert "patterned clothes, PSNR" in capsys.readouterr().out and Image.open(pictures).width > 500


def test_the_whole_demo(tmp_path, painted, monkeypatch, capsys):
    """With a shipped model of another size and a training that has been done; then one that misses its gates."""
    workdir = shutil.copytree(shared_run(), tmp_path / "demo")
    asked, judged, judging = [], {}, judge.judge
    monkeypatch.setattr(judge, "judge", lambda pipe: judged.update(judging(pipe)) or judged)
    monkeypatch.setattr(train, "train", lambda config, place, **more: asked.append((place, more)) or 0)
    monkeypatch.setattr(demo, "SHIPPED", shared_run())
    monkeypatch.setattr(demo, "check_same_config", lambda *_: None)  # nor is the run of the demo's size
    assert run(f"--workdir={workdir}", "--minutes=2.5") == 0
    assert asked == [(str(workdir), {"profile": False, "minutes": 2.5})]
    told = capsys.readouterr().out
    assert "shipped model's pictures" in told and "MISSED" not in told
    shipped, page = (np.asarray(Image.open(workdir / name)) for name in ("shipped.png", "demo.png"))
    cell = 24 * 8  # columns of 24, enlarged eight times to be 256 high
    assert page.shape[0] > len(demo.SHOWN) * demo.SHOWN_CELL and page.shape[1] - shipped.shape[1] in (
        cell + 4,
        2 * cell + 8,
    )
    assert json.loads((workdir / "demo.json").read_text()).keys() == {"plain", "patterned"}

    monkeypatch.setattr(demo, "SHIPPED", tmp_path / "gone")
    verdict = dataclasses.replace(judged["plain"].verdict, retrieval=0.5)
    worse = judged | {"plain": dataclasses.replace(judged["plain"], verdict=verdict)}
    monkeypatch.setattr(judge, "judge", lambda pipe: worse)
    monkeypatch.setattr(judge, "carrying", lambda pipe: None)
    assert run(f"--workdir={workdir}") == 1
    told = capsys.readouterr().out
    assert told.count("no pictures of the shipped model") == 1 and told.endswith(
        "plain clothes: retrieval 50%; at least 95%\n"
    )

    monkeypatch.setattr(train, "train", lambda *_, **__: train.STOPPED)
    assert run(f"--workdir={workdir}") == train.STOPPED
