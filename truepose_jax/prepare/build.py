"""`prepare build`: one command per dataset, from raw files to records."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import time
from typing import Any

from input_pipeline.annotations.parsing import LABEL_SETS, label_set
from input_pipeline.records.writer import build_records
from input_pipeline.schema import InputError
from input_pipeline.shards import Shard
from input_pipeline.sources.base import RawSet, limited
from input_pipeline.sources.ccp import read_ccp
from input_pipeline.sources.deepfashion import read_deepfashion
from input_pipeline.sources.listing import MissingFiles, checklist
from input_pipeline.sources.market1501 import read_market1501
from input_pipeline.sources.own_photos import read_folder, synthetic_people
from input_pipeline.sources.phoenix import read_phoenix
from input_pipeline.sources.wpose import read_wpose
from truepose_jax.prepare.drop_sheet import drop_sheet
from truepose_jax.runtime.cli import parse_size, reject_unused_flags

READERS = {
    "deepfashion": read_deepfashion, "market1501": read_market1501, "wpose": read_wpose, "ccp": read_ccp,
    "phoenix": read_phoenix,
}  # fmt: skip
"""Of published datasets."""
DATASETS = (*READERS, "folder", "synthetic")
SYNTHETIC_PAIRS, SYNTHETIC_SIZE = 10_000, (256, 176)
FLAGS_OF: dict[str, tuple[str, ...]] = {
    "raw": ("deepfashion", "market1501", "wpose", "ccp", "phoenix", "folder"),
    "labels": ("deepfashion", "market1501", "wpose", "folder"),
    "lists": ("deepfashion", "market1501"),
    "allow_missing": ("deepfashion", "market1501", "wpose", "phoenix"),
    "pairs": ("folder",),
    "test_pairs": ("folder",),
    "keypoints": ("folder",),
    "pose_frame": ("folder",),
    "seed": ("synthetic",),
    "poses_per_identity": ("synthetic",),
    "patterns": ("synthetic",),
    "background": ("synthetic",),
    "framing": ("synthetic",),
}
"""Which datasets a flag means something to; elsewhere it is an error."""


def add_build(commands) -> None:
    """The flags of `build`. All defaults are None, so that what was given can be told from what was not."""
    parser = commands.add_parser("build", help="turn a raw dataset into records; run again to go on after a stop")
    sets = ", ".join(name for name in LABEL_SETS if name != "whole")
    add = parser.add_argument_group("the dataset").add_argument
    add("--dataset", required=True, choices=DATASETS)
    add("--raw", help="folder of the raw files; each dataset's layout is in docs/data.md")
    add("--lists", help="folder of the pair and annotation lists, if not RAW")
    add("--allow-missing", action="store_true", default=None, help="build without what is missing")
    add = parser.add_argument_group("what is built").add_argument
    add("--out", required=True, help="folder of the records")
    add("--size", type=parse_size, metavar="HxW", help="fit photos to this size (default: as they are)")
    add("--limit", type=int, help="so many pairs of each split at most (without pairs: images)")
    add("--workers", type=int, help="processes that read photos (default: one a core)")
    add = parser.add_argument_group("maps and poses").add_argument
    add("--labels", "--parsing", dest="labels", help=f"label set of RAW/parsing: {sets}, or none")
    add("--keypoints", help="folder: an annotation CSV or folder of poses, in place of RAW/keypoints")
    add("--pose-frame", type=parse_size, metavar="HxW", help="folder: size of the frame of the poses")
    add = parser.add_argument_group("pairs of a folder").add_argument
    add("--pairs", help="folder: self (default), identity, or a CSV with from,to")
    add("--test-pairs", help="folder: a CSV of pairs to hold out as the split test")
    add = parser.add_argument_group("drawn people (--dataset=synthetic)").add_argument
    add("--seed", type=int, help="synthetic: of the people (0)")
    add("--poses-per-identity", type=int, metavar="N", help="synthetic: pictures of a person (4)")
    add("--patterns", choices=("all", "solid", "mixed", "two_sided"), help="synthetic: clothes (all)")
    add("--background", choices=("all", "plain"), help="synthetic: scenes (all)")
    add("--framing", choices=("all", "close"), help="synthetic: how near (all)")
    parser.set_defaults(run=build)


def build(flags: argparse.Namespace, share: Shard) -> None:
    """Reads the lists, says what is missing, builds, and prints what came of it. Raises InputError."""
    reject_unused_flags(flags, FLAGS_OF, flags.dataset, title=f"--dataset={flags.dataset}")
    if flags.limit is not None and flags.limit < 1:
        raise InputError(f"--limit={flags.limit} leaves nothing to build")
    if flags.workers is not None and flags.workers < 1:
        raise InputError(f"--workers={flags.workers}; at least one process must read photos")
    started = time.monotonic()
    raw = read_raw(flags)
    raw = dataclasses.replace(raw, splits={name: limited(split, flags.limit) for name, split in raw.splits.items()})
    report = build_records(
        raw,
        flags.out,
        size=flags.size if flags.dataset != "synthetic" else None,
        workers=flags.workers or len(os.sched_getaffinity(0)),
        settings=settings_of(flags),
        share=share,
    )
    out = pathlib.Path(flags.out)
    if report is None:
        print(f"{out}: {share} is done")
        return
    drop_sheet(report).save(out / "report.png")
    print_report(report)
    print(f"{out}: built in {time.monotonic() - started:.0f} s; what was dropped is in report.json and report.png")


def read_raw(flags: argparse.Namespace) -> RawSet:
    """The raw set of the flags; prints the checklist of a published dataset where it is not complete."""
    if flags.dataset == "synthetic":
        return synthetic_people(
            pairs=flags.limit or SYNTHETIC_PAIRS, size=flags.size or SYNTHETIC_SIZE, **synthetic_settings(flags)
        )  # fmt: skip
    if not flags.raw:
        raise InputError(f"--dataset={flags.dataset} needs --raw=DIR, the folder of its files")
    heeded: dict[str, Any] = {}
    if flags.dataset in FLAGS_OF["labels"]:
        heeded["labels"] = label_set(_required_labels(flags)).name
    if flags.dataset in FLAGS_OF["lists"]:
        heeded["lists"] = flags.lists
    if flags.dataset == "folder":
        return read_folder(
            flags.raw, **heeded, pairs=flags.pairs or "self", test_pairs=flags.test_pairs,
            keypoints=flags.keypoints, pose_frame=flags.pose_frame,
        )  # fmt: skip
    try:
        raw, needed = READERS[flags.dataset](flags.raw, **heeded)
    except MissingFiles as error:
        print(checklist(error.needed))
        raise
    if raw.problems:
        print(checklist(needed))
        for line in raw.problems:
            print(f"  NOT AS PUBLISHED  {line}")
        if not flags.allow_missing and flags.limit is None:
            raise InputError(
                f"{flags.raw}: {len(raw.problems)} things are not as published (above); complete the files, or build "
                "without them with --allow-missing"
            )
    return raw


def _required_labels(flags: argparse.Namespace) -> str:
    if not flags.labels:
        sets = ", ".join(name for name in LABEL_SETS if name != "whole")
        raise InputError(f"say whose classes {flags.raw}/parsing has: --parsing=SET, one of {sets}; or --parsing=none")
    return flags.labels


def synthetic_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags of synthetic people that were given."""
    names = ("seed", "poses_per_identity", "patterns", "background", "framing")
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def settings_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What makes a build with these flags another one, beyond its list of images."""
    settings = synthetic_settings(flags) | {"limit": flags.limit}
    if flags.dataset == "synthetic":
        settings["size"] = list(flags.size or SYNTHETIC_SIZE)
    else:
        settings["raw"] = str(pathlib.Path(flags.raw).resolve())
    return settings


def print_report(report: dict[str, Any]) -> None:
    """The report in a few lines."""
    for split, counts in report["splits"].items():
        print(
            f"{split}: {counts['images']:,} images of {counts['identities']:,} identities, {counts['pairs']:,} pairs, "
            f"{counts['bytes'] / 2**20:.1f} MiB"
        )
        for reason, count in counts["pairs_dropped"].items():
            print(f"{split}: {count:,} pairs left out: {reason}")
        if counts["images_without_joints"]:
            print(f"{split}: {counts['images_without_joints']:,} images have no visible joint and are nobody's target")
    for reason, found in report["dropped"].items():
        print(f"dropped: {found['count']:,} images, {reason}, such as {found['images'][0]['name']}")
    for note in report["notes"]:
        print(f"note: {note}")
    for line in report.get("doubts", ()):
        print(f"warning: {line}")
