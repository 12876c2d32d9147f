"""Doubts of poses and maps: each kind on drawn people made wrong in that way, none on them as they are."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.plausibility import KINDS, SetOfDoubts, doubts, judge
from input_pipeline.synthetic.people import SyntheticPeople
from tests.shared_data import shared_data
from truepose_jax import prepare

HW = (256, 176)
ATR = label_set("atr18")


@pytest.fixture(scope="module")
def people():
    images = SyntheticPeople(seed=0, split="train", identities=3, poses_per_identity=2, size=HW)
    return [images.image(i) for i in range(len(images))]


def interpolated(parsing: np.ndarray) -> np.ndarray:
    small = Image.fromarray(parsing).resize((44, 64), Image.Resampling.NEAREST)
    return np.asarray(small.resize((176, 256), Image.Resampling.BILINEAR))


def moved(joints, scale=1.0, shift=(0, 0)):
    out = joints.copy()
    out[:, :2] = out[:, :2] * scale + shift
    return out


WRONG = {
    "outside": lambda r: (moved(r.joints, 4), r.parsing),
    "small": lambda r: (moved(r.joints, 0.05, (80, 120)), r.parsing),
    "astray": lambda r: (moved(r.joints, 0.3, (-10, 0)).clip(0.5), r.parsing),
    "empty": lambda r: (r.joints, r.parsing * 0),
    "rings": lambda r: (r.joints, interpolated(r.parsing)),
}


def test_drawn_people_are_not_doubted(people):
    for record in people:
        assert doubts(judge(record.joints, record.parsing, ATR, HW)) == []
        assert doubts(judge(record.joints, None, label_set("whole"), HW)) == []


@pytest.mark.parametrize("kind", WRONG)
def test_each_kind_is_seen(people, kind):
    for record in people:
        joints, parsing = WRONG[kind](record)
        assert KINDS[kind].text in doubts(judge(joints, parsing, ATR, HW))


def test_lip_and_cihp_are_told_apart_where_the_class_that_differs_is_seen(people):
    record = people[0]
    low, high = np.zeros(HW, np.uint8), np.zeros(HW, np.uint8)
    low[int(record.joints[2, 1]) : int(record.joints[9, 1]), 60:120] = 10  # shoulders to knees
    high[int(record.joints[1, 1]) : int(record.joints[1, 1]) + 12, 60:120] = 10  # below the neck
    for parsing, labels, wanted in ((low, "cihp20", "lip20"), (high, "lip20", "cihp20")):
        judged = judge(record.joints, parsing, label_set(labels), HW)
        assert judged[wanted] and not judge(record.joints, parsing, label_set(wanted), HW)[labels]


def test_what_only_many_can_tell_is_told_of_sets(people):
    swapped, other = SetOfDoubts(), SetOfDoubts()
    for record in people:
        judged = judge(record.joints, ATR.flipped[record.parsing], ATR, HW)
        swapped.add(record.name, judged)
        assert doubts(judged) == []
        other.add(record.name, judge(record.joints, (record.parsing + 3) % 18, ATR, HW))
    assert any("are sides swapped" in line for line in swapped.lines())
    assert any("no face lies under the nose" in line for line in other.lines())


def test_inspect_and_train_say_the_collected_interpolated_map(tmp_path, caplog, capsys):
    root = shared_data("field_cases", "m_bilinear")
    assert prepare.main(["inspect", f"--root={root}", "--labels=atr18", "--size=64x48", f"--out={tmp_path}/s.png"]) == 0
    assert "warning: 1 of 4 photos: thin rings" in capsys.readouterr().out
