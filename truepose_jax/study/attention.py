"""`study attention` (TruePose Fig. 2): attention on head, clothes and the rest of the source, from parsing maps.

Measured is attention per share of the picture (regions.densities): 1 means that a region gets what its size would give it by
chance. Of TruePose: the source attention before and after the reweighting, per layer (it has no timestep: SourceNet runs once,
at t = 0), and TargetNet's attention on the source, per layer and sampling step (ours.py). Of CLIP and DINOv2, where their
folders are given: the last layer's [CLS] attention (baselines.py). Where the weights are as they were made, charts and files
say UNTRAINED.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import tqdm
from PIL import Image

from input_pipeline.annotations.parsing import LabelSet, label_set
from input_pipeline.schema import MAX_CLASSES, InputError
from truepose_jax.inference.pipeline import Fitted, Run
from truepose_jax.models.masks import coverage_levels
from truepose_jax.runtime import plots
from truepose_jax.runtime.choices import SYNTHETIC
from truepose_jax.runtime.cli import enable_compilation_cache, reject_unused_flags
from truepose_jax.runtime.markdown import narrow
from truepose_jax.study import drawing, model, overlays, table
from truepose_jax.study.baselines import NAMES, Baseline, load_baseline
from truepose_jax.study.flags import SPLIT
from truepose_jax.study.ours import Seen, Watcher, join
from truepose_jax.study.regions import REGIONS, densities, grid_coverage, membership, region_classes
from truepose_jax.study.report import report
from truepose_jax.study.samples import Sample, are_records, read_samples
from truepose_jax.study.table import LAST, MAPS, MEAN, OURS, Row

JSON_FILE = "attention.json"
UNTRAINED = "UNTRAINED"
OF_MODEL = {"size": ("--weights",), "kind": ("--workdir",), "step": ("--workdir",)}
PHOTOS, RECORDS = "--data=PHOTOS", "--data=RECORDS"
OF_DATA = {"labels": (PHOTOS,), "keypoints": (PHOTOS,), "pose-frame": (PHOTOS,), "split": (RECORDS,)}


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that the files are made of. baselines: {name: [photos cells]} beside their encoders."""

    samples: Sequence[Sample]
    fitted: Sequence[Fitted]
    labels: LabelSet
    seen: Seen
    coverage: dict[str, np.ndarray]
    grids: dict[str, tuple[int, int]]
    encoders: Sequence[Baseline]
    masses: dict[str, list[np.ndarray]]


def study_attention(flags: argparse.Namespace) -> None:
    """Reads, measures, writes. Everything given is checked before the weights are read."""
    plots.need_matplotlib()
    out = _folder(flags.out, flags.overwrite)
    reject_unused_flags(flags, OF_MODEL, "--workdir" if flags.workdir else "--weights")
    kind = SYNTHETIC if flags.data == SYNTHETIC else RECORDS if are_records(flags.data) else PHOTOS
    reject_unused_flags(flags, OF_DATA, kind, title=f"--data={flags.data}")
    if flags.labels:
        membership(label_set(flags.labels))
    if flags.batch_size < 1:
        raise InputError(f"--batch-size is {flags.batch_size}; it must be 1 or more")
    if flags.workdir:
        run = Run.open(flags.workdir, weights=flags.kind, step=flags.step)
        config = run.config
    else:
        config = model.config_of_weights(flags.weights, flags.size)
        run = Run(flags.weights, config, None, 0, "raw")
    sampling = run.sampling(flags.steps, flags.guidance, "ddim")
    steps, guidance = sampling.steps, sampling.guidance
    samples, labels = read_samples(
        flags.data, config, flags.count,
        labels=flags.labels, split=flags.split or SPLIT, keypoints=flags.keypoints, pose_frame=flags.pose_frame,
    )  # fmt: skip
    membership(labels)
    fitted = [run.fit(sample.request(labels, flags.seed, own=config.model.carry.head)) for sample in samples]
    encoders = [load_baseline(name, getattr(flags, name)) for name in NAMES if getattr(flags, name)]
    enable_compilation_cache()
    studied = model.of_run(run) if flags.workdir else model.of_weights(config)
    print(
        f"{studied.name}: {len(samples)} photos of {flags.data}, {steps} DDIM steps, guidance {guidance:g}", flush=True
    )
    watcher = Watcher(studied.pipeline, steps=steps, guidance=guidance)
    measured = measure(watcher, samples, fitted, labels, encoders, flags.batch_size)
    rows = rows_of(measured)
    untrained = {OURS: studied.untrained} | {e.name: _never_trained(e) for e in encoders}
    about = {
        "model": studied.name,
        "title": studied.title,
        "untrained": {name: why for name, why in untrained.items() if why},
        "data": flags.data,
        "photos": len(samples),
        "size": list(config.model.size),
        "labels": labels.name,
        "regions": region_classes(labels),
        "mean_share_of_picture": _mean_shares(measured),
        "sampling": {"steps": steps, "guidance": guidance, "seed": flags.seed},
        "fusion": dataclasses.asdict(config.model.fusion),
        "baselines": {
            e.name: {"folder": e.folder, "sha256": e.sha256, "input": e.side, "patch": e.patch} for e in encoders
        },
        "command": "python -m truepose_jax.study " + " ".join(sys.argv[1:]),
    }
    write(out, measured, rows, about, shown=flags.shown)
    print(f"{out}: report.md, {JSON_FILE}, attention.csv and charts", flush=True)


def measure(
    watcher: Watcher,
    samples: Sequence[Sample],
    fitted: Sequence[Fitted],
    labels: LabelSet,
    encoders: Sequence[Baseline],
    batch_size: int,
) -> Measured:
    """Runs the model and the encoders over all photos."""
    pipeline = watcher.pipeline
    config = pipeline.run.config
    parts, size = [], min(batch_size, len(fitted))
    with tqdm.tqdm(total=len(fitted), unit="photo", smoothing=0.1) as bar:
        for start in range(0, len(fitted), size):
            piece = fitted[start : start + size]
            batch, keys = pipeline.batch_of(piece, size)
            parts.append(watcher.watch(batch, keys))
            bar.update(len(piece))
    seen = join(parts, len(fitted))
    levels = coverage_levels(
        np.stack([f.source.parsing for f in fitted]),
        num_classes=MAX_CLASSES,
        factor=config.model.size[0] // watcher.method.latent_spec(config.model.size)[0],
        levels=len(config.model.unet.block_out_channels),
    )
    of = membership(labels)
    covered = [np.asarray(level) @ of for level in levels]
    sites = {site.name: site.level for site in config.model.unet.sites if site.name in seen.before}
    photos = [sample.photo for sample in samples]
    return Measured(
        samples,
        fitted,
        labels,
        seen,
        {name: covered[level].reshape(len(fitted), -1, len(REGIONS)) for name, level in sites.items()},
        {name: covered[level].shape[1:3] for name, level in sites.items()},
        encoders,
        {e.name: [e.mass(photo) for photo in tqdm.tqdm(photos, desc=e.name, unit="photo")] for e in encoders},
    )


def rows_of(measured: Measured) -> list[Row]:
    """Every number of the study."""
    rows = table.our_rows(measured.seen, measured.coverage)
    for encoder in measured.encoders:
        values = [
            densities(mass, grid_coverage(sample.parsing, measured.labels, encoder.grid, encoder.patch))
            for mass, sample in zip(measured.masses[encoder.name], measured.samples, strict=True)
        ]
        rows += table.rows_of(encoder.name, LAST, MEAN, "", np.stack(values))
    return rows


def write(out: pathlib.Path, measured: Measured, rows: Sequence[Row], about: dict, *, shown: int) -> None:
    """The files of the study. Raises InputError where they cannot be written."""
    series = [(f"{OURS}: {name}", table.select(rows, name)) for name in MAPS]
    for encoder in measured.encoders:
        series.append((f"{encoder.name}: {LAST}", {r.region: r for r in rows if r.model == encoder.name}))
    marked = [(_marked(name, about), found) for name, found in series]
    title = (
        f"{_marked(OURS, about)}: {about['title']}; {about['photos']} photos, {pathlib.PurePath(about['data']).name}"
    )
    sites = list(measured.seen.before)
    try:
        table.write_csv(rows, out / "attention.csv")
        drawing.bars(out / "bars.png", marked, title)
        drawing.layers(out / "layers.png", rows, sites, title)
        drawing.over_t(out / "over_t.png", rows, measured.seen.timesteps.tolist(), title)
        Image.fromarray(_sheet(measured, about, shown)).save(out / "overlays.png", optimize=True)
        text = report(rows, marked, sites, measured.seen.timesteps.tolist(), about)
        (out / "report.md").write_text(narrow(text))
        values = about | {"rows": [dataclasses.asdict(row) for row in rows]}
        (out / JSON_FILE).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{out}: cannot write the results ({error})") from error


def _sheet(measured: Measured, about: dict, shown: int) -> np.ndarray:
    """Photo, source attention before and after, target attention (means over layers and t), and the encoders'."""
    chosen = range(min(shown, len(measured.fitted)))
    seen, grids = measured.seen, measured.grids

    def ours(masses: dict[str, np.ndarray], i: int) -> np.ndarray:
        framing = measured.fitted[i].framing
        return np.mean([overlays.uncropped(overlays.of_cells(masses[s][i], grids[s]), framing) for s in grids], axis=0)

    over_t, through = ({site: mass.mean(axis=0) for site, mass in of.items()} for of in (seen.target, seen.through))
    kinds = {"before Eq. 6": seen.before, "after Eq. 6": seen.after, "target Eq. 8": over_t, "target Eq. 8, 7": through}
    if OURS in about["untrained"]:
        kinds = {
            f"{name.split(' ')[0]} {UNTRAINED}{'' if i < 3 else ' 7'}": m for i, (name, m) in enumerate(kinds.items())
        }
    maps = {name: [ours(masses, i) for i in chosen] for name, masses in kinds.items()}
    for encoder in measured.encoders:
        found = [overlays.of_cells(measured.masses[encoder.name][i], encoder.grid) for i in chosen]
        maps[_marked(encoder.name, about)] = found
    photos = [(measured.samples[i].photo, measured.samples[i].parsing) for i in chosen]
    return overlays.overlay_sheet(photos, maps, measured.labels)


def _marked(name: str, about: dict) -> str:
    """The name, with what must be known of its weights."""
    return f"{name} {UNTRAINED}" if name.partition(":")[0] in about["untrained"] else name


def _never_trained(encoder: Baseline) -> str:
    return "every norm still has the scale it was made with" if encoder.untrained else ""


def _mean_shares(measured: Measured) -> dict[str, float]:
    finest = max(measured.coverage.values(), key=lambda c: c.shape[1])
    return {region: round(float(finest[..., i].mean()), 4) for i, region in enumerate(REGIONS)}


def _folder(path: str, overwrite: bool) -> pathlib.Path:
    out = pathlib.Path(path)
    if (out / JSON_FILE).exists() and not overwrite:
        raise InputError(f"{out}: holds a study already; give another --out, or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make this folder ({error.strerror}); choose another") from error
    return out
