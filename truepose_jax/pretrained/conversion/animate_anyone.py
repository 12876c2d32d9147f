"""AnimateAnyone's UNets and pose guider, as Moore's public code saves them, and ours: ablation B2 with ControlNet's pose encoder.

    reference_unet      SourceNet, less its last norm and convolution, which nothing reads: zeros here
    denoising_unet      TargetNet; keys and values of attn2 are our fusion's
    pose_guider         the pose encoder

Each is a file of plain tensors without a prefix, .pth or .safetensors. What the motion modules add is for films and is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from truepose_jax.config import DenoiserModel, UNetConfig, to_dict
from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.export import write_files
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.plan import Plan, Shapes, Source, parameters
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, TensorSource
from truepose_jax.pretrained.conversion.truepose_names import block_of_site
from truepose_jax.pretrained.conversion.weights_folder import PARAMS_FILE

STEMS = ("reference_unet", "denoising_unet", "pose_guider")
SUFFIXES = (".safetensors", ".pth")
UNET = UNetConfig()
"""SD1.5's, which no such file says."""

KEYS = ModelKeys(
    title="AnimateAnyone network",
    ignored=((r".*pos_encoder\.pe", "a constant"),),
)
STRANGE = ".to_k_ip."
"""MCLD's, whose source is a UV texture, its pose a DensePose picture."""

SETTINGS = {
    "method": "truepose",
    "fusion": {"texture": "concat", "alignment": "global"},
    "pose_encoder": {"kind": "controlnet"},
    "positions": "none",
    "source_parsing": "none",
    "sampling": {"steps": 30, "spacing": "trailing", "guidance": 3.5},
}
SCHEDULE = {
    "betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000, "prediction": "v", "zero_snr": True,
}  # fmt: skip


def is_one(model: DenoiserModel) -> bool:
    """Whether a run's network has this form."""
    fusion = getattr(model, "fusion", None)
    if (
        fusion is None
        or model.pose_encoder != "controlnet"
        or model.source_parsing != "none"
        or model.positions != "none"
    ):
        return False
    return fusion.texture == "concat" and fusion.alignment == "global" and not model.carry.head


def place_of(path: str) -> tuple[str, str]:
    """(stem of the file, tensor's name in it) of our parameter at `path`; "" for what the files leave out."""
    network, _, inside = path.partition("/")
    if network == "source_net":
        left_out = inside.startswith(("conv_norm_out/", "conv_out/"))
        return STEMS[0], "" if left_out else key_maps.torch_name(inside)
    if network == "target_net":
        return STEMS[1], key_maps.torch_name(inside)
    if network == "fusion":
        site, _, rest = inside.partition("/")
        return STEMS[1], key_maps.torch_name(f"{block_of_site(site)}/{rest}")
    if network == "pose_encoder":
        return STEMS[2], key_maps.torch_name(inside)
    raise ConversionError(f"{path} is no parameter of AnimateAnyone's network")


def files_of(src: Path) -> dict[str, Path]:
    """{stem: its file}. Raises ConversionError."""
    found = {}
    for stem in STEMS:
        there = [src / f"{stem}{suffix}" for suffix in SUFFIXES if (src / f"{stem}{suffix}").is_file()]
        if not there:
            raise ConversionError(
                f"{src} holds no {stem}.pth or {stem}.safetensors; AnimateAnyone's files are {', '.join(STEMS)}"
            )
        found[stem] = there[0]
    return found


def plan_of(src: Path, open_file: Callable[[Path], TensorSource], shapes: Shapes, *, name: str) -> Plan:
    """The weights folder of AnimateAnyone's files, with nothing random in it. Raises ConversionError."""
    files = files_of(src)
    sources = {stem: Source(str(file), open_file(file), KEYS, {file.name: file}) for stem, file in files.items()}
    for source in sources.values():
        if any(STRANGE in tensor for tensor in source.tensors.infos):
            raise ConversionError(
                f"{source.place}: is MCLD's: its source is a UV texture, its pose a DensePose picture"
            )
    tree = shapes.truepose(UNET, SETTINGS)
    first = sources[STEMS[2]].tensors.infos.get("conv_out.weight")
    wanted = tree["pose_encoder"]["conv_out"]["kernel"].shape
    if first is not None and first.shape[1] != wanted[2]:
        raise ConversionError(
            f"{files[STEMS[2]]}: its last layer reads {first.shape[1]} channels; ControlNet's encoder reads {wanted[2]}"
        )

    def source_of(path: str) -> tuple[Source, str]:
        stem, tensor = place_of(path)
        return sources[stem], tensor

    return Plan(
        items={PARAMS_FILE: parameters(tree, source_of, lambda path: "conv_in.weight")},
        texts={},
        details={
            "method": "truepose",
            "unet": to_dict(UNET),
            "fresh": [],
            "schedule": SCHEDULE,
            "origin": {"model": "animate-anyone", "name": name, "licence": "apache-2.0"},
            "settings": SETTINGS,
        },
        notes=(
            "reference_unet's last norm and convolution are not in its file: zeros, nothing reads them",
            "around it theirs differs: pose pictures with hands and faces, CLIP of the squashed photo, a last step to abar 1",
        ),
    )


def write(dst: Path, params: Mapping[str, Any], dtype: str | None = None) -> str:
    """Writes a run's parameters as these files, .safetensors, and says so. Raises ConversionError before the first byte."""
    files = {stem: f"{stem}.safetensors" for stem in STEMS}
    return f"AnimateAnyone's files: {write_files(dst, params, place_of, files, {}, dtype)}"
