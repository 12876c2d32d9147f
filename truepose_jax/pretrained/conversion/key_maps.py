"""How our parameters and PyTorch's tensors correspond: one rule for names and layouts, small tables.

Our paths mirror PyTorch's dotted names, so that a path alone tells the tensor:
`down_blocks_0/attentions_1/proj_in/kernel` is `down_blocks.0.attentions.1.proj_in.weight`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

LISTS = frozenset(
    {
        "down_blocks",
        "up_blocks",
        "resnets",
        "attentions",
        "transformer_blocks",
        "downsamplers",
        "upsamplers",
        "to_out",
        "net",
        "layers",
        "layer",
        "blocks",
        "motion_modules",
        "attention_blocks",
        "norms",
        "dynamic_scalar",
    }
)
"""Modules that are lists in PyTorch: `net_2` is `net.2`, while `linear_1` is a name."""

_INDEXED = re.compile(r"(.+)_(\d+)")
_WEIGHTS = frozenset({"kernel", "scale", "embedding"})

# Axes of our kernel in PyTorch's order. Convolution: HWIO -> OIHW; dense: [in, out] -> [out, in].
_KERNEL_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}
_KERNEL_AXES_BACK = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}


def torch_name(path: str) -> str:
    """PyTorch's name of the parameter at `path`: 'ff/net_0/proj/kernel' -> 'ff.net.0.proj.weight'."""
    *modules, leaf = path.split("/")
    parts = []
    for module in modules:
        indexed = _INDEXED.fullmatch(module)
        parts += indexed.groups() if indexed and indexed[1] in LISTS else (module,)
    return ".".join([*parts, "weight" if leaf in _WEIGHTS else leaf])


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of our parameter at `path` of `shape`."""
    return tuple(shape[axis] for axis in _axes(path, len(shape), _KERNEL_AXES))


def torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Our array as PyTorch lays it out (a view)."""
    return array.transpose(_axes(path, array.ndim, _KERNEL_AXES))


def our_layout(path: str, array: np.ndarray) -> np.ndarray:
    """PyTorch's array as we lay it out (a view)."""
    return array.transpose(_axes(path, array.ndim, _KERNEL_AXES_BACK))


def _axes(path: str, ndim: int, table: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    if path.rsplit("/", 1)[-1] != "kernel":
        return tuple(range(ndim))
    if ndim not in table:
        raise ValueError(f"{path}: a kernel of {ndim} axes has no PyTorch layout here")
    return table[ndim]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a/b/kernel', leaf) of a nested mapping, in its order."""
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path, value


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = value
    return tree


_WRAPPERS = re.compile(r"(_orig_mod\.|module\.)*")


def wrapping(name: str) -> str:
    """The part of a tensor's name that torch.compile (_orig_mod.) and DataParallel (module.) have put before it; often ""."""
    return _WRAPPERS.match(name)[0]


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """What a kind of PyTorch model needs beyond the rule.

    aliases: (regex, replacement) on tensor names, first match wins: other spellings of the canonical name.
    ignored: (regex, reason) of tensors that are left out on purpose.
    strangers: how to recognise and name a model that is not ours.
    """

    title: str
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    strangers: tuple[Stranger, ...] = ()

    def canonical(self, name: str) -> str:
        name = name[len(wrapping(name)) :]
        for pattern, replacement in self.aliases:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        return name

    def reason_to_ignore(self, name: str) -> str | None:
        name = name[len(wrapping(name)) :]
        return next((reason for pattern, reason in self.ignored if re.fullmatch(pattern, name)), None)

    def recognise(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The name of the stranger that tensors of these names and shapes are, or None."""
        return next((s.what for s in self.strangers if s.matches(shapes)), None)


@dataclasses.dataclass(frozen=True)
class Stranger:
    """A model of another kind: it has a tensor `name`, with `size` along `axis` where that is given."""

    what: str
    name: str
    axis: int | None = None
    size: int | None = None

    def matches(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if self.name not in shapes:
            return False
        shape = shapes[self.name]
        return self.axis is None or (self.axis < len(shape) and shape[self.axis] == self.size)


FIRST_CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"

UNET = ModelKeys(
    title="UNet2DConditionModel",
    strangers=(
        Stranger("an SDXL UNet (it has an added text-and-size embedding)", "add_embedding.linear_1.weight"),
        Stranger("an inpainting UNet (9 input channels)", "conv_in.weight", 1, 9),
        Stranger("an InstructPix2Pix or image-variation UNet (8 input channels)", "conv_in.weight", 1, 8),
        Stranger("an SD2.x UNet (context of width 1024, SD1.5 has 768)", FIRST_CONTEXT, 1, 1024),
        Stranger("an autoencoder", "quant_conv.weight"),
        Stranger("a CLIP model", "vision_model.embeddings.class_embedding"),
        Stranger("an original LDM checkpoint (single file)", "model.diffusion_model.input_blocks.0.0.weight"),
    ),
)

VAE = ModelKeys(
    title="AutoencoderKL",
    # Files written by diffusers < 0.14, SD1.5's among them.
    aliases=tuple(
        (rf"^((?:en|de)coder\.mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    ),
    strangers=(
        Stranger("a UNet", "time_embedding.linear_1.weight"),
        Stranger("a CLIP model", "vision_model.embeddings.class_embedding"),
        Stranger("an original LDM checkpoint (single file)", "first_stage_model.quant_conv.weight"),
        Stranger("a 16-channel autoencoder (SD3, Flux)", "decoder.conv_in.weight", 1, 16),
    ),
)

CLIP_VISION = ModelKeys(
    title="CLIPVisionModelWithProjection",
    ignored=(
        (r"(vision|text)_model\.embeddings\.position_ids", "a buffer: 0, 1, 2, ..."),
        (r"text_model\..*|text_projection\.weight|logit_scale", "CLIP's text side"),
    ),
    strangers=(
        Stranger("a UNet", "time_embedding.linear_1.weight"),
        Stranger("an autoencoder", "quant_conv.weight"),
        Stranger("an original OpenAI CLIP file", "visual.class_embedding"),
    ),
)

DINOV2 = ModelKeys(
    title="Dinov2Model",
    # transformers from 5 on; its gated layers have names of their own, which save_pretrained turns back.
    aliases=(
        (r"^(encoder\.layer\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
        (r"^(encoder\.layer\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
        (r"^(encoder\.layer\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
        (r"^(encoder\.layer\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
    ),
    ignored=((r"embeddings\.mask_token", "the token of masked training"),),
    strangers=(
        Stranger("a DINOv2 with registers", "embeddings.register_tokens"),
        Stranger("a CLIP model", "vision_model.embeddings.class_embedding"),
        Stranger("a state_dict that has to be saved by save_pretrained", "encoder.layer.0.mlp.gate_proj.weight"),
    ),
)

COMBINER = ModelKeys(title="combiner of FPDM's first stage")
