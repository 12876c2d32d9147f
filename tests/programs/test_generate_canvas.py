"""`generate` with several sources and poses: what comes out, lists of canvases, and every bad request in one line."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests import tiny_methods
from tests.tiny_run import SIZE, make_run, shared_run, write_inputs
from truepose_jax import generate

CHANGES = {"model": {"size": SIZE}, "diffusion": {"steps": 1, "guidance": 2.0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("canvas") / "run", tiny_methods.config("imagpose", CHANGES))


def words(inputs, run, sources, poses, outs, *more):
    found = [f"--workdir={run}", "--pose-frame=40x30", "--source-pose-frame=40x30", *more]
    for name, values in (("source", sources), ("pose", poses)):
        found += [f"--{name}={inputs / str(value)}" for value in values]
    found += [f"--source-pose={inputs / pathlib.Path(photo).with_suffix('.json')}" for photo in sources]
    return found + [f"--out={out}" for out in outs]


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_canvases(inputs, run, tmp_path):
    """A star with its sheet; one pose of it with two sources; the same by a list, which is not done again."""
    star = [tmp_path / f"{i}.png" for i in range(2)]
    sheet = tmp_path / "sheet.png"
    assert generate.main(words(inputs, run, ["0.png"], ["1.json", "2.json"], star, f"--sheet={sheet}")) == 0
    assert [picture(out).shape for out in star] == [(32, 24, 3)] * 2 and np.any(picture(star[0]) != picture(star[1]))
    assert picture(sheet).shape[1] > 5 * 24
    both = tmp_path / "both.png"
    assert generate.main(words(inputs, run, ["0.png", "1.png"], ["2.json"], [both])) == 0
    assert np.any(picture(both) != picture(star[1]))
    line = {
        "sources": [{"photo": f"{i}.png", "pose": f"{i}.json"} for i in range(2)],
        "poses": ["2.json"],
        "outs": ["a/b.png"],
    }
    listed = inputs / "list.jsonl"
    listed.write_text(json.dumps(line) + "\n\n")
    command = [f"--workdir={run}", f"--requests={listed}", f"--out-dir={tmp_path / 'many'}", "--pose-frame=40x30"]
    command.append("--source-pose-frame=40x30")
    assert generate.main(command) == 0
    made = tmp_path / "many" / "a" / "b.png"
    np.testing.assert_array_equal(picture(made), picture(both))
    before = made.stat().st_mtime_ns
    assert generate.main(command) == 0 and made.stat().st_mtime_ns == before


def bad_requests():
    one, two = ["0.png"], ["0.png", "1.png"]
    yield "too many", two, ["0.json", "1.json", "2.json"], 3, [], "2 sources and 3 poses: a canvas has 4 tiles"
    yield "no out", one, ["1.json", "2.json"], 1, [], "2 --pose and 1 --out"
    yield "a map", two, ["1.json"], 1, ["--parsing=none"], "--parsing means nothing to several sources or poses"
    yield "a fill of nothing", one, ["1.json"], 1, ["--fill=other"], "--fill"
    yield "no joint", two, ["none.json"], 1, [], "no"


@pytest.mark.parametrize("case", bad_requests(), ids=lambda case: case[0])
def test_bad_requests_end_with_one_line(case, inputs, run, tmp_path, capsys):
    _, sources, poses, outs, more, want = case
    found = words(inputs, run, sources, poses, [tmp_path / f"{i}.png" for i in range(outs)], *more)
    try:
        code = generate.main(found)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and want in capsys.readouterr().err.strip().splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_methods_of_one_source_say_so(inputs, tmp_path, capsys):
    found = words(inputs, shared_run(), ["0.png", "1.png"], ["2.json"], [tmp_path / "out.png"])
    assert generate.main(found) == 2
    assert "method, truepose, takes one source and one pose; imagpose takes up to 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line,want",
    [
        ("{", "line 1: "),
        ('{"sources": [], "poses": []}', "lacks 'outs'"),
        ('{"sources": [{"photo": "0.png", "pose": "0.json"}], "poses": ["1.json"], "outs": ["../x.png"]}', "inside of"),
        ("", "holds no requests"),
    ],
)
def test_bad_lists(line, want, inputs, run, tmp_path, capsys):
    listed = tmp_path / "list.jsonl"
    listed.write_text(line)
    command = [f"--workdir={run}", f"--requests={listed}", f"--out-dir={tmp_path / 'out'}"]
    assert generate.main(command) == 2 and want in capsys.readouterr().err
