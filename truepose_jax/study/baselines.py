"""Self-attention of the encoders that other methods see the source through: CLIP's vision tower and DINOv2.

Of the last layer: the softmax of the [CLS] query, averaged over heads, on the patches (what [CLS] pays to itself and to register
tokens is left out and the rest scaled to sum 1). Every photo is stretched to the encoder's square, so that each patch holds
photo; its parsing map is stretched with it. Behind the [torch] extra.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline.annotations.photo import one_line
from input_pipeline.files import read_json
from input_pipeline.schema import InputError
from truepose_jax.pretrained.frozen_networks import files_sha256
from truepose_jax.runtime.cli import install

NAMES = {"clip": "CLIP", "dino": "DINOv2"}
CLASSES = {
    "clip_vision_model": "CLIPVisionModel",
    "clip": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
"""model_type of config.json -> class of transformers."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """An encoder in evaluation mode. side: of its square input, in pixels. skip: tokens before the patches. sha256: of its
    weights. untrained: its norms still have the values they are made with."""

    name: str
    folder: str
    model: Any
    side: int
    patch: int
    skip: int
    mean: np.ndarray
    std: np.ndarray
    sha256: str
    untrained: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.side // self.patch, self.side // self.patch

    def mass(self, photo: np.ndarray) -> np.ndarray:
        """Attention on each patch, float32 [rows * columns], for a photo uint8 [h w 3]."""
        import torch

        side = self.grid[0] * self.patch
        square = Image.fromarray(photo).resize((side, side), Image.Resampling.BICUBIC)
        pixels = (np.asarray(square, np.float32) / 255 - self.mean) / self.std
        with torch.no_grad():
            out = self.model(
                pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)),
                output_attentions=True,
            )
        on_patches = out.attentions[-1][0, :, 0, self.skip :].mean(0).double().numpy()
        return (on_patches / on_patches.sum()).astype(np.float32)


def load_baseline(flag: str, folder: str) -> Baseline:
    """flag: "clip" or "dino". Raises InputError where torch or transformers is missing and for a folder that does not serve."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"--{flag} needs PyTorch and transformers ({error}): {install('torch')}") from error
    place = pathlib.Path(folder)
    config, processor = (_read(flag, place, name) for name in ("config.json", "preprocessor_config.json"))
    kind = str(config.get("model_type"))
    wanted = "CLIP" if kind.startswith("clip") else "DINOv2"
    if kind not in CLASSES or wanted != NAMES[flag]:
        raise InputError(f"--{flag}={folder}: holds a model of type {kind!r}; give one of {NAMES[flag]}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        # "eager": the other implementations do not give their weights
        model, report = getattr(transformers, CLASSES[kind]).from_pretrained(
            folder, attn_implementation="eager", use_safetensors=True, output_loading_info=True, local_files_only=True
        )
        side = model.config.image_size
        if wanted == "DINOv2":  # whose positions are interpolated; CLIP's are for one size
            size = processor.get("crop_size") or side
            side = size["height"] if isinstance(size, dict) else size
        mean, std = (np.asarray(processor[name], np.float32) for name in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"--{flag}={folder}: transformers cannot load it ({one_line(error)})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"--{flag}={folder}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    return Baseline(
        NAMES[flag],
        folder,
        model.eval(),
        side,
        model.config.patch_size,
        1 + getattr(model.config, "num_register_tokens", 0),
        mean,
        std,
        files_sha256(place),
        _untrained(model),
    )


def _read(flag: str, place: pathlib.Path, name: str) -> dict[str, Any]:
    advice = f"--{flag} is a folder of transformers with config.json, preprocessor_config.json and safetensors"
    return read_json(place / name, advice=advice)


def _untrained(model: Any) -> bool:
    """No training leaves every scale of a norm at exactly 1."""
    scales = [p for name, p in model.named_parameters() if "norm" in name and name.endswith("weight")]
    return bool(scales) and all(bool((p == 1).all()) for p in scales)
