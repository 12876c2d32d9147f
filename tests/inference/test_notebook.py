"""docs/pictures.ipynb runs from top to bottom, on the model that comes along: whole, with its own CLIP, and small."""

import json
import pathlib

import jax
import numpy as np
import pytest

from truepose_jax.runtime.bundled import SHIPPED

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

    pipe = names["pipe"]
    assert (pipe.run.step, pipe.run.weights, pipe.run.config.model.size) == (3000, "ema", (128, 96))
    assert pipe.encoder.trained and pipe.encoder.fingerprint == pipe.run.frozen["clip"]
    arrays = jax.tree.leaves(pipe.params)
    assert sum(x.size for x in arrays) == 2_624_663
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in arrays)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 15e6
