"""What the input tests share: the folder of real data, folders written to disk, and a small image set."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.keypoints import load_pose
from input_pipeline.annotations.photo import Framing
from input_pipeline.schema import ImageRecord

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def shared_data(*parts: str) -> pathlib.Path:
    """A path of ../shared/data; skips the test where the folder is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data is absent: {path}")
    return path


def standing_joints(h: int, w: int) -> np.ndarray:
    """A person standing upright in a picture of h x w pixels: float32 [18 3], all visible."""
    xy = np.array(
        [
            (50, 15), (50, 25), (38, 25), (33, 40), (30, 54), (62, 25), (67, 40), (70, 54),
            (43, 55), (42, 75), (42, 95), (57, 55), (58, 75), (58, 95),
            (47, 13), (53, 13), (43, 15), (57, 15),
        ],
        np.float32,
    )  # fmt: skip
    return np.concatenate([xy * (w / 100, h / 100), np.ones((18, 1))], axis=1).astype(np.float32)


def openpose_json(joints: np.ndarray) -> str:
    return json.dumps({"people": [{"pose_keypoints_2d": joints.reshape(-1).tolist()}]})


def write_folder(root: pathlib.Path, names, *, hw=(60, 40), label_max=18, parsing=True) -> pathlib.Path:
    """A folder as FolderImages reads it: noise photos, striped maps, standing poses."""
    rng = np.random.default_rng(0)
    for name in names:
        for sub, suffix in (("image", ".png"), ("parsing", ".png"), ("keypoints", ".json")):
            if sub == "parsing" and not parsing:
                continue
            path = root / sub / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if sub == "image":
                Image.fromarray(rng.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(path)
            elif sub == "parsing":
                stripes = np.arange(hw[0]) * label_max // hw[0]
                Image.fromarray(np.repeat(stripes[:, None], hw[1], 1).astype(np.uint8)).save(path)
            else:
                path.write_text(openpose_json(standing_joints(*hw)))
    return root


class NoiseImages:
    """An image set in memory: `people` identities of `views` photos, all ordered pairs of an identity."""

    labels = "atr18"

    def __init__(self, people: int = 6, views: int = 4, hw: tuple[int, int] = (64, 48)):
        rng = np.random.default_rng(1)
        count = people * views
        self.images = rng.integers(0, 256, (count, *hw, 3), dtype=np.uint8)
        self.maps = rng.integers(0, 18, (count, *hw), dtype=np.uint8)
        self.joints = np.stack([standing_joints(*hw)] * count)
        self.joints[:, :, :2] += rng.uniform(-2, 2, (count, 18, 2))
        self.views = views
        same = [(a, b) for a in range(count) for b in range(count) if a != b and a // views == b // views]
        self.pairs = np.array(same, np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> ImageRecord:
        identity = f"person{index // self.views}"
        return ImageRecord(self.images[index], self.maps[index], self.joints[index], f"{index:03d}", identity)


def read_pose(spec, *, frame_hw=None, out_hw) -> np.ndarray:
    """Joints of a spec in pixels of a picture into which its frame is put as a photo would be."""
    pose = load_pose(spec, frame_hw=frame_hw)
    return Framing.fit(pose.frame_hw, out_hw).joints(pose.joints)
