"""Style transfer: what is kept is kept, in the latent and in the picture; what is edited depends on the style; bad input."""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.parsing import label_set
from input_pipeline.schema import InputError
from tests.process import code_of
from tests.shared_data import openpose_json, standing_joints
from tests.tiny_run import shared_pipeline, shared_run, write_inputs
from tests.torch_models import tiny_vae
from truepose_jax import generate
from truepose_jax.diffusion.guidance import Branches
from truepose_jax.diffusion.samplers import ddim_levels, sample_latents
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.inference.pipeline import Pipeline, Request, fit_request
from truepose_jax.pretrained.frozen_networks import load_vae
from truepose_jax.sampling import inpainting
from truepose_jax.sampling.inpainting import Edit, EditSampler, class_mask, keep_outside, latent_mask, read_edit
from truepose_jax.sampling.sampler import Sampling

FACTOR = 4
"""Of the tiny run's pixel codec."""


pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def pipe():
    return shared_pipeline()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), hw=(32, 24))


def photo(seed: int, hw=(32, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def request(style: int, edit: Edit | None, hw=(32, 24)) -> Request:
    rows = np.repeat((np.arange(hw[0]) * 18 // hw[0])[:, None], hw[1], 1).astype(np.uint8)
    frame = hw if edit is None else edit.reference.shape[:2]
    return Request(photo(style, hw), standing_joints(*frame), rows, name="edit", edit=edit)


def box(hw, top, bottom, left, right) -> np.ndarray:
    mask = np.zeros(hw, bool)
    mask[top:bottom, left:right] = True
    return mask


def cells(mask: np.ndarray, factor: int = FACTOR) -> np.ndarray:
    """The pixels of every cell that holds a pixel of the mask, by loops."""
    found = np.zeros_like(mask)
    for i in range(0, mask.shape[0], factor):
        for j in range(0, mask.shape[1], factor):
            found[i : i + factor, j : j + factor] = mask[i : i + factor, j : j + factor].any()
    return found


# ------------------------------------------------------------------------------------------------ the sampler


def test_every_level_is_the_reference_noised_to_it():
    """amend sees x at every abar of the way, the noise and the result included, and what stands outside is Eq. 1."""
    schedule = Schedule(betas="cosine", prediction="x0")
    rng = np.random.default_rng(0)
    noise, reference = (rng.standard_normal((1, 4, 3, 2)).astype(np.float32) for _ in range(2))
    region = box((4, 3), 1, 3, 1, 2)[None, ..., None]
    amend, seen, shown = keep_outside(jnp.asarray(region), reference, noise), [], []

    def watched(x, abar):
        x = amend(x, abar)
        jax.debug.callback(lambda a, x: seen.append((float(a), np.asarray(x))), abar, x, ordered=True)
        return x

    def predict(x, t):
        jax.debug.callback(lambda x: shown.append(np.asarray(x)), x, ordered=True)
        return jnp.full_like(x, 0.25)

    found = sample_latents(predict, noise, schedule, steps=5, spacing="trailing", step_callback=watched)
    jax.effects_barrier()
    assert len(seen) == 6 and len(shown) == 5
    for (abar, x), want in zip(seen, ddim_levels(schedule, steps=5, spacing="trailing")[1], strict=True):
        assert abar == pytest.approx(want, rel=1e-6)
        expected = np.sqrt(want) * reference + np.sqrt(1 - want) * noise
        outside = ~np.broadcast_to(region, x.shape)
        np.testing.assert_allclose(x[outside], expected[outside], atol=2e-6)
    for (_, x), given in zip(seen, shown, strict=False):
        assert np.array_equal(x, given), "the network sees what amend made"
    inside = np.broadcast_to(region, found.shape)
    plain = np.asarray(
        sample_latents(lambda x, t: jnp.full_like(x, 0.25), noise, schedule, steps=5, spacing="trailing")
    )
    np.testing.assert_allclose(np.asarray(found)[inside], plain[inside], atol=2e-6)


def test_masks_are_max_pooled():
    mask = np.random.default_rng(2).random((3, 32, 24)) < 0.03
    found = np.asarray(latent_mask(jnp.asarray(mask), (8, 6)))[..., 0].repeat(FACTOR, 1).repeat(FACTOR, 2)
    assert np.array_equal(found, np.stack([cells(m) for m in mask])) and 0.1 < found.mean() < 0.9


# ------------------------------------------------------------------------------------------------ pictures


def test_outside_the_mask_nothing_changes(pipe):
    """With the pixel codec and guidance: the reference's own bytes outside the mask's cells; pasted, outside the mask. Inside,
    another style gives another picture."""
    reference, mask = photo(5), box((32, 24), 9, 22, 6, 17)
    edit = Edit(reference, mask)
    pasted = Edit(reference, mask, outside="pasted")
    requests = [request(1, edit), request(1, pasted), request(2, edit)]
    first, second, other = pipe.batch(requests, batch_size=1)  # one program for all tests here
    kept = ~cells(mask)
    assert kept.mean() > 0.4 and (cells(mask) & ~mask).any()
    assert np.array_equal(first[kept], reference[kept]) and np.array_equal(other[kept], reference[kept])
    assert np.array_equal(second[~mask], reference[~mask]) and np.array_equal(second[mask], first[mask])
    assert (first[cells(mask) & ~mask] != reference[cells(mask) & ~mask]).mean() > 0.5
    assert np.abs(first[mask].astype(int) - reference[mask]).mean() > 20
    assert np.abs(first[mask].astype(int) - other[mask]).mean() > 0.5, "the region follows the style"


@pytest.mark.slow
def test_rows_without_an_edit_come_out_as_ever(pipe):
    """Beside an edit in one batch, and by the plain program alone."""
    edit = Edit(photo(5), box((32, 24), 9, 22, 6, 17))
    _, beside = pipe.batch([request(1, edit), request(1, None)], batch_size=1)
    (alone,) = pipe.batch([request(1, None)])
    assert np.abs(beside.astype(int) - alone).max() <= 1


def test_the_picture_is_framed_as_the_reference(pipe):
    """A square reference in an upright model: its padding goes, the source's own frame does not matter."""
    reference, mask = photo(6, (60, 60)), box((60, 60), 0, 30, 0, 60)
    fitted = fit_request(request(1, Edit(reference, mask)), (32, 24))
    assert fitted.framing.box == (0, 4, 24, 28) and not fitted.edit.mask[:4].any() and fitted.edit.mask[4:16].all()
    assert fitted.joints[fitted.joints[:, 2] > 0, 1].min() > 4
    (picture,) = pipe.sample([fitted])
    assert picture.shape == (24, 24, 3)
    assert np.array_equal(picture[12:], fitted.edit.reference[16:28])
    shown = inpainting.sheet_columns(fitted.source.image, fitted.skeleton, fitted.edit, picture)
    assert [cell[0].shape for cell in shown.values()] == [(32, 24, 3)] * 5


class Constant:
    """A method that predicts one latent and gives latents: what the sampler and the codec do, without a network."""

    def __init__(self, autoencoder, channels: int = 4):
        self.autoencoder, self.channels = autoencoder, channels

    def condition(self, params, frozen, batch):
        return None

    def branches(self, conditioning, scale):
        return Branches(conditioning)

    def sample_spec(self, batch):
        h, w = batch["target"].shape[1:3]
        return h // 8, w // 8, self.channels

    def denoise(self, params, x, t, conditioning):
        return jnp.full_like(x, 0.5)

    def encode(self, frozen, images):
        return self.autoencoder.encode_mean(frozen.get("autoencoder"), images)

    def decode(self, frozen, latents):
        return latents


@functools.cache
def with_vae():
    """(reference, mask, its latents, the sampled ones, decode) with a VAE, the upper eighth edited."""
    with tempfile.TemporaryDirectory() as folder:
        autoencoder, vae, _ = load_vae(str(tiny_vae(pathlib.Path(folder))))
    reference, mask = photo(7, (128, 64)), box((128, 64), 0, 16, 0, 64)
    batch = {
        "target": jnp.asarray(reference[None] / np.float32(127.5) - 1),
        "target_pose": jnp.zeros((1, 128, 64, 3)),
        inpainting.MASK_FIELD: jnp.asarray(mask[None]),
    }
    sampler = EditSampler(Constant(autoencoder), Schedule(prediction="x0"), "trailing", Sampling(2, 1.0))

    @jax.jit
    def both(vae, batch, keys):
        return autoencoder.encode_mean(vae, batch["target"]), sampler.sample({}, {"autoencoder": vae}, batch, keys)

    found = jax.device_get(both(vae, batch, jax.random.split(jax.random.key(0), 1)))
    return reference, mask, *found, jax.jit(lambda z: jnp.clip(autoencoder.decode(vae, z), -1, 1))


def test_with_a_vae_the_latent_outside_is_kept():
    """Bit for bit; and pasted, the picture outside is the reference's whatever the decoder does."""
    reference, mask, encoded, latents, _ = with_vae()
    assert np.array_equal(latents[0, 2:], encoded[0, 2:])
    assert np.abs(latents[0, :2] - encoded[0, :2]).min() > 1e-4
    made = photo(8, (128, 64))
    finished = inpainting.FittedEdit.fit(Edit(reference, mask, "pasted"), (128, 64), "x").finish(made)
    assert np.array_equal(finished[16:], reference[16:]) and np.array_equal(finished[:16], made[:16])


@pytest.mark.slow
def test_a_vae_mixes_less_with_distance():
    """Norms and attention of the decoder see the whole picture, so nothing stays exactly; a small edit moves what is near
    by more than what is far."""
    _, _, encoded, latents, decode = with_vae()
    slightly = encoded + 0.01 * (latents - encoded)
    apart = np.abs(np.asarray(decode(slightly)) - np.asarray(decode(encoded)))[0].mean(axis=(1, 2))
    assert 0 < apart[96:].mean() < apart[16:32].mean() < apart[:16].mean()


def test_a_method_of_other_latents_says_so():
    class Canvas:
        factor = 8
        encode_mean = staticmethod(lambda params, images: jnp.zeros((1, 4, 3, 12)))

    batch = {"target": jnp.zeros((1, 32, 24, 3)), "target_pose": jnp.zeros((1, 32, 24, 3))}
    sampler = EditSampler(Constant(Canvas()), Schedule(), "leading", Sampling(2, 1.0))
    with pytest.raises(ValueError, match="cannot edit"):
        sampler.sample({}, {}, batch, jax.random.split(jax.random.key(0), 1))


# ------------------------------------------------------------------------------------------------ masks and files


def test_masks_of_classes_and_of_files(inputs):
    atr = label_set("atr18")
    parsing = np.array([[4, 7, 0], [11, 7, 4]], np.uint8)
    assert np.array_equal(class_mask(parsing, atr, "upper-clothes, Dress"), [[1, 1, 0], [0, 1, 1]])
    with pytest.raises(InputError, match=r"atr18 has no class 'Coat'; choose from Background, Hat"):
        class_mask(parsing, atr, "Coat")
    grey = np.full((32, 24), 127, np.uint8)
    grey[3:5] = 128
    Image.fromarray(grey).save(inputs / "grey.png")
    edit = read_edit(str(inputs / "0.png"), str(inputs / "grey.png"))
    assert np.array_equal(edit.mask, grey > 127) and edit.outside == "decoded"
    # White paint on a transparent layer, as drawing programs save it, whatever lies under its transparent pixels.
    layer = np.full((32, 24, 4), 255, np.uint8)
    layer[..., 3] = np.where(grey > 127, 255, 0)
    Image.fromarray(layer).save(inputs / "layer.png")
    assert np.array_equal(read_edit(str(inputs / "0.png"), str(inputs / "layer.png")).mask, grey > 127)
    of_classes = read_edit(str(inputs / "0.png"), "Dress", parsing=str(inputs / "0_map.png"), labels="atr18")
    assert np.array_equal(of_classes.mask, np.asarray(Image.open(inputs / "0_map.png")) == 7)


def flags_of(inputs, place, /, **changes) -> list[str]:
    flags = {
        "workdir": shared_run(),
        "source": inputs / "0.png",
        "parsing": inputs / "0_map.png",
        "labels": "atr18",
        "reference": inputs / "1.png",
        "edit-mask": "Upper-clothes,Dress",
        "reference-parsing": inputs / "1_map.png",
        "pose": inputs / "1.json",
        "out": place,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


run = functools.partial(code_of, generate.main)


def test_the_program_makes_the_picture_of_the_api(inputs, tmp_path, monkeypatch, pipe):
    """Its pose frame is the reference's size, unless told otherwise."""
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)
    out, sheet = tmp_path / "out.png", tmp_path / "sheet.png"
    assert run(*flags_of(inputs, out, sheet=sheet, outside="pasted")) == 0
    photos = [np.asarray(Image.open(inputs / f"{i}.png")) for i in range(2)]
    maps = [np.asarray(Image.open(inputs / f"{i}_map.png")) for i in range(2)]
    joints = np.array(json.loads((inputs / "1.json").read_text())["people"][0]["pose_keypoints_2d"]).reshape(18, 3)
    mask = (maps[1] == 4) | (maps[1] == 7)
    made = pipe(photos[0], maps[0], joints, name="0.png > 1.json", edit=Edit(photos[1], mask, "pasted"))
    found = np.asarray(Image.open(out))
    assert np.abs(found.astype(int) - made).max() <= 1 and np.array_equal(found[~mask], photos[1][~mask])
    assert np.asarray(Image.open(sheet)).shape[1] > 5 * 24 * 4


BAD = {
    "mask of another size": ({"edit_mask": "INPUTS/large.png"}, "the edit mask is 40x30 but the reference is 32x24"),
    "black mask": ({"edit_mask": "INPUTS/black.png"}, "no pixel is lighter than 127"),
    "no such mask": ({"edit_mask": "/absent.png"}, "/absent.png"),
    "class that is not there": ({"edit_mask": "Scarf", "reference_parsing": "INPUTS/dress.png"}, "holds no pixel of Scarf"),
    "unknown class": ({"edit_mask": "Coat"}, "atr18 has no class 'Coat'"),
    "classes without a map": ({"reference_parsing": None}, "--reference-parsing is missing"),
    "classes without labels": ({"labels": None, "parsing": "none"}, "--reference-labels is missing"),
    "no mask": ({"edit_mask": None}, "--edit-mask is missing (the region of --reference"),
    "no reference": ({"reference": None}, "--reference is missing (the photo"),
    "no pose": ({"pose": None}, "--pose is missing (the reference's own pose)"),
    "pose without joints": ({"pose": "INPUTS/none.json"}, "no joint"),
    "no such reference": ({"reference": "/absent.png"}, "cannot read the photo"),
    "map of another photo": ({"reference_parsing": "INPUTS/large.png"}, "the map is 40x30 but its photo is 32x24"),
    "unknown outside": ({"outside": "kept"}, "invalid choice"),
    "lists": ({"pairs": "list.csv", "source": None, "parsing": None, "pose": None, "out": None}, "--reference is for one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, inputs, tmp_path, refuses, monkeypatch):
    _bad_files(inputs)
    monkeypatch.setattr(Pipeline, "of_run", None)  # before any long work
    changes, words = BAD[case]
    changes = {k: v if v is None else str(v).replace("INPUTS", str(inputs)) for k, v in changes.items()}
    refuses(words, generate.main, *flags_of(inputs, tmp_path / "out.png", **changes))


@functools.cache
def _bad_files(inputs):
    Image.fromarray(np.full((40, 30), 255, np.uint8)).save(inputs / "large.png")
    Image.fromarray(np.full((32, 24), 1, np.uint8)).save(inputs / "black.png")
    Image.fromarray(np.full((32, 24), 7, np.uint8)).save(inputs / "dress.png")
    (inputs / "none.json").write_text(openpose_json(np.zeros((18, 3))))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(photo(0), np.zeros((32, 24), bool)), "the edit mask is empty"),
        (Edit(photo(0), np.zeros((30, 24), bool)), "is 30x24 but the reference is 32x24"),
        (Edit(photo(0), np.zeros((32, 24), np.uint8)), "bool [h w]"),
        (Edit(photo(0).astype(np.float32), np.ones((32, 24), bool)), "uint8 [h w 3]"),
        (Edit(photo(0), np.ones((32, 24), bool), outside="kept"), "outside is 'kept'"),
        (Edit(photo(0, (320, 240)), box((320, 240), 4, 5, 4, 5)), "empty at the model's 32x24"),
    ],
)
def test_edits_that_cannot_be(edit, words):
    with pytest.raises(InputError) as caught:
        fit_request(request(1, edit), (32, 24))
    assert words in str(caught.value)
