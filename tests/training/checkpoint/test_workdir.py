"""metadata.json, the check of the configuration, the lock and the signal to stop."""

import fcntl
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests.process import free_port, of_code
from truepose_jax import train
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.runtime import sharding
from truepose_jax.training.checkpoint import (
    CheckpointError,
    Preemption,
    as_metadata,
    check_place,
    check_same_config,
    check_same_contents,
    check_there,
    data_digest,
    lock_workdir,
    parameter_table,
    read_config,
    read_metadata,
    write_metadata,
)


def make_config(**changes) -> Config:
    values = base.get_config()
    with values.unlocked():
        values.update_from_flattened_dict(changes)
    return from_config_dict(Config, values)


def make_params():
    conv = {"kernel": jnp.zeros((64, 48)), "bias": jnp.zeros((48,))}
    return {"source_net": {"conv": conv}, "fusion": {"scale": jnp.zeros((3, 5), jnp.bfloat16)}}


def test_metadata_round_trip(tmp_path):
    config, params = make_config(seed=3), make_params()
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    table = parameter_table(params)
    said = write_metadata(tmp_path, config=config, parameter_table=table, mesh=mesh, extra={"frozen": {"vae": "abc"}})
    assert read_config(tmp_path) == config
    record = read_metadata(tmp_path)
    assert json.loads(json.dumps(said)) == record
    assert record["parameters"]["networks"] == {"fusion": 15, "source_net": 64 * 48 + 48}
    assert record["parameters"]["total"] == 64 * 48 + 48 + 15
    assert ["source_net/conv/kernel", [64, 48], "float32"] in record["parameters"]["table"]
    assert record["versions"]["jax"] == jax.__version__ and record["mesh"] == {
        "data": 1,
        "fsdp": 1,
        "tensor": 1,
    }
    assert record["frozen"] == {"vae": "abc"} and record["devices"]["platform"] == jax.devices()[0].platform
    assert [p.name for p in tmp_path.iterdir()] == ["metadata.json"]


def test_what_is_kept_for_good_must_be_saved():
    assert make_config(**{"checkpoint.every": 5, "checkpoint.keep_every": 20}).checkpoint.keep_every == 20
    for wrong in (7, -5):
        with pytest.raises(ConfigError, match=rf"keep_every is {wrong}; .* multiple of checkpoint\.every \(5\)"):
            make_config(**{"checkpoint.every": 5, "checkpoint.keep_every": wrong})


def test_unreadable_metadata_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no training run"):
        read_config(tmp_path)
    for text in ('{"config": ', "[]", '{"config": {"seed": "1"}}'):
        (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"metadata\.json") as caught:
            read_config(tmp_path)
        assert "\n" not in str(caught.value)


def test_workdir_of_another_configuration(tmp_path):
    check_same_config(tmp_path, make_config())
    write_metadata(tmp_path, config=make_config(), parameter_table=[], mesh=None)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    check_same_config(tmp_path, make_config())
    allowed = {"total_steps": 7, "log_every": 5, "eval.every": 3, "checkpoint.keep": 9, "mesh.fsdp": 2}
    allowed |= {
        "data.threads": 1,
        "data.workers": 2,
        "data.max_invalid": 0.5,
        "model.remat": not make_config().model.remat,
    }
    allowed |= {"optim.accumulation": 2, "optim.max_skips": 3, "optim.noise_scale": "on"}
    moved = {name: "/moved" for name in ("data.root", "model.vae", "model.clip.path", "init_from")}
    check_same_config(tmp_path, make_config(**allowed, **moved))
    changes = {"batch_size": 24, "optim.learning_rate": 1e-4, "seed": 1, "data.flip": True, "total_steps": 1}
    with pytest.raises(CheckpointError) as caught:
        check_same_config(tmp_path, make_config(**changes))
    assert "config.seed was 0 and is 1; config.batch_size was 12 and is 24; " in str(caught.value)
    assert "(and 1 more)" in str(caught.value) and "total_steps" not in str(caught.value)
    record = json.loads((tmp_path / "metadata.json").read_text())
    del record["config"]["data"]["flip"]
    (tmp_path / "metadata.json").write_text(json.dumps(record))
    check_same_config(tmp_path, make_config())
    with pytest.raises(CheckpointError, match=r"config\.data\.flip was false and is true"):
        check_same_config(tmp_path, make_config(**{"data.flip": True}))
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no metadata\.json"):
        check_same_config(tmp_path, make_config())


def test_without_a_saved_step_any_configuration_is_fine(tmp_path):
    """metadata.json is written before the first step: one that found no memory must not hold the next try to its batch."""
    write_metadata(tmp_path, config=make_config(), parameter_table=[], mesh=None)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    check_same_config(tmp_path, make_config(batch_size=6))


CONTENTS = {
    "autoencoder": "a" * 64,
    "clip": "c" * 64,
    "data": "d" * 64,
    "origin": {"name": "sd15", "files": {"f": "1"}},
}


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("autoencoder", "b" * 64, "config.model.vae"),
        ("clip", "b" * 64, "config.model.clip.path"),
        ("data", "b" * 64, "config.data.root"),
        ("origin", None, "config.init_from"),
    ],
)
def test_a_run_goes_on_with_what_it_has_trained_with(tmp_path, name, value, setting):
    changed = CONTENTS | {name: value}
    write_metadata(tmp_path, config=make_config(), parameter_table=[], mesh=None, extra=as_metadata(CONTENTS))
    check_same_contents(tmp_path, changed)  # no step is saved yet
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    check_same_contents(tmp_path, CONTENTS)
    check_same_contents(tmp_path, CONTENTS | {"clip": ""})  # not known
    with pytest.raises(CheckpointError, match=rf"not the one .*; give {setting} the same again") as caught:
        check_same_contents(tmp_path, changed)
    assert "\n" not in str(caught.value)
    record = json.loads((tmp_path / "metadata.json").read_text())
    for entries in (record, record["frozen"]):
        entries.pop(name, None)
    (tmp_path / "metadata.json").write_text(json.dumps(record))
    check_same_contents(tmp_path, changed)  # an older run did not record it


def test_digest_of_a_folder_of_photos(tmp_path):
    def digest(pairs=((0, 1),), **more):
        return data_digest(SimpleNamespace(pairs=np.array(pairs), **more), str(tmp_path), ("image", "parsing"))

    (tmp_path / "image" / "a").mkdir(parents=True)
    (tmp_path / "image" / "a" / "1.png").write_text("12345")
    found = [digest()]
    (tmp_path / "notes.txt").write_text("nothing that is trained on")
    assert digest() == found[0]
    (tmp_path / "image" / "a" / "1.png").write_text("1234")
    found.append(digest())
    (tmp_path / "image" / "a" / "1.png").rename(tmp_path / "image" / "a" / "2.png")
    found += [digest(), digest(((1, 0),)), digest(digest="of records")]
    assert len(set(found)) == 5


def test_a_workdir_that_is_no_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("gs://bucket/run", "s3://bucket/run"):
        with pytest.raises(CheckpointError, match=rf"--workdir={place} is an address.* mount the bucket"):
            train.train(make_config(), place)
    check_place(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=f"cannot write in the workdir {place} ") as caught:
            train.train(make_config(), place)
        assert "\n" not in str(caught.value)


def test_a_workdir_is_for_one_run_at_a_time(tmp_path):
    code = """
        import fcntl, sys, time
        file = open(sys.argv[1] + "/lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on there"); file.flush()
        print("held", flush=True)
        time.sleep(60)
    """
    child = of_code(code, tmp_path)
    child.wait_for("held")
    with pytest.raises(CheckpointError, match=r"in use by another run \(process 12 on there\)"):
        lock_workdir(tmp_path)
    child.kill()
    child.finish()
    lock_workdir(tmp_path)  # kept though nobody keeps what it returns
    assert lock_workdir(tmp_path) is lock_workdir(tmp_path)
    assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    with (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock_workdir(tmp_path):
        pass
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_signals_set_the_flag_and_the_old_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with Preemption() as preemption:
            assert not preemption.stop(1) and not preemption.requested
            os.kill(os.getpid(), number)
            assert preemption.stop(1) and preemption.requested and preemption.stop(2)
        assert "saving, then stopping" in capfd.readouterr().err
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_sigterm_in_a_process_and_the_second_one():
    code = """
        import sys, time
        from truepose_jax.training.checkpoint import Preemption
        with Preemption() as preemption:
            print("ready", flush=True)
            while not preemption.stop(0):
                time.sleep(0.01)
            print("saved", flush=True)
            time.sleep(60 * int(sys.argv[1]))
        print("left", flush=True)
    """
    children = [of_code(code, 0), of_code(code, 1)]
    for child in children:
        child.wait_for("ready")
        child.send_signal(signal.SIGTERM)
        child.wait_for("saved")
    children[1].send_signal(signal.SIGTERM)
    assert [child.finish()[:2] for child in children] == [(0, "ready\nsaved\nleft\n"), (143, "ready\nsaved\n")]


def test_a_signal_is_answered_at_once_while_nothing_is_unsaved():
    """The main thread is away in C, as in a compilation, where Python's own handlers would wait for it: for a minute."""
    code = """
        import itertools, os, sys
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        import numpy as np
        from truepose_jax.training.checkpoint import Preemption
        looks = itertools.count()
        safe_to_exit = {"nothing unsaved": lambda: True, "being saved": lambda: next(looks) > 2}[sys.argv[1]]
        with Preemption(safe_to_exit=safe_to_exit):
            large = np.ones((10_000, 10_000), np.float32)
            print("ready", flush=True)
            large @ large
            print("the end", flush=True)
    """
    said = []
    for kind in ("nothing unsaved", "being saved"):
        child = of_code(code, kind)
        child.wait_for("ready")
        time.sleep(0.2)  # it needs longer for the product, and a moment to begin with it
        child.send_signal(signal.SIGTERM)
        said.append(child.finish())
    assert [end[:2] for end in said] == [(143, "ready\n")] * 2
    assert "nothing unsaved" in said[0][2] and "saving, then" not in said[0][2]
    assert "saving, then" in said[1][2] and "nothing unsaved" in said[1][2]


def test_two_processes_stop_together_when_one_gets_the_signal():
    code = """
        import sys, time, jax
        jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
        from truepose_jax.training.checkpoint import Preemption
        with Preemption() as preemption:
            print("ready", flush=True)
            for step in range(3000):
                if preemption.stop(step):
                    break
                time.sleep(0.01)
        print("stopped", step, flush=True)
        jax.distributed.shutdown()
    """
    port = free_port()
    children = [of_code(code, port, i) for i in range(2)]
    for child in children:
        child.wait_for("ready")
    children[1].send_signal(signal.SIGINT)  # goes on to JAX as SIGTERM
    said = [child.finish()[1].splitlines()[-1] for child in children]
    assert said[0] == said[1] and said[0].startswith("stopped") and said[0] != "stopped 2999", said


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_workdir_that_vanishes_ends_its_run(tmp_path, how):
    workdir = tmp_path / "run"
    with lock_workdir(workdir):
        check_there(workdir)
        if how == "removed":
            shutil.rmtree(workdir)
        else:
            workdir.rename(tmp_path / "elsewhere")
        if how == "replaced":
            workdir.mkdir()
            (workdir / "lock").write_text("")
        with pytest.raises(CheckpointError, match="was removed or replaced"):
            check_there(workdir)
    check_there(tmp_path / "never locked")
