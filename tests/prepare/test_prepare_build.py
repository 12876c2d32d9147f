"""`prepare build` and `prepare check`: resuming after kill -9, reports, defects, and one line for bad input."""

import json
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from input_pipeline.records.check import check_records
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.tables import table_files
from input_pipeline.records.writer import build_records
from input_pipeline.schema import InputError
from input_pipeline.synthetic.people import SyntheticPeople
from tests.process import run
from tests.records import IN_RECORD_1, built, noise_set, write_people
from tests.shared_data import shared_data
from truepose_jax import prepare

KILLED = """
import multiprocessing, os, pathlib, signal, sys
from input_pipeline.records.writer import build_records
from tests.records import noise_set

def annotate(records):
    if records[0]["name"] == "p008":
        pids = [str(child.pid) for child in multiprocessing.active_children()]
        pathlib.Path(sys.argv[2]).write_text(" ".join(pids))
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    build_records(noise_set(train=40), sys.argv[1], annotators=[annotate], shard_records=4, workers=2)
"""


def alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def test_a_build_that_was_killed_goes_on_and_its_workers_end(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out, pids = tmp_path / "r", tmp_path / "pids"
    code, _, errors = run(script, out, pids)
    assert code == -9, errors
    workers = [int(pid) for pid in pids.read_text().split()]
    deadline = time.monotonic() + 600
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(alive(pid) for pid in workers)

    # Shards of a split are built in order, test (1) before train (10): test and two of train were whole.
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("noise-*")}
    assert sorted(whole) == [
        "noise-test.array_record-00000-of-00001",
        "noise-train.array_record-00000-of-00010",
        "noise-train.array_record-00001-of-00010",
    ]
    with pytest.raises(InputError, match="not finished"):
        RecordImages(out, "train")
    # What a kill during a write leaves: a half file, and a shard without its note.
    (out / "build" / "noise-train.array_record-00002-of-00010.partial").write_bytes(b"half")
    (out / "noise-train.array_record-00003-of-00010").write_bytes(b"not noted")
    with pytest.raises(InputError, match="holds a build with other size"):
        build_records(noise_set(train=40), out, size=(32, 32), shard_records=4)

    seen = []
    build_records(noise_set(train=40), out, annotators=[lambda r: seen.append(r[0]["name"])], shard_records=4)
    assert seen == [f"p{i:03d}" for i in range(8, 40, 4)]
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in whole.items())
    assert check_records(out)[0] == []
    assert contents(out) == contents(built(tmp_path / "at once", noise_set(train=40), shard_records=4))

    before = contents(out)
    report = build_records(noise_set(train=40), out, shard_records=4, annotators=[lambda r: 1 / 0])
    assert report["splits"]["train"]["images"] == 40 and contents(out) == before


def test_what_cannot_be_read_is_dropped_with_its_pairs_and_reported(tmp_path, capsys):
    root = write_people(tmp_path / "photos", count=6)
    (root / "image" / "p1.jpg").write_bytes((root / "image" / "p1.jpg").read_bytes()[:200])
    Image.fromarray(np.full((64, 48), 19, np.uint8)).save(root / "parsing" / "p4.png")
    (tmp_path / "pairs.csv").write_text("from,to\np0,p1\np2,p3\np3,p2\np4,p5\n")
    out = tmp_path / "r"
    flags = ["build", "--dataset=folder", f"--raw={root}", f"--out={out}", "--labels=atr18", "--workers=1"]
    assert prepare.main([*flags, f"--pairs={tmp_path}/pairs.csv"]) == 0
    printed = capsys.readouterr().out
    assert "train: 4 images of 4 identities, 2 pairs" in printed
    assert "2 pairs left out: one of its images has no record" in printed
    assert "dropped: 1 images, photo unreadable, such as p1" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["dropped"]["photo unreadable"]["images"][0]["name"] == "p1"
    assert "label 19 is outside atr18" in report["dropped"]["parsing map unreadable"]["images"][0]["detail"]
    sheet = np.asarray(Image.open(out / "report.png"))
    assert sheet.shape[0] > 400 and (sheet != 255).any(-1).mean() > 0.05
    images = RecordImages(out, "train")
    assert list(images.names) == ["p0", "p2", "p3", "p5"]
    np.testing.assert_array_equal(images.pairs, [[1, 2], [2, 1]])
    assert prepare.main(["check", str(out)]) == 0
    assert prepare.main(["inspect", f"--records={out}", "--size=64x48", f"--out={tmp_path}/s.png"]) == 0
    assert "4 photos, labels atr18" in capsys.readouterr().out


def test_held_out_people_are_kept_from_training(tmp_path):
    root = tmp_path / "photos"
    write_people(root, count=6)
    for kind in ("image", "parsing", "keypoints"):
        for i, path in enumerate(sorted((root / kind).iterdir())):
            (root / kind / f"who{i // 2}").mkdir(exist_ok=True)
            path.rename(root / kind / f"who{i // 2}" / path.name)
    (tmp_path / "test.csv").write_text("source,target\nwho1/p2,who1/p3\n")
    flags = ["build", "--dataset=folder", f"--raw={root}", f"--out={tmp_path}/r", "--labels=atr18", "--pairs=identity"]
    assert prepare.main([*flags, f"--test-pairs={tmp_path}/test.csv", "--workers=1"]) == 0
    train, test = (RecordImages(tmp_path / "r", split) for split in ("train", "test"))
    assert list(test.names) == ["who1/p2", "who1/p3"] and test.pairs.tolist() == [[0, 1]]
    assert set(train.identities) == {"who0", "who2"} and len(train.pairs) == 4


def test_nothing_readable_is_an_error_and_leaves_a_report(tmp_path):
    with pytest.raises(InputError, match="no image could be read"):
        built(tmp_path / "r", noise_set(train=1, test=0, p0={"bad": True}))
    assert json.loads((tmp_path / "r" / "report.json").read_text())["dropped"]["photo unreadable"]["count"] == 1


def test_a_shard_of_which_nothing_is_left_and_a_split_of_which_nothing_is_left(tmp_path):
    bad = {f"p{i}": {"bad": True} for i in (4, 5, 6, 7, 100)}
    root = built(tmp_path / "r", noise_set(train=12, test=1, **bad), shard_records=4)
    images = RecordImages(root, "train")
    assert len(images) == 8 and images.image(4).name == "p008" and "00002-of-00003, record 0" in str(images.place(4))
    with pytest.raises(InputError, match="has no split 'test'"):
        RecordImages(root, "test")
    assert check_records(root)[0] == []


# ------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_people_are_those_of_the_image_set(tmp_path, capsys):
    flags = ["build", "--dataset=synthetic", "--size=64x48", "--limit=13", "--poses-per-identity=3", "--seed=5"]
    assert prepare.main([*flags, f"--out={tmp_path}/r", "--workers=1"]) == 0
    assert "13 pairs" in capsys.readouterr().out
    images = RecordImages(tmp_path / "r", "train")
    people = SyntheticPeople(seed=5, split="train", identities=3, poses_per_identity=3, size=(64, 48))
    np.testing.assert_array_equal(images.pairs[:12], people.pairs[:12])
    for i in (0, 7):
        ours, theirs = images.image(i), people.image(i)
        np.testing.assert_array_equal(ours.parsing, theirs.parsing)
        np.testing.assert_array_equal(ours.joints, theirs.joints)
        assert np.abs(ours.image.astype(int) - theirs.image).mean() < 3
    assert check_records(tmp_path / "r")[0] == []
    assert {name.split("-")[0] for name in RecordImages(tmp_path / "r", "test").names} == {"test"}


# ------------------------------------------------------------------------------------------------- check


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return built(tmp_path_factory.mktemp("sound") / "r", shard_records=4)


def swap(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip_byte(root):
    shard = next(root.glob("*train*00001-of-00002"))
    data = bytearray(shard.read_bytes())
    data[IN_RECORD_1] ^= 255
    shard.write_bytes(data)


def table(root, split, column, value, row=0):
    """Another value in a table; column None: of a pair."""
    name = table_files(split)[column is None]
    array = np.load(root / name)
    (array if column is None else array[column])[row] = value
    np.save(root / name, array)


def other_labels(root):
    swap(root / "metadata.json", "atr18", "pascal7")


DEFECTS = {
    "corrupt shard": (flip_byte, ["00001-of-00002: is corrupt", "00001-of-00002, record 1 (p005): cannot be read"]),
    "missing shard": (
        lambda r: next(r.glob("*-test.array*")).unlink(),
        ["is missing", "record 0 (p100): cannot be read"],
    ),
    "unknown pair": (lambda r: table(r, "train", None, (0, 8)), ["a pair names record 8 of 8"]),
    "labels out of range": (other_labels, ["record 0 (p000): label 7, 8", "outside pascal7's 0 to 6"]),
    "another name": (lambda r: table(r, "test", "name", b"p000", 1), ["the record is of p101", "share 1 names"]),
    "another person": (lambda r: table(r, "test", "identity", b"who0"), ["(who25)", "share 1 identities"]),
    "another count": (lambda r: table(r, "test", "joints", 17), ["has 18 joints; its table says 17"]),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_check_names_the_defect(sound, tmp_path, capsys, defect):
    shutil.copytree(sound, tmp_path / "r")
    damage, words = DEFECTS[defect]
    damage(tmp_path / "r")
    assert prepare.main(["check", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.out
    lines = printed.err.replace("\r", "\n").splitlines()  # a slow machine shows a bar as well
    assert ["defects" in line for line in lines if line.startswith("error: ")] == [True]


def test_check_finds_what_the_builder_was_given(tmp_path):
    """Records whose files are whole and whose contents are wrong."""
    far, near = {"outside": 0.8}, {"outside": 0.5}
    raw = noise_set(train=4, test=1, p1=far, p2=near)
    defects, facts = check_records(built(tmp_path / "r", raw))
    assert len(defects) == 1 and "record 1 (p001): a joint lies far outside" in defects[0]
    assert any("joints lie outside their picture" in line for line in facts)

    def half_tokens(records):
        for fields in records:
            fields["region_tokens"], fields["region_valid"] = b"abc", 3

    defects, _ = check_records(built(tmp_path / "t", noise_set(train=1, test=0), annotators=[half_tokens]))
    assert len(defects) == 1 and "do not fit" in defects[0]

    def no_map(records):
        records[0]["parsing"] = b""

    defects, _ = check_records(built(tmp_path / "m", noise_set(train=2, test=0), annotators=[no_map]))
    assert len(defects) == 1 and "has no parsing map" in defects[0]

    twice = noise_set(train=2, test=0)
    twice.splits["train"].items[1] = twice.splits["train"].items[0]
    defects, _ = check_records(built(tmp_path / "d", twice))
    assert any("1 names occur twice" in line for line in defects)


def test_a_sound_set_has_no_defects(sound, capsys):
    assert prepare.main(["check", str(sound)]) == 0
    printed = capsys.readouterr().out
    assert "train: 8 images of 2 identities, 24 pairs, labels atr18" in printed and "whole and sound" in printed


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset=deepfashion", "--raw=/absent", "--labels=none"], "no such folder"),
        (["--dataset=deepfashion", "--labels=none"], "needs --raw"),
        (["--dataset=deepfashion", "--raw=/"], "say whose classes"),
        (["--dataset=folder", "--raw=PHOTOS", "--labels=atr"], "unknown label set"),
        (["--dataset=folder", "--raw=PHOTOS", "--labels=none", "--lists=/"], "--lists means nothing"),
        (
            ["--dataset=folder", "--raw=PHOTOS", "--labels=none", "--test-pairs=/absent"],
            "cannot read the list of pairs",
        ),
        (["--dataset=synthetic", "--raw=/"], "--raw means nothing"),
        (["--dataset=synthetic", "--limit=0"], "leaves nothing"),
        (["--dataset=synthetic", "--limit=1", "--size=8x8"], "too small for a person"),
        (["--dataset=synthetic", "--workers=0"], "at least one process"),
        (["--dataset=folder", "--raw=PHOTOS", "--labels=none", "--out=PHOTOS"], "is not a build of this program"),
        (["--dataset=folder", "--raw=PHOTOS", "--labels=none", "--out=/proc/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, refuses, flags, words):
    photos = write_people(tmp_path / "photos", count=1)
    flags = (flag.replace("PHOTOS", str(photos)) for flag in flags)
    refuses(words, prepare.main, "build", f"--out={tmp_path}/r", *flags)


@pytest.mark.parametrize("where", ["shard", "note", "table"])
def test_a_disk_that_fills_up_is_one_line_and_the_build_goes_on_later(tmp_path, where):
    """A folder in a file's place refuses it as a full disk does, ArrayRecord's own errors too."""
    raw, out = noise_set(), tmp_path / "r"
    names = {"shard": "build/noise-test.array_record-00000-of-00001.partial", "note": "build/test-00000.json"}
    blocked = out / names.get(where, "images-train.npy")

    def block(records):
        blocked.mkdir(exist_ok=True)

    with pytest.raises(InputError, match=r"r: cannot be written .* run the same command again"):
        build_records(raw, out, annotators=[block])
    blocked.rmdir()
    build_records(raw, out)
    assert check_records(out)[0] == []


def test_check_of_what_is_not_a_build(tmp_path, capsys):
    assert prepare.main(["check", str(tmp_path)]) == 2
    assert "not a build" in capsys.readouterr().err


def test_real_photos_build_and_check(tmp_path, capsys):
    root = shared_data("zalora_parsed")
    flags = ["build", "--dataset=folder", f"--raw={root}", "--parsing=cihp20", "--pairs=self", "--workers=1"]
    assert prepare.main([*flags, f"--out={tmp_path}/r", "--limit=5"]) == 0
    assert prepare.main(["check", f"{tmp_path}/r"]) == 0
    images = RecordImages(tmp_path / "r", "train")
    assert "train: 5 images" in capsys.readouterr().out and images.labels == "cihp20"
    assert any((images.image(i).parsing == 10).any() for i in range(5))  # torso skin, not a jumpsuit
