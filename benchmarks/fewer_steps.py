"""What fewer steps cost: every sampler at several step counts against 250 steps of DDIM. Writes JSON and a Markdown table.

    python benchmarks/fewer_steps.py --out=benchmarks/results              # the shipped model
    python benchmarks/fewer_steps.py --workdir=RUN --guidance=2 --guidance-interval=0.2:0.8 --out=DIR

dB: PSNR of the pictures to those of 250 steps from the same noise, not to the truth (to which fewer steps can be nearer: an
average of what may be is blurred). Held-out synthetic people. Seconds: of a picture, its share of the source's side and of
decoding included; processor time, which does not count what else the machine does. Steps run one by one, as they are for a
callback. FLOPs are counted from the traced programs.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.tables import machine, write
from truepose_jax.diffusion.guidance import EVERYWHERE, guided_denoise
from truepose_jax.diffusion.samplers import Solver
from truepose_jax.evaluate import judge
from truepose_jax.flags.generate import interval
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.runtime.bundled import SHIPPED
from truepose_jax.runtime.choices import SAMPLERS
from truepose_jax.runtime.cli import Parser, enable_compilation_cache
from truepose_jax.runtime.markdown import table
from truepose_jax.sampling.sampler import Sampler, Sampling, compiler_options
from truepose_jax.training.flops import flops_of

STEPS = (1, 2, 4, 8, 16, 35)
TRUTH = 250
PAIRS = 16


class Parts:
    """A pipeline's sampling of one batch, compiled in parts that all samplers and step counts share."""

    def __init__(self, pipe: Pipeline, sampling: Sampling, batch, keys):
        self.pipe, self.sampling, diffusion = pipe, sampling, pipe.run.config.diffusion
        self.schedule, self.spacing = diffusion.schedule, diffusion.spacing
        self.sampler = Sampler(pipe.method, self.schedule, self.spacing, sampling)
        inputs = pipe.params, pipe.frozen, batch, keys
        self.rows = len(keys)
        self.begin, self.flops_around = self._compiled(self.sampler.begin, *inputs)
        self.fixed, self.state = self.begin(*inputs)
        self.seconds_around = _seconds(lambda: self.begin(*inputs))
        t = jnp.zeros((self.rows,), jnp.int32)
        self.steps = {}
        for scale in {sampling.guidance, 1.0}:
            step = lambda params, fixed, x, t, scale=scale: guided_denoise(  # noqa: E731
                lambda *a: pipe.method.denoise(params, *a), pipe.method.branches(fixed[0], scale)
            )(x, t)
            self.steps[scale] = self._compiled(step, pipe.params, self.fixed, self.state.x, t)
        self.finish, flops = self._compiled(self.sampler.finish, pipe.frozen, self.fixed, self.state)
        self.flops_around += flops
        self.seconds_around += _seconds(lambda: self.finish(pipe.frozen, self.fixed, self.state))

    def _compiled(self, function, *inputs):
        flops = flops_of(jax.make_jaxpr(function)(*inputs).jaxpr)
        return jax.jit(function, compiler_options=compiler_options()).lower(*inputs).compile(), flops

    def run(self, sampler: str, steps: int) -> tuple[np.ndarray, float, float]:
        """(pictures in [0, 1], FLOPs and processor seconds of one picture)."""
        solver = Solver(self.schedule, sampler, steps, self.spacing)
        low, high = (share * self.schedule.steps for share in self.sampling.guidance_interval)
        inside = [low <= t <= high for t in solver.levels[0].tolist()]
        count, flops = iter(inside), self.flops_around

        def predict(x, t):
            with jax.disable_jit(False):
                return self.steps[self.sampling.guidance if next(count) else 1.0][0](self.pipe.params, self.fixed, x, t)

        start = time.process_time()
        with jax.disable_jit():  # the loop in Python; what is compiled stays so
            state = solver.advance(predict, solver.begin(self.state.x), 0, steps)
        images = np.asarray(self.finish(self.pipe.frozen, self.fixed, self.state._replace(x=state.x)))
        seconds = time.process_time() - start + self.seconds_around
        flops += sum(self.steps[self.sampling.guidance if guided else 1.0][1] for guided in inside)
        return np.clip(images, -1, 1) / 2 + 0.5, flops / self.rows, seconds / self.rows


def _seconds(call) -> float:
    found = []
    for _ in range(3):
        start = time.process_time()
        jax.block_until_ready(call())
        found.append(time.process_time() - start)
    return float(np.median(found))


def page(found: dict) -> str:
    lines = [
        f"# Fewer steps: {found['model']}",
        "",
        f"{found['pairs']} pairs, batch {found['pairs']}, guidance {found['guidance']:g}; dB to {TRUTH} steps of DDIM. "
        f"{found['machine']['cpu']}, {found['machine']['cores']} core(s), {found['date']}.",
        "",
    ]
    heads = ("sampler", "steps", "GFLOP a picture", "CPU s a picture", "dB", "worst pair")
    names = {"steps": "d", "gflop": ".2f", "cpu_seconds": ".3f", "db": ".1f", "db_worst": ".1f"}
    rows = [[SAMPLERS[row["sampler"]], *(format(row[name], how) for name, how in names.items())] for row in found["rows"]]
    return "\n".join([*lines, *table(heads, rows), ""])


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="", help="a run or an export (the shipped model)")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=lambda text: tuple(map(int, text.split(","))), default=STEPS)
    parser.add_argument("--guidance", type=float, help="the run's")
    parser.add_argument("--guidance-interval", type=interval, default=EVERYWHERE)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for fewer_steps.json and .md")
    flags = parser.parse_args(argv)
    enable_compilation_cache()
    pipe = Pipeline.load(flags.workdir or SHIPPED)
    sampling = pipe.run.sampling(None, flags.guidance, "ddim", flags.guidance_interval)
    pairs = judge.people(pipe.run.config, pipe.encoder, "all", None).first(flags.pairs)
    parts = Parts(pipe, sampling, dict(pairs.batch), pairs.keys(pipe.run.config.seed))
    truth = parts.run("ddim", TRUTH)[0]
    rows = []
    for sampler in (each for each in SAMPLERS if each != "ddpm"):  # whose pictures are others, not nearer ones
        for steps in flags.steps:
            images, flops, seconds = parts.run(sampler, steps)
            db = -10 * np.log10(np.mean((images - truth) ** 2, axis=(1, 2, 3)) + 1e-12)
            row = {"sampler": sampler, "steps": steps, "gflop": round(flops / 1e9, 3), "cpu_seconds": round(seconds, 4)}
            rows.append(row | {"db": round(float(db.mean()), 2), "db_worst": round(float(db.min()), 2)})
            print(json.dumps(rows[-1]), flush=True)
    found = {
        "model": flags.workdir or "docs/models/synthetic_128x96",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "pairs": flags.pairs,
        "guidance": sampling.guidance,
        "guidance_interval": sampling.guidance_interval,
        "rows": rows,
    }
    write(flags.out / "fewer_steps.json", found, page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
