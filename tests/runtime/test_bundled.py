"""Experiments and models that come along: by name, and one line where there is none."""

import os
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from input_pipeline.schema import InputError
from truepose_jax.runtime import bundled
from truepose_jax.runtime.cli import parse_flags


def test_configs_are_found_by_name_and_by_the_path_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = str(bundled.CONFIGS / "demo.py")
    for given in ("demo", "demo.py", "configs/demo.py"):
        assert bundled.find_config(given) == there
    assert bundled.find_config("synthetic_ablation:B3") == f"{bundled.CONFIGS / 'synthetic_ablation.py'}:B3"
    pathlib.Path("demo.py").touch()
    assert bundled.find_config("demo.py:x:y") == "demo.py:x:y", "a file that is there comes first"


@pytest.mark.parametrize("given", ["", "nope", "other/demo.py", "../configs/demo.py", "variants", "/nope.py", "."])
def test_what_is_no_config_is_one_line_with_the_names(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="demo") as caught:
        bundled.find_config(given)
    assert "\n" not in str(caught.value)


def test_a_model_is_found_by_its_name_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundled.find_model("synthetic_128x96") == str(bundled.SHIPPED)
    for given in ("nope", "", "..", "synthetic_128x96/source_net", "../models/synthetic_128x96", str(tmp_path)):
        assert bundled.find_model(given) == given
    os.mkdir("synthetic_128x96")
    assert bundled.find_model("synthetic_128x96") == "synthetic_128x96", "a folder that is there comes first"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config=/nope.py"], "/nope.py does not exist"),
        (["--config="], "--config is empty"),
        (["--config=configs"], "configs is a folder"),
        (["--config", "demo:foo"], "demo:foo: this experiment has no variants"),
        (["--config=synthetic_ablation:foo"], "unknown variant 'foo'"),
        (["--config=demo", "--config.nope=1"], "--config.nope: there is no such setting"),
        (["--config=demo", "--config.modle.size=1"], 'Did you mean "model"'),
    ],
)
def test_bad_configs_end_with_2_and_one_line(monkeypatch, capsys, words, told):
    argv, values = ["train", *words], flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit) as ended:
        parse_flags(argv)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and len(errors.strip().splitlines()) == 1 and told in errors, errors
