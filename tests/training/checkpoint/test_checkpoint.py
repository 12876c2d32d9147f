"""Checkpoints under the accidents they are there for."""

import asyncio
import gc
import os
import resource
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from tests.process import environment, of_code
from truepose_jax.training.checkpoint import CheckpointError, Checkpoints, DamagedStep, store, without_closed_loops

# A restore that failed in one test abandons coroutines, which are collected in another.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(seed: int = 0, *, ema: bool = True, rows: int = 64):
    """A state of the shape train.py saves, with every leaf random: zeros would hide a mix-up."""
    params = {
        "source_net": {"conv": {"kernel": jnp.zeros((rows, 48)), "bias": jnp.zeros((48,))}, "empty": {}},
        "fusion": {"scale": jnp.zeros((3, 5), jnp.bfloat16)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 100)))
    rest = {"step": jnp.int32(0), "opt_state": tx.init(params), "skipped": jnp.int32(0)}
    rng = np.random.default_rng(seed)

    def draw(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 1000, x.shape), x.dtype)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    state = {"params": params, "ema": params if ema else None, "rest": rest}
    return jax.tree.map(draw, state)


def abstract(state, place=None):
    place = place or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def without_empty(tree):
    if not isinstance(tree, dict):
        return tree
    return {k: without_empty(v) for k, v in tree.items() if not (isinstance(v, dict) and not v)}


def biggest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_is_bit_equal_and_what_comes_back_can_be_donated(tmp_path, ema):
    state = make_state(ema=ema)
    state["params"]["source_net"]["conv"]["bias"] = jnp.array([jnp.nan, -0.0, jnp.inf] * 16, jnp.float32)
    saver = Checkpoints(tmp_path, keep=2, every=5)
    assert saver.latest_step() is None and saver.due(10) and not saver.due(11)
    saver.save(7, state, extra={"position": 84, "note": [1, None]})
    saver.save(7, make_state(1, ema=ema), extra={})  # is there already: nothing happens
    saver.close()

    saver = Checkpoints(tmp_path, keep=2, every=5)
    restored, extra, step = saver.restore(abstract(state))
    assert step == 7 and extra == {"position": 84, "note": [1, None]}
    assert_same(state, restored)
    leaf = restored["params"]["source_net"]["conv"]["kernel"]
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(leaf))
    assert leaf.is_deleted()
    saver.close()


def test_state_may_be_donated_right_after_save(tmp_path):
    """The save goes on in the background while the next step overwrites the arrays."""
    state = make_state(rows=10_000)
    want = jax.tree.map(lambda x: np.array(x, copy=True), state)
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    saver = Checkpoints(tmp_path, keep=1, every=1)
    saver.save(1, state, extra={})
    for _ in range(3):
        state = advance(state)
    jax.block_until_ready(state)
    saver.wait()
    assert_same(want, saver.restore(abstract(want))[0])
    saver.close()


def test_a_save_that_fails_is_an_error_and_the_step_before_stays(tmp_path):
    saver = Checkpoints(tmp_path, keep=2, every=1)
    saver.save(1, make_state(1), extra={})
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk would, in the background
    try:
        with pytest.raises(CheckpointError, match=r"saving to .* failed \(.*; free space there"):
            saver.save(2, make_state(2, rows=3000), extra={})
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(3, make_state(3), extra={})
    saver.close()
    saver = Checkpoints(tmp_path, keep=2, every=1)
    assert saver.restore(abstract(make_state()))[2] == 3
    assert_same(make_state(1), saver.restore(abstract(make_state()), step=1)[0])
    with pytest.raises(ValueError, match="not JSON"):
        saver.save(4, make_state(), extra={"loss": float("nan")})
    saver.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot open"):
        Checkpoints(tmp_path / "file", keep=2, every=1)


def test_keeps_the_last_steps(tmp_path):
    saver = Checkpoints(tmp_path, keep=2, every=1)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), extra={"step": step})
    saver.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]
    saver = Checkpoints(tmp_path, keep=2, every=1)
    state, extra, step = saver.restore(abstract(make_state()), step=2)
    assert step == 2 and extra == {"step": 2}
    assert_same(make_state(2), state)
    with pytest.raises(CheckpointError, match="no step 1; it has 2, 3"):
        saver.restore(abstract(make_state()), step=1)
    saver.close()


def test_keeps_every_kth_step_for_good(tmp_path):
    def steps():
        return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())

    saver = Checkpoints(tmp_path, keep=2, every=1, keep_every=3)
    for step in range(1, 6):
        saver.save(step, make_state(step), extra={})
    saver.close()
    assert steps() == [3, 4, 5]
    saver = Checkpoints(tmp_path, keep=1, every=1, keep_every=3)  # another process goes on, with fewer
    for step in (6, 7, 8):
        saver.save(step, make_state(step), extra={})
    saver.close()
    assert steps() == [3, 6, 8]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 10 and 20; tests read it only."""
    workdir = tmp_path_factory.mktemp("saved")
    saver = Checkpoints(workdir, keep=3, every=1)
    saver.save(10, make_state(10), extra={})
    saver.save(20, make_state(20, ema=False), extra={})
    saver.close()
    return workdir


def test_parts_are_restored_alone(saved):
    reader = Checkpoints(saved, keep=1, every=1, read_only=True)
    assert_same(without_empty(make_state(20, ema=False)["params"]), reader.restore_part("params"))
    assert_same(without_empty(make_state(10)["ema"]), reader.restore_part("ema", step=10))
    with pytest.raises(CheckpointError, match=r"step 20 .* holds no 'ema'.*raw weights"):
        reader.restore_part("ema")
    with pytest.raises(CheckpointError, match="reading only"):
        reader.save(30, make_state(), extra={})
    reader.close()
    assert sorted(p.name for p in (saved / "checkpoints").iterdir() if p.name.isdigit()) == ["10", "20"]


def test_a_reader_asks_no_other_process(saved, monkeypatch):
    """In shared work one that has nothing to sample never reads, and would not answer."""
    reader = Checkpoints(saved, keep=1, every=1, read_only=True)
    several = types.ModuleType("jax")
    several.__dict__.update(jax.__dict__, process_count=lambda: 2)
    monkeypatch.setattr(store, "jax", several)
    monkeypatch.setattr(
        store.multihost_utils, "process_allgather", lambda x: pytest.fail("it waits for another process")
    )
    assert_same(without_empty(make_state(10)["ema"]), reader.restore_part("ema", step=10))
    reader.close()


def test_what_does_not_fit_is_named_by_path(saved):
    reader = Checkpoints(saved, keep=1, every=1, read_only=True)

    def message(**changes):
        with pytest.raises(CheckpointError) as caught:
            reader.restore({**abstract(make_state(10)), **changes}, step=10)
        assert "\n" not in str(caught.value) and "step 10 in " in str(caught.value)
        return str(caught.value)

    wrong = abstract(make_state(10))["params"]
    wrong["source_net"]["conv"]["kernel"] = jax.ShapeDtypeStruct((64, 47), jnp.float32)
    wrong["fusion"]["scale"] = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    assert "params/fusion/scale is bfloat16[3, 5] in the checkpoint and float32[3, 5]" in message(params=wrong)
    assert "(and 1 more)" in message(params=wrong)
    assert "ema/fusion/scale is bfloat16[3, 5] in the checkpoint and absent in this run" in message(ema=None)
    more = {**abstract(make_state(10))["params"], "pose": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert "params/pose is absent in the checkpoint and float32[2] in this run" in message(params=more)
    reader.close()


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no training run"):
        Checkpoints(tmp_path, keep=1, every=1, read_only=True)
    saver = Checkpoints(tmp_path, keep=1, every=1)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        saver.restore(abstract(make_state()))
    saver.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with steps 1 and 2; tests damage copies of it."""
    workdir = tmp_path_factory.mktemp("two_steps")
    saver = Checkpoints(workdir, keep=3, every=1)
    for step in (1, 2):
        saver.save(step, make_state(step, rows=3000), extra={})
    saver.close()
    return workdir


@pytest.mark.parametrize("accident", ["truncated", "flipped bit", "no metadata", "not a checkpoint", "part missing"])
def test_damage_is_an_error_that_names_step_folder_and_the_way_out(tmp_path, two_steps, accident, capfd):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    folder, bad = tmp_path / "checkpoints", 2
    file = biggest_file(folder / "2" / "params")
    data = bytearray(file.read_bytes())
    if accident == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif accident == "flipped bit":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif accident == "no metadata":
        (folder / "2" / "params" / "_METADATA").write_text("{")
    elif accident == "not a checkpoint":
        bad = 1234
        (folder / "1234").mkdir()
    else:
        for path in sorted((folder / "2" / "rest").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (folder / "2" / "rest").rmdir()
    saver = Checkpoints(tmp_path, keep=3, every=1)
    capfd.readouterr()
    hook = sys.unraisablehook
    with pytest.raises(CheckpointError) as caught:
        saver.restore(abstract(make_state(rows=3000)))
    assert sys.unraisablehook is hook, "what the rest of the process hears is its own affair"
    text = str(caught.value)
    assert f"step {bad} in {folder}" in text and "\n" not in text and len(text) < 700
    if accident != "part missing":
        assert "to go on from step" in text
    if accident == "flipped bit":
        assert "bits of params/" in text
    assert_same(make_state(1, rows=3000), saver.restore(abstract(make_state(rows=3000)), step=1)[0])
    saver.close()
    assert "Traceback" not in capfd.readouterr().err


def damage(folder: Path, step: int, kind: str, part: str = "params") -> None:
    """Half of the biggest file of a step's part is gone, or one of its bits is another; or a number of its JSON is."""
    file = biggest_file(folder / str(step) / ("extra" if kind == "json" else part))
    data = bytearray(file.read_bytes())
    if kind == "json":
        at = data.index(b'"position":') + len(b'"position": ')
        data[at : at + 1] = b"7"
    elif kind == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_falls_back_past_damaged_steps_and_moves_them_aside(tmp_path):
    saver = Checkpoints(tmp_path, keep=5, every=1)
    for step in (1, 2, 3, 4):
        saver.save(step, make_state(step, rows=3000), extra={"position": 10 * step})
    saver.close()
    folder, wanted = tmp_path / "checkpoints", abstract(make_state(rows=3000))
    for step, kind in ((4, "flipped"), (3, "truncated"), (2, "json")):
        damage(folder, step, kind)

    saver = Checkpoints(tmp_path, keep=5, every=1)
    with pytest.raises(DamagedStep, match=r"cannot read step 4 .*allow_fallback=true$"):
        saver.restore(wanted)
    with pytest.raises(DamagedStep, match=r"cannot read step 2 .*JSON is not what was saved.*step 1 in its place"):
        saver.restore(wanted, step=2)
    assert not (tmp_path / "damaged").exists()

    # What does not fit is no damage, and where nothing can be read nothing is moved.
    wrong = abstract(make_state(rows=3001))
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"does not fit") as caught:
        Checkpoints(tmp_path, keep=5, every=1).restore_or_fall_back(wrong)
    assert not isinstance(caught.value, DamagedStep) and "step 4" in str(caught.value)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "none", keep=5, every=1).restore_or_fall_back(wanted)

    state, extra, step, skipped = saver.restore_or_fall_back(wanted)
    assert step == 1 and extra == {"position": 10}
    assert_same(make_state(1, rows=3000), state)
    assert [line.split(" in ")[0] for line in skipped] == [f"cannot read step {s}" for s in (4, 3, 2)]
    assert "bits of params/" in skipped[0] and str(tmp_path / "damaged" / "4") in skipped[0]
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3", "4"]
    # The run comes to those steps again and saves them; should one be damaged again, nothing is overwritten.
    for step in (2, 3):
        saver.save(step, make_state(10 + step, rows=3000), extra={"position": 10 * step})
    saver.wait()
    damage(folder, 3, "flipped")
    state, _, step, skipped = saver.restore_or_fall_back(wanted)
    assert step == 2 and skipped[0].endswith("3_2")
    assert_same(make_state(12, rows=3000), state)
    saver.close()


def test_where_no_step_can_be_read_nothing_is_moved(tmp_path):
    saver = Checkpoints(tmp_path, keep=5, every=1)
    for step in (1, 2):
        saver.save(step, make_state(step), extra={})
        saver.wait()
        damage(tmp_path / "checkpoints", step, "truncated")
    with pytest.raises(DamagedStep, match="cannot read step 2"):
        saver.restore_or_fall_back(abstract(make_state()))
    saver.close()
    assert not (tmp_path / "damaged").exists()


def test_a_save_that_fails_in_the_background_is_told_when_asked(tmp_path):
    saver = Checkpoints(tmp_path, keep=2, every=1)
    saver.check()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        saver.save(2, make_state(2, rows=3000), extra={})
        deadline = time.monotonic() + 600
        with pytest.raises(CheckpointError, match="free space there"):
            while time.monotonic() < deadline:
                saver.check()
                time.sleep(0.02)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not saver.is_committed(2)


def test_threads_that_find_the_loop_closed_are_silent(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    with without_closed_loops():
        for text in ("Event loop is closed", "another"):
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert heard == ["another"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, caplog):
    """Told before the save where there is no room; later asyncio's pages of orbax's tasks are dropped, and nobody else's."""
    saver = Checkpoints(tmp_path, keep=2, every=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000))
    said = r"step 2 to .* failed \(OSError: .*0\.1 of about \d\.\d MB are free\); free space there"
    with pytest.raises(CheckpointError, match=said):
        saver.save(2, make_state(2, rows=3000), extra={})
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.undo()

    async def nobody_waits(work):
        task = asyncio.create_task(work)
        await asyncio.sleep(0)
        assert task.done()

    for place in ("orbax/checkpoint/x.py", "ours.py"):
        made = {}
        exec(compile("async def fails(): raise ValueError(__file__)", place, "exec"), {"__file__": place}, made)
        asyncio.run(nobody_waits(made["fails"]()))
        gc.collect()
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(ValueError("as tensorstore's, from no line of Python"))
    gc.collect()
    loop.close()
    assert [str(record.exc_info[1]) for record in caplog.records] == ["ours.py"]


def test_restores_on_another_mesh(tmp_path):
    """Saved from one device, restored over eight (fsdp) and back, in a process that has eight."""
    code = """
        import sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from tests.training.checkpoint.test_checkpoint import Checkpoints, abstract, assert_same, make_state, without_empty
        from truepose_jax.runtime import sharding
        mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
        state = make_state()
        cut = jax.tree.map(
            lambda x: NamedSharding(mesh, P("fsdp") if x.ndim == 2 and x.shape[0] % 4 == 0 else P()), state)
        spec = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, cut)
        saver = Checkpoints(sys.argv[1], keep=3, every=1)
        saver.save(1, state, extra={}); saver.wait()
        over = saver.restore(spec)[0]
        assert len(over["params"]["source_net"]["conv"]["kernel"].sharding.device_set) == 8
        assert_same(state, over)
        saver.save(2, over, extra={}); saver.wait()
        assert_same(state, saver.restore(abstract(state))[0])
        assert_same(without_empty(state["ema"]), saver.restore_part("ema"))
        saver.close()
    """
    ended, _, errors = of_code(code, tmp_path, env=environment(devices=8)).finish()
    assert ended == 0, errors[-2000:]


def test_kill_in_the_middle_of_a_save_leaves_the_last_committed_step(tmp_path):
    code = """
        import sys
        from tests.training.checkpoint.test_checkpoint import Checkpoints, make_state
        saver = Checkpoints(sys.argv[1], keep=2, every=1)
        for step in range(1, 1000):
            state = make_state(step, rows=30_000)
            print("saving", step, flush=True)
            saver.save(step, state, extra={"step": step})
    """
    child = of_code(code, tmp_path)
    folder = tmp_path / "checkpoints"
    child.wait_for("saving 3")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        child.send_signal(signal.SIGSTOP)  # looked at while it stands still: what is seen is there at the kill
        os.waitpid(child.pid, os.WUNTRACED)
        if list(folder.glob("3*tmp*")):
            break
        child.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    child.kill()
    child.finish()
    assert list(folder.glob("*tmp*")), "the kill came between saves"

    reader = Checkpoints(tmp_path, keep=2, every=1, read_only=True)
    assert list(folder.glob("*tmp*")), "a reader removed what another process may be writing"
    reader.close()
    saver = Checkpoints(tmp_path, keep=2, every=1)
    assert not list(folder.glob("*tmp*"))
    state, extra, step = saver.restore(abstract(make_state(rows=30_000)))
    assert step >= 2 and extra == {"step": step}
    assert_same(make_state(step, rows=30_000), state)
    saver.save(step + 1, state, extra={})
    saver.close()


def test_bit_sums_are_the_same_in_jax_and_numpy():
    rng = np.random.default_rng(0)
    arrays = {"normal": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32), "scalar": jnp.int32(-3)}
    arrays.update({kind: jnp.ones((3,), kind) for kind in ("bfloat16", "float16", "int8", "bool", "uint32")})
    sums = store.bit_sums(arrays)
    assert sums == {name: int(store._bit_sum_on(x.sharding)(x)) for name, x in arrays.items()}
    assert (sums["bfloat16"], sums["bool"], sums["scalar"]) == (3 * 0x3F80, 3, 2**32 - 3)
