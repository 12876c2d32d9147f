"""One row of a devices or memory study, in a process of its own: how many devices a process sees is settled at its start,
and a compilation that fails or is killed takes nothing with it.

    python -m truepose_jax.scaling.worker TASK.json RESULT.json

The task names what to do and holds the configuration; the result is the row's measured part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from input_pipeline import atomic
from truepose_jax.config import Config, ConfigError, from_config_dict, to_dict


def run(task: Mapping[str, Any], folder: pathlib.Path, *, python: str = sys.executable, fake_devices: int = 0) -> Any:
    """Does `task` in a process; returns its result. A task that is done already is read and not done again.

    fake_devices: CPU devices that the process pretends to have; 0: whatever is there. Raises ConfigError where the
    process fails, with its last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    question, answer, log = (folder / name for name in ("task.json", "result.json", "log.txt"))
    if answer.exists() and question.exists() and json.loads(question.read_text()) == json.loads(json.dumps(task)):
        return json.loads(answer.read_text())
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(task))
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # so that the last line is the error
    if fake_devices:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={fake_devices}".strip()
        environment["JAX_PLATFORMS"] = "cpu"
    if task["do"] == "compile" and task["topology"]:
        environment["JAX_PLATFORMS"] = "cpu"  # the TPU is described, not used
        environment["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks a cloud's metadata server which machine this is
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    with log.open("w") as file:
        command = [python, "-m", "truepose_jax.scaling.worker", str(question), str(answer)]
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ConfigError(
            f"{folder.name} failed (exit code {code}): {lines[-1][:300] if lines else 'no output'}; see {log}"
        )
    return json.loads(answer.read_text())


def task_of(config: Config, do: str, **more: Any) -> dict[str, Any]:
    return {"do": do, "config": to_dict(config), **more}


def _compile(task: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the step on a described TPU (topology) or on this process's devices; {"error"} where it does not fit."""
    import jax

    from truepose_jax.scaling.compiled import facts, mesh_of

    config = from_config_dict(Config, task["config"])
    if task["topology"]:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=task["topology"]).devices
    else:
        devices = jax.devices()
    platform = devices[0].platform
    try:
        return dataclasses.asdict(facts(config, mesh_of(config, devices), little_effort=platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return {"error": " ".join(str(error).split())[:500]}


def _measure(task: Mapping[str, Any]) -> dict[str, Any]:
    from truepose_jax.scaling.measure import measure

    config = from_config_dict(Config, task["config"])
    return measure(config, devices=task["devices"], steps=task["steps"], cache=task["cache"])


def main(argv: list[str]) -> None:
    task = json.loads(pathlib.Path(argv[1]).read_text())
    result = {"compile": _compile, "measure": _measure}[task["do"]](task)
    atomic.write_text(pathlib.Path(argv[2]), json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv)
