"""How many finished pairs the loader makes a second, and what limits it. Prints JSON.

    taskset -c 1 python benchmarks/loader_speed.py [--photos=DIR] [--pairs=1500] [--out=FILE]

A pair is finished: both photos (decoded JPEG, or stored latents), the source's map, joints, region tokens of 768, the
skeleton, the switched-on classes, half of them mirrored. Records are made here: synthetic people of 512x352, their
pixels replaced by those of --photos where it names a folder (real photos take longer to decode), tokens and latents
of random numbers. Rates are pairs per CPU second of this process (so per core) and per second of the wall clock, each the
best of WINDOWS windows: other work on the machine slows memory and caches too.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

from input_pipeline.annotations import photo
from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.photo import decode_photo, read_photo
from input_pipeline.annotations.regions import region_boxes
from input_pipeline.batches.loader import make_loader
from input_pipeline.batches.readers import RecordTokens
from input_pipeline.fields import Layout
from input_pipeline.records.annotate import rewrite_records
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.schema import pack_latents, pack_tokens
from input_pipeline.records.writer import build_records
from input_pipeline.sources.base import RawPicture, RawSet, RawSplit
from input_pipeline.sources.own_photos import synthetic_people
from truepose_jax.config import Config
from truepose_jax.methods import needs

SIZE = (512, 352)
BATCH = 12
WIDTH = 768
WINDOWS = 10
EPOCH = 101_966
"""DeepFashion's training pairs."""
PEOPLE = 12
"""In 4 poses each: 48 photos, 144 pairs."""
SAMPLING = {"444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420}
QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Dressed:
    """A synthetic person's map and joints with other pixels, as a JPEG of the given colour resolution."""

    item: object
    photo: str | None
    sampling: str

    name = property(lambda self: self.item.name)
    identity = property(lambda self: self.item.identity)

    def load(self) -> RawPicture:
        picture = self.item.load()
        image = picture.image
        if self.photo:
            image = cv2.resize(read_photo(self.photo), SIZE[::-1], interpolation=cv2.INTER_AREA)
        settings = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLING[self.sampling]]
        jpeg = cv2.imencode(".jpg", image[..., ::-1], settings)[1].tobytes()
        return RawPicture(decode_photo(jpeg, name=""), picture.parsing, picture.joints, jpeg)


def make_records(folder: pathlib.Path, photos: list[str], sampling: str) -> RecordImages:
    """Built, with random tokens and latents in every record."""
    people = synthetic_people(pairs=12 * PEOPLE, size=SIZE)
    items = people.splits["train"].items
    dressed = [Dressed(item, photos[i % len(photos)] if photos else None, sampling) for i, item in enumerate(items)]
    raw = RawSet("bench", people.labels, {"train": RawSplit(dressed, people.splits["train"].pairs)}, "A benchmark.")
    build_records(raw, folder)
    random = np.random.default_rng(0)

    def fill(records, labels):
        found = []
        for record in records:
            fields = {"latents_size": np.array(SIZE, np.int32)}
            valid = region_boxes(record.parsing, label_set(labels))[1]
            for kind in ("", "flipped_"):
                tokens = random.standard_normal((len(valid), WIDTH)).astype(np.float32)
                fields[f"{kind}region_tokens"], fields[f"{kind}region_valid"] = pack_tokens(tokens, valid)
                fields[f"{kind}latents"] = pack_latents(*random.standard_normal((2, SIZE[0] // 8, SIZE[1] // 8, 4)))
            found.append(fields)
        return found

    rewrite_records(folder, {"clip": {}, "vae": {}}, fill, size=SIZE)
    return opened(folder)


def opened(folder: pathlib.Path) -> RecordImages:
    """With as long a list of pairs as DeepFashion's: Grain's shuffle of a short one costs 0.4 ms a draw."""
    images = RecordImages(folder, "train", size=SIZE)
    images.pairs = np.tile(images.pairs, (-(-EPOCH // len(images.pairs)), 1))
    return images


def layout(form: str) -> Layout:
    """What TruePose trains on, as it travels."""
    config = Config()
    return Layout(needs(config).train, form, {"e": WIDTH})


def loader_rate(images: RecordImages, form: str, threads: int, pairs: int) -> dict[str, float]:
    """Finished pairs per CPU second and per second."""
    loader = make_loader(
        images, RecordTokens(images, WIDTH, True), layout(form), seed=0, batch_size=BATCH, flip=True, threads=threads
    )
    for _ in range(3 + 3 * threads):
        next(loader)
    steps = pairs // BATCH // WINDOWS
    rates = []
    for _ in range(WINDOWS):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            assert next(loader)["valid"].all()
        rates.append((steps * BATCH / (time.process_time() - cpu), steps * BATCH / (time.perf_counter() - wall)))
    by_cpu, by_wall = (max(column) for column in zip(*rates, strict=True))
    return {"pairs_per_cpu_second": round(by_cpu), "pairs_per_second": round(by_wall)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", help="folder of JPEGs whose pixels the records get")
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--out", help="also write the JSON here")
    flags = parser.parse_args()
    cv2.setNumThreads(1)
    photos = sorted(str(path) for path in pathlib.Path(flags.photos).rglob("*.jpg")) if flags.photos else []
    report = {
        "size": "512x352",
        "batch": BATCH,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": platform.machine(),
        "simplejpeg": photo.simplejpeg is not None,
        "photos": f"{len(photos)} real ones" if photos else "synthetic",
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name, form, sampling in (
            ("latents", "latents", "444"),
            ("jpeg 4:2:0", "uint8", "420"),
            ("jpeg 4:4:4", "uint8", "444"),
        ):
            folder = pathlib.Path(temporary) / sampling
            images = opened(folder) if folder.exists() else make_records(folder, photos, sampling)
            size = np.mean([len(images.fields(i)["image"]) for i in range(12)])
            report[name] = {
                f"{threads} thread{'s' * (threads > 1)}": loader_rate(images, form, threads, flags.pairs)
                for threads in (1, 2)
            } | {"jpeg_kB": round(size / 1000, 1)}
    text = json.dumps(report, indent=1)
    print(text)
    if flags.out:
        pathlib.Path(flags.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
