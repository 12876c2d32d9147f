"""What is timed on both sides: one network, its random weights, one batch. All of it follows from a Case and a seed.

The batch holds latents in the place of photos: the peer has no autoencoder, and frozen networks are not part of the comparison.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from configs.base import get_config
from input_pipeline.schema import MAX_CLASSES, WHOLE_IMAGE
from truepose_jax.config import Config, from_config_dict
from truepose_jax.diffusion import losses
from truepose_jax.methods.truepose import TruePose
from truepose_jax.pretrained.conversion.export import write_export
from truepose_jax.runtime import rng
from truepose_jax.training.init import batch_spec

SEED = 0
FACTOR = 8
CLASSES_HERE = 18
"""Of ATR-18: labels that parsing maps hold."""
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 3.0
"""So large that in float32 a side which leaves out clipping or decay is found by its losses; a step's time is the same."""
CHECKED_STEPS = 3
"""Training steps whose losses both sides must agree on: the later ones tell of gradients and the optimizer's updates."""


@dataclasses.dataclass(frozen=True)
class Case:
    """task "train" or "sample". size: (h, w) of the photos in pixels. widths: of the UNets' levels (SD1.5: 320 640 1280
    1280), attention on all but the lowest. dtype: of the computations, "float32" or "bfloat16". device "cpu" or "gpu".
    attention: an implementation of kernels/attention for ours, "" for what is taken there.
    """

    task: str
    size: tuple[int, int]
    widths: tuple[int, ...]
    batch: int
    dtype: str
    device: str
    threads: int
    token_width: int = 768
    steps: int = 35
    guidance: float = 3.5
    remat: bool = False
    layers: int = 2
    attention: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Case:
        """From JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def name(self) -> str:
        h, w = self.size
        steps = f"_{self.steps}steps" if self.task == "sample" else "_remat" if self.remat else ""
        widths = "-".join(map(str, self.widths))
        return f"{self.task}_{self.device}_{self.dtype}_{h}x{w}_width{widths}_batch{self.batch}{steps}" + (
            f"_{self.attention}" if self.attention else ""
        )

    def config(self) -> Config:
        values = get_config()
        values.total_steps = 1000
        values.batch_size = self.batch
        model, levels = values.model, len(self.widths)
        model.size, model.dtype, model.remat = self.size, self.dtype, self.remat
        model.unet.block_out_channels = self.widths
        model.unet.down_block_types = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",)
        model.unet.up_block_types = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1)
        model.unet.layers_per_block = self.layers
        model.unet.attention_head_dim = (8,) * levels
        model.unet.cross_attention_dim = self.token_width
        model.clip.hidden_size = self.token_width
        values.diffusion.steps, values.diffusion.guidance = self.steps, self.guidance
        values.optim.learning_rate, values.optim.weight_decay = LEARNING_RATE, WEIGHT_DECAY
        values.optim.layout = "tree"
        return from_config_dict(Config, values)


class Latents:
    """`Autoencoder` of latents that are there already."""

    factor, channels, scale = FACTOR, 4, 1.0

    def encode_mean(self, params, images):
        del params
        return images

    def encode_sample(self, params, images, keys):
        del params, keys
        return images

    def decode(self, params, latents):
        del params
        return latents


class LatentTruePose(TruePose):
    """Gives latents as they are: pictures would be clipped to [-1, 1]."""

    def decode(self, frozen, latents):
        return self.autoencoder.decode(frozen, latents)


def method_of(case: Case) -> LatentTruePose:
    config = case.config()
    return LatentTruePose(config.model, config.diffusion, Latents())


def batch_of(case: Case) -> dict[str, np.ndarray]:
    """One source per target; latents of unit variance, parsing maps of a dozen rectangles, every region there valid."""
    generator = np.random.default_rng(SEED)
    made = {}
    for name, field in batch_spec(case.config(), targets=case.batch).items():
        if name == "target_parsing":
            continue
        shape = field.shape
        if name in ("source", "target"):
            shape = (case.batch, case.size[0] // FACTOR, case.size[1] // FACTOR, 4)
        drawn = generator.standard_normal(shape) if field.dtype == np.float32 else np.zeros(shape)
        made[name] = drawn.astype(field.dtype)
    h, w = case.size
    for each in made["source_parsing"]:
        for label in generator.integers(1, CLASSES_HERE, 12):
            top, left = generator.integers(0, h - 8), generator.integers(0, w - 8)
            each[top : top + generator.integers(8, h), left : left + generator.integers(8, w)] = label
    made["target_pose"] = np.clip(np.abs(made["target_pose"]), 0, 1)
    made["valid"][:] = 1
    made["class_on"][:, 1:CLASSES_HERE] = generator.random((case.batch, CLASSES_HERE - 1)) < 0.5
    for row, each in enumerate(made["source_parsing"]):
        made["region_valid"][row, [*(set(np.unique(each)) - {0}), WHOLE_IMAGE]] = True
    made["region_tokens"] *= made["region_valid"][..., None]
    assert np.all(made["region_valid"][:, :MAX_CLASSES].any(axis=1))
    return made


def params_of(case: Case) -> Any:
    """float32 on the host, every parameter random: matrices of unit gain, scales about 1, biases about 0. Every core draws some:
    by JAX on a device each shape would be a program to compile."""
    # An initialisation that reads latents: their shape is a batch's, not a photo's.
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(case).items()}
    shapes = jax.eval_shape(lambda: method_of(case).init(jax.random.key(0), batch))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)

    def draw(number: int) -> np.ndarray:
        path, leaf = leaves[number]
        noise = np.random.default_rng((SEED, number)).standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) > 1:
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(0.1) * noise + np.float32(path[-1].key == "scale")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return jax.tree.unflatten(jax.tree.structure(shapes), pool.map(draw, range(len(leaves))))


def sampling_keys(case: Case) -> jax.Array:
    return jax.random.split(jax.random.key(SEED), case.batch)


def draws_of(case: Case) -> dict[str, np.ndarray]:
    """What ours draws from its keys, for the peer: noise, timesteps and drops of the first training steps, or the noise that
    sampling starts from. [CHECKED_STEPS b ...] and [b h w c]."""
    shape = (case.size[0] // FACTOR, case.size[1] // FACTOR, 4)
    if case.task == "sample":
        return {"noise": np.asarray(jax.vmap(lambda key: jax.random.normal(key, shape))(sampling_keys(case)))}
    config, found = case.config(), {"eps": [], "t": [], "keep": []}
    for step in range(CHECKED_STEPS):
        keys = jax.random.split(rng.key(jax.random.key(config.seed), "train", step), case.batch)

        def drawn(stream, sampler, keys=keys):
            return jax.vmap(lambda key: sampler(rng.key(key, stream)))(keys)

        u = drawn("timesteps", jax.random.uniform)
        found["eps"].append(drawn("noise", lambda key: jax.random.normal(key, shape)))
        found["t"].append(losses.timesteps(u, config.diffusion.schedule.steps, config.diffusion.timestep_power))
        found["keep"].append(drawn("drop", jax.random.uniform) >= config.diffusion.drop_rate)
    return {name: np.stack([np.asarray(x) for x in each]) for name, each in found.items()}


def write_for_peer(case: Case, folder: pathlib.Path) -> None:
    """folder/export, as `convert to-torch` writes it, where it is not there yet, and folder/inputs.npz: batch and draws."""
    if not (folder / "export").exists():
        run = {"step": 0, "weights": "raw", "frozen": {}}
        write_export(folder / "export", params_of(case), config=case.config(), run=run)
    np.savez(folder / "inputs.npz", **batch_of(case), **draws_of(case))
