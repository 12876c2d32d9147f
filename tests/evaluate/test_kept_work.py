"""What the evaluation keeps between runs and writes: whose it is, what it costs in memory, and a disk that takes nothing."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from input_pipeline.schema import InputError
from tests.evaluate.test_evaluate import NAMES, folder, refusal, run
from truepose_jax.evaluate import __main__ as evaluation
from truepose_jax.evaluate import program_hash, references, report, scores, statistics
from truepose_jax.evaluate.pairing import Folder, Pair
from truepose_jax.evaluate.protocols import PROTOCOLS
from truepose_jax.evaluate.weights import Network
from truepose_jax.metrics.fid import Statistics
from truepose_jax.runtime import files


@pytest.fixture
def folders(tmp_path):
    folder(tmp_path / "reference", NAMES), folder(tmp_path / "generated", NAMES, offset=5)


# ------------------------------------------------------------------------------------------------- whose work it is


def test_the_hash_is_of_source_and_packages(monkeypatch):
    compute, found = program_hash.program_hash.__wrapped__, dict(program_hash.sources())
    first = compute()
    assert {"truepose_jax.metrics/ssim.py", "truepose_jax.metrics/regions.py"} <= found.keys()
    assert {f"truepose_jax.evaluate/{name}.py" for name in ("protocols", "scores")} <= found.keys()
    assert {f"input_pipeline.annotations/{name}.py" for name in ("photo", "parsing")} <= found.keys()
    with monkeypatch.context() as patch:
        patch.setattr(program_hash.cv2, "__version__", "0")
        assert compute() != first
    assert compute() == first
    changed = found | {"truepose_jax.metrics/ssim.py": b"K1 = 1"}
    monkeypatch.setattr(program_hash, "sources", changed.items)
    assert compute() != first


def test_rows_of_another_program_are_not_taken(tmp_path, folders, monkeypatch):
    asked, read = [], scores.Scorer.read
    monkeypatch.setattr(scores.Scorer, "read", lambda s, p, m: asked.append(p.generated) or read(s, p, m))
    first = run(tmp_path)[1]
    assert run(tmp_path, "--overwrite")[1]["rows"] == first["rows"] and len(asked) == 5
    monkeypatch.setattr(evaluation, "program_hash", lambda: "another")
    other = run(tmp_path, "--overwrite")[1]
    assert len(asked) == 10 and other["rows"] != first["rows"] and other["program"] == "another"


def test_statistics_of_another_program_serve_only_as_a_file_that_is_given(tmp_path, monkeypatch):
    images = Folder.read(str(folder(tmp_path / "images", NAMES)), flag="--x")

    class Net:
        metric, sha256 = "fid", "0" * 64

        @staticmethod
        def apply(batch):
            return np.tile(batch.mean((1, 2)), (1, 683))[:, :2048]

    how = {"role": "truth", "cache": tmp_path / "cache", "batch_size": 8, "title": "x"}
    _, path = statistics.folder_statistics(images, Net, PROTOCOLS["plain"], None, **how)
    given = (str(path), Net, PROTOCOLS["plain"], None)
    assert statistics.reference_statistics(*given)[1] == "made by this version"
    monkeypatch.setattr(statistics, "program_hash", lambda: "another")
    found, made_by = statistics.reference_statistics(*given)
    assert found.count == 5 and made_by == "made by another version"
    assert statistics.folder_statistics(images, Net, PROTOCOLS["plain"], None, **how)[1] != path
    printed = report.table({"metrics": {}, "not_computed": {}, "fid": {"fid": {"reference_made_by": made_by}}})
    assert "fid: its reference statistics were made by another version" in printed


def test_two_evaluations_share_a_cache(tmp_path, folders):
    """Two folders' rows are two files, a process's unfinished file is its own, and rows that are gone are missed."""
    cache = f"--cache={tmp_path / 'cache'}"
    other = folder(tmp_path / "other", NAMES, offset=9)
    assert run(tmp_path, cache)[1]["rows"] != run(tmp_path, cache, generated=other, out="other.json")[1]["rows"]
    with files.atomic_write(tmp_path / "x") as partial:
        partial.write_text("1")
        assert str(os.getpid()) in partial.name and not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "1" and not partial.exists()
    with pytest.raises(InputError, match=r"only 1 of 2 pairs .* run the same command again"):
        report.summarise([{"psnr": 1.0}], lpips_name="lpips", expected=2)


# ------------------------------------------------------------------------------------------------- rows


def pairs_of(sizes, taken):
    for number, hw in enumerate(sizes):
        taken.append(number)
        image = np.full((*hw, 3), number, np.float32)
        yield Pair(f"{number}.png", "r.png", "x"), ({"generated": number}, image, image + 1)


def test_pairs_do_not_wait_for_others_of_their_size():
    """And rows bear LPIPS under the name that the report gives it."""
    taken = []
    assert next(scores._with_lpips(None, pairs_of([(40, 40)] * 9, taken), 4)) == [{"generated": 0}] and len(taken) == 1
    taken.clear()
    network = Network("lpips", "lpips_unverified_weights", "0", {}, lambda a, b: np.abs(a - b).mean((1, 2, 3)))
    lists = scores._with_lpips(network, pairs_of([(40, 40 + max(i, 1)) for i in range(9)], taken), 3)
    assert [row["generated"] for row in next(lists)] == [0, 1] and len(taken) == 6  # the fullest of six that wait
    rows = [{"lpips_unverified_weights": 1.0}] * 2 + [row for batch in lists for row in batch]
    metrics, _ = report.summarise(rows, lpips_name=network.name, expected=9)
    assert metrics["lpips_unverified_weights"]["mean"] == 1 and list(metrics) == ["lpips_unverified_weights"]


# ------------------------------------------------------------------------------------------------- FID's references


def test_no_reference_of_fid_is_ignored(tmp_path):
    photos = folder(tmp_path / "photos", NAMES)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("fid", "none", "again")}
    statistics.save(tmp_path / "fid.safetensors", Statistics.empty(2048), {"metric": "fid"})
    statistics.save(tmp_path / "none.safetensors", Statistics.empty(2048), {})
    shutil.copy(paths["fid"], paths["again"])
    names = str(tmp_path / "train.lst")
    (tmp_path / "train.lst").write_text("p1.jpg\np3\n")

    found = references.fid_sources([str(photos), paths["fid"]], names, ["fid", "clean_fid"])
    assert found["fid"] == paths["fid"] and found["clean_fid"].names == ("p1.png", "p3.png")
    for given, listed, metrics, words in (
        ([paths["fid"]], names, ["fid"], "--fid-names=.* leave it out"),
        ([paths["fid"], paths["again"]], None, ["fid"], "again.*: statistics of fid, as "),
        ([paths["fid"], str(photos)], None, ["fid"], "photos: unused beside .*fid.safetensors"),
        ([paths["none"]], None, ["fid"], "none.*: statistics of None; give those of fid or clean_fid"),
        ([paths["fid"]], None, ["clean_fid"], "statistics of fid; give --fid-weights too"),
    ):
        with pytest.raises(InputError, match=words):
            references.fid_sources(given, listed, metrics)


def test_the_images_of_fid_names_are_there_once_each(tmp_path):
    """One that is there twice does not stand in for one that is missing."""
    photos = folder(tmp_path / "photos", ["p1.png", "p1.jpg", "p2.png"])
    (tmp_path / "train.lst").write_text("p1.jpg\np3.jpg\n")
    given = ([str(photos)], str(tmp_path / "train.lst"), ["fid"])
    with pytest.raises(InputError, match=r"1 image \(p3\) of --fid-names"):
        references.fid_sources(*given)
    folder(photos, ["p3.png"])
    with pytest.raises(InputError, match=r"p1\.jpg and p1\.png are the same image twice"):
        references.fid_sources(*given)


# ------------------------------------------------------------------------------------------------- the disk


def test_a_disk_that_takes_nothing_gets_one_line(tmp_path, folders, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(scores.Scorer, "read", lambda *_: pytest.fail("found out after the work"))
        assert "file: cannot be written" in refusal(capsys, tmp_path, out="file/report.json")
        assert "file: cannot be written" in refusal(capsys, tmp_path, f"--cache={tmp_path / 'file'}")
    rows = run(tmp_path)[1]["rows"]
    os.unlink(rows)
    os.mkdir(rows)
    assert f"{rows}: cannot be written" in refusal(capsys, tmp_path, "--overwrite")
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):
        with (
            pytest.raises(InputError, match=r"x: cannot be written \(.*No space left"),
            files.atomic_write(tmp_path / "x"),
        ):
            raise error
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    absent = tmp_path / "absent" / "a.safetensors"
    assert evaluation.main(["weights", f"--pth={tmp_path / 'a.pth'}", f"--out={absent}"]) == 2
    assert "a.safetensors: cannot be written" in capsys.readouterr().err
