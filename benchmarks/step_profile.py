"""Where the time of a train step goes on this machine: seconds of processor time, and shares by module. Writes JSON.

    python benchmarks/step_profile.py --config=configs/demo.py --out=benchmarks/results/step_profile_demo.json

Shares are of the time inside XLA's operations, from a trace: forward and backward by the module and the first names below it.
Operations to which XLA gives no name (weight gradients of convolutions, copies) stand under "unnamed".
"""

from __future__ import annotations

import collections
import datetime
import glob
import importlib.util
import json
import pathlib
import re
import sys
import tempfile
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.tables import machine
from truepose_jax.config import Config, from_config_dict
from truepose_jax.data.annotations import training_method
from truepose_jax.data.datasets import training_batches, training_set
from truepose_jax.pretrained.factory import assemble, region_encoder
from truepose_jax.runtime.cli import Parser
from truepose_jax.runtime.sharding import put_global_batch, replicate
from truepose_jax.scaling.compiled import mesh_of
from truepose_jax.training.init import abstract_state, batch_spec
from truepose_jax.training.step import Trainer

TRACED = 4
DEPTH = 3
"""Names of a module's path that are told apart."""


def profile(config: Config, steps: int) -> dict:
    mesh = mesh_of(config, jax.devices()[:1])
    encoder = region_encoder(config)
    method, frozen, autoencoder, prints = assemble(config, encoder)
    with tempfile.TemporaryDirectory() as cache:
        data = training_set(config, encoder, cache)
        method = training_method(config, method, data.images, autoencoder, prints)
        batch = put_global_batch(mesh, next(training_batches(config, data)))
    frozen = replicate(mesh, frozen)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, method)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, trainer, mesh))
        init = jax.jit(lambda key: trainer.init_state(key, batch_spec(config)), out_shardings=shardings)
        state = init(jax.random.key(config.seed))
        start = time.process_time()
        lowered = trainer.jitted(state).lower(state, frozen, batch)
        traced = time.process_time()
        step = lowered.compile()
        compiled = time.process_time()
    holder, seconds, losses = [state], [], []

    def one() -> None:
        began = time.process_time()
        holder[0], metrics = step(holder[0], frozen, batch)
        jax.block_until_ready(holder[0])
        seconds.append(time.process_time() - began)
        losses.append(float(metrics["loss"]))

    for _ in range(2 + steps):
        one()
    measured = seconds[2:]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                one()
        (path,) = glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb")
        shares = by_module(path, step.as_text())
    return {
        "cpu_seconds": round(float(np.median(measured)), 3),
        "cpu_seconds_range": [round(min(measured), 3), round(max(measured), 3)],
        "steps": steps,
        "tracing_cpu_seconds": round(traced - start, 1),
        "compiling_cpu_seconds": round(compiled - traced, 1),
        "temporary_mib": round(step.memory_analysis().temp_size_in_bytes / 2**20),
        "losses": losses[:3],
        "shares": {name: round(share, 4) for name, share in shares.most_common(40)},
    }


def by_module(path: str, hlo: str) -> collections.Counter:
    """{forward or backward, module: share of the operations' time}."""
    names = {}
    for line in re.finditer(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", hlo, re.MULTILINE):
        found = re.search(r'op_name="([^"]*)"', line[2])
        names[line[1]] = found[1] if found else ""
    spent = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names and not event.name.startswith(("while", "cond", "call")):
                    spent[_module(names[event.name])] += event.duration_ns
    total = sum(spent.values())
    return collections.Counter({name: value / total for name, value in spent.items()})


def _module(name: str) -> str:
    """'jit(step)/transpose(jvp(CarryTarget))/while/body/dot' -> 'backward CarryTarget/while/body'."""
    name = name.removeprefix("jit(step)/")
    if not name:
        return "unnamed"
    way = "backward" if name.startswith("transpose") else "forward"
    name = re.sub(r"transpose\(jvp\((.*?)\)\)|jvp\((.*?)\)", lambda m: m[1] or m[2] or "loss", name)
    return f"{way} " + re.sub(r"\d+", "#", "/".join(name.split("/")[:DEPTH]))


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.py", help="a configuration's file")
    parser.add_argument("--identities", type=int, default=64, help="of synthetic people, to start sooner")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path)
    flags = parser.parse_args(argv)
    spec = importlib.util.spec_from_file_location("config", flags.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config()
    settings.data.synthetic.identities = flags.identities
    found = profile(from_config_dict(Config, settings), flags.steps)
    found = {"config": flags.config, "date": datetime.date.today().isoformat(), "machine": machine()} | found
    text = json.dumps(found, indent=1)
    print(text)
    if flags.out:
        flags.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
