"""What a run writes while it runs: one object a step, whatever happened before, and valid JSON whatever the loss."""

import contextlib
import io
import json
import resource
import struct
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.process import run
from truepose_jax.config import ConfigError
from truepose_jax.training import run_log as monitors
from truepose_jax.training.run_log import CannotWrite, Monitor, NonFinite, Profiler


def metrics(step: int, **changes):
    values = {
        "loss": 0.5 + step,
        "grad_norm": 1.25,
        "learning_rate": 1e-4,
        "skipped": 0,
        "skipped_now": 0,
        "skips_in_a_row": 0,
        "first_bad_parameter": -1,
        "bin_sums": [1.0 * step, 0.0, 3.0],
        "bin_counts": [2.0, 0.0, 1.0],
    }
    return {name: jnp.asarray(value) for name, value in {**values, **changes}.items()}


def make(workdir, **changes) -> Monitor:
    settings = {"total_steps": 100, "start_step": 0, "log_every": 2, "is_writer": True, "quiet": True}
    return Monitor(workdir, **{**settings, **changes})


def read(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_object_a_step_one_step_late(tmp_path):
    monitor = make(tmp_path)
    for step in range(1, 6):
        monitor.step(step, metrics(step), examples=8)
        assert len(read(tmp_path / "metrics.jsonl")) == step - 1
        time.sleep(0.01)
    monitor.flush()
    monitor.flush()
    lines = read(tmp_path / "metrics.jsonl")
    monitor.close()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert lines[0]["steps_per_second"] is None, "the first step's time is compilation"
    assert all(0 < line["steps_per_second"] < 100 for line in lines[1:-1])
    assert lines[2]["examples_per_second"] == pytest.approx(8 * lines[2]["steps_per_second"])
    assert abs(lines[-1]["time"] - time.time()) < 60
    # Windows of two steps: sums 1 + 2 over 2 + 2 samples, and 3 + 4; a bin without samples has no loss.
    assert [line.get("loss_bins") for line in lines] == [
        None,
        [0.75, None, 3.0],
        None,
        [1.75, None, 3.0],
        None,
    ]
    assert lines[1]["loss_mean"] == 2.0 and "bin_sums" not in lines[0] and "nonfinite" not in lines[0]


def test_mfu_is_the_mean_rate_of_the_last_steps(tmp_path):
    with make(tmp_path, mfu_per_image_rate=0.002) as monitor:
        for step in range(1, 5):
            monitor.step(step, metrics(step), examples=8)
            time.sleep(0.01)
    lines = read(tmp_path / "metrics.jsonl")
    assert ["mfu" in line for line in lines] == [False, True, False, True]
    seconds = [1 / line["steps_per_second"] for line in lines[1:]]
    assert lines[3]["mfu"] == pytest.approx(0.002 * 8 / (sum(seconds) / 3))


def test_resume_leaves_every_step_once(tmp_path):
    """A run killed at step 7, its last checkpoint at 4."""
    lines = [json.dumps({"step": step, "loss": 0.1, "run": 1}) for step in (1, 2, 3, 3, 4, 5, 6)]
    torn = '{"step": 7, "lo'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], "not json", "{}", *lines[2:], torn]))
    (tmp_path / "eval.jsonl").write_text('{"step": 3, "eval": {}}\n{"step": 6, "eval": {}}\n{"ste')
    with make(tmp_path, start_step=4) as monitor:
        for step in (5, 6, 7):
            monitor.step(step, metrics(step), examples=1)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line.get("run") for line in read(tmp_path / "metrics.jsonl")] == [1] * 4 + [None] * 3
    assert [line["step"] for line in read(tmp_path / "eval.jsonl")] == [3]
    assert not list(tmp_path.glob(".*.partial"))


def test_evaluated_reads_past_what_is_no_line_of_ours(tmp_path):
    with make(tmp_path, start_step=6) as monitor:
        assert not monitor.evaluated(3)
        (tmp_path / "eval.jsonl").write_bytes(b'not json\n[]\n{}\n\xff\n{"step": 3, "eval": {}}\n{"step": 6, "ev')
        assert monitor.evaluated(3) and not monitor.evaluated(6)


@pytest.fixture
def profiler(monkeypatch):
    """What is traced, by step number: 'on' and 'off' between them."""
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("off"))
    return said


def traced(said, start, total, until=None):
    """The steps between on and off of a run from `start` that ends at `until`; what was said."""
    lines = []
    with contextlib.suppress(KeyboardInterrupt), Profiler("profile", start, total, say=lines.append) as trace:
        for step in range(start + 1, total + 1):
            trace.before(step)
            said.append(step)
            trace.after(step, jnp.zeros(()))
            if step == until:
                raise KeyboardInterrupt
    assert said.count("on") == said.count("off") <= 1
    return (said[said.index("on") + 1 : said.index("off")] if "on" in said else []), lines


def test_a_trace_is_of_five_steps(profiler, caplog):
    assert traced(profiler, 20, 60) == ([30, 31, 32, 33, 34], ["wrote a trace of 5 steps to profile"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("total", "until", "steps", "words"),
    [
        (34, None, [30, 31, 32, 33, 34], ""),
        (33, None, [29, 30, 31, 32, 33], "13 steps are left, too few to let 9 go by; the trace is of steps 29 to 33"),
        (22, None, [21, 22], "2 steps are left, too few to let 9 go by; the trace is of steps 21 to 22, compilation"),
        (60, 31, [30, 31], ""),
        (60, 29, [], "ended before step 30, so nothing is traced"),
    ],
)
def test_a_trace_where_steps_are_few_or_the_run_ends(profiler, caplog, total, until, steps, words):
    found, lines = traced(profiler, 20, total, until)
    assert found == steps and lines == ([f"wrote a trace of {len(steps)} steps to profile"] if steps else [])
    assert words in caplog.text and bool(caplog.text) == bool(words)


def test_no_step_left_to_trace_is_an_error(profiler):
    with pytest.raises(ConfigError, match=r"--profile: step 60 of config\.total_steps 60 is done"):
        traced(profiler, 60, 60)


def test_a_last_line_without_its_newline_is_torn(tmp_path):
    """Kept, it would share a line with the next step."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with make(tmp_path, start_step=2) as monitor:
        monitor.step(3, metrics(3), examples=1)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 3]


def test_what_is_not_finite_is_null_and_flagged(tmp_path):
    bad = {"loss": float("nan"), "grad_norm": float("inf"), "bin_sums": [float("nan"), 0.0, 1.0]}
    monitor = make(tmp_path, log_every=3)
    monitor.step(1, metrics(1), examples=1)
    monitor.step(2, metrics(2, **bad, skipped=1, skipped_now=1, skips_in_a_row=1), examples=1)
    monitor.step(3, metrics(3), examples=1)
    monitor.evaluation(3, {"loss": float("nan"), "psnr": 20.0})
    monitor.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert lines[1]["loss"] is None and lines[1]["nonfinite"] == ["grad_norm", "loss"]
    assert lines[2]["loss_bins"] == [1.0, None, 3.0] and lines[2]["loss_mean"] == 2.5
    (line,) = read(tmp_path / "eval.jsonl")
    assert line["step"] == 3 and line["eval"] == {"loss": None, "psnr": 20.0} and line["nonfinite"] == ["loss"]


@pytest.mark.parametrize("is_writer", [True, False])
def test_stops_after_too_many_bad_steps_and_says_why(tmp_path, is_writer):
    paths = ["source_net/conv/bias", "fusion/attn1/to_q/kernel"]
    monitor = make(tmp_path, is_writer=is_writer, max_skips=2, parameter_paths=paths)
    bad = {
        "loss": float("nan"),
        "bin_sums": [1.0, float("nan"), 1.0],
        "first_bad_parameter": 1,
        "skipped_now": 1,
    }
    monitor.step(7, metrics(7), examples=1)
    monitor.step(8, metrics(8, **bad, skips_in_a_row=1), examples=1)
    monitor.step(9, metrics(9, **bad, skips_in_a_row=2), examples=1)
    with pytest.raises(NonFinite) as caught:
        monitor.step(10, metrics(10, **bad, skips_in_a_row=3), examples=1)
    text = str(caught.value)
    assert text.startswith("step 9: 2 steps in a row were not finite (since step 8; config.optim.max_skips is 2)")
    assert "the loss is nan (timestep bins 1 of 3)" in text and "first at parameter fusion/attn1/to_q/kernel" in text
    with pytest.raises(NonFinite):
        monitor.close()
    if is_writer:
        assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [7, 8, 9, 10]
    else:
        assert not list(tmp_path.iterdir()), "only the writer writes"


def test_gradient_alone_can_be_bad(tmp_path):
    with (
        pytest.raises(NonFinite, match=r"first at parameter number 5$"),
        make(tmp_path, max_skips=1) as monitor,
    ):
        monitor.step(1, metrics(1, skipped_now=1, skips_in_a_row=1, first_bad_parameter=5), examples=1)
        monitor.step(2, metrics(2), examples=1)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_is_one_line_and_no_wait(tmp_path):
    """A limit on the size of files, as a full disk would: metrics, TensorBoard and pictures all say so."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(CannotWrite) as caught, make(tmp_path, log_every=1) as monitor:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
            with pytest.raises(CannotWrite):
                monitor.image(1, "sheet", noise)
            for step in range(1, 200):
                monitor.step(step, metrics(step), examples=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"cannot write in {tmp_path} (File too large); free space there, or see its permissions"
    with make(tmp_path, start_step=2) as monitor:
        monitor.step(3, metrics(3), examples=1)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_pictures_lines_and_bar(tmp_path, capfd):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with make(tmp_path, quiet=False, total_steps=10) as monitor:
        for step in (1, 2, 3):
            monitor.step(step, metrics(step, skipped=2), examples=4)
        path = monitor.image(3, "sheet", picture)
        monitor.evaluation(3, {"heldout_loss": 0.123456, "psnr": 20.0})
        with pytest.raises(ValueError, match=r"float32\[4, 6, 3\]; expected uint8"):
            monitor.image(3, "sheet", picture.astype(np.float32))
    assert path == tmp_path / "samples" / "sheet_0000003.png"
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    out, err = capfd.readouterr()
    assert "step 3: heldout_loss 0.1235, psnr 20" in out.splitlines()
    assert "3/10" in err and "loss 3.5000" in err and "skipped 2" in err and "ETA" in err
    events = read_events(tmp_path / "tensorboard")
    shown = {(event.step, value.tag): value for event in events for value in event.summary.value}
    assert events[0].file_version == "brain.Event:2"
    assert shown[2, "train/loss"].simple_value == 2.5 and shown[3, "eval/psnr"].simple_value == 20
    assert (3, "train/loss") not in shown and abs(events[-1].wall_time - time.time()) < 60
    drawn = shown[3, "sheet"].image
    assert (drawn.height, drawn.width, drawn.colorspace) == (4, 6, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(drawn.encoded_image_string))), picture)


def read_events(folder: Path) -> list:
    """By tensorboardX's messages and checksums, which share no code with ours."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    (path,), events = folder.glob("*tfevents*"), []
    with path.open("rb") as file:
        while head := file.read(12):
            length, head_crc = struct.unpack("<QI", head)
            body, body_crc = file.read(length), struct.unpack("<I", file.read(4))[0]
            for part, want in ((head[:8], head_crc), (body, body_crc)):
                crc = crc32c(part)
                assert (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF == want
            events.append(Event.FromString(body))
    return events


def test_a_run_that_goes_on_hides_what_came_after_its_checkpoint(tmp_path):
    with make(tmp_path, start_step=300) as monitor:
        monitor.step(301, metrics(301), examples=1)
    start = read_events(tmp_path / "tensorboard")[1]
    assert (start.step, start.session_log.status) == (301, start.session_log.START)


def test_numbers_of_every_block_are_written_at_log_steps_alone(tmp_path):
    with make(tmp_path, log_every=5) as monitor:
        for step in range(1, 12):
            monitor.step(step, metrics(step, hpfa_rms=[0.1] * 16, caa_rms=[0.2] * 16), examples=1)
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "hpfa_rms" in line] == [5, 10]
    assert len(lines[4]["caa_rms"]) == 16 and all("loss" in line and "grad_norm" in line for line in lines)


def test_a_pause_counts_for_no_step(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitors, "time", types.SimpleNamespace(perf_counter=lambda: clock[0], time=time.time))
    monitor = make(tmp_path)
    monitor.step(1, metrics(1), examples=1)
    with monitor.paused():
        clock[0] += 60
    assert len(read(tmp_path / "metrics.jsonl")) == 1, "complete while paused"
    clock[0] += 0.25
    monitor.step(2, metrics(2), examples=1)
    monitor.close()
    assert read(tmp_path / "metrics.jsonl")[1]["steps_per_second"] == 4


def test_quiet_is_quiet_and_brings_no_torch_nor_hides_it(tmp_path):
    code = (
        "import sys; from truepose_jax.training.run_log import Monitor\n"
        "m = Monitor(sys.argv[1], total_steps=2, start_step=0, log_every=1, is_writer=True, quiet=True)\n"
        "m.step(1, {'loss': 1.0}, 1); m.evaluation(1, {'x': 1.0}); m.say('hello'); m.close()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run("-c", code, tmp_path) == (0, "", "")


def test_metrics_of_steps_that_no_checkpoint_has_are_kept_and_said(tmp_path, caplog):
    """Checkpoints were moved away: a run from 0 must not empty what was told of 30 steps. A kill between two checkpoints is
    no such case."""
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 31))
    for name in ("metrics.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(lines)
    make(tmp_path, start_step=20, checkpoint_every=10).close()
    assert not list(tmp_path.glob("*.before-*")) and not caplog.text
    (tmp_path / "metrics.jsonl").write_text(lines)
    for number in (1, 2):
        make(tmp_path, checkpoint_every=10).close()
        assert (tmp_path / "metrics.before-1.jsonl").read_text() == lines
        assert len(list(tmp_path.glob("*.before-*"))) == 2 and "kept as" in caplog.text, number
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_region_that_no_picture_shows_explains_its_nan(tmp_path, capsys):
    with make(tmp_path, quiet=False) as monitor:
        monitor.evaluation(3, {"psnr_face": float("nan"), "psnr_person": 20.0})
    said = capsys.readouterr().out
    assert "psnr_face nan (no picture shows 50 pixels of it), psnr_person 20" in said
