"""`generate --records`: every pair of a split, named for others, stopped and gone on with, in parts by several processes."""

import csv
import signal

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.keypoints import canonical_name, patn_name
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.writer import build_records
from input_pipeline.schema import InputError
from input_pipeline.sources.folder import read_pairs
from tests.process import Program, environment
from tests.records import NoiseItem, RawSet, RawSplit, all_pairs
from tests.tiny_run import SIZE, shared_pipeline, shared_run
from truepose_jax import generate
from truepose_jax.evaluate.pairing import Folder, pair_folders
from truepose_jax.inference.pipeline import Pipeline, Request
from truepose_jax.inference.record_requests import record_rows

STEPS = 100
"""Of sampling, so that a signal to processes with six pictures each comes before the end."""
FASHION = [f"WOMEN/Blouses_Shirts/id_0000337{i}/0{i}_{i}_front" for i in range(1, 4)]


class Named(NoiseItem):
    name = property(lambda self: FASHION[self.number] if self.number < 3 else f"own/p{self.number}")


pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture
def loaded(monkeypatch):
    pipe = shared_pipeline()
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)
    return pipe


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four images of one identity, three of them DeepFashion's; 12 pairs."""
    split = RawSplit([Named(i, outside=0.1 * i) for i in range(4)], all_pairs(4))
    root = tmp_path_factory.mktemp("records") / "r"
    build_records(RawSet("noise", "atr18", {"test": split}, "Noise."), root)
    return root


def run(records, out, *flags):
    return generate.main(
        [f"--workdir={shared_run()}", f"--records={records}", f"--out-dir={out}", "--batch-size=1", *flags]
    )  # one program for all tests


@pytest.mark.parametrize(("naming", "last"), [("cfld", ".png"), ("pidm", "_vis.png")])
def test_all_pairs_are_made_named_and_found_by_evaluate(records, tmp_path, loaded, capsys, naming, last):
    out = tmp_path / "out"
    assert run(records, out, f"--naming={naming}") == 0
    assert "12 pictures of 12 pairs" in capsys.readouterr().out
    first, second = (patn_name(name) for name in FASHION[:2])
    middle = {"cfld": "_to_", "pidm": "_2_"}[naming]
    assert (out / f"{first}{middle}{second}{last}").is_file()
    images = RecordImages(records, "test")
    for name in images.names:  # the truth, as an evaluation has it
        path = tmp_path / "truth" / f"{patn_name(name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(path)
    wanted = read_pairs(str(out / "pairs.csv"))
    pairing = pair_folders(Folder.read(str(out), flag="a"), Folder.read(str(tmp_path / "truth"), flag="b"), wanted)
    assert len(pairing.pairs) == 12 and not pairing.unmatched and not pairing.missing
    with open(out / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = [(canonical_name(row["from"]), canonical_name(row["to"])) for row in rows]
    assert listed == [tuple(images.names[i] for i in pair) for pair in images.pairs.tolist()]
    assert all((out / row["out"]).is_file() for row in rows)


def test_a_picture_is_that_of_its_source_and_pose(records, tmp_path, loaded):
    assert run(records, tmp_path) == 0
    images = RecordImages(records, "test")
    row = next(row for row in record_rows(images, tmp_path, "cfld") if (row.source, row.target) == (1, 3))
    source, target = images.image(1), images.image(3)
    request = Request(source.image, target.joints, source.parsing, "atr18", target.image.shape[:2], row.name, 0)
    (wanted,) = loaded.batch([request], batch_size=1)
    with Image.open(row.out) as image:
        apart = np.abs(np.asarray(image).astype(int) - wanted.astype(int))
    assert apart.max() <= 1
    assert row.name == f"{FASHION[1]} > own/p3"


def test_it_goes_on_and_does_not_mix_settings(records, tmp_path, loaded, capsys):
    assert run(records, tmp_path) == 0
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_to_*.png")}
    gone = sorted(made)[2]
    gone.unlink()
    capsys.readouterr()
    assert run(records, tmp_path) == 0
    assert "12 pairs, 11 of them done before" in capsys.readouterr().out and gone.is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in made.items() if path != gone)
    assert run(records, tmp_path, "--seed=1") == 2
    assert "other settings: seed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- in parts


def parts(records, out, *shards, flags=()):
    """How these parts of the pictures end."""
    return [run(records, out, "--batch-size=1", f"--shard={shard}", *flags) for shard in shards]


def pictures(root):
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_pictures_in_parts_are_those_of_one(records, loaded, tmp_path, capsys):
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert run(records, alone) == 0
    *most, last = (f"{index}/8" for index in (7, 0, 3, 5, 1, 6, 4, 2))
    assert parts(records, several, *most) == [0] * 7
    capsys.readouterr()
    assert parts(records, several, "merge") == [2]
    assert "of 12 pictures are not there: let every shard of this command" in capsys.readouterr().err
    assert parts(records, several, last, most[0], "merge") == [0, 0, 0]
    said = capsys.readouterr().out
    assert "12 pairs, 12 of them done before" in said and "12 pictures of 12 pairs" in said
    assert pictures(several) == pictures(alone), "the same bits, and one generate.json and pairs.csv"

    made = {path: path.stat().st_mtime_ns for path in several.rglob("*.png")}
    gone = sorted(made)[1::4]
    for path in gone:
        path.unlink()
    assert parts(records, several, "1/2", "0/2", "merge") == [0, 0, 0]
    assert pictures(several) == pictures(alone)
    assert all(path.stat().st_mtime_ns == when for path, when in made.items() if path not in gone)
    assert parts(records, several, "0/2", flags=["--seed=1"]) == [2]
    assert "other settings: seed" in capsys.readouterr().err
    assert parts(records, several, "0/2", flags=["--overwrite"]) == [2]
    assert "--overwrite is for one process" in capsys.readouterr().err


def test_rows_that_fail_are_said_by_their_part(records, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RecordImages, "fields", broken(RecordImages.fields))
    assert parts(records, tmp_path, "0/2", "1/2", "merge") == [2, 2, 2]
    said = capsys.readouterr()
    assert said.err.count("rows failed (lines ") == 2 and "6 of 12 pictures are not there" in said.err


def broken(fields):
    def read(images, index):
        if images.names[index] == FASHION[1]:
            raise InputError("is broken")
        return fields(images, index)

    return read


def test_a_signal_to_one_part(records, tmp_path, loaded, capsys):
    """A real one, as a user starts it: SIGTERM once there are pictures. (Of SIGKILL test_generate.py knows.)"""
    out, program = tmp_path / "out", ["-m", "truepose_jax.generate", f"--workdir={shared_run()}"]
    program += [f"--records={records}", f"--out-dir={out}", "--batch-size=1", f"--steps={STEPS}", "--shard=0/2"]
    (row, *_) = record_rows(RecordImages(records, "test"), out, "cfld")
    # compiled once, for both
    loaded.sample([row.read(loaded.run, 0)], sampling=loaded.run.sampling(STEPS, None), batch_size=1)
    started = Program(*program, env=environment(cached=True))
    started.wait_for(lambda: any(out.rglob("*.png")))
    started.send_signal(signal.SIGTERM)
    code, said, _ = started.finish()
    assert code == 143 and "asked to stop" in said
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if not path.name.startswith(".")}
    assert 1 <= len(made) < 6
    flags = [f"--steps={STEPS}"]
    assert parts(records, out, "merge", flags=flags) == [2]
    assert parts(records, out, "2/3", "1/3", "0/3", "merge", flags=flags) == [0] * 4
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shard=2/2"], "--shard=2/2: the parts of 2 are 0 to 1"),
        (["--split=train"], "no split 'train'"),
        (["--labels=atr18"], "--labels means nothing to --records; it is for one picture, --pairs"),
        (["--pose-frame=40x30"], "--pose-frame means nothing to --records"),
        (["--pairs=x.csv"], "two lists"),
        (["--pose=x.json"], "--pose is for one picture and --records"),
        (["--records=/nowhere"], "no such folder"),
    ],
)
def test_bad_flags_are_one_line(records, tmp_path, capsys, flags, words):
    assert run(records, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_that_leave_the_folder_or_meet(records, tmp_path, monkeypatch):
    images = RecordImages(records, "test")
    monkeypatch.setattr(images, "names", ["../../x", "b", "c", "d"])
    with pytest.raises(InputError, match="leaves the folder"):
        record_rows(images, tmp_path, "cfld")
    monkeypatch.setattr(images, "names", ["a", "a", "c", "d"])
    with pytest.raises(InputError, match="would both be"):
        record_rows(images, tmp_path, "cfld")


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("WOMEN/Skirts/id_00000629/04_3_back", "fashionWOMENSkirtsid0000062904_3back"),
        ("WOMEN/Tees_Tanks/id_00007301/04_1_front.jpg", "WOMEN/Tees_Tanks/id_00007301/04_1_front.jpg"),
        ("MEN/Jackets_Vests/id_00000084/01_7_additional", "fashionMENJackets_Vestsid0000008401_7additional"),
        ("anna/1", "anna/1"),
    ],
)
def test_patn_names(name, spelled):
    assert patn_name(name) == spelled
    assert canonical_name(spelled) == name
