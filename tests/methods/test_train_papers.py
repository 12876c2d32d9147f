"""Each further method through the training program: drawn people, batches, steps, evaluation with its sheet, and going on."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline.schema import InputError
from tests import tiny_methods
from tests.shared_data import standing_joints
from truepose_jax import convert, train
from truepose_jax.config import ConfigError, FirstStageConfig
from truepose_jax.inference.canvas import Pose, Source
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.pretrained import vision_networks
from truepose_jax.training.checkpoint import Checkpoints

DATA = {"synthetic": {"identities": 6, "heldout_identities": 3}, "threads": 1}
RUN = {
    "total_steps": 2,
    "model": {"size": (32, 24)},
    "data": DATA,
    "optim": {"layout": "flat"},  # a third of the time to compile
    "checkpoint": {"every": 1},
    "eval": {"every": 2, "pairs": 3, "batch_size": 3, "sheet_rows": 2, "steps": 1, "guidance": 2.0},
    "diffusion": {"steps": 1},
}


def lines(workdir, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / file).read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def quickly(started_quickly):
    """The second start of a method finds its programs."""


def check_pictures(pipe: Pipeline, method: str) -> None:
    """One picture as ever; of a canvas several, which depend on every source and on their own pose."""
    photos = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
    joints = [standing_joints(40, 30) + (i, 0, 0) for i in range(4)]
    picture = pipe(photos[0], None, joints[1], source_joints=joints[0])
    assert picture.shape == (32, 24, 3) and picture.dtype == np.uint8 and np.ptp(picture) > 0
    if method != "imagpose":
        with pytest.raises(InputError, match="fpdm, takes one source and one pose"):
            pipe.canvas([Source(photos[0], joints[0])], [Pose(joints[1])])
        return
    sources, poses = [Source(p, j) for p, j in zip(photos, joints, strict=False)], [Pose(j) for j in joints]
    star = pipe.canvas(sources[:1], poses[1:])
    assert [p.shape for p in star] == [(32, 24, 3)] * 3 and np.any(star[0] != star[1])
    (first,) = pipe.canvas(sources[:1], poses[1:2])
    np.testing.assert_array_equal(first, picture)  # T1 is what one source and one pose give
    (filled,) = pipe.canvas(sources[:1], poses[1:2], fill="source")
    assert np.any(first != filled)
    for count in ((2, 3), (0, 1), (4, 0)):
        with pytest.raises(InputError, match="a canvas has 4 tiles"):
            pipe.canvas(sources[: count[0]], poses[: count[1]])


def check_export(workdir, config) -> None:
    """What `convert to-torch` writes is what the second stage reads, bit for bit, and transformers opens its CLIP."""
    folder = workdir / "export"
    assert convert.main(["to-torch", f"--workdir={workdir}", f"--dst={folder}"]) == 0
    read = vision_networks.load("ipf", FirstStageConfig(path=str(folder), image_size=12))
    params = Checkpoints(workdir, keep=1, every=1, read_only=True).restore_part("params", 2)
    assert read.config == config.model.clip
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, jax.tree.map(np.asarray, dict(params))))
    with pytest.raises(ConfigError, match=r"config\.model\.ipf\.image_size is 32; the CLIP of .* sees 12"):
        vision_networks.plan("ipf", FirstStageConfig(path=str(folder)))
    (folder / "combiner.safetensors").unlink()
    with pytest.raises(ConfigError, match="it is a plain CLIP"):
        vision_networks.load("ipf", FirstStageConfig(path=str(folder), image_size=12))


@pytest.mark.parametrize("method", ["ipf", "fpdm", "imagpose"])
def test_trains_evaluates_and_goes_on(method, tmp_path):
    config = tiny_methods.config(method, RUN)
    assert train.train(config, str(tmp_path)) == 0
    losses = [line["loss"] for line in lines(tmp_path)]
    assert len(losses) == 2 and np.isfinite(losses).all()
    (found,) = (line["eval"] for line in lines(tmp_path, "eval.jsonl"))
    if method == "ipf":
        assert {"heldout_top1", "heldout_top5", "heldout_place"} <= found.keys()
        assert 1 <= found["heldout_place"] <= 6
    else:
        swaps = {name for name in found if name.startswith("swap_cost_")}
        assert swaps == {f"swap_cost_{name}" for name in tiny_methods.one(method)[1].swaps}
        assert np.isfinite(found["psnr_person"]) and any(name.startswith("context_rms/") for name in found)
        (sheet,) = tmp_path.glob("samples/*.png")
        assert Image.open(sheet).size[0] > 4 * 12
    frozen = json.loads((tmp_path / "metadata.json").read_text())["frozen"]
    assert all(frozen[role].startswith("untrained-") for role in {"dino", "ipf"} & frozen.keys())
    assert ("dino" in frozen) == (method != "ipf")

    if method != "ipf":
        check_pictures(Pipeline.load(tmp_path), method)
    else:
        with pytest.raises(ConfigError, match="'ipf', which makes no pictures"):
            Pipeline.load(tmp_path)
        check_export(tmp_path, config)

    if method == "fpdm":  # its state and its pairs go on as TruePose's do
        return
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert train.train(tiny_methods.config(method, RUN, {"eval": {"every": 0}}), str(tmp_path)) == 0
    assert [line["loss"] for line in lines(tmp_path)] == losses
