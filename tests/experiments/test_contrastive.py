"""The contrastive trainer of the region encoder: its loss against torch, its pairs, and a small run into transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from configs.synthetic_clip import get_config
from experiments import contrastive
from experiments.contrastive import Crops, draw_pairs, info_nce, known_again
from tests.process import run
from truepose_jax.config import from_config_dict
from truepose_jax.training.checkpoint import CheckpointError

ROWS, WIDTH = 6, 5


def test_info_nce_against_torch():
    """Values and gradients; rows of weight 0 are nobody's partner."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in "ab")
    weight = np.array([1, 1, 0, 1, 1, 0], np.float32)
    loss, grads = jax.value_and_grad(info_nce, argnums=(0, 1))(a, b, weight, 0.1)
    ta, tb = (torch.tensor(x[weight > 0], dtype=torch.float64, requires_grad=True) for x in (a, b))
    logits = torch.nn.functional.normalize(ta) @ torch.nn.functional.normalize(tb).T / 0.1
    own = torch.arange(len(logits))
    want = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    want.backward()
    assert abs(float(loss) - want.item()) < 1e-5
    for ours, theirs in zip(grads, (ta, tb), strict=True):
        np.testing.assert_allclose(np.asarray(ours)[weight > 0], theirs.grad.numpy(), atol=1e-5)
        assert not np.any(np.asarray(ours)[weight == 0])


def test_pairs_are_one_region_of_one_person_in_two_poses():
    """Pixel values name person, pose and region."""
    people, poses = 5, 3
    pixels = np.zeros((people, poses, 21, 2, 2, 3), np.uint8)
    for index in np.ndindex(people, poses, 21):
        pixels[index] = np.array([index[0], index[1], index[2]])
    valid = np.zeros((people, poses, 21), bool)
    valid[:, :, [1, 4, 20]] = True
    valid[2, 1, 4] = False
    first, second, weight = draw_pairs(Crops(pixels, valid), np.random.default_rng(1), 4)
    assert len(first) == len(second) == len(weight) and weight.sum() <= 4 * 3
    for a, b in zip(first[weight > 0], second[weight > 0], strict=True):
        (person, pose, region), (person2, pose2, region2) = a[0, 0], b[0, 0]
        assert (person, region) == (person2, region2) and pose != pose2
        assert valid[person, pose, region] and valid[person, pose2, region]


def test_known_again():
    tokens = np.random.default_rng(2).standard_normal((7, 2, 4))
    there = np.ones((7, 2), bool)
    rate, chance, count = known_again(tokens, 3 * tokens, there)
    rows = [n for n in there.sum(0) if n > 1]
    assert rate == 1.0 and count == sum(rows)
    np.testing.assert_allclose(chance, np.concatenate([np.full(n, 1 / n) for n in rows]).mean())
    assert known_again(tokens, np.roll(tokens, 1, axis=0), there)[0] == 0.0
    assert np.isnan(known_again(tokens, tokens, np.zeros_like(there))[0])


def test_a_small_run(tmp_path):
    """It learns, and transformers opens what it wrote; a folder that exists is left alone."""
    out = tmp_path / "clip"
    command = [
        "-m", "experiments.train_clip", "--config=configs/synthetic_clip.py", f"--out={out}",
        "--config.total_steps=12", "--config.identities_per_step=6", "--config.synthetic.identities=8",
        "--config.synthetic.heldout_identities=4", "--config.synthetic.poses_per_identity=2",
        "--config.size=(32, 24)", "--config.width=8", "--config.clip.hidden_size=16", "--config.clip.layers=1",
    ]  # fmt: skip
    code, _, errors = run(*command)
    assert code == 0, errors
    results = json.loads((out / "training.json").read_text())["results"]
    assert results["last_loss"] < results["first_loss"]
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(out)
    assert model(torch.zeros(1, 3, 32, 32)).image_embeds.shape == (1, 8)
    code, _, errors = run(*command)
    assert code == 2 and "exists; name a folder that does not" in errors


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Parameters and losses bit for bit those of a training that nobody stopped; other settings are refused."""
    values = get_config()
    values.total_steps, values.identities_per_step, values.size, values.width = 4, 4, (32, 24), 8
    values.synthetic.identities, values.synthetic.heldout_identities, values.synthetic.poses_per_identity = 4, 2, 2
    values.clip.hidden_size, values.clip.layers = 16, 1
    config = from_config_dict(contrastive.ClipTraining, values)
    _, whole, results = contrastive.train(config, tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(contrastive.Preemption, "stop", lambda self, step: step == 1)
        with pytest.raises(contrastive.Stopped, match="2"):
            contrastive.train(config, tmp_path / "stopped")
    _, again, ours = contrastive.train(config, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert ours == results
    with pytest.raises(CheckpointError, match="of other settings"):
        contrastive.train(dataclasses.replace(config, temperature=0.2), tmp_path / "stopped")


def test_the_place_is_tried_before_the_training():
    code, _, errors = run("-m", "experiments.train_clip", "--config=configs/synthetic_clip.py", "--out=/proc/x/clip")
    assert code == 2 and errors.count("\n") == 1 and "cannot be written" in errors


@pytest.mark.parametrize("flag", ["--config", "--out"])
def test_missing_flags(flag):
    given = {"--config": "configs/synthetic_clip.py", "--out": "nowhere"}
    command = [f"{name}={value}" for name, value in given.items() if name != flag]
    code, _, errors = run("-m", "experiments.train_clip", *command)
    assert code == 2 and f"{flag} is missing" in errors
