"""The TPU kernels compiled for real TPUs without one, in an environment of its own (`pytest -m slow`)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "truepose_jax" / "tpu_aot"
"""Where jax[tpu] is set up once (1.3 GB)."""
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def python():
    """The environment's Python."""
    import tpu_aot

    try:
        return tpu_aot.set_up(CACHE)
    except SystemExit as stop:
        assert stop.code == tpu_aot.NO_PIP
        pytest.skip("pip cannot install jax[tpu] here")


def run(python, *arguments):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([python, *arguments], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_tpu_aot(python, tmp_path):
    """Forward and backward compile for every chip; no array of logits remains, and 5x fewer bytes move."""
    script = ROOT / "benchmarks" / "tpu_aot.py"
    run(python, script, "--sizes=2816x40,48x160", f"--out={tmp_path}")
    rows = json.loads((tmp_path / "tpu_aot.json").read_text())["rows"]
    assert {row["chip"] for row in rows} == {"v5e", "v5p", "v6e"}
    plain, _, fused = (
        {(r["chip"], r["tokens"], r["direction"]): r for r in rows if r["form"] == form}
        for form in ("reference", "xla", "pallas_tpu")
    )
    for at, row in fused.items():
        if at[1] == 2816:
            assert row["temporaries_bytes"] < row["logits_bytes"] / 10, at
            assert plain[at]["temporaries_bytes"] >= row["logits_bytes"], at
            assert plain[at]["hbm_bytes"] >= 5 * row["hbm_bytes"], at


@pytest.mark.slow
def test_odd_sizes_masks_and_a_mesh_compile(python):
    run(python, "-m", "tests.kernels.tpu_programs")
