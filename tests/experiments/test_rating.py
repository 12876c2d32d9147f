"""Rating by people: what the sheet shows, hides and counts."""

import csv
import json

from experiments import rating
from tests.evaluate.test_evaluate import NAMES, folder, read_text
from truepose_jax.evaluate import pairing


def test_rating_sheet_and_scores(tmp_path, capsys):
    reference = folder(tmp_path / "reference", NAMES)
    methods = [
        f"--method={name}={folder(tmp_path / name, NAMES, offset=i)}" for i, name in ((7, "ours"), (9, "theirs"))
    ]
    flags = [f"--reference={reference}", *methods, "--size=32x28", "--count=2", f"--out={tmp_path / 'sheet'}"]
    assert rating.main(["sheet", *flags]) == 0
    page = (tmp_path / "sheet" / "sheet.html").read_text()
    assert page.count("<img") == 3 * 2 + 2 * 3 and "ours" not in page and "p1" not in page
    key = list(csv.DictReader(read_text(tmp_path / "sheet" / "key.csv").splitlines()))
    assert sorted(row["method"] for row in key[:6]) == ["ours"] * 2 + ["real"] * 2 + ["theirs"] * 2
    # What a comparison shows as true is in no question: that would answer it.
    real = {row["name"] for row in key[:6] if row["method"] == "real"}
    assert not real & {row["name"] for row in key[6:]} and len(real) == 2
    answers = []
    for row in csv.DictReader(read_text(tmp_path / "sheet" / "answers.csv").splitlines()):
        choices = {k["choice"]: k["method"] for k in key if k["question"] == row["question"]}
        single = {"real": "real", "ours": "real", "theirs": "generated"}
        answer = single[choices[""]] if "" in choices else next(c for c, m in choices.items() if m == "ours")
        answers.append((row["question"], answer))
    answers[0] = (answers[0][0], "")  # left out
    skipped = key[0]["method"]
    with open(tmp_path / "filled.csv", "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *answers])
    capsys.readouterr()
    score = ["score", f"--key={tmp_path / 'sheet' / 'key.csv'}", f"--answers={tmp_path / 'filled.csv'}"]
    assert rating.main(score) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["real"]["R2G"] == 0 and found["ours"]["G2R"] == 1 and found["theirs"]["G2R"] == 0
    assert found["ours"]["Jab"] == 1 and found["theirs"]["Jab"] == 0 and found["ours"]["comparisons"] == 2
    assert found[skipped]["pictures"] == 1
    (tmp_path / "wrong.csv").write_text("question,answer\nS0001,perhaps\n")
    assert rating.main([*score[:2], f"--answers={tmp_path / 'wrong.csv'}"]) == 2
    assert "line 2: 'perhaps'" in capsys.readouterr().err
    assert rating.main(["sheet", *flags]) == 2 and "is there already" in capsys.readouterr().err
    assert rating.main(["sheet", *flags[:-2], "--count=3", f"--out={tmp_path / 'more'}"]) == 2
    assert "1 to 2" in capsys.readouterr().err


def test_methods_are_compared_from_one_source(tmp_path):
    """Two methods that made one target from different sources are no fair choice; a name without a source fits any."""
    methods = {
        "a": pairing.Folder(tmp_path, ("p0_2_p2.png", "p1_2_p2.png", "p1_2_p3.png")),
        "b": pairing.Folder(tmp_path, ("p1_2_p2.png", "p0_2_p3.png", "p4.png")),
        "c": pairing.Folder(tmp_path, ("p2.png", "p3.png", "p4.png")),
    }
    reference = pairing.Folder(tmp_path, tuple(NAMES))
    assert rating._targets(methods, reference) == {"p2.png": {"a": "p1_2_p2.png", "b": "p1_2_p2.png", "c": "p2.png"}}
    del methods["a"]
    assert set(rating._targets(methods, reference)) == {"p2.png", "p3.png", "p4.png"}
