"""Several real processes on this machine: training, joined by gloo, with the examples, losses and stops of one process; and work
in parts (see also test_shards.py and test_generate_records.py)."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from input_pipeline.records.check import check_records
from input_pipeline.schema import InputError
from tests.evaluate.test_evaluate import folder
from tests.metrics.torch_networks import save_weights
from tests.process import ROOT, environment, free_port, of_code
from tests.training import test_killed as runs
from tests.training.test_killed import same_run, start, wait_for_step
from truepose_jax import prepare
from truepose_jax.evaluate.__main__ import main as evaluate
from truepose_jax.runtime import distributed

straight = runs.straight


def by_flags(workdir, count, *more):
    port = free_port()
    join = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    return [start(workdir, *join, f"--process={i}", *more, cached=False) for i in range(count)]


def finish(processes, code=0):
    ends = [process.finish() for process in processes]
    for found, _, errors in ends:
        assert found == code, errors[-3000:]
    return [out for _, out, _ in ends]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {"data": 1, "fsdp": 2}),  # slow for its compilation alone: hundreds of updates in each process
        (2, {"data": 1, "tensor": 2}),  # of one tensor group, which hold the same rows
        (4, {}),
        (4, {"data": 2, "fsdp": 2}),  # Gloo connects each group by itself, after distributed.start has connected all
    ],
)
def test_several_processes_are_one_run(tmp_path, straight, count, mesh):
    layout = ["--config.optim.layout=tree"] if mesh else []
    finish(by_flags(tmp_path, count, *(f"--config.mesh.{axis}={n}" for axis, n in mesh.items()), *layout))
    same_run(tmp_path, straight)
    assert (tmp_path / "samples" / f"sheet_{runs.STEPS:07d}.png").is_file()


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_the_same_step(tmp_path):
    processes = by_flags(tmp_path, 2, "--config.total_steps=2000", "--config.checkpoint.every=5000")
    wait_for_step(processes[0], tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, code=143)
    stopped = [next(line for line in out.splitlines() if "asked to stop" in line) for out in outputs]
    assert stopped[0] == stopped[1]
    (saved,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"saved step {saved};" in stopped[0]


def test_what_processes_tell_one_another(tmp_path):
    """Two real ones: what all say, what one does for both, and errors that both end with."""
    code = """
        import json, pathlib, sys, types
        from input_pipeline.schema import InputError
        from truepose_jax.runtime import distributed
        index, root = int(sys.argv[2]), pathlib.Path(sys.argv[3])
        distributed.SEEN_WITHIN = 1
        distributed.start(coordinator=sys.argv[1], process=index, processes=2)

        def fail():
            raise InputError("the disk is full")

        def error_of(work):
            try:
                return work()
            except InputError as error:
                return str(error)

        late = types.SimpleNamespace(folder=root, seen=[4, 8] if index == 0 else [4])
        late.steps, late.look_again = lambda: late.seen, lambda: late.__dict__.update(seen=[4, 8])
        never = types.SimpleNamespace(folder=root, steps=lambda: [4, 8][: 2 - index], look_again=lambda: None)
        place = root / f"place{index}"
        place.mkdir()
        print(json.dumps([
            distributed.all_gather("x" * (5 + index)),
            distributed.on_primary(lambda: {"by": index}),
            error_of(lambda: distributed.on_primary(fail)),
            error_of(lambda: distributed.assert_same("settings", {"a": 1, "seed": index})),
            error_of(lambda: distributed.assert_same("settings", {"a": 1})),
            error_of(lambda: distributed.same_folder(root)),
            error_of(lambda: distributed.same_folder(place)),
            error_of(lambda: distributed.same_steps(late)),
            error_of(lambda: distributed.same_steps(never)),
        ]))
    """
    for step in ("4", "8"):
        (tmp_path / step).mkdir()
    address = f"localhost:{free_port()}"
    ends = finish([of_code(code, address, index, tmp_path) for index in range(2)])
    first, second = (json.loads(out.splitlines()[-1]) for out in ends)
    for found in (first, second):
        assert found[:2] == [["xxxxx", "xxxxxx"], {"by": 0}] and "the disk is full" in found[2]
        assert "settings: those of process 1 differ from those of process 0: seed is 1 there and 0 here" in found[3]
        assert found[4] is found[5] is found[7] is None
        assert "process 1 does not see what process 0 writes there" in found[6] and "saved steps: those of" in found[8]
    assert not list((tmp_path / "place0").iterdir()) and not list((tmp_path / "place1").iterdir())


# ------------------------------------------------------------------------------------------------- shared work


def local(count, *arguments):
    """How launch/local.sh ends with `count` processes: (code, stdout, stderr)."""
    settings = environment(PYTHON=sys.executable, PORT=str(free_port()))
    command = [ROOT / "launch" / "local.sh", str(count), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout, done.stderr


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix != ".png" and path.is_file()}


def test_two_processes_build_what_one_builds(tmp_path):
    flags = ["build", "--dataset=synthetic", "--size=64x48", "--limit=13", "--poses-per-identity=3", "--workers=1"]
    code, said, errors = local(2, "prepare", *flags, f"--out={tmp_path / 'two'}")
    assert code == 0, errors
    assert "shard 0 of 2 is done" in said and "shard 1 of 2 is done" in said and said.count("13 pairs") == 1
    assert prepare.main([*flags, f"--out={tmp_path / 'one'}"]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert check_records(tmp_path / "two")[0] == []


@pytest.mark.slow
def test_three_processes_evaluate_as_one_does(tmp_path):
    """With LPIPS and FID by networks of the real size: three compilations of each."""
    names = [f"p{i}.png" for i in range(9)]
    reference, generated = folder(tmp_path / "reference", names), folder(tmp_path / "generated", names, offset=9)
    flags = [f"--reference={reference}", f"--generated={generated}", "--protocol=plain", "--batch-size=2"]
    flags += [f"--{name}-weights={save_weights(tmp_path, name, 1)[0]}" for name in ("lpips", "fid")]
    flags += [f"--fid-reference={reference}"]
    code, said, errors = local(3, "evaluate", *flags, f"--out={tmp_path / 'three.json'}")
    assert code == 0, errors
    assert said.count("three.json: the report") == 1
    assert evaluate([*flags, f"--out={tmp_path / 'one.json'}"]) == 0
    three, one = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("three", "one"))
    fid = "fid_unverified_weights"
    np.testing.assert_allclose(three.pop(fid)["mean"], one.pop(fid)["mean"], rtol=1e-6)
    assert three == one, "per-image metrics exactly"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "of"}, "--distributed is 'of'"),
        ({"coordinator": "localhost:1"}, "--process is missing"),
        ({"coordinator": "localhost", "process": 0, "processes": 1}, "HOST:PORT"),
        ({"coordinator": "localhost:1", "process": 2, "processes": 2}, "from 0 to 1"),
        ({"mode": "off", "process": 1}, "makes no sense"),
    ],
)
def test_bad_flags(arguments, text):
    with pytest.raises(InputError, match=text):
        distributed.start(**arguments)


def test_bad_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'first'"):
        distributed.start()
    monkeypatch.delenv("JAX_PROCESS_ID")
    with pytest.raises(InputError, match="--process is missing"):
        distributed.start()
