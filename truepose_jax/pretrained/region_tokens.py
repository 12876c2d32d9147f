"""Region tokens: every parsing class of every source, and the whole image, through CLIP; computed once and kept.

The encoder is a transformers CLIP vision folder, or, where the config names none, a small seeded one. The latter is
untrained: its tokens tell regions apart by rough colour and layout and know nothing of clothes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.photo import one_line
from input_pipeline.annotations.regions import clip_normalise, region_crops
from input_pipeline.batches.transforms import flip_record
from input_pipeline.schema import MAX_CLASSES, ImageRecord, ImageSet, InputError, TokenTable
from truepose_jax.config import ClipConfig, ConfigError
from truepose_jax.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, SafetensorsSource
from truepose_jax.pretrained.frozen_networks import folder_fingerprint, load_torch_folder, read_torch_config
from truepose_jax.runtime import files
from truepose_jax.runtime.distributed import is_seen

CROPS_PER_CALL = 512
IMAGES_PER_CHUNK = 64
CALIBRATION_CROPS = 256
DIGEST = "sha256"
"""Of a cache's metadata."""
PARTS = ("tokens", "valid", "flipped_tokens", "flipped_valid")
"""Arrays of a cache: those of TokenTable."""


@dataclasses.dataclass(frozen=True)
class RegionEncoder:
    """Crops -> tokens: (CLIP(crop) - offset) * scale. offset 0 and scale 1 for trained weights.

    fingerprint: hash of the weights, the key of every cache. trained: False for the seeded stand-in.
    """

    config: CLIPVisionConfig
    params: Any
    fingerprint: str
    trained: bool
    offset: np.ndarray | float = 0.0
    scale: np.ndarray | float = 1.0

    @property
    def network(self) -> RegionEncoder:
        return self

    @functools.cached_property
    def _apply(self):
        module = CLIPVisionModelWithProjection(self.config)
        return jax.jit(lambda params, crops: module.apply({"params": params}, crops).image_embeds)

    def encode(self, crops: np.ndarray) -> np.ndarray:
        """uint8 [n s s 3], s = config.image_size -> float32 [n e]."""
        found = []
        for start in range(0, len(crops), CROPS_PER_CALL):
            piece = clip_normalise(crops[start : start + CROPS_PER_CALL])
            # Powers of two: few sizes, so few compilations.
            padded = np.zeros((1 << (len(piece) - 1).bit_length(), *piece.shape[1:]), np.float32)
            padded[: len(piece)] = piece
            found.append(np.asarray(self._apply(self.params, padded))[: len(piece)])
        return (np.concatenate(found) - self.offset) * self.scale

    def tokens(self, records: Sequence[ImageRecord | None], labels: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens float32 [n 21 e], valid bool [n 21]) of these images; rows without a region, and all rows of an
        image that is None, are zero and invalid."""
        names, size = label_set(labels), self.config.image_size
        valid = np.zeros((len(records), MAX_CLASSES + 1), bool)
        tokens = np.zeros((*valid.shape, self.config.projection_dim), np.float32)
        crops = []
        for i, record in enumerate(records):
            if record is not None:
                cut, valid[i], _ = region_crops(record.image, record.parsing, names, out=size)
                crops.append(cut[valid[i]])
        if crops:
            tokens[valid] = self.encode(np.concatenate(crops))
        return tokens, valid


class LazyEncoder:
    """The encoder of the config, whose weights are loaded when the first crop is encoded: where all tokens lie in
    records or in a cache, CLIP is never loaded. Whatever can be checked before is a ConfigError at once."""

    def __init__(self, clip: ClipConfig, token_width: int):
        self._clip, self._width = clip, token_width
        if clip.path:
            _check_width(clip, token_width)

    @functools.cached_property
    def network(self) -> RegionEncoder:
        """The encoder itself, loaded now."""
        return make_encoder(self._clip, self._width)

    @functools.cached_property
    def fingerprint(self) -> str:
        clip = self._clip
        return folder_fingerprint(clip.path, "clip") if clip.path else _untrained_fingerprint(clip, self._width)

    def tokens(self, records: Sequence[ImageRecord | None], labels: str) -> tuple[np.ndarray, np.ndarray]:
        """See RegionEncoder.tokens."""
        return self.network.tokens(records, labels)


def make_encoder(clip: ClipConfig, token_width: int) -> RegionEncoder:
    """The encoder of the config. Raises ConfigError where the folder is missing or gives tokens of another width."""
    if not clip.path:
        return _untrained(clip, token_width)
    _check_width(clip, token_width)
    return load_encoder(clip.path)


def load_encoder(folder: str) -> RegionEncoder:
    """The encoder of a transformers folder. Raises ConfigError."""
    config = read_torch_config(folder, CLIPVisionConfig.from_transformers, "clip")
    params, fingerprint = load_torch_folder(folder, vision_shapes(config), "clip")
    return RegionEncoder(config, params, fingerprint, trained=True)


def _check_width(clip: ClipConfig, token_width: int) -> CLIPVisionConfig:
    config = read_torch_config(clip.path, CLIPVisionConfig.from_transformers, "clip")
    if config.projection_dim != token_width:
        raise ConfigError(
            f"config.model.clip.path={clip.path} gives tokens of {config.projection_dim}; "
            f"config.model.unet.cross_attention_dim is {token_width}"
        )
    return config


def vision_shapes(config: CLIPVisionConfig):
    """Its parameters as shapes."""
    module = CLIPVisionModelWithProjection(config)
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
    return jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]


def vision_config(clip: ClipConfig, token_width: int) -> CLIPVisionConfig:
    """What `make_encoder` would load, without its weights. Raises ConfigError."""
    if not clip.path:
        return untrained_config(clip, token_width)
    return _check_width(clip, token_width)


def untrained_config(clip: ClipConfig, token_width: int) -> CLIPVisionConfig:
    """The small network of the config's own sizes."""
    return CLIPVisionConfig(
        hidden_size=clip.hidden_size,
        intermediate_size=4 * clip.hidden_size,
        projection_dim=token_width,
        num_hidden_layers=clip.layers,
        num_attention_heads=clip.heads,
        image_size=clip.image_size,
        patch_size=clip.patch_size,
    )


def _untrained_fingerprint(clip: ClipConfig, token_width: int) -> str:
    text = json.dumps(dataclasses.asdict(clip) | {"width": token_width}, sort_keys=True)
    return "untrained-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _untrained(clip: ClipConfig, token_width: int) -> RegionEncoder:
    logging.warning(
        "region tokens come from an UNTRAINED, seeded CLIP (config.model.clip.path is empty): fine for synthetic "
        "people and for trying things out, useless for real clothes"
    )
    config = untrained_config(clip, token_width)
    module = CLIPVisionModelWithProjection(config)
    pixels = np.zeros((1, clip.image_size, clip.image_size, 3), np.float32)
    params = jax.jit(module.init)(jax.random.key(clip.seed), pixels)["params"]
    raw = RegionEncoder(config, params, _untrained_fingerprint(clip, token_width), trained=False)
    # A random network's outputs are one common vector plus a few percent: centre and spread them over seeded crops
    # of random colours, so that the differences can be seen.
    random = np.random.default_rng(clip.seed)
    low = random.integers(0, 256, (CALIBRATION_CROPS, 2, 2, 3), np.uint8)
    side = clip.image_size
    half = -(-side // 2)
    embeds = raw.encode(low.repeat(half, 1).repeat(half, 2)[:, :side, :side])
    return dataclasses.replace(raw, offset=embeds.mean(0), scale=1.0 / embeds.std(0).clip(1e-6))


def token_table(
    images: ImageSet,
    encoder: RegionEncoder | LazyEncoder,
    *,
    flip: bool,
    cache: str | None,
    fingerprint: str,
) -> TokenTable:
    """Tokens of every image of the set (and of its mirror image where `flip`), from `cache` where they lie there.

    cache: a folder, or None; tokens that lie there are mapped, not read into memory.
    fingerprint: names the images; with the encoder's it names the cache file, so that a
    file is never taken for another's. Images that cannot be read get no tokens (their batch rows are invalid).

    Of several processes the first makes the file and the others wait for it, in a `cache` that all of them see; not in a
    collective, which an hour of CLIP may bring to its time limit. Where the first one fails JAX ends the others.
    """
    key = hashlib.sha256(f"{fingerprint}|{encoder.fingerprint}|{flip}".encode()).hexdigest()[:20]
    path = pathlib.Path(cache) / f"region_tokens_{key}.safetensors" if cache else None
    if path is None:
        return TokenTable(*(np.concatenate(columns) for columns in zip(*_parts(images, encoder, flip), strict=True)))
    if jax.process_index() == 0:
        return _kept(path, images, encoder, flip)
    is_seen(path, within=math.inf)
    table, why = _read(path, len(images))
    if table is None:
        raise InputError(f"{path}: {why}; remove it, and start again")
    return table


def _kept(path: pathlib.Path, images: ImageSet, encoder: RegionEncoder | LazyEncoder, flip: bool) -> TokenTable:
    """The table in the file `path`; made and kept there where there is none."""
    if path.exists():
        table, why = _read(path, len(images))
        if table is not None:
            return table
        logging.warning("%s: %s; its region tokens are made anew", path, why)
    files.make_folder(path.parent)
    with files.atomic_write(path) as partial, tempfile.TemporaryDirectory(suffix=".partial", dir=path.parent) as work:
        for part in _parts(images, encoder, flip):
            for name, array in zip(PARTS, part, strict=False):
                with open(pathlib.Path(work) / name, "ab") as file:
                    array.tofile(file)
        columns = part[0].shape[1], MAX_CLASSES + 1
        packed = {
            name: _column(pathlib.Path(work) / name, dtype, width)
            for name, dtype, width in zip(PARTS[: len(part)], 2 * (np.float32, np.bool_), 2 * columns, strict=False)
        }
        save_file(packed, partial, metadata={DIGEST: _digest(packed)})
    return _mapped(path)


def _column(path: pathlib.Path, dtype: type, width: int) -> np.ndarray:
    """[n width] in a file of nothing else, which may be empty."""
    if not path.stat().st_size:
        return np.zeros((0, width), dtype)
    return np.memmap(path, dtype, "r").reshape(-1, width)


def _mapped(path: pathlib.Path) -> TokenTable:
    """The table in a whole file. Memory holds the pages of it that were looked at."""
    source = SafetensorsSource([path])
    return TokenTable(*(source.map(name) for name in PARTS if name in source.infos))


def _read(path: pathlib.Path, count: int) -> tuple[TokenTable | None, str]:
    """(the table of `count` images, "") or (None, what is wrong with the file): a run must not train on other tokens."""
    try:
        with safe_open(path, "numpy") as opened:
            said = (opened.metadata() or {}).get(DIGEST)
        source = SafetensorsSource([path])
        found = _digest({name: source.map(name) for name in source.infos})
    except (OSError, SafetensorError, ConversionError) as error:
        return None, f"cannot be read ({one_line(error)})"
    if said is None:
        return None, "says no digest, as an older version wrote it"
    if said != found:
        return None, "is damaged: its digest is not that of its contents"
    table = _mapped(path)
    return (table, "") if len(table.valid) == count else (None, f"holds {len(table.valid)} images for a set of {count}")


def _digest(packed: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(packed.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        for block in _blocks(array):
            digest.update(block)
    return digest.hexdigest()


def _blocks(array: np.ndarray) -> Iterator[bytes]:
    """The bytes of a mapped array, read from its file: pages of a map would count as memory of this process."""
    left = array.nbytes
    if left:
        with open(array.filename, "rb") as file:
            file.seek(array.offset)
            while left:
                block = file.read(min(left, 1 << 20))
                yield block
                left -= len(block)


def _parts(images: ImageSet, encoder: RegionEncoder | LazyEncoder, flip: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """PARTS (the first two without `flip`) of IMAGES_PER_CHUNK images after the other."""
    names = label_set(images.labels)
    bar = tqdm.tqdm(total=len(images), desc="region tokens", unit="image", disable=len(images) < 1000, delay=1)
    for start in range(0, len(images), IMAGES_PER_CHUNK):
        records = [_record(images, i) for i in range(start, min(start + IMAGES_PER_CHUNK, len(images)))]
        dense = encoder.tokens(records, images.labels)
        if flip:
            mirrored = [None if r is None else flip_record(r, names) for r in records]
            dense += encoder.tokens(mirrored, images.labels)
        yield tuple(array for tokens, valid in zip(dense[::2], dense[1::2], strict=True) for array in (tokens[valid], valid))
        bar.update(len(records))
    bar.close()


def _record(images: ImageSet, index: int) -> ImageRecord | None:
    try:
        return images.image(index)
    except InputError as error:
        logging.warning("%s (no region tokens for it)", error)
        return None
