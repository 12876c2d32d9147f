"""make demo: trains TruePose on synthetic people from nothing, then shows and judges what it learned.

    python -m truepose_jax.demo --workdir=runs/demo [--config=configs/demo.py --config.key=value]

Sixteen held-out people, each to be put into the same four held-out poses. Printed: PSNR inside regions against two
baselines on the same pairs, garment retrieval with its control, and the swap test. Exit code 1 where the model does not
beat the copied source inside the person, or where retrieval is under 50 %.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
from PIL import Image

from configs.demo import get_config
from input_pipeline.poses import Pose, framed_pose
from input_pipeline.synthetic import SyntheticPeople, render
from truepose_jax import train
from truepose_jax.assembly import assemble
from truepose_jax.checkpoint import Checkpoints
from truepose_jax.datasets import EVAL_SEED, Dataset
from truepose_jax.evaluation import Pairs, make_sampler, region_scores, swap_costs, swap_scores
from truepose_jax.metrics.regions import retrieval
from truepose_jax.pictures import sheet, to_uint8
from truepose_jax.programs import keep_programs, run_with_config
from truepose_jax.region_tokens import RegionEncoder, make_encoder, token_table
from truepose_jax.schema import Config, ConfigError, from_config_dict

PEOPLE, POSES = 16, 4
FIRST_POSE, POSE_STRIDE = 101, 10
"""Numbers of the poses: odd ones are never trained on; the stride walks through the table of base poses."""

MEAN_OF = 64
"""Training identities whose mean, in the target pose, is the second baseline."""

ONLY_OF_TRAIN = (train.ESTIMATE, train.DISTRIBUTED, train.COORDINATOR, train.PROCESS, train.PROCESSES)
"""Flags that come with train's and mean nothing here."""

LEAST_RETRIEVAL = 0.5
HPFA_COST = 1.0
"""dB inside the person that another source image must cost before the demo says that HPFA carries appearance."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the demo found; PSNRs in dB, retrieval as shares, swap costs in dB inside the person."""

    psnr: dict[str, dict[str, float]]
    retrieval: float
    shuffled_retrieval: float
    swap_costs: dict[str, float]

    @property
    def beats_copy(self) -> bool:
        return self.psnr["TruePose"]["person"] > self.psnr["copied source"]["person"]

    @property
    def passed(self) -> bool:
        return self.beats_copy and self.retrieval >= LEAST_RETRIEVAL


def demo_poses(config: Config) -> list[Pose]:
    """2 x POSES held-out poses of different kinds: people go from each even one to the odd one after it."""
    return [framed_pose(FIRST_POSE + POSE_STRIDE * i, config.data.synthetic.framing) for i in range(2 * POSES)]


def shared_pose_people(config: Config, encoder: RegionEncoder) -> Dataset:
    """PEOPLE held-out people in POSES target poses; pairs ordered by target pose, then person."""
    poses = demo_poses(config)
    people = SyntheticPeople(
        seed=config.seed + EVAL_SEED,
        split="heldout",
        identities=PEOPLE,
        poses_per_identity=len(poses),
        size=config.model.size,
        pose_list=poses,
        patterns=config.data.synthetic.patterns,
        background=config.data.synthetic.background,
        preload=True,
    )
    index = {(i // len(poses), poses.index(people.pose(i))): i for i in range(len(people))}
    pairs = [(index[person, 2 * k], index[person, 2 * k + 1]) for k in range(POSES) for person in range(PEOPLE)]
    tokens = token_table(people, encoder, flip=False, cache=None, fingerprint="demo")
    return Dataset(people, tokens, np.array(pairs, np.int32), heldout=True)


def mean_training_people(config: Config) -> np.ndarray:
    """The mean picture of MEAN_OF training identities in each target pose, repeated per person: [n h w 3]."""
    means = []
    for pose in demo_poses(config)[1::2]:
        pictures = [
            render(
                seed=config.seed,
                identity=identity,
                pose=pose,
                size=config.model.size,
                patterns=config.data.synthetic.patterns,
                background=config.data.synthetic.background,
            ).image
            for identity in range(MEAN_OF)
        ]
        means.append(np.mean(pictures, axis=0) / 127.5 - 1.0)
    return np.repeat(np.stack(means), PEOPLE, axis=0).astype(np.float32)


def garment_retrieval(images: np.ndarray, pairs: Pairs) -> float:
    """Share of pictures whose clothes lie nearest to their own truth among the PEOPLE in the same pose."""
    truth, clothes = pairs.batch["target"], pairs.mask("clothes")
    groups = [slice(k * PEOPLE, (k + 1) * PEOPLE) for k in range(POSES)]
    return float(np.mean([retrieval(images[g], truth[g], clothes[g]) for g in groups]))


def judge(config: Config, workdir: str) -> tuple[Verdict, np.ndarray]:
    """Restores the run's last checkpoint and measures it; the verdict and a sheet uint8 of half of the pairs."""
    encoder = make_encoder(config.model.clip, config.token_width)
    method, frozen, _, _ = assemble(config, encoder)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, every=config.checkpoint.every, read_only=True)
    params = checkpoints.restore_part("ema" if config.optim.ema_decay else "params")
    sampler = make_sampler(config, method, steps=config.diffusion.steps, guidance=config.diffusion.guidance)

    def sample(batch, keys):
        return np.asarray(sampler(params, frozen, batch, keys))

    pairs = Pairs.read(shared_pose_people(config, encoder))
    scores, images = swap_scores(pairs, sample, config.seed, config.eval.batch_size)
    # The control: everything of the source from a random person in the same pose, itself with chance 1 / PEOPLE.
    random = np.random.default_rng(config.seed)
    order = np.concatenate([k * PEOPLE + random.permutation(PEOPLE) for k in range(POSES)])
    shuffled = pairs.with_sources(order).sample(sample, config.seed, config.eval.batch_size)
    verdict = Verdict(
        psnr={
            "TruePose": scores["intact"],
            "copied source": region_scores(pairs.batch["source"], pairs),
            f"mean of {MEAN_OF} people": region_scores(mean_training_people(config), pairs),
        },
        retrieval=garment_retrieval(images, pairs),
        shuffled_retrieval=garment_retrieval(shuffled, pairs),
        swap_costs=swap_costs(scores),
    )
    shown = [k * PEOPLE + person for k in range(POSES) for person in range(PEOPLE // 2)]
    batch = pairs.batch
    picture = sheet(
        {
            "source": to_uint8(batch["source"][shown]),
            "pose": to_uint8(batch["target_pose"][shown] * 2 - 1),
            "generated": to_uint8(images[shown]),
            "truth": to_uint8(batch["target"][shown]),
        },
        blocks=POSES,
    )
    return verdict, picture


def report(verdict: Verdict, config: Config) -> str:
    """The verdict as a table and plain sentences."""
    regions = [r for r in ("face", "clothes", "person", "whole") if r in verdict.psnr["TruePose"]]
    lines = [
        f"{PEOPLE * POSES} pairs: {PEOPLE} held-out people, from {POSES} held-out poses into {POSES} others; "
        f"{config.diffusion.steps} DDIM steps, guidance {config.diffusion.guidance:g}",
        "",
        "PSNR (dB)".ljust(22) + "".join(r.rjust(10) for r in regions),
    ]
    for name, scores in verdict.psnr.items():
        lines.append(name.ljust(22) + "".join(f"{scores[r]:10.2f}" for r in regions))
    costs = verdict.swap_costs
    image, tokens = costs["image_swapped"], costs["tokens_swapped"]
    lines += [
        "",
        f"garment retrieval among {PEOPLE}: {verdict.retrieval:.0%} (chance {1 / PEOPLE:.0%}); "
        f"with shuffled sources: {verdict.shuffled_retrieval:.0%}",
        "swap test, dB lost inside the person: "
        f"another source image {image:.2f}, other tokens {tokens:.2f}, both {costs['both_swapped']:.2f}",
    ]
    if image >= HPFA_COST and image > tokens:
        lines.append("Appearance flows through SourceNet and HPFA: swapping the source image costs the most.")
    elif image >= HPFA_COST:
        lines.append("Appearance flows through both paths, more of it through the region tokens (CAA).")
    else:
        lines.append(f"HPFA is NOT shown to work here: another source image costs under {HPFA_COST:g} dB.")
    spread = 2 * math.sqrt((1 / PEOPLE) * (1 - 1 / PEOPLE) / (PEOPLE * POSES))
    if verdict.shuffled_retrieval > 1 / PEOPLE + spread:
        lines.append("WARNING: the shuffled control is above chance; the retrieval figure is not to be trusted.")
    if not verdict.beats_copy:
        lines.append("FAILED: inside the person the model does not beat the copied source.")
    if verdict.retrieval < LEAST_RETRIEVAL:
        lines.append(f"FAILED: garment retrieval is under {LEAST_RETRIEVAL:.0%}.")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    if given := [flag.name for flag in ONLY_OF_TRAIN if flag.present]:
        raise ConfigError(f"--{given[0]} is of `python -m truepose_jax.train`; the demo runs as one process")
    keep_programs()
    workdir = train.WORKDIR.value or "runs/demo"
    config = from_config_dict(Config, train.CONFIG.value or get_config())
    if config.data.dataset != "synthetic":
        raise ConfigError("the demo judges synthetic people: config.data.dataset must be 'synthetic'")
    code = train.main_of(config, workdir, profile=train.PROFILE.value)
    if code:
        return code
    print("judging the result on held-out people ...", flush=True)
    jax.clear_caches()
    verdict, picture = judge(config, workdir)
    folder = pathlib.Path(workdir)
    Image.fromarray(picture).save(folder / "demo.png")
    (folder / "demo.json").write_text(json.dumps(dataclasses.asdict(verdict), indent=2) + "\n")
    print(f"\n{report(verdict, config)}\n\nsheet: {folder / 'demo.png'}; numbers: {folder / 'demo.json'}", flush=True)
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    run_with_config(main)
