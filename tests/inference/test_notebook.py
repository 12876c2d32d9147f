"""docs/pictures.ipynb runs from top to bottom, on the model that comes along."""

import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the [pose] extra is not installed")
pytestmark = pytest.mark.usefixtures("started_quickly")
NOTEBOOK = pathlib.Path(__file__).resolve().parents[2] / "docs" / "pictures.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "committed without outputs"
            exec("".join(cell["source"]), names)
    (first, second), (moved, _) = names["pictures"], names["moved"]
    assert first.dtype == np.uint8 and first.shape == moved.shape and first.std() > 20
    assert np.abs(first.astype(int) - moved).max() > 30, "the wrist went up"
    assert first.shape == second.shape and not np.array_equal(first, second), "two seeds"
    assert names["told"][-1][0] == names["told"][-1][1] and names["again"].run.step == names["pipe"].run.step
