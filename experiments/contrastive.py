"""Training of a small CLIP vision tower on synthetic people.

Contrastive (InfoNCE, van den Oord et al. 2018; CLIP's symmetric form, Radford et al. 2021): two crops of one garment of one
person in two poses belong together, all other crops of the step do not. The folder it writes is transformers' format
(config.json, model.safetensors), so runs load it as they load OpenAI's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jaxtyping import Array, Float

from input_pipeline.annotations.parsing import label_set
from input_pipeline.annotations.regions import clip_normalise, region_crops
from input_pipeline.atomic import replacing
from input_pipeline.schema import MAX_CLASSES
from input_pipeline.synthetic.people import SyntheticPeople
from truepose_jax.config import ClipConfig, ConfigError, Count, Positive, PositiveFloat, SyntheticConfig
from truepose_jax.data.datasets import people_settings
from truepose_jax.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection
from truepose_jax.pretrained.conversion import to_torch
from truepose_jax.pretrained.region_tokens import RegionEncoder, untrained_config
from truepose_jax.runtime.files import writing
from truepose_jax.training.checkpoint import CheckpointError, Checkpoints, Preemption

REGIONS_PER_PERSON = 8
"""Crops of a person that enter a step; people have 6 to 12 regions, and a step has one shape."""

WARMUP = 0.1


@dataclasses.dataclass(frozen=True)
class ClipTraining:
    """The settings of configs/synthetic_clip.py. size: (height, width) of the pictures. width: of the tokens.
    checkpoint_every: steps."""

    seed: Count
    total_steps: Positive
    identities_per_step: int
    learning_rate: PositiveFloat
    temperature: PositiveFloat
    size: tuple[int, int]
    width: Positive
    clip: ClipConfig
    synthetic: SyntheticConfig
    checkpoint_every: Positive

    def __post_init__(self):
        if not 2 <= self.identities_per_step <= self.synthetic.identities:
            raise ConfigError(
                f"config.identities_per_step is {self.identities_per_step}; it must be from 2 to synthetic.identities "
                f"({self.synthetic.identities})"
            )


@dataclasses.dataclass(frozen=True)
class Crops:
    """uint8 crops [identities poses 21 s s 3] and which are there [identities poses 21]; the last row: the whole picture."""

    pixels: np.ndarray
    valid: np.ndarray


def read_crops(config: ClipTraining, *, split: str) -> Crops:
    """Renders the people of a split and cuts their regions out."""
    people = SyntheticPeople(**people_settings(config.synthetic, split, seed=config.seed, size=config.size))
    identities, poses = people.identities, people.poses_per_identity
    side, names = config.clip.image_size, label_set(people.labels)
    pixels = np.zeros((len(people), MAX_CLASSES + 1, side, side, 3), np.uint8)
    valid = np.zeros(pixels.shape[:2], bool)
    for i in tqdm.tqdm(range(len(people)), desc=f"{split} people", unit="image", mininterval=1):
        record = people.image(i)
        pixels[i], valid[i], _ = region_crops(record.image, record.parsing, names, out=side)
    return Crops(pixels.reshape(identities, poses, *pixels.shape[1:]), valid.reshape(identities, poses, -1))


def draw_pairs(crops: Crops, random: np.random.Generator, people: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, weight): crops [n s s 3] of the same region of the same person in two poses, and 0 where a person
    has fewer than REGIONS_PER_PERSON regions in both."""
    count, poses = crops.valid.shape[:2]
    first, second = [], []
    weight = np.zeros((people, REGIONS_PER_PERSON), np.float32)
    for row, person in enumerate(random.choice(count, people, replace=False)):
        a, b = random.choice(poses, 2, replace=False)
        regions = random.permutation(np.flatnonzero(crops.valid[person, a] & crops.valid[person, b]))
        weight[row, : len(regions)] = 1
        regions = np.resize(regions, REGIONS_PER_PERSON)
        first.append(crops.pixels[person, a, regions])
        second.append(crops.pixels[person, b, regions])
    return np.concatenate(first), np.concatenate(second), weight.reshape(-1)


def info_nce(
    a: Float[Array, "n e"], b: Float[Array, "n e"], weight: Float[Array, " n"], temperature: float
) -> Float[Array, ""]:
    """Mean over rows and both directions of -log softmax of the row's own partner; cosine similarities / temperature.

    Rows of weight 0 neither count nor are offered as partners.
    """
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6) for x in (a, b))
    logits = a @ b.T / temperature
    own = jnp.diagonal(logits)
    missing = jnp.where(weight > 0, 0.0, -jnp.inf)

    def direction(x):
        return jax.nn.logsumexp(jnp.where(jnp.eye(len(x), dtype=bool), x, x + missing[None]), axis=1) - own

    return jnp.sum(weight * (direction(logits) + direction(logits.T))) / (2 * jnp.maximum(jnp.sum(weight), 1.0))


def known_again(
    first: Float[Array, "n p e"], second: Float[Array, "n p e"], there: np.ndarray
) -> tuple[float, float, int]:
    """(share, what chance gives, count) of regions in one pose whose nearest (cosine) among the same region, in the other
    pose, of everybody who has it is their own. NaN where nobody has any."""
    hits: list[np.ndarray] = []
    for region in range(there.shape[1]):
        rows = np.flatnonzero(there[:, region])
        if len(rows) < 2:
            continue
        a, b = (x[rows, region] / np.linalg.norm(x[rows, region], axis=-1, keepdims=True) for x in (first, second))
        hits.append(np.argmax(a @ b.T, axis=1) == np.arange(len(rows)))
    count = sum(map(len, hits))
    return (float(np.concatenate(hits).mean()), len(hits) / count, count) if hits else (math.nan, math.nan, 0)


class Stopped(Exception):
    """The training was asked to end, and has saved the step that this names."""


def train(config: ClipTraining, workdir: pathlib.Path) -> tuple[CLIPVisionConfig, dict, dict]:
    """(network, parameters, results): how often held-out people's regions are known again, before and after. Crops show
    what is behind a region too, and a synthetic person has one background in all poses, so not all of it is the clothes.

    workdir: of its checkpoints, from which the same call goes on. Raises Stopped, and CheckpointError where `workdir` is of
    other settings.
    """
    checkpoints = Checkpoints(workdir, keep=1, every=config.checkpoint_every)
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    vision = untrained_config(config.clip, config.width)
    module = CLIPVisionModelWithProjection(vision)
    params = module.init(jax.random.key(config.seed), jnp.zeros((1, vision.image_size, vision.image_size, 3)))["params"]
    crops, held_out = read_crops(config, split="train"), read_crops(config, split="heldout")
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(int(WARMUP * config.total_steps), 1), config.total_steps
    )
    tx = optax.adamw(rate, weight_decay=1e-2)

    @jax.jit
    def step(params, state, first, second, weight):
        def loss(params):
            pixels = jnp.concatenate([first, second])
            a, b = jnp.split(module.apply({"params": params}, pixels).image_embeds, 2)
            return info_nce(a, b, weight, config.temperature)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    garments = list(label_set(SyntheticPeople.labels).groups["clothes"])

    def score(params) -> dict[str, float]:
        everything = held_out.pixels[:, :2]
        tokens = _encode(vision, params, everything.reshape(-1, *everything.shape[3:]))
        tokens = tokens.reshape(*everything.shape[:3], -1)
        found, there = {}, held_out.valid[:, 0] & held_out.valid[:, 1]
        for name, columns in (("all", slice(None)), ("clothes", garments)):
            rate, chance, count = known_again(tokens[:, 0, columns], tokens[:, 1, columns], there[:, columns])
            found |= {name: rate, f"{name}_chance": chance, f"{name}_count": count}
        return found

    results = {"untrained": score(params)}
    state, losses = tx.init(params), []
    if checkpoints.latest_step() is not None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), _parts(params, state))
        found, extra, begin = checkpoints.restore(like)
        if extra["settings"] != settings:
            raise CheckpointError(f"{workdir} is of other settings; remove it, or name another --out")
        params, state, losses = found["params"], jax.tree.unflatten(jax.tree.structure(state), found["rest"]), extra["losses"]
        print(f"resuming from step {begin}", flush=True)
    bar = tqdm.trange(len(losses), config.total_steps, desc="contrastive", unit="step", mininterval=1)
    with bar, Preemption() as preemption:
        for number in bar:
            random = np.random.default_rng((config.seed, number))
            first, second, weight = draw_pairs(crops, random, config.identities_per_step)
            params, state, value = step(params, state, clip_normalise(first), clip_normalise(second), weight)
            losses.append(float(value))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            done, stop = number + 1, preemption.stop(number)
            if stop or checkpoints.due(done) or done == config.total_steps:
                checkpoints.save(done, _parts(params, state), extra={"settings": settings, "losses": losses})
            if stop:
                checkpoints.close()
                raise Stopped(done)
    checkpoints.close()
    results |= {"trained": score(params), "first_loss": losses[0], "last_loss": float(np.mean(losses[-20:]))}
    return vision, _unit_tokens(vision, params, held_out), results


def _parts(params, state) -> dict:
    """As Checkpoints wants them; the optimizer's state as a list."""
    return {"params": params, "ema": None, "rest": jax.tree.leaves(state)}


def _encode(vision: CLIPVisionConfig, params, crops: np.ndarray) -> np.ndarray:
    return RegionEncoder(vision, params, fingerprint="", trained=True).encode(crops)


def _unit_tokens(vision, params, crops: Crops):
    """The same network with tokens of about unit variance, as linear layers behind it expect: the cosine, which is all
    that was trained, leaves their scale open."""
    valid = crops.pixels[crops.valid]
    spread = float(_encode(vision, params, valid).std(axis=0).mean())
    kernel = params["visual_projection"]["kernel"] / spread
    return {**params, "visual_projection": {"kernel": kernel}}


def write(folder: pathlib.Path, vision: CLIPVisionConfig, params: dict, about: dict) -> None:
    """A transformers CLIPVisionModelWithProjection folder, and training.json in it; it appears when it is whole."""
    with writing(folder), replacing(folder) as partial:
        partial.mkdir()
        _write(partial, vision, params, about)


def _write(folder: pathlib.Path, vision: CLIPVisionConfig, params: dict, about: dict) -> None:
    fields = dataclasses.asdict(vision) | {
        "model_type": "clip_vision_model",
        "architectures": [CLIPVisionModelWithProjection.__name__],
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    to_torch.save(params, folder / "model.safetensors")
