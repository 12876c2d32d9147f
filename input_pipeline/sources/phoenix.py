"""RWTH-PHOENIX-2014T, sign language of weather reports, as FPDM uses it: frames of 210 columns and 260 rows, no maps.

    RAW/features/fullFrame-210x260px/train/VIDEO/images0001.png     the corpus' own layout; also test/ (dev/ is not used)
    RAW/keypoints/train/VIDEO.npz                                   NOT in the corpus: `keypoints` [frames 133 3] of
                                                                    COCO-WholeBody in pixels, x, y, score

Keypoints of a video are in the order of its frames' names. A score under LEAST_SCORE, or x and y both 0, is a missing point; a
frame without a point is nobody's target. An identity is a video. Training pairs: TRAIN_PAIRS, drawn with SEED, of two frames of
one video, each once; test: the first frame of a video into each, as FPDM's lists have them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zipfile

import numpy as np

from input_pipeline.annotations.photo import PHOTO_SUFFIXES, one_line
from input_pipeline.schema import InputError
from input_pipeline.sources.base import BAD_POSE, RawPicture, RawSet, RawSplit, Unusable, read_photo_bytes, restricted
from input_pipeline.sources.folder import first_folder
from input_pipeline.sources.listing import MissingFiles, Needed

VIDEOS = {"train": 7_096, "test": 642}
TRAIN_PAIRS, TEST_PAIRS, SEED = 100_000, 64_627, 0
JOINTS, LEAST_SCORE = 133, 0.3
FRAME_FOLDERS = ("features/fullFrame-210x260px", "fullFrame-210x260px", "frames")

FRAMES_FROM = (
    "in phoenix-2014-T.v3.tar.gz of RWTH Aachen (www-i6.informatik.rwth-aachen.de/~koller/RWTH-PHOENIX-2014-T)"
)
POSES_FROM = "not published: run a whole-body pose estimator (133 points of COCO-WholeBody) over the frames"
DESCRIPTION = "RWTH-PHOENIX-Weather 2014T: signing of weather reports, with pairs of frames as FPDM draws them."
CITATION = """@inproceedings{camgoz2018neural,
  author = {Camgoz, Necati Cihan and Hadfield, Simon and Koller, Oscar and Ney, Hermann and Bowden, Richard},
  title = {Neural Sign Language Translation}, booktitle = {CVPR}, year = {2018}}"""
LICENCE = "CC BY-NC-SA 3.0, research only."


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame; poses: the video's npz, row: its place there."""

    name: str
    identity: str
    photo: str
    poses: str
    row: int

    def load(self) -> RawPicture:
        image, jpeg = read_photo_bytes(self.photo)
        try:
            poses = read_wholebody(self.poses)
        except InputError as error:
            raise Unusable(BAD_POSE, str(error)) from error
        if self.row >= len(poses):
            raise Unusable(BAD_POSE, f"{self.poses}: has {len(poses)} poses and the video more frames")
        return RawPicture(image, None, poses[self.row], jpeg)


def read_phoenix(raw: str | pathlib.Path) -> tuple[RawSet, list[Needed]]:
    """Both splits, and the checklist of their files. Raises InputError."""
    root = pathlib.Path(raw)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; make it and put the files of `--dataset=phoenix` there")
    frames, poses = first_folder(root, FRAME_FOLDERS), first_folder(root, ("keypoints",))
    needed = [
        Needed("frames", f"{root}/{FRAME_FOLDERS[0]}/", FRAMES_FROM, str(frames or "")),
        Needed("poses", f"{root}/keypoints/", POSES_FROM, str(poses or "")),
    ]
    if absent := [item.what for item in needed if not item.found]:
        raise MissingFiles(f"{root}: no {', no '.join(absent)}", needed)
    splits, problems = {}, []
    for split, count in VIDEOS.items():
        videos = _videos(frames / split)
        posed = {name: files for name, files in videos.items() if (poses / split / f"{name}.npz").is_file()}
        problems += [f"{split}: {len(videos):,} videos; {count:,} expected"] * (len(videos) != count)
        if lacking := sorted(videos.keys() - posed.keys()):
            problems.append(
                f"{split}: {len(lacking):,} videos without poses, such as {lacking[0]} (keypoints/ is incomplete)"
            )
        splits[split] = _split(split, posed, poses)
    if len(splits["test"].pairs) != TEST_PAIRS:
        problems.append(f"test: {len(splits['test'].pairs):,} pairs; {TEST_PAIRS:,} expected")
    raw_set = RawSet(
        "phoenix", "whole", splits, DESCRIPTION, CITATION, "", LICENCE, problems=problems, joints=JOINTS,
        notes=[f"train pairs were drawn by seed {SEED}: FPDM's list is not published"],
    )  # fmt: skip
    return raw_set, needed


def _videos(folder: pathlib.Path) -> dict[str, list[str]]:
    """{video: its frames in order}; folders without a frame are left out. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the corpus has one of videos there")
    found = {}
    for video in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(str(path) for path in video.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
        found |= {video.name: files} if files else {}
    return found


def _split(split: str, videos: dict[str, list[str]], poses: pathlib.Path) -> RawSplit:
    items, starts = [], []
    for video, files in videos.items():
        starts.append(len(items))
        items += [
            Frame(
                f"{split}/{video}/{pathlib.Path(file).stem}",
                f"{split}/{video}",
                file,
                str(poses / split / f"{video}.npz"),
                row,
            )
            for row, file in enumerate(files)
        ]
    lengths = np.diff([*starts, len(items)])
    if split == "test":
        firsts = np.repeat(starts, lengths)
        return RawSplit(items, np.stack([firsts, np.arange(len(items))], axis=-1).astype(np.int32))
    several = np.flatnonzero(lengths > 1)
    if not len(several):
        raise InputError(f"{split}: no video has two frames with poses, so there is no pair to train on")
    random = np.random.default_rng(SEED)
    drawn = random.choice(several, TRAIN_PAIRS)
    source = random.integers(lengths[drawn])
    target = (source + random.integers(1, lengths[drawn])) % lengths[drawn]
    pairs = np.array(starts)[drawn][:, None] + np.stack([source, target], axis=-1)
    return restricted(RawSplit(items, np.empty((0, 2))), np.unique(pairs, axis=0).astype(np.int32))


@functools.lru_cache(maxsize=8)
def read_wholebody(path: str) -> np.ndarray:
    """Joints float32 [frames 133 3] of a video, missing ones (0, 0, 0). Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = np.asarray(file["keypoints"], np.float32)
    except KeyError:
        raise InputError(f"{path}: has no array 'keypoints'") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); give an npz with 'keypoints'") from error
    if found.ndim != 3 or found.shape[1:] != (JOINTS, 3) or not np.isfinite(found).all():
        raise InputError(
            f"{path}: 'keypoints' is {list(found.shape)}; expected finite x, y, score, [frames {JOINTS} 3]"
        )
    seen = (found[..., 2] >= LEAST_SCORE) & found[..., :2].any(-1)
    return np.where(seen[..., None], np.concatenate([found[..., :2], np.ones_like(found[..., :1])], axis=-1), 0)
