"""What experiments/ablation.py runs: the encoder, the people, one training run, and the judging of its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from input_pipeline import atomic
from truepose_jax.data.datasets import evaluation_set
from truepose_jax.evaluate.judge import carrying, sampling
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.metrics.outlines import outline_error, sharpness
from truepose_jax.metrics.psnr import psnr, psnr_inside
from truepose_jax.metrics.ssim import gaussian_window, ssim_map
from truepose_jax.runtime.cli import enable_compilation_cache
from truepose_jax.sampling.image_grid import to_uint8
from truepose_jax.training.validation import Pairs, carried_sources, swap_costs, swap_scores

ROOT = pathlib.Path(__file__).resolve().parent.parent

STEPS, PATTERNS = 600, "mixed"
"""Budget and clothes of the table; of other benches there are reports of their own."""
TRAIN_PAIRS = 12_000
"""1,000 people in 4 poses; one person in 21 is held out of training altogether, with poses of their own."""
SIZE = "64x48"
CLIP_SIZE = "(128, 96)"
"""The region encoder's pictures are the demo's, so that one encoder serves both."""
PAIRS = 96
"""Held-out pairs that a run is judged on: one or two of each of 50 people."""
SHOWN = 6
REGIONS = ("person", "clothes", "face")
ATTENTION = ("hpfa_tokens", "hpfa_inside", "carry_tokens", "carry_inside")
"""Of HPFA, at the sites of the latent's own size, and of the half-cell head: of the run's metrics.jsonl."""
LAST_STEPS = 0.1
"""Share of the run, its end, that ATTENTION is the mean of."""
SSIM_WINDOW = gaussian_window(1.5)
"""On 0 to 1 with a range of 1: 11 taps fit into 64x48, the field's 51 do not."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """scratch: where everything lies. steps: of every run. patterns: of clothes, as in data.synthetic; the encoder is trained
    on such people too. Runs of other budgets and clothes lie beside them."""

    scratch: pathlib.Path
    steps: int
    patterns: str = PATTERNS

    @property
    def clip(self) -> pathlib.Path:
        return self.scratch / ("clip" + self._clothes)

    @property
    def people(self) -> pathlib.Path:
        return self.scratch / ("people" + self._clothes)

    @property
    def name(self) -> str:
        """Of folders and reports beside those of other benches."""
        return f"{self.steps}{self._clothes}"

    @property
    def _clothes(self) -> str:
        return "" if self.patterns == PATTERNS else f"_{self.patterns}"

    def workdir(self, variant: str, seed: int) -> pathlib.Path:
        return self.scratch / f"runs_{self.name}" / f"{variant}_{seed}"

    def row(self, variant: str, seed: int) -> pathlib.Path:
        return self.scratch / f"rows_{self.name}" / f"{variant}_{seed}.npz"

    def log(self, what: str) -> pathlib.Path:
        return self.scratch / f"logs_{self.name}" / f"{what}.log"

    def command(self, variant: str, seed: int) -> list[str]:
        """The training run's; the encoder and the people must be there."""
        return [
            "truepose_jax.train",
            f"--config=configs/synthetic_ablation.py:{variant}",
            f"--workdir={self.workdir(variant, seed)}",
            f"--config.seed={seed}",
            f"--config.total_steps={self.steps}",
            f"--config.data.root={self.people}",
            f"--config.model.clip.path={self.clip}",
        ]


def call(command: Sequence[str], log: pathlib.Path, *, core: int | None = None) -> None:
    """Runs `python -m ...`, on one core where `core` says which. Raises SystemExit where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("a") as out:
        code = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=out, stderr=out, preexec_fn=pin
        ).returncode
    if code:
        tail = " ".join(log.read_text(errors="replace").splitlines()[-1:])
        raise SystemExit(f"error: {command[0]} ended with code {code}: {tail} (all of it in {log})")


def prepare(bench: Bench) -> None:
    """The region encoder and the records with its tokens, where they are not there yet."""
    if not (bench.clip / "model.safetensors").is_file():
        encoder = ["experiments.train_clip", "--config=configs/synthetic_clip.py", f"--out={bench.clip}"]
        looks = [f"--config.synthetic.patterns={bench.patterns}", f"--config.size={CLIP_SIZE}"]
        call([*encoder, *looks], bench.log("clip"))
    build = ["truepose_jax.prepare", "build", "--dataset=synthetic", f"--size={SIZE}", f"--limit={TRAIN_PAIRS}"]
    looks = [f"--patterns={bench.patterns}", "--background=plain", "--framing=close"]
    log = bench.log("people")
    if not (bench.people / "dataset_info.json").is_file():
        call([*build, *looks, f"--out={bench.people}"], log)
    metadata = json.loads((bench.people / "metadata.json").read_text())
    if "clip" not in metadata.get("annotations", {}):
        call(["truepose_jax.prepare", "annotate", str(bench.people), f"--clip={bench.clip}", f"--size={SIZE}"], log)


def run(bench: Bench, variant: str, seed: int, core: int | None) -> None:
    """Trains (or goes on training) and judges; does nothing where the row is there."""
    if bench.row(variant, seed).is_file():
        return
    log = bench.log(f"{variant}_{seed}")
    call(bench.command(variant, seed), log, core=core)
    command = ["experiments.ablation_runs", str(bench.workdir(variant, seed)), str(bench.row(variant, seed))]
    call(command, log, core=core)


def judge(workdir: str, row: str) -> None:
    """Samples the held-out pairs with the run's EMA weights and writes numbers per pair, and a few pictures."""
    enable_compilation_cache()
    pipe = Pipeline.load(workdir)
    config = pipe.run.config
    wanted = dataclasses.replace(config, eval=dataclasses.replace(config.eval, pairs=PAIRS))
    pairs = Pairs.read(evaluation_set(wanted, pipe.encoder, cache=None), pipe.method.needs)

    # The noise of a pair is the same for every variant and seed, so that differences between them are paired.
    rows = config.eval.batch_size
    swaps, images = swap_scores(pairs, pipe.method.swaps, sampling(pipe), 0, rows)
    carried = carried_sources(pairs, images, carrying(pipe), 0, rows)
    found = per_pair(images, carried, pairs) | attention(workdir, [site.level == 0 for site in config.model.unet.sites])
    found |= {f"swap_{name}": np.array(cost) for name, cost in swap_costs(swaps).items()}
    about = images, pairs.batch["target"], pairs.mask("person")
    found |= {"sharpness": np.array(sharpness(*about)), "outline_error": np.array(outline_error(*about))}
    found["who"] = np.unique(pairs.identities, return_inverse=True)[1]
    found |= {"shown": to_uint8(images[:SHOWN]), "carried": to_uint8(carried[:SHOWN])}
    for name in ("source", "target"):
        found[name] = to_uint8(pairs.batch[name][:SHOWN])
    found["pose"] = to_uint8(pairs.batch["target_pose"][:SHOWN] * 2 - 1)
    path = pathlib.Path(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **found)


def per_pair(images: np.ndarray, carried: np.ndarray, pairs: Pairs) -> dict[str, np.ndarray]:
    """{metric: [pairs]}: SSIM, PSNR of the whole picture and inside regions (NaN: region under 50 pixels), and inside the
    person that of the source as the last attention carried it."""
    truth, person = pairs.batch["target"], pairs.mask("person")

    def inside(shown: np.ndarray, masks: np.ndarray) -> list[float]:
        return [psnr_inside(a, b, m, data_range=2.0) for a, b, m in zip(shown, truth, masks, strict=True)]

    values = {
        "psnr": [psnr(a, b, data_range=2.0) for a, b in zip(images, truth, strict=True)],
        "ssim": [ssim(a, b) for a, b in zip(images, truth, strict=True)],
        "psnr_carried": inside(carried, person),
    }
    values |= {f"psnr_{region}": inside(images, pairs.mask(region)) for region in REGIONS}
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def attention(workdir: str, full_size: Sequence[bool]) -> dict[str, np.ndarray]:
    """ATTENTION of the run's last steps; NaN of what the network has not. full_size: of its sites."""
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["step"] > (1 - LAST_STEPS) * lines[-1]["step"]]
    found = {}
    for name in ATTENTION:
        values = np.array([line[name] for line in last if name in line] or [np.nan], np.float64)  # lists are not in every line
        found[name] = np.mean(values[:, list(full_size)] if values.ndim == 2 else values)
    return found


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pixels and channels, of images in [-1, 1]."""
    return float(ssim_map((a + 1) / 2, (b + 1) / 2, window=SSIM_WINDOW, data_range=1.0).mean())


if __name__ == "__main__":
    judge(*sys.argv[1:])
