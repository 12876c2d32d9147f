"""`prepare label`: the parsing maps and poses that a raw folder lacks, where `prepare build` looks for them.

What lies there is kept, in whatever spelling and format, so a folder may be labelled in part and a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tqdm

from input_pipeline.annotations.grey_png import encode_grey_png
from input_pipeline.annotations.keypoints import name_key
from input_pipeline.annotations.parsing import LABEL_SETS, LABELS_FILE, check_said_labels, label_set, said_labels
from input_pipeline.annotations.photo import PHOTO_SUFFIXES, read_photo
from input_pipeline.schema import NUM_JOINTS, InputError
from input_pipeline.shards import Shard
from input_pipeline.sources.folder import files_under, first_folder
from input_pipeline.sources.listing import PARSING_FOLDERS, POSE_FOLDERS, files_by_key
from truepose_jax.detection.embedded import EMBEDDED, EmbeddedParsing, EmbeddedPose
from truepose_jax.runtime import files
from truepose_jax.runtime.cli import reject_unused_flags
from truepose_jax.runtime.reading import batches, readable

PHOTO_FOLDERS = ("img_highres", "Img/img_highres", "image", "images", "img", "photos")
FLAGS_USED_BY = {"labels": ("--parsing",), "score": ("--pose",)}
SCORE, SEEN = 0.3, 0.5
"""Least score of a joint: of VitPose, of the embedded network."""

Label = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def add_label(commands) -> None:
    """The flags of `label`."""
    parser = commands.add_parser(
        "label", help="make the parsing maps and poses that a raw folder lacks; run again to go on after a stop"
    )
    parser.add_argument("--raw", required=True, help="folder as `prepare build --raw` takes it")
    parser.add_argument("--photos", help=f"its folder of photos (default: the first of {', '.join(PHOTO_FOLDERS)})")
    parser.add_argument(
        "--parsing", metavar="MODEL", help="a semantic segmentation model of people: folder or hub name; or embedded"
    )
    sets = ", ".join(name for name in LABEL_SETS if name != "whole")
    parser.add_argument("--labels", help=f"label set of the maps: {sets} (default: the one that loses fewest classes)")
    parser.add_argument("--pose", metavar="MODEL", help="a VitPose of COCO's 17 joints, with --detector; or embedded")
    parser.add_argument("--detector", metavar="MODEL", help="an object detector with a class person, such as RT-DETR")
    parser.add_argument("--score", type=float, help=f"joints below it are missing ({SCORE:g}; embedded: {SEEN:g})")
    parser.add_argument("--batch-size", type=int, default=8, help="photos in a model at once (8)")
    parser.add_argument("--device", default="cpu", help="PyTorch's name of it: cpu, cuda (cpu)")
    parser.set_defaults(run=label)


def label(flags: argparse.Namespace, share: Shard) -> None:
    """Labels this part of the folder of the flags; a merging call looks whether all is there. Raises InputError before any long
    work."""
    if not flags.parsing and not flags.pose:
        raise InputError(
            "nothing to do: give --parsing=MODEL for maps, --pose=MODEL and --detector=MODEL for poses, or all"
        )
    if flags.pose == EMBEDDED and flags.detector:
        raise InputError("--detector means nothing to --pose=embedded, which finds people itself")
    if bool(flags.pose) != bool(flags.detector) and flags.pose != EMBEDDED:
        raise InputError("--pose and --detector belong together: VitPose needs to know where the person is")
    reject_unused_flags(flags, FLAGS_USED_BY, *(f"--{name}" for name in ("parsing", "pose") if getattr(flags, name)))
    score = (SEEN if flags.pose == EMBEDDED else SCORE) if flags.score is None else flags.score
    if flags.batch_size < 1 or not 0 <= score <= 1:
        raise InputError("--batch-size must be 1 or more and --score from 0 to 1")
    root = pathlib.Path(flags.raw)
    device = own_device(flags.device, share)
    every = find_raw_photos(root, flags.photos)
    # Of all photos and not of those that lack something: the others are at work while this is read.
    photos = {name: every[name] for name in share.mine(every)}
    if flags.parsing:
        folder = first_folder(root, PARSING_FOLDERS) or root / PARSING_FOLDERS[0]
        there = files_by_key(folder if folder.is_dir() else None, (".png",))
        todo = missing(photos, there)
        labels = own_labels(folder, flags.labels)
        say_left(share, folder, len(every), len(missing(every, there)), "a map")
        if todo:
            check_writable(root, folder)
            if flags.parsing == EMBEDDED:
                model = EmbeddedParsing(labels)
                found_labels, said = model.labels, [f"{EMBEDDED}: joints, mask and colours as {model.labels.name}"]
            else:
                from truepose_jax.detection.parsing_model import ParsingModel

                model = ParsingModel(flags.parsing, labels, device)
                found_labels = model.map.labels
                said = [f"{flags.parsing}: its {len(model.map.table)} classes as {found_labels.name}"]
                said += [f"  lost: {line}" for line in model.map.lost]
            if not there:  # maps whose labels nobody has said may be of another set
                _write(folder / LABELS_FILE, f"{found_labels.name}\n".encode())
            print("\n".join(said))

            def keep_map(name: str, photo: np.ndarray, found: np.ndarray) -> None:
                del photo
                write_map(folder, name, found)

            run_over(todo, model, keep_map, flags.batch_size, "parsing", share)
    if flags.pose:
        folder = first_folder(root, POSE_FOLDERS) or root / POSE_FOLDERS[0]
        there = files_by_key(folder if folder.is_dir() else None, (".json", ".txt"))
        todo = missing(photos, there)
        say_left(share, folder, len(every), len(missing(every, there)), "a pose")
        none: list[str] = []
        if todo:
            check_writable(root, folder)
            if flags.pose == EMBEDDED:
                model = EmbeddedPose(score)
            else:
                from truepose_jax.detection.pose_model import PoseModel

                model = PoseModel(flags.pose, flags.detector, device, joint_score=score)

            def keep(name: str, photo: np.ndarray, joints: np.ndarray) -> None:
                write_pose(folder, name, joints, photo.shape[:2])
                if not joints.any():
                    none.append(name)

            run_over(todo, model, keep, flags.batch_size, "pose", share)
        if none:
            print(f"{folder}: nobody was found in {len(none)} photos, such as {none[0]}; they are nobody's target")


def own_labels(folder: pathlib.Path, labels: str | None) -> str | None:
    """The label set to make maps in: that of the maps which are there, where it is known. Raises InputError."""
    if labels:
        check_said_labels(folder, label_set(labels).name)
    return labels or said_labels(folder) or None


def check_writable(root: pathlib.Path, folder: pathlib.Path) -> None:
    """Before the models are loaded. A folder that is not there yet is made with its first file. Raises InputError."""
    files.make_folder(folder if folder.exists() else root)


def own_device(device: str, share: Shard) -> str:
    """`cuda` of several processes of a SLURM step, all of which see all cards of their node: each its own."""
    place = os.environ.get("SLURM_LOCALID")
    return f"cuda:{place}" if device == "cuda" and share.count > 1 and place else device


def say_left(share: Shard, folder: pathlib.Path, count: int, left: int, what: str) -> None:
    """Prints how many of all `count` photos have it. Raises InputError where a merging call finds some without."""
    print(f"{folder}: {count - left} of {count} photos have {what}")
    if share.merge:
        share.require(left, count, f"photos with {what}")


def find_raw_photos(root: pathlib.Path, folder: str | None) -> dict[str, pathlib.Path]:
    """Photos of a raw folder by their path in it, without suffix. Raises InputError where there are none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds the photos' folder")
    place = root / folder if folder else first_folder(root, PHOTO_FOLDERS)
    if place is None and any((root / name).is_dir() for name in ("WOMEN", "MEN")):
        place = root
    if place is None or not place.is_dir():
        raise InputError(f"{place or root}: no folder of photos ({', '.join(PHOTO_FOLDERS)}); name it by --photos")
    found = {path.relative_to(place).with_suffix("").as_posix(): path for path in files_under(place)}
    if not found:
        raise InputError(f"{place}: holds no photos ({', '.join(PHOTO_SUFFIXES)})")
    return found


def missing(photos: dict[str, pathlib.Path], there: dict[str, pathlib.Path]) -> dict[str, pathlib.Path]:
    """The photos without a file of their name, in any spelling."""
    return {name: path for name, path in photos.items() if name_key(f"{name}.png") not in there}


def run_over(
    photos: dict[str, pathlib.Path],
    model: Label,
    keep: Callable[[str, np.ndarray, np.ndarray], None],
    batch_size: int,
    what: str,
    share: Shard,
) -> None:
    """Calls keep(name, photo, result) for every photo that can be read; the others are said and left out."""
    with tqdm.tqdm(total=len(photos), desc=what, unit="image", delay=0.5, disable=not share.first) as bar:
        for names, images in _batches(photos, batch_size, bar):
            for name, image, found in zip(names, images, model(images), strict=True):
                keep(name, image, found)
            bar.update(len(names))


def _batches(photos, batch_size: int, bar) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Batches of photos, the next being read while one is worked on; without those that cannot be read."""

    def left_out(name: str, error: InputError) -> None:
        bar.write(f"warning: {error} (left out)")
        bar.update()

    read = readable(lambda name: read_photo(photos[name]), photos, ahead=2 * batch_size, unreadable=left_out)
    for batch in batches(read, batch_size):
        names, images = zip(*batch, strict=True)
        yield list(names), list(images)


def write_map(folder: pathlib.Path, name: str, parsing: np.ndarray) -> None:
    """FOLDER/NAME.png."""
    _write(folder / f"{name}.png", encode_grey_png(parsing))


def write_pose(folder: pathlib.Path, name: str, joints: np.ndarray, hw: tuple[int, int]) -> None:
    """FOLDER/NAME.json, OpenPose-18 with the photo's size; NAME.txt of -1 where nobody was found."""
    path = folder / name
    if not joints.any():
        _write(path.with_name(f"{path.name}.txt"), b"-1 -1\n" * NUM_JOINTS)
        return
    numbers = [round(float(x), 3) for x in joints.reshape(-1)]
    content = {
        "canvas_height": hw[0],
        "canvas_width": hw[1],
        "people": [{"pose_keypoints_2d": numbers}],
    }
    _write(path.with_name(f"{path.name}.json"), json.dumps(content).encode())


def _write(path: pathlib.Path, content: bytes) -> None:
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as partial:
        partial.write_bytes(content)
