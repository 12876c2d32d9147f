"""A model with the half-cell head in generate and Pipeline: the source's own pose, label sets, edits, sheets, lists, records."""

import functools
import logging
import pathlib
import tempfile
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import InputError
from tests.inference.test_pipeline import levels_apart, person
from tests.records import built, noise_set
from tests.sampling.test_inpainting import box, cells
from tests.tiny_run import SIZE, make_run, tiny_config, write_inputs
from truepose_jax import generate
from truepose_jax.inference import request
from truepose_jax.inference.pipeline import Pipeline, Run
from truepose_jax.inference.record_requests import record_rows
from truepose_jax.models.carry import LIMB_LOGIT
from truepose_jax.sampling.inpainting import Edit

pytestmark = pytest.mark.usefixtures("started_quickly")

HEAD = {
    "model__autoencoder": "patches",
    "model__patch_channels": 4,
    "model__unet__in_channels": 16,
    "model__unet__out_channels": 16,
    "model__fusion__carry_latents": True,
    "model__fusion__cosine": True,
    "model__carry__head": True,
    "model__carry__width": 8,
    "diffusion__schedule__prediction": "x0",
    "diffusion__guidance": 1.0,
    "optim__ema_decay": 0.0,
}

_folder = tempfile.TemporaryDirectory(prefix="head_run_")


@functools.cache
def head_run() -> pathlib.Path:
    return make_run(pathlib.Path(_folder.name) / "run", tiny_config(**HEAD))


@pytest.fixture(scope="module")
def pipe():
    loaded = Pipeline.load(head_run())
    # As strong as at birth: random weights leave the limbs' logits weak.
    head = loaded.params["carry_target"] | {"limb_scale": jnp.full((1,), jnp.log(LIMB_LOGIT))}
    return replace(loaded, params=loaded.params | {"carry_target": head})


def without_head(pipe) -> Run:
    return replace(pipe.run, config=tiny_config())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def posed(seed: int, **changes):
    request = person(seed)
    return replace(request, **{"source_joints": request.joints, "joints": person(seed + 9).joints} | changes)


def test_the_sources_own_pose_and_labels_show(pipe):
    """The pose in any frame is one pose; a map of another label set is that map in the model's own classes."""
    one = posed(0)
    lip = LABEL_SETS["lip20"]
    ids = np.array(
        [lip.id_of(name) or 0 for name in LABEL_SETS["atr18"].classes], np.uint8
    )  # lip20 has no Belt, no Bag
    known = np.where(np.isin(one.parsing, (8, 16)), 0, one.parsing).astype(np.uint8)
    requests = {
        "base": one,
        "frame": replace(one, source_joints=one.source_joints * (2, 2, 1), source_frame_hw=(80, 60)),
        "moved": replace(one, source_joints=np.abs(one.source_joints - (0, 39, 0))),  # upside down
        "known": replace(one, parsing=known),
        "lip20": replace(one, parsing=ids[known], labels="lip20"),
        "no map": replace(one, parsing=None),
    }
    made = dict(zip(requests, pipe.batch(list(requests.values()), batch_size=1), strict=True))
    assert made["base"].shape == (*SIZE, 3) and made["base"].std() > 5
    assert levels_apart(made["frame"], made["base"]) <= 1 and levels_apart(made["lip20"], made["known"]) == 0
    print({name: levels_apart(picture, made["base"]) for name, picture in made.items()})
    for name in ("moved", "known", "no map"):
        assert levels_apart(made[name], made["base"]) > 1, name
    fitted = pipe.run.fit(requests["lip20"])
    assert fitted.labels.name == "atr18" and fitted.source.joints[:, 2].all()


def test_what_was_carried_is_framed_as_the_picture(pipe):
    fitted = [pipe.run.fit(posed(2, source=np.zeros((30, 60, 3), np.uint8), parsing=None))]
    (picture,) = pipe.sample(fitted, batch_size=1)
    (carried,) = pipe.carried(fitted, [picture])
    assert carried.shape == picture.shape == (12, 24, 3) and carried.dtype == np.uint8


def test_an_edit_keeps_what_is_outside(pipe):
    """As the codec gives it; inside, the source shows."""
    hw, random = SIZE, np.random.default_rng(4)
    reference, mask = random.integers(0, 256, (*hw, 3), dtype=np.uint8), box(SIZE, 9, 20, 5, 14)
    ours = [posed(seed, edit=Edit(reference, mask), joints=person(3, hw).joints, name="edit") for seed in (0, 1)]
    one, other = pipe.batch(ours, batch_size=1)
    codec = pipe.method.autoencoder
    kept = codec.decode({}, codec.encode_mean({}, reference[None].astype(np.float32) / 127.5 - 1))
    kept = np.clip(np.rint((np.asarray(kept[0]) + 1) * 127.5), 0, 255)
    outside = ~cells(mask, 8)
    assert outside.any() and np.abs(one - kept)[outside].max() <= 1
    assert levels_apart(one, other) > 1 and np.array_equal(one[outside], other[outside])


def test_what_is_said_once(pipe, caplog):
    for text in (request.UNREAD_POSE, request.NO_MAP_OF_HEAD, request.UNKNOWN_LABELS):
        request._say_once.cache_clear()
        with caplog.at_level(logging.WARNING):
            for seed in range(2):
                if text == request.UNREAD_POSE:
                    without_head(pipe).fit(posed(seed))
                elif text == request.NO_MAP_OF_HEAD:
                    pipe.run.fit(posed(seed, parsing=None))
                else:
                    request.fit_request(posed(seed), SIZE, head=True, labels="")
        assert [record.message for record in caplog.records].count(text) == 1
        caplog.clear()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_joints": None}, "give --source-pose=FILE"),
        ({"source_joints": np.zeros((18, 3))}, "no joint of the source's pose is visible"),
        ({"source_joints": np.zeros((17, 3))}, "a source's pose is [18 3]"),
        ({"source_frame_hw": (4, 3)}, "outside the source's pose's 4x3 frame"),
        ({"labels": "pascal7", "parsing": np.zeros((40, 30), np.uint8)}, "the model's atr18 have nothing for its Head"),
    ],
)
def test_requests_that_cannot_be(pipe, change, words):
    with pytest.raises(InputError) as caught:
        pipe.run.fit(posed(0, **change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def flags_of(inputs, out) -> list[str]:
    flags = [f"--workdir={head_run()}", f"--source={inputs / '0.png'}", f"--parsing={inputs / '0_map.png'}"]
    return [*flags, "--labels=atr18", f"--pose={inputs / '1.json'}", "--pose-frame=40x30", f"--out={out}"]


def test_one_picture_and_a_list(inputs, tmp_path, capsys, pipe, monkeypatch):
    out, sheet = tmp_path / "out.png", tmp_path / "sheet.png"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "of_run", None)  # before any model is loaded
        assert generate.main(flags_of(inputs, out)) == 2
        error = capsys.readouterr().err
        assert error.endswith("\n") and ("--source-pose" in error), (
            "nobody is found in blobs, and where there is no [pose] ..."
        )
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)
    titles = []
    monkeypatch.setattr(generate, "sheet", lambda columns: titles.extend(columns) or columns["carried"][0])
    own = f"--source-pose={inputs / '0.json'}"
    assert generate.main([*flags_of(inputs, out), own, f"--sheet={sheet}"]) == 0
    assert titles == ["source", "pose", "carried", "generated"]
    with Image.open(sheet) as carried, Image.open(out) as made:
        assert carried.size == made.size

    listed = tmp_path / "list.csv"
    row = f"{inputs}/0.png,{inputs}/0_map.png,{inputs}/1.json"
    listed.write_text(f"source,parsing,pose,out,source_pose\n{row},a.png,{inputs}/0.json\n{row},b.png,\n")
    many = [f"--workdir={head_run()}", f"--pairs={listed}", f"--out-dir={tmp_path / 'd'}", "--labels=atr18"]
    many += ["--pose-frame=40x30", "--batch-size=1"]
    assert generate.main(many) == 2
    assert "line 3: source_pose is empty" in capsys.readouterr().err
    with Image.open(tmp_path / "d" / "a.png") as listed_picture, Image.open(out) as made:
        assert levels_apart(np.asarray(listed_picture), np.asarray(made)) <= 1
    assert not (tmp_path / "d" / "b.png").exists()
    listed.write_text(f"source,parsing,pose,out\n{row},a.png\n")
    assert generate.main(many) == 2
    assert "lacks the column source_pose" in capsys.readouterr().err


def test_records_know_their_own_poses(pipe, tmp_path):
    root = built(tmp_path / "r", noise_set(train=1, test=2))
    row = record_rows(RecordImages(str(root), "test"), tmp_path, "cfld")[0]
    record = row.images.image(row.source)
    fitted = row.read(pipe.run, 0)
    np.testing.assert_allclose(fitted.source.joints[:, :2], record.joints[:, :2] * 0.8, atol=0.5)
    assert not row.read(without_head(pipe), 0).source.joints.any()


def test_labels_of_a_run_on_records(pipe, tmp_path):
    """The records say them, where they are at hand."""
    root = built(tmp_path / "r", noise_set(train=1, test=0))
    run = pipe.run
    data = replace(run.config.data, dataset="records", labels="", root=str(root))
    assert replace(run, config=replace(run.config, data=data)).labels == "atr18"
    gone = replace(data, root=str(tmp_path / "gone"))
    assert replace(run, config=replace(run.config, data=gone)).labels == ""
