"""`prepare annotate`, and training on what it stored: the same loss and gradients as from photos, up to half precision."""

import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.annotations.regions import region_crops
from input_pipeline.batches.loader import make_loader
from input_pipeline.records import annotate
from input_pipeline.records.annotate import annotations
from input_pipeline.records.check import check_records
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.schema import unpack_tokens
from input_pipeline.schema import InputError
from tests.records import built
from tests.tiny_run import random_like, tiny_config
from truepose_jax import convert, prepare, train
from truepose_jax.config import ConfigError
from truepose_jax.data import datasets
from truepose_jax.data.annotations import training_method
from truepose_jax.data.datasets import evaluation_set, layout_of, training_set
from truepose_jax.methods import make_method
from truepose_jax.models.vae import MomentsAutoencoder
from truepose_jax.pretrained import region_tokens
from truepose_jax.pretrained.conversion.export_configs import unet_config
from truepose_jax.pretrained.frozen_networks import files_sha256, load_autoencoder
from truepose_jax.pretrained.region_tokens import LazyEncoder
from truepose_jax.scaling import measure
from truepose_jax.training.init import batch_spec, resolve_init_from
from truepose_jax.training.step import normalize_batch

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from tests import torch_models  # noqa: E402

SIZE = (32, 24)


pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch_models.tiny_vae(root / "vae")
    torch_models.tiny_vae(root / "other_vae", seed=1)
    torch_models.tiny_clip(root / "clip")
    torch_models.tiny_clip(root / "other_clip", seed=1)
    return root


@pytest.fixture(scope="module")
def records(tmp_path_factory, models):
    root = built(tmp_path_factory.mktemp("records") / "r", shard_records=3)
    assert prepare.main(["annotate", str(root), f"--clip={models}/clip", f"--vae={models}/vae", "--size=32x24"]) == 0
    return root


def config_of(models, records, **changes):
    """A tiny TruePose on VAE latents that trains on the records."""
    values = {
        "model__autoencoder": "sd15", "model__vae": str(models / "vae"), "model__unet__in_channels": 4,
        "model__unet__out_channels": 4, "data__dataset": "records", "data__root": str(records), "data__flip": True,
        "data__latents": "stored", "batch_size": 4, "eval__pairs": 2, "eval__batch_size": 2, "eval__steps": 1,
        "eval__sheet_rows": 1, "data__threads": 1,
    }  # fmt: skip
    return tiny_config(**values | changes)


def test_records_hold_what_the_networks_make_of_photo_and_mirror(models, records):
    """Against transformers' CLIP and diffusers' VAE in torch."""
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(models / "clip").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(models / "vae").eval()
    images, labels = RecordImages(records, "train", size=SIZE), LABEL_SETS["atr18"]
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for index in (0, 4):
        record, fields = images.image(index), images.fields(index)
        assert fields["latents_size"].tolist() == list(SIZE)
        for kind in ("", "flipped_"):
            photo, parsing = record.image, record.parsing
            if kind:
                photo, parsing = photo[:, ::-1], labels.flipped[parsing[:, ::-1]]
            tokens, valid = unpack_tokens(fields[f"{kind}region_tokens"], fields[f"{kind}region_valid"])
            crops, wanted, _ = region_crops(np.ascontiguousarray(photo), parsing, labels, out=16)
            np.testing.assert_array_equal(valid, wanted)
            pixels = (crops[valid] / 255 - mean) / deviation
            with torch.no_grad():
                embeds = clip(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).image_embeds
                pixels = torch.tensor(photo.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
                posterior = vae.encode(pixels).latent_dist
            np.testing.assert_allclose(tokens[valid], embeds.numpy(), rtol=2e-3, atol=1e-3)
            stored = np.frombuffer(fields[f"{kind}latents"], np.float16).reshape(2, 4, 3, 4).astype(np.float32)
            for ours, theirs in zip(stored, (posterior.mean, posterior.logvar), strict=True):
                np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), rtol=2e-3, atol=2e-3)


def test_the_build_stays_whole(models, records, capsys):
    defects, facts = check_records(records)
    assert defects == [] and any("train" in fact for fact in facts)
    assert annotations(records).keys() == {"clip", "vae"}
    before = {path.name: path.read_bytes() for path in records.glob("noise-*")}
    assert prepare.main(["annotate", str(records), f"--clip={models}/clip", "--size=32x24"]) == 0
    assert "already" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in records.glob("noise-*")}


def test_a_stopped_run_goes_on_and_says_nothing_before_it_is_done(models, tmp_path, monkeypatch):
    whole, part = built(tmp_path / "whole", shard_records=3), built(tmp_path / "part", shard_records=3)
    flags = [f"--clip={models}/clip", "--size=32x24"]
    assert prepare.main(["annotate", str(whole), *flags]) == 0
    replaced = []

    def stop(path, *arguments, write=annotate.write_shard):
        if len(replaced) == 2:
            raise KeyboardInterrupt
        replaced.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(annotate, "write_shard", stop)
    assert prepare.main(["annotate", str(part), *flags]) == 130
    assert annotations(part) == {} and check_records(part)[0] == []
    first = {name: (part / name).stat().st_mtime_ns for name in replaced}
    monkeypatch.undo()
    assert prepare.main(["annotate", str(part), *flags]) == 0
    assert first == {name: (part / name).stat().st_mtime_ns for name in first}, "what was done is not done again"
    for path in whole.glob("*.array_record*"):
        assert path.read_bytes() == (part / path.name).read_bytes()
    assert annotations(part) == annotations(whole) and check_records(part)[0] == []
    assert prepare.main(["annotate", str(part), f"--clip={models}/other_clip", "--size=32x24"]) == 0
    assert annotations(part)["clip"] != annotations(whole)["clip"] and check_records(part)[0] == []


def test_loss_and_gradients_are_those_of_the_photos(models, records):
    config = config_of(models, records)
    autoencoder, params, fingerprint = load_autoencoder(config.model)
    images, encoder = RecordImages(records, "train", size=SIZE), LazyEncoder(config.model.clip, config.token_width)
    tokens = datasets.stored_tokens(config, images, encoder)[0]
    photos = make_method(config, autoencoder)
    stored = training_method(config, photos, images, autoencoder, {"autoencoder": fingerprint})
    trained = random_like(jax.eval_shape(lambda key: photos.init(key, batch_spec(config)), jax.random.key(0)), 3)
    keys, frozen = jax.random.split(jax.random.key(5), 4), {"autoencoder": params}
    batches = {}
    for form in ("uint8", "latents"):
        loader = make_loader(images, tokens, layout_of(config, form), seed=2, batch_size=4, flip=True, threads=0)
        batches[form] = normalize_batch(jax.tree.map(jnp.asarray, next(itertools.islice(loader, 1, None))))
    loss = jax.jit(lambda p, frozen, batch: photos.loss(p, frozen, batch, keys)[0])(trained, frozen, batches["uint8"])
    # No parameter lies before the autoencoder: with the moments that it makes of the photos, not rounded, the gradient is
    # that of the photos (the loss shows that they are the same), and only the network without it has to be compiled.
    encode = jax.jit(
        lambda images: jnp.concatenate(autoencoder.module.apply({"params": params}, images, method="encode"), -1)
    )
    exact = batches["latents"] | {part: encode(batches["uint8"][part]) for part in ("source", "target")}
    gradient = jax.jit(jax.value_and_grad(lambda p, batch: stored.loss(p, {}, batch, keys)[0]))
    exact_loss, exact_grads = gradient(trained, exact)
    stored_loss, stored_grads = gradient(trained, batches["latents"])
    assert np.isclose(loss, exact_loss, rtol=1e-5) and np.isclose(loss, stored_loss, rtol=1e-3) and loss > 0
    vector, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (exact_grads, stored_grads))
    assert 0 < np.linalg.norm(vector - other) < 3e-3 * np.linalg.norm(vector)  # not 0: stored in half precision


@pytest.mark.slow
def test_training_from_stored_latents_and_tokens_runs_neither_network(models, records, tmp_path, monkeypatch):
    config = config_of(models, records, total_steps=2, model__clip__path=str(models / "clip"))
    monkeypatch.setattr(region_tokens, "load_encoder", lambda folder: pytest.fail("CLIP was loaded"))
    assert train.train(config, str(tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["invalid"] for line in lines] == [0, 0] and all(np.isfinite(line["loss"]) for line in lines)
    frozen = json.loads((tmp_path / "metadata.json").read_text())["frozen"]
    said = annotations(records)
    assert frozen == {"autoencoder": said["vae"]["fingerprint"], "clip": said["clip"]["fingerprint"]}


def test_the_study_of_devices_trains_from_stored_latents_too(models, records, tmp_path, monkeypatch):
    """With the method of training, and no CLIP."""
    monkeypatch.setattr(region_tokens, "make_encoder", lambda *arguments: pytest.fail("CLIP was made"))

    class Made(Exception):
        pass

    def trainer(config, method):
        raise Made(method)

    monkeypatch.setattr(measure, "Trainer", trainer)
    with pytest.raises(Made) as made:
        measure.measure(config_of(models, records), devices=1, steps=1, cache=str(tmp_path))
    assert isinstance(made.value.args[0].autoencoder, MomentsAutoencoder)


def test_records_that_cannot_be_written_are_found_before_the_networks(models, tmp_path, refuses, monkeypatch):
    root = built(tmp_path / "r")
    shutil.rmtree(root / "build", ignore_errors=True)
    (root / "build").write_text("a file")
    monkeypatch.setattr(region_tokens, "load_encoder", lambda folder: pytest.fail("CLIP was loaded"))
    refuses("cannot be written", prepare.main, "annotate", root, f"--clip={models}/clip", "--size=32x24")
    with pytest.raises(InputError, match="cannot be written"):
        annotate.rewrite_records(root, {"x": {}}, lambda *arguments: [], size=SIZE)


def test_whose_tokens_serve(models, records, caplog):
    """Those of the config's CLIP, or of whichever where the config names none; else new ones are made, and it is said."""
    encoder = LazyEncoder(config_of(models, records).model.clip, 16)
    for path, stored in (("", True), (str(models / "clip"), True), (str(models / "other_clip"), False)):
        config = config_of(models, records, model__clip__path=path)
        encoder = LazyEncoder(config.model.clip, config.token_width)
        caplog.clear()
        sets = training_set(config, encoder, None), evaluation_set(config, encoder, None)
        for found in sets:
            assert isinstance(found.tokens, datasets.RecordTokens) == stored
            assert (found.clip == annotations(records)["clip"]["fingerprint"]) == stored
        assert ("another CLIP" in caplog.text) != stored
    wide = config_of(models, records, model__unet__cross_attention_dim=32)
    assert datasets.stored_tokens(wide, RecordImages(records, "train", size=SIZE), encoder) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__vae": "other_vae"}, "another VAE"),
        ({"model__size": (40, 24)}, "are of 32x24 pictures; config.model.size is 40x24"),
        ({"model__autoencoder": "pixels", "model__pixel_factor": 2}, "stored latents"),
        ({"data__dataset": "synthetic"}, "only dataset 'records'"),
    ],
)
def test_latents_that_do_not_serve(models, records, changes, words):
    if "model__vae" in changes:
        changes = {"model__vae": str(models / changes["model__vae"])}
    if changes.get("model__autoencoder") == "pixels":
        changes |= {"model__unet__in_channels": 12, "model__unet__out_channels": 12}
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        config = config_of(models, records, **changes)
        autoencoder, _, fingerprint = load_autoencoder(config.model)
        images = RecordImages(records, "train", size=config.model.size)
        training_method(config, make_method(config, autoencoder), images, autoencoder, {"autoencoder": fingerprint})
    assert "\n" not in str(error.value)


def test_what_was_made_with_the_originals_serves_their_converted_copies(models, records, tmp_path, caplog, capsys):
    """annotate by the folders of the hub (here in shards), convert, train from the weights folder: neither network runs
    again."""
    vae, clip = tmp_path / "sd/vae", tmp_path / "clip"
    diffusers.AutoencoderKL.from_pretrained(models / "vae").save_pretrained(vae, max_shard_size="20KB")
    of_hub = transformers.CLIPVisionModelWithProjection.from_pretrained(models / "clip")
    of_hub.save_pretrained(clip, max_shard_size="4KB")
    records = shutil.copytree(records, tmp_path / "records")
    capsys.readouterr()
    assert prepare.main(["annotate", str(records), f"--clip={clip}", f"--vae={vae}", "--size=32x24"]) == 0
    assert capsys.readouterr().out.count("already") == 2
    config = config_of(models, records)
    unet = diffusers.UNet2DConditionModel.from_config(unet_config(config.model))
    unet.save_pretrained(tmp_path / "sd/unet")
    diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_end=0.012).save_pretrained(tmp_path / "sd/scheduler")
    weights = tmp_path / "weights"
    flags = [f"--src={tmp_path / 'sd'}", f"--clip={clip}", f"--dst={weights}"]
    assert convert.main(["from-torch", "--model=sd15", *flags]) == 0
    assert files_sha256(weights / "vae") != files_sha256(vae), "other files"
    assert files_sha256(weights / "image_encoder") != files_sha256(clip)

    config = resolve_init_from(config_of(models, records, init_from=str(weights), model__vae=""))
    assert config.model.vae == config.model.clip.path == str(weights)
    autoencoder, _, fingerprint = load_autoencoder(config.model)
    images, encoder = RecordImages(records, "train", size=SIZE), LazyEncoder(config.model.clip, config.token_width)
    assert isinstance(training_set(config, encoder, None).tokens, datasets.RecordTokens)
    training_method(config, make_method(config, autoencoder), images, autoencoder, {"autoencoder": fingerprint})
    assert "do not serve" not in caplog.text


def test_records_without_latents(models, tmp_path):
    root = built(tmp_path / "plain")
    config = config_of(models, root)
    autoencoder, _, fingerprint = load_autoencoder(config.model)
    with pytest.raises(ConfigError, match="has no latents; make them by `prepare annotate"):
        training_method(config, None, RecordImages(root, "train", size=SIZE), autoencoder, fingerprint)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do"),
        (["--clip={models}/vae", "--size=32x24"], "they are an autoencoder"),
        (["--vae={models}/clip", "--size=32x24"], "4 latent channels at 1/1 of the size"),
        (["--vae=/nowhere", "--size=32x24"], "no such folder"),
        (["--vae={models}/vae", "--size=30x24"], "divisible by 8"),
        (["--vae={models}/vae"], "--size=HxW"),
        (["--vae={models}/vae", "--size=32x24", "--batch-size=0"], "--batch-size"),
    ],
)
def test_bad_flags_are_one_line(models, records, refuses, flags, words):
    refuses(words, prepare.main, "annotate", records, *(flag.format(models=models) for flag in flags))
    refuses("not a finished build", prepare.main, "annotate", models, "--clip=x")


def test_base_config_has_the_keys():
    assert base.get_config().data.latents == "off" and base.get_config().data.max_invalid > 0


def test_too_many_unreadable_examples_stop_the_run(tmp_path):
    from truepose_jax.training.run_log import INVALID_WINDOW, Monitor

    def run(invalid, share):
        settings = {"total_steps": 1000, "start_step": 0, "log_every": 100, "is_writer": False, "max_invalid": share}
        with Monitor(tmp_path, **settings) as monitor:
            for step in range(1, INVALID_WINDOW + 50):
                monitor.step(step, {"loss": np.float32(1), "valid": np.float32(10 - invalid(step))}, 10)

    run(lambda step: int(step % 20 == 0), 0.005)
    with pytest.raises(ConfigError, match=r"max_invalid 0\.01 allows 20 in 200") as error:
        run(lambda step: 1, 0.01)
    assert str(error.value).startswith("step 21: 21 examples of the last 21 steps")
    with pytest.raises(ConfigError, match="step 1:"):
        run(lambda step: 10, 0.004)
    assert issubclass(InputError, ValueError)
