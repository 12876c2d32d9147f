"""The fuzzer for some seconds, and that it would see what it looks for."""

import os
import re
import time

import pytest

from tests.fuzz import outcomes
from tests.fuzz.outcomes import Call, outcome
from tests.process import run
from truepose_jax.runtime.cli import run_program

SECONDS = 4


def test_bad_inputs_end_in_one_line():
    """In a process that forks before JAX has threads. No records: they take seconds to build."""
    flags = [f"--minutes={SECONDS / 60}", "--seed=1", "--without=records"]
    code, out, errors = run("-m", "tests.fuzz", *flags)
    assert code == 0, out + errors
    assert int(re.search(r"^\| all \| ([\d,]+)", out, re.MULTILINE)[1].replace(",", "")) > 1, out


def _line(words):
    raise outcomes_error


outcomes_error = FileNotFoundError(2, "No such file or directory", "x")


def _waits(words):
    time.sleep(600)


def _writes(words):
    with open("a", "w") as file:
        file.write("other")


SEEN = {
    outcomes.ONE_LINE: lambda words: run_program(_line, words),
    outcomes.ACCEPTED: lambda words: os.write(2, b"WARNING: so\n") and 0,
    outcomes.SILENT: lambda words: 0,
    outcomes.TRACEBACK: lambda words: {}["x"],
    outcomes.LINES: lambda words: os.write(2, b"error: a\nerror: b\n") and 2,
    outcomes.DAMAGED: _writes,
    outcomes.CODE: lambda words: 3,
    outcomes.HANG: _waits,
}


@pytest.mark.filterwarnings("ignore:os.fork")  # these children touch no thread's work
@pytest.mark.parametrize("kind", SEEN)
def test_each_outcome_is_told(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(outcomes, "PATIENCE", 1.0 if kind == outcomes.HANG else 60)
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "a").write_text("good")
    assert outcome(Call("t", "w", SEEN[kind], [], folder, bad=True))[0] == kind
