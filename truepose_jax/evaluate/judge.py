"""Judges a model on synthetic people whom it has never seen, in plain and in patterned clothes.

Sixteen held-out people, each from four held-out poses into four others. What is found is compared with three ways that need
no network: the copied source, the source warped limb by limb, and the mean of training people in the target pose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from input_pipeline.annotations.parsing import label_set
from input_pipeline.batches.loader import RecordCache
from input_pipeline.schema import ImageRecord, ImageSet
from input_pipeline.synthetic.people import SyntheticPeople, render
from input_pipeline.synthetic.poses import Pose, framed_pose
from truepose_jax.config import Config
from truepose_jax.data.datasets import CACHE_BYTES, EVAL_SEED, Dataset
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.methods import needs
from truepose_jax.methods.base import Swap
from truepose_jax.metrics.limb_warp import limb_warp
from truepose_jax.metrics.outlines import outline_error, sharpness
from truepose_jax.metrics.psnr import LEAST_PIXELS
from truepose_jax.metrics.regions import retrieval
from truepose_jax.pretrained.region_tokens import RegionEncoder, token_table
from truepose_jax.runtime.sharding import batch_parts, put_whole_batch
from truepose_jax.training.validation import (
    Pairs,
    Sample,
    make_sampler,
    of_pairs,
    region_scores,
    swap_costs,
    swap_scores,
)

KINDS: Mapping[str, str] = {"plain": "solid", "patterned": "all"}
"""Kind of clothes -> `patterns` of the synthetic people who wear them."""

PEOPLE, POSES = 16, 4
FIRST_POSE, POSE_STRIDE = 101, 10
"""Numbers of the poses: odd ones are never trained on; the stride walks through the table of base poses."""

MEAN_OF = 64
"""Training identities whose mean, in the target pose, is a baseline."""

OURS, COPIED, WARPED, MEAN = "TruePose", "copied source", "limb-wise warped source", f"mean of {MEAN_OF} people"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one kind of clothes.

    psnr: dB, {row: {region: mean over the pairs}}. retrieval: share of the pictures whose clothes lie nearest to their own
    truth among the PEOPLE in the same pose; shuffled_retrieval: the same where everything of the source is another person's,
    which must be chance. face_retrieval: of the faces that the truth shows, and copied_face_retrieval, of the copied
    sources'. sharpness: mean gradient inside the person, generated / truth. outline_error: grey levels (0 to 255) in the band
    about the true outline. swap_costs: dB lost inside the person. pattern_retrieval: among PEOPLE in the same cut and colours;
    None of plain clothes.
    """

    psnr: Mapping[str, Mapping[str, float]]
    retrieval: float
    shuffled_retrieval: float
    face_retrieval: float | None
    copied_face_retrieval: float | None
    sharpness: float
    outline_error: float
    swap_costs: Mapping[str, float]
    pattern_retrieval: float | None = None

    def margin(self, over: str) -> float:
        """dB inside the person over another row."""
        return self.psnr[OURS]["person"] - self.psnr[over]["person"]


@dataclasses.dataclass(frozen=True)
class Judged:
    """A verdict with the pairs and the pictures [n h w 3] that it is about, ordered by target pose, then person."""

    verdict: Verdict
    pairs: Pairs
    images: np.ndarray


def judge(pipe: Pipeline, *, eval_seed: int | None = None) -> dict[str, Judged]:
    """{kind of clothes: what was found}, with the model's own size, background, framing, steps and guidance. eval_seed: of
    the people; None: that of the run's own evaluation."""
    config, sample = pipe.run.config, sampling(pipe)
    rows = batch_size(pipe, PEOPLE * POSES)
    found = {}
    for kind, patterns in KINDS.items():
        pairs = people(config, pipe.encoder, patterns, eval_seed)
        scores, images = swap_scores(pairs, pipe.method.swaps, sample, config.seed, rows)
        shuffled = shuffled_sources(pairs, pipe.method.swaps, config.seed).sample(sample, config.seed, rows)
        verdict = Verdict(
            psnr={
                OURS: scores["intact"],
                COPIED: region_scores(pairs.batch["source"], pairs),
                WARPED: region_scores(warped_sources(pairs), pairs),
                MEAN: region_scores(mean_training_people(config, patterns), pairs),
            },
            retrieval=retrieval_of("clothes", images, pairs),
            shuffled_retrieval=retrieval_of("clothes", shuffled, pairs),
            face_retrieval=retrieval_of("face", images, pairs),
            copied_face_retrieval=retrieval_of("face", pairs.batch["source"], pairs),
            sharpness=sharpness(images, pairs.batch["target"], pairs.mask("person")),
            outline_error=outline_error(images, pairs.batch["target"], pairs.mask("person")),
            swap_costs=swap_costs(scores),
        )
        if patterns == "all":
            alike = people(config, pipe.encoder, patterns, eval_seed, same_colours=True)
            drawn = alike.sample(sample, config.seed, rows)
            verdict = dataclasses.replace(verdict, pattern_retrieval=retrieval_of("clothes", drawn, alike))
        found[kind] = Judged(verdict, pairs, images)
    return found


def sampling(pipe: Pipeline) -> Sample:
    """The model's own sampling on host batches; values as pictures have them, in [-1, 1]."""
    sampler = make_sampler(pipe.run.config, pipe.method, pipe.run.sampling())

    def sample(batch: Mapping[str, np.ndarray], keys: jax.Array) -> np.ndarray:
        with jax.set_mesh(pipe.mesh):
            images = sampler(pipe.params, pipe.frozen, put_whole_batch(pipe.mesh, batch), keys)
        return np.clip(of_pairs(np.asarray(images), pipe.method.needs), -1, 1)

    return sample


def carrying(pipe: Pipeline) -> Sample | None:
    """For evaluation.carried_sources; None of a method whose attention carries nothing that could be shown."""
    return (lambda batch, keys: pipe.carried_of(batch)) if pipe.method.carries else None


def batch_size(pipe: Pipeline, count: int) -> int:
    """config.eval.batch_size, at most `count`, up to a multiple of the devices."""
    parts = batch_parts(pipe.mesh)
    return -(-min(pipe.run.config.eval.batch_size, count) // parts) * parts


def judged_poses(config: Config) -> list[Pose]:
    """2 x POSES held-out poses of different kinds: people go from each even one to the odd one after it."""
    return [framed_pose(FIRST_POSE + POSE_STRIDE * i, config.data.synthetic.framing) for i in range(2 * POSES)]


def people(
    config: Config,
    encoder: RegionEncoder | None,
    patterns: str,
    eval_seed: int | None = None,
    *,
    same_colours: bool = False,
    reader: Config | None = None,
) -> Pairs:
    """PEOPLE held-out people into POSES target poses; pairs ordered by target pose, then person. same_colours: for each pose
    one person in PEOPLE patterns of one cut and two colours, and another person for the next pose. reader: whose model
    reads them, at its size; None: config."""
    reader, poses = reader or config, judged_poses(config)
    crowd = SyntheticPeople(
        seed=config.seed + EVAL_SEED if eval_seed is None else eval_seed,
        split="heldout",
        identities=PEOPLE * (POSES if same_colours else 1),
        poses_per_identity=len(poses),
        size=reader.model.size,
        pose_list=poses,
        patterns=patterns,
        background=config.data.synthetic.background,
        same_colours=PEOPLE if same_colours else 0,
    )
    wanted = []
    for k in range(POSES):
        for person in range(PEOPLE):
            first = (person + PEOPLE * k * same_colours) * len(poses)
            order = [poses.index(crowd.pose(first + i)) for i in range(len(poses))]
            wanted.append([first + order.index(2 * k), first + order.index(2 * k + 1)])
    indices, pairs = np.unique(wanted, return_inverse=True)
    pairs = pairs.reshape(-1, 2).astype(np.int32)
    images = RecordCache(_Chosen(crowd, indices, pairs), max_bytes=CACHE_BYTES)
    tokens = None if encoder is None else token_table(images, encoder, flip=False, cache=None, fingerprint="judge")
    return Pairs.read(Dataset(images, tokens, pairs, heldout=True), needs(reader))


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some images of a set as a set: what is not wanted is not rendered. pairs: among these."""

    images: ImageSet
    indices: Sequence[int]
    pairs: np.ndarray

    @property
    def labels(self) -> str:
        return self.images.labels

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> ImageRecord:
        return self.images.image(int(self.indices[index]))


def shuffled_sources(pairs: Pairs, swaps: Mapping[str, Swap], seed: int) -> Pairs:
    """Everything of the source from a random person in the same pose, itself with chance 1 / PEOPLE."""
    random = np.random.default_rng(seed)
    order = np.concatenate([k * PEOPLE + random.permutation(PEOPLE) for k in range(POSES)])
    return pairs.with_sources(order, Swap(tuple({name for swap in swaps.values() for name in swap.fields})))


def warped_sources(pairs: Pairs) -> np.ndarray:
    """Each source warped limb by limb into its target's pose, [n h w 3]."""
    batch, joints = pairs.batch, label_set(SyntheticPeople.labels).joints
    fields = ("source", "source_parsing", "source_joints", "target_joints")
    return np.stack([limb_warp(*each, joints) for each in zip(*(batch[name] for name in fields), strict=True)])


def mean_training_people(config: Config, patterns: str) -> np.ndarray:
    """The mean picture of MEAN_OF training identities in each target pose, repeated per person: [n h w 3]."""
    looks = {"patterns": patterns, "background": config.data.synthetic.background}
    means = []
    for pose in judged_poses(config)[1::2]:
        pictures = [
            render(seed=config.seed, identity=identity, pose=pose, size=config.model.size, **looks).image
            for identity in range(MEAN_OF)
        ]
        means.append(np.mean(pictures, axis=0) / 127.5 - 1.0)
    return np.repeat(np.stack(means), PEOPLE, axis=0).astype(np.float32)


def retrieval_of(region: str, images: np.ndarray, pairs: Pairs) -> float | None:
    """Share of the pictures whose truth shows the region in LEAST_PIXELS or more that lie nearest there to that truth, among
    the PEOPLE in its pose; None where none does."""
    truth, mask = pairs.batch["target"], pairs.mask(region)
    groups = [slice(k * PEOPLE, (k + 1) * PEOPLE) for k in range(POSES)]
    found = np.concatenate([retrieval(images[g], truth[g], mask[g]) for g in groups])
    shown = mask.sum(axis=(1, 2)) >= LEAST_PIXELS
    return float(found[shown].mean()) if shown.any() else None


@dataclasses.dataclass(frozen=True)
class Gates:
    """The least (and most) that a verdict must reach. margin: dB inside the person over the copied source; outline_error in
    grey levels; swap_cost: dB that another person's source image must cost."""

    margin: float
    retrieval: float
    outline_error: float
    sharpness: tuple[float, float] = (0.75, 1.05)
    swap_cost: float = 5.0

    def missed(self, kind: str, verdict: Verdict) -> list[str]:
        """One line for each gate that is missed."""
        least, most = self.sharpness
        margin, warp, cost = verdict.margin(COPIED), verdict.margin(WARPED), verdict.swap_costs["image_swapped"]
        reached = {
            f"person {margin:+.2f} dB over the copied source; at least {self.margin:+g}": margin >= self.margin,
            f"person {warp:+.2f} dB over the limb-wise warped source; more than 0": warp > 0,
            f"retrieval {verdict.retrieval:.0%}; at least {self.retrieval:.0%}": verdict.retrieval >= self.retrieval,
            f"sharpness {verdict.sharpness:.2f}; {least} to {most}": least <= verdict.sharpness <= most,
            f"outline error {verdict.outline_error:.1f}; at most {self.outline_error:g}": verdict.outline_error
            <= self.outline_error,
            f"another source image costs {cost:.2f} dB; at least {self.swap_cost:g}": cost >= self.swap_cost,
        }
        return [f"MISSED in {kind} clothes: {text}" for text, passed in reached.items() if not passed]


def to_json(verdicts: Mapping[str, Verdict]) -> dict[str, dict]:
    """{kind: the verdict's fields}; what a kind has not is left out."""
    return {
        kind: {name: value for name, value in dataclasses.asdict(verdict).items() if value is not None}
        for kind, verdict in verdicts.items()
    }


def report(verdicts: Mapping[str, Verdict], config: Config) -> str:
    """The verdicts as tables and plain sentences."""
    lines = [
        f"{PEOPLE * POSES} pairs of each kind of clothes: {PEOPLE} held-out people, from {POSES} held-out poses into "
        f"{POSES} others; {config.diffusion.steps} DDIM steps, guidance {config.diffusion.guidance:g}"
    ]
    for kind, verdict in verdicts.items():
        regions = [r for r in ("face", "clothes", "person", "whole") if r in verdict.psnr[OURS]]
        lines += ["", f"{kind} clothes, PSNR (dB)".ljust(30) + "".join(r.rjust(9) for r in regions)]
        lines += [row.ljust(30) + "".join(f"{scores[r]:9.2f}" for r in regions) for row, scores in verdict.psnr.items()]
        alike = "" if verdict.pattern_retrieval is None else f"; in the same colours {verdict.pattern_retrieval:.0%}"
        faces = []
        if verdict.face_retrieval is not None:
            copied = f"of the copied sources {verdict.copied_face_retrieval:.0%}"
            faces = [f"face retrieval among {PEOPLE}: {verdict.face_retrieval:.0%}; {copied}"]
        image, tokens = (verdict.swap_costs[f"{what}_swapped"] for what in ("image", "tokens"))
        lines += [
            f"garment pixel retrieval among {PEOPLE}: {verdict.retrieval:.0%}{alike} (chance {1 / PEOPLE:.0%}; with shuffled "
            f"sources {verdict.shuffled_retrieval:.0%})",
            *faces,
            f"sharpness inside the person {verdict.sharpness:.2f} of the truth's; error about the outline "
            f"{verdict.outline_error:.1f} grey levels",
            f"swap test, dB lost inside the person: another source image {image:.2f}, other tokens {tokens:.2f}, both "
            f"{verdict.swap_costs['both_swapped']:.2f}",
        ]
        spread = 2 * np.sqrt((1 / PEOPLE) * (1 - 1 / PEOPLE) / (PEOPLE * POSES))
        if verdict.shuffled_retrieval > 1 / PEOPLE + spread:
            lines.append("WARNING: the shuffled control is above chance; the retrieval figure is not to be trusted.")
    return "\n".join(lines)
