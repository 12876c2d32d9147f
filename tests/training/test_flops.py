"""Model FLOPs against two other counts: programs counted by hand, and PyTorch's counter on the peer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.base import get_config
from tests import tiny
from tests.parity.test_truepose_torch import PAPERS, exported, inputs_of, nchw
from truepose_jax.config import Config, from_config_dict
from truepose_jax.sampling.sampler import Sampler, Sampling
from truepose_jax.training import flops


def network(*settings):
    """(config, method, parameters as shapes, batch) of the tiny configuration with these settings."""
    cfg = flops.counted(tiny.config({"model": {"source_parsing": "coverage"}}, *settings))
    made = tiny.method(cfg)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), tiny.spec(cfg)))
    return cfg, made, shapes, tiny.batch(cfg, 1, targets=1)


def forward(made, params, batch):
    """The source's side and TargetNet's output for one image of zeros."""
    conditioning = made.condition(params, {}, batch)
    x, t = jnp.zeros((1, *made.latent_spec(made.model.size))), jnp.zeros((1,), jnp.int32)
    return conditioning, made.denoise(params, x, t, conditioning)


def count(function, *arguments) -> int:
    return flops.flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


X, Y = np.zeros((3, 4)), np.zeros((4, 4))
IMAGE, KERNEL = np.zeros((1, 8, 6, 5)), np.zeros((3, 3, 5, 7))
CONV = 2 * (4 * 3 * 7) * (3 * 3 * 5)


def halved(image, kernel):
    """A convolution of stride 2, padding multiplied."""
    return jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (lambda x, y: x @ y, (X, Y), 2 * 3 * 4 * 4),
        (lambda x, y: (x @ y, y @ y)[0], (X, Y), 2 * 3 * 4 * 4),  # nobody reads the second
        (lambda x: jnp.einsum("bqc,bkc->bqk", x, x), (np.zeros((2, 3, 5)),), 2 * 2 * 3 * 3 * 5),
        (lambda x, y: jax.lax.scan(lambda c, _: (c @ y, None), x, length=5)[0], (X, Y), 5 * 2 * 3 * 4 * 4),
        (lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x @ (y @ y)), (X, Y), 2 * (4 + 3) * 4 * 4),
        (halved, (IMAGE, KERNEL), CONV),
        (jax.grad(lambda *a: halved(*a).sum(), argnums=(0, 1)), (IMAGE, KERNEL), 2 * CONV),
    ],
)
def test_of_programs_counted_by_hand(function, arguments, expected):
    assert count(function, *arguments) == expected


def test_steps_of_sampling_add_up():
    cfg, made, params, batch = network(tiny.MIDDLE_ONLY)

    @functools.cache
    def picture(steps, guidance):
        sampler = Sampler(made, cfg.diffusion.schedule, "leading", Sampling(steps, guidance))
        return count(sampler.sample, params, {}, batch, tiny.keys(0, 1))

    source = count(lambda p, b: made.condition(p, {}, b), params, batch)
    output = count(lambda p, b: forward(made, p, b)[1], params, batch)
    assert picture(3, 1.0) == source + 3 * (output - source)
    assert picture(3, 2.0) - picture(2, 2.0) == picture(2, 2.0) - picture(1, 2.0) > output - source


def test_training_against_pytorchs_counter(tmp_path):
    cfg, made, shapes, batch = network(PAPERS)
    model = exported(cfg, tiny.randomise(shapes, 0), tmp_path / "export")
    source = made.autoencoder.encode_mean({}, batch["source"])
    x0 = nchw(source)
    one = torch.ones(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(x0, torch.randn_like(x0), torch.tensor([500]), inputs_of(batch, source), one, one)
        in_forward = counter.get_total_flops()
        loss.backward()
    # The peer also runs the projection after SourceNet's last block, whose result nothing reads.
    last = cfg.model.unet.sites[-1]
    h, w, _ = made.latent_spec(cfg.model.size)
    unread = 2 * (h * w) * last.channels**2
    assert last.level == 0 and in_forward == count(lambda p, b: forward(made, p, b), shapes, batch) + unread
    assert counter.get_total_flops() == flops.train_flops(cfg) + unread


@pytest.mark.slow
def test_full_size():
    """SD1.5's UNet at 64x64 latents takes about 0.8 TFLOP (two per multiplication); these have 0.69 of its cells, and attention
    falls faster. A step: three times its forward passes, and the VAE of the source and the target."""
    cfg = flops.counted(from_config_dict(Config, get_config()))
    cells = 512 * 352 / 512**2
    whole, networks = flops.train_flops(cfg), 3 * 2 * 0.8e12 * cells
    assert 0.8 * networks < whole < 2 * networks


def test_peaks():
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "cpu": None,
    }
    assert {name: flops.peak_flops(name) for name in names} == names
    np.testing.assert_allclose(flops.utilisation(989e12, 2.0, "NVIDIA H200", devices=2), 0.25)
    assert flops.utilisation(1e12, 1.0, "cpu") is None


def test_mfu_of_a_training_run(monkeypatch):
    """Less where fewer parameters are trained, and where targets share a source; of the half-cell head too."""
    monkeypatch.setattr(flops, "train_flops", functools.cache(flops.train_flops))
    config = tiny.config(tiny.MIDDLE_ONLY)
    found = flops.mfu_per_image_rate(config, "NVIDIA H200", 4)
    np.testing.assert_allclose(found, flops.train_flops(config) / (4 * 989e12))
    for less in ({"optim": {"trainable": "target_net"}}, {"data": {"targets_per_source": 3}}):
        assert flops.mfu_per_image_rate(tiny.config(tiny.MIDDLE_ONLY, less), "NVIDIA H200", 4) < found
    assert flops.mfu_per_image_rate(tiny.config(tiny.HEAD), "NVIDIA H200", 1) > 0
    assert flops.mfu_per_image_rate(config, "cpu", 1) is None
