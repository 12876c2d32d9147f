"""Several real processes on this machine, joined by gloo: the examples, losses and stops of one process."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.resume.test_killed import TINY, steps_of, wait_for_step
from truepose_jax import distributed
from truepose_jax.schema import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 6
SHORT = [
    *TINY,
    f"--config.total_steps={STEPS}",
    "--config.checkpoint.every=100",
    "--config.batch_size=12",
    "--config.data.synthetic.identities=8",
    "--config.eval.pairs=4",
    "--config.eval.batch_size=4",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(**more):
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_"))} | one_device | more


def launch(workdir, *more, env=None):
    command = [sys.executable, "-m", "truepose_jax.train", f"--workdir={workdir}", *SHORT, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env or environment(), stdout=pipe, stderr=pipe, text=True)


def by_flags(workdir, count, *more):
    port = free_port()
    join = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    return [launch(workdir, *join, f"--process={i}", *more) for i in range(count)]


def by_slurm(workdir, count):
    """The variables of a SLURM job step. JAX derives the port from the job's number: take one that gives a free port."""
    job = free_port() % 4096
    step = {"SLURM_JOB_ID": job, "SLURM_NTASKS": count, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": 1}
    ranks = [step | {"SLURM_PROCID": i, "SLURM_LOCALID": i} for i in range(count)]
    return [launch(workdir, env=environment(**{k: str(v) for k, v in rank.items()})) for rank in ranks]


def finish(processes, code=0):
    outputs = [p.communicate(timeout=500) for p in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == code, errors[-3000:]
    return [out for out, _ in outputs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    finish([launch(workdir)])
    return workdir


def same_run(workdir, alone):
    """Losses, gradient norms and the evaluation: equal up to the order of sums."""
    records = steps_of(workdir)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for mine, theirs in zip(records, steps_of(alone), strict=True):
        assert mine["valid"] == theirs["valid"]
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5 if mine["step"] == 1 else 2e-4)
    ours, one = (json.loads((d / "eval.jsonl").read_text())["eval"] for d in (workdir, alone))
    np.testing.assert_allclose(ours["heldout_loss"], one["heldout_loss"], rtol=1e-3)
    assert (workdir / "samples" / f"sheet_{STEPS:07d}.png").is_file()


def test_two_tasks_of_a_slurm_step(tmp_path, alone):
    first, second = finish(by_slurm(tmp_path, 2))
    assert "SLURM job" in first and "2 host(s)" in first and "1 of 2" in second
    same_run(tmp_path, alone)


@pytest.mark.slow
def test_two_processes_with_the_parameters_cut_over_both(tmp_path, alone):
    """Slow for its compilation alone: the optimizer's update of hundreds of arrays, in each process."""
    finish(by_flags(tmp_path, 2, "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.optim.layout=tree"))
    same_run(tmp_path, alone)


@pytest.mark.slow
def test_four_processes(tmp_path, alone):
    finish(by_flags(tmp_path, 4))
    same_run(tmp_path, alone)


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_the_same_step(tmp_path):
    processes = by_flags(tmp_path, 2, "--config.total_steps=2000", "--config.checkpoint.every=5000")
    wait_for_step(processes[0], tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, code=143)
    stopped = [next(line for line in out.splitlines() if "asked to stop" in line) for out in outputs]
    assert stopped[0] == stopped[1]
    (saved,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"saved step {saved};" in stopped[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "of"}, "--distributed is 'of'"),
        ({"coordinator": "localhost:1"}, "--process is missing"),
        ({"coordinator": "localhost", "process": 0, "processes": 1}, "HOST:PORT"),
        ({"coordinator": "localhost:1", "process": 2, "processes": 2}, "from 0 to 1"),
        ({"mode": "off", "process": 1}, "makes no sense"),
    ],
)
def test_bad_flags(arguments, text):
    with pytest.raises(ConfigError, match=text):
        distributed.start(**arguments)


def test_bad_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID is 'first'"):
        distributed.start()
    monkeypatch.delenv("JAX_PROCESS_ID")
    with pytest.raises(ConfigError, match="--process is missing"):
        distributed.start()
