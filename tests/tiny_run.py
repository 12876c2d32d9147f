"""A workdir of a run that never trained: a tiny TruePose on 32x24 pictures, all of whose parameters are random."""

import contextlib
import functools
import json
import pathlib
import tempfile
import unittest.mock

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from configs import base
from tests.shared_data import openpose_json, standing_joints
from truepose_jax.config import Config, from_config_dict
from truepose_jax.inference import pipeline
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.pretrained.factory import assemble, region_encoder
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.training.checkpoint import Checkpoints, parameter_table, write_metadata
from truepose_jax.training.init import batch_spec
from truepose_jax.training.step import Trainer

SIZE = (32, 24)
STEPS = (3, 7)
"""Steps that have checkpoints."""


def tiny_config(**changes) -> Config:
    """changes: {"model.clip.path": ..., "optim.ema_decay": ...} by dotted name with __ for dots."""
    config = base.get_config()
    config.model.update(size=SIZE, autoencoder="pixels", pixel_factor=4, remat=False, dtype="float32")
    config.model.unet.update(
        in_channels=48,
        out_channels=48,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=0,
        attention_head_dim=(2,),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    config.model.clip.update(image_size=16, hidden_size=16, layers=1)
    config.diffusion.update(steps=2, guidance=2.0)
    config.optim.ema_decay = 0.9
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        node = config
        for part in filter(None, group.split("__")):
            node = node[part]
        node[key] = value
    return from_config_dict(Config, config)


def random_like(params, seed: int):
    """Every parameter random, those that start at zero too: the source and the pose then show in the picture."""
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    spread = [1.5 / np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 0.5 for x in leaves]
    arrays = [random.normal(0, s, x.shape) for s, x in zip(spread, leaves, strict=True)]
    return structure.unflatten([jax.numpy.asarray(a, jax.numpy.float32) for a in arrays])


def make_run(workdir: pathlib.Path, config: Config) -> pathlib.Path:
    """Checkpoints at STEPS and metadata.json, as train.py leaves them."""
    encoder = region_encoder(config)
    method, _, _, prints = assemble(config, encoder)
    clip = {} if encoder is None else {"clip": encoder.fingerprint}
    init = Trainer(config, method).init_state
    abstract = jax.eval_shape(lambda key: init(key, batch_spec(config)), jax.random.key(0))
    checkpoints = Checkpoints(workdir, keep=3, every=1)
    for step in STEPS:
        parts = {
            "params": random_like(abstract.params, step),
            "ema": random_like(abstract.ema, 10 * step) if config.optim.ema_decay else None,
            "rest": {"step": jax.numpy.int32(step)},
        }
        checkpoints.save(step, parts, extra={"step": step})
    checkpoints.close()
    write_metadata(
        workdir,
        config=config,
        parameter_table=parameter_table(abstract.params),
        mesh={},
        extra={"frozen": {**prints, **clip}},
    )
    return workdir


_folder = tempfile.TemporaryDirectory(prefix="tiny_run_")


@functools.cache
def shared_run() -> pathlib.Path:
    """One such workdir for all tests, which leave it as it is."""
    return make_run(pathlib.Path(_folder.name) / "run", tiny_config())


@functools.cache
def shared_pipeline() -> Pipeline:
    """That run, loaded."""
    return Pipeline.load(shared_run())


SETTINGS = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def quick_starts():
    """While this holds, a start of `generate` costs 3 s and not 12: XLA keeps its programs in the folder of
    this run of the tests, and the untrained CLIP is made once."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    with unittest.mock.patch.object(pipeline, "make_encoder", functools.cache(make_encoder)):
        for settings in (SETTINGS, before):
            compilation_cache.reset_cache()  # else JAX keeps to what it decided at the first compilation
            for name, value in settings.items():
                jax.config.update(name, value)
            if settings is SETTINGS:
                yield


def write_inputs(folder: pathlib.Path, count: int = 3, hw: tuple[int, int] = (40, 30)) -> pathlib.Path:
    """count photos I.png of blobs, maps I_map.png of atr18 and poses I.json (frame not implied) in pixels of hw."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    for i in range(count):
        low = Image.fromarray(random.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        low.resize(hw[::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        rows = np.repeat((np.arange(hw[0]) * 18 // hw[0])[:, None], hw[1], 1)
        Image.fromarray(rows.astype(np.uint8)).save(folder / f"{i}_map.png")
        joints = standing_joints(*hw)
        joints[:, :2] += random.normal(0, 1.5, (18, 2))
        (folder / f"{i}.json").write_text(openpose_json(joints))
    (folder / "none.json").write_text(json.dumps({"people": [{"pose_keypoints_2d": [0] * 54}]}))
    return folder
