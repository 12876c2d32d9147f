"""Training for a time: the number of steps comes from the first steps' rate, and one program serves any number."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.tiny_run import tiny_config
from truepose_jax import train
from truepose_jax.training.checkpoint import CheckpointError
from truepose_jax.training.optim import learning_rate
from truepose_jax.training.time_budget import FILE, SKIPPED, TIMED, TimeBudget, kept_steps


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self):
        return self.now


def steps(budget, clock, seconds, start=0):
    """(step, what the budget says) until it says something; every step takes so many seconds."""
    for step in range(start + 1, start + 100):
        clock.now += seconds
        if found := budget.steps(step, jnp.zeros(())):
            return step, found
    raise AssertionError("nothing chosen")


def test_training_ends_when_the_time_is_over():
    clock = Clock()
    budget = TimeBudget(2.0, clock)
    clock.now += 30  # set-up
    step, (total, rate) = steps(budget, clock, 0.25)
    assert step == SKIPPED + TIMED and rate == pytest.approx(4)
    assert clock.now + (total - step) * 0.25 == pytest.approx(100 + 120, abs=0.3)


def test_compilation_is_no_part_of_the_rate():
    clock = Clock()
    budget = TimeBudget(2.0, clock)
    assert budget.steps(8, ()) is None
    clock.now += 60
    _, (total, rate) = steps(budget, clock, 0.5, start=8)
    assert rate == pytest.approx(2) and total > 8 + SKIPPED + TIMED


def test_a_late_start_still_trains():
    clock = Clock()
    budget = TimeBudget(0.1, clock)
    step, (total, _) = steps(budget, clock, 3.0)
    assert total == step + TIMED


def test_the_number_is_kept(tmp_path):
    budget = TimeBudget(2.0)
    assert kept_steps(tmp_path) is None
    budget.keep(tmp_path, 321, 4.5)
    assert json.loads((tmp_path / FILE).read_text()) == {"minutes": 2.0, "steps_per_second": 4.5, "total_steps": 321}
    assert kept_steps(tmp_path) is None, "no step was saved: whoever starts again chooses again"
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert kept_steps(tmp_path) == 321
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="remove it"):
        kept_steps(tmp_path)
    with pytest.raises(CheckpointError, match="cannot write"):
        budget.keep(tmp_path / FILE, 1, 1.0)


@pytest.mark.parametrize("flat, warmup", [(0.3, 9), (0.0, 0), (0.05, 20)])
def test_one_schedule_for_any_number_of_steps(flat, warmup):
    settings = {"learning_rate": 2.0, "schedule": "cosine", "flat": flat, "final": 0.02, "warmup_steps": warmup}
    config = tiny.config({"optim": settings}).optim
    traced = jax.jit(lambda step, total: learning_rate(config, total)(step))
    for total in (50, 200):
        want = [learning_rate(config, total)(step) for step in range(total + 1)]
        found = [traced(step, jnp.int32(total)) for step in range(total + 1)]
        np.testing.assert_allclose(found, want, rtol=1e-5)
    assert traced._cache_size() == 1


@pytest.mark.slow  # a minute of compilation
def test_a_run_that_ends_in_time(tmp_path):
    """No time at all: the least number of steps, no evaluation; a second start knows that it is done."""
    config = tiny_config(batch_size=2, total_steps=1000, data__synthetic__identities=2, data__threads=1)
    last = SKIPPED + TIMED + TIMED
    for _ in range(2):
        assert train.train(config, str(tmp_path), minutes=0.001) == 0
        steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, last + 1)] and kept_steps(tmp_path) == last
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(last)]
    assert not (tmp_path / "eval.jsonl").exists() and not (tmp_path / "samples").exists()
