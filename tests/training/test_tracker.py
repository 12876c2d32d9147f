"""What goes to Weights & Biases or trackio: by a stand-in that has their calls."""

import importlib
import importlib.util

import numpy as np
import pytest

from tests.tiny_run import tiny_config
from tests.training.test_run_log import make, metrics
from truepose_jax import train
from truepose_jax.config import ConfigError
from truepose_jax.training.tracker import Tracker

STAND_IN = """
sent, begun, ended, broken = [], [], [], []
class Image:
    def __init__(self, picture): self.picture = picture
class Run:
    def log(self, row, step):
        if broken: raise ConnectionError("no route")
        sent.append((step, row))
    def finish(self): ended.append(True)
def init(**words):
    begun.append(words)
    return Run()
"""


@pytest.fixture(params=["wandb", "trackio"])
def service(request, tmp_path, monkeypatch):
    (tmp_path / f"{request.param}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, request.param, raising=False)
    module = importlib.import_module(request.param)
    yield module
    del importlib.sys.modules[request.param]


def start(service, workdir) -> Tracker:
    return Tracker(service.__name__, "people", workdir, {"seed": 3})


def test_one_row_a_step_and_one_run_a_workdir(service, tmp_path):
    picture = np.full((4, 6, 3), 7, np.uint8)
    for first in (1, 4):
        with make(tmp_path / "run", log_every=1, start_step=first - 1, tracker=start(service, tmp_path / "run")) as monitor:
            for step in range(first, first + 3):
                monitor.step(step, metrics(step), examples=1)
            monitor.flush()
            monitor.evaluation(step, {"psnr": 20.0, "bad": np.nan})
            monitor.image(step, "sheet", picture)
    rows = {step: {**dict(next(r for s, r in service.sent if s == step)), **row} for step, row in service.sent}
    assert [rows[step]["train/loss"] for step in range(1, 7)] == [0.5 + step for step in range(1, 7)]
    assert len(service.sent) == 8 and rows[3]["eval/psnr"] == 20 and "eval/bad" not in rows[6]
    assert rows[6]["sheet"].picture is picture and rows[2]["loss_bins/0"] == 1
    one, again = service.begun
    assert one == again and one["config"] == {"seed": 3} and one["resume"] == "allow" and one["project"] == "people"
    assert one["name"].startswith("run-") and len(service.ended) == 2
    start(service, tmp_path / "other" / "run")
    assert service.begun[-1]["name"] != one["name"]


def test_a_service_that_fails_ends_no_run(service, tmp_path, caplog):
    service.broken.append(True)
    with make(tmp_path / "run", log_every=1, tracker=start(service, tmp_path / "run")) as monitor:
        for step in range(1, 4):
            monitor.step(step, metrics(step), examples=1)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{service.__name__} failed (no route): the run goes on without it"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_one_line_before_anything(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"config.tracker is '{name}', which is not installed: pip install -e '.\[{name}\]'"):
        train.train(tiny_config(tracker=name), str(tmp_path / "run"))
    assert not list((tmp_path).rglob("metadata.json"))


def test_a_service_that_does_not_start_is_one_line(service, tmp_path, monkeypatch):
    def refuse(**words):
        raise RuntimeError("no API key\nSee pages")

    monkeypatch.setattr(service, "init", refuse)
    with pytest.raises(ConfigError, match=r"does not start \(no API key\)"):
        start(service, tmp_path)
