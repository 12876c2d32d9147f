"""The attention study: masses against NumPy written from the equations, densities, baselines, labels, files, bad input."""

import csv
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from input_pipeline.annotations.parsing import label_set
from input_pipeline.schema import InputError
from tests import tiny_methods
from tests.models.test_masks import brute_force, brute_force_mask
from tests.process import code_of
from tests.shared_data import shared_data, write_folder
from tests.tiny_run import SIZE, random_like, tiny_config
from truepose_jax import study
from truepose_jax.inference.pipeline import Pipeline, Run, fit_request
from truepose_jax.pretrained.factory import assemble
from truepose_jax.pretrained.region_tokens import make_encoder
from truepose_jax.runtime.sharding import make_mesh, path_of
from truepose_jax.sampling.image_grid import to_uint8
from truepose_jax.study import attention, baselines, model, table
from truepose_jax.study.ours import Watcher
from truepose_jax.study.regions import densities, grid_coverage, membership, region_classes
from truepose_jax.study.samples import read_samples
from truepose_jax.training.init import batch_spec

STEPS, GUIDANCE = 2, 2.0


pytestmark = pytest.mark.usefixtures("started_quickly")


@functools.cache
def pipeline() -> Pipeline:
    """Two transformer blocks, every parameter random; queries of a gain at which attention is far from uniform."""
    config = tiny_config(model__unet__up_block_types=("CrossAttnUpBlock2D",))
    encoder = make_encoder(config.model.clip, config.token_width)
    method, frozen, _, _ = assemble(config, encoder)
    shapes = jax.eval_shape(lambda key: method.init(key, batch_spec(config)), jax.random.key(0))

    def louder(path, x):
        name = path_of(path)
        return 10 * x if name.endswith(("to_q/kernel", "to_k/kernel")) else x

    params = jax.tree_util.tree_map_with_path(louder, random_like(shapes, 1))
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.local_devices())
    return Pipeline(Run("tiny", config, None, 0, "raw"), method, params, frozen, encoder, mesh)


@functools.cache
def watcher() -> Watcher:
    return Watcher(pipeline(), steps=STEPS, guidance=GUIDANCE)


@pytest.fixture(scope="module")
def watched():
    """(pipeline, fitted samples, their batch and keys, what the study saw of them)."""
    pipe = pipeline()
    samples, labels = read_samples("synthetic", pipe.run.config, 2)
    fitted = [fit_request(sample.request(labels, 0), SIZE) for sample in samples]
    batch, keys = pipe.batch_of(fitted, 2)
    return pipe, fitted, batch, keys, watcher().watch(batch, keys)


@pytest.fixture
def opened(monkeypatch):
    """The program opens this model in place of a run's checkpoint."""
    monkeypatch.setattr(Run, "open", lambda workdir, **_: pipeline().run)
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipeline())
    monkeypatch.setattr(attention, "Watcher", lambda *_, **__: watcher())  # compiled before


def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def heads_of(x, heads):
    """[n c] -> [heads n d]"""
    return np.asarray(x, np.float64).reshape(len(x), heads, -1).swapaxes(0, 1)


def test_masses_are_those_of_the_equations(watched):
    """Every layer and photo: Eq. 6 entry by entry and Eq. 8 in NumPy, from parameters and hidden states that flax's own
    capture gives."""
    pipe, fitted, batch, keys, seen = watched
    method, params, config = pipe.method, pipe.params, pipe.run.config
    parsing = np.stack([f.source.parsing for f in fitted])
    noise = np.stack([jax.random.normal(key, method.latent_spec(SIZE)) for key in keys])

    def states(params, batch, x):
        """Norm outputs: F' of SourceNet, and TargetNet's normed hidden states before Eq. 8."""
        latents = method.autoencoder.encode_mean(None, batch["source"])
        zero = np.zeros(len(noise), np.int32)
        _, taps = method.source_net.apply(
            {"params": params["source_net"]}, latents, zero, batch["region_tokens"][:, -1:], after_conv_in=None
        )[0:2]
        conditioning = method.condition(params, {}, batch)
        t = np.full(len(noise), 501, np.int32)
        _, kept = method.target_net.apply(
            {"params": params["target_net"]}, x, t, None, features=conditioning.sites, after_conv_in=conditioning.pose,
            capture_intermediates=lambda module, _: module.name == "norm" and module.path[-2] == "hpfa",
            mutable=["intermediates"],
        )  # fmt: skip
        return taps, kept["intermediates"]

    assert seen.timesteps.tolist() == [501, 1]
    taps, normed = jax.device_get(jax.jit(states)(params, batch, noise))
    masks = masks_of(parsing, batch["class_on"])
    sites = config.model.unet.sites
    assert list(seen.before) == [site.name for site in sites] and len(sites) == 2
    for site in sites:
        fusion = params["fusion"][site.name]["hpfa"]
        where = params["target_net"]
        inside = normed
        block, rest = site.name.split("_attentions_")
        attention, transformer = rest.split("_transformer_blocks_")
        for part in (block, f"attentions_{attention}", f"transformer_blocks_{transformer}", "hpfa"):
            where, inside = where[part], inside[part]
        for i in range(len(fitted)):
            f = np.asarray(taps[site.name][i], np.float64)
            q, k, v = (
                heads_of(f @ np.asarray(fusion[f"source_to_{x}"]["kernel"], np.float64), site.heads) for x in "qkv"
            )
            a = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
            m = np.broadcast_to(masks[i], a.shape)
            weight = np.select([(a > 0) & m, (a <= 0) & m, (a > 0) & ~m], [1.6, 0.6, 0.3], 1.3)
            after = softmax(a * weight)
            np.testing.assert_allclose(seen.before[site.name][i], softmax(a).mean((0, 1)), rtol=2e-4, atol=1e-7)
            np.testing.assert_allclose(seen.after[site.name][i], after.mean((0, 1)), rtol=2e-4, atol=1e-7)
            fused = (after @ v).swapaxes(0, 1).reshape(len(f), -1)
            keys_h = heads_of(fused @ np.asarray(fusion["to_k"]["kernel"], np.float64), site.heads)
            x = np.asarray(inside["norm"]["__call__"][0][i], np.float64)
            queries = heads_of(x @ np.asarray(where["to_q"]["kernel"], np.float64), site.heads)
            target = softmax(queries @ keys_h.swapaxes(1, 2) / np.sqrt(q.shape[-1])).mean((0, 1))
            np.testing.assert_allclose(seen.target[site.name][0, i], target, rtol=5e-4, atol=1e-6)
            np.testing.assert_allclose(seen.through[site.name][0, i], target @ after.mean(0), rtol=5e-4, atol=1e-6)
        assert np.abs(seen.before[site.name] - seen.after[site.name]).max() > 1e-3
        assert np.abs(np.diff(seen.target[site.name], axis=0)).max() > 1e-3, "it changes with t"
    for masses in (seen.before, seen.after, seen.target, seen.through):
        for mass in masses.values():
            np.testing.assert_allclose(mass.sum(axis=-1), 1.0, atol=1e-5)


def masks_of(parsing, class_on):
    """M of the latent's level, [photos n], by the loops of test_masks."""
    found = []
    for each, on in zip(parsing, class_on, strict=True):
        cells = brute_force(each, 4)  # with 18 classes, of the batch's 20
        found.append(brute_force_mask(cells.reshape(-1, cells.shape[-1]), on[: cells.shape[-1]]))
    return found


@pytest.mark.slow
def test_what_is_watched_is_what_is_sampled(watched):
    """The latents at the end are those of the pipeline's one scan."""
    pipe, fitted, _, _, seen = watched
    pictures = pipe.sample(fitted, steps=STEPS, guidance=GUIDANCE)
    decoded = to_uint8(np.asarray(pipe.method.decode({}, seen.latents)))
    for made, f, picture in zip(decoded, fitted, pictures, strict=True):
        assert np.abs(f.framing.crop(made).astype(int) - picture).max() <= 1


def test_density_cancels_size():
    coverage = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]], np.float32)
    uniform = np.full(4, 0.25)
    np.testing.assert_allclose(densities(uniform, coverage), [1, 1, 1])
    np.testing.assert_allclose(densities(np.array([1.0, 0, 0, 0]), coverage), [1 / 0.375, 0, 0])
    absent = densities(uniform, coverage * [1, 1, 0])
    assert np.isnan(absent[2]) and absent[0] == 1
    values = np.array([[2.0, 1.0, 0.5], [4.0, np.nan, 0.5], [3.0, np.nan, 0.5]])
    head, clothes, rest = table.rows_of("m", "x", "mean", "", values)
    assert (head.density, head.photos, clothes.photos, clothes.sem, rest.sem) == (3.0, 3, 1, None, 0.0)
    assert head.sem == pytest.approx(1 / np.sqrt(3))


def test_regions_of_the_label_sets():
    for name in ("atr18", "lip20", "cihp20"):
        classes = region_classes(label_set(name))
        assert sum(len(c) for c in classes.values()) == len(label_set(name)) and "Background" in classes["rest"]
        assert {"Face", "Hair", "Hat", "Sunglasses"} == set(classes["head"])
        assert {"Upper-clothes", "Scarf", "Left-shoe"} <= set(classes["clothes"]) and "Left-arm" in classes["rest"]
    for name in ("pascal7", "whole"):
        with pytest.raises(InputError, match="heads and garments"):
            membership(label_set(name))
    parsing = np.array([[2, 2, 4, 4], [2, 2, 0, 4]], np.uint8)  # hair, upper-clothes
    np.testing.assert_allclose(grid_coverage(parsing, label_set("atr18"), (1, 2), 4), [[1, 0, 0], [0, 0.75, 0.25]])


# ------------------------------------------------------------------------------------------------ baselines


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Small random ones in transformers' format, as their authors publish theirs."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(intermediate_size=32, projection_dim=8, image_size=24, patch_size=8, **common)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip")
    dino = transformers.Dinov2Config(image_size=70, patch_size=14, **common)
    transformers.Dinov2Model(dino).save_pretrained(root / "dino")
    registers = transformers.Dinov2WithRegistersConfig(image_size=42, patch_size=14, num_register_tokens=3, **common)
    transformers.Dinov2WithRegistersModel(registers).save_pretrained(root / "registers")
    for name, side in (("clip", 24), ("dino", 42), ("registers", 42)):
        size = {"height": side, "width": side}
        transformers.CLIPImageProcessorPil(crop_size=size).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(("flag", "name"), [("clip", "clip"), ("dino", "dino"), ("dino", "registers")])
def test_baselines_are_the_last_layers_cls_attention(encoders, flag, name):
    """Against Q and K of the last block, taken by hooks."""
    encoder = baselines.load_baseline(flag, str(encoders / name))
    assert encoder.untrained and len(encoder.sha256) == 64 and encoder.grid == (3, 3)
    kept = {}

    def keep(module_name):
        return lambda module, inputs, output: kept.__setitem__(module_name, output)

    last = {"clip": "encoder.layers.1.self_attn.{}_proj", "dino": "encoder.layer.1.attention.{}_proj"}[flag]
    for word in "qk":
        encoder.model.get_submodule(last.format(word)).register_forward_hook(keep(word))
    photo = np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8)
    mass = encoder.mass(photo)
    q, k = (kept[word][0].detach().double().numpy().reshape(-1, 2, 8) for word in "qk")
    weights = np.mean([softmax(q[0, g] @ k[:, g].T / np.sqrt(8)) for g in range(2)], axis=0)
    skip = 4 if name == "registers" else 1
    on_patches = weights[skip:] / weights[skip:].sum()
    assert mass.shape == (9,)
    np.testing.assert_allclose(mass, on_patches, rtol=1e-4)
    assert mass.std() > 1e-4
    with torch.no_grad():
        next(p for n, p in encoder.model.named_parameters() if "norm" in n and n.endswith("weight"))[0] += 0.01
    assert not baselines._untrained(encoder.model)


def test_models_that_were_never_trained_are_known():
    params = jax.device_get(pipeline().params)
    assert model.untrained(params) == ""

    def changed(change):
        return jax.tree_util.tree_map_with_path(lambda path, x: change(jax.tree_util.keystr(path), x), params)

    assert "scale" in model.untrained(changed(lambda path, x: np.ones_like(x) if "scale" in path else x))
    assert "zero" in model.untrained(changed(lambda path, x: 0 * x if "to_out_0" in path and "hpfa" in path else x))


# ------------------------------------------------------------------------------------------------ the program


def run(*flags, command: str = "attention") -> int:
    return code_of(study.main, command, *flags)


def test_the_program_writes_its_files_and_says_what_is_untrained(encoders, tmp_path, capsys, opened):
    out = tmp_path / "out"
    flags = ["--workdir=run", f"--out={out}", "--count=3", "--batch-size=2"]
    flags += [f"--clip={encoders / 'clip'}", f"--dino={encoders / 'dino'}"]
    assert run(*flags) == 0, capsys.readouterr().err
    files = {"attention.csv", "attention.json", "report.md", "bars.png", "layers.png", "over_t.png", "overlays.png"}
    assert {path.name for path in out.iterdir()} == files
    found = json.loads((out / "attention.json").read_text())
    assert set(found["untrained"]) == {"CLIP", "DINOv2"} and found["photos"] == 3
    report = " ".join((out / "report.md").read_text().split())
    assert "**CLIP is UNTRAINED**" in report and "TruePose is UNTRAINED" not in report and "t = 0" in report
    with (out / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"])
    kinds = {(row["model"], row["map"]) for row in rows}
    assert kinds == {("TruePose", name) for name in table.MAPS} | {("CLIP", table.LAST), ("DINOv2", table.LAST)}
    steps = {row["t"] for row in rows if row["map"] == table.TARGET}
    assert steps == {"501", "1", "mean"} and {row["t"] for row in rows if row["map"] == table.AFTER} == {""}
    # Whatever the attention, weighed by the shares of a photo's regions the densities make 1.
    assert all(0 < float(row["density"]) < 20 for row in rows)
    assert run(*flags) == 2 and "holds a study already" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(encoders, tmp_path, capsys, monkeypatch, opened, refuses):
    monkeypatch.setattr(Pipeline, "of_run", None)  # before any long work
    photos = write_folder(tmp_path / "photos", ["a", "b"])
    workdir = "--workdir=run"
    cases = [
        ([], "one of the arguments --workdir --weights is required"),
        (["--weights=/absent"], "no weights folder"),
        ([workdir, "--count=0"], "--count is 0"),
        ([workdir, "--size=32x24"], "--size means nothing to --workdir; it is for --weights"),
        (["--weights=/absent", "--step=3"], "--step means nothing to --weights; it is for --workdir"),
        (["--weights=/absent", "--kind=raw"], "--kind means nothing to --weights"),
        ([workdir, "--labels=atr18"], "--labels means nothing to --data=synthetic; it is for --data=PHOTOS"),
        ([workdir, "--split=test"], "--split means nothing to --data=synthetic; it is for --data=RECORDS"),
        ([workdir, "--keypoints=x.csv"], "--keypoints means nothing"),
        ([workdir, "--pose-frame=32x24"], "--pose-frame means nothing"),
        ([workdir, f"--data={photos}", "--labels=atr18", "--split=test"], "--split means nothing"),
        ([workdir, "--batch-size=0"], "--batch-size is 0"),
        ([workdir, "--steps=0"], "steps is 0"),
        ([workdir, "--data=/absent", "--labels=atr18"], "no such folder"),
        ([workdir, f"--data={photos}"], "--labels=atr18|"),
        ([workdir, f"--data={photos}", "--labels=pascal7"], "heads and garments"),
        ([workdir, f"--data={photos}", "--labels=atr"], "unknown label set"),
        ([workdir, "--clip=/absent"], "/absent/config.json: cannot read"),
        ([workdir, f"--clip={encoders / 'dino'}"], "holds a model of type 'dinov2'; give one of CLIP"),
    ]
    for flags, words in cases:
        refuses(words, study.main, "attention", *flags, f"--out={tmp_path / 'out'}")
    assert run(workdir, f"--out={photos / 'image' / 'a.png'}") == 2
    assert "cannot make this folder" in capsys.readouterr().err
    monkeypatch.setattr(attention.plots.importlib.util, "find_spec", lambda name: None)
    assert run(workdir, f"--out={tmp_path / 'out'}") == 2
    assert "pip install -e '.[scaling]'" in capsys.readouterr().err


def test_style_asks_for_the_next_persons_garments(tmp_path, capsys, monkeypatch, opened):
    """What is asked of the pipeline and drawn; that the rest of the picture is kept is test_editing's."""
    asked = []

    def batch(self, requests, *, steps, guidance):
        asked.append(requests)
        return [np.full_like(r.source, 10 * len(asked)) for r in requests]

    monkeypatch.setattr(Pipeline, "batch", batch)
    out, flags = tmp_path / "style.png", ("--workdir=run", "--count=2", "--classes=upper-clothes,Dress,Pants,Skirt")
    assert run(*flags, f"--out={out}", command="style") == 0, capsys.readouterr().err
    people, labels = read_samples("synthetic", tiny_config(), 4)
    garments = [labels.classes.index(name) for name in ("Upper-clothes", "Dress", "Pants", "Skirt")]
    for i, (plain, edited) in enumerate(zip(*asked, strict=True)):
        style, reference = people[2 * i : 2 * i + 2]
        assert plain.edit is None and dataclasses.replace(edited, edit=None) == plain
        np.testing.assert_array_equal(plain.source, style.photo)
        np.testing.assert_array_equal(plain.joints, reference.own_joints)
        np.testing.assert_array_equal(edited.edit.reference, reference.photo)
        grown = np.pad(np.isin(reference.parsing, garments), 1)  # by the pixel around it
        windows = np.lib.stride_tricks.sliding_window_view(grown, (3, 3))
        np.testing.assert_array_equal(edited.edit.mask, windows.any(axis=(2, 3)))
        assert edited.edit.outside == "pasted"
    assert {10, 20} <= set(np.asarray(Image.open(out)).ravel().tolist())
    assert run(*flags, f"--out={out}", command="style") == 2 and "is there already" in capsys.readouterr().err


def test_bad_input_of_style(tmp_path, refuses, monkeypatch, opened):
    monkeypatch.setattr(Pipeline, "of_run", None)  # before any long work
    for flag, words in [
        ("--count=0", "--count is 0"),
        ("--classes=Cape", "has no class 'Cape'"),
        ("--classes=Scarf", "wears none of them"),
        ("--steps=0", "steps is 0"),
        (f"--out={tmp_path / 'style.jpg'}", "does not end in .png"),
    ]:
        refuses(words, study.main, "style", "--workdir=run", "--count=2", f"--out={tmp_path / 'style.png'}", flag)


def test_samples_of_real_photos():
    """Every photo once, in the pose of the next; synthetic people from a pose into another."""
    samples, labels = read_samples(str(shared_data("zalora_parsed")), tiny_config(), 50, labels="cihp20")
    assert len(samples) == 13 and labels.name == "cihp20" and len({s.name for s in samples}) == 13
    for sample, after in zip(samples, [*samples[1:], samples[0]], strict=True):
        assert sample.photo.shape == (512, 320, 3) and sample.parsing.shape == sample.frame_hw == (512, 320)
        assert not np.array_equal(sample.joints, after.joints)
    people, _ = read_samples("synthetic", tiny_config(), 3)
    assert dataclasses.astuple(people[0])[0] != people[1].name and people[0].photo.shape == (*SIZE, 3)


def test_other_methods_are_refused():
    with pytest.raises(InputError, match="the studies look into TruePose; this model's method is 'fpdm'"):
        read_samples("synthetic", tiny_methods.config("fpdm"), 2)
