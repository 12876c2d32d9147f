"""From a configuration to image sets and their region tokens: what training and evaluation read."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np

from input_pipeline.folder import FolderImages
from input_pipeline.loader import RecordCache
from input_pipeline.poses import load_real_poses
from input_pipeline.schema import ImageSet
from input_pipeline.synthetic import SyntheticPeople
from input_pipeline.transforms import TokenTable
from truepose_jax.region_tokens import RegionEncoder, token_table
from truepose_jax.schema import Config

CACHE_BYTES = 4 << 30
"""Decoded or rendered images kept in memory; 64x48 pools fit whole, larger sets in part."""

EVAL_SEED = 1
"""Added to the run's seed for held-out people."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """images with their tokens; pairs int32 [n 2] to train or evaluate on; heldout: unseen in training."""

    images: ImageSet
    tokens: TokenTable
    pairs: np.ndarray
    heldout: bool


def training_set(config: Config, encoder: RegionEncoder, cache: str | None) -> Dataset:
    images, name = _synthetic(config, "train") if config.data.dataset == "synthetic" else _folder(config, "pairs")
    tokens = token_table(images, encoder, flip=config.data.flip, cache=cache, fingerprint=name)
    return Dataset(images, tokens, images.pairs, heldout=False)


def evaluation_set(config: Config, encoder: RegionEncoder, cache: str | None) -> Dataset:
    """Held-out people, or the folder's `eval_pairs`. Pairs are spread over the identities: one of each first."""
    if config.data.dataset == "synthetic":
        images, name = _synthetic(config, "heldout")
        heldout = True
    else:
        images, name = _folder(config, "eval_pairs" if config.data.eval_pairs else "pairs")
        heldout = bool(config.data.eval_pairs)
    tokens = token_table(images, encoder, flip=False, cache=cache, fingerprint=name)
    return Dataset(images, tokens, spread(images.pairs, config.eval.pairs), heldout)


def spread(pairs: np.ndarray, count: int) -> np.ndarray:
    """`count` of the pairs, at even distances through the list (all of them where there are fewer)."""
    if len(pairs) <= count:
        return pairs
    return pairs[np.arange(count) * len(pairs) // count]


def _synthetic(config: Config, split: str) -> tuple[ImageSet, str]:
    s = config.data.synthetic
    train = split == "train"
    settings = {
        "seed": config.seed if train else config.seed + EVAL_SEED,
        "split": split,
        "identities": s.identities if train else s.heldout_identities,
        "poses_per_identity": s.poses_per_identity if train else s.heldout_poses_per_identity,
        "size": config.model.size,
        "patterns": s.patterns,
        "background": s.background,
        "framing": s.framing,
    }
    poses = load_real_poses(s.poses, split=split) if s.poses else None
    images = SyntheticPeople(**settings, pose_list=poses)
    return RecordCache(images, max_bytes=CACHE_BYTES), json.dumps(settings | {"poses": s.poses}, sort_keys=True)


def _folder(config: Config, which: str) -> tuple[ImageSet, str]:
    d = config.data
    images = FolderImages(
        d.root,
        labels=d.labels,
        size=config.model.size,
        pairs=getattr(d, which),
        keypoints=d.keypoints or None,
    )
    files = hashlib.sha256()
    for name, path in sorted(images.files.items()):
        stat = path.stat()
        files.update(f"{name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return RecordCache(images, max_bytes=CACHE_BYTES), f"{d.root}|{d.labels}|{config.model.size}|{files.hexdigest()}"
