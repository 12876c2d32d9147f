"""Sets of joints: mirrors and bones; drawings: colours, blending and frames, against plain arithmetic."""

import cv2
import numpy as np
import pytest

from input_pipeline.annotations.keypoints import flip_joints
from input_pipeline.annotations.skeleton import draw_pose_into, draw_skeleton_uint8
from input_pipeline.schema import InputError
from input_pipeline.skeletons import DRAWINGS, JOINT_SETS

HW = (260, 210)


def pose(count: int, seed: int = 0, hw=HW) -> np.ndarray:
    xy = np.random.default_rng(seed).uniform(20, np.array(hw[::-1]) - 20, (count, 2))
    return np.concatenate([xy, np.ones((count, 1))], axis=1).astype(np.float32)


def drawn(joints: np.ndarray, drawing: str, hw=HW, joints_hw=HW) -> np.ndarray:
    return draw_pose_into(np.zeros((*hw, 3), np.uint8), joints, joints_hw=joints_hw, drawing=drawing)


@pytest.mark.parametrize("count", JOINT_SETS)
def test_the_mirror_is_its_own_inverse_and_keeps_the_bones(count):
    found = JOINT_SETS[count]
    np.testing.assert_array_equal(found.flipped[found.flipped], np.arange(count))
    bones = {frozenset(bone) for bone in found.bones}
    assert len(bones) == len(found.bones) and all(len(bone) == 2 for bone in bones)
    assert {frozenset(found.flipped[list(bone)].tolist()) for bone in bones} == bones
    joints = pose(count)
    np.testing.assert_allclose(flip_joints(flip_joints(joints, HW[1]), HW[1]), joints, atol=1e-4)


def test_whole_bodies_have_the_chains_of_the_data_set():
    """Each hand is a tree from the wrist with five tips, each ring of the face is closed, nothing joins the parts."""
    bones = np.array(JOINT_SETS[133].bones)
    degree = np.bincount(bones.ravel(), minlength=133)
    for hand in (91, 112):
        own = bones[((bones >= hand) & (bones < hand + 21)).all(1)]
        assert len(own) == 20 and degree[hand] == 5 and (degree[hand + 1 : hand + 21] == 1).sum() == 5
    for start, stop in ((36, 42), (42, 48), (48, 60), (60, 68)):
        assert (degree[23 + start : 23 + stop] == 2).all()
    part = np.searchsorted([17, 23, 91, 112, 133], bones, side="right")
    assert (part[:, 0] == part[:, 1]).all()


@pytest.mark.parametrize("drawing", ["pidm", "wholebody133"])
def test_blended_limbs_are_those_of_plain_arithmetic(drawing):
    how = DRAWINGS[drawing]
    hw, kind = how.frame, JOINT_SETS[how.joints]
    joints = pose(how.joints, hw=hw)
    joints[[3, 7]] = 0
    want = np.zeros((*hw, 3))
    y, x = np.mgrid[: hw[0], : hw[1]]
    for (px, py, seen), colour in zip(joints, kind.colours, strict=True):
        if seen:
            want[(x - int(px)) ** 2 + (y - int(py)) ** 2 <= how.disc**2] = colour[::-1]
    for (a, b), colour in zip(kind.bones, kind.colours, strict=False):
        if joints[a, 2] and joints[b, 2]:
            middle, along = (joints[a, :2] + joints[b, :2]) / 2, joints[b, :2] - joints[a, :2]
            angle = np.degrees(np.arctan2(*-along[::-1]))
            size = int(np.linalg.norm(along.astype(float)) / 2), 4
            outline = cv2.ellipse2Poly(tuple(middle.astype(int).tolist()), size, int(angle), 0, 360, 1)
            inside = cv2.fillConvexPoly(np.zeros(hw, np.uint8), outline, 1) > 0
            want[inside] = np.rint(0.4 * want[inside] + 0.6 * np.array(colour[::-1]))
    apart = np.abs(drawn(joints, drawing, hw, hw) - want).max(-1)
    # cv2's discs have other rims; rounding at a half
    assert (apart > 1).mean() < 0.02 and np.median(apart[want.any(-1)]) <= 1


def test_colours_and_frames():
    """A lone joint has its colour, in GFLA's kind red and blue exchanged; ControlNet's limbs are darker than their ends."""
    lone = np.zeros((18, 3), np.float32)
    lone[4] = (100, 120, 1)
    colour = list(JOINT_SETS[18].colours[4])
    assert drawn(lone, "cfld")[120, 100].tolist() == drawn(lone, "openpose")[120, 100].tolist() == colour
    assert drawn(lone, "pidm", (550, 375), HW)[int(120 * 550 / 260), int(100 * 375 / 210)].tolist() == colour[::-1]
    limb = lone.copy()
    limb[3] = (100, 60, 1)
    assert drawn(limb, "openpose")[90, 100].tolist() == [int(0.6 * c) for c in JOINT_SETS[18].colours[3]]
    small = drawn(pose(18), "pidm", (64, 48))
    large = cv2.resize(drawn(pose(18), "pidm", (550, 375)), (48, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(small, large)


def test_any_set_can_be_looked_at_and_others_are_refused():
    assert draw_skeleton_uint8(pose(133), joints_hw=HW, out_hw=HW).any()
    with pytest.raises(InputError, match="a pose of 17 joints; known are sets of 18, 133"):
        draw_skeleton_uint8(pose(17), joints_hw=HW, out_hw=HW)
