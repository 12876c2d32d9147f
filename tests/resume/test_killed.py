"""A run killed with -9 on its way and started again equals the run that was left alone, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.test_checkpoint import damage
from truepose_jax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, EVERY = 40, 8
TINY = [
    "--config=configs/demo.py",
    f"--config.total_steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    "--config.checkpoint.keep=2",
    "--config.eval.every=1000",
    "--config.eval.pairs=2",
    "--config.eval.batch_size=2",
    "--config.eval.steps=2",
    "--config.batch_size=6",
    "--config.model.size=(32, 24)",
    "--config.model.unet.block_out_channels=(8,)",
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',)",
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',)",
    "--config.model.unet.layers_per_block=0",
    "--config.model.unet.attention_head_dim=(2,)",
    "--config.model.unet.norm_num_groups=4",
    "--config.data.synthetic.identities=6",
    "--config.data.synthetic.heldout_identities=2",
]


def command(workdir, *more):
    return [sys.executable, "-m", "truepose_jax.train", f"--workdir={workdir}", *TINY, *more]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One compilation for all runs of this file."""
    cache = tmp_path_factory.mktemp("compiled")
    return os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }


def run(workdir, environment, *more):
    done = subprocess.run(
        command(workdir, *more), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    return done.returncode, done.stdout, done.stderr


def steps_of(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in steps_of(workdir)):
            return
        assert process.poll() is None, f"the run ended before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, environment):
    """The run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("straight")
    code, _, errors = run(workdir, environment)
    assert code == 0, errors
    return workdir


def final_state(workdir):
    store = Checkpoints(workdir, keep=2, every=EVERY, read_only=True)
    assert store.latest_step() == STEPS
    return {part: store.restore_part(part) for part in ("params", "ema")}


def assert_same_run(workdir, straight):
    mine, theirs = final_state(workdir), final_state(straight)
    import jax

    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    ours, expected = steps_of(workdir), steps_of(straight)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in ours] == [r["loss"] for r in expected]


def test_straight_run_leaves_what_it_promises(straight):
    records = steps_of(straight)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(np.isfinite(r["loss"]) for r in records)
    assert (straight / "metadata.json").exists()
    assert (straight / "samples" / f"sheet_{STEPS:07d}.png").exists()
    results = json.loads((straight / "eval.jsonl").read_text().splitlines()[-1])["eval"]
    assert {"heldout_loss", "psnr_person", "swap_cost_image_swapped", "swap_cost_tokens_swapped"} <= results.keys()
    assert any(name.startswith("hpfa_rms/") for name in results)


def wait_for_checkpoint(process, workdir, step):
    deadline = time.monotonic() + 300
    while not any(p.name.isdigit() and int(p.name) >= step for p in (workdir / "checkpoints").iterdir()):
        assert process.poll() is None and time.monotonic() < deadline, f"step {step} was never saved"
        time.sleep(0.02)


def test_killed_and_started_again_equals_straight(tmp_path, environment, straight):
    """And the newest checkpoint damaged: refused, or with checkpoint.allow_fallback the one before it is taken."""
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(process, tmp_path, 2 * EVERY + 3)
    wait_for_checkpoint(process, tmp_path, 2 * EVERY)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    # The optimizer's moments are one array; a bit in a file of many may lie between them and do no harm.
    damage(tmp_path / "checkpoints", newest, "flipped", "rest")
    code, _, errors = run(tmp_path, environment)
    assert code == 2 and f"cannot read step {newest}" in errors.splitlines()[-1]
    assert "--config.checkpoint.allow_fallback=true" in errors.splitlines()[-1] and "Traceback" not in errors
    no_sheets = "--config.eval.sheet_rows=0"
    code, out, errors = run(tmp_path, environment, "--config.checkpoint.allow_fallback=true", no_sheets)
    assert code == 0, errors
    assert (tmp_path / "eval.jsonl").exists() and not (tmp_path / "samples").exists()
    assert f"resuming from step {newest - EVERY}" in out
    assert f"cannot read step {newest}" in errors and (tmp_path / "damaged" / str(newest)).is_dir()
    assert_same_run(tmp_path, straight)


def test_asked_to_stop_while_compiling_ends_at_once(tmp_path, environment):
    uncached = environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, env=uncached, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert any(line.startswith("parameters:") for line in process.stdout)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)  # compilation alone takes longer
    assert process.returncode == 143 and "nothing unsaved" in errors
    assert steps_of(tmp_path) == [] and not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_asked_to_stop_saves_and_says_143(tmp_path, environment, straight):
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wait_for_step(process, tmp_path, EVERY + 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "run the same command again" in out
    code, _, errors = run(tmp_path, environment)
    assert code == 0, errors
    assert_same_run(tmp_path, straight)


def test_another_configuration_is_refused(environment, straight):
    code, _, errors = run(straight, environment, "--config.optim.learning_rate=0.5")
    assert code == 2
    assert "learning_rate" in errors and len(errors.strip().splitlines()) == 1
