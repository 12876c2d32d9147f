"""FPDM's first stage as a folder that config.model.ipf.path takes: CLIP as transformers opens it, and the combiner beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truepose_jax.config import FirstStageModel, to_dict
from truepose_jax.pretrained.conversion import to_torch
from truepose_jax.pretrained.conversion.key_maps import CLIP_VISION
from truepose_jax.pretrained.conversion.safetensors_io import write_safetensors
from truepose_jax.pretrained.conversion.weights_folder import CLIP_FOLDER, check_destination, new_folder

COMBINER_FILE = "combiner.safetensors"
SETTINGS_FILE = "ipf.json"


def clip_config(clip: Any) -> str:
    """config.json of the tower that a CLIPVisionConfig tells."""
    kind = {"model_type": "clip_vision_model", "architectures": [CLIP_VISION.title]}
    return json.dumps(to_dict(clip) | kind, indent=2) + "\n"


def write_first_stage(
    dst: Path, params: Mapping[str, Any], *, model: FirstStageModel, run: Mapping[str, Any], dtype: str | None = None
) -> str:
    """Writes the folder `dst`, which must not exist or be empty, and says what is in it. dtype: see export.write_export. Raises
    ConversionError before the first byte."""
    files = {f"{CLIP_FOLDER}/model.safetensors": params["clip"], COMBINER_FILE: params["combiner"]}
    infos = {file: to_torch.infos(tree, dtype) for file, tree in files.items()}
    size = sum(info.dtype.itemsize * math.prod(info.shape) for found in infos.values() for info in found.values())
    check_destination(dst, size)
    about = {"method": model.method, "run": dict(run)}
    with new_folder(dst, size) as partial:
        (partial / CLIP_FOLDER).mkdir()
        (partial / CLIP_FOLDER / "config.json").write_text(clip_config(model.clip))
        (partial / SETTINGS_FILE).write_text(json.dumps(about, indent=2) + "\n")
        for file, tree in files.items():
            write_safetensors(partial / file, infos[file], to_torch.stream(tree, dtype))
    return f"{dst}: the first stage, for config.model.ipf.path; {len(infos[COMBINER_FILE])} tensors beside CLIP's"
