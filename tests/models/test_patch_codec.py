"""The linear patch codec: its inverse, its fit, and files that are none."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from input_pipeline.synthetic.people import SyntheticPeople
from tests import tiny
from truepose_jax.config import Config, ConfigError, from_config_dict
from truepose_jax.models.patch_codec import PATCH, PatchAutoencoder, PatchBasis, fit, load
from truepose_jax.pretrained.frozen_networks import load_autoencoder

WHOLE = 3 * PATCH**2


def smooth_images(seed, count=6, h=32, w=24):
    """uint8 pictures whose neighbours are alike, as those of photos are."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, h // 8, w // 8, 3)).repeat(8, 1).repeat(8, 2)
    fine = rng.normal(0, 12, (count, h, w, 3))
    return np.clip(coarse + fine, 0, 255).astype(np.uint8)


def normalize_batch(images):
    return images.astype(np.float32) / 127.5 - 1


def write(path, basis):
    save_file(dict(zip(PatchBasis._fields, map(np.ascontiguousarray, basis), strict=True)), path)
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(a file of a basis, the images it was fitted on)."""
    images = smooth_images(0)
    return str(write(tmp_path_factory.mktemp("codec") / "basis.safetensors", fit(images))), images


@pytest.mark.parametrize("own", [False, True])
def test_all_components_lose_nothing(fitted, own):
    codec = PatchAutoencoder(WHOLE, fitted[0] if own else "")
    assert (codec.factor, codec.channels) == (8, 4 * WHOLE)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    latents = codec.encode_mean({}, images)
    assert latents.shape == (2, 2, 3, codec.channels)
    np.testing.assert_allclose(codec.decode({}, latents), images, atol=1e-4)
    np.testing.assert_array_equal(codec.encode_sample({}, images, None), latents)


def test_some_components_are_exact_in_their_span_and_lose_what_the_others_hold(fitted):
    """A second time nothing more is lost; the mean squared error is that of the components left out."""
    path, images = fitted
    codec, basis = PatchAutoencoder(20, path), load(path)[0]
    pictures = normalize_batch(images)
    once = np.asarray(codec.decode({}, codec.encode_mean({}, pictures)))
    np.testing.assert_allclose(codec.decode({}, codec.encode_mean({}, once)), once, atol=1e-5)
    left_out = np.sum(basis.deviations[20:].astype(np.float64) ** 2) / WHOLE
    assert np.mean((once - pictures) ** 2) == pytest.approx(left_out, rel=0.02) and left_out > 1e-4


def test_a_cell_holds_its_own_four_patches(fitted):
    """Latents against sums over pixels; four patches a cell, rows first."""
    path, images = fitted
    codec, basis = PatchAutoencoder(5, path), load(path)[0]
    pictures = normalize_batch(images[:1]).astype(np.float64)
    found = np.asarray(codec.encode_mean({}, pictures.astype(np.float32)))[0]
    patch = pictures[0, 12:16, 16:20].reshape(-1)  # of cell (1, 2), its lower left patch
    along = [(patch - basis.mean) @ basis.components[:, i] for i in range(5)]
    strength = np.sqrt(basis.deviations[:5].astype(np.float64))
    wanted = along / strength * np.sqrt(5 / np.sum(strength**2))
    np.testing.assert_allclose(found[1, 2].reshape(2, 2, 5)[1, 0], wanted, atol=1e-4)


def test_fit_gives_principal_components(fitted):
    """Orthonormal, the strongest first, with the patches' own spread along them."""
    path, images = fitted
    basis = load(path)[0]
    np.testing.assert_allclose(basis.components.T @ basis.components, np.eye(WHOLE), atol=1e-5)
    assert np.all(np.diff(basis.deviations) <= 0) and basis.deviations[0] > 5 * basis.deviations[-1]
    pictures = normalize_batch(images).astype(np.float64)
    patches = [
        picture[y : y + 4, x : x + 4].reshape(-1)
        for picture in pictures for y in range(0, 32, 4) for x in range(0, 24, 4)
    ]  # fmt: skip
    np.testing.assert_allclose(basis.mean, np.mean(patches, axis=0), atol=1e-5)
    along = (np.array(patches) - basis.mean) @ basis.components
    np.testing.assert_allclose(along.std(axis=0, ddof=1), basis.deviations, rtol=1e-3)
    spread = np.corrcoef(along, rowvar=False) - np.eye(WHOLE)
    assert np.abs(spread).max() < 1e-2
    np.testing.assert_array_equal(fit(images).components, basis.components)


@pytest.mark.parametrize("kept", [4, 24, WHOLE])
def test_latents_are_of_strength_1(fitted, kept):
    path, images = fitted
    latents = np.asarray(PatchAutoencoder(kept, path).encode_mean({}, normalize_batch(images)))
    assert np.mean(latents**2) == pytest.approx(1, rel=0.01)
    of_each = np.mean(latents.reshape(-1, kept) ** 2, axis=0)
    assert np.all(np.diff(of_each) < 0), "strong components stay stronger"


def test_the_one_that_comes_along_serves_people():
    """Its 24 components lose little of a rendered person, less than half of what 12 lose; in grey levels."""
    basis, _ = load()
    np.testing.assert_allclose(basis.components.T @ basis.components, np.eye(WHOLE), atol=1e-5)
    assert np.all(np.diff(basis.deviations) <= 0)
    people = SyntheticPeople(
        seed=0, split="heldout", identities=1, poses_per_identity=2, size=(64, 48), framing="close"
    )
    pictures = normalize_batch(np.stack([people.image(i).image for i in range(2)]))

    def lost(kept):
        codec = PatchAutoencoder(kept)
        return 127.5 * np.sqrt(np.mean((np.asarray(codec.decode({}, codec.encode_mean({}, pictures))) - pictures) ** 2))

    assert 0.1 < lost(24) < 8 and lost(24) < 0.5 * lost(12)


def test_fingerprint_tells_file_and_kept(fitted, tmp_path):
    other = str(write(tmp_path / "other.safetensors", fit(smooth_images(1))))
    found = {PatchAutoencoder(kept, path).fingerprint for kept in (20, 24) for path in ("", fitted[0], other)}
    assert len(found) == 6
    assert PatchAutoencoder(20, fitted[0]).fingerprint == PatchAutoencoder(20, fitted[0]).fingerprint


def broken_files(folder, basis):
    mean, components, deviations = basis
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("no tensors")
    write(folder / "shape", (mean, components[:, :40], deviations))
    write(folder / "nan", (mean, components, deviations * np.nan))
    save_file({"mean": mean, "components": components}, folder / "tensor missing")
    whole = write(folder / "whole", basis).read_bytes()
    (folder / "cut off").write_bytes(whole[:-100])
    return ("empty", "text", "shape", "nan", "tensor missing", "cut off")


def test_files_that_are_no_codec_are_one_line(fitted, tmp_path):
    def refusal(path):
        values = tiny.settings(tiny.HEAD)
        values.model.vae = str(path)
        with pytest.raises(ConfigError) as error:
            load_autoencoder(from_config_dict(Config, values).model)
        message = str(error.value)
        assert "\n" not in message and message.startswith(f"config.model.vae={path}"), message
        return message

    for name in broken_files(tmp_path, load(fitted[0])[0]):
        with pytest.raises(ValueError, match="no patch codec"):
            load(str(tmp_path / name))
        assert "no patch codec" in refusal(tmp_path / name)
    assert "No such file" in refusal(tmp_path / "missing")


def test_load_gives_the_codec_that_the_config_names(fitted):
    values = tiny.settings(tiny.HEAD)
    values.model.vae = fitted[0]
    codec, params, fingerprint = load_autoencoder(from_config_dict(Config, values).model)
    assert codec == PatchAutoencoder(values.model.patch_channels, fitted[0]) and params == {}
    assert fingerprint == codec.fingerprint
