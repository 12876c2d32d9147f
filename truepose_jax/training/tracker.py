"""A run's numbers and pictures for Weights & Biases or trackio, whose Python calls are the same."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.annotations.photo import one_line
from truepose_jax.config import ConfigError
from truepose_jax.runtime.cli import install


def check_installed(name: str) -> None:
    """Raises ConfigError. name: config.tracker."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"config.tracker is '{name}', which is not installed: {install(name)}")


class Tracker:
    """Takes what TensorBoard's event file takes, and sends one row a step. All starts of a workdir are one run there. Where the
    service fails later on, the run goes on without it, and says so once."""

    def __init__(self, name: str, project: str, workdir: Path, settings: Mapping[str, Any]):
        """name: "wandb" or "trackio". settings: what it shows beside the run. Raises ConfigError."""
        check_installed(name)
        self._name, self._row, self._step = name, {}, 0
        self._module = importlib.import_module(name)
        place = workdir.absolute()
        called = f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:6]}"
        more = {"id": called[-6:], "dir": str(place)} if name == "wandb" else {"embed": False}
        try:
            self._run = self._module.init(project=project, name=called, config=dict(settings), resume="allow", **more)
        except Exception as error:  # of a service: no login, no network, ...
            raise ConfigError(f"config.tracker: {name} does not start ({one_line(error)})") from error

    def scalar(self, name: str, value: float, step: int) -> None:
        self._put(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """uint8 [h w 3]"""
        self._put(name, self._module.Image(picture), step)

    def _put(self, name: str, value: Any, step: int) -> None:
        if step != self._step:
            self.flush()
        self._step = step
        self._row[name] = value

    def flush(self) -> None:
        row, self._row = self._row, {}
        if row and self._run is not None:
            self._tried(lambda: self._run.log(row, step=self._step))

    def close(self) -> None:
        self.flush()
        if self._run is not None:
            self._tried(self._run.finish)

    def _tried(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # training for days does not end for it
            logging.warning("%s failed (%s): the run goes on without it", self._name, one_line(error))
            self._run = None
