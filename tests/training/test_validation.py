"""The swap test takes somebody else's source."""

import itertools

import jax
import numpy as np

from tests.tiny_run import tiny_config
from truepose_jax.data.datasets import evaluation_set
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.training.validation import IMAGE_FIELDS, TOKEN_FIELDS, Pairs, other_people, swap_costs, swap_scores


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
    pairs = Pairs.read(dataset)
    who = [name.split("-")[-1] for name in pairs.identities]
    assert (
        len(pairs) == 9 and sorted(set(who)) == ["0", "1", "2"] and sum(a == b for a, b in itertools.pairwise(who)) >= 5
    )
    assert pairs.identities == [dataset.images.image(int(s)).identity for s in dataset.pairs[:, 0]]
    seen = []

    def sample(batch: dict, keys: jax.Array) -> np.ndarray:
        seen.append({name: np.array(batch[name]) for name in (*IMAGE_FIELDS, *TOKEN_FIELDS)})
        return batch["source"]

    scores, images = swap_scores(pairs, sample, 0, batch_size=9)
    np.testing.assert_array_equal(images, pairs.batch["source"])
    by_person = {w: {i for i in range(9) if who[i] == w} for w in who}
    for fields, found in zip(((), IMAGE_FIELDS, TOKEN_FIELDS, IMAGE_FIELDS + TOKEN_FIELDS), seen, strict=True):
        for name in (*IMAGE_FIELDS, "region_tokens"):
            for i, value in enumerate(found[name]):
                same = {j for j in range(9) if np.array_equal(value, pairs.batch[name][j])}
                assert same and (same.isdisjoint(by_person[who[i]]) if name in fields else i in same)
    own = pairs.batch["region_valid"]
    theirs = own[other_people(pairs.identities)]
    assert not np.array_equal(own, theirs)
    for found, valid in zip(seen, (own, own & theirs, own & theirs, theirs), strict=True):
        np.testing.assert_array_equal(found["region_valid"], valid)
    assert swap_costs(scores)["image_swapped"] > 1 and abs(swap_costs(scores)["tokens_swapped"]) < 1e-9
