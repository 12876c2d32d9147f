"""The `prepare codec` program: a codec of one's own photos that a run reads, and one line for what does not serve."""

import numpy as np
import pytest
from PIL import Image

from tests.tiny_run import tiny_config
from truepose_jax import prepare
from truepose_jax.pretrained.frozen_networks import load_autoencoder


@pytest.fixture
def photos(tmp_path):
    """Smooth photos, of sizes that patches do not fill, one of them in a folder of its own."""
    random = np.random.default_rng(0)
    for name, hw in (("a.png", (45, 33)), ("in/b.JPG", (64, 48)), ("c.png", (50, 70))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        low = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        low.resize(hw[::-1], Image.Resampling.BICUBIC).save(path, format="JPEG" if name.endswith("JPG") else None)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    return tmp_path / "photos"


def test_a_codec_of_photos(photos, tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    assert prepare.main(["codec", f"--images={photos}", f"--out={out}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "484 patches in 3 of 3 photos" in said[0], said
    psnrs = [float(line.split()[-2]) for line in said[1:]]
    assert len(psnrs) == 8 and psnrs == sorted(psnrs) and psnrs[0] > 25 and psnrs[-1] > 90
    unet = {"model__unet__in_channels": 48, "model__unet__out_channels": 48}
    config = tiny_config(model__autoencoder="patches", model__patch_channels=12, model__vae=str(out), **unet)
    codec, _, fingerprint = load_autoencoder(config.model)
    assert fingerprint.startswith("patches-12-") and codec.path == str(out)
    with Image.open(photos / "a.png") as image:
        pixels = np.asarray(image, np.float32)[None, :40, :32] / 127.5 - 1
    apart = np.square(np.asarray(codec.decode({}, codec.encode_mean({}, pixels))) - pixels).mean()
    assert 10 * np.log10(4 / apart) > psnrs[1] - 3
    # At the size of training, fewer photos: without the padding that would fit them to it.
    other = tmp_path / "other.safetensors"
    flags = ["codec", f"--images={photos}", "--size=160x96", "--count=2", f"--out={other}"]
    assert prepare.main(flags) == 0
    assert "800 patches in 2 of 3 photos" in capsys.readouterr().out and other.is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images=/absent"], "no such folder"),
        (["--images=EMPTY"], "holds no photos"),
        (["--out=TAKEN"], "is there already"),
        (["--out=codec.bin"], "ends in .safetensors"),
        (["--out=/absent/codec.safetensors"], "there is no folder /absent"),
        (["--count=0"], "--count is 0"),
        (["--size=16x12"], "patches in 3 photos; 480 are needed"),
        (["--images=BROKEN"], "cut.png: not a readable image"),
        (["--images=SMALL"], "3x9 pixels; a patch has 4x4"),
    ],
)
def test_what_does_not_serve(photos, tmp_path, refuses, flags, words):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    for name in ("EMPTY", "BROKEN", "SMALL"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "cut.png").write_bytes((photos / "a.png").read_bytes()[:100])
    Image.fromarray(np.zeros((3, 9, 3), np.uint8)).save(tmp_path / "SMALL" / "a.png")
    places = {"EMPTY": tmp_path / "EMPTY", "BROKEN": tmp_path / "BROKEN", "SMALL": tmp_path / "SMALL", "TAKEN": taken}
    for name, place in places.items():
        flags = [flag.replace(name, str(place)) for flag in flags]
    out = tmp_path / "new.safetensors"
    refuses(words, prepare.main, "codec", f"--images={photos}", f"--out={out}", *flags)
    assert not out.exists()
