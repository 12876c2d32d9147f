"""The speed benchmarks at a tiny size: both sides agree, the tables are written, a second start measures nothing again."""

import dataclasses
import json
import re

import numpy as np
import pytest

from benchmarks import sampling, side_by_side, side_by_side_forms, start_up, train_step
from benchmarks.side_by_side_report import ratio

TINY = ["--size=16x16", "--widths=32", "--layers=1", "--batch=1", "--repeats=2", "--threads=1"]


def test_a_form_with_other_numbers_is_not_timed(tmp_path):
    case = train_step.rows(_flags(train_step.main))[0].case
    for name, numbers in (("ours", [1.0, 1.1]), ("eager", [1.0, 1.1 + 1e-6]), ("compiled", [1.0, 1.2])):
        np.save(tmp_path / f"{name}.npy", np.array(numbers))
    assert side_by_side._difference(case, tmp_path, "eager") < 2e-6
    with pytest.raises(side_by_side.FormFailed, match=r"differ from ours by .* not timed"):
        side_by_side._difference(case, tmp_path, "compiled")


def _flags(main):
    """The flags that `main` would run with."""
    import argparse

    parser = argparse.ArgumentParser()
    side_by_side.add_flags(parser)
    return parser.parse_args(TINY)


def test_ratio_is_of_the_same_round():
    """A load that doubles one round's times changes neither side's standing."""
    eager = {"times": [2.0, 4.0, 1.0, 2.0], "ours_times": [1.0, 2.0, 1.0, 1.0]}
    row = {"ours": {"times": [9.0]}, "eager": eager, "about": {"apart": False}}
    assert ratio(row, "eager") == {"median": 0.5, "low": 0.5, "high": 0.625}
    assert ratio(row | {"about": {"apart": True}}, "eager") == {"median": 0.5}


ABOUT = {
    "apart": False, "xla_flags": "", "load_before": 1, "load_after": 2, "when": "2026-01-01", "commit": "abc1234",
}  # fmt: skip


class Process:
    """In the place of side_by_side.Worker: forms that answer at once. Those of `dying` end when they are timed."""

    log, dying = [], {}

    def __init__(self, form, folder, row, environment):
        del row, environment
        self.form, self.folder = form, folder
        self.log.append(f"start {form}")

    def answer(self):
        if self.form != side_by_side_forms.PREPARE:
            return {"device": "cpu"}
        if not (self.folder / "export").exists():
            (self.folder / "export").mkdir()
        return {"product_flops": 1e11}

    def ask(self, command):
        if command == self.dying.get(self.form):
            raise side_by_side.FormFailed(self.form, "ended with code 9")
        self.log.append(f"{command} {self.form}")
        if command == "check":
            np.save(self.folder / f"{self.form}.npy", np.ones(3))
        return {
            "check": {"seconds": 3.0, "resident_bytes": 1 << 30},
            "time": {"seconds": 1.0 if self.form == "ours" else 2.0, "cpu_seconds": 4.0},
            "facts": {"peak_bytes": 2 << 30, **({"program_bytes": 3 << 29} if self.form == "ours" else {})},
        }[command]

    def stop(self):
        pass


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(side_by_side, "Worker", Process)
    monkeypatch.setattr(Process, "log", [])
    monkeypatch.setattr(Process, "dying", {})
    return Process


def _rows(path):
    return json.loads(path.read_text())["rows"]


def test_a_form_is_kept_when_it_is_done(tmp_path, processes, capsys):
    """The second form dies at its end: the first one's numbers stay, and the next start tries the second alone."""
    call, path = [*TINY, f"--out={tmp_path}"], tmp_path / "train_step.json"
    processes.dying["eager_nhwc"] = "facts"
    assert train_step.main([*call, "--peers=eager,eager_nhwc"]) == 0
    (row,) = _rows(path).values()
    assert row["eager"]["times"] == [2.0, 2.0] and row["eager"]["ours_times"] == [1.0, 1.0]
    assert row["eager_nhwc"] == {"failed": "ended with code 9"}
    # A form that failed is tried again; what has times is not.
    processes.dying.clear()
    processes.log.clear()
    assert train_step.main([*call, "--peers=eager,eager_nhwc"]) == 0
    assert "start eager_nhwc" in processes.log and "start eager" not in processes.log
    (row,) = _rows(path).values()
    assert row["eager"]["times"] == row["eager_nhwc"]["times"] == [2.0, 2.0]
    assert row["about"]["machine"]["jax"] and "commit" in row["about"]
    assert row["about"]["machine"]["product_flops"] == 1e11
    text = path.with_suffix(".md").read_text()
    # The table is cut by columns; a form's row goes on in the next part.
    eager, ours = (" |".join(re.findall(rf"^\| {form} \|(.*) \|$", text, re.MULTILINE)) for form in ("eager", "ours"))
    assert "| 0.5 [0.5 0.5] | 4 | 2,048 | 1,024 | -" in eager and "| 2,048 | 1,024 | 1,536 |" in ours
    # Ours that dies is ours', and what was timed before stays.
    processes.dying["ours"] = "time"
    assert train_step.main([*call, "--peers=compiled"]) == 1
    assert "ours: ended with code 9" in capsys.readouterr().err
    assert set(next(iter(_rows(path).values()))) == {"ours", "eager", "eager_nhwc", "about"}


def test_again_replaces_the_rows_of_the_call(tmp_path, processes):
    call, path = [*TINY, f"--out={tmp_path}", "--peers=eager"], tmp_path / "train_step.json"
    assert train_step.main([*call, "--batch=2"]) == 0  # batch 1 is among TINY
    before = path.read_text()
    one, two = _rows(path)
    processes.log.clear()
    assert train_step.main([*call[:3], *call[4:], "--batch=2", "--again"]) == 0
    assert processes.log.count("start eager") == 1 and set(_rows(path)) == {one, two}
    assert json.loads(before)["rows"][one] == _rows(path)[one]


def test_rows_of_another_machine_stay(tmp_path, processes, capsys):
    """Rows beside them may be of another."""
    call, path = [*TINY, f"--out={tmp_path}", "--peers=eager"], tmp_path / "train_step.json"
    assert train_step.main(call) == 0
    ((name, row),) = _rows(path).items()
    row["about"]["machine"] |= {"cpu": "another"}
    path.write_text(json.dumps({"rows": {name: row}}))
    assert train_step.main(call) == 2
    assert "with cpu 'another' where" in capsys.readouterr().err
    assert train_step.main([*call, "--attention=xla"]) == 0
    cpus = {each: found["about"]["machine"]["cpu"] for each, found in _rows(path).items()}
    assert cpus[name] == "another" and set(cpus) == {name, f"{name}_xla"} and cpus[f"{name}_xla"] != "another"


def test_start_up_says_what_each_row_is_of():
    row = {"times": {"first": [3.0], "again": [1.0]}, "load": 1.0, "config": "configs/demo.py"}
    text = start_up.report({
        "train": row | {"machine": {"cpu": "one", "cores": 2, "jax": "0.10"}},
        "generate": row | {"machine": {"cpu": "other", "cores": 2, "jax": "0.10"}, "commit": "abc"},
    })  # fmt: skip
    assert "train: 2 cores of one" in text and "generate: 2 cores of other" in text
    assert "| train | again | 1.0 | 3.0 |" in text


def test_a_peak_that_cannot_begin_anew_is_unknown(monkeypatch):
    """gVisor has no clear_refs, and may leave VmHWM out."""
    monkeypatch.setattr(side_by_side_forms, "_begins_anew", False)
    texts = {"/proc/self/status": "VmRSS:  7 kB\nVmHWM:  9 kB"}

    def refused(path, text):
        raise FileNotFoundError(path)

    monkeypatch.setattr(side_by_side_forms.pathlib.Path, "read_text", lambda path: texts[str(path)])
    monkeypatch.setattr(side_by_side_forms.pathlib.Path, "write_text", refused)
    assert side_by_side_forms._forget_peak("gpu") is None
    assert side_by_side_forms._forget_peak("cpu") == 7 * 1024
    assert side_by_side_forms._peak_resident() is None
    monkeypatch.setattr(side_by_side_forms.pathlib.Path, "write_text", lambda path, text: 1)
    side_by_side_forms._forget_peak("cpu")
    assert side_by_side_forms._peak_resident() == 9 * 1024
    texts["/proc/self/status"] = ""
    assert side_by_side_forms._peak_resident() is None


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("--batch=0", "--batch is 0"),
        ("--peers=foo", "names 'foo'"),
        ("--size=33x32", "divisible by 8"),
        ("--widths=33", "multiple of 32"),
        ("--full", "--device=gpu"),
        ("--patience=0", "--patience is 0.0"),
        ("--patience=nan", "--patience is nan"),
        ("--attention=foo", "--attention is 'foo'"),
        (f"--out={__file__}", "is a file"),
    ],
)
def test_bad_flags_are_one_line(wrong, text, refuses):
    for main in (train_step.main, sampling.main):
        refuses(text, main, wrong)


def test_full_rows_are_chosen_by_batch(monkeypatch, refuses):
    monkeypatch.setattr(side_by_side.shutil, "which", lambda name: name)
    refuses("no row of --batch=4; choose of 2, 8, 12, 60", train_step.main, "--device=gpu", "--full", "--batch=4")
    refuses("leave --size", train_step.main, "--device=gpu", "--full", "--size=64x64")


def test_results_that_cannot_be_read_are_one_line(tmp_path, refuses):
    for text in ("{", "[]", '{"rows": {"a": {}}}'):
        (tmp_path / "train_step.json").write_text(text)
        assert "train_step.json" in refuses("another --out", train_step.main, *TINY, f"--out={tmp_path}")


@pytest.fixture(scope="module")
def block():
    """A TargetBlock of width 32, all random."""
    pytest.importorskip("torch")
    from diffusers.models.attention import BasicTransformerBlock

    from truepose_jax.interop.torch_truepose import TargetBlock

    settings = {"mask_axis": "key", "delta": 0.6, "sigma": 0.3, "reading": "printed", "regions": 20}
    settings |= {"carry_latents": False, "cosine": False, "residual": False}
    return TargetBlock(BasicTransformerBlock(32, 2, 16, cross_attention_dim=32), 0, settings, 4)


def test_what_recomputes_runs_each_block_twice(block, monkeypatch):
    import torch
    from diffusers.models.resnet import ResnetBlock2D

    model, counts = torch.nn.ModuleList([ResnetBlock2D(in_channels=32, temb_channels=8), block]), []
    for kind in (ResnetBlock2D, type(block)):

        def counted(module, *arguments, kind=kind, forward=kind.forward):
            counts.append(kind.__name__)
            return forward(module, *arguments)

        monkeypatch.setattr(kind, "forward", counted)

    def once():
        counts.clear()
        x = model[0](torch.randn(1, 32, 4, 4), torch.randn(1, 8))
        model[1](x.flatten(2).transpose(1, 2)).sum().backward()
        return sorted(counts)

    assert once() == ["ResnetBlock2D", "TargetBlock"]
    side_by_side_forms._recompute_blocks(torch, model)
    try:
        assert once() == ["ResnetBlock2D"] * 2 + ["TargetBlock"] * 2
    finally:
        del block.forward


def test_the_peer_under_autocast(block, monkeypatch):
    """V stays as it was computed, and which regions are read is decided in float32."""
    import torch

    from truepose_jax.interop import torch_truepose

    seen = []

    def noted(q, k, v, mask, settings):
        seen.append((q.dtype, k.dtype, v.dtype))
        return v

    monkeypatch.setattr(torch_truepose, "reweighted_attention", noted)
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, 2, 24, 16, generator=draw).bfloat16() for _ in range(2))
    coverage, present = 1 + 0.01 * torch.rand(8, 24, 20, generator=draw), torch.ones(8, 20, dtype=torch.bool)
    plain, _ = block.least_attended(q, k, coverage, present)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = block.least_attended(q, k, coverage, present)
        features, tokens = torch.randn(8, 24, 32, generator=draw), torch.randn(8, 20, 32, generator=draw)
        block.source_side(features, present[:, :1].expand(8, 24), coverage, tokens, present, torch.ones(8), None)
    assert torch.equal(found, plain)
    assert seen == [(torch.bfloat16,) * 3]


@pytest.mark.slow
def test_the_scripts_write_their_tables(tmp_path, capsys):
    out = f"--out={tmp_path}"
    assert train_step.main([*TINY, out, "--peers=eager"]) == 0
    assert sampling.main([*TINY, out, "--peers=recompute_eager,cached_eager", "--steps=2"]) == 0
    for name, peers in (("train_step", 1), ("sampling", 2)):
        results = json.loads((tmp_path / f"{name}.json").read_text())
        (row,) = results["rows"].values()
        timed = [found for form, found in row.items() if form != "about"]
        assert len(timed) == 1 + peers and [len(found["times"]) for found in timed] == [2 * peers, *[2] * peers]
        assert all(found["difference"] < 1e-4 and found["peak_bytes"] > 0 for found in timed)
        assert "| ours |" in (tmp_path / f"{name}.md").read_text()
    capsys.readouterr()
    assert train_step.main([*TINY, out, "--peers=eager"]) == 0
    assert "done before" in capsys.readouterr().out
    assert side_by_side_forms.OURS in row
    # Other settings under one name are refused, a further form is measured beside those that are there.
    assert train_step.main([*TINY, out, "--layers=2"]) == 2
    assert "with layers 1 where 2 is asked for" in capsys.readouterr().err
    assert train_step.main([*TINY, out, "--peers=eager_nhwc"]) == 0
    (row,) = json.loads((tmp_path / "train_step.json").read_text())["rows"].values()
    assert {"ours", "eager", "eager_nhwc"} < set(row) and len(row["eager_nhwc"]["times"]) == 2


@pytest.mark.slow
def test_a_peer_that_recomputes_agrees(tmp_path):
    case = dataclasses.replace(train_step.rows(_flags(train_step.main))[0].case, remat=True)
    row = side_by_side.measure(side_by_side.Row(case, ("eager",), 2, 200.0))
    assert row["eager"]["difference"] < 1e-4 and len(row["eager"]["times"]) == 2
