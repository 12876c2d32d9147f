"""Canvases to make from files: one of several sources and poses, or a JSONL list of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from input_pipeline.annotations.keypoints import load_pose
from input_pipeline.annotations.photo import one_line, read_photo
from input_pipeline.files import check_form, parse_json, read_text
from input_pipeline.schema import InputError
from truepose_jax.inference.canvas import FittedCanvas, Pose, Source, fit_canvas
from truepose_jax.inference.csv_requests import png_in, short_name
from truepose_jax.inference.pipeline import Run

LINE = {"sources": [{"photo": str, "pose": str}], "poses": [str], "outs": [str]}


@dataclasses.dataclass(frozen=True)
class CanvasRow:
    """A canvas to make: photos with their own poses, poses, and where each pose's picture goes. frames: of poses whose files do
    not say how large their pictures were, as --source-pose-frame and --pose-frame."""

    sources: tuple[tuple[str, str], ...]
    poses: tuple[str, ...]
    outs: tuple[pathlib.Path, ...]
    source_pose_frame: tuple[int, int] | None = None
    pose_frame: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What keys the noise: all sources and poses in order, by their names without folders."""
        photos, poses = ([short_name(x) for x in xs] for xs in ([photo for photo, _ in self.sources], self.poses))
        return f"{' + '.join(photos)} > {' + '.join(poses)}"

    def read(self, run: Run, seed: int, fill: str) -> FittedCanvas:
        """Reads the files and fits them to the model's size. Raises InputError."""
        sources = []
        for photo, file in self.sources:
            own = load_pose(file, frame_hw=self.source_pose_frame)
            sources.append(Source(read_photo(photo), own.joints, own.frame_hw))
        poses = []
        for file in self.poses:
            pose = load_pose(file, frame_hw=self.pose_frame)
            if pose.frame_hw is None:
                raise InputError(f"{file}: the file does not say how large its image was; add --pose-frame=HxW")
            poses.append(Pose(pose.joints, pose.frame_hw))
        return fit_canvas(sources, poses, run, fill=fill, seed=seed, name=self.name)


def canvas_row(
    sources: Sequence[str],
    source_poses: Sequence[str],
    poses: Sequence[str],
    outs: Sequence[str],
    *,
    source_pose_frame: tuple[int, int] | None = None,
    pose_frame: tuple[int, int] | None = None,
) -> CanvasRow:
    """Raises InputError where a photo has no pose of its own, or a pose no file to go to."""
    if len(source_poses) != len(sources):
        raise InputError(
            f"{len(sources)} --source and {len(source_poses)} --source-pose: every photo needs its own pose, in the same order"
        )
    if len(outs) != len(poses):
        raise InputError(f"{len(poses)} --pose and {len(outs)} --out: every pose makes a picture, in the same order")
    pairs = tuple(zip(sources, source_poses, strict=True))
    return CanvasRow(pairs, tuple(poses), tuple(map(pathlib.Path, outs)), source_pose_frame, pose_frame)


def read_canvases(path: str, out_dir: pathlib.Path, **frames: tuple[int, int] | None) -> list[CanvasRow]:
    """A list of canvases, a JSON object a line: {"sources": [{"photo": FILE, "pose": FILE}], "poses": [FILE], "outs": [PNG]};
    sources and poses are relative to the list, outs to out_dir. frames: as canvas_row has them. Raises
    InputError that names the line."""
    folder, rows, taken = pathlib.Path(path).parent, [], set()
    for number, line in enumerate(read_text(path, "a list", advice="give a JSONL file").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            check_form(values, LINE)
            rows.append(_row(values, folder, out_dir, frames))
        except ValueError as error:
            why = f'{one_line(error)}; a line is {{"sources": .., "poses": .., "outs": ..}}'
            raise InputError(f"{path}, line {number}: {why}") from error
        for out in rows[-1].outs:
            if out in taken:
                raise InputError(f"{path}, line {number}: {out} is already another picture's")
            taken.add(out)
    if not rows:
        raise InputError(f"{path}: holds no requests")
    return rows


def _row(values: dict, folder: pathlib.Path, out_dir: pathlib.Path, frames: dict) -> CanvasRow:
    sources = [(str(folder / source["photo"]), str(folder / source["pose"])) for source in values["sources"]]
    outs = [png_in(out_dir, out) for out in values["outs"]]
    poses = [str(folder / pose) for pose in values["poses"]]
    return canvas_row([photo for photo, _ in sources], [pose for _, pose in sources], poses, outs, **frames)
