"""The limb-wise warped source, where the right answer is known."""

import numpy as np
import pytest

from input_pipeline.annotations.parsing import label_set
from input_pipeline.synthetic.people import render
from input_pipeline.synthetic.poses import framed_pose
from truepose_jax.metrics.limb_warp import limb_warp
from truepose_jax.metrics.regions import mean_psnr

LABELS = label_set("atr18")
SIZE = (96, 72)


def picture(pose: int, identity: int = 3):
    """(image [-1, 1], parsing, joints) of one person before a plain studio."""
    found = render(
        seed=0, identity=identity, pose=framed_pose(pose, "close"), size=SIZE, patterns="solid", background="plain"
    )
    return found.image.astype(np.float32) / 127.5 - 1, found.parsing, found.joints


def warped(source, joints):
    return limb_warp(*source, joints, LABELS.joints)


def moved(joints, by):
    """Visible joints shifted by (x, y)."""
    return np.where(joints[:, 2:] > 0, joints + np.array([*by, 0], np.float32), joints)


@pytest.mark.parametrize("pose, hidden", [(0, 0), (8, 0), (46, 0.05)])
def test_the_same_pose_gives_the_same_person(pose, hidden):
    """To the bit; but from behind, arms are taken to be behind the back."""
    source = image, parsing, joints = picture(pose)
    found = warped(source, joints)
    person = parsing > 0
    assert (np.abs(found - image)[person].max(-1) > 1e-5).mean() <= hidden
    assert np.abs(found - image).max(-1)[~person].mean() < 0.05 and found.dtype == np.float32


def test_the_person_moves_with_the_joints():
    source = image, parsing, joints = picture(0)
    found = warped(source, moved(joints, (5, -3)))
    rows, columns = np.nonzero(parsing[3:-3, 5:-5])
    rows, columns = rows + 3, columns + 5
    assert len(rows) > 1000 and np.abs(found[rows - 3, columns + 5] - image[rows, columns]).max() < 1e-4
    left = (parsing > 0) & ~np.roll(parsing > 0, (-3, 5), (0, 1))
    assert left.sum() > 100 and np.abs(found - image)[left].mean() > 0.2, "where the person was is background now"


def test_a_forearm_turns_about_its_elbow():
    """A drawn person: each limb of one colour; the right forearm hangs and is to be held out."""
    joints = np.zeros((18, 3), np.float32)
    at = {0: (36, 14), 1: (36, 24), 2: (26, 24), 3: (22, 38), 4: (22, 52), 5: (46, 24), 6: (50, 38), 7: (50, 52),
          8: (30, 54), 9: (30, 74), 10: (30, 92), 11: (42, 54), 12: (42, 74), 13: (42, 92)}  # fmt: skip
    for joint, xy in at.items():
        joints[joint] = (*xy, 1)
    image, parsing = np.full((*SIZE, 3), 1, np.float32), np.zeros(SIZE, np.uint8)
    for name, (top, bottom, left, right), colour in (
        ("Upper-clothes", (22, 54, 27, 46), (-1, -1, 1)),
        ("Right-arm", (24, 38, 19, 25), (1, 1, -1)),
        ("Right-arm", (38, 54, 19, 25), (1, -1, -1)),
    ):
        parsing[top:bottom, left:right] = LABELS.id_of(name)
        image[top:bottom, left:right] = colour
    wanted = joints.copy()
    wanted[4] = (8, 38, 1)
    found = warped((image, parsing, joints), wanted)
    np.testing.assert_allclose(found[38, 9:18], np.broadcast_to([1, -1, -1], (9, 3)), atol=1e-4)
    np.testing.assert_allclose(found[28:34, 22], np.broadcast_to([1, 1, -1], (6, 3)), atol=1e-4)
    np.testing.assert_allclose(found[30:50, 36], np.broadcast_to([-1, -1, 1], (20, 3)), atol=1e-4)
    np.testing.assert_allclose(found[46:, 20:24], 1, atol=1e-4)


def test_it_beats_the_copied_source():
    """Into another pose, on people of many kinds; and the turned torso is not torn apart."""
    sources, targets = (
        [picture(pose, identity) for identity in range(6) for pose in poses] for poses in ((0, 22), (8, 0))
    )
    truth = np.stack([t[0] for t in targets])
    person = np.stack([t[1] > 0 for t in targets])
    found = np.stack([warped(s, t[2]) for s, t in zip(sources, targets, strict=True)])
    copied = np.stack([s[0] for s in sources])
    assert mean_psnr(found, truth, person) > mean_psnr(copied, truth, person) + 2


def test_missing_joints():
    """Whatever is missing on either side: a finite picture; without a trunk the source itself."""
    source = image, parsing, joints = picture(0)
    for gone in ([3, 4], [9, 10, 12, 13], [0, 14, 15, 16, 17], [2, 8], [4, 7, 10, 13, 6], [*range(3, 5), *range(6, 8)]):
        fewer = joints.copy()
        fewer[gone] = 0
        for found in (warped(source, fewer), warped((image, parsing, fewer), joints)):
            assert np.isfinite(found).all() and found.shape == image.shape
            assert np.abs(found - image)[30:50, 32:40].mean() < 0.2, "the torso stays"
    for gone in ([1], [2, 5], [8, 11]):
        fewer = joints.copy()
        fewer[gone] = 0
        assert warped(source, fewer) is image and warped((image, parsing, fewer), joints) is image
    assert np.isfinite(warped((image, np.zeros_like(parsing), joints), joints)).all()
    assert np.isfinite(warped((image, np.ones_like(parsing), joints), joints)).all()
