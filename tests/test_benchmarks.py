"""The speed benchmarks at a tiny size: both sides agree, the tables are written, a second start measures nothing again."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import sampling, side_by_side, side_by_side_forms, train_step

TINY = ["--size=16x16", "--widths=32", "--layers=1", "--batch=1", "--repeats=2", "--threads=1"]


def test_a_form_with_other_numbers_is_not_timed(tmp_path):
    case = train_step.rows(_flags(train_step.main))[0].case
    for name, numbers in (("ours", [1.0, 1.1]), ("eager", [1.0, 1.1 + 1e-6]), ("compiled", [1.0, 1.2])):
        np.save(tmp_path / f"{name}.npy", np.array(numbers))
    assert side_by_side._difference(case, tmp_path, "eager") < 2e-6
    with pytest.raises(side_by_side.FormFailed, match=r"differ from ours by .* not timed"):
        side_by_side._difference(case, tmp_path, "compiled")


def _flags(main):
    """The flags that `main` would run with."""
    import argparse

    parser = argparse.ArgumentParser()
    side_by_side.add_flags(parser)
    return parser.parse_args(TINY)


def test_ratio_is_of_the_same_round():
    """A load that doubles one round's times changes neither side's standing."""
    row = {"ours": {"times": [1.0, 2.0, 1.0]}, "eager": {"times": [2.0, 4.0, 2.0]}, "about": {"apart": False}}
    assert side_by_side.ratio(row, "eager") == 0.5


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("--batch=0", "--batch is 0"),
        ("--peers=foo", "names 'foo'"),
        ("--size=33x32", "divisible by 8"),
        ("--widths=33", "multiple of 32"),
        ("--full", "--device=gpu"),
    ],
)
def test_bad_flags_are_one_line(wrong, text, capsys):
    for main in (train_step.main, sampling.main):
        with pytest.raises(SystemExit) as stopped:
            main([wrong])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and text in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_scripts_write_their_tables(tmp_path, capsys):
    out = f"--out={tmp_path}"
    assert train_step.main([*TINY, out, "--peers=eager"]) == 0
    assert sampling.main([*TINY, out, "--peers=recompute_eager,cached_eager", "--steps=2"]) == 0
    for name, peers in (("train_step", 1), ("sampling", 2)):
        results = json.loads((tmp_path / f"{name}.json").read_text())
        (row,) = results["rows"].values()
        timed = [found for form, found in row.items() if form != "about"]
        assert len(timed) == 1 + peers and all(len(found["times"]) == 2 for found in timed)
        assert all(found["difference"] < 1e-4 and found["peak_bytes"] > 0 for found in timed)
        assert "| ours |" in (tmp_path / f"{name}.md").read_text()
    capsys.readouterr()
    assert train_step.main([*TINY, out, "--peers=eager"]) == 0
    assert "done before" in capsys.readouterr().out
    assert side_by_side_forms.OURS in row
    # Other settings under one name are refused, a further form is measured beside those that are there.
    assert train_step.main([*TINY, out, "--layers=2"]) == 2
    assert "with layers 1 where 2 is asked for" in capsys.readouterr().err
    assert train_step.main([*TINY, out, "--peers=eager_nhwc"]) == 0
    (row,) = json.loads((tmp_path / "train_step.json").read_text())["rows"].values()
    assert {"ours", "eager", "eager_nhwc"} < set(row) and len(row["eager_nhwc"]["times"]) == 2


@pytest.mark.slow
def test_a_peer_that_recomputes_agrees(tmp_path):
    case = dataclasses.replace(train_step.rows(_flags(train_step.main))[0].case, remat=True)
    row = side_by_side.measure(side_by_side.Row(case, ("eager",), 2, 200.0))
    assert row["eager"]["difference"] < 1e-4 and len(row["eager"]["times"]) == 2
