"""The evaluation program on folders: pairing, protocols, the report, stops, and everything that is refused."""

import json
import pathlib

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from input_pipeline.schema import InputError
from input_pipeline.sources.folder import read_pairs
from tests.metrics.torch_networks import save_weights
from truepose_jax.evaluate import pairing, scores, statistics
from truepose_jax.evaluate.__main__ import main
from truepose_jax.evaluate.protocols import PROTOCOLS
from truepose_jax.metrics.psnr import psnr

HW = (64, 56)
FASHION = "fashionWOMENBlouses_Shirtsid0000337203_3back"
FASHION_SOURCE = "fashionWOMENBlouses_Shirtsid0000337203_2side"
CANONICAL = "WOMEN/Blouses_Shirts/id_00003372/03_3_back"


def picture(seed, hw=HW):
    """Broad waves with a little noise: uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    waves = [127 + 100 * np.sin(x / rng.uniform(4, 20) + y / rng.uniform(4, 20)) for _ in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 5, (*hw, 3)), 0, 255).astype(np.uint8)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def read_text(path):
    return pathlib.Path(path).read_text()


def folder(root, names, *, hw=HW, offset=0):
    for i, name in enumerate(names):
        write(root / name, picture(i + offset, hw))
    return root


NAMES = [f"p{i}.png" for i in range(5)]


def run(tmp_path, *extra, generated=None, reference=None, protocol="plain", out="report.json"):
    generated, reference = generated or tmp_path / "generated", reference or tmp_path / "reference"
    file = tmp_path / out
    flags = [f"--generated={generated}", f"--reference={reference}", f"--protocol={protocol}", f"--out={file}"]
    code = main([*flags, *map(str, extra)])
    return code, json.loads(file.read_text()) if file.exists() and not code else None


def refusal(capsys, *args, **kwargs):
    """The one line that a refused call prints, besides its progress."""
    code, _ = run(*args, **kwargs)
    text = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("pairs: ")]
    assert code == 2 and len(text) == 1 and text[0].startswith("error: "), text
    return text[0]


# --------------------------------------------------------------------------------------------- pairing


def pair(root, generated, references, wanted=None):
    folders = [pairing.Folder(root, tuple(sorted(names))) for names in (generated, references)]
    return pairing.pair_folders(*folders, wanted)


@pytest.mark.parametrize(
    ("generated", "reference", "rule"),
    [
        ("a/b.png", "a/b.jpg", "same name"),
        ("03_2_side.png", "03_2_side.jpg", "same name"),
        (f"{FASHION}.png", f"{CANONICAL}.jpg", "same name"),
        (f"{CANONICAL}.png", f"{FASHION}.png", "same name"),
        (f"{FASHION_SOURCE}_2_{FASHION}_vis.png", f"{CANONICAL}.jpg", "SOURCE_2_TARGET"),
        (f"{FASHION_SOURCE}.jpg_2_{FASHION}.jpg_vis.png", f"deep{FASHION}.png", "SOURCE_2_TARGET"),
        (f"{FASHION_SOURCE}_to_{FASHION}.png", f"{CANONICAL}.jpg", "SOURCE_to_TARGET"),
        (f"{FASHION_SOURCE}.jpg___{FASHION}.jpg_vis.png", f"{FASHION}.jpg", "SOURCE___TARGET"),
        ("anna_2_03_2_side_vis.png", "x/03_2_side.png", "SOURCE_2_TARGET"),
    ],
)
def test_names(tmp_path, generated, reference, rule):
    found = pair(tmp_path, [generated], [reference, "other.png"])
    assert found.pairs == (pairing.Pair(generated, reference, rule),)
    assert found.missing == ("other.png",) and not found.unmatched


def test_names_that_mean_nothing_here(tmp_path):
    found = pair(tmp_path, ["q.png", "a_2_z.png", "p1.png"], NAMES[:2])
    assert [p.reference for p in found.pairs] == ["p1.png"]
    assert found.unmatched == ("a_2_z.png", "q.png") and found.missing == ("p0.png",)
    with pytest.raises(InputError, match=r"2 images \(a_2_z.png, q.png\)"):
        found.check(allow_missing=False)
    found.check(allow_missing=True)


@pytest.mark.parametrize("beside", ["parsing", "keypoints"])
def test_a_folder_laid_out_for_training_is_its_photos(tmp_path, beside):
    """photos/image beside photos/parsing or keypoints, all of which hold pictures; without these it is any folder."""
    root = tmp_path / "photos"
    folder(root / "image", ["anna/1.png", "bob.png"])
    assert pairing.Folder.read(str(root), flag="--x").names == ("image/anna/1.png", "image/bob.png")
    folder(root / beside, ["anna/1.png", "bob.png"])
    found = pairing.Folder.read(str(root), flag="--reference")
    assert found.names == ("anna/1.png", "bob.png") and found.path("bob.png") == root / "image/bob.png"
    maps = pairing.Folder.read(str(root), flag="--parsing", maps=True)
    assert maps.root == root / ("parsing" if beside == "parsing" else "image")
    code, report = run(tmp_path, "--allow-missing", generated=folder(tmp_path / "out", ["bob.png"]), reference=root)
    assert (
        code == 0
        and report["pairs"]["by_rule"] == {"same name": 1}
        and report["reference"]["folder"] == f"{root}/image"
    )
    with pytest.raises(InputError, match=r"by --pairs=CSV"):
        pairing.pair_folders(pairing.Folder(tmp_path, ("bob.png",)), found).check(allow_missing=False)


def test_the_longest_target_and_no_namesake_from_another_folder(tmp_path):
    """A separator inside a name parts no pair, and anna/1 and bob/1 are two people."""
    (found,) = pair(tmp_path, ["anna_to_03_2_side.png"], ["side.png", "03_2_side.png"]).pairs
    assert (found.reference, found.rule, found.source) == ("03_2_side.png", "SOURCE_to_TARGET", "anna")
    source = "WOMEN/Blouses_Shirts/id_00003372/03_2_side"
    (found,) = pair(tmp_path, [f"{source}_2_{CANONICAL}.png"], [f"{CANONICAL}.jpg", f"{source}.jpg"]).pairs
    assert (found.reference, found.source) == (f"{CANONICAL}.jpg", source)
    for generated in ("anna/1.png", "anna/0_to_1.png"):
        assert pair(tmp_path, [generated], ["bob/1.jpg"]).unmatched == (generated,)
    for generated, reference in (("1.png", "bob/1.jpg"), ("anna/1.png", "1.jpg"), ("anna/0_to_1.png", "anna/1.jpg")):
        assert [p.reference for p in pair(tmp_path, [generated], [reference]).pairs] == [reference]


def test_a_list_of_pairs(tmp_path):
    generated = ["p1_2_p2.png", "p3_2_p2.png", "p4.png"]
    found = pair(tmp_path, generated, NAMES, [("p1.jpg", "p2.jpg"), ("p0", "p4"), ("p0", "p3")])
    assert [p.generated for p in found.pairs] == ["p1_2_p2.png", "p4.png"]
    assert found.unmatched == ("p3_2_p2.png",) and found.missing == ("p0 > p3",)
    (tmp_path / "list.csv").write_text("from,to\np0,p1\n\np2,\n")
    with pytest.raises(InputError, match=r"list\.csv: line 4 names no pair"):
        read_pairs(str(tmp_path / "list.csv"))


def test_two_files_of_one_pair(tmp_path):
    with pytest.raises(InputError, match=r"p1_2_p2\.png and p1_to_p2\.png are p1 > p2\.png twice"):
        pair(tmp_path, ["p1_2_p2.png", "p3_2_p2.png", "p1_to_p2.png"], NAMES)
    with pytest.raises(InputError, match=r"p1_2_p2\.png and p2\.png are p1 > p2 twice"):
        pair(tmp_path, ["p1_2_p2.png", "p2.png"], NAMES, [("p1", "p2")])


def test_two_files_of_one_image(tmp_path):
    with pytest.raises(InputError, match="same image twice"):
        pair(tmp_path, NAMES, ["p0.png", "p0.jpg"])
    with pytest.raises(InputError, match=r"1 image \(p1\) there in several formats"):
        pair(tmp_path / "again", ["p1.png", "p1.jpg"], NAMES)


# --------------------------------------------------------------------------------------------- protocols


def torch_resize(image, size, **how):
    x = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)[None])
    return F.interpolate(x, size, align_corners=False, **how)[0].numpy().transpose(1, 2, 0)


def test_protocols_resize_as_they_say():
    photo, size = picture(0, (110, 75)), (64, 44)
    pillow = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    square = np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    cubic = cv2.resize(photo.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    cfld, pidm, pcdm = (PROTOCOLS[name] for name in ("cfld", "pidm", "pcdm"))
    np.testing.assert_array_equal(cfld.frames(photo, "truth", size).perceptual, pillow)
    sample = torch_resize(photo, size, mode="bicubic", antialias=True).clip(0, 255).astype(np.uint8)
    difference = np.abs(cfld.frames(photo, "generated", size).similarity - sample)
    assert difference.max() <= 1 and difference.mean() < 1e-3  # a decimal at a whole level may fall either way
    found = pidm.frames(photo, "truth", size)
    np.testing.assert_array_equal(found.similarity, square)
    expected = torch_resize(square, size, mode="bilinear")
    np.testing.assert_allclose(found.perceptual, expected, atol=2e-3)
    np.testing.assert_array_equal(pcdm.frames(photo, "generated", size).similarity, cubic)
    np.testing.assert_array_equal(pcdm.frames(photo, "truth", size).similarity, pillow)  # their pngs of that size
    assert "saved beforehand" in pcdm.describe(size)["resize of reference images"]
    np.testing.assert_array_equal(PROTOCOLS["plain"].frames(photo, "truth", None).perceptual, photo)
    white = np.full((1, 1, 3), 255, np.float32)
    assert [p.lpips_input(x).max() for p in (cfld, pcdm) for x in (0 * white, white)] == [-1, 1, 0, 1]
    assert {name: p.sigma for name, p in PROTOCOLS.items()} == {"cfld": 1.5, "pidm": 1.2, "pcdm": 1.2, "plain": 1.5}


# --------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {metric: save_weights(root, metric, 1)[0] for metric in ("lpips", "fid")}


def test_a_folder_against_itself(tmp_path, weights, monkeypatch, capsys):
    """SSIM 1, PSNR inf, LPIPS 0, FID 0; none of the last two is called so, for the weights are random."""
    monkeypatch.setattr(statistics, "SIDE", 75)
    names = NAMES[:3]
    reference = folder(tmp_path / "reference", names)
    files = [f"--lpips-weights={weights['lpips']}", f"--fid-weights={weights['fid']}"]
    extra = [*files, f"--fid-reference={reference}", "--batch-size=2"]
    code, report = run(tmp_path, *extra, generated=reference)
    assert code == 0
    found = {name: value["mean"] for name, value in report["metrics"].items()}
    assert found["ssim"] == pytest.approx(1) and found["ssim_256"] == pytest.approx(1)
    assert found["psnr"] == "inf" and found["lpips_unverified_weights"] == 0
    assert abs(found["fid_unverified_weights"]) < 1e-3
    assert "lpips" not in found and "fid" not in found
    printed = capsys.readouterr().out
    assert "ssim_256 (range: the generated's)" in printed
    assert "lpips_unverified_weights" in printed and "clean_fid not computed: give --clean-fid-weights" in printed
    assert report["fid"]["fid"]["reference_count"] == 3
    assert report["weights"]["fid"]["verified"] is False and len(report["weights"]["fid"]["sha256"]) == 64
    assert "0cc3c7bd" in report["weights"]["fid"]["why_not_verified"]

    # Another evaluation with the statistics as reference. Its images differ, so its distance does.
    file = report["fid"]["fid"]["statistics"]
    folder(tmp_path / "generated", names, offset=9)
    extra[2] = f"--fid-reference={file}"
    code, report = run(tmp_path, *extra, out="second.json")
    assert code == 0 and report["fid"]["fid"]["reference"] == file
    assert report["metrics"]["fid_unverified_weights"]["mean"] > 1e-3
    assert report["metrics"]["lpips_unverified_weights"]["mean"] > 1e-3
    # Statistics prepared in another way are refused, before any work.
    capsys.readouterr()
    text = refusal(capsys, tmp_path, *extra, "--size=64x44", protocol="cfld", out="third.json")
    assert "--fid-reference" in text and "its size is own, and here it is 64x44" in text


def test_statistics_resume(tmp_path, monkeypatch):
    """Stopped by an image that cannot be read, mended, and gone on with: as if in one go."""
    monkeypatch.setattr(statistics, "FEATURES", 24)
    root = folder(tmp_path / "images", [f"{i}.png" for i in range(6)])
    images = pairing.Folder.read(str(root), flag="--x")
    calls = []

    class Net:
        metric, sha256 = "fid", "0" * 64

        @staticmethod
        def apply(batch):
            calls.append(len(batch))
            return np.tile(batch.mean((1, 2)), (1, 8))

    how = {"role": "truth", "cache": tmp_path / "cache", "batch_size": 2, "title": "x"}
    plain = PROTOCOLS["plain"]
    whole, _ = statistics.folder_statistics(images, Net, plain, None, **how | {"cache": tmp_path / "other"})
    read = statistics.read_photo
    monkeypatch.setattr(
        statistics, "read_photo", lambda p: (_ for _ in ()).throw(InputError("4.png")) if p.name == "4.png" else read(p)
    )
    with pytest.raises(InputError, match=r"4\.png"):
        statistics.folder_statistics(images, Net, plain, None, **how)
    monkeypatch.setattr(statistics, "read_photo", read)
    calls.clear()
    found, path = statistics.folder_statistics(images, Net, plain, None, **how)
    assert calls == [2] and found.count == 6  # four were done
    np.testing.assert_array_equal(found.mean, whole.mean)
    np.testing.assert_array_equal(found.scatter, whole.scatter)
    calls.clear()
    assert statistics.folder_statistics(images, Net, plain, None, **how)[1] == path and not calls


def test_protocol_and_pairs_in_the_report(tmp_path):
    folder(tmp_path / "reference", ["p0.jpg", "p1.png", "p2.png"], hw=(110, 75))
    folder(tmp_path / "generated", ["p2_2_p0_vis.png", "p1.png", "stray.png"], hw=(64, 44))
    code, report = run(tmp_path, "--size=64x44", "--allow-missing", protocol="cfld")
    assert code == 0
    assert report["protocol"]["name"] == "cfld" and "truncated" in report["protocol"]["resize of generated images"]
    assert report["pairs"]["by_rule"] == {"same name": 1, "SOURCE_2_TARGET": 1}
    assert report["pairs"]["without_reference"] == {"count": 1, "names": ["stray.png"]}
    assert report["pairs"]["not_generated"] == {"count": 1, "names": ["p2.png"]}
    assert report["generated"]["sizes"] == {"64x44": 2} and report["reference"]["formats"] == {"jpg": 1, "png": 2}
    assert report["metrics"]["psnr"]["count"] == 2 and "ssim" not in report["metrics"]
    assert set(report["not_computed"]) == {"lpips", "fid", "clean_fid", "ssim"}
    assert "alexnet-owt-7be5be79.pth" in report["not_computed"]["lpips"]


def test_regions(tmp_path):
    """Clothes are wrong in one image, everything else is right."""
    reference, generated = folder(tmp_path / "reference", NAMES), folder(tmp_path / "generated", NAMES)
    parsing = np.zeros(HW, np.uint8)
    parsing[5:15, 10:30], parsing[20:40, 10:30], parsing[50:52, 10:12] = (
        11,
        4,
        2,
    )  # face, upper clothes, too little hair
    for name in NAMES:
        write(tmp_path / "maps" / name, parsing)
    image = np.asarray(Image.open(generated / "p3.png")).copy()
    image[20:40, 10:30] //= 2
    write(generated / "p3.png", image)
    code, report = run(tmp_path, f"--parsing={tmp_path / 'maps'}", "--labels=atr18")
    assert code == 0 and set(report["regions"]) == {"face", "Upper-clothes", "clothes", "person", "background"}
    assert report["regions"]["face"]["psnr"]["mean"] == "inf"
    (row,) = (
        r for r in map(json.loads, filter(None, read_text(report["rows"]).splitlines())) if r["generated"] == "p3.png"
    )
    truth = np.asarray(Image.open(reference / "p3.png"))[20:40, 10:30]
    expected = psnr(truth // 2, truth, data_range=255)
    assert row["regions"]["Upper-clothes"][0] == pytest.approx(expected, abs=1e-9)
    assert row["regions"]["face"] == ["inf", 1.0] and row["regions"]["Upper-clothes"][1] < 0.95
    assert row["regions"]["person"][0] > expected and row["regions"]["background"][0] == "inf"


def test_references_without_a_map(tmp_path, capsys):
    """Their regions are not left out of the means in silence."""
    folder(tmp_path / "reference", NAMES), folder(tmp_path / "generated", NAMES, offset=5)
    for name in NAMES[:3]:
        write(tmp_path / "maps" / name, np.full(HW, 4, np.uint8))
    extra = [f"--parsing={tmp_path / 'maps'}", "--labels=atr18"]
    assert "no maps of 2 images (p3.png, p4.png)" in refusal(capsys, tmp_path, *extra)
    code, report = run(tmp_path, *extra, "--allow-missing")
    assert code == 0 and report["parsing"]["without_map"] == {"count": 2, "names": ["p3.png", "p4.png"]}
    assert report["regions"]["Upper-clothes"]["psnr"]["count"] == 3


def test_a_photo_that_lies_on_its_side_is_of_the_size_it_shows(tmp_path):
    exif, upright = Image.Exif(), picture(0)
    exif[0x0112] = 6
    (tmp_path / "reference").mkdir()
    lying = Image.fromarray(np.rot90(upright))
    lying.save(tmp_path / "reference" / "p0.jpg", exif=exif, quality=95, subsampling=0)
    write(tmp_path / "generated" / "p0.png", upright)
    code, report = run(tmp_path)
    assert code == 0 and report["metrics"]["psnr"]["mean"] > 25


def test_rows_resume(tmp_path, monkeypatch):
    folder(tmp_path / "reference", NAMES)
    generated = folder(tmp_path / "generated", NAMES, offset=5)
    _, first = run(tmp_path)
    rows = first["rows"]
    lines = read_text(rows).splitlines()
    with open(rows, "w") as file:  # a kill in the third line
        file.write("\n".join(lines[:3]) + "\n" + lines[3][:20])
    write(generated / "p0.png", picture(77))  # and a file that changed
    asked = []
    read = scores.Scorer.read
    monkeypatch.setattr(scores.Scorer, "read", lambda s, p, m: asked.append(p.generated) or read(s, p, m))
    _, second = run(tmp_path, "--overwrite")
    assert sorted(asked) == ["p0.png", "p2.png", "p3.png", "p4.png"]
    assert second["metrics"]["psnr"]["count"] == 5
    assert second["metrics"]["psnr"]["mean"] != first["metrics"]["psnr"]["mean"]
    fresh = run(tmp_path, f"--cache={tmp_path / 'fresh'}", "--overwrite")[1]
    for name, found in second["metrics"].items():
        assert found["mean"] == pytest.approx(fresh["metrics"][name]["mean"], rel=1e-12)


def test_bad_input_gets_one_line(tmp_path, capsys, weights):
    reference = folder(tmp_path / "reference", NAMES)
    folder(tmp_path / "generated", NAMES)
    assert "no such folder" in refusal(capsys, tmp_path, generated=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(capsys, tmp_path, generated=tmp_path / "empty")
    strange = folder(tmp_path / "strange", ["x.png"])
    assert "no generated image has a reference" in refusal(capsys, tmp_path, generated=strange)
    some = folder(tmp_path / "some", NAMES[:3])
    assert "2 images (p3.png, p4.png) not among" in refusal(capsys, tmp_path, generated=some)
    large = folder(tmp_path / "large", NAMES, hw=(66, 56))
    assert "5 of 5 pairs differ in size (p0.png is 66x56 and p0.png 64x56)" in refusal(
        capsys, tmp_path, generated=large
    )
    assert "--size is missing" in refusal(capsys, tmp_path, protocol="pidm")
    assert "plain resizes nothing" in refusal(capsys, tmp_path, "--size=64x64")
    assert "ends in .json" in refusal(capsys, tmp_path, out="report.txt")
    assert "go together" in refusal(capsys, tmp_path, "--labels=atr18")
    text = refusal(capsys, tmp_path, f"--fid-reference={reference}")
    assert "--fid-weights=FILE" in text and "inception_v3_google-0cc3c7bd.pth" in text
    text = refusal(capsys, tmp_path, f"--lpips-weights={tmp_path / 'absent.safetensors'}")
    assert "no such file" in text and "alexnet-owt-7be5be79.pth" in text
    assert "they are an AlexNet" in refusal(capsys, tmp_path, f"--fid-weights={weights['lpips']}")
    (tmp_path / "list.csv").write_text("a,b\n")
    assert "from,to" in refusal(capsys, tmp_path, f"--pairs={tmp_path / 'list.csv'}")
    whole = (reference / "p1.png").read_bytes()
    (reference / "p1.png").write_bytes(whole[: len(whole) // 2])
    assert "p1.png: not a readable image" in refusal(capsys, tmp_path)
    (reference / "p1.png").write_bytes(whole)
    assert run(tmp_path)[0] == 0
    assert "is there already" in refusal(capsys, tmp_path)


def test_converted_weights_tell_what_they_are(tmp_path, monkeypatch, capsys):
    """With the hashes of these files declared as published, the metric bears its name; a changed tensor loses it."""
    from safetensors.numpy import load_file, save_file

    from truepose_jax.evaluate import weights as module

    path, _ = save_weights(tmp_path, "lpips", 2)
    sources = module.load("lpips", str(path)).facts["made_from"]
    published = module.PUBLISHED["lpips"]
    known = {name: digest[:8] for name, digest in sources.items()}
    replaced = {**module.PUBLISHED, "lpips": module.dataclasses.replace(published, files=known)}
    monkeypatch.setattr(module, "PUBLISHED", replaced)
    assert module.load("lpips", str(path)).name == "lpips"
    tensors, metadata = load_file(path), module._metadata(path)
    tensors["features.0.bias"] = tensors["features.0.bias"] + 1
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, metadata=metadata)
    found = module.load("lpips", str(changed))
    assert found.name != "lpips" and "changed after" in found.facts["why_not_verified"]
    save_file(tensors, changed)
    assert "does not say" in module.load("lpips", str(changed)).facts["why_not_verified"]
    assert main(["weights", f"--pth={tmp_path / 'no.pth'}", f"--out={tmp_path / 'o.safetensors'}"]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "bad.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(["weights", f"--pth={tmp_path / 'bad.pth'}", f"--out={tmp_path / 'o.safetensors'}"]) == 2
    assert "not a state dict" in capsys.readouterr().err
