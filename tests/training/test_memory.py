"""The memory estimate: by hand on small functions, against XLA's account of a compiled gradient, and as people read it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.process import environment, run
from truepose_jax.config import ConfigError
from truepose_jax.training import memory as estimates
from truepose_jax.training.memory import GIB, Estimate, Step, estimate, memory_report, peak_bytes, report

KIB = 1024
X = jax.ShapeDtypeStruct((256,), np.float32)
"""1 KiB."""


def peak(function, *arguments) -> int:
    return peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    ("function", "kib"),
    [
        (lambda x: jnp.sin(jnp.sin(x)), 1),  # the second in place of the first
        (lambda x: jnp.cumsum(jnp.cumsum(x)), 2),  # not elementwise: operand and result
        (lambda x: jnp.sin(x.reshape(16, 16)).reshape(256), 1),  # reshapes are free
        (lambda x: jnp.cumsum(x) + jnp.cumsum(x[::-1]), 3),
        (lambda x: x + jnp.broadcast_to(jnp.float32(1), (256,)), 1),
        (lambda x: jax.lax.cond(True, lambda y: jnp.cumsum(jnp.cumsum(y)), jnp.sin, x), 2),  # inside a branch
    ],
)
def test_small_functions(function, kib):
    assert abs(peak(function, X) - kib * KIB) < 64


def mlp(remat):
    layer = lambda w, x: jnp.tanh(jax.nn.softmax(x @ w) @ w)  # noqa: E731
    layer = jax.checkpoint(layer) if remat else layer

    def loss(ws, x):
        for w in ws:
            x = layer(w, x)
        return jnp.mean(x**2)

    return jax.grad(loss)


def test_against_xla():
    """Gradient of eight layers: what XLA allots, at two batch sizes. The trace keeps more of each softmax than XLA does."""
    ws = [jax.ShapeDtypeStruct((64, 64), np.float32)] * 8
    for batch in (512, 2048):
        x = jax.ShapeDtypeStruct((batch, 64), np.float32)
        found = jax.jit(mlp(False)).lower(ws, x).compile().memory_analysis()
        theirs = found.temp_size_in_bytes + found.output_size_in_bytes
        assert 0.8 < peak(mlp(False), ws, x) / theirs < 1.4


def test_rematerialisation_keeps_one_array_a_layer():
    ws = [jax.ShapeDtypeStruct((64, 64), np.float32)] * 8
    x = jax.ShapeDtypeStruct((2048, 64), np.float32)
    assert peak(mlp(True), ws, x) < 0.75 * peak(mlp(False), ws, x)


def test_kernels_hold_nothing_outside():
    """A Pallas kernel is its results; what it says of its blocks lies in another memory."""
    from jax.experimental import pallas as pl

    def double(x_ref, out_ref):
        out_ref[...] = jnp.cumsum(x_ref[...]) + jnp.cumsum(x_ref[...][::-1])

    kernel = pl.pallas_call(double, out_shape=X)
    assert abs(peak(lambda x: jnp.cumsum(kernel(x)), X) - 2 * KIB) < 64


def test_a_batch_that_was_not_traced():
    """Arrays that the traced batch divides grow with it; the rest stays."""

    def function(x, w):
        return jnp.cumsum(jnp.cumsum(x @ w, axis=0) @ w.T, axis=0), jnp.cumsum(w, axis=0)

    def at(batch):
        return jax.ShapeDtypeStruct((batch, 8, 16), np.float32), jax.ShapeDtypeStruct((16, 32), np.float32)

    traced = jax.make_jaxpr(function)(*at(61)).jaxpr
    for batch in (1, 7, 200):
        there = peak_bytes(traced, scaled=lambda size, b=batch: size // 61 * b if size % 61 == 0 else size)
        assert there == peak(function, *at(batch))


def test_of_a_configuration():
    config = tiny.config(tiny.MIDDLE_ONLY, {"optim": {"ema_decay": 0.9}})
    found = estimate(config, platforms=("gpu",))
    count, step = sum(found.networks.values()), found.steps["gpu"]
    assert found.parameters == found.ema == 4 * count and found.trained == count
    assert found.optimizer == pytest.approx(8 * count, rel=0.01) and found.frozen == 0
    assert step.per_image > 0 and step.least > 0
    text = report(config, found)
    assert f"{count:,}" in text and "16x10, float32" in text and "H200" in text and "v5e" not in text
    half = estimate(
        tiny.config(tiny.MIDDLE_ONLY, {"optim": {"ema_decay": 0.9, "trainable": "^target_net/"}}), platforms=("gpu",)
    )
    assert half.optimizer < 0.6 * found.optimizer and half.steps["gpu"].per_image < step.per_image


def test_attention_is_the_platforms_own():
    """At 192 tokens the TPU's kernel, asked for, keeps no array of logits; a GPU, without it, 2 x 192 x 192 a head."""
    config = tiny.config(tiny.MIDDLE_ONLY, {"model": {"size": (32, 24), "attention": "pallas_tpu"}})
    steps = estimate(config).steps
    assert steps["tpu"].per_image < 0.8 * steps["gpu"].per_image


def test_stored_latents_are_not_encoded():
    sizes = {}
    for latents in ("off", "stored"):
        data = {"dataset": "records", "root": "somewhere", "latents": latents}
        model = {"autoencoder": "sd15", "size": (128, 96), "unet": {"in_channels": 4, "out_channels": 4}}
        config = tiny.config(tiny.MIDDLE_ONLY, {"data": data, "model": model})
        sizes[latents] = estimate(config, platforms=("gpu",)).steps["gpu"].per_image
    assert sizes["stored"] < 0.5 * sizes["off"]


def test_largest_batch():
    step = Step(least=8 * GIB, fixed=4 * GIB, per_image=GIB // 2)
    found = Estimate({}, 4 * GIB, 0, 8 * GIB, 0, GIB, {"gpu": step})
    assert found.largest_batch(16 * GIB, "gpu") == found.largest_batch(20 * GIB, "gpu") == 0
    assert found.largest_batch(21 * GIB, "gpu") == 8
    assert found.largest_batch(16 * GIB, "gpu", fsdp=8) == 26
    for memory in (21, 30, 64):
        most = found.largest_batch(memory * GIB, "gpu")
        assert found.bytes(most, "gpu") <= memory * GIB < found.bytes(most + 1, "gpu")


def test_the_report_speaks_of_this_run():
    """Its batch on every number of devices that it divides over, its fsdp, and the sum of gradients where it accumulates."""
    step = Step(least=0, fixed=0, per_image=GIB)
    found = Estimate({"net": 1}, 4 * GIB, 0, 0, 0, 0, {"gpu": step})

    def rows(batch, mesh, accumulation=1):
        change = {"batch_size": batch, "mesh": mesh, "optim": {"accumulation": accumulation}}
        text = report(tiny.config(tiny.MIDDLE_ONLY, change), found)
        assert f"fsdp {mesh.get('fsdp', 1)}" in text.partition("largest batch")[2]
        return [line.split() for line in text.partition("this run")[2].splitlines()[1:]]

    assert [(row[0], row[2], row[6]) for row in rows(12, {"fsdp": 2})] == [
        ("2", "6", "8.00"), ("4", "3", "5.00"), ("6", "2", "4.00"), ("12", "1", "3.00")
    ]  # fmt: skip
    assert [(row[0], row[2]) for row in rows(12, {"data": 2, "fsdp": 1}, 3)] == [("2", "2")]
    assert "does not divide" in " ".join(rows(12, {"data": 5})[0])
    once, thrice = (
        estimate(tiny.config(tiny.MIDDLE_ONLY, {"batch_size": 6, "optim": {"accumulation": n}}), platforms=("gpu",))
        for n in (1, 3)
    )
    assert thrice.steps["gpu"].fixed - once.steps["gpu"].fixed == once.parameters


def test_the_report_leaves_room(monkeypatch):
    """Of 80 GiB a GPU's program has 60, and the estimate may be 8 % low."""
    step = Step(least=0, fixed=0, per_image=GIB)
    found = Estimate({"net": 1}, 0, 0, 0, 0, 0, {"gpu": step, "tpu": step})
    config = tiny.config(tiny.MIDDLE_ONLY)
    for name in estimates.SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    batches = largest(report(config, found))
    assert batches["H200 (gpu)"] == int(140.4 * 0.75 * 0.92) and batches["v5p (tpu)"] == int(95.74 * 0.92)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    text = report(config, found)
    assert (
        largest(text)["H200 (gpu)"] == int(140.4 * 0.95 * 0.92)
        and "takes 0.95 (XLA_PYTHON_CLIENT_MEM_FRACTION=.95)" in text
    )
    assert "0.47 to 0.70 of such an estimate" in text
    remat = tiny.config(tiny.MIDDLE_ONLY, {"model": {"remat": True}})
    assert "up to 8% more" in report(remat, found)
    assert largest(report(config, found, memory=100)) == {"given (gpu)": 92, "given (tpu)": 92}
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match="XLA_CLIENT_MEM_FRACTION is 'most'"):
        report(config, found)


def largest(text: str) -> dict[str, int]:
    """The printed table: the batch without FSDP, by device."""
    found = re.findall(r"^  (\S.*?\)) +[\d.]+ GiB +(\d+) ", text, re.M)
    return {name: int(batch) for name, batch in found}


CONFIG = """
from tests import tiny

def get_config():
    return tiny.settings(tiny.MIDDLE_ONLY)
"""
RUN = """
import sys
from truepose_jax import train
from truepose_jax.flags import train as told
from truepose_jax.runtime.cli import run_with_config
from jax._src import xla_bridge

def main(argv):
    assert not xla_bridge.backends_are_initialized()
    code = train.main(argv)
    print("backends", *xla_bridge.backends())
    return code

run_with_config(main, told)
"""


def estimated(*words):
    """`train` with these flags, where JAX would start on a GPU that is not there."""
    return run("-c", RUN, *words, env=environment(JAX_PLATFORMS="cuda"))


def test_no_accelerator_is_started(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    code, out, errors = estimated(f"--config={tmp_path / 'config.py'}", "--estimate", "--memory=4")
    assert code == 0, errors
    assert out.splitlines()[-1] == "backends cpu" and "given (gpu)" in out


def test_wrong_flags_are_one_line(monkeypatch):
    for settings, memory, text in ((None, None, "--config is missing"), (tiny.settings(), -1.0, "--memory is -1")):
        with pytest.raises(ConfigError, match=text):
            memory_report(settings, memory)


def test_an_ablation_that_looks_through_clip():
    """B1 has no SourceNet, and CLIP among its frozen networks."""
    cfg = tiny.config({"model": {"fusion": {"features": "clip"}}})
    found = estimate(cfg, platforms=("gpu",))
    assert "clip_source" in found.networks and "source_net" not in found.networks
    assert found.frozen > 4 * 100_000
