"""benchmarks/tpu_train_step.py: the search for the largest batch, the compiler's account, and (slow) the compiler itself."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tpu_aot  # noqa: E402
import tpu_train_step  # noqa: E402
from tpu_aot import code_of  # noqa: E402
from tpu_train_step import ROWS, account, compiled, kept, next_batch, origin  # noqa: E402

from benchmarks import tables  # noqa: E402

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "truepose_jax" / "tpu_aot"


def search(bytes_at, available, guess, per_image, tells=True):
    """tells: whether a refusal says how many bytes it would have taken."""
    tried = {}
    while (batch := next_batch(tried, available, guess, per_image)) is not None:
        assert batch not in tried and batch >= 1
        found = bytes_at(batch)
        tried[batch] = found if tells or found <= available else math.inf
    return max((b for b, found in tried.items() if found <= available), default=0), len(tried)


@pytest.mark.parametrize("guess", (1, 20, 36, 40, 200))
@pytest.mark.parametrize("per_image", (0.5, 1, 4))
@pytest.mark.parametrize("tells", (True, False))
def test_the_largest_batch_is_found(guess, per_image, tells):
    """Bytes 100 + max(50, 2 b): 150 fit up to b = 25, 175 up to 37, 90 never."""

    def bytes_at(batch):
        return 100 + max(50, 2 * batch)

    for available, want in ((150, 25), (175, 37), (90, 0)):
        found, compilations = search(bytes_at, available, guess, per_image, tells)
        assert found == want and compilations <= 11


def test_a_straight_line_takes_four():
    """The guess, the line's batch with the estimate's slope, the line's batch with its own, and one more that is refused."""
    assert search(lambda batch: 10 + 3 * batch, 100, 20, 2.0) == (30, 4)


ASSIGNMENT = """BufferAssignment:
allocation 0: size 1000, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <1 a @0> (size=1000,offset=0): f32[250]{0:T(256)}
allocation 1: size 200, parameter 1, shape |u8[200]| at ShapeIndex {}:
allocation 2: size 40, output shape is |f32[10]|, maybe-live-out:
allocation 3: size 5000, preallocated-temp:
allocation 4: size 7000, color 1, preallocated-temp:
allocation 5: size 12, constant:

HLO module text: allocation 6: size 99
"""


def test_account():
    found = account(ASSIGNMENT, "ENTRY %main (a: f32[250]) -> f32[10] {\n}\n", 4)
    wanted = {
        "bytes": 6252,
        "argument_bytes": 1200,
        "output_bytes": 1040,
        "donated_bytes": 1000,
        "temporary_bytes": 5012,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["collectives"] == {} and found["kernels"] == 0


def test_rows_are_named_once_and_meshes_fit():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row.chips % row.fsdp == 0 for row in ROWS)


def test_what_is_compiled_already_is_read(tmp_path, monkeypatch):
    folder = tmp_path / ROWS[0].name / "b0003"
    folder.mkdir(parents=True)
    found = {"bytes": 5, "of": origin()}
    (folder / "result.json").write_text(json.dumps(found))
    monkeypatch.setattr(tpu_train_step.subprocess, "Popen", lambda *_, **__: pytest.fail("compiled again"))
    assert compiled(ROWS[0], 3, tmp_path) == found


def test_a_compilation_of_something_else_is_set_aside(tmp_path, capsys):
    path = tmp_path / "result.json"
    for of, taken in ((origin(), True), (origin() | {"options": {}}, False), (origin() | {"sources": ""}, False)):
        path.write_text(json.dumps({"bytes": 5, "of": of}))
        assert (kept(path) is not None) == taken
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is ")[2] for line in said] == ["of other options; set aside", "of other sources; set aside"]
    for text in ("{", "[]", '{"bytes": 5}'):
        path.write_text(text)
        assert kept(path) is None and "cannot be read" in capsys.readouterr().err


def test_only_code_counts_as_source():
    one = 'def f(x):\n    """Says this."""\n    return x  # why\n'
    assert (
        code_of(one)
        == code_of('def f(x):\n    "And that."\n\n    return (x)\n')
        != code_of("def f(x):\n    return -x\n")
    )


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["--rows=["], "no regular expression"),
        (["--rows=nothing"], "no row's name"),
        (["--code"], "--code is for --batch"),
        (["--batch=3", "--verify", f"--rows=^{ROWS[0].name}$"], "leave one out"),
        (["--batch=3", "--compilations=4", f"--rows=^{ROWS[0].name}$"], "--compilations is of the search"),
        (["--batch=3"], "--batch is for one row"),
        ([f"--out={__file__}"], "is a file"),
    ],
)
def test_wrong_flags_are_one_line(wrong, text, refuses):
    refuses(text, tpu_train_step.main, *wrong)


def test_attention_of_some_chips_is_merged(tmp_path, refuses):
    cells = [("v5e", n, form) for n in (2816, 48) for form in tpu_aot.FORMS]
    names = ("chip", "tokens", "form")
    rest = {"head_width": 40, "direction": "forward", "logits_bytes": 4, "temporaries_bytes": 1, "hbm_bytes": 2}
    rows = [dict(zip(names, cell, strict=True)) | rest | {"compile_seconds": 1.0, "of": "jax 1"} for cell in cells]
    new = [row | {"compile_seconds": 9.0, "of": "jax 2"} for row in rows[:3]]
    found = tables.merged(rows, [*new, *(row | {"chip": "v6e"} for row in rows[:3])][::-1], tpu_aot.cell_of)
    found.sort(key=tpu_aot.order)
    assert [row["compile_seconds"] for row in found] == [9.0] * 3 + [1.0] * 6
    text = tpu_aot.report(found)
    assert "- v5e 48x40, v6e 2816x40: jax 1." in text and text.count("| 2816 x 40 |") == 2
    refuses("'v9' is no chip", tpu_aot.main, "--chips=v9")
    refuses("'3' is not TOKENSxWIDTH", tpu_aot.main, "--sizes=3")
    (tmp_path / "tpu_aot.json").write_text("{")
    refuses("another --out", tpu_aot.main, f"--out={tmp_path}")


@pytest.mark.slow
def test_the_account_is_memory_analysis(tmp_path):
    """Of a small network's step on four chips, code generated: the assignment of buffers against the compiler's summary."""
    try:
        python = tpu_train_step.set_up(CACHE)
    except SystemExit as stop:
        assert stop.code == tpu_aot.NO_PIP
        pytest.skip("pip cannot install jax[tpu] here")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    call = [python, "-m", "tests.benchmarks.tpu_account", tmp_path]
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    theirs = found["memory_analysis"]
    assert theirs["argument"] == pytest.approx(found["argument_bytes"], rel=0.01)
    assert theirs["alias"] == pytest.approx(found["donated_bytes"], rel=0.01)
    assert theirs["temp"] == pytest.approx(found["temporary_bytes"], rel=0.05)
    assert found["kernels"] > 0
