"""What each hour of a run bought: every checkpoint that it kept, judged on held-out people. Writes JSON and a chart.

    python -m truepose_jax.train --config=configs/demo.py --workdir=RUN --config.checkpoint.keep_every=500 ...
    python benchmarks/margin_curve.py RUN --out=docs/models/synthetic_128x96 [--eval_seed=N]

Of both kinds of clothes: dB inside the person over the copied source and over the limb-wise warped source, sharpness and outline
error, by steps and by hours of training (steps alone; compiling, judging and pauses left out). Needs `pip install '.[scaling]'`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import numpy as np
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from truepose_jax.evaluate import judge
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.metrics.outlines import outline_error, sharpness
from truepose_jax.runtime.cli import Parser
from truepose_jax.training.validation import region_scores


def hours(workdir: pathlib.Path) -> dict[int, float]:
    """{step: hours of training until then}, from metrics.jsonl."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seconds = np.cumsum([1 / row["steps_per_second"] if row["steps_per_second"] else 0.0 for row in rows])
    return {row["step"]: float(at) / 3600 for row, at in zip(rows, seconds, strict=True)}


def rows(workdir: pathlib.Path, eval_seed: int | None) -> list[dict]:
    pipe = Pipeline.load(workdir)
    pairs = {kind: judge.people(pipe.run.config, pipe.encoder, looks, eval_seed) for kind, looks in judge.KINDS.items()}
    best = {
        kind: [region_scores(x, of)["person"] for x in (of.batch["source"], judge.warped_sources(of))]
        for kind, of in pairs.items()
    }
    at, found = hours(workdir), []
    size = judge.batch_size(pipe, judge.PEOPLE * judge.POSES)
    checkpoints, sample = pipe.run.checkpoints, None
    for step in tqdm.tqdm(checkpoints.steps(), desc="checkpoints"):
        params = dataclasses.replace(pipe.run, step=step).params()
        pipe.params.clear()
        pipe.params.update(params)
        sample = sample or judge.sampling(pipe)
        row = {"step": step, "hours": at[step]}
        for kind, of in pairs.items():
            images = of.sample(sample, pipe.run.config.seed, size)
            person = region_scores(images, of)["person"]
            truth, inside = of.batch["target"], of.mask("person")
            row[kind] = {
                "over_copy": person - best[kind][0],
                "over_limb_warp": person - best[kind][1],
                "sharpness": sharpness(images, truth, inside),
                "outline_error": outline_error(images, truth, inside),
            }
        found.append(row)
    return found


def draw(found: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for kind, colour in zip(judge.KINDS, ("tab:blue", "tab:orange"), strict=True):
        x = [row["hours"] for row in found]
        for name, style in (("over_copy", "-o"), ("over_limb_warp", "--o")):
            said = f"{kind}, over the {'copied' if name == 'over_copy' else 'limb-wise warped'} source"
            axes[0].plot(x, [row[kind][name] for row in found], style, color=colour, label=said, markersize=3)
        axes[1].plot(x, [row[kind]["outline_error"] for row in found], "-o", color=colour, label=kind, markersize=3)
    axes[0].set(xlabel="hours of training", ylabel="dB inside the person", title="margin")
    axes[1].set(xlabel="hours of training", ylabel="grey levels", title="error about the outline")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for curve.json and curve.png")
    parser.add_argument("--eval_seed", type=int, help="of the people (default: those of the run's own evaluation)")
    flags = parser.parse_args(argv)
    if not flags.out.is_dir():
        parser.error(f"--out={flags.out} is no folder")
    found = rows(flags.workdir, flags.eval_seed)
    (flags.out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, flags.out / "curve.png")
    for row in found:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
