"""The metrics of every pair, one line of JSON each: streamed, and resumed where a run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from input_pipeline.annotations.parsing import CLOTHES, LabelSet, read_parsing
from input_pipeline.annotations.photo import read_photo
from input_pipeline.files import parse_json
from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard
from truepose_jax.evaluate.pairing import Folder, Pair, image_key, image_size
from truepose_jax.evaluate.protocols import Protocol, Size
from truepose_jax.evaluate.weights import Network
from truepose_jax.metrics.garments import colour_histogram
from truepose_jax.metrics.lpips import LEAST_SIDE
from truepose_jax.metrics.psnr import LEAST_PIXELS, psnr, psnr_inside
from truepose_jax.metrics.regions import group_mask
from truepose_jax.metrics.ssim import UNIFORM_51, gaussian_window, ssim_51, ssim_256
from truepose_jax.runtime.files import make_folder, writing
from truepose_jax.runtime.reading import read_ahead

Row = dict[str, Any]
"""What is known of a pair; numbers that are not finite are written as strings (nan, inf)."""


@dataclasses.dataclass(frozen=True)
class Maps:
    """Parsing maps of the reference images, by name, in any spelling."""

    folder: Folder
    labels: LabelSet

    def regions(self) -> dict[str, tuple[int, ...]]:
        """{region: ids}: the groups of the label set, hair, background, and each garment."""
        singles = {"Hair": "hair", "Background": "background"} | {c: c for c in CLOTHES}
        found = dict(self.labels.groups)
        return found | {singles[c]: (i,) for i, c in enumerate(self.labels.classes) if c in singles}

    def names(self) -> dict[str, str]:
        return self.folder.by_key()

    def absent(self, references: Iterable[str]) -> list[str]:
        """The reference images without a map."""
        names = self.names()
        return [name for name in dict.fromkeys(references) if image_key(name) not in names]

    def read(self, name: str, photo_hw: Size, hw: Size) -> np.ndarray:
        """uint8 [hw]: the map, of the photo's size or of the frames', by nearest neighbour."""
        path = self.folder.path(name)
        own = image_size(path, upright=False)
        parsing = read_parsing(path, self.labels, own if own in {photo_hw, hw} else photo_hw)
        return np.asarray(Image.fromarray(parsing).resize(hw[::-1], Image.Resampling.NEAREST))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Computes the rows of pairs. maps, lpips: None where there are none."""

    generated: Folder
    reference: Folder
    protocol: Protocol
    size: Size | None
    maps: Maps | None
    lpips: Network | None

    def read(self, pair: Pair, map_names: Mapping[str, str]) -> tuple[Row, np.ndarray, np.ndarray]:
        """(row without LPIPS, LPIPS's two inputs). Raises InputError."""
        photo = read_photo(self.reference.path(pair.reference))
        made = self.protocol.frames(read_photo(self.generated.path(pair.generated)), "generated", self.size)
        truth = self.protocol.frames(photo, "truth", self.size)
        a, b = made.similarity, truth.similarity
        row: Row = {"generated": pair.generated, "reference": pair.reference, "psnr": psnr(a, b, data_range=255.0)}
        narrow = gaussian_window(self.protocol.sigma)
        local = None
        if min(a.shape[:2]) >= len(UNIFORM_51.weights):
            row["ssim"] = float(ssim_51(a, b).mean())
        if min(a.shape[:2]) >= len(narrow.weights):
            local = ssim_256(a, b, sigma=self.protocol.sigma)
            row["ssim_256"] = float(local.mean())
        name = map_names.get(image_key(pair.reference))
        if self.maps and name:
            parsing = self.maps.read(name, photo.shape[:2], a.shape[:2])
            row |= self._regions(a, b, parsing, local, narrow.margin)
        return row, self.protocol.lpips_input(made.perceptual), self.protocol.lpips_input(truth.perceptual)

    def _regions(self, a: np.ndarray, b: np.ndarray, parsing: np.ndarray, local: np.ndarray | None, margin: int) -> Row:
        """{"regions": {name: [psnr, ssim]}}, and colours of the clothes where there are enough of them."""
        found: Row = {"regions": {}}
        for region, ids in self.maps.regions().items():
            mask = group_mask(parsing, ids)
            if np.count_nonzero(mask) < LEAST_PIXELS:
                continue
            inner = mask[margin:-margin, margin:-margin]
            seen = local is not None and np.count_nonzero(inner) >= LEAST_PIXELS
            similar = float(local[inner].mean()) if seen else math.nan
            found["regions"][region] = [psnr_inside(a, b, mask, data_range=255.0), similar]
            if region == "clothes":
                found["clothes"] = [_sparse(colour_histogram(image, mask)) for image in (a, b)]
        return found


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a file and of what shards have left beside it, of images that have not changed since, in the order of `stamps`,
    read one at a time.

    stamps: {generated image: what its row must bear}.
    """

    path: pathlib.Path
    stamps: Mapping[str, str]

    def __iter__(self) -> Iterator[Row]:
        places: dict[str, tuple[pathlib.Path, int]] = {}
        for path, place, row in self._all():
            if row.get("stamp") == self.stamps.get(row.get("generated"), ""):
                places.setdefault(row["generated"], (path, place))
        # Not in the order of the files, which tells who was when stopped: sums of rounded numbers depend on it.
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path, _ in places.values()}
            for generated in self.stamps:
                if generated in places:
                    path, place = places[generated]
                    files[path].seek(place)
                    row = json.loads(files[path].readline())
                    del row["stamp"]
                    yield _numbers(row)

    def _all(self) -> Iterator[tuple[pathlib.Path, int, Row]]:
        """(file, where in it, row) of all that can be read."""
        for path in filter(pathlib.Path.exists, (self.path, *self.parts())):
            place = 0
            with path.open("rb") as file:
                for line in file:
                    # cut off by a kill, or empty
                    with contextlib.suppress(ValueError):
                        row = parse_json(line.decode())
                        if isinstance(row, dict):
                            yield path, place, row
                    place += len(line)

    def parts(self) -> list[pathlib.Path]:
        """What shards have left."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.*.jsonl"))

    def part(self, share: Shard) -> pathlib.Path:
        """The file that this part of the work writes: two that append to one would mix their lines."""
        if share.finishes:
            return self.path
        return self.path.with_name(f"{self.path.stem}.{share.index}-of-{share.count}.jsonl")

    def gather(self) -> None:
        """Puts what shards have left into the file."""
        make_folder(self.path.parent)
        with writing(self.path), self.path.open("ab") as file:
            file.write(b"\n")  # a kill may have cut the last line off
            for part in self.parts():
                file.write(part.read_bytes() + b"\n")
                file.flush()
                part.unlink()


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[Pair],
    *,
    settings: Mapping[str, Any],
    cache: pathlib.Path,
    batch_size: int,
    share: Shard = WHOLE,
) -> Rows:
    """The rows, all of them where this part finishes the work. Pairs that have one are not computed again.

    settings: what rows depend on besides the two files. share: the part of the pairs that this call scores. Raises InputError for
    images that cannot be read; rows done by then are kept.
    """
    stamps = {pair.generated: _stamp(scorer, pair) for pair in pairs}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    kept = Rows(cache / f"pairs-{key}.jsonl", stamps)
    make_folder(cache)
    if share.finishes:
        kept.gather()
    done = {row["generated"] for row in kept}
    mine = share.mine(pairs)
    todo = [pair for pair in mine if pair.generated not in done]
    map_names = scorer.maps.names() if scorer.maps else {}
    part = kept.part(share)
    if todo:
        bar = tqdm.tqdm(
            total=len(mine), initial=len(mine) - len(todo), unit="pair", desc="pairs", smoothing=0.05,
            disable=not share.first,
        )  # fmt: skip
        with writing(part), bar, part.open("a", encoding="utf-8") as file:
            if not share.finishes:  # else `gather` has done so
                file.write("\n")  # a kill may have cut the last line off
            found = read_ahead(lambda pair: scorer.read(pair, map_names), todo, ahead=2 * batch_size)
            for rows in _with_lpips(scorer.lpips, found, batch_size):
                for row in rows:
                    file.write(json.dumps(to_json(row | {"stamp": stamps[row["generated"]]})) + "\n")
                file.flush()
                bar.update(len(rows))
    if share.merge:
        share.require(len(pairs) - len(done), len(pairs), "pairs' rows")
    return kept


def _with_lpips(
    network: Network | None, found: Iterator[tuple[Pair, tuple[Row, np.ndarray, np.ndarray]]], batch_size: int
) -> Iterator[list[Row]]:
    """Rows with their LPIPS, under the network's name; each at once where there is no network.

    Batches are of one image size, and padded where they are not full: no more than 2 x batch_size images wait for others.
    """
    if network is None:
        yield from ([row] for _, (row, _, _) in found)
        return
    waiting: dict[tuple[int, ...], list[tuple[Row, np.ndarray, np.ndarray]]] = {}

    def flush(shape: tuple[int, ...]) -> list[Row]:
        batch = waiting.pop(shape)
        fill = batch + batch[-1:] * (batch_size - len(batch))
        a, b = (np.stack([entry[i] for entry in fill]) for i in (1, 2))
        for (row, _, _), value in zip(batch, np.asarray(network.apply(a, b)), strict=False):
            row[network.name] = float(value)
        return [row for row, _, _ in batch]

    for pair, (row, a, b) in found:
        if min(a.shape[:2]) < LEAST_SIDE:
            raise InputError(f"{pair.generated}: {a.shape[0]}x{a.shape[1]} pixels; LPIPS needs {LEAST_SIDE} a side")
        waiting.setdefault(a.shape, []).append((row, a, b))
        fullest = max(waiting, key=lambda shape: len(waiting[shape]))
        if len(waiting[fullest]) == batch_size or sum(map(len, waiting.values())) >= 2 * batch_size:
            yield flush(fullest)
    for shape in list(waiting):
        yield flush(shape)


def _sparse(histogram: np.ndarray) -> list[list[float]]:
    """[[bin, share]] of the bins that are not empty."""
    return [[int(i), round(float(histogram[i]), 5)] for i in np.flatnonzero(histogram)]


def _stamp(scorer: Scorer, pair: Pair) -> str:
    stats = scorer.generated.path(pair.generated).stat(), scorer.reference.path(pair.reference).stat()
    return f"{pair.reference} " + " ".join(f"{s.st_size}-{s.st_mtime_ns}" for s in stats)


def to_json(value: Any) -> Any:
    """JSON knows no nan and no inf: they become strings."""
    if isinstance(value, Mapping):
        return {name: to_json(v) for name, v in value.items()}
    if isinstance(value, list):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """The inverse of plain."""
    if isinstance(value, Mapping):
        return {name: _numbers(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if value in {"nan", "inf", "-inf"} else value
