"""The method of docs/extending.md, as it stands there, trains once its two rows are added."""

import dataclasses
import json
import pathlib
import re
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import base
from truepose_jax import train
from truepose_jax.config import MODELS, Config, ModelConfig, PositiveFloat, from_config_dict
from truepose_jax.diffusion import losses
from truepose_jax.methods import PAPERS, Paper
from truepose_jax.methods.base import Needs
from truepose_jax.methods.denoising import per_row, without_invalid

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
NAMES = {
    "dataclasses": dataclasses, "Literal": Literal, "nn": nn, "jax": jax, "jnp": jnp, "ModelConfig": ModelConfig,
    "PositiveFloat": PositiveFloat, "losses": losses, "Needs": Needs, "per_row": per_row, "without_invalid": without_invalid,
    "__name__": __name__,
}  # fmt: skip


def mean_settings(monkeypatch) -> ConfigDict:
    """A configuration of the page's method, whose two rows are there for this test."""
    (text,) = re.findall(r"```python\n(@dataclasses.*?)```", PAGE.read_text(), re.DOTALL)
    names = dict(NAMES)
    exec(text, names)
    monkeypatch.setitem(MODELS, "mean", names["MeanModel"])
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


def test_the_pages_method_trains(tmp_path, monkeypatch):
    values = mean_settings(monkeypatch)
    assert train.train(from_config_dict(Config, values), str(tmp_path)) == 0
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in told]
    assert len(found) == 4 and np.isfinite(found).all() and found[-1] < found[0]
    assert json.loads((tmp_path / "eval.jsonl").read_text())["eval"]["heldout_loss"] > 0
