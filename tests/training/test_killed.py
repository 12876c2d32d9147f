"""A run killed with -9 on its way and started again equals the run that was left alone, bit for bit; one of several
processes equals it up to the order of sums (see also tests/runtime/test_multihost.py)."""

import json
import random
import shutil
import signal

import numpy as np
import pytest

from tests import process
from tests.training.checkpoint.test_checkpoint import damage
from truepose_jax.training.checkpoint import Checkpoints

STEPS, EVERY = 9, 3
TINY = [
    "--config=configs/demo.py",
    f"--config.total_steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    "--config.checkpoint.keep=2",
    "--config.eval.every=1000",
    "--config.eval.pairs=4",
    "--config.eval.batch_size=4",
    "--config.eval.steps=2",
    "--config.batch_size=12",
    "--config.model.size=(32, 24)",
    "--config.model.autoencoder=pixels",
    "--config.model.pixel_factor=4",
    "--config.model.unet.in_channels=48",
    "--config.model.unet.out_channels=48",
    "--config.model.fusion.carry_latents=False",
    "--config.model.carry.head=False",
    "--config.model.carry.limb_warp=False",
    *(f"--config.diffusion.losses.{name}=0" for name in ("flow", "pixels", "parsing")),
    "--config.model.pose_encoder=four_conv",
    *(f"--config.model.clip.{name}={size}" for name, size in (("layers", 1), ("hidden_size", 16), ("image_size", 16))),
    "--config.model.unet.block_out_channels=(8,)",
    "--config.model.unet.down_block_types=('DownBlock2D',)",
    "--config.model.unet.up_block_types=('UpBlock2D',)",
    "--config.model.unet.layers_per_block=0",
    "--config.model.unet.attention_head_dim=(2,)",
    "--config.model.unet.norm_num_groups=4",
    "--config.data.synthetic.identities=8",
    "--config.data.synthetic.heldout_identities=2",
]
NO_EVALUATION = "--config.eval.every=0"


def start(workdir, *more, cached=True, **variables):
    """A run; one compilation for all of this file."""
    words = [f"--workdir={workdir}", *TINY, *more]
    return process.Program("-m", "truepose_jax.train", *words, env=process.environment(cached=cached, **variables))


def run(workdir, *more):
    return start(workdir, *more).finish()


def steps_of(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_step(started, workdir, step):
    started.wait_for(lambda: any(r["step"] >= step for r in steps_of(workdir)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("straight")
    code, _, errors = run(workdir)
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


def saved_steps(workdir):
    return [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]


def test_killed_and_started_again_equals_straight(tmp_path, straight):
    """And the newest checkpoint damaged: checkpoint.allow_fallback takes the one before it."""
    killed = start(tmp_path, NO_EVALUATION)
    wait_for_step(killed, tmp_path, 2 * EVERY + 1)
    killed.wait_for(lambda: max(saved_steps(tmp_path), default=0) >= 2 * EVERY)
    killed.kill()
    killed.finish()
    newest = max(saved_steps(tmp_path))
    # The optimizer's moments are one array; a bit in a file of many may lie between them and do no harm.
    damage(tmp_path / "checkpoints", newest, "flipped", "rest")
    code, out, errors = run(tmp_path, "--config.checkpoint.allow_fallback=true", NO_EVALUATION)
    assert code == 0 and not (tmp_path / "eval.jsonl").exists(), errors
    assert f"resuming from step {newest - EVERY}" in out
    assert f"cannot read step {newest}" in errors and (tmp_path / "damaged" / str(newest)).is_dir()
    assert_same_run(tmp_path, straight)


def test_asked_to_stop_while_compiling_ends_at_once(tmp_path):
    asked = start(tmp_path, cached=False)
    asked.wait_for("starting from random parameters")
    asked.send_signal(signal.SIGTERM)
    code, _, errors = asked.finish()
    assert code == 143 and "nothing unsaved" in errors
    assert steps_of(tmp_path) == [] and not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_asked_to_stop_saves_and_says_143(tmp_path, straight):
    asked = start(tmp_path)
    wait_for_step(asked, tmp_path, EVERY + 2)
    asked.send_signal(signal.SIGTERM)
    code, out, _ = asked.finish()
    assert code == 143
    assert "run the same command again" in out
    code, _, errors = run(tmp_path, NO_EVALUATION)
    assert code == 0, errors
    assert_same_run(tmp_path, straight)


def same_run(workdir, straight, first=1):
    """Losses and gradient norms of steps from `first`, until rounding has had its say, and the evaluation."""
    records = steps_of(workdir)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for mine, theirs in zip(records[first - 1 : first + 5], steps_of(straight)[first - 1 :], strict=False):
        assert mine["valid"] == theirs["valid"]
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5 if mine["step"] == first else 2e-4)
    ours, one = (json.loads((d / "eval.jsonl").read_text())["eval"] for d in (workdir, straight))
    np.testing.assert_allclose(ours["heldout_loss"], one["heldout_loss"], rtol=1e-3)


def test_two_tasks_of_a_slurm_step(tmp_path, straight):
    """By the variables of a job step, from one process's checkpoint on. JAX derives its port from the job's number."""
    begun = STEPS - EVERY
    for name in ("metadata.json", "metrics.jsonl", f"checkpoints/{begun}"):
        copy = shutil.copytree if (straight / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(straight / name, tmp_path / name)
    job = process.free_port(random.sample(range(65536 - 4096, 65536), 100)) - (65536 - 4096)
    step = {"SLURM_JOB_ID": job, "SLURM_NTASKS": 2, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": 1}
    tasks = []
    for i in range(2):
        variables = step | {"SLURM_PROCID": i, "SLURM_LOCALID": i}
        variables = {name: str(value) for name, value in variables.items()}
        tasks.append(start(tmp_path, "--config.eval.sheet_rows=0", cached=False, **variables))
    (code, first, errors), (other, second, more) = (task.finish() for task in tasks)
    assert code == other == 0, errors[-3000:] + more[-3000:]
    assert "SLURM job" in first and "2 host(s)" in first and "1 of 2" in second
    assert f"resuming from step {begun}" in first
    same_run(tmp_path, straight, begun + 1)
    assert not (tmp_path / "samples").exists()
