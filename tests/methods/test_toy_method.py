"""The method of docs/extending.md, as it stands there, trains once its two rows are added."""

import json
import pathlib
import re

import numpy as np
from ml_collections import ConfigDict

from configs import base
from truepose_jax import config, convert, train
from truepose_jax.config import MODELS, Config, from_config_dict
from truepose_jax.config import model as model_settings
from truepose_jax.methods import PAPERS, Paper

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"


def mean_settings(monkeypatch) -> ConfigDict:
    """A configuration of the page's method, whose rows are there for this test."""
    settings, method = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {**vars(model_settings)}
    exec(settings, names)
    monkeypatch.setattr(config, "MeanModel", names["MeanModel"], raising=False)
    monkeypatch.setitem(MODELS, "mean", names["MeanModel"])
    names = {"__name__": __name__}
    exec(method, names)
    monkeypatch.setitem(PAPERS, "mean", Paper(names["needs"], names["make"]))
    values = base.get_config("mean")
    values.model.size = (32, 24)
    values.total_steps, values.batch_size = 4, 4
    values.data.targets_per_source = 2
    values.data.threads = 1
    values.data.synthetic.update(identities=4, heldout_identities=2)
    values.optim.update(learning_rate=0.1, accumulation=2)
    values.eval.update(every=4, pairs=4)
    return values


def test_the_pages_method_trains(tmp_path, monkeypatch, capsys):
    values = mean_settings(monkeypatch)
    assert train.train(from_config_dict(Config, values), str(tmp_path)) == 0
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in told]
    assert len(found) == 4 and np.isfinite(found).all() and found[-1] < found[0]
    assert json.loads((tmp_path / "eval.jsonl").read_text())["eval"]["heldout_loss"] > 0
    assert convert.main(["to-torch", f"--workdir={tmp_path}", f"--dst={tmp_path / 'out'}"]) == 2
    assert "no form to write a model of method 'mean'" in capsys.readouterr().err
