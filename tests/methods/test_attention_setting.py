"""config.model.attention: the form that is named is what every attention of the method traces, and nothing else."""

import logging
import re
import typing

import jax

from tests import tiny, tiny_methods
from truepose_jax.config import ModelConfig
from truepose_jax.kernels.attention import api
from truepose_jax.methods.base import ATTENDING
from truepose_jax.methods.truepose import TruePose


def test_the_setting_names_what_there_is():
    names = typing.get_args(typing.get_type_hints(ModelConfig)["attention"])
    assert names == ("auto", *api.IMPLEMENTATIONS)
    assert all(hasattr(getattr(TruePose, name), "__wrapped__") for name in ATTENDING)


def traced(caplog, name: str) -> set[tuple[str, str]]:
    """{(form, why)} of every attention of a loss, whose program is not compiled."""
    caplog.set_level(logging.INFO, logger=api.__name__)
    params = tiny_methods.one("truepose")[-1]
    api._say.cache_clear()
    caplog.clear()
    config = tiny_methods.config("truepose", {"model": {"attention": name}})
    method, batch = tiny.method(config), tiny.batch(config, 0, targets=1)
    jax.eval_shape(lambda p: method.loss(p, {}, batch, tiny.keys(0, 1)), params)
    lines = [record.getMessage() for record in caplog.records if record.name == api.__name__]
    assert {line.split(" of ")[0] for line in lines} == {"attention", "reweighted_attention"}
    # Few go to what suits them.
    many = [line for line in lines if int(re.search(r", (\d+) keys", line)[1]) > api.FEW_KEYS]
    return {re.search(r": (\w+) \((.*)\)", line).groups() for line in many}


def test_what_is_named_runs(caplog):
    assert traced(caplog, "per_image") == {("per_image", "asked for")}


def test_on_a_tpu_its_kernel_runs_where_it_is_named_alone(caplog, monkeypatch):
    monkeypatch.setattr(api, "platform", lambda: "tpu")
    assert {form for form, _ in traced(caplog, "auto")} == {"reference"}
    assert traced(caplog, "pallas_tpu") == {("pallas_tpu", "asked for")}
    assert all("UNVERIFIED" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert traced(caplog, "cudnn") == {("reference", "cudnn runs on a GPU alone, and this is a TPU")}


def test_who_calls_may_say_where_the_setting_is_auto(caplog):
    with api.default_implementation("xla"):
        assert traced(caplog, "auto") == {("xla", "asked for")}
        assert traced(caplog, "reference") == {("reference", "asked for")}
