"""The swap test takes somebody else's source; the sheet shows what was carried; one number of the head, one a site of HPFA."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from tests.tiny_run import tiny_config
from truepose_jax.data.datasets import evaluation_set
from truepose_jax.methods import make_method, needs
from truepose_jax.methods.truepose import SOURCE, TOKENS, TruePose
from truepose_jax.pretrained.frozen_networks import load_autoencoder
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.runtime.sharding import make_mesh
from truepose_jax.sampling.image_grid import MARGIN, TITLE, to_uint8
from truepose_jax.training.validation import (
    Evaluator,
    Pairs,
    other_people,
    swap_costs,
    swap_scores,
)


def test_the_next_row_of_somebody_else():
    assert other_people(["a", "b", "c"]).tolist() == [1, 2, 0]
    assert other_people(["a", "a", "a", "b", "b", "a"]).tolist() == [3, 3, 3, 5, 5, 3]
    assert other_people(["a", "", "b"]).tolist() == [2, 2, 0]
    assert other_people(["a", "a"]).tolist() == [1, 0] and other_people(["a"]).tolist() == [0]


def test_swapped_rows_show_somebody_else():
    """More pairs than people, side by side: a swap to the neighbour would often be none, and its cost too small."""
    config = tiny_config(
        data__synthetic__heldout_identities=3, data__synthetic__heldout_poses_per_identity=3, eval__pairs=9
    )
    dataset = evaluation_set(config, make_encoder(config.model.clip, config.token_width), cache=None)
    pairs = Pairs.read(dataset, needs(config))
    who = [name.split("-")[-1] for name in pairs.identities]
    assert (
        len(pairs) == 9 and sorted(set(who)) == ["0", "1", "2"] and sum(a == b for a, b in itertools.pairwise(who)) >= 5
    )
    assert pairs.identities == [dataset.images.image(int(s)).identity for s in dataset.pairs[:, 0]]
    seen = []

    def sample(batch: dict, keys: jax.Array) -> np.ndarray:
        seen.append({name: np.array(batch[name]) for name in (*SOURCE, *TOKENS)})
        return batch["source"]

    scores, images = swap_scores(pairs, TruePose.swaps, sample, 0, batch_size=9)
    np.testing.assert_array_equal(images, pairs.batch["source"])
    by_person = {w: {i for i in range(9) if who[i] == w} for w in who}
    for fields, found in zip(((), SOURCE, TOKENS, SOURCE + TOKENS), seen, strict=True):
        for name in (*SOURCE, "region_tokens"):
            for i, value in enumerate(found[name]):
                same = {j for j in range(9) if np.array_equal(value, pairs.batch[name][j])}
                assert same and (same.isdisjoint(by_person[who[i]]) if name in fields else i in same)
    own = pairs.batch["region_valid"]
    theirs = own[other_people(pairs.identities)]
    assert not np.array_equal(own, theirs)
    for found, valid in zip(seen, (own, own & theirs, own & theirs, theirs), strict=True):
        np.testing.assert_array_equal(found["region_valid"], valid)
    assert swap_costs(scores)["image_swapped"] > 1 and abs(swap_costs(scores)["tokens_swapped"]) < 1e-9


@pytest.mark.parametrize("texture", ["hpfa", "concat"])
def test_the_sheet_shows_what_was_carried_where_an_attention_carries(texture):
    """The programs are stand-ins: the picture is the source upside down, what is carried is that picture mirrored."""
    config = tiny_config(
        data__synthetic__heldout_identities=3, eval__pairs=3, eval__sheet_rows=2, model__fusion__texture=texture
    )
    dataset = evaluation_set(config, make_encoder(config.model.clip, config.token_width), cache=None)
    method = make_method(config, load_autoencoder(config.model)[0])
    assert method.carries == (texture == "hpfa")
    evaluator = Evaluator(config, method, dataset, make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))
    sites = [site.name for site in config.model.unet.sites]
    metrics = {"hpfa_tokens": np.arange(1.0, len(sites) + 1), "carry_tokens": np.float32(7), "flow": np.float32(9)}
    evaluator._loss = lambda params, frozen, batch, keys: (np.float32(0.5), metrics)
    evaluator._sample = lambda params, frozen, batch, keys: batch["source"][:, ::-1]
    if evaluator._carried is not None:
        evaluator._carried = lambda params, frozen, batch: batch["target"][:, :, ::-1]
    results, sheet = evaluator.run({}, {})
    assert results["carry_tokens"] == 7 and "flow" not in results and results["heldout_loss"] == pytest.approx(0.5)
    assert {f"hpfa_tokens/{site}": i + 1.0 for i, site in enumerate(sites)}.items() <= results.items()

    shown = to_uint8(evaluator.pairs.batch["source"][1])
    columns = {"source": shown, "pose": None, "carried": shown[::-1, ::-1], "generated": shown[::-1], "truth": None}
    if texture == "concat":
        del columns["carried"]
    h, w = 4 * config.model.size[0], 4 * config.model.size[1]  # enlarged to 128 rows
    assert sheet.shape[1] == len(columns) * (w + MARGIN) + 2 * MARGIN
    top = TITLE + h + MARGIN
    for i, wanted in enumerate(columns.values()):
        cell = sheet[top : top + h, MARGIN + i * (w + MARGIN) :][:, :w]
        assert wanted is None or np.array_equal(cell[::4, ::4], wanted)

    no_rows = dataclasses.replace(evaluator.config, eval=dataclasses.replace(evaluator.config.eval, sheet_rows=0))
    evaluator.config = no_rows
    assert evaluator.run({}, {})[1] is None
