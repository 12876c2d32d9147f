"""A tiny TruePose for tests: config, method, a valid random batch, and parameters that are all random.

Zero-initialised parameters would hide most of HPFA: `params` draws every one.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.base import get_config
from input_pipeline.schema import MAX_CLASSES, WHOLE_IMAGE
from tests.records import pair_layout
from tests.shared_data import standing_joints
from truepose_jax.config import Config, from_config_dict
from truepose_jax.methods.truepose import TruePose
from truepose_jax.pretrained.frozen_networks import load_autoencoder
from truepose_jax.runtime.sharding import path_of

TOKEN_WIDTH = 12
LAST_CLASS = 17
"""Of ATR-18; the batch's other rows of classes are padding."""

# 16x10 pixels at factor 2: one level of 8x5 cells. No layers on the way down leaves two blocks, in the middle and on the
# way up; most of a test's time goes into compiling.
CHANGES = {
    "total_steps": 100,
    "batch_size": 6,
    "model": {
        "size": (16, 10),
        "autoencoder": "pixels",
        "pixel_factor": 2,
        "unet": {
            "in_channels": 12,
            "out_channels": 12,
            "block_out_channels": (8,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "layers_per_block": 0,
            "attention_head_dim": 2,
            "cross_attention_dim": TOKEN_WIDTH,
            "norm_num_groups": 4,
        },
        "remat": False,
        "dtype": "float32",
    },
}

MIDDLE_ONLY = {
    "model": {"unet": {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}},
}
"""Change to a single transformer block, where a test compiles the whole method several times."""

HEAD = {
    "model": {
        "size": (32, 24),
        "autoencoder": "patches",
        "patch_channels": 4,
        "unet": {"in_channels": 16, "out_channels": 16, **MIDDLE_ONLY["model"]["unet"]},
        "fusion": {"carry_latents": True, "cosine": True, "residual": True},
        "carry": {"head": True, "width": 16, "limb_warp": True},
    },
    "diffusion": {
        "schedule": {"prediction": "x0"},
        "losses": {"latents": 0.5, "flow": 0.3, "pixels": 2.0, "parsing": 0.3},
    },
}
"""Change to 4x3 cells with all that is ours: one HPFA that carries latents, the half-cell head at 8x6, every loss. Two
channels a group in the head's norms: of one alone no bias before them has a gradient."""


def settings(*changes: Mapping[str, Any]) -> ConfigDict:
    """configs/base.py made tiny, then changed by nested dicts."""
    found = get_config()
    for change in (CHANGES, *changes):
        _update(found, change)
    return found


def _update(group: ConfigDict, change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, Mapping):
            _update(group[key], value)
        else:
            with group.ignore_type():
                group[key] = value


def config(*changes: Mapping[str, Any]) -> Config:
    return from_config_dict(Config, settings(*changes))


def method(cfg: Config) -> TruePose:
    return TruePose(cfg.model, cfg.diffusion, load_autoencoder(cfg.model)[0])


def spec(cfg: Config, *, targets: int = 1, sources: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    layout = pair_layout(width=cfg.token_width)
    shapes = layout.shapes(batch_size=targets, targets_per_source=targets // sources, size=cfg.model.size)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def batch(cfg: Config, seed: int, *, targets: int, sources: int | None = None) -> dict[str, np.ndarray]:
    """Noise photos; parsing maps of a dozen rectangles; every region that is there is valid. Skeletons of the same person moved
    about, with a joint in ten missing."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, field in spec(cfg, targets=targets, sources=sources or targets).items():
        if field.dtype == np.float32:
            made[name] = rng.uniform(-1, 1, field.shape).astype(np.float32)
        else:
            made[name] = np.zeros(field.shape, field.dtype)
    h, w = cfg.model.size
    for name in ("source_parsing", "target_parsing"):
        for each in made[name]:
            for label in rng.integers(0, LAST_CLASS + 1, 12):
                top, left = rng.integers(0, h - 3), rng.integers(0, w - 3)
                each[top : top + rng.integers(3, h), left : left + rng.integers(3, w)] = label
    for name in ("source_joints", "target_joints"):
        joints = standing_joints(h, w) + 0.1 * h * made[name] * (1, 1, 0)
        made[name] = (joints * (made[name][..., 2:] < 0.8)).astype(np.float32)
    made["target_pose"] = np.abs(made["target_pose"])
    made["region_tokens"] *= 2
    made["valid"][:] = 1
    made["class_on"][:, 1 : LAST_CLASS + 1] = rng.random((targets, LAST_CLASS)) < 0.5
    for row, each in enumerate(made["source_parsing"]):
        made["region_valid"][row, [*(set(np.unique(each)) - {0}), WHOLE_IMAGE]] = True
    made["region_tokens"] *= made["region_valid"][..., None]
    assert np.all(made["region_valid"][:, :MAX_CLASSES].sum(axis=1) >= 3), "choose another seed"
    pair_layout(width=cfg.token_width).check(made)
    return made


def randomise(shapes: Any, seed: int) -> Any:
    """A random float32 tree of these shapes: matrices of unit gain, scales about 1, biases about 0.

    Queries and keys get twice the gain: soft attention averages the source away and leaves HPFA next to no gradient.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names, noise = [part.key for part in path], rng.standard_normal(leaf.shape)
        if len(leaf.shape) > 1:
            gain = 2.0 if names[-2].endswith(("to_q", "to_k")) else 1.0
            return jnp.asarray(gain * noise / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)
        return jnp.asarray(0.2 * noise + (names[-1] == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def params(made: TruePose, cfg: Config, seed: int = 0) -> Any:
    """Parameters of the method, every one random."""
    return randomise(jax.eval_shape(lambda: made.init(jax.random.key(0), spec(cfg))), seed)


TARGETS = 6
"""Batch size of the one compiled gradient that most tests share."""


@functools.cache
def base() -> tuple[Config, TruePose, Any]:
    """(config, method, parameters) of the unchanged tiny configuration."""
    cfg = config()
    return cfg, method(cfg), params(method(cfg), cfg)


@functools.cache
def base_gradient() -> Callable:
    """(params, batch of TARGETS, keys) -> ((loss, metrics), gradients) of `base`, compiled once for the whole run."""
    made = base()[1]
    return jit(jax.value_and_grad(lambda p, b, k: made.loss(p, {}, b, k), has_aux=True))


def keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def compiler_options() -> dict[str, Any]:
    """XLA's quickest way to a program, for nothing here runs long: half the time of the default."""
    lowest = {"xla_backend_optimization_level": 0}
    older = lowest | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=older)()
    except jax.errors.JaxRuntimeError:  # a jaxlib without that option
        return lowest
    return older


def jit(function: Callable) -> Callable:
    """jax.jit that compiles quickly and gives NumPy arrays."""
    call = jax.jit(function, compiler_options=compiler_options())
    return lambda *args: jax.device_get(call(*args))


def rows(made: Mapping[str, Any], chosen, *, sources=None) -> dict[str, Any]:
    """Rows `chosen` of every field (`sources`: other ones for the fields of the source)."""
    of_source = {"source", "source_joints", "source_parsing", "region_tokens", "region_valid"}
    sources = chosen if sources is None else sources
    return {k: v[np.asarray(sources if k in of_source else chosen)] for k, v in made.items()}


def with_rows(made: Mapping[str, Any], new: Mapping[str, Any], chosen, fields=None) -> dict[str, Any]:
    """Rows `chosen` of `made`, one source per target, replaced by those of `new` (in these fields)."""
    found = dict(made)
    for name in made if fields is None else fields:
        at = np.isin(np.arange(len(made[name])), chosen).reshape(-1, *[1] * (made[name].ndim - 1))
        found[name] = np.where(at, new[name], made[name])
    return found


def named(tree: Any) -> dict[str, np.ndarray]:
    """{'source_net/conv_in/kernel': array} in the order of the tree's leaves."""
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def error(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected number, of two arrays or two trees (worst leaf)."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        assert np.isfinite(a).all() and np.isfinite(b).all()
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def check_gradients(found: Any, expected: Any, *, whole: float = 2e-5, leaf: float = 2e-4) -> None:
    """The same gradients in another order of summation: `whole` on the norm of the difference of the trees, `leaf` on
    each leaf's largest difference (some are sums that nearly cancel). Measured: up to 1e-5 and 6e-5."""
    assert error(found, expected) < leaf
    flat, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected))
    assert np.linalg.norm(flat - want) < whole * np.linalg.norm(want)
