"""The generate program: one picture, lists that survive kills, and one line with exit code 2 for bad input."""

import contextlib
import functools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.process import Program, code_of, environment
from tests.shared_data import shared_data
from tests.tiny_run import SIZE, shared_pipeline, shared_run, write_inputs
from truepose_jax import generate
from truepose_jax.inference import request
from truepose_jax.inference.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def pipe():
    return shared_pipeline()


@pytest.fixture
def loaded(monkeypatch, pipe):
    """The program takes this pipeline in place of loading the same one: 2 s less."""
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)
    return pipe


run = functools.partial(code_of, generate.main)


def single(inputs, target, **changes) -> list[str]:
    flags = {
        "workdir": shared_run(),
        "source": inputs / "0.png",
        "parsing": inputs / "0_map.png",
        "labels": "atr18",
        "pose": inputs / "1.json",
        "pose-frame": "40x30",
        "out": target,
    }
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def write_list(path, rows, header="source,parsing,pose,out") -> pathlib.Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def all_pairs(inputs, count=9) -> list[str]:
    """count pairs of the three photos and poses, 0_0.png to 2_2.png; every third has no map."""
    pairs = [(i, j) for i in range(3) for j in range(3)][:count]
    return [f"{i}.png,{'none' if j == 2 else f'{i}_map.png'},{j}.json,all/{i}_{j}.png" for i, j in pairs]


# ------------------------------------------------------------------------------------------------ one picture


def test_one_picture_its_sheet_and_what_it_says(inputs, tmp_path, capsys, loaded):
    out, sheet = tmp_path / "new" / "out.png", tmp_path / "sheet.png"
    assert run(*single(inputs, out, sheet=sheet)) == 0
    said = capsys.readouterr().out
    assert "step 7, ema weights; 2 DDIM steps, guidance 2, seed 0" in said and "32x24" in said
    picture = read(out)
    assert picture.shape == (*SIZE, 3) and picture.std() > 5
    assert read(sheet).shape[0] > SIZE[0] and read(sheet).shape[1] > 3 * SIZE[1]
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["out.png", "sheet.png"]

    assert run(*single(inputs, out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*single(inputs, out), "--overwrite", "--seed=1", "--weights=raw") == 0
    assert "raw weights" in capsys.readouterr().out and levels_apart(read(out), picture) > 5


def test_names_that_key_the_noise():
    def name(source, pose):
        return generate.Row(0, source, "none", pose, None, None, pathlib.Path("x.png")).name

    assert name("/a/b/0.png", "c/1.json") == "0.png > 1.json"
    spelled = name("img/WOMEN/Dresses/id_00005537/05_1_front.jpg", "ann.csv#fasionWOMENDressesid0000553705_2side.jpg")
    assert spelled == "WOMEN/Dresses/id_00005537/05_1_front.jpg > WOMEN/Dresses/id_00005537/05_2_side.jpg"
    assert name("x.png", "ann.csv#a/b/c.jpg") == "x.png > c.jpg"


# ------------------------------------------------------------------------------------------------ lists


def test_a_list_with_bad_rows(inputs, tmp_path, capsys, loaded):
    """Bad rows are named with their lines, the others are made and equal what the Python API makes."""
    (inputs / "cut.png").write_bytes((inputs / "0.png").read_bytes()[:100])
    rows = [
        *(f"{row},atr18,40x30" for row in all_pairs(inputs, 4)),
        "absent.png,none,0.json,a.png,,40x30",  # line 6
        "cut.png,none,0.json,b.png,,40x30",
        "0.png,0_map.png,none.json,c.png,atr18,40x30",  # line 8
        "0.png,0_map.png,0.json,d.png,pascal7,40x30",
        "0.png,0_map.png,0.json,e.png,atr,40x30",  # line 10
        "0.png,0_map.png,0.json,../f.png,atr18,40x30",
        "0.png,0_map.png,0.json,g.jpg,atr18,40x30",  # line 12
        "0.png,0_map.png,0.json,all/0_0.png,atr18,40x30",
        "0.png,,0.json,h.png,atr18,40x30",  # line 14
        "0.png,0_map.png,0.json,i.png,atr18,40",
        ",,,,,",
        "0.png,0_map.png,0.json",  # line 17
        "0.png,0_map.png,0.json,j.png,,40x30",
        "0.png,0_map.png,0.json,k.png,atr18,",  # line 19
    ]
    listed = write_list(inputs / "bad.csv", rows, header="Source,parsing,pose,out,labels,pose_frame")
    flags = [
        f"--workdir={shared_run()}",
        f"--pairs={listed}",
        f"--out-dir={tmp_path / 'd'}",
        "--batch-size=3",
    ]
    assert run(*flags) == 2
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    expected = {
        6: "cannot read the photo", 7: "truncated", 8: "no joint", 9: "outside pascal7", 10: "unknown label set",
        11: "leaves the folder", 12: "ends in .png", 13: "that of line 2", 14: "parsing is empty",
        15: "pose_frame '40'", 17: "out is empty", 18: "--labels", 19: "--pose-frame",
    }  # fmt: skip
    for line, words in expected.items():
        (found,) = [error for error in errors if f"bad.csv, line {line}:" in error]
        assert words in found
    assert f"error: {listed}: 13 of 17 rows failed" in errors[-1]
    made = sorted((tmp_path / "d").rglob("*.png"))
    assert [p.name for p in made] == ["0_0.png", "0_1.png", "0_2.png", "1_0.png"]
    assert not (tmp_path / "f.png").exists()

    row = generate.Row(0, *(str(inputs / f) for f in ("0.png", "0_map.png", "1.json")), "atr18", (40, 30), made[1])
    (alone,) = loaded.sample([row.read(loaded.run, 0)])
    assert levels_apart(read(made[1]), alone) <= 1, "batches do not change a picture"


def test_several_pictures_of_a_pair(inputs, tmp_path, capsys, loaded):
    """Of a list with a seed column, and of one pair: the same pictures as those seeds alone give."""
    rows = ["0.png,0_map.png,1.json,a.png,5", "1.png,1_map.png,0.json,b.png,", "2.png,2_map.png,0.json,c.png,five"]
    listed = write_list(inputs / "seeds.csv", rows, header="source,parsing,pose,out,seed")
    flags = [f"--workdir={shared_run()}", "--labels=atr18", "--pose-frame=40x30", f"--pairs={listed}", "--seed=2"]
    assert run(*flags, f"--out-dir={tmp_path}", "--num=2", "--batch-size=3") == 2
    said = capsys.readouterr()
    assert "line 4: seed 'five' is no whole number" in said.err and "1 of 3 rows failed" in said.err
    assert "2 pairs, 2 pictures each, 0 done before" in said.out
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["a_5.png", "a_6.png", "b_2.png", "b_3.png"]
    assert levels_apart(read(tmp_path / "a_5.png"), read(tmp_path / "a_6.png")) > 5
    out, sheet = tmp_path / "one" / "o.png", tmp_path / "one" / "sheet.png"
    assert run(*single(inputs, out, sheet=sheet, seed=5, num=2)) == 0
    assert "o_5.png to o_6.png: 32x24" in capsys.readouterr().out
    for seed in (5, 6):
        assert levels_apart(read(out.with_stem(f"o_{seed}")), read(tmp_path / f"a_{seed}.png")) <= 1
    assert not out.exists() and read(sheet).shape[0] > 2 * SIZE[0]
    for wrong, words in (({"num": 0}, "--num is 0"), ({"num": 2, "seed": 2**32 - 1}, "seeds go from 0 to")):
        assert run(*single(inputs, tmp_path / "x.png", **wrong)) == 2
        assert words in capsys.readouterr().err
    assert run(*single(inputs, tmp_path / "x.png", guidance_interval="0.5")) == 2
    assert "'0.5' is not LOW:HIGH" in capsys.readouterr().err


def test_estimate(inputs, tmp_path, capsys, monkeypatch):
    """Of one pair and of a list: memory and seconds; the weights are not read, nothing is written, bad rows are told."""
    monkeypatch.setattr(Pipeline, "of_run", None)
    assert run(*single(inputs, tmp_path / "one" / "o.png", num=3), "--estimate") == 0
    alone = capsys.readouterr().out
    assert "2 DDIM steps, guidance 2" in alone and "3 pictures at once" in alone and "for 3 (" in alone
    listed = write_list(inputs / "estimate.csv", [*all_pairs(inputs), "0.png,,0.json,x.png"])
    flags = [f"--workdir={shared_run()}", "--labels=atr18", "--pose-frame=40x30", f"--pairs={listed}", "--estimate"]
    assert run(*flags, f"--out-dir={tmp_path / 'd'}", "--steps=20") == 2
    said = capsys.readouterr()
    assert "8 pictures at once" in said.out and "for 9 (" in said.out and "parsing is empty" in said.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def work(text):
        return float(re.search(r"([\d.]+) GFLOP a picture", text)[1])

    assert 5 < work(said.out) / work(alone) < 10, "20 steps of work, and the source's side once"


EATEN = {
    "the source": {"out": "INPUTS/0.png"},
    "the map": {"out": "INPUTS/0_map.png"},
    "the source by a link": {"out": "INPUTS/link.png"},
    "the other output": {"out": "INPUTS/x.png", "sheet": "INPUTS/y/../x.png"},
    "the source, by the sheet": {"out": "INPUTS/x.png", "sheet": "INPUTS/0.png"},
}


@pytest.mark.parametrize("kind", EATEN)
def test_no_output_is_an_input_or_another_output(inputs, tmp_path, refuses, loaded, kind):
    before = {path: path.read_bytes() for path in inputs.iterdir() if path.is_file()}
    with contextlib.suppress(FileExistsError):
        (inputs / "link.png").symlink_to(inputs / "0.png")
    changes = {name: place.replace("INPUTS", str(inputs)) for name, place in EATEN[kind].items()}
    target = changes.pop("out")
    refuses("would replace it", generate.main, *single(inputs, target, **changes), "--overwrite")
    (inputs / "link.png").unlink()
    assert {path: path.read_bytes() for path in inputs.iterdir() if path.is_file()} == before


def test_a_list_replaces_its_old_pictures_one_by_one(inputs, tmp_path, capsys, monkeypatch, loaded):
    """A row that reads what another makes is refused; where a row fails or a kill comes its old picture stands, and is made
    by the same command without --overwrite afterwards; a foreign file is not taken for done."""
    out = tmp_path / "out"
    flags = [f"--workdir={shared_run()}", "--labels=atr18", "--pose-frame=40x30", f"--out-dir={out}", "--batch-size=1"]
    (out / "all").mkdir(parents=True)
    (out / "all/0_1.png").write_bytes(b"foreign")
    listed = write_list(inputs / "three.csv", all_pairs(inputs, 3))
    assert run(*flags, f"--pairs={listed}") == 2
    assert "holds no pictures of this program" in capsys.readouterr().err
    assert (out / "all/0_1.png").read_bytes() == b"foreign"

    assert run(*flags, f"--pairs={listed}", "--overwrite") == 0
    old = {path.name: path.read_bytes() for path in (out / "all").iterdir()}
    assert len(old) == 3 and not (out / "generate.old.json").exists()
    written = []

    def stop_at_second(picture, path, save=generate.save_png):
        assert path.read_bytes() == old[path.name], "it stands until then"
        if written:
            raise KeyboardInterrupt
        save(picture, path)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_png", stop_at_second)
        assert run(*flags, f"--pairs={listed}", "--overwrite", "--seed=1") == 130
    assert sum(path.read_bytes() == old[path.name] for path in (out / "all").iterdir()) == 2
    capsys.readouterr()
    assert run(*flags, f"--pairs={listed}", "--seed=1") == 0
    assert "3 pairs, 1 of them done before" in capsys.readouterr().out
    assert not any(path.read_bytes() == old[path.name] for path in (out / "all").iterdir())
    assert not (out / "generate.old.json").exists()

    eats = [f"{i}.png,none,0.json,{i}.png,atr18,40x30" for i in range(2)]
    listed = write_list(inputs / "eats.csv", eats, header="source,parsing,pose,out,labels,pose_frame")
    photos = [(inputs / f"{i}.png").read_bytes() for i in range(2)]
    flags[3] = f"--out-dir={inputs}"
    assert run(*flags, f"--pairs={listed}", "--overwrite") == 2
    assert "2 of 2 rows failed" in capsys.readouterr().err
    assert [(inputs / f"{i}.png").read_bytes() for i in range(2)] == photos


def test_a_list_stopped_midway_goes_on(inputs, tmp_path, capsys, monkeypatch, loaded):
    """Stopped between two pictures of a batch: what is there is whole, stays, and the rest follows."""
    listed = write_list(inputs / "all.csv", all_pairs(inputs))
    flags = [f"--workdir={shared_run()}", f"--pairs={listed}", "--labels=atr18", "--pose-frame=40x30"]
    flags += [f"--out-dir={tmp_path}", "--batch-size=3"]
    written = []

    def stop_at_fifth(picture, path, save=generate.save_png):
        if len(written) == 4:
            raise KeyboardInterrupt
        save(picture, path)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_png", stop_at_fifth)
        assert run(*flags) == 130
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert sorted(before) == sorted(written) and len(before) == 4
    # With other settings it does not go on: the folder would mix them.
    assert run(*flags, "--seed=1") == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert run(*flags) == 0
    said = capsys.readouterr()
    assert "9 pairs, 4 of them done before" in said.out and "9 pictures of 9 pairs" in said.out
    assert "9/9" in said.err and "image/s" in said.err.replace("s/image", "image/s")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    fitted = [row.read(loaded.run, 0) for row in rows_of(listed, tmp_path)]
    for row, picture in zip(rows_of(listed, tmp_path), loaded.sample(fitted, batch_size=3), strict=True):
        assert levels_apart(read(row.out), picture) <= 1
    # Nothing to do: the weights are not even read.
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "of_run", None)
        assert run(*flags) == 0


def rows_of(listed, out_dir):
    return generate.read_rows(str(listed), pathlib.Path(out_dir), labels="atr18", pose_frame=(40, 30))[0]


def test_a_program_killed_and_started_again(inputs, tmp_path, loaded):
    """As a user starts it, on two devices, killed with -9 once a picture is there; then run on to the end."""
    rows = [row.replace("all/", f"{copy}/") for copy in range(40) for row in all_pairs(inputs)]
    listed = write_list(inputs / "many.csv", rows)
    program = ["-m", "truepose_jax.generate", f"--workdir={shared_run()}", "--batch-size=2"]
    program += ["--labels=atr18", "--pose-frame=40x30", f"--out-dir={tmp_path}"]
    started = Program(*program, f"--pairs={listed}", env=environment(devices=2))
    started.wait_for(lambda: any(tmp_path.rglob("*.png")))
    started.kill()
    assert started.finish()[0] == -9
    made = [path for path in tmp_path.rglob("*.png") if not path.name.startswith(".")]
    assert 1 <= len(made) < len(rows)
    fitted = [row.read(loaded.run, 0) for row in rows_of(listed, tmp_path)[:9]]
    pictures = dict(
        zip((row.out for row in rows_of(listed, tmp_path)), loaded.sample(fitted, batch_size=3), strict=False)
    )
    for path in made:
        if path in pictures:
            assert levels_apart(read(path), pictures[path]) <= 1, "as many devices as you like"
    first_nine = write_list(inputs / "nine.csv", rows[:9])
    assert run(*program[2:], "--batch-size=3", f"--pairs={first_nine}") == 0
    for path, picture in pictures.items():
        assert levels_apart(read(path), picture) <= 1


# ------------------------------------------------------------------------------------------------ bad input


BAD = {
    "no workdir": ({"workdir": "/absent"}, "holds no training run"),
    "no photo": ({"source": "/absent.png"}, "cannot read the photo"),
    "cut photo": ({"source": "INPUTS/cut.png"}, "truncated"),
    "no map": ({"parsing": "/absent.png"}, "cannot read the parsing map"),
    "map of another photo": ({"parsing": "INPUTS/large_map.png"}, "the map is 50x40 but its photo is 40x30"),
    "labels of another set": ({"labels": "pascal7"}, "outside pascal7's 0 to 6"),
    "unknown labels": ({"labels": "atr"}, "unknown label set 'atr'"),
    "unknown labels of no map": ({"labels": "atr", "parsing": "none"}, "unknown label set 'atr'"),
    "no labels": ({"labels": None}, "--labels=atr18|"),
    "no pose": ({"pose": "/absent.json"}, "cannot read the pose"),
    "odd pose": ({"pose": "INPUTS/0.png"}, "leave --pose-frame out"),
    "no joint": ({"pose": "INPUTS/none.json"}, "no joint"),
    "no frame": ({"pose_frame": None}, "add --pose-frame"),
    "wrong frame": ({"pose_frame": "4x3"}, "outside the pose's 4x3 frame"),
    "bad frame": ({"pose_frame": "40"}, "'40' is not HEIGHTxWIDTH"),
    "steps": ({"steps": 0}, "steps is 0"),
    "too many steps": ({"steps": 1001}, "from 1 to 1000"),
    "not a number": ({"steps": "ten"}, "invalid int value"),
    "guidance": ({"guidance": "nan"}, "guidance is nan"),
    "seed": ({"seed": -1}, "seed is -1"),
    "no step": ({"step": 5}, "no step 5"),
    "weights": ({"weights": "best"}, "invalid choice"),
    "no ema": ({"workdir": "NO_EMA", "weights": "ema"}, "keeps no EMA"),
    "no checkpoint": ({"workdir": "EMPTY"}, "no checkpoint yet"),
    "not a png": ({"out": "x.jpg"}, "ends in .png"),
    "a folder": ({"out": "INPUTS/folder.png"}, "is there already"),
    "sheet there": ({"sheet": "INPUTS/2.png"}, "is there already"),
    "in a file": ({"out": "INPUTS/0.png/x.png"}, "cannot be written"),
    "vae of pixels": ({"vae": "/absent"}, "a VAE does not apply"),
    "clip": ({"clip": "/absent"}, "no such folder"),
    "missing flag": ({"pose": None}, "--pose is missing"),
    "labels of no map": ({"parsing": None}, "--parsing=auto knows its own"),
    "unknown flag": ({"size": 3}, "unrecognized arguments"),
    "one and many": ({"pairs": "list.csv"}, "give one of them"),
    "a list's folder": ({"out_dir": "d"}, "--out-dir means nothing to one picture; it is for --pairs, --records"),
    "a list's batch": ({"batch_size": 8}, "--batch-size means nothing to one picture"),
    "a split": ({"split": "test"}, "--split means nothing to one picture; it is for --records"),
    "a naming": ({"naming": "cfld"}, "--naming means nothing to one picture"),
}


@pytest.fixture(scope="module")
def places(inputs, tmp_path_factory):
    """Names in BAD -> folders."""
    root = tmp_path_factory.mktemp("bad")
    (inputs / "cut.png").write_bytes((inputs / "0.png").read_bytes()[:100])
    (inputs / "folder.png").mkdir()
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(inputs / "large_map.png")
    shutil.copytree(shared_run(), root / "no_ema")
    metadata = root / "no_ema" / "metadata.json"
    values = json.loads(metadata.read_text())
    values["config"]["optim"]["ema_decay"] = 0.0
    metadata.write_text(json.dumps(values))
    (root / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copy(metadata, root / "empty")
    return {"INPUTS": inputs, "NO_EMA": root / "no_ema", "EMPTY": root / "empty"}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, inputs, places, tmp_path, refuses, monkeypatch):
    changes, words = BAD[case]
    for name, place in places.items():
        changes = {
            key: str(value).replace(name, str(place)) if value is not None else None for key, value in changes.items()
        }
    if case not in ("vae of pixels", "clip"):
        monkeypatch.setattr(Pipeline, "of_run", None)  # before any long work
    request._say_once(request.NO_MAP)
    refuses(words, generate.main, *single(inputs, tmp_path / "out.png", **changes))
    assert not (tmp_path / "out.png").exists()


def test_bad_lists_are_one_line_and_exit_code_2(inputs, tmp_path, capsys, refuses):
    row = "0.png,none,0.json,a.png"
    (tmp_path / "picture.csv").write_bytes((inputs / "0.png").read_bytes())
    cases = [
        (tmp_path / "absent.csv", "cannot read the list"),
        (tmp_path / "picture.csv", "cannot read the list"),
        (
            write_list(tmp_path / "columns.csv", [row], header="source,target,pose"),
            "lacks columns parsing, out",
        ),
        (write_list(tmp_path / "empty.csv", [], header="source,parsing,pose,out"), "holds no pairs"),
        (write_list(tmp_path / "nothing.csv", [], header=""), "lacks columns"),
    ]
    for listed, words in cases:
        refuses(words, generate.main, f"--workdir={shared_run()}", f"--pairs={listed}", f"--out-dir={tmp_path / 'd'}")
    listed = write_list(inputs / "one.csv", [row])
    for flags, words in (
        ([f"--out-dir={tmp_path / 'd'}", "--batch-size=0"], "--batch-size is 0"),
        ([f"--out-dir={tmp_path / 'd'}", "--labels=atr"], "unknown label set"),
        ([f"--out-dir={tmp_path / 'd'}", "--split=test"], "--split means nothing to --pairs; it is for --records"),
        ([f"--out-dir={tmp_path / 'd'}", "--naming=pidm"], "--naming means nothing to --pairs"),
        ([], "--out-dir is missing"),
    ):
        assert run(f"--workdir={shared_run()}", f"--pairs={listed}", *flags) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


# ------------------------------------------------------------------------------------------------ real photos


def test_real_photos_with_the_poses_of_others(tmp_path, loaded):
    """Every zalora photo (cihp20) in the next one's pose, with the tiny model: read, fitted, made, framed."""
    root = shared_data("zalora_parsed")
    photos = sorted((root / "image").iterdir())
    poses = sorted((root / "keypoints").iterdir())
    rows = [
        f"{photo},{root / 'parsing' / photo.stem}.png,{poses[(i + 1) % len(poses)]},{i}.png"
        for i, photo in enumerate(photos)
    ]
    flags = [
        f"--pairs={write_list(tmp_path / 'list.csv', rows)}",
        f"--out-dir={tmp_path / 'd'}",
        "--batch-size=3",
    ]
    assert run(f"--workdir={shared_run()}", *flags, "--labels=cihp20", "--pose-frame=512x320") == 0
    pictures = [read(path) for path in (tmp_path / "d").glob("*.png")]
    assert len(pictures) == 13 and {picture.shape for picture in pictures} == {(32, 20, 3)}


def test_a_real_photo_without_a_map(tmp_path, loaded):
    root = shared_data("deepfashion_samples")
    photo = next((root / "img").rglob("*.jpg"))
    pose = next((root / "pose").rglob("*.txt"))
    flags = [f"--workdir={shared_run()}", f"--source={photo}", "--parsing=none", f"--pose={pose}"]
    assert run(*flags, f"--out={tmp_path}/out.png") == 0
    assert read(tmp_path / "out.png").shape == (32, 22, 3)  # 750x1101 in 24x32: a column of padding on each side
