"""The scaling studies: fits on curves that are known, bytes of known programs, plans, and a batch study that is stopped
and goes on."""

import dataclasses
import itertools
import json
import math
import unittest.mock

import numpy as np
import pytest

from input_pipeline.schema import InputError
from tests import tiny
from tests.methods.test_toy_method import mean_settings
from tests.process import starts
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.data.datasets import training_batches
from truepose_jax.scaling import batch, devices, memory
from truepose_jax.scaling.batch_report import curves, write_report
from truepose_jax.scaling.collectives import collective_bytes
from truepose_jax.scaling.fits import hyperbola, noise_estimate, steps_to
from truepose_jax.scaling.hardware import CHIPS, Topology, predicted
from truepose_jax.scaling.table import Table
from truepose_jax.training.checkpoint import Preemption

BATCHES = np.array([6, 12, 24, 48, 96, 192])


def test_hyperbola_finds_what_made_the_points():
    exact = hyperbola(BATCHES, 40 * (1 + 50 / BATCHES))
    assert (exact.least.value, exact.critical.value) == pytest.approx((40, 50), rel=1e-4)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        found = hyperbola(BATCHES, 40 * (1 + 50 / BATCHES) * np.exp(0.05 * rng.standard_normal(len(BATCHES))))
        inside += found.critical.low < 50 < found.critical.high
        assert found.critical.high < 8 * found.critical.low
    assert 54 <= inside <= 60, "95 % of 60 are 57; fewer than 54 come up once in 30 times"
    assert hyperbola([6, 12, 12], [10, 8, 8]) is None


def test_steps_to():
    steps = [1, 2, 4, 8]
    assert steps_to(0.5, steps, [1.0, 0.9, 0.7, 0.6]) is None
    assert steps_to(0.5, steps, [1.0, 0.5, 0.7, 0.6]) == 2
    assert steps_to(0.65, steps, [1.0, 0.9, 0.7, 0.6]) == pytest.approx(4 * math.sqrt(2))  # half way in log steps
    assert steps_to(2.0, steps, [1.0, 0.9, 0.7, 0.6]) == 1


def test_noise_interval():
    """Contains the truth about as often as it says, and has no upper end where the gradient is lost in the noise."""
    rng, inside = np.random.default_rng(1), 0
    for i in range(40):
        found = noise_estimate(2 + rng.standard_normal(100), 10 + 2 * rng.standard_normal(100), seed=i)
        inside += found.low < 5 < found.high
    assert 33 <= inside <= 40
    lost = noise_estimate(0.05 + rng.standard_normal(100), 10 + rng.standard_normal(100))
    assert math.isnan(lost.high) and lost.low > 10


@pytest.mark.parametrize("resolution", [0.0, 0.05])
@pytest.mark.parametrize(
    "bytes_at",
    [
        lambda b: 1000 + 37 * b,
        lambda b: 1000 + 37 * (16 * math.ceil(b / 16)),  # padded
        lambda b: 1000 + 10 * b + 0.5 * b**2,
        lambda b: 1000 + 37 * b if b < 500 else math.inf,  # a compiler that refuses
        lambda b: max(9000, 37 * b),  # flat at first
    ],
)
@pytest.mark.parametrize("budget", [10_000, 100_000, 1_000_000])
def test_largest_batch(bytes_at, resolution, budget):
    asked = []

    def ask(b):
        asked.append(b)
        assert b % 3 == 0
        return bytes_at(b)

    found = memory.largest(ask, budget, unit=3, resolution=resolution)
    assert bytes_at(found) <= budget
    assert bytes_at(found + 3 * max(1, int(resolution * found / 3))) > budget
    assert len(asked) == len(set(asked)) <= 22


def test_largest_batch_where_none_fits():
    assert memory.largest(lambda b: 10.0, 5, unit=3, resolution=0.0) == 0
    assert memory.largest(lambda b: 10.0, 20, unit=3, resolution=0.0) > memory.MOST / 64  # flat: it stops looking


HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %a = f32[] add(%x, %y)
}

%body.1 (arg: (s32[], f32[100])) -> (s32[], f32[100]) {
  %all-reduce.2 = f32[100]{0} all-reduce(%g), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %t = (s32[], f32[100]{0}) tuple(%i, %all-reduce.2)
}

%cond.1 (arg: (s32[], f32[100])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[100]) -> f32[] {
  %while.1 = (s32[], f32[100]{0}) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %ag = (bf16[10,8]{1,0}, bf16[40,8]{1,0:T(8,128)}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = bf16[40,8]{1,0} all-gather-done(%ag)
  %ag2 = ((f32[5]{0}, f32[2]{0}), (f32[20]{0}, f32[8]{0})) all-gather-start(%p, %q), replica_groups=[2,4]<=[8]
  %rs2 = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) reduce-scatter-start(%p, %q), replica_groups=[2,4]<=[8]
  %rs = f32[25]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %ar = (f32[7]{0}, s32[3]{0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add
  %one = f32[9]{0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %cp = f32[6]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collective_bytes():
    found = collective_bytes(HLO, 8)
    assert found["all-reduce"] == {
        "count": 6,
        "operand_bytes": 5 * 400 + 40,
        "wire_bytes": 5 * 400 * 2 * 3 / 4 + 40 * 2 * 7 / 8,
    }
    assert found["all-gather"] == {"count": 2, "operand_bytes": 160 + 28, "wire_bytes": 480 + 84}
    assert found["reduce-scatter"] == {"count": 2, "operand_bytes": 400 + 48, "wire_bytes": 300 + 36}
    assert found["collective-permute"] == {"count": 1, "operand_bytes": 24, "wire_bytes": 24}


def test_prediction():
    chip = CHIPS["v5e"]
    found = predicted(chip, flops=197e9, hbm_bytes=819e3, wire_bytes=2e8)
    assert (found["compute_seconds"], found["collective_seconds"]) == pytest.approx((1e-3, 1e-3))
    assert (found["efficiency_lower"], found["efficiency_upper"]) == pytest.approx((0.5, 1.0))
    assert Topology("v5p:4x4x4").chips == 64 and Topology("v5e:16x16").chips == 256
    with pytest.raises(ConfigError, match="v7:2x2"):
        Topology("v7:2x2")


SETTINGS = batch.Settings(target=0.5, examples=600, micro=6, reference=24, lamb_rate=0.02)


def test_batch_plan():
    plan = batch.plan([12, 24, 48], batch.curves_of("adamw/none,adamw/linear,lamb/sqrt"), 1, SETTINGS)
    names = [run.name for run in plan]
    assert len(names) == len(set(names)) == 8  # the reference batch once per optimizer
    assert names.count("adamw-any-b00024-s0") == 1
    config = tiny.config({"data": {"targets_per_source": 3}, "optim": {"learning_rate": 1e-3, "warmup_steps": 10}})
    made = {run.name: batch.config_of(run, config, SETTINGS) for run in plan}
    large = made["adamw-linear-b00048-s0"]
    assert (large.optim.learning_rate, large.optim.warmup_steps, large.optim.accumulation) == (2e-3, 5, 8)
    assert (large.total_steps, large.batch_size, large.optim.noise_scale) == (12, 48, "on")
    lamb = made["lamb-sqrt-b00012-s0"].optim
    assert lamb.learning_rate == pytest.approx(0.02 / math.sqrt(2)) and (lamb.name, lamb.layout) == ("lamb", "tree")
    assert batch.evaluated_steps(12) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    late = batch.evaluated_steps(1000)
    assert late[0] == 1 and late[-1] == 1000 and max(b / a for a, b in itertools.pairwise(late[30:])) < 1.12
    with pytest.raises(ConfigError, match="batch 20 cannot be cut"):
        batch.config_of(batch.Run("adamw", "none", 20, 0), config, SETTINGS)


def test_table(tmp_path):
    common = {"study": "batch", "settings": {"target": 0.5}}
    first = Table(tmp_path / "out", common)
    first.add({"name": "a", "batch": 6, "noise": None, "parts": {"x": 1}})
    again = Table(tmp_path / "out", common)
    again.add({"name": "b", "batch": 12, "error": "does, not fit"})
    assert Table(tmp_path / "out", common).done("a")["batch"] == 6
    lines = (tmp_path / "out" / "rows.csv").read_text().splitlines()
    assert lines[0] == "name,batch,noise,parts,error" and lines[2] == 'b,12,,,"does, not fit"'
    with pytest.raises(ConfigError, match=r"settings.target was 0.5 and is 0.6"):
        Table(tmp_path / "out", {"study": "batch", "settings": {"target": 0.6}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"no study\.json"):
        Table(tmp_path / "mine", common)


TOY_SETTINGS = batch.Settings(target=None, examples=48, micro=4, reference=8, lamb_rate=0.02)


@pytest.fixture
def toy(monkeypatch):
    """The configuration of a method that compiles in no time."""
    values = mean_settings(monkeypatch)
    values.model.noise = 0.3
    values.eval.update(pairs=4, batch_size=4)
    return values


def batch_row(run, values, settings, folder, *, stop_at=math.inf):
    """batch.row, asked to stop after so many steps."""
    with unittest.mock.patch.object(Preemption, "stop", lambda self, step: step >= stop_at):
        return batch.row(run, from_config_dict(Config, values), settings, folder)


def test_a_batch_study_that_is_stopped_goes_on(tmp_path, toy):
    """The row and every loss are those of a study that was left alone; the report reads them."""
    run, rows, losses = batch.Run("adamw", "any", 8, 0), [], []
    for stops in ([math.inf], [3, math.inf]):
        folder = tmp_path / str(len(stops))
        for stop in stops:
            row = batch_row(run, toy, TOY_SETTINGS, folder, stop_at=stop)
            assert (row is None) == (stop < math.inf)
        workdir = folder / "runs" / run.name
        losses.append([json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()])
        rows.append({k: v for k, v in row.items() if k != "seconds_per_step"})
        assert [step for step, _ in batch.evaluations(workdir)] == list(range(1, 7))
        assert not (workdir / "checkpoints").exists()
    assert rows[0] == rows[1] and losses[0] == losses[1] and len(losses[0]) == 6
    assert rows[0]["best_loss"] < batch.evaluations(workdir)[0][1]
    assert rows[0]["noise_scale"] > 0
    table = Table(folder / "report", {})
    table.add({**row, "steps": 3})
    table.add(row)
    assert table.rows == [row], "a row made anew takes the place of the one before"
    (folder / "runs").rename(table.folder / "runs")
    text = write_report(table, from_config_dict(Config, toy), TOY_SETTINGS, "command").read_text()
    assert "**One seed**" in text and run.name in text
    assert {p.name for p in table.folder.glob("*.png")} == {"losses.png", "noise_scale.png"}


def test_a_run_ends_at_the_target(tmp_path, toy, monkeypatch):
    """And one that was killed between reaching it and its row is not trained on."""
    run, first = batch.Run("lamb", "none", 16, 0), tmp_path / "first"
    batch_row(run, toy, dataclasses.replace(TOY_SETTINGS, examples=16 * 12), first)
    found = [loss for _, loss in batch.evaluations(first / "runs" / run.name)]
    target = found[6]
    assert min(found[:6]) > target
    settings = dataclasses.replace(TOY_SETTINGS, target=target, examples=16 * 200)
    row = batch_row(run, toy, settings, tmp_path)
    seen = batch.evaluations(tmp_path / "runs" / run.name)
    assert row["steps"] == seen[-1][0] == 7 and row["steps_to_target"] == pytest.approx(7)
    assert row["examples_to_target"] == 16 * row["steps_to_target"]
    (tmp_path / "runs" / run.name / "checkpoints").mkdir()
    monkeypatch.setattr(batch, "train", None)
    assert batch_row(run, toy, settings, tmp_path) == row


def test_a_run_that_diverges_gets_its_row(tmp_path, toy, monkeypatch):
    """And its line in the report, so that the study goes on."""

    def spoiled(*inputs, start_step, **options):
        batches = training_batches(*inputs, start_step=start_step, **options)
        for step, each in enumerate(batches, start_step):
            yield each if step < 3 else each | {"target": np.full(each["target"].shape, np.nan, np.float32)}

    monkeypatch.setattr("truepose_jax.train.training_batches", spoiled)
    found = Table(tmp_path, {})
    settings = dataclasses.replace(TOY_SETTINGS, target=0.001, examples=8 * 40)
    toy.optim.max_skips = 3
    run = batch.Run("adamw", "any", 8, 0)
    row = batch_row(run, toy, settings, tmp_path)
    assert row["diverged"] and row["steps_to_target"] is row["examples_to_target"] is None
    assert row["steps"] == 6 and row["best_loss"] > 0
    assert not (tmp_path / "runs" / run.name / "checkpoints").exists()
    found.add(row)
    at_once = batch.Run("adamw", "none", 48, 0)  # before it was evaluated
    folder = tmp_path / "runs" / at_once.name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null, "skipped_now": 1, "steps_per_second": null}\n')
    config = from_config_dict(Config, toy)
    found.add(batch.judged(at_once, config, settings, folder, diverged=True))
    assert found.rows[1]["best_loss"] is None and found.rows[1]["steps"] == 1
    text = write_report(found, config, settings, "command").read_text()
    assert "diverged at 6" in text and f"{run.name} (step 6), {at_once.name} (step 1)" in text


def test_a_diverged_run_is_not_tried_again():
    run, row = batch.Run("adamw", "none", 12, 0), {"steps_to_target": None, "steps": 3}
    assert batch.again(run, row, tiny.config(), SETTINGS)
    assert not batch.again(run, row | {"diverged": True}, tiny.config(), SETTINGS)


def row_of(optimizer, rule, size, steps):
    return {"name": f"{optimizer}{rule}{size}", "optimizer": optimizer, "rule": rule, "batch": size, "seed": 0} | {
        "steps_to_target": steps
    }


def test_the_reference_batch_counts_for_every_rule():
    rows = [row_of("adamw", "none", 6, 9), row_of("adamw", "any", 12, 5), row_of("adamw", "sqrt", 24, 3)]
    found = curves([*rows, row_of("lamb", "any", 12, 4)])
    assert {name: [r["batch"] for r in mine] for name, mine in found.items()} == {
        "AdamW, none": [6, 12],
        "AdamW, sqrt": [12, 24],
        "LAMB, any": [12],
    }


def measured(kind, n, speed):
    seconds = {f"{part}_seconds": 0.1 for part in ("step", "compute", "collective", "input")}
    facts = {
        "wire_bytes": 1e6,
        "bytes_per_device": 10**7,
        "first_loss": 1.0,
        "second_loss": 0.5 + 1e-7 * n,
        "fake": n > 1,
    }
    name = {"name": f"{kind}-{n}", "kind": kind, "devices": n, "batch": 4 * n, "images_per_second": speed}
    return name | seconds | facts


def planned(name, chips):
    facts = {"bytes": 2**30, "flops": 1e9, "hbm_bytes": 1e9, "wire_bytes": 1e6, "prediction": True}
    facts["collectives"] = {"all-reduce": {"operand_bytes": 5e5}}
    seconds = predicted(CHIPS["v5e"], flops=1e9, hbm_bytes=1e9, wire_bytes=1e6)
    return {"name": name, "kind": "plan", "topology": name, "devices": chips, "batch": 4 * chips} | facts | seconds


def test_devices_report(tmp_path):
    """Efficiency per device against the fewest; pretended devices and predictions say what they are."""
    table = Table(tmp_path / "out", {})
    for row in (
        measured("weak", 1, 10.0),
        measured("weak", 4, 20.0),
        measured("strong", 2, 8.0),
        measured("strong", 4, 8.0),
    ):
        table.add(row)
    for row in (planned("v5e:2x2", 4), planned("v5e:4x4", 16)):
        table.add(row)
    assert devices.efficiencies(table.rows[:4]) == {"weak-1": 1.0, "weak-4": 0.5, "strong-2": 1.0, "strong-4": 0.5}
    text = devices.write_report(
        table, tiny.config(), devices.Settings(4, 16, 3), "command", ["Left out: x."]
    ).read_text()
    text = " ".join(text.split())
    for part in (
        devices.FAKE,
        devices.PREDICTION,
        "Left out: x.",
        "| weak | 4 | 16 | 20 | 50% |",
        "differ by 4.0e-07",
    ):
        assert part in text, text
    assert {p.name for p in table.folder.glob("*.png")} == {"throughput.png", "tpu_plan.png"}


def test_devices_plan():
    runs = devices.plan([1, 4], [Topology("v5e:4x4")], devices.Settings(per_device=6, strong=24, steps=3))
    assert [(r.kind, r.devices, r.batch) for r in runs] == [
        ("weak", 1, 6), ("weak", 4, 24), ("strong", 1, 24), ("strong", 4, 24), ("plan", 16, 96),
    ]  # fmt: skip
    config = tiny.config({"mesh": {"fsdp": 2}})
    assert devices.config_of(runs[1], config).mesh.data == 2
    with pytest.raises(ConfigError, match="does not fit 1 device"):
        devices.config_of(runs[0], config)
    with pytest.raises(ConfigError, match="must be a multiple of 4"):
        devices.config_of(devices.Run("weak", 4, 6), tiny.config())
    with pytest.raises(ConfigError, match=r"config\.batch_size is -8; it must be above 0"):
        devices.config_of(devices.Run("weak", 4, -8), tiny.config())
    with pytest.raises(ConfigError, match=r"config\.model\.dtype is 'float16'; choose one of"):
        memory.config_of(memory.Run((64, 48), "float16", True, 1), tiny.config(), 1)


def test_memory_report_of_a_cpu_claims_nothing_of_accelerators(tmp_path):
    settings = memory.Settings(0, 0.1)
    assert memory.Run((64, 48), "float32", True, 1, "v5p:2x2x1").budget(settings) == CHIPS["v5p"].memory
    assert memory.Run((64, 48), "float32", True, 1).budget(memory.Settings(7, 0.1)) == 7
    found = Table(tmp_path / "out", {})
    for place in ("", "v5e:2x2"):
        for remat, most in (("off", 10), ("on", 20 if place else 10)):
            run = memory.Run((64, 48), "float32", remat == "on", 4, place)
            facts = dict.fromkeys(("bytes", "argument_bytes", "temporary_bytes", "bytes_per_example"), 1 << 20)
            row = {"name": run.name, "topology": place, "prediction": bool(place), "height": 64, "width": 48, "fsdp": 4}
            row |= {"dtype": "float32", "remat": remat, "budget_bytes": 1 << 30, "largest_batch": most, "compiled": 1}
            found.add(row | facts)
    text = memory.write_report(found, tiny.config(), settings, "command", [], on_cpu=True).read_text()
    text = " ".join(text.split())
    assert memory.CPU_ROWS in text and "remat off to on: x 2.00 (1 pair)" in text and "x 1.00" not in text
    text = memory.write_report(found, tiny.config(), settings, "command", [], on_cpu=False).read_text()
    assert memory.CPU_ROWS not in text and "remat off to on: x 1.41 (2 pairs)" in text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="cannot be written"):
            Table(out, {})
    found = Table(tmp_path / "out", {})
    (found.folder / "rows.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        found.add({"name": "a"})


def test_a_dry_run_and_bad_input(tmp_path):
    common = ["--config=configs/demo.py", f"--out={tmp_path / 'out'}"]
    dry = ["--study=memory", "--memory_gib=1", "--dry-run", "--sizes=64x48,32x24", "--fsdp=1", "--topologies=v5e:4x4"]
    good, bad = starts("truepose_jax.scaling.__main__", [*common, *dry], [*common, "--study=batch", "--batches=12,20"])
    assert good[0] == 0 and len(good[1].splitlines()) == 9 and "8 runs, 8 to do" in good[1], good
    assert bad[:2] == [2, ""] and bad[2].count("\n") == 1 and bad[2].startswith("error: batch 20 cannot be cut"), bad
    assert not (tmp_path / "out").exists()
