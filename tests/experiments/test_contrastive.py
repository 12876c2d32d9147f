"""The contrastive trainer of the region encoder: its loss against torch, its pairs, and a small run into transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from configs.synthetic_clip import get_config
from experiments import contrastive, train_clip
from experiments.contrastive import Crops, draw_pairs, info_nce, known_again
from experiments.train_clip import main
from input_pipeline.schema import InputError
from truepose_jax.config import ConfigError
from truepose_jax.training.checkpoint import STOPPED, CheckpointError

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


@pytest.fixture
def small():
    """Four steps of a small network."""
    values = get_config()
    values.total_steps, values.identities_per_step, values.size, values.width = 4, 4, (32, 24), 8
    values.synthetic.identities, values.synthetic.heldout_identities, values.synthetic.poses_per_identity = 4, 2, 2
    values.clip.hidden_size, values.clip.layers = 16, 1
    return values


def test_a_run_that_was_stopped_goes_on(small, tmp_path, monkeypatch):
    """It learns, transformers opens what it wrote, and all of that is bit for bit what a training leaves that nobody stopped.
    Other settings, and a folder that exists, are refused."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert main([""], small, alone) == 0
    results = json.loads((alone / "training.json").read_text())["results"]
    assert results["last_loss"] < results["first_loss"]
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(alone)
    assert model(torch.zeros(1, 3, 32, 32)).image_embeds.shape == (1, 8)
    with pytest.raises(ConfigError, match="exists; name a folder that does not"):
        main([""], small, alone)

    with monkeypatch.context() as patch:
        patch.setattr(contrastive.Preemption, "stop", lambda self, step: step == 1)
        assert main([""], small, stopped) == STOPPED
    small.temperature *= 2
    with pytest.raises(CheckpointError, match="of other settings"):
        main([""], small, stopped)
    small.temperature /= 2
    assert main([""], small, stopped) == 0
    for name in ("training.json", "model.safetensors"):
        assert (stopped / name).read_bytes() == (alone / name).read_bytes()
    assert not (tmp_path / ".stopped.training").exists()


@pytest.mark.parametrize(
    ("given", "out", "words"),
    [
        (False, "clip", "--config is missing"),
        (True, None, "--out is missing"),
        (True, "/proc/x/clip", "cannot be written"),
    ],
)
def test_refused_before_the_training(small, monkeypatch, given, out, words):
    monkeypatch.setattr(train_clip, "train", None)
    with pytest.raises((ConfigError, InputError), match=words):
        main([""], small if given else None, out)
