"""Judging: who is judged, what the figures are for models whose answers are known, and what the gates say."""

import dataclasses
import json
import types

import numpy as np
import pytest

from tests.tiny_run import tiny_config
from truepose_jax.evaluate import judge
from truepose_jax.evaluate.judge import COPIED, KINDS, OURS, PEOPLE, POSES, WARPED, Gates, Verdict
from truepose_jax.evaluate.report import table
from truepose_jax.methods.truepose import TruePose
from truepose_jax.metrics.psnr import psnr_inside
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.runtime.sharding import make_mesh

CONFIG = tiny_config(
    model__size=(48, 36), data__synthetic__background="plain", data__synthetic__framing="close", eval__batch_size=24
)
SCORES = {"whole": 20.0, "face": 20.0, "clothes": 20.0, "person": 20.0}


@pytest.fixture(scope="module")
def pipe():
    """What judging reads of a Pipeline, without a network."""
    run = types.SimpleNamespace(config=CONFIG)
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    encoder = make_encoder(CONFIG.model.clip, CONFIG.token_width)
    return types.SimpleNamespace(run=run, encoder=encoder, mesh=mesh, method=TruePose)


PAIRS = {}


def people(config, encoder, patterns, eval_seed=None, *, same_colours=False, made=judge.people):
    """judge.people, each kind made once for all tests."""
    key = patterns, eval_seed, same_colours
    if key not in PAIRS:
        PAIRS[key] = made(config, encoder, patterns, eval_seed, same_colours=same_colours)
    return PAIRS[key]


def answering(monkeypatch, answer):
    """Judging meets a model that answers so: {field: array} of a batch -> images."""
    monkeypatch.setattr(judge, "sampling", lambda pipe: lambda batch, keys: answer(batch))
    monkeypatch.setattr(judge, "people", people)
    monkeypatch.setattr(judge, "MEAN_OF", 2)


def test_who_is_judged(pipe):
    pairs = people(CONFIG, pipe.encoder, "solid")
    assert len(pairs) == PEOPLE * POSES and pairs.identities[:PEOPLE] == pairs.identities[-PEOPLE:]
    assert pairs.identities[:3] == ["heldout-1-0", "heldout-1-1", "heldout-1-2"]
    source, target = pairs.batch["source_joints"], pairs.batch["target_joints"]
    for k in range(POSES):
        group = slice(k * PEOPLE, (k + 1) * PEOPLE)
        assert (source[group] == source[group][0]).all() and (target[group] == target[group][0]).all()
        assert not np.array_equal(source[k * PEOPLE], target[k * PEOPLE])
    assert len(np.unique(target.reshape(len(target), -1), axis=0)) == POSES
    others = judge.people(CONFIG, pipe.encoder, "solid", 7)
    assert others.identities[0] == "heldout-7-0" and np.array_equal(others.batch["target_joints"], target)
    assert not np.array_equal(others.batch["target"], pairs.batch["target"])


def test_people_in_the_same_colours(pipe):
    pairs = people(CONFIG, pipe.encoder, "all", same_colours=True)
    targets = pairs.batch["target"].reshape(POSES, PEOPLE, *CONFIG.model.size, 3)
    maps = pairs.batch["target_parsing"].reshape(POSES, PEOPLE, *CONFIG.model.size)
    assert len(set(pairs.identities)) == PEOPLE * POSES
    for k in range(POSES):
        assert (maps[k] == maps[k][0]).all() and len(np.unique(targets[k].reshape(PEOPLE, -1), axis=0)) >= PEOPLE - 2
    assert not any(np.array_equal(maps[0][0], maps[k][0]) for k in range(1, POSES))


def faces_by_hand(judged):
    """Share of the faces of 50 pixels or more that lie nearest to their own truth among the people in the same pose."""
    truth, masks, found = judged.pairs.batch["target"], judged.pairs.mask("face"), []
    for i in np.flatnonzero(masks.sum(axis=(1, 2)) >= 50):
        others = np.arange(PEOPLE) + i // PEOPLE * PEOPLE
        errors = [np.square(judged.images[i] - truth[j])[masks[i]].mean() for j in others]
        found.append(np.argmin(errors) == i % PEOPLE)
    assert 5 < len(found) < len(truth)
    return np.mean(found)


def test_a_model_that_copies_the_source(pipe, monkeypatch):
    answering(monkeypatch, lambda batch: batch["source"])
    found = judge.judge(pipe)
    assert found.keys() == KINDS.keys()
    for kind, each in found.items():
        verdict = each.verdict
        assert each.pairs.identities[0] == "heldout-1-0" and len(each.images) == PEOPLE * POSES
        assert verdict.psnr[OURS] == verdict.psnr[COPIED] and verdict.margin(COPIED) == 0 > verdict.margin(WARPED)
        person = each.pairs.mask("person")
        by_hand = [
            psnr_inside(a, b, m, data_range=2.0)
            for a, b, m in zip(each.images, each.pairs.batch["target"], person, strict=True)
        ]
        assert verdict.psnr[OURS]["person"] == pytest.approx(np.mean(by_hand))
        assert verdict.swap_costs["tokens_swapped"] == 0 < verdict.swap_costs["image_swapped"]
        assert verdict.face_retrieval == verdict.copied_face_retrieval == pytest.approx(faces_by_hand(each))
        assert verdict.retrieval > 0.4 and verdict.shuffled_retrieval < 0.2 and verdict.outline_error > 20
        assert (verdict.pattern_retrieval is None) == (kind == "plain")
    told = judge.report({kind: each.verdict for kind, each in found.items()}, CONFIG)
    assert "WARNING" not in told and "in the same colours" in told


def test_a_model_that_knows_the_truth(pipe, monkeypatch):
    """Whatever the source: so the control is not at chance, and the report says that the figure is not to be trusted."""
    answering(monkeypatch, lambda batch: batch["target"] + np.float32(2 / 255))
    verdicts = {kind: each.verdict for kind, each in judge.judge(pipe).items()}
    for verdict in verdicts.values():
        assert verdict.retrieval == verdict.shuffled_retrieval == 1 and verdict.sharpness == pytest.approx(1, abs=1e-3)
        assert verdict.outline_error == pytest.approx(1, abs=1e-3) and verdict.swap_costs["both_swapped"] == 0
    assert verdicts["patterned"].pattern_retrieval > 0.9
    assert judge.report(verdicts, CONFIG).count("WARNING") == 2


def verdict(person=20.0, **changes):
    rows = {OURS: SCORES | {"person": person}, COPIED: SCORES | {"person": 16.0}, WARPED: SCORES | {"person": 19.0}}
    found = {
        "psnr": rows,
        "retrieval": 0.97,
        "shuffled_retrieval": 0.06,
        "face_retrieval": 0.5,
        "sharpness": 0.9,
        "outline_error": 15.0,
        "copied_face_retrieval": 0.4,
    }
    costs = {"image_swapped": 6.0, "tokens_swapped": 0.1, "both_swapped": 6.1}
    return Verdict(**found | {"swap_costs": costs} | changes)


def test_each_gate_that_is_missed_is_a_line():
    gates = Gates(margin=3.5, retrieval=0.95, outline_error=18.0)
    assert gates.missed("plain", verdict()) == []
    nan = float("nan")
    for change, text in (
        ({"person": 19.4}, "+3.40 dB over the copied source; at least +3.5"),
        ({"person": nan}, "over the copied source"),
        ({"retrieval": 0.9}, "retrieval 90%; at least 95%"),
        ({"sharpness": 0.7}, "sharpness 0.70"),
        ({"sharpness": 1.1}, "sharpness 1.10"),
        ({"sharpness": nan}, "sharpness"),
        ({"outline_error": 18.5}, "outline error 18.5; at most 18"),
        ({"swap_costs": {"image_swapped": 4.9}}, "another source image costs 4.90 dB; at least 5"),
    ):
        lines = gates.missed("plain", verdict(**change))
        assert len(lines) == 1 + (change.get("person") is nan) and text in lines[0] and "plain clothes" in lines[0]
    behind = verdict(person=19.5, psnr=verdict(19.5).psnr | {WARPED: SCORES | {"person": 19.5}})
    assert [line for line in gates.missed("plain", behind) if "limb-wise" in line]


def test_the_figures_as_json():
    found = judge.to_json({"plain": verdict(), "patterned": verdict(pattern_retrieval=0.8)})
    fields = {field.name for field in dataclasses.fields(Verdict)}
    assert found["patterned"].keys() == fields and found["plain"].keys() == fields - {"pattern_retrieval"}
    assert json.loads(json.dumps(found)) == found


def test_a_region_that_no_image_shows_says_so_in_the_table():
    none = {"mean": float("nan"), "ci95": float("nan"), "count": 0, "undefined": 3}
    some = {"mean": 20.0, "ci95": 1.0, "count": 3, "undefined": 0}
    regions = {"face": {"psnr": none, "ssim_256": none}, "clothes": {"psnr": some, "ssim_256": some}}
    metrics = {"ssim_256": some, "garment_colour_retrieval_of_16": some}
    text = table({"metrics": metrics, "regions": regions, "not_computed": {}})
    assert "no image shows 50 pixels of it" in text and "nan" not in text and "SSIM_256" in text
