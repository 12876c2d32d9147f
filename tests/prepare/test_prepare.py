"""`prepare inspect`: the sheet, the counts, the warnings, and one line with exit code 2 for bad input."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.parsing import LABEL_SETS, flip_parsing
from input_pipeline.annotations.plausibility import SetOfDoubts, judge
from input_pipeline.sources.folder import FolderImages
from tests.shared_data import shared_data, write_folder
from truepose_jax import prepare
from truepose_jax.prepare import inspection


def test_inspect_draws_a_sheet_and_counts(tmp_path, capsys):
    root = write_folder(tmp_path / "r", ["a", "b", "c"])
    out = tmp_path / "new" / "sheet.png"
    flags = ["inspect", f"--root={root}", "--labels=atr18", "--size=64x48", "--count=2", f"--out={out}"]
    assert prepare.main(flags) == 0
    sheet = np.asarray(Image.open(out))
    assert sheet.shape[0] > 2 * prepare.PANEL_HEIGHT and (sheet != 255).any(-1).mean() > 0.3
    printed = capsys.readouterr().out
    assert "3 photos, labels atr18" in printed and "right wrist" in printed and "2 of 3 photos at 64x48" in printed
    assert prepare.main([*flags, "--pose-from=own"]) == 0


def test_inspect_of_real_photos(tmp_path, capsys):
    root = shared_data("zalora_parsed")
    flags = [
        "inspect",
        f"--root={root}",
        "--labels=cihp20",
        "--size=128x80",
        "--count=2",
        f"--out={tmp_path}/s.png",
    ]
    assert prepare.main(flags) == 0
    printed = capsys.readouterr().out
    assert "Face 13" in printed and "warning" not in printed


def test_inspect_of_synthetic_people(tmp_path, capsys):
    assert prepare.main(["inspect", "--synthetic=3", "--size=64x48", "--count=1", f"--out={tmp_path}/s.png"]) == 0
    printed = capsys.readouterr().out
    assert "6 photos, labels atr18" in printed and "warning" not in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--root=ROOT", "--labels=pascal7"], "outside pascal7's 0 to 6"),
        (["--root=ROOT", "--labels=atr"], "unknown label set"),
        (["--root=/absent", "--labels=none"], "no such folder"),
        (["--synthetic=0"], "empty set"),
        (["--synthetic=1", "--size=16x16"], "too small for a person"),
        (["--root=ROOT", "--labels=none", "--keypoints=/absent.csv"], "no poses"),
        (["--root=ROOT", "--split=test"], "--split means nothing to --root; it is for --records"),
        (["--records=ROOT", "--labels=atr18"], "--labels means nothing to --records; it is for --root"),
        (["--synthetic=2", "--keypoints=x.csv"], "--keypoints means nothing to --synthetic"),
        (["--synthetic=2", "--pose-frame=64x48"], "--pose-frame means nothing to --synthetic"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, refuses, flags, words):
    root = write_folder(tmp_path, ["a"])
    flags = [flag.replace("ROOT", str(root)) for flag in flags]
    refuses(words, prepare.main, "inspect", "--size=64x48", *flags, f"--out={tmp_path}/s.png")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--count=0"], "--count is 0"),
        (["--out=s.txt"], "does not name a picture; end it in .png"),
        (["--out=ROOT"], "does not name a picture"),
        (["--out=FILE/s.png"], "cannot be written"),
    ],
)
def test_inspect_says_it_before_it_reads_photos(tmp_path, refuses, monkeypatch, flags, words):
    monkeypatch.setattr(inspection, "synthetic_images", lambda *arguments: pytest.fail("photos were read"))
    (tmp_path / "file").write_text("")
    flags = [f.replace("ROOT", str(tmp_path)).replace("FILE", str(tmp_path / "file")) for f in flags]
    refuses(words, prepare.main, "inspect", "--synthetic=1", "--size=64x48", f"--out={tmp_path}/s.png", *flags)


def test_bad_flags_exit_with_2(tmp_path):
    for flags in (["--size=64"], ["--size=0x4"], []):
        with pytest.raises(SystemExit) as excinfo:
            prepare.main(["inspect", *flags, f"--out={tmp_path}/s.png"])
        assert excinfo.value.code == 2


def test_warnings_for_swapped_sides_and_another_set():
    """Of studio photos; tests/input_pipeline/annotations/test_plausibility.py has the kinds."""
    images = FolderImages(shared_data("zalora_parsed"), labels="cihp20", size=(128, 80))
    records = [images.image(i) for i in range(len(images))]

    def lines(change, labels="cihp20"):
        found, labels = SetOfDoubts(), LABEL_SETS[labels]
        for record in records:
            found.add(record.name, judge(record.joints, change(record.parsing), labels, record.parsing.shape))
        return found.lines()

    labels = LABEL_SETS["cihp20"]
    assert lines(lambda parsing: parsing) == []
    assert len(lines(lambda parsing: labels.flipped[parsing])) == 1
    assert len(lines(lambda parsing: flip_parsing(parsing, labels)[:, ::-1])) == 1
    assert any("no face" in line for line in lines(lambda parsing: parsing % 18, "atr18"))
