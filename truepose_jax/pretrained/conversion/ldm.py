"""The original single-file layout of Stable Diffusion 1.x: names, what is left out, and the configs that it lacks.

The file is a flat state dict: model.diffusion_model.* (UNet), first_stage_model.* (autoencoder), cond_stage_model.*
(text encoder), buffers of the noise schedule and perhaps EMA copies. Names are made from diffusers' (and not the other
way round), so that errors speak in the file's own.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from truepose_jax.config import Schedule, UNetConfig
from truepose_jax.pretrained.conversion.key_maps import ModelKeys, Stranger
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, TensorSource

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_FIRST_CONTEXT = f"{UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

KEYS = ModelKeys(
    title="SD1.x checkpoint in one file",
    ignored=(
        (r"cond_stage_model\..*", "the text encoder"),
        (r"model_ema\..*", "EMA copies (the weights under model.diffusion_model are taken)"),
        (
            r"betas|(sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?"
            r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor",
            "buffers of the noise schedule",
        ),
        (r"first_stage_model\.(loss|model_ema)\..*", "what the autoencoder was trained with"),
    ),
    strangers=(
        Stranger("an SDXL checkpoint (it has an added text-and-size embedding)", f"{UNET_PREFIX}label_emb.0.0.weight"),
        Stranger("an inpainting checkpoint (9 input channels)", f"{UNET_PREFIX}input_blocks.0.0.weight", 1, 9),
        Stranger("an InstructPix2Pix checkpoint (8 input channels)", f"{UNET_PREFIX}input_blocks.0.0.weight", 1, 8),
        Stranger("a depth-to-image checkpoint (5 input channels)", f"{UNET_PREFIX}input_blocks.0.0.weight", 1, 5),
        Stranger("an SD2.x checkpoint (context of width 1024, SD1.5 has 768)", _FIRST_CONTEXT, 1, 1024),
        Stranger("an SD3 checkpoint", f"{UNET_PREFIX}x_embedder.proj.weight"),
        Stranger("a ControlNet", "control_model.input_blocks.0.0.weight"),
        Stranger("a LoRA", "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"),
        Stranger("a UNet in diffusers' names; give the folder that holds unet/, vae/ and scheduler/", "conv_in.weight"),
        Stranger("an autoencoder alone", "decoder.conv_in.weight"),
        Stranger("a CLIP model", "vision_model.embeddings.class_embedding"),
    ),
)

SD15_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

SD15_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

SCHEDULE_TOLERANCE = 1e-3
"""On abar_t in [0, 1]: float16 files round by 5e-4."""

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(tensor: str, unet: UNetConfig) -> str:
    """diffusers' name -> the file's: 'conv_in.weight' -> 'model.diffusion_model.input_blocks.0.0.weight'."""
    module, leaf = tensor.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{UNET_PREFIX}{_UNET_ENDS[module]}.{leaf}"
    side, _, rest = tensor.partition(".")
    if side == "mid_block":
        kind, index, inside = rest.split(".", 2)
        slot = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        level, kind, index, inside = rest.split(".", 3)
        slot = _slot(side, int(level), kind, int(index), unet)
    if kind == "resnets":
        part, _, leaf = inside.rpartition(".")
        inside = f"{_RESNET[part]}.{leaf}"
    elif kind == "downsamplers":
        inside = inside.replace("conv.", "op.", 1)
    return f"{UNET_PREFIX}{slot}.{inside}"


def _slot(side: str, level: int, kind: str, index: int, unet: UNetConfig) -> str:
    """'input_blocks.4.1': blocks are numbered through all levels, and each holds resnet, attention, resampling."""
    layers = unet.layers_per_block
    if side == "down_blocks":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
        return f"input_blocks.{block}.{1 if kind == 'attentions' else 0}"
    if kind == "upsamplers":
        after_attention = unet.up_block_types[level] == "CrossAttnUpBlock2D"
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if after_attention else 1}"
    return f"output_blocks.{level * (layers + 1) + index}.{1 if kind == 'attentions' else 0}"


def vae_name(tensor: str, levels: int) -> str:
    """diffusers' name -> the file's; the decoder's levels are numbered from the full size there."""
    name = re.sub(r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1", tensor)
    name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d)", lambda found: f".mid.block_{int(found[1]) + 1}", name)
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    if attention:
        name = f"{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}.{attention[3]}"
    for old, new in (
        (".resnets.", ".block."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
        (".conv_norm_out.", ".norm_out."),
        (".conv_shortcut.", ".nin_shortcut."),
    ):
        name = name.replace(old, new)
    return VAE_PREFIX + name


def vae_shape(tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: the attention's matrices are 1x1 convolutions there."""
    matrix = len(shape) == 2 and ".attentions." in tensor
    return (*shape, 1, 1) if matrix else shape


def check_schedule(tensors: TensorSource, place: str) -> None:
    """Raises ConversionError where the file's own abar_t, if it has them, are not SD1.5's."""
    if "alphas_cumprod" not in tensors.infos:
        return
    found, ours = tensors.read("alphas_cumprod").astype(np.float64), Schedule().alphas_cumprod
    # not <=: NaN must not pass.
    if found.shape != ours.shape or not np.abs(found - ours).max() <= SCHEDULE_TOLERANCE:
        raise ConversionError(
            f"{place}: its noise schedule (alphas_cumprod) is not SD1.5's; a file in this layout cannot say which "
            "other it is, so convert a diffusers folder with a scheduler/"
        )
