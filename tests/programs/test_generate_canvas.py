"""`generate` with several sources and poses: what comes out, lists of canvases, scenarios of records, and every bad request in
one line."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline.records.reader import RecordImages
from input_pipeline.records.writer import build_records
from input_pipeline.sources.folder import read_pairs
from tests import tiny_methods
from tests.records import NoiseItem, RawSet, RawSplit, all_pairs
from tests.shared_data import standing_joints
from tests.tiny_run import SIZE, make_run, write_inputs
from truepose_jax import generate
from truepose_jax.evaluate.pairing import Folder, pair_folders
from truepose_jax.inference.canvas import Pose, Source, fit_canvas
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.runtime.bundled import SHIPPED

CHANGES = {"model": {"size": SIZE}, "diffusion": {"steps": 1, "guidance": 2.0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("canvas") / "run", tiny_methods.config("imagpose", CHANGES))


@pytest.fixture(scope="module")
def pipe(run):
    return Pipeline.load(str(run))


@pytest.fixture
def loaded(pipe, monkeypatch):
    """The program takes this pipeline, with what it has compiled, in place of loading the same one."""
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)
    return pipe


def words(inputs, run, sources, poses, outs, *more):
    found = [f"--workdir={run}", "--pose-frame=40x30", "--source-pose-frame=40x30", *more]
    for name, values in (("source", sources), ("pose", poses)):
        found += [f"--{name}={inputs / str(value)}" for value in values]
    found += [f"--source-pose={inputs / pathlib.Path(photo).with_suffix('.json')}" for photo in sources]
    return found + [f"--out={out}" for out in outs]


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_canvases(inputs, run, tmp_path, loaded):
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


def test_pictures_come_in_the_order_of_the_poses(pipe):
    photo, poses = np.zeros((40, 30, 3), np.uint8), [Pose(standing_joints(40, 30) + (i, 0, 0)) for i in range(3)]
    source = Source(photo, poses[0].joints)
    canvas = fit_canvas([source], poses, pipe.run)
    for tile, pose in zip(canvas.wanted, poses, strict=True):
        alone = fit_canvas([source], [pose], pipe.run)
        np.testing.assert_array_equal(canvas.skeleton(tile), alone.skeleton(alone.wanted[0]))
    assert np.any(canvas.skeleton(canvas.wanted[0]) != canvas.skeleton(canvas.wanted[1]))


def bad_requests():
    one, two = ["0.png"], ["0.png", "1.png"]
    yield "too many", two, ["0.json", "1.json", "2.json"], 3, [], "2 sources and 3 poses: a canvas has 4 tiles"
    yield "no out", one, ["1.json", "2.json"], 1, [], "2 --pose and 1 --out"
    yield "a map", two, ["1.json"], 1, ["--parsing=none"], "--parsing means nothing to several sources or poses"
    yield "a fill of nothing", one, ["1.json"], 1, ["--fill=other"], "--fill"
    yield "no joint", two, ["none.json"], 1, [], "no"


@pytest.mark.parametrize("case", list(bad_requests()), ids=lambda case: case[0])
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
    found = words(inputs, SHIPPED.name, ["0.png", "1.png"], ["2.json"], [tmp_path / "out.png"])
    assert generate.main(found) == 2
    assert "method, truepose, takes one source and one pose; imagpose takes up to 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line,want",
    [
        ("{", "line 1: "),
        ('{"sources": [], "poses": []}', "has no 'outs'"),
        ('{"sources": [{"photo": "0.png", "pose": "0.json"}], "poses": ["1.json"], "outs": ["../x.png"]}', "leaves the folder"),
        ("", "holds no requests"),
    ],
)
def test_bad_lists(line, want, inputs, run, tmp_path, capsys):
    listed = tmp_path / "list.jsonl"
    listed.write_text(line)
    command = [f"--workdir={run}", f"--requests={listed}", f"--out-dir={tmp_path / 'out'}"]
    assert generate.main(command) == 2 and want in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- of records


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Test: four photos of one person and two of another, so 14 pairs, two of them without a third photo. Train: two photos."""
    root = tmp_path_factory.mktemp("records") / "r"
    splits = {name: RawSplit([NoiseItem(i) for i in range(n)], all_pairs(n)) for name, n in (("test", 6), ("train", 2))}
    build_records(RawSet("noise", "atr18", splits, "Noise."), root)
    return root


CANVASES = {
    "T1": (["p000"], ["p003"], "pose"),
    "T2": (["p000"], ["p003"], "source"),
    "T3": (["p000", "p001", "p002"], ["p003"], "pose"),
    "star": (["p000"], ["p001", "p002", "p003"], "pose"),
}
"""Scenario -> (sources, poses, fill) of the canvas that holds the pair of p000 and p003."""


@pytest.mark.parametrize("scenario", CANVASES)
def test_scenarios_of_records(scenario, records, run, loaded, tmp_path, capsys):
    """Every pair has its picture, that of the canvas made by hand; evaluate finds them; what is there is not made again."""
    command = [f"--workdir={run}", f"--records={records}", f"--scenario={scenario}", f"--out-dir={tmp_path / 'out'}"]
    command.append("--batch-size=3")
    assert generate.main(command) == 0
    assert "14 pictures of 14 pairs" in capsys.readouterr().out
    noted = json.loads((tmp_path / "out" / "generate.json").read_text())
    assert (noted["scenario"], noted["repeated_sources"]) == (scenario, 2 if scenario == "T3" else 0)

    images = RecordImages(records, "test")
    photos = {name: images.image(i) for i, name in enumerate(images.names)}
    sources, poses, fill = CANVASES[scenario]
    made = loaded.canvas(
        [Source(photos[name].image, photos[name].joints) for name in sources],
        [Pose(photos[name].joints, photos[name].image.shape[:2]) for name in poses],
        fill=fill,
        name=" > ".join(" + ".join(names) for names in (sources, poses)),
    )[-1]
    assert np.abs(picture(tmp_path / "out" / "p000_to_p003.png").astype(int) - made).max() <= 1
    for name in images.names:
        (tmp_path / "truth").mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "truth" / f"{name}.png")
    folders = (Folder.read(str(tmp_path / name), flag=name) for name in ("out", "truth"))
    pairing = pair_folders(*folders, read_pairs(str(tmp_path / "out" / "pairs.csv")))
    assert len(pairing.pairs) == 14 and not pairing.unmatched and not pairing.missing

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    gone = tmp_path / "out" / "p005_to_p004.png"
    gone.unlink()
    assert generate.main(command) == 0 and gone.is_file()
    assert all(path.stat().st_mtime_ns == when for path, when in stamps.items() if path != gone)
    other = "T1" if scenario != "T1" else "T2"
    assert generate.main([*command, f"--scenario={other}"]) == 2
    assert f"other settings: scenario was {scenario} and is {other}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        ("imagpose", ["--scenario=T4"], "invalid choice: 'T4'"),
        (
            "imagpose",
            ["--scenario=T3", "--split=train"],
            "nobody in its split 'train' has a photo besides source and target",
        ),
        ("truepose", ["--scenario=T3"], "--scenario=T3 is of methods that make canvases"),
    ],
)
def test_bad_scenarios(method, flags, words, records, run, tmp_path, capsys):
    workdir = run if method == "imagpose" else SHIPPED.name
    try:
        code = generate.main([f"--workdir={workdir}", f"--records={records}", f"--out-dir={tmp_path / 'out'}", *flags])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and words in error.strip().splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_scenario_is_of_records(inputs, run, tmp_path, capsys):
    found = words(inputs, run, ["0.png", "1.png"], ["2.json"], [tmp_path / "out.png"], "--scenario=T3")
    assert (
        generate.main(found) == 2 and "--scenario means nothing to several sources or poses" in capsys.readouterr().err
    )
