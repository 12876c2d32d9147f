"""What `convert to-torch` wrote serves as a run: the same pictures, its own CLIP, and errors for what it has not."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.inference.test_pipeline import person
from tests.tiny_run import STEPS, shared_pipeline, shared_run
from truepose_jax import convert, generate
from truepose_jax.inference.pipeline import Pipeline, Run
from truepose_jax.pretrained.conversion.key_maps import leaves
from truepose_jax.pretrained.frozen_networks import folder_fingerprint

CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    assert convert.main(["to-torch", f"--workdir={shared_run()}", f"--dst={folder}"]) == 0
    return folder


def test_the_same_pictures(export):
    one, other = shared_pipeline(), Pipeline.load(export)
    mine, theirs = dict(leaves(one.params)), dict(leaves(other.params))
    assert mine.keys() == theirs.keys()
    for path, array in mine.items():
        assert array.dtype == theirs[path].dtype and np.array_equal(array, theirs[path]), path
    assert (other.run.step, other.run.weights, other.run.frozen) == (STEPS[-1], "ema", one.run.frozen)
    assert np.array_equal(one.batch([person(1)], batch_size=1)[0], other.batch([person(1)], batch_size=1)[0])


def test_what_an_export_has_not(export, tmp_path, refuses):
    call = [f"--workdir={export}", "--source=a", "--parsing=none", "--pose=p", f"--out={tmp_path / 'o.png'}"]
    cut = shutil.copytree(export, tmp_path / "cut")
    file = cut / "truepose.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    older = shutil.copytree(export, tmp_path / "older")
    settings = json.loads((older / "truepose.json").read_text())
    del settings["run"]
    (older / "truepose.json").write_text(json.dumps(settings))
    odd = shutil.copytree(export, tmp_path / "odd")
    (odd / "training_config.json").write_text('{"sede": 0}')
    to_torch = f"--dst={tmp_path / 'new'}"
    for program, words, text in (
        (generate, [*call, "--weights=raw"], "holds the ema weights of step 7 and no others"),
        (generate, [*call, "--step=3"], "holds the ema weights of step 7 and no others"),
        (generate, [f"--workdir={older}", *call[1:]], "export the run again"),
        (generate, [f"--workdir={odd}", *call[1:]], "training_config.json"),
        (convert, ["to-torch", f"--workdir={export}", to_torch], "is an export already"),
        (convert, ["to-torch", f"--workdir={shared_run()}", "--with-clip", to_torch], "an untrained one"),
    ):
        refuses(text, program.main, *words)
    with pytest.raises(ValueError, match="truncated"):
        Pipeline.load(cut)
    assert not (tmp_path / "new").exists() and Run.open(export, weights="ema", step=7).step == 7


def test_its_clip_comes_along(tmp_path):
    """And is found when the one that the run was trained with has gone."""
    import transformers

    vision = transformers.CLIPVisionConfig(**CLIP)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path / "clip")
    run = shutil.copytree(shared_run(), tmp_path / "run")
    metadata = json.loads((run / "metadata.json").read_text())
    metadata["config"]["model"]["clip"]["path"] = str(tmp_path / "clip")
    metadata["frozen"]["clip"] = folder_fingerprint(str(tmp_path / "clip"), "clip")
    (run / "metadata.json").write_text(json.dumps(metadata))
    command = ["to-torch", f"--workdir={run}", "--with-clip", "--weights=raw", f"--dst={tmp_path / 'model'}"]
    assert convert.main(command) == 0
    shutil.rmtree(tmp_path / "clip")
    pipe = Pipeline.load(tmp_path / "model")
    assert pipe.encoder.trained and pipe.encoder.fingerprint == pipe.run.frozen["clip"] and pipe.run.weights == "raw"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(pipe.params))
    card = " ".join((tmp_path / "model" / "README.md").read_text().split())
    assert "`image_encoder/`" in card and "fingerprint `" not in card and "--workdir=FOLDER" in card
    assert all(
        str(tmp_path) not in file.read_text()
        for file in (tmp_path / "model").glob("*.*")
        if file.suffix != ".safetensors"
    )
