"""What experiments/ablation.py concludes from rows of numbers: intervals, paired differences, the gate."""

import json
import pathlib

import numpy as np
import pytest

from experiments import ablation_report as report
from experiments.ablation_runs import ATTENTION, PAIRS, SHOWN, Bench, attention

PEOPLE = 48
WHO = np.repeat(np.arange(PEOPLE), PAIRS // PEOPLE)


def test_pairs_of_one_person_are_no_independent_evidence():
    """All of the spread is between people: the interval is that of 48 numbers, not of 96; NaN count for nothing."""
    random = np.random.default_rng(0)
    person = random.standard_normal(PEOPLE)
    values = person[WHO][None].repeat(3, 0)
    mean, low, high = report.interval(values, WHO)
    np.testing.assert_allclose(mean, person.mean(), rtol=1e-12)
    np.testing.assert_allclose(high - low, 2 * 1.96 * person.std() / np.sqrt(PEOPLE), rtol=0.06)
    holes = np.concatenate([values, np.full((3, 2), np.nan)], axis=1)
    found = report.interval(holes, np.concatenate([WHO, [0, 1]]))
    np.testing.assert_allclose(found, (mean, low, high), rtol=1e-12)


def test_differences_are_paired_and_seeds_count():
    random = np.random.default_rng(1)
    common = 5 * random.standard_normal((3, PAIRS))
    better, worse = common + 0.3 + 0.1 * random.standard_normal((3, PAIRS)), common

    def rows(values, seeds=(0, 1, 2)):
        return {"x": values, "seed": np.array(seeds), "who": WHO[None]}

    def difference(a, b):
        return report.difference(rows(a), rows(b), "x")

    found = difference(better, worse)
    assert report.verdict(found) == "better" and found["interval"][2] - found["interval"][1] < 0.1
    assert report.verdict(difference(worse, better)) == "worse"
    # Paired by the seed's number, not by its place; two seeds prove nothing.
    two = report.difference(rows(better), rows(worse[[2, 1]], (2, 5)), "x")
    np.testing.assert_allclose(two["by_seed"], [(better[2] - worse[2]).mean()])
    assert report.verdict(two) == "(1 seed)"
    # One seed of three decides: no evidence, however many pairs.
    lucky = common + np.array([[1.0], [-0.4], [-0.3]])
    assert report.verdict(difference(lucky, common)) == "not distinguished"


def row(shift: float, cost: float, seed: int, *, hpfa: bool = True) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {metric: 15 + shift + random.standard_normal(PAIRS) for metric in report.METRICS}
    found["psnr_face"][:7] = np.nan
    found |= dict.fromkeys(report.DIGITS, np.array(cost))
    if not hpfa:
        found |= dict.fromkeys(("hpfa_tokens", "hpfa_inside"), np.array(np.nan))
    cells = random.integers(0, 255, (SHOWN, 8, 6, 3)).astype(np.uint8)
    found |= dict.fromkeys(("source", "target", "pose", "shown"), cells)
    return found | {"who": WHO}


@pytest.mark.parametrize(("cost", "word"), [(3.4, "passed"), (2.6, "NOT passed")])
def test_report(tmp_path: pathlib.Path, cost: float, word: str):
    bench = Bench(tmp_path, 7)
    assert report.write(bench, tmp_path / "out") == []
    for variant, shift in {"full": 2.0, "B3": 2.0, "B2": 0.0, "A23_prose": 0.0, "no_head": 0.0}.items():
        for seed in range(3 if variant[:1] in "fB" else 1):
            path = bench.row(variant, seed)
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **row(shift, cost, seed, hpfa=variant != "B2"))
    (tmp_path / "rows_7" / "full_3.part.npz").write_bytes(b"torn")
    written = report.write(bench, tmp_path / "out")
    found = json.loads(written[0].read_text())
    assert {name: of["seeds"] for name, of in found["variants"].items()} == {
        "full": 3,
        "B2": 3,
        "B3": 3,
        "A23_prose": 1,
        "no_head": 1,
    }
    assert list(found["paper_order"]) == ["full > B3", "B3 > B2"] and found["steps"] == 7
    text = written[1].read_text()
    assert f"costs {cost:.2f} dB inside the person; 3 are asked: {word}" in text
    assert "| full > B3 | not distinguished" in text and "| B3 > B2 | better 2.00" in text
    assert "| A23_prose | (1 seed) -2.00" in text and "## Without what is ours" in text and "nan" not in text
    assert found["variants"]["B2"]["hpfa_tokens"] == [None] * 3 and f" | - | - | {cost:.2f} | {cost:.2f} |" in text
    assert written[2].stat().st_size > 1000
    assert [path.name for path in written] == ["ablation_7.json", "ablation_7.md", "ablation_7.png"]
    # A report is never replaced by one of less: neither variants nor seeds.
    wanted = [("full", 0), ("B3", 0)]
    assert report.would_lose(bench, tmp_path / "out", wanted) is None
    for path in tmp_path.glob("rows_7/B3_[12].npz"):
        path.unlink()
    assert "3 seeds of B3" in report.would_lose(bench, tmp_path / "out", wanted)
    assert report.would_lose(bench, tmp_path / "elsewhere", wanted) is None


def test_attention_of_the_last_steps(tmp_path: pathlib.Path):
    """The mean of the last tenth, at the sites of the latent's own size; without HPFA there is none."""
    lines = [{"step": step, "hpfa_tokens": [9.0, step, 1.0], "carry_tokens": 2.0 * step} for step in range(10, 210, 10)]
    lines[-1:-1] = [{"step": 195, "carry_tokens": 390.0}]  # lists are in the lines of log steps alone
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = attention(str(tmp_path), [False, True, True])
    assert found["hpfa_tokens"] == (190 + 200 + 2) / 4 and found["carry_tokens"] == 390.0
    assert np.isnan(found["hpfa_inside"]) and found.keys() == set(ATTENTION)
