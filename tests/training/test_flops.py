"""Model FLOPs against three other counts: traced operations, XLA's cost analysis, and PyTorch's counter on the peer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.base import get_config
from tests import tiny
from tests.parity.test_truepose_torch import SD15_LIKE, exported, inputs_of, nchw
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.kernels.attention import api
from truepose_jax.sampling.sampler import Sampler, Sampling
from truepose_jax.training import flops

IN_PARSING = {"model": {"source_parsing": "coverage"}}


@functools.cache
def network():
    """(config, method, parameters as shapes, batch): SD1.5's block types, latents of 16x11 over two levels."""
    cfg = tiny.config(SD15_LIKE, IN_PARSING)
    made = tiny.method(cfg)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), tiny.spec(cfg)))
    return cfg, made, shapes, tiny.batch(cfg, 1, targets=1)


def conditioning_of(made, params, batch):
    return made.condition(params, {}, batch)


def output_of(made, params, conditioning):
    """TargetNet's, for one image of zeros."""
    x, t = jnp.zeros((1, *made.latent_spec(made.model.size))), jnp.zeros((1,), jnp.int32)
    return made.denoise(params, x, t, conditioning)


def multiplications(jaxpr) -> int:
    """Two FLOPs each, of every product and convolution that something reads, padding included."""
    from jax.interpreters import partial_eval

    found = 0
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            found += 2 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, order = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            found += 2 * math.prod(out.shape) * math.prod(kernel[i] for i in order[1:])
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += times * multiplications(inner)
    return found


def test_forward_is_what_is_traced():
    cfg, made, params, batch = network()
    expected = flops.model_flops(cfg)
    conditioning = jax.eval_shape(lambda p, b: conditioning_of(made, p, b), params, batch)

    def count(function, *arguments):
        return multiplications(jax.make_jaxpr(function)(*arguments).jaxpr)

    source = count(lambda p, b: conditioning_of(made, p, b), params, batch)
    single_key = sum(  # may be left out: one token's softmax is 1
        part.forward for part in flops.source_parts(cfg)
        if part.name in ("attn2.to_q", "attn2.to_k", "attn2.products")
    )  # fmt: skip
    assert source in (expected.source + expected.pose, expected.source + expected.pose - single_key)
    assert count(lambda p, c: output_of(made, p, c), params, conditioning) == expected.conditional
    # Of a dropped source two rows of zeros go through HPFA's and CAA's output layers.
    biases = sum(2 * 2 * site.channels**2 for site in cfg.model.unet.sites)
    assert count(lambda p, c: output_of(made, p, made.null(c)), params, conditioning) == expected.null + biases


def test_any_traced_program():
    """The count of this file, the sampler's loop included, which is the formula's; and of a branch the longest."""
    cfg, made, params, batch = network()
    sampler = Sampler(made, cfg.diffusion.schedule, "leading", Sampling(3, 2.0))
    jaxpr = jax.make_jaxpr(sampler.sample)(params, {}, batch, tiny.keys(0, 1)).jaxpr
    found = flops.flops_of(jaxpr)
    assert found == multiplications(jaxpr)
    assert found == pytest.approx(flops.model_flops(cfg).sample(3, 2.0), rel=0.01)

    def branch(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x @ (y @ y))

    squares = jax.make_jaxpr(branch)(np.zeros((3, 4)), np.zeros((4, 4))).jaxpr
    assert flops.flops_of(squares) == 2 * (4 * 4 * 4 + 3 * 4 * 4)


def test_carried_latents_are_counted():
    cfg = tiny.config({"model": {"fusion": {"carry_latents": True, "cosine": True, "residual": True}}})
    made = tiny.method(cfg)
    params, batch = jax.eval_shape(lambda: made.init(jax.random.key(0), tiny.spec(cfg))), tiny.batch(cfg, 1, targets=1)
    conditioning = jax.eval_shape(lambda p, b: conditioning_of(made, p, b), params, batch)
    traced = multiplications(jax.make_jaxpr(lambda p, c: output_of(made, p, c))(params, conditioning).jaxpr)
    found, plain = flops.model_flops(cfg), flops.model_flops(tiny.config())
    h, w, channels = made.latent_spec(cfg.model.size)
    more = 0
    for site in cfg.model.unet.sites:
        n, carried = -(-h // 2**site.level) * -(-w // 2**site.level), site.heads * channels
        more += 2 * n * n * carried + 2 * n * carried * site.channels
    assert traced == found.conditional and found.conditional == plain.conditional + more
    assert found.source == plain.source and found.null == plain.null
    assert plain.train + 2 * more < found.train < plain.train + 3 * more
    head = tiny.config(tiny.HEAD)
    assert flops.mfu_per_image_rate(head, "NVIDIA H200", 1) is None
    with pytest.raises(ConfigError, match="half-cell head"):
        flops.model_flops(head)


def test_forward_against_xla():
    """Of the unoptimised program, which also counts elementwise operations and leaves padding out: a few per cent, and
    fewer where the network is wide."""
    cfg = tiny.config(SD15_LIKE, {"model": {"unet": {"block_out_channels": (128, 128)}}})
    made = tiny.method(cfg)
    batch = tiny.batch(cfg, 1, targets=1)
    params = jax.eval_shape(lambda: made.init(jax.random.key(0), tiny.spec(cfg)))

    def run(params, batch):
        conditioning = conditioning_of(made, params, batch)
        return conditioning, output_of(made, params, conditioning)

    with api.default_implementation("reference"):  # XLA counts what a loop of `per_image` does once
        cost = jax.jit(run).lower(params, batch).cost_analysis()
    expected = flops.model_flops(cfg)
    ratio = (expected.source + expected.pose + expected.conditional) / cost["flops"]
    print(f"\nanalytic / XLA: {ratio:.4f}")
    assert 0.97 < ratio < 1.06


def test_training_against_pytorchs_counter(tmp_path):
    cfg, _, shapes, batch = network()
    model = exported(cfg, tiny.randomise(shapes, 0), tmp_path / "export")
    made = tiny.method(cfg)
    source = made.autoencoder.encode_mean({}, batch["source"])
    x0 = nchw(source)
    one = torch.ones(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(x0, torch.randn_like(x0), torch.tensor([500]), inputs_of(batch, source), one, one)
        forward = counter.get_total_flops()
        loss.backward()
    expected = flops.model_flops(cfg)
    # The peer also runs the projection after SourceNet's last block, whose result nothing reads ...
    last = cfg.model.unet.sites[-1]
    h, w, _ = made.latent_spec(cfg.model.size)
    unread = 2 * (h * w) * last.channels**2
    assert last.level == 0 and forward == expected.source + expected.pose + expected.conditional + unread
    # ... and differentiates the queries and keys of a single token: twice more, but for the token's own gradient.
    more = {"attn2.to_q": 2, "attn2.to_k": 1, "attn2.products": 2}
    idle = sum(more.get(part.name, 0) * part.forward for part in flops.source_parts(cfg))
    assert counter.get_total_flops() == expected.train + idle + unread


@pytest.mark.parametrize("size", [(512, 352), (256, 176)])
def test_full_size(size):
    values = get_config()
    values.model.size = size
    cfg = from_config_dict(Config, values)
    found = flops.model_flops(cfg)
    print(f"\n{size}: {found}")
    # SD1.5's UNet at 64x64 latents takes about 0.8 TFLOP (two per multiplication); these latents have 0.69 of its cells,
    # and a quarter of that, and attention falls faster.
    cells = size[0] * size[1] / 512**2
    assert 0.5e12 * cells < found.null < 0.9e12 * cells
    assert 2.5 < found.train / (found.source + found.pose + found.conditional) < 3
    assert found.sample(35, 1.0) == found.source + found.pose + 35 * found.conditional
    assert found.sample(35, 3.5) - found.sample(35, 1.0) == 35 * found.null


def test_more_targets_share_a_source():
    cfg = tiny.config(SD15_LIKE)
    three = tiny.config(SD15_LIKE, {"data": {"targets_per_source": 3}})
    one, shared = flops.model_flops(cfg), flops.model_flops(three)
    assert shared.train < one.train and shared.conditional == one.conditional


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


def test_mfu_of_a_training_run():
    config = tiny.config(SD15_LIKE)
    found = flops.mfu_per_image_rate(config, "NVIDIA H200", 4)
    np.testing.assert_allclose(found, flops.model_flops(config).train / (4 * 989e12))
    some = tiny.config(SD15_LIKE, {"optim": {"trainable": "target_net"}})
    ablation = tiny.config(SD15_LIKE, {"model": {"fusion": {"alignment": "global"}}})
    assert flops.mfu_per_image_rate(config, "cpu", 1) is None
    assert flops.mfu_per_image_rate(some, "NVIDIA H200", 1) is None
    assert flops.mfu_per_image_rate(ablation, "NVIDIA H200", 1) is None
