"""Every file that a program reads, and every setting: a folder of good ones, and calls over it with one of them made bad."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from configs import base
from input_pipeline.annotations.photo import read_photo
from input_pipeline.records.reader import RecordImages
from input_pipeline.sources.folder import read_pairs
from tests.fuzz import mutations
from tests.fuzz.outcomes import Call
from tests.shared_data import openpose_json, standing_joints
from truepose_jax import generate, prepare
from truepose_jax.config import Config, from_config_dict, to_dict
from truepose_jax.evaluate import __main__ as evaluate
from truepose_jax.inference.exported import Exported
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.models.unet import UNetConfig
from truepose_jax.pretrained.conversion.safetensors_io import TensorInfo, open_source, write_safetensors
from truepose_jax.pretrained.conversion.weights_folder import FORMAT, PARAMS_FILE, VERSION, WEIGHTS_FILE, open_weights
from truepose_jax.runtime.cli import run_program
from truepose_jax.training.checkpoint import read_config
from truepose_jax.training.time_budget import kept_steps

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "docs/models/synthetic_128x96"
HW = (64, 48)
Mutation = Callable[[pathlib.Path, random.Random], str]
CERTAIN = (mutations.special, mutations.other_kind)
"""What is made so is of no use in any case."""
BYTES, JSON, LIST = mutations.damage, mutations.change_json, mutations.change_list


@dataclasses.dataclass(frozen=True)
class Target:
    """A call of `main` with `words` in a copy of the folder of good files, one of `files` made bad. share: how often."""

    name: str
    main: Callable[[list[str]], int | None]
    words: Sequence[str]
    files: Sequence[str]
    how: Sequence[Mutation]
    share: float = 1.0
    many: bool = False
    certain: bool = True


class _Reached(Exception):
    """All input was read and taken: what comes after is no input's."""


def _stops(main: Callable, place: object, name: str) -> Callable[[list[str]], int | None]:
    """`main` up to a call that is long work. Only ever run in a child: nobody puts the attribute back."""

    def reached(*_, **__):
        raise _Reached

    def run(words: list[str]) -> int | None:
        setattr(place, name, reached)
        try:
            return main(words)
        except _Reached:
            return 0

    return run


def _reads(read: Callable) -> Callable[[list[str]], int | None]:
    """A program that reads one file, for readers whose own programs take seconds to come to it."""
    return lambda words: run_program(lambda given: (read(*given), None)[1], words)


def _tokens(folder: str) -> None:
    images = RecordImages(folder, "train")
    images.digest  # noqa: B018
    for index in range(len(images)):
        images.image(index)


def _tensors(file: str) -> None:
    source = open_source(file)
    for name in source.infos:
        source.read(name)


def _settings(key: str, text: str) -> None:
    values = base.get_config().to_dict()
    *groups, last = key.split(".")
    place = values
    for group in groups:
        place = place[group]
    place[last] = json.loads(text)
    from_config_dict(Config, values)


def _keys(values: dict, prefix: str = "") -> list[str]:
    found = [_keys(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}"] for k, v in values.items()]
    return [key for keys in found for key in keys]


SETTINGS = _keys(base.get_config().to_dict())
NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400")


def write_good(root: pathlib.Path) -> None:
    """The folder of good files."""
    rng = np.random.default_rng(0)
    for sub in ("image", "parsing", "keypoints"):
        (root / sub).mkdir(parents=True)
    photos = {"a.jpg": "JPEG", "b.png": "PNG", "c.webp": "WEBP", "d.bmp": "BMP", "e.tif": "TIFF"}
    rows = np.repeat((np.arange(HW[0]) * 18 // HW[0])[:, None], HW[1], 1).astype(np.uint8)
    body = standing_joints(*HW)
    for name, kind in photos.items():
        Image.fromarray(rng.integers(0, 256, (*HW, 3), dtype=np.uint8)).save(root / "image" / name, kind)
        stem = name[0]
        Image.fromarray(rows).save(root / "parsing" / f"{stem}.png")
        (root / "keypoints" / f"{stem}.json").write_text(openpose_json(body))
    xy = [f"{x:.0f} {y:.0f}" for x, y, _ in body]
    (root / "pose.txt").write_text("\n".join(xy) + "\n")
    columns = [[int(v) for v in body[:, i]] for i in (1, 0)]
    (root / "annotations.csv").write_text(f"name:keypoints_y:keypoints_x\na.jpg:{columns[0]}:{columns[1]}\n")
    coco = [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]
    people = [{"image_id": 1, "keypoints": body[coco].reshape(-1).tolist()}]
    image = {"id": 1, "file_name": "a.jpg", "height": HW[0], "width": HW[1]}
    (root / "coco.json").write_text(json.dumps({"images": [image], "annotations": people}))
    (root / "results.json").write_text(json.dumps([{**people[0], "image_id": "a.jpg"}]))
    lines = [f"image/{n},parsing/{n[0]}.png,keypoints/{n[0]}.json,{n[0]}.png,keypoints/{n[0]}.json" for n in photos]
    (root / "list.csv").write_text("\n".join(["source,parsing,pose,out,source_pose", *lines]) + "\n")
    (root / "pairs.csv").write_text("from,to\na,b\nb.png,c.webp\nd,e\n")
    (root / "made").mkdir()
    for a, b in (ring := ("ab", "bc", "cd", "de", "ea")):
        shutil.copy(root / "image/b.png", root / "made" / f"{a}_to_{b}.png")
    (root / "ring.csv").write_text("from,to\n" + "".join(f"{a},{b}\n" for a, b in ring))
    infos = {f"layer.{i}.weight": TensorInfo((3, 2), np.dtype(np.float32)) for i in range(3)}
    write_safetensors(root / "model.safetensors", infos, ((name, np.ones((3, 2), np.float32)) for name in infos))
    shutil.copytree(MODEL, root / "model")
    (root / "weights").mkdir()
    shutil.copy(root / "model.safetensors", root / "weights" / PARAMS_FILE)
    unet = {"format": FORMAT, "version": VERSION, "unet": to_dict(UNetConfig()), "method": "truepose"}
    schedule = {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 1000, "prediction": "eps"}
    origin = {"model": "sd15", "name": "x", "licence": "y", "files": {}}
    about = unet | {"fresh": [], "schedule": schedule, "origin": origin, "settings": {}}
    (root / "weights" / WEIGHTS_FILE).write_text(json.dumps(about))
    (root / "run").mkdir()
    settings = json.loads((MODEL / "training_config.json").read_text())
    frozen = {"autoencoder": "a", "clip": "c"}
    (root / "run/metadata.json").write_text(json.dumps({"config": settings, "frozen": frozen, "data": "d", "origin": None}))
    (root / "run/time_budget.json").write_text(json.dumps({"minutes": 1, "steps_per_second": 2.0, "total_steps": 9}))
    (root / "run/checkpoints/5").mkdir(parents=True)


def write_records(root: pathlib.Path) -> None:
    """And records of its photos. For a process that forks nobody afterwards: the writer has threads."""
    flags = ["--dataset=folder", f"--raw={root}", f"--out={root / 'records'}", "--labels=atr18", "--pairs=self", "--workers=1"]
    assert prepare.main(["build", *flags]) == 0


_POSE = ["--workdir=model", "--source=image/b.png", "--parsing=parsing/b.png", "--labels=atr18", "--out=out/x.png",
         "--source-pose=keypoints/b.json"]  # fmt: skip
_GENERATE = _stops(generate.main, Pipeline, "of_run")
_FOLDER = ["--root=.", "--labels=atr18", "--size=64x48", "--count=1", "--out=out/sheet.png"]
_EVALUATE = ["--generated=made", "--reference=image", "--protocol=plain", "--out=out/report.json", "--cache=out/cache",
             "--pairs=ring.csv"]  # fmt: skip
PHOTOS = ("image/a.jpg", "image/b.png", "image/c.webp", "image/d.bmp", "image/e.tif")

TARGETS = (
    Target("photo (reader)", _reads(read_photo), ["{file}"], PHOTOS, (*CERTAIN, BYTES, BYTES, BYTES), 5),
    Target("photo (generate)", _GENERATE, [*_POSE, "--pose=keypoints/b.json", "--pose-frame=64x48"], ["image/b.png"],
           (*CERTAIN, BYTES), 1),
    Target("map (generate)", _GENERATE, [*_POSE, "--pose=keypoints/b.json", "--pose-frame=64x48"], ["parsing/b.png"],
           (*CERTAIN, BYTES), 1),
    Target("pose, OpenPose", _GENERATE, [*_POSE, "--pose=keypoints/a.json", "--pose-frame=64x48"], ["keypoints/a.json"],
           (*CERTAIN, BYTES, JSON, JSON, JSON), 2),
    Target("pose, COCO", _GENERATE, [*_POSE, "--pose=coco.json#a.jpg"], ["coco.json"], (*CERTAIN, BYTES, JSON, JSON, JSON), 2),
    Target("pose, results", _GENERATE, [*_POSE, "--pose=results.json#a.jpg", "--pose-frame=64x48"], ["results.json"],
           (*CERTAIN, BYTES, JSON, JSON), 1),
    Target("pose, text", _GENERATE, [*_POSE, "--pose=pose.txt"], ["pose.txt"], (*CERTAIN, BYTES, BYTES), 1),
    Target("pose, annotations", _GENERATE, [*_POSE, "--pose=annotations.csv#a.jpg"], ["annotations.csv"],
           (*CERTAIN, BYTES, BYTES), 1),
    Target("list (generate)", _GENERATE,
           ["--workdir=model", "--pairs=list.csv", "--labels=atr18", "--pose-frame=64x48", "--out-dir=out"], ["list.csv"],
           (*CERTAIN, BYTES, LIST, LIST, LIST), 2, many=True),
    Target("list of pairs (reader)", _reads(read_pairs), ["{file}"], ["pairs.csv"], (*CERTAIN, BYTES, LIST, LIST), 2),
    Target("export", _reads(lambda folder: Exported.open(pathlib.Path(folder))), ["model"],
           [f"model/{name}" for name in ("truepose.json", "training_config.json")],
           (*CERTAIN, BYTES, JSON, JSON, JSON), 3),
    Target("run's metadata", _reads(read_config), ["run"], ["run/metadata.json"], (*CERTAIN, BYTES, JSON, JSON, JSON), 3),
    Target("time budget", _reads(kept_steps), ["run"], ["run/time_budget.json"], (mutations.other_kind, BYTES, JSON), 1,
           certain=False),
    Target("weights folder", _reads(lambda folder: open_weights(pathlib.Path(folder))), ["weights"], ["weights/weights.json"],
           (*CERTAIN, BYTES, JSON, JSON, JSON), 2),
    Target("safetensors", _reads(_tensors), ["{file}"], ["model.safetensors"], (*CERTAIN, BYTES, BYTES, BYTES), 4),
    Target("folder (inspect)", lambda words: prepare.main(["inspect", *words]), _FOLDER,
           [*PHOTOS, "parsing/c.png", "keypoints/d.json"], (*CERTAIN, BYTES), 0.5, certain=False),
    Target("folder (build)", lambda words: prepare.main(["build", *words]),
           ["--dataset=folder", "--raw=.", "--out=out/r", "--labels=atr18", "--pairs=pairs.csv", "--workers=1"],
           [*PHOTOS, "parsing/c.png", "keypoints/d.json", "pairs.csv"], (*CERTAIN, BYTES), 0.3, certain=False),
    Target("records (check)", lambda words: prepare.main(["check", *words]), ["records"],
           ["records/dataset_info.json", "records/features.json", "records/metadata.json", "records/checksums.json",
            "records/images-train.npy", "records/pairs-train.npy"],
           (*CERTAIN, BYTES, BYTES), 0.5, certain=False),
    Target("records (reader)", _reads(_tokens), ["records"],
           ["records/metadata.json", "records/checksums.json", "records/dataset_info.json"], (*CERTAIN, JSON, JSON), 1),
    Target("pictures (evaluate)", _stops(evaluate.main, evaluate, "score_pairs"), _EVALUATE,
           [*PHOTOS, "made/a_to_b.png", "ring.csv"], (*CERTAIN, BYTES), 0.5, certain=False),
)  # fmt: skip


def setting(good: pathlib.Path, rng: random.Random) -> Call:
    """One setting of a configuration made odd."""
    key = rng.choice(SETTINGS)
    odd = [json.dumps(value) for value in mutations.ODD] + ["1e-300", "-0.0", "[0, 0]", "[1, -1]", "10000000"]
    text = rng.choice([*odd, *NO_NUMBERS])
    return Call("setting", f"{key}={text}", _reads(_settings), [key, text], good, text in NO_NUMBERS)


def call(target: Target, good: pathlib.Path, place: pathlib.Path, rng: random.Random | None) -> Call:
    """A copy of the good files at `place`, one of them made bad, and the call over it. rng None: nothing is made bad."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place, copy_function=os.link)
    for name in ("out", "folder"):
        (place / name).mkdir()
    os.mkfifo(place / "fifo")
    (place / "loop").symlink_to(place / "loop")
    if rng is None:
        words = [word.format(file=target.files[0]) for word in target.words]
        return Call(target.name, "nothing", target.main, words, place, many=target.many)
    file, how = rng.choice(target.files), rng.choice(target.how)
    path = place / file
    data = path.read_bytes()
    path.unlink()  # the copies are links to the good files
    path.write_bytes(data)
    what = how(path, rng)
    words = [word.format(file=file) for word in target.words]
    return Call(target.name, f"{file}: {what}", target.main, words, place, target.certain and how in CERTAIN, target.many)
