"""Pictures from a trained model: the person of a photo in another pose. What it is told: truepose_jax/flags/generate.py."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from input_pipeline.annotations.keypoints import split_spec
from input_pipeline.annotations.parsing import label_set
from input_pipeline.files import read_json
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.tables import table_files
from input_pipeline.schema import InputError
from input_pipeline.shards import Shard
from truepose_jax.config import to_dict
from truepose_jax.flags.generate import BATCH, NAMING, SPLIT, make_parser
from truepose_jax.inference.canvas import FittedCanvas
from truepose_jax.inference.canvas_requests import canvas_row, read_canvases
from truepose_jax.inference.csv_requests import COLUMNS, Row, of_seeds, read_rows, that_eat_inputs
from truepose_jax.inference.estimate import estimate
from truepose_jax.inference.found_sheet import found_sheet
from truepose_jax.inference.old_pictures import OLD_FILE, check_ours, is_done, note_old, read_old
from truepose_jax.inference.photo_requests import AUTO, GIVEN, PhotoOptions
from truepose_jax.inference.pipeline import Fitted, Pipeline, Run
from truepose_jax.inference.record_requests import CanvasRow, RecordRow, canvas_rows, pair_list, record_rows
from truepose_jax.runtime.bundled import SHIPPED
from truepose_jax.runtime.choices import FILLS, OUTSIDE, SCENARIOS
from truepose_jax.runtime.cli import BAD_INPUT, enable_compilation_cache, program, reject_unused_flags
from truepose_jax.runtime.files import atomic_write, check_apart, make_folder
from truepose_jax.runtime.reading import batches, readable
from truepose_jax.runtime.shards import shard_of, signals_as_exits
from truepose_jax.sampling.image_grid import save_png, sheet
from truepose_jax.sampling.inpainting import read_edit, sheet_columns
from truepose_jax.sampling.sampler import Sampling
from truepose_jax.training.checkpoint import STOPPED, Preemption

EDIT_FLAGS = ("reference", "edit-mask", "reference-parsing", "reference-labels", "outside")
"""Of style transfer; the first two need one another."""
HINTS = {
    "reference": " (the photo of which --edit-mask is a region)",
    "edit-mask": " (the region of --reference that is made anew)",
    "pose": " (the reference's own pose)",
}
READ_FLAGS = ("source", "parsing", "pose", "source-pose", "reference", "edit-mask", "reference-parsing")
"""Of one picture, the files that are read."""
ONE, CANVAS = "one picture", "several sources or poses"
REPEATED = ("source", "source_pose", "pose", "out")
"""Flags that may be given several times, for a canvas."""
OF_ONE = ("sheet", "source-pose", "show-found", "person", "pose-person")
"""Of one picture alone, beside its inputs."""
FLAGS_USED_BY = {
    "labels": (ONE, "--pairs"),
    "pose-frame": (ONE, "--pairs", CANVAS, "--requests"),
    "source-pose-frame": (ONE, "--pairs", CANVAS, "--requests"),
    "fill": (CANVAS, "--requests"),
    "crop": (ONE, "--pairs"),
    "align-pose": (ONE, "--pairs"),
    "split": ("--records",),
    "naming": ("--records",),
    "scenario": ("--records",),
    "out-dir": ("--pairs", "--records", "--requests"),
    "batch-size": ("--pairs", "--records"),
    "num": (ONE, "--pairs"),
    "shard": ("--pairs", "--records"),
}
"""Which calls read a flag; in others it is an error. What is for one picture alone is refused before."""
MOST = 1000
"""Pictures of one pair."""
Report = Callable[[int, object], None]
"""(line of the CSV, what is wrong with it)."""
SETTINGS_FILE = "generate.json"
"""In --out-dir: what its pictures were made with, so that no two settings mix in one folder."""
PAIRS_FILE = "pairs.csv"
"""There too, of --records: from,to,out of every picture."""


@program
def main(argv: Sequence[str]) -> int | None:
    """Returns the exit code: 2, and one line on stderr, for bad input."""
    flags = make_parser().parse_args(argv)
    enable_compilation_cache()
    if not flags.workdir:
        flags.workdir = str(SHIPPED)
        print(
            f"no --workdir: {SHIPPED.name}, the small model that comes along; it has seen drawn people only", flush=True
        )
    if flags.labels:
        label_set(flags.labels)
    lists = [name for name in ("pairs", "records", "requests") if getattr(flags, name)]
    if len(lists) > 1:
        raise InputError(f"--{lists[0]} and --{lists[1]} are two lists; give one of them")
    several = flags.fill or any(len(getattr(flags, name) or ()) > 1 for name in REPEATED)
    if (several and not lists) or flags.requests:
        generate_canvases(flags)
        return None
    for name in REPEATED:
        setattr(flags, name, (getattr(flags, name) or [None])[0])
    single = {name: getattr(flags, name) for name in COLUMNS}
    many = "pairs" if flags.pairs else "records"
    edit = {name: getattr(flags, name.replace("-", "_")) for name in EDIT_FLAGS}
    if flags.pairs or flags.records:
        others = {name: getattr(flags, name.replace("-", "_")) for name in OF_ONE}
        given = [name for name, value in (single | others | edit).items() if value]
        if given:
            raise InputError(f"--{given[0]} is for one picture and --{many} for a list; give one of them")
        reject_unused_flags(flags, FLAGS_USED_BY, f"--{many}")
        if not flags.out_dir:
            raise InputError(f"--out-dir is missing: name the folder for the pictures of --{many}")
        with signals_as_exits():
            return generate_list(flags, shard_of(flags.shard))
    else:
        reject_unused_flags(flags, FLAGS_USED_BY, ONE)
        if any(edit.values()):
            single = single | {name: edit[name] for name in EDIT_FLAGS[:2]}
        elif (flags.parsing or AUTO) == AUTO and flags.labels:
            raise InputError("--labels is of a map that --parsing names; --parsing=auto knows its own")
        missing = [name for name, value in single.items() if not value and name != "parsing"]
        if missing:
            hint = HINTS.get(missing[0], "") if any(edit.values()) else ""
            raise InputError(f"--{missing[0]} is missing{hint}; see --help")
        generate_one(flags)
    return None


def _sampling(run: Run, flags: argparse.Namespace) -> Sampling:
    if flags.num is not None and not 1 <= flags.num <= MOST:
        raise InputError(f"--num is {flags.num}; it must be from 1 to {MOST}")
    return run.sampling(flags.steps, flags.guidance, flags.sampler, flags.guidance_interval)


def generate_one(flags: argparse.Namespace) -> None:
    """One pair's pictures, and their sheet. Everything is checked before the weights are read."""
    run = Run.open(flags.workdir, weights=flags.weights, step=flags.step)
    if flags.labels and not run.needs.tokens:
        raise InputError(f"--labels={flags.labels} is unheeded: the method of {run.workdir} reads no parsing map")
    sampling = _sampling(run, flags)
    own = flags.source_pose, flags.source_pose_frame
    parsing, out = flags.parsing or (AUTO if run.needs.tokens else "none"), pathlib.Path(flags.out)
    pair = Row(
        0, flags.source, parsing, flags.pose, flags.labels, flags.pose_frame, out, *own, options=photo_options(flags)
    )
    rows = of_seeds(pair, flags.seed, flags.num or 1)
    outputs = {f"--out={row.out}": row.out for row in rows}
    outputs |= {f"--{n}": p for n, p in (("sheet", flags.sheet), ("show-found", flags.show_found)) if p}
    read = {f"--{name}": getattr(flags, name.replace("-", "_")) for name in READ_FLAGS}
    check_apart(outputs, {name: split_spec(path)[0] for name, path in read.items() if path})
    for path in outputs.values():
        _check_new_png(path, flags.overwrite)
    edit = None
    if flags.reference:
        labels, outside = flags.reference_labels or flags.labels, flags.outside or OUTSIDE[0]
        parsing = flags.reference_parsing
        edit = read_edit(flags.reference, flags.edit_mask, parsing=parsing, labels=labels, outside=outside)
    resolved = pair.resolve(run, flags.seed, edit)
    for path, seen in ((flags.source, resolved.source), (flags.pose, resolved.pose)):
        if seen.about != GIVEN:
            print(f"{path}: {seen.about}", flush=True)
    if flags.show_found:
        save_png(found_sheet([resolved.source, resolved.pose]), pathlib.Path(flags.show_found))
    fitted = run.fit(resolved.request)
    every = [dataclasses.replace(fitted, seed=row.seed) for row in rows]
    size = min(len(every), BATCH)
    if flags.estimate:
        return _print_estimate(run, sampling, flags, len(every), size)
    pipeline = Pipeline.of_run(run, vae=flags.vae, clip=flags.clip, dtype=flags.dtype)
    print(describe(run, sampling, flags.seed), flush=True)
    start = time.perf_counter()
    with tqdm.tqdm(unit="step", leave=False, disable=None) as bar:  # on a terminal alone

        def progress(done: int, steps: int) -> None:
            bar.total = steps
            bar.update(done - bar.n)

        pictures = pipeline.sample(every, sampling=sampling, batch_size=size, callback=progress)
    finished = [fitted.finish(picture) for picture in pictures]
    for picture, row in zip(finished, rows, strict=True):
        save_png(picture, row.out)
    if flags.sheet:
        shown = {"source": fitted.source.image, "pose": fitted.skeleton}
        columns = {name: [fitted.framing.crop(image)] for name, image in shown.items()}
        if fitted.edit:
            sheets = [sheet_columns(fitted.source.image, fitted.skeleton, fitted.edit, picture) for picture in pictures]
            columns = {title: [each[title][0] for each in sheets] for title in sheets[0]}
        else:
            columns = {title: cells * len(pictures) for title, cells in columns.items()}
            carried = {"carried": pipeline.carried(every, pictures)} if pipeline.method.carries else {}
            columns |= carried | {"generated": pictures}
        save_png(sheet(columns), pathlib.Path(flags.sheet))
    (h, w), seconds = finished[0].shape[:2], time.perf_counter() - start
    made = flags.out if len(rows) == 1 else f"{rows[0].out} to {rows[-1].out.name}"
    print(f"{made}: {h}x{w}, {seconds:.1f} s with compilation", flush=True)


def photo_options(flags: argparse.Namespace) -> PhotoOptions:
    """How the flags say that photos are read."""
    crop = {None: None, "person": True, "none": False}[flags.crop]
    person, pose_person = (1 if number is None else number for number in (flags.person, flags.pose_person))
    return PhotoOptions(person, pose_person, crop, bool(flags.align_pose))


def generate_canvases(flags: argparse.Namespace) -> None:
    """The pictures of one canvas of several sources or poses, or of a list of canvases; those that are there are left as they
    are. Everything that can be is checked before the weights are read."""
    mode = "--requests" if flags.requests else CANVAS
    reject_unused_flags(flags, FLAGS_USED_BY, mode)
    of_one = [name for name in (*OF_ONE, *EDIT_FLAGS) if name not in ("sheet", "source-pose")]
    alone = {"parsing": flags.parsing, **{name: getattr(flags, name.replace("-", "_")) for name in of_one}}
    given = [name for name, value in alone.items() if value]
    if flags.requests:
        given += [name.replace("_", "-") for name in (*REPEATED, "sheet") if getattr(flags, name)]
    if given:
        raise InputError(f"--{given[0]} means nothing to {mode}")
    run = Run.open(flags.workdir, weights=flags.weights, step=flags.step)
    sampling = _sampling(run, flags)
    frames = {"source_pose_frame": flags.source_pose_frame, "pose_frame": flags.pose_frame}
    if flags.requests:
        if not flags.out_dir:
            raise InputError("--out-dir is missing: name the folder for the pictures of --requests")
        rows = read_canvases(flags.requests, pathlib.Path(flags.out_dir), **frames)
        done = [] if flags.overwrite else [row for row in rows if all(out.exists() for out in row.outs)]
        todo = [row for row in rows if row not in done]
    else:
        lists = [getattr(flags, name) or [] for name in REPEATED]
        todo = [canvas_row(*lists, **frames)]
        for path in (*todo[0].outs, *([flags.sheet] if flags.sheet else [])):
            _check_new_png(path, flags.overwrite)
    fill = flags.fill or FILLS[0]
    fitted = [row.read(run, flags.seed, fill) for row in todo]
    pipeline = Pipeline.of_run(run, vae=flags.vae, clip=flags.clip) if todo else None
    print(describe(run, sampling, flags.seed), flush=True)
    for row, canvas in zip(tqdm.tqdm(todo, unit="canvas", disable=len(todo) < 2), fitted, strict=True):
        (pictures,) = pipeline.sample_canvases([canvas], sampling=sampling)
        for picture, out in zip(pictures, row.outs, strict=True):
            save_png(picture, out)
        if flags.sheet:
            shown = {f"source {i + 1}": [canvas.tiles[i].image] for i in range(len(row.sources))}
            poses = {f"pose {i + 1}": [canvas.skeleton(tile)] for i, tile in enumerate(canvas.wanted)}
            made = {f"picture {i + 1}": [picture] for i, picture in enumerate(pictures)}
            cells = {name: [canvas.framing.crop(cell) for cell in column] for name, column in (shown | poses).items()}
            save_png(sheet(cells | made), pathlib.Path(flags.sheet))
    print(f"{sum(len(row.outs) for row in todo)} pictures of {len(todo)} canvases", flush=True)


def describe(run: Run, sampling: Sampling, seed: int) -> str:
    """One line that says what the pictures are made with."""
    return f"{run.workdir}: step {run.step}, {run.weights} weights; {sampling}, seed {seed}"


def _print_estimate(run: Run, sampling: Sampling, flags: argparse.Namespace, pictures: int, batch: int) -> None:
    print(describe(run, sampling, flags.seed), flush=True)
    found = estimate(run, sampling, batch=batch, dtype=flags.dtype)
    print(found.report(pictures=pictures, batch=batch), flush=True)


AnyRow = Row | RecordRow | CanvasRow


def _check_new_png(path: str | pathlib.Path, overwrite: bool) -> None:
    """May a picture be written there? Raises InputError."""
    path = pathlib.Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path}: is there already; give another name" + ("" if path.is_dir() else ", or --overwrite"))
    make_folder(path.parent)


def generate_list(flags: argparse.Namespace, share: Shard) -> int:
    """This part of the pictures of a list that are not there yet; the exit code: 0, STOPPED, or BAD_INPUT at the end where rows
    failed, which are reported and left out. A merging call looks whether all are there.

    Every process holds all parameters on its own devices and samples alone: a picture needs nothing of another one.
    """
    batch_size = BATCH if flags.batch_size is None else flags.batch_size
    num = flags.num or 1
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; it must be 1 or more")
    run = Run.open(flags.workdir, weights=flags.weights, step=flags.step)
    sampling = _sampling(run, flags)
    out_dir = pathlib.Path(flags.out_dir)
    settings = settings_of(run, sampling, flags)
    if flags.records:
        images = RecordImages(flags.records, flags.split or SPLIT)
        source, problems = str(images.root / table_files(images.split)[1]), []
        rows = listed = record_rows(images, out_dir, flags.naming or NAMING)
        settings |= {"records": images.digest, "split": images.split}
        if run.needs.draw == "canvas":
            scenario = flags.scenario or SCENARIOS[0]
            rows, repeated = canvas_rows(listed, scenario)
            settings |= {"scenario": scenario, "repeated_sources": repeated}
        elif flags.scenario:
            raise InputError(
                f"--scenario={flags.scenario} is of methods that make canvases; {run.workdir} is of {run.config.model.method}"
            )
    else:
        source = flags.pairs
        frames = {"pose_frame": flags.pose_frame, "source_pose_frame": flags.source_pose_frame}
        frames["options"], needed = photo_options(flags), run.needs.source_pose
        listed, problems = read_rows(flags.pairs, out_dir, labels=flags.labels, **frames, source_poses=needed)
        rows = [row for pair in listed for row in of_seeds(pair, flags.seed, num)]
        eating = that_eat_inputs(rows)
        problems += eating
        rows = [row for row in rows if row.line not in dict(eating)]
    outs = [out for row in rows for out in row.outs]
    if not flags.overwrite:
        check_settings(out_dir, settings)
        check_ours(out_dir, out_dir / SETTINGS_FILE, outs)
    elif not share.finishes or share.merge:
        raise InputError("--overwrite is for one process; several parts need another --out-dir, or an empty one")
    make_folder(out_dir)
    anew = flags.overwrite and flags.estimate  # then nothing is noted
    if flags.overwrite and not anew:
        note_old(out_dir, outs)
    old = read_old(out_dir)
    mine = share.mine(rows)
    todo = [row for row in mine if anew or not all(is_done(out, old) for out in row.outs)]
    ours = [out for row in (rows if share.merge else mine) for out in row.outs]
    left = sum(anew or not is_done(out, old) for out in ours)
    pairs = len(outs) // num
    count = pairs + len(problems)
    if not flags.estimate:
        print(describe(run, sampling, flags.seed), flush=True)
    part = "" if share.finishes else f", {len(ours)} pictures of {share}"
    many = f", {num} pictures each, {len(ours) - left}" if num > 1 else f", {len(ours) - left} of them"
    print(f"{source}: {pairs} pairs{part}{many} done before", flush=True)
    failed = []

    def report(line: int, why: object) -> None:
        if line in failed:  # as the same pair's first seed
            return
        failed.append(line)
        tqdm.tqdm.write(f"error: {source}, line {line}: {why}", file=sys.stderr)

    for line, why in problems if share.first else ():
        report(line, why)
    # Not of what is left or this part's: one size, so one program and the same bits, however the work is cut.
    size = min(batch_size, max(len(rows), 1))
    if flags.estimate:
        _print_estimate(run, sampling, flags, left, size)
        return BAD_INPUT if failed else 0
    stopped = False
    if todo:
        pipeline = Pipeline.of_run(run, vae=flags.vae, clip=flags.clip, dtype=flags.dtype)
        with atomic_write(out_dir / SETTINGS_FILE) as partial:
            partial.write_text(json.dumps(settings, indent=1) + "\n")
        if flags.records:
            with atomic_write(out_dir / PAIRS_FILE) as partial:
                partial.write_text(pair_list(listed, out_dir))
        made = len(ours) - sum(len(row.outs) for row in todo)
        bar = tqdm.tqdm(total=len(ours), initial=made, unit="image", smoothing=0.1, disable=not share.first)
        compiled = False  # Until the first batch is sampled there is nothing to save.
        with bar, Preemption(safe_to_exit=lambda: not compiled) as preemption:
            for batch in _batches(todo, run, flags.seed, size, report):
                fitted = [fitted for _, fitted in batch]
                if isinstance(fitted[0], FittedCanvas):
                    pictures = pipeline.sample_canvases(fitted, sampling=sampling, batch_size=size)
                else:
                    sampled = pipeline.sample(fitted, sampling=sampling, batch_size=size)
                    pictures = [[one.finish(picture)] for one, picture in zip(fitted, sampled, strict=True)]
                compiled = True
                for (row, _), several in zip(batch, pictures, strict=True):
                    for picture, out in zip(several, row.outs, strict=True):
                        save_png(picture, out)
                    made += len(several)
                    bar.update(len(several))
                stopped = preemption.stop(made)
                if stopped:
                    break
    pictures = sum(is_done(out, old) for out in ours)
    if share.merge and not problems:
        share.require(len(ours) - pictures, len(ours), "pictures")
    if share.finishes and pictures == len(outs):
        (out_dir / OLD_FILE).unlink(missing_ok=True)
    if stopped:
        print(f"asked to stop: {pictures} of {len(ours)} pictures done; run the same command again to go on")
    elif share.finishes:
        print(f"{out_dir}: {pictures} pictures of {count} pairs", flush=True)
    else:
        print(f"{out_dir}: {pictures} pictures of {len(ours)}; {share} is done", flush=True)
    if failed and not stopped:
        failed = sorted(failed)
        lines = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
        print(f"error: {source}: {len(failed)} of {count} rows failed (lines {lines})", file=sys.stderr)
    return STOPPED if stopped else BAD_INPUT if failed else 0


def _batches(
    rows: Sequence[AnyRow], run: Run, seed: int, size: int, report: Report
) -> Iterator[list[tuple[AnyRow, Fitted | FittedCanvas]]]:
    """Batches of `size` readable rows, in order; the last may be smaller. Reads one batch ahead."""

    def unreadable(row: AnyRow, error: InputError) -> None:
        report(row.line, error)

    return batches(readable(lambda row: row.read(run, seed), rows, ahead=2 * size, unreadable=unreadable), size)


def settings_of(run: Run, sampling: Sampling, flags: argparse.Namespace) -> dict[str, Any]:
    """What a picture depends on besides its row."""
    config = json.dumps(to_dict(run.config), sort_keys=True)
    return {
        "config": hashlib.sha256(config.encode()).hexdigest()[:16],
        "step": run.step,
        "weights": run.weights,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "sampler": sampling.sampler,
        "guidance_interval": list(sampling.guidance_interval),
        "dtype": flags.dtype,
        "seed": flags.seed,
        "vae": flags.vae,
        "clip": flags.clip,
        "crop": flags.crop,
        "align_pose": flags.align_pose,
    }


def check_settings(out_dir: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises InputError where the folder's pictures were made with other settings."""
    path = out_dir / SETTINGS_FILE
    if not path.exists():
        return
    was = read_json(path, what="the settings of pictures", advice="take another --out-dir, or --overwrite")
    for name, value in settings.items():
        if was.get(name) != value:
            raise InputError(
                f"{out_dir} holds pictures made with other settings: {name} was {was.get(name)} and is {value}; "
                "give the same, another --out-dir, or --overwrite"
            )


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)  # absl has put a handler of its own there
    sys.exit(main())
