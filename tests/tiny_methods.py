"""The other methods as small as they go: configuration, method, frozen networks and a valid random batch of each."""

import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from input_pipeline.fields import FIELDS, Layout
from tests import tiny
from truepose_jax.config import Config, from_config_dict
from truepose_jax.methods import Trainable, needs
from truepose_jax.pretrained.factory import assemble, region_encoder
from truepose_jax.training.init import batch_spec

SIZE = (16, 12)
METHODS = ("truepose", "ipf", "fpdm", "imagpose")
DENOISERS = ("truepose", "fpdm", "imagpose")

UNET = {
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 0,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
SEEN = {"image_size": 12, "patch_size": 4, "hidden_size": 8, "layers": 1, "heads": 2}
SMALL = {
    "autoencoder": "pixels", "pixel_factor": 2, "size": SIZE, "dtype": "float32", "remat": False, "pose_encoder": "four_conv",
}  # fmt: skip


def settings(method: str, *changes) -> ConfigDict:
    """configs/base.py of the method made tiny, then changed by nested dicts."""
    if method == "truepose":
        return tiny.settings(tiny.MIDDLE_ONLY, *changes)
    found = base.get_config(method)
    model: dict[str, Any] = {
        "ipf": {
            "size": SIZE,
            "dtype": "float32",
            "clip": {
                "hidden_size": 8, "intermediate_size": 16, "projection_dim": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
            },
        },
        "fpdm": SMALL | {"unet": UNET, "dino": SEEN, "ipf": SEEN | {"width": 8}, "projection": 8},
        "imagpose": SMALL | {"unet": UNET | {"in_channels": 25}, "dino": SEEN, "patch": 2},
    }[method]  # fmt: skip
    for change in ({"total_steps": 100, "batch_size": 4, "model": model}, *changes):
        tiny._update(found, change)
    return found


def config(method: str, *changes) -> Config:
    return from_config_dict(Config, settings(method, *changes))


def assembled(cfg: Config) -> tuple[Trainable, Any]:
    """(method, frozen networks as it takes them)."""
    found = assemble(cfg, region_encoder(cfg))
    return found.method, found.frozen


def batch(cfg: Config, seed: int, rows: int = 4) -> dict[str, np.ndarray]:
    """Noise, of all that loss and condition read."""
    if cfg.model.method == "truepose":
        return tiny.batch(cfg, seed, targets=rows)
    rng = np.random.default_rng(seed)
    wanted = needs(cfg)
    layout = Layout((*wanted.train, *wanted.sample), "float32", wanted.letters, wanted.drawing)
    made = {}
    for name, (shape, dtype) in layout.shapes(batch_size=rows, targets_per_source=1, size=cfg.model.size).items():
        low = -1.0 if FIELDS[name].kind == "photo" else 0.0
        made[name] = (rng.uniform(low, 1, shape) if dtype == "float32" else rng.random(shape) < 0.5).astype(dtype)
    if "given" in made:
        made["given"][:] = np.arange(4) == 0
    made["valid"][:] = 1
    return made


@functools.cache
def one(method: str) -> tuple[Config, Trainable, Any, Any]:
    """(configuration, method, frozen, parameters all random) of the unchanged tiny configuration."""
    cfg = config(method)
    made, frozen = assembled(cfg)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), batch_spec(cfg)))
    return cfg, made, frozen, tiny.randomise(shapes, 0)
