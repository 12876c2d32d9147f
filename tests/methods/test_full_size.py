"""The full-size network by shapes alone: SD1.5's parameter count, sites, and a train step at both of the paper's sizes."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from truepose_jax.config import Config, from_config_dict
from truepose_jax.methods import make_method
from truepose_jax.models.vae import KLAutoencoder
from truepose_jax.training.init import batch_spec
from truepose_jax.training.step import Trainer

SD15_UNET = 859_520_964
"""Parameters of SD1.5's UNet (issue 2)."""

SD15_VAE = 83_653_863
"""Parameters of SD1.5's autoencoder, as diffusers counts them."""


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def full_config(size) -> Config:
    values = get_config()
    values.model.size = size
    config = from_config_dict(Config, values)
    assert config.model.remat and config.model.dtype == "bfloat16"
    return config


def spec_of(config):
    return batch_spec(config, targets=config.batch_size)


@pytest.fixture(scope="module")
def network():
    """(trainer of the 512x352 configuration, its batch, state and autoencoder parameters), all as shapes."""
    config = full_config((512, 352))
    autoencoder = KLAutoencoder(dtype=jnp.bfloat16)
    trainer = Trainer(config, make_method(config, autoencoder))
    spec = spec_of(config)
    state = jax.eval_shape(lambda: trainer.init_state(jax.random.key(0), spec))
    return trainer, spec, state, {"autoencoder": jax.eval_shape(autoencoder.init, jax.random.key(0))}


def test_parameter_counts(network):
    trainer, _, state, frozen = network
    counts = {name: count(tree) for name, tree in state.params.items()}
    print("\n" + "\n".join(f"{name}: {n:,}" for name, n in counts.items()))
    print(f"trainable: {sum(counts.values()):,}; autoencoder: {count(frozen):,}")
    assert counts["source_net"] == SD15_UNET
    assert count(frozen) == SD15_VAE
    # What TruePose adds: per block five square projections (fusion), and attn2's keys and values moved there; a norm,
    # a query and an output projection with bias (TargetNet).
    sites = trainer.config.model.unet.sites
    keys_values = sum(2 * 768 * s.channels for s in sites)
    assert counts["fusion"] == sum(5 * s.channels**2 for s in sites) + keys_values
    added = sum(2 * s.channels**2 + 3 * s.channels for s in sites)
    assert counts["target_net"] == SD15_UNET - keys_values + added
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_one_train_step_and_a_loss_at_256x176(network):
    """Slow for its tracing; benchmarks/tpu_train_step.py compiles this step for TPUs. The smaller size has the same parameters
    at 32x22 latents, 22 -> 11 -> 6 -> 3 and back."""
    trainer, spec, state, frozen = network
    assert trainer.method.latent_spec((512, 352)) == (64, 44, 4)
    after, metrics = jax.eval_shape(trainer.step, state, frozen, spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == np.float32
    assert metrics["hpfa_rms"].shape == metrics["caa_rms"].shape == (16,)

    config = full_config((256, 176))
    assert trainer.method.latent_spec((256, 176)) == (32, 22, 4)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.batch_size))
    loss, metrics = jax.eval_shape(trainer.method.loss, state.params, frozen, spec_of(config), keys)
    assert loss.shape == () and loss.dtype == np.float32
    assert metrics["hpfa_rms"].shape == (16,)


def test_sites():
    """A10: 6 down, 1 mid, 9 up; 8 heads of 40, 80 and 160."""
    sites = full_config((512, 352)).model.unet.sites
    assert len(sites) == len({s.name for s in sites}) == 16
    assert collections.Counter(s.name.split("_")[0] for s in sites) == {"down": 6, "mid": 1, "up": 9}
    assert [s.level for s in sites] == [0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert [s.head_dim for s in sites] == [40, 40, 80, 80, 160, 160, 160, 160, 160, 160, 80, 80, 80, 40, 40, 40]
    assert {s.heads for s in sites} == {8}
