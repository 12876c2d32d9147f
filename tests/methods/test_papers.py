"""FPDM's branches and IMAGPose's draws: what is theirs alone."""

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from configs import fpdm_deepfashion_512
from input_pipeline.batches.plans import CanvasPlan, groups_of
from input_pipeline.schema import InputError
from tests import tiny_methods
from truepose_jax.config import ConfigError
from truepose_jax.methods.fpdm import FPDMConditioning
from truepose_jax.methods.imagpose import draw_given, draw_reference
from truepose_jax.pretrained.factory import planned
from truepose_jax.training.init import batch_spec


def fpdm(**model):
    return planned(tiny_methods.config("fpdm", {"model": model}))[0]


def test_fpdm_takes_a_third_branch_where_the_shares_differ():
    """u + w_s (p - u) + w_f (f - p) with w_s = share x w_f."""
    full = FPDMConditioning("pose", "sites", "fused", "unfused")
    base, others = fpdm(source_share=1.5).branches(full, 2.0)
    assert (base.pose, base.sites, base.fused) == (None, None, "unfused")
    (first, partial), (second, whole) = others
    assert (first, second) == (3.0 - 2.0, 2.0) and whole is full
    assert (partial.pose, partial.sites, partial.fused) == ("pose", "sites", "unfused")
    assert [weight for weight, _ in fpdm().branches(full, 2.0).others] == [2.0]


def test_the_second_stage_alone_needs_no_first():
    assert not fpdm_deepfashion_512.get_config("stage2_only").model.fusion_embedding
    made = fpdm(fusion_embedding=False)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), batch_spec(tiny_methods.config("fpdm"))))
    assert "fusion_embedding" not in shapes and "source_projection" in shapes
    assert made.needs.networks == ("autoencoder", "dino") and set(made.swaps) == {"tokens_swapped"}
    assert made.needs.train == ("source_square", "target_pose", "target")


def test_patterns_of_given_tiles_are_uniform():
    """14 with one to three given; 15 with the paper's fourth. The reference is one of the given, uniformly."""
    keys = jax.random.split(jax.random.key(0), 7000)
    for nothing, patterns in ((False, 14), (True, 15)):
        given = np.asarray(jax.vmap(lambda key, n=nothing: draw_given(key, nothing=n))(keys))
        found, counts = np.unique(given @ (1 << np.arange(4)), return_counts=True)
        assert found.tolist() == list(range(0 if nothing else 1, 15)) and len(found) == patterns
        assert chisquare(counts).pvalue > 1e-4
    some = np.broadcast_to([True, False, True, True], (7000, 4))
    chosen = np.asarray(jax.vmap(draw_reference)(keys, some))
    values, counts = np.unique(chosen, return_counts=True)
    assert values.tolist() == [0, 2, 3] and chisquare(counts).pvalue > 1e-4
    assert set(np.asarray(jax.vmap(draw_reference)(keys[:99], np.zeros((99, 4), bool)))) == {0, 1, 2, 3}


def test_canvases_are_of_one_person_and_of_two_photos_at_least():
    pairs = np.array([[5, 1], [1, 5], [2, 3], [3, 7], [6, 6]])
    groups = groups_of(pairs, 8)
    assert [group.tolist() for group in groups] == [[1, 5], [2, 3, 7]]
    plan = CanvasPlan(groups, seed=0, flip=True)
    seen, flips = set(), set()
    for epoch in range(40):
        for index, group in enumerate(groups):
            drawn = plan.draw(index, epoch)
            tiles = {drawn.source, *drawn.targets}
            assert len(drawn.targets) == 3 and len(tiles) > 1 and tiles <= set(group.tolist())
            seen |= tiles
            flips.add(drawn.flip)
            assert plan.draw(index, epoch) == drawn
    assert seen == {1, 2, 3, 5, 7} and flips == {False, True}
    with pytest.raises(InputError, match="two usable photos"):
        groups_of(np.array([[6, 6]]), 8)


TWO_LEVELS = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize(
    "method,changes,words",
    [
        ("fpdm", {"model": {"size": (17, 12)}}, "divisible by 2"),
        ("imagpose", {"model": {"size": (16, 14), "unet": TWO_LEVELS}}, r"multiples of 4, as in \(16, 1[26]\)"),
        ("imagpose", {"model": {"patch": 4}}, "the texture's patches are 8 pixels wide"),
        ("imagpose", {"model": {"unet": {"in_channels": 12}}}, "needs 12 and imagpose reads 13 beside it"),
        ("imagpose", {"data": {"self_pair": 0.1}}, "a row is a canvas of one person"),
        ("fpdm", {"diffusion": {"schedule": {"zero_snr": True}, "spacing": "trailing"}}, "where 'eps' says nothing"),
        ("fpdm", {"diffusion": {"schedule": {"zero_snr": True, "prediction": "v"}}}, "needs spacing 'trailing'"),
        ("fpdm", {"diffusion": {"losses": {"pixels": 1.0}, "schedule": {"prediction": "x0"}}}, "are truepose's"),
        ("fpdm", {"model": {"fusion": {}}}, r"config\.model\.fusion is a setting of truepose"),
        ("ipf", {"data": {"flip": True}}, "data.flip and data.self_pair must be off"),
    ],
)
def test_settings_that_cannot_be_run(method, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        values = tiny_methods.settings(method).to_dict()
        merge(values, changes)
        tiny_methods.from_config_dict(tiny_methods.Config, values)
    assert "\n" not in str(caught.value)


def merge(values: dict, changes: dict) -> None:
    for name, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(name), dict):
            merge(values[name], change)
        else:
            values[name] = change
