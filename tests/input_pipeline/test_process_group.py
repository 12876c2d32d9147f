"""Work that several processes share: build, annotate, label and evaluate, here in threads, each with its own share (lists of
pictures and real processes: test_generate_records.py, test_multihost.py)."""

import argparse
import json
import os
import pathlib
import signal
import time

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.process_group import ALONE, Share
from input_pipeline.records.annotate import annotations, rewrite_records
from input_pipeline.records.check import check_records
from input_pipeline.records.schema import pack_tokens
from input_pipeline.records.writer import build_records
from input_pipeline.schema import InputError
from tests.evaluate.test_evaluate import folder
from tests.process_group import share_work
from tests.records import built, noise_set
from truepose_jax import prepare
from truepose_jax.detection import parsing_model
from truepose_jax.evaluate import __main__ as evaluation
from truepose_jax.evaluate import statistics
from truepose_jax.evaluate.weights import Network
from truepose_jax.prepare import label
from truepose_jax.runtime import distributed


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(distributed, "LOOK_AGAIN", (0.001, 0.01))
    monkeypatch.setattr(distributed, "CHECK_EVERY", 0.0)


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------- the shares


def test_every_piece_is_exactly_one_processes():
    for count in (1, 2, 3, 5, 8):
        shares = [Share() for _ in range(count)]
        for index, share in enumerate(shares):
            share.index, share.count = index, count
        assert sorted(x for share in shares for x in share.mine(range(23))) == list(range(23))
        assert max(len(share.mine(range(23))) for share in shares) == -(-23 // count)
    assert ALONE.mine("abc") == ["a", "b", "c"] and ALONE.meet("x", 3) == [3] and ALONE.lead("x", lambda: 4) == 4
    assert ALONE.asked(True) and not ALONE.asked(False)


def test_meetings(tmp_path, monkeypatch):
    def work(share):
        share.agree("the same", {"a": 1})
        share.lead("a file", lambda: (tmp_path / "x").write_text("1234"))
        share.see(tmp_path / "x", 4)
        numbers = share.meet("numbers", 10 * share.index)
        share.meet("all have them", meanwhile=lambda: None)
        return numbers, share.asked(share.index == 1 and share.count == 3)

    ends = share_work(3, work)
    assert [numbers for numbers, _ in ends] == [[0, 10, 20]] * 3 and ends[1][1]

    with pytest.raises(InputError, match="does not see it; choose a folder that all hosts share"):
        monkeypatch.setattr(distributed, "SEEN_WITHIN", 0)
        raise share_work(2, lambda share: share.see(tmp_path / "x", 5))[0]
    for error in share_work(2, lambda share: share.agree("settings", {"seed": share.index, "a": 1})):
        assert isinstance(error, InputError) and ("seed is" in str(error) or "has failed" in str(error))
    for error in share_work(2, lambda share: share.meet(f"place {share.index}")):
        assert isinstance(error, InputError)


def test_one_fails_or_stops_and_the_others_hear_of_it():
    def work(share, error):
        if share.index == 1:
            raise error
        while True:
            share.check()

    for end in (ends := share_work(3, lambda share: work(share, InputError("disk full"))))[::2]:
        assert isinstance(end, InputError) and "process 1 has failed (disk full)" in str(end)
    assert str(ends[1]) == "disk full"
    for end in share_work(3, lambda share: work(share, SystemExit(143))):
        assert isinstance(end, SystemExit) and end.code == 143
    # One that waits at a meeting, or has come to the end, hears it too.
    ends = share_work(3, lambda share: [lambda: 1 / 0, lambda: share.meet("later"), lambda: None][share.index]())
    assert isinstance(ends[0], ZeroDivisionError) and all("division by zero" in str(end) for end in ends[1:])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["check", "x", "--process=1"], "--process makes no sense here: `prepare check` runs in one process"),
        (["inspect", "--synthetic=2", "--out=x.png", "--distributed=always"], "--distributed makes no sense here"),
        (["build", "--dataset=synthetic", "--out=x", "--process=1"], "--coordinator is missing"),
        (["label", "--raw=x", "--coordinator=host", "--process=0", "--processes=2"], "HOST:PORT"),
    ],
)
def test_flags_are_refused_in_one_line(command, words, capsys):
    assert prepare.main(command) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_signal_ends_the_one_process_too(capsys):
    """With 143, after what `finally` saves."""
    saved = []
    with pytest.raises(SystemExit) as stopped, distributed.joined(argparse.Namespace(**NOBODY)) as share:
        assert share is ALONE
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            saved.append("rows")
    assert stopped.value.code == 143 and saved and "SIGTERM: stopping" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


NOBODY = {"distributed": "off", "coordinator": None, "process": None, "processes": None}


# ------------------------------------------------------------------------------------------------- prepare


def test_a_build_by_several_that_one_leaves_goes_on_with_another_number(tmp_path):
    raw = noise_set(train=20, p3={"bad": True})

    def work(share, annotators=()):
        return build_records(raw, tmp_path / "r", shard_records=4, annotators=annotators, share=share)

    def fail(records):
        if records[0]["name"] == "p008":
            raise InputError("no room")

    ends = share_work(2, lambda share: work(share, [fail]))
    assert all("no room" in str(end) for end in ends) and not (tmp_path / "r" / "dataset_info.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("noise-*")}
    assert 1 <= len(before) < 6
    ends = share_work(3, work)
    assert all(end["splits"]["train"]["images"] == 19 for end in ends)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert check_records(tmp_path / "r")[0] == []
    assert contents(tmp_path / "r") == contents(built(tmp_path / "alone", raw, shard_records=4))
    other = share_work(
        2, lambda share: build_records(noise_set(train=8 + 4 * share.index), tmp_path / "x", share=share)
    )
    assert any("differ" in str(end) for end in other) and not (tmp_path / "x").exists()


def test_annotations_by_several(tmp_path):
    """As by one process, byte for byte; sound where one has failed, and gone on with by another number."""
    alone, several = (built(tmp_path / name, noise_set(train=16), shard_records=4) for name in ("alone", "several"))
    wanted, asked = {"clip": {"fingerprint": "x", "size": [32, 24], "flipped": False}}, []

    def fill(records, labels, bad=""):
        assert labels == "atr18"
        asked.append([record.name for record in records])
        if bad in asked[-1]:
            raise InputError("no more")
        tokens = [np.tile(record.image.mean((0, 1)), (21, 1)) for record in records]
        data = [pack_tokens(values, np.arange(21) < 3) for values in tokens]
        return [{"region_tokens": values, "region_valid": bits} for values, bits in data]

    def work(share, bad=""):
        return rewrite_records(several, wanted, lambda r, labels: fill(r, labels, bad), size=(32, 24), share=share)

    assert rewrite_records(alone, wanted, fill, size=(32, 24)) == 0
    ends = share_work(2, lambda share: work(share, "p008"))
    assert all("no more" in str(end) for end in ends) and annotations(several) == {}
    done = len(list((several / "build").glob("annotated-*")))
    asked.clear()
    assert share_work(3, work) == [0, 0, 0]
    assert len(asked) == 5 - done and annotations(several) == wanted
    assert check_records(several)[0] == [] and contents(several) == contents(alone)


def test_labels_by_several(tmp_path, monkeypatch, capsys):
    raw = tmp_path / "raw"
    for i in range(7):
        (raw / "image").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 6, 3), i, np.uint8)).save(raw / "image" / f"{i}.png")
    (raw / "parsing").mkdir()
    Image.fromarray(np.full((8, 6), 9, np.uint8)).save(raw / "parsing" / "4.png")
    seen = []

    class Model:
        map = parsing_model.ClassMap(LABEL_SETS["atr18"], np.arange(18, dtype=np.uint8), ())

        def __init__(self, *_):
            pass

        def __call__(self, photos):
            seen.extend(int(photo[0, 0, 0]) for photo in photos)
            return [photo[..., 0] for photo in photos]

    monkeypatch.setattr(parsing_model, "ParsingModel", Model)
    flags = argparse.Namespace(
        raw=str(raw),
        photos=None,
        parsing="m",
        pose=None,
        detector=None,
        batch_size=2,
        score=None,
        labels=None,
        device="cpu",
    )
    assert share_work(3, lambda share: label.label(flags, share)) == [None] * 3
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]
    maps = {path.stem: np.asarray(Image.open(path)) for path in (raw / "parsing").glob("*.png")}
    assert {name: set(np.unique(found)) for name, found in maps.items()} == {
        str(i): {9 if i == 4 else i} for i in range(7)
    }
    printed = capsys.readouterr().out
    assert "1 of 7 photos have a map" in printed and printed.count("its 18 classes") == 1


# ------------------------------------------------------------------------------------------------- evaluate


def network(metric, path):
    """A cheap stand-in: features are the picture's mean colours over and over, LPIPS the mean difference."""
    del path

    def features(images):
        return np.tile(images.mean((1, 2)), (1, 683))[:, :2048] * np.arange(1, 2049, dtype=np.float32)

    apply = (lambda a, b: np.abs(a - b).mean((1, 2, 3))) if metric == "lpips" else features
    return Network(metric, metric, "0" * 64, {}, apply)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """run(name, count): the report, of as many processes, without the command."""
    monkeypatch.setattr(evaluation, "load", network)
    # Of 2048 x 2048 numbers the distance takes 4 s; this tells as well whether the statistics are the same.
    monkeypatch.setattr(
        evaluation, "frechet_distance", lambda a, b: float((a.mean * b.mean).sum() + (a.scatter * b.scatter).sum())
    )
    names = [f"p{i}.png" for i in range(11)]
    reference, generated = folder(tmp_path / "reference", names), folder(tmp_path / "generated", names, offset=20)
    flags = [f"--reference={reference}", f"--generated={generated}", "--protocol=plain", "--batch-size=2"]
    flags += ["--lpips-weights=x", "--fid-weights=x", f"--fid-reference={reference}"]

    def run(name, count):
        argv = [*flags, f"--out={tmp_path / name}.json", f"--cache={tmp_path / 'cache' / name.split('-')[0]}"]
        given = evaluation.make_parser().parse_args(argv)
        if count == 1:
            return evaluation.evaluate(given, ALONE, argv)
        return share_work(count, lambda share: evaluation.evaluate(given, share, argv))

    return run


def numbers(path):
    """A report without what tells which cache and command it came from."""
    report = json.loads(path.read_text())
    rows = [json.loads(line) for line in pathlib.Path(report.pop("rows")).read_text().splitlines() if line]
    assert len(rows) == len({row["generated"] for row in rows}) == 11, "no pair twice"
    del report["command"], report["fid"]["fid"]["statistics"]
    return report


def test_the_report_of_several_is_that_of_one(evaluated, tmp_path, capsys):
    """Not only to 1e-6: rows are summed in one order, and features enter the statistics in one order."""
    evaluated("alone", 1)
    capsys.readouterr()
    for count in (2, 3):
        assert evaluated(f"several{count}", count) == [None] * count
        assert numbers(tmp_path / f"several{count}.json") == numbers(tmp_path / "alone.json")
        assert capsys.readouterr().out.count("+- 95 %") == 1, "one table"
        left = sorted(path.name for path in (tmp_path / "cache" / f"several{count}").iterdir())
        assert left == sorted(path.name for path in (tmp_path / "cache" / "alone").iterdir())


def test_an_evaluation_by_several_goes_on_with_another_number(evaluated, tmp_path, monkeypatch):
    read = statistics.read_photo

    def read_all_but_one(path):
        if path.name == "p7.png":
            raise InputError("p7.png: cannot be read")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "read_photo", read_all_but_one)
        ends = evaluated("on-3", 3)
    assert all("p7.png: cannot be read" in str(end) for end in ends) and not (tmp_path / "on-3.json").exists()
    pieces = len(list((tmp_path / "cache" / "on").glob("*.piece.safetensors")))
    asked = []
    monkeypatch.setattr(statistics, "read_photo", lambda path: asked.append(path) or read(path))
    monkeypatch.setattr(evaluation.Scorer, "read", lambda *_: pytest.fail("rows are computed again"))
    evaluated("on-1", 1)
    assert len(asked) <= 22 - 2 * pieces + 1 and pieces > 0
