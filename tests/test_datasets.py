"""From a configuration to image sets with region tokens: a folder of photos, and its cache."""

import numpy as np
from PIL import Image

from configs.demo import get_config
from input_pipeline.synthetic import render
from truepose_jax.datasets import evaluation_set, training_set
from truepose_jax.region_tokens import make_encoder
from truepose_jax.schema import Config, from_config_dict


def write_folder(root, count=3):
    for name in ("image", "parsing", "keypoints"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        record = render(seed=0, identity=i, pose=2 * i, size=(64, 48))
        Image.fromarray(record.image).save(root / "image" / f"p{i}.png")
        Image.fromarray(record.parsing).save(root / "parsing" / f"p{i}.png")
        rows = [f"{x} {y}" if seen else "-1 -1" for x, y, seen in record.joints]
        (root / "keypoints" / f"p{i}.txt").write_text("\n".join(rows) + "\n")


def test_folder_gets_tokens_of_both_sides_and_keeps_them(tmp_path):
    write_folder(tmp_path / "photos")
    values = get_config()
    values.data.dataset, values.data.root, values.data.flip = "folder", str(tmp_path / "photos"), True
    config = from_config_dict(Config, values)
    encoder = make_encoder(config.model.clip, config.token_width)
    cache = tmp_path / "cache"
    first = training_set(config, encoder, str(cache))
    assert len(first.images) == 3 and first.tokens.valid[:, -1].all() and first.tokens.flipped_valid[:, -1].all()
    assert np.abs(first.tokens.tokens - first.tokens.flipped_tokens).max() > 0
    (kept,) = cache.glob("region_tokens_*.safetensors")
    written = kept.stat().st_mtime_ns
    again = training_set(config, encoder, str(cache))
    np.testing.assert_array_equal(first.tokens.tokens, again.tokens.tokens)
    assert kept.stat().st_mtime_ns == written
    assert not evaluation_set(config, encoder, None).heldout

    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(tmp_path / "photos" / "image" / "p0.png")
    changed = training_set(config, encoder, str(cache))
    assert np.abs(changed.tokens.tokens[0] - first.tokens.tokens[0]).max() > 0
