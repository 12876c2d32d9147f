"""From a configuration to image sets and their region tokens: what training and evaluation read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from input_pipeline.annotations.parsing import label_set
from input_pipeline.batches.loader import RecordCache, make_loader
from input_pipeline.batches.readers import RecordTokens
from input_pipeline.fields import Layout
from input_pipeline.records.reader import RecordImages, open_build, split_names
from input_pipeline.schema import NUM_JOINTS, ImageSet, InputError, TokenTable
from input_pipeline.skeletons import DRAWINGS
from input_pipeline.sources.folder import FolderImages
from input_pipeline.synthetic.people import SyntheticPeople
from input_pipeline.synthetic.poses import load_real_poses
from truepose_jax.config import Config, ConfigError, SyntheticConfig
from truepose_jax.data.annotations import stored_tokens
from truepose_jax.methods import needs
from truepose_jax.pretrained.region_tokens import LazyEncoder, RegionEncoder, token_table

CACHE_BYTES = 4 << 30
"""Decoded or rendered images kept in memory; 64x48 pools fit whole, larger sets in part."""

TRAIN_SPLIT, TEST_SPLIT = "train", "test"
"""Splits of a built dataset where the config names none."""

Encoder = RegionEncoder | LazyEncoder

DOUBTED = 32
"""Photos of a folder that are looked at before a training starts: does all belong together?"""

EVAL_SEED = 1
"""Added to the run's seed for held-out people."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """images with their tokens (None where the method reads none); pairs int32 [n 2] to train or evaluate on; heldout:
    unseen in training. clip: fingerprint of the CLIP that made the tokens, where it is known."""

    images: ImageSet
    tokens: TokenTable | RecordTokens | None
    pairs: np.ndarray
    heldout: bool
    clip: str = ""


def about_records(config: Config) -> dict[str, str]:
    """{"name", "labels"} of the records that a run was trained on; {} where they are not where its config says."""
    if config.data.dataset != "records":
        return {}
    try:
        info = open_build(pathlib.Path(config.data.root)).info
    except InputError:
        return {}
    return {"name": info.name, "labels": info.metadata["labels"]}


def training_set(config: Config, encoder: Encoder | None, cache: str | None) -> Dataset:
    """Raises InputError and ConfigError where the data are not what the config says."""
    images, name = _OPEN[config.data.dataset](config, "train")
    _check_joints(config, images)
    tokens, clip = _tokens(config, images, encoder, config.data.flip, cache, name)
    return Dataset(images, tokens, images.pairs, heldout=False, clip=clip)


def layout_of(config: Config, form: str) -> Layout:
    """What a training batch of the configuration's method holds, in a form of input_pipeline/fields.py."""
    found = needs(config)
    return Layout(found.train, form, found.letters, found.drawing)


def training_form(config: Config) -> str:
    """The form in which training's batches travel."""
    return "latents" if config.data.latents == "stored" else "uint8"


def _check_joints(config: Config, images: ImageSet) -> None:
    """Raises ConfigError where poses have other joints than the model knows."""
    found, name = images.joints if isinstance(images, RecordImages) else NUM_JOINTS, config.model.skeleton
    if found != DRAWINGS[name].joints:
        raise ConfigError(
            f"poses of {config.data.root or config.data.dataset} have {found} joints; config.model.skeleton {name!r} has "
            f"{DRAWINGS[name].joints}"
        )


def training_batches(
    config: Config, data: Dataset, *, start_step: int = 0, host_index: int = 0, host_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """The loader of a training run on `data`, from `start_step` on (input_pipeline/batches/loader.py)."""
    return make_loader(
        data.images,
        data.tokens,
        layout_of(config, training_form(config)),
        draw=needs(config).draw,
        seed=config.seed,
        batch_size=config.batch_size,
        targets_per_source=config.data.targets_per_source,
        flip=config.data.flip,
        self_pair=config.data.self_pair,
        start_step=start_step,
        host_index=host_index,
        host_count=host_count,
        threads=config.data.threads,
        workers=config.data.workers,
    )


def _tokens(
    config: Config, images: ImageSet, encoder: Encoder | None, flip: bool, cache: str | None, name: str
) -> tuple[TokenTable | RecordTokens | None, str]:
    """(tokens, fingerprint of their CLIP): those of the records where they serve, else from the cache or CLIP. encoder: None
    where the method reads no tokens."""
    if encoder is None:
        return None, ""
    stored = stored_tokens(config, images, encoder) if isinstance(images, RecordImages) else None
    if stored is not None:
        return stored
    table = token_table(images, encoder, flip=flip, cache=cache, fingerprint=name)
    return table, encoder.fingerprint


def evaluation_set(config: Config, encoder: Encoder | None, cache: str | None) -> Dataset:
    """Held-out people, the folder's `eval_pairs`, or the records' test split. Pairs are spread
    evenly over the list: over its identities where these stand together, some more than once where there are fewer."""
    heldout = config.data.dataset == "synthetic" or bool(_evaluation_split(config))
    images, name = _OPEN[config.data.dataset](config, "heldout" if heldout else "train")
    _check_joints(config, images)
    tokens, clip = _tokens(config, images, encoder, False, cache, name)
    return Dataset(images, tokens, evenly_spaced(images.pairs, config.eval.pairs), heldout, clip)


def evenly_spaced(pairs: np.ndarray, count: int) -> np.ndarray:
    """`count` of the pairs, at even distances through the list (all of them where there are fewer)."""
    if len(pairs) <= count:
        return pairs
    return pairs[np.arange(count) * len(pairs) // count]


def people_settings(s: SyntheticConfig, split: str, *, seed: int, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of SyntheticPeople for a split, "train" or "heldout"."""
    train = split == "train"
    return {
        "seed": seed,
        "split": split,
        "identities": s.identities if train else s.heldout_identities,
        "poses_per_identity": s.poses_per_identity if train else s.heldout_poses_per_identity,
        "size": size,
        "patterns": s.patterns,
        "background": s.background,
        "framing": s.framing,
    }


def _synthetic(config: Config, split: str) -> tuple[ImageSet, str]:
    s, seed = config.data.synthetic, config.seed + (0 if split == "train" else EVAL_SEED)
    settings = people_settings(s, split, seed=seed, size=config.model.size)
    poses = load_real_poses(s.poses, split=split) if s.poses else None
    images = SyntheticPeople(**settings, pose_list=poses)
    return RecordCache(images, max_bytes=CACHE_BYTES), json.dumps(settings | {"poses": s.poses}, sort_keys=True)


def _evaluation_split(config: Config) -> str:
    """What config.data.eval_pairs comes to: "" where evaluation uses the training pairs."""
    d = config.data
    if d.dataset == "records" and not d.eval_pairs and TEST_SPLIT in split_names(d.root):
        return TEST_SPLIT
    return d.eval_pairs


def _records(config: Config, split: str) -> tuple[ImageSet, str]:
    d = config.data
    name = (TRAIN_SPLIT if d.pairs == "self" else d.pairs) if split == "train" else _evaluation_split(config)
    images = RecordImages(d.root, name, size=config.model.size)
    if d.labels and label_set(d.labels).name != images.labels:
        raise ConfigError(f"config.data.labels is {d.labels!r}; the maps in {d.root} are {images.labels!r} (or say '')")
    if len(images.pairs) == 0:
        why = "no photo has a visible joint" if not images.joint_counts.any() else "it has no pairs"
        raise InputError(f"{d.root}: its split '{name}' cannot be trained or evaluated on: {why}")
    return images, f"records|{images.digest}|{name}|{config.model.size}"


def _folder(config: Config, split: str) -> tuple[ImageSet, str]:
    d = config.data
    images = FolderImages(
        d.root,
        labels=d.labels,
        size=config.model.size,
        pairs=d.pairs if split == "train" else d.eval_pairs,
        keypoints=d.keypoints or None,
    )
    for line in images.doubts(DOUBTED):
        logging.warning("%s: %s", d.root, line)
    files = hashlib.sha256()
    for name, path in sorted(images.files.items()):
        stat = path.stat()
        files.update(f"{name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return RecordCache(images, max_bytes=CACHE_BYTES), f"{d.root}|{d.labels}|{config.model.size}|{files.hexdigest()}"


_OPEN = {"synthetic": _synthetic, "folder": _folder, "records": _records}
"""config.data.dataset -> function of (config, "train" | "heldout") that gives the images and names them for caches."""
