"""Pictures to make whose inputs are files: one of the command line, or the rows of a CSV."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence

from input_pipeline.annotations.keypoints import canonical_name, load_pose, split_spec
from input_pipeline.annotations.parsing import LABEL_SETS, label_set, read_parsing
from input_pipeline.annotations.photo import PHOTO_SUFFIXES, read_photo
from input_pipeline.files import place_in, read_list
from input_pipeline.schema import InputError
from truepose_jax.inference.photo_requests import AUTO, PhotoOptions, Resolved, resolve, segformer
from truepose_jax.inference.pipeline import Run
from truepose_jax.inference.request import SEEDS, Fitted, Request
from truepose_jax.runtime.cli import parse_size
from truepose_jax.sampling.inpainting import Edit

COLUMNS = ("source", "parsing", "pose", "out")
OPTIONAL_COLUMNS = ("labels", "pose_frame", "source_pose", "source_pose_frame", "seed")


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture to make: the files, as FILE or FILE#NAME, and where it goes. line: in the CSV, 0: no list. pose: joints, or a
    photo to find them in. parsing: a map, "none", "auto", or the folder of a segmentation model. source_pose: of the source's
    person, in pixels of the photo unless the file or source_pose_frame says otherwise; None: found where it is needed. seed:
    None: the command line's."""

    line: int
    source: str
    parsing: str
    pose: str
    labels: str | None
    pose_frame: tuple[int, int] | None
    out: pathlib.Path
    source_pose: str | None = None
    source_pose_frame: tuple[int, int] | None = None
    seed: int | None = None
    options: PhotoOptions = PhotoOptions()

    @property
    def name(self) -> str:
        """What keys the noise: photo and pose by their names without folders, so that it does not matter where they
        lie; DeepFashion's photos, whose file names repeat, by the canonical name. Nothing for one picture of a pose photo: the
        seed alone then gives what Pipeline and the page give."""
        if not self.line and is_photo_file(self.pose):
            return ""
        return f"{short_name(self.source)} > {short_name(self.pose)}"

    @property
    def outs(self) -> tuple[pathlib.Path, ...]:
        return (self.out,)

    def read(self, run: Run, seed: int, edit: Edit | None = None) -> Fitted:
        """Reads the files and fits them to the model's size. Raises InputError."""
        return run.fit(self.resolve(run, seed, edit).request)

    def resolve(self, run: Run, seed: int, edit: Edit | None = None) -> Resolved:
        """Reads the files, and then finds in the photos what no file says. Raises InputError."""
        photo = read_photo(self.source)
        labels, parser = self.labels or "", None
        if self.parsing == "none":
            parsing, labels = None, "whole"
        elif self.parsing == AUTO:
            parsing = AUTO
        elif os.path.isdir(self.parsing):
            parsing, parser = AUTO, segformer
        elif not self.labels:
            raise InputError(f"{self.parsing}: say whose labels these are by --labels={'|'.join(LABEL_SETS)}")
        else:
            parsing = read_parsing(self.parsing, label_set(self.labels), photo.shape[:2])
        if is_photo_file(self.pose):
            if self.pose_frame:
                raise InputError(f"{self.pose}: a photo is its pose's frame; leave --pose-frame out")
            joints, frame = read_photo(self.pose), None
        else:
            pose = load_pose(self.pose, frame_hw=self.pose_frame)
            for note in pose.notes:
                logging.warning("%s: %s", self.pose, note)
            joints, frame = pose.joints, pose.frame_hw
            if frame is None and edit is None:
                raise InputError(f"{self.pose}: the file does not say how large its image was; add --pose-frame=HxW")
        seed = seed if self.seed is None else self.seed
        request = Request(photo, joints, parsing, labels, frame, self.name, seed, edit)
        if self.source_pose:
            own = load_pose(self.source_pose, frame_hw=self.source_pose_frame)
            request = dataclasses.replace(request, source_joints=own.joints, source_frame_hw=own.frame_hw)
        options = self.options if parser is None else dataclasses.replace(self.options, parser=parser(self.parsing))
        model = run.config.model
        names = os.path.basename(self.source), os.path.basename(self.pose)
        return resolve(request, model.size, head=run.needs.source_pose, options=options, names=names)


def is_photo_file(pose: str) -> bool:
    """Is this pose a photo to find it in, and no member of a file of many poses, FILE.csv#NAME.jpg?"""
    file, member = split_spec(pose)
    return not member and pathlib.PurePath(file).suffix.lower() in PHOTO_SUFFIXES


def of_seeds(row: Row, seed: int, num: int) -> list[Row]:
    """`num` pictures of a row, with its seed (without one: `seed`) and those that follow. Of several, OUT.png becomes
    OUT_SEED.png. Raises InputError past the last seed."""
    first = seed if row.seed is None else row.seed
    if not 0 <= first <= SEEDS - num:
        many = "" if num == 1 else f" and {num} pictures follow it"
        raise InputError(f"seed is {first}{many}; seeds go from 0 to {SEEDS - 1}")
    if num == 1:
        return [dataclasses.replace(row, seed=first)]
    found = range(first, first + num)
    return [dataclasses.replace(row, seed=s, out=row.out.with_stem(f"{row.out.stem}_{s}")) for s in found]


def short_name(spec: str) -> str:
    """Of FILE or FILE#NAME without folders; DeepFashion's photos, whose file names repeat, by the canonical name."""
    file, member = split_spec(spec)
    name = canonical_name(member or file)
    return name if name.startswith(("WOMEN/", "MEN/")) else pathlib.PurePosixPath(name).name


def read_rows(
    path: str,
    out_dir: pathlib.Path,
    *,
    labels: str | None,
    pose_frame: tuple[int, int] | None,
    source_pose_frame: tuple[int, int] | None = None,
    source_poses: bool = False,
    options: PhotoOptions = PhotoOptions(),
) -> tuple[list[Row], list[tuple[int, str]]]:
    """(rows, [(line, what is wrong with it)]) of a list; labels and the frames serve rows without their own. source_poses:
    every row must have one. options: of all rows.

    Raises InputError where the file cannot be read, lacks columns or holds no pairs.
    """
    lines = read_list(path)
    header = [cell.lower() for cell in lines[0][1]] if lines else []
    missing = [name for name in COLUMNS if name not in header]
    if source_poses and not missing and "source_pose" not in header:
        raise InputError(
            f"{path}: lacks the column source_pose; this model carries the source's pixels by its pose, so name every "
            "photo's own, or write auto there"
        )
    if missing:
        raise InputError(f"{path}: lacks columns {', '.join(missing)}; its first line must be {','.join(COLUMNS)}")
    unknown = [name for name in header if name and name not in COLUMNS + OPTIONAL_COLUMNS]
    if unknown:
        logging.warning("%s: columns %s mean nothing here", path, ", ".join(unknown))
    rows, problems, taken = [], [], {}
    for line, cells in lines[1:]:
        values = dict(zip(header, cells, strict=False))
        try:
            if source_poses and not values.get("source_pose"):
                raise InputError("source_pose is empty; this model needs the photo's own pose (auto: find it)")
            row = _row(line, values, pathlib.Path(path).parent, out_dir, labels, pose_frame, source_pose_frame, options)
            if row.out in taken:
                raise InputError(f"out '{values['out']}' is that of line {taken[row.out]} already")
        except InputError as error:
            problems.append((line, str(error)))
            continue
        taken[row.out] = line
        rows.append(row)
    if not rows and not problems:
        raise InputError(f"{path}: holds no pairs under its header")
    return rows, problems


def that_eat_inputs(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """[(line, what is wrong with it)] of the rows whose picture would replace a file that some row reads."""
    read: dict[str, int] = {}
    for row in rows:
        files = (row.source, row.parsing, split_spec(row.pose)[0], row.source_pose)
        read.update((os.path.realpath(file), row.line) for file in files if file and "\0" not in file)
    lines = {row.line: row for row in rows if str(row.out) in read}
    return [
        (line, f"out '{row.out}' is what line {read[str(row.out)]} reads, and would replace it") for line, row in lines.items()
    ]


def png_in(out_dir: pathlib.Path, name: str) -> pathlib.Path:
    """The picture `name` of the folder. Raises InputError."""
    out = place_in(out_dir, name, "out")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"out '{name}' is no file name that ends in .png")
    return out


def _row(
    line: int,
    values: dict[str, str],
    base: pathlib.Path,
    out_dir: pathlib.Path,
    labels: str | None,
    pose_frame: tuple[int, int] | None,
    source_pose_frame: tuple[int, int] | None,
    options: PhotoOptions,
) -> Row:
    empty = [name for name in COLUMNS if not values.get(name)]
    if empty:
        hint = "; write none where there is no map, or auto" if "parsing" in empty else ""
        raise InputError(f"{empty[0]} is empty{hint}")
    out = png_in(out_dir, values["out"])
    in_photo = is_photo_file(values["pose"])
    frames = {"pose_frame": None if in_photo else pose_frame, "source_pose_frame": source_pose_frame}
    for name in frames:
        if values.get(name):
            try:
                frames[name] = parse_size(values[name])
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{name} {error}") from error
    parsing, source_pose, seed = values["parsing"], values.get("source_pose"), values.get("seed")
    if seed and not (seed.isdecimal() and int(seed) < SEEDS):
        raise InputError(f"seed '{seed}' is no whole number from 0 to {SEEDS - 1}")
    return Row(
        line,
        str(base / values["source"]),
        parsing if parsing in ("none", AUTO) else str(base / parsing),
        str(base / values["pose"]),
        label_set(values["labels"]).name if values.get("labels") else labels,
        frames["pose_frame"],
        out,
        str(base / source_pose) if source_pose and source_pose != AUTO else None,
        frames["source_pose_frame"],
        int(seed) if seed else None,
        options,
    )
