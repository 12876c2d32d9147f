"""What experiments/methods.py measures: the first stage's galleries, the demo's judge, IMAGPose's canvases; and thresholds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.skeleton import draw_skeleton_uint8
from input_pipeline.schema import ImageRecord
from input_pipeline.synthetic.clothes import DRESS, UPPER
from input_pipeline.synthetic.people import SyntheticPeople, render
from input_pipeline.synthetic.poses import BASES, Pose, framed_pose
from truepose_jax.data.datasets import EVAL_SEED
from truepose_jax.evaluate import judge
from truepose_jax.evaluate.judge import COPIED, OURS, PEOPLE, POSES
from truepose_jax.inference import canvas
from truepose_jax.inference.pipeline import Pipeline, Run
from truepose_jax.metrics.regions import group_mask, mean_psnr
from truepose_jax.models.fpdm import ImagePoseFusion
from truepose_jax.sampling.image_grid import sheet, to_uint8

Found = dict[str, Any]
"""Numbers by name, as JSON has them."""
SHOWN = 6
"""People of a sheet."""


def first_stage(run: Run) -> Found:
    """Shares of fused embeddings that lie nearest to their own target: among PEOPLE in its pose; among the person's own POSES
    targets; there again with the poses permuted within each person."""
    config = run.config
    pairs = [judge.people(config, None, patterns) for patterns in judge.KINDS.values()]
    network = ImagePoseFusion(config.model.clip)
    params = run.checkpoints.restore_part("params", run.step)
    random, found = np.random.default_rng(config.seed), []
    for batch in (each.batch for each in pairs):
        photos = {name: (batch[name] + 1) / 2 for name in ("source_small", "target_small")}
        embed = functools.partial(network.apply, {"params": params}, method="embed")
        source, target, pose = (np.asarray(embed(x)) for x in (*photos.values(), batch["pose_small"]))
        places = np.stack([k * PEOPLE + np.arange(PEOPLE) for k in range(POSES)])  # [poses people]
        mixed = random.permuted(places, axis=0).reshape(-1)
        fused, other = (
            np.asarray(network.apply({"params": params}, p, source, method="combine")) for p in (pose, pose[mixed])
        )
        target = target / np.linalg.norm(target, axis=1, keepdims=True)
        found.append([nearest(fused, target, places), *(nearest(f, target, places.T) for f in (fused, other))])
    same_pose, same_person, shuffled = np.mean(found, axis=0).tolist()
    return {"same_pose_gallery": same_pose, "same_person_gallery": same_person, "shuffled_poses": shuffled}


def nearest(fused: np.ndarray, target: np.ndarray, galleries: np.ndarray) -> float:
    """Share of rows [n e] that lie nearest, among the targets of their gallery [g k] of row numbers, to their own."""
    hits = [np.argmax(fused[rows] @ target[rows].T, axis=1) == np.arange(len(rows)) for rows in galleries]
    return float(np.mean(hits))


def pictures(pipe: Pipeline) -> tuple[Found, np.ndarray]:
    """(the demo's verdict by kind of clothes, a sheet) of a method of one source."""
    judged = judge.judge(pipe)
    found = {}
    for kind, each in judged.items():
        found[kind] = dataclasses.asdict(each.verdict)
        psnr = found[kind]["psnr"]
        found[kind]["psnr"] = {"generated": psnr.pop(OURS), **psnr}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("source", "pose", "generated", "truth")}
    for each in judged.values():
        rows = np.arange(SHOWN) * (PEOPLE + 1)  # another person and, where there is one, another pose in each
        rows = rows[rows < len(each.pairs)]
        batch = each.pairs.batch
        shown = batch["source"], batch["target_pose"] * 2 - 1, each.images, batch["target"]
        for column, images in zip(columns.values(), shown, strict=True):
            column += list(to_uint8(images[rows]))
    return found, sheet(columns, blocks=2)


def views(turn: float, count: int, framing: str) -> list[Pose]:
    """The first held-out poses of bodies turned by `turn` degrees, give or take 25."""
    odd = itertools.count(judge.FIRST_POSE, 2)
    near = (number for number in odd if abs(BASES[number // 2 % len(BASES)].turn - turn) < 25)
    return [framed_pose(number, framing) for number in itertools.islice(near, count)]


@dataclasses.dataclass(frozen=True)
class Crowd:
    """PEOPLE held-out people in two-sided clothes: records [person][view], four fronts f0 to f3 and four backs b0 to b3."""

    pipe: Pipeline
    records: Sequence[Mapping[str, ImageRecord]]

    @classmethod
    def drawn(cls, pipe: Pipeline) -> Crowd:
        config = pipe.run.config
        poses = {f"f{i}": pose for i, pose in enumerate(views(0, 4, config.data.synthetic.framing))}
        poses |= {f"b{i}": pose for i, pose in enumerate(views(180, 4, config.data.synthetic.framing))}
        look = functools.partial(
            render, seed=config.seed + EVAL_SEED, size=config.model.size, split="heldout", patterns="two_sided",
            background=config.data.synthetic.background,
        )  # fmt: skip
        people = range(PEOPLE)
        return cls(pipe, [{name: look(identity=i, pose=pose) for name, pose in poses.items()} for i in people])

    def truth(self, view: str) -> np.ndarray:
        return np.stack([person[view].image for person in self.records])

    def made(self, sources: str, poses: str, *, fill: str = "pose", seed: int = 0) -> np.ndarray:
        """uint8 [people poses h w 3] from the views "f0 b1" in those of "b0"."""
        found = []
        for number, person in enumerate(self.records):
            shown = [canvas.Source(person[view].image, person[view].joints) for view in sources.split()]
            wanted = [canvas.Pose(person[view].joints) for view in poses.split()]
            found.append(self.pipe.canvas(shown, wanted, fill=fill, seed=seed, name=str(number)))
        return np.array(found)

    def psnr(self, images: np.ndarray, view: str) -> dict[str, float]:
        """dB of [people h w 3] against the truth in that view, inside clothes and person."""
        groups = label_set(SyntheticPeople.labels).groups
        parsing = np.stack([person[view].parsing for person in self.records])
        scaled = [x / 127.5 - 1 for x in (images, self.truth(view))]
        return {name: mean_psnr(*scaled, group_mask(parsing, groups[name])) for name in ("clothes", "person")}

    def colours(self, images: np.ndarray, views: str) -> np.ndarray:
        """The mean colour [people views 3] of the trunk's cloth, 0 to 255, where the truth has it, of [people views h w 3]."""
        names = views.split()
        masks = np.array([[np.isin(p[v].parsing, (UPPER, DRESS)) for v in names] for p in self.records], float)
        return np.einsum("pvhw,pvhwc->pvc", masks, images) / np.maximum(masks.sum((2, 3)), 1)[..., None]


def canvases(pipe: Pipeline) -> tuple[Found, np.ndarray]:
    """(scenarios T1, T2, T3 and star from a front photo into a back and a front; what a second source gains; how the tiles of a
    canvas agree on clothes that no source shows; a sheet)."""
    crowd = Crowd.drawn(pipe)
    copied = crowd.truth("f0")
    table: Found = {COPIED: {side: crowd.psnr(copied, view) for side, view in (("back", "b0"), ("front", "f2"))}}
    shown = {}
    for side, view in (("back", "b0"), ("front", "f2")):
        calls = {
            "T1": ("f0", view, "pose"), "T2": ("f0", view, "source"), "T3": ("f0 b1 f1", view, "pose"),
            "star": ("f0", f"{view} b2 f3", "pose"),
        }  # fmt: skip
        for name, (sources, poses, fill) in calls.items():
            images = crowd.made(sources, poses, fill=fill)[:, 0]
            table.setdefault(name, {})[side] = crowd.psnr(images, view)
            shown[name, side] = images
    second = {"other side": crowd.made("f0 b1", "b0")[:, 0], "same side": crowd.made("f0 f1", "b0")[:, 0]}
    one = table["T1"]["back"]["clothes"]
    gains = {name: crowd.psnr(images, "b0")["clothes"] - one for name, images in second.items()}
    skeleton = [
        draw_skeleton_uint8(p["b0"].joints, joints_hw=p["b0"].image.shape[:2], out_hw=p["b0"].image.shape[:2])
        for p in crowd.records
    ]
    columns = {
        "front": copied, "back": crowd.truth("b1"), "pose": skeleton, "of front": shown["T1", "back"],
        "front+front": second["same side"], "front+back": second["other side"], "truth": crowd.truth("b0"),
    }  # fmt: skip
    found = {"scenarios": table, "second_source_gain": gains, "agreement": agreement(crowd)}
    return found, sheet({name: list(cells[:SHOWN]) for name, cells in columns.items()})


def agreement(crowd: Crowd, seeds: int = 3) -> dict[str, float]:
    """Grey levels, mean over the channels, between the trunk colours of two tiles of unseen sides, both of a person, made of one
    front: within a canvas, and of canvases of other keys."""
    poses = "b0 b2 b3"
    colours = np.stack([crowd.colours(crowd.made("f0", poses, seed=s), poses) for s in range(seeds)])  # [s p v 3]
    apart = np.abs(colours[:, None, :, :, None] - colours[None, :, :, None]).mean(-1)  # [s s p v v]
    tiles, same = ~np.eye(3, dtype=bool), np.eye(seeds, dtype=bool)
    return {"within": float(apart[same][..., tiles].mean()), "across": float(apart[~same][..., tiles].mean())}


def thresholds(name: str, row: Mapping[str, Any]) -> dict[str, bool]:
    """{what was wanted, with what was found: whether it is}."""
    if name == "ipf":
        first, (pose, person, mixed) = row["eval"]["heldout_top1"], row["galleries"].values()
        return {
            f"finds its target among 64 held-out people's and their sources: {first:.0%}, at least 60%": first >= 0.6,
            f"among {PEOPLE} in one pose: {pose:.0%}, above {2 / PEOPLE:.0%}": pose > 2 / PEOPLE,
            f"among a person's {POSES} poses: {person:.0%}, above {2 / POSES:.0%}": person > 2 / POSES,
            f"there with permuted poses: {mixed:.0%}, near {1 / POSES:.0%}": abs(mixed - 1 / POSES) < 0.1,
        }
    if "judged" in row:
        reached = {}
        for kind, each in row["judged"].items():
            margin = each["psnr"]["generated"]["person"] - each["psnr"][COPIED]["person"]
            costs, kept = each["swap_costs"], each["retrieval"]
            cost = costs.get("both_swapped", costs["tokens_swapped"])
            reached |= {
                f"{kind}: {margin:+.2f} dB over the copied source inside the person, above 0": margin > 0,
                f"{kind}: clothes found among {PEOPLE}: {kept:.0%}, at least 50%": kept >= 0.5,
                f"{kind}: another person's source costs {cost:.2f} dB, at least 3": cost >= 3,
            }
        return reached
    gains, agreed = row["canvases"]["second_source_gain"], row["canvases"]["agreement"]
    other, same = gains["other side"], gains["same side"]
    reached = {
        f"a second source, of the unseen side: {other:+.2f} dB in the clothes, at least 3": other >= 3,
        f"of the same side: {same:+.2f} dB, under 0.5": same < 0.5,
        f"unseen clothes differ by {agreed['across']:.1f} grey levels between keys, above 10": agreed["across"] > 10,
    }
    if name == "imagpose":
        ratio = agreed["within"] / agreed["across"]
        reached[f"within a canvas by {agreed['within']:.1f}, {ratio:.2f} of that, at most 0.5"] = ratio <= 0.5
    return reached
