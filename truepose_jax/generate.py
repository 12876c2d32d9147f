"""Pictures from a trained model: the person of a photo in another pose.

    python -m truepose_jax.generate --workdir=DIR --source=PHOTO --parsing=MAP.png --labels=atr18 --pose=FILE --out=OUT.png
    python -m truepose_jax.generate --workdir=DIR --pairs=LIST.csv --out-dir=D
    python -m truepose_jax.generate --workdir=DIR --records=RECORDS --split=test --out-dir=D

--pose: OpenPose JSON (18 or 25 joints), COCO-17 JSON, 18 rows of text, or annotations.csv#image-name. --parsing=none:
all of the photo is person. LIST.csv has columns source,parsing,pose,out and may have labels,pose_frame; its paths are
relative to it, `out` (a .png) to D. --records makes all pairs of a split of what `prepare build` wrote, as
SOURCE_to_TARGET.png (or as --naming says), with D/pairs.csv for `evaluate --pairs`. Rows that are done are skipped: run
the same command again after a kill. SIGTERM or Ctrl-C: the batch under way is finished and written, then it ends with 143.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from input_pipeline.keypoints import canonical_name, load_pose
from input_pipeline.parsing import LABEL_SETS, label_set, read_parsing
from input_pipeline.photo import one_line, read_photo
from input_pipeline.records import RecordImages
from input_pipeline.schema import InputError
from truepose_jax.checkpoint import STOPPED, Preemption
from truepose_jax.pictures import sheet
from truepose_jax.pipeline import WEIGHTS, Fitted, Pipeline, Request, Run, fit_request
from truepose_jax.programs import Parser, keep_programs, parse_size, run_program
from truepose_jax.record_rows import NAMINGS, RecordRow, pair_list, record_rows
from truepose_jax.schema import to_dict

COLUMNS = ("source", "parsing", "pose", "out")
OPTIONAL_COLUMNS = ("labels", "pose_frame")
READERS = 4
"""Threads that read and fit the photos of the next batches while one is sampled."""
Report = Callable[[int, object], None]
"""(line of the CSV, what is wrong with it)."""
SETTINGS_FILE = "generate.json"
"""In --out-dir: what its pictures were made with, so that no two settings mix in one folder."""
PAIRS_FILE = "pairs.csv"
"""There too, of --records: from,to,out of every picture."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2, and one line on stderr, for bad input."""
    return run_program(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int | None:
    flags = make_parser().parse_args(argv)
    keep_programs()
    if flags.labels:
        label_set(flags.labels)
    single = {name: getattr(flags, name) for name in COLUMNS}
    many = "pairs" if flags.pairs else "records"
    if flags.pairs and flags.records:
        raise InputError("--pairs and --records are two lists; give one of them")
    if flags.pairs or flags.records:
        given = [name for name, value in (single | {"sheet": flags.sheet}).items() if value]
        if given:
            raise InputError(f"--{given[0]} is for one picture and --{many} for a list; give one of them")
        if not flags.out_dir:
            raise InputError(f"--out-dir is missing: name the folder for the pictures of --{many}")
        return generate_list(flags)
    else:
        missing = [name for name, value in single.items() if not value]
        if missing:
            hint = " (none where there is no map)" if missing[0] == "parsing" else ""
            raise InputError(f"--{missing[0]} is missing{hint}; see --help")
        generate_one(flags)
    return None


def make_parser() -> argparse.ArgumentParser:
    usage, details = __doc__.split("\n\n", 1)
    parser = Parser(
        prog="python -m truepose_jax.generate",
        description=usage,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the run: its last checkpoint is read, it may still be training")
    add("--source", metavar="PHOTO", help="photo of the person")
    add("--parsing", metavar="MAP", help="its parsing map, a PNG of label ids; or none")
    add("--labels", help=f"label set of the map: {', '.join(LABEL_SETS)}")
    add("--pose", metavar="FILE", help="the pose to draw the person in")
    add("--pose-frame", type=parse_size, metavar="HxW", help="size of the picture the pose was found in")
    add("--out", metavar="PNG", help="the picture")
    add("--sheet", metavar="PNG", help="also draw source, skeleton and picture side by side")
    add("--pairs", metavar="CSV", help="a list in place of one picture")
    add("--records", metavar="DIR", help="all pairs of records in place of one picture")
    add("--split", default="test", help="of --records (test)")
    add("--naming", choices=tuple(NAMINGS), default="cfld", help="of the pictures of --records (cfld)")
    add("--out-dir", metavar="D", help="folder for the pictures of --pairs or --records")
    add("--batch-size", type=int, default=8, help="of a list (8); no picture depends on it")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--steps", type=int, help="DDIM steps (the run's)")
    add("--guidance", type=float, help="classifier-free guidance, 1: none (the run's)")
    add("--seed", type=int, default=0, help="of the noise, which also depends on the pair's names (0)")
    add("--weights", choices=tuple(WEIGHTS), help="ema where the run keeps one, else raw")
    add("--step", type=int, help="checkpoint (the last)")
    add("--vae", metavar="DIR", help="folder of the autoencoder, in place of the config's")
    add("--clip", metavar="DIR", help="folder of CLIP, in place of the config's")
    return parser


def generate_one(flags: argparse.Namespace) -> None:
    """One picture, and its sheet. Everything is checked before the weights are read."""
    run = Run.open(flags.workdir, weights=flags.weights, step=flags.step)
    steps, guidance = run.sampling(flags.steps, flags.guidance)
    places = [_new_png(path, flags.overwrite) for path in (flags.out, flags.sheet) if path]
    row = Row(0, flags.source, flags.parsing, flags.pose, flags.labels, flags.pose_frame, places[0])
    fitted = row.read(run, flags.seed)
    pipeline = Pipeline.of_run(run, vae=flags.vae, clip=flags.clip)
    print(describe(run, steps, guidance, flags.seed), flush=True)
    start = time.perf_counter()
    (picture,) = pipeline.sample([fitted], steps=steps, guidance=guidance)
    save_png(picture, places[0])
    if flags.sheet:
        shown = {"source": fitted.source.image, "pose": fitted.skeleton}
        columns = {name: [fitted.framing.crop(image)] for name, image in shown.items()}
        save_png(sheet(columns | {"generated": [picture]}), places[1])
    h, w = picture.shape[:2]
    print(f"{flags.out}: {h}x{w}, {time.perf_counter() - start:.1f} s with compilation", flush=True)


def describe(run: Run, steps: int, guidance: float, seed: int) -> str:
    """One line that says what the pictures are made with."""
    sampling = f"{steps} DDIM steps, guidance {guidance:g}, seed {seed}"
    return f"{run.workdir}: step {run.step}, {run.weights} weights; {sampling}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture to make: the files, as FILE or FILE#NAME, and where it goes. line: in the CSV."""

    line: int
    source: str
    parsing: str
    pose: str
    labels: str | None
    pose_frame: tuple[int, int] | None
    out: pathlib.Path

    @property
    def name(self) -> str:
        """What keys the noise: photo and pose by their names without folders, so that it does not matter where they
        lie; DeepFashion's photos, whose file names repeat, by the canonical name."""
        return f"{_short_name(self.source)} > {_short_name(self.pose)}"

    def read(self, run: Run, seed: int) -> Fitted:
        """Reads the files and fits them to the model's size. Raises InputError."""
        photo = read_photo(self.source)
        if self.parsing == "none":
            parsing, labels = None, "whole"
        elif not self.labels:
            raise InputError(f"{self.parsing}: say whose labels these are by --labels={'|'.join(LABEL_SETS)}")
        else:
            labels = self.labels
            parsing = read_parsing(self.parsing, label_set(labels), photo.shape[:2])
        pose = load_pose(self.pose, frame_hw=self.pose_frame)
        if pose.frame_hw is None:
            raise InputError(f"{self.pose}: the file does not say how large its image was; add --pose-frame=HxW")
        request = Request(photo, pose.joints, parsing, labels, pose.frame_hw, self.name, seed)
        return fit_request(request, run.config.model.size)


AnyRow = Row | RecordRow


def _short_name(spec: str) -> str:
    file, _, member = spec.partition("#")
    name = canonical_name(member or file)
    return name if name.startswith(("WOMEN/", "MEN/")) else pathlib.PurePosixPath(name).name


def _new_png(path: str | pathlib.Path, overwrite: bool) -> pathlib.Path:
    """The path, after checking that a picture may be written there. Raises InputError."""
    path = pathlib.Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path}: is there already; give another name" + ("" if path.is_dir() else ", or --overwrite"))
    _make_folder(path.parent)
    return path


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot make this folder ({error.strerror}); choose another") from error


def save_png(picture: np.ndarray, path: pathlib.Path) -> None:
    """uint8 [h w 3]; the file appears when it is whole. Raises InputError where it cannot be written."""
    _write_whole(path, lambda partial: Image.fromarray(picture).save(partial, format="PNG"))


def _write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _make_folder(path.parent)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({one_line(error)}); free space there, or see its permissions"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def generate_list(flags: argparse.Namespace) -> int:
    """The pictures of a list that are not there yet; the exit code (0, or STOPPED). Rows that fail are reported and left
    out; raises InputError at the end where there were any."""
    if flags.batch_size < 1:
        raise InputError(f"--batch-size is {flags.batch_size}; it must be 1 or more")
    run = Run.open(flags.workdir, weights=flags.weights, step=flags.step)
    steps, guidance = run.sampling(flags.steps, flags.guidance)
    out_dir = pathlib.Path(flags.out_dir)
    settings = settings_of(run, steps, guidance, flags)
    if flags.records:
        images = RecordImages(flags.records, flags.split)
        source, problems = str(images.root / f"pairs-{flags.split}.csv"), []
        rows = record_rows(images, out_dir, flags.naming)
        settings |= {"records": images.digest, "split": flags.split}
    else:
        source = flags.pairs
        rows, problems = read_rows(flags.pairs, out_dir, labels=flags.labels, pose_frame=flags.pose_frame)
    if not flags.overwrite:
        check_settings(out_dir, settings)
    todo = rows if flags.overwrite else [row for row in rows if not row.out.exists()]
    print(describe(run, steps, guidance, flags.seed), flush=True)
    print(f"{source}: {len(rows)} pairs, {len(rows) - len(todo)} of them done before", flush=True)
    failed = []

    def report(line: int, why: object) -> None:
        failed.append(line)
        tqdm.tqdm.write(f"error: {source}, line {line}: {why}", file=sys.stderr)

    for line, why in problems:
        report(line, why)
    if todo:
        pipeline = Pipeline.of_run(run, vae=flags.vae, clip=flags.clip)
        # Old pictures go first: a kill must not leave some that a second start takes for new ones.
        for row in todo:
            row.out.unlink(missing_ok=True)
        text = json.dumps(settings, indent=1) + "\n"
        _write_whole(out_dir / SETTINGS_FILE, lambda partial: partial.write_text(text))
        if flags.records:
            _write_whole(out_dir / PAIRS_FILE, lambda partial: partial.write_text(pair_list(rows, out_dir)))
        size = min(flags.batch_size, len(todo))
        bar = tqdm.tqdm(total=len(rows), initial=len(rows) - len(todo), unit="image", smoothing=0.1)
        compiled = False  # Until the first batch is sampled there is nothing to save.
        with bar, Preemption(may_leave=lambda: not compiled) as preemption:
            for batch in _batches(todo, run, flags.seed, size, report):
                fitted = [fitted for _, fitted in batch]
                pictures = pipeline.sample(fitted, steps=steps, guidance=guidance, batch_size=size)
                compiled = True
                for (row, _), picture in zip(batch, pictures, strict=True):
                    save_png(picture, row.out)
                bar.update(len(batch))
                if preemption.stop(bar.n):
                    print(f"asked to stop: {bar.n} of {len(rows)} pairs done; run the same command again to go on")
                    return STOPPED
    count = len(rows) + len(problems)
    print(f"{out_dir}: {sum(row.out.exists() for row in rows)} pictures of {count} pairs", flush=True)
    if failed:
        lines = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
        raise InputError(f"{source}: {len(failed)} of {count} rows failed (lines {lines})")
    return 0


def _batches(
    rows: Sequence[AnyRow], run: Run, seed: int, size: int, report: Report
) -> Iterator[list[tuple[AnyRow, Fitted]]]:
    """Batches of `size` readable rows, in order; the last may be smaller. Reads one batch ahead."""
    batch, later = [], iter(rows)
    with ThreadPoolExecutor(READERS) as pool:

        def reading(count: int) -> list[tuple[AnyRow, Future[Fitted]]]:
            return [(row, pool.submit(row.read, run, seed)) for row in itertools.islice(later, count)]

        waiting = collections.deque(reading(2 * size))
        while waiting:
            row, found = waiting.popleft()
            waiting.extend(reading(1))
            try:
                batch.append((row, found.result()))
            except InputError as error:
                report(row.line, error)
            if len(batch) == size or (batch and not waiting):
                yield batch
                batch = []


def read_rows(
    path: str, out_dir: pathlib.Path, *, labels: str | None, pose_frame: tuple[int, int] | None
) -> tuple[list[Row], list[tuple[int, str]]]:
    """(rows, [(line, what is wrong with it)]) of a list; labels and pose_frame serve rows without their own.

    Raises InputError where the file cannot be read, lacks columns or holds no pairs.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read the list ({one_line(error)}); give a CSV") from error
    header = [cell.lower() for cell in lines[0][1]] if lines else []
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError(f"{path}: lacks columns {', '.join(missing)}; its first line must be {','.join(COLUMNS)}")
    unknown = [name for name in header if name and name not in COLUMNS + OPTIONAL_COLUMNS]
    if unknown:
        logging.warning("%s: columns %s mean nothing here", path, ", ".join(unknown))
    rows, problems, taken = [], [], {}
    for line, cells in lines[1:]:
        if not any(cells):
            continue
        values = dict(zip(header, cells, strict=False))
        try:
            row = _row(line, values, pathlib.Path(path).parent, out_dir, labels, pose_frame)
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


def _row(
    line: int,
    values: dict[str, str],
    base: pathlib.Path,
    out_dir: pathlib.Path,
    labels: str | None,
    pose_frame: tuple[int, int] | None,
) -> Row:
    empty = [name for name in COLUMNS if not values.get(name)]
    if empty:
        raise InputError(f"{empty[0]} is empty" + ("; write none where there is no map" if "parsing" in empty else ""))
    out = (out_dir / values["out"]).resolve()
    if not out.is_relative_to(out_dir.resolve()):
        raise InputError(f"out '{values['out']}' leaves the folder {out_dir}")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"out '{values['out']}' is no file name that ends in .png")
    if values.get("pose_frame"):
        try:
            pose_frame = parse_size(values["pose_frame"])
        except argparse.ArgumentTypeError as error:
            raise InputError(f"pose_frame {error}") from error
    parsing = values["parsing"]
    return Row(
        line,
        str(base / values["source"]),
        parsing if parsing == "none" else str(base / parsing),
        str(base / values["pose"]),
        label_set(values["labels"]).name if values.get("labels") else labels,
        pose_frame,
        out,
    )


def settings_of(run: Run, steps: int, guidance: float, flags: argparse.Namespace) -> dict[str, Any]:
    """What a picture depends on besides its row."""
    config = json.dumps(to_dict(run.config), sort_keys=True)
    return {
        "config": hashlib.sha256(config.encode()).hexdigest()[:16],
        "step": run.step,
        "weights": run.weights,
        "steps": steps,
        "guidance": guidance,
        "seed": flags.seed,
        "vae": flags.vae,
        "clip": flags.clip,
    }


def check_settings(out_dir: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises InputError where the folder's pictures were made with other settings."""
    path = out_dir / SETTINGS_FILE
    try:
        was = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); take another --out-dir, or --overwrite"
        ) from error
    for name, value in settings.items():
        if was.get(name) != value:
            raise InputError(
                f"{out_dir} holds pictures made with other settings: {name} was {was.get(name)} and is {value}; "
                "give the same, another --out-dir, or --overwrite"
            )


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)  # absl has put a handler of its own there
    sys.exit(main())
