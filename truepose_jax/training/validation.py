"""What is measured while training: held-out loss, PSNR inside regions, and the swap test.

The swap test asks through which path appearance flows: it samples the same pairs with the source image (and its
parsing) of another person, with another person's tokens (of the whole image and of the regions that both have), and
with both, and reports what each costs inside the person. A falling loss hides a dead path; this does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from input_pipeline.annotations.parsing import label_set
from input_pipeline.batches.loader import eval_batches
from input_pipeline.fields import Layout
from input_pipeline.schema import ImageSet, InputError
from truepose_jax.config import Config
from truepose_jax.data.datasets import Dataset
from truepose_jax.methods.base import OF_KEPT, Denoiser, Frozen, Needs, Params, Swap, Trainable
from truepose_jax.metrics.regions import group_mask, mean_psnr
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import batch_parts, put_whole_batch
from truepose_jax.sampling.image_grid import sheet, to_uint8
from truepose_jax.sampling.sampler import Sampler, Sampling, compiler_options

INTACT = "intact"
"""The scores beside the swaps'."""

FOR_METRICS = (
    "source", "target", "source_joints", "target_joints", "target_pose", "source_parsing", "target_parsing",
)  # fmt: skip
"""Fields that evaluation reads, whatever the method does: some of the comparisons need no network but these."""

Sample = Callable[[Mapping[str, np.ndarray], jax.Array], np.ndarray]
"""(host batch, keys [b]) -> images [b h w 3]."""

CheckPreemption = Callable[[], None]
"""Called between batches; raises to stop (preemption)."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pairs of an evaluation as one host batch (one source per target), the label groups of its maps, and who each
    source shows. The batch has what the method reads and, for metrics, the photos, the pose and the target's map."""

    batch: Mapping[str, np.ndarray]
    groups: Mapping[str, Sequence[int]]
    identities: Sequence[str]

    @classmethod
    def read(cls, dataset: Dataset, needs: Needs, pairs: np.ndarray | None = None) -> Pairs:
        pairs = dataset.pairs if pairs is None else pairs
        names = (*needs.train, *needs.sample, *FOR_METRICS)
        layout = Layout(names, letters=needs.letters, drawing=needs.drawing)
        (batch,) = eval_batches(dataset.images, dataset.tokens, layout, pairs, len(pairs))
        identities = [_identity(dataset.images, int(source)) for source in pairs[:, 0]]
        return cls(batch, label_set(dataset.images.labels).groups, identities)

    def __len__(self) -> int:
        return len(self.batch["valid"])

    def mask(self, group: str) -> np.ndarray:
        """bool [n h w]: where the target's map shows the group, in rows that could be read."""
        inside = group_mask(self.batch["target_parsing"], self.groups[group])
        return inside & (self.batch["valid"] > 0)[:, None, None]

    def with_sources(self, order: np.ndarray, swap: Swap) -> Pairs:
        """The same targets with the swap's fields of row order[i] in row i."""
        # Half a swap: a token whose region the map does not show, or the reverse, is nothing that training ever saw.
        swapped = {name: self.batch[name][order] for name in swap.fields}
        swapped |= {name: self.batch[name] & self.batch[name][order] for name in swap.meet}
        return dataclasses.replace(self, batch={**self.batch, **swapped})

    def keys(self, seed: int) -> jax.Array:
        """One key per pair, the same in every evaluation."""
        return jax.random.split(rng.key(jax.random.key(seed), "evaluation"), len(self))

    def first(self, rows: int) -> Pairs:
        """The first rows alone."""
        batch = {name: array[:rows] for name, array in self.batch.items()}
        return dataclasses.replace(self, batch=batch, identities=self.identities[:rows])

    def sample(
        self, sample: Sample, seed: int, batch_size: int, check_preemption: CheckPreemption = lambda: None
    ) -> np.ndarray:
        """Generated images [n h w 3], in batches of one size; `check_preemption` is called between them (preemption)."""
        found = []
        for piece, keys in self.pieces(seed, batch_size):
            found.append(sample(piece, keys))
            check_preemption()
        return np.concatenate(found)[: len(self)]

    def pieces(self, seed: int, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], jax.Array]]:
        """(batch, keys) in batches of one size: the last one repeats the last pair, with valid = 0."""
        keys = self.keys(seed)
        for start in range(0, len(self), batch_size):
            wanted = np.arange(start, start + batch_size)
            rows = np.minimum(wanted, len(self) - 1)
            piece = {name: array[rows] for name, array in self.batch.items()}
            piece["valid"] = piece["valid"] * (wanted < len(self)).astype(np.float32)
            yield piece, keys[rows]


def region_scores(images: np.ndarray, pairs: Pairs) -> dict[str, float]:
    """PSNR in dB inside each label group of the target's map, and over the whole picture."""
    valid = pairs.batch["valid"] > 0
    truth = pairs.batch["target"]
    scores = {"whole": mean_psnr(images[valid], truth[valid], np.ones(images[valid].shape[:3], bool))}
    return scores | {group: mean_psnr(images, truth, pairs.mask(group)) for group in pairs.groups}


def swap_scores(
    pairs: Pairs,
    swaps: Mapping[str, Swap],
    sample: Sample,
    seed: int,
    batch_size: int,
    check_preemption: CheckPreemption = lambda: None,
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Region scores without and with each of a method's swaps, and the intact images."""
    order = other_people(pairs.identities)
    scores, intact = {}, None
    for name, swap in {INTACT: Swap(()), **swaps}.items():
        swapped = pairs.with_sources(order, swap)
        images = swapped.sample(sample, seed, batch_size, check_preemption)
        scores[name] = region_scores(images, pairs)
        intact = images if intact is None else intact
    return scores, intact


def carried_sources(pairs: Pairs, images: np.ndarray, carried: Sample, seed: int, batch_size: int) -> np.ndarray:
    """The sources as the attention carried them [n h w 3], where the samples of the pairs are `images`. carried: Denoiser.carried
    of batches whose targets are those."""
    return dataclasses.replace(pairs, batch={**pairs.batch, "target": images}).sample(carried, seed, batch_size)


def other_people(identities: Sequence[str]) -> np.ndarray:
    """int [n]: for every row the next one, cyclically, that shows somebody else; where nobody else is there, the next. An
    identity "" is nobody."""
    rows = range(len(identities))

    def partner(i: int) -> int:
        following = [*rows[i + 1 :], *rows[: i + 1]]
        return next((j for j in following if identities[j] not in ("", identities[i])), following[0])

    return np.array([partner(i) for i in rows])


def _identity(images: ImageSet, index: int) -> str:
    try:
        return images.image(index).identity
    except InputError:  # a record that cannot be read has no weight
        return ""


def swap_costs(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """dB lost inside the person by each swap."""
    return {name: scores[INTACT]["person"] - scores[name]["person"] for name in scores if name != INTACT}


class EmbeddingEvaluator:
    """The evaluation of a method that makes no pictures: its loss and metrics on the same held-out pairs every time."""

    def __init__(self, config: Config, method: Trainable, dataset: Dataset, mesh: Mesh):
        self.config, self.method, self.dataset, self.mesh = config, method, dataset, mesh
        self.pairs = Pairs.read(dataset, method.needs)
        parts = batch_parts(mesh)
        self.batch_size = -(-min(config.eval.batch_size, len(self.pairs)) // parts) * parts
        self._loss = jax.jit(method.loss, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def run(
        self, params: Params, frozen: Frozen, check_preemption: CheckPreemption = lambda: None
    ) -> tuple[dict[str, float], None]:
        """(every metric of the loss, a mean over the valid pairs of batches of eval.batch_size; no picture)."""
        sums, weight = {}, 0.0
        for piece, keys in self.pairs.pieces(self.config.seed, self.batch_size):
            _, metrics = self._loss(params, frozen, put_whole_batch(self.mesh, piece), keys)
            count = float(piece["valid"].sum())
            weight += count
            sums = {name: sums.get(name, 0.0) + float(value) * count for name, value in metrics.items()}
            check_preemption()
        name = "heldout" if self.dataset.heldout else "train"
        return {f"{name}_{part}": value / max(weight, 1.0) for part, value in sums.items()}, None


class Evaluator(EmbeddingEvaluator):
    """The evaluation of a run, the same pairs and noise every time, so that its curves compare."""

    def __init__(self, config: Config, method: Denoiser, dataset: Dataset, mesh: Mesh):
        super().__init__(config, method, dataset, mesh)
        wanted, interval = config.eval, config.diffusion.guidance_interval
        self.sampler = make_sampler(config, method, Sampling(wanted.steps, wanted.guidance, wanted.sampler, interval))
        whole = NamedSharding(mesh, PartitionSpec())
        self._sample = jax.jit(self.sampler.sample, out_shardings=whole, compiler_options=compiler_options())
        self._carried = jax.jit(method.carried, out_shardings=whole) if method.carries else None

    def run(
        self, params: Params, frozen: Frozen, check_preemption: CheckPreemption = lambda: None
    ) -> tuple[dict[str, float], np.ndarray | None]:
        """(results, sample sheet uint8; None for eval.sheet_rows 0). Results: held-out loss, PSNR per region, what each
        swap costs inside the person, and each block's HPFA and CAA output norms."""
        name = "heldout" if self.dataset.heldout else "train"
        loss, norms = self._losses(params, frozen, check_preemption)
        results = {f"{name}_loss": loss}
        sample = self.sample_with(params, frozen)
        scores, images = swap_scores(
            self.pairs, self.method.swaps, sample, self.config.seed, self.batch_size, check_preemption
        )
        results |= {f"psnr_{region}": value for region, value in scores["intact"].items()}
        results |= {f"swap_cost_{swap}": cost for swap, cost in swap_costs(scores).items()}
        shown = self.sheet(images, self._carried_with(params, frozen)) if self.config.eval.sheet_rows else None
        return results | norms, shown

    def sample_with(self, params: Params, frozen: Frozen) -> Sample:
        def sample(batch, keys):
            images = np.asarray(self._sample(params, frozen, put_whole_batch(self.mesh, batch), keys))
            return of_pairs(images, self.method.needs)

        return sample

    def _carried_with(self, params: Params, frozen: Frozen) -> Sample | None:
        if self._carried is None:
            return None
        return lambda batch, keys: np.asarray(self._carried(params, frozen, put_whole_batch(self.mesh, batch)))

    def _losses(
        self, params: Params, frozen: Frozen, check_preemption: CheckPreemption
    ) -> tuple[float, dict[str, float]]:
        total, weight, norms = 0.0, 0.0, []
        for piece, keys in self.pairs.pieces(self.config.seed, self.batch_size):
            loss, metrics = self._loss(params, frozen, put_whole_batch(self.mesh, piece), keys)
            count = float(piece["valid"].sum())
            total, weight = total + float(loss) * count, weight + count
            norms.append({part: np.asarray(metrics[part]) for part in metrics if part.startswith(OF_KEPT)})
            check_preemption()
        names = [site.name for site in self.config.model.unet.sites]
        means = {part: np.mean([n[part] for n in norms], axis=0) for part in norms[0]}
        found = {}
        for part, mean in means.items():  # one number a site, or one of the half-cell head
            found |= (
                {f"{part}/{site}": float(v) for site, v in zip(names, mean, strict=True)}
                if mean.ndim
                else {part: float(mean)}
            )
        return total / max(weight, 1.0), found

    def sheet(self, images: np.ndarray, carried: Sample | None = None) -> np.ndarray:
        """source | pose | carried | generated | truth of the first `sheet_rows` pairs. carried: makes the third column."""
        rows = self.config.eval.sheet_rows
        shown = self.pairs.first(rows)
        columns = {
            "source": to_uint8(shown.batch["source"]),
            "pose": to_uint8(shown.batch["target_pose"] * 2 - 1),
        }
        if carried is not None:
            seen = carried_sources(shown, images[:rows], carried, self.config.seed, self.batch_size)
            columns["carried"] = to_uint8(seen)
        return sheet(
            columns | {"generated": to_uint8(images[:rows]), "truth": to_uint8(shown.batch["target"])},
        )


def evaluator_of(config: Config, method: Trainable, dataset: Dataset, mesh: Mesh) -> EmbeddingEvaluator:
    """The evaluation that suits the method."""
    kind = Evaluator if hasattr(method, "denoise") else EmbeddingEvaluator
    return kind(config, method, dataset, mesh)


@dataclasses.dataclass(frozen=True)
class Watch:
    """How a run is watched while it trains. make: its evaluation. due: whether there is one after a step; None: as config.eval
    says. enough: whether a run with such results ends there."""

    make: Callable[[Config, Trainable, Dataset, Mesh], EmbeddingEvaluator] = evaluator_of
    due: Callable[[int], bool] | None = None
    enough: Callable[[Mapping[str, float]], bool] = lambda results: False


def of_pairs(images: np.ndarray, needs: Needs) -> np.ndarray:
    """The pictures [n h w 3] of a sample of pairs: of a canvas the first tile that is made."""
    return images[:, 1] if needs.pictures > 1 else images


def make_sampler(config: Config, method: Denoiser, sampling: Sampling) -> Sampler:
    """The run's sampler: its schedule and spacing."""
    return Sampler(method, config.diffusion.schedule, config.diffusion.spacing, sampling)
