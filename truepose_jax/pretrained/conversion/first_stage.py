"""FPDM's first stage as a folder that config.model.ipf.path takes: CLIP as transformers opens it, and the combiner beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truepose_jax.config import FirstStageModel, to_dict
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import write_files
from truepose_jax.pretrained.conversion.weights_folder import CLIP_FOLDER

COMBINER_FILE = "combiner.safetensors"
SETTINGS_FILE = "ipf.json"


def clip_config(clip: Any) -> str:
    """config.json of the tower that a CLIPVisionConfig tells."""
    kind = {"model_type": "clip_vision_model", "architectures": [key_maps.CLIP_VISION.title]}
    return json.dumps(to_dict(clip) | kind, indent=2) + "\n"


def write_first_stage(
    dst: Path, params: Mapping[str, Any], *, model: FirstStageModel, run: Mapping[str, Any], dtype: str | None = None
) -> str:
    """Writes the folder `dst`, which must not exist or be empty, and says what is in it. dtype: see export.write_export. Raises
    ConversionError before the first byte."""
    files = {"clip": f"{CLIP_FOLDER}/model.safetensors", "combiner": COMBINER_FILE}
    about = json.dumps({"method": model.method, "run": dict(run)}, indent=2) + "\n"
    texts = {f"{CLIP_FOLDER}/config.json": clip_config(model.clip), SETTINGS_FILE: about}

    def place_of(path: str) -> tuple[str, str]:
        network, _, inside = path.partition("/")
        return network, key_maps.torch_name(inside)

    return f"the first stage, for config.model.ipf.path: {write_files(dst, params, place_of, files, texts, dtype)}"
