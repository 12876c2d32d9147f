"""Work in parts: build, annotate, label and evaluate by one, three and eight, in any order, after kills and again, to the byte
(lists of pictures: test_generate_records.py; the launcher: test_multihost.py)."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.records.annotate import annotations, rewrite_records
from input_pipeline.records.check import check_records
from input_pipeline.records.schema import pack_tokens
from input_pipeline.records.writer import build_records
from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard
from tests.evaluate.test_evaluate import folder
from tests.process import of_code
from tests.records import IN_RECORD_1, built, noise_set
from truepose_jax import prepare
from truepose_jax.detection import parsing_model
from truepose_jax.evaluate import __main__ as evaluation
from truepose_jax.evaluate import statistics
from truepose_jax.evaluate.weights import Network
from truepose_jax.prepare import label
from truepose_jax.runtime.shards import shard_of, signals_as_exits

MERGE = Shard(merge=True)


def parts(count, *, seed=0):
    """All parts of `count`, in some order."""
    return [Shard(int(index), count) for index in np.random.default_rng(seed).permutation(count)]


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------- which part


def test_every_piece_is_exactly_one_parts():
    for count in (1, 2, 3, 5, 8, 30):
        shares = [shard.mine(range(23)) for shard in parts(count)]
        assert sorted(number for mine in shares for number in mine) == list(range(23))
        assert max(map(len, shares)) == -(-23 // count)
    assert MERGE.mine("abc") == [] and MERGE.finishes and WHOLE.mine("abc") == ["a", "b", "c"] and WHOLE.finishes
    assert not Shard(0, 2).finishes


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(
    ("text", "environ", "found"),
    [
        (None, {}, WHOLE),
        ("2/8", SLURM, Shard(2, 8)),
        ("merge", SLURM, MERGE),
        (None, SLURM, Shard(3, 4)),
        (None, SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, Shard(3, 8)),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, WHOLE),  # the batch script itself
        (None, ARRAY, Shard(2, 5)),
        (None, ARRAY | SLURM, Shard(11, 20)),
        (None, {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, Shard(1, 2)),
        (None, {"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "6"}, Shard(4, 6)),
    ],
)
def test_who_says_which_part(text, environ, found):
    assert shard_of(text, environ) == found


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("8/8", {}, "--shard=8/8: the parts of 8 are 0 to 7"),
        ("1", {}, "--shard=1 is not I/N"),
        ("-1/2", {}, "is not I/N"),
        ("0/0", {}, "--shard=0/0"),
        (None, {"JAX_PROCESS_ID": "1"}, "JAX_NUM_PROCESSES is ''; it must be a number, or say --shard=I/N"),
        (None, {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is ''"),
        (None, {"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID: the parts of 2 are 0 to 1"),
        (None, SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
    ],
)
def test_what_names_no_part_is_one_line(text, environ, words):
    with pytest.raises(InputError) as caught:
        shard_of(text, environ)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_command_without_parts_takes_none(refuses):
    refuses("--shard=0/2", prepare.main, "inspect", "--synthetic=1", "--out=x.png", "--shard=0/2")


def test_a_signal_ends_it_after_what_finally_saves(capsys):
    saved = []
    with pytest.raises(SystemExit) as stopped, signals_as_exits():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            saved.append("rows")
    assert stopped.value.code == 143 and saved and "SIGTERM: stopping" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ------------------------------------------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The build of one process."""
    return built(tmp_path_factory.mktemp("alone") / "r", noise_set(train=20, p3={"bad": True}), shard_records=4)


@pytest.mark.parametrize("count", [3, 8])
def test_a_build_in_parts_is_that_of_one(alone, tmp_path, count):
    raw, out = noise_set(train=20, p3={"bad": True}), tmp_path / "r"
    *most, last = parts(count, seed=count)
    for shard in most:
        assert build_records(raw, out, shard_records=4, share=shard) is None
    if last.index < 6:  # there are six files
        with pytest.raises(InputError, match=r"[12] of 6 files of records are not there: let every shard"):
            build_records(raw, out, shard_records=4, share=MERGE)
    before = {path: path.stat().st_mtime_ns for path in out.glob("noise-*")}
    for shard in (last, last, most[0], MERGE):  # again does nothing
        report = build_records(raw, out, shard_records=4, share=shard)
    assert report["splits"]["train"]["images"] == 19
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert check_records(out)[0] == [] and contents(out) == contents(alone)
    assert build_records(raw, out, shard_records=4, share=parts(3)[0]) == report, "what is finished stays so"
    with pytest.raises(InputError, match="other splits"):
        build_records(noise_set(train=8), out, shard_records=4, share=MERGE)


def test_a_part_killed_outright_is_done_again(alone, tmp_path):
    """kill -9 while a file is being written; another number of parts goes on."""
    code = """
        import signal, sys
        from input_pipeline.records.writer import build_records
        from input_pipeline.shards import Shard
        from tests.records import noise_set

        seen = []

        def stand_still(records):
            seen.append(records)
            if len(seen) == 2:
                print("here", flush=True)
                signal.pause()

        build_records(noise_set(train=20, p3={"bad": True}), sys.argv[1], shard_records=4, annotators=[stand_still],
                      share=Shard(0, 2))
    """
    child = of_code(code, tmp_path / "r")
    child.wait_for("here")
    child.kill()
    child.finish()
    assert len(list((tmp_path / "r").glob("noise-*"))) == 1
    for shard in (*parts(3), MERGE):
        build_records(noise_set(train=20, p3={"bad": True}), tmp_path / "r", shard_records=4, share=shard)
    assert contents(tmp_path / "r") == contents(alone)


@pytest.mark.parametrize("count", [3, 8])
def test_a_check_in_parts_says_what_one_says(alone, tmp_path, count):
    root = shutil.copytree(alone, tmp_path / "r")
    shard = next(root.glob("*train*00001-of-00005"))
    shard.write_bytes(shard.read_bytes()[:IN_RECORD_1] + b"?" + shard.read_bytes()[IN_RECORD_1 + 1 :])
    whole = check_records(root)
    assert any("is corrupt" in line for line in whole[0]) and len(whole[0]) > 1 and len(whole[1]) > 1
    *most, last = parts(count, seed=count)
    for part in most:
        assert check_records(root, share=part) == ([], [])
    if last.index < 6:
        with pytest.raises(InputError, match=r"[12] of 6 checked files of records are not there"):
            check_records(root, share=MERGE)
    assert prepare.main(["check", str(root), f"--shard={last.index}/{count}"]) == 0
    assert check_records(root, share=MERGE) == whole
    assert not list((root / "build").glob("checked-*")) and contents(root).keys() == contents(alone).keys()


@pytest.mark.parametrize("count", [3, 8])
def test_annotations_in_parts(tmp_path, count):
    """As by one process, byte for byte; after one has failed, and after another wish."""
    alone, several = (built(tmp_path / name, noise_set(train=16), shard_records=4) for name in ("alone", "several"))
    wanted, asked = {"clip": {"fingerprint": "x", "size": [32, 24], "flipped": False}}, []

    def fill(records, labels, bad="", light=0.0):
        assert labels == "atr18"
        asked.append([record.name for record in records])
        if bad in asked[-1]:
            raise InputError("no more")
        tokens = [np.tile(record.image.mean((0, 1)) + light, (21, 1)) for record in records]
        data = [pack_tokens(values, np.arange(21) < 3) for values in tokens]
        return [{"region_tokens": values, "region_valid": bits} for values, bits in data]

    def work(shard, bad="", wanted=wanted, light=0.0):
        return rewrite_records(several, wanted, lambda r, labels: fill(r, labels, bad, light), size=(32, 24), share=shard)

    assert rewrite_records(alone, wanted, fill, size=(32, 24)) == 0
    shards = parts(count)
    notes = lambda: set((several / "build").glob("annotated-*"))  # noqa: E731
    work(shards[0])
    first = notes()
    work(shards[0], wanted={"clip": {"fingerprint": "y", "size": [32, 24], "flipped": False}}, light=5.0)
    other = notes()
    assert len(other) == len(first) and not other & first, "what another wish has written over is not done"
    with pytest.raises(InputError, match="no more"):
        [work(shard, "p008") for shard in shards]
    with pytest.raises(InputError, match="annotated files of records are not there"):
        work(MERGE)
    assert annotations(several) == {}
    done = len(notes() - other)
    asked.clear()
    assert [work(shard) for shard in shards] == [None] * count and work(MERGE) == 0
    assert len(asked) == 5 - done and annotations(several) == wanted
    assert check_records(several)[0] == [] and contents(several) == contents(alone)


def test_labels_in_parts(tmp_path, monkeypatch, capsys):
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
    given = {"raw": str(raw), "parsing": "m", "batch_size": 2, "device": "cpu"}
    absent = dict.fromkeys(("photos", "pose", "detector", "score", "labels"))
    flags = argparse.Namespace(**given, **absent)
    with pytest.raises(InputError, match="6 of 7 photos with a map are not there"):
        label.label(flags, Shard(merge=True))
    for index in (2, 0, 1):
        label.label(flags, Shard(index, 3))
    label.label(flags, Shard(merge=True))
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]
    maps = {path.stem: np.asarray(Image.open(path)) for path in (raw / "parsing").glob("*.png")}
    assert {name: set(np.unique(found)) for name, found in maps.items()} == {
        str(i): {9 if i == 4 else i} for i in range(7)
    }
    printed = capsys.readouterr().out
    assert "1 of 7 photos have a map" in printed and "7 of 7 photos have a map" in printed


# ------------------------------------------------------------------------------------------------- evaluate


def network(metric, path):
    """A cheap stand-in: features are the picture's mean colours over and over, LPIPS the mean difference."""
    del path

    def features(images):
        return np.tile(images.mean((1, 2)), (1, 8)) * np.arange(1, 25, dtype=np.float32)

    apply = (lambda a, b: np.abs(a - b).mean((1, 2, 3))) if metric == "lpips" else features
    return Network(metric, metric, "0" * 64, {}, apply)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """run(name, shards): these parts of the evaluation, without the command."""
    monkeypatch.setattr(evaluation, "load", network)
    monkeypatch.setattr(statistics, "FEATURES", 24)
    names = [f"p{i}.png" for i in range(11)]
    reference, generated = folder(tmp_path / "reference", names), folder(tmp_path / "generated", names, offset=20)
    flags = [f"--reference={reference}", f"--generated={generated}", "--protocol=plain", "--batch-size=2"]
    flags += ["--lpips-weights=x", "--fid-weights=x", f"--fid-reference={reference}"]

    def run(name, *shards):
        argv = [*flags, f"--out={tmp_path / name}.json", f"--cache={tmp_path / 'cache' / name.split('-')[0]}"]
        given = evaluation.make_parser().parse_args(argv)
        for shard in shards:
            evaluation.evaluate(given, shard, argv)

    return run


def numbers(path):
    """A report without what tells which cache and command it came from."""
    report = json.loads(path.read_text())
    rows = [json.loads(line) for line in pathlib.Path(report.pop("rows")).read_text().splitlines() if line.endswith("}")]
    assert len(rows) == len({row["generated"] for row in rows}) == 11, "no pair twice"
    del report["command"], report["fid"]["fid"]["statistics"]
    return report


@pytest.mark.parametrize("count", [3, 8])
def test_the_report_of_parts_is_that_of_one(evaluated, tmp_path, capsys, count):
    """Not only to 1e-6: rows are summed in one order, and features enter the statistics in one order."""
    evaluated("alone", WHOLE)
    *most, last = parts(count)
    evaluated("parts", *most)
    with pytest.raises(InputError, match=r"of 11 pairs' rows are not there: let every shard"):
        evaluated("parts", MERGE)
    capsys.readouterr()
    evaluated("parts", last, most[0], MERGE)
    assert capsys.readouterr().out.count("+- 95 %") == 1, "one table"
    assert numbers(tmp_path / "parts.json") == numbers(tmp_path / "alone.json")
    left, want = (sorted(path.name for path in (tmp_path / "cache" / name).iterdir()) for name in ("parts", "alone"))
    assert left == want


def test_an_evaluation_in_parts_goes_on_with_another_number(evaluated, tmp_path, monkeypatch):
    read = statistics.read_photo

    def read_all_but_one(path):
        if path.name == "p7.png":
            raise InputError("p7.png: cannot be read")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "read_photo", read_all_but_one)
        for shard in parts(3):
            with pytest.raises(InputError, match=r"p7.png: cannot be read") if shard.index == 1 else contextlib.nullcontext():
                evaluated("on", shard)
    rows = next((tmp_path / "cache" / "on").glob("pairs-*.0-of-3.jsonl"))
    rows.write_text(rows.read_text()[:-20])  # as a kill leaves it
    pieces = len(list((tmp_path / "cache" / "on").glob("*.piece.safetensors")))
    asked, scored = [], []
    monkeypatch.setattr(statistics, "read_photo", lambda path: asked.append(path) or read(path))
    score = evaluation.Scorer.read
    monkeypatch.setattr(evaluation.Scorer, "read", lambda self, *given: scored.append(given) or score(self, *given))
    evaluated("on", *parts(2), MERGE)
    assert len(asked) == 22 - (2 * pieces - 2) and pieces > 0  # the last of either folder holds one image
    assert len(scored) == 1
    evaluated("alone", WHOLE)
    assert numbers(tmp_path / "on.json") == numbers(tmp_path / "alone.json")
