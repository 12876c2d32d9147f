"""The prepared quarter of an hour on a GPU, as far as a CPU goes: its stages, its limits, and programs as files."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.serialize_executable import serialize

from benchmarks import gpu_aot

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_quarter_hour.sh"
STAGES = ["ceilings", "attention", "train", "sampling", "recipe", "pallas"]


def start(out, python=sys.executable, *more, **variables):
    environment = os.environ | {"PYTHON": str(python), "DRY_RUN": "1"} | variables
    return subprocess.run([SCRIPT, out, *more], env=environment, capture_output=True, text=True, timeout=300)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages_on_a_cpu(tmp_path):
    done = start(tmp_path, STAGES="ceilings attention")
    assert done.returncode == 0, done.stderr
    assert [(row["stage"], row["code"]) for row in lines(tmp_path / "stages.jsonl")] == [("ceilings", 0), ("attention", 0)]
    versions, product, copy = lines(tmp_path / "ceilings.jsonl")
    assert versions["jax"] == jax.__version__ and product["tflops"] > 0 and copy["gb_per_s"] > 0
    cases = lines(tmp_path / "attention.jsonl")
    assert [row["case"].split()[:2] for row in cases] == [
        ["plain", "reference"], ["reweighted", "reference"], ["plain", "xla"], ["reweighted", "xla"], ["plain", "cudnn"]
    ]  # fmt: skip
    assert all(0 < row["error"] < 2e-2 and row["seconds"] > 0 for row in cases[:4])
    assert "- reweighted xla 48x16: error" in done.stdout and done.stdout == (tmp_path / "table.md").read_text()


FAKE = """#!/bin/bash
echo "$*" >> {log}
case "$*" in
  *train_step*) exit 3 ;;
  *--name=pallas*) exec sleep 60 ;;
  *truepose_jax.demo*) mkdir -p {out}/run; echo '{{"plain": 1}}' > {out}/run/demo.json; echo x > {out}/run/demo.png; exit 1 ;;
  *convert*) mkdir -p {out}/export; echo weights > {out}/export/w ;;
  *table*) exec {python} "$@" ;;
esac
"""


def test_one_stage_that_fails_and_one_that_hangs_leave_the_others_their_time(tmp_path):
    out, log, fake, programs = (tmp_path / name for name in ("out", "log", "python", "programs"))
    programs.mkdir()
    fake.write_text(FAKE.format(log=log, out=out, python=sys.executable))
    fake.chmod(0o755)
    script = tmp_path / "benchmarks" / SCRIPT.name
    script.parent.mkdir()
    text = SCRIPT.read_text()
    limits = [int(limit) for limit in re.findall(r"^(?:stage|side) \w+ (\d+)", text, re.M)]
    assert len(limits) == len(STAGES) and sum(limits) == 525 < 540 and f"add up to {sum(limits)} s" in text
    script.write_text(text.replace("stage pallas 40", "stage pallas 1"))
    script.chmod(0o755)
    (script.parent / "gpu_stages.py").symlink_to(ROOT / "benchmarks" / "gpu_stages.py")
    environment = os.environ | {"PYTHON": str(fake), "DRY_RUN": ""}
    done = subprocess.run([script, out, programs], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes = {row["stage"]: row["code"] for row in lines(out / "stages.jsonl")}
    assert codes == dict.fromkeys(STAGES, 0) | {"train": 3, "pallas": 124} and list(codes) == STAGES
    called = log.read_text()
    assert f"train_step.py --device=gpu --full --peers=eager,eager_nhwc --repeats=5 --out={out} --programs={programs}" in called
    assert f"truepose_jax.demo --workdir={out}/run --config=configs/demo.py --minutes=3.2 --config.model" in called
    assert "--batch=12 --batch=60" in called and f"convert to-torch --workdir={out}/run --dtype=float16" in called
    assert (out / "weights.tar.aa").stat().st_size > 0 and '"plain": 1' in done.stdout and "| pallas | 124 |" in done.stdout


def test_a_program_in_a_file_is_the_program(tmp_path):
    """Loaded it gives the same numbers; what is no program is told and left to the compiler."""

    def function(tree, x):
        return {"y": jnp.sin(x) @ tree["w"]}, x.sum()

    x = np.random.default_rng(0).standard_normal((3, 3), np.float32)
    arguments = ({"w": x}, x)
    compiled = jax.jit(function).lower(*arguments).compile()
    (tmp_path / "good").write_bytes(serialize(compiled)[0])
    loaded = gpu_aot.load(tmp_path / "good", function, arguments)
    for ours, theirs in zip(jax.tree.leaves(loaded(*arguments)), jax.tree.leaves(compiled(*arguments)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (tmp_path / "bad").write_bytes(b"no program")
    assert gpu_aot.load(tmp_path / "bad", function, arguments) is None
    assert gpu_aot.load(tmp_path / "absent", function, arguments) is None


PTXAS = """
ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 126 registers, used 2 barriers
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 238 registers, used 2 barriers
"""


def test_the_compilers_account():
    assert gpu_aot.registers(PTXAS) == {"kernels": 2, "registers": 238, "spilled_bytes": 16} and not gpu_aot.registers("")
    row = {"held_bytes": 2e6, "temporary_bytes": 1e6, "library_calls": 3, "compile_cpu_s": 2.0, "sources": "x"}
    rows = {"attention-reference-48x160-forward": row, "train-512x352-batch12": {"failed": "took over 900 s", "sources": "y"}}
    about = dict.fromkeys(("jax", "plugin", "machine", "when"), "x")
    told = gpu_aot.report({"about": about, "rows": rows})
    assert "| attention-reference-48x160-forward | 2.0 | 1.0 | - | - | - | 3 | 2 |" in told
    assert "sources x and y; compiled on" in told
    assert "- train-512x352-batch12: took over 900 s" in told and "| train-512x352-batch12" not in told
