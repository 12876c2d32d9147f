"""Pixels on their way in and out against the processors that CLIP and SD1.5 are used with.

tests/input_pipeline/annotations/test_parsing.py has one square photo against CLIP's processor; here are the crops of a whole
map and the autoencoder's ranges. Both libraries' processors are the Pillow ones: their torchvision ones resize otherwise.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPImageProcessorPil

from input_pipeline.annotations import regions
from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.batches.transforms import write_picture
from truepose_jax.sampling.image_grid import to_uint8
from truepose_jax.training.step import normalize_batch

CLIP = 1e-6
"""Tolerance on values of about -2 to 2. Measured: 2.4e-7."""


def photo(seed: int, h: int, w: int) -> np.ndarray:
    """Smooth shapes with noise, uint8 [h w 3]: bicubic interpolation overshoots at their edges."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize((w, h), Image.Resampling.NEAREST)).astype(int)
    return np.clip(smooth + rng.integers(-20, 21, (h, w, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("h,w", [(320, 208), (90, 220)])
def test_region_crops_are_what_clips_processor_makes_of_the_padded_regions(h, w):
    """Regions smaller and larger than 224, wide and tall, and the whole image: A16's white square, then the processor."""
    image, labels = photo(0, h, w), LABEL_SETS["atr18"]
    parsing = np.zeros((h, w), np.uint8)
    parsing[10 : h - 10, 20 : w - 5] = 4  # nearly all
    parsing[30:80, 40:60] = 11
    parsing[35:45, 30:90] = 14
    crops, valid, boxes = regions.region_crops(image, parsing, labels)
    ours = regions.clip_normalise(crops)
    processor = CLIPImageProcessorPil()
    assert np.flatnonzero(valid).tolist() == [4, 11, 14, 20]
    for row in np.flatnonzero(valid):
        x0, y0, x1, y1 = boxes[row]
        side = max(x1 - x0, y1 - y0)
        square = Image.new("RGB", (int(side), int(side)), "white")
        square.paste(Image.fromarray(image[y0:y1, x0:x1]), ((side - (x1 - x0)) // 2, (side - (y1 - y0)) // 2))
        expected = processor(square, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(ours[row], expected, atol=CLIP)


def test_normalisation_is_that_of_clip():
    processor = CLIPImageProcessorPil()
    np.testing.assert_array_equal(regions.CLIP_MEAN, np.float32(processor.image_mean))
    np.testing.assert_array_equal(regions.CLIP_STD, np.float32(processor.image_std))
    size = {name: processor.crop_size[name] for name in ("height", "width")}
    assert set(size.values()) == {regions.CROP_SIZE} and processor.resample == Image.Resampling.BICUBIC


EVERY = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
"""Every value that a pixel may have."""


def test_pixels_enter_the_autoencoder_as_diffusers_gives_them():
    """On the host and on the device; skeletons stay in [0, 1]."""
    expected = VaeImageProcessor(do_resize=False).preprocess(Image.fromarray(EVERY))[0].permute(1, 2, 0).numpy()
    ours = np.empty(EVERY.shape, np.float32)
    write_picture(EVERY, out=ours)
    on_device = normalize_batch({name: jnp.asarray(EVERY) for name in ("target", "target_pose")})
    for each in (ours, on_device["target"]):
        np.testing.assert_allclose(each, expected, atol=2e-7)
        assert (each.min(), each.max()) == (-1.0, 1.0)
    unscaled = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(Image.fromarray(EVERY))[0]
    np.testing.assert_allclose(on_device["target_pose"], unscaled.permute(1, 2, 0).numpy(), atol=1e-7)


def test_pixels_leave_the_autoencoder_as_diffusers_reads_them():
    """Beyond [-1, 1] too, and back to the same bytes."""
    decoded = np.linspace(-1.3, 1.3, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
    tensor = torch.from_numpy(decoded).permute(2, 0, 1)[None]
    expected = np.asarray(VaeImageProcessor().postprocess(tensor, output_type="pil")[0])
    np.testing.assert_array_equal(to_uint8(decoded), expected)
    entered = np.empty(EVERY.shape, np.float32)
    write_picture(EVERY, out=entered)
    np.testing.assert_array_equal(to_uint8(entered), EVERY)
