"""make demo: the shipped model's pictures, then a model from nothing, shown and judged. What it is told: flags/demo.py."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import cv2
import jax
import numpy as np

from configs.demo import get_config
from truepose_jax import train
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.evaluate import judge
from truepose_jax.evaluate.judge import KINDS, PEOPLE, POSES, Gates, Judged
from truepose_jax.flags import demo as told
from truepose_jax.flags.demo import EVAL_SEED, JUDGE, MINUTES, ONLY_OF_TRAIN, OUT, PICTURES
from truepose_jax.flags.train import CONFIG, PROFILE, WORKDIR
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError
from truepose_jax.runtime.bundled import SHIPPED
from truepose_jax.runtime.cli import enable_compilation_cache, run_with_config
from truepose_jax.runtime.files import atomic_write, check_new_file
from truepose_jax.sampling.image_grid import save_png, sheet, to_uint8
from truepose_jax.training.checkpoint import CheckpointError, check_place, check_same_config
from truepose_jax.training.init import resolve_init_from
from truepose_jax.training.time_budget import kept_steps
from truepose_jax.training.validation import Pairs, carried_sources

GATES = {"plain": Gates(margin=3.5, retrieval=0.95, outline_error=18.0), "patterned": Gates(2.5, 0.85, 20.5)}
"""What training from nothing in the demo's time must reach."""

SHOWN = (
    ("patterned", 0, 0),
    ("plain", 1, 1),
    ("patterned", 2, 2),
    ("plain", 3, 3),
    ("patterned", 1, 4),
    ("patterned", 3, 5),
)
"""Rows of the sheet: (kind of clothes, target pose, person). Not chosen for how they look."""

SHOWN_CELL = 256
"""Least height of a picture on the sheet, in pixels: prints can be seen."""


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    if given := [flag.name for flag in ONLY_OF_TRAIN if flag.present]:
        raise ConfigError(f"--{given[0]} is of `python -m truepose_jax.train`; the demo runs as one process")
    alone = JUDGE.present
    unheeded = (WORKDIR, CONFIG, PROFILE, MINUTES) if alone else (EVAL_SEED, OUT, PICTURES)
    if given := [flag.name for flag in unheeded if flag.present]:
        raise ConfigError(f"--{given[0]} means nothing {'to' if alone else 'without'} --judge")
    if alone and not JUDGE.value:
        raise ConfigError("--judge is empty: say 'shipped', or name the workdir of a run or an export")
    enable_compilation_cache()
    if alone:
        return _judge_alone(JUDGE.value, EVAL_SEED.value, OUT.value, PICTURES.value)
    config = from_config_dict(Config, CONFIG.value or get_config())
    if config.data.dataset != "synthetic":
        raise ConfigError("the demo judges synthetic people: config.data.dataset must be 'synthetic'")
    return _show_and_train(config, pathlib.Path(WORKDIR.value or "runs/demo"))


def _judge_alone(which: str, eval_seed: int | None, out: str | None, pictures: str | None) -> int:
    places = [pathlib.Path(place) for place in (out, pictures) if place is not None]
    for place in places:
        check_new_file(place)
    pipe = Pipeline.load(SHIPPED if which == "shipped" else which)
    found = judge.judge(pipe, eval_seed=eval_seed)
    verdicts = {kind: each.verdict for kind, each in found.items()}
    print(judge.report(verdicts, pipe.run.config), flush=True)
    if out is not None:
        _write_json(pathlib.Path(out), verdicts)
    if pictures is not None:
        pages = [_all_pairs(each) for each in found.values()]
        save_png(np.concatenate(pages), pathlib.Path(pictures))
    return 0


def _show_and_train(config: Config, workdir: pathlib.Path) -> int:
    check_place(str(workdir))
    kept = None if MINUTES.value is None else kept_steps(workdir)
    check_same_config(workdir, resolve_init_from(dataclasses.replace(config, total_steps=kept or config.total_steps)))
    shipped = _show_shipped(config, workdir)
    code = train.train(config, str(workdir), profile=PROFILE.value, minutes=MINUTES.value)
    if code:
        return code
    print("judging what was trained here, on people it has not seen ...", flush=True)
    jax.clear_caches()
    pipe = Pipeline.load(workdir)
    found = judge.judge(pipe)
    verdicts = {kind: each.verdict for kind, each in found.items()}
    pairs = shown_pairs({kind: each.pairs for kind, each in found.items()})
    images = np.stack([found[kind].images[_row(pose, who)] for kind, pose, who in SHOWN])
    columns = {"from nothing": images}
    if (carried := judge.carrying(pipe)) is not None:
        rows = judge.batch_size(pipe, len(pairs))
        columns = {"carried": carried_sources(pairs, images, carried, config.seed, rows)} | columns
    if shipped is not None:
        columns["shipped"] = shipped
    save_png(shown_sheet(pairs, columns), workdir / "demo.png")
    _write_json(workdir / "demo.json", verdicts)
    missed = [line for kind, gates in GATES.items() for line in gates.missed(kind, verdicts[kind])]
    print(f"\n{judge.report(verdicts, config)}\n\nsheet: {workdir / 'demo.png'}; numbers: {workdir / 'demo.json'}")
    print(*missed, sep="\n", flush=True)
    return 1 if missed else 0


def _show_shipped(config: Config, workdir: pathlib.Path) -> np.ndarray | None:
    """Writes the shipped model's sheet; its pictures [n h w 3] of the SHOWN pairs, None where it cannot be opened."""
    began = time.monotonic()
    try:
        pipe = Pipeline.load(SHIPPED)
    except (CheckpointError, ConfigError, ConversionError, OSError) as error:
        print(f"no pictures of the shipped model: {error}", flush=True)
        return None
    reader = pipe.run.config  # the same people as will be judged, as this model wants them
    pairs = shown_pairs(
        {kind: judge.people(config, pipe.encoder, patterns, reader=reader) for kind, patterns in KINDS.items()}
    )
    images = pairs.sample(judge.sampling(pipe), config.seed, judge.batch_size(pipe, len(pairs)))
    save_png(shown_sheet(pairs, {"shipped": images}), workdir / "shipped.png")
    seconds = time.monotonic() - began
    print(
        f"the shipped model's pictures of people it has not seen: {workdir / 'shipped.png'} ({seconds:.0f} s)",
        flush=True,
    )
    del pipe
    jax.clear_caches()
    return images


def _row(pose: int, person: int) -> int:
    return pose * PEOPLE + person


def shown_pairs(pairs: Mapping[str, Pairs]) -> Pairs:
    """The SHOWN rows of {kind of clothes: all pairs}."""
    chosen = [(pairs[kind], _row(pose, person)) for kind, pose, person in SHOWN]
    batch = {name: np.stack([each.batch[name][row] for each, row in chosen]) for name in chosen[0][0].batch}
    return Pairs(batch, chosen[0][0].groups, [each.identities[row] for each, row in chosen])


def shown_sheet(pairs: Pairs, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """source | pose | the columns [n h w 3], of any size | truth."""
    return sheet(_columns(pairs, columns), least_cell=SHOWN_CELL)


def _all_pairs(judged: Judged) -> np.ndarray:
    return sheet(_columns(judged.pairs, {"generated": judged.images}), blocks=POSES)


def _columns(pairs: Pairs, columns: Mapping[str, np.ndarray]) -> dict[str, Sequence[np.ndarray]]:
    batch = pairs.batch
    h, w = batch["target"].shape[1:3]
    fitted = {
        name: [cv2.resize(image, (w, h), interpolation=cv2.INTER_NEAREST) for image in to_uint8(images)]
        for name, images in columns.items()
    }
    pose = to_uint8(batch["target_pose"] * 2 - 1)
    return {"source": to_uint8(batch["source"]), "pose": pose, **fitted, "truth": to_uint8(batch["target"])}


def _write_json(path: pathlib.Path, verdicts: Mapping[str, judge.Verdict]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(judge.to_json(verdicts), indent=2) + "\n")


if __name__ == "__main__":
    run_with_config(main, told)
