"""Parity with the published packages themselves, at full size and on the same random weights (see packages.py)."""

import hashlib
import pathlib

import jax
import numpy as np
import pytest
import torch

from tests.metrics.packages import package
from tests.metrics.torch_networks import random_state
from truepose_jax.evaluate.weights import PUBLISHED, module_of, shapes_of
from truepose_jax.metrics import fid
from truepose_jax.pretrained.conversion import from_torch

pytestmark = pytest.mark.slow

HW = (256, 176)
WIDTH = 512
"""Of the features whose distance is compared: sqrtm of 2,048 takes minutes."""


def photos(seed, count=2):
    """Smooth, with noise: uint8 [n h w 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: HW[0], : HW[1]]
    waves = [127 + 100 * np.sin(x / rng.uniform(5, 40) + y / rng.uniform(5, 40)) for _ in range(3 * count)]
    images = np.stack(waves).reshape(count, 3, *HW).transpose(0, 2, 3, 1) + rng.normal(0, 8, (count, *HW, 3))
    return np.clip(images, 0, 255).astype(np.uint8)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32))


def ours(metric, state, *images):
    params = from_torch.load({k: v.numpy() for k, v in state.items()}, shapes_of(metric), PUBLISHED[metric].keys)
    module, _ = module_of(metric)
    return np.asarray(jax.jit(lambda p, *x: module.apply({"params": p}, *x))(params, *images))


def report(what, found, expected):
    worst = float(np.abs(found - expected).max())
    print(f"\nparity {what}: {worst:.2e} of {np.abs(expected).max():.4g} ({worst / np.abs(expected).max():.2e})")
    return worst / np.abs(expected).max()


def test_lpips():
    lpips = package("lpips")
    model = lpips.LPIPS(net="alex", pnet_rand=True, pretrained=False, verbose=False).eval()
    state = random_state("lpips", 5)
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    renamed = {
        (f"net.slice{slices[int(k.split('.')[1])]}.{k.split('.', 1)[1]}" if k.startswith("features") else k): v
        for k, v in state.items()
    }
    _, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    a, b = (photos(s) / np.float32(127.5) - 1 for s in (0, 1))
    with torch.no_grad():
        expected = model(nchw(a), nchw(b)).reshape(-1).numpy()
    assert report("lpips", ours("lpips", state, a, b), expected) < 2e-6


def test_hash_of_the_linear_layers():
    file = pathlib.Path(package("lpips").__file__).parent / "weights" / "v0.1" / "alex.pth"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in PUBLISHED["lpips"].files.values()
    assert set(torch.load(file, map_location="cpu", weights_only=True)) == {
        k for k in random_state("lpips", 0) if k.startswith("lin")
    }


@pytest.mark.parametrize("metric", ["fid", "clean_fid"])
def test_hashes_in_the_packages(metric):
    source = {"fid": "torchvision.models.inception", "clean_fid": "pytorch_fid.inception"}[metric]
    (digest,) = PUBLISHED[metric].files.values()
    assert f"-{digest}.pth" in pathlib.Path(package(source).__file__).read_text()
    assert "-7be5be79.pth" in pathlib.Path(package("torchvision.models.alexnet").__file__).read_text()


def test_torchvision_inception_as_the_field_feeds_it():
    models = package("torchvision.models")
    model = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    model.fc, model.AuxLogits = torch.nn.Identity(), None
    model.aux_logits = False
    state = random_state("fid", 6)
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    images = photos(2)
    x = torch.nn.functional.interpolate(nchw(images) / 255, (299, 299), mode="bilinear")
    with torch.no_grad():
        expected = model(x).numpy()  # transform_input is the affine
    found = ours("fid", state, np.stack([fid.legacy_input(i.astype(np.float32)) for i in images]))
    assert report("torchvision Inception-v3, legacy input", found, expected) < 2e-5


def test_pytorch_fid_inception_with_clean_fid_input():
    module = package("pytorch_fid.inception")
    state = random_state("clean_fid", 7)
    full = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    counters = {k.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for k in state if "running_mean" in k}
    module.load_state_dict_from_url = lambda *args, **kwargs: state | full | counters
    model = module.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    resize = package("cleanfid.resize").build_resizer("clean")
    images = photos(3)
    prepared = np.stack([resize(image) for image in images])
    x = np.stack([fid.clean_input(i.astype(np.float32)) for i in images])
    assert report("clean-fid's resize", x, (prepared - 128) / 128) < 1e-6
    with torch.no_grad():
        expected = model((nchw(prepared) - 128) / 128)[0].reshape(2, -1).numpy()
    assert report("pytorch-fid's Inception", ours("clean_fid", state, x), expected) < 2e-5


@pytest.mark.parametrize("count", [200, 2000])
def test_distance(count):
    """200 images are fewer than the 512 features; sqrtm of a singular product is what the packages take then."""
    score = package("pytorch_fid.fid_score")
    clean = package("cleanfid.fid")
    rng = np.random.default_rng(8)
    mix = rng.standard_normal((WIDTH, WIDTH)) * (np.arange(1, WIDTH + 1) ** -0.5)[:, None]
    sets = [rng.standard_normal((count, WIDTH)) @ mix + shift for shift in (0.0, 0.3)]
    found = []
    for rows in sets:
        statistics = fid.Statistics.empty(WIDTH)
        statistics.update(rows)
        found.append(statistics)
    moments = [m for s in found for m in (s.mean, s.covariance)]
    ours = fid.frechet_distance(*found)
    itself = fid.frechet_distance(found[0], found[0])
    print(f"\n{count} images: ours {ours:.6f}, of a set to itself {itself:.2e}")
    for name, function in (
        ("pytorch-fid", score.calculate_frechet_distance),
        ("clean-fid", clean.frechet_distance),
    ):
        expected = float(function(*moments))
        print(f"{name} {expected:.6f}, difference {abs(ours - expected):.2e}")
        assert ours == pytest.approx(expected, rel=1e-3 if count < WIDTH else 1e-7)
    assert abs(itself) < 1e-6 * ours
