"""What experiments/ablation.py writes down of one run."""

import json

import numpy as np

from experiments import ablation_runs
from experiments.ablation_report import DIGITS, METRICS
from tests import tiny_run


def test_a_run_is_judged(tmp_path, monkeypatch):
    """All that the report reads, of pairs of different people; attention is said of the last steps, NaN where there is none."""
    monkeypatch.setattr(ablation_runs, "PAIRS", 4)
    run = tiny_run.make_run(
        tmp_path / "run", tiny_run.tiny_config(eval__batch_size=4, data__synthetic__heldout_identities=4)
    )
    sites = tiny_run.tiny_config().model.unet.sites
    lines = [{"step": step, "hpfa_tokens": [float(step)] * len(sites)} for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ablation_runs.judge(str(run), str(tmp_path / "rows" / "full_0.npz"))
    row = dict(np.load(tmp_path / "rows" / "full_0.npz"))
    assert {name: row[name].shape for name in METRICS} == dict.fromkeys(METRICS, (4,))
    assert np.isfinite(row["psnr_person"]).all() and np.isfinite(row["psnr_carried"]).all()
    assert np.abs(row["psnr_person"] - row["psnr_carried"]).max() > 0.1
    assert all(row[name].shape == () for name in DIGITS) and len(set(row["who"])) == 4
    assert row["hpfa_tokens"] == 19.5 and np.isnan(row["carry_tokens"])
    assert row["swap_image_swapped"] != 0 and row["outline_error"] > 0
    assert row["shown"].shape == row["carried"].shape == row["target"].shape
