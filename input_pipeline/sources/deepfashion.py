"""DeepFashion In-shop (high-resolution photos) with PATN's lists: where its files are, and what they should count.

    RAW/img_highres/WOMEN/Blouses_Shirts/id_00003372/03_3_back.jpg   (also Img/img_highres/, img/, or right in RAW)
    RAW/fasion-resize-pairs-{train,test}.csv                         from,to (also in RAW/lists/, or --lists)
    RAW/fasion-resize-annotation-{train,test}.csv                    name:keypoints_y:keypoints_x, frame 256x176
    RAW/train.lst, RAW/test.lst
    RAW/parsing/WOMEN/...png                                         label maps, of the photos' sizes (not with none)
    RAW/pose/WOMEN/...txt                                            18 rows of x y, for images no CSV annotates

Any of the five spellings of an image's name is read, in lists and as file names, and becomes
WOMEN/Blouses_Shirts/id_00003372/03_3_back.
"""

from __future__ import annotations

import pathlib

from input_pipeline.schema import InputError
from input_pipeline.sources import listing
from input_pipeline.sources.base import NO_MAP, NO_PHOTO, NO_POSE, Dropped, RawSet, RawSplit
from input_pipeline.sources.folder import first_folder, identity_of

SPLITS = ("train", "test")
EXPECTED_PAIRS = {"train": 101_966, "test": 8_570}
EXPECTED_IMAGES = {"train": 48_674, "test": 4_038}
"""Lines of train.lst and test.lst; the training pairs name 37,016 of the 48,674."""

PHOTO_FOLDERS = ("img_highres", "Img/img_highres", "img", "image", "images")
LIST_FOLDERS = ("", "lists", "patn")
PAIR_FILES = (
    "fasion-resize-pairs-{}.csv",
    "fashion-resize-pairs-{}.csv",
    "fasion-pairs-{}.csv",
    "fashion-pairs-{}.csv",
)
POSE_FILES = tuple(name.replace("pairs", "annotation") for name in PAIR_FILES)

PHOTOS_FROM = (
    "request it from the Multimedia Lab of the Chinese University of Hong Kong (DeepFashion, In-shop Clothes Retrieval "
    "Benchmark: sign their agreement, they send the password of img_highres.zip)"
)
LISTS_FROM = (
    "from the data links of the PATN project (github.com/tengteng95/Pose-Transfer) or of DPTN "
    "(github.com/PangzeCheung/Dual-task-Pose-Transformer-Network)"
)
DESCRIPTION = (
    "DeepFashion In-shop Clothes Retrieval, high-resolution photos, for pose transfer: PATN's pairs and OpenPose-18 "
    "joints. One record is one image; the pairs are in pairs-SPLIT.npy."
)
CITATION = """@inproceedings{liu2016deepfashion,
  author = {Liu, Ziwei and Luo, Ping and Qiu, Shi and Wang, Xiaogang and Tang, Xiaoou},
  title = {DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich Annotations},
  booktitle = {CVPR}, year = {2016}}
@inproceedings{zhu2019progressive,
  author = {Zhu, Zhen and Huang, Tengteng and Shi, Baoguang and Yu, Miao and Wang, Bofei and Bai, Xiang},
  title = {Progressive Pose Attention Transfer for Person Image Generation},
  booktitle = {CVPR}, year = {2019}}"""
HOMEPAGE = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html"
LICENCE = "Photos and annotations: non-commercial research only, under the agreement with MMLab, CUHK. Do not pass on."


def read_deepfashion(
    raw: str | pathlib.Path, *, labels: str, lists: str | pathlib.Path | None = None
) -> tuple[RawSet, list[listing.Needed]]:
    """The dataset as its lists give it, and the checklist of its files.

    labels: the label set of RAW/parsing, or "whole". A split that lacks its pair list gets the derived pairs; one
    without poses is a problem. Raises InputError where there is no photo at all.
    """
    root = pathlib.Path(raw)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; make it and put the files of `--dataset=deepfashion` there")
    places = [pathlib.Path(lists)] if lists else [root / folder for folder in LIST_FOLDERS]
    found = {
        split: {
            "pairs": listing.first_file(places, [name.format(split) for name in PAIR_FILES]),
            "annotations": listing.first_file(places, [name.format(split) for name in POSE_FILES]),
            "images": listing.first_file(places, [f"{split}.lst"]),
        }
        for split in SPLITS
    }
    folder = _photo_folder(root)
    maps = first_folder(root, listing.PARSING_FOLDERS)
    needed = _checklist(root, folder, maps, labels, found)
    if folder is None:
        raise listing.MissingFiles(f"{root}: no photos (img_highres/WOMEN/..., MEN/...)", needed)

    photos, pose_folder = listing.photos_by_key(folder), first_folder(root, listing.POSE_FOLDERS)
    map_files = listing.maps_by_key(maps, labels)
    splits: dict[str, RawSplit] = {}
    problems: list[str] = []
    notes: list[str] = []
    dropped: list[Dropped] = []
    for split in SPLITS:
        files = found[split]
        poses = listing.read_poses(files["annotations"], pose_folder)
        names = listing.read_names(files["images"]) if files["images"] else []
        if names and len(names) != EXPECTED_IMAGES[split]:
            problems.append(f"{files['images'].name} names {len(names):,} images; {EXPECTED_IMAGES[split]:,} expected")
        pairs = _pairs(split, files, names, poses, problems, notes)
        content, lost = listing.paired_photos(
            pairs, photos=photos, poses=poses, maps=map_files, labels=labels, identity=identity_of
        )
        named = len({key for pair in pairs for key in pair})
        problems += [f"{split}: {line}" for line in listing.missing_problems(pairs, content, lost, where=_WHERE)]
        if names:
            notes.append(f"{split}.lst names {len(names):,} images, {named:,} of them in pairs; only these are built")
        dropped += lost
        if content.items:
            splits[split] = content
    raw_set = RawSet(
        "deepfashion", labels, splits, DESCRIPTION, CITATION, HOMEPAGE, LICENCE, dropped, problems, notes
    )  # fmt: skip
    return raw_set, needed


_WHERE = {
    NO_PHOTO: "img_highres is incomplete, or its names were changed",
    NO_POSE: "neither the annotation CSV nor pose/ has them",
    NO_MAP: "parsing/ is incomplete",
}


def _pairs(split: str, files: dict, names: list[str], poses: listing.Poses, problems: list[str], notes: list[str]):
    """The listed pairs, else the derived ones; counts that are not the published ones become problems."""
    if files["pairs"]:
        pairs, how = listing.read_pair_keys(files["pairs"]), f"in {files['pairs'].name}"
    elif len(poses):
        known = names or sorted(poses.rows)
        pairs, how = (
            listing.derived_pairs([key for key in known if key in poses], poses, identity_of),
            "by the pair rule",
        )
        notes.append(
            f"{split}: no pair list; {len(pairs):,} pairs derived (same person and clothes, shoulders and hips)"
        )
    else:
        problems.append(f"{split}: no pose at all (fasion-resize-annotation-{split}.csv, or pose/*.txt)")
        return []
    if len(pairs) != EXPECTED_PAIRS[split]:
        problems.append(f"{split}: {len(pairs):,} pairs {how}; {EXPECTED_PAIRS[split]:,} expected")
    return pairs


def _photo_folder(root: pathlib.Path) -> pathlib.Path | None:
    """The folder that holds WOMEN/ and MEN/, or flat files."""
    folder = first_folder(root, PHOTO_FOLDERS)
    if folder is not None:
        return folder
    return root if (root / "WOMEN").is_dir() or (root / "MEN").is_dir() else None


def _checklist(root, folder, maps, labels: str, found: dict) -> list[listing.Needed]:
    needed = [listing.Needed("photos", f"{root}/img_highres/WOMEN/... and MEN/...", PHOTOS_FROM, str(folder or ""))]
    for split, files in found.items():
        for what, file, instead in (
            ("annotations", POSE_FILES[0], ""),
            ("pairs", PAIR_FILES[0], "; without it the pairs are derived from the annotations"),
            ("images", "{}.lst", "; only needed to derive pairs and to check counts"),
        ):
            name = file.format(split)
            needed.append(
                listing.Needed(f"{split} {what}", f"{root}/{name}", LISTS_FROM + instead, str(files[what] or ""))
            )
    if labels != "whole":
        how = (
            f"run a human parser (SCHP) with {labels} classes over the photos and keep the names; or use --parsing=none"
        )
        needed.append(listing.Needed("parsing maps", f"{root}/parsing/WOMEN/...png", how, str(maps or "")))
    return needed
